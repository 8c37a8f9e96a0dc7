//! Finds the volumes on the disks of one guest.

use std::io;

use serde::Serialize;

use super::layout::{Extent, Layout, Segment};
use super::lvm2::{self, GroupReport};
use super::read::ReadAt;
use super::table::{self, Table, TableKind};
use super::volume::{MAX_VOLUMES, Skipped, SkippedKind, Volume, VolumeKind};
use crate::{Code, Error, Result};

/// Maximum damages reported for one table.
const MAX_SHOWN: usize = 8;
/// Maximum notes for one guest; they go into the job log.
const MAX_NOTES: usize = 256;

/// Contents of a guest's disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Examined {
    /// One report for each disk, in order.
    pub disks: Vec<DiskReport>,
    /// The guest's volume groups.
    pub groups: Vec<GroupReport>,
    /// Volumes that may hold a filesystem. Excludes physical volumes of groups.
    pub volumes: Vec<Volume>,
    /// Volumes that cannot be reached, with reasons.
    pub skipped: Vec<Skipped>,
    /// Anomalies that lose no data.
    pub notes: Vec<String>,
}

/// Report for one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskReport {
    /// `disk`, `disk2`, …
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// Partition table.
    pub table: Table,
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
    let mut pvs: Vec<lvm2::FoundPv> = Vec::new();
    for (index, disk) in disks.iter().enumerate() {
        let name = disk_name(index);
        let fail = |error: io::Error| Error::new(Code::DiskUnreadable, name.clone()).because(error);
        let table = table::read(*disk).map_err(fail)?;
        out.notes
            .extend(table.notes.iter().map(|note| format!("{name}: {note}")));
        let found = if !table.damage.is_empty() {
            Some((SkippedKind::DamagedTable, damage_text(&table)))
        } else if table.kind != TableKind::None && table.partitions.is_empty() {
            let reason = "the partition table is empty".to_owned();
            Some((SkippedKind::EmptyDisk, reason))
        } else {
            None
        };
        out.skipped.extend(found.map(|(kind, reason)| Skipped {
            name: name.clone(),
            reason,
            kind,
            disk: Some(index),
            volume: None,
        }));
        for volume in on_disk(index, disk.size(), &table) {
            let Some(place) = volume.layout.contiguous() else {
                continue;
            };
            match lvm2::find_pv(disks, &volume.name, place).map_err(fail)? {
                // Entries for the same extent (noted with the table) have the same content: read it
                // once.
                Some(pv) if pvs.iter().any(|p| p.place == pv.place) => {}
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

fn damage_text(table: &Table) -> String {
    let shown = table.damage.iter().take(MAX_SHOWN);
    let mut text = shown
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    if let Some(more @ 1..) = table.damage.len().checked_sub(MAX_SHOWN) {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

/// Enforces the limits on volumes and notes.
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
            disk: None,
            volume: None,
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

/// The partitions of a disk, or the whole disk.
fn on_disk(disk: usize, size: u64, table: &Table) -> Vec<Volume> {
    let linear = |start, len| Layout::Segments(vec![Segment::Linear(Extent { disk, start, len })]);
    if table.kind == TableKind::None {
        return vec![Volume {
            name: disk_name(disk),
            kind: VolumeKind::Whole { disk },
            layout: linear(0, size),
            read_only: None,
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
        read_only: None,
    };
    table.partitions.iter().map(partition).collect()
}

#[cfg(test)]
mod tests {
    use super::super::table::{gpt, mbr};
    use super::*;

    fn skipped(disks: &[Vec<u8>]) -> Vec<(String, SkippedKind, String)> {
        let disks: Vec<&dyn ReadAt> = disks.iter().map(|d| d as &dyn ReadAt).collect();
        let found = examine(&disks).unwrap();
        assert!(found.notes.is_empty(), "{:?}", found.notes);
        let all = found.skipped.into_iter();
        all.map(|s| (s.name, s.kind, s.reason)).collect()
    }

    #[test]
    fn test_damaged_tables_are_a_loss_and_empty_ones_are_not() {
        let good = mbr::tests::sample();
        assert_eq!(skipped(&[good.clone(), gpt::tests::sample(512)]), []);
        // One partition starts beyond the end, another disk's logical chain is broken; everything
        // else is found.
        let mut damaged = good.clone();
        mbr::tests::put(&mut damaged, 0, 2, 0x83, 1000, 100);
        damaged[300 * 512 + 510] = 0;
        let reason = "no extended boot record at sector 300, p3 starts beyond the end of the disk"
            .to_owned();
        let loss = ("disk2".to_owned(), SkippedKind::DamagedTable, reason);
        assert_eq!(skipped(&[good.clone(), damaged]), [loss]);
        assert_eq!(
            SkippedKind::DamagedTable.loss(),
            Some(Code::BadPartitionTable)
        );
        let mut damaged = gpt::tests::sample(512);
        let last = damaged.len() - 512;
        damaged[512 + 30] ^= 1;
        damaged[last + 30] ^= 1;
        let found = skipped(&[good.clone(), damaged]);
        assert_eq!(found[0].1, SkippedKind::DamagedTable);
        // A table without partitions.
        let mut empty = gpt::tests::sample(512);
        gpt::tests::clear(&mut empty, 512);
        let reason = "the partition table is empty".to_owned();
        let none = ("disk2".to_owned(), SkippedKind::EmptyDisk, reason);
        assert_eq!(skipped(&[good, empty]), [none]);
        assert_eq!(SkippedKind::EmptyDisk.loss(), None);
    }

    #[test]
    fn test_damage_that_is_listed_has_an_end() {
        let mut table = table::read(&gpt::tests::sample(512)).unwrap();
        table.damage = (1..=200).map(table::Damage::Beyond).collect();
        let text = damage_text(&table);
        assert!(text.ends_with(" and 192 more"), "{text}");
    }

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
