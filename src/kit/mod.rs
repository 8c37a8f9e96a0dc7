//! The rebuild kit of a guest: everything needed to make its disks again, except for the files.
//!
//! A backup holds the kit below `.guestsnap/rebuild`: a description (`kit.json`) and the bytes that no
//! description replaces, each in a file of its own with its digest. The format is described in
//! `docs/manifest.md`.
//!
//! * [`format`](mod@format): the types of `kit.json`
//! * [`collect`](collect()): a kit from the disks of a guest
//! * [`filesystem`]: properties in superblocks, and the commands that make equal filesystems
//! * [`load`](load()): a kit from a restored folder, checked like everything that a guest may have written
#![forbid(unsafe_code)]

mod be;
mod collect;
pub mod filesystem;
pub mod format;
mod grow;
mod load;
mod places;

pub use collect::{Collected, Holds, Subvolumes, collect, sha256, subvolumes};
pub use format::Kit;
pub use load::{Loaded, load, parse};

/// The folder of the kit, below that of the manifest.
pub const FOLDER: &str = "rebuild";
/// The description's file.
pub const FILE: &str = "kit.json";
