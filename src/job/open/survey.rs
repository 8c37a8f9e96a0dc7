//! The way into a guest: its disks are examined, its volumes mapped and probed, its filesystems
//! mounted, and all joined to one tree.

use std::collections::BTreeMap;
use std::result;

use super::contents::{Closed, Nothing, hold_no_files};
use super::guest::OpenGuest;
use super::how::How;
use super::identity::Disks;
use super::losses::left_out;
use super::mapped::MappedVolume;
use crate::config::client::Fsck;
use crate::disk::{self, Examined, FileDisk, ReadAt, Skipped, SkippedKind};
use crate::error::{Code, Error, Result, escape};
use crate::fs::{
    self, BtrfsMember, Claim, Content, DetachedMount, Filesystem, GuestTree, Hints, MountedVolume,
    Note, NoteLevel, SkipReason, VolumeIdentity,
};
use crate::guest::Guest;
use crate::job::caller::Importance;
use crate::job::manifest::{
    FoundVolume, JoinedVolume, Manifest, NotCovered, SavedDisk, VolumeState,
};
use crate::job::prepare::Prepared;
use crate::kit::{self, Collected, Holds};
use crate::point::{Point, pass};
use crate::snapshot::Device;

/// Examines the guest's disks and mounts their filesystems. On an error everything is released,
/// including the snapshots.
pub(in crate::job) fn open(prepared: Prepared, how: &How<'_>) -> Result<OpenGuest> {
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
    /// Mounts the guest's filesystems. On an error the manifest may be partly filled.
    pub(in crate::job) fn mount_all(&mut self, how: &How<'_>) -> Result<()> {
        let devices: Vec<Device> = self.snapshots.iter().map(|s| s.device()).collect();
        let (disks, examined, known) = examine(&self.guest, &devices)?;
        let mut survey = Survey::new(self, how, known);
        for note in &examined.notes {
            // Warning: notes of a disk.
            survey.tell(Importance::Warning, note);
        }
        examined.skipped.iter().for_each(|s| survey.skip(s));
        let volumes = examined.volumes.iter();
        let probed = volumes.filter_map(|v| survey.probe(v, &devices)).collect();
        let probed = survey.gather_btrfs(probed);
        let (claim, probed) = survey.wait_for_btrfs(probed)?;
        survey.open.claim = Some(claim);
        let mounted: Vec<_> = probed.into_iter().filter_map(|p| survey.mount(p)).collect();
        survey.lose_failed();
        survey.describe(&examined, &disks);
        match mounted.is_empty() {
            true => survey.end_without_files(),
            false => survey.join(mounted),
        }
    }
}

/// Reads the tables and the LVM metadata of a guest's disks.
fn examine(guest: &Guest, devices: &[Device]) -> Result<(Vec<FileDisk>, Examined, Disks)> {
    let disks = devices
        .iter()
        .map(|d| FileDisk::open_up_to(&d.path, d.size))
        .collect::<Result<Vec<_>>>()?;
    let views: Vec<&dyn ReadAt> = disks.iter().map(|d| d as &dyn ReadAt).collect();
    let examined = disk::examine(&views)?;
    pass(Point::DiskExamined);
    let known = Disks::of(guest, &examined, &views);
    Ok((disks, examined, known))
}

/// A volume that holds a filesystem.
struct Probed<'a> {
    volume: &'a disk::Volume,
    mapped: MappedVolume,
    filesystem: Filesystem,
    /// The other volumes that the filesystem lies on.
    parts: Vec<(&'a disk::Volume, MappedVolume)>,
}

impl<'a> Probed<'a> {
    /// All volumes of the filesystem, the first one first.
    fn volumes(self) -> impl Iterator<Item = (&'a disk::Volume, MappedVolume)> {
        [(self.volume, self.mapped)].into_iter().chain(self.parts)
    }
}

/// A volume that could not be opened.
struct Failed<'a> {
    volume: &'a disk::Volume,
    /// Empty where it is unknown.
    filesystem: Filesystem,
    error: Error,
}

/// The state of a guest's opening.
struct Survey<'a> {
    open: &'a mut OpenGuest,
    how: &'a How<'a>,
    known: Disks,
    /// A word about each volume, for the job log.
    found: Vec<String>,
    /// Each volume, for the manifest.
    report: Vec<FoundVolume>,
    /// The error of a guest of which nothing can be opened.
    lost: Option<Code>,
    /// Volumes without a filesystem in the tree that a line of the guest's fstab may mean.
    closed: Vec<Closed>,
    failed: Vec<Failed<'a>>,
    /// Contents of the volumes, for the rebuild kit.
    holds: BTreeMap<String, Holds>,
}

