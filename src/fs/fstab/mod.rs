//! Bounded byte parser for the guest's `/etc/fstab`, and matching of its lines to volumes.

mod line;
mod matching;
mod source;

pub use line::{Line, MAX_FILE, MAX_LINES, parse};
pub use matching::{Match, claim, compare, matches};
pub use source::Source;
