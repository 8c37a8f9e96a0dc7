//! Resolves logical volumes to extents of the guest's disks.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::vg::{Area, Lv, LvSegment, Pv, SegmentKind, Vg};
use super::{printable, raid};
use crate::disk::layout::{Extent, Layout, Segment, ThinPool, VolumeReader, total};
use crate::disk::read::ReadAt;
use crate::disk::thin::Budget;

/// Maximum nesting of volumes: a thin pool on raid1 images on stripes needs four levels.
const MAX_DEPTH: usize = 8;
/// Maximum segments of one fully resolved volume.
const MAX_SEGMENTS: usize = 65_536;
/// Maximum disk runs visited for one volume, and for all volumes of a guest. The depth limit does
/// not bound the work, because repeated references multiply it at each level. The segment limit
/// does not either, because a segment may have many stripes. Every run of a result was counted
/// here, so this bounds memory too.
const MAX_WORK: usize = 200_000;
const MAX_GUEST_WORK: usize = 2_000_000;
/// Maximum stripes of one segment: LVM2 creates no more.
const MAX_STRIPES: usize = 128;
/// Maximum images of a mirror or raid1 volume: the kernel keeps failed images in 64 bits.
const MAX_IMAGES: usize = 64;

/// Resolves the volumes of one group.
pub(super) struct Resolver<'a> {
    pub(super) vg: &'a Vg,
    pub(super) disks: &'a [&'a dyn ReadAt],
    /// Extents of the group's physical volumes, by UUID.
    pub(super) places: BTreeMap<String, Extent>,
    pub(super) notes: Vec<String>,
    /// Pools by name, shared by their thin volumes.
    pub(super) pools: BTreeMap<String, Arc<ThinPool>>,
    /// Limits shared by the guest's thin volumes.
    pub(super) budget: Arc<Budget>,
    /// Runs visited so far for all volumes of the guest.
    pub(super) work: usize,
    /// Value of `work` at which the current volume fails.
    pub(super) limit: usize,
}

/// Reason why a volume cannot be read; for the log.
type Reason = String;

