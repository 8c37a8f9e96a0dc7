//! One object of a guest's tree and its metadata.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::inode::{Kind, Meta};

/// One object of a guest's tree.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Path from the guest's root in bytes, no leading or trailing slash; empty for the root itself.
    pub path: Vec<u8>,
    /// Type.
    pub kind: Kind,
    /// Metadata.
    pub meta: Meta,
    /// Target of a symbolic link.
    pub link: Option<Vec<u8>>,
    /// Whether this is a directory whose content was not walked completely.
    pub incomplete: bool,
    pub(crate) place: Place,
}

/// Location of an entry, by descriptor.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    /// A directory that exists only in our tree.
    Nowhere,
    /// An open directory (possibly O_PATH).
    Open(Arc<OwnedFd>),
    /// A name in this directory: the last component of the entry's path, starting at this byte.
    In(Arc<OwnedFd>, usize),
}

impl Entry {
    /// Creates the entry of a directory.
    pub(crate) fn directory(path: Vec<u8>, meta: Meta, place: Place) -> Entry {
        Entry {
            path,
            kind: Kind::Directory,
            meta,
            link: None,
            incomplete: false,
            place,
        }
    }

    /// Last component of the path; empty for the root.
    pub fn name(&self) -> &[u8] {
        self.path.rsplit(|&b| b == b'/').next().unwrap_or_default()
    }

    /// Opens the object, never following a link. `None`: it exists only in our tree.
    pub(crate) fn open(&self, flags: OFlags) -> Result<Option<OwnedFd>, Errno> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let (dir, name): (_, &[u8]) = match &self.place {
            Place::Nowhere => return Ok(None),
            Place::Open(dir) => (dir, b"."),
            Place::In(dir, at) => (dir, &self.path[*at..]),
        };
        rustix::fs::openat(dir, name, flags, Mode::empty()).map(Some)
    }
}
