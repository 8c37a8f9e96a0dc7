//! Inventory of the host: logical volumes and files. Selection queries it through a trait, so that
//! tests need no host.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::config::pattern::Pattern;
use crate::hostdev::lvname::LvName;
use crate::{Code, Error, Result};

/// Kind of a logical volume, as guestsnap treats it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LvKind {
    /// An ordinary volume: linear, striped, raid, cached.
    Plain,
    /// A thin volume. One with an origin is a thin snapshot, or a guest cloned from a template.
    Thin,
    /// A copy-on-write snapshot.
    Snapshot,
    /// A thin pool, cache pool or similar.
    Pool,
    /// A component of another volume.
    Hidden,
    /// Any other: being merged or converted, or of a newer kind.
    Other,
}

/// A candidate for a guest's disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LvCandidate {
    /// Names.
    pub name: LvName,
    /// LVM tags.
    pub tags: Vec<String>,
    /// Size in bytes.
    pub size: u64,
    /// Kind.
    pub kind: LvKind,
    /// Origin, if it is a snapshot.
    pub origin: Option<String>,
    /// Whether it is writable.
    pub writable: bool,
    /// Whether it is active, or comes up with its group. `false`: inactive and marked for
    /// activation skip, which LVM sets on thin snapshots.
    pub ready: bool,
    /// The host's own use of it (`mounted on /srv`, `swap`).
    pub in_use: Option<String>,
    /// The volume whose external DRBD metadata it has; it is no guest's disk.
    pub metadata_of: Option<String>,
    /// Why other hosts may write to its group's metadata; `None`: they do not, or LVM coordinates.
    pub shared: Option<String>,
}

impl LvCandidate {
    /// Whether guestsnap created it as a snapshot.
    pub fn is_ours(&self) -> bool {
        self.tags
            .iter()
            .any(|tag| tag == "guestsnap" || tag.starts_with("guestsnap."))
    }
}

/// Queries the host.
pub trait Inventory {
    /// Returns all logical volumes, in any order.
    fn volumes(&self) -> Result<Vec<LvCandidate>>;

    /// Returns the matching regular files, sorted.
    fn files(&self, pattern: &Pattern) -> Result<Vec<PathBuf>>;

    /// Returns the matching files, including those behind symbolic links, sorted and without
    /// duplicates. Xen's `auto` and libvirt's `autostart` directories contain links.
    fn definition_files(&self, pattern: &Pattern) -> Result<Vec<PathBuf>>;

    /// Reads a guest definition. Refuses it if a user other than root can change it, if it is not a
    /// regular file, or if it is longer than `limit`.
    fn definition(&self, path: &Path, limit: u64) -> Result<Vec<u8>>;

    /// Resolves symbolic links. Device-mapper devices become `/dev/mapper/NAME`, as do DRBD devices on them.
    fn canonical(&self, path: &Path) -> Result<PathBuf>;
}

/// A made-up inventory, for tests and planning.
#[derive(Debug, Clone, Default)]
pub struct FixedInventory {
    /// Logical volumes.
    pub volumes: Vec<LvCandidate>,
    /// Files with their contents.
    pub files: BTreeMap<PathBuf, Vec<u8>>,
    /// Symbolic links and their final targets.
    pub links: BTreeMap<PathBuf, PathBuf>,
}

impl Inventory for FixedInventory {
    fn volumes(&self) -> Result<Vec<LvCandidate>> {
        Ok(self.volumes.clone())
    }

    fn files(&self, pattern: &Pattern) -> Result<Vec<PathBuf>> {
        Ok(self
            .files
            .keys()
            .filter(|path| pattern.matches(path))
            .cloned()
            .collect())
    }

    fn definition_files(&self, pattern: &Pattern) -> Result<Vec<PathBuf>> {
        self.files(pattern)
    }

    fn definition(&self, path: &Path, limit: u64) -> Result<Vec<u8>> {
        match self.files.get(path) {
            Some(bytes) if u64::try_from(bytes.len()).is_ok_and(|n| n <= limit) => {
                Ok(bytes.clone())
            }
            Some(_) => Err(Error::new(
                Code::BadGuestDefinition,
                format!("{}: longer than {limit} bytes", path.display()),
            )),
            None => Err(Error::new(
                Code::BadGuestDefinition,
                format!("{}: not found", path.display()),
            )),
        }
    }

    fn canonical(&self, path: &Path) -> Result<PathBuf> {
        match self.links.get(path) {
            Some(target) => Ok(target.clone()),
            None if self.files.contains_key(path) => Ok(path.to_owned()),
            None => Err(Error::new(Code::OriginGone, path.display().to_string())),
        }
    }
}
