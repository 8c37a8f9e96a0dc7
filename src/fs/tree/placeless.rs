//! Subvolumes of a btrfs without a place in the guest's tree.

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, Mode, OFlags};

use super::resolve::{each_name, id, open_subvolume};
use crate::inode::{InodeId, Kind, Meta};
use crate::sys::btrfs::{SubvolumeKind, subvolume_kind};

/// Maximum names examined on one btrfs.
const MAX_PLACELESS_NAMES: usize = 1024;

/// Whether a subvolume is a snapshot with no data of its own.
pub(super) fn is_past(top: BorrowedFd<'_>, path: &[u8]) -> bool {
    let kind = || {
        let folder = open_subvolume(top, path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(&folder, c".", flags, Mode::empty())
    };
    // The top is in no subvolume.
    let known = kind().ok().and_then(|folder| subvolume_kind(folder).ok());
    !path.is_empty() && known.is_some_and(SubvolumeKind::is_past)
}

/// Returns the paths of a btrfs's subvolumes that have no place and hold more than directories and
/// subvolumes (unreadable ones may), and whether the search was complete. Excludes content of
/// placed subvolumes and deep content of found ones.
pub(super) fn placeless(
    top: BorrowedFd<'_>,
    placed: &HashSet<InodeId>,
    left_out: impl Fn(&[u8]) -> bool,
) -> (BTreeSet<Vec<u8>>, bool) {
    let mut found = BTreeSet::new();
    let mut all = true;
    if id(top).is_ok_and(|id| placed.contains(&id)) {
        return (found, all);
    }
    let mut left = MAX_PLACELESS_NAMES;
    // Each with its subvolume.
    let mut folders = VecDeque::from([(Vec::new(), Vec::new())]);
    while let Some((subvolume, path)) = folders.pop_front() {
        if !all {
            break;
        }
        if path != subvolume && found.contains(&subvolume) {
            continue;
        }
        let mut has_files = false;
        let listed = open_subvolume(top, &path).and_then(|folder| {
            let device = id(folder.as_fd())?.dev;
            each_name(folder.as_fd(), |name| {
                all = left > 0;
                if !all {
                    return false;
                }
                left -= 1;
                let inner = match path.is_empty() {
                    true => name.to_vec(),
                    false => [&path, name].join(&b'/'),
                };
                if left_out(&inner) {
                    return true;
                }
                match Meta::read(&folder, name, AtFlags::SYMLINK_NOFOLLOW) {
                    Err(_) => drop(found.insert(inner)),
                    Ok(meta) if Kind::from_mode(meta.mode) != Some(Kind::Directory) => {
                        has_files = true;
                    }
                    Ok(meta) if placed.contains(&meta.id()) => {}
                    Ok(meta) if meta.dev == device => {
                        folders.push_back((subvolume.clone(), inner));
                    }
                    Ok(_) => folders.push_back((inner.clone(), inner)),
                }
                true
            })
        });
        if has_files || listed.is_err() {
            found.insert(subvolume);
        }
    }
    // Subvolumes in the top may be wanted even if the top is left out.
    found.retain(|path| !path.is_empty() || !left_out(path));
    (found, all)
}
