//! Sizes of thick snapshots.
//!
//! The copy-on-write area stores each chunk changed on the origin (or in the snapshot) once, plus
//! the kernel's table of chunks. The chunk size is a trade-off: a small write copies a whole chunk,
//! but larger chunks need fewer entries and fewer copies for sequential writes. With the default of
//! 64 KiB, a guest's 4 KiB random write still costs one disk operation. The table of a 1 TiB disk
//! takes 256 MiB on disk, against 4 GiB with LVM's default.

use super::lvm::LvInfo;
use crate::config::{Size, defaults};
use crate::error::{Code, Error, Result};

/// Chunk sizes that both the kernel's snapshot target and LVM accept.
const MIN_CHUNK: u64 = 4 << 10;
const MAX_CHUNK: u64 = 512 << 10;
/// Size of a table entry in bytes.
const ENTRY: u64 = 16;
/// Minimum size in chunks; less would not survive a journal replay.
const MIN_CHUNKS: u64 = 64;

/// Validates a chunk size.
pub(super) fn chunk(asked: Option<u64>) -> Result<u64> {
    let chunk = asked.unwrap_or(defaults::CHUNK);
    if chunk.is_power_of_two() && (MIN_CHUNK..=MAX_CHUNK).contains(&chunk) {
        Ok(chunk)
    } else {
        Err(Error::new(
            Code::SnapshotFailed,
            format!("chunk size {chunk}: a power of two between 4k and 512k is needed"),
        ))
    }
}

/// Size of the copy-on-write area in extents: the requested size, rounded up, at most that needed
/// to change every chunk.
pub(super) fn extents(origin: &LvInfo, size: Size, chunk: u64) -> Result<u64> {
    let bad = |what: &str| Error::new(Code::SnapshotFailed, format!("{}: {what}", origin.name));
    if origin.extent_size == 0 {
        return Err(bad("the group has no extent size"));
    }
    let bytes = match size {
        Size::Percent(0) | Size::Bytes(0) => return Err(bad("a snapshot needs a size")),
        Size::Percent(percent) => {
            let bytes = u128::from(origin.size) * u128::from(percent) / 100;
            u64::try_from(bytes).map_err(|_| bad("the size is too large"))?
        }
        Size::Bytes(bytes) => bytes,
    };
    let bytes = bytes.max(MIN_CHUNKS * chunk).min(full(origin.size, chunk));
    Ok(bytes.div_ceil(origin.extent_size))
}

/// Size of a full copy in bytes: a header, every chunk, and the table areas.
fn full(origin: u64, chunk: u64) -> u64 {
    let chunks = origin.div_ceil(chunk);
    let areas = chunks.div_ceil(chunk / ENTRY);
    // One extra chunk: the kernel counts an area as used in advance.
    (chunks + areas + 2).saturating_mul(chunk)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::lvm::tests::origin;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn test_size_is_rounded_up_to_extents() {
        let lv = origin(40 * GIB, 4 * MIB);
        let extents = |size| extents(&lv, size, defaults::CHUNK).unwrap();
        assert_eq!(extents(Size::Percent(20)), 2048);
        assert_eq!(extents(Size::Bytes(10 * GIB)), 2560);
        assert_eq!(extents(Size::Bytes(10 * GIB + 1)), 2561);
        assert_eq!(extents(Size::Bytes(1)), 1);
    }

    #[test]
    fn test_size_is_capped_at_a_full_copy() {
        let lv = origin(40 * GIB, 4 * MIB);
        let full = extents(&lv, Size::Percent(100), defaults::CHUNK).unwrap();
        assert_eq!(full, 10240);
        let more = extents(&lv, Size::Bytes(400 * GIB), defaults::CHUNK).unwrap();
        // 655,360 chunks, 160 areas of 4,096 entries, a header and one to spare: 10.125 MiB.
        assert_eq!(more, 10240 + 3);
    }

    #[test]
    fn test_odd_sizes_and_chunks_are_refused() {
        let lv = origin(GIB, 4 * MIB);
        assert!(extents(&lv, Size::Percent(0), defaults::CHUNK).is_err());
        assert!(extents(&lv, Size::Bytes(0), defaults::CHUNK).is_err());
        assert_eq!(chunk(None).unwrap(), 65536);
        assert_eq!(chunk(Some(4096)).unwrap(), 4096);
        for odd in [0, 1, 512, 5000, 1 << 20] {
            assert!(chunk(Some(odd)).is_err());
        }
    }
}
