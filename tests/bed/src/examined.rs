//! Disks of a guest as the library examines and maps them, and partition tables by `sfdisk`.

use crate::{Result, cmd};
use guestsnap::disk::{Examined, FileDisk, Mapped, ReadAt, Volume};
use std::path::Path;

/// The disks for [`guestsnap::disk::examine()`].
pub fn refs(disks: &[FileDisk]) -> Vec<&dyn ReadAt> {
    disks.iter().map(|d| d as &dyn ReadAt).collect()
}

/// The volume of this name; panics if there is none.
pub fn volume<'a>(found: &'a Examined, name: &str) -> &'a Volume {
    let names: Vec<&str> = found.volumes.iter().map(|v| v.name.as_str()).collect();
    let found = found.volumes.iter().find(|v| v.name == name);
    found.unwrap_or_else(|| panic!("{name} is not in {names:?}"))
}

/// All bytes of a mapped volume.
pub fn device_bytes(mapped: &Mapped) -> Vec<u8> {
    let all = std::fs::read(mapped.path()).unwrap();
    assert_eq!(u64::try_from(all.len()).unwrap(), mapped.size());
    all
}

/// Writes a partition table; the kernel is not told.
pub fn sfdisk(disk: &Path, script: &str) -> Result {
    let disk = disk.display().to_string();
    let args = ["--no-reread", "--no-tell-kernel", "-q", &disk];
    cmd::run_with_input("sfdisk", args, script.as_bytes())?;
    Ok(())
}
