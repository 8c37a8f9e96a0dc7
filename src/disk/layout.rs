//! Maps a volume to disk extents, and reads it without a device.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::read::ReadAt;
use super::thin::{Budget, Wanted};

/// A contiguous run of bytes on one guest disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Extent {
    /// Index into the guest's disks.
    pub disk: usize,
    /// Offset of the first byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A segment of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Segment {
    /// A single run.
    Linear(Extent),
    /// Round robin over several runs of equal length, a multiple of `stripe_size`.
    Striped {
        /// Bytes in one stripe chunk.
        stripe_size: u64,
        /// The runs in order.
        stripes: Vec<Extent>,
    },
}

impl Segment {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Segment::Linear(extent) => extent.len,
            Segment::Striped { stripes, .. } => {
                stripes.iter().fold(0, |sum, e| sum.saturating_add(e.len))
            }
        }
    }

    /// Whether the segment is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The runs that hold the segment.
    pub fn extents(&self) -> &[Extent] {
        match self {
            Segment::Linear(extent) => std::slice::from_ref(extent),
            Segment::Striped { stripes, .. } => stripes,
        }
    }
}

/// Total length of the segments in bytes.
pub(super) fn total(segments: &[Segment]) -> u64 {
    segments
        .iter()
        .fold(0, |sum, s| sum.saturating_add(s.len()))
}

/// A thin pool of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ThinPool {
    /// `vg/lv` in the guest.
    pub name: String,
    /// Extents of the pool's metadata.
    pub metadata: Vec<Segment>,
    /// Extents of the pool's data.
    pub data: Vec<Segment>,
    /// Transaction id that the pool's metadata must carry.
    pub transaction_id: u64,
    /// Bytes per block.
    pub chunk_size: u64,
}

/// Location of a volume's bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// Segments, in order.
    Segments(Vec<Segment>),
    /// A thin volume; [`thin`](super::thin) resolves it at mapping time.
    Thin {
        /// The volume's pool.
        #[serde(serialize_with = "pool_name")]
        pool: Arc<ThinPool>,
        /// The volume's device id in the pool.
        device_id: u32,
        /// Size in bytes.
        size: u64,
        /// External origin: supplies blocks never written, up to its own end.
        #[serde(skip)]
        external_origin: Option<Arc<Layout>>,
        /// Limits shared by the guest's volumes.
        #[serde(skip)]
        budget: Arc<Budget>,
    },
}

fn pool_name<S: Serializer>(pool: &Arc<ThinPool>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&pool.name)
}

impl ThinPool {
    /// Parameters for resolving a thin volume of this pool.
    pub(super) fn wanted(&self, device_id: u32, size: u64) -> Wanted {
        Wanted {
            device_id,
            size,
            transaction_id: self.transaction_id,
            chunk_size: self.chunk_size,
            data_size: total(&self.data),
        }
    }
}

impl Layout {
    /// Disk index and offset of the volume's first byte. For a thin volume, those of its pool.
    pub fn first(&self) -> Option<(usize, u64)> {
        let segments = match self {
            Layout::Segments(segments) => segments,
            Layout::Thin { pool, .. } => &pool.data,
        };
        let extents = segments.iter().flat_map(Segment::extents);
        extents.map(|extent| (extent.disk, extent.start)).min()
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Layout::Segments(segments) => total(segments),
            Layout::Thin { size, .. } => *size,
        }
    }

    /// Indexes of the disks that hold the volume.
    pub fn disks(&self) -> BTreeSet<usize> {
        let segments: Vec<&Segment> = match self {
            Layout::Segments(segments) => segments.iter().collect(),
            Layout::Thin { pool, .. } => pool.metadata.iter().chain(&pool.data).collect(),
        };
        let extents = segments.into_iter().flat_map(Segment::extents);
        extents.map(|extent| extent.disk).collect()
    }

    /// The run that covers the whole volume, if there is one.
    pub fn contiguous(&self) -> Option<Extent> {
        match self {
            Layout::Segments(segments) => match &segments[..] {
                [Segment::Linear(extent)] => Some(*extent),
                _ => None,
            },
            Layout::Thin { .. } => None,
        }
    }
}

