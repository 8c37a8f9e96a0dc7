//! The restorer: the current object, its directory, and the order of the calls.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, IFlags, Mode};
use rustix::io::Errno;

use super::errors::{attributes, failed};
use super::fences::{is_lacking, without_fences};
use super::file::Current;
use super::memory::Memory;
use super::place::{Place, READ_DIRECTORY};
use super::request::{Created, Request, Wanted, What, keep};
use super::target::{Joined, Target, resolve, resolve_error};
use crate::error::{Code, Error, Result, escape};
use crate::inode::{InodeId, Kind, Meta};
use crate::point::{Point, pass, reach};
use crate::stream::losses::Losses;

/// A step, for messages.
const TIMES_BACK: &str = "setting the times of its folder back";

/// Restores objects below one directory.
#[derive(Debug)]
pub struct Restorer {
    target: Target,
    wanted: Wanted,
    parent: Option<Parent>,
    memory: Memory,
    losses: Losses,
    current: Option<Current>,
}

/// Directory of the last object.
#[derive(Debug)]
struct Parent {
    path: Vec<u8>,
    directory: OwnedFd,
    key: InodeId,
}

impl Restorer {
    /// Restores below this folder and creates it if missing; `None`, empty or `/`: the host's root.
    ///
    /// The administrator chooses the folder itself, so its path may contain symbolic links.
    pub fn new(folder: Option<&[u8]>) -> Result<Restorer> {
        Target::open(folder).map(Restorer::to)
    }

    /// Restores into a guest's tree, the roots of its filesystems included. `prefix` stands in front of
    /// all paths.
    pub fn into_tree(roots: Vec<Joined>, prefix: &[u8]) -> Restorer {
        Restorer::to(Target::tree(roots, prefix))
    }

    fn to(target: Target) -> Restorer {
        Restorer {
            target,
            wanted: Wanted::default(),
            parent: None,
            memory: Memory::new(),
            losses: Losses::default(),
            current: None,
        }
    }

    /// Chooses the attributes to restore, from the next object on.
    pub fn choose(&mut self, wanted: Wanted) {
        self.wanted = wanted;
    }

    /// Creates an object; a regular file is empty. Drops the previous one if unfinished.
    pub fn create(&mut self, request: &Request<'_>) -> Result<Created> {
        self.current = None;
        let relative = self.target.relative(request.path)?;
        let (parent, name) = self.target.split(&relative);
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
        self.enter(parent, request.path, &mut warnings)?;
        let Some(parent) = &self.parent else {
            return Err(failed(request.path, "no folder"));
        };
        let place = Place {
            directory: parent.directory.as_fd(),
            name,
            path: request.path,
        };

        let existing = place.existing()?;
        if let Some(existing) = &existing {
            let made_by_us = self.memory.is_made(existing);
            let reason = keep(request, existing).filter(|_| !made_by_us);
            if let Some(reason) = reason {
                return Ok(Created::Skipped(reason));
            }
        }
        let file = self.make(&place, kind, request, existing.as_ref())?;
        if let Some(file) = file
            .as_ref()
            .filter(|_| kind != Kind::Directory && request.meta.nlink != 1)
        {
            self.memory.first(file, request.path)?;
        }
        pass(Point::RestoreCreated);
        let current = Current::new(request, kind, file, warnings);
        let created = if current.data_done {
            Created::Created
        } else {
            Created::Extract
        };
        self.current = Some(current);
        Ok(created)
    }

    /// Opens the directory of an object, unless it is still open.
    fn enter(&mut self, parent: &[u8], path: &[u8], warnings: &mut Vec<Error>) -> Result<()> {
        if self.parent.as_ref().is_some_and(|p| p.path == parent) {
            return Ok(());
        }
        let directory = self.make_directories(parent, path, warnings)?;
        let meta = Meta::read(&directory, b"", AtFlags::EMPTY_PATH)
            .map_err(|e| failed(path, "stat of its folder").because(e))?;
        self.parent = Some(Parent {
            path: parent.to_vec(),
            directory,
            key: meta.id(),
        });
        Ok(())
    }

