//! The guest's volumes and the names the guest may use for them.

use super::DetachedMount;
use super::probe::Filesystem;

/// Names that the guest may use for a volume.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VolumeIdentity {
    /// Short name for logs and for the directory of a volume outside fstab: `p1`, `vg0-root`.
    pub name: String,
    /// Names of its disk in the guest (`vda`, `xvda2`); empty if unknown, never guessed.
    pub disk_names: Vec<String>,
    /// Partition number; `None`: whole disk or logical volume.
    pub partition: Option<u32>,
    /// Partition UUID in the form of `PARTUUID=`.
    pub partuuid: Option<String>,
    /// Partition label.
    pub partlabel: Option<Vec<u8>>,
    /// Volume group and logical volume in the guest.
    pub lv: Option<(String, String)>,
    /// UUIDs of both, concatenated, without dashes.
    pub lv_uuids: Option<String>,
    /// Origin in the same group, if this is a thin snapshot.
    pub snapshot_of: Option<String>,
    /// Whether its disk is the guest's only one.
    pub only_disk: bool,
    /// Index of the disk it begins on, and the offset there.
    pub start: (usize, u64),
    /// Whether that disk has a boot loader.
    pub bootable: bool,
    /// Distinguishes it from all other volumes, including copies, across jobs.
    pub key: String,
    /// The other devices of its btrfs: each of their names means the same filesystem.
    pub parts: Vec<VolumeIdentity>,
}

impl VolumeIdentity {
    /// All devices of its filesystem, the first one first.
    pub fn devices(&self) -> impl Iterator<Item = &VolumeIdentity> {
        std::iter::once(self).chain(&self.parts)
    }

    /// Whether this is the whole disk of this index.
    pub fn is_whole_disk(&self, disk: usize) -> bool {
        self.start == (disk, 0) && self.partition.is_none() && self.lv.is_none()
    }

    /// Whether this is a thin snapshot of `other`.
    pub fn is_snapshot_of(&self, other: &VolumeIdentity) -> bool {
        match (&self.lv, &other.lv, &self.snapshot_of) {
            (Some((vg, _)), Some((group, lv)), Some(of)) => {
                let group_id = |volume: &VolumeIdentity| {
                    let uuids = volume.lv_uuids.as_ref()?;
                    uuids.get(..32).map(str::to_owned)
                };
                // Two groups may share a name.
                vg == group && lv == of && group_id(self) == group_id(other)
            }
            _ => false,
        }
    }
}

/// A volume whose filesystem is mounted.
#[derive(Debug)]
pub struct MountedVolume {
    /// Names that the guest may use.
    pub identity: VolumeIdentity,
    /// Result of the probe.
    pub filesystem: Filesystem,
    /// The mount.
    pub mount: DetachedMount,
}
