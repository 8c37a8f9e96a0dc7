//! An object known only by name.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::item::{Item, Problem};
use super::names::MAX_PATH;
use crate::inode::{Kind, Meta};
use crate::point::{Point, reach};
use crate::stream::entry::{Entry, Place};

/// A step of the walk.
#[derive(Debug)]
pub(crate) enum Step {
    Item(Item),
    /// An object whose metadata the caller reads when convenient.
    Object(Unread),
    /// A name left out, as reported by an earlier problem.
    Passed,
}

impl From<Item> for Step {
    fn from(item: Item) -> Step {
        Step::Item(item)
    }
}

/// An object known only by name.
#[derive(Debug)]
pub(crate) struct Unread {
    pub(crate) path: Vec<u8>,
    pub(super) name_start: usize,
    pub(super) directory: Arc<OwnedFd>,
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

    pub(super) fn read(self) -> Result<Entry, Problem> {
        let Unread {
            path,
            name_start,
            directory,
        } = self;
        let name = &path[name_start..];
        if name.contains(&b'/') || name.is_empty() {
            return Err(Problem::new(&path, true, "bad name", Errno::UCLEAN));
        }
        // On failure the type is unknown: it may have been a directory.
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
        if meta.encrypted && kind != Kind::Directory {
            return Err(Problem::encrypted(&path, false));
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
