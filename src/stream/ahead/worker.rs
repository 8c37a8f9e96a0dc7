//! The threads: one walks, the others read.

use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use rustix::fs::{Mode, OFlags, RawDir};

use super::item::{Contents, InMemory, Item, Prepared, cost_of};
use super::options::AheadOptions;
use super::queue::{
    MAX_DIRECTORIES, MAX_WAITING, Opened, Output, Slot, SlotContent, State, Work, ready,
};
use crate::inode::{Kind, Meta};
use crate::stream::content::FileReader;
use crate::stream::entry::Entry;
use crate::stream::walk::{self, Step, Walker};
use crate::stream::xattrs;

/// Maximum names queued for an early lookup.
const MAX_SOON: usize = 128;

/// Maximum directories held open for early lookups.
const MAX_SOON_DIRECTORIES: usize = 8;

/// Files open for reading at the same time. The kernel is asked for the contents of all of them
/// before a reader waits for the first. (Measured at 5 ms per read: 32, 64 and 128 gave 4,800,
/// 7,400 and 9,700 small files a second.) All threads share them; many threads with few files each
/// also look up many inodes at once.
const OPEN_FILES: u64 = 128;

/// Maximum share of the daemon's descriptor limit that a job uses for [`OPEN_FILES`]: one in this many.
const PART_OF_DESCRIPTORS: u64 = 8;

