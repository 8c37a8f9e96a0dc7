//! The run of one guest: its tree is walked, and file after file offered to Bacula.

use std::collections::VecDeque;
use std::io;
use std::thread::JoinHandle;

use super::context::Context;
use super::file::{FileRun, Source};
use super::guest_ledger::GuestLedger;
use super::helper::Helper;
use super::opening::Opened;
use super::settings::BackupSettings;
use super::tally::{Holes, Tally};
use crate::error::{Code, Error, Result, escape};
use crate::inode::Kind;
use crate::job::caller::{Daemon, Importance};
use crate::job::filter::Filter;
use crate::job::item;
use crate::job::item::{FileType, Item};
use crate::job::open::{OpenGuest, OwnFile};
use crate::job::watch::Watch;
use crate::point::{Point, pass};
use crate::stream::ahead::{self, Contents, ReadAhead};
use crate::stream::{Entry, HardLinks};

/// Memory for files with several names, per guest: half a million of them at a time.
pub(super) const HARD_LINK_BYTES: usize = 64 << 20;

/// The guest that is being streamed.
pub(super) struct GuestRun {
    pub(super) open: OpenGuest,
    pub(super) walk: Walk,
    pub(super) links: HardLinks,
    /// Names that are sent after the first one of their file, though they were walked before it.
    late: VecDeque<Item>,
    pub(super) filter: Filter,
    pub(super) holes: Holes,
    pub(super) tally: Tally,
    pub(super) ledger: GuestLedger,
    pub(super) file: Option<FileRun>,
}

/// The rest of a guest, still to be sent.
pub(super) struct Walk {
    /// `None` once everything was walked.
    walker: Option<ReadAhead>,
    /// The threads of a walk that is through, as far as they still run.
    ending: Vec<JoinHandle<()>>,
    /// Files of ours. They come before the root, so that its times are put on last.
    extra: VecDeque<OwnFile>,
    /// The guest's root, the last to be sent.
    root: Option<ahead::Prepared>,
}

impl Walk {
    pub(super) fn is_complete(&self) -> bool {
        self.walker.is_none() && self.root.is_none()
    }

    /// Stops the readers. Returns their threads, which may still wait for a disk.
    pub(super) fn stop(self) -> Vec<JoinHandle<()>> {
        drop(self.root);
        let mut threads = self.ending;
        threads.extend(self.walker.map(ReadAhead::stop).unwrap_or_default());
        threads
    }

    /// All is walked; the guest's root and our own files are left.
    fn end(&mut self) {
        self.ending = self.walker.take().map_or_else(Vec::new, ReadAhead::stop);
    }

    /// Excludes the contents of the directory that was begun last.
    fn leave_out(&mut self) {
        self.walker.iter_mut().for_each(ReadAhead::leave_out);
    }
}

impl GuestRun {
    pub(super) fn new(opened: Opened, context: &Context) -> GuestRun {
        let Opened {
            walker,
            open,
            anew,
            places,
            errors,
        } = opened;
        let (settings, client) = (&context.settings, &context.client);
        let name = open.name();
        GuestRun {
            walk: Walk {
                walker,
                ending: Vec::new(),
                extra: open.own_files().into(),
                root: None,
            },
            links: HardLinks::new(HARD_LINK_BYTES, Some(&settings.working_dir)),
            late: VecDeque::new(),
            filter: Filter::new(client.filter(name)),
            holes: Holes::new(client.limits.holes.as_deref().copied()),
            tally: Tally::new(name, errors, context.desk()),
            ledger: GuestLedger::new(open.catalog_tree(), anew, places),
            file: None,
            open,
        }
    }

    /// One step of the walk; sets the current file when it found something to send. `false`: the guest
    /// is through.
    pub(super) fn step(&mut self, context: &mut Context, daemon: &mut dyn Daemon) -> bool {
        if let Some(late) = self.late.pop_front() {
            self.file = Some(FileRun::other(late, None));
            return true;
        }
        let Some(walker) = &mut self.walk.walker else {
            if let Some(own) = self.walk.extra.pop_front() {
                self.offer_own(own, &context.settings, daemon);
            } else if let Some(root) = self.walk.root.take() {
                self.offer(root, context, daemon);
            } else {
                return false;
            }
            return true;
        };
        let desk = context.desk();
        match walker.next_unless(|| desk.is_stopped()) {
            // Not the end of the walk, but of the job.
            None if desk.is_stopped() => {}
            None => {
                pass(Point::LastFile);
                self.walk.end();
            }
            Some(ahead::Item::Begin(entry)) => self.begin(&entry, &mut context.helper, daemon),
            Some(ahead::Item::End(entry)) if entry.entry.path.is_empty() => {
                self.walk.root = Some(entry);
            }
            Some(ahead::Item::Object(entry) | ahead::Item::End(entry)) => {
                self.offer(entry, context, daemon);
            }
            Some(ahead::Item::Problem(problem)) => {
                let path = self.open.catalog_path(&problem.path);
                self.ledger.keep_problem(path, problem.subtree);
                self.tally.error(&problem.error);
            }
            Some(ahead::Item::LeftOut(left_out)) => {
                let path = self.open.catalog_path(&left_out.path);
                self.ledger.leave_out_subvolume(path, &left_out);
            }
        }
        true
    }

