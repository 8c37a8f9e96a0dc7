//! The daemon as every part of a job sees it: a place for messages, and a stop sign.

use std::sync::Arc;

use crate::error::Error;
use crate::job::caller::{CancelFlag, Importance, Reporter};

/// Takes messages and knows whether the job is to stop. Clones share the job.
#[derive(Clone)]
pub(super) struct Desk {
    reporter: Arc<dyn Reporter>,
    cancel: CancelFlag,
}

impl Desk {
    pub(super) fn new(reporter: Arc<dyn Reporter>, cancel: CancelFlag) -> Desk {
        Desk { reporter, cancel }
    }

    pub(super) fn message(&self, importance: Importance, text: &str) {
        self.reporter.message(importance, text);
    }

    /// Reports something that is, or may be, missing from the backup.
    pub(super) fn error(&self, error: &Error) {
        self.message(Importance::Error, &error.report());
    }

    pub(super) fn reporter(&self) -> &dyn Reporter {
        self.reporter.as_ref()
    }

    pub(super) fn cancel(&self) -> &CancelFlag {
        &self.cancel
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.cancel.is_set() || self.reporter.cancelled()
    }

    /// [`Desk::is_stopped`] without a borrow of the desk.
    pub(super) fn stop_sign(&self) -> impl Fn() -> bool + use<> {
        let desk = self.clone();
        move || desk.is_stopped()
    }
}
