//! One volume group: its volumes, and those left out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::Serialize;

use super::label::PvHeader;
use super::names::dashed;
use super::pv::FoundPv;
use super::resolve::Resolver;
use super::snapshots::Snapshots;
use super::vg::{Lv, LvSegment, SegmentKind, Vg};
use crate::disk::layout::Extent;
use crate::disk::read::ReadAt;
use crate::disk::thin::Budget;
use crate::disk::volume::{Skipped, SkippedKind, Volume, VolumeKind};

/// A volume group of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GroupReport {
    /// Name.
    pub name: String,
    /// UUID with dashes, as `vgs` prints it.
    pub uuid: String,
    /// Sequence number of the metadata used.
    pub seqno: u64,
    /// Disks and partitions that are its PVs.
    pub physical_volumes: Vec<String>,
    /// Their places, in this order.
    #[serde(skip)]
    pub places: Vec<PvPlace>,
    /// The metadata text used.
    #[serde(skip)]
    pub text: Vec<u8>,
    /// Volumes that are not mere runs of extents or stripes of them, with their segments' type.
    #[serde(skip)]
    pub complex: Vec<String>,
}

/// A physical volume on the guest's disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PvPlace {
    /// The disk or partition.
    pub place: Extent,
    /// Its header.
    pub header: PvHeader,
}

/// LVM content of a guest.
#[derive(Debug, Default)]
pub(in crate::disk) struct Assembled {
    pub(in crate::disk) groups: Vec<GroupReport>,
    pub(in crate::disk) volumes: Vec<Volume>,
    pub(in crate::disk) skipped: Vec<Skipped>,
    pub(in crate::disk) notes: Vec<String>,
    pub(super) budget: Arc<Budget>,
}

impl PvPlace {
    fn of(pv: &FoundPv) -> PvPlace {
        PvPlace {
            place: pv.place,
            header: pv.header.clone(),
        }
    }
}

/// Volumes of other types than linear and striped.
fn complex(vg: &Vg) -> Vec<String> {
    let kind = |kind: &SegmentKind| match kind {
        SegmentKind::Striped { areas, .. } => areas
            .iter()
            .any(|area| !vg.pvs.contains_key(&area.name))
            .then_some("raid0"),
        SegmentKind::Mirror(_) => Some("mirror"),
        SegmentKind::Raid1(_) => Some("raid1"),
        SegmentKind::ThinPool { .. } => Some("thin pool"),
        SegmentKind::Thin { .. } => Some("thin"),
        SegmentKind::Snapshot { .. } => Some("snapshot"),
        SegmentKind::Other(_) => Some("another type"),
    };
    let of = |(name, lv): (&String, &super::vg::Lv)| {
        let kind = lv.segments.iter().find_map(|s| kind(&s.kind))?;
        Some(format!("{name} ({kind})"))
    };
    vg.lvs.iter().filter_map(of).collect()
}

