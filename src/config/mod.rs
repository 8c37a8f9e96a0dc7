//! Configuration: the FileSet's directive string and the client file.
//!
//! Independent of Bacula and LVM. The directive comes from the Director and only selects and tunes.
//! Commands to run and wider access come from the root-owned client file.

pub mod client;
pub mod defaults;
pub mod directive;
mod filesystems;
pub mod pattern;
pub mod trust;
pub use client::ClientFile;
pub use directive::{Directive, INSTANCE_TAG, OnError, Selector, Size, SnapshotKind, When};
pub use filesystems::FsPolicy;
