//! The life of one job: plan, run, report, undo. Knows nothing of struct layouts.
//!
//! [`Backup`] and [`Restore`] are driven by Bacula's callbacks (see [`crate::ffi`]), by the command
//! line and by tests, through three small traits: [`Reporter`] takes messages, [`Daemon`] answers
//! questions about candidates, [`CancelFlag`] is set from another thread.

mod aside;
mod backup;
mod filter;
mod host;
mod item;
mod look;
mod open;
pub mod options;
mod paths;
mod prepare;
pub mod query;
mod restore;
pub mod rights;
mod saves;
mod watch;

use std::ffi::CStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub(crate) use aside::join;
pub use backup::{Backup, BackupSettings};
pub use host::Host;
pub use item::Item;
pub use look::{Look, Looked};
pub use prepare::{journal_folder, requests};
pub use restore::{Restore, RestoreFile, Restored};

/// How much a message matters to the job's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Importance {
    /// For the record.
    Info,
    /// Something to know; the job stays OK.
    Warning,
    /// Something is missing from the backup or restore: the job ends with errors.
    Error,
    /// The job fails, at once.
    Fatal,
}

/// Takes the job's messages; may be called from any thread of the job.
pub trait Reporter: Send + Sync {
    /// One message, without a line end.
    fn message(&self, importance: Importance, message: &str);

    /// Whether the job was cancelled or has failed.
    fn cancelled(&self) -> bool;
}

/// Answers about one candidate, during one call.
pub trait Daemon {
    /// Whether the FileSet's Exclude, wild and regex want it. Also sets the options (digest,
    /// compression) for the next file sent: ask last about the file that is sent.
    fn accepts(&mut self, item: &Item) -> bool;

    /// Whether it is to be sent at the job's level.
    fn changed(&mut self, item: &Item) -> bool;

    /// It exists, unchanged: the accurate list keeps it.
    fn mark_seen(&mut self, item: &Item);
}

/// Set once, from any thread.
#[derive(Debug, Clone, Default)]
pub struct CancelFlag(Arc<AtomicBool>);

impl CancelFlag {
    /// Cancels.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether it was.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// What a file is to Bacula.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    /// Has data, perhaps none.
    Regular,
    /// Sent after its content.
    Directory,
    /// Symbolic link.
    Symlink,
    /// A further name of a file that was sent in this job.
    HardLink,
    /// FIFO or device node.
    Special,
}

/// The answer to "the next file, please".
#[derive(Debug)]
pub enum Step<'a> {
    /// Send this.
    File(&'a Item),
    /// Send the questions of [`options`] to the catalog.
    Questions,
    /// The directive is done.
    End,
}

/// Bytes for people.
pub fn size_text(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} bytes")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Text of a C string for a message.
fn shown(text: &CStr) -> String {
    crate::error::escape(text.to_bytes())
}
