//! A kit from the disks of a guest.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use sha2::{Digest, Sha256};

use super::filesystem::{self, Described, Recipe};
use super::format::{
    Area, Blob, Disk, Entries, Group, Kit, Partition, PhysicalVolume, Place, Subvolume, Volume,
};
use super::load::check;
use crate::disk::table::{Table, TableKind};
use crate::disk::{self, DiskReport, Examined, ReadAt, SkippedKind, VolumeReader};
use crate::error::escape;
use crate::fs::Join;
use crate::sys::btrfs::{self, subvolume_id};

/// Maximum bytes kept of the area in front of the first partition, or of a boot partition.
pub(super) const MAX_AREA: u64 = 8 << 20;
/// Maximum bytes of all areas of a kit, zeros included, and their number.
pub(super) const MAX_SPAN: u64 = 512 << 20;
pub(super) const MAX_AREAS: usize = 4096;
/// Maximum bytes of all files of a kit.
const MAX_TOTAL: usize = 64 << 20;

/// Types of partitions that hold a boot loader and no filesystem: BIOS boot and PReP.
const BOOT_PARTITIONS: [(&str, &str); 3] = [
    (
        "21686148-6449-6e6f-744e-656564454649",
        "BIOS boot partition",
    ),
    ("9e1a2d38-c612-4316-aa26-8b49521e5a8b", "PReP partition"),
    ("0x41", "PReP partition"),
];

/// Contents of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holds {
    /// A filesystem of this type, as libblkid names it, whose files are in the backup.
    Files {
        /// The type.
        fstype: String,
        /// The label that libblkid finds.
        label: Option<Vec<u8>>,
        /// btrfs: facts that only the mounted filesystem gives.
        btrfs: Option<Subvolumes>,
    },
    /// Swap.
    Swap,
    /// Contents that are not made again, by name.
    Other(String),
}

/// Facts of a mounted btrfs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Subvolumes {
    /// Those that are no snapshots.
    pub list: Vec<Subvolume>,
    /// Whether data and metadata are stored twice.
    pub twice: (bool, bool),
    /// Why the list cannot be read.
    pub failed: Option<String>,
}

/// A kit with its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collected {
    /// The description.
    pub kit: Kit,
    /// Names and bytes of the files beside it.
    pub files: Vec<(String, Vec<u8>)>,
    /// Unreadable parts, with reasons; also in [`Kit::missing`].
    pub unread: Vec<String>,
}

/// Describes a guest's disks. `sources`: the volume or image of each. `holds`: contents of the
/// volumes by name; a volume without an entry is not made again.
pub fn collect(
    guest: &str,
    sources: &[String],
    examined: &Examined,
    disks: &[&dyn ReadAt],
    holds: &BTreeMap<String, Holds>,
) -> Collected {
    let mut out = Collector::default();
    let kit_disks = examined.disks.iter().zip(disks).zip(sources);
    let kit_disks = kit_disks
        .map(|((report, disk), source)| out.disk(report, *disk, source, examined))
        .collect();
    let groups = examined
        .groups
        .iter()
        .map(|group| out.group(group))
        .collect();
    let unreached = examined
        .skipped
        .iter()
        .filter(|s| s.kind != SkippedKind::EmptyDisk);
    let unreached = unreached.map(|skipped| format!("{}: {}", skipped.name, skipped.reason));
    out.missing.extend(unreached);
    let volumes = examined.volumes.iter();
    let volumes = volumes
        .filter_map(|volume| out.volume(volume, disks, holds.get(&volume.name)?))
        .collect();
    let Collector {
        files,
        mut missing,
        unread,
        ..
    } = out;
    missing.extend(unread.iter().cloned());
    let mut kit = Kit {
        format: Kit::FORMAT,
        guest: guest.to_owned(),
        disks: kit_disks,
        groups,
        volumes,
        tree: Vec::new(),
        missing,
    };
    // Checks now for reasons that a rebuild would refuse the kit for.
    if let Err(why) = check(&kit) {
        kit.missing
            .push(format!("no disk is made from this kit: {why}"));
    }
    Collected { kit, files, unread }
}

impl Collected {
    /// All files of the kit, the description last: names and bytes.
    pub fn files(&self) -> Vec<(String, Vec<u8>)> {
        let mut text = serde_json::to_vec_pretty(&self.kit).unwrap_or_default();
        text.push(b'\n');
        let description = (super::FILE.to_owned(), text);
        self.files.iter().cloned().chain([description]).collect()
    }