    /// Begins a directory: asks whether its contents are wanted.
    fn begin(&mut self, entry: &Entry, helper: &mut Helper, daemon: &mut dyn Daemon) {
        let path = self.open.catalog_path(&entry.path);
        let item = Item::new(FileType::Directory, path, None, item::stat(entry));
        let wanted = item.is_some_and(|item| daemon.accepts(&item));
        if !wanted || self.leaves_out(entry, helper) {
            self.walk.leave_out();
        }
    }

    /// Whether the client file leaves this directory out. That may have to look into it.
    fn leaves_out(&mut self, entry: &Entry, helper: &mut Helper) -> bool {
        if self.filter.names(entry) {
            return true;
        }
        let Some(look) = self.filter.look(entry) else {
            return false;
        };
        // Given up: the job is at its end. Failed: the walk goes in, nothing is left out unasked.
        let marked = matches!(helper.run(look, |_| ()), Ok(Some(true)));
        if marked {
            self.filter.left_out += 1;
            let path = self.open.catalog_path(&entry.path);
            self.ledger.leave_out_marked(path);
        }
        marked
    }

    /// Makes an entry the current file if the FileSet and the level want it.
    fn offer(&mut self, prepared: ahead::Prepared, context: &mut Context, daemon: &mut dyn Daemon) {
        let settings = &context.settings;
        let Some(item) = self.item_of(&prepared.entry, daemon) else {
            return;
        };
        if !self.is_due(&item, &prepared.entry, settings, daemon) {
            // A name that comes before a first name that is new is sent after it.
            let (meta, name) = (&prepared.entry.meta, item.name.as_bytes());
            if !settings.accurate {
                return;
            }
            if self.links.unsent(meta, name) {
                daemon.mark_seen(&item);
                return;
            }
        }
        let path = item.accurate_name().to_owned();
        match self.file_of(item, prepared, settings, &mut context.helper) {
            Ok(file) => self.file = file,
            Err(error) => {
                self.ledger.keep(path.to_bytes());
                self.tally.error(&error);
            }
        }
    }

    /// The entry to Bacula, unless it is left out.
    fn item_of(&mut self, entry: &Entry, daemon: &mut dyn Daemon) -> Option<Item> {
        // Directories were asked about when they were announced.
        if entry.kind != Kind::Directory && self.filter.names(entry) {
            return None;
        }
        let Some(file_type) = FileType::of(entry.kind) else {
            self.tally.sockets += 1;
            return None;
        };
        let path = self.open.catalog_path(&entry.path);
        let item = Item::new(file_type, path, entry.link.clone(), item::stat(entry));
        let Some(mut item) = item else {
            let text = format!("a name with a NUL byte: {}", escape(&entry.path));
            self.tally.error(&Error::new(Code::Internal, text));
            return None;
        };
        item.sparse = entry.kind == Kind::Regular && entry.meta.is_sparse();
        if !daemon.accepts(&item) {
            return None;
        }
        if let Some(limit) = self.filter.too_large(entry) {
            let text = format!(
                "/{} is left out: {} bytes, max_file_size is {limit}",
                escape(&entry.path),
                entry.meta.size,
            );
            self.tally.tell(Importance::Info, &text);
            return None;
        }
        Some(item)
    }

    /// Whether an item is to be sent at the job's level.
    fn is_due(
        &self,
        item: &Item,
        entry: &Entry,
        settings: &BackupSettings,
        daemon: &mut dyn Daemon,
    ) -> bool {
        // Asked in any case: an accurate job learns here that it is there.
        let changed = settings.full || daemon.changed(item);
        // The first name may be new though the file is not: its folder has another name, say. In the catalog the
        // others are links to a name that is gone.
        changed
            || self.ledger.is_anew(item.accurate_name().to_bytes())
            || self.links.knows(&entry.meta)
    }

