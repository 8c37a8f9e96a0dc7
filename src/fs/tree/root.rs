//! Finds the guest's root among its filesystems.
//!
//! Each volume offers at most one candidate. The one with the best evidence is the root; a thin
//! snapshot never precedes its origin. Ties are broken by facts that do not describe the systems
//! (previous job, boot loader, disk order). A tie is an error until the client file names the root.

use std::cmp::{Ordering, Reverse};
use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;

use super::Hints;
use super::elsewhere::{Tried, find_elsewhere};
use super::resolve::{
    NoFile, each_name, id, open_beneath, open_named, read_file, resolve, subvolume_root,
};
use super::text::{Names, describe, in_volume, shown_path};
use crate::error::{Code, Error, Result, escape};
use crate::fs::fstab::{self, Line, Match};
use crate::fs::path::Budget;
use crate::fs::{MountedVolume, Note};
use crate::inode::{InodeId, Kind};

/// Maximum names examined at the top of a btrfs for the root.
pub(super) const MAX_TOP_NAMES: usize = 256;

/// Maximum subvolumes examined because an fstab in another one names them.
const MAX_NAMED: usize = 8;

/// Evidence in a candidate's own fstab, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Evidence {
    /// Its root line names another existing volume: this is a copy.
    NamesAnother,
    /// No root line: a container's root filesystem, a template.
    Nothing,
    /// Its root line names a missing volume.
    NamesAbsent,
    /// Its root line has a form that proves nothing.
    Unproven,
    /// Its root line names it.
    NamesItself,
}

/// A directory that may be the guest's root.
pub(super) struct Candidate {
    pub(super) volume: usize,
    /// Volume and subvolume, for messages.
    name: String,
    /// Whether it is the filesystem's (default) root.
    default: bool,
    pub(super) root: OwnedFd,
    pub(super) lines: Vec<Line>,
    pub(super) remarks: Vec<String>,
    has_fstab: bool,
    has_os_release: bool,
    evidence: Evidence,
    /// btrfs: its own fstab names this very subvolume.
    named: bool,
}

impl Candidate {
    fn rank(&self) -> (Evidence, bool, bool) {
        (self.evidence, self.has_fstab, self.has_os_release)
    }

    /// Rank within a volume: a named subvolume first, then the default root. A system that moved
    /// into a subvolume leaves an fstab at the top that matches there too. The other candidates are
    /// snapshots.
    fn rank_in_volume(&self) -> (bool, bool, (Evidence, bool, bool)) {
        (self.named, self.default && !self.named, self.rank())
    }

    /// Whether this candidate competes with the chosen root.
    fn rivals(&self, root: &Candidate) -> bool {
        let both = self.has_fstab && self.has_os_release;
        self.rank() == root.rank()
            || self.evidence == Evidence::NamesItself
            || both && root.evidence != Evidence::NamesItself
    }
}

/// The best candidate of a volume, the only one held open, and the names of its equals.
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

/// Read failures during the search.
#[derive(Default)]
struct Unread {
    /// A place that may hold a root.
    place: Option<Error>,
    /// Each with its cause.
    fstabs: Names,
    elsewhere: Tried,
}

/// Result of the search.
#[derive(Default)]
pub(super) struct Found {
    /// `None`: several filesystems, and none looks like the root.
    pub(super) root: Option<Candidate>,
    /// An unreadable fstab that may be the guest's.
    pub(super) unread_fstab: Option<Error>,
    /// Why another filesystem may be the root.
    pub(super) unsure: Option<Error>,
    /// Rival volumes and their names. A place in the root's fstab settles the doubt about a volume.
    pub(super) rivals: Vec<(usize, String)>,
}

