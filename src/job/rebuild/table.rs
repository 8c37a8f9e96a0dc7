//! The bytes of a disk in front of, between and behind its volumes, for a disk of another size too.

use crate::crc::crc32;
use crate::kit::Loaded;
use crate::kit::format::{Disk, Entries};

/// Bytes for a place on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    /// Description for messages.
    pub(super) what: String,
    pub(super) start: u64,
    pub(super) bytes: Vec<u8>,
}

/// All pieces of a disk that has `size` bytes, at least those of the kit's disk. Areas come
/// first; later pieces replace parts of them. The error says why the disk cannot be made.
pub(super) fn pieces(kit: &Loaded, disk: &Disk, size: u64) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    for area in &disk.areas {
        let mut bytes = area
            .file
            .as_ref()
            .map_or(&[][..], |file| kit.bytes(file))
            .to_vec();
        let len = usize::try_from(area.len).map_err(|e| e.to_string())?;
        bytes.resize(len, 0);
        pieces.push(Piece {
            what: area.what.clone(),
            start: area.start,
            bytes,
        });
    }
    if disk.table == "gpt" {
        let gpt = gpt(disk, &pieces, size)?;
        pieces.extend(gpt);
    }
    Ok(pieces)
}

/// Zeros for both ends of each partition: data of an earlier guest there would pass for contents.
pub(super) fn ends(disk: &Disk) -> Vec<Piece> {
    const LEN: u64 = 1 << 20;
    let ends = disk.partitions.iter().flat_map(|partition| {
        let len = LEN.min(partition.len);
        let last = partition.start + partition.len - len;
        [partition.start, last].map(|start| Piece {
            what: format!("ends of p{}", partition.number),
            start,
            bytes: vec![0; usize::try_from(len).unwrap_or_default()],
        })
    });
    ends.collect()
}

/// The bytes that pieces put at a place; zeros where there is none.
fn laid(pieces: &[Piece], start: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    for piece in pieces {
        // Bytes of the piece in front of the place, and of the place in front of the piece.
        let before = usize::try_from(start.saturating_sub(piece.start)).unwrap_or(usize::MAX);
        let after = usize::try_from(piece.start.saturating_sub(start)).unwrap_or(usize::MAX);
        let from = piece.bytes.get(before..).unwrap_or_default();
        let to = out.get_mut(after..).unwrap_or_default();
        let count = from.len().min(to.len());
        to[..count].copy_from_slice(&from[..count]);
    }
    out
}

/// Both copies of the GPT, and the protective entry for the size of this disk.
fn gpt(disk: &Disk, pieces: &[Piece], size: u64) -> Result<Vec<Piece>, String> {
    let sector = u64::from(disk.sector_size);
    let Some(Entries {
        lba,
        count,
        size: each,
    }) = disk.entries
    else {
        return Err("its GPT has no entries".to_owned());
    };
    let bytes = u64::from(count) * u64::from(each);
    let sectors = bytes.div_ceil(sector);
    let last = (size / sector).checked_sub(1).ok_or("it is too small")?;
    let backup = last.checked_sub(sectors).ok_or("it is too small")?;
    let first_usable = lba + sectors;
    let in_the_way = |p: &&crate::kit::format::Partition| {
        p.start < first_usable * sector || p.start + p.len > backup * sector
    };
    if let Some(p) = disk.partitions.iter().find(in_the_way) {
        return Err(format!("p{} leaves no room for the GPT", p.number));
    }
    let len = usize::try_from(bytes).map_err(|e| e.to_string())?;
    let entries = laid(pieces, lba * sector, len);
    let guid = guid(disk.id.as_deref().unwrap_or_default()).ok_or("its id is no GUID")?;
    // Partitioning tools leave more room in front than the entries need.
    let kept = laid(pieces, sector + 40, 8);
    let kept = u64::from_le_bytes(kept.try_into().unwrap_or_default());
    let start = disk
        .partitions
        .iter()
        .map(|p| p.start / sector)
        .min()
        .unwrap_or(first_usable);
    let first_usable = if (first_usable..=start).contains(&kept) {
        kept
    } else {
        first_usable
    };
    let header = |own: u64, other: u64, entries_lba: u64| {
        let mut header = vec![0; usize::try_from(sector).unwrap_or(512)];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"EFI PART");
        put(8, &0x1_0000_u32.to_le_bytes());
        put(12, &92_u32.to_le_bytes());
        put(24, &own.to_le_bytes());
        put(32, &other.to_le_bytes());
        put(40, &first_usable.to_le_bytes());
        put(48, &(backup - 1).to_le_bytes());
        put(56, &guid);
        put(72, &entries_lba.to_le_bytes());
        put(80, &count.to_le_bytes());
        put(84, &each.to_le_bytes());
        put(88, &crc32(&entries).to_le_bytes());
        let crc = crc32(&header[..92]);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        header
    };
    let piece = |what: &str, lba: u64, bytes: Vec<u8>| Piece {
        what: format!("{what} of {}", disk.name),
        start: lba * sector,
        bytes,
    };
    Ok(vec![
        piece(
            "protective MBR",
            0,
            protective(laid(pieces, 0, 512), size / sector),
        ),
        piece("GPT", 1, header(1, last, lba)),
        piece("backup of the GPT's entries", backup, entries.clone()),
        piece("backup of the GPT", last, header(last, 1, backup)),
    ])
}

