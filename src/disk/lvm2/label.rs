//! The label, header and metadata areas of a physical volume.

use std::io;

use crate::crc::{LVM2_START, register};
use crate::disk::le;
use crate::disk::read::{ReadAt, read_up_to};

const SECTOR: usize = 512;
/// Largest metadata text that is read. Metadata areas are 1 MiB by default.
const MAX_TEXT: u64 = 32 * 1024 * 1024;
const MAX_AREAS: usize = 16;
const MDA_MAGIC: &[u8; 16] = b"\x20LVM2\x20x[5A%r0N*>";
const MDA_HEADER: u64 = 512;

/// The header of a physical volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PvHeader {
    /// UUID: 32 characters, no dashes.
    pub uuid: String,
    /// Size in bytes according to the header.
    pub size: u64,
    /// Start of the data area. Label and metadata lie before it.
    pub data_start: u64,
    /// Metadata areas.
    pub metadata_areas: Vec<AreaPlace>,
}

/// A part of a physical volume, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AreaPlace {
    /// From the beginning of the physical volume.
    pub start: u64,
    /// Length.
    pub len: u64,
}

/// Finds the label in the first four sectors.
pub fn pv_header(head: &[u8]) -> Option<PvHeader> {
    (0u64..)
        .zip(head.chunks_exact(SECTOR).take(4))
        .find_map(|(number, s)| in_sector(s, number))
}

fn in_sector(sector: &[u8], number: u64) -> Option<PvHeader> {
    let fits = sector.get(..8)? == b"LABELONE"
        && sector.get(24..32)? == b"LVM2 001"
        && le::u64_at(sector, 8)? == number
        && le::u32_at(sector, 16)? == register(LVM2_START, sector.get(20..)?);
    if !fits {
        return None;
    }
    let at = usize::try_from(le::u32_at(sector, 20)?).ok()?;
    let header = sector.get(at..)?;
    let uuid = super::uuid(std::str::from_utf8(header.get(..32)?).ok()?)?;
    let size = le::u64_at(header, 32)?;
    // Two lists of areas, each ended by a zero start: data areas, then metadata areas.
    let mut pairs = header.get(40..)?.chunks_exact(16).map_while(|pair| {
        let (start, len) = (le::u64_at(pair, 0)?, le::u64_at(pair, 8)?);
        Some(AreaPlace { start, len })
    });
    let mut data_start = None;
    pairs.by_ref().find(|area| {
        data_start = data_start.or(Some(area.start));
        area.start == 0
    })?;
    let metadata_areas = pairs
        .take_while(|area| area.start != 0)
        .take(MAX_AREAS)
        .collect();
    Some(PvHeader {
        uuid,
        size,
        data_start: data_start.unwrap_or(0),
        metadata_areas,
    })
}

/// Location of the current text in a metadata area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextLocation {
    /// Offset from the start of the area.
    offset: u64,
    len: u64,
    checksum: u32,
}

/// Content of a metadata area's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Area {
    /// No text, or marked to be ignored.
    Empty,
    /// Location of the text.
    Text(TextLocation),
}

/// Parses the header of the metadata area at `start`, `len`. The error describes the damage.
pub fn area(header: &[u8], start: u64, len: u64) -> Result<Area, &'static str> {
    let parse = || {
        let checked = header.get(4..512)?;
        let intact = le::u32_at(header, 0)? == register(LVM2_START, checked)
            && header.get(4..20)? == MDA_MAGIC;
        let known = le::u32_at(header, 20)? == 1
            && le::u64_at(header, 24)? == start
            && le::u64_at(header, 32)? == len;
        let location = TextLocation {
            offset: le::u64_at(header, 40)?,
            len: le::u64_at(header, 48)?,
            checksum: le::u32_at(header, 56)?,
        };
        Some((intact, known, location, le::u32_at(header, 60)?))
    };
    let (intact, known, location, flags) = parse().ok_or("too short")?;
    if !intact {
        return Err("wrong checksum in the header");
    }
    if !known {
        return Err("unknown version or wrong place in the header");
    }
    if location.offset == 0 || flags & 1 != 0 {
        return Ok(Area::Empty);
    }
    let room = len.saturating_sub(MDA_HEADER);
    if location.offset < MDA_HEADER || location.offset >= len || location.len > room.min(MAX_TEXT) {
        return Err("text beyond the area");
    }
    Ok(Area::Text(location))
}

/// Content of a metadata area.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Held {
    /// No volume group.
    Nothing,
    /// Text of a volume group.
    Text(Vec<u8>),
    /// Unusable, for this reason.
    Unusable(&'static str),
}

/// Reads the current text of a metadata area, within the budget.
pub(super) fn text(pv: &dyn ReadAt, start: u64, len: u64, budget: &mut u64) -> io::Result<Held> {
    if start.checked_add(len).is_none_or(|end| end > pv.size()) {
        return Ok(Held::Unusable("beyond the end of the physical volume"));
    }
    let location = match area(&read_up_to(pv, start, MDA_HEADER)?, start, len) {
        Ok(Area::Text(location)) => location,
        Ok(Area::Empty) => return Ok(Held::Nothing),
        Err(why) => return Ok(Held::Unusable(why)),
    };
    // Damaged texts count as well, because they were read.
    match budget.checked_sub(location.len) {
        Some(rest) => *budget = rest,
        None => return Ok(Held::Unusable("too much LVM metadata in one guest")),
    }
    // The area is a ring buffer after its header.
    let first = location.len.min(len - location.offset);
    let mut text = read_up_to(pv, start + location.offset, first)?;
    text.extend(read_up_to(pv, start + MDA_HEADER, location.len - first)?);
    if register(LVM2_START, &text) != location.checksum {
        return Ok(Held::Unusable("wrong checksum of the text"));
    }
    Ok(Held::Text(text))
}
