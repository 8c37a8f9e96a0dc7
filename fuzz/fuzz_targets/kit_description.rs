//! The description of a rebuild kit, which may have been edited.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    if let Ok(kit) = guestsnap::kit::parse(text) {
        for disk in &kit.disks {
            assert!(disk.partitions.iter().all(|p| p.start + p.len <= disk.bytes));
            assert!(disk.areas.iter().all(|a| a.start + a.len <= disk.bytes));
        }
    }
});
