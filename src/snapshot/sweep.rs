//! Removing what jobs that are gone left behind, and nothing else.
//!
//! What is removed is proven to be ours in one of two ways:
//!
//! * An abandoned journal names it. A volume must then carry the tag of that very job (host, boot,
//!   process, start time, serial number), and its UUID must be the journal's if that has one.
//!   A device must have the UUID that we give.
//! * A volume carries the tag of a job whose process is gone, has the name that job gave, and is
//!   a snapshot.
//!
//! Anything else that looks like ours is reported and left alone, and so is what others still use.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Dir, FlockOperation, flock};

use super::dm;
use super::holders::{self, Holder};
use super::journal::{self, Abandoned, Object, SUFFIX, UNFINISHED};
use super::lvm::{self, LvInfo, LvmUuid};
use super::names::{DM_UUID_PREFIX, JobTag, OwnerState, PREFIX, TAG};
use super::remove::{HAS_SNAPSHOTS, Removal, remove_all};
use crate::error::{Code, Error, Result};
use crate::point::{Point, pass, reach};

/// What a sweep did or would do.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct SweepReport {
    /// Removed (or, in a dry run, to be removed).
    pub removed: Vec<String>,
    /// Ours and still there: in use, or it could not be removed; with the reason. Somebody has to look.
    pub kept: Vec<String>,
    /// Looks like ours but is not proven so, with the reason. It may stay as it is.
    pub alike: Vec<String>,
    /// What else there is to say.
    pub notes: Vec<String>,
    /// Nothing was changed.
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

/// Sweeps. `folder` is the folder of the journals; a second sweep waits for the first.
pub fn sweep(folder: &Path, dry_run: bool) -> Result<SweepReport> {
    let handle = journal::open_folder(folder)?;
    // Everything below would be safe without it; two sweeps would only be in each other's way.
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
    // Devices first, the last made first: they stand on the volumes.
    let mut devices = HashSet::new();
    for (_, journal) in &mut journals {
        sweep_devices(journal, &mut devices, &mut report);
    }
    sweep_volumes(&mut journals, &devices, &mut report)?;
    for (name, journal) in journals {
        let Some(contents) = &journal.contents else {
            continue;
        };
        if contents.damaged > 0 {
            report.kept.push(format!(
                "journal {name}: {} lines cannot be read; remove it by hand when nothing of {} is left",
                contents.damaged, contents.job
            ));
        } else if contents.open.is_empty() && !dry_run {
            // Its lock is still held: `journal` lives until the end of this turn.
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

/// Sweeps volumes alone, without any journal: what their tags prove.
pub fn sweep_by_tags(dry_run: bool) -> Result<SweepReport> {
    let mut report = SweepReport {
        dry_run,
        ..SweepReport::default()
    };
    sweep_volumes(&mut [], &HashSet::new(), &mut report)?;
    Ok(report)
}

/// The journals whose jobs are gone, with their locks.
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
            Ok(None) => {}
            Ok(Some(journal)) => match journal.contents.as_ref().map(|c| c.job.owner().state()) {
                None => report
                    .kept
                    .push(format!("journal {name}: it cannot be read")),
                Some(Ok(OwnerState::Unknown(why))) => {
                    report.alike.push(format!("journal {name}: {why}"));
                }
                // Nobody has locked it: of a process that lives, it is a job that is over.
                Some(Ok(OwnerState::Alive | OwnerState::Gone)) => {
                    found.push((name.to_owned(), journal));
                }
                Some(Err(error)) => return Err(error),
            },
            Err(error) => report.kept.push(format!("journal {name}: {error}")),
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

/// A journal that never got its name: nothing was created for it.
fn sweep_unfinished(folder: &OwnedFd, name: &str, report: &mut SweepReport) {
    let gone = JobTag::is_journal_of_gone(&name[UNFINISHED.len()..]);
    if gone != Some(true) || report.dry_run {
        return;
    }
    if let Err(error) = journal::remove_file(folder, Path::new(name)) {
        report.kept.push(format!("journal {name}: {error}"));
    }
}

/// Adds the names of what is removed to `devices`.
fn sweep_devices(journal: &mut Abandoned, devices: &mut HashSet<String>, report: &mut SweepReport) {
    let Some(contents) = &mut journal.contents else {
        return;
    };
    let job = &contents.job;
    let mut settled = Vec::new();
    for (n, object) in contents.open.iter().rev() {
        let Object::Dm { name } = object else {
            continue;
        };
        match sweep_device(name, report.dry_run) {
            Ok(true) => {
                report.removed.push(format!("device {name} of {job}"));
                devices.insert(name.clone());
                settled.push(*n);
            }
            Ok(false) => settled.push(*n),
            Err((ours, why)) => {
                let list = if ours {
                    &mut report.kept
                } else {
                    &mut report.alike
                };
                list.push(format!("device {name} of {job}: {why}"));
            }
        }
    }
    for n in settled {
        contents.open.remove(&n);
    }
}

/// Whether there was something to remove. Most devices are gone by themselves. An error says why not,
/// and whether it is ours.
fn sweep_device(name: &str, dry_run: bool) -> std::result::Result<bool, (bool, String)> {
    reach(Point::SweepDevice).map_err(|errno| (true, errno.to_string()))?;
    let device = dm::by_name(name).map_err(|error| (true, error.report()))?;
    let Some(device) = device else {
        return Ok(false);
    };
    if !name.starts_with(PREFIX) || device.uuid != format!("{DM_UUID_PREFIX}{name}") {
        return Err((false, format!("its UUID `{}` is not ours", device.uuid)));
    }
    if !dry_run {
        dm::remove(name).map_err(|error| {
            let who = holders::describe(&holders::holders(device.devno));
            (true, format!("{}{who}", error.with_causes()))
        })?;
    }
    Ok(true)
}

/// What is to be done with a volume.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Not ours, or of a job that runs.
    Nothing,
    /// Ours and abandoned: remove it.
    Remove(JobTag),
    /// Ours, but not to be removed, and why.
    Keep(String),
    /// Not proven to be ours, and why.
    Alike(String),
}

fn sweep_volumes(
    journals: &mut [(String, Abandoned)],
    devices: &HashSet<String>,
    report: &mut SweepReport,
) -> Result<()> {
    if !Path::new("/dev/mapper/control").exists() {
        // Without device-mapper there is no LVM, and there are no volumes.
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
                // With nobody to be seen it is udev, for a moment: the removal tries for a while.
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

/// The host's volume groups and how many volumes each has. LVM is asked when somebody wants to know.
#[derive(Default)]
struct Groups(Option<std::result::Result<Vec<(String, u64)>, String>>);

impl Groups {
    /// How many volumes a group has; `None`: it does not exist.
    fn volumes(&mut self, vg: &str) -> std::result::Result<Option<u64>, String> {
        let groups = self
            .0
            .get_or_insert_with(|| lvm::groups().map_err(|error| error.with_causes()));
        let groups = groups.as_ref().map_err(Clone::clone)?;
        Ok(groups.iter().find(|(name, _)| name == vg).map(|(_, n)| *n))
    }
}

/// Whether nobody but devices that go, or would go, holds a volume.
fn only_of(devices: &HashSet<String>, holders: &[Holder]) -> bool {
    let of = |holder: &Holder| matches!(holder, Holder::Device { dm_name: Some(name), .. } if devices.contains(name));
    holders.iter().all(of)
}

/// Takes out of a journal what is gone now.
fn settle(
    journal_name: &str,
    journal: &mut Abandoned,
    lvs: &[LvInfo],
    kept: &HashSet<&LvmUuid>,
    groups: &mut Groups,
    report: &mut SweepReport,
) {
    let Some(contents) = &mut journal.contents else {
        return;
    };
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
                // Should it come back, with disks that were away, the volume's tags tell enough only
                // if the process is gone: else the job is taken for one that runs.
                !matches!(contents.job.owner().state(), Ok(OwnerState::Gone))
            }
            Err(why) => {
                report.kept.push(format!("{what}: {why}"));
                true
            }
        }
    });
}