/// Maximum objects that a thread takes at a time.
const MAX_BATCH: usize = 32;

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) state: Mutex<State>,
    /// Signals work for the readers.
    pub(super) work: Condvar,
    /// Signals that the head of the queue may be ready.
    pub(super) ready: Condvar,
    /// Signals that there may be room.
    pub(super) room: Condvar,
    pub(super) options: AheadOptions,
    pub(super) small_file: usize,
    /// Maximum objects per thread at a time.
    pub(super) batch: usize,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic with the lock held sets `failed` while unwinding.
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(super) fn wake_all(&self) {
        self.work.notify_all();
        self.ready.notify_all();
        self.room.notify_all();
    }

    /// Runs a thread's body. A panic ends the whole walk with a problem, never silently.
    pub(super) fn run(&self, body: impl FnOnce()) {
        if catch_unwind(AssertUnwindSafe(body)).is_err() {
            let mut state = self.lock();
            state.failed = true;
            state.stop = true;
            drop(state);
            self.wake_all();
        }
    }

    // ---- walking thread ----

    pub(super) fn walk(&self, mut walker: Walker) {
        walker.keep_soon();
        // Directories the walk is in: number, and depth outside of it.
        let mut inside: Vec<(u64, usize)> = Vec::new();
        let mut next = 0;
        loop {
            if let Some(gone) = self.abandon(&mut walker, &mut inside) {
                if !self.push(ready(Output::Gone(gone)), 0, false) {
                    return;
                }
                continue;
            }
            let Some(step) = walker.next_step() else {
                break;
            };
            self.add_soon(walker.take_soon());
            let (content, cost, directory) = match step {
                Step::Passed if self.lock().stop => return,
                Step::Passed => continue,
                Step::Object(object) => {
                    let cost = cost_of(&object.path);
                    (SlotContent::ToRead(Work::Object(object)), cost, false)
                }
                Step::Item(walk::Item::Object(entry)) => {
                    let cost = cost_of(&entry.path);
                    (SlotContent::ToRead(Work::Entry(entry)), cost, false)
                }
                Step::Item(walk::Item::Begin(entry)) => {
                    inside.push((next, walker.depth()));
                    next += 1;
                    let cost = cost_of(&entry.path);
                    (ready(Output::Begin(next - 1, entry)), cost, true)
                }
                Step::Item(walk::Item::End(entry)) => {
                    let Some((number, _)) = inside.pop() else {
                        unreachable!("an end without a beginning");
                    };
                    let cost = cost_of(&entry.path);
                    (SlotContent::ToRead(Work::End(number, entry)), cost, true)
                }
                Step::Item(walk::Item::Problem(problem)) => {
                    let cost = cost_of(&problem.path);
                    let item = Item::Problem(problem);
                    (ready(Output::Item(item)), cost, false)
                }
                Step::Item(walk::Item::LeftOut(left_out)) => {
                    let cost = cost_of(&left_out.path);
                    let item = Item::LeftOut(left_out);
                    (ready(Output::Item(item)), cost, false)
                }
            };
            if !self.push(content, cost, directory) {
                return;
            }
        }
        drop(walker);
        let mut state = self.lock();
        state.walked = true;
        // Readers need no early lookups now, and the disk may be slow.
        let soon = std::mem::take(&mut state.soon);
        drop(state);
        drop(soon);
        self.wake_all();
    }

    /// Leaves the outermost directory that the job leaves out, and returns its number.
    fn abandon(&self, walker: &mut Walker, inside: &mut Vec<(u64, usize)>) -> Option<u64> {
        let left_out = {
            let mut state = self.lock();
            if state.left_out.is_empty() {
                return None;
            }
            std::mem::take(&mut state.left_out)
        };
        let at = inside.iter().position(|(n, _)| left_out.contains(n))?;
        let (number, depth) = inside[at];
        inside.truncate(at);
        walker.abandon(depth);
        Some(number)
    }

    fn add_soon(&self, directories: Vec<(Arc<OwnedFd>, Vec<u8>)>) {
        if directories.is_empty() {
            return;
        }
        let mut state = self.lock();
        // The walk reaches these before those already queued.
        for directory in directories.into_iter().rev() {
            state.soon.push_front(directory);
        }
        let keep = soon_to_keep(&state.soon);
        let too_many = state.soon.split_off(keep);
        drop(state);
        drop(too_many);
        self.work.notify_all();
    }

    /// Queues a result, or the work for it. `false`: the job wants no more.
    fn push(&self, content: SlotContent, cost: usize, directory: bool) -> bool {
        let mut state = self.lock();
        loop {
            if state.stop {
                return false;
            }
            let full = state.used + cost > self.options.budget
                || state.slots.len() >= MAX_WAITING
                || (directory && state.directories >= MAX_DIRECTORIES);
            // An empty queue always has room for one.
            if !full || state.slots.is_empty() {
                break;
            }
            state.walk_waits = true;
            state = self.room.wait(state).unwrap_or_else(|e| e.into_inner());
            state.walk_waits = false;
        }
        state.used += cost;
        state.directories += usize::from(directory);
        let is_work = matches!(content, SlotContent::ToRead(_));
        // Each wake-up is a system call: only for sleeping threads.
        let wake_reader = is_work && state.idle > 0;
        let wake_job = !is_work && state.slots.is_empty() && state.wanted;
        state.slots.push_back(Slot { cost, content });
        drop(state);
        if wake_reader {
            self.work.notify_one();
        } else if wake_job {
            self.ready.notify_one();
        }
        true
    }

    // ---- reading threads ----

    pub(super) fn read(&self) {
        let mut names = vec![MaybeUninit::uninit(); 32 << 10];
        let mut batch = Vec::with_capacity(self.batch);
        let mut opened = Vec::with_capacity(self.batch);
        let mut state = self.lock();
        loop {
            if state.stop {
                return;
            }
            // Before each batch, so that the disk constantly gets requests ahead of the walk.
            let soon = state.soon.pop_front();
            if let Some((parent, name)) = &soon {
                drop(state);
                warm(parent, name, &mut names);
                state = self.lock();
            }
            state.take_work(self.options.threads, self.batch, &mut batch);
            if !batch.is_empty() {
                drop(state);
                let several = batch.len() > 1;
                opened.extend(
                    batch
                        .drain(..)
                        .map(|(n, work)| (n, self.open(work, several))),
                );
                // In order: the reader of the queue's head never waits for room.
                for (number, opened) in opened.drain(..) {
                    // Attributes may be large; they are counted once read.
                    drop(self.wait_for_room(number, 0));
                    let (output, extra) = self.finish(number, opened);
                    let mut state = self.lock();
                    state.finish(number, output, extra);
                    if number == state.first && state.wanted {
                        self.ready.notify_one();
                    }
                }
                state = self.lock();
            } else if soon.is_some() {
                continue;
            } else if state.walked {
                return;
            } else {
                state.idle += 1;
                state = self.work.wait(state).unwrap_or_else(|e| e.into_inner());
                state.idle -= 1;
            }
        }
    }

    /// Looks up an object and opens it. With `early`, the kernel starts to read a small file.
    fn open(&self, work: Work, early: bool) -> Opened {
        let object = match work {
            Work::Object(object) => object.look(),
            Work::Entry(entry) => walk::Item::Object(entry),
            Work::End(id, entry) => return Opened::End(id, entry),
        };
        let entry = match object {
            walk::Item::Object(entry) => entry,
            walk::Item::Problem(problem) => return Opened::Problem(problem),
            _ => unreachable!("looking at an object gives it or a problem"),
        };
        if entry.kind != Kind::Regular || !self.is_wanted(&entry.meta) {
            return Opened::Entry(entry);
        }
        let reader = FileReader::open(&entry);
        if let Ok(reader) = &reader {
            let size = reader.size();
            if size > self.small_file as u64 || (early && size > 0) {
                reader.will_need();
            }
        }
        Opened::File(entry, reader)
    }

    /// Reads the rest of an object. Also returns the room reserved for its contents.
    fn finish(&self, number: u64, opened: Opened) -> (Output, usize) {
        let (entry, reader) = match opened {
            Opened::Problem(problem) => return (Output::Item(Item::Problem(problem)), 0),
            Opened::File(entry, reader) => (entry, reader),
            Opened::End(id, entry) => return (Output::End(id, self.with_attributes(entry)), 0),
            Opened::Entry(entry) => {
                let prepared = self.with_attributes(entry);
                return (Output::Item(Item::Object(prepared)), 0);
            }
        };
        let mut prepared = Prepared::new(entry);
        let mut extra = 0;
        match reader {
            Ok(mut reader) => extra = self.read_file(number, &mut prepared, &mut reader),
            Err(error) => prepared.contents = Some(Err(error)),
        }
        (Output::Item(Item::Object(prepared)), extra)
    }

    fn with_attributes(&self, entry: Entry) -> Prepared {
        let mut prepared = Prepared::new(entry);
        if self.is_wanted(&prepared.entry.meta) {
            prepared.attributes = Some(xattrs::collect(&prepared.entry, None));
        }
        prepared
    }

    fn is_wanted(&self, meta: &Meta) -> bool {
        if self.options.names_only {
            return false;
        }
        let Some(since) = self.options.changed_since else {
            return true;
        };
        meta.mtime.seconds >= since || meta.ctime.seconds >= since
    }

    fn read_file(&self, number: u64, prepared: &mut Prepared, reader: &mut FileReader) -> usize {
        prepared.attributes = Some(xattrs::collect(&prepared.entry, Some(reader)));
        match usize::try_from(reader.size()) {
            Ok(size) if size <= self.small_file && self.reserve(number, size) => {
                let contents = InMemory::read(reader, size);
                prepared.contents = Some(Ok(Contents::Memory(contents)));
                size
            }
            _ => 0,
        }
    }

    /// Waits for room for a file's contents and reserves it; `false` if stopped.
    fn reserve(&self, number: u64, size: usize) -> bool {
        let mut state = self.wait_for_room(number, size);
        if state.stop {
            return false;
        }
        state.used += size;
        true
    }

    /// Waits for room or the stop. The head of the queue does not wait.
    fn wait_for_room(&self, number: u64, size: usize) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        while state.used + size > self.options.budget && number != state.first && !state.stop {
            state.waiting += 1;
            state = self.room.wait(state).unwrap_or_else(|e| e.into_inner());
            state.waiting -= 1;
        }
        state
    }
}

