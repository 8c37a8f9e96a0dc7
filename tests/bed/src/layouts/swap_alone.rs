use super::{Expected, Layout};
use crate::guestdisk::{Content, GuestDisk, MIB, Part, Table};

pub const LAYOUT: Layout = Layout {
    shows: "A disk with swap space alone holds no files.",
    mib: 32,
    build: |disk, _| {
        GuestDisk::create(disk, Table::Mbr, &[Part::new(16 * MIB, Content::Swap)])?;
        Ok(())
    },
    expected: Expected::Says("its disks hold no files"),
};
