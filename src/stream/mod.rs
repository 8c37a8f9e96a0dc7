//! Walks a guest's tree and reads metadata and contents; writes a restored tree.
//!
//! Guest paths are never opened as a whole: a walk goes from directory to directory by descriptor,
//! never follows a link, and opens only regular files and directories.

pub mod ahead;
pub mod content;
pub mod entry;
pub mod find;
pub mod hardlinks;
mod losses;
pub mod record;
pub mod restore;
pub mod walk;
pub mod xattrs;

pub use ahead::{AheadOptions, Contents, Prepared, ReadAhead};
pub use content::FileReader;
pub use entry::Entry;
pub use hardlinks::HardLinks;
pub use record::Record;
pub use restore::{Created, Replace, Request, Restorer, What};
pub use walk::{Item, LeftOut, Problem, WalkOptions, Walker};
