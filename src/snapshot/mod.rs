//! One instant of a disk: thick and thin LVs, reflinked files; the journal; the sweep.
//!
//! Knows nothing of partitions or files.

mod command;
mod host_use;
pub mod journal;
pub mod lvm;
mod lvsnap;
mod reflink;
mod status;
mod sweep;

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;

use crate::Result;
use crate::config::{Size, SnapshotKind};
use crate::guest::DiskSource;

pub use host_use::host_use;
pub use journal::{JobTag, Journal, Object};
pub use sweep::{SweepReport, sweep};

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
    /// The block device or file that holds the snapshot's bytes. Writable.
    fn device(&self) -> Device;
    /// `thick 8 GiB`, `thin`, `reflink`: for the log.
    fn describe(&self) -> String;
    /// Asks the kernel, not a cache. Checked at release too: see [`Status::Invalid`].
    fn status(&self) -> Result<Status>;
    /// Removes the snapshot and settles the journal.
    fn close(self: Box<Self>) -> Result<()>;
    /// The open file behind it, for kinds that have no name of their own.
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A file or device and its size, for callers that need no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Path.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
}

/// Snapshots all disks of one guest, back to back. All or nothing: on an error those already taken
/// are removed again.
pub fn take_all(requests: &[Request], journal: &Arc<Journal>) -> Result<Vec<Box<dyn Snapshot>>> {
    // Everything that can be known before is checked before the first is taken: the time between
    // the first and the last is what makes them one instant.
    let plans = requests
        .iter()
        .map(|request| {
            Ok(match &request.origin {
                DiskSource::Lv { vg, lv } => Plan::Lv(lvsnap::plan(request, vg, lv)?),
                DiskSource::File(path) => Plan::File(path),
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let mut taken: Vec<Box<dyn Snapshot>> = Vec::new();
    for plan in plans {
        let snapshot: Result<Box<dyn Snapshot>> = match plan {
            Plan::Lv(plan) => lvsnap::take(plan, journal).map(|s| Box::new(s) as _),
            Plan::File(path) => reflink::take(path).map(|s| Box::new(s) as _),
        };
        match snapshot {
            Ok(snapshot) => taken.push(snapshot),
            Err(error) => {
                if let Err(undo) = close_all(taken) {
                    log::error!("{}", undo.report());
                }
                return Err(error);
            }
        }
    }
    Ok(taken)
}

enum Plan<'a> {
    Lv(lvsnap::LvPlan),
    File(&'a std::path::Path),
}

/// Removes snapshots, the last one first. Goes on after a failure; the first error is returned,
/// the others are logged.
pub fn close_all(snapshots: Vec<Box<dyn Snapshot>>) -> Result<()> {
    let mut first = Ok(());
    for snapshot in snapshots.into_iter().rev() {
        if let Err(error) = snapshot.close() {
            match &first {
                Ok(()) => first = Err(error),
                Err(_) => log::error!("{}", error.report()),
            }
        }
    }
    first
}
