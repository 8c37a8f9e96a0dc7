//! GUID partition tables.

use std::io;

use super::{Damage, MAX_PARTITIONS, Partition, Records, Table, TableKind, le};
use crate::crc::crc32;
use crate::disk::read::{ReadAt, read_up_to};

/// Maximum size of the entry array; real ones have 16 KiB.
const MAX_ENTRY_BYTES: u64 = 1024 * 1024;

/// A header with a valid checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    alternate: u64,
    disk_guid: [u8; 16],
    entries_lba: u64,
    entry_count: u32,
    entry_size: u32,
    entries_crc: u32,
}

/// The array of entries that a header describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entries {
    /// Its first sector.
    pub lba: u64,
    /// Number of entries, used or not.
    pub count: u32,
    /// Bytes of each.
    pub size: u32,
}

/// Parses the header sector located at `lba`.
pub fn header(sector: &[u8], lba: u64) -> Option<Header> {
    if sector.get(..8)? != b"EFI PART" {
        return None;
    }
    let size = usize::try_from(le::u32_at(sector, 12)?).ok()?;
    if size < 92 {
        return None;
    }
    let mut checked = sector.get(..size)?.to_vec();
    checked.get_mut(16..20)?.fill(0);
    if crc32(&checked) != le::u32_at(sector, 16)? || le::u64_at(sector, 24)? != lba {
        return None;
    }
    let header = Header {
        alternate: le::u64_at(sector, 32)?,
        disk_guid: le::array(sector, 56)?,
        entries_lba: le::u64_at(sector, 72)?,
        entry_count: le::u32_at(sector, 80)?,
        entry_size: le::u32_at(sector, 84)?,
        entries_crc: le::u32_at(sector, 88)?,
    };
    let bytes = u64::from(header.entry_count) * u64::from(header.entry_size);
    (header.entry_size >= 128 && header.entry_size % 8 == 0 && bytes <= MAX_ENTRY_BYTES)
        .then_some(header)
}

/// Parses one entry; `None` if unused.
pub fn entry(bytes: &[u8], number: u32, sector_size: u64) -> Option<Result<Partition, Damage>> {
    let kind: [u8; 16] = le::array(bytes, 0)?;
    if kind == [0; 16] {
        return None;
    }
    let first = le::u64_at(bytes, 32)?;
    let last = le::u64_at(bytes, 40)?;
    let start = first.checked_mul(sector_size);
    let len = last
        .checked_sub(first)
        .and_then(|n| n.checked_add(1))
        .and_then(|n| n.checked_mul(sector_size));
    let (Some(start), Some(len)) = (start, len) else {
        return Some(Err(Damage::Backwards(number)));
    };
    let name: Vec<u16> = bytes
        .get(56..128)?
        .chunks_exact(2)
        .map_while(|c| le::u16_at(c, 0))
        .take_while(|unit| *unit != 0)
        .collect();
    let name = String::from_utf16_lossy(&name);
    Some(Ok(Partition {
        number,
        start,
        len,
        kind: guid(&kind),
        partuuid: Some(guid(&le::array(bytes, 16)?)),
        partlabel: (!name.is_empty()).then_some(name),
        flags: le::u64_at(bytes, 48)?,
    }))
}

