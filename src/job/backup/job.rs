//! The run of one backup (or estimate): snapshots of everything that has room at its start, then guest
//! by guest.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::context::Context;
use super::desk::Desk;
use super::file::FileRun;
use super::guest::GuestRun;
use super::notes::log_late;
use super::plan::{GivenUp, Plan};
use super::settings::BackupSettings;
use super::{hooks, opening, release};
use crate::config::{ClientFile, Directive, defaults};
use crate::error::{Error, Result};
use crate::job::caller::{CancelFlag, Daemon, Reporter, Step};
use crate::job::prepare::{self, Prepared};
use crate::job::saves::Saves;
use crate::job::watch::Watch;
use crate::point::{Point, pass};
use crate::snapshot::{self, Journal};

/// A backup job.
#[expect(
    missing_debug_implementations,
    reason = "holds the daemon's side as a trait object"
)]
pub struct Backup {
    context: Context,
    plan: Plan,
    /// The guest that is being streamed.
    guest: Option<GuestRun>,
    /// `[hooks] before` was started, so `after` is due.
    hooked: bool,
    /// The questions for a restore are on their way to the catalog.
    questions: bool,
    /// When the job last said where it is.
    said: Instant,
}

impl Backup {
    /// Parses the directives, finds the guests and takes all snapshots of the job.
    pub fn start(
        settings: BackupSettings,
        directives: &[Vec<u8>],
        reporter: Arc<dyn Reporter>,
        cancel: CancelFlag,
    ) -> Result<Backup> {
        let plan = Plan::parse(directives)?;
        #[cfg(feature = "debug-panic")]
        if plan.panics_at(crate::config::directive::DebugPanic::Start) {
            panic!("asked for by debug=panic-start");
        }
        let client = ClientFile::load(&prepare::client_file())?;
        let desk = Desk::new(reporter, cancel);
        let mut backup = Backup {
            context: Context::new(settings, client, desk),
            plan,
            guest: None,
            hooked: false,
            questions: false,
            said: Instant::now(),
        };
        let journal = backup.open_journal()?;
        backup.hooked = true;
        hooks::before(&backup.context)?;
        let watch = Watch::start(&backup.context.client.limits)?;
        backup.context.watch = Some(Arc::new(watch));
        backup.plan.make(&mut backup.context, &journal)?;
        pass(Point::JobStarted);
        Ok(backup)
    }

    /// Opens the job's journal, and the memory of the job before.
    fn open_journal(&mut self) -> Result<Arc<Journal>> {
        let settings = self.context.settings.clone();
        let open = move |told: &dyn Reporter| {
            let (working_dir, job_id) = (&settings.working_dir, settings.job_id);
            let (estimate, previous) = (settings.estimate, &settings.previous);
            let journal = prepare::journal(working_dir.clone(), job_id, told)?;
            // An estimate has a name of its own.
            let resource = if estimate { previous } else { &settings.job };
            let needed = !(estimate && settings.full);
            let saves = needed.then(|| Saves::open(working_dir, resource, job_id, previous));
            Ok((journal, saves))
        };
        let helper = &mut self.context.helper;
        let (journal, saves) = helper.ask("while the journal was opened", open)?;
        helper.set_journal(journal.clone());
        if let Some(saves) = saves {
            self.context.ledger.remember(saves);
        }
        Ok(journal)
    }

    /// The daemon runs the next `Plugin =` line now. It runs them in the order in which it announced them.
    pub fn begin_command(&mut self) -> Result<()> {
        self.plan.begin_line()
    }

