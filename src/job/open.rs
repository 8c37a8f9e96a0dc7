//! From snapshots to one tree: tables, guest LVM, mapping, mounting. Undone in reverse.

use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use serde_json::json;

use super::prepare::Prepared;
use super::saves::Place;
use super::{Importance, Reporter};
use crate::config::client::{FilterSettings, Fsck};
use crate::disk::{self, FileDisk, Mapped, ReadAt, Skipped, SkippedKind, VolumeKind};
use crate::error::{Code, Error, Result, escape};
use crate::fs::fstab::{self, Source};
use crate::fs::{
    self, Claim, Content, DetachedMount, Filesystem, FsPolicy, GuestTree, Missing, MountedVolume,
    Note, NoteLevel, SkipReason, VolumeIdentity,
};
use crate::guest::Guest;
use crate::guest::quiesce::Consistency;
use crate::point::{Point, pass};
use crate::snapshot::{self, Device, Journal, Object, Snapshot, Status};
use crate::stream::{AheadOptions, ReadAhead, WalkOptions};

/// A guest that can be read.
#[derive(Debug)]
pub(super) struct OpenGuest {
    guest: Guest,
    prefix: Vec<u8>,
    consistency: Consistency,
    // Dropped in this order: each holds the next busy.
    tree: Option<GuestTree>,
    mapped: Vec<Volume>,
    claim: Option<Claim>,
    snapshots: Vec<Box<dyn Snapshot>>,
    manifest: serde_json::Value,
    filter: FilterSettings,
    /// Not all that may hold files was opened.
    failed_volumes: bool,
    /// Places in the catalog whose filesystem is not there.
    missed: Vec<Vec<u8>>,
    peak: Option<f64>,
    /// Why it is not read to its end.
    given_up: Option<Error>,
}

/// How a guest is opened.
pub(super) struct How<'a> {
    pub(super) policy: FsPolicy,
    pub(super) fsck: Fsck,
    pub(super) journal: &'a Arc<Journal>,
    pub(super) job_id: u32,
    pub(super) reporter: &'a dyn Reporter,
    /// Whether the job is to end.
    pub(super) stop: &'a dyn Fn() -> bool,
}

impl How<'_> {
    /// Takes down a volume that is not needed after all. That this fails is an error of its own:
    /// it never hides the first one, nor keeps others from being taken down.
    fn close(&self, volume: Volume, what: &str) {
        if let Err(error) = volume.close() {
            self.tell_second(&error, what);
        }
    }

    fn tell_second(&self, error: &Error, what: &str) {
        let text = format!("{what}: {}", error.report());
        self.reporter.message(Importance::Error, &text);
    }

    fn tell(&self, notes: &[Note]) {
        for note in notes {
            let importance = match note.level {
                NoteLevel::Info => Importance::Info,
                NoteLevel::Warning => Importance::Warning,
            };
            self.reporter.message(importance, &note.text);
        }
    }
}

/// Looks into the guest's disks and mounts what is there. On an error everything is given back,
/// the snapshots too.
pub(super) fn open(prepared: Prepared, how: &How<'_>) -> Result<OpenGuest> {
    let mut open = OpenGuest::new(prepared);
    match open.mount_all(how) {
        Ok(()) => Ok(open),
        Err(error) => {
            for undo in open.close() {
                how.reporter.message(Importance::Error, &undo.report());
            }
            Err(error)
        }
    }
}

impl OpenGuest {
    /// Not looked into yet.
    pub(super) fn new(prepared: Prepared) -> OpenGuest {
        let Prepared {
            guest,
            snapshots,
            prefix,
            consistency,
            filter,
        } = prepared;
        OpenGuest {
            // Nobody knows where the files of such a disk were.
            failed_volumes: guest.uncovered.iter().any(|disk| !disk.expected),
            guest,
            prefix,
            consistency,
            tree: None,
            mapped: Vec::new(),
            claim: None,
            snapshots,
            manifest: json!({}),
            filter,
            missed: Vec::new(),
            peak: None,
            given_up: None,
        }
    }

