//! A restore into a guest's own disks: the target, its filesystems mounted for writing, and the way of
//! each file to one of them.

mod guest;
mod open;
mod route;
mod target;

pub(super) use guest::IntoGuest;