    /// The next file of the running line. An error fails the job.
    pub fn next_file(&mut self, daemon: &mut dyn Daemon) -> Result<Step<'_>> {
        self.forget_file();
        if !self.plan.is_running() {
            return Ok(Step::End);
        }
        loop {
            if self.is_stopped() {
                // The daemon may wait for others before it says that the job is over.
                self.finish();
                return Ok(Step::End);
            }
            self.progress();
            self.give_up_full_pools();
            let Some(guest) = &mut self.guest else {
                let next = self.plan.next_guest(&mut self.context);
                if self.is_stopped() {
                    // A guest handed out now would be opened for nothing.
                    drop(next);
                    continue;
                }
                let Some((directive, prepared)) = next? else {
                    self.end_line()?;
                    return Ok(Step::End);
                };
                self.open_guest(&directive, prepared);
                continue;
            };
            if !self.questions && !self.context.settings.estimate {
                // Once in a job: the answers are for all that is restored together. A job that
                // opens no guest sends nothing.
                self.questions = true;
                return Ok(Step::Questions);
            }
            if !guest.step(&mut self.context, daemon) {
                self.release();
            } else if guest.file.is_some() {
                if guest.tally.files == 0 {
                    pass(Point::FirstFile);
                }
                break;
            }
        }
        let file = self.guest.as_ref().and_then(|guest| guest.file.as_ref());
        Ok(file.map_or(Step::End, FileRun::step))
    }

    /// The next [`Backup::read`] gives no more than this.
    pub fn at_most(&self) -> usize {
        let file = self.guest.as_ref().and_then(|guest| guest.file.as_ref());
        file.map_or(0, |file| file.at_most())
    }

    /// Data of the current file; 0 at its end.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // The daemon looks at a cancel only when it sends, and zeros of a hole it does not send.
        if self.is_stopped() {
            self.finish();
            return Err(io::Error::from_raw_os_error(libc::ECANCELED));
        }
        #[cfg(feature = "debug-panic")]
        if self
            .plan
            .panics_at(crate::config::directive::DebugPanic::Read)
        {
            panic!("asked for by debug=panic-read");
        }
        let Some(guest) = &mut self.guest else {
            return Ok(0);
        };
        let watch = self.context.watch.as_ref();
        if watch.is_some_and(|watch| guest.is_doomed(watch).is_some()) {
            // The guest is given up before the next file.
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let read = guest.read(buffer, &self.context.helper);
        if read.is_err() && self.is_stopped() {
            self.finish();
        }
        read
    }

    /// The next record of the current file's attributes that Bacula's stat record cannot hold.
    pub fn record(&mut self) -> Option<Vec<u8>> {
        self.guest.as_mut()?.record(&mut self.context.helper)
    }

    /// The current file was sent as `file_index`.
    pub fn end_file(&mut self, file_index: i32) {
        if let Some(guest) = &mut self.guest {
            guest.end_file(file_index);
        }
    }

    /// Whether a path of the accurate list, not seen in this job, must not count as deleted.
    pub fn must_keep(&self, path: &[u8]) -> bool {
        // A stopped job did not look at everything.
        self.context.ledger.keeps(path) || self.is_stopped() || !self.plan.is_done()
    }

    /// Gives everything back. Called at the job's end, however it ends; may be called again.
    pub fn finish(&mut self) {
        pass(Point::JobFinish);
        self.forget_file();
        self.release();
        self.context.helper.end();
        self.release_waiting();
        self.context.helper.close_journal();
        if std::mem::take(&mut self.hooked) {
            hooks::after(&self.context);
        }
        pass(Point::JobFinished);
    }

    /// Gives back the snapshots of the guests whose turn did not come, and the watch over them.
    fn release_waiting(&mut self) {
        let watch = self.context.watch.take();
        let left = self.plan.drain();
        if self.context.helper.is_stalled() {
            // LVM looks at every device, and may wait for the one that does not answer.
            self.context.helper.later(move || {
                drop(watch);
                log_late(snapshot::close_all(left).err());
            });
        } else if watch.is_some() || !left.is_empty() {
            let closed = self.context.unhurried(
                "guests that wait",
                "the release of their snapshots",
                || {
                    drop(watch);
                    snapshot::close_all(left)
                },
                |closed| log_late(closed.err()),
            );
            if let Some(Err(error)) = closed {
                self.context.desk().error(&error);
            }
            self.context.helper.end();
        }
    }

    fn is_stopped(&self) -> bool {
        self.context.desk().is_stopped()
    }

    /// The file before is through.
    fn forget_file(&mut self) {
        if let Some(guest) = &mut self.guest {
            guest.file = None;
        }
    }

    /// Tells now and then where the job is.
    fn progress(&mut self) {
        if let Some(watch) = &self.context.watch {
            watch.tell(self.context.desk().reporter());
        }
        let every = self.context.client.limits.progress_minutes.as_deref();
        let minutes = every.copied().unwrap_or(defaults::PROGRESS_MINUTES);
        if self.said.elapsed() < Duration::from_secs(60 * minutes) {
            return;
        }
        self.said = Instant::now();
        if let Some(guest) = &self.guest {
            guest.tally.tell_progress();
        }
    }

    /// Gives up the guests whose snapshots are in a thin pool that is nearly full.
    fn give_up_full_pools(&mut self) {
        let watch = self.context.watch.clone();
        let Some(watch) = watch.filter(|watch| watch.is_any_full()) else {
            return;
        };
        let given_up = self.guest.as_mut().and_then(|guest| {
            let why = guest.is_doomed(&watch)?;
            Some(guest.open.give_up(why))
        });
        let left = self.plan.give_up_full_pools(&watch);
        drop(watch);
        if let Some(tree) = given_up {
            self.context.ledger.keep(tree);
            self.release();
        }
        for given_up in left {
            self.give_up(given_up);
        }
    }

    fn give_up(&mut self, given_up: GivenUp) {
        let GivenUp {
            directive,
            prepared,
            why,
        } = given_up;
        let name = prepared.guest.name;
        let closed = self.context.unhurried(
            &name,
            "the release of its snapshots",
            || snapshot::close_all(prepared.snapshots),
            |closed| log_late(closed.err()),
        );
        if let Some(Err(error)) = closed {
            self.context.desk().error(&error);
        }
        let ledger = &mut self.context.ledger;
        ledger.guest_failed(&directive, &name, &why, false);
        ledger.fail(Error::new(why.code(), name));
    }

    fn open_guest(&mut self, directive: &Directive, prepared: Prepared) {
        let name = prepared.guest.name.clone();
        match opening::open(&mut self.context, prepared) {
            Ok(Some(opened)) => {
                self.context.ledger.opened(opened.open.unread());
                self.guest = Some(GuestRun::new(opened, &self.context));
            }
            // The job is at its end.
            Ok(None) => {}
            Err(error) => {
                let ledger = &mut self.context.ledger;
                ledger.guest_failed(directive, &name, &error, false);
            }
        }
    }

    /// The running line is through; with the last one, so is the job.
    fn end_line(&mut self) -> Result<()> {
        self.plan.end_line();
        match self.plan.is_done() {
            true => self.context.ledger.verdict(),
            false => Ok(()),
        }
    }

    /// Ends the running guest.
    fn release(&mut self) {
        if let Some(guest) = self.guest.take() {
            release::release(guest, &mut self.context);
        }
    }
}

impl Drop for Backup {
    fn drop(&mut self) {
        self.finish();
    }
}
