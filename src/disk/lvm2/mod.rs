//! The guest's own LVM2, read from the bytes of its disks.
//!
//! Only disks of one guest are examined together, so names and UUIDs that other guests or the host
//! also use do not conflict. Writes nothing.
//!
//! * [`label`]: physical volumes and their metadata areas
//! * [`text`]: the text format of the metadata
//! * [`vg`]: a volume group, parsed from the text
//! * [`raid`]: selection of a readable image of a raid1 volume

mod assemble;
mod group;
pub mod label;
mod metadata;
mod names;
mod pv;
pub mod raid;
mod resolve;
mod snapshots;
pub mod text;
pub mod vg;

pub use group::GroupReport;
pub use metadata::parse;

pub(super) use assemble::assemble;
pub(super) use pv::{FoundPv, find_pv};

use names::{dashed, printable, uuid};
