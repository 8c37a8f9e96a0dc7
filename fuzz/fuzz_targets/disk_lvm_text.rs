//! The text of a volume group.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    let _ = guestsnap::disk::lvm2::parse(text);
});
