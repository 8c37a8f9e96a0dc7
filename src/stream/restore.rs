//! Writing a restored tree.
//!
//! Everything happens below one directory that is held open. Parents are resolved without following
//! any symbolic link, so a link that was planted in the target leads nowhere; objects are created
//! exclusively and then changed through their descriptor, not their name.
//!
//! The calls follow Bacula's: [`Restorer::create`], data for regular files, `apply_record` per
//! stored record, [`Restorer::finish`]. Attributes are put on in `finish`, in the one order that
//! keeps them: owner, mode, extended attributes, times, inode flags. Flags that would keep later
//! files out of a directory are put on in [`Restorer::end`].

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, IFlags, Mode, OFlags, ResolveFlags, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use super::entry::{Kind, Meta, Time, proc_path};
use super::record::Record;
use crate::error::{Code, Error, Result, escape};
use crate::point::{Point, pass, reach};

/// Blocks of zeros of this size, aligned, become holes in sparse files.
const HOLE: usize = 4096;

/// Part of a path that is resolved with one system call; the kernel takes less than 4096 bytes.
const MAX_RESOLVE: usize = 3500;

/// Bytes that may be spent on remembering finished directories.
const MEMORY: usize = 64 << 20;

/// What one of them costs: key and value, in a table that has just grown.
const SETTLED: usize = 130;

/// Inode flags that forbid changes.
const FENCES: IFlags = IFlags::IMMUTABLE.union(IFlags::APPEND);

/// A step for messages.
const TIMES_BACK: &str = "setting the times of its folder back";

const READ_DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// What to do when the target exists, as Bacula's replace option says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replace {
    /// `a`: replace.
    Always,
    /// `w`: replace if the saved file is newer.
    IfNewer,
    /// `o`: replace if the saved file is older.
    IfOlder,
    /// `n`: keep what is there.
    Never,
}

impl Replace {
    /// From Bacula's character.
    pub fn from_char(c: u8) -> Option<Replace> {
        match c {
            b'a' => Some(Replace::Always),
            b'w' => Some(Replace::IfNewer),
            b'o' => Some(Replace::IfOlder),
            b'n' => Some(Replace::Never),
            _ => None,
        }
    }
}

/// What to create.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What<'a> {
    /// An object of the kind that the mode says; links are given as one of the others.
    Object,
    /// A symbolic link to this target.
    Symlink(&'a [u8]),
    /// Another name of the file at this path (with the restore folder in front, like the path).
    HardLink(&'a [u8]),
}

/// Which attributes are put on. All of them, unless the administrator says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// POSIX ACLs.
    pub acls: bool,
    /// The other extended attributes.
    pub xattrs: bool,
    /// Owner and group, by number. Without them no file keeps its setuid and setgid bits: it would
    /// run as who restores it.
    pub owners: bool,
}

impl Default for Wanted {
    fn default() -> Wanted {
        Wanted {
            acls: true,
            xattrs: true,
            owners: true,
        }
    }
}

