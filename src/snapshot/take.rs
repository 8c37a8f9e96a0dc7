//! Taking the snapshots of one guest's disks: all or nothing, back to back.
//!
//! In steps, so that a guest is stopped for as short as can be: [`prepare`] asks LVM, checks and
//! writes the journal; [`Prepared::lock`] waits for other jobs; [`Locked::take`] only takes; and
//! [`NotAll::undo`], which may wait for other jobs again, is for when the guest runs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::lvm::{self, GROUPS, LvInfo, LvName};
use super::names::TAG;
use super::remove::{Removal, remove_all};
use super::volume::{Kind, NotTaken, Plan};
use super::{Journal, Request, Snapshot, host_use, human, off, reflink, thick, thin};
use crate::config::SnapshotKind;
use crate::error::{Code, Error, Result};
use crate::guest::DiskSource;
use crate::point::{Point, pass};
use crate::turn::Turn;

/// Snapshots that can be taken at once.
#[derive(Debug)]
pub struct Prepared {
    plans: Vec<Disk>,
}

#[derive(Debug)]
enum Disk {
    Volume(Box<Plan>),
    Image(PathBuf),
    Off(PathBuf),
}

/// Snapshots all disks of one guest, or none.
pub fn take_all(requests: &[Request], journal: &Arc<Journal>) -> Result<Vec<Box<dyn Snapshot>>> {
    prepare(requests, journal)?
        .lock()?
        .take()
        .map_err(|not_all| not_all.undo())
}

/// Checks everything that can be checked before, and writes down what will be created. What is
/// not taken in the end is taken back from the journal.
pub fn prepare(requests: &[Request], journal: &Arc<Journal>) -> Result<Prepared> {
    prepared(requests, &volumes(requests)?, &mut BTreeMap::new(), journal)
}

/// [`prepare`] for several guests: LVM is asked once. Room in a group goes to the first of them.
pub fn prepare_each(guests: &[Vec<Request>], journal: &Arc<Journal>) -> Vec<Result<Prepared>> {
    let mut promised = BTreeMap::new();
    match volumes(guests.iter().flatten()) {
        Ok(lvs) => guests
            .iter()
            .map(|requests| prepared(requests, &lvs, &mut promised, journal))
            .collect(),
        // It may be one guest's group that LVM cannot show.
        Err(_) => guests
            .iter()
            .map(|requests| {
                let lvs = volumes(requests)?;
                prepared(requests, &lvs, &mut promised, journal)
            })
            .collect(),
    }
}

/// `promised`: bytes of a group that others will take.
fn prepared(
    requests: &[Request],
    lvs: &[LvInfo],
    promised: &mut BTreeMap<String, u64>,
    journal: &Arc<Journal>,
) -> Result<Prepared> {
    if !lvs.is_empty() {
        pass(Point::VolumesListed);
    }
    let choices = requests
        .iter()
        .map(|request| Choice::of(request, lvs))
        .collect::<Result<Vec<_>>>()?;
    let mut rooms = rooms(&choices);
    for room in &mut rooms {
        let gone = promised.get(&room.vg).copied().unwrap_or(0);
        room.free = room.free.saturating_sub(gone);
        room.check()?;
    }
    let origins: Vec<&LvName> = choices.iter().filter_map(Choice::volume).collect();
    let mut intents = journal
        .intend_volumes(&origins, |name| lvs.iter().any(|lv| lv.name == *name))?
        .into_iter();
    if !origins.is_empty() {
        pass(Point::SnapshotsPrepared);
    }
    for room in rooms {
        *promised.entry(room.vg).or_default() += room.needed;
    }
    let disks = choices.into_iter().filter_map(|choice| match choice {
        Choice::Volume(origin, kind) => intents.next().map(|intent| {
            Disk::Volume(Box::new(Plan {
                origin: origin.clone(),
                kind,
                intent,
            }))
        }),
        Choice::Image(path, _) => Some(Disk::Image(path.to_owned())),
        Choice::Off(path, _) => Some(Disk::Off(path.to_owned())),
    });
    Ok(Prepared {
        plans: disks.collect(),
    })
}

