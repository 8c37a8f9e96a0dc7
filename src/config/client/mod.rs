//! The client file `/etc/bacula/guestsnap.toml`: settings of the client's administrator.
//!
//! A client need not trust the Director with root. Commands to run and wider access are therefore
//! set only here, in a file that only root can change. The directive selects and tunes.

mod file;
mod restore;
mod settings;
mod values;

pub use file::{CLIENT_FILE, FilterSettings, Quiesce};
pub use settings::{
    ClientFile, Fsck, GuestSettings, Hooks, Limits, PveSettings, QuiesceWay, RestoreSettings,
    Shared, Sources, VgSettings,
};
pub use values::{
    Allow, Argv, Chunk, DiskName, DomainName, FileName, FileSize, Folder, FreezeSeconds, FsType,
    HoldSeconds, HookSeconds, IntoPattern, LockSeconds, Minutes, PathPattern, Percent,
    PercentOrNone, ReadAheadBytes, Readers, RootName,
};
