//! Holds a guest's writes while snapshots of its thick volumes are taken.
//!
//! All origins are suspended; then `lvcreate` runs for each and resumes that origin. A guest with
//! suspended disks is worse than no backup. So an independent wake-up process resumes them in any
//! case ([`crate::wake`]), and the journal names them for the sweep.
//!
//! I/O to a suspended volume blocks, so no file needed by the wake-up or LVM may be on it. Volumes
//! used by the host in any way are not suspended ([`refusal`]).

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::lvm::LvInfo;
use super::volume::dm_uuid;
use super::{Journal, Object, dm};
use crate::error::{Code, Error, Result};
use crate::hostdev::uses;
use crate::point::{Point, pass, reach};
use crate::process;
use crate::wake::Guard;

/// Resumes each argument: plain `dmsetup` stops at the first missing device.
const RESUME: &str = "for d do dmsetup resume --noudevsync \"$d\" || r=1; done; exit $r";

/// Layouts known to work. A thin origin must not be suspended under LVM: its snapshot fails and
/// leaves a wrong transaction number in the pool.
const LAYOUTS: [&str; 2] = ["linear", "striped"];

/// Why an origin cannot be suspended during the snapshots of others. `None`: it can.
pub(super) fn refusal(origin: &LvInfo) -> Option<String> {
    let Some(devno) = origin.devno else {
        return Some("it is not active".to_owned());
    };
    if !origin.layout.iter().all(|word| LAYOUTS.contains(&&**word)) {
        return Some(format!("it is {}", origin.layout.join(",")));
    }
    if let Some(who) = uses::host_use(devno) {
        return Some(who.to_string());
    }
    // LVM reads stacked maps and loop devices, and would block.
    let holders = uses::names(&uses::folder(devno).join("holders"));
    let loops = uses::loops_on(|backing| uses::block_devno(backing) == Some(devno));
    let above = [holders, loops].concat();
    (!above.is_empty()).then(|| format!("the host has {} on it", above.join(", ")))
}

/// A suspended volume.
#[derive(Debug)]
struct Origin {
    name: String,
    dm_uuid: String,
    object: Object,
}

/// The suspended volumes of one guest; resumed on drop.
#[derive(Debug)]
pub(super) struct Hold {
    origins: Vec<Origin>,
    journal: Arc<Journal>,
    guard: Option<Guard>,
    since: Instant,
    limit: Duration,
    /// Why the wake-up has weaker guarantees than intended.
    pub weaker: Option<Error>,
}

/// Result of a hold.
#[derive(Debug)]
pub(super) struct Released {
    /// Time since the first suspend.
    pub held: Duration,
    /// Whether the wake-up fired before the release.
    pub early: bool,
    /// Error if a volume may still be suspended.
    pub problem: Option<Error>,
}

impl Hold {
    /// Suspends all volumes or none.
    pub fn start(origins: &[&LvInfo], journal: &Arc<Journal>, limit: Duration) -> Result<Hold> {
        for origin in origins {
            flush(origin)?;
        }
        let names = origins.iter().map(|origin| origin.name.dm_name());
        let mut command: Vec<String> = ["/bin/sh", "-c", RESUME, "sh"].map(str::to_owned).into();
        command.extend(names);
        process::find("dmsetup")?;
        let unarmed = |error| Error::new(Code::CommandFailed, "the wake-up").because(error);
        reach(Point::HoldArm).map_err(unarmed)?;
        let (guard, weaker) = Guard::arm(&command, limit)?;
        let mut hold = Hold {
            origins: Vec::new(),
            journal: journal.clone(),
            guard: Some(guard),
            since: Instant::now(),
            limit,
            weaker,
        };
        for origin in origins {
            if let Err(error) = hold.suspend(origin) {
                if let Some(problem) = hold.release().problem {
                    log::error!("{}", problem.report());
                }
                return Err(error);
            }
        }
        pass(Point::Held);
        Ok(hold)
    }

    fn suspend(&mut self, origin: &LvInfo) -> Result<()> {
        let dm_uuid = dm_uuid(&origin.vg_uuid, &origin.uuid);
        let failed = |error: Error| {
            Error::new(Code::CommandFailed, format!("suspending {}", origin.name)).because(error)
        };
        if dm::is_suspended(&dm_uuid)? {
            let text = format!("{} is suspended by somebody else", origin.name);
            return Err(Error::new(Code::CommandFailed, text));
        }
        let object = Object::Suspended {
            vg: origin.name.vg().clone(),
            name: origin.name.lv().to_owned(),
            dm_uuid: dm_uuid.clone(),
        };
        self.journal.intend(&object)?;
        self.origins.push(Origin {
            name: origin.name.to_string(),
            dm_uuid: dm_uuid.clone(),
            object,
        });
        // The host may have started to use it.
        if let Some(why) = refusal(origin) {
            return Err(failed(Error::new(Code::DiskInUse, why)));
        }
        reach(Point::HoldSuspend)
            .map_err(|errno| {
                failed(Error::new(Code::SnapshotStatus, dm_uuid.clone()).because(errno))
            })
            .and_then(|()| dm::suspend(&dm_uuid).map_err(failed))
    }

    /// Whether the volume is still suspended, without interruption since the start.
    pub fn holds(&mut self, origin: &LvInfo) -> bool {
        let fired = self.guard.as_mut().is_none_or(Guard::fired);
        !fired && dm::is_suspended(&dm_uuid(&origin.vg_uuid, &origin.uuid)).unwrap_or(false)
    }

    /// Whether time is left for optional work.
    pub fn has_time(&self) -> bool {
        self.since.elapsed() < self.limit / 3
    }

    /// Resumes the suspended volumes.
    pub fn release(mut self) -> Released {
        self.resume()
    }

    fn resume(&mut self) -> Released {
        pass(Point::HoldRelease);
        let early = self.guard.as_mut().is_none_or(Guard::fired);
        let woken = self.guard.take().map_or(Ok(()), Guard::release);
        let mut problem = None;
        for origin in self.origins.drain(..) {
            match resumed(&origin.dm_uuid) {
                Ok(()) => self.journal.gone(&origin.object),
                Err(error) => {
                    let text = format!("{} may still be suspended", origin.name);
                    problem = Some(Error::new(Code::ThawFailed, text).because(error));
                }
            }
        }
        if let Err(error) = woken {
            // They are resumed nevertheless.
            log::debug!("{error}");
        }
        pass(Point::HoldReleased);
        Released {
            held: self.since.elapsed(),
            early,
            problem,
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if self.guard.is_none() {
            return;
        }
        if let Some(problem) = self.resume().problem {
            log::error!("{}", problem.report());
        }
    }
}

/// Retries after a failed wake-up.
fn resumed(dm_uuid: &str) -> Result<()> {
    match dm::is_suspended(dm_uuid)? {
        true => dm::resume(dm_uuid),
        false => Ok(()),
    }
}

/// Writes back the host's cached data of a volume, so that suspending it is fast.
fn flush(origin: &LvInfo) -> Result<()> {
    let path = node(origin);
    let failed = |error| {
        let text = format!("{}: writing down what is in memory", origin.name);
        Error::new(Code::SnapshotStatus, text).because(error)
    };
    let file = File::open(path).map_err(failed)?;
    file.sync_all().map_err(failed)
}

/// The device node of a volume.
pub(super) fn node(origin: &LvInfo) -> PathBuf {
    Path::new("/dev/mapper").join(origin.name.dm_name())
}