    /// Adds the places of the filesystems.
    pub fn place(&mut self, joins: &[Join]) {
        let name = |join: &Join| {
            let mut volumes = self.kit.volumes.iter();
            let known = volumes.find(|v| v.volume.replace('/', "-") == join.volume);
            known.map_or_else(|| join.volume.clone(), |v| v.volume.clone())
        };
        let place = |join: &Join| {
            let root = join.root.as_ref().filter(|_| join.fstype == "btrfs");
            Place {
                path: escape(&join.path),
                volume: name(join),
                subvolume: root.and_then(|root| open(root).and_then(subvolume_id).ok()),
            }
        };
        self.kit.tree = joins.iter().map(place).collect();
        self.drop_snapshots();
        let unplaced: Vec<String> = self.kit.unplaced().collect();
        self.kit.missing.extend(unplaced);
    }

    /// Leaves out read-only snapshots that have no place in the guest: their files are not saved.
    fn drop_snapshots(&mut self) {
        let Kit {
            volumes,
            tree,
            missing,
            ..
        } = &mut self.kit;
        for volume in volumes {
            let name = &volume.volume;
            let placed = |one: &Subvolume| {
                let mut places = tree.iter().filter(|place| place.volume == *name);
                one.default || places.any(|place| place.subvolume == Some(one.id))
            };
            volume.subvolumes.retain(|one| !one.past || placed(one));
            let read_only = volume.subvolumes.iter().filter(|one| one.read_only);
            missing.extend(read_only.map(|one| format!("{name}: {} is made writable", one.path)));
        }
    }
}

/// Opens a directory for reading that is held by its path.
fn open(directory: impl AsFd) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(directory, c".", flags, Mode::empty())?)
}

/// Facts of a mounted btrfs. `top`: its top; `root`: root of a mount without `subvol=`.
pub fn subvolumes(top: BorrowedFd<'_>, root: BorrowedFd<'_>) -> Subvolumes {
    let facts = || {
        let top = open(top)?;
        let default = subvolume_id(open(root)?)?;
        let list = btrfs::subvolumes(&top)?.into_iter().map(|one| Subvolume {
            id: one.id,
            path: escape(&one.path),
            default: one.id == default,
            read_only: one.kind.read_only,
            past: one.kind.is_past(),
        });
        Ok(Subvolumes {
            list: list.collect(),
            twice: btrfs::stored_twice(&top)?,
            failed: None,
        })
    };
    facts().unwrap_or_else(|error: io::Error| Subvolumes {
        failed: Some(error.to_string()),
        ..Subvolumes::default()
    })
}

#[derive(Default)]
struct Collector {
    files: Vec<(String, Vec<u8>)>,
    total: usize,
    /// Bytes of all areas, zeros included.
    span: u64,
    areas: usize,
    missing: Vec<String>,
    unread: Vec<String>,
}

impl Collector {
    fn disk(
        &mut self,
        report: &DiskReport,
        disk: &dyn ReadAt,
        source: &str,
        examined: &Examined,
    ) -> Disk {
        let (name, table) = (&report.name, &report.table);
        for damage in &table.damage {
            self.missing.push(format!("{name}: {damage}"));
        }
        let mut areas = self.table_areas(name, table, disk);
        let number = examined.disks.iter().position(|d| d.name == *name);
        for group in &examined.groups {
            for (pv, volume) in group.places.iter().zip(&group.physical_volumes) {
                if Some(pv.place.disk) != number {
                    continue;
                }
                let front = (0, pv.header.data_start.min(pv.place.len));
                let places = pv.header.metadata_areas.iter().map(|a| (a.start, a.len));
                // The guest's numbers.
                let inside = |(start, len): &(u64, u64)| {
                    let end = start.checked_add(*len);
                    *start >= front.1 && end.is_some_and(|end| end <= pv.place.len)
                };
                let behind = places.filter(inside);
                for (start, len) in [front].into_iter().chain(behind) {
                    let what = format!("LVM metadata of {volume}");
                    areas.extend(self.area(disk, &what, pv.place.start + start, len));
                }
            }
        }
        Disk {
            name: name.clone(),
            source: source.to_owned(),
            bytes: report.size,
            table: match table.kind {
                TableKind::None => "none",
                TableKind::Mbr => "mbr",
                TableKind::Gpt => "gpt",
            }
            .to_owned(),
            sector_size: table.sector_size,
            id: table.id.clone(),
            entries: table.records.entries.map(|e| Entries {
                lba: e.lba,
                count: e.count,
                size: e.size,
            }),
            partitions: table
                .partitions
                .iter()
                .map(|p| Partition {
                    number: p.number,
                    start: p.start,
                    len: p.len,
                    kind: p.kind.clone(),
                    partuuid: p.partuuid.clone(),
                    partlabel: p.partlabel.clone(),
                    flags: p.flags,
                })
                .collect(),
            areas,
        }
    }

