//! A volume's filesystem: probing, mount policy, the detached mount, the guest's fstab, one tree.
//!
//! A guest owns every byte read here. So a volume is mounted only when exactly one signature of an
//! allowed type was found, with options that keep the guest from choosing the host's behaviour, and
//! the mount is never attached to the host's tree: it is a descriptor, and closing it is the unmount.

mod btrfs;
pub mod check;
pub mod claim;
pub mod compat;
pub mod fstab;
pub mod mount;
pub mod policy;
pub mod probe;
pub mod tree;

pub use claim::{Claim, claim};
pub use mount::DetachedMount;
pub use policy::{DEFAULT_TYPES, FsPolicy};
pub use probe::{Content, Filesystem, SkipReason, probe};
pub use tree::{GuestTree, Join, Missing, MountedVolume, VolumeIdentity};

/// How much a [`Note`] matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoteLevel {
    /// A decision worth recording.
    Info,
    /// Something is left out or done in a second-best way.
    Warning,
}

/// A line for the job log: a decision or a fallback. The text is safe to print.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// How much it matters.
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

    /// Something is left out or done in a second-best way.
    pub fn warning(text: impl Into<String>) -> Note {
        Note {
            level: NoteLevel::Warning,
            text: text.into(),
        }
    }
}
