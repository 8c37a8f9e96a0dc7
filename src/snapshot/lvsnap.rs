//! Snapshots of logical volumes: thick (a COW area beside the origin) and thin (in its pool).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::command::lvm;
use super::journal::{Journal, Object, TAG};
use super::lvm::{self, LvInfo, dm_name};
use super::{Device, Request, Snapshot, Status, host_use, status};
use crate::config::{Size, SnapshotKind};
use crate::error::{Code, Error, Result};

/// Bytes of a COW chunk. Each first write of the guest to a chunk copies it: 64 KiB copies little,
/// and keeps the exception table (16 bytes per chunk) small.
const DEFAULT_CHUNK: u64 = 64 << 10;

/// A thin pool that is this full takes no further snapshot: a full pool stops every guest in it.
const POOL_LIMIT: f64 = 90.0;

/// udev may hold a device for a moment after its last use.
const BUSY_PATIENCE: Duration = Duration::from_secs(10);
const BUSY_PAUSE: Duration = Duration::from_millis(100);

/// How a snapshot will be made; everything that can be checked before is.
#[derive(Debug)]
pub(super) struct LvPlan {
    origin: LvInfo,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Thick { bytes: u64, chunk: u64 },
    Thin { pool: String },
}

pub(super) fn plan(request: &Request, vg: &str, lv: &str) -> Result<LvPlan> {
    let origin = lvm::get(vg, lv)?;
    let name = format!("{vg}/{lv}");
    if let Some(reason) = origin.unfit() {
        return Err(Error::new(
            Code::UnsupportedDisk,
            format!("{name}: {reason}"),
        ));
    }
    let Some((major, minor)) = origin.devno else {
        return Err(Error::new(
            Code::SnapshotFailed,
            format!("{name} is not active; activate it with lvchange -ay"),
        ));
    };
    if let Some(user) = host_use(major, minor) {
        return Err(Error::new(Code::DiskInUse, format!("{name}: {user}")));
    }
    let pool = origin.pool.clone().filter(|_| origin.is_thin());
    let kind = match (request.kind, pool) {
        (SnapshotKind::Thin, None) => {
            return Err(Error::new(
                Code::SnapshotFailed,
                format!("{name} is not a thin volume, snapshot=thin cannot be"),
            ));
        }
        (SnapshotKind::Thin | SnapshotKind::Auto, Some(pool)) => {
            let used = match status::thin(&format!("{}-tpool", dm_name(vg, &pool)))? {
                Status::Valid { used } => used,
                Status::Invalid => 100.0,
            };
            if used > POOL_LIMIT {
                let text = format!(
                    "{name}: thin pool {vg}/{pool} is {used:.0} % full, above {POOL_LIMIT} %"
                );
                return Err(Error::new(Code::NoRoom, text));
            }
            Kind::Thin { pool }
        }
        (SnapshotKind::Thick, _) | (SnapshotKind::Auto, None) => {
            let room = lvm::room(vg)?;
            let chunk = request.chunk.unwrap_or(DEFAULT_CHUNK);
            let bytes = thick_bytes(request.size, origin.size, room.extent, chunk);
            if bytes > room.free {
                let text = format!(
                    "{name}: the snapshot needs {} MiB, volume group {vg} has {} MiB free",
                    bytes >> 20,
                    room.free >> 20
                );
                return Err(Error::new(Code::NoRoom, text));
            }
            Kind::Thick { bytes, chunk }
        }
    };
    Ok(LvPlan { origin, kind })
}

/// Bytes of the COW area, in whole extents: as asked, but never more than a copy of every chunk
/// and its table need.
fn thick_bytes(size: Size, origin: u64, extent: u64, chunk: u64) -> u64 {
    let wanted = match size {
        Size::Percent(percent) => {
            origin / 100 * u64::from(percent) + origin % 100 * u64::from(percent) / 100
        }
        Size::Bytes(bytes) => bytes,
    };
    // One table chunk for every chunk/16 data chunks, one for the header, one in reserve.
    let chunks = origin.div_ceil(chunk);
    let tables = chunks.div_ceil(chunk / 16) + 2;
    let whole = (chunks + tables) * chunk;
    wanted.min(whole).div_ceil(extent).max(1) * extent
}

