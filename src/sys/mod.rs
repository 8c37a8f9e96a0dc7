//! System calls and ioctls that no crate offers. The only place besides `ffi` with unsafe code.

pub mod blkid;
pub mod blockdev;
pub mod btrfs;
pub mod child;
pub mod lease;
pub mod loopdev;
mod stat;

pub use stat::zeroed_stat;
