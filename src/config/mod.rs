//! What is asked for: the directive string of the FileSet and the client file.
//!
//! Knows nothing of Bacula or LVM. The directive comes from the Director and only selects and
//! tunes; everything that runs a command or widens access comes from the root-owned client file.

pub mod client;
pub mod directive;
pub mod pattern;
pub mod trust;
pub use client::ClientFile;
pub use directive::{Directive, OnError, Selector, Size, SnapshotKind};
