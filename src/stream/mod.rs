//! Walking a guest's tree, its metadata and contents; and writing a restored tree.
//!
//! Nothing here opens a guest path as a whole: a walk goes from directory to directory by
//! descriptor and never follows a link, and only regular files and directories are ever opened.

pub mod ahead;
pub mod content;
pub mod entry;
pub mod find;
pub mod hardlinks;
pub mod record;
pub mod restore;
pub mod walk;
pub mod xattrs;

pub use ahead::{AheadOptions, Contents, Prepared, ReadAhead};
pub use content::FileReader;
pub use entry::{Entry, Kind, Meta, Time};
pub use hardlinks::HardLinks;
pub use record::Record;
pub use restore::{Created, Replace, Request, Restorer, What};
pub use walk::{Item, Problem, WalkOptions, Walker};
