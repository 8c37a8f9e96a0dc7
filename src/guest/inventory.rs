//! What this host has: logical volumes and files. Selection asks through a trait, so that it runs
//! in tests without a host.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::config::pattern::Pattern;
use crate::{Code, Error, Result};

/// What a logical volume is to guestsnap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LvKind {
    /// An ordinary volume: linear, striped, raid, cached.
    Plain,
    /// A thin volume; one with an origin is a thin snapshot, or a guest made from a template.
    Thin,
    /// A copy-on-write snapshot.
    Snapshot,
    /// A thin pool, cache pool or the like.
    Pool,
    /// A part of another volume.
    Hidden,
    /// Anything else: a volume that is being merged or converted, or of a kind of later times.
    Other,
}

/// A logical volume that may be a guest's disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LvCandidate {
    /// Volume group.
    pub vg: String,
    /// Logical volume.
    pub lv: String,
    /// LVM tags.
    pub tags: Vec<String>,
    /// Bytes.
    pub size: u64,
    /// What it is.
    pub kind: LvKind,
    /// The volume it is a snapshot of.
    pub origin: Option<String>,
    /// What this host itself uses it for (`mounted on /srv`, `swap`).
    pub in_use: Option<String>,
}

impl LvCandidate {
    /// True for the snapshots that guestsnap makes.
    pub fn is_ours(&self) -> bool {
        self.tags
            .iter()
            .any(|tag| tag == "guestsnap" || tag.starts_with("guestsnap."))
    }
}

/// Asks this host.
pub trait Inventory {
    /// Every logical volume, in any order.
    fn volumes(&self) -> Result<Vec<LvCandidate>>;

    /// The regular files that match, sorted.
    fn files(&self, pattern: &Pattern) -> Result<Vec<PathBuf>>;

    /// The files that match and symbolic links to such, sorted; each file once. Xen's `auto` and
    /// libvirt's `autostart` folders hold links.
    fn definition_files(&self, pattern: &Pattern) -> Result<Vec<PathBuf>>;

    /// A guest definition. Refused when others than root can change it, and when it is no regular
    /// file or longer than `limit`.
    fn definition(&self, path: &Path, limit: u64) -> Result<Vec<u8>>;

    /// The path without symbolic links; device-mapper devices as `/dev/mapper/NAME`.
    fn canonical(&self, path: &Path) -> Result<PathBuf>;
}

/// An inventory that is made up: for tests and for planning on paper.
#[derive(Debug, Clone, Default)]
pub struct FixedInventory {
    /// Logical volumes.
    pub volumes: Vec<LvCandidate>,
    /// Files with their contents.
    pub files: BTreeMap<PathBuf, Vec<u8>>,
    /// Symbolic links and where they end.
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
