use super::{Expected, Layout};
use crate::guestdisk::{Fs, GuestDisk, MIB, Part, Table};
use std::os::unix::fs::FileExt;

pub const LAYOUT: Layout = Layout {
    shows: "The copy of the table at the end of the disk is used.",
    mib: 64,
    build: |disk, mnt| {
        let made = GuestDisk::create(disk, Table::Gpt, &[Part::fs(40 * MIB, Fs::Ext4, "root")])?;
        let mounted = made.mount(1, mnt)?;
        std::fs::write(mounted.path().join("note"), "kept\n")?;
        mounted.close()?;
        std::fs::File::options()
            .write(true)
            .open(disk)?
            .write_all_at(&[0; 512], 512)?;
        Ok(())
    },
    expected: Expected::Back(&[("note", "kept\n")]),
};
