//! Values as text of messages.

use std::ffi::CStr;

/// Bytes for people.
pub fn size_text(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} bytes")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Text of a C string for a message.
pub(super) fn shown(text: &CStr) -> String {
    crate::error::escape(text.to_bytes())
}
