//! Removes leftovers of jobs that are gone, and nothing else.
//!
//! An object is removed only if one of these proves it to be ours:
//!
//! * An abandoned journal names it. A volume must then carry the tag of that very job (host, boot,
//!   process, start time, serial number), and its UUID must be the journal's if that has one.
//!   A device must have the UUID that we give.
//! * A volume carries the tag of a job whose process is gone, has the name that job gave, and is
//!   a snapshot.
//!
//! Other objects that resemble ours, or are still in use, are reported and left alone.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{Dir, FlockOperation, flock};

use super::active::{self, End};
use super::dm;
use super::fresh;
use super::journal::{self, Abandoned, Found, Object, PARTIAL, SUFFIX, UNFINISHED};
use super::lvm::{self, GROUPS, LvInfo, LvmUuid};
use super::names::{JobTag, OwnerState, TAG};
use super::remove::{HAS_SNAPSHOTS, Removal, remove_all};
use crate::error::{Code, Error, Result};
use crate::hostdev::holders::{self, Holder};
use crate::hostdev::lvname::{LvName, VgName};
use crate::hostdev::names::{PREFIX, is_our_device};
use crate::point::{Point, pass, reach};

/// Results of a sweep or dry run.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct SweepReport {
    /// Removed (in a dry run: to be removed).
    pub removed: Vec<String>,
    /// Ours but still present, with the reason: in use, or removal failed. The administrator has to
    /// act.
    pub kept: Vec<String>,
    /// Resembles ours without proof, with the reason. No action needed.
    pub alike: Vec<String>,
    /// Other notes.
    pub notes: Vec<String>,
    /// Whether this was a dry run.
    pub dry_run: bool,
}

impl SweepReport {
    /// One line per object.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        let verb = if self.dry_run {
            "would remove"
        } else {
            "removed"
        };
        let removed = self
            .removed
            .iter()
            .map(move |what| format!("{verb} {what}"));
        let left = self.kept.iter().chain(&self.alike);
        removed
            .chain(left.map(|what| format!("left alone: {what}")))
            .chain(self.notes.iter().cloned())
    }
}

/// Runs a sweep. `folder` is the journal directory; concurrent sweeps wait for each other.
pub fn sweep(folder: &Path, dry_run: bool) -> Result<SweepReport> {
    let handle = journal::open_folder(folder)?;
    // Avoids conflicts only: the sweep is safe without the lock.
    let locked =
        reach(Point::SweepLock).and_then(|()| flock(&handle, FlockOperation::LockExclusive));
    locked.map_err(|error| {
        Error::new(Code::JournalFailed, format!("locking {}", folder.display()))
            .because(std::io::Error::from(error))
    })?;
    let mut report = SweepReport {
        dry_run,
        ..SweepReport::default()
    };
    let mut journals = abandoned(folder, &handle, &mut report)?;
    pass(Point::SweepTaken);
    // Before LVM commands, which may read from these volumes.
    for (_, journal) in &mut journals {
        sweep_suspended(journal, &mut report);
    }
    // Devices first, in reverse order of creation: they are stacked on the volumes.
    let mut devices = HashSet::new();
    for (_, journal) in &mut journals {
        sweep_devices(journal, &mut devices, &mut report);
    }
    sweep_volumes(&mut journals, &devices, &mut report)?;
    for (_, journal) in &mut journals {
        sweep_activated(journal, &mut report);
        sweep_fresh(journal, &mut report);
        sweep_images(journal, &mut report);
        tell_half_restored(journal, &mut report);
    }
    for (name, journal) in journals {
        let contents = &journal.contents;
        if contents.damaged > 0 {
            report.kept.push(format!(
                "journal {name}: {} lines cannot be read; remove it by hand when nothing of {} is left",
                contents.damaged, contents.job
            ));
        } else if contents.open.is_empty() && !dry_run {
            // `journal` keeps its lock until the end of this iteration.
            let removed = reach(Point::SweepJournal)
                .map_err(std::io::Error::from)
                .and_then(|()| journal::remove_file(&handle, Path::new(&name)));
            if let Err(error) = removed {
                report.kept.push(format!("journal {name}: {error}"));
            }
        }
    }
    pass(Point::SweepDone);
    Ok(report)
}

