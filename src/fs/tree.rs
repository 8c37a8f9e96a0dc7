//! The guest's filesystems as one tree.
//!
//! The tree is joined by path, in our walker only: where `/var` of the guest is a filesystem of
//! its own, the walker shows that filesystem's root in place of the directory. Nothing is mounted
//! onto a guest path.

use std::cmp::Ordering;
use std::collections::{BTreeSet, HashSet, VecDeque};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RawDir, ResolveFlags};
use rustix::io::Errno;

use super::fstab::{self, Line};
use super::mount::DamageCounter;
use super::probe::Filesystem;
use super::{DetachedMount, Note};
use crate::error::{Code, Error, Result, escape};
use crate::stream::entry::{Kind, Meta, proc_path};
use crate::sys::btrfs::subvolume_id;

/// Symbolic links followed while one path is resolved, as the kernel does.
const MAX_LINKS: usize = 40;

/// Directories a resolved path may have.
const MAX_DEPTH: usize = 200;

/// Names at the top of a btrfs that are looked at for the guest's root.
const MAX_TOP_NAMES: usize = 256;

/// Subvolumes that are looked at for the root because an fstab in another one names them.
const MAX_NAMED: usize = 8;

/// Names of a btrfs that are looked at for what has no place.
const MAX_PLACELESS_NAMES: usize = 1024;

/// Subvolumes without a place that are named, and how much of each name.
const MAX_SHOWN: usize = 8;
const MAX_SHOWN_NAME: usize = 100;

/// How long ext4 may take to count damage that it has just found.
pub(crate) const DAMAGE_DELAY: Duration = Duration::from_millis(5);

/// The inode number of every btrfs subvolume's root.
const SUBVOLUME_ROOT: u64 = 256;

/// What the guest may call a volume.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VolumeIdentity {
    /// A short name for logs and for the folder of a volume that is not in fstab: `p1`,
    /// `vg0-root`.
    pub name: String,
    /// What the guest may call its disk (`vda`, `xvda2`); none: nobody knows, and no name is guessed.
    pub disk_names: Vec<String>,
    /// The partition's number; `None`: the whole disk, or a logical volume.
    pub partition: Option<u32>,
    /// The partition's UUID, in the form of `PARTUUID=`.
    pub partuuid: Option<String>,
    /// The partition's label.
    pub partlabel: Option<Vec<u8>>,
    /// The guest's own volume group and logical volume.
    pub lv: Option<(String, String)>,
}

/// A volume whose filesystem is mounted.
#[derive(Debug)]
pub struct MountedVolume {
    /// What the guest may call it.
    pub identity: VolumeIdentity,
    /// What the probe said.
    pub filesystem: Filesystem,
    /// The mount.
    pub mount: DetachedMount,
}

/// A filesystem's place in the tree.
#[derive(Debug)]
pub struct Join {
    /// Path from the guest's root, no slashes at the ends; empty: the root.
    pub path: Vec<u8>,
    /// The directory shown there, O_PATH. `None`: a directory of our own (a guest without a root).
    pub(crate) root: Option<Arc<OwnedFd>>,
    /// Device and inode of that directory.
    pub(crate) id: Option<(u64, u64)>,
    /// btrfs: also walk subvolumes inside that have no place of their own.
    pub nested_subvolumes: bool,
    /// The volume, for logs.
    pub volume: String,
    /// The filesystem's type, for logs.
    pub fstype: String,
    /// The filesystem's UUID, or what it has instead.
    pub uuid: Option<String>,
    pub(crate) damage: Option<DamageCounter>,
}

