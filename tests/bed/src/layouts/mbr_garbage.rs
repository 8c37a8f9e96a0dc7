use super::{Expected, Layout};
use std::os::unix::fs::FileExt;

pub const LAYOUT: Layout = Layout {
    shows: "A table of which no entry makes sense.",
    mib: 16,
    build: |disk, _| {
        let mut sector = [0xff; 512];
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        std::fs::File::options()
            .write(true)
            .open(disk)?
            .write_all_at(&sector, 0)?;
        Ok(())
    },
    expected: Expected::Says("GS-"),
};