/// Finds the guest's root.
pub(super) fn find_root(
    volumes: &[MountedVolume],
    hints: &Hints,
    notes: &mut Vec<Note>,
    budget: &Budget<'_>,
) -> Result<Found> {
    let mut found = Found::default();
    let wanted = match &hints.root {
        Some(text) => match Wanted::find(text, volumes, hints) {
            Some(wanted) => Some(wanted),
            None => {
                found.unsure = Some(not_opened(text, volumes));
                return Ok(found);
            }
        },
        None if hints.places.iter().any(Option::is_some) => {
            found.root = defined_root(volumes, hints, notes)?;
            return Ok(found);
        }
        None => None,
    };
    let mut unread = Unread::default();
    let mut best = candidates(volumes, wanted.as_ref(), &mut unread, budget)?;
    drop_snapshots(&mut best, volumes, notes);
    best.sort_by_key(|(candidate, _)| Reverse(order(candidate, volumes, hints)));
    found.unread_fstab = tell_unread(unread, &best, notes)?;
    let mut best = best.into_iter();
    let Some((root, equal)) = best.next() else {
        found.root = without_candidate(volumes, notes)?;
        return Ok(found);
    };
    if wanted.is_none() {
        if let Some(closed) = closed_root(&root, volumes, hints) {
            found.unsure = Some(Error::new(
                Code::RootUnsure,
                format!(
                    "its root is {}, which cannot be read, and {} is another filesystem",
                    escape(closed.as_bytes()),
                    root.name
                ),
            ));
            return Ok(found);
        }
        if equal.len() > 1 {
            let text = format!("these look like it: {}", equal.list("; "));
            found.unsure = Some(Error::new(Code::RootUnsure, text));
        }
        let rivals = best.filter(|(other, _)| other.rivals(&root));
        found.rivals = rivals
            .map(|(other, _)| (other.volume, other.name))
            .collect();
    }
    let why = match root.rank() {
        _ if wanted.is_some() => "the client file says so",
        (Evidence::NamesItself, ..) => "its own fstab says so",
        (_, true, _) => "it has an fstab",
        (_, _, true) => "it has an os-release file",
        _ => "it has an fstab that cannot be read",
    };
    notes.push(Note::info(format!("root: {} ({why})", root.name)));
    found.root = Some(root);
    Ok(found)
}

/// Why the root that the client file names is none.
fn not_opened(text: &str, volumes: &[MountedVolume]) -> Error {
    let opened = volumes.iter().map(|v| escape(v.identity.name.as_bytes()));
    let text = format!(
        "the client file says {}, which is none of its opened filesystems ({})",
        escape(text.as_bytes()),
        opened.collect::<Vec<_>>().join(", ")
    );
    Error::new(Code::RootUnsure, text)
}

/// The best candidate of each volume with the names of its equals there. `wanted` restricts them to one volume.
fn candidates(
    volumes: &[MountedVolume],
    wanted: Option<&Wanted>,
    unread: &mut Unread,
    budget: &Budget<'_>,
) -> Result<Vec<(Candidate, Names)>> {
    let mut best = Vec::new();
    for number in 0..volumes.len() {
        if wanted.is_none_or(|wanted| wanted.volume == number) {
            let subvolume = wanted.and_then(|wanted| wanted.subvolume);
            let mut of_volume = find_in_volume(volumes, number, subvolume, unread, budget)?;
            budget.check()?;
            if let Some(first) = of_volume.first.take() {
                best.push((first, of_volume.equal));
            }
        }
    }
    if let (Some(wanted), true) = (wanted, best.is_empty()) {
        best.push((wanted.candidate(volumes)?, Names::default()));
    }
    Ok(best)
}

/// Reports read failures of the search. Returns that of an fstab that may be the guest's, and fails if the root may
/// be in a place that was not read.
fn tell_unread(
    unread: Unread,
    best: &[(Candidate, Names)],
    notes: &mut Vec<Note>,
) -> Result<Option<Error>> {
    // The root may be the unreadable one; with another root, all paths would be wrong.
    let sure = best
        .first()
        .is_some_and(|(root, _)| root.evidence == Evidence::NamesItself);
    if let Some(error) = unread.place {
        if !sure {
            return Err(error);
        }
        notes.push(Note::error(
            &error,
            "Files in there may not be in this backup.",
        ));
    }
    if !unread.fstabs.is_empty() {
        let text = format!("its /etc/fstab: {}", unread.fstabs.list("; "));
        let error = Error::new(Code::ReadFailed, text);
        if !sure {
            return Ok(Some(error));
        }
        // Warning: second fstab.
        notes.push(Note::warning(error.report()));
    }
    Ok(None)
}

