//! Removing what jobs that are gone left behind, and nothing else.
//!
//! An LV goes when it carries our tag and an owner's tag, *and* our kind of name, *and* is a
//! snapshot, *and* its owner (process, start time, boot) is gone. A device goes when its name and
//! UUID are ours and its owner is gone by a journal. Everything else is reported at most.

use std::fs;
use std::path::Path;

use devicemapper::{DM, DevId, DmName, DmOptions};
use nix::fcntl::{Flock, FlockArg};

use super::journal::{self, JobTag, NAME_PREFIX, Object, TAG};
use super::lvm::{self, LvInfo};
use super::lvsnap;
use crate::error::{Code, Error, Result};

/// Starts the UUID of every device-mapper device of ours.
pub const DM_UUID_PREFIX: &str = "GUESTSNAP-";

/// What a sweep did or would do.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct SweepReport {
    /// Removed (or, in a dry run, to be removed).
    pub removed: Vec<String>,
    /// Looks like ours but is not proven so, or could not be removed; with the reason.
    pub kept: Vec<String>,
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
        removed.chain(self.kept.iter().map(|what| format!("left alone: {what}")))
    }
}

/// Sweeps. `folder` is the journal folder; only one sweep runs at a time.
pub fn sweep(folder: &Path, dry_run: bool) -> Result<SweepReport> {
    let handle = journal::open_folder(folder)?;
    let _lock = Flock::lock(handle, FlockArg::LockExclusive).map_err(|(_, e)| {
        Error::new(Code::JournalFailed, format!("{}: lock", folder.display())).because(e)
    })?;
    let mut report = SweepReport {
        dry_run,
        ..SweepReport::default()
    };
    let journals = abandoned(folder, &mut report)?;
    let mut clean = true;
    // Devices first: they stand on the snapshots.
    for object in journals.iter().flat_map(|(_, objects)| objects) {
        if let Object::Dm { name } = object {
            clean &= sweep_device(name, &mut report);
        }
    }
    if std::path::Path::new("/dev/mapper/control").exists() {
        for lv in lvm::list()? {
            clean &= sweep_lv(&lv, &mut report);
        }
    }
    if clean && !dry_run {
        for (path, _) in journals {
            if let Err(error) = fs::remove_file(&path) {
                report.kept.push(format!("{}: {error}", path.display()));
            }
        }
    }
    Ok(report)
}

type Abandoned = Vec<(std::path::PathBuf, Vec<Object>)>;

/// The journals whose owner is gone.
fn abandoned(folder: &Path, report: &mut SweepReport) -> Result<Abandoned> {
    let failed = |e| Error::new(Code::JournalFailed, folder.display().to_string()).because(e);
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_none_or(|e| e != "journal") {
            continue;
        }
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            // Its job ended in this moment.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(error)),
        };
        match journal::read(&text) {
            Some((owner, _)) if owner.owner_lives() => {}
            Some((_, objects)) => found.push((path, objects)),
            None => report
                .kept
                .push(format!("{}: not a journal of ours", path.display())),
        }
    }
    Ok(found)
}

/// `false`: something of ours is left.
fn sweep_lv(lv: &LvInfo, report: &mut SweepReport) -> bool {
    let name = format!("{}/{}", lv.vg, lv.lv);
    let tagged = lv.tags.iter().any(|t| t == TAG);
    let named = lv.lv.starts_with(NAME_PREFIX);
    if !tagged && !named {
        return true;
    }
    let Some(owner) = lv.tags.iter().find_map(|t| JobTag::from_lvm_tag(t)) else {
        report.kept.push(format!("LV {name}: no owner's tag"));
        return true;
    };
    if !tagged || !named || lv.origin.is_none() {
        report.kept.push(format!(
            "LV {name}: not a snapshot of ours, though its tags or name say so"
        ));
        return true;
    }
    if owner.owner_lives() {
        return true;
    }
    let what = format!(
        "LV {name} of job {} (process {} is gone)",
        owner.job_id, owner.pid
    );
    if report.dry_run {
        report.removed.push(what);
        return true;
    }
    match lvsnap::remove_named(&name) {
        Ok(()) => {
            report.removed.push(what);
            true
        }
        Err(error) => {
            report.kept.push(format!("{what}: {}", error.report()));
            false
        }
    }
}

/// `false`: something of ours is left. Most devices are gone by themselves: their removal was
/// armed when they were made.
fn sweep_device(name: &str, report: &mut SweepReport) -> bool {
    let Ok(id) = DmName::new(name) else {
        return true;
    };
    let Ok(dm) = DM::new() else { return true };
    let Ok(info) = dm.device_info(&DevId::Name(id)) else {
        return true;
    };
    let ours = info
        .uuid()
        .is_some_and(|u| u.to_string().starts_with(DM_UUID_PREFIX));
    if !ours || !name.starts_with(NAME_PREFIX) {
        report.kept.push(format!(
            "device {name}: in a journal of ours, but its UUID is not ours"
        ));
        return true;
    }
    if !report.dry_run {
        if let Err(error) = dm.device_remove(&DevId::Name(id), DmOptions::default()) {
            report.kept.push(format!("device {name}: {error}"));
            return false;
        }
    }
    report.removed.push(format!("device {name}"));
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lv(name: &str, tags: &[&str], origin: Option<&str>) -> LvInfo {
        LvInfo {
            vg: "vg0".into(),
            lv: name.into(),
            uuid: String::new(),
            size: 1,
            attr: "swi-a-s---".into(),
            origin: origin.map(str::to_owned),
            pool: None,
            tags: tags.iter().map(|t| (*t).to_owned()).collect(),
            devno: None,
        }
    }

    #[test]
    fn test_only_proven_leftovers_are_removed() {
        let alive = JobTag::new(1).unwrap();
        let dead = JobTag {
            start: alive.start + 1,
            ..alive.clone()
        };
        let (alive, dead) = (alive.lvm_tag(), dead.lvm_tag());
        let ours = "guestsnap-1-2.3-4";
        let decide = |lv: &LvInfo| {
            let mut report = SweepReport {
                dry_run: true,
                ..SweepReport::default()
            };
            sweep_lv(lv, &mut report);
            (report.removed.len(), report.kept.len())
        };
        assert_eq!(decide(&lv(ours, &[TAG, &dead], Some("o"))), (1, 0));
        assert_eq!(decide(&lv(ours, &[TAG, &alive], Some("o"))), (0, 0));
        assert_eq!(decide(&lv(ours, &[TAG, &dead], None)), (0, 1));
        assert_eq!(decide(&lv(ours, &[TAG], Some("o"))), (0, 1));
        assert_eq!(decide(&lv(ours, &[], Some("o"))), (0, 1));
        assert_eq!(decide(&lv("mine", &[TAG, &dead], Some("o"))), (0, 1));
        assert_eq!(decide(&lv("mine", &[], Some("o"))), (0, 0));
    }
}