/// One object to restore.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The target path as Bacula gives it: with the restore folder in front.
    pub path: &'a [u8],
    /// What it is.
    pub what: What<'a>,
    /// Bacula's stat record: at least mode, owner, size, blocks, rdev and mtime.
    pub meta: Meta,
    /// What to do when something is there.
    pub replace: Replace,
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Created {
    /// A regular file: data may follow.
    Extract,
    /// Created; no data follows.
    Created,
    /// Left as it is, and why.
    Skipped(&'static str),
}

/// Restores objects below one directory.
#[derive(Debug)]
pub struct Restorer {
    root: OwnedFd,
    /// The restore folder as Bacula puts it in front of paths, without a slash at its end.
    prefix: Vec<u8>,
    wanted: Wanted,
    parent: Option<Parent>,
    /// Directories made on the way to a file, whose own attributes are still to come.
    made: HashSet<(u64, u64)>,
    /// Directories that are finished.
    settled: HashMap<(u64, u64), Settled>,
    /// What may still be spent on them.
    memory: usize,
    /// Those that there was no memory for.
    forgotten: u64,
    /// Files that lost the flag NOCOW.
    lost_nocow: u64,
    current: Option<Current>,
}

/// A directory that is finished, but for what a later file in it would change or be refused by.
#[derive(Debug)]
struct Settled {
    times: Timestamps,
    /// Its path, and the flags that are still to come.
    fences: Option<Box<(Vec<u8>, IFlags)>>,
}

impl Settled {
    fn cost(&self) -> usize {
        let fences = self.fences.as_ref();
        SETTLED + fences.map_or(0, |f| size_of::<(Vec<u8>, IFlags)>() + f.0.len())
    }
}

/// The directory that the last object was created in.
#[derive(Debug)]
struct Parent {
    path: Vec<u8>,
    directory: OwnedFd,
    key: (u64, u64),
}

/// The object between create and finish.
#[derive(Debug)]
struct Current {
    path: Vec<u8>,
    kind: Kind,
    /// `None`: a further name of a file; nothing is to be set.
    file: Option<OwnedFd>,
    meta: Meta,
    record: Record,
    position: u64,
    end: u64,
    data_done: bool,
    /// The target takes this flag for empty files only.
    lost_nocow: bool,
    warnings: Vec<Error>,
}

impl Restorer {
    /// Restores below this folder, which is made if missing; `None`, empty or `/`: the host's root.
    ///
    /// The folder itself is the administrator's choice and may be reached over symbolic links.
    pub fn new(folder: Option<&[u8]>) -> Result<Restorer> {
        let mut prefix = folder.unwrap_or_default();
        while let Some(shorter) = prefix.strip_suffix(b"/") {
            prefix = shorter;
        }
        let failed = |step: &str, cause: std::io::Error| {
            let text = format!("the restore folder {}: {step}", escape(prefix));
            Error::new(Code::RestoreFailed, text).because(cause)
        };
        let path: &[u8] = if prefix.is_empty() { b"/" } else { prefix };
        let mut builder = std::fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(builder.recursive(true), 0o700);
        reach(Point::RestoreFolder)
            .map_err(std::io::Error::from)
            .and_then(|()| builder.create(OsStr::from_bytes(path)))
            .map_err(|e| failed("making it", e))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|e| failed("opening it", e.into()))?;
        Ok(Restorer {
            root,
            prefix: prefix.to_vec(),
            wanted: Wanted::default(),
            parent: None,
            made: HashSet::new(),
            settled: HashMap::new(),
            memory: MEMORY,
            forgotten: 0,
            lost_nocow: 0,
            current: None,
        })
    }

    /// Chooses what is put on from the next object on.
    pub fn choose(&mut self, wanted: Wanted) {
        self.wanted = wanted;
    }

    /// Creates an object (for a regular file: empty). Ends the one before, if that was not finished.
    pub fn create(&mut self, request: &Request<'_>) -> Result<Created> {
        self.current = None;
        let relative = self.relative(request.path)?;
        let (parent, name) = split(&relative);
        if name.is_empty() {
            return Ok(Created::Skipped(
                "the restore folder itself is left as it is",
            ));
        }
        let kind = match request.what {
            What::Symlink(_) => Kind::Symlink,
            What::Object | What::HardLink(_) => Kind::from_mode(request.meta.mode)
                .ok_or_else(|| failed(request.path, "unknown type"))?,
        };
        let mut warnings = Vec::new();
        let cached = self.parent.as_ref().is_some_and(|p| p.path == parent);
        if !cached {
            let directory = self.make_directories(parent, request.path, &mut warnings)?;
            let meta = Meta::read(&directory, b"", AtFlags::EMPTY_PATH)
                .map_err(|e| failed(request.path, "stat of its folder").because(e))?;
            self.parent = Some(Parent {
                path: parent.to_vec(),
                directory,
                key: (meta.dev, meta.ino),
            });
        }
        let Some(parent) = &self.parent else {
            return Err(failed(request.path, "no folder"));
        };
        let place = Place {
            directory: parent.directory.as_fd(),
            name,
            path: request.path,
        };

        let existing = match Meta::read(place.directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(meta) => Some(meta),
            Err(Errno::NOENT) => None,
            Err(e) => return Err(place.failed("stat").because(e)),
        };
        if let Some(existing) = &existing {
            let made_by_us = self.made.contains(&(existing.dev, existing.ino));
            let reason = keep(request, existing).filter(|_| !made_by_us);
            if let Some(reason) = reason {
                return Ok(Created::Skipped(reason));
            }
        }
        let mut file = None;
        match request.what {
            What::HardLink(first) => {
                let first = self.relative(first)?;
                self.link(&place, &first, existing.as_ref())?;
            }
            What::Symlink(target) => {
                place.clear_away(existing.as_ref())?;
                file = Some(place.symlink(target)?);
            }
            What::Object if kind == Kind::Directory => {
                file = Some(place.directory(existing.as_ref())?);
            }
            What::Object if kind == Kind::Regular => {
                place.clear_away(existing.as_ref())?;
                file = Some(place.regular()?);
            }
            What::Object if kind == Kind::Symlink => {
                return Err(place.failed("a symbolic link without a target"));
            }
            What::Object => {
                place.clear_away(existing.as_ref())?;
                file = Some(place.node(kind, &request.meta)?);
            }
        }
        pass(Point::RestoreCreated);
        let extract = file.is_some() && kind == Kind::Regular;
        self.current = Some(Current {
            path: request.path.to_vec(),
            kind,
            file,
            meta: request.meta,
            record: Record::default(),
            position: 0,
            end: 0,
            data_done: !extract,
            lost_nocow: false,
            warnings,
        });
        Ok(if extract {
            Created::Extract
        } else {
            Created::Created
        })
    }

    /// Writes at the current position. In a file that was sparse, blocks of zeros become holes.
    pub fn write(&mut self, data: &[u8]) -> Result<()> {
        let current = self.extracting("write")?;
        if current.meta.is_sparse() {
            current.write_sparse(data)
        } else {
            current.write_all(data)
        }
    }

    /// Sets the position for the next write.
    pub fn seek(&mut self, position: u64) -> Result<()> {
        let current = self.extracting("seek")?;
        current.position = position;
        current.end = current.end.max(position);
        Ok(())
    }

    /// The end of the data: the file gets its size.
    pub fn finish_data(&mut self) -> Result<()> {
        let current = self.extracting("end of data")?;
        current.data_done = true;
        let Some(file) = &current.file else {
            return Ok(());
        };
        reach(Point::RestoreSize)
            .and_then(|()| rustix::fs::ftruncate(file, current.end))
            .map_err(|e| failed(&current.path, "setting its size").because(e))?;
        if current.end != current.meta.size {
            let text = format!(
                "{} bytes came, its record says {}",
                current.end, current.meta.size
            );
            current.warnings.push(failed(&current.path, &text));
        }
        Ok(())
    }

    /// Takes one of our records, to be put on in [`Restorer::finish`].
    pub fn apply_record(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(current) = &mut self.current else {
            return Err(Error::new(
                Code::RestoreAttributes,
                "a record without a file",
            ));
        };
        let (record, notes) = Record::decode(bytes).map_err(|e| {
            let shown = escape(&current.path);
            Error::new(Code::RestoreAttributes, shown).because(e)
        })?;
        for note in notes {
            current.warn(&note, None);
        }
        current.record.absorb(record);
        Ok(())
    }

    /// Puts all attributes on and closes the object. What could not be set is in the list: the
    /// content is there all the same, but for a file whose close fails ([`Code::RestoreFailed`]).
    pub fn finish(&mut self) -> Result<Vec<Error>> {
        let Some(current) = &self.current else {
            return Ok(Vec::new());
        };
        if !current.data_done {
            self.finish_data()?;
        }
        let Some(mut current) = self.current.take() else {
            return Ok(Vec::new());
        };
        if let Some(file) = current.file.take() {
            pass(Point::RestoreAttributes);
            let later = match current.kind {
                Kind::Directory => self.settle(&mut current, &file),
                _ => IFlags::empty(),
            };
            current.put_on(&file, self.wanted, later);
            if current.kind == Kind::Regular {
                current.close(file);
            }
        }
        self.lost_nocow += u64::from(current.lost_nocow);
        self.times_of_parent(&mut current);
        pass(Point::RestoreFinished);
        Ok(current.warnings)
    }

    /// The end, also of a restore that was cancelled: directories get the flags that would have kept
    /// later files out. What could not be set is told; the answer is for the log: what became of
    /// directories that there was no memory for, and of files that lost what the target cannot keep.
    pub fn end(mut self, mut problem: impl FnMut(&Error)) -> Vec<String> {
        for (key, settled) in std::mem::take(&mut self.settled) {
            let Some((path, fences)) = settled.fences.map(|f| *f) else {
                continue;
            };
            if let Err(errno) = self.fence(key, &path, fences) {
                let step = "setting its inode flags (chattr) at the end of the restore";
                problem(&attributes(&path, step).because(errno));
            }
        }
        let target = escape(&self.prefix);
        let forgotten = (self.forgotten > 0).then(|| {
            format!(
                "restore to {target}/: {} folders are more than the {} MiB for it can remember. A file that came \
                 into one of them after the folder itself changed the folder's times, or was refused where the \
                 folder is immutable: restore those folders once more, or in parts",
                self.forgotten,
                MEMORY >> 20
            )
        });
        let nocow = (self.lost_nocow > 0).then(|| {
            format!(
                "restore to {target}/: {} files are not NOCOW (chattr +C) any more, which btrfs takes for empty files \
                 only: where that matters, copy them into a folder that is",
                self.lost_nocow
            )
        });
        forgotten.into_iter().chain(nocow).collect()
    }

    fn fence(
        &self,
        key: (u64, u64),
        path: &[u8],
        fences: IFlags,
    ) -> std::result::Result<(), Errno> {
        let relative = self.relative(path).map_err(|_| Errno::INVAL)?;
        let directory = self.open_directory(&relative)?;
        let file = rustix::fs::openat(&directory, c".", READ_DIRECTORY, Mode::empty())?;
        let meta = Meta::read(&file, b"", AtFlags::EMPTY_PATH)?;
        if (meta.dev, meta.ino) != key {
            return Err(Errno::STALE);
        }
        let before = rustix::fs::ioctl_getflags(&file)?;
        rustix::fs::ioctl_setflags(&file, before | fences)
    }

    /// Remembers a finished directory. The answer: the flags that are left to [`Restorer::end`].
    fn settle(&mut self, current: &mut Current, file: &OwnedFd) -> IFlags {
        let key = match Meta::read(file, b"", AtFlags::EMPTY_PATH) {
            Ok(meta) => (meta.dev, meta.ino),
            Err(errno) => {
                current.warn("stat", Some(errno));
                return IFlags::empty();
            }
        };
        self.made.remove(&key);
        if let Some(old) = self.settled.remove(&key) {
            self.memory += old.cost();
        }
        let fences = current.saved_flags() & FENCES;
        let settled = Settled {
            times: current.times(),
            fences: (!fences.is_empty()).then(|| Box::new((current.path.clone(), fences))),
        };
        let Some(rest) = self.memory.checked_sub(settled.cost()) else {
            self.forgotten += 1;
            return IFlags::empty();
        };
        self.memory = rest;
        self.settled.insert(key, settled);
        fences
    }

    /// A new name in a finished directory changed its times: put them back.
    fn times_of_parent(&mut self, current: &mut Current) {
        let Some(parent) = &self.parent else { return };
        if let Err(errno) = self.times_back(parent.key, &parent.directory) {
            current.warn(TIMES_BACK, Some(errno));
        }
    }

    fn times_back(&self, key: (u64, u64), directory: &OwnedFd) -> std::result::Result<(), Errno> {
        let Some(Settled { times, .. }) = self.settled.get(&key) else {
            return Ok(());
        };
        rustix::fs::utimensat(CWD, proc_path(directory), times, AtFlags::empty())
    }

    fn extracting(&mut self, step: &str) -> Result<&mut Current> {
        match &mut self.current {
            Some(current) if !current.data_done => Ok(current),
            _ => Err(Error::new(
                Code::RestoreFailed,
                format!("{step} without a file that takes data"),
            )),
        }
    }

    /// The path below the restore folder: no empty components, no dots.
    fn relative(&self, path: &[u8]) -> Result<Vec<u8>> {
        let outside = || {
            let text = format!(
                "{} is not below the restore folder {}",
                escape(path),
                escape(&self.prefix)
            );
            Error::new(Code::RestoreOutside, text)
        };
        let rest = path.strip_prefix(&self.prefix[..]).ok_or_else(outside)?;
        if !self.prefix.is_empty() && !rest.is_empty() && !rest.starts_with(b"/") {
            return Err(outside());
        }
        let mut relative = Vec::with_capacity(rest.len());
        for part in rest.split(|&b| b == b'/') {
            match part {
                b"" | b"." => {}
                b".." => return Err(outside()),
                part if part.contains(&0) => return Err(outside()),
                part => {
                    if !relative.is_empty() {
                        relative.push(b'/');
                    }
                    relative.extend_from_slice(part);
                }
            }
        }
        Ok(relative)
    }

    /// Opens a directory below the root, without following links.
    fn open_directory(&self, relative: &[u8]) -> std::result::Result<OwnedFd, Errno> {
        let mut directory = resolve(self.root.as_fd(), b".")?;
        let mut rest = relative;
        while !rest.is_empty() {
            let end = if rest.len() <= MAX_RESOLVE {
                rest.len()
            } else {
                let slash = rest[..MAX_RESOLVE].iter().rposition(|&b| b == b'/');
                slash.ok_or(Errno::NAMETOOLONG)?
            };
            directory = resolve(directory.as_fd(), &rest[..end])?;
            rest = rest.get(end + 1..).unwrap_or_default();
        }
        Ok(directory)
    }

    /// Opens the directory of an object, making what is missing on the way.
    fn make_directories(
        &mut self,
        relative: &[u8],
        path: &[u8],
        warnings: &mut Vec<Error>,
    ) -> Result<OwnedFd> {
        match self.open_directory(relative) {
            Ok(directory) => return Ok(directory),
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(resolve_error(path, errno)),
        }
        let mut directory = resolve(self.root.as_fd(), b".").map_err(|e| resolve_error(path, e))?;
        for name in relative.split(|&b| b == b'/') {
            directory = match resolve(directory.as_fd(), name) {
                Ok(next) => next,
                Err(Errno::NOENT) => {
                    let place = Place {
                        directory: directory.as_fd(),
                        name,
                        path,
                    };
                    let made = place.directory(None)?;
                    let key = |directory: &OwnedFd| {
                        let meta = Meta::read(directory, b"", AtFlags::EMPTY_PATH);
                        meta.map(|meta| (meta.dev, meta.ino))
                            .map_err(|e| failed(path, "stat of a new folder").because(e))
                    };
                    self.made.insert(key(&made)?);
                    if let Err(errno) = self.times_back(key(&directory)?, &directory) {
                        warnings.push(attributes(path, TIMES_BACK).because(errno));
                    }
                    made
                }
                Err(errno) => return Err(resolve_error(path, errno)),
            };
        }
        Ok(directory)
    }

    /// Gives a file that was restored before another name.
    fn link(&self, place: &Place<'_>, first: &[u8], existing: Option<&Meta>) -> Result<()> {
        let (parent, name) = split(first);
        let gone = |errno| {
            let text = format!(
                "linking it to {}, which must be restored too",
                escape(first)
            );
            place.failed(&text).because(errno)
        };
        let directory = self.open_directory(parent).map_err(gone)?;
        let source = Meta::read(&directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(gone)?;
        if existing.is_some_and(|e| (e.dev, e.ino) == (source.dev, source.ino)) {
            return Ok(());
        }
        place.clear_away(existing)?;
        let link = || {
            let flags = AtFlags::empty();
            reach(Point::RestoreLink)?;
            rustix::fs::linkat(&directory, name, place.directory, place.name, flags)
        };
        match link() {
            Ok(()) => Ok(()),
            // An immutable or append-only file takes no new name.
            Err(Errno::PERM) if Kind::from_mode(source.mode) == Some(Kind::Regular) => {
                without_fences(directory.as_fd(), name, link).map_err(gone)
            }
            Err(errno) => Err(gone(errno)),
        }
    }
}

/// Does something with a regular file while its immutable and append-only flags are off.
fn without_fences(
    directory: BorrowedFd<'_>,
    name: &[u8],
    action: impl Fn() -> std::result::Result<(), Errno>,
) -> std::result::Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, name, flags, Mode::empty())?;
    let before = rustix::fs::ioctl_getflags(&file)?;
    if !before.intersects(FENCES) {
        return Err(Errno::PERM);
    }
    rustix::fs::ioctl_setflags(&file, before - FENCES)?;
    let result = action();
    // Not when its last name is gone.
    if Meta::read(&file, b"", AtFlags::EMPTY_PATH).is_ok_and(|meta| meta.nlink == 0) {
        return result;
    }
    result.and(rustix::fs::ioctl_setflags(&file, before))
}