    /// Mounts what is there. On an error the manifest may tell how far it came.
    pub(super) fn mount_all(&mut self, how: &How<'_>) -> Result<()> {
        let reporter = how.reporter;
        let name = self.guest.name.clone();
        let devices: Vec<Device> = self.snapshots.iter().map(|s| s.device()).collect();
        let disks = devices
            .iter()
            .map(|d| FileDisk::open(&d.path))
            .collect::<Result<Vec<_>>>()?;
        let views: Vec<&dyn ReadAt> = disks.iter().map(|d| d as &dyn ReadAt).collect();
        let examined = disk::examine(&views)?;
        pass(Point::DiskExamined);
        drop(views);
        drop(disks);

        for note in &examined.notes {
            reporter.message(Importance::Warning, &format!("{name}: {note}"));
        }
        let mut found = Vec::new();
        let mut report = Vec::new();
        // What a guest of which nothing can be opened fails with.
        let mut lost = None;
        // What a line of its fstab may mean although it has no filesystem in the tree.
        let mut closed = Vec::new();
        for skipped in &examined.skipped {
            found.push(format!("{} skipped ({})", skipped.name, skipped.reason));
            let Some(code) = skipped.kind.loss() else {
                report.push(json!({ "volume": skipped.name, "skipped": skipped.reason }));
                continue;
            };
            let error = Error::new(code, self.loss_text(skipped)).report();
            report.push(json!({ "volume": skipped.name, "error": error }));
            let rest = match skipped.kind {
                SkippedKind::DamagedTable => "What the table does not show is not in this backup.",
                _ => "Nothing of this volume is in this backup.",
            };
            let text = format!("{name}: {}: ERROR {error}. {rest}", skipped.name);
            reporter.message(Importance::Error, &text);
            self.failed_volumes = true;
            lost.get_or_insert(code);
            closed.extend(skipped.volume.as_ref().map(|kind| Closed {
                identity: identity(&skipped.name, kind, &self.guest.disk_names),
                filesystem: Filesystem::default(),
                reason: None,
            }));
        }
        let mut failed = Vec::new();
        let mut probed = Vec::new();
        for volume in &examined.volumes {
            let what = format!("{name}: {}", volume.name);
            match probe(volume, &devices, how, &what) {
                Ok(Ok((mapped, filesystem))) => probed.push((volume, what, mapped, filesystem)),
                Ok(Err(nothing)) if nothing == Nothing::DamagedPv => {
                    let error = Error::new(Code::BadGuestLvm, format!("{what}: {nothing}"));
                    failed.push((volume, what, Filesystem::default(), error));
                }
                Ok(Err(nothing)) => {
                    let reason = nothing.to_string();
                    report.push(json!({
                        "volume": volume.name,
                        "kind": volume.kind,
                        "bytes": volume.size(),
                        "skipped": reason,
                    }));
                    found.push(format!("{} skipped ({reason})", volume.name));
                    if nothing.may_hold_files() {
                        self.failed_volumes = true;
                        let text =
                            format!("{what}: {reason}. Nothing of this volume is in this backup.");
                        reporter.message(Importance::Warning, &text);
                    }
                    closed.push(Closed {
                        identity: identity(&volume.name, &volume.kind, &self.guest.disk_names),
                        filesystem: Filesystem::default(),
                        reason: Some(nothing),
                    });
                }
                Err(error) => failed.push((volume, what, Filesystem::default(), error)),
            }
        }
        match self.wait_for_btrfs(&probed, how) {
            Ok(claim) => self.claim = Some(claim),
            Err(error) => {
                for (_, what, mapped, _) in probed {
                    how.close(mapped, &what);
                }
                return Err(error);
            }
        }
        let mut mounted = Vec::new();
        for (volume, what, mapped, filesystem) in probed {
            match self.mount(volume, mapped, filesystem.clone(), &what, how) {
                Ok(volume_mounted) => {
                    report.push(json!({
                        "volume": volume.name,
                        "kind": volume.kind,
                        "bytes": volume.size(),
                        "filesystem": volume_mounted.mount.fstype(),
                        "uuid": volume_mounted.filesystem.uuid,
                        "label": volume_mounted.filesystem.label.as_deref().map(escape),
                        "options": volume_mounted.mount.options(),
                    }));
                    found.push(format!("{} {}", volume.name, volume_mounted.mount.fstype()));
                    mounted.push(volume_mounted);
                }
                Err(error) => failed.push((volume, what, filesystem, error)),
            }
        }
        for (volume, what, filesystem, error) in failed {
            self.failed_volumes = true;
            lost = match error.code() {
                Code::BadGuestLvm => lost.or(Some(Code::BadGuestLvm)),
                _ => Some(Code::MountFailed),
            };
            closed.push(Closed {
                identity: identity(&volume.name, &volume.kind, &self.guest.disk_names),
                filesystem,
                reason: None,
            });
            found.push(format!("{} failed", volume.name));
            report.push(json!({
                "volume": volume.name,
                "kind": volume.kind,
                "bytes": volume.size(),
                "error": error.report(),
            }));
            let text = format!(
                "{what}: ERROR {}. Nothing of this volume is in this backup.",
                error.report()
            );
            reporter.message(Importance::Error, &text);
        }
        self.manifest = json!({
            "format": 1,
            "guest": name,
            "job_id": how.job_id,
            "consistency": self.consistency.to_string(),
            "disks": self.guest.disks.iter().zip(&examined.disks).zip(&self.snapshots).map(|((source, disk), snapshot)| json!({
                "source": source.to_string(),
                "bytes": snapshot.device().size,
                "snapshot": snapshot.describe(),
                "contents": disk,
            })).collect::<Vec<_>>(),
            "not_covered": self.guest.uncovered.iter().map(|d| json!({ "disk": d.what, "reason": d.reason })).collect::<Vec<_>>(),
            "groups": examined.groups,
            "volumes": report,
            "decisions": [],
            "tree": [],
            "notes": examined.notes,
        });
        if mounted.is_empty() {
            let found = if found.is_empty() {
                "nothing known".to_owned()
            } else {
                found.join(", ")
            };
            return Err(Error::new(
                lost.unwrap_or(Code::NoContent),
                format!("{}: {found}", disks_text(&self.guest)),
            ));
        }
        let tree = GuestTree::assemble(mounted)?;
        pass(Point::GuestOpened);
        let mut notes = tree.notes().to_vec();
        notes.extend(tree.placeless(|path| left_out(&self.filter, path)));
        how.tell(
            &notes
                .iter()
                .map(|note| Note {
                    level: note.level,
                    text: format!("{name}: {}", note.text),
                })
                .collect::<Vec<_>>(),
        );
        reporter.message(Importance::Info, &format!("{name}: {}", found.join(", ")));
        let mut decisions: Vec<String> = notes.into_iter().map(|n| n.text).collect();
        decisions.extend(tree.unread_fstab().map(|e| self.lost_fstab(e, reporter)));
        for missing in tree.missing() {
            decisions.push(self.miss(missing, tree.unlisted(), &closed, reporter));
        }
        self.manifest["decisions"] = json!(decisions);
        self.manifest["tree"] = json!(
            tree.joins()
                .iter()
                .map(|join| json!({
                    "path": escape(&join.path),
                    "volume": join.volume,
                    "filesystem": join.fstype,
                }))
                .collect::<Vec<_>>()
        );
        self.tree = Some(tree);
        Ok(())
    }