    /// The bytes of a partition table, and those of boot loaders outside of filesystems.
    fn table_areas(&mut self, name: &str, table: &Table, disk: &dyn ReadAt) -> Vec<Area> {
        let mut areas = Vec::new();
        if table.kind == TableKind::None {
            return areas;
        }
        let first = table.partitions.iter().map(|p| p.start).min();
        let front = first.unwrap_or(MAX_AREA).min(disk.size());
        if front > MAX_AREA {
            let text = format!(
                "{name}: beyond its first {} MiB, what is in front of the first partition",
                MAX_AREA >> 20
            );
            self.missing.push(text);
        }
        areas.extend(self.area(
            disk,
            &format!("boot area of {name}"),
            0,
            front.min(MAX_AREA),
        ));
        if let Some(entries) = table.records.entries {
            let start = entries.lba.saturating_mul(table.sector_size.into());
            let len = u64::from(entries.count) * u64::from(entries.size);
            if start.saturating_add(len) > front.min(MAX_AREA) {
                areas.extend(self.area(disk, &format!("GPT of {name}"), start, len));
            }
        }
        for start in &table.records.extended {
            let what = format!("extended boot record of {name}");
            areas.extend(self.area(disk, &what, *start, 512));
        }
        for partition in &table.partitions {
            let kind = BOOT_PARTITIONS
                .iter()
                .find(|(kind, _)| *kind == partition.kind);
            if let Some((_, what)) = kind {
                let what = format!("{what} p{} of {name}", partition.number);
                areas.extend(self.area(disk, &what, partition.start, partition.len));
            }
        }
        areas
    }

    fn group(&mut self, group: &disk::lvm2::GroupReport) -> Group {
        for volume in &group.complex {
            let text = format!("{}/{volume}: such a volume is not made again", group.name);
            self.missing.push(text);
        }
        let volumes = group.places.iter().zip(&group.physical_volumes);
        Group {
            name: group.name.clone(),
            uuid: group.uuid.clone(),
            complex: group.complex.clone(),
            metadata: self.file(&format!("{}.vg", group.name), group.text.clone()),
            physical_volumes: volumes
                .map(|(pv, volume)| PhysicalVolume {
                    volume: volume.clone(),
                    uuid: pv.header.uuid.clone(),
                    bytes: pv.header.size,
                })
                .collect(),
        }
    }

    fn volume(
        &mut self,
        volume: &disk::Volume,
        disks: &[&dyn ReadAt],
        holds: &Holds,
    ) -> Option<Volume> {
        let name = &volume.name;
        let Some(reader) = VolumeReader::new(disks, &volume.layout) else {
            // A thin volume, which is told with its group.
            return None;
        };
        let fstype = match holds {
            Holds::Files { fstype, .. } => fstype,
            Holds::Swap => "swap",
            Holds::Other(what) => {
                self.missing.push(format!("{name}: {what}"));
                return None;
            }
        };
        let described = match filesystem::read(fstype, &reader) {
            Ok(Some(Ok(described))) => described,
            Ok(Some(Err(why))) => {
                self.missing.push(format!("{name} ({fstype}): {why}"));
                return None;
            }
            Ok(None) => {
                let text = format!("{name}: a filesystem of type {fstype} is not made again");
                self.missing.push(text);
                return None;
            }
            Err(error) => {
                self.unread.push(format!("{name}: its superblock: {error}"));
                return None;
            }
        };
        let Described { mut recipe, lost } = described;
        let lost = lost.iter().map(|what| format!("{name}: {what}"));
        self.missing.extend(lost);
        let mut subvolumes = Vec::new();
        if let Holds::Files { label, btrfs, .. } = holds {
            if let (Recipe::Vfat(fat), Some(label)) = (&mut recipe, label) {
                // The entry in the root folder counts, which the boot sector may lack.
                let mut lost = Vec::new();
                fat.label = filesystem::label(label, &mut lost);
                let lost = lost.iter().map(|what| format!("{name}: {what}"));
                self.missing.extend(lost);
            }
            if let (Recipe::Btrfs(recipe), Some(facts)) = (&mut recipe, btrfs) {
                (recipe.data_twice, recipe.metadata_twice) = facts.twice;
                let (plain, odd): (Vec<_>, Vec<_>) = facts
                    .list
                    .iter()
                    .cloned()
                    .partition(|one| !one.path.contains('\\'));
                let odd = odd.iter().filter(|one| !one.past);
                let odd =
                    odd.map(|one| format!("{name}: subvolume {}: its name is not text", one.path));
                self.missing.extend(odd);
                subvolumes = plain;
                let failed = facts.failed.as_ref();
                self.unread
                    .extend(failed.map(|why| format!("{name}: its subvolumes: {why}")));
            }
        }
        let areas = match boot_code(&recipe) {
            Some(len) => self.area(&reader, &format!("boot sectors of {name}"), 0, len),
            None => None,
        };
        Some(Volume {
            volume: name.clone(),
            bytes: volume.size(),
            recipe,
            subvolumes,
            areas: areas.into_iter().collect(),
        })
    }

