//! Bacula's plugin interface in four layouts, the callback shell, messages.
//!
//! * `abi`: layouts, numbers and function tables of each interface version
//! * `packet`: the daemon's arguments of a call as safe values
//! * `daemon`: the daemon's functions as safe calls
//! * `callbacks`: the functions that the daemon calls, each a thin shell over [`crate::job`]
//! * `bridge`: `log` records to the daemon's log
//!
//! Conventions of this border: pointers are checked before use; strings of the daemon are copied
//! during the call; our strings live until the callback that ends their use; no panic crosses; the
//! private data of a job is shared by two threads (the job's own, and the one that delivers a
//! cancel), so the cancel path touches atomics only.
#![expect(unsafe_code, reason = "the C interface to the daemon")]

mod abi;
mod bridge;
mod callbacks;
mod daemon;
mod load;
mod packet;

pub use load::{loadPlugin, unloadPlugin};
