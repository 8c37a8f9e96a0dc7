//! The guest's filesystems as one tree.
//!
//! The tree is joined by path, in our walker only: where `/var` of the guest is a filesystem of
//! its own, the walker shows that filesystem's root in place of the directory. Nothing is mounted
//! onto a guest path.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

use super::{DetachedMount, Note};
use crate::error::{Code, Error, Result};

/// A filesystem's place in the tree.
#[derive(Debug)]
pub struct Join {
    /// Path from the guest's root, no slashes at the ends; empty: the root.
    pub path: Vec<u8>,
    /// The directory shown there, O_PATH.
    pub(crate) root: Arc<OwnedFd>,
    /// btrfs: also walk subvolumes inside that have no place of their own.
    pub nested_subvolumes: bool,
    /// The volume, for notes.
    pub volume: String,
}

/// A guest's mounted filesystems, joined.
#[derive(Debug)]
pub struct GuestTree {
    mounts: Vec<DetachedMount>,
    joins: Arc<[Join]>,
    private: Vec<u8>,
    notes: Vec<Note>,
}

impl GuestTree {
    /// A tree of one filesystem.
    pub fn single(mount: DetachedMount, volume: &str) -> Result<GuestTree> {
        let join = Join {
            path: Vec::new(),
            root: Arc::new(reopen(mount.root(), volume)?),
            nested_subvolumes: false,
            volume: volume.to_owned(),
        };
        Ok(GuestTree {
            mounts: vec![mount],
            joins: [join].into(),
            private: b".guestsnap".to_vec(),
            notes: Vec::new(),
        })
    }

    /// The filesystems' places, the root first, then by path.
    pub fn joins(&self) -> &[Join] {
        &self.joins
    }

    pub(crate) fn share_joins(&self) -> Arc<[Join]> {
        self.joins.clone()
    }

    /// The name in the guest's root below which our own files go; the guest has none of this name.
    pub fn private(&self) -> &[u8] {
        &self.private
    }

    /// Decisions and things left out, for the job log.
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// Closes all filesystems. An error if a walker still uses them: it would keep the devices busy.
    pub fn close(self) -> Result<()> {
        let GuestTree { mounts, joins, .. } = self;
        let in_use = Arc::strong_count(&joins) > 1;
        drop(joins);
        let mut result = Ok(());
        for mount in mounts.into_iter().rev() {
            result = result.and(mount.close());
        }
        if in_use {
            return Err(Error::new(
                Code::Internal,
                "a guest's tree is closed while it is being walked",
            ));
        }
        result
    }
}

fn reopen(root: impl AsFd, volume: &str) -> Result<OwnedFd> {
    rustix::fs::openat(
        root,
        c".",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|e| Error::new(Code::MountFailed, format!("{volume}: its root")).because(e))
}
