//! System calls and ioctls that no crate offers. The only place besides `ffi` with unsafe code.

pub mod child;