/// Orders candidates, the best last: by evidence, then by weaker facts.
fn order(candidate: &Candidate, volumes: &[MountedVolume], hints: &Hints) -> impl Ord + use<> {
    let identity = &volumes[candidate.volume].identity;
    (
        candidate.rank(),
        hints.had(b"", identity),
        identity.bootable,
        Reverse((identity.start, candidate.volume)),
    )
}

/// Removes thin snapshots whose origin is a candidate or cannot be read.
fn drop_snapshots(
    best: &mut Vec<(Candidate, Names)>,
    volumes: &[MountedVolume],
    notes: &mut Vec<Note>,
) {
    if best.len() < 2 {
        return;
    }
    let all: Vec<usize> = best.iter().map(|(candidate, _)| candidate.volume).collect();
    best.retain(|(candidate, _)| {
        let identity = &volumes[candidate.volume].identity;
        let origin = all.iter().map(|&number| &volumes[number].identity);
        let origin = origin
            .into_iter()
            .find(|other| identity.is_snapshot_of(other));
        if let Some(origin) = origin {
            notes.push(Note::info(format!(
                "{} is a snapshot of {}: it is not the root",
                candidate.name,
                escape(origin.name.as_bytes())
            )));
        }
        origin.is_none()
    });
}

/// The unreadable root, if the best candidate would wrongly replace it: as its snapshot or copy, or
/// because its fstab does not name itself.
fn closed_root<'a>(
    root: &Candidate,
    volumes: &[MountedVolume],
    hints: &'a Hints,
) -> Option<&'a str> {
    let volume = &volumes[root.volume];
    let closed = hints.closed.iter().find(|(identity, filesystem)| {
        let copy = filesystem.uuid.is_some() && filesystem.uuid == volume.filesystem.uuid;
        let other = root.evidence != Evidence::NamesItself;
        volume.identity.is_snapshot_of(identity)
            || hints.had(b"", identity) && (copy || other)
            || other && root.names(identity, filesystem)
    });
    closed.map(|(identity, _)| identity.name.as_str())
}

impl Candidate {
    /// Whether its root line names this volume.
    fn names(
        &self,
        identity: &crate::fs::VolumeIdentity,
        filesystem: &crate::fs::Filesystem,
    ) -> bool {
        root_line(&self.lines)
            .is_some_and(|line| fstab::matches(&line.source, identity, filesystem))
    }
}

/// The effective root line: the first that must be mounted, as for other mount points.
fn root_line(lines: &[Line]) -> Option<&Line> {
    let mut lines = lines.iter().filter(|line| line.mount_point.is_empty());
    let strong = lines.clone().find(|line| !line.weak);
    strong.or_else(|| lines.next())
}

/// Root named by the client file.
struct Wanted<'a> {
    volume: usize,
    /// btrfs: subvolume path.
    subvolume: Option<&'a [u8]>,
}

