//! Device-mapper devices that udev rules ignore and that disappear with their last user.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use devicemapper::{DM, DevId, DmError, DmFlags, DmOptions, DmUuid};

use super::{DmName, Namer, SECTOR};
use crate::hostdev::holders;
use crate::point::{Point, pass, reach};
use crate::sys::blockdev;
use crate::{Code, Error, Result};

/// Time limit for the kernel to remove the device after its last close.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for a new device's node where udev, not devtmpfs, creates it.
const NODE_TIMEOUT: Duration = Duration::from_secs(10);

/// Handle to the kernel's device-mapper.
#[derive(Clone)]
pub(super) struct Control(Arc<DM>);

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Control")
    }
}

impl Control {
    /// Returns `None` if the host has no device-mapper, or no udev to announce new devices to.
    pub(super) fn open() -> Option<Self> {
        let dm = DM::new().ok()?;
        match dm.version() {
            Ok(_) => Some(Control(Arc::new(dm))),
            Err(error) => {
                log::debug!("device-mapper: {}", cause(&error));
                None
            }
        }
    }
}

/// One line of a table; its start follows from the preceding lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    sectors: u64,
    kind: &'static str,
    text: String,
}

impl Target {
    pub(super) fn new(sectors: u64, kind: &'static str, text: String) -> Self {
        Target {
            sectors,
            kind,
            text,
        }
    }
}

/// Access mode of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

impl Access {
    fn flags(self) -> DmFlags {
        match self {
            Access::Read => DmFlags::DM_READONLY,
            Access::Write => DmFlags::empty(),
        }
    }
}

/// A table in the kernel's form: start, sectors, target, parameters.
type Table = Vec<(u64, u64, String, String)>;

/// `major:minor`, the form used in tables.
pub(super) fn devno(number: u64) -> String {
    format!("{}:{}", libc::major(number), libc::minor(number))
}

/// A device-mapper device created by guestsnap.
#[derive(Debug)]
pub(super) struct DmDevice {
    control: Control,
    name: DmName,
    path: PathBuf,
    number: u64,
    size: u64,
    /// Open while the device is in use; the last close lets the kernel remove the device.
    file: Option<File>,
    /// Whether deferred removal is set.
    armed: bool,
    gone: bool,
}

impl DmDevice {
    /// Creates a device, verifies it, and sets its deferred removal.
    pub(super) fn create(
        control: &Control,
        names: &mut dyn Namer,
        targets: Vec<Target>,
        access: Access,
    ) -> Result<Self> {
        let name = names.next()?;
        let fail = |step: &str| {
            let detail = format!("{name}: {step}");
            move |error: io::Error| Error::new(Code::MapFailed, detail).because(error)
        };
        let uuid = name.uuid();
        let id = dm_name(&name).map_err(fail("name"))?;
        let uuid = DmUuid::new(&uuid)
            .map_err(|e| cause(&e))
            .map_err(fail("uuid"))?;
        let dm = &control.0;
        reach(Point::DmCreate)
            .map_err(io::Error::from)
            .map_err(fail("create"))?;
        let info = dm
            .device_create(id, Some(uuid), DmOptions::private())
            .map_err(|e| cause(&e))
            .map_err(fail("create"))?;
        let number = info.device();
        // From here on, dropping the value removes the device.
        let mut device = DmDevice {
            control: control.clone(),
            path: PathBuf::from(format!("/dev/dm-{}", number.minor)),
            number: libc::makedev(number.major, number.minor),
            size: targets.iter().fold(0, |sum, t| sum + t.sectors) * SECTOR,
            name: name.clone(),
            file: None,
            armed: false,
            gone: false,
        };
        pass(Point::DmCreated);
        let table = table(targets);
        device.activate(&table, access).map_err(fail("table"))?;
        device.verify(&table).map_err(fail("read back"))?;
        drop(table);
        device.open().map_err(fail("open"))?;
        device.arm().map_err(fail("arrange removal"))?;
        pass(Point::DmReady);
        Ok(device)
    }

    fn activate(&self, table: &Table, access: Access) -> io::Result<()> {
        let id = DevId::Name(dm_name(&self.name)?);
        let dm = &self.control.0;
        reach(Point::DmLoad)?;
        let options = DmOptions::default().set_flags(access.flags());
        dm.table_load(&id, table, options).map_err(|e| cause(&e))?;
        reach(Point::DmResume)?;
        // Without the suspend flag this call resumes. The udev flags keep scanners away.
        dm.device_suspend(&id, DmOptions::private())
            .map_err(|e| cause(&e))?;
        Ok(())
    }

    /// The kernel's current table.
    fn table(&self, flags: DmFlags) -> io::Result<Table> {
        let id = DevId::Name(dm_name(&self.name)?);
        let options = DmOptions::default().set_flags(flags);
        let (_, table) = self
            .control
            .0
            .table_status(&id, options)
            .map_err(|e| cause(&e))?;
        Ok(table)
    }