impl Join {
    /// What tells the files that are shown there from others: the filesystem, and how much of it.
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

/// A line of the guest's fstab whose files are nowhere in the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The line.
    pub line: Line,
    /// Where its mount point leads, links followed, if it can be resolved.
    pub place: Option<Vec<u8>>,
    /// What keeps it from being read. `None`: no opened volume is the one it names.
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

/// A guest's mounted filesystems, joined.
#[derive(Debug)]
pub struct GuestTree {
    // The order matters for drop: the roots are closed before the mounts.
    joins: Arc<[Join]>,
    /// With the volumes' names, for messages.
    mounts: Vec<(String, DetachedMount)>,
    private: Vec<u8>,
    notes: Vec<Note>,
    missing: Vec<Missing>,
    unlisted: usize,
    unread_fstab: Option<Error>,
}

impl GuestTree {
    /// Finds the guest's root among its filesystems and joins the others to it by its fstab.
    /// Those that fstab does not name go below `PRIVATE/volumes/NAME`.
    pub fn assemble(volumes: Vec<MountedVolume>) -> Result<GuestTree> {
        let mut notes = Vec::new();
        let (root, unread_fstab) = find_root(&volumes, &mut notes)?;
        let mut joiner = Joiner {
            volumes: &volumes,
            joins: Vec::new(),
            used: HashSet::new(),
            notes,
            missing: Vec::new(),
            private: b".guestsnap".to_vec(),
        };
        match root {
            Some(root) => joiner.with_root(root)?,
            None => joiner.joins.push(Join {
                path: Vec::new(),
                root: None,
                id: None,
                nested_subvolumes: false,
                volume: String::new(),
                fstype: String::new(),
                uuid: None,
                damage: None,
            }),
        }
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
            unread_fstab,
        })
    }

    /// The filesystems' places, the root first, then by path.
    pub fn joins(&self) -> &[Join] {
        &self.joins
    }

    pub(crate) fn share_joins(&self) -> Arc<[Join]> {
        self.joins.clone()
    }

    /// The name in the guest's root below which our own files go (`.guestsnap`, unless the guest
    /// has that name itself).
    pub fn private(&self) -> &[u8] {
        &self.private
    }

    /// Decisions and things left out, for the job log.
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// Lines of the guest's fstab that got no place, though their files may be missed.
    pub fn missing(&self) -> &[Missing] {
        &self.missing
    }

    /// An fstab that cannot be read and may be the guest's: none that was read names its root.
    pub fn unread_fstab(&self) -> Option<&Error> {
        self.unread_fstab.as_ref()
    }

    /// Filesystems that the guest's fstab does not name, as far as one can tell.
    pub fn unlisted(&self) -> usize {
        self.unlisted
    }

    /// Warnings that name the subvolumes that are in no place, but for those whose path from the top is left out
    /// on purpose. (The walk names those inside of others that are in one.) Which paths of the guest showed them,
    /// if any did, nobody knows: nothing of the catalog is kept for them. A line that is gone from fstab is as
    /// good as the guest's word that nothing is there any more.
    pub fn placeless(&self, left_out: impl Fn(&[u8]) -> bool) -> Vec<Note> {
        let placed: HashSet<_> = self.joins.iter().filter_map(|join| join.id).collect();
        let mut notes = Vec::new();
        for (volume, mount) in &self.mounts {
            let Some(top) = mount.top() else {
                continue;
            };
            let (found, all) = placeless(top, &placed, &left_out);
            if found.is_empty() && all {
                continue;
            }
            let mut names = Names::default();
            found.iter().for_each(|path| names.push(shown_path(path)));
            let mut text = names.list(", ");
            if !all {
                let and = if found.is_empty() { "" } else { ", and " };
                text.push_str(&format!("{and}maybe some that were not looked at"));
            }
            notes.push(Note::warning(format!(
                "{volume}: subvolumes without a place in the guest's tree are left out: {text}. A line with \
                 subvol= and noauto in its fstab gives a place to one"
            )));
        }
        notes
    }

    /// Damage that drivers have found so far and passed over: names or contents may be missing.
    pub fn damage(&self) -> Vec<String> {
        let found = |join: &Join| {
            let text = join.damage.as_ref()?.found()?;
            Some(format!("/{}: {text}", escape(&join.path)))
        };
        // The driver counts in a task of its own.
        std::thread::sleep(DAMAGE_DELAY);
        self.joins.iter().filter_map(found).collect()
    }

    /// Closes all filesystems. An error if a walker still uses them: it would keep the devices busy.
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

