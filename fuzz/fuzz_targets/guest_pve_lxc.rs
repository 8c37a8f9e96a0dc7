//! A container's configuration of Proxmox VE.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = guestsnap::guest::pve::lxc::parse(bytes);
});
