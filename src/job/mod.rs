//! The life of one job: plan, run, report, undo. Knows nothing of struct layouts.
//!
//! [`Backup`] and [`Restore`] are driven by Bacula's callbacks (see [`crate::ffi`]), by the command
//! line and by tests, through three small traits: [`Reporter`] takes messages, [`Daemon`] answers
//! questions about candidates, [`CancelFlag`] is set from another thread.

mod aside;
mod backup;
mod caller;
mod filter;
mod host;
mod into;
mod item;
mod look;
pub mod manifest;
mod open;
pub mod options;
mod paths;
mod prepare;
pub mod query;
pub mod rebuild;
mod restore;
pub mod rights;
mod saves;
mod text;
mod vanished;
mod watch;

pub(crate) use aside::join;
pub use backup::{Backup, BackupSettings};
pub use caller::{CancelFlag, Daemon, Importance, Reporter, Step};
pub use host::Host;
pub use item::{FileType, Item};
pub use look::{Look, Looked};
pub use prepare::{journal_folder, requests};
pub use restore::{Restore, RestoreFile, RestoreSettings, Restored};
pub use saves::Summary;
pub use saves::last::{LastSave, last as last_saves};
pub use text::size_text;