/// Sweeps volumes by their tags alone, without journals.
pub fn sweep_by_tags(dry_run: bool) -> Result<SweepReport> {
    let mut report = SweepReport {
        dry_run,
        ..SweepReport::default()
    };
    sweep_volumes(&mut [], &HashSet::new(), &mut report)?;
    Ok(report)
}

/// Locks and returns the journals whose jobs are gone.
fn abandoned(
    path: &Path,
    folder: &OwnedFd,
    report: &mut SweepReport,
) -> Result<Vec<(String, Abandoned)>> {
    let failed = |error: rustix::io::Errno| {
        Error::new(Code::JournalFailed, format!("reading {}", path.display()))
            .because(std::io::Error::from(error))
    };
    let mut found = Vec::new();
    reach(Point::SweepRead).map_err(failed)?;
    for entry in Dir::read_from(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let Ok(name) = entry.file_name().to_str() else {
            continue;
        };
        if name.starts_with(UNFINISHED) {
            sweep_unfinished(folder, name, report);
        }
        if !name.starts_with(PREFIX) || !name.ends_with(SUFFIX) {
            continue;
        }
        match journal::take_over(folder, name) {
            Ok(Found::Busy) => {}
            Ok(Found::Unreadable(why)) => {
                let why = why.describe(&path.join(name));
                report.kept.push(format!("journal {name}: {why}"));
            }
            Ok(Found::Abandoned(journal)) => match journal.contents.job.owner().state()? {
                OwnerState::Unknown(why) => {
                    report.alike.push(format!("journal {name}: {why}"));
                }
                // Unlocked: if the process is alive, the job has ended.
                OwnerState::Alive | OwnerState::Gone => found.push((name.to_owned(), journal)),
            },
            Err(error) => report.kept.push(format!("journal {name}: {error}")),
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

/// An incomplete journal: no object was created for it.
fn sweep_unfinished(folder: &OwnedFd, name: &str, report: &mut SweepReport) {
    let gone = JobTag::is_journal_of_gone(&name[UNFINISHED.len()..]);
    if gone != Some(true) || report.dry_run {
        return;
    }
    if let Err(error) = journal::remove_file(folder, Path::new(name)) {
        report.kept.push(format!("journal {name}: {error}"));
    }
}

/// Resumes volumes that a dead job left suspended. Its wake-up should already have done so.
fn sweep_suspended(journal: &mut Abandoned, report: &mut SweepReport) {
    let contents = &mut journal.contents;
    let job = &contents.job;
    contents.open.retain(|_, object| {
        let Object::Suspended { dm_uuid, .. } = &*object else {
            return true;
        };
        let done = match dm::is_suspended(dm_uuid) {
            Ok(false) => return false,
            Ok(true) if report.dry_run => Ok("would resume"),
            Ok(true) => dm::resume(dm_uuid).map(|()| "resumed"),
            Err(error) => Err(error),
        };
        match done {
            Ok(verb) => report.notes.push(format!("{verb} {object} of {job}")),
            Err(error) => {
                let why = error.with_causes();
                report.kept.push(format!("{object} of {job}: {why}"));
                return true;
            }
        }
        report.dry_run
    });
}

/// Removes volumes that a dead rebuild has not completed: they carry its tag.
fn sweep_fresh(journal: &mut Abandoned, report: &mut SweepReport) {
    let contents = &mut journal.contents;
    let job = &contents.job;
    let tag = job.to_lvm_tag();
    contents.open.retain(|_, object| {
        let Object::Fresh { vg, name } = &*object else {
            return true;
        };
        if report.dry_run {
            report
                .removed
                .push(format!("{object} of {job}, if it carries the tag {tag}"));
            return true;
        }
        match LvName::new(vg, name).and_then(|name| fresh::remove(&name, &tag)) {
            Ok(true) => report.removed.push(format!("{object} of {job}")),
            Ok(false) => {}
            Err(error) => {
                let why = error.with_causes();
                report.kept.push(format!("{object} of {job}: {why}"));
                return true;
            }
        }
        false
    });
}

/// Removes images that a dead rebuild has not completed: their names end as no other's does.
fn sweep_images(journal: &mut Abandoned, report: &mut SweepReport) {
    let contents = &mut journal.contents;
    let job = &contents.job;
    contents.open.retain(|_, object| {
        let Object::Image { path, folder } = &*object else {
            return true;
        };
        let ours = path
            .as_os_str()
            .as_encoded_bytes()
            .ends_with(PARTIAL.as_bytes());
        let around = path.parent().and_then(|parent| parent.metadata().ok());
        if around.is_none_or(|meta| meta.dev() != *folder) {
            let text = format!("{object} of {job}: its filesystem is not mounted there");
            report.kept.push(text);
            return true;
        }
        match path.symlink_metadata() {
            Ok(meta) if ours && meta.is_file() => {}
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                report.kept.push(format!("{object} of {job}: {error}"));
                return true;
            }
            _ => return false,
        }
        if report.dry_run {
            report.removed.push(format!("{object} of {job}"));
            return true;
        }
        match std::fs::remove_file(path) {
            Ok(()) => {
                report.removed.push(format!("{object} of {job}"));
                false
            }
            Err(error) => {
                report.kept.push(format!("{object} of {job}: {error}"));
                true
            }
        }
    });
}

/// Names the guests whose disks a job was writing to when it was killed or cancelled.
fn tell_half_restored(journal: &mut Abandoned, report: &mut SweepReport) {
    let contents = &mut journal.contents;
    let job = &contents.job;
    contents.open.retain(|_, object| {
        if !matches!(object, Object::Into { .. }) {
            return true;
        }
        let text = format!("{object} of {job} did not come to its end");
        let error = Error::new(Code::HalfRestored, text);
        report.notes.push(error.report());
        report.dry_run
    });
}

/// Deactivates volumes that a dead job activated. A volume whose snapshots could not be removed
/// stays active until they are.
fn sweep_activated(journal: &mut Abandoned, report: &mut SweepReport) {
    let contents = &mut journal.contents;
    let job = &contents.job;
    let snapshots: HashSet<(VgName, String)> = contents
        .open
        .values()
        .filter_map(|object| match object {
            Object::Lv { vg, origin, .. } => Some((vg.clone(), origin.clone())),
            _ => None,
        })
        .collect();
    contents.open.retain(|_, object| {
        let Object::Activated {
            vg,
            name,
            uuid,
            dm_uuid,
        } = &*object
        else {
            return true;
        };
        // A volume active since boot was not activated by that job.
        let active = dm::by_uuid(dm_uuid).map(|device| device.is_some());
        if !job.owner().is_of_this_boot() || matches!(active, Ok(false)) {
            return false;
        }
        if snapshots.contains(&(vg.clone(), name.clone())) {
            return true;
        }
        if report.dry_run {
            let what = format!("would deactivate {vg}/{name}, which {job} activated");
            report.notes.push(what);
            return true;
        }
        pass(Point::SweepDeactivate);
        let done = LvName::within(vg.clone(), name).and_then(|lv| {
            let _turn = GROUPS.take(vg);
            active::deactivate(&lv, uuid, dm_uuid)
        });
        match done {
            Ok(End::Inactive) => {
                let what = format!("deactivated {vg}/{name}, which {job} activated");
                report.notes.push(what);
                false
            }
            Ok(End::InUse(why)) => {
                report
                    .notes
                    .push(format!("{object} of {job} stays active: {why}"));
                false
            }
            Err(error) => {
                let why = error.with_causes();
                report.kept.push(format!("{object} of {job}: {why}"));
                true
            }
        }
    });
}

/// Adds the names of removed devices to `devices`.
fn sweep_devices(journal: &mut Abandoned, devices: &mut HashSet<String>, report: &mut SweepReport) {
    let contents = &mut journal.contents;
    let job = &contents.job;
    let mut settled = Vec::new();
    for (n, object) in contents.open.iter().rev() {
        let Object::Dm { name } = object else {
            continue;
        };
        match sweep_device(name, report.dry_run) {
            Ok(Swept::Removed) => {
                report.removed.push(format!("device {name} of {job}"));
                devices.insert(name.clone());
                settled.push(*n);
            }
            Ok(Swept::Gone) => settled.push(*n),
            Ok(Swept::Alike(why)) => {
                let alike = &mut report.alike;
                alike.push(format!("device {name} of {job}: {why}"));
            }
            Err(why) => report.kept.push(format!("device {name} of {job}: {why}")),
        }
    }
    for n in settled {
        contents.open.remove(&n);
    }
}

/// Result for a device that a journal names.
enum Swept {
    /// It was ours and is removed.
    Removed,
    /// It was gone already, as most are.
    Gone,
    /// It is not proven to be ours, and why.
    Alike(String),
}

/// Removes a device. An error says why one of ours is still there.
fn sweep_device(name: &str, dry_run: bool) -> std::result::Result<Swept, String> {
    reach(Point::SweepDevice).map_err(|errno| errno.to_string())?;
    let Some(device) = dm::by_name(name).map_err(|error| error.report())? else {
        return Ok(Swept::Gone);
    };
    if !is_our_device(name, &device.uuid) {
        let why = format!("its UUID `{}` is not ours", device.uuid);
        return Ok(Swept::Alike(why));
    }
    if !dry_run {
        dm::remove(name).map_err(|error| {
            let who = holders::describe(&holders::holders(device.devno));
            format!("{}{who}", error.with_causes())
        })?;
    }
    Ok(Swept::Removed)
}

/// Decision about a volume.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Not ours, or of a running job.
    Nothing,
    /// Ours and abandoned: remove it.
    Remove(JobTag),
    /// Ours, but must stay, for this reason.
    Keep(String),
    /// Not proven to be ours, for this reason.
    Alike(String),
}

fn sweep_volumes(
    journals: &mut [(String, Abandoned)],
    devices: &HashSet<String>,
    report: &mut SweepReport,
) -> Result<()> {
    if !Path::new("/dev/mapper/control").exists() {
        // No device-mapper means no LVM volumes.
        return Ok(());
    }
    pass(Point::SweepVolumes);
    let lvs = match lvm::list() {
        // A host with image files only needs no lvm2.
        Err(error) if error.code() == Code::CommandMissing => return Ok(()),
        lvs => lvs?,
    };
    let mut doomed = Vec::new();
    let mut kept = HashSet::new();
    for lv in &lvs {
        match judge(lv, journals)? {
            Verdict::Nothing => {}
            Verdict::Remove(job) => {
                let what = format!("volume {} of {job}", lv.name);
                let holders = lv.devno.filter(|_| lv.open).map(holders::holders);
                // No visible holder means udev, briefly: the removal retries.
                if let Some(holders) = holders.filter(|all| !only_of(devices, all)) {
                    let who = holders::describe(&holders);
                    report.kept.push(format!("{what}: in use{who}"));
                    kept.insert(&lv.uuid);
                } else {
                    doomed.push((lv, what));
                }
            }
            Verdict::Keep(why) => {
                report.kept.push(format!("volume {}: {why}", lv.name));
                kept.insert(&lv.uuid);
            }
            Verdict::Alike(why) => {
                report.alike.push(format!("volume {}: {why}", lv.name));
                kept.insert(&lv.uuid);
            }
        }
    }
    let mut left = HashSet::new();
    let mut failure = None;
    if !report.dry_run && !doomed.is_empty() {
        pass(Point::SweepRemove);
        let removals = doomed
            .iter()
            .map(|(lv, _)| Removal::swept(lv.name.clone(), lv.uuid.clone()));
        if let Err(error) = remove_all(removals.collect()) {
            left.extend(lvm::list()?.into_iter().map(|lv| lv.uuid));
            failure = Some(error.with_causes());
        }
        pass(Point::SweepRemoved);
    }
    for (lv, what) in doomed {
        if left.contains(&lv.uuid) {
            kept.insert(&lv.uuid);
            let why = failure.as_deref().unwrap_or("it could not be removed");
            report.kept.push(format!("{what}: {why}"));
        } else {
            report.removed.push(what);
        }
    }
    let mut groups = Groups::default();
    for (name, journal) in journals {
        settle(name, journal, &lvs, &kept, &mut groups, report);
    }
    Ok(())
}

/// The host's volume groups and their numbers of volumes, queried on demand.
#[derive(Default)]
struct Groups(Option<std::result::Result<Vec<(String, u64)>, String>>);

impl Groups {
    /// Number of volumes in a group; `None`: no such group.
    fn volumes(&mut self, vg: &VgName) -> std::result::Result<Option<u64>, String> {
        let groups = self
            .0
            .get_or_insert_with(|| lvm::groups().map_err(|error| error.with_causes()));
        let groups = groups.as_ref().map_err(Clone::clone)?;
        Ok(groups
            .iter()
            .find(|(name, _)| name == vg.as_str())
            .map(|(_, n)| *n))
    }
}

/// Whether the only holders are devices that are, or would be, removed.
fn only_of(devices: &HashSet<String>, holders: &[Holder]) -> bool {
    let of = |holder: &Holder| matches!(holder, Holder::Device { dm_name: Some(name), .. } if devices.contains(name));
    holders.iter().all(of)
}

/// Removes entries of vanished objects from a journal.
fn settle(
    journal_name: &str,
    journal: &mut Abandoned,
    lvs: &[LvInfo],
    kept: &HashSet<&LvmUuid>,
    groups: &mut Groups,
    report: &mut SweepReport,
) {
    let contents = &mut journal.contents;
    contents.open.retain(|_, object| {
        let Object::Lv { vg, .. } = &*object else {
            return true;
        };
        if let Some(lv) = lvs.iter().find(|lv| is(lv, object)) {
            return kept.contains(&lv.uuid);
        }
        if lvs.iter().any(|lv| lv.name.vg() == vg) {
            return false;
        }
        let what = format!("journal {journal_name}: {object}");
        match groups.volumes(vg) {
            Ok(Some(0)) => false,
            // Exported, or locked by another host.
            Ok(Some(_)) => {
                report.kept.push(format!(
                    "{what}: the volumes of the group {vg} are not visible"
                ));
                true
            }
            Ok(None) => {
                report
                    .notes
                    .push(format!("{what}: there is no group {vg} any more"));
                // If the group reappears with absent disks, the tags suffice only if the process is
                // gone. Otherwise the job would count as running.
                !matches!(contents.job.owner().state(), Ok(OwnerState::Gone))
            }
            Err(why) => {
                report.kept.push(format!("{what}: {why}"));
                true
            }
        }
    });
}

/// Whether a journal entry means this volume.
fn is(lv: &LvInfo, object: &Object) -> bool {
    match object {
        Object::Lv {
            uuid: Some(uuid), ..
        } => lv.uuid.as_str() == uuid,
        Object::Lv {
            vg,
            name,
            uuid: None,
            ..
        } => lv.name.vg() == vg && lv.name.lv() == name,
        Object::Dm { .. }
        | Object::Suspended { .. }
        | Object::Activated { .. }
        | Object::Fresh { .. }
        | Object::Image { .. }
        | Object::Into { .. } => false,
    }
}

fn judge(lv: &LvInfo, journals: &[(String, Abandoned)]) -> Result<Verdict> {
    let tagged = lv.tags.iter().any(|tag| tag == TAG);
    let tag = lv.tags.iter().find_map(|tag| JobTag::from_lvm_tag(tag));
    for contents in journals.iter().map(|(_, journal)| &journal.contents) {
        if !contents.open.values().any(|object| is(lv, object)) {
            continue;
        }
        return Ok(match tag {
            // Half created or half removed, it is not a snapshot; its tag is still proof.
            Some(tag) if tagged && tag == contents.job && !has_snapshots(lv) => {
                Verdict::Remove(tag)
            }
            Some(tag) if tagged && tag == contents.job => Verdict::Keep(HAS_SNAPSHOTS.to_owned()),
            _ => Verdict::Alike(format!(
                "the journal of {} names it, but it has not the tags of that job",
                contents.job
            )),
        });
    }
    let Some(tag) = tag.filter(|_| tagged) else {
        return Ok(if tagged {
            Verdict::Alike(format!("it has the tag {TAG}, but none that names a job"))
        } else if lv.name.lv().starts_with(PREFIX) {
            Verdict::Alike("its name looks like ours, but it has not our tags".to_owned())
        } else {
            Verdict::Nothing
        });
    };
    Ok(match tag.owner().state()? {
        OwnerState::Alive => Verdict::Nothing,
        OwnerState::Unknown(why) => Verdict::Alike(why.to_owned()),
        OwnerState::Gone if !lv.is_snapshot() => {
            Verdict::Alike("it has our tags, but it is not a snapshot".to_owned())
        }
        OwnerState::Gone if !tag.is_name(lv.name.lv()) => {
            Verdict::Alike("it has our tags, but not the name that goes with them".to_owned())
        }
        OwnerState::Gone if has_snapshots(lv) => Verdict::Keep(HAS_SNAPSHOTS.to_owned()),
        OwnerState::Gone => Verdict::Remove(tag),
    })
}

/// Whether it has thick snapshots, which would be removed with it; thin ones are independent.
fn has_snapshots(lv: &LvInfo) -> bool {
    lv.role.iter().any(|role| role == "thickorigin")
}

#[cfg(test)]
mod tests;
