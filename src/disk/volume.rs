//! Volumes of a guest, and skipped ones.

use serde::Serialize;

use super::layout::Layout;
use crate::Code;

/// Maximum volumes of one guest. Each needs a device, descriptors, a journal write, a mount and a
/// backup, and tables may name the same bytes many times over.
pub const MAX_VOLUMES: usize = 128;

/// A volume that may hold a filesystem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Volume {
    /// `disk`, `p1`, `VolGroup00/root`; on further disks `disk2`, `disk2p1`. Unique in the guest.
    /// Letters, digits and `_-+.`, with one `/` for logical volumes.
    pub name: String,
    /// Volume type, with identifiers that fstab may use.
    pub kind: VolumeKind,
    /// Location of its bytes.
    pub layout: Layout,
    /// Why writes there would spoil it or other volumes. `None`: it may be written to.
    #[serde(skip)]
    pub read_only: Option<&'static str>,
}

impl Volume {
    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.layout.size()
    }
}

/// Type of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum VolumeKind {
    /// A disk without a partition table.
    Whole {
        /// Index of the disk.
        disk: usize,
    },
    /// A partition.
    Partition {
        /// Index of the disk.
        disk: usize,
        /// Number as in Linux.
        number: u32,
        /// `0x83`, or a GPT type GUID in lower case.
        #[serde(rename = "type")]
        kind: String,
        /// `PARTUUID=`, lower case.
        partuuid: Option<String>,
        /// `PARTLABEL=`; set by the guest.
        partlabel: Option<String>,
    },
    /// A logical volume of the guest.
    Lv {
        /// Volume group.
        vg: String,
        /// Logical volume.
        lv: String,
        /// Origin, if this is a thin snapshot.
        snapshot_of: Option<String>,
        /// UUIDs of the group and the volume, concatenated, without dashes.
        uuids: Option<String>,
    },
}

/// Type of a skipped item.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum SkippedKind {
    /// A disk with an empty partition table.
    EmptyDisk,
    /// The unreadable part of a damaged partition table.
    DamagedTable,
    /// A physical volume that belongs to no group.
    UnusedPv,
    /// A physical volume whose group is unknown because its metadata are damaged.
    DamagedPv,
    /// A logical volume.
    LogicalVolume,
    /// A snapshot of a reachable logical volume.
    Snapshot,
    /// All volumes beyond [`MAX_VOLUMES`], as one item.
    TooMany,
}

impl SkippedKind {
    /// The error code. `None`: no files are lost.
    pub fn loss(self) -> Option<Code> {
        match self {
            SkippedKind::EmptyDisk | SkippedKind::UnusedPv | SkippedKind::Snapshot => None,
            SkippedKind::DamagedTable => Some(Code::BadPartitionTable),
            SkippedKind::DamagedPv => Some(Code::BadGuestLvm),
            SkippedKind::LogicalVolume | SkippedKind::TooMany => Some(Code::UnsupportedVolume),
        }
    }
}

/// An item that cannot be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// Named like a volume.
    pub name: String,
    /// Reason.
    pub reason: String,
    /// Type.
    pub kind: SkippedKind,
    /// Index of its disk, if on one.
    pub disk: Option<usize>,
    /// The volume it would be, if known.
    pub volume: Option<VolumeKind>,
}
