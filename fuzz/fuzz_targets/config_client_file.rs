//! The client file.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = guestsnap::config::ClientFile::parse(text);
});
