//! What is inside a disk: partition tables and guest LVM, read as bytes; and a volume as a block
//! device.
//!
//! The parsers are pure and bounded: the guest owns every byte. The host's LVM never sees a guest.
//!
//! * [`read`]: bytes at an offset, whatever holds them
//! * [`table`]: MBR and GPT
#![forbid(unsafe_code)]

mod crc;
mod le;
pub mod read;
pub mod table;

pub use read::{FileDisk, ReadAt};
