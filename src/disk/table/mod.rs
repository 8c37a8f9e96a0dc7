//! Partition tables: none, MBR with logical partitions, GPT.
//!
//! Numbers and bounds match those that Linux assigns in the guest. Damage is recorded and not
//! fatal: the other partitions stay readable.

pub mod gpt;
pub mod mbr;
mod partitions;

pub use partitions::{Damage, MAX_PARTITIONS, Partition, Records, Table, TableKind, read};

use super::le;
use partitions::looks_like_content;