    /// Creates the object. `None`: another hard link.
    fn make(
        &self,
        place: &Place<'_>,
        kind: Kind,
        request: &Request<'_>,
        existing: Option<&Meta>,
    ) -> Result<Option<OwnedFd>> {
        let file = match request.what {
            What::HardLink(first) => {
                let first = self.target.relative(first)?;
                self.link(place, &first, existing, &request.meta)?;
                return Ok(None);
            }
            What::Symlink(target) => {
                place.clear_away(existing)?;
                place.symlink(target)?
            }
            What::Object if kind == Kind::Directory => place.directory(existing)?,
            What::Object if kind == Kind::Regular => {
                place.clear_away(existing)?;
                place.regular()?
            }
            What::Object if kind == Kind::Symlink => {
                return Err(place.failed("a symbolic link without a target"));
            }
            What::Object => {
                place.clear_away(existing)?;
                place.node(kind, &request.meta)?
            }
        };
        Ok(Some(file))
    }

    /// Writes at the current position. In a file that was sparse, blocks of zeros become holes.
    pub fn write(&mut self, data: &[u8]) -> Result<()> {
        self.extracting("write")?.write(data)
    }

    /// Sets the position for the next write.
    pub fn seek(&mut self, position: u64) -> Result<()> {
        self.extracting("seek")?.seek(position);
        Ok(())
    }

    /// Ends the data and sets the file's size.
    pub fn finish_data(&mut self) -> Result<()> {
        self.extracting("end of data")?.finish_data()
    }

    /// Takes one of our records; [`Restorer::finish`] sets its attributes.
    pub fn apply_record(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(current) = &mut self.current else {
            return Err(Error::new(
                Code::RestoreAttributes,
                "a record without a file",
            ));
        };
        current.apply_record(bytes)
    }

    /// Sets all attributes and closes the object. Returns those that failed. The content is
    /// complete nevertheless, except for a file whose close fails ([`Code::RestoreFailed`]).
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
                Kind::Directory => self.memory.settle(&mut current, &file),
                _ => IFlags::empty(),
            };
            current.put_on(&file, self.wanted, later);
            if current.kind == Kind::Regular {
                current.close(file);
            }
        }
        self.losses.nocow += u64::from(current.lost_nocow);
        self.losses.rights += u64::from(current.lost_rights);
        self.losses.ntfs += u64::from(current.lost_ntfs);
        self.losses.flags(current.lost_flags);
        self.times_of_parent(&mut current);
        pass(Point::RestoreFinished);
        Ok(current.warnings)
    }

    /// Ends the restore, even a cancelled one: sets the flags that would have kept later files out
    /// of directories, and reports those that failed. Returns log lines about directories that did
    /// not fit into memory, and about files that lost attributes.
    pub fn end(mut self, mut problem: impl FnMut(&Error)) -> Vec<String> {
        for (key, path, fences) in self.memory.take_fences() {
            match self.fence(key, &path, fences) {
                Ok(()) => {}
                Err(errno) if is_lacking(errno) => self.losses.flags(fences),
                Err(errno) => {
                    let step = "setting its inode flags (chattr) at the end of the restore";
                    problem(&attributes(&path, step).because(errno));
                }
            }
        }
        let prefix = self.target.prefix();
        let forgotten = self.memory.tell(prefix);
        let lost = self.losses.tell(prefix);
        forgotten.into_iter().chain(lost).collect()
    }

    fn fence(&self, key: InodeId, path: &[u8], fences: IFlags) -> std::result::Result<(), Errno> {
        let relative = self.target.relative(path).map_err(|_| Errno::INVAL)?;
        let directory = self.target.open_directory(&relative)?;
        let file = rustix::fs::openat(&directory, c".", READ_DIRECTORY, Mode::empty())?;
        let meta = Meta::read(&file, b"", AtFlags::EMPTY_PATH)?;
        if meta.id() != key {
            return Err(Errno::STALE);
        }
        let before = rustix::fs::ioctl_getflags(&file)?;
        rustix::fs::ioctl_setflags(&file, before | fences)
    }

    /// Restores the times of a finished directory after a new name changed them.
    fn times_of_parent(&mut self, current: &mut Current) {
        let Some(parent) = &self.parent else { return };
        if let Err(errno) = self.memory.times_back(parent.key, &parent.directory) {
            current.warn(TIMES_BACK, Some(errno));
        }
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

    /// Opens the directory of an object and creates missing directories on the way.
    fn make_directories(
        &mut self,
        relative: &[u8],
        path: &[u8],
        warnings: &mut Vec<Error>,
    ) -> Result<OwnedFd> {
        match self.target.open_directory(relative) {
            Ok(directory) => return Ok(directory),
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(resolve_error(path, errno)),
        }
        let root = self.target.root(relative);
        let (mut directory, below) = root.map_err(|e| resolve_error(path, e))?;
        for name in below.split(|&b| b == b'/') {
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
                        meta.map(|meta| meta.id())
                            .map_err(|e| failed(path, "stat of a new folder").because(e))
                    };
                    self.memory.made(key(&made)?);
                    if let Err(errno) = self.memory.times_back(key(&directory)?, &directory) {
                        warnings.push(attributes(path, TIMES_BACK).because(errno));
                    }
                    made
                }
                Err(errno) => return Err(resolve_error(path, errno)),
            };
        }
        Ok(directory)
    }

    /// Gives a previously restored file another name.
    fn link(
        &self,
        place: &Place<'_>,
        first: &[u8],
        existing: Option<&Meta>,
        saved: &Meta,
    ) -> Result<()> {
        let (parent, name) = self.target.split(first);
        let gone = |errno| {
            let text = format!(
                "linking it to {}, which must be restored too",
                escape(first)
            );
            place.failed(&text).because(errno)
        };
        let directory = self.target.open_directory(parent).map_err(gone)?;
        let source = Meta::read(&directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(gone)?;
        if existing.is_some_and(|e| e.id() == source.id()) {
            return Ok(());
        }
        if !self.memory.is_ours(&source, saved) {
            let text = format!(
                "its first name {} is a file that this restore did not write: it was kept as it is on the host. Restore \
                 both with replace=always, or to another folder",
                escape(first)
            );
            return Err(place.failed(&text));
        }
        place.clear_away(existing)?;
        let link = || {
            let flags = AtFlags::empty();
            reach(Point::RestoreLink)?;
            rustix::fs::linkat(&directory, name, place.directory, place.name, flags)
        };
        match link() {
            Ok(()) => Ok(()),
            // An immutable or append-only file accepts no new name.
            Err(Errno::PERM) if Kind::from_mode(source.mode) == Some(Kind::Regular) => {
                without_fences(directory.as_fd(), name, link).map_err(gone)
            }
            Err(errno) => Err(gone(errno)),
        }
    }
}