    /// Tells that the guest's fstab cannot be read. What it joins is saved in other places than before: in
    /// accurate mode nothing may count as deleted. What it told.
    fn lost_fstab(&mut self, error: &Error, reporter: &dyn Reporter) -> String {
        self.failed_volumes = true;
        let text = format!(
            "{}: ERROR {}. Which filesystem the guest has where is not known: what is not its root is in \
             .guestsnap/volumes of this backup.",
            self.guest.name,
            error.report()
        );
        reporter.message(Importance::Error, &text);
        error.to_string()
    }

    /// Tells of a line of the guest's fstab that got no place, and remembers the place if files may
    /// be missed there. What it told.
    fn miss(
        &mut self,
        missing: &Missing,
        unlisted: usize,
        closed: &[Closed],
        reporter: &dyn Reporter,
    ) -> String {
        let name = &self.guest.name;
        let line = &missing.line;
        let volume = closed
            .iter()
            .find(|c| fstab::matches(&line.source, &c.identity, &c.filesystem));
        let mut text = missing.to_string();
        if let Some(volume) = volume {
            let name = escape(volume.identity.name.as_bytes());
            text = format!("{text}: it is {name}");
            if let Some(reason) = &volume.reason {
                text = format!("{text}, {reason}");
            }
        }
        // Such names are a guess of ours: what is meant may be among the rest, which is saved.
        let guessed = matches!(line.source, Source::Device(_) | Source::Other(_));
        let importance = match volume {
            _ if left_out(&self.filter, &line.mount_point) => {
                text = format!("{text}; left out by `skip`");
                Importance::Info
            }
            // It is an error already.
            Some(Closed { reason: None, .. }) => Importance::Info,
            Some(Closed {
                reason: Some(Nothing::Unknown),
                ..
            }) => Importance::Error,
            // It may be away. What is there and cannot be read is another thing.
            _ if line.optional && missing.why.is_none() => Importance::Info,
            None if guessed && missing.why.is_none() && unlisted > 0 => {
                text.push_str("; UUID= or LABEL= there would tell which one it is");
                Importance::Warning
            }
            _ => Importance::Error,
        };
        if importance != Importance::Error {
            reporter.message(importance, &format!("{name}: {text}"));
            return text;
        }
        let error = Error::new(Code::VolumeMissing, text);
        let shown = escape(&line.mount_point);
        let told = format!(
            "{name}: ERROR {}. Nothing of /{shown} is in this backup.",
            error.report()
        );
        reporter.message(Importance::Error, &told);
        for place in [Some(&line.mount_point), missing.place.as_ref()] {
            let Some(place) = place.filter(|place| !place.is_empty()) else {
                continue;
            };
            let mut tree = self.catalog_path(place);
            tree.push(b'/');
            if !self.missed.contains(&tree) {
                self.missed.push(tree);
            }
        }
        error.to_string()
    }

    /// What cannot be reached: the step, the disk and the cause.
    fn loss_text(&self, skipped: &Skipped) -> String {
        let step = match skipped.kind {
            SkippedKind::DamagedTable => "reading the partition table",
            SkippedKind::DamagedPv => "reading the LVM metadata",
            _ => return skipped.reason.clone(),
        };
        let disk = skipped.disk.and_then(|disk| self.guest.disks.get(disk));
        let disk = disk.map(ToString::to_string).unwrap_or_default();
        format!("disk {disk}: {step}: {}", skipped.reason)
    }

