//! An xl.cfg, and one disk of it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = guestsnap::guest::xl::parse(bytes);
    let _ = guestsnap::guest::xl::parse_disk(bytes);
});
