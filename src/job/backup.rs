//! One backup (or estimate): snapshots of everything at its start, then guest by guest.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;

use super::aside::{self, Aside, Pump};
use super::filter::Filter;
use super::open::{self, How, OpenGuest};
use super::paths::Paths;
use super::prepare::{self, Prepared, Wanted};
use super::saves::{Place, Saves};
use super::watch::Watch;
use super::{CancelFlag, Daemon, FileType, Importance, Item, Reporter, Step, size_text};
use crate::config::client::Hooks;
use crate::config::{ClientFile, Directive, OnError};
use crate::error::{Code, Error, Result, escape, shorten};
use crate::fs::NoteLevel;
use crate::guest::{Guest, Selection};
use crate::point::{Point, pass};
use crate::process;
use crate::snapshot::{self, Journal};
use crate::stream::ahead::{self, AheadOptions, BUDGET, Contents, ReadAhead, THREADS};
use crate::stream::{Entry, HardLinks, Kind};

/// How often a long job says where it is.
const PROGRESS: Duration = Duration::from_secs(300);

/// Memory for the names of files with several names, per guest.
const HARD_LINK_BYTES: usize = 16 << 20;

/// Bytes of messages about single files of one guest; the rest is counted. A guest may be made so that
/// every name in it is worth a message, of a long path.
const MAX_TOLD: usize = 256 << 10;

/// Bytes of paths of one guest that are remembered because they must not count as deleted; with more,
/// nothing of the guest does.
const MAX_KEPT: usize = 4 << 20;

/// Bytes of holes that are delivered of one guest: the daemon takes a hole as zeros, a few gigabytes a
/// second, and everybody in a guest can make a file of some exabytes of nothing.
const MAX_HOLES: u64 = 16 << 40;

/// How long the release of a guest may take once the job is cancelled. LVM takes seconds for many
/// snapshots.
const RELEASE_GRACE: Duration = Duration::from_secs(10);

/// What the daemon says of the job.
#[derive(Debug, Clone)]
pub struct BackupSettings {
    /// Bacula's JobId; 0 for estimates.
    pub job_id: u32,
    /// Bacula's name of the job, with its time.
    pub job: String,
    /// The same of the job that this one adds to.
    pub previous: String,
    /// The daemon's working directory; ours is a folder in it.
    pub working_dir: PathBuf,
    /// A full backup: nothing is asked about changes.
    pub full: bool,
    /// Accurate mode: unchanged files must be marked.
    pub accurate: bool,
    /// Only names and sizes are wanted.
    pub estimate: bool,
    /// Not a full backup: what changed before this time (seconds since 1970) is probably not asked
    /// for, so it is not read ahead. What is sent, the daemon decides.
    pub since: i64,
}

/// One `Plugin =` line.
struct Command {
    text: Vec<u8>,
    directive: Directive,
    waiting: VecDeque<Prepared>,
    done: bool,
}

/// The guest that is being streamed.
struct Running {
    open: OpenGuest,
    /// `None` once everything was walked.
    walker: Option<ReadAhead>,
    /// The threads of a walk that is through, as far as they still run.
    ending: Vec<JoinHandle<()>>,
    /// Files of ours. They come before the root, so that its times are put on last.
    extra: VecDeque<(Vec<u8>, Vec<u8>)>,
    /// The guest's root, the last to be sent.
    root: Option<ahead::Prepared>,
    links: HardLinks,
    filter: Filter,
    /// Bytes of holes that were promised to the daemon, as zeros.
    holes: u64,
    started: Instant,
    files: u64,
    bytes: u64,
    errors: u64,
    sockets: u64,
    /// Bytes of the messages that were given.
    told: usize,
    /// Messages that were not given any more: errors, and others.
    untold: (u64, u64),
    /// What could not be read, so that it must not count as deleted.
    unread: Paths,
    /// Directories that were left out because of what is in them.
    marked: Paths,
    /// What these two take.
    remembered: usize,
    /// What the job before does not have: sent whatever its age.
    anew: Paths,
    places: Vec<Place>,
}

/// Where the data of the current file comes from.
enum Source {
    Nothing,
    Read(Contents),
    Pump(Pump),
    Memory(io::Cursor<Vec<u8>>),
}