fn attributes(path: &[u8], step: &str) -> Error {
    Error::new(Code::RestoreAttributes, format!("{}: {step}", escape(path)))
}

fn failed(path: &[u8], step: &str) -> Error {
    Error::new(Code::RestoreFailed, format!("{}: {step}", escape(path)))
}

fn resolve_error(path: &[u8], errno: Errno) -> Error {
    let (code, step) = match errno {
        Errno::NOSYS => (Code::KernelTooOld, "openat2"),
        Errno::LOOP | Errno::XDEV => (
            Code::RestoreOutside,
            "a folder of its path is a symbolic link in the target",
        ),
        Errno::NOTDIR => (
            Code::RestoreFailed,
            "a folder of its path is not a folder in the target",
        ),
        _ => (Code::RestoreFailed, "opening its folder"),
    };
    Error::new(code, format!("{}: {step}", escape(path))).because(errno)
}

/// Opens a directory below another one: never up, never over a link.
fn resolve(directory: BorrowedFd<'_>, path: &[u8]) -> std::result::Result<OwnedFd, Errno> {
    // Without O_NOFOLLOW: RESOLVE_NO_SYMLINKS covers the last component, and says so (ELOOP).
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    reach(Point::RestoreResolve)?;
    // EAGAIN: something was renamed meanwhile.
    for _ in 0..3 {
        match rustix::fs::openat2(directory, path, flags, Mode::empty(), how) {
            Err(Errno::AGAIN) => {}
            result => return result,
        }
    }
    Err(Errno::AGAIN)
}