    /// Kernels before 6.7 cannot have two clones of a btrfs open: jobs take turns.
    fn wait_for_btrfs(&self, probed: &[Probed<'_>], how: &How<'_>) -> Result<Claim> {
        let mut told = false;
        fs::claim(
            probed.iter().map(|(_, _, _, filesystem)| filesystem),
            &mut || {
                if !std::mem::replace(&mut told, true) {
                    let text = format!(
                        "{}: waiting for another job, which has a btrfs with the same id open",
                        self.guest.name
                    );
                    how.reporter.message(Importance::Info, &text);
                }
                (how.stop)()
            },
        )
    }

    /// Checks a volume if that is asked for, and mounts it.
    fn mount(
        &mut self,
        volume: &disk::Volume,
        mapped: Volume,
        filesystem: Filesystem,
        what: &str,
        how: &How<'_>,
    ) -> Result<MountedVolume> {
        let opened = check(&mapped, &filesystem, what, how)
            .and_then(|()| DetachedMount::open(mapped.mapped.fd(), &filesystem, &how.policy, what));
        let (mount, notes) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                how.close(mapped, what);
                return Err(error);
            }
        };
        self.mapped.push(mapped);
        for note in notes {
            if note.level == NoteLevel::Warning {
                how.reporter.message(Importance::Warning, &note.text);
            } else {
                log::debug!("{}", note.text);
            }
        }
        Ok(MountedVolume {
            identity: identity(&volume.name, &volume.kind, &self.guest.disk_names),
            filesystem,
            mount,
        })
    }

    /// The guest's name.
    pub(super) fn name(&self) -> &str {
        &self.guest.name
    }

    /// A walk over its tree, with threads that read ahead. `None`: there is no tree.
    pub(super) fn read_ahead(&self, options: AheadOptions) -> Result<Option<ReadAhead>> {
        self.tree
            .as_ref()
            .map(|tree| ReadAhead::start(tree, WalkOptions::default(), options))
            .transpose()
    }

    /// Catalog path of a path in the guest.
    pub(super) fn catalog_path(&self, path: &[u8]) -> Vec<u8> {
        let mut out = self.prefix.clone();
        if !path.is_empty() {
            out.push(b'/');
            out.extend_from_slice(path);
        }
        out
    }

    /// All of it in the catalog: a path with a trailing slash.
    pub(super) fn catalog_tree(&self) -> Vec<u8> {
        [&self.prefix[..], b"/"].concat()
    }

    /// The filesystems that are read, and where they are in the catalog; with the rules for what is
    /// left out.
    pub(super) fn places(&self) -> Vec<Place> {
        let joins = self.tree.iter().flat_map(|tree| tree.joins());
        let filesystems = joins.map(|join| {
            let mut tree = self.catalog_path(&join.path);
            tree.push(b'/');
            Place::new(&tree, join.identity())
        });
        // What was left out by other rules did not change either since it was not saved.
        let rules = Place::new(&self.catalog_tree(), format!("rules {}", self.filter));
        filesystems.chain([rules]).collect()
    }

    /// Catalog path of the manifest.
    pub(super) fn manifest_path(&self) -> Vec<u8> {
        let private = self
            .tree
            .as_ref()
            .map_or(&b".guestsnap"[..], |t| t.private());
        self.catalog_path(&[private, b"/manifest.json"].concat())
    }

    /// The mounted tree.
    pub(super) fn tree(&self) -> Option<&GuestTree> {
        self.tree.as_ref()
    }

    /// What was found in this guest.
    pub(super) fn found(&self) -> &serde_json::Value {
        &self.manifest
    }

    /// The same as a file.
    pub(super) fn manifest(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec_pretty(&self.manifest).unwrap_or_default();
        text.push(b'\n');
        text
    }

    /// Catalog trees in which nothing may count as deleted: places whose filesystem is not there;
    /// and all of the guest if a volume was not opened, for which paths that held is not known.
    pub(super) fn unread(&self) -> Vec<Vec<u8>> {
        let mut trees = self.missed.clone();
        if self.failed_volumes {
            trees.push(self.catalog_tree());
        }
        trees
    }

    /// It is not read to its end. Gives the catalog tree of which nothing may count as deleted.
    pub(super) fn give_up(&mut self, why: Error) -> Vec<u8> {
        self.given_up = Some(why);
        self.catalog_tree()
    }

    /// Whether all snapshots are still valid; to be asked after the last byte was read.
    pub(super) fn check(&mut self) -> Result<()> {
        if let Some(why) = self.given_up.take() {
            return Err(why);
        }
        for (disk, snapshot) in self.guest.disks.iter().zip(&self.snapshots) {
            match snapshot.status()? {
                Status::Valid { used } => self.peak = Some(self.peak.unwrap_or(0.0).max(used)),
                Status::Invalid => {
                    self.peak = Some(100.0);
                    return Err(Error::new(
                        Code::SnapshotInvalid,
                        format!("disk {disk}: {}", snapshot.describe()),
                    ));
                }
            }
        }
        Ok(())
    }

    /// The snapshots of the guest's disks.
    pub(super) fn snapshots(&self) -> &[Box<dyn Snapshot>] {
        &self.snapshots
    }

    /// A share of a COW area in use, in percent, that was seen elsewhere.
    pub(super) fn seen(&mut self, used: Option<f64>) {
        self.peak = self.peak.into_iter().chain(used).reduce(f64::max);
    }

    /// Highest share of a COW area in use that was seen, in percent.
    pub(super) fn peak(&self) -> Option<f64> {
        self.peak
    }

    /// Takes everything down, in reverse, whatever fails.
    pub(super) fn close(mut self) -> Vec<Error> {
        let mut errors = Vec::new();
        if let Some(Err(error)) = self.tree.take().map(GuestTree::close) {
            errors.push(error);
        }
        for mapped in self.mapped.drain(..).rev() {
            errors.extend(mapped.close().err());
        }
        self.claim = None;
        errors.extend(snapshot::close_all(std::mem::take(&mut self.snapshots)).err());
        errors
    }
}

