use super::{Expected, Layout};
use crate::guestdisk::{Fs, GuestDisk, MIB, Part, Table};

pub const LAYOUT: Layout = Layout {
    shows: "A filesystem without a table.",
    mib: 128,
    build: |disk, mnt| {
        let made = GuestDisk::create(
            disk,
            Table::Whole,
            &[Part::fs(128 * MIB, Fs::Btrfs, "root")],
        )?;
        let mounted = made.mount(1, mnt)?;
        std::fs::write(mounted.path().join("note"), "kept\n")?;
        mounted.close()
    },
    expected: Expected::Back(&[("note", "kept\n")]),
};