/// Folder and name of a clean relative path.
fn split(relative: &[u8]) -> (&[u8], &[u8]) {
    match relative.iter().rposition(|&b| b == b'/') {
        Some(slash) => (&relative[..slash], &relative[slash + 1..]),
        None => (b"", relative),
    }
}

/// Why what exists is kept, if it is. Bacula's own rules.
fn keep(request: &Request<'_>, existing: &Meta) -> Option<&'static str> {
    let saved = request.meta.mtime.seconds;
    let there = existing.mtime.seconds;
    match request.replace {
        Replace::Always => None,
        Replace::Never => Some("it exists"),
        Replace::IfNewer => (saved <= there).then_some("the saved one is not newer"),
        Replace::IfOlder => (saved >= there).then_some("the saved one is not older"),
    }
}

/// A name in an open directory, and the whole path for errors.
struct Place<'a> {
    directory: BorrowedFd<'a>,
    name: &'a [u8],
    path: &'a [u8],
}

impl Place<'_> {
    fn failed(&self, step: &str) -> Error {
        failed(self.path, step)
    }

    /// Removes what is in the way, unless it is a directory.
    fn clear_away(&self, existing: Option<&Meta>) -> Result<()> {
        let Some(existing) = existing else {
            return Ok(());
        };
        let kind = Kind::from_mode(existing.mode);
        if kind == Some(Kind::Directory) {
            return Err(self.failed("a folder of this name is in the way"));
        }
        let unlink = || rustix::fs::unlinkat(self.directory, self.name, AtFlags::empty());
        let result = match unlink() {
            // It is immutable or append-only; where it has other names or stays, it is so again.
            Err(Errno::PERM) if kind == Some(Kind::Regular) => {
                without_fences(self.directory, self.name, unlink)
            }
            result => result,
        };
        result.map_err(|e| self.failed("removing what is in its place").because(e))
    }

    fn regular(&self) -> Result<OwnedFd> {
        let flags = OFlags::WRONLY
            | OFlags::CREATE
            | OFlags::EXCL
            | OFlags::NOFOLLOW
            | OFlags::NOCTTY
            | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o600);
        let file = reach(Point::RestoreCreate)
            .and_then(|()| rustix::fs::openat(self.directory, self.name, flags, mode))
            .map_err(|e| self.failed("creating it").because(e))?;
        drop_inherited(&file);
        Ok(file)
    }

    fn symlink(&self, target: &[u8]) -> Result<OwnedFd> {
        reach(Point::RestoreSymlink)
            .and_then(|()| rustix::fs::symlinkat(target, self.directory, self.name))
            .map_err(|e| self.failed("creating the symbolic link").because(e))?;
        let (file, meta) = self.open_new()?;
        if Kind::from_mode(meta.mode) == Some(Kind::Symlink) {
            Ok(file)
        } else {
            Err(self.failed("the new symbolic link was replaced by somebody"))
        }
    }

    fn node(&self, kind: Kind, meta: &Meta) -> Result<OwnedFd> {
        let file_type = match kind {
            Kind::Fifo => FileType::Fifo,
            Kind::CharDevice => FileType::CharacterDevice,
            Kind::BlockDevice => FileType::BlockDevice,
            Kind::Socket => FileType::Socket,
            _ => return Err(self.failed("not a special file")),
        };
        let device = if matches!(kind, Kind::CharDevice | Kind::BlockDevice) {
            meta.rdev
        } else {
            0
        };
        let mode = Mode::from_raw_mode(0o600);
        reach(Point::RestoreNode)
            .and_then(|()| rustix::fs::mknodat(self.directory, self.name, file_type, mode, device))
            .map_err(|e| self.failed("creating the special file").because(e))?;
        let (file, made) = self.open_new()?;
        if Kind::from_mode(made.mode) == Some(kind) && made.rdev == device {
            drop_inherited(&file);
            Ok(file)
        } else {
            Err(self.failed("the new special file was replaced by somebody"))
        }
    }

    /// Opens what was just made by name, and makes sure that it can only be ours.
    fn open_new(&self) -> Result<(OwnedFd, Meta)> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(self.directory, self.name, flags, Mode::empty())
            .map_err(|e| self.failed("opening it").because(e))?;
        let meta = Meta::read(&file, b"", AtFlags::EMPTY_PATH)
            .map_err(|e| self.failed("stat").because(e))?;
        let ours = meta.nlink == 1 && meta.uid == rustix::process::geteuid().as_raw();
        if ours {
            Ok((file, meta))
        } else {
            Err(self.failed("what was just created was replaced by somebody"))
        }
    }

    /// Makes the directory, or takes the one that exists.
    fn directory(&self, existing: Option<&Meta>) -> Result<OwnedFd> {
        let open = || {
            rustix::fs::openat(self.directory, self.name, READ_DIRECTORY, Mode::empty())
                .map_err(|e| self.failed("opening the folder").because(e))
        };
        if existing.is_some_and(|e| Kind::from_mode(e.mode) == Some(Kind::Directory)) {
            return open();
        }
        self.clear_away(existing)?;
        reach(Point::RestoreMkdir)
            .and_then(|()| {
                rustix::fs::mkdirat(self.directory, self.name, Mode::from_raw_mode(0o700))
            })
            .map_err(|e| self.failed("making the folder").because(e))?;
        let directory = open()?;
        let meta = Meta::read(&directory, b"", AtFlags::EMPTY_PATH)
            .map_err(|e| self.failed("stat of the new folder").because(e))?;
        if meta.uid != rustix::process::geteuid().as_raw() {
            return Err(self.failed("the new folder was replaced by somebody"));
        }
        drop_inherited(&directory);
        // The daemon's umask may have taken bits away, or an inherited ACL given some.
        rustix::fs::fchmod(&directory, Mode::from_raw_mode(0o700))
            .map_err(|e| self.failed("setting the mode of the new folder").because(e))?;
        Ok(directory)
    }
}