/// A volume that holds a filesystem, and its name for messages.
type Probed<'a> = (&'a disk::Volume, String, Volume, Filesystem);

/// Why there are no files in a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Nothing {
    /// Something else is in it.
    Known(SkipReason),
    /// A physical volume that cannot be used as one.
    DamagedPv,
    /// Its start is blank.
    Blank,
    /// Its type says that it holds none: what a boot loader puts there has no signature.
    NotForFiles,
    /// Nobody knows what is in it.
    Unknown,
}

impl Nothing {
    fn known(reason: SkipReason, kind: &VolumeKind) -> Nothing {
        match (&reason, kind) {
            // In a logical volume it is the disk of a guest of this guest. Anywhere else it would
            // have been found, were it in order.
            (SkipReason::LvmMember, VolumeKind::Whole { .. } | VolumeKind::Partition { .. }) => {
                Nothing::DamagedPv
            }
            _ => Nothing::Known(reason),
        }
    }

    /// Whether somebody may miss it: a database without a filesystem, a filesystem that lost its
    /// superblock, or what is encrypted or a part of a set, which nobody can read from here.
    fn may_hold_files(&self) -> bool {
        match self {
            Nothing::Known(reason) => !matches!(reason, SkipReason::Swap | SkipReason::Journal(_)),
            Nothing::DamagedPv | Nothing::Unknown => true,
            Nothing::Blank | Nothing::NotForFiles => false,
        }
    }

    fn unknown(blank: bool, kind: &VolumeKind) -> Nothing {
        match kind {
            _ if blank => Nothing::Blank,
            VolumeKind::Partition { kind, .. } if NOT_FOR_FILES.contains(&kind.as_str()) => {
                Nothing::NotForFiles
            }
            _ => Nothing::Unknown,
        }
    }
}

impl std::fmt::Display for Nothing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Nothing::Known(reason) => reason.fmt(f),
            Nothing::DamagedPv => f.write_str("an LVM physical volume that cannot be read"),
            Nothing::NotForFiles => f.write_str("of a type that holds no files"),
            Nothing::Blank => f.write_str("no known content"),
            Nothing::Unknown => f.write_str("no known content, but not blank"),
        }
    }
}

/// Types of partitions that hold no files: boot loaders, what Windows reserves, and swap, which
/// may be encrypted with a new key at each start.
const NOT_FOR_FILES: [&str; 6] = [
    "0x41",
    "0x82",
    "21686148-6449-6e6f-744e-656564454649",
    "9e1a2d38-c612-4316-aa26-8b49521e5a8b",
    "e3c9e316-0b5c-4db8-817d-f92df00215ae",
    "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f",
];

/// A volume without a filesystem in the tree.
struct Closed {
    identity: VolumeIdentity,
    /// As far as it is known.
    filesystem: Filesystem,
    /// `None`: it is an error of the job already.
    reason: Option<Nothing>,
}

/// Whether the client file leaves out what a guest mounts at this path; or the subvolume of this path from the top
/// that it mounts nowhere, which only says that nobody misses it.
fn left_out(filter: &FilterSettings, path: &[u8]) -> bool {
    // `/data`, `/data/**`, or a folder above.
    let absolute = [b"/", path].concat();
    let below = [&absolute, &b"/x"[..]].concat();
    let ends = absolute.iter().enumerate().skip(1);
    let above = ends.filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
    let named = |path: &[u8]| {
        let path = std::ffi::OsStr::from_bytes(path);
        filter.skip.iter().any(|pattern| pattern.matches(path))
    };
    named(&absolute) || named(&below) || above.into_iter().any(|at| named(&absolute[..at]))
}

