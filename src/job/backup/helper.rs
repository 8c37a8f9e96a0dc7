//! Work beside the daemon's thread: everything that may wait for a guest's disk or for LVM.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;

use super::desk::Desk;
use super::notes::{Notes, log_late};
use crate::error::{Code, Error, Result};
use crate::job::aside::{self, Aside, Pump};
use crate::job::caller::Reporter;
use crate::snapshot::Journal;
use crate::stream::FileReader;

/// How long the release of a guest may take once the job is cancelled. LVM takes seconds for many
/// snapshots.
const RELEASE_GRACE: Duration = Duration::from_secs(10);

/// The job's thread for slow work, and the journal that this work writes to.
pub(super) struct Helper {
    desk: Desk,
    aside: Aside,
    /// Threads and guests were left behind, because a disk does not answer.
    stalled: bool,
    journal: Option<Arc<Journal>>,
}

impl Helper {
    pub(super) fn new(desk: Desk) -> Helper {
        Helper {
            desk,
            aside: Aside::default(),
            stalled: false,
            journal: None,
        }
    }

    pub(super) fn desk(&self) -> &Desk {
        &self.desk
    }

    pub(super) fn journal(&self) -> Option<Arc<Journal>> {
        self.journal.clone()
    }

    pub(super) fn set_journal(&mut self, journal: Arc<Journal>) {
        self.journal = Some(journal);
    }

    /// Whether a disk does not answer.
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// Does the work and waits for it. `None`: the job was stopped first; the work goes on, and its
    /// result is for `late`.
    pub(super) fn run<T: Send + 'static>(
        &mut self,
        work: impl FnOnce() -> T + Send + 'static,
        late: impl FnOnce(T) + Send + 'static,
    ) -> Result<Option<T>> {
        self.aside.run(self.desk.stop_sign(), work, late)
    }

    /// Like `run`, with messages. When the job is stopped first, the work goes on without it, and that
    /// is the error.
    pub(super) fn ask<T: Send + 'static>(
        &mut self,
        step: &str,
        work: impl FnOnce(&dyn Reporter) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let notes = Arc::new(Notes::default());
        let told = notes.clone();
        let done = self.run(move || work(told.as_ref()), |result| log_late(result.err()))?;
        match done {
            Some(result) => {
                notes.tell(self.desk.reporter());
                result
            }
            None => {
                notes.leave(self.desk.reporter());
                self.abandon();
                Err(Error::new(Code::Cancelled, step))
            }
        }
    }

    /// Like `run`, but waits [`RELEASE_GRACE`] longer than the job, and keeps the journal open.
    pub(super) fn run_patiently<T: Send + 'static>(
        &mut self,
        work: impl FnOnce() -> T + Send + 'static,
        late: impl FnOnce(T) + Send + 'static,
    ) -> Result<Option<T>> {
        let journal = self.journal();
        let stopped = patient(self.desk.stop_sign());
        self.aside.run(stopped, work, move |given| {
            late(given);
            // The result of the work writes to the journal.
            drop(journal);
        })
    }

    /// Reads a file ahead of the caller.
    pub(super) fn pump(&mut self, file: FileReader) -> Result<Pump> {
        self.aside.pump(file)
    }

    /// Runs work after the job that must wait for a disk that does not answer.
    pub(super) fn later(&self, work: impl FnOnce() + Send + 'static) {
        let journal = self.journal();
        let thread = std::thread::Builder::new()
            .name("guestsnap-wait".to_owned())
            .spawn(move || {
                // The daemon's signals are handled by the daemon's threads.
                let _ = SigSet::all().thread_block();
                work();
                drop(journal);
            });
        if let Err(error) = thread {
            // The closure is dropped, and with it all it holds.
            let error = Error::new(Code::Internal, "starting a thread").because(error);
            self.desk.error(&error);
        }
    }

    /// Abandons a blocked thread. Our own flag tells it that the job has ended; the daemon may have
    /// freed the job by then.
    fn abandon(&mut self) {
        self.stalled = true;
        self.desk.cancel().set();
    }

    /// Abandons a disk that does not answer, and reports that. The Director may not listen to a
    /// cancelled job any more: the daemon's own log has it too.
    pub(super) fn give_up_on(&mut self, error: &Error) {
        self.abandon();
        log::warn!("{}", error.report());
        self.desk.error(error);
    }

    /// Ends the helper's thread with these others. Returns those that wait for a disk.
    pub(super) fn end_with(&mut self, mut threads: Vec<JoinHandle<()>>) -> Vec<JoinHandle<()>> {
        threads.extend(self.aside.stop());
        aside::join(threads, self.desk.stop_sign())
    }

    /// Ends the helper's thread. A blocked thread releases its objects by itself later.
    pub(super) fn end(&mut self) {
        for stuck in self.end_with(Vec::new()) {
            self.stalled = true;
            drop(stuck);
        }
    }

    /// Closes the journal, unless a disk is stalled: then it ends with the last thread that may have to
    /// write to it.
    pub(super) fn close_journal(&mut self) {
        let journal = self.journal.take().filter(|_| !self.stalled);
        if let Some(Err(error)) = journal.map(|journal| journal.close()) {
            self.desk.error(&error);
        }
    }
}

/// A stop sign that shows some time after the other one.
fn patient(stopped: impl Fn() -> bool) -> impl Fn() -> bool {
    let since = std::cell::Cell::new(None::<Instant>);
    move || {
        if since.get().is_none() && stopped() {
            since.set(Some(Instant::now()));
        }
        since
            .get()
            .is_some_and(|since| since.elapsed() >= RELEASE_GRACE)
    }
}
