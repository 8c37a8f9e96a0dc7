//! Joins the guest's filesystems into one tree.
//!
//! Joins exist in the walker only: if `/var` of the guest is a separate filesystem, the walker
//! shows its root in place of the directory. No filesystem is mounted on a guest path.

mod elsewhere;
mod join;
mod make;
mod placeless;
mod resolve;
mod root;
pub(crate) mod text;

use std::collections::{BTreeMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use self::join::Joiner;
use self::placeless::{is_past, placeless};
use self::root::find_root;
use self::text::{Names, shown, shown_path};
use super::fstab::Line;
use super::mount::DamageCounter;
use super::path::Budget;
use super::{DetachedMount, Filesystem, MountedVolume, Note, VolumeIdentity};
use crate::error::{Code, Error, Result, escape};
use crate::inode::InodeId;
use crate::sys::btrfs::subvolume_id;

/// Delay until ext4 has counted damage it found.
pub(crate) const DAMAGE_DELAY: Duration = Duration::from_millis(5);

/// A filesystem's place in the tree.
#[derive(Debug)]
pub struct Join {
    /// Path from the guest's root, no slash at either end; empty: the root.
    pub path: Vec<u8>,
    /// Directory shown there, O_PATH. `None`: a synthetic directory (a guest without a root).
    pub(crate) root: Option<Arc<OwnedFd>>,
    /// Identity of that directory.
    pub(crate) id: Option<InodeId>,
    /// btrfs: also walk nested subvolumes without a place of their own.
    pub nested_subvolumes: bool,
    /// Volume name for logs.
    pub volume: String,
    /// Key that distinguishes the volume from all others; see [`VolumeIdentity::key`].
    pub key: String,
    /// Filesystem type for logs.
    pub fstype: String,
    /// Filesystem UUID or its substitute.
    pub uuid: Option<String>,
    pub(crate) damage: Option<DamageCounter>,
}

impl Join {
    /// Identifies the files shown there: the filesystem and the part of it.
    pub fn identity(&self) -> String {
        let name = self.uuid.as_ref().unwrap_or(&self.volume);
        let mut text = format!("{} {name}", self.fstype);
        if let Some(root) = self.root.as_ref().filter(|_| self.fstype == "btrfs") {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let directory = rustix::fs::openat(root, c".", flags, Mode::empty());
            let id = directory.map_err(Into::into).and_then(subvolume_id);
            let id = id.map_or_else(|e| e.to_string(), |id| id.to_string());
            text.push_str(&format!(" subvolume {id}"));
        }
        if self.nested_subvolumes {
            text.push_str(" and those inside");
        }
        text
    }
}

/// An fstab line whose files are not in the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The line.
    pub line: Line,
    /// Its mount point with links followed, if it can be resolved.
    pub place: Option<Vec<u8>>,
    /// Why it cannot be read. `None`: no opened volume matches it.
    pub why: Option<String>,
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&shown(&self.line))?;
        match &self.why {
            Some(why) => write!(f, ": {why}"),
            None => f.write_str(" is not among the guest's opened filesystems"),
        }
    }
}

/// Facts about a guest beyond its filesystems.
#[derive(Debug, Clone, Default)]
pub struct Hints {
    /// Root named by the client file: the guest's `VG/LV`, a filesystem's UUID or a volume's name,
    /// with an optional `:` and subvolume.
    pub root: Option<String>,
    /// Places in the previous job: volume keys by guest path.
    pub before: BTreeMap<Vec<u8>, String>,
    /// Places that the guest's definition gives to its disks, without slashes at their ends; empty: the
    /// root. With any, neither the guest's fstab nor the contents of its filesystems matter.
    pub places: Vec<Option<String>>,
    /// Volumes that cannot be read, with the known facts about their filesystems.
    pub closed: Vec<(VolumeIdentity, Filesystem)>,
    /// Whether missing mount points are made: the filesystems are mounted for writing.
    pub make: bool,
}

impl Hints {
    /// The disk that the definition mounts at the root.
    fn root_disk(&self) -> Option<usize> {
        let root = |place: &Option<String>| place.as_deref() == Some("");
        self.places.iter().position(root)
    }

    /// Lines for the other places that the definition gives, each after those above it.
    fn lines(&self) -> Vec<Line> {
        let places = self.places.iter().enumerate();
        let placed = places.filter_map(|(disk, place)| {
            let place = place.as_ref().filter(|place| !place.is_empty())?;
            Some(Line::defined(place.as_bytes(), disk))
        });
        placed.collect()
    }

    /// Whether the previous job had this volume at this place.
    fn had(&self, path: &[u8], volume: &VolumeIdentity) -> bool {
        !volume.key.is_empty() && self.before.get(path) == Some(&volume.key)
    }
}

/// A guest's mounted filesystems, joined.
#[derive(Debug)]
pub struct GuestTree {
    // Drop order matters: roots close before mounts.
    joins: Arc<[Join]>,
    /// With volume names for messages.
    mounts: Vec<(String, DetachedMount)>,
    private: Vec<u8>,
    notes: Vec<Note>,
    missing: Vec<Missing>,
    unlisted: usize,
    unread_fstab: Option<Error>,
    unsure: Option<Error>,
}

impl GuestTree {
    /// Like [`GuestTree::assemble_with`], without hints.
    pub fn assemble(volumes: Vec<MountedVolume>) -> Result<GuestTree> {
        GuestTree::assemble_unless(volumes, &|| false)
    }

    /// Like [`GuestTree::assemble`], but fails once `stop` returns true.
    pub fn assemble_unless(
        volumes: Vec<MountedVolume>,
        stop: &dyn Fn() -> bool,
    ) -> Result<GuestTree> {
        GuestTree::assemble_with(volumes, &Hints::default(), stop)
    }

