//! What device-mapper says: status and tables of snapshots, and whether a device exists.

use devicemapper::{
    DM, DevId, DmError, DmFlags, DmName, DmOptions, DmResult, DmUuid, errors::Error as CoreError,
};

use crate::error::{Code, Error, Result};
use crate::point::{Point, reach};

/// The device file of the device-mapper driver.
const CONTROL: &str = "/dev/mapper/control";

/// One line of a table or of a status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// Sectors.
    pub length: u64,
    /// `snapshot`, `thin-pool` …
    pub kind: String,
    /// The rest.
    pub params: String,
}

/// A device as the kernel knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Info {
    /// Major and minor number.
    pub devno: (u32, u32),
    /// UUID; empty when it has none.
    pub uuid: String,
}

fn failed(what: &str, error: DmError) -> Error {
    Error::new(Code::SnapshotStatus, format!("device-mapper: {what}")).because(error)
}

fn no_such_device(error: &DmError) -> bool {
    matches!(error, DmError::Core(CoreError::Ioctl(_, _, _, errno))
        if **errno as i32 == libc::ENXIO)
}

/// Asks about one device; `None` when there is none of that name or UUID.
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

/// Removes a device that the caller has proven to be ours and unused; what still holds it makes
/// this fail.
pub(super) fn remove(name: &str) -> Result<()> {
    let gone = ask(name, |dm| {
        let id = DevId::Name(DmName::new(name)?);
        dm.device_remove(&id, DmOptions::private())
    });
    gone.map(|_| ())
}
