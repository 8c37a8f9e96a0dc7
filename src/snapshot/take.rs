//! Takes the snapshots of one guest's disks: all or none.
//!
//! Separate steps keep the guest's pause short. [`prepare`] queries LVM, checks, and writes the
//! journal. [`Prepared::lock`] waits for other jobs. [`Locked::take`] only takes snapshots.
//! [`NotAll::undo`] may wait for other jobs again; call it when the guest runs.

mod room;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use super::active::Activated;
use super::drbd::{self, Below};
use super::lvm::{self, GROUPS, LvInfo};
use super::names::TAG;
use super::remove::{Removal, remove_all};
use super::together::{self, Disk, How, Taken};
use super::volume::{Kind, Plan};
use super::{Journal, Request, Snapshot, off, reflink, thick, thin};
use crate::config::SnapshotKind;
use crate::error::{Code, Error, Result};
use crate::guest::DiskSource;
use crate::hostdev::lvname::{LvName, VgName};
use crate::hostdev::{host_use, host_use_beside_containers, uses};
use crate::point::{Point, pass};
use crate::turn::Turn;

pub use room::Room;
use room::{Promised, rooms};

/// Snapshots ready to be taken.
#[derive(Debug)]
pub struct Prepared {
    plans: Vec<Disk>,
}

/// Performs all checks that need no snapshot, and journals the volumes to be created. Entries for
/// snapshots that are not taken are removed from the journal.
pub fn prepare(requests: &[Request], journal: &Arc<Journal>) -> Result<Prepared> {
    let mut lvs = volumes(requests)?;
    let mut active = Active::of(requests, &mut lvs, journal)?;
    let lvs = Volumes {
        lvs: &lvs,
        active: &mut active,
    };
    prepared(requests, None, lvs, &mut Promised::default(), journal)
}

/// The disks of a guest.
#[derive(Debug)]
pub struct Asked {
    /// The snapshots to take, all or none.
    pub requests: Vec<Request>,
    /// If the guest may wait for room: its place in the job. Guests of a later place get no room in a
    /// group before it.
    pub place: Option<usize>,
}

/// [`prepare`] for several guests with one LVM query. Guests get room in a group in their order.
pub fn prepare_each(guests: &[Asked], journal: &Arc<Journal>) -> Vec<Result<Prepared>> {
    let mut promised = Promised::default();
    let requests = || guests.iter().flat_map(|asked| &asked.requests);
    let all = volumes(requests()).and_then(|mut lvs| {
        let active = Active::of(requests(), &mut lvs, journal)?;
        Ok((lvs, active))
    });
    match all {
        Ok((lvs, mut active)) => guests
            .iter()
            .map(|Asked { requests, place }| {
                let lvs = Volumes {
                    lvs: &lvs,
                    active: &mut active,
                };
                prepared(requests, *place, lvs, &mut promised, journal)
            })
            .collect(),
        // LVM may be unable to report the group of one guest only.
        Err(_) => guests
            .iter()
            .map(|Asked { requests, place }| {
                let mut lvs = volumes(requests)?;
                let mut active = Active::of(requests, &mut lvs, journal)?;
                let lvs = Volumes {
                    lvs: &lvs,
                    active: &mut active,
                };
                prepared(requests, *place, lvs, &mut promised, journal)
            })
            .collect(),
    }
}

/// The host's volumes, and those activated by this call.
struct Volumes<'a> {
    lvs: &'a [LvInfo],
    active: &'a mut Active,
}

/// Activated volumes, with one entry per requested disk.
#[derive(Default)]
struct Active(BTreeMap<LvName, Vec<Result<Activated>>>);

impl Active {
    /// Activates inactive volumes where allowed. `lvs` is the state afterwards.
    fn of<'a>(
        requests: impl IntoIterator<Item = &'a Request> + Clone,
        lvs: &mut Vec<LvInfo>,
        journal: &Arc<Journal>,
    ) -> Result<Active> {
        let mut active = Active::default();
        for request in requests.clone() {
            let DiskSource::Lv(name) = &request.origin else {
                continue;
            };
            let lv = lvs.iter().find(|lv| lv.name == *name);
            let allowed = |lv: &&LvInfo| request.activate && not_a_disk(lv).is_none();
            if let Some(lv) = lv.filter(allowed) {
                let entry = Activated::of(lv, journal).transpose();
                let all =
                    entry.map(|entry| active.0.entry(lv.name.clone()).or_default().push(entry));
                all.unwrap_or_default();
            }
        }
        if !active.0.is_empty() {
            *lvs = volumes(requests)?;
        }
        Ok(active)
    }

    /// Takes the activation for one disk.
    fn take(&mut self, origin: &LvName) -> Result<Option<Activated>> {
        let entry = self.0.get_mut(origin).and_then(Vec::pop);
        entry.transpose()
    }
}

