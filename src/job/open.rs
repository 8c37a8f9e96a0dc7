//! From snapshots to one tree: tables, guest LVM, mapping, mounting. Undone in reverse.

use std::sync::Arc;

use serde_json::json;

use super::prepare::Prepared;
use super::{Importance, Reporter};
use crate::config::client::Fsck;
use crate::disk::{self, FileDisk, Mapped, ReadAt, SkippedKind, VolumeKind};
use crate::error::{Code, Error, Result, escape};
use crate::fs::{
    self, Claim, Content, DetachedMount, Filesystem, FsPolicy, GuestTree, MountedVolume, Note,
    NoteLevel, VolumeIdentity,
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
    /// Volumes that hold files but could not be opened.
    failed_volumes: bool,
    peak: Option<f64>,
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
        } = prepared;
        OpenGuest {
            guest,
            prefix,
            consistency,
            tree: None,
            mapped: Vec::new(),
            claim: None,
            snapshots,
            manifest: json!({}),
            failed_volumes: false,
            peak: None,
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
        for skipped in &examined.skipped {
            found.push(format!("{} skipped ({})", skipped.name, skipped.reason));
            report.push(json!({ "volume": skipped.name, "skipped": skipped.reason }));
            // A volume of a group may hold files, whatever keeps it from being read.
            if skipped.kind == SkippedKind::LogicalVolume {
                self.failed_volumes = true;
                let error = Error::new(Code::UnsupportedVolume, skipped.reason.clone());
                let text = format!(
                    "{name}: {}: ERROR {}. Nothing of this volume is in this backup.",
                    skipped.name,
                    error.report()
                );
                reporter.message(Importance::Error, &text);
            }
        }
        let mut failed = Vec::new();
        let mut probed = Vec::new();
        for volume in &examined.volumes {
            let what = format!("{name}: {}", volume.name);
            match probe(volume, &devices, how.journal, &what) {
                Ok(Ok((mapped, filesystem))) => probed.push((volume, what, mapped, filesystem)),
                Ok(Err(reason)) => {
                    report.push(json!({
                        "volume": volume.name,
                        "kind": volume.kind,
                        "bytes": volume.size(),
                        "skipped": reason,
                    }));
                    found.push(format!("{} skipped ({reason})", volume.name));
                }
                Err(error) => failed.push((volume, what, error)),
            }
        }
        match self.wait_for_btrfs(&probed, how) {
            Ok(claim) => self.claim = Some(claim),
            Err(error) => {
                for (_, _, mapped, _) in probed {
                    mapped.close()?;
                }
                return Err(error);
            }
        }
        let mut mounted = Vec::new();
        for (volume, what, mapped, filesystem) in probed {
            match self.mount(volume, mapped, filesystem, &what, how) {
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
                Err(error) => failed.push((volume, what, error)),
            }
        }
        for (volume, what, error) in failed {
            self.failed_volumes = true;
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
            let code = match self.failed_volumes {
                true => Code::MountFailed,
                false => Code::NoContent,
            };
            return Err(Error::new(
                code,
                format!("{}: {found}", disks_text(&self.guest)),
            ));
        }
        let tree = GuestTree::assemble(mounted)?;
        pass(Point::GuestOpened);
        how.tell(
            &tree
                .notes()
                .iter()
                .map(|note| Note {
                    level: note.level,
                    text: format!("{name}: {}", note.text),
                })
                .collect::<Vec<_>>(),
        );
        reporter.message(Importance::Info, &format!("{name}: {}", found.join(", ")));
        let decisions = tree.notes().iter().map(|note| note.text.as_str());
        self.manifest["decisions"] = json!(decisions.collect::<Vec<_>>());
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
                mapped.close()?;
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
            identity: identity(volume),
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

    /// Catalog trees of volumes that failed to open: which paths they held is not known, so
    /// nothing of the guest may count as deleted.
    pub(super) fn unread(&self) -> Option<Vec<u8>> {
        self.failed_volumes
            .then(|| self.catalog_path(b"").into_iter().chain([b'/']).collect())
    }

    /// Whether all snapshots are still valid; to be asked after the last byte was read.
    pub(super) fn check(&mut self) -> Result<()> {
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

/// Maps one volume and looks what is in it. `Ok(Err(reason))`: it holds no files.
fn probe(
    volume: &disk::Volume,
    devices: &[Device],
    journal: &Arc<Journal>,
    what: &str,
) -> Result<std::result::Result<(Volume, Filesystem), String>> {
    let mapped = Volume::map(volume, devices, journal)?;
    match fs::probe(mapped.mapped.fd(), what) {
        Ok(Content::Filesystem(filesystem)) => Ok(Ok((mapped, filesystem))),
        Ok(other) => {
            mapped.close()?;
            Ok(Err(match other {
                Content::Skip(reason) => reason.to_string(),
                _ => "no known content".to_owned(),
            }))
        }
        Err(error) => {
            mapped.close()?;
            Err(error)
        }
    }
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
    fn map(volume: &disk::Volume, devices: &[Device], journal: &Arc<Journal>) -> Result<Volume> {
        let mut names = JournalNames {
            journal,
            given: Vec::new(),
        };
        let mapped = disk::map(volume, devices, &mut names);
        let devices = names.given;
        match mapped {
            Ok(mapped) => Ok(Volume {
                mapped,
                devices,
                journal: journal.clone(),
            }),
            Err(error) => {
                // A map that failed has undone itself.
                for object in &devices {
                    journal.gone(object)?;
                }
                Err(error)
            }
        }
    }

    fn close(self) -> Result<()> {
        self.mapped.close()?;
        for object in &self.devices {
            self.journal.gone(object)?;
        }
        Ok(())
    }
}

/// What the guest's fstab may call a volume.
fn identity(volume: &disk::Volume) -> VolumeIdentity {
    let mut identity = VolumeIdentity {
        name: volume.name.replace('/', "-"),
        ..VolumeIdentity::default()
    };
    match &volume.kind {
        VolumeKind::Whole { disk } => identity.disk = *disk,
        VolumeKind::Partition {
            disk,
            number,
            partuuid,
            partlabel,
            ..
        } => {
            identity.disk = *disk;
            identity.partition = Some(*number);
            identity.partuuid = partuuid.clone();
            identity.partlabel = partlabel.clone().map(String::into_bytes);
        }
        VolumeKind::Lv { vg, lv, .. } => identity.lv = Some((vg.clone(), lv.clone())),
    }
    identity
}