/// A protective MBR whose entry covers a disk of so many sectors. One that is hybrid stays as it is.
fn protective(mut mbr: Vec<u8>, sectors: u64) -> Vec<u8> {
    let used: Vec<usize> = (0..4)
        .map(|entry| 446 + 16 * entry)
        .filter(|at| mbr[at + 12..at + 16] != [0; 4])
        .collect();
    if let [at] = used[..] {
        let rest = u32::try_from(sectors - 1).unwrap_or(u32::MAX);
        mbr[at + 12..at + 16].copy_from_slice(&rest.to_le_bytes());
    }
    mbr
}

/// The bytes of a GUID: its first three fields are little-endian.
fn guid(text: &str) -> Option<[u8; 16]> {
    let digits: Vec<u8> = text.bytes().filter(|b| *b != b'-').collect();
    let digit = |b: u8| {
        char::from(b)
            .to_digit(16)
            .and_then(|d| u8::try_from(d).ok())
    };
    let bytes: Option<Vec<u8>> = digits
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        })
        .collect();
    let [a, b, c, d, e, f, g, h, tail @ ..]: [u8; 16] = bytes?.try_into().ok()?;
    let mut out = [d, c, b, a, f, e, h, g, 0, 0, 0, 0, 0, 0, 0, 0];
    out[8..].copy_from_slice(&tail);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::table;

    #[test]
    fn test_pieces_are_laid_over_each_other() {
        let piece = |start, bytes: &[u8]| Piece {
            what: String::new(),
            start,
            bytes: bytes.to_vec(),
        };
        let pieces = [piece(2, b"abcdef"), piece(4, b"XY"), piece(100, b"far")];
        assert_eq!(laid(&pieces, 0, 4), b"\0\0ab");
        assert_eq!(laid(&pieces, 3, 4), b"bXYe");
        assert_eq!(laid(&pieces, 6, 4), b"ef\0\0");
        assert_eq!(laid(&pieces, 8, 2), b"\0\0");
    }

    #[test]
    fn test_a_gpt_fits_its_new_disk() {
        let first = table::gpt::tests::sample(512);
        let known = table::read(&first).unwrap();
        let disks: [&dyn crate::disk::ReadAt; 1] = [&first];
        let examined = crate::disk::examine(&disks).unwrap();
        let holds = std::collections::BTreeMap::new();
        let collected = crate::kit::collect("web", &["vg/web".into()], &examined, &disks, &holds);
        let kit = Loaded::of(collected);
        let disk = kit.kit.disks[0].clone();
        for grown in [0, 1, 1000] {
            let size = disk.bytes + grown * 512;
            let mut made = vec![0; usize::try_from(size).unwrap()];
            let all = pieces(&kit, &disk, size).unwrap();
            for piece in &all {
                let start = usize::try_from(piece.start).unwrap();
                made[start..start + piece.bytes.len()].copy_from_slice(&piece.bytes);
            }
            let again = table::read(&made).unwrap();
            assert_eq!(again.partitions, known.partitions);
            assert_eq!((&again.id, again.kind), (&known.id, known.kind));
            assert!(again.notes.is_empty() && again.damage.is_empty());
            // Each copy is whole: without the first, the second is found at the end of the disk.
            made[512..1024].fill(0);
            let backup = table::read(&made).unwrap();
            assert_eq!(backup.partitions, known.partitions);
            assert_eq!(backup.notes.len(), 1, "{:?}", backup.notes);
        }
        let refused = pieces(&kit, &disk, 220 * 512).err();
        assert_eq!(refused.as_deref(), Some("p3 leaves no room for the GPT"));
    }
}