/// A backup job.
#[expect(
    missing_debug_implementations,
    reason = "holds the daemon's side as a trait object"
)]
pub struct Backup {
    settings: BackupSettings,
    reporter: Arc<dyn Reporter>,
    cancel: CancelFlag,
    client: ClientFile,
    journal: Option<Arc<Journal>>,
    /// `[hooks] before` was started, so `after` is due.
    hooked: bool,
    watch: Option<Arc<Watch>>,
    commands: Vec<Command>,
    current: Option<usize>,
    running: Option<Running>,
    /// Where whatever touches a guest's disk is done.
    aside: Aside,
    /// Threads and guests that were left behind, because a disk does not answer.
    stalled: bool,
    item: Option<Item>,
    entry: Option<ahead::Prepared>,
    source: Source,
    recorded: bool,
    records: VecDeque<Vec<u8>>,
    /// What could not be read of guests that are through or not opened: never "deleted".
    keep: Paths,
    /// `None`: it could not be opened, which was told.
    saves: Option<Arc<Saves>>,
    /// Reasons for the job to fail that wait until the other guests are through.
    fatal: Vec<Error>,
    opened: usize,
    /// The questions for a restore are on their way to the catalog.
    questions: bool,
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
        let parsed = directives
            .iter()
            .map(|text| parse(text))
            .collect::<Result<Vec<_>>>()?;
        #[cfg(feature = "debug-panic")]
        if parsed
            .iter()
            .any(|d| d.debug == Some(crate::config::directive::DebugPanic::Start))
        {
            panic!("asked for by debug=panic-start");
        }
        let client = ClientFile::load(&prepare::client_file())?;
        let mut backup = Backup {
            settings,
            reporter,
            cancel,
            client,
            journal: None,
            hooked: false,
            watch: None,
            commands: Vec::new(),
            current: None,
            running: None,
            aside: Aside::default(),
            stalled: false,
            item: None,
            entry: None,
            source: Source::Nothing,
            recorded: false,
            records: VecDeque::new(),
            keep: Paths::default(),
            saves: None,
            fatal: Vec::new(),
            opened: 0,
            questions: false,
            said: Instant::now(),
        };
        let settings = backup.settings.clone();
        let (journal, saves) = backup.ask("while the journal was opened", move |told| {
            let BackupSettings {
                job_id,
                job,
                previous,
                working_dir,
                estimate,
                full,
                ..
            } = settings;
            let journal = prepare::journal(working_dir.clone(), job_id, told)?;
            // An estimate has a name of its own.
            let resource = if estimate { &previous } else { &job };
            let needed = !(estimate && full);
            let saves = needed.then(|| Saves::open(&working_dir, resource, job_id, &previous));
            Ok((journal, saves))
        })?;
        backup.journal = Some(journal.clone());
        match saves {
            Some(Ok(saves)) => backup.saves = Some(Arc::new(saves)),
            Some(Err(error)) => backup.will_be_saved_again(&error),
            None => {}
        }
        backup.before()?;
        backup.watch = Some(Arc::new(Watch::start(&backup.client.limits)?));
        let (lines, client) = (parsed.clone(), backup.client.clone());
        let selections = backup.ask("while guests were looked for", move |told| {
            prepare::select(&lines, &client, told)
        })?;
        let mut folders = prepare::Folders::default();
        let mut wanted = Vec::new();
        for (line, (selection, directive)) in selections.into_iter().zip(&parsed).enumerate() {
            let guests = backup.guests(selection, directive, &mut folders);
            wanted.extend(guests.into_iter().map(|guest| (line, guest)));
        }
        let commands = directives.iter().zip(parsed);
        backup.commands = commands
            .map(|(text, directive)| Command {
                text: text.clone(),
                directive,
                waiting: VecDeque::new(),
                done: false,
            })
            .collect();
        backup.take(wanted, &journal)?;
        pass(Point::JobStarted);
        Ok(backup)
    }

    /// The daemon runs this `Plugin =` line now.
    pub fn begin_command(&mut self, text: &[u8]) -> Result<()> {
        let next = self.commands.iter().position(|c| !c.done && c.text == text);
        self.current = Some(next.ok_or_else(|| {
            Error::new(
                Code::Internal,
                format!(
                    "the daemon runs a line it did not announce: {}",
                    escape(text)
                ),
            )
        })?);
        Ok(())
    }

    /// The next file of the running line. An error fails the job.
    pub fn next_file(&mut self, daemon: &mut dyn Daemon) -> Result<Step<'_>> {
        self.source = Source::Nothing;
        self.item = None;
        self.entry = None;
        self.recorded = false;
        let Some(current) = self.current else {
            return Ok(Step::End);
        };
        loop {
            if self.stopped() {
                // The daemon may wait for others before it says that the job is over.
                self.finish();
                return Ok(Step::End);
            }
            self.progress();
            self.give_up_full_pools();
            if self.running.is_none() {
                let Some(prepared) = self.commands[current].waiting.pop_front() else {
                    return self.end_command(current);
                };
                self.open_guest(current, prepared);
            } else if !self.questions && !self.settings.estimate {
                // Once in a job: the answers are for all that is restored together. A job that
                // opens no guest sends nothing.
                self.questions = true;
                return Ok(Step::Questions);
            } else if !self.step(daemon) {
                self.release();
            } else if self.item.is_some() {
                if self.running.as_ref().is_some_and(|r| r.files == 0) {
                    pass(Point::FirstFile);
                }
                break;
            }
        }
        Ok(self.item.as_ref().map_or(Step::End, Step::File))
    }

    /// The next [`Backup::read`] gives no more than this.
    pub fn at_most(&self) -> usize {
        match &self.source {
            Source::Nothing => 0,
            Source::Read(contents) => contents.at_most(),
            Source::Pump(_) => usize::MAX,
            Source::Memory(data) => data.get_ref().len(),
        }
    }

    /// Data of the current file; 0 at its end.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // The daemon looks at a cancel only when it sends, and zeros of a hole it does not send.
        if self.stopped() {
            self.finish();
            return Err(io::Error::from_raw_os_error(libc::ECANCELED));
        }
        #[cfg(feature = "debug-panic")]
        if self
            .commands
            .iter()
            .any(|c| c.directive.debug == Some(crate::config::directive::DebugPanic::Read))
        {
            panic!("asked for by debug=panic-read");
        }
        if self.pool_is_full() {
            // The guest is given up before the next file.
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let stopped = self.stop_sign();
        let read = match &mut self.source {
            Source::Nothing => Ok(0),
            Source::Read(contents) => contents.read(buffer),
            Source::Pump(pump) => pump.read(buffer, stopped),
            Source::Memory(data) => io::Read::read(data, buffer),
        };
        if read.is_err() && self.stopped() {
            self.finish();
        }
        let failed = read.is_err() && !self.stopped();
        if let Some(running) = self.running.as_mut().filter(|_| failed) {
            // The daemon tells it.
            running.errors += 1;
            let item = self.item.as_ref();
            let path = item.map(|item| item.accurate_name().to_bytes().to_vec());
            path.into_iter().for_each(|path| self.keep(path, false));
        }
        let count = read?;
        if let Some(running) = &mut self.running {
            running.bytes = running.bytes.saturating_add(count as u64);
        }
        Ok(count)
    }

    /// The next record of what Bacula's stat record cannot hold of the current file.
    pub fn record(&mut self) -> Option<Vec<u8>> {
        if let Some(mut entry) = self.entry.take_if(|_| !self.recorded) {
            self.recorded = true;
            let collected = if entry.has_attributes() {
                entry.attributes()
            } else {
                // The data are through: Bacula asks for this last.
                self.source = Source::Nothing;
                let stopped = self.stop_sign();
                let collect = move || {
                    let collected = entry.attributes();
                    (entry, collected)
                };
                let done = self.aside.run(stopped, collect, drop);
                match done {
                    Ok(Some((back, collected))) => {
                        entry = back;
                        collected
                    }
                    Ok(None) => return None,
                    Err(error) => {
                        self.count_error(&error);
                        return None;
                    }
                }
            };
            self.entry = Some(entry);
            match collected {
                Ok((record, problems)) => {
                    self.records = record.encode().into();
                    self.lost_attributes(&problems);
                }
                Err(error) => self.lost_attributes(&[error]),
            }
        }
        self.records.pop_front()
    }

    /// Some of the current file's attributes are not in this job: all of it is in the next one.
    fn lost_attributes(&mut self, problems: &[Error]) {
        problems
            .iter()
            .for_each(|problem| self.count_error(problem));
        if let Some(item) = self.item.as_ref().filter(|_| !problems.is_empty()) {
            let path = item.accurate_name().to_bytes().to_vec();
            self.keep(path, false);
        }
    }

    /// The current file was sent as `file_index`.
    pub fn end_file(&mut self, file_index: i32) {
        self.source = Source::Nothing;
        self.records.clear();
        let (Some(running), Some(item)) = (&mut self.running, &self.item) else {
            return;
        };
        running.files += 1;
        if let Some(entry) = &self.entry {
            if item.file_type != FileType::HardLink {
                running
                    .links
                    .insert(&entry.entry.meta, item.name.as_bytes(), file_index);
            }
        }
    }

    /// Whether a path of the accurate list, not seen in this job, must not count as deleted.
    pub fn must_keep(&self, path: &[u8]) -> bool {
        // A stopped job did not look at everything.
        self.keep.contains(path) || self.stopped() || self.commands.iter().any(|c| !c.done)
    }

    /// Gives everything back. Called at the job's end, however it ends; may be called again.
    pub fn finish(&mut self) {
        pass(Point::JobFinish);
        self.item = None;
        self.entry = None;
        self.source = Source::Nothing;
        self.release();
        let thread = self.aside.stop().into_iter().collect();
        for stuck in aside::join(thread, self.stop_sign()) {
            // It gives back what it holds by itself.
            self.stalled = true;
            drop(stuck);
        }
        let watch = self.watch.take();
        let left = self.commands.iter_mut().flat_map(|c| c.waiting.drain(..));
        let left: Vec<_> = left.flat_map(|prepared| prepared.snapshots).collect();
        if self.stalled {
            // LVM looks at every device, and may wait for the one that does not answer.
            let journal = self.journal.clone();
            self.later(move || {
                drop(watch);
                log_late(snapshot::close_all(left).err());
                drop(journal);
            });
        } else if watch.is_some() || !left.is_empty() {
            let closed = self.unhurried(
                "guests that wait",
                "the release of their snapshots",
                || {
                    drop(watch);
                    snapshot::close_all(left)
                },
                |closed| log_late(closed.err()),
            );
            if let Some(Err(error)) = closed {
                self.reporter.message(Importance::Error, &error.report());
            }
            for stuck in aside::join(self.aside.stop().into_iter().collect(), self.stop_sign()) {
                self.stalled = true;
                drop(stuck);
            }
        }
        // With a stalled disk the journal ends with the last thread that may have to write to it.
        if let Some(journal) = self.journal.take().filter(|_| !self.stalled) {
            if let Err(error) = journal.close() {
                self.reporter.message(Importance::Error, &error.report());
            }
        }
        self.after();
        pass(Point::JobFinished);
    }

    /// Runs the command that the client file wants to run before the first snapshot.
    fn before(&mut self) -> Result<()> {
        self.hooked = true;
        let hooks = &self.client.hooks;
        let Some(hook) = &hooks.before else {
            return Ok(());
        };
        let argv = Hooks::argv(hook, self.settings.job_id);
        process::run_well(&argv, hooks.patience(), &|| self.stopped())
            .map_err(|error| Error::new(Code::HookFailed, "before").because(error))
    }

    /// Runs the command for the end of the job, cancelled or not: it undoes the other one.
    fn after(&mut self) {
        if !std::mem::take(&mut self.hooked) {
            return;
        }
        let hooks = &self.client.hooks;
        let Some(hook) = &hooks.after else {
            return;
        };
        let argv = Hooks::argv(hook, self.settings.job_id);
        if let Err(error) = process::run_well(&argv, hooks.patience(), &|| false) {
            let error = Error::new(Code::HookFailed, "after").because(error);
            self.reporter.message(Importance::Error, &error.report());
        }
    }

    fn will_be_saved_again(&self, error: &Error) {
        let text = format!(
            "{}. What this job saves is saved again by the next one, changed or not",
            error.report()
        );
        self.reporter.message(Importance::Warning, &text);
    }

    fn stopped(&self) -> bool {
        self.cancel.is_set() || self.reporter.cancelled()
    }

    /// The same for while something of `self` is in use.
    fn stop_sign(&self) -> impl Fn() -> bool + use<> {
        let (cancel, reporter) = (self.cancel.clone(), self.reporter.clone());
        move || cancel.is_set() || reporter.cancelled()
    }

    /// The guests of a line that are to be saved; of the others it tells.
    fn guests(
        &mut self,
        selection: Selection,
        directive: &Directive,
        folders: &mut prepare::Folders,
    ) -> Vec<Guest> {
        if selection.may_miss_any() {
            self.keep
                .insert(format!("{}/", directive.path).into_bytes());
        }
        let mut guests = selection.guests;
        if !selection.misses.is_empty() {
            self.selector_missed(directive);
        }
        for (name, error) in &selection.refused {
            let partly = guests.iter().any(|guest| guest.name == *name);
            self.guest_failed(directive, name, error, partly);
        }
        guests.retain(|guest| match folders.claim(directive, guest) {
            Ok(true) => true,
            Ok(false) => {
                let text = format!("{} is saved by another Plugin line already", guest.name);
                self.reporter.message(Importance::Info, &text);
                false
            }
            Err(error) => {
                self.guest_failed(directive, &guest.name, &error, false);
                false
            }
        });
        guests
    }

    /// Takes the snapshots of all guests, each with the number of its line. An error fails the job.
    fn take(&mut self, guests: Vec<(usize, Guest)>, journal: &Arc<Journal>) -> Result<()> {
        let whose: Vec<_> = guests
            .iter()
            .map(|(line, guest)| (*line, guest.name.clone()))
            .collect();
        let wanted = guests.into_iter().map(|(line, guest)| Wanted {
            guest,
            directive: self.commands[line].directive.clone(),
        });
        let wanted = wanted.collect();
        let (client, journal) = (self.client.clone(), journal.clone());
        // A job that is given up watches nothing any more.
        let watch = self.watch.as_ref().map(Arc::downgrade);
        let stop = self.cancel.clone();
        let taken = Arc::new(Mutex::new(Some(BTreeMap::new())));
        let give = taken.clone();
        let asked = self.ask("while snapshots were taken", move |told| {
            prepare::snapshots(wanted, &client, &journal, told, &stop, &|number, result| {
                let watch = watch.as_ref().and_then(Weak::upgrade);
                if let (Some(watch), Ok(prepared)) = (watch, &result) {
                    watch.add(&prepared.snapshots);
                }
                // What comes after a cancel is removed at once.
                let mut taken = give.lock().unwrap_or_else(PoisonError::into_inner);
                match &mut *taken {
                    Some(taken) => {
                        taken.insert(number, result);
                    }
                    None => log_late(result.err()),
                }
            });
            Ok(())
        });
        let taken = taken.lock().unwrap_or_else(PoisonError::into_inner).take();
        for (number, result) in taken.into_iter().flatten() {
            let (line, name) = &whose[number];
            match result {
                Ok(prepared) => self.commands[*line].waiting.push_back(prepared),
                Err(error) => {
                    let directive = self.commands[*line].directive.clone();
                    self.guest_failed(&directive, name, &error, false);
                }
            }
        }
        match asked {
            Ok(()) if self.stopped() => {
                Err(Error::new(Code::Cancelled, "while snapshots were taken"))
            }
            asked => asked,
        }
    }

    /// Does what may have to wait for a disk or for LVM, beside the daemon's thread. When the job is
    /// cancelled first, what is done goes on without it, and that is the error.
    fn ask<T: Send + 'static>(
        &mut self,
        step: &str,
        work: impl FnOnce(&dyn Reporter) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let notes = Arc::new(Notes::default());
        let told = notes.clone();
        let stopped = self.stop_sign();
        let work = move || work(told.as_ref());
        let done = self.aside.run(stopped, work, |result| {
            log_late(result.err());
        });
        match done? {
            Some(result) => {
                notes.tell(self.reporter.as_ref());
                result
            }
            None => {
                notes.leave(self.reporter.as_ref());
                self.give_up();
                Err(Error::new(Code::Cancelled, step))
            }
        }
    }

    /// A thread is left to what it waits for. Whatever it looks at later says that the job is over,
    /// without the daemon, which may have forgotten the job by then.
    fn give_up(&mut self) {
        self.stalled = true;
        self.cancel.set();
    }

    fn progress(&mut self) {
        if let Some(watch) = &self.watch {
            watch.tell(self.reporter.as_ref());
        }
        let every = self.client.limits.progress_minutes.as_deref();
        if self.said.elapsed() < every.map_or(PROGRESS, |minutes| Duration::from_secs(60 * minutes))
        {
            return;
        }
        self.said = Instant::now();
        if let Some(running) = &self.running {
            self.reporter.message(
                Importance::Info,
                &format!("{}: {}, still running", running.open.name(), sent(running)),
            );
        }
    }

    /// Whether the running guest is about to be given up.
    fn pool_is_full(&self) -> bool {
        let both = self.watch.as_ref().zip(self.running.as_ref());
        both.is_some_and(|(watch, running)| watch.given_up(running.open.snapshots()).is_some())
    }

    /// Gives up the guests whose snapshots are in a thin pool that is nearly full.
    fn give_up_full_pools(&mut self) {
        let Some(watch) = self.watch.as_ref().filter(|watch| watch.is_any_full()) else {
            return;
        };
        let given_up = self.running.as_mut().and_then(|running| {
            let why = watch.given_up(running.open.snapshots())?;
            Some(running.open.give_up(why))
        });
        let mut left = Vec::new();
        for command in &mut self.commands {
            for prepared in std::mem::take(&mut command.waiting) {
                match watch.given_up(&prepared.snapshots) {
                    None => command.waiting.push_back(prepared),
                    Some(why) => {
                        watch.end(&prepared.snapshots);
                        left.push((command.directive.clone(), prepared, why));
                    }
                }
            }
        }
        if let Some(tree) = given_up {
            self.keep.insert(tree);
            self.release();
        }
        for (directive, prepared, why) in left {
            let name = prepared.guest.name;
            let closed = self.unhurried(
                &name,
                "the release of its snapshots",
                || snapshot::close_all(prepared.snapshots),
                |closed| log_late(closed.err()),
            );
            if let Some(Err(error)) = closed {
                self.reporter.message(Importance::Error, &error.report());
            }
            self.guest_failed(&directive, &name, &why, false);
            self.fatal.push(Error::new(why.code(), name));
        }
    }

    fn open_guest(&mut self, current: usize, prepared: Prepared) {
        let name = prepared.guest.name.clone();
        let Some(journal) = self.journal.clone() else {
            return;
        };
        let limits = &self.client.limits;
        let mut options = AheadOptions {
            budget: limits.read_ahead.as_deref().copied().unwrap_or(BUDGET),
            threads: limits.readers.as_deref().copied().unwrap_or(THREADS),
            names_only: self.settings.estimate,
            changed_since: (!self.settings.full).then_some(self.settings.since),
        };
        let policy = self.client.fs_policy(&name);
        let fsck = self.client.fsck(&name);
        let job_id = self.settings.job_id;
        let notes = Arc::new(Notes::default());
        let told = notes.clone();
        let stopped = self.stop_sign();
        let cancel = self.cancel.clone();
        let (full, accurate) = (self.settings.full, self.settings.accurate);
        let (saves, previous) = (self.saves.clone(), self.settings.previous.clone());
        let open = move || {
            let how = How {
                policy,
                fsck,
                journal: &journal,
                job_id,
                reporter: told.as_ref(),
                stop: &|| cancel.is_set(),
            };
            let open = open::open(prepared, &how)?;
            let (tree, places) = (open.catalog_tree(), open.places());
            let saves = saves.filter(|_| !full);
            let mut anew = match &saves {
                Some(saves) if accurate => saves.unread_before(&tree),
                Some(saves) => saves.not_before(&tree, &places),
                None if full || accurate => Paths::default(),
                None => [tree.clone()].into_iter().collect(),
            };
            tell_anew(&open, &anew, &previous, told.as_ref());
            if let Some(saves) = saves.filter(|_| !accurate) {
                // Most of these are left out again.
                anew.join(&saves.marked_before(&tree));
            }
            if anew.contains(&tree) {
                options.changed_since = None;
            }
            match open.read_ahead(options) {
                // In this order: if nobody takes them, the readers go first.
                Ok(walker) => Ok((walker, open, anew, places)),
                Err(error) => {
                    for undo in open.close() {
                        told.message(Importance::Error, &undo.report());
                    }
                    Err(error)
                }
            }
        };
        let opened = self.aside.run(stopped, open, |opened| {
            log_late(opened.err());
        });
        let opened = match opened {
            Ok(Some(opened)) => {
                notes.tell(self.reporter.as_ref());
                opened
            }
            Ok(None) => {
                notes.leave(self.reporter.as_ref());
                let what = format!(
                    "{name}: it was being opened when the job was cancelled; its snapshots are removed \
                     when its disks answer"
                );
                self.give_up_on(&Error::new(Code::DiskStalled, what));
                return;
            }
            Err(error) => Err(error),
        };
        match opened {
            Ok((walker, open, anew, places)) => {
                self.opened += 1;
                let extra = VecDeque::from([(open.manifest_path(), open.manifest())]);
                self.keep.extend(open.unread());
                self.running = Some(Running {
                    open,
                    walker,
                    ending: Vec::new(),
                    extra,
                    root: None,
                    links: HardLinks::new(HARD_LINK_BYTES),
                    filter: Filter::new(self.client.filter(&name)),
                    holes: 0,
                    started: Instant::now(),
                    files: 0,
                    bytes: 0,
                    errors: 0,
                    sockets: 0,
                    told: 0,
                    untold: (0, 0),
                    unread: Paths::default(),
                    marked: Paths::default(),
                    remembered: 0,
                    anew,
                    places,
                });
            }
            Err(error) => {
                let directive = self.commands[current].directive.clone();
                self.guest_failed(&directive, &name, &error, false);
            }
        }
    }

    fn guest_failed(&mut self, directive: &Directive, name: &str, error: &Error, partly: bool) {
        self.keep.insert(prepare::prefix(directive, name, true));
        let rest = match partly {
            true => format!("The other disks of {name} are saved."),
            false => format!("Nothing of {name} is in this backup."),
        };
        self.reporter.message(
            Importance::Error,
            &format!("{name}: ERROR {}. {rest}", error.report()),
        );
        if directive.on_error == OnError::Fail {
            self.fatal.push(Error::new(
                Code::GuestsFailed,
                format!("{name}, and on_error=fail is set"),
            ));
        }
    }

    /// A selector found nothing.
    fn selector_missed(&mut self, directive: &Directive) {
        if directive.on_error == OnError::Fail {
            self.fatal.push(Error::new(
                Code::GuestsFailed,
                "a selector found nothing, and on_error=fail is set",
            ));
        }
    }

    fn end_command(&mut self, current: usize) -> Result<Step<'_>> {
        self.commands[current].done = true;
        self.current = None;
        if self.commands.iter().all(|c| c.done) {
            if self.opened == 0 {
                self.fatal.push(Error::new(
                    Code::GuestsFailed,
                    "none of the guests could be opened",
                ));
            }
            if let Some(first) = self.fatal.drain(..).next() {
                return Err(first);
            }
        }
        Ok(Step::End)
    }

    /// One step of the walk; sets `item` when it found something to send. `false`: the guest is
    /// through.
    fn step(&mut self, daemon: &mut dyn Daemon) -> bool {
        let Some(running) = &mut self.running else {
            return false;
        };
        let Some(walker) = &mut running.walker else {
            if let Some((path, data)) = running.extra.pop_front() {
                self.offer_extra(path, data, daemon);
            } else if let Some(root) = running.root.take() {
                self.offer(root, daemon);
            } else {
                return false;
            }
            return true;
        };
        let (cancel, reporter) = (&self.cancel, &self.reporter);
        match walker.next_unless(|| cancel.is_set() || reporter.cancelled()) {
            // Not the end of the walk, but of the job.
            None if cancel.is_set() || reporter.cancelled() => {}
            None => {
                pass(Point::LastFile);
                running.ending = running.walker.take().map_or_else(Vec::new, ReadAhead::stop);
            }
            Some(ahead::Item::Begin(entry)) => {
                let path = running.open.catalog_path(&entry.path);
                let item = Item::new(
                    FileType::Directory,
                    path,
                    None,
                    stat(&entry, self.settings.estimate),
                );
                let wanted = item.is_some_and(|item| daemon.accepts(&item));
                if !wanted || self.leaves_out(&entry) {
                    let walker = self.running.as_mut().and_then(|r| r.walker.as_mut());
                    walker.into_iter().for_each(ReadAhead::leave_out);
                }
            }
            Some(ahead::Item::End(entry)) if entry.entry.path.is_empty() => {
                running.root = Some(entry)
            }
            Some(ahead::Item::Object(entry) | ahead::Item::End(entry)) => self.offer(entry, daemon),
            Some(ahead::Item::Problem(problem)) => {
                // There may be any number of them, of long paths.
                if running.remembered <= MAX_KEPT {
                    let mut path = running.open.catalog_path(&problem.path);
                    self.keep(path.clone(), false);
                    path.push(b'/');
                    self.keep(path, problem.subtree);
                }
                self.count_error(&problem.error);
            }
            Some(ahead::Item::Note(note)) => {
                let importance = match note.level {
                    NoteLevel::Info => Importance::Info,
                    NoteLevel::Warning => Importance::Warning,
                };
                self.tell(importance, &note.text);
            }
        }
        true
    }

    /// Makes an entry the current item if the FileSet and the level want it.
    fn offer(&mut self, mut prepared: ahead::Prepared, daemon: &mut dyn Daemon) {
        let entry = &prepared.entry;
        let Some(running) = &mut self.running else {
            return;
        };
        // Directories were asked about when they were announced.
        if entry.kind != Kind::Directory && running.filter.names(entry) {
            return;
        }
        let file_type = match entry.kind {
            Kind::Regular => FileType::Regular,
            Kind::Directory => FileType::Directory,
            Kind::Symlink => FileType::Symlink,
            Kind::Fifo | Kind::CharDevice | Kind::BlockDevice => FileType::Special,
            Kind::Socket => {
                running.sockets += 1;
                return;
            }
        };
        let path = running.open.catalog_path(&entry.path);
        let stat = stat(entry, self.settings.estimate);
        let Some(mut item) = Item::new(file_type, path, entry.link.clone(), stat) else {
            let error = Error::new(
                Code::Internal,
                format!("a name with a NUL byte: {}", escape(&entry.path)),
            );
            self.count_error(&error);
            return;
        };
        item.sparse = entry.kind == Kind::Regular && entry.meta.is_sparse();
        if !daemon.accepts(&item) {
            return;
        }
        if let Some(limit) = running.filter.too_large(entry) {
            let text = format!(
                "/{} is left out: {} bytes, max_file_size is {limit}",
                escape(&entry.path),
                entry.meta.size,
            );
            self.tell(Importance::Warning, &text);
            return;
        }
        let anew = running.anew.contains(item.accurate_name().to_bytes());
        // Asked in any case: an accurate job learns here that it is there.
        let changed = self.settings.full || daemon.changed(&item);
        if !anew && !changed {
            if self.settings.accurate {
                daemon.mark_seen(&item);
            }
            return;
        }
        if let Some(first) = running.links.find(&entry.meta) {
            let (name, target) = (item.name.to_bytes().to_vec(), first.path.into_vec());
            if let Some(linked) = Item::new(FileType::HardLink, name, Some(target), item.stat) {
                item = Item {
                    link_file_index: first.file_index,
                    ..linked
                };
                if self.settings.estimate {
                    item.stat.st_size = 0;
                }
            }
        } else if entry.kind == Kind::Regular && entry.meta.size > 0 && !self.settings.estimate {
            if let Err(error) = running.take_holes(entry, self.client.limits.holes.as_deref()) {
                self.keep(item.accurate_name().to_bytes().to_vec(), false);
                self.count_error(&error);
                return;
            }
            // Opened here: after startBackupFile the catalog has the file, readable or not.
            let stopped = self.stop_sign();
            let opened = if prepared.has_contents() {
                Ok(Some((prepared.contents(), prepared)))
            } else {
                let open = move || (prepared.contents(), prepared);
                self.aside.run(stopped, open, drop)
            };
            let contents = match opened {
                Ok(Some((contents, back))) => {
                    prepared = back;
                    contents
                }
                // The job is at its end.
                Ok(None) => return,
                Err(error) => {
                    self.keep(item.accurate_name().to_bytes().to_vec(), false);
                    self.count_error(&error);
                    return;
                }
            };
            let source = contents.and_then(|contents| match contents {
                // Sent, it would hide what an earlier job has of it. In a full job a part is better
                // than nothing.
                Contents::Memory(mut memory) if !self.settings.full => memory
                    .whole(&prepared.entry)
                    .map(|()| Source::Read(Contents::Memory(memory))),
                Contents::Memory(memory) => Ok(Source::Read(Contents::Memory(memory))),
                Contents::File(file) => self.aside.pump(file).map(Source::Pump),
            });
            match source {
                Ok(source) => self.source = source,
                Err(error) => {
                    self.keep(item.accurate_name().to_bytes().to_vec(), false);
                    self.count_error(&error);
                    return;
                }
            }
        }
        self.item = Some(item);
        self.entry = Some(prepared);
    }

    /// Makes one of our own files the current item.
    fn offer_extra(&mut self, path: Vec<u8>, data: Vec<u8>, daemon: &mut dyn Daemon) {
        let mut stat = crate::sys::zeroed_stat();
        stat.st_mode = libc::S_IFREG | 0o600;
        stat.st_nlink = 1;
        stat.st_size = i64::try_from(data.len()).unwrap_or(0);
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        stat.st_mtime = i64::try_from(now.as_secs()).unwrap_or(0);
        stat.st_ctime = stat.st_mtime;
        stat.st_atime = stat.st_mtime;
        let Some(item) = Item::new(FileType::Regular, path, None, stat) else {
            return;
        };
        if daemon.accepts(&item) {
            self.source = Source::Memory(io::Cursor::new(data));
            self.item = Some(item);
        }
    }

    /// Whether the client file leaves this directory out. That may have to look into it.
    fn leaves_out(&mut self, entry: &Entry) -> bool {
        let Some(running) = &mut self.running else {
            return false;
        };
        if running.filter.names(entry) {
            return true;
        }
        let Some(look) = running.filter.look(entry) else {
            return false;
        };
        let stopped = self.stop_sign();
        // Given up: the job is at its end. Failed: the walk goes in, nothing is left out unasked.
        let marked = matches!(self.aside.run(stopped, look, |_| ()), Ok(Some(true)));
        if let Some(running) = self.running.as_mut().filter(|_| marked) {
            running.filter.left_out += 1;
            // Without the mark, all that is old in there is new to the next job.
            let tree = running.open.catalog_path(&entry.path);
            running.remember([&tree[..], b"/"].concat(), true, |r| &mut r.marked);
        }
        marked
    }

    fn count_error(&mut self, error: &Error) {
        if let Some(running) = &mut self.running {
            running.errors += 1;
        }
        self.tell(Importance::Error, &error.report());
    }

    /// A message about something in the running guest. There may be any number: see [`MAX_TOLD`].
    fn tell(&mut self, importance: Importance, text: &str) {
        let Some(running) = &mut self.running else {
            self.reporter.message(importance, text);
            return;
        };
        if running.told <= MAX_TOLD {
            let text = format!("{}: {}", running.open.name(), shorten(text));
            running.told += text.len();
            self.reporter.message(importance, &text);
        } else if importance >= Importance::Error {
            running.untold.0 += 1;
        } else {
            running.untold.1 += 1;
        }
    }

    /// Remembers an object of the running guest that could not be read, or with `below` a whole tree.
    fn keep(&mut self, path: Vec<u8>, below: bool) {
        if let Some(running) = &mut self.running {
            running.remember(path, below, |r| &mut r.unread);
        }
    }

    /// Ends the running guest: checks its snapshots, then takes everything down.
    fn release(&mut self) {
        let Some(running) = self.running.take() else {
            return;
        };
        pass(Point::Release);
        let Running {
            open,
            walker,
            ending,
            files,
            bytes,
            errors,
            sockets,
            untold,
            started,
            root,
            filter,
            unread,
            marked,
            places,
            ..
        } = running;
        self.keep.join(&unread);
        let complete = walker.is_none() && root.is_none();
        // All of these hold folders of the guest open.
        self.source = Source::Nothing;
        self.entry = None;
        drop(root);
        let mut threads = ending;
        threads.extend(walker.map(ReadAhead::stop).unwrap_or_default());
        threads.extend(self.aside.stop());
        let stuck = aside::join(threads, self.stop_sign());
        let name = open.name().to_owned();
        for (count, importance) in [
            (untold.0, Importance::Error),
            (untold.1, Importance::Warning),
        ] {
            if count > 0 {
                let what = match importance {
                    Importance::Error => "errors",
                    _ => "warnings",
                };
                let text = format!("{name}: {count} more {what} that are not shown here");
                self.reporter.message(importance, &text);
            }
        }
        if !stuck.is_empty() {
            self.leave_stalled(open, stuck);
            return;
        }
        let mut asked = open;
        let check = move || {
            let checked = asked.check();
            (asked, checked)
        };
        let checked = self.unhurried(
            &name,
            "the state of its snapshots",
            check,
            |(open, checked)| log_late(checked.err().into_iter().chain(open.close())),
        );
        let Some((mut open, checked)) = checked else {
            return;
        };
        if let Some(watch) = &self.watch {
            open.seen(watch.end(open.snapshots()));
            watch.tell(self.reporter.as_ref());
        }
        let tree = open.catalog_tree();
        let used = open
            .peak()
            .map(|p| format!(", COW peak {p:.0} %"))
            .unwrap_or_default();
        let begun = Instant::now();
        let Some(closed) = self.unhurried(&name, "its release", move || open.close(), log_late)
        else {
            return;
        };
        let mut text = format!(
            "{name}: {files} files, {} {}, {errors} errors{used}, in {:.1} s, released in {:.2} s",
            size_text(bytes),
            if complete {
                "sent"
            } else {
                "sent, NOT COMPLETE"
            },
            started.elapsed().as_secs_f64(),
            begun.elapsed().as_secs_f64(),
        );
        if sockets > 0 {
            text.push_str(&format!(
                ", {sockets} sockets not saved (Bacula saves none)"
            ));
        }
        if filter.left_out > 0 {
            text.push_str(&format!(
                ", {} left out as the client file says",
                filter.left_out
            ));
        }
        self.reporter.message(Importance::Info, &text);
        if let Err(error) = checked {
            let rest = match error.code() {
                Code::PoolNearlyFull => format!("Only a part of {name} is in this backup."),
                _ => format!("What was saved of {name} in this job cannot be trusted."),
            };
            self.reporter.message(
                Importance::Error,
                &format!("{name}: ERROR {}. {rest}", error.report()),
            );
            self.fatal.push(Error::new(error.code(), name.clone()));
        } else if complete && !self.settings.estimate {
            let saves = self.saves.as_ref();
            let saved = saves.map(|saves| saves.saved(&tree, places, &unread, &marked));
            if let Some(Err(error)) = saved {
                self.will_be_saved_again(&error);
            }
        }
        for error in closed {
            self.reporter
                .message(Importance::Error, &format!("{name}: {}", error.report()));
        }
        pass(Point::Released);
    }

    /// Does a part of a guest's end beside the daemon's thread. `None`: the job was cancelled some time
    /// ago and this still waits; it goes on by itself, with the journal, and that was told. What it
    /// gives is for `late` then.
    fn unhurried<T: Send + 'static>(
        &mut self,
        name: &str,
        step: &str,
        work: impl FnOnce() -> T + Send + 'static,
        late: impl FnOnce(T) + Send + 'static,
    ) -> Option<T> {
        let journal = self.journal.clone();
        let done = self
            .aside
            .run(patient(self.stop_sign()), work, move |given| {
                late(given);
                // What was given writes to the journal.
                drop(journal);
            });
        match done {
            Ok(Some(done)) => return Some(done),
            Ok(None) => {
                let what = format!("{name}: the job was cancelled while {step} waits for it");
                self.give_up_on(&Error::new(Code::DiskStalled, what));
            }
            // What the work held was dropped, and so released.
            Err(error) => {
                let text = format!("{name}: {step}: {}", error.report());
                self.reporter.message(Importance::Error, &text);
                // Whether its snapshots were valid to the end is not known.
                self.fatal
                    .push(Error::new(Code::GuestsFailed, format!("{name}: {step}")));
            }
        }
        None
    }

    /// Tells of a disk that does not answer. The Director may not listen to a cancelled job any more:
    /// the daemon's own log has it too.
    fn give_up_on(&mut self, error: &Error) {
        self.give_up();
        log::warn!("{}", error.report());
        self.reporter.message(Importance::Error, &error.report());
    }

    /// Leaves a guest whose disk does not answer to the threads that wait for it: what they hold is
    /// taken down when they come back.
    fn leave_stalled(&mut self, mut open: OpenGuest, stuck: Vec<JoinHandle<()>>) {
        if let Some(watch) = &self.watch {
            open.seen(watch.end(open.snapshots()));
        }
        let what = format!(
            "{}: the job was cancelled while {} reads wait for it; its snapshots stay until they come back",
            open.name(),
            stuck.len()
        );
        self.give_up_on(&Error::new(Code::DiskStalled, what));
        let journal = self.journal.clone();
        self.later(move || {
            for thread in stuck {
                // What it has to say was for a job that is over.
                let _ = thread.join();
            }
            log_late(open.close());
            drop(journal);
        });
    }

    /// Does what has to wait for a disk that does not answer, after the job.
    fn later(&self, work: impl FnOnce() + Send + 'static) {
        let thread = std::thread::Builder::new()
            .name("guestsnap-wait".to_owned())
            .spawn(move || {
                // The daemon's signals are handled by the daemon's threads.
                let _ = SigSet::all().thread_block();
                work();
            });
        if let Err(error) = thread {
            // The closure is dropped, and with it all it holds.
            let error = Error::new(Code::Internal, "starting a thread").because(error);
            self.reporter.message(Importance::Error, &error.report());
        }
    }
}

