//! Reading ahead of the job.
//!
//! One thread walks; some more read what the walk comes to: metadata, attributes, the contents of
//! small files. The job takes the results in the order of the walk and seldom waits for the disk,
//! and a disk with a long way to it is asked for many things at a time. Large files are only opened
//! here; whoever takes them reads them.
//!
//! Everything that waits to be taken is counted, and the walk stops at the budget. The result at the
//! head of the line may always be read, so the smallest budget is slow but never stuck. Directories
//! that wait are bounded too: each holds a descriptor.

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::SigSet;
use rustix::fs::{Mode, OFlags, RawDir};

use super::content::FileReader;
use super::entry::{Entry, Kind, Meta};
use super::record::Record;
use super::walk::{self, Problem, Step, Unread, WalkOptions, Walker};
use super::xattrs;
use crate::error::{Code, Error, Result, escape};
use crate::fs::{GuestTree, Note};

/// What an entry costs beside its path and contents.
const ENTRY_COST: usize = 900;

/// Most beginnings and ends of directories that wait to be taken. What waits holds no more folders open
/// than that: those that were entered since what is taken next, and those on the way back from there.
const MAX_DIRECTORIES: usize = 96;

/// Most results that wait to be taken.
const MAX_WAITING: usize = 8192;

/// Most names that wait to be looked at early.
const MAX_SOON: usize = 128;

/// Most directories that are held open for names that wait to be looked at early.
const MAX_SOON_DIRECTORIES: usize = 8;

/// Files up to this size are read whole, if a quarter of the budget allows it.
const SMALL_FILE: usize = 128 << 10;

/// The default of [`AheadOptions::budget`].
pub const BUDGET: usize = 32 << 20;

/// The default of [`AheadOptions::threads`].
pub const THREADS: usize = 16;

/// How many results the job takes under one lock.
const AT_ONCE: usize = 32;

/// Files that are open to be read at the same time. The kernel is asked for the contents of all of
/// them before anybody waits for the first (measured where a read takes 5 ms: 32, 64 and 128 gave
/// 4,800, 7,400 and 9,700 small files a second). All threads share them; many threads with few each
/// also look at many inodes at once.
const OPEN_FILES: u64 = 128;

/// Of the descriptors that the daemon may have, a job takes no more than this part for [`OPEN_FILES`].
const PART_OF_DESCRIPTORS: u64 = 8;

/// Most objects that a thread takes at a time.
const MAX_BATCH: usize = 32;

/// How often a job that waits looks whether it was stopped.
const LOOK: Duration = Duration::from_millis(100);

/// How far and with what to read ahead.
#[derive(Debug, Clone)]
pub struct AheadOptions {
    /// Bytes that may wait to be taken.
    pub budget: usize,
    /// Threads that read, beside the one that walks. At least one is used.
    pub threads: usize,
    /// Contents and attributes are read ahead only of objects changed at or after this time, in
    /// seconds since 1970. The others are likely not to be asked for; if they are, they are read
    /// then.
    pub changed_since: Option<i64>,
    /// Contents and attributes are not read ahead at all: an estimate asks for neither.
    pub names_only: bool,
}

impl Default for AheadOptions {
    fn default() -> Self {
        AheadOptions {
            budget: BUDGET,
            threads: THREADS,
            changed_since: None,
            names_only: false,
        }
    }
}

/// What the walk gives, as [`walk::Item`], with what was read ahead.
#[derive(Debug)]
pub enum Item {
    /// A directory that will be walked next, unless [`ReadAhead::leave_out`] is called now.
    Begin(Entry),
    /// An object that is not a directory.
    Object(Prepared),
    /// A directory whose content has been given.
    End(Prepared),
    /// Something could not be read. The walk goes on.
    Problem(Problem),
    /// Something is left out by policy.
    Note(Note),
}

impl From<walk::Item> for Item {
    fn from(item: walk::Item) -> Item {
        match item {
            walk::Item::Begin(entry) => Item::Begin(entry),
            walk::Item::Object(entry) => Item::Object(Prepared::new(entry)),
            walk::Item::End(entry) => Item::End(Prepared::new(entry)),
            walk::Item::Problem(problem) => Item::Problem(problem),
            walk::Item::Note(note) => Item::Note(note),
        }
    }
}

/// An entry, and what has been read of it.
#[derive(Debug)]
pub struct Prepared {
    /// The entry.
    pub entry: Entry,
    attributes: Option<Result<(Record, Vec<Error>)>>,
    contents: Option<Result<Contents>>,
}

impl Prepared {
    /// An entry of which nothing has been read yet.
    pub fn new(entry: Entry) -> Prepared {
        Prepared {
            entry,
            attributes: None,
            contents: None,
        }
    }