/// A directory that may be the guest's root.
struct Candidate {
    volume: usize,
    /// Volume and subvolume, for messages.
    name: String,
    /// The filesystem's (default) root.
    default: bool,
    root: OwnedFd,
    lines: Vec<Line>,
    remarks: Vec<String>,
    has_fstab: bool,
    has_os_release: bool,
    /// Its own fstab says that it is the root.
    consistent: bool,
    /// btrfs: and says so of this very subvolume.
    named: bool,
}

impl Candidate {
    fn rank(&self) -> (bool, bool, bool) {
        (self.consistent, self.has_fstab, self.has_os_release)
    }

    /// Among those of its volume. A system that moved into a subvolume leaves an fstab at the top, which fits
    /// there too. The others are snapshots then, as they are beside a default root.
    fn rank_in_volume(&self) -> (bool, bool, (bool, bool, bool)) {
        (self.named, self.default && !self.named, self.rank())
    }
}

/// Names for a message: the first ones, and how many more there are.
#[derive(Debug, Default)]
struct Names {
    shown: Vec<String>,
    more: usize,
}

impl Names {
    fn push(&mut self, name: String) {
        match self.shown.len() {
            MAX_SHOWN.. => self.more += 1,
            _ => self.shown.push(name),
        }
    }

    fn append(&mut self, other: Names) {
        other.shown.into_iter().for_each(|name| self.push(name));
        self.more += other.more;
    }

    fn list(&self, between: &str) -> String {
        let shown = self.shown.join(between);
        match self.more {
            0 => shown,
            more => format!("{shown} and {more} more"),
        }
    }
}

/// The best candidate, the only one that is held open, and the names of all that are as good.
#[derive(Default)]
struct Best {
    first: Option<Candidate>,
    equal: Names,
}

impl Best {
    fn add<K: Ord>(&mut self, other: Best, rank: impl Fn(&Candidate) -> K) {
        let order = other.first.as_ref().map(&rank);
        match order.cmp(&self.first.as_ref().map(&rank)) {
            Ordering::Greater => *self = other,
            Ordering::Equal => self.equal.append(other.equal),
            Ordering::Less => {}
        }
    }
}

/// What could not be read on the way to the root.
#[derive(Default)]
struct Unread {
    /// A root may be in there.
    place: Option<Error>,
    /// Each with its cause.
    fstabs: Names,
}

/// The best candidate for the root, and an fstab that may be the guest's and cannot be read. No candidate: no
/// filesystem looks like one, and there are several.
fn find_root(
    volumes: &[MountedVolume],
    notes: &mut Vec<Note>,
) -> Result<(Option<Candidate>, Option<Error>)> {
    let mut best = Best::default();
    let mut unread = Unread::default();
    for number in 0..volumes.len() {
        let found = find_in_volume(volumes, number, &mut unread)?;
        best.add(found, Candidate::rank);
    }
    let Best { first, equal } = best;
    // The root may be what could not be read: without it the paths would not be the guest's.
    let sure = first.as_ref().is_some_and(|root| root.consistent);
    if let Some(error) = unread.place {
        if !sure {
            return Err(error);
        }
        notes.push(Note::warning(format!(
            "{}: whether a root is in there is not known",
            error.report()
        )));
    }
    let mut unread_fstab = None;
    if !unread.fstabs.shown.is_empty() {
        let text = format!("its /etc/fstab: {}", unread.fstabs.list("; "));
        let error = Error::new(Code::ReadFailed, text);
        if sure {
            notes.push(Note::warning(error.report()));
        } else {
            unread_fstab = Some(error);
        }
    }
    let Some(root) = first else {
        return Ok((without_candidate(volumes, notes)?, unread_fstab));
    };
    if equal.shown.len() > 1 {
        notes.push(Note::warning(format!(
            "several filesystems look like the guest's root ({}): the first is taken",
            equal.list("; ")
        )));
    }
    let why = match root.rank() {
        (true, ..) => "its own fstab says so",
        (_, true, _) => "it has an fstab",
        (_, _, true) => "it has an os-release file",
        _ => "it has an fstab that cannot be read",
    };
    notes.push(Note::info(format!("root: {} ({why})", root.name)));
    Ok((Some(root), unread_fstab))
}

