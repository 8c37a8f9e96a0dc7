use super::{Expected, Layout};
use crate::guestdisk::{Fs, GuestDisk, MIB, Part, Table};

pub const LAYOUT: Layout = Layout {
    shows: "The partition of old installers, which is on no border of 4096 bytes.",
    mib: 64,
    build: |disk, mnt| {
        let made = GuestDisk::create(
            disk,
            Table::Mbr,
            &[Part::fs(40 * MIB, Fs::Ext3, "root").at(63)],
        )?;
        let mounted = made.mount(1, mnt)?;
        std::fs::write(mounted.path().join("note"), "kept\n")?;
        mounted.close()
    },
    expected: Expected::Back(&[("note", "kept\n")]),
};
