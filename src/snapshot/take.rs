//! Taking the snapshots of one guest's disks: all or nothing, back to back.
//!
//! In two steps, so that a guest is stopped for as short as can be: [`prepare`] asks LVM, checks
//! and writes the journal; [`Prepared::take`] only takes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use super::lvm::{self, LvInfo, LvName, VgLock};
use super::names::TAG;
use super::remove::{Removal, remove_all};
use super::volume::{Kind, NotTaken, Plan};
use super::{Journal, Request, Snapshot, host_use, human, off, reflink, thick, thin};
use crate::config::SnapshotKind;
use crate::error::{Code, Error, Result};
use crate::guest::DiskSource;
use crate::point::{Point, pass};

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
    prepare(requests, journal)?.take()
}

/// Checks everything that can be checked before, and writes down what will be created. What is
/// not taken in the end is taken back from the journal.
pub fn prepare(requests: &[Request], journal: &Arc<Journal>) -> Result<Prepared> {
    let mut volumes = Vec::new();
    for request in requests {
        match &request.origin {
            DiskSource::Lv { vg, lv } => volumes.push((request, LvName::new(vg, lv)?)),
            DiskSource::File(path) => match request.kind {
                SnapshotKind::None => drop(off::take(path)?),
                _ => reflink::check(path)?,
            },
        }
    }
    let vgs: BTreeSet<&str> = volumes.iter().map(|(_, name)| name.vg()).collect();
    let vgs: Vec<&str> = vgs.into_iter().collect();
    // Without a group lvs would report all of them.
    let lvs = if vgs.is_empty() {
        Vec::new()
    } else {
        lvm::list_in(&vgs)?
    };
    if !lvs.is_empty() {
        pass(Point::VolumesListed);
    }
    let mut chosen = Vec::new();
    for (request, name) in &volumes {
        let origin = lvs
            .iter()
            .find(|lv| lv.name == *name)
            .ok_or_else(|| Error::new(Code::OriginGone, name.to_string()))?;
        chosen.push((origin, choose(request, origin, &lvs)?));
    }
    check_room(&chosen)?;
    let origins: Vec<&LvName> = volumes.iter().map(|(_, name)| name).collect();
    let intents = journal.intend_volumes(&origins, |name| lvs.iter().any(|lv| lv.name == *name))?;
    if !intents.is_empty() {
        pass(Point::SnapshotsPrepared);
    }
    let mut plans = chosen
        .into_iter()
        .zip(intents)
        .map(|((origin, kind), intent)| Plan {
            origin: origin.clone(),
            kind,
            intent,
        });
    let disks = requests.iter().filter_map(|request| match &request.origin {
        DiskSource::Lv { .. } => plans.next().map(Box::new).map(Disk::Volume),
        DiskSource::File(path) => Some(match request.kind {
            SnapshotKind::None => Disk::Off(path.clone()),
            _ => Disk::Image(path.clone()),
        }),
    });
    Ok(Prepared {
        plans: disks.collect(),
    })
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
    let Some(devno) = origin.devno.filter(|_| origin.active) else {
        return refuse(Code::SnapshotFailed, "it is not active (lvchange -ay)");
    };
    if let Some(who) = host_use(devno) {
        return refuse(Code::DiskInUse, &who);
    }
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
        let pool = thin::pool_uuid(origin, lvs)?;
        thin::check_pool(origin, &pool, thin::MAX_POOL_FILL)?;
        Ok(Kind::Thin { pool })
    } else {
        let chunk = thick::chunk(request.chunk)?;
        let extents = thick::extents(origin, request.size, chunk)?;
        Ok(Kind::Thick { extents, chunk })
    }
}

/// Each group must have room for all its snapshots together.
fn check_room(chosen: &[(&LvInfo, Kind)]) -> Result<()> {
    let mut needs: BTreeMap<&str, (u64, &LvInfo, Vec<String>)> = BTreeMap::new();
    for (origin, kind) in chosen {
        if let Kind::Thick { extents, .. } = kind {
            let need = needs
                .entry(origin.name.vg())
                .or_insert((0, origin, Vec::new()));
            need.0 = need.0.saturating_add(*extents);
            need.2.push(origin.name.to_string());
        }
    }
    for (vg, (need, lv, disks)) in needs {
        if need > lv.vg_free {
            let bytes = |extents: u64| human(extents.saturating_mul(lv.extent_size));
            return Err(Error::new(
                Code::NoRoom,
                format!(
                    "{}: {} needed, {} free in {vg}",
                    disks.join(", "),
                    bytes(need),
                    bytes(lv.vg_free)
                ),
            ));
        }
    }
    Ok(())
}

impl Prepared {
    /// Takes the snapshots, one right after the other. If one fails, those before it are removed.
    pub fn take(mut self) -> Result<Vec<Box<dyn Snapshot>>> {
        let vgs: BTreeSet<String> = self
            .plans
            .iter()
            .filter_map(|disk| match disk {
                Disk::Volume(plan) => Some(plan.origin.name.vg().to_owned()),
                Disk::Image(_) | Disk::Off(_) => None,
            })
            .collect();
        // In the order of their names, as everybody who takes several.
        let locks: Vec<VgLock> = vgs.iter().map(|vg| VgLock::take(vg)).collect();
        let mut taken: Vec<Box<dyn Snapshot>> = Vec::new();
        let mut plans = std::mem::take(&mut self.plans).into_iter();
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
            return Ok(taken);
        };
        self.plans = plans.collect();
        let mut removals: Vec<Removal> = failure.leftover.into_iter().collect();
        removals.extend(taken.iter_mut().rev().filter_map(|s| s.removal()));
        if let Err(undo) = remove_all(removals) {
            log::error!("{}", undo.report());
        }
        Err(failure.error)
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
