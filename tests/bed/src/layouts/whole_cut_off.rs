use super::{Expected, Layout};
use crate::cmd;
use crate::guestdisk::MIB;

pub const LAYOUT: Layout = Layout {
    shows: "A disk that is shorter than its filesystem.",
    mib: 64,
    build: |disk, _| {
        let file = disk.display().to_string();
        cmd::run("mkfs.ext4", ["-q", "-F", &file])?;
        std::fs::File::options()
            .write(true)
            .open(disk)?
            .set_len(32 * MIB)?;
        Ok(())
    },
    expected: Expected::Says("GS-"),
};
