//! A disk that is an LVM physical volume: label, header and metadata area get right checksums.
#![no_main]

use libfuzzer_sys::fuzz_target;

/// LVM2's checksum: the register of CRC-32 from another start, not inverted.
fn checksum(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(!0xF597_A6CF);
    hasher.update(bytes);
    !hasher.finalize()
}

fuzz_target!(|bytes: &[u8]| {
    let mut disk = bytes.to_vec();
    if disk.len() < 8192 {
        return;
    }
    let label = &mut disk[512..1024];
    label[..8].copy_from_slice(b"LABELONE");
    label[8..16].copy_from_slice(&1u64.to_le_bytes());
    label[24..32].copy_from_slice(b"LVM2 001");
    let crc = checksum(&label[20..]);
    label[16..20].copy_from_slice(&crc.to_le_bytes());
    // The usual place of the first metadata area.
    let area = &mut disk[4096..];
    area[4..20].copy_from_slice(b"\x20LVM2\x20x[5A%r0N*>");
    let field = |area: &[u8], at: usize| u64::from_le_bytes(area[at..at + 8].try_into().unwrap());
    let offset = usize::try_from(field(area, 40)).unwrap_or(usize::MAX);
    let len = usize::try_from(field(area, 48)).unwrap_or(usize::MAX);
    let text = area
        .get(offset..offset.saturating_add(len))
        .unwrap_or_default();
    let crc = checksum(text);
    area[56..60].copy_from_slice(&crc.to_le_bytes());
    let crc = checksum(&area[4..512]);
    area[..4].copy_from_slice(&crc.to_le_bytes());
    let disk = disk.as_slice();
    guestsnap::disk::examine(&[&disk]).expect("a slice is always readable");
});