impl<'a> Wanted<'a> {
    fn find(text: &'a str, volumes: &[MountedVolume], hints: &Hints) -> Option<Wanted<'a>> {
        let (name, subvolume) = match text.split_once(':') {
            Some((name, subvolume)) => (name, Some(subvolume.trim_matches('/').as_bytes())),
            None => (text, None),
        };
        let fits = |volume: &MountedVolume| {
            let mut devices = volume.identity.devices();
            let uuid = volume.filesystem.uuid.as_ref();
            uuid.is_some_and(|uuid| uuid.eq_ignore_ascii_case(name))
                || devices.any(|device| {
                    let lv = device.lv.as_ref().map(|(vg, lv)| format!("{vg}/{lv}"));
                    device.name == name || lv.is_some_and(|lv| lv == name)
                })
        };
        let found = (0..volumes.len()).filter(|&number| fits(&volumes[number]));
        let volume = found.min_by_key(|&number| {
            let identity = &volumes[number].identity;
            (
                identity.name != name,
                identity.snapshot_of.is_some(),
                !hints.had(b"", identity),
                !identity.bootable,
                identity.start,
            )
        })?;
        Some(Wanted { volume, subvolume })
    }

    /// Creates a candidate that does not look like a system.
    fn candidate(&self, volumes: &[MountedVolume]) -> Result<Candidate> {
        let volume = &volumes[self.volume];
        let (top, path) = match (volume.mount.top(), self.subvolume) {
            (Some(top), Some(path)) if !path.is_empty() => (top, path),
            _ => (volume.mount.root(), &b"."[..]),
        };
        let root = open_beneath(top, path).map_err(|e| in_volume(volume, "opening its root", e))?;
        let name = describe(volume, self.subvolume);
        Ok(Candidate::bare(self.volume, name, root))
    }
}

/// Finds the best candidate of one volume. Opens one subvolume at a time, because a guest may have
/// many.
fn find_in_volume(
    volumes: &[MountedVolume],
    number: usize,
    only: Option<&[u8]>,
    unread: &mut Unread,
    budget: &Budget<'_>,
) -> Result<Best> {
    let volume = &volumes[number];
    let root = open_beneath(volume.mount.root(), b".")
        .map_err(|e| in_volume(volume, "opening its root", e))?;
    let default = id(root.as_fd()).map_err(|e| in_volume(volume, "looking at its root", e))?;
    let mut search = Search {
        volumes,
        volume,
        number,
        unread,
        budget,
        best: Best::default(),
        seen: HashSet::from([default]),
        named: Vec::new(),
    };
    if let (Some(top), Some(path)) = (volume.mount.top(), only) {
        let step = format!("opening subvolume {}", shown_path(path));
        let chosen = open_beneath(top, if path.is_empty() { b"." } else { path })
            .map_err(|e| in_volume(volume, &step, e))?;
        search.look(Some(path.to_vec()), chosen);
        return Ok(search.best);
    }
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
        // Warning: no root.
        notes.push(Note::warning(
            "no filesystem looks like the guest's root: each is saved as a volume of its own",
        ));
        return Ok(None);
    };
    notes.push(Note::info(format!(
        "root: {} (the only filesystem)",
        escape(volume.identity.name.as_bytes())
    )));
    // All subvolumes are wanted in this case.
    let root = volume.mount.top().unwrap_or(volume.mount.root());
    let root = open_beneath(root, b".").map_err(|e| in_volume(volume, "opening its root", e))?;
    Ok(Some(Candidate::bare(0, String::new(), root)))
}

/// The root that the guest's definition names, with lines for its other places. `None`: that disk is
/// not covered or cannot be opened.
fn defined_root(
    volumes: &[MountedVolume],
    hints: &Hints,
    notes: &mut Vec<Note>,
) -> Result<Option<Candidate>> {
    let disk = hints.root_disk();
    let is_root = |v: &MountedVolume| disk.is_some_and(|disk| v.identity.is_whole_disk(disk));
    let Some(number) = volumes.iter().position(is_root) else {
        // Warning: no root.
        notes.push(Note::warning(
            "its root cannot be read: each other filesystem is saved as a volume of its own",
        ));
        return Ok(None);
    };
    let volume = &volumes[number];
    let name = describe(volume, None);
    notes.push(Note::info(format!(
        "root: {name} (its definition on the host says so)"
    )));
    let root = open_beneath(volume.mount.root(), b".")
        .map_err(|e| in_volume(volume, "opening its root", e))?;
    Ok(Some(Candidate {
        lines: hints.lines(),
        ..Candidate::bare(number, name, root)
    }))
}

