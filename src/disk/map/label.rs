//! Loop devices and the host's LVM.
//!
//! LVM reads the first four sectors of each loop device. If it finds a label, valid or not, it
//! parses further data, which the guest controls. So no loop device of ours may begin with a label.

use std::io;

use crate::disk::read::ReadAt;
use crate::{Code, Error, Result};

/// Magic at the start of a label.
const LABEL: &[u8] = b"LABELONE";
/// LVM's sector size, independent of the device's.
const SECTOR: usize = 512;
/// Bytes that LVM scans for a label.
const LOOKED_AT: usize = 4 * SECTOR;
/// Alignment of the start of a loop device that spans more than one volume.
const STEP: u64 = 4096;
/// Maximum start offsets tried.
const TRIES: u64 = 64;

/// Returns the sector that has a label, in the first bytes of a device.
fn sector_with_label(start: &[u8]) -> Option<usize> {
    let mut sectors = start.chunks(SECTOR).take(LOOKED_AT / SECTOR);
    sectors.position(|sector| sector.starts_with(LABEL))
}

/// Whether a loop device starting at `offset` would show a label.
pub(super) fn is_shown_at(disk: &dyn ReadAt, offset: u64) -> io::Result<bool> {
    let left = disk.size().saturating_sub(offset);
    let len = usize::try_from(left).unwrap_or(LOOKED_AT).min(LOOKED_AT);
    let mut start = [0; LOOKED_AT];
    disk.read_exact_at(&mut start[..len], offset)?;
    Ok(sector_with_label(&start).is_some())
}

/// Finds a start offset for a loop device that must cover `lowest`: after the label of a disk that
/// is a physical volume and, if possible, where no journal replay writes.
pub(super) fn beginning(disk: &dyn ReadAt, lowest: u64) -> io::Result<Option<u64>> {
    let steps = (1..=TRIES).map(|n| n * STEP).take_while(|at| *at <= lowest);
    for at in steps.chain([lowest, 0]) {
        if !is_shown_at(disk, at)? {
            return Ok(Some(at));
        }
    }
    Ok(None)
}

/// The error for a volume that cannot be a loop device.
pub(super) fn refused(device: &str) -> Error {
    let text = format!("{device}: LABELONE in its first four sectors");
    Error::new(Code::HiddenLabel, text)
}

/// Checks that a loop device shows no label.
pub(super) fn check(device: &crate::sys::loopdev::LoopDevice) -> Result<()> {
    let name = device.path().display().to_string();
    let start = device.beginning(LOOKED_AT).map_err(|error| {
        Error::new(Code::MapFailed, format!("{name}: its first sectors")).because(error)
    })?;
    match sector_with_label(&start) {
        Some(_) => Err(refused(&name)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(labels: &[usize]) -> Vec<u8> {
        let mut disk = vec![0; 1 << 20];
        for sector in labels {
            disk[sector * SECTOR..sector * SECTOR + 8].copy_from_slice(LABEL);
        }
        disk
    }

    #[test]
    fn test_a_label_counts_in_the_first_four_sectors_valid_or_not() {
        for sector in 0..4 {
            assert!(is_shown_at(&disk(&[sector]), 0).unwrap(), "{sector}");
        }
        assert!(!is_shown_at(&disk(&[4]), 0).unwrap());
        assert!(is_shown_at(&disk(&[4]), 512).unwrap());
        // A device shorter than four sectors.
        let short = disk(&[0])[..600].to_vec();
        assert!(is_shown_at(&short, 0).unwrap());
        assert!(!is_shown_at(&short, 512).unwrap());
    }

    #[test]
    fn test_a_loop_device_begins_behind_labels() {
        let begin = |labels: &[usize], lowest| beginning(&disk(labels), lowest).unwrap();
        // A physical volume whose extents begin at 512 KiB.
        assert_eq!(begin(&[1], 512 << 10), Some(4096));
        assert_eq!(begin(&[1, 9], 512 << 10), Some(8192));
        // A partition at sector 63, one at sector 4, and a whole disk.
        assert_eq!(begin(&[63], 63 * 512), Some(4096));
        assert_eq!(begin(&[4], 4 * 512), Some(0));
        assert_eq!(begin(&[], 0), Some(0));
        assert_eq!(begin(&[2], 0), None);
        // A label at every candidate offset.
        let all: Vec<usize> = (0..2048).collect();
        assert_eq!(begin(&all, 512 << 10), None);
    }
}