/// What would be done with one disk.
#[derive(Debug)]
pub struct Planned {
    /// Bytes of the disk.
    pub size: u64,
    /// The snapshot, as [`Snapshot::describe`] would say.
    pub snapshot: String,
}

/// What would be done if all these disks were snapshotted now: for each of them, and the room that
/// is needed for all. The checks are those of [`prepare`]; nothing is created.
pub fn plan(requests: &[Request]) -> Result<(Vec<Result<Planned>>, Vec<Room>)> {
    let lvs = volumes(requests)?;
    let choices: Vec<_> = requests
        .iter()
        .map(|request| Choice::of(request, &lvs))
        .collect();
    let possible: Vec<_> = choices.iter().flatten().cloned().collect();
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
    Ok((planned.collect(), rooms(&possible)))
}

/// The volumes of all groups that the disks are in.
fn volumes<'a>(requests: impl IntoIterator<Item = &'a Request>) -> Result<Vec<LvInfo>> {
    let vgs: BTreeSet<&str> = requests
        .into_iter()
        .filter_map(|request| match &request.origin {
            DiskSource::Lv { vg, .. } => Some(vg.as_str()),
            DiskSource::File(_) => None,
        })
        .collect();
    let vgs: Vec<&str> = vgs.into_iter().collect();
    // Without a group lvs would report all of them.
    match vgs.is_empty() {
        true => Ok(Vec::new()),
        false => lvm::list_in(&vgs),
    }
}

