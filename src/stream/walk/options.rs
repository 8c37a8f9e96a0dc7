//! Limits of a walk.

/// Limits of a walk.
#[derive(Debug, Clone)]
pub struct WalkOptions {
    /// Maximum open directories, at least 2.
    pub open_directories: usize,
    /// Maximum bytes of names read and sorted together; larger directories are sorted in parts.
    pub batch_bytes: usize,
    /// Maximum bytes of names kept over all levels of the walk.
    pub names_bytes: usize,
    /// Maximum btrfs subvolumes looked at in one guest, besides those shown at a place of their own.
    /// Counts one that has a place elsewhere in the tree as well. After one more, folders of btrfs
    /// that were not looked at before are left out with an error, whether they are subvolumes or
    /// not: only a look tells. Until the filesystem is unmounted, the kernel keeps 2 KiB for each,
    /// and one of the host's million device numbers.
    pub subvolumes: usize,
}

impl Default for WalkOptions {
    fn default() -> Self {
        WalkOptions {
            open_directories: 32,
            batch_bytes: 1 << 20,
            names_bytes: 8 << 20,
            subvolumes: 16_384,
        }
    }
}
