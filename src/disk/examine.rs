//! From the disks of one guest to its volumes.

use std::io;

use serde::Serialize;

use super::layout::{Extent, Layout, Segment};
use super::lvm2::{self, GroupReport};
use super::read::ReadAt;
use super::table::{self, Table, TableKind};
use crate::{Code, Error, Result};

/// Volumes of one guest. Each is mapped and mounted, which costs a device, some descriptors and a
/// write to the journal, and is saved: tables may name the same bytes many times over.
pub const MAX_VOLUMES: usize = 128;

/// Notes of one guest: they go into the job log.
const MAX_NOTES: usize = 256;

/// What the disks of a guest hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Examined {
    /// One for each disk, in order.
    pub disks: Vec<DiskReport>,
    /// Volume groups of the guest.
    pub groups: Vec<GroupReport>,
    /// Everything that may hold a filesystem. Parts of volume groups are not in it.
    pub volumes: Vec<Volume>,
    /// What cannot be reached, and why.
    pub skipped: Vec<Skipped>,
    /// What was odd.
    pub notes: Vec<String>,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskReport {
    /// `disk`, `disk2`, …
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Its partition table.
    pub table: Table,
}

/// Something that may hold a filesystem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Volume {
    /// `disk`, `p1`, `VolGroup00/root`; on further disks `disk2`, `disk2p1`. Unique in the guest;
    /// of letters, digits and `_-+.`, with one `/` for logical volumes.
    pub name: String,
    /// What it is; holds what a guest's fstab may call it.
    pub kind: VolumeKind,
    /// Where its bytes are.
    pub layout: Layout,
}

impl Volume {
    /// Bytes.
    pub fn size(&self) -> u64 {
        self.layout.size()
    }
}

/// What a volume is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum VolumeKind {
    /// A disk without partition table.
    Whole {
        /// Index of the disk.
        disk: usize,
    },
    /// A partition.
    Partition {
        /// Index of the disk.
        disk: usize,
        /// As Linux counts it.
        number: u32,
        /// `0x83`, or a GPT type GUID in lower case.
        #[serde(rename = "type")]
        kind: String,
        /// `PARTUUID=`, lower case.
        partuuid: Option<String>,
        /// `PARTLABEL=`; chosen by the guest.
        partlabel: Option<String>,
    },
    /// A logical volume of the guest.
    Lv {
        /// Volume group.
        vg: String,
        /// Logical volume.
        lv: String,
        /// The volume it is a thin snapshot of.
        snapshot_of: Option<String>,
    },
}

/// What kind of thing cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum SkippedKind {
    /// A disk with a damaged or empty partition table.
    Disk,
    /// A physical volume without its group.
    PhysicalVolume,
    /// A logical volume.
    LogicalVolume,
    /// All volumes beyond [`MAX_VOLUMES`], together.
    TooMany,
}

/// Something that cannot be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// Named as a volume would be.
    pub name: String,
    /// Why.
    pub reason: String,
    /// What it is.
    pub kind: SkippedKind,
}

