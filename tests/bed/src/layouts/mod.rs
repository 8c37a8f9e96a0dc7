//! Layouts of disks, one file each: what it shows, how to build it, what must come back or which code must be said.
//! `scenarios/layouts.rs` saves all of them in one job. A new one is one small file and its line in [`ALL`].

use crate::Result;
use std::path::Path;

mod blank;
mod gpt_4096;
mod gpt_first_header_gone;
mod mbr_garbage;
mod mbr_logical;
mod mbr_sector_63;
mod superblock_gone;
mod swap_alone;
mod whole_btrfs;
mod whole_cut_off;
mod whole_ext4;
mod whole_xfs;

macro_rules! all {
    ($($name:ident)*) => { &[$((stringify!($name), $name::LAYOUT)),*] };
}

/// All layouts; the guest has the file's name.
pub const ALL: &[(&str, Layout)] = all! {
    blank
    gpt_4096
    gpt_first_header_gone
    mbr_garbage
    mbr_logical
    mbr_sector_63
    superblock_gone
    swap_alone
    whole_btrfs
    whole_cut_off
    whole_ext4
    whole_xfs
};

/// A disk.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// For messages: a sentence on what it shows.
    pub shows: &'static str,
    /// Size of the empty disk that `build` gets, in MiB.
    pub mib: u64,
    /// Makes it, on an image file or a block device; the folder is for mounts.
    pub build: fn(disk: &Path, mnt: &Path) -> Result,
    pub expected: Expected,
}

/// The end of a backup.
#[derive(Clone, Copy, Debug)]
pub enum Expected {
    /// Without any error, and these files are restored: path and content.
    Back(&'static [(&'static str, &'static str)]),
    /// A line of the job log on this guest holds the text.
    Says(&'static str),
}
