//! The job as its caller sees it: messages, questions and the cancel.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::item::Item;
use crate::fs::NoteLevel;

/// How much a message matters to the job's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Importance {
    /// For the record.
    Info,
    /// Something to look at, though nothing is missing: to Bacula the job is a plain OK.
    Warning,
    /// Something is, or may be, missing from the backup or restore: the job ends with errors.
    Error,
    /// The job fails, at once.
    Fatal,
}

impl From<NoteLevel> for Importance {
    fn from(level: NoteLevel) -> Importance {
        match level {
            NoteLevel::Info => Importance::Info,
            NoteLevel::Warning => Importance::Warning,
            NoteLevel::Error => Importance::Error,
        }
    }
}

/// Takes the job's messages; may be called from any thread of the job.
pub trait Reporter: Send + Sync {
    /// One message, without a line end.
    fn message(&self, importance: Importance, message: &str);

    /// Whether the job was cancelled or has failed.
    fn cancelled(&self) -> bool;

    /// Whether a job at its end came to all its files, maybe with errors. `None`: it is not at its end, or
    /// nothing tells.
    fn came_to_all(&self) -> Option<bool> {
        None
    }
}

/// Answers about one candidate, during one call.
pub trait Daemon {
    /// Whether the FileSet's Exclude, wild and regex want it. Also sets the options (digest,
    /// compression) for the next file sent: ask last about the file that is sent.
    fn accepts(&mut self, item: &Item) -> bool;

    /// Whether it, which was [accepted](Daemon::accepts) just now, is to be sent at the job's level.
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

/// The answer to "the next file, please".
#[derive(Debug)]
pub enum Step<'a> {
    /// Send the item that was [accepted](Daemon::accepts) last, unchanged.
    Accepted(&'a Item),
    /// Send this, which the daemon was not asked about in this form: a further name of a file, for instance.
    Other(&'a Item),
    /// Send the questions of [`options`](super::options) to the catalog.
    Questions,
    /// The directive is done.
    End,
}