/// `place`: see [`Asked`].
fn prepared(
    requests: &[Request],
    place: Option<usize>,
    volumes: Volumes<'_>,
    promised: &mut Promised,
    journal: &Arc<Journal>,
) -> Result<Prepared> {
    let Volumes { lvs, active } = volumes;
    if !lvs.is_empty() {
        pass(Point::VolumesListed);
    }
    let mut activated = Vec::new();
    for request in requests {
        activated.push(match &request.origin {
            DiskSource::Lv(name) => active.take(name)?,
            DiskSource::File(_) => None,
        });
    }
    let choices = requests
        .iter()
        .map(|request| Choice::of(request, lvs, false))
        .collect::<Result<Vec<_>>>()?;
    let mut rooms = rooms(&choices);
    promised.check(&mut rooms, place)?;
    let origins: Vec<&LvName> = choices.iter().filter_map(Choice::volume).collect();
    let mut intents = journal
        .intend_volumes(&origins, |name| lvs.iter().any(|lv| lv.name == *name))?
        .into_iter();
    if !origins.is_empty() {
        pass(Point::SnapshotsPrepared);
    }
    for room in rooms {
        *promised.bytes.entry(room.vg).or_default() += room.needed;
    }
    let choices = choices.into_iter().zip(activated).zip(requests);
    let disks = choices.filter_map(|((choice, activated), request)| match choice {
        Choice::Volume(origin, kind) => intents.next().map(|intent| {
            Disk::Volume(Box::new(Plan {
                origin: origin.clone(),
                kind,
                intent,
                activated,
                in_container: request.in_container,
                below: None,
            }))
        }),
        Choice::Image(path, _) => Some(Disk::Image(path.to_owned())),
        Choice::Off(path, _) => Some(Disk::Off(path.to_owned())),
    });
    Ok(Prepared {
        plans: disks.collect(),
    })
}

/// Plan for one disk.
#[derive(Debug)]
pub struct Planned {
    /// Size of the disk in bytes.
    pub size: u64,
    /// The snapshot in the form of [`Snapshot::describe`].
    pub snapshot: String,
}

/// Plans snapshots of the disks of these guests: one plan per disk, and the room needed in total and
/// by one guest at most. Performs the checks of [`prepare`]; creates nothing.
pub fn plan(guests: &[Vec<Request>]) -> Result<(Vec<Result<Planned>>, Vec<Room>)> {
    let lvs = volumes(guests.iter().flatten())?;
    let mut choices = Vec::new();
    let mut most: BTreeMap<VgName, u64> = BTreeMap::new();
    for requests in guests {
        let asked = requests.iter();
        let asked: Vec<_> = asked
            .map(|request| Choice::of(request, &lvs, true))
            .collect();
        let possible: Vec<_> = asked.iter().flatten().cloned().collect();
        for room in rooms(&possible) {
            let most = most.entry(room.vg).or_default();
            *most = room.needed.max(*most);
        }
        choices.extend(asked);
    }
    let possible: Vec<_> = choices.iter().flatten().cloned().collect();
    let mut rooms = rooms(&possible);
    for room in &mut rooms {
        room.most = most.get(&room.vg).copied().unwrap_or(room.needed);
    }
    let planned = choices.into_iter().map(|choice| {
        choice.map(|choice| match choice {
            Choice::Volume(origin, kind) => Planned {
                size: origin.size,
                snapshot: kind.describe(origin.extent_size),
            },
            Choice::Image(_, size) => Planned {
                size,
                snapshot: reflink::KIND.to_owned(),
            },
            Choice::Off(_, size) => Planned {
                size,
                snapshot: off::KIND.to_owned(),
            },
        })
    });
    Ok((planned.collect(), rooms))
}

/// Lists the volumes of all groups that contain the disks.
fn volumes<'a>(requests: impl IntoIterator<Item = &'a Request>) -> Result<Vec<LvInfo>> {
    let vgs: BTreeSet<&VgName> = requests
        .into_iter()
        .filter_map(|request| match &request.origin {
            DiskSource::Lv(name) => Some(name.vg()),
            DiskSource::File(_) => None,
        })
        .collect();
    let vgs: Vec<&str> = vgs.into_iter().map(VgName::as_str).collect();
    // Without a group argument, lvs would report all groups.
    match vgs.is_empty() {
        true => Ok(Vec::new()),
        false => lvm::list_in(&vgs),
    }
}

