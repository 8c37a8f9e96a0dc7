//! The kernel's list of unmounted btrfs devices.
//!
//! Mounting a btrfs, and udev for each one it sees, registers the device with the kernel under the
//! filesystem's id. Of two clones the kernel registers one. Before 6.7 it refuses to mount the
//! other if that has an earlier generation.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use super::mount::failed;
use crate::error::Result;
use crate::sys::btrfs::forget_device;

const CONTROL: &str = "/dev/btrfs-control";

/// Retries for a device that is still in use, and the wait between them.
const BUSY_TRIES: u32 = 200;
const BUSY_WAIT: std::time::Duration = std::time::Duration::from_millis(10);

/// A device that the kernel keeps registered after the unmount, under a path that soon names
/// another device. Dropped from the kernel's list on close.
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
        // A forked child of another thread keeps the mount open until its exec.
        let mut forgotten = forget_device(&control, &path);
        for _ in 0..BUSY_TRIES {
            let busy = |e: &std::io::Error| e.raw_os_error() == Some(libc::EBUSY);
            if !forgotten.as_ref().is_err_and(busy) {
                break;
            }
            std::thread::sleep(BUSY_WAIT);
            forgotten = forget_device(&control, &path);
        }
        match forgotten {
            // Newer kernels drop a single device themselves.
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

/// Drops the other unmounted devices with this id from the kernel's list; returns their names.
///
/// This is harmless: a single-device filesystem, the only kind mounted here, is registered again at
/// its mount. udev's records give the ids, so no device is read. A loop device without a file is
/// dropped whatever it held.
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
        // ENOENT: the device was not registered. EBUSY: it is mounted.
        if forget_device(&control, &path).is_ok() {
            forgotten.push(name);
        }
    }
    forgotten
}

/// Whether udev's record describes a btrfs with this id.
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
