//! Configuration files of Proxmox VE. Pure parsers: no file is opened here.
//!
//! Formats: the manual pages qm.conf(5) and pct.conf(5), and the chapter "Storage" of the
//! administration guide.

mod config;
pub mod lxc;
pub mod qemu;
pub mod storage;

pub use config::{Agent, Config, Drive, Handle, MAX_BYTES, MAX_LINE, Role, vmid};

use config::{boolean, drive, number};