impl Running {
    /// Adds to one of the sets; see [`MAX_KEPT`].
    fn remember(&mut self, path: Vec<u8>, below: bool, set: fn(&mut Running) -> &mut Paths) {
        self.remembered += size_of::<Vec<u8>>() + path.len();
        match self.remembered {
            ..=MAX_KEPT if below => set(self).insert(path),
            ..=MAX_KEPT => set(self).insert_object(path),
            _ => {
                let all = self.open.catalog_tree();
                set(self).insert(all);
            }
        }
    }

    /// Counts a file's holes, as long as there are not too many.
    fn take_holes(&mut self, entry: &Entry, most: Option<&u64>) -> Result<()> {
        let most = most.copied().unwrap_or(MAX_HOLES);
        let (size, data) = (entry.meta.size, entry.meta.blocks.saturating_mul(512));
        let holes = self.holes.saturating_add(size.saturating_sub(data));
        if holes > most {
            let text = format!(
                "/{}: a file of {} with {} of data; of holes {} are delivered",
                escape(&entry.path),
                size_text(size),
                size_text(data),
                size_text(most),
            );
            return Err(Error::new(Code::TooManyHoles, text));
        }
        self.holes = holes;
        Ok(())
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

/// What went wrong after a job that was given up: it is told to nobody else.
fn log_late(errors: impl IntoIterator<Item = Error>) {
    for error in errors {
        log::error!("{}", error.report());
    }
}

/// Messages of another thread, for the job's to pass on. A job that has given up waiting is gone
/// when they come: then they are for the daemon's own log.
#[derive(Debug)]
struct Notes(Mutex<Option<Vec<(Importance, String)>>>);

impl Default for Notes {
    fn default() -> Notes {
        Notes(Mutex::new(Some(Vec::new())))
    }
}

impl Notes {
    fn lock(&self) -> MutexGuard<'_, Option<Vec<(Importance, String)>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, reporter: &dyn Reporter) {
        let notes = self.lock().as_mut().map(std::mem::take);
        for (importance, text) in notes.unwrap_or_default() {
            reporter.message(importance, &text);
        }
    }

    /// Passes on what there is. The job takes no more.
    fn leave(&self, reporter: &dyn Reporter) {
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

impl Drop for Backup {
    fn drop(&mut self) {
        self.finish();
    }
}

fn sent(running: &Running) -> String {
    format!("{} files, {}", running.files, size_text(running.bytes))
}

/// Tells what is saved though it did not change since the job before.
fn tell_anew(open: &OpenGuest, anew: &Paths, previous: &str, reporter: &dyn Reporter) {
    const SHOWN: usize = 5;
    let (name, all) = (open.name(), open.catalog_tree());
    let mut text = format!(
        "{name}: saved whole, for the job before ({previous}) does not have it, or has another root of \
         it, or by other rules for what is left out"
    );
    if !anew.contains(&all) {
        let paths = anew.trees().chain(anew.objects());
        let paths: Vec<_> = paths
            .map(|path| shorten(&escape(path)).into_owned())
            .collect();
        let shown = &paths[..paths.len().min(SHOWN)];
        let more = match paths.len() - shown.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        text = format!(
            "{name}: saved whole, for the job before ({previous}) has not read them: {}{more}",
            shown.join(", ")
        );
    }
    if *anew != Paths::default() {
        reporter.message(Importance::Info, &text);
    }
}

/// The directive behind `guestsnap:`.
pub(super) fn parse(text: &[u8]) -> Result<Directive> {
    let text = std::str::from_utf8(text)
        .map_err(|e| Error::new(Code::BadDirective, "not UTF-8").because(e))?;
    let (_, rest) = text
        .split_once(':')
        .ok_or_else(|| Error::new(Code::BadDirective, format!("no colon in {text:?}")))?;
    Directive::parse(rest)
}

fn stat(entry: &Entry, estimate: bool) -> libc::stat {
    let meta = &entry.meta;
    let mut stat = crate::sys::zeroed_stat();
    let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    stat.st_dev = meta.dev;
    stat.st_ino = meta.ino;
    stat.st_nlink = meta.nlink.into();
    stat.st_mode = meta.mode;
    stat.st_uid = meta.uid;
    stat.st_gid = meta.gid;
    stat.st_rdev = meta.rdev;
    // An estimate adds up every size it is given.
    let sized = !estimate || entry.kind == Kind::Regular;
    stat.st_size = if sized { signed(meta.size) } else { 0 };
    stat.st_blksize = meta.blksize.into();
    stat.st_blocks = signed(meta.blocks);
    for (seconds, nanoseconds, time) in [
        (&mut stat.st_atime, &mut stat.st_atime_nsec, meta.atime),
        (&mut stat.st_mtime, &mut stat.st_mtime_nsec, meta.mtime),
        (&mut stat.st_ctime, &mut stat.st_ctime_nsec, meta.ctime),
    ] {
        *seconds = time.seconds;
        *nanoseconds = time.nanoseconds.into();
    }
    stat
}
