//! The walk over a guest's tree.
//!
//! An explicit stack, a bounded number of open directories, and names in batches: a directory of a
//! million names or a chain of ten thousand directories costs the same memory as a small tree. A
//! directory that was closed to stay within the bounds is opened again from its filesystem's root,
//! and its current batch is read again: the mount is read-only, so the answer is the same.

use std::collections::{HashMap, HashSet, VecDeque};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;

use super::entry::{Entry, Kind, Meta, Place, Time};
use crate::error::{Code, Error, escape, shorten};
use crate::fs::tree::{DAMAGE_DELAY, Join};
use crate::fs::{GuestTree, Note};
use crate::point::{Point, reach};

/// Longest path, in bytes. A catalog's path column takes no more.
const MAX_PATH: usize = 65_535;

/// Directories of which it is remembered that they were entered: 52 MiB at the most, no more than 60
/// bytes for each. A guest with more than that can make the walk enter the rest again and again.
const MAX_ENTERED: usize = (1 << 21) / 8 * 7;

/// Deepest directory.
const MAX_DEPTH: usize = 16_384;

/// Bytes asked of the kernel at once when names are read.
const NAMES_AT_ONCE: usize = 64 << 10;

/// How many names ahead directories and first inodes are handed out to be read early.
const LOOK_AHEAD: usize = 128;

/// Of so many inodes in sequence one is looked at early. ext4 reads 32 blocks of the inode table at
/// once, with 256 or 512 inodes in most.
const INODES_AT_ONCE: u64 = 256;

/// Bounds of a walk.
#[derive(Debug, Clone)]
pub struct WalkOptions {
    /// Directories open at the same time, at least 2.
    pub open_directories: usize,
    /// Bytes of names that are read and sorted together; a directory with more is sorted in parts.
    pub batch_bytes: usize,
    /// Bytes of names kept over all levels of the walk.
    pub names_bytes: usize,
}

impl Default for WalkOptions {
    fn default() -> Self {
        WalkOptions {
            open_directories: 32,
            batch_bytes: 1 << 20,
            names_bytes: 8 << 20,
        }
    }
}

/// What a walk gives, in this order per directory: `Begin`, its content, `End`.
#[derive(Debug)]
pub enum Item {
    /// A directory that will be walked next, unless [`Walker::leave_out`] is called now.
    Begin(Entry),
    /// An object that is not a directory.
    Object(Entry),
    /// A directory whose content has been given. Not given for a skipped one.
    End(Entry),
    /// Something could not be read. The walk goes on.
    Problem(Problem),
    /// Something is left out by policy.
    Note(Note),
}

/// Something that could not be read.
#[derive(Debug)]
pub struct Problem {
    /// The path from the guest's root.
    pub path: Vec<u8>,
    /// Whether names below the path may be missing too (else only the path itself is).
    pub subtree: bool,
    /// What happened.
    pub error: Error,
}

impl Problem {
    fn new(path: &[u8], subtree: bool, step: &str, cause: Errno) -> Problem {
        let shown = escape(path);
        // Many of these may wait to be told.
        let shown = shorten(&shown);
        let detail = if subtree {
            format!("/{shown}: {step}; the content of this folder is incomplete")
        } else {
            format!("/{shown}: {step}")
        };
        Problem {
            path: path.to_vec(),
            subtree,
            error: Error::new(Code::WalkFailed, detail).because(cause),
        }
    }
}

/// Walks a guest's tree. See [`Item`].
#[derive(Debug)]
pub struct Walker {
    joins: Arc<[Join]>,
    /// Places other than the root, by path.
    places: HashMap<Vec<u8>, usize>,
    private: Vec<u8>,
    options: WalkOptions,
    /// The path of the innermost directory on the stack.
    path: Vec<u8>,
    stack: Vec<Frame>,
    /// A directory that was announced and is entered on the next call.
    announced: Option<Announced>,
    queue: VecDeque<Item>,
    names_bytes: usize,
    buffer: Vec<MaybeUninit<u8>>,
    /// The directories that were entered: joined filesystem, device and inode.
    entered: HashSet<(usize, u64, u64)>,
    soon: Option<Vec<(Arc<OwnedFd>, Vec<u8>)>>,
}

