//! A guest's fstab. What it names stays below the guest's root.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let (lines, _) = guestsnap::fs::fstab::parse(bytes);
    for line in lines {
        assert!(
            !line
                .mount_point
                .split(|b| *b == b'/')
                .any(|part| part == b"..")
        );
    }
});