/// How to snapshot a disk; images with their size.
#[derive(Debug, Clone)]
enum Choice<'a> {
    Volume(&'a LvInfo, Kind),
    Image(&'a Path, u64),
    Off(&'a Path, u64),
}

impl<'a> Choice<'a> {
    fn of(request: &'a Request, lvs: &'a [LvInfo], planning: bool) -> Result<Choice<'a>> {
        match &request.origin {
            DiskSource::Lv(name) => {
                let origin = lvs.iter().find(|lv| lv.name == *name);
                let origin =
                    origin.ok_or_else(|| Error::new(Code::OriginGone, name.to_string()))?;
                Ok(Choice::Volume(
                    origin,
                    choose(request, origin, lvs, planning)?,
                ))
            }
            DiskSource::File(path) => Ok(match request.kind {
                SnapshotKind::None => Choice::Off(path, off::take(path)?.device().size),
                _ => Choice::Image(path, reflink::check(path)?),
            }),
        }
    }

    fn volume(&self) -> Option<&LvName> {
        match self {
            Choice::Volume(origin, _) => Some(&origin.name),
            Choice::Image(..) | Choice::Off(..) => None,
        }
    }
}

/// Why a volume cannot be a guest's disk.
pub(super) fn not_a_disk(lv: &LvInfo) -> Option<&'static str> {
    if lv.tags.iter().any(|tag| tag == TAG) {
        Some("it is a snapshot of guestsnap")
    } else if lv.is_pool() {
        Some("it is a pool")
    } else if lv.is_thick_snapshot() {
        Some("it is a snapshot itself")
    } else {
        None
    }
}

/// Refuses unsuitable volumes, and decides between thick and thin. `planning`: a volume that may be
/// activated counts as active.
fn choose(request: &Request, origin: &LvInfo, lvs: &[LvInfo], planning: bool) -> Result<Kind> {
    let refuse = |code, why: &str| Err(Error::new(code, format!("{}: {why}", origin.name)));
    if let Some(why) = not_a_disk(origin) {
        return refuse(Code::UnsupportedDisk, why);
    }
    let active = origin.devno.is_some() && origin.active;
    if !active && !request.activate {
        return refuse(
            Code::SnapshotFailed,
            "it is not active, and `activate = false` forbids to make it so (lvchange -ay)",
        );
    }
    if !active && !planning {
        return refuse(Code::SnapshotFailed, "it is not active");
    }
    let below = host_use_of(origin, request.in_container)?;
    drbd::refuse_metadata(origin, lvs, below.is_some())?;
    let thin = match request.kind {
        SnapshotKind::Auto => origin.is_thin(),
        SnapshotKind::Thick => false,
        SnapshotKind::None => {
            return refuse(
                Code::UnsupportedDisk,
                "snapshot=none is for image files; a volume can have a snapshot",
            );
        }
        SnapshotKind::Thin if origin.is_thin() => true,
        SnapshotKind::Thin => {
            return refuse(
                Code::UnsupportedDisk,
                "it is not a thin volume, so that it cannot have a thin snapshot",
            );
        }
    };
    if thin {
        let pool = thin::pool_of(origin, lvs)?;
        if active {
            thin::check_pool(origin, &pool, thin::MAX_POOL_FILL)?;
        }
        Ok(Kind::Thin { pool })
    } else {
        let chunk = thick::chunk(request.chunk)?;
        let extents = thick::extents(origin, request.size, chunk)?;
        Ok(Kind::Thick { extents, chunk })
    }
}

/// Refuses a volume that the host uses itself. Returns the place of one that it has below DRBD.
fn host_use_of(origin: &LvInfo, in_container: bool) -> Result<Option<Below>> {
    let host_use = match in_container {
        true => host_use_beside_containers,
        false => host_use,
    };
    match origin.devno.and_then(host_use) {
        None => Ok(None),
        Some(who) => match who.drbd() {
            Some(minor) => drbd::below(origin, minor).map(Some),
            None => Err(who.error(&origin.name)),
        },
    }
}

/// Snapshots that can be taken without waiting for other jobs.
#[derive(Debug)]
pub struct Locked {
    // Drop order matters: returning a disk needs the locks.
    locks: Vec<Turn>,
    prepared: Prepared,
}