impl Candidate {
    /// A candidate without any sign of a system.
    fn bare(volume: usize, name: String, root: OwnedFd) -> Candidate {
        Candidate {
            volume,
            name,
            default: true,
            root,
            lines: Vec::new(),
            remarks: Vec::new(),
            has_fstab: false,
            has_os_release: false,
            evidence: Evidence::Nothing,
            named: false,
        }
    }
}

/// The search in one volume.
struct Search<'a> {
    volumes: &'a [MountedVolume],
    volume: &'a MountedVolume,
    number: usize,
    unread: &'a mut Unread,
    budget: &'a Budget<'a>,
    best: Best,
    /// Visited directories.
    seen: HashSet<InodeId>,
    /// Subvolumes that another one's fstab names as the root, not yet visited.
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

    /// Adds the directory as a candidate if it looks like a guest's root.
    fn look(&mut self, subvolume: Option<Vec<u8>>, root: OwnedFd) {
        let volume = self.volume;
        let default = subvolume.is_none();
        let name = describe(volume, subvolume.as_deref());
        let mut joins = Vec::new();
        let text = match read_file(root.as_fd(), &[], b"etc/fstab", self.budget) {
            Err(NoFile::Missing(stop)) if stop.by_link => {
                match find_elsewhere(
                    self.volumes,
                    &root,
                    &stop.at,
                    self.budget,
                    &mut self.unread.elsewhere,
                ) {
                    Some((text, join)) => {
                        joins.push(join);
                        Ok(text)
                    }
                    // A single filesystem has no other place and no others to join.
                    None if self.volumes.len() == 1 && volume.mount.fstype() != "btrfs" => {
                        Err(NoFile::Missing(stop))
                    }
                    None => Err(NoFile::Failed(stop.errno)),
                }
            }
            text => text,
        };
        let is_file = |path: &[u8]| {
            resolve(root.as_fd(), &joins, path, self.budget)
                .is_ok_and(|f| f.kind == Some(Kind::Regular))
        };
        let has_os_release = is_file(b"etc/os-release") || is_file(b"usr/lib/os-release");
        // A damaged fstab may be the root's, even without other signs.
        if !has_os_release && matches!(text, Err(NoFile::Missing(_))) {
            return;
        }
        if let Err(NoFile::Failed(errno)) = &text {
            self.unread.fstabs.push(format!("{name}: {errno}"));
        }
        let has_fstab = text.is_ok();
        let (lines, remarks) = fstab::parse(&text.unwrap_or_default());
        let own = root_line(&lines);
        let found = own.map(|line| self.compare(line));
        let mut named = false;
        if let (Some(Evidence::NamesItself), Some(line)) = (found, own) {
            if let Some(Ok(other)) = open_named(volume, line) {
                named = id(other.as_fd()) == id(root.as_fd());
                if !named {
                    // A snapshot of that one, or an earlier root.
                    return self.look_later(line, other);
                }
            }
        }
        let by_default = own.is_some_and(|line| {
            let any = line.subvolume.is_none() && line.subvolume_id.is_none();
            default && (any || volume.mount.top().is_none())
        });
        let evidence = match found {
            Some(Evidence::NamesItself) if !named && !by_default => Evidence::Unproven,
            found => found.unwrap_or(Evidence::Nothing),
        };
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
            evidence,
            named,
        });
        self.best
            .add(Best { first, equal }, Candidate::rank_in_volume);
    }

    /// Evidence of a root line for this volume.
    fn compare(&self, line: &Line) -> Evidence {
        let compare = |volume: &MountedVolume| {
            fstab::compare(&line.source, &volume.identity, &volume.filesystem)
        };
        match compare(self.volume) {
            Match::Yes => Evidence::NamesItself,
            Match::Unknown => Evidence::Unproven,
            Match::No if self.volumes.iter().any(|v| compare(v) == Match::Yes) => {
                Evidence::NamesAnother
            }
            Match::No => Evidence::NamesAbsent,
        }
    }

    /// Queues the subvolume that a line names as the root; the list of names may not include it.
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