impl Resolver<'_> {
    /// Resolves a volume to its layout.
    pub(super) fn layout(&mut self, name: &str, lv: &Lv) -> Result<Layout, Reason> {
        self.limit = self.work.saturating_add(MAX_WORK).min(MAX_GUEST_WORK);
        self.layout_at(name, lv, 0)
    }

    fn layout_at(&mut self, name: &str, lv: &Lv, depth: usize) -> Result<Layout, Reason> {
        if let [
            LvSegment {
                extents,
                kind:
                    SegmentKind::Thin {
                        pool,
                        device_id,
                        external_origin,
                    },
                ..
            },
        ] = &lv.segments[..]
        {
            let size = extents
                .checked_mul(self.vg.extent_size)
                .ok_or("too large")?;
            let pool = self.pool(pool)?;
            let origin = external_origin.as_deref();
            let origin = origin.map(|origin| self.external_origin(origin, depth + 1));
            self.budget.add_volume();
            return Ok(Layout::Thin {
                pool,
                device_id: *device_id,
                size,
                external_origin: origin.transpose()?,
                budget: Arc::clone(&self.budget),
            });
        }
        self.segments(name, depth).map(Layout::Segments)
    }

    fn external_origin(&mut self, name: &str, depth: usize) -> Result<Arc<Layout>, Reason> {
        if depth > MAX_DEPTH {
            return Err("external origins of external origins too deep".into());
        }
        self.spend(1)?;
        let lv = self.vg.lvs.get(name);
        let lv = lv.ok_or_else(|| format!("external origin {} is missing", printable(name)))?;
        self.layout_at(name, lv, depth).map(Arc::new)
    }

    fn pool(&mut self, name: &str) -> Result<Arc<ThinPool>, Reason> {
        if let Some(pool) = self.pools.get(name) {
            return Ok(Arc::clone(pool));
        }
        let lv = self
            .vg
            .lvs
            .get(name)
            .ok_or_else(|| format!("thin pool {} is missing", printable(name)))?;
        let [LvSegment { kind, .. }] = &lv.segments[..] else {
            return Err(format!("{name} is not a thin pool"));
        };
        let SegmentKind::ThinPool {
            metadata,
            data,
            transaction_id,
            chunk_size,
        } = kind
        else {
            return Err(format!("{name} is not a thin pool"));
        };
        let pool = Arc::new(ThinPool {
            name: format!("{}/{name}", self.vg.name),
            metadata: self.segments(metadata, 0)?,
            data: self.segments(data, 0)?,
            transaction_id: *transaction_id,
            chunk_size: *chunk_size,
        });
        self.pools.insert(name.to_owned(), Arc::clone(&pool));
        Ok(pool)
    }

    fn spend(&mut self, runs: usize) -> Result<(), Reason> {
        let work = self.work.saturating_add(runs);
        if work > self.limit {
            return Err("the volume group is too entangled".into());
        }
        self.work = work;
        Ok(())
    }

    /// Resolves a whole volume to segments on disks.
    fn segments(&mut self, name: &str, depth: usize) -> Result<Vec<Segment>, Reason> {
        if depth > MAX_DEPTH {
            return Err("volumes within volumes too deep".into());
        }
        let vg = self.vg;
        let lv = vg.lvs.get(name);
        let lv = lv.ok_or_else(|| format!("{} is missing in the metadata", printable(name)))?;
        if lv.segments.is_empty() {
            return Err("no segments".into());
        }
        self.spend(lv.segments.len())?;
        let mut all = Vec::new();
        for segment in &lv.segments {
            let len = segment
                .extents
                .checked_mul(vg.extent_size)
                .ok_or("too large")?;
            for part in self.segment(segment, len, depth)? {
                push_merged(&mut all, part);
            }
            if all.len() > MAX_SEGMENTS {
                return Err(format!("more than {MAX_SEGMENTS} segments"));
            }
        }
        Ok(all)
    }

    fn segment(
        &mut self,
        segment: &LvSegment,
        len: u64,
        depth: usize,
    ) -> Result<Vec<Segment>, Reason> {
        match &segment.kind {
            SegmentKind::Striped { areas, .. } if areas.len() == 1 => {
                self.area(&areas[0], len, depth)
            }
            SegmentKind::Striped { stripe_size, areas } => {
                self.stripes(*stripe_size, areas, len, depth)
            }
            SegmentKind::Mirror(areas) => self.mirror(areas, len, depth),
            SegmentKind::Raid1(images) => self.raid1(images, len, depth),
            SegmentKind::Thin { .. } => Err("thin volume within another volume".into()),
            SegmentKind::ThinPool { .. } => Err("thin pool".into()),
            SegmentKind::Snapshot { .. } => Err("snapshot".into()),
            SegmentKind::Other(kind) => Err(format!("type {kind} is not supported")),
        }
    }

    /// Resolves `len` bytes of a PV or LV, starting at an extent.
    fn area(&mut self, area: &Area, len: u64, depth: usize) -> Result<Vec<Segment>, Reason> {
        let start = area
            .extent
            .checked_mul(self.vg.extent_size)
            .ok_or("too large")?;
        let vg = self.vg;
        match vg.pvs.get(&area.name) {
            Some(pv) => Ok(vec![Segment::Linear(
                self.on_pv(&area.name, pv, start, len)?,
            )]),
            None => {
                let whole = self.segments(&area.name, depth + 1)?;
                self.spend(whole.iter().map(|s| s.extents().len()).sum())?;
                slice(&whole, start, len)
            }
        }
    }

    fn on_pv(&self, name: &str, pv: &Pv, start: u64, len: u64) -> Result<Extent, Reason> {
        let place = self.places.get(&pv.uuid).ok_or_else(|| {
            format!(
                "physical volume {name} ({}) is missing",
                super::dashed(&pv.uuid)
            )
        })?;
        let room = pv.extents.checked_mul(self.vg.extent_size);
        let end = start
            .checked_add(len)
            .filter(|end| room.is_some_and(|room| *end <= room));
        let inside = end
            .and_then(|end| end.checked_add(pv.start))
            .is_some_and(|end| end <= place.len);
        if !inside {
            return Err(format!("extents beyond the end of physical volume {name}"));
        }
        // Neither sum overflows: both are bounded by `place.len`, which lies on the disk.
        Ok(Extent {
            disk: place.disk,
            start: place.start + pv.start + start,
            len,
        })
    }

    fn stripes(
        &mut self,
        stripe_size: u64,
        areas: &[Area],
        len: u64,
        depth: usize,
    ) -> Result<Vec<Segment>, Reason> {
        if areas.len() > MAX_STRIPES {
            return Err(format!("more than {MAX_STRIPES} stripes"));
        }
        self.spend(areas.len())?;
        let count = u64::try_from(areas.len()).map_err(|_| "too many stripes")?;
        let each = len / count;
        if stripe_size == 0 || each * count != len || each % stripe_size != 0 {
            return Err("stripes do not fill the segment".into());
        }
        let mut stripes = Vec::new();
        for area in areas {
            match self.area(area, each, depth)?[..] {
                [Segment::Linear(extent)] => stripes.push(extent),
                _ => return Err("stripes over volumes of several segments".into()),
            }
        }
        Ok(vec![Segment::Striped {
            stripe_size,
            stripes,
        }])
    }

    fn images(&mut self, count: usize) -> Result<(), Reason> {
        if count > MAX_IMAGES {
            return Err(format!("more than {MAX_IMAGES} images"));
        }
        self.spend(count)
    }

    /// Prefers the first image: writes reach it first and resynchronisation copies from it. Takes
    /// another one only if the first cannot be resolved.
    fn mirror(&mut self, areas: &[Area], len: u64, depth: usize) -> Result<Vec<Segment>, Reason> {
        self.images(areas.len())?;
        let mut why = None;
        for (index, area) in areas.iter().enumerate() {
            match self.area(area, len, depth) {
                Ok(segments) => {
                    if index > 0 {
                        self.notes.push(format!(
                            "mirror image {} is read, the first is missing",
                            area.name
                        ));
                    }
                    return Ok(segments);
                }
                Err(reason) => {
                    why.get_or_insert(reason);
                }
            }
        }
        Err(why.unwrap_or_else(|| "mirror without images".into()))
    }

    fn raid1(
        &mut self,
        images: &[(String, String)],
        len: u64,
        depth: usize,
    ) -> Result<Vec<Segment>, Reason> {
        self.images(images.len())?;
        let mut candidates = Vec::new();
        let mut why = None;
        for (position, (metadata, image)) in images.iter().enumerate() {
            let area = Area {
                name: image.clone(),
                extent: 0,
            };
            match self.area(&area, len, depth) {
                Ok(segments) => {
                    let lv = self.vg.lvs.get(image);
                    candidates.push(raid::Candidate {
                        position,
                        rebuilding: lv.is_some_and(|lv| lv.rebuilding),
                        write_mostly: lv.is_some_and(|lv| lv.write_mostly),
                        superblock: self.superblock(metadata, depth),
                        segments,
                    });
                }
                Err(reason) => {
                    why.get_or_insert(reason);
                }
            }
        }
        if candidates.is_empty() {
            return Err(why.unwrap_or_else(|| "raid1 without images".into()));
        }
        let (chosen, note) = raid::choose(candidates, images.len())?;
        self.notes.extend(note);
        Ok(chosen)
    }

    /// Reads the superblock beside an image, if possible.
    fn superblock(&mut self, metadata: &str, depth: usize) -> Option<raid::Superblock> {
        let segments = self.segments(metadata, depth + 1).ok()?;
        let mut head = [0; raid::SUPERBLOCK];
        VolumeReader::over(self.disks, &segments)
            .read_exact_at(&mut head, 0)
            .ok()?;
        raid::superblock(&head)
    }
}

