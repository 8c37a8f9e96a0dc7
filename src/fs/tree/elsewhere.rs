//! Finds an fstab behind a link to another filesystem or subvolume of the guest: NixOS keeps it in
//! `/nix`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::Join;
use super::resolve::{each_name, id, open_beneath, open_named, read_file, subvolume_root};
use super::root::MAX_TOP_NAMES;
use crate::fs::MountedVolume;
use crate::fs::fstab;
use crate::fs::path::Budget;

/// Maximum directories tried for one guest.
const MAX_TRIES: usize = 2048;

/// Attempts and results for one guest: snapshots of a root share the fstab's place.
#[derive(Default)]
pub(super) struct Tried {
    tries: usize,
    found: Option<(usize, Option<Vec<u8>>)>,
}

/// Reads the fstab of a root whose link leads out of it at the directory `stop`. Tries filesystems
/// and subvolumes that the guest may mount there or above; the fstab found must confirm that mount.
pub(super) fn find_elsewhere(
    volumes: &[MountedVolume],
    root: &OwnedFd,
    stop: &[u8],
    budget: &Budget<'_>,
    tried: &mut Tried,
) -> Option<(Vec<u8>, Join)> {
    let ends = stop.iter().enumerate().filter(|(_, byte)| **byte == b'/');
    let ends = ends.map(|(at, _)| at).chain([stop.len()]);
    let points: Vec<&[u8]> = ends
        .map(|end| &stop[..end])
        .filter(|p| !p.is_empty())
        .collect();
    for (number, name) in tried.found.clone().into_iter().chain(directories(volumes)) {
        let volume = &volumes[number];
        let Some(directory) = open(volume, name.as_deref()) else {
            continue;
        };
        for point in &points {
            tried.tries += 1;
            if tried.tries > MAX_TRIES {
                return None;
            }
            let join = at(point, directory.try_clone().ok()?);
            let text = read_file(
                root.as_fd(),
                std::slice::from_ref(&join),
                b"etc/fstab",
                budget,
            );
            let says_so = |text: &Vec<u8>| says_so(text, point, volume, &directory);
            if let Some(text) = text.ok().filter(says_so) {
                tried.found = Some((number, name));
                return Some((text, join));
            }
        }
    }
    None
}

/// All filesystems, and the subvolumes at the top of each.
fn directories(volumes: &[MountedVolume]) -> impl Iterator<Item = (usize, Option<Vec<u8>>)> {
    volumes.iter().enumerate().flat_map(|(number, volume)| {
        let mut names = vec![None];
        if let Some(top) = volume.mount.top() {
            // Ignore unlisted names: the fstab then counts as unreadable.
            let _ = each_name(top, |name| {
                names.push(Some(name.to_vec()));
                names.len() < MAX_TOP_NAMES
            });
        }
        names.into_iter().map(move |name| (number, name))
    })
}

/// Opens the root of a volume, or of the top-level subvolume with this name.
fn open(volume: &MountedVolume, name: Option<&[u8]>) -> Option<OwnedFd> {
    let find = |top: BorrowedFd<'_>, name| subvolume_root(top, name).ok().flatten();
    match (name, volume.mount.top()) {
        (Some(name), Some(top)) => find(top, name),
        _ => open_beneath(volume.mount.root(), b".").ok(),
    }
}

fn at(path: &[u8], root: OwnedFd) -> Join {
    Join {
        path: path.to_vec(),
        id: id(root.as_fd()).ok(),
        root: Some(Arc::new(root)),
        nested_subvolumes: false,
        volume: String::new(),
        key: String::new(),
        fstype: String::new(),
        uuid: None,
        damage: None,
    }
}

/// Whether an fstab mounts this directory of the volume at this place.
fn says_so(text: &[u8], point: &[u8], volume: &MountedVolume, directory: &OwnedFd) -> bool {
    let (lines, _) = fstab::parse(text);
    lines.iter().any(|line| {
        let there = line.mount_point == point
            && fstab::matches(&line.source, &volume.identity, &volume.filesystem);
        let root = || open_beneath(volume.mount.root(), b".").map_err(|e| e.to_string());
        let named = || open_named(volume, line).unwrap_or_else(root);
        there && named().is_ok_and(|named| id(named.as_fd()) == id(directory.as_fd()))
    })
}
