//! How large a thick snapshot is made.
//!
//! The copy-on-write area holds each chunk that changes on the origin (or in the snapshot) once,
//! and the kernel's table of them. The chunk size is a trade: a small write to the origin copies
//! a whole chunk, but a large chunk needs fewer entries, and sequential writes copy less often.
//! The default of 64 KiB is where guests' 4 KiB random writes still cost one disk operation,
//! while the table of a 1 TiB disk stays at 256 MiB on disk instead of LVM's default's 4 GiB.

use super::lvm::LvInfo;
use crate::config::Size;
use crate::error::{Code, Error, Result};

/// The chunk size when none is asked for.
pub const DEFAULT_CHUNK: u64 = 64 << 10;
/// What the kernel's snapshot target and LVM take.
const MIN_CHUNK: u64 = 4 << 10;
const MAX_CHUNK: u64 = 512 << 10;
/// Bytes of one entry of the table.
const ENTRY: u64 = 16;
/// Less room than this would not survive the replay of a journal.
const MIN_CHUNKS: u64 = 64;

/// Checks a chunk size.
pub(super) fn chunk(asked: Option<u64>) -> Result<u64> {
    let chunk = asked.unwrap_or(DEFAULT_CHUNK);
    if chunk.is_power_of_two() && (MIN_CHUNK..=MAX_CHUNK).contains(&chunk) {
        Ok(chunk)
    } else {
        Err(Error::new(
            Code::SnapshotFailed,
            format!("chunk size {chunk}: a power of two between 4k and 512k is needed"),
        ))
    }
}

/// The size of the copy-on-write area in extents of the group: what is asked for, rounded up, and
/// never more than what a change of every chunk would need.
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

/// Bytes that a full copy needs: a header, every chunk, and the areas of the table.
fn full(origin: u64, chunk: u64) -> u64 {
    let chunks = origin.div_ceil(chunk);
    let areas = chunks.div_ceil(chunk / ENTRY);
    // One more chunk: the kernel counts an area as used before it is.
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
        let extents = |size| extents(&lv, size, DEFAULT_CHUNK).unwrap();
        assert_eq!(extents(Size::Percent(20)), 2048);
        assert_eq!(extents(Size::Bytes(10 * GIB)), 2560);
        assert_eq!(extents(Size::Bytes(10 * GIB + 1)), 2561);
        assert_eq!(extents(Size::Bytes(1)), 1);
    }

    #[test]
    fn test_size_is_capped_at_a_full_copy() {
        let lv = origin(40 * GIB, 4 * MIB);
        let full = extents(&lv, Size::Percent(100), DEFAULT_CHUNK).unwrap();
        assert_eq!(full, 10240);
        let more = extents(&lv, Size::Bytes(400 * GIB), DEFAULT_CHUNK).unwrap();
        // 655,360 chunks, 160 areas of 4,096 entries, a header and one to spare: 10.125 MiB.
        assert_eq!(more, 10240 + 3);
    }

    #[test]
    fn test_odd_sizes_and_chunks_are_refused() {
        let lv = origin(GIB, 4 * MIB);
        assert!(extents(&lv, Size::Percent(0), DEFAULT_CHUNK).is_err());
        assert!(extents(&lv, Size::Bytes(0), DEFAULT_CHUNK).is_err());
        assert_eq!(chunk(None).unwrap(), 65536);
        assert_eq!(chunk(Some(4096)).unwrap(), 4096);
        for odd in [0, 1, 512, 5000, 1 << 20] {
            assert!(chunk(Some(odd)).is_err());
        }
    }
}
