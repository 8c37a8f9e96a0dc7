//! Properties in a superblock that an equal filesystem needs, and the commands that make one.
//!
//! Superblocks are the guest's bytes, and so is a restored kit: numbers are bounded by the programs that
//! take them, and words come from fixed lists or are labels.

mod btrfs;
mod ext;
mod fat;
mod recipe;
mod swap;
mod xfs;

pub use btrfs::Btrfs;
pub use ext::Ext;
pub use fat::Fat;
pub use recipe::{Argv, Described, Recipe, parse, read};
pub use swap::Swap;
pub use xfs::Xfs;

pub(in crate::kit) use recipe::label;
use recipe::{argv, uuid};
