//! A guest: its name, its disks, its definition.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::pve;
use crate::hostdev::lvname::LvName;

/// One disk of a guest on this host.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum DiskSource {
    /// A logical volume.
    Lv(LvName),
    /// A raw image file.
    File(PathBuf),
}

impl std::fmt::Display for DiskSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DiskSource::Lv(name) => name.fmt(f),
            DiskSource::File(path) => {
                f.write_str(&crate::error::escape(path.as_os_str().as_encoded_bytes()))
            }
        }
    }
}

/// A file on this host that defines a guest.
#[derive(Clone, PartialEq, Eq)]
pub struct DefinitionFile {
    /// Its name without folders.
    pub name: OsString,
    /// Its contents.
    pub bytes: Arc<[u8]>,
}

// Definitions may contain passwords.
impl std::fmt::Debug for DefinitionFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("DefinitionFile").field(&self.name).finish()
    }
}

impl DefinitionFile {
    /// The file at a path.
    pub(crate) fn new(path: &Path, bytes: &[u8]) -> DefinitionFile {
        DefinitionFile {
            name: path.file_name().unwrap_or_default().to_owned(),
            bytes: bytes.into(),
        }
    }
}

/// A disk in a definition that guestsnap does not cover.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UncoveredDisk {
    /// Its name in the definition.
    pub what: String,
    /// Reason why it is left out.
    pub reason: String,
    /// Meaning of its absence from the backup.
    pub absence: Absence,
}

/// Meaning of the absence of a disk from a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absence {
    /// Its files are missing: an error.
    Lost,
    /// It is no disk of the guest: a drive for removable media, a folder of the host.
    NoDisk,
    /// The guest's definition says that its owner wants no backup of it.
    NotWanted,
}

/// A guest: its name in the catalog and its disks in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// One path component of the catalog path; never empty, no `/`, not `.` or `..`.
    pub name: String,
    /// Disks in the order of the guest's definition.
    pub disks: Vec<DiskSource>,
    /// Possible names of each disk in the guest (`vda`, `xvda2`); empty if unknown.
    pub disk_names: Vec<Vec<String>>,
    /// The path at which the guest's definition mounts each disk, without slashes at its ends; empty:
    /// the root. `None`: the guest's fstab tells.
    pub places: Vec<Option<String>>,
    /// Disks that are not covered.
    pub uncovered: Vec<UncoveredDisk>,
    /// The file that defines it, if one does.
    pub file: Option<DefinitionFile>,
    /// If it is a guest of Proxmox VE: how commands reach it.
    pub pve: Option<pve::Handle>,
    /// Reason to doubt that the disks belong to the host's guest of this name. If set, never run a
    /// command against that guest. Checked only if a command would name it.
    pub doubt: Option<String>,
}
