//! Queries device-mapper: status and tables of snapshots, existence of devices.

use devicemapper::{
    DM, DevId, DmError, DmFlags, DmName, DmOptions, DmResult, DmUuid, errors::Error as CoreError,
};

use crate::error::{Code, Error, Result};
use crate::point::{Point, reach};

/// Control device of the device-mapper driver.
const CONTROL: &str = "/dev/mapper/control";

/// One line of a table or status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// Length in sectors.
    pub length: u64,
    /// Target type: `snapshot`, `thin-pool` …
    pub kind: String,
    /// Remaining parameters.
    pub params: String,
}

/// Kernel state of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Info {
    /// Major and minor number.
    pub devno: (u32, u32),
    /// UUID; empty when it has none.
    pub uuid: String,
    /// Open or used by another device.
    pub open: bool,
    /// Suspended: I/O blocks.
    pub suspended: bool,
}

fn failed(what: &str, error: DmError) -> Error {
    Error::new(Code::SnapshotStatus, format!("device-mapper: {what}")).because(error)
}

fn no_such_device(error: &DmError) -> bool {
    matches!(error, DmError::Core(CoreError::Ioctl(_, _, _, errno))
        if **errno as i32 == libc::ENXIO)
}

/// Queries one device; `None` if no device has this name or UUID.
fn ask<T>(what: &str, question: impl FnOnce(&DM) -> DmResult<T>) -> Result<Option<T>> {
    if !std::path::Path::new(CONTROL).exists() {
        return Ok(None);
    }
    let dm = DM::new().map_err(|error| failed(what, error))?;
    match question(&dm) {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if no_such_device(&error) => Ok(None),
        Err(error) => Err(failed(what, error)),
    }
}

fn targets(uuid: &str, flags: DmFlags) -> Result<Option<Vec<Target>>> {
    ask(uuid, |dm| {
        let id = DevId::Uuid(DmUuid::new(uuid)?);
        let (_, lines) = dm.table_status(&id, DmOptions::default().set_flags(flags))?;
        Ok(lines
            .into_iter()
            .map(|(_, length, kind, params)| Target {
                length,
                kind,
                params,
            })
            .collect())
    })
}

/// The status lines of the device with this UUID; `None`: no such device.
pub(super) fn status(uuid: &str) -> Result<Option<Vec<Target>>> {
    reach(Point::SnapshotStatus)
        .map_err(|errno| Error::new(Code::SnapshotStatus, uuid).because(errno))?;
    targets(uuid, DmFlags::DM_NOFLUSH)
}

/// The table of the device with this UUID; `None`: no such device.
pub(super) fn table(uuid: &str) -> Result<Option<Vec<Target>>> {
    targets(uuid, DmFlags::DM_STATUS_TABLE)
}

fn info(what: &str, id: DmResult<DevId<'_>>) -> Result<Option<Info>> {
    ask(what, |dm| {
        let info = dm.device_info(&id?)?;
        let device = info.device();
        let uuid = info.uuid().map(|uuid| uuid.as_bytes()).unwrap_or_default();
        Ok(Info {
            devno: (device.major, device.minor),
            uuid: String::from_utf8_lossy(uuid).into_owned(),
            open: info.open_count() > 0,
            suspended: info.flags().contains(DmFlags::DM_SUSPEND),
        })
    })
}

/// The device with this name.
pub(super) fn by_name(name: &str) -> Result<Option<Info>> {
    info(name, DmName::new(name).map(DevId::Name))
}

/// The device with this UUID.
pub(super) fn by_uuid(uuid: &str) -> Result<Option<Info>> {
    info(uuid, DmUuid::new(uuid).map(DevId::Uuid))
}

/// Removes a device that the caller has proven to be guestsnap's and unused. Fails if the device is
/// still in use.
pub(super) fn remove(name: &str) -> Result<()> {
    let gone = ask(name, |dm| {
        let id = DevId::Name(DmName::new(name)?);
        dm.device_remove(&id, DmOptions::private())
    });
    gone.map(|_| ())
}

/// Whether the device with this UUID exists and is suspended.
pub(super) fn is_suspended(uuid: &str) -> Result<bool> {
    Ok(by_uuid(uuid)?.is_some_and(|device| device.suspended))
}

/// Suspends a device: new I/O blocks, earlier I/O has completed.
pub(super) fn suspend(uuid: &str) -> Result<()> {
    set_suspended(uuid, DmFlags::DM_SUSPEND)
}

/// Resumes a device: blocked I/O continues.
pub(super) fn resume(uuid: &str) -> Result<()> {
    set_suspended(uuid, DmFlags::empty())
}

fn set_suspended(uuid: &str, flag: DmFlags) -> Result<()> {
    let done = ask(uuid, |dm| {
        let id = DevId::Uuid(DmUuid::new(uuid)?);
        dm.device_suspend(&id, DmOptions::default().set_flags(flag))
    })?;
    done.map(drop)
        .ok_or_else(|| Error::new(Code::SnapshotStatus, format!("there is no device {uuid}")))
}
