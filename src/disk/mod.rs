//! What is inside a disk: partition tables and guest LVM, read as bytes; and a volume as a block
//! device.
//!
//! The parsers are pure and bounded: the guest owns every byte. The host's LVM never sees a guest.
//!
//! * [`read`]: bytes at an offset, whatever holds them
//! * [`table`]: MBR and GPT
//! * [`lvm2`]: volume groups of the guest
//! * [`layout`]: a volume as extents of disks, and reading it without a device
//! * [`examine`](examine()): all of it for the disks of one guest
//! * [`map`](mod@map): a volume as a block device
#![forbid(unsafe_code)]

pub mod examine;
pub mod layout;
mod le;
pub mod lvm2;
pub mod map;
pub mod read;
#[cfg(test)]
mod robustness;
pub mod table;

pub use examine::{DiskReport, Examined, Skipped, SkippedKind, Volume, VolumeKind, examine};
pub use layout::{Extent, Layout, Segment, ThinPool, VolumeReader};
pub use map::{DmName, Mapped, Namer, map};
pub use read::{FileDisk, ReadAt};
pub use table::Damage;
