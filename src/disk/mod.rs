//! Disk contents: partition tables and guest LVM, parsed from bytes; volumes as block devices.
//!
//! The guest controls every byte, so the parsers are pure and bounded. The host's LVM never sees a
//! guest.
//!
//! * [`read`]: reads at an offset from any source
//! * [`table`]: MBR and GPT
//! * [`lvm2`]: volume groups of the guest
//! * [`thin`]: thin volumes of the guest
//! * [`layout`]: a volume as disk extents, read without a device
//! * [`volume`]: volumes of the guest, and skipped ones
//! * [`examine`](examine()): all of the above for the disks of one guest
//! * [`map`](mod@map): a volume as a block device
#![forbid(unsafe_code)]

pub mod examine;
pub mod layout;
pub(crate) mod le;
pub mod lvm2;
pub mod map;
pub mod read;
#[cfg(test)]
mod robustness;
pub mod table;
pub mod thin;
pub mod volume;

pub use examine::{DiskReport, Examined, examine};
pub use layout::{Extent, Layout, Segment, ThinPool, VolumeReader};
pub use map::{DmName, Mapped, Namer, hold, map};
pub use read::{FileDisk, ReadAt};
pub use table::Damage;
pub use volume::{Skipped, SkippedKind, Volume, VolumeKind};
