//! System calls and ioctls that no crate offers. Besides `ffi`, the only module with unsafe code.

pub mod blkid;
pub mod blockdev;
pub mod btrfs;
pub mod child;
pub mod direct;
pub mod lease;
pub mod loopdev;
mod stat;

pub use stat::zeroed_stat;
