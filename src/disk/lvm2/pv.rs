//! Physical volumes on disks and partitions.

use std::io;

use super::label::{self, PvHeader};
use crate::disk::layout::Extent;
use crate::disk::read::{Part, ReadAt, read_up_to};

/// A PV found on a disk or partition.
#[derive(Debug)]
pub(in crate::disk) struct FoundPv {
    /// Name of the disk or partition (`p2`).
    pub(in crate::disk) name: String,
    pub(in crate::disk) place: Extent,
    pub(in crate::disk) header: PvHeader,
}

/// Looks for a physical volume on a disk or partition.
pub(in crate::disk) fn find_pv(
    disks: &[&dyn ReadAt],
    name: &str,
    place: Extent,
) -> io::Result<Option<FoundPv>> {
    let Some(disk) = disks.get(place.disk) else {
        return Ok(None);
    };
    let part = Part {
        disk: *disk,
        start: place.start,
        len: place.len,
    };
    let head = read_up_to(&part, 0, 4 * 512)?;
    Ok(match label::pv_header(&head) {
        Some(header) if !is_md_member(&part)? => Some(FoundPv {
            name: name.to_owned(),
            place,
            header,
        }),
        _ => None,
    })
}

/// Whether it belongs to a Linux software RAID. A mirror may have its superblock at the end, so
/// that its content, such as a PV, appears to start right here.
fn is_md_member(part: &dyn ReadAt) -> io::Result<bool> {
    let size = part.size();
    let version_0 = (size & !0xFFFF).checked_sub(0x1_0000);
    let version_1_0 = (size & !0xFFF).checked_sub(0x2000);
    for at in [version_0, version_1_0, Some(0), Some(4096)]
        .into_iter()
        .flatten()
    {
        if read_up_to(part, at, 4)? == 0xA92B_4EFC_u32.to_le_bytes() {
            return Ok(true);
        }
    }
    Ok(false)
}
