//! One instant of a disk: thick and thin LVs, reflinked files; the journal; the sweep.
//!
//! Knows nothing of partitions or files.

pub mod command;
pub mod journal;
pub mod lvm;

use std::path::{Path, PathBuf};

use crate::Result;
use crate::config::{Size, SnapshotKind};
use crate::guest::DiskSource;

pub use journal::{JobTag, Journal};

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
    fn device(&self) -> &Path;
    /// Bytes.
    fn size(&self) -> u64;
    /// `thick 8 GiB`, `thin`, `reflink`: for the log.
    fn describe(&self) -> String;
    /// Asks the kernel, not a cache. Checked at release too: see [`Status::Invalid`].
    fn status(&self) -> Result<Status>;
    /// Removes the snapshot and settles the journal.
    fn close(self: Box<Self>) -> Result<()>;
}

/// A file or device and its size, for callers that need no more.
#[derive(Debug, Clone)]
pub struct Device {
    /// Path.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
}