    /// Whether the contents are there, or the reason why not.
    pub fn has_contents(&self) -> bool {
        self.contents.is_some()
    }

    /// Whether the attributes are there, or the reason why not.
    pub fn has_attributes(&self) -> bool {
        self.attributes.is_some()
    }

    /// Opens the contents of a regular file, once; of a small one, reads them.
    pub fn contents(&mut self) -> Result<Contents> {
        if let Some(contents) = self.contents.take() {
            return contents;
        }
        let mut reader = FileReader::open(&self.entry)?;
        Ok(match usize::try_from(reader.size()) {
            Ok(size) if size <= SMALL_FILE => Contents::Memory(InMemory::read(&mut reader, size)),
            _ => Contents::File(reader),
        })
    }

    /// Our record, and what could not be read for it, once.
    pub fn attributes(&mut self) -> Result<(Record, Vec<Error>)> {
        match self.attributes.take() {
            Some(attributes) => attributes,
            None => xattrs::collect(&self.entry, None),
        }
    }

    fn cost(&self) -> usize {
        let attributes = match &self.attributes {
            Some(Ok((record, _))) => record.xattrs.iter().map(|(n, v)| n.len() + v.len()).sum(),
            _ => 0,
        };
        let link = self.entry.link.as_ref().map_or(0, Vec::len);
        attributes + link + cost_of(&self.entry.path)
    }
}

fn cost_of(path: &[u8]) -> usize {
    ENTRY_COST + path.len()
}

/// The contents of a regular file: read already, or to be read now.
#[derive(Debug)]
pub enum Contents {
    /// Read ahead.
    Memory(InMemory),
    /// Open.
    File(FileReader),
}

/// A small file's contents. An error comes after what was read before it.
#[derive(Debug)]
pub struct InMemory {
    data: Vec<u8>,
    position: usize,
    error: Option<io::Error>,
}

impl Contents {
    /// The next read gives no more than this.
    pub fn at_most(&self) -> usize {
        match self {
            Contents::File(_) => usize::MAX,
            Contents::Memory(memory) => memory.data.len() - memory.position,
        }
    }

    /// Reads on. 0: the end.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let memory = match self {
            Contents::File(file) => return file.read(buffer),
            Contents::Memory(memory) => memory,
        };
        let rest = &memory.data[memory.position..];
        if rest.is_empty() {
            return match memory.error.take() {
                Some(error) => Err(error),
                None => Ok(0),
            };
        }
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        memory.position += length;
        Ok(length)
    }
}

/// A walk with threads that read ahead. They end when it is dropped.
#[derive(Debug)]
pub struct ReadAhead {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Taken from the line, not given yet.
    taken: VecDeque<Taken>,
    /// What those cost that were given since the lock was last held.
    given: usize,
    /// The directory that the last item announced.
    announced: Option<u64>,
    /// The directory whose content is left out.
    leaving_out: Option<u64>,
}

/// A result that left the line. What it costs counts until it is given.
#[derive(Debug)]
struct Taken {
    output: Box<Output>,
    cost: usize,
}

/// Stops a [`ReadAhead`] from another thread: it then gives no more items than it has taken out
/// of the line already.
#[derive(Debug, Clone)]
pub struct Stopper(Arc<Shared>);

impl Stopper {
    /// Stops it. Returns at once.
    pub fn stop(&self) {
        self.0.lock().stop = true;
        self.0.wake_all();
    }
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// There is something to read.
    work: Condvar,
    /// The head of the line may be there.
    ready: Condvar,
    /// There may be room.
    room: Condvar,
    options: AheadOptions,
    small_file: usize,
    /// How many objects a thread takes at a time.
    batch: usize,
}

#[derive(Debug, Default)]
struct State {
    slots: VecDeque<Slot>,
    /// The number of the first slot.
    first: u64,
    /// No slot before this one waits to be read.
    next_work: u64,
    used: usize,
    /// Beginnings and ends of directories among the slots.
    directories: usize,
    /// Readers that wait for room.
    waiting: usize,
    /// The walk waits for room.
    walk_waits: bool,
    /// Readers that wait for work.
    idle: usize,
    /// The job waits for the head of the line.
    wanted: bool,
    soon: VecDeque<(Arc<OwnedFd>, Vec<u8>)>,
    /// Directories that the job leaves out and the walk may still be in.
    left_out: Vec<u64>,
    walked: bool,
    stop: bool,
    failed: bool,
}

#[derive(Debug)]
struct Slot {
    cost: usize,
    content: SlotContent,
}