/// The best of one volume. Its subvolumes are opened one at a time: a guest may have many, all of them wanted.
fn find_in_volume(volumes: &[MountedVolume], number: usize, unread: &mut Unread) -> Result<Best> {
    let volume = &volumes[number];
    let root = open_beneath(volume.mount.root(), b".")
        .map_err(|e| in_volume(volume, "opening its root", e))?;
    let default = id(root.as_fd()).map_err(|e| in_volume(volume, "looking at its root", e))?;
    let mut search = Search {
        volume,
        number,
        unread,
        best: Best::default(),
        seen: HashSet::from([default]),
        named: Vec::new(),
    };
    if let Some(top) = volume.mount.top() {
        let mut names = Vec::new();
        let listed = each_name(top, |name| {
            names.push(name.to_vec());
            names.len() < MAX_TOP_NAMES
        });
        listed.unwrap_or_else(|e| search.failed(e));
        names.sort();
        for name in names {
            match subvolume_root(top, &name) {
                Ok(Some(root)) => search.look_once(name, root),
                Ok(None) => {}
                Err(error) => search.failed(error),
            }
        }
    }
    search.look(None, root);
    for next in 0..MAX_NAMED {
        let named = search.named.get_mut(next);
        if let Some((name, Some(root))) = named.map(|(name, root)| (name.clone(), root.take())) {
            search.look_once(name, root);
        }
    }
    if let (None, Some((name, _))) = (&search.best.first, search.named.first()) {
        let text = format!(
            "{}: an fstab in it names that as the root, and it does not look like one",
            describe(volume, Some(name))
        );
        let error = Error::new(Code::MountFailed, text);
        search.unread.place.get_or_insert(error);
    }
    Ok(search.best)
}

fn without_candidate(
    volumes: &[MountedVolume],
    notes: &mut Vec<Note>,
) -> Result<Option<Candidate>> {
    let [volume] = volumes else {
        notes.push(Note::warning(
            "no filesystem looks like the guest's root: each is saved as a volume of its own",
        ));
        return Ok(None);
    };
    notes.push(Note::info(format!(
        "root: {} (the only filesystem)",
        escape(volume.identity.name.as_bytes())
    )));
    // All subvolumes are wanted then.
    let root = volume.mount.top().unwrap_or(volume.mount.root());
    Ok(Some(Candidate {
        volume: 0,
        name: String::new(),
        default: true,
        root: open_beneath(root, b".").map_err(|e| in_volume(volume, "opening its root", e))?,
        lines: Vec::new(),
        remarks: Vec::new(),
        has_fstab: false,
        has_os_release: false,
        consistent: false,
        named: false,
    }))
}

/// The search for the root in one volume.
struct Search<'a> {
    volume: &'a MountedVolume,
    number: usize,
    unread: &'a mut Unread,
    best: Best,
    /// What was looked at.
    seen: HashSet<(u64, u64)>,
    /// Subvolumes that an fstab in another one names as the root, until they are looked at.
    named: Vec<(Vec<u8>, Option<OwnedFd>)>,
}

