//! Damages disks made by real tools: the parsers must not panic, loop, or return extents outside a
//! disk.
//!
//! Shares its seeds with the fuzz targets. The damage is deterministic.

use super::layout::{Layout, VolumeReader};
use super::read::ReadAt;
use super::thin::{Budget, Mapping, Refused, Run, Wanted, resolve};
use super::{Examined, examine, lvm2};
use crate::crc::{LVM2_START, crc32, register};

const MBR: &[u8] = include_bytes!("../../fuzz/corpus/disk_table/mbr");
const GPT: &[u8] = include_bytes!("../../fuzz/corpus/disk_table/gpt");
const PV: &[u8] = include_bytes!("../../fuzz/corpus/disk_lvm_label/pv");
const WRAPPED: &[u8] = include_bytes!("../../fuzz/corpus/disk_lvm_label/wrapped");
const THIN: &[u8] = include_bytes!("../../fuzz/corpus/disk_thin/restored");
const TEXT: &[u8] = include_bytes!("../../fuzz/corpus/disk_lvm_text/kinds");

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit.max(1)).unwrap();
        usize::try_from(self.next() % limit).unwrap()
    }
}

/// Sets a few bytes to edge values, copies a range elsewhere, or truncates.
fn damage(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len());
        match random.below(8) {
            0 => bytes.truncate(at),
            1 => {
                let len = random.below(64).min(bytes.len() - at);
                let from = random.below(bytes.len() - len);
                bytes.copy_within(from..from + len, at);
            }
            2 | 3 => {
                let interesting = [0u64, 1, 0xFF, 0xFFFF_FFFF, u64::MAX, 1 << 63, 511, 4096];
                let value = interesting[random.below(interesting.len())].to_le_bytes();
                let len = (1 << random.below(4)).min(bytes.len() - at);
                bytes[at..at + len].copy_from_slice(&value[..len]);
            }
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
        }
        if bytes.is_empty() {
            return;
        }
    }
}

/// Recomputes the checksums of label, metadata area and text at their usual places.
fn seal_pv(disk: &mut [u8]) -> Option<()> {
    let crc = register(LVM2_START, disk.get(512 + 20..1024)?);
    disk[512 + 16..512 + 20].copy_from_slice(&crc.to_le_bytes());
    let area = disk.get_mut(4096..)?;
    let field = |area: &[u8], at| usize::try_from(super::le::u64_at(area, at)?).ok();
    let (offset, len) = (field(area, 40)?, field(area, 48)?);
    if let Some(text) = area.get(offset..offset.saturating_add(len)) {
        let crc = register(LVM2_START, text);
        area[56..60].copy_from_slice(&crc.to_le_bytes());
    }
    let crc = register(LVM2_START, area.get(4..512)?);
    area[..4].copy_from_slice(&crc.to_le_bytes());
    Some(())
}

fn seal_gpt(disk: &mut [u8]) -> Option<()> {
    let header = disk.get_mut(512..1024)?;
    header[16..20].fill(0);
    let crc = crc32(&header[..92]);
    header[16..20].copy_from_slice(&crc.to_le_bytes());
    Some(())
}

/// Checks that each result lies on its disk, is readable, and has a safe name.
fn check(found: &Examined, disks: &[&dyn ReadAt]) {
    for volume in &found.volumes {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-+./".contains(&b);
        assert!(volume.name.bytes().all(plain), "{:?}", volume.name);
        assert!(
            !volume
                .name
                .split('/')
                .any(|part| matches!(part, "" | "." | ".."))
        );
        let Layout::Segments(segments) = &volume.layout else {
            continue;
        };
        for extent in segments.iter().flat_map(|s| s.extents()) {
            let end = extent.start.checked_add(extent.len).unwrap();
            assert!(end <= disks[extent.disk].size(), "{volume:?}");
        }
        let reader = VolumeReader::new(disks, &volume.layout).unwrap();
        let mut byte = [0];
        if reader.size() > 0 {
            reader.read_exact_at(&mut byte, reader.size() - 1).unwrap();
        }
    }
}