/// Takes away ACLs that a new object inherited from the folder it was put in. That there are none,
/// or that the filesystem has none, is the usual case. (By its name in /proc: special files are held by O_PATH.)
fn drop_inherited(file: &OwnedFd) {
    for name in [ACL_ACCESS, ACL_DEFAULT] {
        let _ = rustix::fs::removexattr(proc_path(file), name);
    }
}

const ACL_ACCESS: &[u8] = b"system.posix_acl_access";
const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";

/// Inode flags that are put on. The others say how the filesystem keeps the file.
const SETTABLE: IFlags = IFlags::SECURE_REMOVAL
    .union(IFlags::UNRM)
    .union(IFlags::SYNC)
    .union(IFlags::IMMUTABLE)
    .union(IFlags::APPEND)
    .union(IFlags::NODUMP)
    .union(IFlags::NOATIME)
    .union(IFlags::COMPRESSED)
    .union(IFlags::JOURNALING)
    .union(IFlags::NOTAIL)
    .union(IFlags::DIRSYNC)
    .union(IFlags::TOPDIR)
    .union(IFlags::NOCOW);

impl Current {
    /// Where a server or a quota keeps the file, what is wrong with its data may come with the close
    /// only: no room, a disk that failed.
    fn close(&mut self, file: OwnedFd) {
        let closed = reach(Point::RestoreClose).and_then(|()| {
            nix::unistd::close(file).map_err(|e| Errno::from_raw_os_error(e as i32))
        });
        if let Err(errno) = closed {
            let error = failed(&self.path, "closing it: its contents may not be there");
            self.warnings.push(error.because(errno));
        }
    }