    /// Reads an area. `None`: it cannot be read, or is too large.
    fn area(&mut self, disk: &dyn ReadAt, what: &str, start: u64, len: u64) -> Option<Area> {
        let read = || -> io::Result<Vec<u8>> {
            let len = usize::try_from(len).map_err(io::Error::other)?;
            let mut bytes = vec![0; len];
            disk.read_exact_at(&mut bytes, start)?;
            Ok(bytes)
        };
        if len > MAX_AREA {
            let text = format!("{what}: {len} bytes, and {MAX_AREA} at most are kept");
            self.missing.push(text);
            return None;
        }
        self.span = self.span.saturating_add(len);
        self.areas += 1;
        if self.span > MAX_SPAN || self.areas > MAX_AREAS {
            let text = format!(
                "{what}: a kit has {MAX_AREAS} areas and {} MiB at most",
                MAX_SPAN >> 20
            );
            self.missing.push(text);
            return None;
        }
        let mut bytes = match read() {
            Ok(bytes) => bytes,
            Err(error) => {
                self.unread.push(format!("{what}: {error}"));
                return None;
            }
        };
        let used = bytes.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
        bytes.truncate(used);
        if self.total.saturating_add(used) > MAX_TOTAL {
            let text = format!("{what}: a kit has {} MiB at most", MAX_TOTAL >> 20);
            self.missing.push(text);
            return None;
        }
        let name = format!("area-{}", self.files.len());
        Some(Area {
            what: what.to_owned(),
            start,
            len,
            file: (used > 0).then(|| self.file(&name, bytes)),
        })
    }

    fn file(&mut self, name: &str, bytes: Vec<u8>) -> Blob {
        self.total += bytes.len();
        let blob = Blob {
            name: name.to_owned(),
            sha256: sha256(&bytes),
        };
        self.files.push((name.to_owned(), bytes));
        blob
    }
}

/// SHA-256 in hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

/// Bytes in front of a filesystem that a boot loader may use and mkfs does not write.
fn boot_code(recipe: &Recipe) -> Option<u64> {
    match recipe {
        Recipe::Ext(_) => Some(1024),
        Recipe::Btrfs(_) => Some(0x1_0000),
        // The boot sector, whose parameters mkfs writes anew.
        Recipe::Vfat(_) => Some(512),
        Recipe::Xfs(_) | Recipe::Swap(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::examine;
    use crate::disk::table::mbr;

    #[test]
    fn test_what_is_not_made_again_is_named() {
        let disk = mbr::tests::sample();
        let disks: [&dyn ReadAt; 1] = [&disk];
        let examined = examine(&disks).unwrap();
        let names: Vec<&str> = examined.volumes.iter().map(|v| v.name.as_str()).collect();
        let [first, second, third, ..] = names[..] else {
            panic!("{names:?}");
        };
        let files = |fstype: &str| Holds::Files {
            fstype: fstype.into(),
            label: None,
            btrfs: None,
        };
        let holds = BTreeMap::from([
            (first.to_owned(), Holds::Other("encrypted with LUKS".into())),
            (second.to_owned(), files("ntfs")),
            (third.to_owned(), files("xfs")),
        ]);
        let found = collect("web", &["vg/web".into()], &examined, &disks, &holds);
        assert_eq!(
            found.kit.missing,
            [
                format!("{first}: encrypted with LUKS"),
                format!("{second}: a filesystem of type ntfs is not made again"),
                format!("{third} (xfs): its superblock is not legible"),
            ]
        );
        assert!(found.unread.is_empty() && found.kit.volumes.is_empty());
        // The table and each extended record, all of whose bytes come back.
        let what: Vec<&str> = found.kit.disks[0]
            .areas
            .iter()
            .map(|a| a.what.as_str())
            .collect();
        assert_eq!(what[0], "boot area of disk");
        assert!(what.len() > 1, "{what:?}");
        for area in &found.kit.disks[0].areas {
            let start = usize::try_from(area.start).unwrap();
            let file = area.file.as_ref().unwrap();
            let (_, bytes) = found
                .files
                .iter()
                .find(|(name, _)| *name == file.name)
                .unwrap();
            assert_eq!(&disk[start..start + bytes.len()], &bytes[..]);
            assert_eq!(sha256(bytes), file.sha256);
        }
    }
}