impl<'a> Survey<'a> {
    fn new(open: &'a mut OpenGuest, how: &'a How<'a>, known: Disks) -> Survey<'a> {
        Survey {
            open,
            how,
            known,
            found: Vec::new(),
            report: Vec::new(),
            lost: None,
            closed: Vec::new(),
            failed: Vec::new(),
            holds: BTreeMap::new(),
        }
    }

    /// A message about the guest.
    fn tell(&self, importance: Importance, text: &str) {
        let text = format!("{}: {text}", self.open.guest.name);
        self.how.reporter.message(importance, &text);
    }

    /// The name of a volume for messages.
    fn what(&self, volume: &disk::Volume) -> String {
        format!("{}: {}", self.open.guest.name, volume.name)
    }

    /// Something on the disks cannot be reached, or need not be.
    fn skip(&mut self, skipped: &Skipped) {
        let (name, reason) = (&skipped.name, &skipped.reason);
        self.found.push(format!("{name} skipped ({reason})"));
        let kind = skipped.volume.as_ref();
        let identity = kind.map(|kind| self.known.identity(name, kind, None));
        let report = |state| FoundVolume::unreached(name, state);
        let Some(code) = skipped.kind.loss() else {
            self.report.push(report(VolumeState::skipped(reason)));
            self.closed.extend(identity.map(|identity| {
                let nothing = Nothing::Copy(reason.clone());
                Closed::new(name, identity, Some(nothing))
            }));
            return;
        };
        if self.open.unwanted(name) {
            self.report.push(report(VolumeState::skipped(reason)));
            let text = format!("{name}: {reason}; left out by `skip`");
            self.tell(Importance::Info, &text);
            return;
        }
        let error = Error::new(code, self.open.loss_text(skipped)).report();
        self.report.push(report(VolumeState::error(&error)));
        let rest = match skipped.kind {
            SkippedKind::DamagedTable => "What the table does not show is not in this backup.",
            _ => "Nothing of this volume is in this backup.",
        };
        self.tell(Importance::Error, &format!("{name}: ERROR {error}. {rest}"));
        self.open.failed_volumes = true;
        self.lost.get_or_insert(code);
        self.closed
            .extend(identity.map(|identity| Closed::new(name, identity, None)));
    }

    /// Maps a volume and looks for its filesystem. `None`: it has no files, or failed.
    fn probe(&mut self, volume: &'a disk::Volume, devices: &[Device]) -> Option<Probed<'a>> {
        let what = self.what(volume);
        let nothing = match probe(volume, devices, self.how, &what) {
            Ok(Ok((mapped, filesystem))) => {
                return Some(Probed {
                    volume,
                    mapped,
                    filesystem,
                    parts: Vec::new(),
                });
            }
            Ok(Err(nothing)) => nothing,
            Err(error) => {
                self.fail(volume, Filesystem::default(), error);
                return None;
            }
        };
        if nothing == Nothing::DamagedPv {
            let error = Error::new(Code::BadGuestLvm, format!("{what}: {nothing}"));
            self.fail(volume, Filesystem::default(), error);
            return None;
        }
        let reason = nothing.to_string();
        let holds = match nothing {
            Nothing::Known(SkipReason::Swap) => Some(Holds::Swap),
            // Boot loaders without a filesystem are areas of the disk.
            Nothing::Blank | Nothing::NotForFiles => None,
            _ => Some(Holds::Other(reason.clone())),
        };
        self.holds
            .extend(holds.map(|holds| (volume.name.clone(), holds)));
        let state = VolumeState::skipped(&reason);
        self.report.push(FoundVolume::reached(volume, state));
        self.found
            .push(format!("{} skipped ({reason})", volume.name));
        let identity = self.known.volume(volume);
        self.closed
            .push(Closed::new(&volume.name, identity, Some(nothing)));
        None
    }

    fn fail(&mut self, volume: &'a disk::Volume, filesystem: Filesystem, error: Error) {
        self.failed.push(Failed {
            volume,
            filesystem,
            error,
        });
    }

    /// Kernels before 6.7 cannot have two clones of a btrfs open: jobs take turns.
    fn wait_for_btrfs(&self, probed: Vec<Probed<'a>>) -> Result<(Claim, Vec<Probed<'a>>)> {
        let mut told = false;
        let claim = fs::claim(probed.iter().map(|probed| &probed.filesystem), &mut || {
            if !std::mem::replace(&mut told, true) {
                let text = "waiting for another job, which has a btrfs with the same id open";
                self.tell(Importance::Info, text);
            }
            (self.how.stop)()
        });
        match claim {
            Ok(claim) => Ok((claim, probed)),
            Err(error) => {
                for (volume, mapped) in probed.into_iter().flat_map(Probed::volumes) {
                    self.how.close(mapped, &self.what(volume));
                }
                Err(error)
            }
        }
    }

    /// Brings the devices of each btrfs over several of them together, below the first one. Where they are not all
    /// there, each is an error.
    fn gather_btrfs(&mut self, probed: Vec<Probed<'a>>) -> Vec<Probed<'a>> {
        let mut gathered = Vec::new();
        let mut members = Vec::new();
        for one in probed {
            if one.filesystem.fstype != "btrfs" {
                gathered.push(one);
                continue;
            }
            match BtrfsMember::read(one.mapped.mapped.fd(), &self.what(one.volume)) {
                Err(error) => self.drop_member(one, error),
                Ok(member) if member.devices == 1 => gathered.push(one),
                Ok(member) => members.push((one, member)),
            }
        }
        let (sets, incomplete) = BtrfsMember::sets(members);
        for (one, why) in incomplete {
            let text = format!("{}: {why}", self.what(one.volume));
            self.drop_member(one, Error::new(Code::UnsupportedVolume, text));
        }
        for set in sets {
            let mut set = set.into_iter();
            if let Some(mut first) = set.next() {
                first.filesystem.several = true;
                first.parts = set.map(|one| (one.volume, one.mapped)).collect();
                gathered.push(first);
            }
        }
        gathered
    }

    /// A device of a btrfs that is not opened.
    fn drop_member(&mut self, one: Probed<'a>, error: Error) {
        self.how.close(one.mapped, &self.what(one.volume));
        self.fail(one.volume, one.filesystem, error);
    }

    /// Checks a volume if that is asked for, and mounts it. `None`: it failed.
    fn mount(&mut self, probed: Probed<'a>) -> Option<MountedVolume> {
        let (volume, filesystem) = (probed.volume, probed.filesystem.clone());
        let (what, how) = (self.what(volume), self.how);
        let (volumes, maps): (Vec<_>, Vec<_>) = probed.volumes().unzip();
        self.open.torn(&volumes, &what, how.reporter);
        let opened = match &maps[..] {
            [device, more @ ..] => mount_set(device, more, &filesystem, &what, how),
            [] => return None,
        };
        let (mount, notes) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                maps.into_iter().for_each(|map| how.close(map, &what));
                self.fail(volume, filesystem, error);
                return None;
            }
        };
        self.open.mapped.extend(maps);
        for part in &volumes[1..] {
            let text = format!("a part of the btrfs on {}", volume.name);
            let state = VolumeState::skipped(&text);
            self.report.push(FoundVolume::reached(part, state));
            self.found.push(format!("{} {text}", part.name));
        }
        for note in notes {
            match note.level {
                NoteLevel::Info => log::debug!("{}", note.text),
                level => how.reporter.message(level.into(), &note.text),
            }
        }
        let holds = holds(&mount, &filesystem);
        self.holds.insert(volume.name.clone(), holds);
        let state = VolumeState::Mounted {
            filesystem: mount.fstype().to_owned(),
            uuid: filesystem.uuid.clone(),
            label: filesystem.label.as_deref().map(escape),
            options: mount.options(),
            used_bytes: mount.used(),
        };
        self.report.push(FoundVolume::reached(volume, state));
        self.found
            .push(format!("{} {}", volume.name, mount.fstype()));
        let parts = volumes[1..].iter().map(|part| self.known.volume(part));
        Some(MountedVolume {
            identity: VolumeIdentity {
                parts: parts.collect(),
                ..self.known.volume(volume)
            },
            filesystem,
            mount,
        })
    }

    /// Reports the volumes that failed.
    fn lose_failed(&mut self) {
        for failed in std::mem::take(&mut self.failed) {
            let Failed {
                volume,
                filesystem,
                error,
            } = failed;
            self.open.failed_volumes = true;
            self.lost = match error.code() {
                Code::BadGuestLvm => self.lost.or(Some(Code::BadGuestLvm)),
                code => Some(code),
            };
            self.closed.push(Closed {
                filesystem,
                ..Closed::new(&volume.name, self.known.volume(volume), None)
            });
            self.found.push(format!("{} failed", volume.name));
            let error = error.report();
            let other = Holds::Other(error.clone());
            self.holds.insert(volume.name.clone(), other);
            let state = VolumeState::error(&error);
            self.report.push(FoundVolume::reached(volume, state));
            let text = format!(
                "{}: ERROR {error}. Nothing of this volume is in this backup.",
                volume.name
            );
            self.tell(Importance::Error, &text);
        }
    }

    /// Makes the rebuild kit, without the tree. An unreadable part is an error.
    fn collect_kit(&self, examined: &Examined, disks: &[FileDisk]) -> Collected {
        let guest = &self.open.guest;
        let sources: Vec<String> = guest.disks.iter().map(ToString::to_string).collect();
        // Earlier reads may predate the replay of journals through other devices.
        disks.iter().for_each(FileDisk::forget);
        let views: Vec<&dyn ReadAt> = disks.iter().map(|d| d as &dyn ReadAt).collect();
        let mut kit = kit::collect(&guest.name, &sources, examined, &views, &self.holds);
        let uncovered = guest.uncovered.iter();
        let uncovered = uncovered.map(|disk| format!("{}: {}", disk.what, disk.reason));
        kit.kit.missing.extend(uncovered);
        for what in &kit.unread {
            let error = Error::new(Code::KitIncomplete, escape(what.as_bytes()));
            let text = format!("ERROR {}", error.report());
            self.tell(Importance::Error, &text);
        }
        kit
    }

    /// Writes the manifest, without the tree.
    fn describe(&mut self, examined: &Examined, disks: &[FileDisk]) {
        let kit = self.collect_kit(examined, disks);
        let guest = &self.open.guest;
        let disks = guest.disks.iter().zip(&examined.disks);
        let disks = disks.zip(&self.open.snapshots);
        let manifest = Manifest {
            format: Manifest::FORMAT,
            guest: guest.name.clone(),
            job_id: self.how.job_id,
            consistency: self.open.consistency.to_string(),
            disks: disks
                .map(|((source, contents), snapshot)| SavedDisk {
                    source: source.to_string(),
                    bytes: snapshot.device().size,
                    snapshot: snapshot.describe(),
                    contents: contents.clone(),
                })
                .collect(),
            not_covered: guest
                .uncovered
                .iter()
                .map(|disk| NotCovered {
                    disk: disk.what.clone(),
                    reason: disk.reason.clone(),
                })
                .collect(),
            groups: examined.groups.clone(),
            volumes: std::mem::take(&mut self.report),
            decisions: Vec::new(),
            tree: Vec::new(),
            notes: examined.notes.clone(),
            not_rebuilt: kit.kit.missing.clone(),
        };
        self.open.manifest = Some(manifest);
        self.open.kit = Some(kit);
    }

    /// Nothing is mounted. That is no error if no volume can hold files.
    fn end_without_files(self) -> Result<()> {
        let known = |c: &Closed| match &c.reason {
            Some(Nothing::Known(reason)) => reason.may_hold_files(),
            _ => false,
        };
        let encrypted = self.closed.iter().any(known);
        let lost = self.lost.or(encrypted.then_some(Code::UnsupportedVolume));
        let found = self.found.join(", ");
        if lost.is_none() && hold_no_files(&self.closed) {
            // The job before may have found files.
            self.open.failed_volumes = true;
            self.open.tree = Some(GuestTree::assemble(Vec::new())?);
            let text = format!("its disks hold no files: {found}");
            self.tell(Importance::Info, &text);
            return Ok(());
        }
        let found = match self.found.is_empty() {
            true => "nothing known",
            false => &found,
        };
        let disks = self.open.guest.disks.iter().map(ToString::to_string);
        let disks = disks.collect::<Vec<_>>().join(", ");
        Err(Error::new(
            lost.unwrap_or(Code::NoContent),
            format!("{disks}: {found}"),
        ))
    }

    /// Joins the filesystems to one tree, and reports lines and filesystems that do not match.
    fn join(self, mounted: Vec<MountedVolume>) -> Result<()> {
        let (how, reporter) = (self.how, self.how.reporter);
        self.open.volumes = mounted.iter().map(|v| v.identity.key.clone()).collect();
        let closed = self.closed.iter();
        let hints = Hints {
            root: how.root.clone(),
            before: how.before.clone(),
            places: self.open.guest.places.clone(),
            closed: closed
                .filter(|c| c.reason.as_ref().is_none_or(Nothing::may_hold_files))
                .map(|c| (c.identity.clone(), c.filesystem.clone()))
                .collect(),
            make: false,
        };
        let tree = GuestTree::assemble_with(mounted, &hints, how.stop)?;
        pass(Point::GuestOpened);
        let mut notes = tree.notes().to_vec();
        notes.extend(tree.placeless(|path| left_out(&self.open.filter, path)));
        for Note { level, text } in &notes {
            self.tell((*level).into(), text);
        }
        self.tell(Importance::Info, &self.found.join(", "));
        let (open, closed) = (self.open, self.closed);
        let mut decisions: Vec<String> = notes.into_iter().map(|n| n.text).collect();
        decisions.extend(tree.unread_fstab().map(|e| open.lost_fstab(e, reporter)));
        decisions.extend(tree.unsure().map(|e| open.unsure_root(e, reporter)));
        let mut named = Vec::new();
        for missing in tree.missing() {
            let (text, volume) = open.miss(missing, tree.unlisted(), &closed, reporter);
            decisions.push(text);
            named.extend(volume);
        }
        open.tell_closed(&closed, &named, reporter);
        if let Some(manifest) = &mut open.manifest {
            manifest.decisions = decisions;
            manifest.tree = tree.joins().iter().map(JoinedVolume::of).collect();
        }
        if let Some(kit) = &mut open.kit {
            kit.place(tree.joins());
            if let Some(manifest) = &mut open.manifest {
                manifest.not_rebuilt = kit.kit.missing.clone();
            }
        }
        open.tree = Some(tree);
        Ok(())
    }
}

/// Contents of a mounted volume, for the rebuild kit.
fn holds(mount: &DetachedMount, filesystem: &Filesystem) -> Holds {
    Holds::Files {
        fstype: filesystem.fstype.clone(),
        label: filesystem.label.clone(),
        btrfs: mount.top().map(|top| kit::subvolumes(top, mount.root())),
    }
}

/// Maps one volume and probes its contents. `Ok(Err(…))`: it holds no files.
fn probe(
    volume: &disk::Volume,
    devices: &[Device],
    how: &How<'_>,
    what: &str,
) -> Result<result::Result<(MappedVolume, Filesystem), Nothing>> {
    let mapped = MappedVolume::map(volume, devices, how.journal, how.stop)?;
    let nothing = match fs::probe(mapped.mapped.fd(), what) {
        Ok(Content::Filesystem(filesystem)) => return Ok(Ok((mapped, filesystem))),
        Ok(Content::Skip(reason)) => Ok(Nothing::known(reason, &volume.kind)),
        Ok(Content::Unknown { blank }) => Ok(Nothing::unknown(blank, &volume.kind)),
        Err(error) => Err(error),
    };
    how.close(mapped, what);
    nothing.map(Err)
}

/// Checks a filesystem if that is asked for, and mounts it with all its devices.
fn mount_set(
    device: &MappedVolume,
    more: &[MappedVolume],
    filesystem: &Filesystem,
    what: &str,
    how: &How<'_>,
) -> Result<(DetachedMount, Vec<Note>)> {
    check(device, filesystem, what, how)?;
    let others: Vec<_> = more.iter().map(|part| part.mapped.fd()).collect();
    let first = device.mapped.fd();
    let opened = DetachedMount::open_set(first, &others, filesystem, &how.policy, what)?;
    let mut volumes = [device].into_iter().chain(more);
    volumes.try_for_each(|volume| volume.mapped.check_labels())?;
    Ok(opened)
}

/// Runs the filesystem's own check if the client file asks for it. Damage is an error of the job; the
/// readable files of the volume are saved nevertheless.
fn check(mapped: &MappedVolume, filesystem: &Filesystem, what: &str, how: &How<'_>) -> Result<()> {
    if how.fsck == Fsck::None {
        return Ok(());
    }
    if filesystem.several {
        // Its tool looks for the other devices among those of the host.
        let text = format!("{what}: a btrfs over several devices is not checked");
        // Warning: set not checked.
        how.reporter.message(Importance::Warning, &text);
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
