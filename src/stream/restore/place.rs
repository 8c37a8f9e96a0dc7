//! One name in an open directory: removes an existing object and creates one of any kind.

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::attributes::drop_inherited;
use super::errors::failed;
use super::fences::without_fences;
use crate::error::{Error, Result};
use crate::inode::{Kind, Meta};
use crate::point::{Point, reach};

pub(super) const READ_DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// A name in an open directory, with its full path for errors.
pub(super) struct Place<'a> {
    pub(super) directory: BorrowedFd<'a>,
    pub(super) name: &'a [u8],
    pub(super) path: &'a [u8],
}

impl Place<'_> {
    pub(super) fn failed(&self, step: &str) -> Error {
        failed(self.path, step)
    }

    /// Metadata of the object with this name, if any.
    pub(super) fn existing(&self) -> Result<Option<Meta>> {
        match Meta::read(self.directory, self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(meta) => Ok(Some(meta)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(self.failed("stat").because(e)),
        }
    }

    /// Removes an existing object, unless it is a directory.
    pub(super) fn clear_away(&self, existing: Option<&Meta>) -> Result<()> {
        let Some(existing) = existing else {
            return Ok(());
        };
        let kind = Kind::from_mode(existing.mode);
        if kind == Some(Kind::Directory) {
            return Err(self.failed("a folder of this name is in the way"));
        }
        let unlink = || rustix::fs::unlinkat(self.directory, self.name, AtFlags::empty());
        let result = match unlink() {
            // Immutable or append-only. The flag is set again if links remain or unlinking fails.
            Err(Errno::PERM) if kind == Some(Kind::Regular) => {
                without_fences(self.directory, self.name, unlink)
            }
            result => result,
        };
        result.map_err(|e| self.failed("removing what is in its place").because(e))
    }

    pub(super) fn regular(&self) -> Result<OwnedFd> {
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

    pub(super) fn symlink(&self, target: &[u8]) -> Result<OwnedFd> {
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

    pub(super) fn node(&self, kind: Kind, meta: &Meta) -> Result<OwnedFd> {
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

    /// Opens the object just created by name, and verifies that it can only be ours.
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

    /// Creates the directory, or opens the existing one.
    pub(super) fn directory(&self, existing: Option<&Meta>) -> Result<OwnedFd> {
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
        // The daemon's umask may have cleared bits, or an inherited ACL added some.
        rustix::fs::fchmod(&directory, Mode::from_raw_mode(0o700))
            .map_err(|e| self.failed("setting the mode of the new folder").because(e))?;
        Ok(directory)
    }
}
