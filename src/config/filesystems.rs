//! Policy for mounting filesystems.

use std::collections::BTreeSet;

use super::defaults;

/// Filesystem settings of the client file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsPolicy {
    /// Types to mount, as libblkid names them.
    pub allowed: BTreeSet<String>,
    /// Do not replay journals (`noload`, `norecovery`, `nologreplay`); the view may be
    /// inconsistent. Off by default; each such mount gives a warning.
    pub skip_recovery: bool,
    /// Mount for writing: a restore into the guest's own disks.
    pub writable: bool,
}

impl Default for FsPolicy {
    fn default() -> Self {
        FsPolicy {
            allowed: defaults::FILESYSTEMS
                .iter()
                .map(|&t| t.to_owned())
                .collect(),
            skip_recovery: defaults::SKIP_RECOVERY,
            writable: false,
        }
    }
}
