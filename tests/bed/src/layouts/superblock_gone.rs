use super::{Expected, Layout};
use crate::guestdisk::{Fs, GuestDisk, MIB, Part, Table};
use std::os::unix::fs::FileExt;

pub const LAYOUT: Layout = Layout {
    shows: "An ext4 whose superblock is overwritten.",
    mib: 64,
    build: |disk, _| {
        let made = GuestDisk::create(disk, Table::Mbr, &[Part::fs(40 * MIB, Fs::Ext4, "root")])?;
        std::fs::File::options()
            .write(true)
            .open(disk)?
            .write_all_at(&[0xff; 4096], made.part(1)?.offset)?;
        Ok(())
    },
    expected: Expected::Says("GS-"),
};
