//! A libvirt domain or storage pool.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = guestsnap::guest::libvirt::parse(bytes);
    if let Ok(pool) = guestsnap::guest::libvirt::parse_pool(bytes) {
        let _ = pool.path("volume");
    }
});
