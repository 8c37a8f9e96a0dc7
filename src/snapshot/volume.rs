//! A snapshot volume, thick or thin: creation, monitoring, removal.

use std::path::PathBuf;

use super::active::Activated;
use super::command::Program;
use super::drbd::Below;
use super::journal::Intent;
use super::lvm::{LvInfo, LvmUuid, lvm, lvm_beside_suspended};
use super::names::TAG;
use super::probe::Probe;
use super::remove::{Removal, remove_all};
use super::thin::Pool;
use super::{Device, Snapshot, Status, dm};
use crate::error::{Code, Error, Result};
use crate::hostdev::lvname::LvName;
use crate::hostdev::uses;
use crate::point::{Point, pass, reach};

/// Kind of a snapshot, decided in advance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// With its own copy-on-write volume.
    Thick { extents: u64, chunk: u64 },
    /// In its origin's pool.
    Thin { pool: Pool },
}

impl Kind {
    /// Text for display.
    pub fn describe(&self, extent_size: u64) -> String {
        match self {
            Kind::Thick { extents, .. } => {
                let bytes = extents.saturating_mul(extent_size);
                format!("{} thick", super::human(bytes))
            }
            Kind::Thin { .. } => "thin".to_owned(),
        }
    }
}

/// A snapshot about to be taken; checked and journaled.
#[derive(Debug)]
pub(super) struct Plan {
    pub origin: LvInfo,
    pub kind: Kind,
    pub intent: Intent,
    /// Keeps the origin active.
    pub activated: Option<Activated>,
    /// See [`Request::in_container`](super::Request::in_container).
    pub in_container: bool,
    /// Its place below DRBD, if it is below.
    pub below: Option<Below>,
}

/// Why a snapshot was not taken, and its possible remains.
#[derive(Debug)]
pub(super) struct NotTaken {
    pub error: Error,
    pub leftover: Option<Removal>,
}

impl NotTaken {
    /// A failure that left nothing behind.
    pub fn without_leftover(error: Error) -> Box<NotTaken> {
        Box::new(NotTaken {
            error,
            leftover: None,
        })
    }
}

impl Plan {
    /// Takes the snapshot. The caller holds the group's lock. On failure it releases the lock, then
    /// removes the remains. `beside_suspended`: volumes are suspended meanwhile.
    pub fn take(self, beside_suspended: bool) -> std::result::Result<LvSnapshot, Box<NotTaken>> {
        let name = self.intent.name().clone();
        let job_tag = self.intent.journal().tag().to_lvm_tag();
        let call = match beside_suspended {
            true => lvm_beside_suspended(Program::Lvcreate),
            false => lvm(Program::Lvcreate),
        };
        let call = call
            .args(["--yes", "--snapshot", "--permission", "rw"])
            .args(["--name", name.lv()])
            .args(["--addtag", TAG, "--addtag", &job_tag]);
        let call = match &self.kind {
            Kind::Thick { extents, chunk } => call
                .args(["--extents", &extents.to_string()])
                .args(["--chunksize", &format!("{chunk}b")]),
            // LVM does not activate thin snapshots by default.
            Kind::Thin { .. } => call.args(["--setactivationskip", "n"]),
        };
        let what = format!("{} of {}", self.intent.name(), self.origin.name);
        let call = call.arg(self.origin.name.to_string());
        let injected = |errno| Error::new(Code::CommandFailed, "lvcreate").because(errno);
        let verified = reach(Point::Lvcreate)
            .map_err(injected)
            .and_then(|()| call.run())
            .and_then(|_| reach(Point::LvcreateDone).map_err(injected))
            .and_then(|()| self.verify(&name))
            .and_then(|verified| match &self.below {
                Some(below) => below.check(&self.origin).map(|()| verified),
                None => Ok(verified),
            });
        match verified {
            Ok((uuid, path)) => {
                self.intent.created(&uuid);
                pass(Point::LvcreateKnown);
                Ok(LvSnapshot {
                    probe: self.probe(&name, &uuid),
                    path,
                    // Metadata of DRBD follow the guest's disk.
                    size: self.below.as_ref().map_or(self.origin.size, |b| b.bytes),
                    below: self.below,
                    kind: self.kind,
                    extent_size: self.origin.extent_size,
                    removal: Some(Removal::verified(name, uuid, self.intent, self.activated)),
                })
            }
            // A failed lvcreate rolls back. If it does not, the tags identify the volume.
            Err(error) => Err(Box::new(NotTaken {
                error: Error::new(Code::SnapshotFailed, what).because(error),
                leftover: Some(Removal::unverified(
                    name,
                    job_tag,
                    self.intent,
                    self.activated,
                )),
            })),
        }
    }

