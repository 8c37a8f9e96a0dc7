//! guestsnap: a Bacula File Daemon plugin that backs up the files of Xen and KVM guests from
//! snapshots of their disks.
//!
//! One way through the code, arrows point to the right only:
//!
//! ```text
//! config -> guest -> snapshot -> disk -> fs -> stream -> job -> ffi
//! ```
//!
//! * [`config`]: what is asked for: the directive string and the client file
//! * [`guest`]: where guests come from; a guest is a name and its ordered disks
//! * [`snapshot`]: one instant of a disk, the journal of what was created, the sweep
//! * [`disk`]: bytes of a disk to volumes; a volume to a block device
//! * [`fs`]: probing, detached mounts, guest fstab to one tree
//! * [`stream`]: walking, metadata, reading; and writing a restored tree
//! * [`job`]: the life of one job, independent of Bacula
//! * [`ffi`]: Bacula's plugin interface
//! * `process`: running configured commands
//! * `turn`: one at a time works on a volume group, or freezes
//! * [`sys`]: system calls and ioctls that no crate offers
//!
//! Unsafe code lives in [`ffi`] and [`sys`] only.

pub mod config;
mod crc;
pub mod disk;
pub mod error;
pub mod ffi;
pub mod fs;
pub mod guest;
pub mod job;
#[doc(hidden)]
pub mod point;
mod process;
pub mod snapshot;
pub mod stream;
pub mod sys;
mod turn;

pub use error::{Code, Error, Result};