/// Whether a journal's entry means this volume.
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
        Object::Dm { .. } => false,
    }
}

fn judge(lv: &LvInfo, journals: &[(String, Abandoned)]) -> Result<Verdict> {
    let tagged = lv.tags.iter().any(|tag| tag == TAG);
    let tag = lv.tags.iter().find_map(|tag| JobTag::from_lvm_tag(tag));
    let contents = journals.iter().filter_map(|(_, j)| j.contents.as_ref());
    for contents in contents {
        if !contents.open.values().any(|object| is(lv, object)) {
            continue;
        }
        return Ok(match tag {
            // Half made or half removed, it is no snapshot; its tag tells all the same.
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

/// Thick ones, which would go with it; thin ones stand by themselves.
fn has_snapshots(lv: &LvInfo) -> bool {
    lv.role.iter().any(|role| role == "thickorigin")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::lvm::LvName;
    use crate::snapshot::lvm::tests::snapshot;

    fn lv(name: &str, tags: &[&str]) -> LvInfo {
        let mut lv = snapshot();
        lv.name = LvName::new("vg0", name).unwrap();
        lv.tags = tags.iter().map(|t| (*t).to_owned()).collect();
        lv
    }

    fn journal(job: &JobTag, object: Object) -> Vec<(String, Abandoned)> {
        let abandoned = Abandoned::for_test(job.clone(), object);
        vec![("x".to_owned(), abandoned)]
    }

    fn kept(verdict: Result<Verdict>) -> bool {
        matches!(verdict.unwrap(), Verdict::Keep(_))
    }

    fn alike(verdict: Result<Verdict>) -> bool {
        matches!(verdict.unwrap(), Verdict::Alike(_))
    }

    #[test]
    fn test_a_journal_of_a_group_that_is_gone_ends() {
        let alive = JobTag::new(1).unwrap();
        let gone = alive.gone_for_test();
        let object = |vg: &str| Object::Lv {
            vg: vg.to_owned(),
            name: alive.name(1),
            origin: "domu".to_owned(),
            uuid: None,
        };
        let groups = || Ok(vec![("empty".to_owned(), 0), ("exported".to_owned(), 2)]);
        let lvs = [lv("a", &[])];
        // The job, the group, whether the entry stays, and in how many lists it is.
        for (job, vg, stays, kept, notes) in [
            (&alive, "vg0", false, 0, 0),
            (&alive, "empty", false, 0, 0),
            (&alive, "exported", true, 1, 0),
            (&gone, "gone", false, 0, 1),
            // Nothing but the journal names what comes back.
            (&alive, "gone", true, 0, 1),
        ] {
            let mut journals = journal(job, object(vg));
            let mut report = SweepReport::default();
            let mut groups = Groups(Some(groups()));
            settle(
                "j",
                &mut journals[0].1,
                &lvs,
                &HashSet::new(),
                &mut groups,
                &mut report,
            );
            let open = &journals[0].1.contents.as_ref().unwrap().open;
            assert_eq!(open.len(), usize::from(stays), "{vg}");
            assert_eq!(
                (report.kept.len(), report.notes.len()),
                (kept, notes),
                "{vg}"
            );
        }
        // LVM does not say: nothing is taken for gone.
        let mut journals = journal(&gone, object("gone"));
        let mut report = SweepReport::default();
        let mut groups = Groups(Some(Err("no lvm".to_owned())));
        settle(
            "j",
            &mut journals[0].1,
            &lvs,
            &HashSet::new(),
            &mut groups,
            &mut report,
        );
        assert_eq!(journals[0].1.contents.as_ref().unwrap().open.len(), 1);
        assert_eq!(report.kept.len(), 1);
    }

    #[test]
    fn test_a_tagged_snapshot_goes_only_with_its_owner() {
        let alive = JobTag::new(1).unwrap();
        let gone = alive.gone_for_test();
        let (alive_tag, gone_tag) = (alive.to_lvm_tag(), gone.to_lvm_tag());
        let ours = gone.name(4);
        let judge = |lv: &LvInfo| judge(lv, &[]);
        let good = lv(&ours, &[TAG, &gone_tag]);
        assert_eq!(judge(&good).unwrap(), Verdict::Remove(gone.clone()));
        // Of an earlier boot of this host, and of its clone, which may be running.
        let [host, _, rest] = gone_tag.rsplitn(3, ':').collect::<Vec<_>>()[..] else {
            panic!("{gone_tag}");
        };
        let earlier = format!("{rest}:another-boot:{host}");
        let removed = judge(&lv(&ours, &[TAG, &earlier])).unwrap();
        assert!(matches!(removed, Verdict::Remove(_)), "{removed:?}");
        assert!(alike(judge(&lv(&ours, &[TAG, &format!("{earlier}-2")]))));
        let running = judge(&lv(&ours, &[TAG, &alive_tag]));
        assert_eq!(running.unwrap(), Verdict::Nothing);
        assert_eq!(judge(&lv("mine", &[])).unwrap(), Verdict::Nothing);
        assert!(alike(judge(&lv(&ours, &[]))));
        assert!(alike(judge(&lv(&ours, &[TAG]))));
        assert!(alike(judge(&lv(&ours, &[&gone_tag]))));
        assert!(alike(judge(&lv("mine", &[TAG, &gone_tag]))));
        assert!(alike(judge(&lv(&format!("{ours}x"), &[TAG, &gone_tag]))));
        let mut plain = good.clone();
        plain.role = vec!["public".to_owned()];
        assert!(alike(judge(&plain)));
        let origin = |role: &str| {
            let mut origin = good.clone();
            origin.role.push(role.to_owned());
            judge(&origin)
        };
        assert!(kept(origin("thickorigin")));
        assert_eq!(origin("thinorigin").unwrap(), Verdict::Remove(gone));
    }

    #[test]
    fn test_a_journal_needs_the_tags_of_its_job() {
        let job = JobTag::new(1).unwrap();
        let other = JobTag::new(1).unwrap();
        let name = job.name(1);
        let object = |uuid: Option<String>| Object::Lv {
            vg: "vg0".to_owned(),
            name: name.clone(),
            origin: "domu".to_owned(),
            uuid,
        };
        let mut half_made = lv(&name, &[TAG, &job.to_lvm_tag()]);
        half_made.role = vec!["public".to_owned()];
        let by_name = journal(&job, object(None));
        // Of a process that lives: the lock of the journal was free, so the job is over.
        assert_eq!(
            judge(&half_made, &by_name).unwrap(),
            Verdict::Remove(job.clone())
        );
        assert!(alike(judge(&lv(&name, &[]), &by_name)));
        assert!(alike(judge(
            &lv(&name, &[TAG, &other.to_lvm_tag()]),
            &by_name
        )));
        let by_uuid = journal(&job, object(Some(half_made.uuid.to_string())));
        assert_eq!(
            judge(&half_made, &by_uuid).unwrap(),
            Verdict::Remove(job.clone())
        );
        let by_other_uuid = journal(&job, object(Some("other".to_owned())));
        assert_eq!(judge(&half_made, &by_other_uuid).unwrap(), Verdict::Nothing);
    }
}
