//! Walks a guest's tree.
//!
//! Uses an explicit stack, a bounded number of open directories, and names in batches: a directory
//! with a million names or a chain of ten thousand directories needs no more memory than a small
//! tree. A directory closed to stay within the bounds is reopened from its filesystem's root and
//! its current batch read again. The mount is read-only, so the result is the same.

mod item;
mod names;
mod options;
mod unread;
mod walker;

pub use item::{Item, LeftOut, Problem};
pub use options::WalkOptions;
pub(crate) use unread::{Step, Unread};
pub use walker::Walker;
