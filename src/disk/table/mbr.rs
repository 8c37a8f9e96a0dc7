//! DOS partition tables with chains of logical partitions.

use std::collections::BTreeSet;
use std::io;

use super::{Damage, MAX_PARTITIONS, Partition, Records, Table, TableKind, le, looks_like_content};
use crate::disk::read::{ReadAt, read_up_to};

/// Maximum empty extended boot records followed, as in Linux.
const MAX_EMPTY_RECORDS: usize = 100;

/// One of the four entries of a boot record, in sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    active: u8,
    kind: u8,
    start: u32,
    sectors: u32,
}

impl Entry {
    /// Linux checks the length only, not the type.
    pub(super) fn is_used(&self) -> bool {
        self.sectors != 0
    }

    fn is_extended(&self) -> bool {
        self.is_used() && matches!(self.kind, 0x05 | 0x0F | 0x85)
    }

    /// Whether this is the protective entry of a GPT.
    pub(super) fn is_protective(&self) -> bool {
        self.kind == 0xEE && self.is_used()
    }
}

/// The raw entries of a boot record; `None` without its signature.
fn raw_entries(sector: &[u8]) -> Option<[Entry; 4]> {
    if le::u16_at(sector, 510)? != 0xAA55 {
        return None;
    }
    let entry = |index: usize| {
        let at = 446 + 16 * index;
        Some(Entry {
            active: *sector.get(at)?,
            kind: *sector.get(at + 4)?,
            start: le::u32_at(sector, at + 8)?,
            sectors: le::u32_at(sector, at + 12)?,
        })
    };
    Some([entry(0)?, entry(1)?, entry(2)?, entry(3)?])
}

/// Returns the entries of an MBR that has partitions. Rejects the boot sector of a filesystem that
/// fills the disk, which has the same signature.
pub fn entries(sector: &[u8]) -> Option<[Entry; 4]> {
    let entries = raw_entries(sector)?;
    let sane = entries.iter().all(|e| matches!(e.active, 0 | 0x80))
        && entries.iter().filter(|e| e.is_used()).all(|e| e.start != 0)
        && entries.iter().any(Entry::is_used);
    (sane && !is_boot_sector(sector)).then_some(entries)
}

/// Boot sectors of FAT, exFAT, NTFS and BitLocker.
fn is_boot_sector(sector: &[u8]) -> bool {
    let at = |offset: usize, magic: &[u8]| sector.get(offset..offset + magic.len()) == Some(magic);
    at(3, b"NTFS    ")
        || at(3, b"EXFAT   ")
        || at(3, b"-FVE-FS-")
        || is_fat(sector).unwrap_or(false)
}

/// Whether the sector has a plausible FAT BIOS parameter block. MBR boot code would need a dozen
/// plausible fields by chance.
fn is_fat(sector: &[u8]) -> Option<bool> {
    let jump = matches!(le::array::<3>(sector, 0)?, [0xEB, _, 0x90] | [0xE9, _, _]);
    let sector_size = le::u16_at(sector, 11)?;
    let cluster = *sector.get(13)?;
    let reserved = le::u16_at(sector, 14)?;
    let fats = *sector.get(16)?;
    let root_entries = le::u16_at(sector, 17)?;
    let small_total = le::u16_at(sector, 19)?;
    let media = *sector.get(21)?;
    let small_fat = le::u16_at(sector, 22)?;
    let total = le::u32_at(sector, 32)?;
    let fat32_fat = le::u32_at(sector, 36)?;
    // FAT12 and FAT16 have a fixed-size root directory; FAT32 has none.
    let tail = if small_fat == 0 {
        root_entries == 0 && fat32_fat != 0
    } else {
        root_entries != 0
    };
    Some(
        jump && matches!(sector_size, 512 | 1024 | 2048 | 4096)
            && cluster.is_power_of_two()
            && reserved != 0
            && matches!(fats, 1 | 2)
            && (media == 0xF0 || media >= 0xF8)
            && (small_total != 0 || total != 0)
            && tail,
    )
}

/// Reads the table that the entries of the first sector start.
pub(super) fn read(disk: &dyn ReadAt, first: &[u8], entries: &[Entry; 4]) -> io::Result<Table> {
    let id = le::u32_at(first, 440).filter(|id| *id != 0);
    let sector_size = sector_size(disk, entries)?;
    let mut found = Found {
        id,
        sector_size,
        partitions: Vec::new(),
        damage: Vec::new(),
        notes: Vec::new(),
        extended: Vec::new(),
    };
    if sector_size != 512 {
        found
            .notes
            .push(format!("MBR counts in sectors of {sector_size} bytes"));
    }
    for (number, entry) in (1..).zip(entries) {
        if entry.is_used() && !entry.is_extended() && !entry.is_protective() {
            found.push(number, *entry, 0);
        }
    }
    let mut next = 5;
    for entry in entries.iter().filter(|e| e.is_extended()) {
        found.follow(disk, *entry, &mut next)?;
    }
    Ok(Table {
        kind: TableKind::Mbr,
        sector_size: u32::from(sector_size),
        id: id.map(|id| format!("{id:08x}")),
        partitions: found.partitions,
        damage: found.damage,
        notes: found.notes,
        records: Records {
            extended: found.extended,
            entries: None,
        },
    })
}

