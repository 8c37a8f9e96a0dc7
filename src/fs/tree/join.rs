//! Joins the guest's filesystems by its fstab.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::make::make;
use super::resolve::{Resolved, each_name, id, open_beneath, open_named, resolve};
use super::root::Candidate;
use super::text::{in_volume, shown};
use super::{Hints, Join, Missing};
use crate::error::{Code, Error, Result, escape};
use crate::fs::fstab::{self, Line};
use crate::fs::path::Budget;
use crate::fs::{MountedVolume, Note, VolumeIdentity};
use crate::inode::{Kind, Meta};

/// Builds the joins.
pub(super) struct Joiner<'a> {
    pub(super) volumes: &'a [MountedVolume],
    pub(super) hints: &'a Hints,
    pub(super) joins: Vec<Join>,
    /// Volume of the root.
    pub(super) root: Option<usize>,
    /// Volumes with a place.
    pub(super) used: HashSet<usize>,
    pub(super) notes: Vec<Note>,
    pub(super) missing: Vec<Missing>,
    pub(super) private: Vec<u8>,
    pub(super) budget: &'a Budget<'a>,
}

/// Why a line's filesystem gets no place.
enum NoPlace {
    /// Its files are already in the tree.
    There(String),
    /// It cannot be opened, or its mount point cannot be used.
    Failed(String),
}

impl From<String> for NoPlace {
    fn from(why: String) -> NoPlace {
        NoPlace::Failed(why)
    }
}

