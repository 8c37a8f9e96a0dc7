//! The storages of Proxmox VE, and the path of a disk of the configuration that follows a NUL byte.
#![no_main]

use guestsnap::guest::pve::{qemu, storage};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let at = bytes.iter().position(|byte| *byte == 0);
    let (text, rest) = bytes.split_at(at.unwrap_or(bytes.len()));
    let config = qemu::parse(rest.get(1..).unwrap_or_default());
    if let (Ok(storages), Ok(config)) = (storage::parse(text), config) {
        for drive in &config.drives {
            if let Ok(path) = storage::path(&storages, drive, &|_| false) {
                assert!(path.is_absolute());
            }
        }
    }
});