impl Search<'_> {
    fn failed(&mut self, cause: Errno) {
        let error = || in_volume(self.volume, "listing it", cause);
        self.unread.place.get_or_insert_with(error);
    }

    fn look_once(&mut self, subvolume: Vec<u8>, root: OwnedFd) {
        match id(root.as_fd()) {
            Ok(id) if self.seen.insert(id) => self.look(Some(subvolume), root),
            Ok(_) => {}
            Err(error) => self.failed(error),
        }
    }

    /// Takes the directory as a candidate, if it looks like a guest's root.
    fn look(&mut self, subvolume: Option<Vec<u8>>, root: OwnedFd) {
        let volume = self.volume;
        let default = subvolume.is_none();
        let name = describe(volume, subvolume.as_deref());
        let is_file = |path: &[u8]| {
            resolve(root.as_fd(), &[], path).is_ok_and(|found| found.kind == Some(Kind::Regular))
        };
        let has_os_release = is_file(b"etc/os-release") || is_file(b"usr/lib/os-release");
        let text = read_file(root.as_fd(), b"etc/fstab");
        // Whose fstab is damaged may be the root, even if there is nothing else to see.
        if !has_os_release && text == Ok(None) {
            return;
        }
        let text = text.unwrap_or_else(|errno| {
            self.unread.fstabs.push(format!("{name}: {errno}"));
            None
        });
        let has_fstab = text.is_some();
        let (lines, remarks) = fstab::parse(&text.unwrap_or_default());
        // Of several the last one counts, as at boot.
        let own = lines.iter().rev().find(|line| {
            line.mount_point.is_empty()
                && fstab::matches(&line.source, &volume.identity, &volume.filesystem)
        });
        let mut named = false;
        if let Some((line, Ok(other))) =
            own.and_then(|line| Some((line, open_named(volume, line)?)))
        {
            named = id(other.as_fd()) == id(root.as_fd());
            if !named {
                // A snapshot of that one, or what was the root before.
                return self.look_later(line, other);
            }
        }
        let by_default = own.is_some_and(|line| {
            let any = line.subvolume.is_none() && line.subvolume_id.is_none();
            default && (any || volume.mount.top().is_none())
        });
        let mut equal = Names::default();
        equal.push(name.clone());
        let first = Some(Candidate {
            volume: self.number,
            name,
            default,
            root,
            lines,
            remarks,
            has_fstab,
            has_os_release,
            consistent: named || by_default,
            named,
        });
        self.best
            .add(Best { first, equal }, Candidate::rank_in_volume);
    }

    /// Remembers the subvolume that a line names as the root. It may be none of the first names.
    fn look_later(&mut self, line: &Line, root: OwnedFd) {
        let name = match (&line.subvolume, line.subvolume_id) {
            (None, Some(number)) => format!("number {number}").into_bytes(),
            (path, _) => path.clone().unwrap_or_default(),
        };
        if self.named.iter().any(|(known, _)| *known == name) {
            return;
        }
        if self.named.len() < MAX_NAMED {
            return self.named.push((name, Some(root)));
        }
        let text = format!(
            "{}: more than {MAX_NAMED} subvolumes are the root by an fstab in another one",
            describe(self.volume, None)
        );
        let error = Error::new(Code::MountFailed, text);
        self.unread.place.get_or_insert(error);
    }
}

/// A volume, or a subvolume of it, for messages.
fn describe(volume: &MountedVolume, subvolume: Option<&[u8]>) -> String {
    let name = escape(volume.identity.name.as_bytes());
    match subvolume {
        Some(path) => format!("{name}, subvolume {}", shown_path(path)),
        None => name,
    }
}

/// A subvolume's path from the top, for messages.
fn shown_path(path: &[u8]) -> String {
    match path.get(..MAX_SHOWN_NAME) {
        _ if path.is_empty() => "the top itself".to_owned(),
        Some(start) => format!("{}…", escape(start)),
        None => escape(path),
    }
}

/// The subvolume that a line names; `None`: it names none.
fn open_named(volume: &MountedVolume, line: &Line) -> Option<std::result::Result<OwnedFd, String>> {
    let mount = &volume.mount;
    match (mount.top()?, &line.subvolume, line.subvolume_id) {
        (top, Some(path), _) => {
            Some(open_subvolume(top, path).map_err(|e| format!("subvolume {}: {e}", escape(path))))
        }
        (_, None, Some(number)) => Some(
            mount
                .btrfs_subvolume(number, &volume.identity.name)
                .map_err(|e| e.report()),
        ),
        _ => None,
    }
}

/// Builds the joins.
struct Joiner<'a> {
    volumes: &'a [MountedVolume],
    joins: Vec<Join>,
    /// Volumes that have a place.
    used: HashSet<usize>,
    notes: Vec<Note>,
    missing: Vec<Missing>,
    private: Vec<u8>,
}

