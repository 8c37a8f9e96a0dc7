//! Metadata of a thin pool: each block gets its place and the checksum of its kind.
#![no_main]

use guestsnap::disk::thin::{Budget, Wanted, resolve};
use libfuzzer_sys::fuzz_target;

const BLOCK: usize = 4096;
const CHUNK: u64 = 65_536;

fuzz_target!(|bytes: &[u8]| {
    if bytes.len() < BLOCK {
        return;
    }
    let mut metadata = bytes.to_vec();
    // Checks that would end the reading at once.
    metadata[32..40].copy_from_slice(&27_022_010u64.to_le_bytes());
    metadata[40..44].copy_from_slice(&2u32.to_le_bytes());
    metadata[48..56].copy_from_slice(&7u64.to_le_bytes());
    metadata[336..344].copy_from_slice(&[128, 0, 0, 0, 8, 0, 0, 0]);
    metadata[360..364].fill(0);
    for (number, block) in metadata.chunks_exact_mut(BLOCK).enumerate() {
        let salt = if number == 0 { 160_774 } else { 121_107 };
        block[8..16].copy_from_slice(&u64::try_from(number).unwrap().to_le_bytes());
        let sum = !crc32c::crc32c(&block[4..]) ^ salt;
        block[..4].copy_from_slice(&sum.to_le_bytes());
    }
    for device_id in 0..4 {
        let wanted = Wanted {
            device_id,
            size: 1000 * CHUNK - 4096,
            transaction_id: 7,
            chunk_size: CHUNK,
            data_size: 1600 * CHUNK,
        };
        let metadata = metadata.as_slice();
        let Ok(mapping) = resolve(&metadata, &wanted, &Budget::default(), &|| false) else {
            continue;
        };
        let mut end = 0;
        for run in &mapping.runs {
            assert!(run.len > 0 && run.start >= end);
            end = run.start + run.len;
            assert!(end <= wanted.size && run.data + run.len <= wanted.data_size);
        }
        assert!(mapping.lines <= 2 * mapping.runs.len() + 1);
    }
});