    fn verify(&self, table: &Table) -> io::Result<()> {
        if self.table(DmFlags::DM_STATUS_TABLE)? == *table {
            Ok(())
        } else {
            Err(io::Error::other("the kernel has another table"))
        }
    }

    fn open(&mut self) -> io::Result<()> {
        reach(Point::DmOpen)?;
        let deadline = Instant::now() + NODE_TIMEOUT;
        let file = loop {
            match File::options()
                .read(true)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&self.path)
            {
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound && Instant::now() < deadline =>
                {
                    sleep(Duration::from_millis(5));
                }
                other => break other?,
            }
        };
        let metadata = file.metadata()?;
        if !metadata.file_type().is_block_device() || metadata.rdev() != self.number {
            return Err(io::Error::other("the node belongs to another device"));
        }
        if blockdev::size(file.as_fd())? != self.size {
            return Err(io::Error::other("the device has another size"));
        }
        self.file = Some(file);
        Ok(())
    }

    fn arm(&mut self) -> io::Result<()> {
        let id = DevId::Name(dm_name(&self.name)?);
        let dm = &self.control.0;
        reach(Point::DmArm)?;
        let options = DmOptions::private().set_flags(DmFlags::DM_DEFERRED_REMOVE);
        dm.device_remove(&id, options).map_err(|e| cause(&e))?;
        let info = dm.device_info(&id).map_err(|e| cause(&e))?;
        if !info.flags().contains(DmFlags::DM_DEFERRED_REMOVE) {
            return Err(io::Error::other("the kernel did not take it"));
        }
        self.armed = true;
        Ok(())
    }

    /// Status line of the only target.
    pub(super) fn status(&self) -> io::Result<String> {
        match &mut self.table(DmFlags::empty())?[..] {
            [(_, _, _, status)] => Ok(std::mem::take(status)),
            _ => Err(io::Error::other("not one target")),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn name(&self) -> &DmName {
        &self.name
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Closes the device and waits until the kernel has removed it.
    pub(super) fn close(mut self) -> Result<()> {
        self.release()
    }

    fn release(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.gone, true) {
            return Ok(());
        }
        pass(Point::DmRelease);
        drop(self.file.take());
        let name = &self.name;
        let injected = reach(Point::DmReleased).map_err(io::Error::from);
        injected.and_then(|()| self.removed()).map_err(|error| {
            let holders = match error.kind() {
                io::ErrorKind::ResourceBusy => holders::describe_device(self.number),
                _ => String::new(),
            };
            Error::new(Code::ReleaseFailed, format!("{name}: remove{holders}")).because(error)
        })
    }

    /// Waits until the device is gone; requests removal if that is not yet deferred.
    fn removed(&self) -> io::Result<()> {
        let id = DevId::Name(dm_name(&self.name)?);
        let dm = &self.control.0;
        let deadline = Instant::now() + REMOVE_TIMEOUT;
        let mut wait = Duration::from_micros(500);
        loop {
            let answer = if self.armed {
                dm.device_info(&id)
                    .map(|_| io::ErrorKind::ResourceBusy.into())
            } else {
                dm.device_remove(&id, DmOptions::private())
                    .map(|_| io::ErrorKind::NotFound.into())
            };
            let error = answer.unwrap_or_else(|error| cause(&error));
            let missing = error.raw_os_error() == Some(libc::ENXIO);
            if missing || error.kind() == io::ErrorKind::NotFound {
                return Ok(());
            }
            if error.kind() != io::ErrorKind::ResourceBusy || Instant::now() > deadline {
                return Err(error);
            }
            sleep(wait);
            wait = (wait * 2).min(Duration::from_millis(50));
        }
    }
}

impl AsFd for DmDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // `create` returns open devices only, and only `release` takes the file.
        self.file.as_ref().expect("an open device").as_fd()
    }
}

impl Drop for DmDevice {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            log::error!("{}", error.report());
        }
    }
}

/// Lays out the targets one after the other.
fn table(targets: Vec<Target>) -> Table {
    let mut start = 0;
    let mut table = Vec::with_capacity(targets.len());
    for target in targets {
        table.push((start, target.sectors, target.kind.to_owned(), target.text));
        start += target.sectors;
    }
    table
}

fn dm_name(name: &DmName) -> io::Result<&devicemapper::DmName> {
    devicemapper::DmName::new(name.as_str()).map_err(|e| cause(&e))
}

/// The errno in the crate's error, whose own text dumps whole ioctl headers.
fn cause(error: &DmError) -> io::Error {
    match error {
        DmError::Core(devicemapper::errors::Error::Ioctl(_, _, _, errno)) => (**errno).into(),
        other => io::Error::other(other.to_string()),
    }
}
