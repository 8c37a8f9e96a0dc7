//! Block devices of the host: guestsnap's own, those the host uses, and their holders; names in the host's LVM.

pub mod drbd;
pub mod holders;
pub mod lvname;
pub(crate) mod names;
pub mod uses;

pub use uses::{Devno, HostUse, host_use, host_use_beside_containers};
