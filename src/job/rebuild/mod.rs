//! Makes a guest's disks again from its rebuild kit, for the command line.
//!
//! * [`plan`]: the disks and their targets, and refusals
//! * [`definition`]: the guest's definition with the new names of its disks
//! * `target`: a disk that is made, and undone if something fails
//! * `table`: the bytes outside of filesystems
//! * `make`: the steps, in order
//! * `tree`: subvolumes, and the fstab that a restore into the disks needs

pub mod definition;
mod make;
pub mod plan;
mod table;
mod target;
mod tree;

pub use make::{Rebuild, Rebuilt};
pub use target::TargetName;