    fn warn(&mut self, step: &str, cause: Option<Errno>) {
        let error = attributes(&self.path, step);
        self.warnings.push(match cause {
            Some(errno) => error.because(errno),
            None => error,
        });
    }

    fn check(&mut self, step: &str, result: std::result::Result<(), Errno>) {
        if let Err(errno) = result {
            self.warn(step, Some(errno));
        }
    }

    fn write_all(&mut self, mut data: &[u8]) -> Result<()> {
        let Some(file) = &self.file else {
            return Err(failed(&self.path, "write without a file"));
        };
        while !data.is_empty() {
            let written = reach(Point::RestoreWrite)
                .and_then(|()| rustix::io::pwrite(file, data, self.position));
            match written {
                Ok(0) => return Err(failed(&self.path, "write: nothing was taken")),
                Ok(length) => {
                    data = &data[length..];
                    self.position += length as u64;
                    self.end = self.end.max(self.position);
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(failed(&self.path, "write").because(errno)),
            }
        }
        Ok(())
    }

    /// Writes, with aligned blocks of zeros as holes.
    fn write_sparse(&mut self, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            // Up to the next border of a block of the file.
            let into = usize::try_from(self.position % HOLE as u64).unwrap_or(0);
            let length = data.len().min(HOLE - into);
            let (block, rest) = data.split_at(length);
            if block.iter().all(|&b| b == 0) {
                self.position += length as u64;
                self.end = self.end.max(self.position);
                data = rest;
                continue;
            }
            // Write in one go up to the next block of zeros.
            let mut run = length;
            for next in rest.chunks(HOLE) {
                if next.iter().all(|&b| b == 0) {
                    break;
                }
                run += next.len();
            }
            let (now, later) = data.split_at(run);
            self.write_all(now)?;
            data = later;
        }
        Ok(())
    }

    fn times(&self) -> Timestamps {
        let pick = |exact: Option<Time>, coarse: Time| exact.unwrap_or(coarse).into();
        Timestamps {
            last_access: pick(self.record.atime, self.meta.atime),
            last_modification: pick(self.record.mtime, self.meta.mtime),
        }
    }

