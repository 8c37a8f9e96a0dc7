//! Any bytes as a disk: MBR, extended boot records, GPT, LVM.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|disk: &[u8]| {
    let found = guestsnap::disk::examine(&[&disk]).expect("a slice is always readable");
    for partition in &found.disks[0].table.partitions {
        assert!(partition.start + partition.len <= found.disks[0].size);
    }
});
