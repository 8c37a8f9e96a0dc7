//! A volume's filesystem: probing, mount policy, the detached mount, the guest's fstab, one tree.
//!
//! The guest controls every byte read here. So a volume is mounted only if it has exactly one
//! signature, of an allowed type, and with options that override those in the superblock. The mount
//! is a descriptor, never attached to the host's tree; closing it unmounts.

mod btrfs;
pub mod check;
pub mod claim;
pub mod compat;
pub mod fstab;
pub mod mount;
pub mod path;
pub mod policy;
pub mod probe;
pub mod tree;
mod volume;

pub use claim::{Claim, claim};
pub use mount::DetachedMount;
pub use policy::BtrfsMember;
pub use probe::{Content, Filesystem, SkipReason, probe};
pub use tree::{GuestTree, Hints, Join, Missing};
pub use volume::{MountedVolume, VolumeIdentity};

/// Importance of a [`Note`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoteLevel {
    /// A decision worth recording.
    Info,
    /// All files are saved, but the administrator should look at it.
    Warning,
    /// Files may be missing from the backup, and the configuration does not ask for that.
    Error,
}

/// A line for the job log. The text is safe to print.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Importance.
    pub level: NoteLevel,
    /// The text.
    pub text: String,
}

impl Note {
    /// A decision worth recording.
    pub fn info(text: impl Into<String>) -> Note {
        Note {
            level: NoteLevel::Info,
            text: text.into(),
        }
    }

    /// A problem that loses no files.
    pub fn warning(text: impl Into<String>) -> Note {
        Note {
            level: NoteLevel::Warning,
            text: text.into(),
        }
    }

    /// Files that may be missing: the error's report, and the part missing from the backup.
    pub fn error(error: &crate::Error, rest: &str) -> Note {
        Note {
            level: NoteLevel::Error,
            text: format!("ERROR {}. {rest}", error.report()),
        }
    }
}