/// Determines the sector size, which an MBR does not state: 512, unless only 4096 fits and finds
/// content.
fn sector_size(disk: &dyn ReadAt, entries: &[Entry; 4]) -> io::Result<u16> {
    let used: Vec<&Entry> = entries.iter().filter(|e| e.is_used()).collect();
    let fits = |size: u64| {
        used.iter()
            .all(|e| (u64::from(e.start) + u64::from(e.sectors)) * size <= disk.size())
    };
    if !fits(4096) {
        return Ok(512);
    }
    let mut seen_4096 = false;
    for entry in used {
        if looks_like_content(disk, u64::from(entry.start) * 512)? {
            return Ok(512);
        }
        seen_4096 |= looks_like_content(disk, u64::from(entry.start) * 4096)?;
    }
    Ok(if seen_4096 { 4096 } else { 512 })
}

struct Found {
    id: Option<u32>,
    sector_size: u16,
    partitions: Vec<Partition>,
    damage: Vec<Damage>,
    notes: Vec<String>,
    extended: Vec<u64>,
}

impl Found {
    /// Adds a partition whose entry counts from sector `base`.
    fn push(&mut self, number: u32, entry: Entry, base: u64) {
        let size = u64::from(self.sector_size);
        self.partitions.push(Partition {
            number,
            // At most 3 * 2^32 sectors of 4096 bytes: no overflow.
            start: (base + u64::from(entry.start)) * size,
            len: u64::from(entry.sectors) * size,
            kind: format!("0x{:02x}", entry.kind),
            partuuid: self.id.map(|id| format!("{id:08x}-{number:02x}")),
            partlabel: None,
            flags: entry.active.into(),
        });
    }