/// Adds the volumes of one group, named `shown/lv`. Takes and returns the work spent on the guest
/// so far.
pub(super) fn group(
    disks: &[&dyn ReadAt],
    (vg, text): (&Vg, &[u8]),
    shown: &str,
    pvs: &[&FoundPv],
    work: usize,
    out: &mut Assembled,
) -> usize {
    let places = places(shown, pvs, &mut out.notes);
    out.groups.push(GroupReport {
        name: shown.to_owned(),
        uuid: dashed(&vg.uuid),
        seqno: vg.seqno,
        physical_volumes: pvs.iter().map(|pv| pv.name.clone()).collect(),
        places: pvs.iter().map(|pv| PvPlace::of(pv)).collect(),
        text: text.to_vec(),
        complex: complex(vg),
    });
    let snapshots = Snapshots::of(vg);
    let mut resolver = Resolver {
        vg,
        disks,
        places,
        notes: Vec::new(),
        pools: BTreeMap::new(),
        budget: Arc::clone(&out.budget),
        work,
        limit: 0,
    };
    for (name, lv) in &vg.lvs {
        // LVM2 hides the COW volumes and shows an invented volume instead.
        if !lv.visible && !snapshots.cows.contains_key(name.as_str()) {
            continue;
        }
        if lv.segments.iter().all(|s| is_store(&s.kind)) {
            continue;
        }
        let layout = match snapshots.reason(name) {
            Some(reason) => Err(reason),
            None => resolver.layout(name, lv),
        };
        for note in resolver.notes.drain(..) {
            out.notes.push(format!("{shown}/{name}: {note}"));
        }
        let uuids = lv.uuid.as_ref().map(|id| format!("{}{id}", vg.uuid));
        match layout {
            Ok(layout) => out.volumes.push(Volume {
                name: format!("{shown}/{name}"),
                kind: VolumeKind::Lv {
                    vg: vg.name.clone(),
                    lv: name.clone(),
                    snapshot_of: lv.thin_origin.clone(),
                    uuids: uuids.clone(),
                },
                layout,
                read_only: read_only(vg, &snapshots, name, lv),
            }),
            Err(reason) => out.skipped.push(Skipped {
                name: format!("{shown}/{name}"),
                kind: SkippedKind::LogicalVolume,
                reason,
                disk: None,
                volume: Some(VolumeKind::Lv {
                    vg: vg.name.clone(),
                    lv: name.clone(),
                    snapshot_of: lv.thin_origin.clone(),
                    uuids: uuids.clone(),
                }),
            }),
        }
    }
    // A snapshot whose origin is readable is no loss.
    for skipped in &mut out.skipped {
        let name = skipped.name.strip_prefix(&format!("{shown}/"));
        let origin = name.and_then(|name| snapshots.cows.get(name));
        let origin = origin.map(|origin| format!("{shown}/{origin}"));
        if origin.is_some_and(|origin| out.volumes.iter().any(|v| v.name == origin)) {
            skipped.kind = SkippedKind::Snapshot;
        }
    }
    resolver.work
}

/// Locations of the physical volumes, by UUID. Leaves out duplicates.
fn places(shown: &str, pvs: &[&FoundPv], notes: &mut Vec<String>) -> BTreeMap<String, Extent> {
    let mut places = BTreeMap::new();
    let mut twice = BTreeSet::new();
    for pv in pvs {
        if places.insert(pv.header.uuid.clone(), pv.place).is_some() {
            twice.insert(pv.header.uuid.clone());
        }
    }
    for uuid in twice {
        notes.push(format!(
            "{shown}: physical volume {} is there twice, none of them is used",
            dashed(&uuid)
        ));
        places.remove(&uuid);
    }
    places
}

/// Why a volume must not be written to behind the back of the guest's LVM.
fn read_only(vg: &Vg, snapshots: &Snapshots<'_>, name: &str, lv: &Lv) -> Option<&'static str> {
    let mut all = vg.lvs.values().flat_map(|lv| &lv.segments);
    let is_base = |segment: &LvSegment| matches!(&segment.kind, SegmentKind::Thin { external_origin: Some(of), .. } if of == name);
    if snapshots.cows.values().any(|origin| *origin == name) || all.any(is_base) {
        return Some("it has snapshots inside the guest");
    }
    let why = |segment: &LvSegment| match &segment.kind {
        SegmentKind::Striped { areas, .. } => areas
            .iter()
            .any(|area| !vg.pvs.contains_key(&area.name))
            .then_some("it lies on other volumes of the guest"),
        SegmentKind::Mirror(_) | SegmentKind::Raid1(_) => Some("it is mirrored inside the guest"),
        SegmentKind::Thin { .. } => Some("it is in a thin pool of the guest"),
        SegmentKind::ThinPool { .. } | SegmentKind::Snapshot { .. } | SegmentKind::Other(_) => {
            Some("it is of another kind than linear and striped")
        }
    };
    lv.segments.iter().find_map(why)
}

/// Whether this type only stores data of other volumes, so that leaving it out loses nothing.
fn is_store(kind: &SegmentKind) -> bool {
    match kind {
        SegmentKind::ThinPool { .. } | SegmentKind::Snapshot { .. } => true,
        SegmentKind::Other(kind) => matches!(kind.as_str(), "cache-pool" | "vdo-pool"),
        _ => false,
    }
}
