use super::{Expected, Layout};
use crate::guestdisk::{Fs, GuestDisk, MIB, Part, Table};

pub const LAYOUT: Layout = Layout {
    shows: "A filesystem without a table.",
    mib: 32,
    build: |disk, mnt| {
        let made = GuestDisk::create(disk, Table::Whole, &[Part::fs(32 * MIB, Fs::Ext4, "root")])?;
        let mounted = made.mount(1, mnt)?;
        std::fs::write(mounted.path().join("note"), "kept\n")?;
        mounted.close()
    },
    expected: Expected::Back(&[("note", "kept\n")]),
};
