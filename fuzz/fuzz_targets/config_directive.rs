//! The Director's text behind `guestsnap:`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = guestsnap::config::Directive::parse(text);
});
