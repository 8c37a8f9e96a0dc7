//! Results of a walk.

use rustix::io::Errno;

use crate::error::{Code, Error, escape, shorten};
use crate::stream::entry::Entry;

/// A result of the walk. Order per directory: `Begin`, its content, `End`.
#[derive(Debug)]
pub enum Item {
    /// A directory that will be walked next, unless
    /// [`Walker::leave_out`](super::Walker::leave_out) is called now.
    Begin(Entry),
    /// An object that is not a directory.
    Object(Entry),
    /// A directory whose content has been given. Absent for a skipped one.
    End(Entry),
    /// A read error. The walk continues.
    Problem(Problem),
    /// The directory just announced is a subvolume, and its content is left out.
    LeftOut(LeftOut),
}

/// A btrfs subvolume that is left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// Path from the guest's root.
    pub path: Vec<u8>,
    /// Whether it is an unchangeable snapshot of a subvolume of this filesystem, without any
    /// current data of the guest.
    pub read_only: bool,
}

impl std::fmt::Display for LeftOut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = match self.read_only {
            true => "a read-only snapshot",
            false => "a snapshot without a line in the guest's fstab",
        };
        write!(
            f,
            "/{} is {what}: its content is left out",
            escape(&self.path)
        )
    }
}

/// A read error.
#[derive(Debug)]
pub struct Problem {
    /// Path from the guest's root.
    pub path: Vec<u8>,
    /// Whether names below the path may be missing, not only the path itself.
    pub subtree: bool,
    /// The error.
    pub error: Error,
}

impl Problem {
    pub(super) fn new(path: &[u8], subtree: bool, step: &str, cause: Errno) -> Problem {
        let shown = escape(path);
        // Many of these may be queued.
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

    /// Reports an object that only the guest can read. In a directory even the names are unreadable.
    pub(super) fn encrypted(path: &[u8], folder: bool) -> Problem {
        let shown = escape(path);
        let what = match folder {
            true => "nothing in this folder is saved",
            false => "this file is not saved",
        };
        let detail = format!("/{}: {what}", shorten(&shown));
        Problem {
            path: path.to_vec(),
            subtree: folder,
            error: Error::new(Code::Encrypted, detail),
        }
    }
}
