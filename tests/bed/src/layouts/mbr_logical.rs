use super::{Expected, Layout};
use crate::guestdisk::{Fs, GuestDisk, MIB, Part, Table};

pub const LAYOUT: Layout = Layout {
    shows: "The only filesystem is in a logical partition.",
    mib: 64,
    build: |disk, mnt| {
        let made = GuestDisk::create(
            disk,
            Table::Mbr,
            &[Part::fs(40 * MIB, Fs::Ext4, "root").logical()],
        )?;
        let mounted = made.mount(5, mnt)?;
        std::fs::write(mounted.path().join("note"), "kept\n")?;
        mounted.close()
    },
    expected: Expected::Back(&[("note", "kept\n")]),
};