/// How a disk will be snapshotted; images with their size.
#[derive(Debug, Clone)]
enum Choice<'a> {
    Volume(&'a LvInfo, Kind),
    Image(&'a Path, u64),
    Off(&'a Path, u64),
}

impl<'a> Choice<'a> {
    fn of(request: &'a Request, lvs: &'a [LvInfo]) -> Result<Choice<'a>> {
        match &request.origin {
            DiskSource::Lv { vg, lv } => {
                let name = LvName::new(vg, lv)?;
                let origin = lvs.iter().find(|lv| lv.name == name);
                let origin =
                    origin.ok_or_else(|| Error::new(Code::OriginGone, name.to_string()))?;
                Ok(Choice::Volume(origin, choose(request, origin, lvs)?))
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

/// Refuses what must not be snapshotted, and decides between thick and thin.
fn choose(request: &Request, origin: &LvInfo, lvs: &[LvInfo]) -> Result<Kind> {
    let refuse = |code, why: &str| Err(Error::new(code, format!("{}: {why}", origin.name)));
    if origin.tags.iter().any(|tag| tag == TAG) {
        return refuse(Code::UnsupportedDisk, "it is a snapshot of guestsnap");
    }
    if origin.is_pool() {
        return refuse(Code::UnsupportedDisk, "it is a pool");
    }
    if origin.is_thick_snapshot() {
        return refuse(Code::UnsupportedDisk, "it is a snapshot itself");
    }
    if origin.devno.is_none() || !origin.active {
        return refuse(Code::SnapshotFailed, "it is not active (lvchange -ay)");
    }
    refuse_host_use(origin)?;
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
        thin::check_pool(origin, &pool, thin::MAX_POOL_FILL)?;
        Ok(Kind::Thin { pool })
    } else {
        let chunk = thick::chunk(request.chunk)?;
        let extents = thick::extents(origin, request.size, chunk)?;
        Ok(Kind::Thick { extents, chunk })
    }
}

fn refuse_host_use(origin: &LvInfo) -> Result<()> {
    match origin.devno.and_then(host_use) {
        Some(who) => Err(Error::new(
            Code::DiskInUse,
            format!("{}: {who}", origin.name),
        )),
        None => Ok(()),
    }
}

/// The room that all thick snapshots of one group need together.
#[derive(Debug)]
pub struct Room {
    /// The group.
    pub vg: String,
    /// Bytes needed.
    pub needed: u64,
    /// Bytes free.
    pub free: u64,
    /// The origins.
    disks: Vec<String>,
}

impl Room {
    /// Whether it is there.
    pub fn check(&self) -> Result<()> {
        if self.needed <= self.free {
            return Ok(());
        }
        let text = format!(
            "{}: {} needed, {} free in {}",
            self.disks.join(", "),
            human(self.needed),
            human(self.free),
            self.vg
        );
        Err(Error::new(Code::NoRoom, text))
    }
}

fn rooms(choices: &[Choice<'_>]) -> Vec<Room> {
    let mut rooms: BTreeMap<&str, Room> = BTreeMap::new();
    for choice in choices {
        if let Choice::Volume(origin, Kind::Thick { extents, .. }) = choice {
            let bytes = |extents: u64| extents.saturating_mul(origin.extent_size);
            let vg = origin.name.vg();
            let room = rooms.entry(vg).or_insert_with(|| Room {
                vg: vg.to_owned(),
                needed: 0,
                free: bytes(origin.vg_free),
                disks: Vec::new(),
            });
            room.needed = room.needed.saturating_add(bytes(*extents));
            room.disks.push(origin.name.to_string());
        }
    }
    rooms.into_values().collect()
}

/// Snapshots that can be taken without waiting for another job.
#[derive(Debug)]
pub struct Locked {
    prepared: Prepared,
    locks: Vec<Turn>,
}

/// Why not all snapshots of a guest were taken, and those that are there all the same.
#[derive(Debug)]
pub struct NotAll {
    error: Error,
    removals: Vec<Removal>,
}

impl NotAll {
    /// Removes what was taken.
    pub fn undo(self) -> Error {
        if let Err(undo) = remove_all(self.removals) {
            log::error!("{}", undo.report());
        }
        self.error
    }
}

impl Prepared {
    /// The volume groups that the snapshots will be in.
    pub fn groups(&self) -> BTreeSet<String> {
        self.plans
            .iter()
            .filter_map(|disk| match disk {
                Disk::Volume(plan) => Some(plan.origin.name.vg().to_owned()),
                Disk::Image(_) | Disk::Off(_) => None,
            })
            .collect()
    }

    /// Waits until no other job works on the volume groups, and keeps them from it. An error if
    /// the host has begun to use a disk meanwhile: other guests may have taken their time.
    pub fn lock(self) -> Result<Locked> {
        // In the order of their names, as everybody who takes several.
        let locks = self.groups().iter().map(|vg| GROUPS.take(vg)).collect();
        for disk in &self.plans {
            if let Disk::Volume(plan) = disk {
                refuse_host_use(&plan.origin)?;
            }
        }
        Ok(Locked {
            prepared: self,
            locks,
        })
    }
}

impl Locked {
    /// Takes the snapshots, one right after the other. If one fails, those before it are to be
    /// removed.
    pub fn take(self) -> std::result::Result<Vec<Box<dyn Snapshot>>, NotAll> {
        let mut taken = Vec::new();
        self.take_into(&mut taken).map(|()| taken)
    }

    /// The same. Should it panic, what was taken is removed where `taken` is dropped: that waits for the
    /// locks, and must not while others wait for something that the caller holds.
    pub fn take_into(self, taken: &mut Vec<Box<dyn Snapshot>>) -> std::result::Result<(), NotAll> {
        let Locked {
            mut prepared,
            locks,
        } = self;
        let mut plans = std::mem::take(&mut prepared.plans).into_iter();
        let mut failure = None;
        for disk in plans.by_ref() {
            let result = match disk {
                Disk::Volume(plan) => plan.take().map(|snapshot| Box::new(snapshot) as _),
                Disk::Image(path) => reflink::take(&path)
                    .map(|snapshot| Box::new(snapshot) as _)
                    .map_err(NotTaken::without_leftover),
                Disk::Off(path) => off::take(&path)
                    .map(|disk| Box::new(disk) as _)
                    .map_err(NotTaken::without_leftover),
            };
            match result {
                Ok(snapshot) => taken.push(snapshot),
                Err(not_taken) => {
                    failure = Some(not_taken);
                    break;
                }
            }
        }
        drop(locks);
        let Some(failure) = failure else {
            return Ok(());
        };
        prepared.plans = plans.collect();
        let mut removals: Vec<Removal> = failure.leftover.into_iter().collect();
        removals.extend(taken.iter_mut().rev().filter_map(|s| s.removal()));
        Err(NotAll {
            error: failure.error,
            removals,
        })
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // Nothing was created for these.
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
        // This host may have a device of that number.
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
        // What comes next, bringing the guest to rest, does not begin.
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