    /// Owner, mode, extended attributes, times, inode flags: each would undo or forbid a later one
    /// in another order. Flags that come `later` are left out.
    fn put_on(&mut self, file: &OwnedFd, wanted: Wanted, later: IFlags) {
        // Links and special files are held by O_PATH, which only their name in /proc serves.
        let name = proc_path(file);
        let mut owned = false;
        if wanted.owners {
            let owner = reach(Point::RestoreOwner).and_then(|()| {
                rustix::fs::chownat(
                    file,
                    c"",
                    Some(Uid::from_raw(self.meta.uid)),
                    Some(Gid::from_raw(self.meta.gid)),
                    AtFlags::EMPTY_PATH,
                )
            });
            owned = owner.is_ok();
            self.check("setting the owner", owner);
        }
        let is_acl = |name: &[u8]| name == ACL_ACCESS || name == ACL_DEFAULT;
        self.record.xattrs.retain(|(name, _)| {
            if is_acl(name) {
                wanted.acls
            } else {
                wanted.xattrs
            }
        });
        if self.kind == Kind::Directory {
            self.drop_old_acls(file);
        }
        if self.kind != Kind::Symlink {
            // A program of somebody else must not become root's that anybody runs as root.
            let bits = if owned { 0o7777 } else { 0o1777 };
            let mode = Mode::from_raw_mode(self.meta.mode & bits);
            let result = rustix::fs::chmod(name.as_str(), mode);
            self.check("setting the mode", result);
        }
        for (key, value) in std::mem::take(&mut self.record.xattrs) {
            let flags = XattrFlags::empty();
            let result = reach(Point::RestoreXattr)
                .and_then(|()| rustix::fs::setxattr(name.as_str(), key.as_slice(), &value, flags));
            let step = || format!("setting the extended attribute {}", escape(&key));
            if let Err(errno) = result {
                self.warn(&step(), Some(errno));
            }
        }
        let times = reach(Point::RestoreTimes).and_then(|()| {
            rustix::fs::utimensat(CWD, name.as_str(), &self.times(), AtFlags::empty())
        });
        self.check("setting the times", times);
        if matches!(self.kind, Kind::Regular | Kind::Directory) {
            self.put_on_flags(file, later);
        }
    }

    /// A directory that was there before may have ACLs that the saved one had not.
    fn drop_old_acls(&mut self, file: &OwnedFd) {
        for acl in [ACL_ACCESS, ACL_DEFAULT] {
            if !self.record.xattrs.iter().any(|(name, _)| name == acl) {
                match rustix::fs::fremovexattr(file, acl) {
                    Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
                    Err(errno) => self.warn("removing an ACL that is not its own", Some(errno)),
                }
            }
        }
    }

    /// The saved inode flags that are put on.
    fn saved_flags(&self) -> IFlags {
        IFlags::from_bits_retain(self.record.flags.unwrap_or(0)) & SETTABLE
    }