/// Why a guest's snapshots are incomplete, and those already taken.
#[derive(Debug)]
pub struct NotAll {
    error: Error,
    removals: Vec<Removal>,
}

impl NotAll {
    /// Removes the snapshots already taken.
    pub fn undo(self) -> Error {
        if let Err(undo) = remove_all(self.removals) {
            log::error!("{}", undo.report());
        }
        self.error
    }
}

impl Prepared {
    /// Volume groups of the snapshots.
    pub fn groups(&self) -> BTreeSet<VgName> {
        self.plans
            .iter()
            .filter_map(|disk| match disk {
                Disk::Volume(plan) => Some(plan.origin.name.vg().clone()),
                Disk::Image(_) | Disk::Off(_) => None,
            })
            .collect()
    }

    /// Waits for other jobs on the volume groups and locks these. Fails if the host has started to
    /// use a disk meanwhile: other guests may have taken long.
    pub fn lock(mut self) -> Result<Locked> {
        // In name order, like all callers that take several.
        let locks = self.groups().iter().map(|vg| GROUPS.take(vg)).collect();
        for disk in &mut self.plans {
            if let Disk::Volume(plan) = disk {
                plan.below = host_use_of(&plan.origin, plan.in_container)?;
            }
        }
        Ok(Locked {
            prepared: self,
            locks,
        })
    }
}

impl Locked {
    /// Whether all disks are mounted containers' volumes: LVM freezes their filesystems.
    pub fn are_frozen_by_lvm(&self) -> bool {
        let frozen = |disk: &Disk| match disk {
            Disk::Volume(plan) => {
                plan.in_container && plan.origin.devno.is_some_and(uses::is_frozen_by_lvm)
            }
            Disk::Image(_) | Disk::Off(_) => false,
        };
        self.prepared.plans.iter().all(frozen)
    }

    /// Takes the snapshots. If one fails, the caller removes those before it. After a panic, dropping `taken` removes
    /// them. That waits for the locks, so it must not happen while others wait for an object that the caller holds.
    pub fn take_into(
        self,
        taken: &mut Vec<Box<dyn Snapshot>>,
        how: &How,
    ) -> std::result::Result<Taken, NotAll> {
        let Locked {
            mut prepared,
            locks,
        } = self;
        let plans = std::mem::take(&mut prepared.plans);
        let doubts: Vec<Error> = plans.iter().filter_map(Disk::doubt).collect();
        let done = together::take(plans, how, taken);
        drop(locks);
        let failed = match done {
            Ok(mut done) => {
                done.problems.extend(doubts);
                return Ok(done);
            }
            Err(failed) => failed,
        };
        prepared.plans = failed.rest;
        let mut removals: Vec<Removal> = failed.cause.leftover.into_iter().collect();
        removals.extend(taken.iter_mut().rev().filter_map(|s| s.removal()));
        Err(NotAll {
            error: failed.cause.error,
            removals,
        })
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // No snapshot was created for these.
        for disk in self.plans.drain(..) {
            if let Disk::Volume(plan) = disk {
                plan.intent.removed();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn test_other_jobs_are_waited_for_before_anything_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Arc::new(Journal::open(folder.path(), 7).unwrap());
        let mut origin = lvm::tests::origin(64 << 20, 4 << 20);
        // This host may have a device with that number.
        origin.devno = None;
        let intents = journal.intend_volumes(&[&origin.name], |_| false);
        let plans = intents.unwrap().into_iter().map(|intent| {
            let kind = Kind::Thick {
                extents: 1,
                chunk: 4096,
            };
            Disk::Volume(Box::new(Plan {
                origin: origin.clone(),
                kind,
                intent,
                activated: None,
                in_container: false,
                below: None,
            }))
        });
        let prepared = Prepared {
            plans: plans.collect(),
        };
        let other = GROUPS.take(origin.name.vg());
        let (tell, told) = mpsc::channel();
        let waits = std::thread::spawn(move || {
            let locked = prepared.lock().unwrap();
            tell.send(()).unwrap();
            locked
        });
        // The next step, quiescing the guest, does not start.
        assert!(told.recv_timeout(Duration::from_millis(200)).is_err());
        drop(other);
        told.recv_timeout(Duration::from_secs(10)).unwrap();
        let locked = waits.join().unwrap();
        assert_eq!(locked.locks.len(), 1);
        drop(locked);
        drop(GROUPS.take(origin.name.vg()));
        journal.close().unwrap();
    }
}
