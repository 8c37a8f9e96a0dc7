//! A partition table as its partitions, whatever its kind.

use std::io;

use serde::{Serialize, Serializer};

use super::{gpt, mbr};
use crate::disk::read::{ReadAt, read_up_to};

/// Maximum partitions of one disk, as in Linux.
pub const MAX_PARTITIONS: usize = 256;

/// The kind of a partition table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum TableKind {
    /// No table: the disk itself is the only volume.
    None,
    /// DOS partition table.
    Mbr,
    /// GUID partition table.
    Gpt,
}

/// One partition, in bytes, within its disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Partition {
    /// Number as in Linux: from 1, logical partitions of an MBR from 5.
    pub number: u32,
    /// Offset on the disk in bytes.
    pub start: u64,
    /// Length in bytes; never past the end of the disk.
    pub len: u64,
    /// `0x83`, or a GPT type GUID in lower case.
    #[serde(rename = "type")]
    pub kind: String,
    /// `PARTUUID=` value in the form of fstab, lower case.
    pub partuuid: Option<String>,
    /// `PARTLABEL=` value in the form of fstab; set by the guest.
    pub partlabel: Option<String>,
    /// GPT: the attribute bits. MBR: 0x80 if it is active.
    #[serde(skip)]
    pub flags: u64,
}

/// An unusable part of a partition table: partitions and their files may be missing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Damage {
    /// A protective MBR without a usable GPT, and the reason.
    NoGpt(String),
    /// A partition that starts past the end of the disk.
    Beyond(u32),
    /// A partition that ends before it starts.
    Backwards(u32),
    /// The chain of logical partitions leads back to this sector.
    ChainLoop(u64),
    /// The chain of logical partitions leads to this sector, which holds no record.
    NoRecord(u64),
    /// The chain of logical partitions continues without partitions.
    EmptyChain,
    /// More partitions than [`MAX_PARTITIONS`].
    TooMany,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Damage::NoGpt(why) => write!(f, "protective MBR, but {why}"),
            Damage::Beyond(number) => write!(f, "p{number} starts beyond the end of the disk"),
            Damage::Backwards(number) => write!(f, "p{number} ends before it starts"),
            Damage::ChainLoop(sector) => write!(
                f,
                "the chain of logical partitions is a loop: back to sector {sector}"
            ),
            Damage::NoRecord(sector) => write!(f, "no extended boot record at sector {sector}"),
            Damage::EmptyChain => f.write_str("too many empty extended boot records"),
            Damage::TooMany => write!(f, "more than {MAX_PARTITIONS} partitions"),
        }
    }
}

impl Serialize for Damage {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A disk's partition table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Table {
    /// Table type.
    pub kind: TableKind,
    /// Sector size that the table's numbers assume.
    pub sector_size: u32,
    /// Disk GUID, or the MBR's disk id as eight hexadecimal digits.
    pub id: Option<String>,
    /// Partitions by number.
    pub partitions: Vec<Partition>,
    /// Unusable parts.
    pub damage: Vec<Damage>,
    /// Anomalies without loss.
    pub notes: Vec<String>,
    /// Where its bytes are, beside those in front of the first partition.
    #[serde(skip)]
    pub records: Records,
}

/// The bytes that make up a table, as places on the disk.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Records {
    /// MBR: offsets in bytes of the extended boot records.
    pub extended: Vec<u64>,
    /// GPT: the array of entries.
    pub entries: Option<gpt::Entries>,
}

impl Table {
    pub(super) fn none() -> Self {
        Table {
            kind: TableKind::None,
            sector_size: 512,
            id: None,
            partitions: Vec::new(),
            damage: Vec::new(),
            notes: Vec::new(),
            records: Records::default(),
        }
    }
}

/// Reads the partition table. Fails only on read errors.
pub fn read(disk: &dyn ReadAt) -> io::Result<Table> {
    let first = read_up_to(disk, 0, 512)?;
    let Some(entries) = mbr::entries(&first) else {
        return Ok(Table::none());
    };
    let mut table = if entries.iter().any(mbr::Entry::is_protective) {
        match gpt::read(disk)? {
            gpt::Gpt::Table(table) => table,
            gpt::Gpt::Unusable(why) => {
                let mut table = mbr::read(disk, &first, &entries)?;
                table.damage.insert(0, Damage::NoGpt(why));
                table
            }
        }
    } else {
        mbr::read(disk, &first, &entries)?
    };
    if table.kind == TableKind::Gpt && entries.iter().any(|e| e.is_used() && !e.is_protective()) {
        table
            .notes
            .push("hybrid MBR: the GPT counts, as for Linux".into());
    }
    fit(&mut table, disk.size());
    Ok(table)
}

/// Trims partitions to the disk's end, drops those past it, and notes overlaps.
fn fit(table: &mut Table, size: u64) {
    let Table {
        partitions,
        damage,
        notes,
        ..
    } = table;
    partitions.retain_mut(|p| {
        let room = size.saturating_sub(p.start);
        if room == 0 {
            damage.push(Damage::Beyond(p.number));
        } else if p.len > room {
            notes.push(format!(
                "p{} ends beyond the end of the disk, cut there",
                p.number
            ));
            p.len = room;
        }
        room != 0 && p.len != 0
    });
    partitions.sort_by_key(|p| p.number);
    let mut by_start: Vec<&Partition> = partitions.iter().collect();
    by_start.sort_by_key(|p| (p.start, p.number));
    // The furthest end so far, and its partition.
    let mut reach: Option<&Partition> = None;
    for p in by_start {
        if let Some(before) = reach.filter(|b| b.start.saturating_add(b.len) > p.start) {
            notes.push(format!("p{} and p{} overlap", before.number, p.number));
        }
        if reach.is_none_or(|b| b.start.saturating_add(b.len) < p.start.saturating_add(p.len)) {
            reach = Some(p);
        }
    }
}

/// Whether a well-known signature is at a possible volume start; used only to tell sector sizes
/// apart.
pub(super) fn looks_like_content(disk: &dyn ReadAt, start: u64) -> io::Result<bool> {
    let head = read_up_to(disk, start, 4096)?;
    let at = |offset: usize, magic: &[u8]| head.get(offset..offset + magic.len()) == Some(magic);
    Ok(at(1080, &[0x53, 0xEF]) // ext2/3/4
        || at(0, b"XFSB")
        || at(510, &[0x55, 0xAA]) // FAT, NTFS, boot code
        || at(4086, b"SWAPSPACE2")
        || at(0, b"LUKS\xBA\xBE")
        || (0..4).any(|sector| at(sector * 512, b"LABELONE"))
        || read_up_to(disk, start.saturating_add(0x1_0040), 8)? == b"_BHRfS_M")
}