impl Joiner<'_> {
    pub(super) fn with_root(&mut self, root: Candidate) -> Result<()> {
        let Candidate {
            volume,
            root: directory,
            lines,
            remarks,
            ..
        } = root;
        // Warning: fstab.
        self.notes.extend(remarks.into_iter().map(Note::warning));
        self.choose_private(&directory)?;
        self.root = Some(volume);
        let only = self.volumes.len() == 1 && lines.is_empty();
        self.push(Vec::new(), volume, directory, only);
        let lines = lines
            .into_iter()
            .filter(|line| !line.mount_point.is_empty());
        let (lines, others) = fstab::claim(lines.collect(), |line| self.volume_of(line).is_some());
        let failed: Vec<(Line, usize, String)> = lines
            .into_iter()
            .filter_map(|line| self.add_line(line))
            .collect();
        self.budget.check()?;
        for line in others {
            let text = format!("{}: another line has this place", shown(&line));
            self.notes.push(Note::info(text));
        }
        for (line, volume, why) in failed {
            // Volumes in no line are saved separately. Of a btrfs in use, only subvolumes with a
            // place are saved.
            // Written data has no other place.
            let only = self.hints.make
                || self.used.contains(&volume) && self.volumes[volume].mount.top().is_some();
            if only {
                self.miss(line, Some(why));
            } else {
                let shown = shown(&line);
                // Warning: fstab.
                self.notes.push(Note::warning(format!("{shown}: {why}")));
            }
        }
        Ok(())
    }

    /// Records a line without a place.
    fn miss(&mut self, line: Line, why: Option<String>) {
        let root = self.joins.first().and_then(|join| join.root.clone());
        let place = root
            .and_then(|root| {
                resolve(root.as_fd(), &self.joins, &line.mount_point, self.budget).ok()
            })
            .map(|found| found.path);
        self.missing.push(Missing { line, place, why });
    }

    fn push(&mut self, path: Vec<u8>, volume: usize, root: OwnedFd, nested_subvolumes: bool) {
        let found = &self.volumes[volume];
        self.used.insert(volume);
        self.joins.push(Join {
            path,
            id: id(root.as_fd()).ok(),
            root: Some(Arc::new(root)),
            nested_subvolumes,
            volume: escape(found.identity.name.as_bytes()),
            key: found.identity.key.clone(),
            fstype: found.filesystem.fstype.clone(),
            uuid: found.filesystem.uuid.clone(),
            damage: found.mount.damage().cloned(),
        });
    }

    /// Chooses an unused name for synthetic entries.
    fn choose_private(&mut self, root: &OwnedFd) -> Result<()> {
        for number in 0..100 {
            let name = match number {
                0 => b".guestsnap".to_vec(),
                n => format!(".guestsnap-{n}").into_bytes(),
            };
            match Meta::read(root, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => {
                    if number > 0 {
                        self.notes.push(Note::info(format!(
                            "the guest has a /.guestsnap of its own: ours is /{}",
                            escape(&name)
                        )));
                    }
                    self.private = name;
                    return Ok(());
                }
                Ok(_) => {}
                Err(errno) => {
                    let text = "looking for .guestsnap in the guest's root";
                    return Err(Error::new(Code::MountFailed, text).because(errno));
                }
            }
        }
        Err(Error::new(
            Code::MountFailed,
            "the guest has all names that guestsnap could use in its root",
        ))
    }

    /// Those of `volumes` that still have no place.
    pub(super) fn unplaced(&self, volumes: &[(usize, String)]) -> Vec<(usize, String)> {
        let unplaced = volumes
            .iter()
            .filter(|(volume, _)| !self.used.contains(volume));
        unplaced.cloned().collect()
    }

    /// The volume that a line names, and whether others match too.
    fn volume_of(&self, line: &Line) -> Option<(usize, bool)> {
        let volumes = self.volumes;
        let fits = |v: &MountedVolume| fstab::matches(&line.source, &v.identity, &v.filesystem);
        let mut found: Vec<usize> = (0..volumes.len()).filter(|&n| fits(&volumes[n])).collect();
        // A snapshot does not replace its origin, whether that is open or not.
        let closed = self.hints.closed.iter().map(|(identity, _)| identity);
        let open = found.iter().map(|&number| &volumes[number].identity);
        let origins: Vec<_> = open.chain(closed).collect();
        found.retain(|&number| {
            let identity = &volumes[number].identity;
            !origins.iter().any(|origin| identity.is_snapshot_of(origin))
        });
        // Among copies, prefer those that belong together.
        let root = self.root.map(|root| &volumes[root].identity);
        // The previous job's places count only with the same root.
        let kept = root.is_some_and(|root| self.hints.had(b"", root));
        let vg = |of: &VolumeIdentity| of.lv.as_ref().map(|(vg, _)| vg.clone());
        let best = found.iter().copied().min_by_key(|&number| {
            let identity = &volumes[number].identity;
            (
                !(kept && self.hints.had(&line.mount_point, identity)),
                identity.snapshot_of.is_some(),
                root.is_some_and(|root| root.start.0 != identity.start.0),
                root.is_some_and(|root| vg(root) != vg(identity)),
                (identity.start, number),
            )
        });
        best.map(|best| (best, found.len() > 1))
    }

    /// Joins a line's filesystem. Otherwise returns the volume and the reason, if files may be
    /// missing.
    fn add_line(&mut self, line: Line) -> Option<(Line, usize, String)> {
        let shown = shown(&line);
        let Some((volume, several)) = self.volume_of(&line) else {
            self.miss(line, None);
            return None;
        };
        if several {
            let name = &self.volumes[volume].identity.name;
            // Warning: fstab.
            self.notes.push(Note::warning(format!(
                "{shown} fits several volumes: {} is taken",
                escape(name.as_bytes())
            )));
        }
        match self.join_line(&line, volume) {
            Ok(()) => None,
            Err(NoPlace::There(why)) => {
                // Warning: fstab.
                self.notes.push(Note::warning(format!("{shown}: {why}")));
                None
            }
            Err(NoPlace::Failed(why)) => Some((line, volume, why)),
        }
    }

    fn join_line(&mut self, line: &Line, volume: usize) -> std::result::Result<(), NoPlace> {
        let directory = match open_named(&self.volumes[volume], line) {
            Some(named) => named?,
            None => {
                open_beneath(self.volumes[volume].mount.root(), b".").map_err(|e| e.to_string())?
            }
        };
        let new = id(directory.as_fd()).map_err(|e| e.to_string())?;
        if let Some(join) = self.joins.iter().find(|join| join.id == Some(new)) {
            let there = escape(&join.path);
            let why = format!("it is at /{there} already and is not saved twice");
            return Err(NoPlace::There(why));
        }
        let Some(root) = self.joins[0].root.clone() else {
            return Err(NoPlace::Failed("no root".into()));
        };
        let find = || resolve(root.as_fd(), &self.joins, &line.mount_point, self.budget);
        let place = match find() {
            Err(Errno::NOENT) if self.hints.make => {
                make(&self.joins, &line.mount_point)?;
                find()
            }
            found => found,
        };
        let place = place.map_err(|e| format!("its mount point: {e}"))?;
        if place.kind != Some(Kind::Directory) {
            return Err(NoPlace::Failed("its mount point is not a folder".into()));
        }
        if self.joins.iter().any(|j| j.path == place.path) {
            let why = "another filesystem is at this place";
            return Err(NoPlace::Failed(why.into()));
        }
        if line.weak {
            self.keep_hidden(&place);
        }
        self.push(place.path, volume, directory, false);
        Ok(())
    }

    /// Gives the directory below a mount point a place of its own unless it is empty: the guest may
    /// run without the filesystem that hides it.
    fn keep_hidden(&mut self, place: &Resolved) {
        let mut empty = true;
        let listed = each_name(place.object.as_fd(), |_| {
            empty = false;
            false
        });
        // The walk reports a directory that cannot be listed.
        if listed.is_ok() && empty {
            return;
        }
        let above = |join: &&Join| {
            let rest = place.path.strip_prefix(&join.path[..]);
            rest.is_some_and(|rest| join.path.is_empty() || rest.starts_with(b"/"))
        };
        let Some(around) = self
            .joins
            .iter()
            .filter(above)
            .max_by_key(|join| join.path.len())
        else {
            return;
        };
        let path = [&self.private, &b"/hidden/"[..], &place.path].concat();
        let join = Join {
            id: id(place.object.as_fd()).ok(),
            root: Some(place.object.clone()),
            nested_subvolumes: around.nested_subvolumes,
            volume: around.volume.clone(),
            key: around.key.clone(),
            fstype: around.fstype.clone(),
            uuid: around.uuid.clone(),
            // Damage of this filesystem is checked at its main place.
            damage: None,
            path,
        };
        self.notes.push(Note::info(format!(
            "/{} has files below the filesystem that need not be mounted there: they are saved under /{}",
            escape(&place.path),
            escape(&join.path)
        )));
        self.joins.push(join);
    }

    /// Gives every remaining volume a place of its own; returns their number.
    pub(super) fn add_unlisted(&mut self) -> Result<usize> {
        let mut names = HashSet::new();
        for number in 0..self.volumes.len() {
            if self.used.contains(&number) {
                continue;
            }
            let volume = &self.volumes[number];
            let mut name = volume.identity.name.replace('/', "-").into_bytes();
            name.retain(|&b| b != 0);
            if name.is_empty() || name == b"." || name == b".." {
                name = format!("volume{number}").into_bytes();
            }
            while !names.insert(name.clone()) {
                name.extend_from_slice(b"-2");
            }
            let mut path = self.private.clone();
            path.extend_from_slice(b"/volumes/");
            path.extend_from_slice(&name);
            self.notes.push(Note::info(format!(
                "{} is not in the guest's fstab: it is saved under /{}",
                escape(volume.identity.name.as_bytes()),
                escape(&path)
            )));
            // The wanted subvolumes are unknown: take all.
            let root = volume.mount.top().unwrap_or(volume.mount.root());
            let root =
                open_beneath(root, b".").map_err(|e| in_volume(volume, "opening its root", e))?;
            self.push(path, number, root, true);
        }
        Ok(names.len())
    }
}
