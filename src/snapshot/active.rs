//! Activates inactive volumes, such as those of guests that are off, for the duration of a backup.
//!
//! The journal records a volume before its activation. After its snapshots are removed, the volume
//! is deactivated, unless its guest has started. After a crash the sweep does this.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::command::Program;
use super::lvm::{GROUPS, LvInfo, LvmUuid, lvm};
use super::volume::dm_uuid;
use super::{Journal, Object, dm};
use crate::error::{Code, Error, Result};
use crate::hostdev::lvname::LvName;
use crate::point::{Point, pass, reach};

/// Time limit for deactivating a volume just closed: udev may have it open.
const PATIENCE: Duration = Duration::from_secs(10);
/// Wait between two attempts.
const PAUSE: Duration = Duration::from_millis(250);

/// Volumes activated by jobs of this process, with their number of users. Changed only with the
/// group's turn held.
static USERS: Mutex<BTreeMap<String, u32>> = Mutex::new(BTreeMap::new());

fn users() -> MutexGuard<'static, BTreeMap<String, u32>> {
    USERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A volume activated by a job of this process. Dropping it deactivates the volume, unless another
/// job uses it.
#[derive(Debug)]
pub(super) struct Activated {
    name: LvName,
    uuid: LvmUuid,
    dm_uuid: String,
    journal: Arc<Journal>,
    object: Object,
    open: bool,
}

impl Activated {
    /// Activates a volume, or joins a job that has. `None`: it is already active otherwise.
    pub fn of(lv: &LvInfo, journal: &Arc<Journal>) -> Result<Option<Activated>> {
        let dm_uuid = dm_uuid(&lv.vg_uuid, &lv.uuid);
        let _turn = GROUPS.take(lv.name.vg());
        let joined = users().contains_key(&dm_uuid);
        if lv.active && !joined {
            return Ok(None);
        }
        let object = Object::Activated {
            vg: lv.name.vg().clone(),
            name: lv.name.lv().to_owned(),
            uuid: lv.uuid.to_string(),
            dm_uuid: dm_uuid.clone(),
        };
        journal.intend(&object)?;
        *users().entry(dm_uuid.clone()).or_default() += 1;
        let activated = Activated {
            name: lv.name.clone(),
            uuid: lv.uuid.clone(),
            dm_uuid,
            journal: journal.clone(),
            object,
            open: true,
        };
        if joined {
            return Ok(Some(activated));
        }
        let done = reach(Point::Activate)
            .map_err(|errno| Error::new(Code::CommandFailed, "lvchange").because(errno))
            .and_then(|()| change("y", &activated.name, activated.uuid.as_str()));
        if let Err(error) = done {
            let text = format!("{}: activating it", activated.name);
            drop(_turn);
            drop(activated);
            return Err(Error::new(Code::SnapshotFailed, text).because(error));
        }
        pass(Point::Activated);
        Ok(Some(activated))
    }

    /// Deactivates the volume if this is its last user.
    pub fn close(mut self) -> Result<()> {
        self.release()
    }

    fn release(&mut self) -> Result<()> {
        self.open = false;
        let _turn = GROUPS.take(self.name.vg());
        let last = {
            let mut users = users();
            let left = users.get(&self.dm_uuid).copied().unwrap_or(1) - 1;
            match left {
                0 => users.remove(&self.dm_uuid),
                _ => users.insert(self.dm_uuid.clone(), left),
            };
            left == 0
        };
        if last {
            let end = deactivate(&self.name, self.uuid.as_str(), &self.dm_uuid)?;
            if let End::InUse(why) = end {
                log::info!("{} stays active: {why}", self.name);
                if self.journal.has_snapshot_of(&self.name) {
                    // The sweep removes that snapshot first.
                    return Ok(());
                }
            }
        }
        self.journal.gone(&self.object);
        Ok(())
    }
}

impl Drop for Activated {
    fn drop(&mut self) {
        // While panicking, this thread may hold the group's turn: leave it to the sweep.
        if !self.open || std::thread::panicking() {
            return;
        }
        if let Err(error) = self.release() {
            log::error!("{}", error.report());
        }
    }
}

/// Result of a deactivation.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// It is not active any more.
    Inactive,
    /// In use; the text says how.
    InUse(&'static str),
}

/// Deactivates a volume that a job activated, unless it is in use. The caller holds the group's
/// turn.
pub(super) fn deactivate(name: &LvName, uuid: &str, dm_uuid: &str) -> Result<End> {
    let failed = |error: Error| {
        Error::new(Code::ReleaseFailed, format!("{name}: deactivating it")).because(error)
    };
    let started = Instant::now();
    loop {
        let Some(device) = dm::by_uuid(dm_uuid)? else {
            return Ok(End::Inactive);
        };
        if dm::by_uuid(&format!("{dm_uuid}-real"))?.is_some() {
            return Ok(End::InUse("it has snapshots"));
        }
        let patient = started.elapsed() < PATIENCE;
        if !device.open {
            let done = reach(Point::Deactivate)
                .map_err(|errno| Error::new(Code::CommandFailed, "lvchange").because(errno))
                .and_then(|()| change("n", name, uuid));
            pass(Point::Deactivated);
            match done {
                Ok(()) if dm::by_uuid(dm_uuid)?.is_none() => return Ok(End::Inactive),
                Ok(()) if !patient => {
                    let text = "lvchange reported no failure, and it is still active";
                    return Err(failed(Error::new(Code::CommandFailed, text)));
                }
                Err(error) if !patient => return Err(failed(error)),
                _ => {}
            }
        } else if !patient {
            return Ok(End::InUse("it is open, its guest may have been started"));
        }
        sleep(PAUSE);
    }
}

/// Selects by UUID: another volume may have taken the name.
fn change(to: &str, name: &LvName, uuid: &str) -> Result<()> {
    lvm(Program::Lvchange)
        .args(["--activate", to, "--ignoreactivationskip"])
        .args(["--select", &format!("lv_uuid=\"{uuid}\""), name.vg()])
        .run()
        .map(drop)
}
