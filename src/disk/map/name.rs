//! Names of device-mapper devices, and the services that a map needs from its job.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;

use crate::hostdev::names::{DM_UUID_PREFIX, PREFIX, dm_uuid};
use crate::{Code, Error, Result};

/// Name of a device-mapper device of ours: `guestsnap-` and letters, digits, `_.-`. At most 58
/// bytes: the UUID adds a prefix of 69, and the kernel accepts 127.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DmName(String);

impl DmName {
    /// Validates a name.
    pub fn new(name: impl Into<String>) -> Option<Self> {
        let name = name.into();
        let rest = name.strip_prefix(PREFIX)?;
        let fine = !rest.is_empty()
            // The UUID holds prefix and name.
            && name.len() + DM_UUID_PREFIX.len() <= 127
            && rest.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
        fine.then_some(DmName(name))
    }

    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The device's UUID.
    pub fn uuid(&self) -> String {
        dm_uuid(&self.0)
    }
}

impl std::fmt::Display for DmName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Services that maps need from their job, mainly device names. The job's implementation journals
/// each name before returning it, so that a sweep can find the device.
pub trait Namer {
    /// Returns an unused device name.
    fn next(&mut self) -> Result<DmName>;

    /// Creates an empty unnamed file for writes to a thin volume.
    fn scratch(&self) -> Result<File>;

    /// Whether the job is cancelled.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Device names for tests and tools without a journal: a prefix and a counter.
#[derive(Debug)]
pub struct CountingNamer {
    stem: String,
    count: u32,
}

impl CountingNamer {
    /// Generates `guestsnap-STEM-1`, `guestsnap-STEM-2`, …
    pub fn new(stem: impl Into<String>) -> Self {
        CountingNamer {
            stem: stem.into(),
            count: 0,
        }
    }
}

impl Namer for CountingNamer {
    fn next(&mut self) -> Result<DmName> {
        self.count += 1;
        let name = format!("{}{}-{}", PREFIX, self.stem, self.count);
        DmName::new(name.clone()).ok_or_else(|| Error::new(Code::Internal, format!("name {name}")))
    }

    fn scratch(&self) -> Result<File> {
        let folder = std::env::temp_dir();
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .open(&folder);
        file.map_err(|error| {
            Error::new(Code::MapFailed, folder.display().to_string()).because(error)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_names() {
        assert_eq!(
            DmName::new("guestsnap-12-1").unwrap().uuid(),
            "LVM-guestsnap_private_device_of_a_backup_job________________________.guestsnap:12:1"
        );
        assert!(DmName::new("vg0-root").is_none());
        assert!(DmName::new("guestsnap-").is_none());
        assert!(DmName::new("guestsnap-a/b").is_none());
        assert!(DmName::new(format!("guestsnap-{}", "x".repeat(49))).is_none());
        assert!(DmName::new(format!("guestsnap-{}", "x".repeat(48))).is_some());
    }
}