/// Maps one volume and looks what is in it. `Ok(Err(…))`: it holds no files.
fn probe(
    volume: &disk::Volume,
    devices: &[Device],
    how: &How<'_>,
    what: &str,
) -> Result<std::result::Result<(Volume, Filesystem), Nothing>> {
    let mapped = Volume::map(volume, devices, how)?;
    let nothing = match fs::probe(mapped.mapped.fd(), what) {
        Ok(Content::Filesystem(filesystem)) => return Ok(Ok((mapped, filesystem))),
        Ok(Content::Skip(reason)) => Ok(Nothing::known(reason, &volume.kind)),
        Ok(Content::Unknown { blank }) => Ok(Nothing::unknown(blank, &volume.kind)),
        Err(error) => Err(error),
    };
    how.close(mapped, what);
    nothing.map(Err)
}

/// Runs the filesystem's own check if the client file asks for it. Damage is an error of the job;
/// what can be read of the volume is saved all the same.
fn check(mapped: &Volume, filesystem: &Filesystem, what: &str, how: &How<'_>) -> Result<()> {
    if how.fsck == Fsck::None {
        return Ok(());
    }
    let Some(check) = fs::check::of_type(&filesystem.fstype) else {
        let text = format!("{what}: {} has no check", filesystem.fstype);
        how.reporter.message(Importance::Info, &text);
        return Ok(());
    };
    if check.needs_replay {
        let (mount, _) = DetachedMount::open(mapped.mapped.fd(), filesystem, &how.policy, what)?;
        mount.close()?;
    }
    match check.run(mapped.mapped.path(), what, how.stop) {
        Ok(notes) => how.tell(&notes),
        Err(error) if error.code() == Code::Cancelled => return Err(error),
        Err(error) => how.reporter.message(Importance::Error, &error.report()),
    }
    Ok(())
}

fn disks_text(guest: &Guest) -> String {
    guest
        .disks
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

/// Names of the devices of one volume, each written down before it is used.
struct JournalNames<'a> {
    journal: &'a Journal,
    given: Vec<Object>,
}

impl disk::Namer for JournalNames<'_> {
    fn next(&mut self) -> Result<disk::DmName> {
        let name = disk::DmName::new(self.journal.new_name())
            .ok_or_else(|| Error::new(Code::Internal, "a device name that is not valid"))?;
        let object = Object::Dm {
            name: name.to_string(),
        };
        self.journal.intend(&object)?;
        self.given.push(object);
        Ok(name)
    }
}

/// A mapped volume and what the journal says of it.
#[derive(Debug)]
struct Volume {
    mapped: Mapped,
    devices: Vec<Object>,
    journal: Arc<Journal>,
}

impl Volume {
    fn map(volume: &disk::Volume, devices: &[Device], how: &How<'_>) -> Result<Volume> {
        let journal = how.journal;
        let mut names = JournalNames {
            journal,
            given: Vec::new(),
        };
        let mapped = disk::map(volume, devices, &mut names);
        Volume::known(mapped, names, journal)
    }

    fn known(
        mapped: Result<Mapped>,
        names: JournalNames<'_>,
        journal: &Arc<Journal>,
    ) -> Result<Volume> {
        // A map that failed has undone itself, or has not: what is still there when the journal is
        // closed stays in it for the next sweep.
        Ok(Volume {
            mapped: mapped?,
            devices: names.given,
            journal: journal.clone(),
        })
    }

    fn close(self) -> Result<()> {
        self.mapped.close()?;
        self.devices.iter().for_each(|dm| self.journal.gone(dm));
        Ok(())
    }
}