fn torture(seed: &[u8], seal: fn(&mut [u8]) -> Option<()>) {
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let second = PV.to_vec();
    for round in 0..2000 {
        let mut disk = seed.to_vec();
        damage(&mut disk, &mut random);
        if round % 2 == 0 {
            seal(&mut disk);
        }
        let disks: [&dyn ReadAt; 2] = [&disk, &second];
        check(&examine(&disks).unwrap(), &disks);
    }
}

#[test]
fn test_damaged_tables() {
    torture(MBR, |_| None);
    torture(GPT, seal_gpt);
}

#[test]
fn test_damaged_physical_volumes() {
    torture(PV, seal_pv);
    torture(WRAPPED, seal_pv);
}

#[test]
fn test_damaged_text() {
    let mut random = Random(0x1234_5678_9ABC_DEF1);
    let mut survived = 0;
    for _ in 0..5000 {
        let mut text = TEXT.to_vec();
        damage(&mut text, &mut random);
        survived += usize::from(lvm2::parse(&text).is_ok());
    }
    assert!(
        survived > 100,
        "the damage leaves nothing to resolve: {survived}"
    );
}

const CHUNK: u64 = 65_536;

fn thin(metadata: &[u8], device_id: u32) -> Result<Mapping, Refused> {
    let wanted = Wanted {
        device_id,
        size: 1000 * CHUNK,
        transaction_id: 7,
        chunk_size: CHUNK,
        data_size: 1600 * CHUNK,
    };
    resolve(&metadata, &wanted, &Budget::default(), &|| false)
}

/// Recomputes the checksums of all blocks.
fn seal_thin(metadata: &mut [u8]) {
    for (number, block) in metadata.chunks_exact_mut(4096).enumerate() {
        let salt = if number == 0 { 160_774 } else { 121_107 };
        let sum = !crc32c::crc32c(&block[4..]) ^ salt;
        block[..4].copy_from_slice(&sum.to_le_bytes());
    }
}

#[test]
fn test_damaged_thin_metadata() {
    let mut random = Random(0x0DDB_1A5E_5BAD_5EED);
    let mut survived = 0;
    for round in 0..3000 {
        let mut metadata = THIN.to_vec();
        damage(&mut metadata, &mut random);
        if round % 4 != 0 {
            seal_thin(&mut metadata);
        }
        for device_id in 1..4 {
            let Ok(mapping) = thin(&metadata, device_id) else {
                continue;
            };
            survived += 1;
            let mut end = 0;
            for run in &mapping.runs {
                assert!(run.len > 0 && run.start >= end);
                end = run.start + run.len;
                assert!(end <= 1000 * CHUNK && run.data + run.len <= 1600 * CHUNK);
            }
        }
    }
    assert!(survived > 100, "the damage leaves nothing: {survived}");
}

/// The repair tool wrote the seed, so it does not repeat our reading of the format.
#[test]
fn test_thin_metadata_of_thin_restore() {
    let run = |start: u64, data: u64, chunks: u64| Run {
        start: start * CHUNK,
        data: data * CHUNK,
        len: chunks * CHUNK,
    };
    let scattered: Vec<Run> = (0..300).map(|n| run(3 * n, n * 997 % 1000, 1)).collect();
    let found = thin(THIN, 1).unwrap();
    assert_eq!(found.runs, scattered);
    assert!(!found.alone && !found.needs_check);
    let ranges = [run(0, 1000, 100), run(700, 1500, 50)];
    assert_eq!(thin(THIN, 2).unwrap().runs, ranges);
    assert_eq!(thin(THIN, 3).unwrap().runs, []);
}

#[test]
fn test_the_seeds_are_what_they_should_be() {
    let found = |seed: &[u8]| {
        let disk = seed.to_vec();
        examine(&[&disk]).unwrap()
    };
    assert_eq!(found(MBR).disks[0].table.partitions.len(), 6);
    assert_eq!(found(GPT).disks[0].table.partitions.len(), 2);
    assert_eq!(found(PV).groups[0].name, "guest");
    assert_eq!(found(WRAPPED).groups[0].name, "guest");
    assert!(lvm2::parse(TEXT).unwrap().lvs.len() > 10);
}
