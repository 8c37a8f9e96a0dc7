//! The walk itself: a stack of directories.

mod subvolumes;

use std::collections::{HashMap, HashSet, VecDeque};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::item::{Item, Problem};
use super::names::{Batch, MAX_PATH, NAMES_AT_ONCE, join_path, read_batch};
use super::options::WalkOptions;
use super::unread::{Step, Unread};
use crate::error::{Code, Error, escape};
use crate::fs::GuestTree;
use crate::fs::tree::{DAMAGE_DELAY, Join};
use crate::inode::{InodeId, Kind, Meta, Time};
use crate::point::{Point, reach};
use crate::stream::entry::{Entry, Place};

/// Maximum entered directories remembered: 2^21 buckets of 25 bytes are 50 MiB, and 75 MiB for a
/// moment while the table last grows. A guest with more can make the walk enter the rest again and
/// again.
const MAX_ENTERED: usize = (1 << 21) / 8 * 7;

/// Maximum depth of directories.
const MAX_DEPTH: usize = 16_384;

/// Number of names ahead for which directories and inodes are looked up early.
const LOOK_AHEAD: usize = 128;

/// Inodes in sequence of which one is looked up early. ext4 reads 32 blocks of the inode table at
/// once, mostly with 256 or 512 inodes.
const INODES_AT_ONCE: u64 = 256;

/// Walks a guest's tree; see [`Item`].
#[derive(Debug)]
pub struct Walker {
    joins: Arc<[Join]>,
    /// Places other than the root, by path.
    places: HashMap<Vec<u8>, usize>,
    private: Vec<u8>,
    options: WalkOptions,
    /// Path of the innermost directory on the stack.
    path: Vec<u8>,
    stack: Vec<Frame>,
    /// A directory that was announced and is entered by the next call.
    announced: Option<Announced>,
    queue: VecDeque<Item>,
    names_bytes: usize,
    buffer: Vec<MaybeUninit<u8>>,
    /// Directories entered: joined filesystem, device and inode.
    entered: HashSet<(usize, InodeId)>,
    /// Number of subvolumes counted for [`WalkOptions::subvolumes`].
    subvolumes: usize,
    /// Joined filesystems in which further possible subvolumes are skipped.
    crowded: HashSet<usize>,
    soon: Option<Vec<(Arc<OwnedFd>, Vec<u8>)>>,
}

#[derive(Debug)]
struct Announced {
    entry: Entry,
    source: Source,
}

/// Source of a directory's content.
#[derive(Debug, Clone, Copy)]
enum Source {
    /// Same filesystem as the parent.
    Inherited,
    /// The root of a joined filesystem.
    Join(usize),
    /// A directory that exists only in our tree.
    Own,
    /// Only the directory itself is given, without its content.
    LeftOut,
}

#[derive(Debug)]
struct Frame {
    /// Length of the directory's path.
    path_length: usize,
    meta: Meta,
    source: Source,
    /// Joined filesystem it is in.
    join: usize,
    directory: Option<Arc<OwnedFd>>,
    /// Start of the current batch.
    batch_start: u64,
    /// Number of names already given from the current batch.
    given: usize,
    /// Number of names in the current batch processed by [`Walker::look_ahead`].
    looked_at: usize,
    /// Part of the inode table looked up last. The first name's part is read along with the name.
    window: Option<u64>,
    batch: Option<Batch>,
    incomplete: bool,
    damage_told: bool,
    /// Names below a directory of our own, or those added to the root.
    own: Vec<Vec<u8>>,
}

