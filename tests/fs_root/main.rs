//! Filesystems of loop images: probed, mounted detached, walked, and restored onto another one.
//!
//! These tests need root and loop devices, and fail without.

mod ahead;
mod damage;
mod joined;
mod mounts;
mod populate;
mod restore;
mod round_trip;
mod subvolumes;
