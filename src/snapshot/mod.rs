//! Snapshots of disks: thick and thin LVs, reflinked files; the journal; the sweep.
//!
//! This module does not interpret partitions or files.

mod active;
pub mod command;
mod direct;
mod disk;
mod dm;
mod drbd;
mod filter;
mod fresh;
mod hold;
pub mod journal;
pub mod lvm;
pub mod monitor;
pub mod names;
mod off;
mod probe;
mod quiet;
mod reflink;
mod remove;
pub mod shared;
mod sweep;
mod take;
mod thick;
mod thin;
mod together;
mod volume;

pub use direct::{Direct, take_for_writing};
pub use disk::{Device, Request, Snapshot, Status, close_all};
pub use drbd::{Standing, standing};
pub use fresh::FreshVolume;
pub(crate) use journal::open_folder;
pub use journal::{Journal, Object, PARTIAL};
pub use monitor::{Event, Monitor, MonitorSettings};
pub use names::JobTag;
pub use probe::{Fill, Probe, State};
pub use remove::Removal;
pub use sweep::{SweepReport, sweep, sweep_by_tags};
pub use take::{Asked, Locked, NotAll, Planned, Prepared, Room, plan, prepare, prepare_each};
pub use together::{How, Taken, Together};
pub use volume::LvSnapshot;

use disk::{all_failed, human};
