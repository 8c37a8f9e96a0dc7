//! A libvirt domain.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = guestsnap::guest::libvirt::parse(bytes);
});