#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "a box more would be an allocation more per object"
)]
enum SlotContent {
    ToRead(Work),
    Reading,
    Ready(Box<Output>),
}

fn ready(output: Output) -> SlotContent {
    SlotContent::Ready(Box::new(output))
}

#[derive(Debug)]
enum Work {
    Object(Unread),
    Entry(Entry),
    End(u64, Entry),
}

/// Work half done.
#[derive(Debug)]
enum Opened {
    Problem(Problem),
    /// Not a regular file, or not to be read ahead.
    Entry(Entry),
    File(Entry, Result<FileReader>),
    End(u64, Entry),
}

#[derive(Debug)]
enum Output {
    Item(Item),
    Begin(u64, Entry),
    End(u64, Prepared),
    /// The end of a directory that is left out.
    Gone(u64),
    /// A thread has failed: there is no more, though there should be.
    Failed,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic with the lock held sets `failed` on its way out.
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn wake_all(&self) {
        self.work.notify_all();
        self.ready.notify_all();
        self.room.notify_all();
    }

    /// Runs a thread's body. A panic ends the whole walk with a problem, not silently.
    fn run(&self, body: impl FnOnce()) {
        if catch_unwind(AssertUnwindSafe(body)).is_err() {
            let mut state = self.lock();
            state.failed = true;
            state.stop = true;
            drop(state);
            self.wake_all();
        }
    }

    // ---- the walking thread ----

    fn walk(&self, mut walker: Walker) {
        walker.keep_soon();
        // The directories the walk is in: number, and depth outside of it.
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
                Step::Item(walk::Item::Note(note)) => {
                    let cost = cost_of(note.text.as_bytes());
                    let item = Item::Note(note);
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
        // Nobody waits for these any more, and the disk may be slow.
        let soon = std::mem::take(&mut state.soon);
        drop(state);
        drop(soon);
        self.wake_all();
    }

    /// Leaves the outermost directory that the job leaves out, and gives its number.
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
        // The walk comes to these before it comes to those that are there.
        for directory in directories.into_iter().rev() {
            state.soon.push_front(directory);
        }
        let keep = soon_to_keep(&state.soon);
        let too_many = state.soon.split_off(keep);
        drop(state);
        drop(too_many);
        self.work.notify_all();
    }