#[cfg(test)]
impl Restorer {
    pub(super) fn current(&self) -> Option<&Current> {
        self.current.as_ref()
    }

    pub(super) fn memory(&mut self) -> &mut Memory {
        &mut self.memory
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::MetadataExt;

    use super::super::Replace;
    use super::super::testing::own;
    use super::*;
    use crate::inode::Time;

    #[test]
    fn test_a_second_name_is_no_link_to_a_foreign_file() {
        let target = tempfile::tempdir().unwrap();
        let top = target.path().as_os_str().as_bytes();
        let at = |name: &str| [top, b"/", name.as_bytes()].concat();
        let (first, second) = (at("first"), at("second"));
        let (file, link) = (target.path().join("first"), target.path().join("second"));
        let meta = Meta {
            mode: 0o100_600,
            nlink: 2,
            mtime: Time {
                seconds: 1_000_000_000,
                nanoseconds: 0,
            },
            uid: own(),
            gid: rustix::process::getegid().as_raw(),
            ..Meta::default()
        };
        let restore = |replace| {
            let mut r = Restorer::new(Some(top)).unwrap();
            let mut create = |path, what| {
                let created = r.create(&Request {
                    path,
                    what,
                    meta,
                    replace,
                });
                r.finish().unwrap();
                created
            };
            let made = create(&first, What::Object).unwrap();
            (made, create(&second, What::HardLink(&first)))
        };
        for replace in [Replace::Never, Replace::IfNewer, Replace::IfOlder] {
            std::fs::write(&file, "of the host").unwrap();
            let time = if replace == Replace::IfOlder {
                1
            } else {
                2_000_000_000
            };
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(time);
            let touched = std::fs::File::options().write(true).open(&file).unwrap();
            touched.set_modified(time).unwrap();
            let (made, linked) = restore(replace);
            assert!(matches!(made, Created::Skipped(_)), "{replace:?}");
            let text = linked.unwrap_err().report();
            assert!(text.contains("this restore did not write"), "{text}");
            assert!(!link.exists() && std::fs::metadata(&file).unwrap().nlink() == 1);
        }
        let (made, linked) = restore(Replace::Always);
        assert_eq!(
            (made, linked.unwrap()),
            (Created::Extract, Created::Created)
        );
        assert_eq!(std::fs::metadata(&link).unwrap().nlink(), 2);
        // Repeated, with both present.
        let (made, linked) = restore(Replace::Never);
        assert!(matches!(
            (made, linked.unwrap()),
            (Created::Skipped(_), Created::Skipped(_))
        ));
    }
}
