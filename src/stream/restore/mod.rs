//! Writes a restored tree.
//!
//! All work takes place below one directory that is held open. Parents are resolved without
//! following symbolic links, so a link planted in the target leads nowhere. Objects are created
//! exclusively and then changed through their descriptor, not their name.
//!
//! The calls follow Bacula's: [`Restorer::create`], data for regular files, `apply_record` per
//! stored record, [`Restorer::finish`]. `finish` sets the attributes in the only order that
//! preserves them: owner, mode, extended attributes, times, inode flags. Flags that would keep
//! later files out of a directory are set in [`Restorer::end`].

mod attributes;
mod errors;
mod fences;
mod file;
mod memory;
mod place;
mod request;
mod restorer;
mod target;
#[cfg(test)]
mod testing;

pub use request::{Created, Replace, Request, Wanted, What};
pub use restorer::Restorer;
pub use target::Joined;
