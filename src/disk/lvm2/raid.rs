//! Selects a readable image of a raid1 volume.
//!
//! The kernel keeps a superblock in a small volume beside each image. It holds an event count, the
//! failed images, and each image's rebuild position.

use crate::disk::layout::Segment;
use crate::disk::le;

/// Bytes read of a superblock.
pub(super) const SUPERBLOCK: usize = 64;
const MAGIC: u32 = 0x6452_6D44;

/// State of one image, from its superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Superblock {
    position: u32,
    events: u64,
    /// One bit per image.
    failed: u64,
    /// Rebuild position of this image; all ones once complete.
    recovered: u64,
}

/// Parses the start of a metadata volume; `None` if the array was never active.
pub fn superblock(head: &[u8]) -> Option<Superblock> {
    if le::u32_at(head, 0)? != MAGIC {
        return None;
    }
    Some(Superblock {
        position: le::u32_at(head, 12)?,
        events: le::u64_at(head, 16)?,
        failed: le::u64_at(head, 24)?,
        recovered: le::u64_at(head, 32)?,
    })
}

/// A complete image.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) position: usize,
    pub(super) rebuilding: bool,
    pub(super) write_mostly: bool,
    pub(super) superblock: Option<Superblock>,
    pub(super) segments: Vec<Segment>,
}

/// Chooses the first complete image, preferably one that is not write-mostly. Like the kernel,
/// trusts the list of failed images in the superblock with the most events.
pub(super) fn choose(
    candidates: Vec<Candidate>,
    images: usize,
) -> Result<(Vec<Segment>, Option<String>), String> {
    let newest = candidates
        .iter()
        .filter_map(|c| c.superblock)
        .max_by_key(|s| s.events);
    let complete = |c: &Candidate| match (newest, c.superblock) {
        // Never active: no write went through the array.
        (None, _) => !c.rebuilding,
        (Some(_), None) => false,
        (Some(newest), Some(own)) => {
            let failed = u32::try_from(c.position)
                .ok()
                .and_then(|p| 1u64.checked_shl(p))
                .is_none_or(|bit| newest.failed & bit != 0);
            !failed && own.recovered == u64::MAX && usize::try_from(own.position) == Ok(c.position)
        }
    };
    let found = candidates.len();
    let mut usable: Vec<Candidate> = candidates.into_iter().filter(complete).collect();
    usable.sort_by_key(|c| (c.write_mostly, c.position));
    let Some(chosen) = usable.into_iter().next() else {
        return Err("no image of the raid1 volume is complete".into());
    };
    let note = if chosen.write_mostly {
        Some(format!(
            "image {} is read although it is write-mostly and may lag",
            chosen.position
        ))
    } else if found < images {
        Some(format!(
            "raid1 with {found} of {images} images, image {} is read",
            chosen.position
        ))
    } else if chosen.position != 0 {
        Some(format!(
            "raid1 image {} is read, those before it are not complete",
            chosen.position
        ))
    } else {
        None
    };
    Ok((chosen.segments, note))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::layout::Extent;

    fn image(position: usize, superblock: Option<Superblock>) -> Candidate {
        let extent = Extent {
            disk: position,
            start: 0,
            len: 1,
        };
        Candidate {
            position,
            rebuilding: false,
            write_mostly: false,
            superblock,
            segments: vec![Segment::Linear(extent)],
        }
    }

    fn state(position: u32, events: u64, failed: u64, recovered: u64) -> Option<Superblock> {
        Some(Superblock {
            position,
            events,
            failed,
            recovered,
        })
    }

    fn chosen(candidates: Vec<Candidate>) -> Result<usize, String> {
        let images = candidates.len();
        choose(candidates, images).map(|(segments, _)| segments[0].extents()[0].disk)
    }

    #[test]
    fn test_superblock_fields() {
        let mut head = [0; SUPERBLOCK];
        head[..4].copy_from_slice(b"DmRd");
        head[12] = 1;
        head[16] = 9;
        head[24] = 4;
        head[32..40].fill(0xFF);
        assert_eq!(superblock(&head), state(1, 9, 4, u64::MAX));
        assert_eq!(superblock(&head[..39]), None);
        assert_eq!(superblock(&[0; SUPERBLOCK]), None);
    }

    #[test]
    fn test_first_complete_image_is_chosen() {
        let fine = u64::MAX;
        assert_eq!(chosen(vec![image(0, None), image(1, None)]), Ok(0));
        assert_eq!(
            chosen(vec![
                image(0, state(0, 5, 0, fine)),
                image(1, state(1, 5, 0, fine))
            ]),
            Ok(0)
        );
        // Image 0 dropped out; its own superblock is stale.
        assert_eq!(
            chosen(vec![
                image(0, state(0, 5, 0, fine)),
                image(1, state(1, 8, 1, fine))
            ]),
            Ok(1)
        );
        // Image 0 is rebuilding, or has no superblock yet.
        assert_eq!(
            chosen(vec![
                image(0, state(0, 5, 0, 77)),
                image(1, state(1, 5, 0, fine))
            ]),
            Ok(1)
        );
        assert_eq!(
            chosen(vec![image(0, None), image(1, state(1, 5, 0, fine))]),
            Ok(1)
        );
        // No complete image is left.
        assert!(chosen(vec![image(0, state(0, 5, 0, 77))]).is_err());
        assert!(chosen(vec![image(0, state(1, 5, 0, fine))]).is_err());
    }

    #[test]
    fn test_write_mostly_is_the_last_resort() {
        let mut slow = image(0, None);
        slow.write_mostly = true;
        assert_eq!(chosen(vec![slow, image(1, None)]), Ok(1));
        let mut slow = image(0, None);
        slow.write_mostly = true;
        let (_, note) = choose(vec![slow], 2).unwrap();
        assert!(note.unwrap().contains("write-mostly"));
    }
}