impl Walker {
    /// Creates a walk from the guest's root. Keeps the tree's filesystems open until dropped.
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
            subvolumes: 0,
            crowded: HashSet::new(),
            soon: None,
        };
        let item = walker.announce_join(Vec::new(), 0);
        walker.queue.push_back(item);
        walker
    }

    /// Leaves out the directory announced by the last item, with its content.
    pub fn leave_out(&mut self) {
        self.announced = None;
        // Items about that directory.
        self.queue.clear();
    }

    /// Like [`Iterator::next`], but leaves reading an object's metadata to the caller.
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

    /// Number of directories the walk is in, without one just announced.
    pub(crate) fn depth(&self) -> usize {
        self.stack.len()
    }

    /// Leaves all directories except the outermost `depth`, without `End` items.
    pub(crate) fn abandon(&mut self, depth: usize) {
        self.announced = None;
        self.queue.clear();
        for frame in self.stack.drain(depth..) {
            self.names_bytes -= frame.batch.as_ref().map_or(0, Batch::bytes);
        }
        let length = self.stack.last().map_or(0, |f| f.path_length);
        self.path.truncate(length);
    }

    /// Starts collecting names for [`Walker::take_soon`].
    pub(crate) fn keep_soon(&mut self) {
        self.soon = Some(Vec::new());
    }

    /// Takes the names to be read soon, each once, with their directories.
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
        let entry = Entry::directory(path, meta, place);
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
            // The kernel rejects a directory inside itself, but not one in two places. A few of
            // those, nested, have more paths than any walk can visit.
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
            // Another filesystem may be joined below the content left out.
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
        let key = (join, meta.id());
        match source {
            Source::Own => true,
            _ if self.entered.len() >= MAX_ENTERED => !self.entered.contains(&key),
            _ => self.entered.insert(key),
        }
    }

    /// Whether filesystems are joined below the private directory.
    fn has_own(&self) -> bool {
        let mut prefix = self.private.clone();
        prefix.push(b'/');
        self.joins.iter().any(|j| j.path.starts_with(&prefix))
    }

    /// Names below a directory of our own, in reverse order.
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

    /// Closes directories and drops names far up the stack until the limits hold.
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

    /// Returns the open directory of a frame; reopens it if it was closed.
    fn directory(&mut self, number: usize) -> Result<Arc<OwnedFd>, Errno> {
        if let Some(directory) = &self.stack[number].directory {
            return Ok(directory.clone());
        }
        // Go back to the nearest open directory, or to the filesystem's root.
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
        if found.id() != wanted.id() {
            return Err(Errno::STALE);
        }
        Ok(current)
    }

    /// Ensures that the innermost directory has a batch with names left, or that none remains.
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
            // Give the names read before the error first; the batch has no successor.
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
            // Without a batch the directory could not even be reopened.
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
        if !name.plain && self.has_too_many_subvolumes(number) {
            return Some(self.pass_over(number));
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
        Some(self.object(number, object))
    }

    /// Collects the names of directories that will be entered soon, and one name per part of the
    /// inode table.
    fn look_ahead(&mut self, number: usize) {
        let crowded = self.has_too_many_subvolumes(number);
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
                if (name.directory || another) && (name.plain || !crowded) {
                    soon.push((directory.clone(), text.to_vec()));
                }
            }
            frame.looked_at += 1;
        }
    }

    /// Returns the next directory of our own below this one, or its end.
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

    /// Announces a directory of our own, with the times of the guest's root.
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

    /// Ends the innermost directory.
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

    /// At the end of a filesystem: reports damage that the driver skipped.
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

    /// Handles an object that may be a directory.
    fn object(&mut self, number: usize, object: Unread) -> Step {
        match object.read() {
            Ok(entry) if entry.kind == Kind::Directory => {
                let other_filesystem = entry.meta.dev != self.stack[number].meta.dev;
                self.subvolumes += usize::from(other_filesystem);
                if other_filesystem && self.has_too_many_subvolumes(number) {
                    return self.pass_over(number);
                }
                self.subdirectory(number, entry.path, entry.meta, entry.place)
                    .into()
            }
            Ok(entry) => Item::Object(entry).into(),
            Err(problem) => Item::Problem(problem).into(),
        }
    }
}

impl Iterator for Walker {
    type Item = Item;

    fn next(&mut self) -> Option<Item> {
        loop {
            match self.next_step()? {
                Step::Item(item) => return Some(item),
                Step::Object(object) => return Some(object.look()),
                Step::Passed => {}
            }
        }
    }
}