    fn probe(&self, name: &LvName, uuid: &LvmUuid) -> Probe {
        let dm_uuid = dm_uuid(&self.origin.vg_uuid, uuid);
        match &self.kind {
            Kind::Thick { .. } => Probe::thick(name.clone(), dm_uuid),
            Kind::Thin { pool } => Probe::thin(name.clone(), dm_uuid, pool.clone()),
        }
    }

    /// Verifies the result of `lvcreate` with the kernel: the device, that it is a snapshot, and its
    /// origin.
    fn verify(&self, name: &LvName) -> Result<(LvmUuid, PathBuf)> {
        let wrong = |what: &str| Error::new(Code::SnapshotFailed, format!("{name} {what}"));
        let info = dm::by_name(&name.dm_name())?.ok_or_else(|| wrong("has no device"))?;
        let uuid = info
            .uuid
            .strip_prefix(&format!("LVM-{}", self.origin.vg_uuid.compact()))
            .and_then(LvmUuid::from_compact)
            .ok_or_else(|| wrong("is not a volume of that group"))?;
        let table = dm::table(&info.uuid)?.unwrap_or_default();
        let [target] = table.as_slice() else {
            return Err(wrong("has an unexpected table"));
        };
        let words: Vec<&str> = target.params.split(' ').collect();
        let origin = dm_uuid(&self.origin.vg_uuid, &self.origin.uuid);
        let related = match &self.kind {
            // `ORIGIN COW P CHUNK`
            Kind::Thick { .. } => {
                let real = dm::by_uuid(&format!("{origin}-real"))?;
                target.kind == "snapshot" && is_device(words.first(), real.as_ref())
            }
            // `POOL ID`; only the pool and LVM know the origin.
            Kind::Thin { pool } => {
                target.kind == "thin"
                    && is_device(words.first(), dm::by_uuid(&pool.dm_uuid)?.as_ref())
            }
        };
        if !related {
            return Err(wrong("is not a snapshot of its origin"));
        }
        if target.length.checked_mul(512) != Some(self.origin.size) {
            return Err(wrong("differs from its origin in size"));
        }
        let path = PathBuf::from("/dev/mapper").join(name.dm_name());
        if uses::block_devno(&path) != Some(info.devno) {
            return Err(wrong("has no device node"));
        }
        Ok((uuid, path))
    }
}

fn is_device(word: Option<&&str>, device: Option<&dm::Info>) -> bool {
    match (word, device) {
        (Some(word), Some(dm::Info { devno, .. })) => **word == format!("{}:{}", devno.0, devno.1),
        _ => false,
    }
}

/// Device-mapper UUID of a visible volume.
pub(super) fn dm_uuid(vg: &LvmUuid, lv: &LvmUuid) -> String {
    format!("LVM-{}{}", vg.compact(), lv.compact())
}

/// An existing thick or thin snapshot.
#[derive(Debug)]
pub struct LvSnapshot {
    probe: Probe,
    path: PathBuf,
    size: u64,
    kind: Kind,
    below: Option<Below>,
    extent_size: u64,
    /// `None` once removal has begun.
    removal: Option<Removal>,
}

impl Snapshot for LvSnapshot {
    fn device(&self) -> Device {
        Device {
            path: self.path.clone(),
            size: self.size,
            read_only: false,
        }
    }

    fn describe(&self) -> String {
        let kind = self.kind.describe(self.extent_size);
        match &self.below {
            Some(below) => format!("{kind} {below}"),
            None => kind,
        }
    }

    fn status(&self) -> Result<Status> {
        self.probe.status()
    }

    fn probe(&self) -> Option<Probe> {
        Some(self.probe.clone())
    }

    fn removal(&mut self) -> Option<Removal> {
        self.removal.take()
    }

    fn close(mut self: Box<Self>) -> Result<()> {
        remove_all(self.removal.take().into_iter().collect())
    }
}

impl Drop for LvSnapshot {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.removal.take().map(|removal| remove_all(vec![removal])) {
            log::error!("{}", error.report());
        }
    }
}
