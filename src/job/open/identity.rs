//! Identities of a guest's volumes: the names that its fstab may use for them.

use crate::disk::{self, Layout, ReadAt, VolumeKind};
use crate::fs::VolumeIdentity;
use crate::guest::{Absence, Guest};

/// Types of partitions that boot loaders are in: EFI system and BIOS boot.
const BOOT: [&str; 3] = [
    "0xef",
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b",
    "21686148-6449-6e6f-744e-656564454649",
];

/// Bytes of a boot record that are code.
const BOOT_CODE: usize = 440;

/// Facts of the guest's disks, for the identities of its volumes.
pub(in crate::job) struct Disks {
    /// See [`Guest::disk_names`].
    names: Vec<Vec<String>>,
    sources: Vec<String>,
    /// The guest has no more than one.
    only: bool,
    bootable: Vec<bool>,
}

impl Disks {
    pub(in crate::job) fn of(
        guest: &Guest,
        examined: &disk::Examined,
        disks: &[&dyn ReadAt],
    ) -> Disks {
        let has_code = |disk: &dyn ReadAt| {
            let mut code = [0; BOOT_CODE];
            disk.read_exact_at(&mut code, 0).is_ok() && code.iter().any(|byte| *byte != 0)
        };
        let bootable = examined.disks.iter().zip(disks).map(|(report, disk)| {
            let mut partitions = report.table.partitions.iter();
            let legacy = report.table.kind == disk::table::TableKind::Mbr;
            partitions.any(|p| BOOT.contains(&p.kind.as_str())) || legacy && has_code(*disk)
        });
        Disks {
            names: guest.disk_names.clone(),
            sources: guest.disks.iter().map(ToString::to_string).collect(),
            only: guest.disks.len() == 1
                && guest.uncovered.iter().all(|d| d.absence == Absence::NoDisk),
            bootable: bootable.collect(),
        }
    }

    pub(in crate::job) fn volume(&self, volume: &disk::Volume) -> VolumeIdentity {
        self.identity(&volume.name, &volume.kind, Some(&volume.layout))
    }

    /// The identity of a volume, with the names that the guest's fstab may use.
    pub(in crate::job) fn identity(
        &self,
        name: &str,
        kind: &VolumeKind,
        layout: Option<&Layout>,
    ) -> VolumeIdentity {
        let mut identity = VolumeIdentity {
            name: name.replace('/', "-"),
            only_disk: self.only,
            ..VolumeIdentity::default()
        };
        let mut start = layout.and_then(Layout::first).unwrap_or_default();
        let of = match kind {
            VolumeKind::Whole { disk } => {
                start.0 = *disk;
                String::new()
            }
            VolumeKind::Partition {
                disk,
                number,
                partuuid,
                partlabel,
                ..
            } => {
                start.0 = *disk;
                identity.partition = Some(*number);
                identity.partuuid = partuuid.clone();
                identity.partlabel = partlabel.clone().map(String::into_bytes);
                format!(" p{number}")
            }
            VolumeKind::Lv {
                vg,
                lv,
                snapshot_of,
                uuids,
            } => {
                identity.lv = Some((vg.clone(), lv.clone()));
                identity.lv_uuids = uuids.clone();
                identity.snapshot_of = snapshot_of.clone();
                format!(" {vg}/{lv}")
            }
        };
        let disk = start.0;
        if identity.lv.is_none() {
            identity.disk_names = self.names.get(disk).cloned().unwrap_or_default();
        }
        identity.start = start;
        identity.bootable = self.bootable.get(disk).copied().unwrap_or_default();
        let source = self.sources.get(disk).cloned();
        identity.key = source.unwrap_or_default() + &of;
        identity
    }
}