/// Maximum objects per thread at a time.
pub(super) fn batch(readers: usize, descriptors: Option<u64>) -> usize {
    let files = descriptors.map_or(OPEN_FILES, |all| {
        (all / PART_OF_DESCRIPTORS).min(OPEN_FILES)
    });
    (usize::try_from(files).unwrap_or(usize::MAX) / readers).clamp(1, MAX_BATCH)
}

/// Number of early lookups to keep: limited in names and directories.
fn soon_to_keep(soon: &VecDeque<(Arc<OwnedFd>, Vec<u8>)>) -> usize {
    let mut directories: Vec<*const OwnedFd> = Vec::with_capacity(MAX_SOON_DIRECTORIES);
    for (number, (directory, _)) in soon.iter().enumerate().take(MAX_SOON) {
        let directory = Arc::as_ptr(directory);
        if directories.contains(&directory) {
            continue;
        }
        if directories.len() == MAX_SOON_DIRECTORIES {
            return number;
        }
        directories.push(directory);
    }
    soon.len().min(MAX_SOON)
}

/// Lets the kernel read a directory ahead of the walk, or the inode of another object, which it
/// does not open. Errors recur when the walk gets there.
fn warm(parent: &OwnedFd, name: &[u8], buffer: &mut [MaybeUninit<u8>]) {
    let flags =
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    if let Ok(directory) = rustix::fs::openat(parent, name, flags, Mode::empty()) {
        let _ = RawDir::new(&directory, buffer)
            .next()
            .map(|entry| entry.is_ok());
    }
}
