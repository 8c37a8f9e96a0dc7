//! Block devices of the host: guestsnap's own, those the host uses, and their holders.

pub mod drbd;
pub mod holders;
pub(crate) mod names;
pub mod uses;

pub use uses::{Devno, HostUse, host_use, host_use_beside_containers};
