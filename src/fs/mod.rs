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
mod note;
pub mod path;
pub mod policy;
pub mod probe;
pub mod tree;
mod volume;

pub use claim::{Claim, claim};
pub use mount::DetachedMount;
pub use note::{Note, NoteLevel};
pub use policy::BtrfsMember;
pub use probe::{Content, Filesystem, SkipReason, probe};
pub use tree::{GuestTree, Hints, Join, Missing};
pub use volume::{MountedVolume, VolumeIdentity};