/// Why the filesystem of a line gets no place.
enum NoPlace {
    /// Its files are in the tree already.
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
    fn with_root(&mut self, root: Candidate) -> Result<()> {
        let Candidate {
            volume,
            root: directory,
            lines,
            remarks,
            ..
        } = root;
        self.notes.extend(remarks.into_iter().map(Note::warning));
        self.choose_private(&directory)?;
        let only = self.volumes.len() == 1 && lines.is_empty();
        self.push(Vec::new(), volume, directory, only);
        let mut lines: Vec<Line> = lines
            .into_iter()
            .filter(|line| !line.mount_point.is_empty())
            .collect();
        // Outer mount points first; of lines for the same place the last one counts, as at boot.
        lines.reverse();
        lines.sort_by(|a, b| a.mount_point.cmp(&b.mount_point));
        lines.dedup_by(|later, kept| later.mount_point == kept.mount_point);
        let failed: Vec<(Line, usize, String)> = lines
            .into_iter()
            .filter_map(|line| self.add_line(line))
            .collect();
        for (line, volume, why) in failed {
            // What is in no line at all is saved as a volume of its own. But of a btrfs that is
            // used only the subvolumes with a place are.
            if self.used.contains(&volume) && self.volumes[volume].mount.top().is_some() {
                self.miss(line, Some(why));
            } else {
                let shown = shown(&line);
                self.notes.push(Note::warning(format!("{shown}: {why}")));
            }
        }
        Ok(())
    }

    /// Remembers a line without a place.
    fn miss(&mut self, line: Line, why: Option<String>) {
        let root = self.joins.first().and_then(|join| join.root.clone());
        let place = root
            .and_then(|root| resolve(root.as_fd(), &self.joins, &line.mount_point).ok())
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
            fstype: found.filesystem.fstype.clone(),
            uuid: found.filesystem.uuid.clone(),
            damage: found.mount.damage().cloned(),
        });
    }

    /// A name for our own files that the guest does not use.
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

    /// Joins the filesystem of a line, or says why not: of which volume, if its files may be
    /// missed for it.
    fn add_line(&mut self, line: Line) -> Option<(Line, usize, String)> {
        let shown = shown(&line);
        let found: Vec<usize> = (0..self.volumes.len())
            .filter(|&n| {
                let volume = &self.volumes[n];
                fstab::matches(&line.source, &volume.identity, &volume.filesystem)
            })
            .collect();
        let Some(&volume) = found.first() else {
            self.miss(line, None);
            return None;
        };
        if found.len() > 1 {
            let name = &self.volumes[volume].identity.name;
            self.notes.push(Note::warning(format!(
                "{shown} fits several volumes: {} is taken",
                escape(name.as_bytes())
            )));
        }
        match self.join_line(&line, volume) {
            Ok(()) => None,
            Err(NoPlace::There(why)) => {
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
        let place = resolve(root.as_fd(), &self.joins, &line.mount_point)
            .map_err(|e| format!("its mount point: {e}"))?;
        if place.kind != Some(Kind::Directory) {
            return Err(NoPlace::Failed("its mount point is not a folder".into()));
        }
        if self.joins.iter().any(|j| j.path == place.path) {
            let why = "another filesystem is at this place";
            return Err(NoPlace::Failed(why.into()));
        }
        self.push(place.path, volume, directory, false);
        Ok(())
    }

    /// Gives every volume that has no place one of its own; how many these are.
    fn add_unlisted(&mut self) -> Result<usize> {
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
            // Nothing says which subvolumes are wanted: all of them.
            let root = volume.mount.top().unwrap_or(volume.mount.root());
            let root =
                open_beneath(root, b".").map_err(|e| in_volume(volume, "opening its root", e))?;
            self.push(path, number, root, true);
        }
        Ok(names.len())
    }
}

/// A line for messages.
fn shown(line: &Line) -> String {
    format!("fstab: /{} ({})", escape(&line.mount_point), line.source)
}

fn in_volume(volume: &MountedVolume, step: &str, cause: Errno) -> Error {
    let name = escape(volume.identity.name.as_bytes());
    Error::new(Code::MountFailed, format!("{name}: {step}")).because(cause)
}

