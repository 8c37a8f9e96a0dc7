//! Removing snapshot volumes, several in one command.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::command::Program;
use super::journal::Intent;
use super::lvm::{GROUPS, LvName, LvmUuid, lvm};
use super::{dm, holders};
use crate::error::{Code, Error, Result};
use crate::point::{Point, pass, reach};

/// How long "in use" is tried again: udev opens what it hears of for a moment.
const PATIENCE: Duration = Duration::from_secs(10);
/// The wait between two tries; `lvremove` waits some time itself.
const PAUSE: Duration = Duration::from_millis(250);

/// Why a volume of ours is not removed.
pub(super) const HAS_SNAPSHOTS: &str =
    "others made thick snapshots of it, which would go with it; remove those first";

/// A snapshot volume on its way out. It is found by what nobody else has: its UUID, or a name and
/// the job's tag. A volume that merely has the name is never touched.
#[derive(Debug)]
pub struct Removal {
    name: LvName,
    identity: Identity,
    /// Settled when the volume is gone; `None` for the sweep, which settles by itself.
    intent: Option<Intent>,
}

#[derive(Debug)]
enum Identity {
    Uuid(LvmUuid),
    JobTag(String),
}

impl Removal {
    /// A volume we created and looked at.
    pub(super) fn verified(name: LvName, uuid: LvmUuid, intent: Intent) -> Self {
        Removal {
            name,
            identity: Identity::Uuid(uuid),
            intent: Some(intent),
        }
    }

    /// A volume that may or may not have come into being.
    pub(super) fn unverified(name: LvName, job_tag: String, intent: Intent) -> Self {
        Removal {
            name,
            identity: Identity::JobTag(job_tag),
            intent: Some(intent),
        }
    }

    /// A volume that the sweep has proven to be ours and abandoned.
    pub(super) fn swept(name: LvName, uuid: LvmUuid) -> Self {
        Removal {
            name,
            identity: Identity::Uuid(uuid),
            intent: None,
        }
    }

    /// In the language of LVM's selections.
    fn selection(&self) -> String {
        match &self.identity {
            Identity::Uuid(uuid) => format!("lv_uuid=\"{uuid}\""),
            Identity::JobTag(tag) => {
                format!("(lv_name=\"{}\" && lv_tags={{\"{tag}\"}})", self.name.lv())
            }
        }
    }

    /// `lvremove` reported no failure: the volume is gone, unless it is one that [`selection`] leaves out.
    fn settle(self) -> Result<()> {
        let failed = |why| {
            Err(Error::new(
                Code::ReleaseFailed,
                format!("{}: {why}", self.name),
            ))
        };
        let device = dm::by_name(&self.name.dm_name())?;
        if let Some(device) = device.filter(|device| self.may_be(device)) {
            // What the kernel has below the origin of a thick snapshot.
            return match dm::by_uuid(&format!("{}-real", device.uuid))? {
                Some(_) => failed(HAS_SNAPSHOTS),
                None => failed("lvremove reported no failure, and it is still there"),
            };
        }
        if let Some(intent) = self.intent {
            intent.removed();
        }
        Ok(())
    }

    /// The name alone could be another volume's by now.
    fn may_be(&self, device: &dm::Info) -> bool {
        match &self.identity {
            Identity::Uuid(uuid) => device.uuid.ends_with(&uuid.compact()),
            Identity::JobTag(_) => true,
        }
    }
}

/// Removes the volumes: one command per group if all goes well. What cannot be removed stays in the
/// journal and is named in the error, with who holds it.
pub(super) fn remove_all(removals: Vec<Removal>) -> Result<()> {
    let mut groups: BTreeMap<String, Vec<Removal>> = BTreeMap::new();
    for removal in removals {
        let vg = removal.name.vg().to_owned();
        groups.entry(vg).or_default().push(removal);
    }
    let mut failures = Vec::new();
    for (vg, removals) in groups {
        let started = Instant::now();
        match run(&vg, &removals) {
            Ok(()) => failures.extend(removals.into_iter().filter_map(|r| r.settle().err())),
            Err(error) => {
                log::debug!("{error}");
                // One by one from here: one volume in use keeps lvremove from writing down that
                // the others are gone.
                for removal in removals {
                    failures.extend(remove_one(removal, started).err());
                }
            }
        }
    }
    super::all_failed(failures)
}

fn remove_one(removal: Removal, started: Instant) -> Result<()> {
    let error = loop {
        match run(removal.name.vg(), std::slice::from_ref(&removal)) {
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

/// For LVM: these volumes, but none that others made thick snapshots of: `lvremove` takes those along without
/// a question. LVM looks while it holds the lock of the group.
fn selection(removals: &[Removal]) -> String {
    let each: Vec<String> = removals.iter().map(Removal::selection).collect();
    format!("({}) && lv_role!={{\"thickorigin\"}}", each.join(" || "))
}

fn run(vg: &str, removals: &[Removal]) -> Result<()> {
    let _lock = GROUPS.take(vg);
    reach(Point::Lvremove)
        .map_err(|errno| Error::new(Code::CommandFailed, "lvremove").because(errno))?;
    // Success is also that nothing matches any more.
    lvm(Program::Lvremove)
        .args(["--yes", "--select", &selection(removals), vg])
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