/// Appends a segment, merging it with the last one if contiguous.
fn push_merged(all: &mut Vec<Segment>, next: Segment) {
    if let (Some(Segment::Linear(last)), Segment::Linear(more)) = (all.last_mut(), &next) {
        if last.disk == more.disk && last.start.checked_add(last.len) == Some(more.start) {
            last.len += more.len;
            return;
        }
    }
    all.push(next);
}

/// Returns `len` bytes from `start`.
fn slice(segments: &[Segment], start: u64, len: u64) -> Result<Vec<Segment>, Reason> {
    let end = start.checked_add(len).filter(|end| *end <= total(segments));
    let end = end.ok_or("extents beyond the end of an inner volume")?;
    let mut at = 0;
    let mut out = Vec::new();
    for segment in segments {
        let (from, to) = (start.max(at), end.min(at + segment.len()));
        if from < to {
            push_merged(&mut out, cut(segment, from - at, to - from)?);
        }
        at += segment.len();
    }
    Ok(out)
}

fn cut(segment: &Segment, start: u64, len: u64) -> Result<Segment, Reason> {
    match segment {
        Segment::Linear(e) => Ok(Segment::Linear(Extent {
            disk: e.disk,
            start: e.start + start,
            len,
        })),
        whole if start == 0 && len == whole.len() => Ok(whole.clone()),
        Segment::Striped { .. } => Err("a part of stripes within another volume".into()),
    }
}
