//! Taking the snapshots of one guest's disks: all or nothing, back to back.
//!
//! In two steps, so that a guest is stopped for as short as can be: [`prepare`] asks LVM, checks
//! and writes the journal; [`Prepared::take`] only takes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::lvm::{self, LvInfo, LvName, VgLock};
use super::names::TAG;
use super::remove::remove_all;
use super::volume::{Kind, LvSnapshot, NotTaken, Plan};
use super::{Journal, Request, Snapshot, host_use, human, thick, thin};
use crate::config::SnapshotKind;
use crate::error::{Code, Error, Result};
use crate::guest::DiskSource;

/// Snapshots that can be taken at once.
#[derive(Debug)]
pub struct Prepared {
    plans: Vec<Plan>,
}

/// Snapshots all disks of one guest, or none.
pub fn take_all(requests: &[Request], journal: &Arc<Journal>) -> Result<Vec<Box<dyn Snapshot>>> {
    prepare(requests, journal)?.take()
}

/// Checks everything that can be checked before, and writes down what will be created. What is
/// not taken in the end is taken back from the journal.
pub fn prepare(requests: &[Request], journal: &Arc<Journal>) -> Result<Prepared> {
    let mut names = Vec::new();
    for request in requests {
        match &request.origin {
            DiskSource::Lv { vg, lv } => names.push(LvName::new(vg, lv)?),
            DiskSource::File(_) => {
                return Err(Error::new(
                    Code::SnapshotFailed,
                    format!(
                        "{}: snapshots of files are not built in yet",
                        request.origin
                    ),
                ));
            }
        }
    }
    let vgs: BTreeSet<&str> = names.iter().map(LvName::vg).collect();
    let vgs: Vec<&str> = vgs.into_iter().collect();
    let lvs = lvm::list_in(&vgs)?;
    let mut chosen = Vec::new();
    for (request, name) in requests.iter().zip(&names) {
        let origin = lvs
            .iter()
            .find(|lv| lv.name == *name)
            .ok_or_else(|| Error::new(Code::OriginGone, name.to_string()))?;
        chosen.push((origin, choose(request, origin, &lvs)?));
    }
    check_room(&chosen)?;
    let origins: Vec<&LvName> = names.iter().collect();
    let intents = journal.intend_volumes(&origins, |name| lvs.iter().any(|lv| lv.name == *name))?;
    let plans = chosen
        .into_iter()
        .zip(intents)
        .map(|((origin, kind), intent)| Plan {
            origin: origin.clone(),
            kind,
            intent,
        })
        .collect();
    Ok(Prepared { plans })
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
    let mut needs: BTreeMap<&str, (u64, &LvInfo)> = BTreeMap::new();
    for (origin, kind) in chosen {
        if let Kind::Thick { extents, .. } = kind {
            let need = needs.entry(origin.name.vg()).or_insert((0, origin));
            need.0 = need.0.saturating_add(*extents);
        }
    }
    for (vg, (need, lv)) in needs {
        if need > lv.vg_free {
            let bytes = |extents: u64| human(extents.saturating_mul(lv.extent_size));
            return Err(Error::new(
                Code::NoRoom,
                format!("{vg}: {} needed, {} free", bytes(need), bytes(lv.vg_free)),
            ));
        }
    }
    Ok(())
}

impl Prepared {
    /// Takes the snapshots, one right after the other. If one fails, those before it are removed.
    pub fn take(mut self) -> Result<Vec<Box<dyn Snapshot>>> {
        let plans = std::mem::take(&mut self.plans);
        let vgs: BTreeSet<String> = plans
            .iter()
            .map(|plan| plan.origin.name.vg().to_owned())
            .collect();
        // In the order of their names, as everybody who takes several.
        let locks: Vec<VgLock> = vgs.iter().map(|vg| VgLock::take(vg)).collect();
        let mut taken: Vec<LvSnapshot> = Vec::new();
        let mut plans = plans.into_iter();
        let mut failure = None;
        for plan in plans.by_ref() {
            match plan.take() {
                Ok(snapshot) => taken.push(snapshot),
                Err(failed) => {
                    failure = Some(failed);
                    break;
                }
            }
        }
        drop(locks);
        let Some(NotTaken { error, leftover }) = failure.map(|failed| *failed) else {
            return Ok(taken.into_iter().map(|s| Box::new(s) as _).collect());
        };
        self.plans = plans.collect();
        let mut removals = vec![leftover];
        removals.extend(taken.iter_mut().rev().filter_map(Snapshot::removal));
        if let Err(undo) = remove_all(removals) {
            log::error!("{}", undo.report());
        }
        Err(error)
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // Nothing was created for these.
        for plan in self.plans.drain(..) {
            plan.intent.removed();
        }
    }
}