    fn put_on_flags(&mut self, file: &OwnedFd, later: IFlags) {
        if self.record.flags.is_none() {
            return;
        }
        let mut wanted = self.saved_flags() - later;
        let before = match rustix::fs::ioctl_getflags(file) {
            Ok(flags) => flags,
            Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::NOSYS) if wanted.is_empty() => return,
            Err(errno) => {
                self.warn("inode flags (chattr)", Some(errno));
                return;
            }
        };
        // A directory that was fenced on the target stays so, whatever the saved one was.
        if self.kind == Kind::Directory {
            wanted |= before & FENCES;
        }
        if before & SETTABLE == wanted {
            return;
        }
        if rustix::fs::ioctl_setflags(file, (before - SETTABLE) | wanted).is_err() {
            // Not all of them: one by one, so that one that the target lacks costs only itself. What
            // forbids changes comes last.
            let mut now = before;
            for flag in (wanted - FENCES).iter().chain((wanted & FENCES).iter()) {
                if now.contains(flag) {
                    continue;
                }
                match rustix::fs::ioctl_setflags(file, now | flag) {
                    Ok(()) => now |= flag,
                    Err(errno) => {
                        wanted -= flag;
                        let step = format!("setting the inode flag {:#x} (chattr)", flag.bits());
                        self.warn(&step, Some(errno));
                    }
                }
            }
        }
        // Some are ignored without an error: btrfs does so with NOCOW where there are data.
        match rustix::fs::ioctl_getflags(file) {
            Ok(now) if now.contains(wanted) => {}
            Ok(now) if wanted - now == IFlags::NOCOW && self.end > 0 => self.lost_nocow = true,
            Ok(now) => {
                let lost = (wanted - now).bits();
                let step = format!("the filesystem did not take the inode flag {lost:#x} (chattr)");
                self.warn(&step, None);
            }
            Err(errno) => self.warn("reading its inode flags (chattr) back", Some(errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

    use super::*;

    fn restorer(folder: &str) -> Restorer {
        Restorer {
            root: rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap(),
            prefix: folder.as_bytes().to_vec(),
            wanted: Wanted::default(),
            parent: None,
            made: HashSet::new(),
            settled: HashMap::new(),
            memory: MEMORY,
            forgotten: 0,
            lost_nocow: 0,
            current: None,
        }
    }

    #[test]
    fn test_paths_stay_below_the_folder() {
        let r = restorer("/tmp/r");
        assert_eq!(r.relative(b"/tmp/r/a//b/./c/").unwrap(), b"a/b/c");
        assert_eq!(r.relative(b"/tmp/r").unwrap(), b"");
        for path in [
            "/tmp/rx/a",
            "/tmp/r/../a",
            "/etc/passwd",
            "a",
            "/tmp/r/a\0b",
        ] {
            let error = r.relative(path.as_bytes()).unwrap_err();
            assert_eq!(error.code(), Code::RestoreOutside, "{path}");
        }
        assert_eq!(
            restorer("").relative(b"/@guestsnap/w/etc").unwrap(),
            b"@guestsnap/w/etc"
        );
    }

    #[test]
    fn test_replace_rules_are_baculas() {
        let at = |seconds| Meta {
            mtime: Time {
                seconds,
                nanoseconds: 0,
            },
            ..Meta::default()
        };
        let kept = |c, saved, there| {
            let request = Request {
                path: b"/x",
                what: What::Object,
                meta: at(saved),
                replace: Replace::from_char(c).unwrap(),
            };
            keep(&request, &at(there)).is_some()
        };
        assert!(!kept(b'a', 1, 2));
        assert!(kept(b'n', 2, 1));
        assert!(kept(b'w', 1, 1) && kept(b'w', 1, 2) && !kept(b'w', 2, 1));
        assert!(kept(b'o', 1, 1) && kept(b'o', 2, 1) && !kept(b'o', 1, 2));
        assert_eq!(Replace::from_char(b'x'), None);
    }

    /// Restores an empty file or a folder with this owner; gives what could not be set.
    fn put(restorer: &mut Restorer, path: &[u8], mode: u32, uid: u32) -> Vec<Error> {
        let meta = Meta {
            mode,
            uid,
            gid: rustix::process::getegid().as_raw(),
            mtime: Time {
                seconds: 1_000_000_000,
                nanoseconds: 0,
            },
            ..Meta::default()
        };
        let request = Request {
            path,
            what: What::Object,
            meta,
            replace: Replace::Always,
        };
        restorer.create(&request).unwrap();
        restorer.finish().unwrap()
    }

    fn own() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    #[test]
    fn test_without_its_owner_nothing_is_setuid() {
        // A thread's capabilities are its own.
        std::thread::spawn(restore_without_chown).join().unwrap();
    }

    fn restore_without_chown() {
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::CHOWN);
        set_capabilities(None, sets).unwrap();
        let target = tempfile::tempdir().unwrap();
        let top = target.path().as_os_str().as_bytes();
        let mut r = Restorer::new(Some(top)).unwrap();
        for (name, mode, uid, left) in [
            ("theirs", 0o106_755, own() + 1, 0o755),
            ("folder", 0o043_775, own() + 1, 0o1775),
            ("own", 0o104_755, own(), 0o4755),
        ] {
            let path = [top, b"/", name.as_bytes()].concat();
            let problems = put(&mut r, &path, mode, uid);
            let told: Vec<String> = problems.iter().map(Error::report).collect();
            assert_eq!(told.len(), usize::from(uid != own()), "{name}: {told:?}");
            assert!(told.iter().all(|t| t.contains("owner")), "{name}: {told:?}");
            let meta = std::fs::metadata(target.path().join(name)).unwrap();
            assert_eq!((meta.mode() & 0o7777, meta.uid()), (left, own()), "{name}");
        }
    }

    #[test]
    fn test_folders_beyond_the_memory_are_counted() {
        let target = tempfile::tempdir().unwrap();
        let top = target.path().as_os_str().as_bytes();
        let at = |name: &str| [top, b"/", name.as_bytes()].concat();
        let mut r = Restorer::new(Some(top)).unwrap();
        r.memory = 2 * SETTLED;
        // The same one again costs nothing more.
        for folder in ["one", "one", "two", "three", "four"] {
            assert!(put(&mut r, &at(folder), 0o040_700, own()).is_empty());
        }
        for file in ["one/file", "two/file", "three/file", "four/file"] {
            assert!(put(&mut r, &at(file), 0o100_600, own()).is_empty());
        }
        let kept = ["one", "two", "three", "four"].map(|folder| {
            let meta = std::fs::metadata(target.path().join(folder)).unwrap();
            meta.mtime() == 1_000_000_000
        });
        assert_eq!(kept, [true, true, false, false]);
        let told = r.end(|e| panic!("{}", e.report()));
        assert!(told.len() == 1 && told[0].contains("2 folders"), "{told:?}");
    }

    #[test]
    fn test_what_fences_a_folder_waits_while_there_is_memory() {
        let target = tempfile::tempdir().unwrap();
        let file = rustix::fs::open(target.path(), READ_DIRECTORY, Mode::empty()).unwrap();
        let mut current = Current {
            path: b"/some/folder".to_vec(),
            kind: Kind::Directory,
            file: None,
            meta: Meta::default(),
            record: Record {
                flags: Some((FENCES | IFlags::NODUMP).bits()),
                ..Record::default()
            },
            position: 0,
            end: 0,
            data_done: true,
            lost_nocow: false,
            warnings: Vec::new(),
        };
        let mut r = restorer("/some");
        assert_eq!(r.settle(&mut current, &file), FENCES);
        let (left, forgotten) = (r.memory, r.forgotten);
        assert!(left <= MEMORY - SETTLED - current.path.len() && forgotten == 0);
        // The same one again takes the place of the first.
        assert_eq!(r.settle(&mut current, &file), FENCES);
        assert_eq!(r.memory, left);
        // Without memory for it the flags come at once, and nothing of it is left to do.
        r.memory = 0;
        current.path = vec![b'x'; 4000];
        assert_eq!(r.settle(&mut current, &file), IFlags::empty());
        assert!(r.settled.is_empty() && r.forgotten == 1);
    }
}