/// Reads a volume from the guest's disks.
pub struct VolumeReader<'a> {
    disks: &'a [&'a dyn ReadAt],
    segments: &'a [Segment],
    /// End offset of each segment in the volume.
    ends: Vec<u64>,
}

impl std::fmt::Debug for VolumeReader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VolumeReader")
            .field("segments", &self.segments)
            .finish_non_exhaustive()
    }
}

impl<'a> VolumeReader<'a> {
    /// Creates a reader of `layout` over the disks it was made from; `None` for a thin volume.
    pub fn new(disks: &'a [&'a dyn ReadAt], layout: &'a Layout) -> Option<Self> {
        let Layout::Segments(segments) = layout else {
            return None;
        };
        Some(Self::over(disks, segments))
    }

    pub(super) fn over(disks: &'a [&'a dyn ReadAt], segments: &'a [Segment]) -> Self {
        let ends = segments
            .iter()
            .scan(0u64, |end, segment| {
                *end = end.saturating_add(segment.len());
                Some(*end)
            })
            .collect();
        VolumeReader {
            disks,
            segments,
            ends,
        }
    }

    /// Disk, offset, and remaining length of the run at a volume offset.
    fn locate(&self, offset: u64) -> Option<(usize, u64, u64)> {
        let index = self.ends.partition_point(|end| *end <= offset);
        let segment = self.segments.get(index)?;
        let inner = offset - (self.ends.get(index)? - segment.len());
        match segment {
            Segment::Linear(e) => Some((e.disk, e.start.checked_add(inner)?, e.len - inner)),
            Segment::Striped {
                stripe_size,
                stripes,
            } => {
                let count = u64::try_from(stripes.len()).ok()?;
                let (chunk, within) = (inner.checked_div(*stripe_size)?, inner % stripe_size);
                let stripe = stripes.get(usize::try_from(chunk % count).ok()?)?;
                let at = (chunk / count)
                    .checked_mul(*stripe_size)?
                    .checked_add(within)?;
                Some((
                    stripe.disk,
                    stripe.start.checked_add(at)?,
                    stripe_size - within,
                ))
            }
        }
    }
}

impl ReadAt for VolumeReader<'_> {
    fn size(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let eof = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let (mut rest, mut offset) = (buf, offset);
        while !rest.is_empty() {
            let (disk, at, len) = self.locate(offset).ok_or_else(eof)?;
            let len = usize::try_from(len).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            self.disks
                .get(disk)
                .ok_or_else(eof)?
                .read_exact_at(now, at)?;
            rest = later;
            offset = offset
                .checked_add(u64::try_from(len).map_err(io::Error::other)?)
                .ok_or_else(eof)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(disk: usize, start: u64, len: u64) -> Extent {
        Extent { disk, start, len }
    }

    #[test]
    fn test_reader_crosses_segments_and_stripes() {
        let first = b"abcdefghij".to_vec();
        let second = b"ABCDEFGHIJ".to_vec();
        let disks: [&dyn ReadAt; 2] = [&first, &second];
        let layout = Layout::Segments(vec![
            Segment::Linear(extent(0, 8, 2)),
            Segment::Striped {
                stripe_size: 2,
                stripes: vec![extent(0, 0, 4), extent(1, 4, 4)],
            },
            Segment::Linear(extent(1, 0, 3)),
        ]);
        assert_eq!(layout.disks(), BTreeSet::from([0, 1]));
        let reader = VolumeReader::new(&disks, &layout).unwrap();
        assert_eq!(reader.size(), 13);
        assert_eq!(layout.size(), 13);
        let mut all = vec![0; 13];
        reader.read_exact_at(&mut all, 0).unwrap();
        assert_eq!(all, b"ijabEFcdGHABC");
        for start in 0..13 {
            for len in 0..=13 - start {
                let mut buf = vec![0; len];
                reader.read_exact_at(&mut buf, start as u64).unwrap();
                assert_eq!(buf, all[start..start + len]);
            }
        }
        assert!(reader.read_exact_at(&mut [0; 2], 12).is_err());
        assert!(reader.read_exact_at(&mut [0; 1], u64::MAX).is_err());
    }
}
