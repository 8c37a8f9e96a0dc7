//! A GPT whose checksums are made right, so that what lies behind them is reached.
#![no_main]

use libfuzzer_sys::fuzz_target;

const SECTOR: usize = 512;

fuzz_target!(|bytes: &[u8]| {
    let mut disk = vec![0; 4 * SECTOR];
    disk[450] = 0xEE;
    disk[458] = 1;
    disk[510..512].copy_from_slice(&[0x55, 0xAA]);
    disk.truncate(SECTOR);
    disk.extend_from_slice(bytes);
    if disk.len() < 3 * SECTOR {
        return;
    }
    let header = &mut disk[SECTOR..];
    header[..8].copy_from_slice(b"EFI PART");
    header[24..32].copy_from_slice(&1u64.to_le_bytes());
    let field = |header: &[u8], at: usize| {
        u32::from_le_bytes(header[at..at + 4].try_into().unwrap()) as usize
    };
    let entries = header[72..80].try_into().map(u64::from_le_bytes).unwrap();
    let len = field(header, 80).saturating_mul(field(header, 84));
    let start = usize::try_from(entries)
        .unwrap_or(usize::MAX)
        .saturating_mul(SECTOR);
    let end = start.saturating_add(len).min(disk.len());
    let crc = crc32fast::hash(disk.get(start..end).unwrap_or_default());
    let header = &mut disk[SECTOR..];
    header[88..92].copy_from_slice(&crc.to_le_bytes());
    header[16..20].fill(0);
    let size = field(header, 12);
    if let Some(checked) = header.get(..size.min(SECTOR)) {
        let crc = crc32fast::hash(checked);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
    }
    let disk = disk.as_slice();
    let found = guestsnap::disk::examine(&[&disk]).expect("a slice is always readable");
    for partition in &found.disks[0].table.partitions {
        assert!(partition.start + partition.len <= found.disks[0].size);
    }
});