/// Reads the partition tables and volume groups of one guest's disks, in the guest's order.
pub fn examine(disks: &[&dyn ReadAt]) -> Result<Examined> {
    let mut out = Examined {
        disks: Vec::new(),
        groups: Vec::new(),
        volumes: Vec::new(),
        skipped: Vec::new(),
        notes: Vec::new(),
    };
    let mut pvs = Vec::new();
    for (index, disk) in disks.iter().enumerate() {
        let name = disk_name(index);
        let fail = |error: io::Error| Error::new(Code::DiskUnreadable, name.clone()).because(error);
        let table = table::read(*disk).map_err(fail)?;
        out.notes
            .extend(table.notes.iter().map(|note| format!("{name}: {note}")));
        if table.kind != TableKind::None && table.partitions.is_empty() {
            out.skipped.push(Skipped {
                name: name.clone(),
                reason: match table.notes.first() {
                    Some(note) => format!("no partition can be used: {note}"),
                    None => "the partition table is empty".into(),
                },
                kind: SkippedKind::Disk,
            });
        }
        for volume in on_disk(index, disk.size(), &table) {
            let Some(place) = volume.layout.contiguous() else {
                continue;
            };
            match lvm2::find_pv(disks, &volume.name, place).map_err(fail)? {
                Some(pv) => pvs.push(pv),
                None => out.volumes.push(volume),
            }
        }
        out.disks.push(DiskReport {
            name,
            size: disk.size(),
            table,
        });
    }
    let lvm = lvm2::assemble(disks, &pvs).map_err(|error| {
        Error::new(Code::DiskUnreadable, "LVM metadata of the guest").because(error)
    })?;
    out.groups = lvm.groups;
    out.volumes.extend(lvm.volumes);
    out.skipped.extend(lvm.skipped);
    out.notes.extend(lvm.notes);
    bound(&mut out);
    Ok(out)
}

/// Leaves no more than a job can open, and can tell of.
fn bound(out: &mut Examined) {
    let volumes = out.volumes.drain(MAX_VOLUMES.min(out.volumes.len())..);
    let skipped = out.skipped.drain(MAX_VOLUMES.min(out.skipped.len())..);
    let mut names = volumes.map(|v| v.name).chain(skipped.map(|s| s.name));
    if let Some(name) = names.next() {
        let more = names.count();
        out.skipped.push(Skipped {
            name,
            reason: format!("left out, and {more} more: a guest has {MAX_VOLUMES} volumes at most"),
            kind: SkippedKind::TooMany,
        });
    }
    if let Some(more) = out.notes.len().checked_sub(MAX_NOTES).filter(|n| *n > 0) {
        out.notes.truncate(MAX_NOTES);
        out.notes.push(format!("{more} more notes are left out"));
    }
}

/// `disk`, `disk2`, …
fn disk_name(index: usize) -> String {
    if index == 0 {
        "disk".into()
    } else {
        format!("disk{}", index + 1)
    }
}

/// The partitions of a disk, or the disk itself.
fn on_disk(disk: usize, size: u64, table: &Table) -> Vec<Volume> {
    let linear = |start, len| Layout::Segments(vec![Segment::Linear(Extent { disk, start, len })]);
    if table.kind == TableKind::None {
        return vec![Volume {
            name: disk_name(disk),
            kind: VolumeKind::Whole { disk },
            layout: linear(0, size),
        }];
    }
    let partition = |p: &table::Partition| Volume {
        name: if disk == 0 {
            format!("p{}", p.number)
        } else {
            format!("{}p{}", disk_name(disk), p.number)
        },
        kind: VolumeKind::Partition {
            disk,
            number: p.number,
            kind: p.kind.clone(),
            partuuid: p.partuuid.clone(),
            partlabel: p.partlabel.clone(),
        },
        layout: linear(p.start, p.len),
    };
    table.partitions.iter().map(partition).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_no_more_volumes_than_a_job_can_open() {
        let found = |count: usize| {
            let disks = vec![vec![0u8; 4096]; count];
            let disks: Vec<&dyn ReadAt> = disks.iter().map(|d| d as &dyn ReadAt).collect();
            examine(&disks).unwrap()
        };
        let fits = found(MAX_VOLUMES);
        assert_eq!((fits.volumes.len(), fits.skipped.len()), (MAX_VOLUMES, 0));
        let more = found(MAX_VOLUMES + 3);
        assert_eq!((more.volumes.len(), more.skipped.len()), (MAX_VOLUMES, 1));
        let skipped = &more.skipped[0];
        assert_eq!(skipped.kind, SkippedKind::TooMany);
        assert_eq!(skipped.name, "disk129");
        assert_eq!(
            skipped.reason,
            "left out, and 2 more: a guest has 128 volumes at most"
        );
    }
}