const LOOK: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Opens a directory below another one, O_PATH, without following any link.
fn open_beneath(root: BorrowedFd<'_>, path: &[u8]) -> std::result::Result<OwnedFd, Errno> {
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(root, path, LOOK | OFlags::DIRECTORY, Mode::empty(), how)
}

/// What two descriptors of the same object have in common, and no others of one guest.
fn id(fd: BorrowedFd<'_>) -> std::result::Result<(u64, u64), Errno> {
    Meta::read(fd, b"", AtFlags::EMPTY_PATH).map(|m| (m.dev, m.ino))
}

/// The root of a subvolume by its path; empty: the top itself.
fn open_subvolume(top: BorrowedFd<'_>, path: &[u8]) -> std::result::Result<OwnedFd, Errno> {
    open_beneath(top, if path.is_empty() { b"." } else { path })
}

/// Calls for each name in a folder until that gives `false`.
fn each_name(
    folder: BorrowedFd<'_>,
    mut call: impl FnMut(&[u8]) -> bool,
) -> std::result::Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(folder, c".", flags, Mode::empty())?;
    let mut buffer = vec![MaybeUninit::uninit(); 8192];
    let mut names = RawDir::new(&directory, &mut buffer);
    while let Some(entry) = names.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." && !call(name) {
            break;
        }
    }
    Ok(())
}

/// The subvolumes of a btrfs, by path, that have no place and hold anything but folders and subvolumes, as
/// what cannot be looked into may; and whether all was looked at. What is inside of one with a place, or deep in
/// one that is found, is not in it.
fn placeless(
    top: BorrowedFd<'_>,
    placed: &HashSet<(u64, u64)>,
    left_out: impl Fn(&[u8]) -> bool,
) -> (BTreeSet<Vec<u8>>, bool) {
    let mut found = BTreeSet::new();
    let mut all = true;
    if id(top).is_ok_and(|id| placed.contains(&id)) {
        return (found, all);
    }
    let mut left = MAX_PLACELESS_NAMES;
    // Each with the subvolume it is in.
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
            let (device, _) = id(folder.as_fd())?;
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
                    Ok(meta) if placed.contains(&(meta.dev, meta.ino)) => {}
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
    // What is in the top may be wanted though the top is not.
    found.retain(|path| !path.is_empty() || !left_out(path));
    (found, all)
}

/// The root of a subvolume, if that is what has this name.
fn subvolume_root(top: BorrowedFd<'_>, name: &[u8]) -> std::result::Result<Option<OwnedFd>, Errno> {
    let meta = Meta::read(top, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let is_directory = Kind::from_mode(meta.mode) == Some(Kind::Directory);
    if is_directory && meta.ino == SUBVOLUME_ROOT {
        return open_beneath(top, name).map(Some);
    }
    Ok(None)
}

/// What a path of the guest means.
struct Resolved {
    /// The path without links.
    path: Vec<u8>,
    /// The object, O_PATH.
    file: OwnedFd,
    kind: Option<Kind>,
}

/// Resolves a path as the guest would: absolute links start at its root, `..` ends there, and
/// joined filesystems are entered. (The kernel's RESOLVE_IN_ROOT does not follow links on our
/// mounts, which forbid that, and knows nothing of the joins.)
fn resolve(
    root: BorrowedFd<'_>,
    joins: &[Join],
    path: &[u8],
) -> std::result::Result<Resolved, Errno> {
    let parts = |path: &[u8]| -> Vec<Vec<u8>> {
        path.split(|&b| b == b'/')
            .filter(|p| !p.is_empty() && p != b".")
            .map(<[u8]>::to_vec)
            .collect()
    };
    let mut pending: VecDeque<Vec<u8>> = parts(path).into();
    let mut done: Vec<(Vec<u8>, Arc<OwnedFd>)> = Vec::new();
    let start = Arc::new(open_beneath(root, b".")?);
    let mut links = 0;
    let mut kind = Some(Kind::Directory);
    while let Some(part) = pending.pop_front() {
        if kind != Some(Kind::Directory) {
            return Err(Errno::NOTDIR);
        }
        if part == b".." {
            done.pop();
            continue;
        }
        let here = done.last().map_or(&start, |(_, fd)| fd).clone();
        let file = rustix::fs::openat(&here, part.as_slice(), LOOK, Mode::empty())?;
        let meta = Meta::read(&file, b"", AtFlags::EMPTY_PATH)?;
        match Kind::from_mode(meta.mode) {
            Some(Kind::Symlink) => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Errno::LOOP);
                }
                let target = rustix::fs::readlinkat(&file, c"", Vec::new())?.into_bytes();
                if target.starts_with(b"/") {
                    done.clear();
                }
                for part in parts(&target).into_iter().rev() {
                    pending.push_front(part);
                }
                continue;
            }
            found => kind = found,
        }
        if done.len() == MAX_DEPTH {
            return Err(Errno::NAMETOOLONG);
        }
        done.push((part, Arc::new(file)));
        let path = join_names(&done);
        let joined = joins.iter().find(|j| j.path == path);
        if let (Some(last), Some(root)) = (done.last_mut(), joined.and_then(|j| j.root.clone())) {
            last.1 = root;
            kind = Some(Kind::Directory);
        }
    }
    let last = done.last().map_or(&start, |(_, fd)| fd);
    Ok(Resolved {
        file: last.try_clone().map_err(|_| Errno::MFILE)?,
        path: join_names(&done),
        kind,
    })
}

