//! A volume as a block device.
//!
//! | volume | device |
//! |---|---|
//! | whole block device | the device itself |
//! | one run; file, or no device-mapper | loop device, unless it would show an LVM label |
//! | one run or several, or stripes; device-mapper | linear and striped targets |
//! | thin, device-mapper | linear and zero targets, with a snapshot target above them for writes |
//! | thin in one run, no device-mapper | loop device |
//!
//! Snapshots are mapped writable, because the kernel replays journals into them. No device outlives
//! a killed process: loop devices have autoclear set, device-mapper devices deferred removal.

mod base;
mod dm;
mod label;
mod mapped;
mod name;
mod stack;

pub use mapped::{Mapped, hold, map};
pub use name::{CountingNamer, DmName, Namer};

use base::{Base, Ground, Place, SECTOR};
use mapped::{Owned, close_loop, first_of, needs_dm};