#[derive(Debug)]
struct Announced {
    entry: Entry,
    source: Source,
}

/// Where a directory's content comes from.
#[derive(Debug, Clone, Copy)]
enum Source {
    /// Like the parent: the same filesystem.
    Inherited,
    /// The root of a joined filesystem.
    Join(usize),
    /// A directory that exists only in our tree.
    Own,
    /// The directory is given, its content is not.
    LeftOut,
}

#[derive(Debug)]
struct Frame {
    /// Length of the directory's path.
    path_length: usize,
    meta: Meta,
    source: Source,
    /// The joined filesystem it is in.
    join: usize,
    directory: Option<Arc<OwnedFd>>,
    /// Where the current batch starts.
    batch_start: u64,
    /// How many names of the current batch have been given.
    given: usize,
    /// How many names of the current batch have been looked at by [`Walker::look_ahead`].
    looked_at: usize,
    /// The part of the inode table that was looked at last; the first name's is read with it.
    window: Option<u64>,
    batch: Option<Batch>,
    incomplete: bool,
    damage_told: bool,
    /// The names below a directory of our own, or the ones added to the root.
    own: Vec<Vec<u8>>,
}

/// Names of a directory, sorted by inode number.
#[derive(Debug)]
struct Batch {
    names: Vec<u8>,
    index: Vec<Name>,
    /// Where the next batch starts; `None`: this is the last.
    next: Option<u64>,
}

/// A name in a batch. The order is that of the inode numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    ino: u64,
    start: u32,
    length: u16,
    /// The kernel says that it is something else than a directory.
    plain: bool,
    /// The kernel says that it is a directory.
    directory: bool,
}

impl Batch {
    fn name(&self, number: usize) -> Option<(Name, &[u8])> {
        let name = self.index.get(number)?;
        let start = name.start as usize;
        let text = &self.names[start..start + usize::from(name.length)];
        Some((*name, text))
    }

    fn empty() -> Batch {
        Batch {
            names: Vec::new(),
            index: Vec::new(),
            next: None,
        }
    }

    fn bytes(&self) -> usize {
        self.names.capacity() + self.index.capacity() * size_of::<Name>()
    }
}

impl Walker {
    /// Starts at the guest's root. The tree's filesystems stay open until the walker is dropped.
    pub fn new(tree: &GuestTree, options: WalkOptions) -> Walker {
        let joins = tree.share_joins();
        let places = joins
            .iter()
            .enumerate()
            .skip(1)
            .map(|(i, join)| (join.path.clone(), i))
            .collect();
        let mut walker = Walker {
            joins,
            places,
            private: tree.private().to_vec(),
            options,
            path: Vec::new(),
            stack: Vec::new(),
            announced: None,
            queue: VecDeque::new(),
            names_bytes: 0,
            buffer: vec![MaybeUninit::uninit(); NAMES_AT_ONCE],
            entered: HashSet::new(),
            soon: None,
        };
        let item = walker.announce_join(Vec::new(), 0);
        walker.queue.push_back(item);
        walker
    }

    /// Leaves out the directory that was announced by the last item, with all below it.
    pub fn leave_out(&mut self) {
        self.announced = None;
        // What is told of it.
        self.queue.clear();
    }

    /// As [`Iterator::next`], but leaves reading an object's metadata to the caller.
    pub(crate) fn next_step(&mut self) -> Option<Step> {
        if let Some(item) = self.queue.pop_front() {
            return Some(item.into());
        }
        if let Some(announced) = self.announced.take() {
            self.enter(announced);
            if let Some(item) = self.queue.pop_front() {
                return Some(item.into());
            }
        }
        self.step()
    }

