//! The types of `kit.json`. All sizes and offsets are in bytes.

use serde::{Deserialize, Serialize};

use super::filesystem::Recipe;

/// The description of a guest's disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kit {
    /// [`Kit::FORMAT`].
    pub format: u32,
    /// Name in the catalog.
    pub guest: String,
    /// The disks, in the guest's order.
    pub disks: Vec<Disk>,
    /// The guest's LVM volume groups.
    pub groups: Vec<Group>,
    /// Filesystems and swap areas.
    pub volumes: Vec<Volume>,
    /// Where the filesystems are in the guest, the root first.
    pub tree: Vec<Place>,
    /// Parts that the kit does not describe, with reasons.
    pub missing: Vec<String>,
}

impl Kit {
    /// The version of the format: that of the manifest it came with. Format 1 had no kit.
    pub const FORMAT: u32 = 2;
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// `disk`, `disk2`, …
    pub name: String,
    /// Volume or image on the host.
    pub source: String,
    /// Size.
    pub bytes: u64,
    /// `none`, `mbr` or `gpt`.
    pub table: String,
    /// Sector size that the table's numbers assume.
    pub sector_size: u32,
    /// Disk GUID, or the MBR's disk id.
    pub id: Option<String>,
    /// GPT: the array of entries.
    pub entries: Option<Entries>,
    /// Partitions by number.
    pub partitions: Vec<Partition>,
    /// Bytes to write back.
    pub areas: Vec<Area>,
}

/// The array of entries of a GPT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entries {
    /// Its first sector.
    pub lba: u64,
    /// Number of entries.
    pub count: u32,
    /// Bytes of each.
    pub size: u32,
}

/// A partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partition {
    /// Number as in Linux.
    pub number: u32,
    /// Offset.
    pub start: u64,
    /// Length.
    pub len: u64,
    /// `0x83`, or a GPT type GUID.
    #[serde(rename = "type")]
    pub kind: String,
    /// `PARTUUID`.
    pub partuuid: Option<String>,
    /// `PARTLABEL`.
    pub partlabel: Option<String>,
    /// GPT: the attribute bits. MBR: 128 if it is active.
    pub flags: u64,
}

/// Bytes of a disk or volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Area {
    /// Description for messages.
    pub what: String,
    /// Offset.
    pub start: u64,
    /// Length. Bytes beyond the end of the file are zero.
    pub len: u64,
    /// The bytes; `None`: all are zero.
    pub file: Option<Blob>,
}

/// A file beside the description.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// Its name.
    pub name: String,
    /// SHA-256 of its bytes, in hexadecimal digits.
    pub sha256: String,
}

/// A volume group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Name.
    pub name: String,
    /// UUID, with dashes.
    pub uuid: String,
    /// The metadata text, in the form that `vgcfgrestore` takes.
    pub metadata: Blob,
    /// Volumes that are not made again, with their type.
    pub complex: Vec<String>,
    /// The physical volumes. Their labels and metadata areas are areas of the disks.
    pub physical_volumes: Vec<PhysicalVolume>,
}

/// A physical volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhysicalVolume {
    /// The disk or partition.
    pub volume: String,
    /// UUID, 32 characters.
    pub uuid: String,
    /// Size according to its header.
    pub bytes: u64,
}

/// A filesystem or swap area.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its name in the job log.
    pub volume: String,
    /// Size of the volume.
    pub bytes: u64,
    /// How to make it.
    pub recipe: Recipe,
    /// btrfs: its subvolumes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subvolumes: Vec<Subvolume>,
    /// Bytes to write back into it.
    pub areas: Vec<Area>,
}

/// A subvolume of a btrfs, other than its top. Read-only snapshots are listed if they have a place in the guest or are
/// the default; the files of others are not saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subvolume {
    /// Its id.
    pub id: u64,
    /// Path from the top of the filesystem; bytes that are not text as `\xNN`.
    pub path: String,
    /// Whether a mount without `subvol=` shows it.
    pub default: bool,
    /// Whether it was read-only. It is made writable.
    #[serde(default)]
    pub read_only: bool,
    /// Whether it was a read-only snapshot of another one here.
    #[serde(skip)]
    pub past: bool,
}

/// The place of a filesystem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// From the guest's root; empty: the root.
    pub path: String,
    /// The volume.
    pub volume: String,
    /// btrfs: the id of the subvolume.
    pub subvolume: Option<u64>,
}
