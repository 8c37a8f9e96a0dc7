//! Makes missing mount points in a tree that is mounted for writing: a new disk has none.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::Join;
use super::resolve::open_beneath;
use crate::error::escape;
use crate::point::{Point, reach};

/// Mode of a new mount point, whatever the daemon's umask.
const MODE: Mode = Mode::from_raw_mode(0o755);

/// Makes the directories of a path, from the filesystem that stands above it. Follows no link.
pub(super) fn make(joins: &[Join], path: &[u8]) -> Result<(), String> {
    let failed = |errno: Errno| format!("making /{}: {errno}", escape(path));
    let below = |join: &Join| {
        let rest = path.strip_prefix(&join.path[..])?;
        match join.path.is_empty() {
            true => Some(rest.to_vec()),
            false => rest.strip_prefix(b"/").map(<[u8]>::to_vec),
        }
    };
    let found = joins.iter().filter_map(|join| Some((join, below(join)?)));
    let (join, rest) = found
        .max_by_key(|(join, _)| join.path.len())
        .ok_or_else(|| failed(Errno::NOENT))?;
    let root = join.root.as_ref().ok_or_else(|| failed(Errno::NOENT))?;
    let mut directory = open_beneath(root.as_fd(), b".").map_err(failed)?;
    for name in rest.split(|&b| b == b'/') {
        directory = match open_beneath(directory.as_fd(), name) {
            Err(Errno::NOENT) => make_one(&directory, name).map_err(failed)?,
            opened => opened.map_err(failed)?,
        };
    }
    Ok(())
}

fn make_one(directory: &OwnedFd, name: &[u8]) -> Result<OwnedFd, Errno> {
    reach(Point::IntoMountPoint)?;
    rustix::fs::mkdirat(directory, name, MODE)?;
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let made = rustix::fs::openat2(directory, name, flags, Mode::empty(), how)?;
    rustix::fs::fchmod(&made, MODE)?;
    Ok(made)
}
