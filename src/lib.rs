//! guestsnap: a Bacula File Daemon plugin that backs up the files of Xen and KVM guests from
//! snapshots of their disks.
//!
//! Modules depend only on those to their left:
//!
//! ```text
//! config -> guest -> snapshot -> disk -> fs -> stream -> job -> ffi
//! ```
//!
//! * [`config`]: the directive string and the client file
//! * [`guest`]: sources of guests; a guest is a name and its ordered disks
//! * [`snapshot`]: snapshots of disks, the journal of created objects, the sweep
//! * [`disk`]: volumes from the bytes of a disk; a block device from a volume
//! * [`fs`]: probing, detached mounts, one tree from the guest's fstab
//! * [`stream`]: walking, metadata, reading; and writing a restored tree
//! * [`job`]: the life of one job, independent of Bacula
//! * [`ffi`]: Bacula's plugin interface
//! * `process`: runs configured commands
//! * `turn`: serializes work on a volume group, and freezes
//! * `wake`: undoes a freeze in every case, even after this process is gone
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
pub mod hostdev;
pub mod inode;
pub mod job;
pub mod kit;
#[doc(hidden)]
pub mod point;
mod process;
pub mod snapshot;
pub mod stream;
pub mod sys;
mod turn;
mod wake;

pub use error::{Code, Error, Result};
