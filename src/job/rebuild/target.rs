//! A disk to make.

use std::fs::File;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, RenameFlags};

use super::table::Piece;
use crate::error::{Code, Error, Result, escape};
use crate::point::{Point, pass, reach};
use crate::snapshot::{Device, Journal, Object, PARTIAL};

/// The name of a target, as the command line gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetName {
    /// An image file.
    Image(PathBuf),
}

impl TargetName {
    /// Parses the name.
    pub fn parse(text: &std::ffi::OsStr) -> Result<TargetName> {
        let path = Path::new(text);
        let bad = |why: &str| {
            let shown = escape(text.as_bytes());
            Err(Error::new(Code::BadTarget, format!("{shown}: {why}")))
        };
        if !path.is_absolute() {
            return bad("name an image by its absolute path");
        }
        match path.file_name() {
            Some(_) => Ok(TargetName::Image(path.to_owned())),
            None => bad("it names a folder"),
        }
    }
}

impl std::fmt::Display for TargetName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            TargetName::Image(path) => f.write_str(&escape(path.as_os_str().as_bytes())),
        }
    }
}

/// A disk that is being made. Dropped before [`Target::finish`], it is undone.
#[derive(Debug)]
pub(super) struct Target {
    name: TargetName,
    /// Where the image is until it is complete.
    partial: PathBuf,
    path: PathBuf,
    file: File,
    size: u64,
    object: Object,
    journal: Arc<Journal>,
    done: bool,
}

impl Target {
    /// Makes an empty disk.
    pub(super) fn make(name: &TargetName, size: u64, journal: &Arc<Journal>) -> Result<Target> {
        let TargetName::Image(path) = name;
        let failed = |why: &str| Error::new(Code::BadTarget, format!("{name}: {why}"));
        if path.symlink_metadata().is_ok() {
            return Err(failed("it exists"));
        }
        let mut partial = path.clone().into_os_string();
        partial.push(PARTIAL);
        let partial = PathBuf::from(partial);
        let object = Object::Image {
            path: partial.clone(),
        };
        journal.intend(&object)?;
        let file = reach(Point::RebuildImage)
            .map_err(std::io::Error::from)
            .and_then(|()| {
                File::options()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .custom_flags(libc::O_NOFOLLOW)
                    .open(&partial)
            });
        let file = file.map_err(|error| {
            journal.gone(&object);
            failed("creating it").because(error)
        })?;
        pass(Point::RebuildImageMade);
        let target = Target {
            name: name.clone(),
            partial,
            path: path.clone(),
            file,
            size,
            object,
            journal: journal.clone(),
            done: false,
        };
        let sized = target.file.set_len(size);
        sized.map_err(|error| failed("its size").because(error))?;
        Ok(target)
    }

    /// The disk, for the maps.
    pub(super) fn device(&self) -> Device {
        Device {
            path: self.partial.clone(),
            size: self.size,
            read_only: false,
        }
    }

    pub(super) fn name(&self) -> &TargetName {
        &self.name
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Writes pieces in order.
    pub(super) fn write(&self, pieces: &[Piece]) -> Result<()> {
        for piece in pieces {
            let written = reach(Point::RebuildWrite)
                .map_err(std::io::Error::from)
                .and_then(|()| self.file.write_all_at(&piece.bytes, piece.start));
            written.map_err(|error| {
                let text = format!(
                    "{}: writing the {}",
                    self.name,
                    escape(piece.what.as_bytes())
                );
                Error::new(Code::RebuildFailed, text).because(error)
            })?;
        }
        self.sync()
    }

    fn sync(&self) -> Result<()> {
        (&self.file)
            .flush()
            .and_then(|()| self.file.sync_all())
            .map_err(|error| {
                let text = format!("{}: writing it back", self.name);
                Error::new(Code::RebuildFailed, text).because(error)
            })
    }

    /// Gives the disk its name.
    pub(super) fn finish(mut self) -> Result<()> {
        self.sync()?;
        let renamed = reach(Point::RebuildRename).and_then(|()| {
            let cwd = rustix::fs::CWD;
            rustix::fs::renameat_with(cwd, &self.partial, cwd, &self.path, RenameFlags::NOREPLACE)
        });
        renamed.map_err(|errno| {
            Error::new(Code::RebuildFailed, format!("{}: renaming it", self.name)).because(errno)
        })?;
        self.done = true;
        pass(Point::RebuildRenamed);
        self.journal.gone(&self.object);
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(|error| {
            Error::new(Code::RebuildFailed, format!("{}: its folder", self.name)).because(error)
        })
    }

    /// Removes what was made.
    pub(super) fn undo(mut self) -> Result<()> {
        self.remove()
    }

    fn remove(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.done, true) {
            return Ok(());
        }
        let removed = rustix::fs::unlinkat(rustix::fs::CWD, &self.partial, AtFlags::empty());
        removed.map_err(|errno| {
            let shown = escape(self.partial.as_os_str().as_bytes());
            Error::new(Code::ReleaseFailed, shown).because(errno)
        })?;
        self.journal.gone(&self.object);
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            log::error!("{}", error.report());
        }
    }
}