/// What the guest's fstab may call a volume.
fn identity(name: &str, kind: &VolumeKind, disk_names: &[Vec<String>]) -> VolumeIdentity {
    let names = |disk: usize| disk_names.get(disk).cloned().unwrap_or_default();
    let mut identity = VolumeIdentity {
        name: name.replace('/', "-"),
        ..VolumeIdentity::default()
    };
    match kind {
        VolumeKind::Whole { disk } => identity.disk_names = names(*disk),
        VolumeKind::Partition {
            disk,
            number,
            partuuid,
            partlabel,
            ..
        } => {
            identity.disk_names = names(*disk);
            identity.partition = Some(*number);
            identity.partuuid = partuuid.clone();
            identity.partlabel = partlabel.clone().map(String::into_bytes);
        }
        VolumeKind::Lv { vg, lv, .. } => identity.lv = Some((vg.clone(), lv.clone())),
    }
    identity
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::config::pattern::Pattern;
    use crate::disk::Namer;
    use crate::fs::fstab::Line;
    use crate::guest::{DiskSource, UncoveredDisk};

    #[derive(Default)]
    struct Told(Mutex<Vec<(Importance, String)>>);

    impl Reporter for Told {
        fn message(&self, importance: Importance, message: &str) {
            self.0.lock().unwrap().push((importance, message.into()));
        }

        fn cancelled(&self) -> bool {
            false
        }
    }

    fn guest(uncovered: Vec<UncoveredDisk>, skip: &[&str]) -> OpenGuest {
        let skip = skip.iter().map(|p| Pattern::path(p).unwrap()).collect();
        OpenGuest::new(Prepared {
            guest: Guest {
                name: "web".into(),
                disks: vec![DiskSource::File("/srv/web.img".into())],
                disk_names: Vec::new(),
                uncovered,
                doubt: None,
            },
            snapshots: Vec::new(),
            prefix: b"/@guestsnap/web".to_vec(),
            consistency: Consistency::Crash,
            filter: FilterSettings {
                skip,
                ..FilterSettings::default()
            },
        })
    }

    fn line(text: &str) -> Line {
        fstab::parse(text.as_bytes()).0.remove(0)
    }

    fn missing(text: &str) -> Missing {
        Missing {
            line: line(text),
            place: None,
            why: None,
        }
    }

    fn partition(number: u32, kind: &str) -> VolumeKind {
        VolumeKind::Partition {
            disk: 0,
            number,
            kind: kind.into(),
            partuuid: None,
            partlabel: None,
        }
    }

    fn closed(number: u32, reason: Option<Nothing>) -> Closed {
        Closed {
            identity: identity(
                &format!("p{number}"),
                &partition(number, "0x83"),
                &[vec!["sda".into()]],
            ),
            filesystem: Filesystem::default(),
            reason,
        }
    }

    #[test]
    fn test_a_line_without_its_volume_is_an_error_and_keeps_its_place() {
        let mut open = guest(Vec::new(), &[]);
        let told = Told::default();
        let mut gone = missing("UUID=1 /data ext4 defaults");
        gone.place = Some(b"srv/data".to_vec());
        open.miss(&gone, 0, &[], &told);
        let told = told.0.into_inner().unwrap();
        let [(Importance::Error, text)] = &told[..] else {
            panic!("{told:?}")
        };
        assert!(text.starts_with("web: ERROR GS-507 "), "{text}");
        assert!(
            text.contains("/data (UUID=1)") && text.contains("To do: "),
            "{text}"
        );
        assert!(
            text.ends_with("Nothing of /data is in this backup."),
            "{text}"
        );
        let kept: [&[u8]; 2] = [b"/@guestsnap/web/data/", b"/@guestsnap/web/srv/data/"];
        assert_eq!(open.unread(), kept);
    }

    #[test]
    fn test_an_unread_fstab_is_an_error_and_keeps_the_guest() {
        let mut open = guest(Vec::new(), &[]);
        let told = Told::default();
        let lost = Error::new(Code::ReadFailed, "its /etc/fstab: p1: EIO");
        open.lost_fstab(&lost, &told);
        let told = told.0.into_inner().unwrap();
        let [(Importance::Error, text)] = &told[..] else {
            panic!("{told:?}")
        };
        assert!(text.starts_with("web: ERROR GS-601 "), "{text}");
        assert!(text.contains("its /etc/fstab: p1: EIO"), "{text}");
        assert_eq!(open.unread(), [b"/@guestsnap/web/"]);
    }

    #[test]
    fn test_what_is_there_and_unread_is_an_error_though_it_may_be_away() {
        let mut open = guest(Vec::new(), &["/skipped"]);
        let mut unread = |text: &str| {
            let told = Told::default();
            let missing = Missing {
                why: Some("subvolume @data: EIO".into()),
                ..missing(text)
            };
            open.miss(&missing, 1, &[], &told);
            told.0.into_inner().unwrap().remove(0)
        };
        for options in ["nofail", "noauto", "nofail,x-systemd.automount"] {
            let (importance, text) = unread(&format!("UUID=1 /data btrfs subvol=@data,{options}"));
            assert_eq!(importance, Importance::Error, "{options}");
            assert!(text.contains("subvolume @data: EIO"), "{text}");
        }
        let (importance, _) = unread("UUID=1 /skipped btrfs subvol=@data,nofail");
        assert_eq!(importance, Importance::Info);
        assert_eq!(open.unread(), [b"/@guestsnap/web/data/"]);
    }

    #[test]
    fn test_lines_that_nobody_misses_are_no_errors() {
        let volumes = [
            closed(5, Some(Nothing::Known(SkipReason::Luks))),
            closed(6, None),
            closed(7, Some(Nothing::Unknown)),
        ];
        for (text, unlisted, expected) in [
            ("UUID=1 /data ext4 defaults", 1, Importance::Error),
            ("UUID=1 /data ext4 nofail", 0, Importance::Info),
            ("/dev/sr0 /media/cdrom0 auto ro", 0, Importance::Info),
            // Left out in the client file.
            ("UUID=1 /skipped ext4", 0, Importance::Info),
            ("UUID=1 /skipped/below ext4", 0, Importance::Info),
            ("UUID=1 /empty ext4", 0, Importance::Info),
            ("UUID=1 /skip ext4", 0, Importance::Error),
            // Such a name may mean one of those that are saved as volumes of their own.
            ("/dev/sdq1 /data ext4", 1, Importance::Warning),
            ("/dev/sdq1 /data ext4", 0, Importance::Error),
            ("/dev/disk/by-id/x /data ext4", 1, Importance::Warning),
            // Encrypted; failed, and told; nobody knows what.
            ("/dev/sda5 /data ext4", 1, Importance::Error),
            ("/dev/sda5 /data ext4 nofail", 1, Importance::Info),
            ("/dev/sda6 /data ext4", 1, Importance::Info),
            ("/dev/sda7 /data ext4", 1, Importance::Error),
            ("/dev/sda7 /data ext4 nofail", 1, Importance::Error),
        ] {
            let mut open = guest(Vec::new(), &["/skipped", "/empty/**"]);
            let told = Told::default();
            open.miss(&missing(text), unlisted, &volumes, &told);
            let told = told.0.into_inner().unwrap();
            assert_eq!(told.len(), 1);
            assert_eq!(told[0].0, expected, "{told:?}");
            let kept = !open.unread().is_empty();
            assert_eq!(kept, expected == Importance::Error, "{text}");
        }
    }

    #[test]
    fn test_subvolumes_without_a_place_can_be_left_out() {
        let skips =
            |skip: &str, path: &str| left_out(&guest(Vec::new(), &[skip]).filter, path.as_bytes());
        assert!(skips("/@old", "@old") && skips("/@old", "@old/inner"));
        assert!(!skips("/@old", "@older") && !skips("/@old", "") && !skips("/@old", "a/@old"));
        for path in ["timeshift-btrfs", "timeshift-btrfs/snapshots/1/@"] {
            assert!(skips("/timeshift-btrfs/**", path));
        }
        // The top itself, and nothing in it.
        assert!(skips("/", "") && !skips("/", "@old"));
    }

    #[test]
    fn test_disks_that_are_not_covered_keep_the_guest() {
        let disk = |expected| UncoveredDisk {
            what: "vdb".into(),
            reason: "x".into(),
            expected,
        };
        assert!(guest(vec![disk(true)], &[]).unread().is_empty());
        let open = guest(vec![disk(true), disk(false)], &[]);
        assert_eq!(open.unread(), [b"/@guestsnap/web/"]);
    }

    #[test]
    fn test_what_a_volume_without_files_is() {
        let bios = "21686148-6449-6e6f-744e-656564454649";
        let lv = VolumeKind::Lv {
            vg: "vg".into(),
            lv: "db".into(),
            snapshot_of: None,
        };
        let linux = partition(1, "0x83");
        assert_eq!(Nothing::unknown(true, &linux), Nothing::Blank);
        assert_eq!(Nothing::unknown(false, &linux), Nothing::Unknown);
        assert_eq!(Nothing::unknown(false, &lv), Nothing::Unknown);
        for kind in [bios, "0x82"] {
            let kind = partition(1, kind);
            assert_eq!(Nothing::unknown(false, &kind), Nothing::NotForFiles);
        }
        let pv = |kind: &VolumeKind| Nothing::known(SkipReason::LvmMember, kind);
        assert_eq!(pv(&linux), Nothing::DamagedPv);
        assert_eq!(pv(&lv), Nothing::Known(SkipReason::LvmMember));
        let swap = Nothing::known(SkipReason::Swap, &linux);
        assert_eq!(swap, Nothing::Known(SkipReason::Swap));
        let holds = |reason| Nothing::known(reason, &linux).may_hold_files();
        assert!(!holds(SkipReason::Swap) && !Nothing::Blank.may_hold_files());
        assert!(holds(SkipReason::Luks) && holds(SkipReason::MdMember) && pv(&lv).may_hold_files());
    }

    #[test]
    fn test_devices_of_a_map_that_failed_stay_in_the_journal() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Arc::new(Journal::open(folder.path(), 7).unwrap());
        let mut names = JournalNames {
            journal: &journal,
            given: Vec::new(),
        };
        let name = names.next().unwrap().to_string();
        let failed = Err(Error::new(Code::MapFailed, "p1"));
        let error = Volume::known(failed, names, &journal).unwrap_err();
        assert_eq!(error.code(), Code::MapFailed);
        // Its undo may have failed: only the kernel knows what is there.
        let lines: Vec<String> = std::fs::read_dir(folder.path())
            .unwrap()
            .filter_map(|entry| std::fs::read_to_string(entry.unwrap().path()).ok())
            .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
            .filter(|line| line.contains(&name))
            .collect();
        assert_eq!(lines.len(), 1, "{lines:?}");
    }
}