/// A GUID as text; its first three fields are little-endian.
fn guid(bytes: &[u8; 16]) -> String {
    let [a, b, c, d, e, f, g, h, tail @ ..] = *bytes;
    let mut order = vec![d, c, b, a, f, e, h, g];
    order.extend(tail);
    let mut text = String::with_capacity(36);
    for (index, byte) in order.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// GPT of a disk.
pub(super) enum Gpt {
    /// A table.
    Table(Table),
    /// Nothing that can be used, and why.
    Unusable(String),
}

/// Reads the GPT of a disk whose MBR announces one.
pub(super) fn read(disk: &dyn ReadAt) -> io::Result<Gpt> {
    let mut why = "no GPT header is intact".to_owned();
    for sector_size in [512, 4096] {
        match read_with(disk, sector_size)? {
            Some(Gpt::Unusable(reason)) => why = reason,
            Some(table) => return Ok(table),
            None => {}
        }
    }
    Ok(Gpt::Unusable(why))
}

/// Tries one sector size; primary header first, then the backups. `None` without an intact header.
fn read_with(disk: &dyn ReadAt, sector_size: u32) -> io::Result<Option<Gpt>> {
    let size = u64::from(sector_size);
    let read_sector = |lba: u64| match lba.checked_mul(size) {
        Some(at) => read_up_to(disk, at, size),
        None => Ok(Vec::new()),
    };
    let first = read_sector(1)?;
    let last = (disk.size() / size).saturating_sub(1);
    // On a disk that has grown, only the primary header, if legible, tells where the backup is.
    let told = le::u64_at(&first, 32).unwrap_or(last);
    let mut why = None;
    for lba in [1, last, told] {
        let Some(header) = header(&read_sector(lba)?, lba) else {
            continue;
        };
        match table(disk, &header, sector_size)? {
            Some(mut table) => {
                if lba != 1 {
                    table
                        .notes
                        .insert(0, "the primary GPT is damaged, its backup was used".into());
                }
                return Ok(Some(Gpt::Table(table)));
            }
            None => why = Some("the checksum of the GPT entries is wrong".to_owned()),
        }
    }
    Ok(why.map(Gpt::Unusable))
}

/// Reads the entries that a header describes; `None` if their checksum is wrong.
fn table(disk: &dyn ReadAt, header: &Header, sector_size: u32) -> io::Result<Option<Table>> {
    let size = u64::from(sector_size);
    let bytes = u64::from(header.entry_count) * u64::from(header.entry_size);
    let Some(at) = header.entries_lba.checked_mul(size) else {
        return Ok(None);
    };
    let entries = read_up_to(disk, at, bytes)?;
    if crc32(&entries) != header.entries_crc {
        return Ok(None);
    }
    let mut table = Table {
        kind: TableKind::Gpt,
        sector_size,
        id: Some(guid(&header.disk_guid)),
        partitions: Vec::new(),
        damage: Vec::new(),
        notes: Vec::new(),
        records: Records {
            entries: Some(Entries {
                lba: header.entries_lba,
                count: header.entry_count,
                size: header.entry_size,
            }),
            ..Records::default()
        },
    };
    let entry_size = usize::try_from(header.entry_size).map_err(io::Error::other)?;
    for (number, bytes) in (1..).zip(entries.chunks_exact(entry_size)) {
        match entry(bytes, number, size) {
            None => {}
            Some(_) if table.partitions.len() >= MAX_PARTITIONS => {
                table.damage.push(Damage::TooMany);
                break;
            }
            Some(Ok(partition)) => table.partitions.push(partition),
            Some(Err(damage)) => table.damage.push(damage),
        }
    }
    Ok(Some(table))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::disk::table::{self, mbr};

    fn put_header(disk: &mut [u8], ss: usize, lba: usize, alternate: usize, entries_lba: usize) {
        let sectors = disk.len() / ss;
        let entries_crc = crc32(&disk[entries_lba * ss..entries_lba * ss + 128 * 128]);
        let h = &mut disk[lba * ss..(lba + 1) * ss];
        h.fill(0);
        h[..8].copy_from_slice(b"EFI PART");
        h[8..12].copy_from_slice(&0x10000u32.to_le_bytes());
        h[12..16].copy_from_slice(&92u32.to_le_bytes());
        h[24..32].copy_from_slice(&(lba as u64).to_le_bytes());
        h[32..40].copy_from_slice(&(alternate as u64).to_le_bytes());
        h[40..48].copy_from_slice(&34u64.to_le_bytes());
        h[48..56].copy_from_slice(&((sectors - 34) as u64).to_le_bytes());
        h[56..72].copy_from_slice(&[7; 16]);
        h[72..80].copy_from_slice(&(entries_lba as u64).to_le_bytes());
        h[80..84].copy_from_slice(&128u32.to_le_bytes());
        h[84..88].copy_from_slice(&128u32.to_le_bytes());
        h[88..92].copy_from_slice(&entries_crc.to_le_bytes());
        let crc = crc32(&h[..92]);
        h[16..20].copy_from_slice(&crc.to_le_bytes());
    }

    /// Partitions 1 and 3 on 400 sectors, primary and backup.
    pub(crate) fn sample(ss: usize) -> Vec<u8> {
        let sectors = 400;
        let mut disk = vec![0; ss * sectors];
        mbr::tests::put(&mut disk, 0, 0, 0xEE, 1, 399);
        for entries in [2, sectors - 34] {
            for (index, first, last, name) in [(0, 40u64, 99u64, "EFI"), (2, 100, 199, "root é")] {
                let at = entries * ss + index * 128;
                let e = &mut disk[at..at + 128];
                e[..16].copy_from_slice(&[
                    0xAF, 0x3D, 0xC6, 0x0F, 0x83, 0x84, 0x72, 0x47, 0x8E, 0x79, 0x3D, 0x69, 0xD8,
                    0x47, 0x7D, 0xE4,
                ]);
                e[16..32].copy_from_slice(&[index as u8 + 1; 16]);
                e[32..40].copy_from_slice(&first.to_le_bytes());
                e[40..48].copy_from_slice(&last.to_le_bytes());
                for (unit, code) in name.encode_utf16().enumerate() {
                    e[56 + 2 * unit..58 + 2 * unit].copy_from_slice(&code.to_le_bytes());
                }
            }
        }
        put_header(&mut disk, ss, 1, sectors - 1, 2);
        put_header(&mut disk, ss, sectors - 1, 1, sectors - 34);
        disk
    }

    /// Clears the partitions of a sample.
    pub(crate) fn clear(disk: &mut [u8], ss: usize) {
        let sectors = disk.len() / ss;
        for entries in [2, sectors - 34] {
            disk[entries * ss..entries * ss + 128 * 128].fill(0);
        }
        put_header(disk, ss, 1, sectors - 1, 2);
        put_header(disk, ss, sectors - 1, 1, sectors - 34);
    }

    #[test]
    fn test_entries_in_both_sector_sizes() {
        for ss in [512, 4096] {
            let table = table::read(&sample(ss)).unwrap();
            assert_eq!(table.kind, TableKind::Gpt);
            assert_eq!(table.sector_size as usize, ss);
            assert!(table.notes.is_empty(), "{:?}", table.notes);
            assert!(table.damage.is_empty(), "{:?}", table.damage);
            let [efi, root] = &table.partitions[..] else {
                panic!("{table:?}")
            };
            assert_eq!((efi.number, root.number), (1, 3));
            assert_eq!((root.start, root.len), (100 * ss as u64, 100 * ss as u64));
            assert_eq!(root.kind, "0fc63daf-8483-4772-8e79-3d69d8477de4");
            assert_eq!(
                root.partuuid.as_deref(),
                Some("03030303-0303-0303-0303-030303030303")
            );
            assert_eq!(root.partlabel.as_deref(), Some("root é"));
        }
    }

    #[test]
    fn test_backup_is_used() {
        for broken in [512 + 30, 2 * 512 + 40] {
            let mut disk = sample(512);
            disk[broken] ^= 1;
            let table = table::read(&disk).unwrap();
            assert_eq!(table.partitions.len(), 2);
            assert!(table.notes[0].contains("backup"), "{:?}", table.notes);
            // Grown disk: the backup is no longer at the end.
            disk.resize(disk.len() + 51200, 0);
            assert_eq!(table::read(&disk).unwrap().partitions.len(), 2);
        }
    }

    #[test]
    fn test_both_damaged() {
        let mut disk = sample(512);
        disk[512 + 30] ^= 1;
        let last = disk.len() - 512 + 30;
        disk[last] ^= 1;
        let table = table::read(&disk).unwrap();
        assert_eq!((table.kind, table.partitions.len()), (TableKind::Mbr, 0));
        assert_eq!(
            table.damage,
            [Damage::NoGpt("no GPT header is intact".into())]
        );
    }

    #[test]
    fn test_leftover_without_protective_mbr_is_ignored() {
        let mut disk = sample(512);
        mbr::tests::put(&mut disk, 0, 0, 0x83, 10, 20);
        assert_eq!(table::read(&disk).unwrap().kind, TableKind::Mbr);
        disk[510] = 0;
        assert_eq!(table::read(&disk).unwrap().kind, TableKind::None);
    }

    #[test]
    fn test_hybrid_is_a_gpt() {
        let mut disk = sample(512);
        mbr::tests::put(&mut disk, 0, 1, 0x83, 100, 20);
        let table = table::read(&disk).unwrap();
        assert_eq!(table.kind, TableKind::Gpt);
        assert!(table.notes[0].contains("hybrid"));
    }

    #[test]
    fn test_absurd_headers() {
        let disk = sample(512);
        let mut sector = disk[512..1024].to_vec();
        let seal = |sector: &mut Vec<u8>| {
            sector[16..20].fill(0);
            let crc = crc32(&sector[..92]);
            sector[16..20].copy_from_slice(&crc.to_le_bytes());
        };
        assert!(header(&sector, 1).is_some());
        assert!(header(&sector, 2).is_none());
        sector[80..84].copy_from_slice(&u32::MAX.to_le_bytes());
        seal(&mut sector);
        assert!(header(&sector, 1).is_none());
        sector[80..84].copy_from_slice(&1u32.to_le_bytes());
        sector[84..88].copy_from_slice(&0u32.to_le_bytes());
        seal(&mut sector);
        assert!(header(&sector, 1).is_none());
        let mut backwards = [1; 128];
        backwards[40..48].fill(0);
        assert!(entry(&backwards, 1, 512).unwrap().is_err());
    }
}