    /// How many directories the walk is in. A directory that was just announced is not one of them.
    pub(crate) fn depth(&self) -> usize {
        self.stack.len()
    }

    /// Leaves all directories but the outermost `depth` without their ends.
    pub(crate) fn abandon(&mut self, depth: usize) {
        self.announced = None;
        self.queue.clear();
        for frame in self.stack.drain(depth..) {
            self.names_bytes -= frame.batch.as_ref().map_or(0, Batch::bytes);
        }
        let length = self.stack.last().map_or(0, |f| f.path_length);
        self.path.truncate(length);
    }

    /// From now on, names of what will be read soon are kept for [`Walker::take_soon`].
    pub(crate) fn keep_soon(&mut self) {
        self.soon = Some(Vec::new());
    }

    /// What will be read soon, each given once: directory and name.
    pub(crate) fn take_soon(&mut self) -> Vec<(Arc<OwnedFd>, Vec<u8>)> {
        self.soon.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Announces the root of a joined filesystem.
    fn announce_join(&mut self, path: Vec<u8>, join: usize) -> Item {
        let Some(root) = self.joins[join].root.clone() else {
            return self.announce_own(path);
        };
        match Meta::read(&root, b"", AtFlags::EMPTY_PATH) {
            Ok(meta) => {
                let place = Place::Open(root);
                self.announce(path, meta, place, Source::Join(join))
            }
            Err(errno) => Item::Problem(Problem::new(&path, true, "stat", errno)),
        }
    }

    fn announce(&mut self, path: Vec<u8>, meta: Meta, place: Place, source: Source) -> Item {
        if path.len() > MAX_PATH || self.stack.len() >= MAX_DEPTH {
            return Item::Problem(Problem::new(&path, true, "too deep", Errno::NAMETOOLONG));
        }
        let entry = Entry {
            path,
            kind: Kind::Directory,
            meta,
            link: None,
            incomplete: false,
            place,
        };
        self.announced = Some(Announced {
            entry: entry.clone(),
            source,
        });
        Item::Begin(entry)
    }

    /// Enters the announced directory.
    fn enter(&mut self, announced: Announced) {
        let Announced { mut entry, source } = announced;
        let join = match source {
            Source::Join(join) => join,
            _ => self.stack.last().map_or(0, |parent| parent.join),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK;
        let opened = if self.is_first(source, join, &entry.meta) {
            reach(Point::WalkOpen)
                .and_then(|()| entry.open(flags))
                .map_err(|errno| ("open", errno))
        } else {
            // The kernel finds a directory inside of itself, but not one in two places: a few of
            // those inside of each other are more paths than anybody can walk.
            Err(("it is at another path too", Errno::LOOP))
        };
        let directory = match opened {
            Ok(directory) => directory.map(Arc::new),
            Err((step, errno)) => {
                let problem = Problem::new(&entry.path, true, step, errno);
                self.queue.push_back(Item::Problem(problem));
                entry.incomplete = true;
                self.queue.push_back(Item::End(entry));
                return;
            }
        };
        let own = match (source, self.stack.len()) {
            // Another filesystem may be joined below what is left out.
            (Source::Own | Source::LeftOut, _) => self.own_children(&entry.path),
            (_, 0) if self.has_own() => vec![self.private.clone()],
            _ => Vec::new(),
        };
        self.path = entry.path;
        self.stack.push(Frame {
            path_length: self.path.len(),
            meta: entry.meta,
            source,
            join,
            directory,
            batch_start: 0,
            given: 0,
            looked_at: 0,
            window: None,
            batch: None,
            incomplete: false,
            damage_told: false,
            own,
        });
        self.evict();
    }

    /// Whether a directory is entered for the first time.
    fn is_first(&mut self, source: Source, join: usize, meta: &Meta) -> bool {
        let key = (join, meta.dev, meta.ino);
        match source {
            Source::Own => true,
            _ if self.entered.len() >= MAX_ENTERED => !self.entered.contains(&key),
            _ => self.entered.insert(key),
        }
    }

    /// Whether filesystems are shown below the private directory.
    fn has_own(&self) -> bool {
        let mut prefix = self.private.clone();
        prefix.push(b'/');
        self.joins.iter().any(|j| j.path.starts_with(&prefix))
    }

    /// The names below a directory of our own, last first.
    fn own_children(&self, path: &[u8]) -> Vec<Vec<u8>> {
        let mut prefix = path.to_vec();
        if !path.is_empty() {
            prefix.push(b'/');
        }
        let mut names: Vec<Vec<u8>> = self
            .joins
            .iter()
            .filter_map(|join| join.path.strip_prefix(&prefix[..]))
            .filter_map(|rest| rest.split(|&b| b == b'/').next())
            .filter(|name| !name.is_empty())
            .map(<[u8]>::to_vec)
            .collect();
        names.sort_unstable_by(|a, b| b.cmp(a));
        names.dedup();
        names
    }

    /// Closes directories and drops names far up the stack until the bounds hold.
    fn evict(&mut self) {
        let last = self.stack.len() - 1;
        if let Some(outer) = last.checked_sub(self.options.open_directories.max(2)) {
            let frame = &mut self.stack[outer];
            frame.directory = None;
            self.names_bytes -= frame.batch.take().map_or(0, |b| b.bytes());
        }
        if self.names_bytes <= self.options.names_bytes {
            return;
        }
        for frame in &mut self.stack[..last] {
            self.names_bytes -= frame.batch.take().map_or(0, |b| b.bytes());
            if self.names_bytes <= self.options.names_bytes {
                return;
            }
        }
    }

    /// The open directory of a frame, opened again if it was closed.
    fn directory(&mut self, number: usize) -> Result<Arc<OwnedFd>, Errno> {
        if let Some(directory) = &self.stack[number].directory {
            return Ok(directory.clone());
        }
        // Back to the next directory that is open, or to the filesystem's root.
        let mut first = number;
        while first > 0 && self.stack[first].directory.is_none() {
            if let Source::Join(_) = self.stack[first].source {
                break;
            }
            first -= 1;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut current = match &self.stack[first].directory {
            Some(directory) => directory.clone(),
            None => {
                let join = &self.joins[self.stack[first].join];
                let root = join.root.as_ref().ok_or(Errno::BADF)?;
                Arc::new(rustix::fs::openat(root, c".", flags, Mode::empty())?)
            }
        };
        for level in first..=number {
            if level > first {
                let start = match self.stack[level - 1].path_length {
                    0 => 0,
                    parent => parent + 1,
                };
                let name = &self.path[start..self.stack[level].path_length];
                current = Arc::new(rustix::fs::openat(&current, name, flags, Mode::empty())?);
            }
            if level + self.options.open_directories.max(2) > number {
                self.stack[level].directory = Some(current.clone());
            }
        }
        let found = Meta::read(&current, b"", AtFlags::EMPTY_PATH)?;
        let wanted = &self.stack[number].meta;
        if (found.dev, found.ino) != (wanted.dev, wanted.ino) {
            return Err(Errno::STALE);
        }
        Ok(current)
    }

    /// Makes sure the innermost directory has a batch with a name left, or none at all.
    fn fill(&mut self) -> Result<(), Errno> {
        let number = self.stack.len() - 1;
        loop {
            let frame = &mut self.stack[number];
            if let Some(batch) = &frame.batch {
                if frame.given < batch.index.len() {
                    return Ok(());
                }
                let Some(next) = batch.next else {
                    return Ok(());
                };
                frame.batch_start = next;
                frame.given = 0;
                frame.looked_at = 0;
                self.names_bytes -= frame.batch.take().map_or(0, |b| b.bytes());
            }
            let start = frame.batch_start;
            let directory = self.directory(number)?;
            let (batch, result) = read_batch(
                &directory,
                start,
                self.options.batch_bytes,
                &mut self.buffer,
            );
            self.names_bytes += batch.bytes();
            let frame = &mut self.stack[number];
            frame.batch = Some(batch);
            // What was read before the error is given first; the batch has no next one.
            if !frame.incomplete {
                result?;
            }
        }
    }

    fn step(&mut self) -> Option<Step> {
        let number = self.stack.len().checked_sub(1)?;
        if let Source::Own | Source::LeftOut = self.stack[number].source {
            return Some(self.step_own(number).into());
        }
        if let Err(errno) = self.fill() {
            let frame = &mut self.stack[number];
            let first = !frame.incomplete;
            frame.incomplete = true;
            // Without a batch the directory could not even be opened again.
            if frame.batch.is_none() {
                frame.batch = Some(Batch::empty());
                frame.given = 0;
            }
            if first {
                let problem = Problem::new(&self.path, true, "reading names", errno);
                return Some(Item::Problem(problem).into());
            }
        }
        self.look_ahead(number);
        let frame = &mut self.stack[number];
        let found = frame.batch.as_ref().and_then(|b| b.name(frame.given));
        let Some((name, text)) = found else {
            return Some(self.step_own(number).into());
        };
        let path = join_path(&self.path, text);
        frame.given += 1;
        if let Some(&join) = self.places.get(&path) {
            return Some(self.announce_join(path, join).into());
        }
        let directory = match self.directory(number) {
            Ok(directory) => directory,
            Err(errno) => {
                return Some(Item::Problem(Problem::new(&path, true, "open", errno)).into());
            }
        };
        let object = Unread {
            name_start: path.len() - usize::from(name.length),
            path,
            directory,
        };
        if name.plain {
            return Some(Step::Object(object));
        }
        Some(self.object(number, object).into())
    }

    /// Hands out the names of directories that will be entered soon, and one name for each part of the
    /// inode table.
    fn look_ahead(&mut self, number: usize) {
        let Some(soon) = &mut self.soon else { return };
        let frame = &mut self.stack[number];
        let (Some(batch), Some(directory)) = (&frame.batch, &frame.directory) else {
            return;
        };
        let end = batch.index.len().min(frame.given + LOOK_AHEAD);
        frame.looked_at = frame.looked_at.max(frame.given);
        while frame.looked_at < end {
            if let Some((name, text)) = batch.name(frame.looked_at) {
                let window = name.ino / INODES_AT_ONCE;
                let another = *frame.window.get_or_insert(window) != window;
                frame.window = Some(window);
                if name.directory || another {
                    soon.push((directory.clone(), text.to_vec()));
                }
            }
            frame.looked_at += 1;
        }
    }

    /// The next directory of our own below this one, or its end.
    fn step_own(&mut self, number: usize) -> Item {
        let Some(name) = self.stack[number].own.pop() else {
            return self.leave();
        };
        let path = join_path(&self.path, &name);
        if let Some(&join) = self.places.get(&path) {
            return self.announce_join(path, join);
        }
        self.announce_own(path)
    }

    /// Announces a directory of our own. It shows the time of the guest's root.
    fn announce_own(&mut self, path: Vec<u8>) -> Item {
        let time = self.stack.first().map_or(Time::default(), |f| f.meta.mtime);
        let meta = Meta {
            mode: 0o040_700,
            nlink: 2,
            mtime: time,
            ctime: time,
            atime: time,
            ..Meta::default()
        };
        self.announce(path, meta, Place::Nowhere, Source::Own)
    }

    /// The end of the innermost directory.
    fn leave(&mut self) -> Item {
        let number = self.stack.len() - 1;
        if let Some(problem) = self.new_damage(number) {
            self.stack[number].incomplete = true;
            self.stack[number].damage_told = true;
            return Item::Problem(problem);
        }
        let place = match self.stack[number].source {
            Source::Own => Ok(Place::Nowhere),
            _ => self.directory(number).map(Place::Open),
        };
        let frame = self.stack.pop().expect("leave is called with a frame");
        self.names_bytes -= frame.batch.as_ref().map_or(0, Batch::bytes);
        let entry = Entry {
            path: self.path.clone(),
            kind: Kind::Directory,
            meta: frame.meta,
            link: None,
            incomplete: frame.incomplete,
            place: match place {
                Ok(place) => place,
                Err(errno) => {
                    let problem = Problem::new(&self.path, false, "its attributes", errno);
                    self.queue.push_back(Item::Problem(problem));
                    Place::Nowhere
                }
            },
        };
        let parent = self.stack.last().map_or(0, |f| f.path_length);
        self.path.truncate(parent);
        Item::End(entry)
    }

    /// At the end of a filesystem: damage that the driver passed over.
    fn new_damage(&self, number: usize) -> Option<Problem> {
        let Source::Join(join) = self.stack[number].source else {
            return None;
        };
        let counter = self.joins[join].damage.as_ref();
        let counter = counter.filter(|_| !self.stack[number].damage_told)?;
        std::thread::sleep(DAMAGE_DELAY);
        let text = counter.found()?;
        let step = format!("{text}; files below may be missing");
        let detail = format!("/{}: {step}", escape(&self.path));
        Some(Problem {
            path: self.path.clone(),
            subtree: true,
            error: Error::new(Code::WalkFailed, detail),
        })
    }

    /// An object that may be a directory.
    fn object(&mut self, number: usize, object: Unread) -> Item {
        match object.read() {
            Ok(entry) if entry.kind == Kind::Directory => {
                self.subdirectory(number, entry.path, entry.meta, entry.place)
            }
            Ok(entry) => Item::Object(entry),
            Err(problem) => Item::Problem(problem),
        }
    }

    fn subdirectory(&mut self, number: usize, path: Vec<u8>, meta: Meta, place: Place) -> Item {
        let frame = &self.stack[number];
        let join = &self.joins[frame.join];
        let other_filesystem = meta.dev != frame.meta.dev;
        if !other_filesystem || join.nested_subvolumes {
            return self.announce(path, meta, place, Source::Inherited);
        }
        let text = format!(
            "{}: subvolume /{} is not in the guest's fstab: its content is left out",
            join.volume,
            escape(&path)
        );
        // In btrfs an empty folder has no length: it is saved as it is.
        let lost = meta.size > 0 && !self.has_place(&meta);
        let note = lost.then(|| Item::Note(Note::warning(text)));
        let begin = self.announce(path, meta, place, Source::LeftOut);
        self.queue.extend(note);
        begin
    }

    /// Whether a directory is the root of what has a place, maybe another one: snapper's first snapshot is the root.
    fn has_place(&self, meta: &Meta) -> bool {
        let id = Some((meta.dev, meta.ino));
        self.joins.iter().any(|join| join.id == id)
    }
}

impl Iterator for Walker {
    type Item = Item;

    fn next(&mut self) -> Option<Item> {
        Some(match self.next_step()? {
            Step::Item(item) => item,
            Step::Object(object) => object.look(),
        })
    }
}

/// What the walk comes to.
#[derive(Debug)]
pub(crate) enum Step {
    Item(Item),
    /// An object whose metadata is still to be read, by whoever has the time.
    Object(Unread),
}

impl From<Item> for Step {
    fn from(item: Item) -> Step {
        Step::Item(item)
    }
}

/// An object of which only the name is known.
#[derive(Debug)]
pub(crate) struct Unread {
    pub(crate) path: Vec<u8>,
    name_start: usize,
    directory: Arc<OwnedFd>,
}

impl Unread {
    /// Reads the metadata of an object that is not a directory.
    pub(crate) fn look(self) -> Item {
        match self.read() {
            Ok(entry) if entry.kind == Kind::Directory => {
                let step = "a folder that is listed as something else";
                Item::Problem(Problem::new(&entry.path, true, step, Errno::UCLEAN))
            }
            Ok(entry) => Item::Object(entry),
            Err(problem) => Item::Problem(problem),
        }
    }

    fn read(self) -> Result<Entry, Problem> {
        let Unread {
            path,
            name_start,
            directory,
        } = self;
        let name = &path[name_start..];
        if name.contains(&b'/') || name.is_empty() {
            return Err(Problem::new(&path, true, "bad name", Errno::UCLEAN));
        }
        // When this fails the type is not known: it may have been a directory.
        let meta = reach(Point::WalkStat)
            .and_then(|()| Meta::read(&directory, name, AtFlags::SYMLINK_NOFOLLOW))
            .map_err(|e| Problem::new(&path, true, "stat", e))?;
        let Some(kind) = Kind::from_mode(meta.mode) else {
            return Err(Problem::new(&path, false, "unknown type", Errno::UCLEAN));
        };
        if path.len() > MAX_PATH {
            let subtree = kind == Kind::Directory;
            return Err(Problem::new(&path, subtree, "too long", Errno::NAMETOOLONG));
        }
        let link = match kind {
            Kind::Symlink => Some(
                reach(Point::WalkReadlink)
                    .and_then(|()| rustix::fs::readlinkat(&directory, name, Vec::new()))
                    .map_err(|e| Problem::new(&path, false, "readlink", e))?
                    .into_bytes(),
            ),
            _ => None,
        };
        Ok(Entry {
            place: Place::In(directory, name_start),
            path,
            kind,
            meta,
            link,
            incomplete: false,
        })
    }
}

fn join_path(directory: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(directory.len() + 1 + name.len());
    if !directory.is_empty() {
        path.extend_from_slice(directory);
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

/// Reads names from a position until there are enough, sorted by inode number. With an error, the
/// batch holds what was read before it.
fn read_batch(
    directory: &OwnedFd,
    start: u64,
    enough: usize,
    buffer: &mut [MaybeUninit<u8>],
) -> (Batch, Result<(), Errno>) {
    let mut batch = Batch::empty();
    let result = read_names(directory, start, enough, buffer, &mut batch);
    batch.index.sort_unstable();
    batch.names.shrink_to_fit();
    batch.index.shrink_to_fit();
    (batch, result)
}

fn read_names(
    directory: &OwnedFd,
    start: u64,
    enough: usize,
    buffer: &mut [MaybeUninit<u8>],
    batch: &mut Batch,
) -> Result<(), Errno> {
    reach(Point::WalkNames)?;
    rustix::fs::seek(directory, SeekFrom::Start(start))?;
    let mut names = RawDir::new(directory, buffer);
    while let Some(entry) = names.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        // The bounds on a batch and on a name keep both far below their types' limits.
        let at = u32::try_from(batch.names.len()).map_err(|_| Errno::OVERFLOW)?;
        let length = u16::try_from(name.len()).map_err(|_| Errno::OVERFLOW)?;
        batch.names.extend_from_slice(name);
        let directory = entry.file_type() == FileType::Directory;
        batch.index.push(Name {
            ino: entry.ino(),
            start: at,
            length,
            plain: !directory && entry.file_type() != FileType::Unknown,
            directory,
        });
        let used = batch.names.len() + batch.index.len() * size_of::<Name>();
        if used >= enough {
            let next = entry.next_entry_cookie();
            // Positions only grow. Names that a guest made to share one would never end.
            if next <= start {
                return Err(Errno::LOOP);
            }
            batch.next = Some(next);
            return Ok(());
        }
    }
    Ok(())
}