    /// An item with its data, or as a hard link. `None`: the job is at its end.
    fn file_of(
        &mut self,
        mut item: Item,
        prepared: ahead::Prepared,
        settings: &BackupSettings,
        helper: &mut Helper,
    ) -> Result<Option<FileRun>> {
        let (kind, meta) = (prepared.entry.kind, &prepared.entry.meta);
        // An estimate adds up every size it is given; the comparison with the job before needs those of the job.
        let mut changed = settings.estimate && kind != Kind::Regular;
        if changed {
            item.stat.st_size = 0;
        }
        if let Some(first) = self.links.find(meta) {
            if let Some(mut linked) = item.linked_to(first.path.into_vec(), first.file_index) {
                if settings.estimate {
                    linked.stat.st_size = 0;
                }
                item = linked;
                changed = true;
            }
        } else if kind == Kind::Regular && meta.size > 0 && !settings.estimate {
            self.holes.take(&prepared.entry)?;
            let opened = open_source(prepared, settings.full, helper)?;
            return Ok(
                opened.map(|(source, prepared)| FileRun::accepted(item, Some(prepared), source))
            );
        }
        Ok(Some(match changed {
            true => FileRun::other(item, Some(prepared)),
            false => FileRun::accepted(item, Some(prepared), Source::Nothing),
        }))
    }

    /// Makes one of our own files the current one, unless the job before has the very same.
    fn offer_own(&mut self, own: OwnFile, settings: &BackupSettings, daemon: &mut dyn Daemon) {
        let item = Item::own_file(own.path, own.data.len());
        let Some(item) = item.filter(|item| daemon.accepts(item)) else {
            return;
        };
        if own.unchanged && settings.accurate {
            daemon.mark_seen(&item);
        } else if !own.unchanged {
            let source = Source::Memory(io::Cursor::new(own.data));
            self.file = Some(FileRun::accepted(item, None, source));
        }
    }

    /// Data of the current file; 0 at its end.
    pub(super) fn read(&mut self, buffer: &mut [u8], helper: &Helper) -> io::Result<usize> {
        let Some(file) = &mut self.file else {
            return Ok(0);
        };
        let desk = helper.desk();
        let read = file.read(buffer, desk.stop_sign());
        if read.is_err() && !desk.is_stopped() {
            // The daemon tells it.
            self.tally.errors += 1;
            self.ledger.keep(file.path());
        }
        let count = read?;
        self.tally.bytes = self.tally.bytes.saturating_add(count as u64);
        Ok(count)
    }

    /// The next record of the current file.
    pub(super) fn record(&mut self, helper: &mut Helper) -> Option<Vec<u8>> {
        let file = self.file.as_mut()?;
        match file.collect(helper) {
            Ok(problems) => {
                problems
                    .iter()
                    .for_each(|problem| self.tally.error(problem));
                if !problems.is_empty() {
                    // Some attributes are not in this job: all of the file is in the next one.
                    self.ledger.keep(file.path());
                }
            }
            Err(error) => self.tally.error(&error),
        }
        file.record()
    }

    /// The current file was sent as `file_index`.
    pub(super) fn end_file(&mut self, file_index: i32) {
        if let Some(file) = &mut self.file {
            self.tally.files += 1;
            file.end(file_index, &mut self.links);
            for name in self.links.take_late() {
                // All names of a file have one inode.
                let first = &file.item;
                let target = Some(first.name.as_bytes().to_vec());
                let late = Item::new(FileType::HardLink, name.into_vec(), target, first.stat);
                self.late.extend(late.map(|late| Item {
                    link_file_index: file_index,
                    ..late
                }));
            }
        }
    }

    /// Why this guest is to be given up, if it is.
    pub(super) fn is_doomed(&self, watch: &Watch) -> Option<Error> {
        watch.given_up(self.open.snapshots())
    }
}

/// Opens the contents of a regular file. `None`: the job is at its end.
fn open_source(
    mut prepared: ahead::Prepared,
    full: bool,
    helper: &mut Helper,
) -> Result<Option<(Source, ahead::Prepared)>> {
    // Opened here: after startBackupFile the catalog has the file, readable or not.
    let opened = if prepared.has_contents() {
        Some((prepared.contents(), prepared))
    } else {
        helper.run(move || (prepared.contents(), prepared), drop)?
    };
    let Some((contents, prepared)) = opened else {
        return Ok(None);
    };
    let source = match contents? {
        // If sent, it would hide the version in an earlier job. In a full job a part is better
        // than nothing.
        Contents::Memory(mut memory) if !full => {
            memory.whole(&prepared.entry)?;
            Source::Read(Contents::Memory(memory))
        }
        Contents::Memory(memory) => Source::Read(Contents::Memory(memory)),
        Contents::File(file) => Source::Pump(helper.pump(file)?),
    };
    Ok(Some((source, prepared)))
}
