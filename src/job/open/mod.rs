//! From snapshots to one tree: tables, guest LVM, mapping, mounting. Undone in reverse.

mod contents;
mod guest;
mod how;
mod identity;
mod losses;
mod mapped;
mod survey;

pub(super) use guest::{OpenGuest, OwnFile};
pub(super) use how::How;
pub(super) use identity::Disks;
pub(super) use mapped::MappedVolume;
pub(super) use survey::open;
