//! Subvolumes, mount points and a first fstab: a restore into new disks finds the guest's tree by them.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps};
use rustix::io::Errno;

use super::make::{Made, failed};
use crate::config::FsPolicy;
use crate::error::{Result, escape};
use crate::fs::{DetachedMount, Filesystem};
use crate::job::caller::Importance;
use crate::kit::filesystem::Recipe;
use crate::kit::format::{Kit, Place, Subvolume, Volume};
use crate::point::{Point, reach};
use crate::sys::btrfs;

/// Subvolumes of one filesystem that are created and deleted again, so that those after them get the ids they had.
const MAX_FILLERS: u64 = 10_000;
const FILLER: &[u8] = b".guestsnap-filler";

/// Lays out a new filesystem: subvolumes, mount points, and in the root a first fstab. All of it is older
/// than any file, so that a restore replaces it whatever it was told of files that exist.
pub(super) fn lay_out(volume: &Volume, kit: &Kit, made: &Made<'_>) -> Result<()> {
    if matches!(volume.recipe, Recipe::Swap(_)) {
        return Ok(());
    }
    on_mounted(volume, made, |mount| {
        let top = resolve(mount.top().unwrap_or(mount.root()), b".")?;
        if !volume.subvolumes.is_empty() {
            subvolumes(volume, &top, made)?;
        }
        for place in kit
            .tree
            .iter()
            .filter(|place| place.volume == volume.volume)
        {
            let path = place.subvolume(volume).map_or("", |one| one.path.as_str());
            let root = folders(&top, path)?;
            for point in mount_points(kit, place) {
                folders(&root, point)?;
            }
            if place.path.is_empty() {
                first_fstab(&folders(&root, "etc")?, &kit.fstab())?;
            }
        }
        age(&top, 0)
    })
}

/// Makes the subvolumes of a btrfs, with the ids they had as far as that goes.
fn subvolumes(volume: &Volume, top: &OwnedFd, made: &Made<'_>) -> io::Result<()> {
    let mut all: Vec<&Subvolume> = volume.subvolumes.iter().collect();
    all.sort_by_key(|one| one.id);
    let mut next = next_id(top)?;
    let mut left = MAX_FILLERS;
    for one in all {
        while next < one.id && one.id - next < left {
            if made.reporter.cancelled() {
                return Err(io::Error::from_raw_os_error(libc::ECANCELED));
            }
            left -= 1;
            next = next_id(top)?;
        }
        let (folder, name) = one.path.rsplit_once('/').unwrap_or(("", &one.path));
        let folder = folders(top, folder)?;
        reach(Point::RebuildSubvolume)?;
        btrfs::create_subvolume(&folder, name.as_bytes())?;
        let id = btrfs::subvolume_id(resolve(folder.as_fd(), name.as_bytes())?)?;
        if one.default {
            btrfs::set_default(top, id)?;
        }
        if id != one.id {
            let (name, old) = (escape(volume.volume.as_bytes()), one.id);
            let text = format!(
                "{name}: subvolume {} has the id {id}, and had {old}",
                one.path
            );
            // Warning: another id.
            made.reporter.message(Importance::Warning, &text);
        }
        next = id + 1;
    }
    Ok(())
}

/// The id of the next subvolume, after one that is used up.
fn next_id(top: &OwnedFd) -> io::Result<u64> {
    btrfs::create_subvolume(top, FILLER)?;
    let id = resolve(top.as_fd(), FILLER)
        .map_err(Into::into)
        .and_then(btrfs::subvolume_id);
    btrfs::delete_subvolume(top, FILLER)?;
    Ok(id? + 1)
}

/// Paths in the filesystem at a place where others are mounted.
fn mount_points<'a>(kit: &'a Kit, place: &'a Place) -> impl Iterator<Item = &'a str> {
    let below = |outer: &'a str, inner: &'a str| match outer.is_empty() {
        true => Some(inner).filter(|inner| !inner.is_empty()),
        false => inner.strip_prefix(outer)?.strip_prefix('/'),
    };
    let around = move |inner: &'a str| {
        let all = kit
            .tree
            .iter()
            .filter(|one| below(&one.path, inner).is_some());
        all.max_by_key(|one| one.path.len())
    };
    kit.tree.iter().filter_map(move |inner| {
        let ours = around(&inner.path).is_some_and(|outer| outer == place);
        below(&place.path, &inner.path).filter(|_| ours && inner.is_plain() && !inner.is_private())
    })
}

fn first_fstab(etc: &OwnedFd, text: &str) -> io::Result<()> {
    reach(Point::RebuildFstab)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
    let mut file = File::from(rustix::fs::openat(etc, "fstab", flags, mode)?);
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// Makes all that is in a new folder, and the folder, older than any file.
fn age(folder: &OwnedFd, depth: usize) -> io::Result<()> {
    /// Deeper than any path here.
    const MAX_DEPTH: usize = 2048;
    let zero = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let times = Timestamps {
        last_access: zero,
        last_modification: zero,
    };
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        if entry.file_type() == FileType::Directory && depth < MAX_DEPTH {
            age(&resolve(folder, name.to_bytes())?, depth + 1)?;
        } else {
            rustix::fs::utimensat(folder, name, &times, AtFlags::SYMLINK_NOFOLLOW)?;
        }
    }
    Ok(rustix::fs::futimens(folder, &times)?)
}

/// Mounts a new filesystem for writing, and works on it.
fn on_mounted(
    volume: &Volume,
    made: &Made<'_>,
    work: impl FnOnce(&DetachedMount) -> io::Result<()>,
) -> Result<()> {
    let mapped = made.map(&volume.volume)?;
    let filesystem = Filesystem {
        fstype: volume.recipe.fstype().to_owned(),
        uuid: Some(volume.recipe.uuid().to_owned()),
        ..Filesystem::default()
    };
    let policy = FsPolicy {
        writable: true,
        ..FsPolicy::default()
    };
    let mount = DetachedMount::open(mapped.mapped.fd(), &filesystem, &policy, &volume.volume);
    let worked = mount.and_then(|(mount, _)| {
        let worked = work(&mount).map_err(|error| failed(volume, "its first files").because(error));
        let closed = mount.close();
        worked.and(closed)
    });
    let closed = mapped.close();
    worked.and(closed)
}

fn resolve(directory: impl AsFd, path: &[u8]) -> Found<OwnedFd> {
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat2(directory, path, flags, Mode::empty(), how)
}

type Found<T> = std::result::Result<T, Errno>;

/// Opens a folder, and makes the missing parts of its path.
fn folders(top: &OwnedFd, path: &str) -> io::Result<OwnedFd> {
    let mut folder = resolve(top, b".")?;
    for name in path.split('/').filter(|name| !name.is_empty()) {
        folder = match resolve(&folder, name.as_bytes()) {
            Err(Errno::NOENT) => {
                rustix::fs::mkdirat(&folder, name, Mode::from_raw_mode(0o755))?;
                resolve(&folder, name.as_bytes())?
            }
            found => found?,
        };
    }
    Ok(folder)
}
