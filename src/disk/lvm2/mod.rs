//! The guest's own LVM2, read from the bytes of its disks.
//!
//! Only the disks of one guest are ever looked at together, so names and UUIDs that other guests or
//! the host use as well do not matter. Nothing is written.
//!
//! * [`label`]: physical volumes and their metadata areas
//! * [`text`]: the text format of the metadata
//! * [`vg`]: a volume group as the text describes it
//! * [`raid`]: which image of a raid1 volume may be read

pub mod label;
pub mod raid;
mod resolve;
pub mod text;
pub mod vg;

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use serde::Serialize;

use super::examine::{Skipped, SkippedKind, Volume, VolumeKind};
use super::layout::Extent;
use super::read::{Part, ReadAt, read_up_to};
use label::PvHeader;
use resolve::Resolver;
use vg::{SegmentKind, Vg};

/// Metadata text that is parsed for one guest, in all.
const MAX_TEXT_TOTAL: u64 = 256 * 1024 * 1024;
/// Groups of one guest.
const MAX_GROUPS: usize = 256;

/// A PV found on a disk or partition.
#[derive(Debug)]
pub(super) struct FoundPv {
    /// The disk or partition (`p2`).
    pub(super) name: String,
    pub(super) place: Extent,
    pub(super) header: PvHeader,
}

/// A volume group of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GroupReport {
    /// Name.
    pub name: String,
    /// UUID with dashes, as `vgs` prints it.
    pub uuid: String,
    /// Version of the metadata that was used.
    pub seqno: u64,
    /// Disks and partitions that hold it.
    pub physical_volumes: Vec<String>,
}

/// What LVM holds in a guest.
#[derive(Debug, Default)]
pub(super) struct Assembled {
    pub(super) groups: Vec<GroupReport>,
    pub(super) volumes: Vec<Volume>,
    pub(super) skipped: Vec<Skipped>,
    pub(super) notes: Vec<String>,
}

/// A UUID of 32 letters and digits without its dashes.
fn uuid(text: &str) -> Option<String> {
    let plain: String = text.chars().filter(|c| *c != '-').collect();
    let fine = plain.len() == 32
        && plain
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"!#".contains(&b));
    fine.then_some(plain)
}

/// A UUID as the LVM tools print it.
fn dashed(uuid: &str) -> String {
    let mut text = String::with_capacity(38);
    for (index, c) in uuid.chars().enumerate() {
        if matches!(index, 6 | 10 | 14 | 18 | 22 | 26) {
            text.push('-');
        }
        text.push(c);
    }
    text
}

