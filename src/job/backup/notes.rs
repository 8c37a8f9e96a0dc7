//! Messages of threads beside the job's.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::Error;
use crate::job::caller::{Importance, Reporter};

/// Keeps another thread's messages for the job's thread to pass on. After [`Notes::leave`] they go to
/// the daemon's own log: the job no longer waits for them.
#[derive(Debug)]
pub(super) struct Notes(Mutex<Option<Vec<(Importance, String)>>>);

impl Default for Notes {
    fn default() -> Notes {
        Notes(Mutex::new(Some(Vec::new())))
    }
}

impl Notes {
    fn lock(&self) -> MutexGuard<'_, Option<Vec<(Importance, String)>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes on the messages so far. Returns the number of errors among them.
    pub(super) fn tell(&self, reporter: &dyn Reporter) -> u64 {
        let notes = self.lock().as_mut().map(std::mem::take);
        let mut errors = 0;
        for (importance, text) in notes.unwrap_or_default() {
            errors += u64::from(importance >= Importance::Error);
            reporter.message(importance, &text);
        }
        errors
    }

    /// Passes on the messages so far. The job takes no more.
    pub(super) fn leave(&self, reporter: &dyn Reporter) {
        let notes = self.lock().take();
        for (importance, text) in notes.unwrap_or_default() {
            reporter.message(importance, &text);
        }
    }
}

impl Reporter for Notes {
    fn message(&self, importance: Importance, message: &str) {
        match &mut *self.lock() {
            Some(notes) => notes.push((importance, message.to_owned())),
            None if importance >= Importance::Warning => log::error!("{message}"),
            None => {}
        }
    }

    fn cancelled(&self) -> bool {
        false
    }
}

/// Logs errors that come after the job was given up: the job reports no more.
pub(super) fn log_late(errors: impl IntoIterator<Item = Error>) {
    for error in errors {
        log::error!("{}", error.report());
    }
}