pub(super) fn take(plan: LvPlan, journal: &Arc<Journal>) -> Result<LvSnapshot> {
    let LvPlan { origin, kind } = plan;
    let lv = journal.new_name();
    let object = Object::Lv {
        vg: origin.vg.clone(),
        lv: lv.clone(),
    };
    let source = format!("{}/{}", origin.vg, origin.lv);
    let owner = journal.tag().lvm_tag();
    let mut arguments = vec![
        "-s", "-n", &lv, "--addtag", TAG, "--addtag", &owner, "--yes",
    ];
    let (size, chunk);
    match &kind {
        Kind::Thick { bytes, chunk: c } => {
            size = format!("{bytes}b");
            chunk = format!("{c}b");
            arguments.extend(["-L", &size, "-c", &chunk, "-p", "rw"]);
        }
        // Not skipped at activation, and active at once.
        Kind::Thin { .. } => arguments.extend(["-kn", "-ay"]),
    }
    arguments.push(&source);
    journal.intend(&object)?;
    if let Err(error) = lvm("lvcreate", &arguments) {
        let error = Error::new(Code::SnapshotFailed, source).because(error);
        // It may have failed after the LV was made.
        return Err(match lvm::get(&origin.vg, &lv) {
            Err(_) => match journal.gone(&object) {
                Ok(()) => error,
                Err(journal) => journal.because(error),
            },
            Ok(_) => match remove(&origin.vg, &lv, journal) {
                Ok(()) => error,
                Err(left) => left.because(error),
            },
        });
    }
    let snapshot = LvSnapshot {
        vg: origin.vg.clone(),
        device: Device {
            path: PathBuf::from(format!("/dev/{}/{lv}", origin.vg)),
            size: origin.size,
        },
        lv,
        kind,
        journal: journal.clone(),
        removed: false,
    };
    // Never the live disk: what we have must be a snapshot, of this origin, and valid.
    snapshot.verify(&origin).map(|()| snapshot)
}

/// A snapshot LV of ours.
#[derive(Debug)]
pub(super) struct LvSnapshot {
    vg: String,
    lv: String,
    device: Device,
    kind: Kind,
    journal: Arc<Journal>,
    removed: bool,
}

impl LvSnapshot {
    fn verify(&self, origin: &LvInfo) -> Result<()> {
        let made = lvm::get(&self.vg, &self.lv)?;
        let wrong = |what: &str| {
            Err(Error::new(
                Code::SnapshotFailed,
                format!("{}/{}: {what}", self.vg, self.lv),
            ))
        };
        if made.origin.as_deref() != Some(&origin.lv) {
            return wrong("it is not a snapshot of the disk that was asked for");
        }
        if made.devno.is_none() {
            return wrong("it is not active");
        }
        if self.status()? == Status::Invalid {
            return wrong("it is invalid from its start");
        }
        Ok(())
    }

    fn remove(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.removed, true) {
            return Ok(());
        }
        remove(&self.vg, &self.lv, &self.journal)
    }
}

/// Removes an LV that this job made. Waits a little for a device that is busy.
fn remove(vg: &str, lv: &str, journal: &Journal) -> Result<()> {
    let name = format!("{vg}/{lv}");
    remove_named(&name)?;
    journal.gone(&Object::Lv {
        vg: vg.to_owned(),
        lv: lv.to_owned(),
    })
}

/// As [`remove`], without a journal: for the sweep.
pub(super) fn remove_named(name: &str) -> Result<()> {
    let begun = Instant::now();
    loop {
        let Err(error) = lvm("lvremove", &["--yes", name]) else {
            return Ok(());
        };
        if begun.elapsed() > BUSY_PATIENCE {
            return Err(Error::new(Code::ReleaseFailed, format!("snapshot {name}")).because(error));
        }
        std::thread::sleep(BUSY_PAUSE);
    }
}

impl Snapshot for LvSnapshot {
    fn device(&self) -> Device {
        self.device.clone()
    }

    fn describe(&self) -> String {
        match &self.kind {
            Kind::Thick { bytes, .. } => format!("thick {} MiB", bytes >> 20),
            Kind::Thin { pool } => format!("thin in pool {pool}"),
        }
    }

    fn status(&self) -> Result<Status> {
        match &self.kind {
            Kind::Thick { .. } => status::thick(&dm_name(&self.vg, &self.lv)),
            Kind::Thin { pool } => status::thin(&format!("{}-tpool", dm_name(&self.vg, pool))),
        }
    }

    fn close(mut self: Box<Self>) -> Result<()> {
        self.remove()
    }
}

impl Drop for LvSnapshot {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            log::error!("{}", error.report());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_size_of_thick_snapshots() {
        const MIB: u64 = 1 << 20;
        let bytes = |size, origin| thick_bytes(size, origin, 4 * MIB, DEFAULT_CHUNK) / MIB;
        assert_eq!(bytes(Size::Percent(20), 1024 * MIB), 208);
        assert_eq!(bytes(Size::Bytes(10 * MIB), 1024 * MIB), 12);
        assert_eq!(bytes(Size::Bytes(1), 1024 * MIB), 4);
        // A whole copy, its table and its header: 1024 MiB + 4 table chunks + 2.
        assert_eq!(bytes(Size::Bytes(1 << 40), 1024 * MIB), 1028);
    }
}
