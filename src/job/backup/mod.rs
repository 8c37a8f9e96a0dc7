//! A backup, as three lifetimes: the job ([`Backup`]), a guest's run in it, and a file's run in that.
//!
//! | lifetime | files |
//! |---|---|
//! | the job | `job` (order, end), `plan` (lines, guests, snapshots), `hooks` |
//! | a guest | `opening`, `guest` (walk and choice), `release` |
//! | a file | `file` (data and records) |
//!
//! They share the `context`: the `helper` does slow work beside the daemon's thread, the `desk`
//! takes messages and knows whether to stop, the `ledger` lists paths to keep or to save again. A guest
//! adds to them by its `tally` and its `guest_ledger`.

mod context;
mod desk;
mod file;
mod guest;
mod guest_ledger;
mod helper;
mod hooks;
mod job;
mod ledger;
mod notes;
mod opening;
mod plan;
mod release;
mod settings;
mod tally;

pub use job::Backup;
pub use settings::BackupSettings;
