//! How a guest is opened.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::mapped::MappedVolume;
use crate::config::FsPolicy;
use crate::config::client::Fsck;
use crate::error::Error;
use crate::fs::Note;
use crate::job::caller::{Importance, Reporter};
use crate::snapshot::Journal;

/// How a guest is opened.
pub(in crate::job) struct How<'a> {
    pub(in crate::job) policy: FsPolicy,
    pub(in crate::job) fsck: Fsck,
    /// The root that the client file names.
    pub(in crate::job) root: Option<String>,
    /// The volumes of the job before, by their places in the guest.
    pub(in crate::job) before: BTreeMap<Vec<u8>, String>,
    pub(in crate::job) journal: &'a Arc<Journal>,
    pub(in crate::job) job_id: u32,
    pub(in crate::job) reporter: &'a dyn Reporter,
    /// Whether the job is to end.
    pub(in crate::job) stop: &'a dyn Fn() -> bool,
}

impl How<'_> {
    /// Takes down a volume that is not needed after all. That this fails is an error of its own:
    /// it never hides the first one, nor keeps others from being taken down.
    pub(in crate::job) fn close(&self, volume: MappedVolume, what: &str) {
        if let Err(error) = volume.close() {
            self.tell_second(&error, what);
        }
    }

    pub(super) fn tell_second(&self, error: &Error, what: &str) {
        let text = format!("{what}: {}", error.report());
        self.reporter.message(Importance::Error, &text);
    }

    pub(super) fn tell(&self, notes: &[Note]) {
        for note in notes {
            self.reporter.message(note.level.into(), &note.text);
        }
    }
}