    /// Follows the chain of extended boot records. Each holds up to four partitions, relative to
    /// the record, and a link, relative to the start of the extended partition.
    fn follow(&mut self, disk: &dyn ReadAt, extended: Entry, next: &mut u32) -> io::Result<()> {
        let (first, sectors) = (u64::from(extended.start), u64::from(extended.sectors));
        let (mut here, mut here_sectors) = (first, sectors);
        let mut seen = BTreeSet::new();
        let mut empty = 0;
        loop {
            if !seen.insert(here) {
                self.damage.push(Damage::ChainLoop(here));
                return Ok(());
            }
            let record = read_up_to(disk, here * u64::from(self.sector_size), 512)?;
            let Some(entries) = raw_entries(&record) else {
                self.damage.push(Damage::NoRecord(here));
                return Ok(());
            };
            self.extended.push(here * u64::from(self.sector_size));
            empty += 1;
            for (index, entry) in entries.iter().enumerate() {
                if !entry.is_used() || entry.is_extended() {
                    continue;
                }
                let start = here + u64::from(entry.start);
                let end = start + u64::from(entry.sectors);
                let inside = u64::from(entry.start) + u64::from(entry.sectors) <= here_sectors
                    && start >= first
                    && end <= first + sectors;
                // The last two entries may hold garbage; Linux uses them only if they fit.
                if index >= 2 && !inside {
                    continue;
                }
                if self.partitions.len() >= MAX_PARTITIONS {
                    self.damage.push(Damage::TooMany);
                    return Ok(());
                }
                self.push(*next, *entry, here);
                *next += 1;
                empty = 0;
            }
            let Some(link) = entries.iter().find(|e| e.is_extended()) else {
                return Ok(());
            };
            if empty >= MAX_EMPTY_RECORDS {
                self.damage.push(Damage::EmptyChain);
                return Ok(());
            }
            here = first + u64::from(link.start);
            here_sectors = u64::from(link.sectors);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::disk::table;

    /// Writes an entry into the boot record at `sector`.
    pub(crate) fn put(
        disk: &mut [u8],
        sector: usize,
        index: usize,
        kind: u8,
        start: u32,
        sectors: u32,
    ) {
        let at = sector * 512 + 446 + 16 * index;
        disk[at + 4] = kind;
        disk[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
        disk[at + 12..at + 16].copy_from_slice(&sectors.to_le_bytes());
        disk[sector * 512 + 510..sector * 512 + 512].copy_from_slice(&[0x55, 0xAA]);
    }

    fn numbers(table: &Table) -> Vec<(u32, u64, u64)> {
        table
            .partitions
            .iter()
            .map(|p| (p.number, p.start / 512, p.len / 512))
            .collect()
    }

    /// Two primaries and three logical partitions.
    pub(crate) fn sample() -> Vec<u8> {
        let mut disk = vec![0; 512 * 1000];
        disk[440..444].copy_from_slice(&0x1234_abcd_u32.to_le_bytes());
        put(&mut disk, 0, 0, 0x83, 10, 90);
        put(&mut disk, 0, 1, 0x0F, 200, 700);
        put(&mut disk, 0, 3, 0x8E, 100, 100);
        put(&mut disk, 200, 0, 0x83, 2, 50);
        put(&mut disk, 200, 1, 0x05, 100, 100);
        put(&mut disk, 300, 0, 0x82, 2, 60);
        put(&mut disk, 300, 1, 0x05, 300, 100);
        put(&mut disk, 500, 0, 0x83, 3, 70);
        disk
    }

    #[test]
    fn test_primaries_and_logical_partitions() {
        let table = table::read(&sample()).unwrap();
        assert_eq!(table.kind, TableKind::Mbr);
        assert_eq!(table.id.as_deref(), Some("1234abcd"));
        assert_eq!(
            numbers(&table),
            [
                (1, 10, 90),
                (4, 100, 100),
                (5, 202, 50),
                (6, 302, 60),
                (7, 503, 70)
            ]
        );
        assert_eq!(table.partitions[2].partuuid.as_deref(), Some("1234abcd-05"));
        assert_eq!(table.partitions[1].kind, "0x8e");
        assert!(table.notes.is_empty(), "{:?}", table.notes);
        assert!(table.damage.is_empty(), "{:?}", table.damage);
    }

    #[test]
    fn test_chain_that_loops_ends() {
        let mut disk = sample();
        put(&mut disk, 500, 1, 0x05, 100, 100);
        let table = table::read(&disk).unwrap();
        assert_eq!(table.partitions.len(), 5);
        assert_eq!(table.damage, [Damage::ChainLoop(300)]);
        // A record linked to itself.
        put(&mut disk, 200, 1, 0x05, 0, 100);
        assert_eq!(table::read(&disk).unwrap().partitions.len(), 3);
    }

    #[test]
    fn test_broken_chain_keeps_what_was_found() {
        let mut disk = sample();
        disk[300 * 512 + 510] = 0;
        let table = table::read(&disk).unwrap();
        assert_eq!(table.partitions.len(), 3);
        assert_eq!(table.damage, [Damage::NoRecord(300)]);
    }

    #[test]
    fn test_bounds_and_overlap() {
        let mut disk = sample();
        put(&mut disk, 0, 0, 0x83, 10, 95);
        put(&mut disk, 0, 2, 0x83, 990, 100);
        let table = table::read(&disk).unwrap();
        assert!(numbers(&table).contains(&(3, 990, 10)));
        assert_eq!(
            table.notes,
            [
                "p3 ends beyond the end of the disk, cut there",
                "p1 and p4 overlap"
            ]
        );
        put(&mut disk, 0, 2, 0x83, 1000, 100);
        let table = table::read(&disk).unwrap();
        assert_eq!(table.damage, [Damage::Beyond(3)]);
        assert!(table.partitions.iter().all(|p| p.number != 3));
    }

    #[test]
    fn test_boot_sectors_are_not_tables() {
        // FAT32 over the whole disk, with boot code that looks like a used entry.
        let mut disk = sample();
        disk[0..3].copy_from_slice(&[0xEB, 0x58, 0x90]);
        disk[11..13].copy_from_slice(&512u16.to_le_bytes());
        disk[13..17].copy_from_slice(&[8, 32, 0, 2]);
        disk[21] = 0xF8;
        disk[32..36].copy_from_slice(&1000u32.to_le_bytes());
        disk[36..40].copy_from_slice(&10u32.to_le_bytes());
        assert_eq!(table::read(&disk).unwrap().kind, TableKind::None);
        // These bytes as MBR boot code: not FAT.
        disk[13] = 7;
        assert_eq!(table::read(&disk).unwrap().kind, TableKind::Mbr);
        disk[3..11].copy_from_slice(b"NTFS    ");
        assert_eq!(table::read(&disk).unwrap().kind, TableKind::None);
        // Boot code in place of the entries.
        let mut disk = sample();
        disk[446] = 0x31;
        assert_eq!(table::read(&disk).unwrap().kind, TableKind::None);
        // A boot sector without partitions; a disk shorter than one sector.
        let mut disk = vec![0; 1024];
        disk[510..512].copy_from_slice(&[0x55, 0xAA]);
        assert_eq!(table::read(&disk).unwrap().kind, TableKind::None);
        assert_eq!(table::read(&vec![0u8; 100]).unwrap().kind, TableKind::None);
    }

    #[test]
    fn test_sectors_of_4096_bytes_are_found_by_content() {
        let mut disk = vec![0; 4096 * 1000];
        put(&mut disk, 0, 0, 0x83, 256, 100);
        assert_eq!(table::read(&disk).unwrap().sector_size, 512);
        disk[256 * 4096..256 * 4096 + 4].copy_from_slice(b"XFSB");
        let table = table::read(&disk).unwrap();
        assert_eq!(table.sector_size, 4096);
        assert_eq!(
            (table.partitions[0].start, table.partitions[0].len),
            (256 * 4096, 100 * 4096)
        );
        disk[256 * 512..256 * 512 + 4].copy_from_slice(b"XFSB");
        assert_eq!(table::read(&disk).unwrap().sector_size, 512);
    }
}