/// Looks for a physical volume on a part of a disk.
pub(super) fn find_pv(
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

/// Whether Linux software raid owns the part. Its mirrors may have their superblock at the end, so
/// that the content, a PV say, seems to lie right here.
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

/// Groups the PVs and resolves their volumes. Fails only if a disk cannot be read.
pub(super) fn assemble(disks: &[&dyn ReadAt], pvs: &[FoundPv]) -> io::Result<Assembled> {
    let mut out = Assembled::default();
    let texts = read_texts(disks, pvs, &mut out)?;
    let mut groups: BTreeMap<&str, &Vg> = BTreeMap::new();
    for vg in texts.values() {
        let newest = groups.entry(&vg.uuid).or_insert(vg);
        if newest.seqno != vg.seqno {
            let (low, high) = (newest.seqno.min(vg.seqno), newest.seqno.max(vg.seqno));
            out.notes
                .push(format!("{}: metadata {low} is outdated by {high}", vg.name));
        }
        if vg.seqno > newest.seqno {
            *newest = vg;
        }
    }
    let used: BTreeSet<&str> = groups
        .values()
        .flat_map(|vg| vg.pvs.values())
        .map(|pv| pv.uuid.as_str())
        .collect();
    for pv in pvs
        .iter()
        .filter(|pv| !used.contains(pv.header.uuid.as_str()))
    {
        out.skipped.push(Skipped {
            name: pv.name.clone(),
            kind: SkippedKind::PhysicalVolume,
            reason: "an LVM physical volume that belongs to no readable volume group".into(),
        });
    }
    let mut names = BTreeSet::new();
    for (uuid, vg) in groups.into_iter().take(MAX_GROUPS) {
        // A PV whose own metadata speak of another group was taken out of this one.
        let mine: Vec<&FoundPv> = pvs
            .iter()
            .filter(|pv| vg.pvs.values().any(|p| p.uuid == pv.header.uuid))
            .filter(|pv| texts.get(&pv.name).is_none_or(|own| own.uuid == uuid))
            .collect();
        let mut shown = vg.name.clone();
        while !names.insert(shown.clone()) {
            out.notes
                .push(format!("two volume groups are named {}", vg.name));
            shown.push('+');
        }
        group(disks, vg, &shown, &mine, &mut out);
    }
    Ok(out)
}

/// The newest metadata text of each PV, parsed, by the PV's name.
fn read_texts(
    disks: &[&dyn ReadAt],
    pvs: &[FoundPv],
    out: &mut Assembled,
) -> io::Result<BTreeMap<String, Vg>> {
    let mut texts: BTreeMap<String, Vg> = BTreeMap::new();
    let mut budget = MAX_TEXT_TOTAL;
    for pv in pvs {
        let Some(disk) = disks.get(pv.place.disk) else {
            continue;
        };
        let part = Part {
            disk: *disk,
            start: pv.place.start,
            len: pv.place.len,
        };
        for (start, len) in &pv.header.metadata_areas {
            let problem = match label::text(&part, *start, *len)? {
                Ok(None) => continue,
                Ok(Some(text)) => {
                    let spent = u64::try_from(text.len()).map_err(io::Error::other)?;
                    let Some(rest) = budget.checked_sub(spent) else {
                        out.notes
                            .push("too much LVM metadata, the rest is not read".into());
                        return Ok(texts);
                    };
                    budget = rest;
                    match parse(&text) {
                        Ok(vg) => {
                            let known = texts.get(&pv.name).is_some_and(|t| t.seqno >= vg.seqno);
                            if !known {
                                texts.insert(pv.name.clone(), vg);
                            }
                            continue;
                        }
                        Err(why) => why,
                    }
                }
                Err(why) => why.to_owned(),
            };
            out.notes.push(format!(
                "{}: LVM metadata area at {start}: {problem}",
                pv.name
            ));
        }
    }
    Ok(texts)
}

/// Parses the text of one volume group. The error says what is wrong, without guest text.
pub fn parse(text: &[u8]) -> Result<Vg, String> {
    vg::from_text(&text::parse(text).map_err(|e| e.to_string())?)
}

/// The volumes of one group, named `shown/lv`.
fn group(disks: &[&dyn ReadAt], vg: &Vg, shown: &str, pvs: &[&FoundPv], out: &mut Assembled) {
    let mut places = BTreeMap::new();
    let mut twice = BTreeSet::new();
    for pv in pvs {
        if places.insert(pv.header.uuid.clone(), pv.place).is_some() {
            twice.insert(pv.header.uuid.clone());
        }
    }
    for uuid in twice {
        out.notes.push(format!(
            "{shown}: physical volume {} is there twice, none of them is used",
            dashed(&uuid)
        ));
        places.remove(&uuid);
    }
    out.groups.push(GroupReport {
        name: shown.to_owned(),
        uuid: dashed(&vg.uuid),
        seqno: vg.seqno,
        physical_volumes: pvs.iter().map(|pv| pv.name.clone()).collect(),
    });
    let snapshots = Snapshots::of(vg);
    let mut resolver = Resolver {
        vg,
        disks,
        places,
        notes: Vec::new(),
        pools: BTreeMap::new(),
    };
    for (name, lv) in &vg.lvs {
        // LVM2 hides the COW volumes and shows an invented one in their place.
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
        match layout {
            Ok(layout) => out.volumes.push(Volume {
                name: format!("{shown}/{name}"),
                kind: VolumeKind::Lv {
                    vg: vg.name.clone(),
                    lv: name.clone(),
                    snapshot_of: lv.thin_origin.clone(),
                },
                layout,
            }),
            Err(reason) => out.skipped.push(Skipped {
                name: format!("{shown}/{name}"),
                kind: SkippedKind::LogicalVolume,
                reason,
            }),
        }
    }
}

/// Volumes that only hold others: nothing of theirs is missed.
fn is_store(kind: &SegmentKind) -> bool {
    match kind {
        SegmentKind::ThinPool { .. } | SegmentKind::Snapshot { .. } => true,
        SegmentKind::Other(kind) => matches!(kind.as_str(), "cache-pool" | "vdo-pool"),
        _ => false,
    }
}

/// Classic snapshots within the guest.
struct Snapshots<'a> {
    /// COW volume to origin.
    cows: BTreeMap<&'a str, &'a str>,
    merging: BTreeSet<&'a str>,
}

impl<'a> Snapshots<'a> {
    fn of(vg: &'a Vg) -> Self {
        let mut all = Snapshots {
            cows: BTreeMap::new(),
            merging: BTreeSet::new(),
        };
        for segment in vg.lvs.values().flat_map(|lv| &lv.segments) {
            if let SegmentKind::Snapshot {
                origin,
                cow,
                merging,
            } = &segment.kind
            {
                all.cows.insert(cow, origin);
                if *merging {
                    all.merging.insert(origin);
                }
            }
        }
        all
    }

    /// Why a volume is left out; none for an origin: its own extents are always current.
    fn reason(&self, name: &str) -> Option<String> {
        if let Some(origin) = self.cows.get(name) {
            let origin = crate::error::escape(origin.as_bytes());
            return Some(format!("a snapshot of {origin} inside the guest"));
        }
        self.merging
            .contains(name)
            .then(|| "a snapshot is being merged into it".into())
    }
}
