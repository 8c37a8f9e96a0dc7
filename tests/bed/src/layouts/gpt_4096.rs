use super::{Expected, Layout};
use crate::guestdisk::{Fs, GuestDisk, MIB, Part, Table};

pub const LAYOUT: Layout = Layout {
    shows: "A table of a guest with sectors of 4096 bytes.",
    mib: 64,
    build: |disk, mnt| {
        let made = GuestDisk::create(
            disk,
            Table::Gpt4096,
            &[Part::fs(40 * MIB, Fs::Ext4, "root")],
        )?;
        let mounted = made.mount(1, mnt)?;
        std::fs::write(mounted.path().join("note"), "kept\n")?;
        mounted.close()
    },
    expected: Expected::Back(&[("note", "kept\n")]),
};
