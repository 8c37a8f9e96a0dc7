//! What the kernel remembers of btrfs devices that are not mounted.
//!
//! Whoever mounts a btrfs, and udev with every one it sees, makes the kernel remember the device by
//! the filesystem's id. Of two clones it remembers one, and before 6.7 refuses to mount the other
//! when that is of an earlier generation.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use super::mount::failed;
use crate::error::Result;
use crate::sys::btrfs::forget_device;

const CONTROL: &str = "/dev/btrfs-control";

/// A device that the kernel remembers after the unmount, by a path that soon means something else.
/// Forgotten on close.
#[derive(Debug)]
pub(super) struct BtrfsDevice {
    device: Option<OwnedFd>,
    what: String,
}

impl BtrfsDevice {
    pub(super) fn new(device: BorrowedFd<'_>, what: &str) -> Result<BtrfsDevice> {
        let copy = device
            .try_clone_to_owned()
            .map_err(|e| failed(what, "dup").because(e))?;
        Ok(BtrfsDevice {
            device: Some(copy),
            what: what.to_owned(),
        })
    }

    pub(super) fn device(&self) -> Option<&OwnedFd> {
        self.device.as_ref()
    }

    pub(super) fn close(mut self) -> Result<()> {
        self.forget()
    }

    fn forget(&mut self) -> Result<()> {
        let Some(device) = self.device.take() else {
            return Ok(());
        };
        let wrong = |e: std::io::Error| failed(&self.what, "forgetting the device").because(e);
        let control = File::open(CONTROL).map_err(wrong)?;
        let path = CString::new(format!("/proc/self/fd/{}", device.as_raw_fd()))
            .map_err(|e| wrong(e.into()))?;
        match forget_device(&control, &path) {
            // Newer kernels forget a single device by themselves.
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            result => result.map_err(wrong),
        }
    }
}

impl Drop for BtrfsDevice {
    fn drop(&mut self) {
        if let Err(error) = self.forget() {
            log::warn!("{}", error.report());
        }
    }
}

/// Makes the kernel forget the other devices with this id that are not mounted; their names.
///
/// That costs nobody anything: a filesystem on one device, as all are that we mount, is remembered
/// again when it is mounted. Which devices have the id udev knows; no device is read. A loop device
/// without a file is forgotten whatever was on it.
pub(super) fn forget_others(uuid: &str) -> Vec<String> {
    let Ok(control) = File::open(CONTROL) else {
        return Vec::new();
    };
    let devices = fs::read_dir("/sys/class/block").into_iter().flatten();
    let mut forgotten = Vec::new();
    for device in devices.flatten() {
        let folder = device.path();
        let Some(name) = device.file_name().to_str().map(str::to_owned) else {
            continue;
        };
        let read = |file: &Path| fs::read_to_string(file).unwrap_or_default();
        let number = read(&folder.join("dev"));
        let known = read(&Path::new("/run/udev/data").join(format!("b{}", number.trim())));
        let unbound = name.starts_with("loop") && !folder.join("loop").exists();
        if !unbound && !has_id(&known, uuid) {
            continue;
        }
        let Ok(path) = CString::new(format!("/dev/{name}")) else {
            continue;
        };
        // ENOENT: the kernel did not remember it. EBUSY: it is mounted.
        if forget_device(&control, &path).is_ok() {
            forgotten.push(name);
        }
    }
    forgotten
}

/// Whether udev's record of a device says that it is a btrfs with this id.
fn has_id(record: &str, uuid: &str) -> bool {
    let value = |key: &str| {
        record.lines().find_map(|line| {
            line.strip_prefix("E:")?
                .strip_prefix(key)?
                .strip_prefix('=')
        })
    };
    value("ID_FS_TYPE") == Some("btrfs") && value("ID_FS_UUID") == Some(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_a_record_of_udev_tells_whose_device_it_is() {
        let record = "S:disk/by-id/dm-name-vg0-web\nI:123\nE:ID_FS_UUID=11-22\nE:ID_FS_UUID_SUB=33\n\
                      E:ID_FS_TYPE=btrfs\nG:systemd\n";
        assert!(has_id(record, "11-22"));
        assert!(!has_id(record, "11"));
        assert!(!has_id(record, "33"));
        assert!(!has_id(&record.replace("btrfs", "ext4"), "11-22"));
        assert!(!has_id("", "11-22"));
        assert!(
            forget_others("no such id")
                .iter()
                .all(|name| name.starts_with("loop"))
        );
    }
}