    /// Finds the guest's root among its filesystems and joins the others by its fstab. Unlisted
    /// ones go below `PRIVATE/volumes/NAME`. Fails once `stop` returns true.
    pub fn assemble_with(
        volumes: Vec<MountedVolume>,
        hints: &Hints,
        stop: &dyn Fn() -> bool,
    ) -> Result<GuestTree> {
        let mut notes = Vec::new();
        let budget = Budget::new(stop);
        let found = find_root(&volumes, hints, &mut notes, &budget)?;
        let mut joiner = Joiner {
            volumes: &volumes,
            hints,
            joins: Vec::new(),
            root: None,
            used: HashSet::new(),
            notes,
            missing: Vec::new(),
            private: b".guestsnap".to_vec(),
            budget: &budget,
        };
        match found.root {
            Some(root) => joiner.with_root(root)?,
            None => joiner.joins.push(Join {
                path: Vec::new(),
                root: None,
                id: None,
                nested_subvolumes: false,
                volume: String::new(),
                key: String::new(),
                fstype: String::new(),
                uuid: None,
                damage: None,
            }),
        }
        let rivals = joiner.unplaced(&found.rivals);
        let unsure = found.unsure.or_else(|| {
            let names = rivals.iter().map(|(_, name)| name.as_str());
            let names = names.collect::<Vec<_>>().join(", ");
            let volume = &joiner.joins.first()?.volume;
            (!rivals.is_empty()).then(|| {
                let text = format!("{volume} is taken, and {names} looks like a system too");
                Error::new(Code::RootUnsure, text)
            })
        });
        let unlisted = joiner.add_unlisted()?;
        let Joiner {
            mut joins,
            notes,
            missing,
            private,
            ..
        } = joiner;
        joins.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(GuestTree {
            joins: joins.into(),
            mounts: volumes
                .into_iter()
                .map(|v| (escape(v.identity.name.as_bytes()), v.mount))
                .collect(),
            private,
            notes,
            missing,
            unlisted,
            unread_fstab: found.unread_fstab,
            unsure,
        })
    }

    /// All places: the root first, then by path.
    pub fn joins(&self) -> &[Join] {
        &self.joins
    }

    pub(crate) fn share_joins(&self) -> Arc<[Join]> {
        self.joins.clone()
    }

    /// Directory name in the guest's root for synthetic entries: `.guestsnap`, unless the guest
    /// uses that name.
    pub fn private(&self) -> &[u8] {
        &self.private
    }

    /// Decisions and omissions for the job log.
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// Lines of the guest's fstab without a place whose files may be missing.
    pub fn missing(&self) -> &[Missing] {
        &self.missing
    }

    /// An unreadable fstab that may be the guest's: no readable one names its root.
    pub fn unread_fstab(&self) -> Option<&Error> {
        self.unread_fstab.as_ref()
    }

    /// Why another filesystem than the chosen one may be the root.
    pub fn unsure(&self) -> Option<&Error> {
        self.unsure.as_ref()
    }

    /// Number of filesystems apparently not in the guest's fstab.
    pub fn unlisted(&self) -> usize {
        self.unlisted
    }

    /// Reports subvolumes without a place as errors, since no backup has their files; read-only
    /// snapshots are only mentioned. Omits paths that `left_out` accepts. The walk reports
    /// subvolumes nested in a placed one.
    ///
    /// We cannot tell where, or whether, the guest mounted them, so their catalog entries are not
    /// protected from deletion. A line removed from fstab counts as the guest's statement that
    /// nothing is mounted there.
    pub fn placeless(&self, left_out: impl Fn(&[u8]) -> bool) -> Vec<Note> {
        let placed: HashSet<_> = self.joins.iter().filter_map(|join| join.id).collect();
        let mut notes = Vec::new();
        for (volume, mount) in &self.mounts {
            let Some(top) = mount.top() else {
                continue;
            };
            let (found, all) = placeless(top, &placed, &left_out);
            let (past, found): (Vec<_>, Vec<_>) =
                found.into_iter().partition(|path| is_past(top, path));
            let list = |paths: &[Vec<u8>]| {
                let mut names = Names::default();
                paths.iter().for_each(|path| names.push(shown_path(path)));
                names.list(", ")
            };
            if !past.is_empty() {
                let names = list(&past);
                let text = format!("{volume}: read-only snapshots are left out: {names}");
                notes.push(Note::info(text));
            }
            if found.is_empty() && all {
                continue;
            }
            let mut text = list(&found);
            if !all {
                let and = if found.is_empty() { "" } else { ", and " };
                text.push_str(&format!("{and}maybe some that were not looked at"));
            }
            let text = format!(
                "{volume}: subvolumes without a place in the guest's tree: {text}. A line with subvol= and noauto in \
                 its fstab gives a place to one"
            );
            let error = Error::new(Code::NoPlace, text);
            notes.push(Note::error(&error, "Their content is not in this backup."));
        }
        notes
    }

    /// Damage that drivers have found and skipped so far: names or contents may be missing.
    pub fn damage(&self) -> Vec<String> {
        let found = |join: &Join| {
            let text = join.damage.as_ref()?.found()?;
            Some(format!("/{}: {text}", escape(&join.path)))
        };
        // The driver counts in a separate task.
        std::thread::sleep(DAMAGE_DELAY);
        self.joins.iter().filter_map(found).collect()
    }

    /// Closes all filesystems. Fails if a walker still uses them, which would keep the devices
    /// busy.
    pub fn close(self) -> Result<()> {
        let GuestTree { mounts, joins, .. } = self;
        let in_use = Arc::strong_count(&joins) > 1;
        drop(joins);
        let mut result = Ok(());
        for (_, mount) in mounts.into_iter().rev() {
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