    /// Puts a result or the work for it in line. `false`: the job wants no more.
    fn push(&self, content: SlotContent, cost: usize, directory: bool) -> bool {
        let mut state = self.lock();
        loop {
            if state.stop {
                return false;
            }
            let full = state.used + cost > self.options.budget
                || state.slots.len() >= MAX_WAITING
                || (directory && state.directories >= MAX_DIRECTORIES);
            // With an empty line the smallest budget has room.
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
        // A call to the kernel each: only for somebody who sleeps.
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

    // ---- the reading threads ----

    fn read(&self) {
        let mut names = vec![MaybeUninit::uninit(); 32 << 10];
        let mut batch = Vec::with_capacity(self.batch);
        let mut opened = Vec::with_capacity(self.batch);
        let mut state = self.lock();
        loop {
            if state.stop {
                return;
            }
            // Before each batch, so that the disk is asked for what the walk comes to later all along.
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
                // In order: whoever has the head of the line never waits for room.
                for (number, opened) in opened.drain(..) {
                    // Attributes may be large, and are counted when they are there.
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

    /// Looks at an object and opens it. With `early`, the kernel starts to read a small file.
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

    /// Reads the rest of an object; the second value is the room that was taken for its contents.
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

    /// Takes room for a file's contents, when there is some.
    fn reserve(&self, number: u64, size: usize) -> bool {
        let mut state = self.wait_for_room(number, size);
        if state.stop {
            return false;
        }
        state.used += size;
        true
    }

    /// Waits until there is room, or the end. The head of the line does not wait.
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

impl State {
    /// Takes a fair share of the work that waits.
    fn take_work(&mut self, threads: usize, most: usize, batch: &mut Vec<(u64, Work)>) {
        self.next_work = self.next_work.max(self.first);
        let end = self.first + self.slots.len() as u64;
        let waiting = usize::try_from(end - self.next_work).unwrap_or(usize::MAX);
        let share = (waiting / threads.max(1)).clamp(1, most);
        while batch.len() < share && self.next_work < end {
            let number = self.next_work;
            self.next_work += 1;
            let Some(slot) = usize::try_from(number - self.first)
                .ok()
                .and_then(|index| self.slots.get_mut(index))
            else {
                return;
            };
            if let SlotContent::ToRead(_) = slot.content {
                let content = std::mem::replace(&mut slot.content, SlotContent::Reading);
                if let SlotContent::ToRead(work) = content {
                    batch.push((number, work));
                }
            }
        }
    }

    /// Puts a result in its place. Its room was counted by [`Shared::reserve`] already, that of its
    /// attributes is counted now.
    fn finish(&mut self, number: u64, output: Output, extra: usize) {
        let cost = match &output {
            Output::Item(Item::Object(prepared)) | Output::End(_, prepared) => prepared.cost(),
            _ => 0,
        };
        let Some(index) = number
            .checked_sub(self.first)
            .and_then(|n| usize::try_from(n).ok())
        else {
            return;
        };
        if let Some(slot) = self.slots.get_mut(index) {
            let before = slot.cost;
            slot.cost = before.max(cost) + extra;
            self.used += slot.cost - before - extra;
            slot.content = ready(output);
        }
    }
}

impl InMemory {
    fn read(reader: &mut FileReader, size: usize) -> InMemory {
        let mut data = vec![0; size];
        let mut length = 0;
        let mut error = None;
        while length < size {
            match reader.read(&mut data[length..]) {
                Ok(0) => break,
                Ok(more) => length += more,
                Err(e) => {
                    error = Some(e);
                    break;
                }
            }
        }
        data.truncate(length);
        InMemory {
            data,
            position: 0,
            error,
        }
    }

    /// An error if not all could be read.
    pub(crate) fn whole(&mut self, entry: &Entry) -> Result<()> {
        self.error.take().map_or(Ok(()), |error| {
            let path = escape(&entry.path);
            Err(Error::new(Code::ReadFailed, format!("/{path}: read")).because(error))
        })
    }
}

/// How many objects each of the threads takes at a time.
fn batch(readers: usize, descriptors: Option<u64>) -> usize {
    let files = descriptors.map_or(OPEN_FILES, |all| {
        (all / PART_OF_DESCRIPTORS).min(OPEN_FILES)
    });
    (usize::try_from(files).unwrap_or(usize::MAX) / readers).clamp(1, MAX_BATCH)
}

/// How many of the names that wait to be looked at early are kept: few enough, in few directories.
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

/// Lets the kernel read a directory that the walk will come to, or the inode of something else, which
/// this does not open. Errors will show then.
fn warm(parent: &OwnedFd, name: &[u8], buffer: &mut [MaybeUninit<u8>]) {
    let flags =
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    if let Ok(directory) = rustix::fs::openat(parent, name, flags, Mode::empty()) {
        let _ = RawDir::new(&directory, buffer)
            .next()
            .map(|entry| entry.is_ok());
    }
}

impl ReadAhead {
    /// Starts the threads. One that walks and one that reads are enough.
    pub fn start(tree: &GuestTree, walk: WalkOptions, options: AheadOptions) -> Result<ReadAhead> {
        let walker = Walker::new(tree, walk);
        let readers = options.threads.max(1);
        let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            ready: Condvar::new(),
            room: Condvar::new(),
            small_file: SMALL_FILE.min(options.budget / 4),
            batch: batch(readers, descriptors),
            options,
        });
        let mut ahead = ReadAhead {
            shared: shared.clone(),
            threads: Vec::new(),
            taken: VecDeque::with_capacity(AT_ONCE),
            given: 0,
            announced: None,
            leaving_out: None,
        };
        let walking = shared.clone();
        ahead.spawn("guestsnap-walk", move || {
            walking.run(|| walking.walk(walker))
        })?;
        for number in 0..readers {
            let reading = shared.clone();
            let started = ahead.spawn("guestsnap-read", move || reading.run(|| reading.read()));
            match started {
                Ok(()) => {}
                Err(error) if number == 0 => return Err(error),
                Err(error) => {
                    log::warn!("{number} threads read instead of {readers}: {error}");
                    break;
                }
            }
        }
        Ok(ahead)
    }

    /// When this fails, dropping `self` ends the threads that are there.
    fn spawn(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(256 << 10)
            .spawn(|| {
                // The daemon's signals are handled by the daemon's threads.
                let _ = SigSet::all().thread_block();
                body();
            })
            .map_err(|e| Error::new(Code::Internal, "starting a thread").because(e))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Leaves out the directory that was announced by the last item, with all below it.
    pub fn leave_out(&mut self) {
        if let Some(number) = self.announced.take() {
            self.leaving_out = Some(number);
            self.shared.lock().left_out.push(number);
        }
    }

    /// Stops; the threads, which end when they come back from what they do.
    pub fn stop(mut self) -> Vec<JoinHandle<()>> {
        self.stopper().stop();
        std::mem::take(&mut self.threads)
    }

    /// For another thread to stop this.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.shared.clone())
    }

    /// As [`Iterator::next`], but does not wait any longer once `stopped`.
    pub fn next_unless(&mut self, stopped: impl Fn() -> bool) -> Option<Item> {
        self.announced = None;
        loop {
            let output = self.take_output(&stopped)?;
            if let Output::Failed = output {
                // Also in the middle of what is left out.
                self.leaving_out = None;
                return Some(Item::Problem(Problem {
                    path: Vec::new(),
                    subtree: true,
                    error: Error::new(Code::Internal, "a thread that reads ahead has failed"),
                }));
            }
            if let Some(number) = self.leaving_out {
                match output {
                    Output::End(n, _) | Output::Gone(n) if n == number => self.leaving_out = None,
                    _ => {}
                }
                continue;
            }
            match output {
                Output::Item(item) => return Some(item),
                Output::Begin(number, entry) => {
                    self.announced = Some(number);
                    return Some(Item::Begin(entry));
                }
                Output::End(_, prepared) => return Some(Item::End(prepared)),
                Output::Gone(_) | Output::Failed => {}
            }
        }
    }

    /// The next result in line.
    fn take_output(&mut self, stopped: impl Fn() -> bool) -> Option<Output> {
        if self.taken.is_empty() {
            self.take_some(stopped);
        }
        let Taken { output, cost } = self.taken.pop_front()?;
        self.given += cost;
        Some(*output)
    }

    /// Takes what is ready at the head of the line, up to [`AT_ONCE`]. Nothing: there is no more.
    fn take_some(&mut self, stopped: impl Fn() -> bool) {
        let mut state = self.shared.lock();
        state.used -= std::mem::take(&mut self.given);
        loop {
            if state.failed {
                state.failed = false;
                let output = Box::new(Output::Failed);
                self.taken.push_back(Taken { output, cost: 0 });
                return;
            }
            if state.stop || (state.walked && state.slots.is_empty()) {
                return;
            }
            while self.taken.len() < AT_ONCE {
                let Some(Slot {
                    content: SlotContent::Ready(_),
                    ..
                }) = state.slots.front()
                else {
                    break;
                };
                let Some(Slot { cost, content }) = state.slots.pop_front() else {
                    break;
                };
                state.first += 1;
                let SlotContent::Ready(output) = content else {
                    break;
                };
                let directory = matches!(*output, Output::Begin(..) | Output::End(..));
                state.directories -= usize::from(directory);
                self.taken.push_back(Taken { output, cost });
            }
            // The walk is woken when there is room for more than one.
            let room = state.used <= self.shared.options.budget / 4 * 3
                && state.slots.len() <= MAX_WAITING / 4 * 3
                && state.directories <= MAX_DIRECTORIES / 4 * 3;
            if state.waiting > 0 || (state.walk_waits && (room || state.slots.is_empty())) {
                self.shared.room.notify_all();
            }
            if !self.taken.is_empty() {
                return;
            }
            state.wanted = true;
            let (locked, timeout) = self
                .shared
                .ready
                .wait_timeout(state, LOOK)
                .unwrap_or_else(|e| e.into_inner());
            state = locked;
            state.wanted = false;
            if timeout.timed_out() && stopped() {
                return;
            }
        }
    }
}

impl Iterator for ReadAhead {
    type Item = Item;

    fn next(&mut self) -> Option<Item> {
        self.next_unless(|| false)
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake_all();
        for thread in self.threads.drain(..) {
            // A panic was caught inside and told by the walk.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::entry::Place;

    #[test]
    fn test_targets_and_attributes_count_as_memory() {
        let link = |target: &[u8]| {
            Prepared::new(Entry {
                path: b"link".to_vec(),
                kind: Kind::Symlink,
                meta: Meta::default(),
                link: Some(target.to_vec()),
                incomplete: false,
                place: Place::Nowhere,
            })
        };
        let mut prepared = link(&[b'x'; 4000]);
        assert_eq!(prepared.cost(), link(b"").cost() + 4000);
        // It is counted when it was looked at, in place of what was thought of it before.
        let mut state = State {
            used: cost_of(b"link"),
            ..State::default()
        };
        state.slots.push_back(Slot {
            cost: state.used,
            content: SlotContent::Reading,
        });
        let record = Record {
            xattrs: vec![(b"user.x".to_vec(), vec![0; 94])],
            ..Record::default()
        };
        prepared.attributes = Some(Ok((record, Vec::new())));
        state.finish(0, Output::Item(Item::Object(prepared)), 0);
        assert_eq!(state.used, cost_of(b"link") + 4000 + 100);
    }
}
