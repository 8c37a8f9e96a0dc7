//! A disk to snapshot, and a snapshot of one.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use super::probe::Probe;
use super::remove::{self, Removal};
use crate::config::{Size, SnapshotKind};
use crate::guest::DiskSource;
use crate::{Code, Error, Result};

/// A snapshot to take.
#[derive(Debug, Clone)]
pub struct Request {
    /// The disk.
    pub origin: DiskSource,
    /// Kind of snapshot.
    pub kind: SnapshotKind,
    /// Size of a thick snapshot.
    pub size: Size,
    /// Chunk size of a thick snapshot in bytes; `None`: the default.
    pub chunk: Option<u64>,
    /// Whether an inactive volume may be activated for the duration of the backup.
    pub activate: bool,
    /// Whether it is a container's: LXC on this host mounts it while the container runs.
    pub in_container: bool,
}

/// State of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Status {
    /// Usable, with the used share of the COW area in percent (0.0 for kinds without one).
    Valid {
        /// Percent used.
        used: f64,
    },
    /// Overflowed or lost: no data is reliable, including data already read.
    Invalid,
}

/// An existing snapshot. `close` removes it; `Drop` does the same and logs errors.
pub trait Snapshot: Send + std::fmt::Debug {
    /// Block device or file with the snapshot's bytes. Writable unless [`Device::read_only`] is
    /// set. For an unnamed file, the path is below `/proc/self/fd`, valid while the snapshot
    /// exists.
    fn device(&self) -> Device;
    /// Text for the log: `8 GiB thick`, `thin`, `reflink`.
    fn describe(&self) -> String;
    /// Queries the kernel, not a cache. Also checked at release: see [`Status::Invalid`].
    fn status(&self) -> Result<Status>;
    /// Probe for the monitor; `None` for kinds that cannot overflow.
    fn probe(&self) -> Option<Probe> {
        None
    }
    /// Extracts the volume for [`close_all`]; dropping the snapshot then removes nothing.
    fn removal(&mut self) -> Option<Removal> {
        None
    }
    /// The open file of kinds without a name.
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Removes the snapshot and its journal entry.
    fn close(self: Box<Self>) -> Result<()>;
}

/// Removes several snapshots, those of one group with one command. Continues after a failure.
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

/// Combines several errors into one.
pub(super) fn all_failed(mut failures: Vec<Error>) -> Result<()> {
    match failures.len() {
        0 => Ok(()),
        1 => Err(failures.remove(0)),
        _ => {
            let all: Vec<String> = failures.iter().map(Error::with_causes).collect();
            Err(Error::new(Code::ReleaseFailed, all.join("; ")))
        }
    }
}

/// Formats a size: `8 GiB`, `512 MiB`.
pub(super) fn human(bytes: u64) -> String {
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

/// A file or device with its size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Path.
    pub path: PathBuf,
    /// Size in bytes.
    pub size: u64,
    /// It is not a snapshot and must not be written to.
    pub read_only: bool,
}
