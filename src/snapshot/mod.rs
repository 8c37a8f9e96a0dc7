//! One instant of a disk: thick and thin LVs, reflinked files; the journal; the sweep.
//!
//! Knows nothing of partitions or files.

pub mod command;
mod dm;
pub mod holders;
pub mod host;
pub mod journal;
pub mod lvm;
pub mod monitor;
pub mod names;
mod off;
mod probe;
mod reflink;
mod remove;
mod sweep;
mod take;
mod thick;
mod thin;
mod volume;

use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use crate::config::{Size, SnapshotKind};
use crate::guest::DiskSource;
use crate::{Code, Error, Result};

pub use host::host_use;
pub(crate) use journal::open_folder;
pub use journal::{Journal, Object};
pub use monitor::{Event, Monitor, MonitorSettings};
pub use names::JobTag;
pub use probe::{Fill, Probe, State};
pub use remove::Removal;
pub use sweep::{SweepReport, sweep, sweep_by_tags};
pub use take::{Locked, NotAll, Planned, Prepared, Room, plan, prepare, prepare_each, take_all};
pub use thick::DEFAULT_CHUNK;
pub use volume::LvSnapshot;

/// What to snapshot, and how.
#[derive(Debug, Clone)]
pub struct Request {
    /// The disk.
    pub origin: DiskSource,
    /// Kind.
    pub kind: SnapshotKind,
    /// Size of a thick snapshot.
    pub size: Size,
    /// Chunk size of a thick snapshot in bytes; `None`: our default.
    pub chunk: Option<u64>,
}

/// The state of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Status {
    /// Usable; the share of the COW area in use, in percent (0.0 for kinds without one).
    Valid {
        /// Percent used.
        used: f64,
    },
    /// Overflowed or lost: nothing read from it can be trusted, also not what was read before.
    Invalid,
}

/// A snapshot that exists. `close` removes it; `Drop` does the same and logs.
pub trait Snapshot: Send + std::fmt::Debug {
    /// The block device or file that holds the snapshot's bytes. Writable, unless
    /// [`Device::read_only`] says otherwise. A file without a name
    /// has a path below `/proc/self/fd`, good for as long as the snapshot exists.
    fn device(&self) -> Device;
    /// `8 GiB thick`, `thin`, `reflink`: for the log.
    fn describe(&self) -> String;
    /// Asks the kernel, not a cache. Checked at release too: see [`Status::Invalid`].
    fn status(&self) -> Result<Status>;
    /// For the monitor; `None` for kinds that cannot overflow.
    fn probe(&self) -> Option<Probe> {
        None
    }
    /// Takes the volume out for [`close_all`]; dropping the snapshot then removes nothing.
    fn removal(&mut self) -> Option<Removal> {
        None
    }
    /// The open file behind it, for kinds that have no name of their own.
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Removes the snapshot and settles the journal.
    fn close(self: Box<Self>) -> Result<()>;
}

/// Removes several snapshots, volumes of one group in one command. Does not stop at a failure.
pub fn close_all(snapshots: Vec<Box<dyn Snapshot>>) -> Result<()> {
    let mut removals = Vec::new();
    let mut failures = Vec::new();
    for mut snapshot in snapshots {
        match snapshot.removal() {
            Some(removal) => removals.push(removal),
            None => failures.extend(snapshot.close().err()),
        }
    }
    failures.extend(remove::remove_all(removals).err());
    all_failed(failures)
}

/// One error for several.
fn all_failed(mut failures: Vec<Error>) -> Result<()> {
    match failures.len() {
        0 => Ok(()),
        1 => Err(failures.remove(0)),
        _ => {
            let all: Vec<String> = failures.iter().map(Error::with_causes).collect();
            Err(Error::new(Code::ReleaseFailed, all.join("; ")))
        }
    }
}

/// Bytes for people: `8 GiB`, `512 MiB`.
fn human(bytes: u64) -> String {
    let (unit, name) = if bytes >= 1 << 30 {
        (1 << 30, "GiB")
    } else {
        (1 << 20, "MiB")
    };
    let tenths = u128::from(bytes) * 10 / unit;
    match tenths % 10 {
        0 => format!("{} {name}", tenths / 10),
        rest => format!("{}.{rest} {name}", tenths / 10),
    }
}

/// A file or device and its size, for callers that need no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Path.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    /// It is no snapshot and must not be written to.
    pub read_only: bool,
}
