//! Disks of real tools, damaged in many ways: nothing may panic, loop, or point outside of a disk.
//!
//! The seeds are those of the fuzz targets. The damage is the same in each run.

use super::layout::{Layout, VolumeReader};
use super::read::ReadAt;
use super::{Examined, examine, lvm2};
use crate::crc::{LVM2_START, crc32, register};

const MBR: &[u8] = include_bytes!("../../fuzz/corpus/disk_table/mbr");
const GPT: &[u8] = include_bytes!("../../fuzz/corpus/disk_table/gpt");
const PV: &[u8] = include_bytes!("../../fuzz/corpus/disk_lvm_label/pv");
const WRAPPED: &[u8] = include_bytes!("../../fuzz/corpus/disk_lvm_label/wrapped");
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

/// Changes a few bytes to values that matter, copies a piece elsewhere, or cuts the end off.
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

/// Makes the checksums of label, metadata area and text right again, where they usually are.
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

/// Everything found lies on its disk, can be read, and has a harmless name.
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