fn join_names(parts: &[(Vec<u8>, Arc<OwnedFd>)]) -> Vec<u8> {
    let names: Vec<&[u8]> = parts.iter().map(|(name, _)| name.as_slice()).collect();
    names.join(&b'/')
}

/// A small regular file of the guest; `None` if there is none of this name.
fn read_file(root: BorrowedFd<'_>, path: &[u8]) -> std::result::Result<Option<Vec<u8>>, Errno> {
    let found = match resolve(root, &[], path) {
        Ok(found) => found,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        Err(errno) => return Err(errno),
    };
    if found.kind != Some(Kind::Regular) {
        return Err(Errno::INVAL);
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(CWD, proc_path(&found.file), flags, Mode::empty())?;
    // One byte more, so that the parser notices the cut.
    let mut text = vec![0; fstab::MAX_FILE + 1];
    let mut length = 0;
    while length < text.len() {
        match rustix::io::read(&file, &mut text[length..]) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    text.truncate(length);
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn resolved(root: &std::path::Path, path: &str) -> std::result::Result<String, Errno> {
        let directory = fs::File::open(root).unwrap();
        let found = resolve(directory.as_fd(), &[], path.as_bytes())?;
        Ok(String::from_utf8(found.path).unwrap())
    }

    #[test]
    fn test_links_never_leave_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("real/etc")).unwrap();
        fs::write(root.join("real/etc/fstab"), "inside").unwrap();
        symlink("/real/etc", root.join("etc")).unwrap();
        symlink("../../../../../../real", root.join("up")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        symlink("/", root.join("top")).unwrap();
        assert_eq!(resolved(root, "etc/fstab").unwrap(), "real/etc/fstab");
        assert_eq!(resolved(root, "up/etc").unwrap(), "real/etc");
        assert_eq!(resolved(root, "top/top/up").unwrap(), "real");
        assert_eq!(resolved(root, "../..").unwrap(), "");
        assert_eq!(resolved(root, "loop").unwrap_err(), Errno::LOOP);
        assert_eq!(resolved(root, "etc/passwd").unwrap_err(), Errno::NOENT);
        assert_eq!(resolved(root, "etc/fstab/x").unwrap_err(), Errno::NOTDIR);
        let directory = fs::File::open(root).unwrap();
        let text = read_file(directory.as_fd(), b"etc/fstab").unwrap().unwrap();
        assert_eq!(text, b"inside");
        assert_eq!(read_file(directory.as_fd(), b"nothing").unwrap(), None);
        assert_eq!(read_file(directory.as_fd(), b"real"), Err(Errno::INVAL));
    }
}
