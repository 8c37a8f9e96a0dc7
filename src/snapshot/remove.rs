//! Removes snapshot volumes, several with one command.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::active::Activated;
use super::command::Program;
use super::dm;
use super::journal::Intent;
use super::lvm::{GROUPS, LvmUuid, lvm};
use crate::error::{Code, Error, Result};
use crate::hostdev::holders;
use crate::hostdev::lvname::{LvName, VgName};
use crate::point::{Point, pass, reach};

/// Retry limit for "in use": udev briefly opens devices it is notified of.
const PATIENCE: Duration = Duration::from_secs(10);
/// Wait between two attempts; `lvremove` also waits.
const PAUSE: Duration = Duration::from_millis(250);

/// Why a volume of ours is not removed.
pub(super) const HAS_SNAPSHOTS: &str =
    "others made thick snapshots of it, which would go with it; remove those first";

/// A snapshot volume to remove. Identified by its UUID, or by name and the job's tag. A volume that
/// only has the name is never touched.
#[derive(Debug)]
pub struct Removal {
    name: LvName,
    identity: Identity,
    /// Settled when the volume is gone; `None` for the sweep, which settles entries itself.
    intent: Option<Intent>,
    /// Keeps the origin active until the removal.
    activated: Option<Activated>,
}

#[derive(Debug)]
enum Identity {
    Uuid(LvmUuid),
    JobTag(String),
}

impl Removal {
    /// For a volume that we created and verified.
    pub(super) fn verified(
        name: LvName,
        uuid: LvmUuid,
        intent: Intent,
        activated: Option<Activated>,
    ) -> Self {
        Removal {
            name,
            identity: Identity::Uuid(uuid),
            intent: Some(intent),
            activated,
        }
    }

    /// For a volume that may not have been created.
    pub(super) fn unverified(
        name: LvName,
        job_tag: String,
        intent: Intent,
        activated: Option<Activated>,
    ) -> Self {
        Removal {
            name,
            identity: Identity::JobTag(job_tag),
            intent: Some(intent),
            activated,
        }
    }

    /// For a volume that the sweep has proven to be ours and abandoned.
    pub(super) fn swept(name: LvName, uuid: LvmUuid) -> Self {
        Removal {
            name,
            identity: Identity::Uuid(uuid),
            intent: None,
            activated: None,
        }
    }

    /// Extracts the origin's activation, for another snapshot of it.
    pub(super) fn take_activated(&mut self) -> Option<Activated> {
        self.activated.take()
    }

    /// LVM selection expression.
    fn selection(&self) -> String {
        match &self.identity {
            Identity::Uuid(uuid) => format!("lv_uuid=\"{uuid}\""),
            Identity::JobTag(tag) => {
                format!("(lv_name=\"{}\" && lv_tags={{\"{tag}\"}})", self.name.lv())
            }
        }
    }

    /// Call this after a successful `lvremove`: the volume is gone unless [`selection`] excluded
    /// it.
    fn settle(mut self) -> Result<()> {
        let failed = |why| {
            Err(Error::new(
                Code::ReleaseFailed,
                format!("{}: {why}", self.name),
            ))
        };
        let device = dm::by_name(&self.name.dm_name())?;
        if let Some(device) = device.filter(|device| self.may_be(device)) {
            // The device below the origin of a thick snapshot.
            return match dm::by_uuid(&format!("{}-real", device.uuid))? {
                Some(_) => failed(HAS_SNAPSHOTS),
                None => failed("lvremove reported no failure, and it is still there"),
            };
        }
        if let Some(intent) = self.intent.take() {
            intent.removed();
        }
        self.activated.take().map_or(Ok(()), Activated::close)
    }

    /// Whether the device is this volume; the name alone is not enough.
    fn may_be(&self, device: &dm::Info) -> bool {
        match &self.identity {
            Identity::Uuid(uuid) => device.uuid.ends_with(&uuid.compact()),
            Identity::JobTag(_) => true,
        }
    }
}

/// Removes the volumes, normally with one command per group. Failures stay in the journal; the
/// error names them with their holders.
pub(super) fn remove_all(removals: Vec<Removal>) -> Result<()> {
    let mut groups: BTreeMap<VgName, Vec<Removal>> = BTreeMap::new();
    for removal in removals {
        let vg = removal.name.vg().clone();
        groups.entry(vg).or_default().push(removal);
    }
    let mut failures = Vec::new();
    for (vg, removals) in groups {
        let started = Instant::now();
        match run(&vg, &removals, false) {
            Ok(()) => failures.extend(removals.into_iter().filter_map(|r| r.settle().err())),
            Err(error) => {
                log::debug!("{error}");
                // One at a time from here: a volume in use keeps lvremove from committing the
                // others' removal.
                for removal in removals {
                    failures.extend(remove_one(removal, started, false).err());
                }
            }
        }
    }
    super::all_failed(failures)
}

/// Removes one volume; the caller holds the group's lock.
pub(super) fn remove_locked(removal: Removal) -> Result<()> {
    remove_one(removal, Instant::now(), true)
}

fn remove_one(removal: Removal, started: Instant, locked: bool) -> Result<()> {
    let error = loop {
        match run(removal.name.vg(), std::slice::from_ref(&removal), locked) {
            Ok(()) => return removal.settle(),
            Err(error) if started.elapsed() >= PATIENCE || error.code() != Code::CommandFailed => {
                break error;
            }
            Err(error) => log::debug!("{error}"),
        }
        sleep(PAUSE);
    };
    let holders = match dm::by_name(&removal.name.dm_name()) {
        Ok(Some(info)) => holders::describe(&holders::holders(info.devno)),
        Ok(None) | Err(_) => String::new(),
    };
    let what = format!("{}{holders}", removal.name);
    Err(Error::new(Code::ReleaseFailed, what).because(error))
}

/// LVM selection for these volumes, except those with thick snapshots made by others, which
/// `lvremove` would remove without asking. LVM evaluates it under the group's lock.
fn selection(removals: &[Removal]) -> String {
    let each: Vec<String> = removals.iter().map(Removal::selection).collect();
    format!("({}) && lv_role!={{\"thickorigin\"}}", each.join(" || "))
}

fn run(vg: &VgName, removals: &[Removal], locked: bool) -> Result<()> {
    let _lock = (!locked).then(|| GROUPS.take(vg));
    reach(Point::Lvremove)
        .map_err(|errno| Error::new(Code::CommandFailed, "lvremove").because(errno))?;
    // Success includes no match.
    lvm(Program::Lvremove)
        .args(["--yes", "--select", &selection(removals), vg.as_str()])
        .run()
        .map(|_| pass(Point::LvremoveDone))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::lvm::tests::snapshot;

    #[test]
    fn test_snapshots_that_others_made_of_ours_are_not_taken_along() {
        let lv = snapshot();
        let one = Removal::swept(lv.name.clone(), lv.uuid.clone());
        let named = Removal {
            identity: Identity::JobTag("guestsnap.job=1".to_owned()),
            ..Removal::swept(lv.name, lv.uuid)
        };
        assert_eq!(
            selection(&[one, named]),
            "(lv_uuid=\"czMlG0-ZF7q-0XKn-Q3DF-Se3f-9WOh-wYdaa9\" || \
             (lv_name=\"s1\" && lv_tags={\"guestsnap.job=1\"})) && lv_role!={\"thickorigin\"}"
        );
    }
}
