//! Where guests come from: a guest is a name and its ordered disks.

pub mod definition;
pub mod inventory;
pub mod libvirt;
pub mod quiesce;
pub mod select;
pub mod xl;

use std::path::PathBuf;

pub use inventory::{FixedInventory, Inventory, LvCandidate, LvKind};
pub use select::{Selection, select, unknown_sections};

/// One disk of a guest, on this host.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum DiskSource {
    /// A logical volume.
    Lv {
        /// Volume group.
        vg: String,
        /// Logical volume.
        lv: String,
    },
    /// A raw image file.
    File(PathBuf),
}

impl std::fmt::Display for DiskSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DiskSource::Lv { vg, lv } => write!(f, "{vg}/{lv}"),
            DiskSource::File(path) => {
                f.write_str(&crate::error::escape(path.as_os_str().as_encoded_bytes()))
            }
        }
    }
}

/// A disk that a definition names but guestsnap does not cover.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UncoveredDisk {
    /// As the definition names it.
    pub what: String,
    /// Why it is left out.
    pub reason: String,
    /// True when nobody expects its files in a backup (a CD drive): no warning is due.
    pub expected: bool,
}

/// A guest: its name in the catalog and its disks in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// One path component of the catalog path; never empty, no `/`, not `.` or `..`.
    pub name: String,
    /// Disks in the order of the guest's definition.
    pub disks: Vec<DiskSource>,
    /// For each disk the names that the guest may have for it (`vda`, `xvda2`); none: nobody knows.
    pub disk_names: Vec<Vec<String>>,
    /// Disks that are not covered.
    pub uncovered: Vec<UncoveredDisk>,
    /// Why the disks may be those of another guest than the one that has this name on the host: then
    /// nothing must be done to the one of this name. Only looked for where a command would name it.
    pub doubt: Option<String>,
}
