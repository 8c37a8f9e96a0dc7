//! The contents of a guest: the file `manifest.json` of its backup, and the answer of
//! `guestsnap inspect`. The format is described in `docs/manifest.md`.

use serde::Serialize;
use serde_json::Value;

use crate::disk::lvm2::GroupReport;
use crate::disk::{DiskReport, Volume, VolumeKind};
use crate::error::escape;
use crate::fs::Join;

/// A guest: disks, volumes and tree. Names from the guest are escaped, except for partition labels and
/// the reasons for skipped or uncovered items.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Manifest {
    /// [`Manifest::FORMAT`].
    pub format: u32,
    /// Name in the catalog.
    pub guest: String,
    /// Bacula's JobId; 0 without a job.
    pub job_id: u32,
    /// How much the snapshots agree with the guest and with each other.
    pub consistency: String,
    /// The disks that were read.
    pub disks: Vec<SavedDisk>,
    /// The disks that were not.
    pub not_covered: Vec<NotCovered>,
    /// The guest's LVM volume groups.
    pub groups: Vec<GroupReport>,
    /// Everything that may hold a filesystem.
    pub volumes: Vec<FoundVolume>,
    /// The choice of the root with its reason, and questions that the guest's fstab leaves open.
    pub decisions: Vec<String>,
    /// Where the filesystems are in the guest's folder.
    pub tree: Vec<JoinedVolume>,
    /// Oddities in tables or LVM metadata.
    pub notes: Vec<String>,
    /// Parts of the guest that the rebuild kit does not describe, with reasons.
    pub not_rebuilt: Vec<String>,
}

/// A disk of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SavedDisk {
    /// Volume or image on the host.
    pub source: String,
    /// Size.
    pub bytes: u64,
    /// How the snapshot was taken.
    pub snapshot: String,
    /// Its partition table.
    pub contents: DiskReport,
}

/// A disk of the guest's definition that is not read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NotCovered {
    /// The name in the definition.
    pub disk: String,
    /// Why.
    pub reason: String,
}

/// Something that may hold a filesystem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FoundVolume {
    /// Its name in the job log.
    pub volume: String,
    /// `None`: it could not be reached.
    #[serde(flatten)]
    pub extent: Option<VolumeExtent>,
    /// The outcome.
    #[serde(flatten)]
    pub state: VolumeState,
}

/// Facts of a reachable volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VolumeExtent {
    /// Size.
    pub bytes: u64,
    /// The kind.
    pub kind: VolumeKind,
}

/// Whether the files of a volume are in the backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum VolumeState {
    /// They are.
    Mounted {
        /// Its type, as `blkid` names it.
        filesystem: String,
        /// Its UUID.
        uuid: Option<String>,
        /// Its label.
        label: Option<String>,
        /// How it was mounted.
        options: String,
        /// Bytes in use, as `df` counts them.
        used_bytes: u64,
    },
    /// It has none, or none is missed.
    Skipped {
        /// Why.
        skipped: String,
    },
    /// They should be, and are not.
    Error {
        /// The report.
        error: String,
    },
}

impl VolumeState {
    /// A volume without files.
    pub fn skipped(reason: &str) -> VolumeState {
        VolumeState::Skipped {
            skipped: reason.to_owned(),
        }
    }

    /// A volume that failed.
    pub fn error(report: &str) -> VolumeState {
        VolumeState::Error {
            error: report.to_owned(),
        }
    }
}

impl FoundVolume {
    /// A volume that cannot be reached.
    pub fn unreached(name: &str, state: VolumeState) -> FoundVolume {
        FoundVolume {
            volume: name.to_owned(),
            extent: None,
            state,
        }
    }

    /// A volume that can be reached.
    pub fn reached(volume: &Volume, state: VolumeState) -> FoundVolume {
        FoundVolume {
            extent: Some(VolumeExtent {
                bytes: volume.size(),
                kind: volume.kind.clone(),
            }),
            ..FoundVolume::unreached(&volume.name, state)
        }
    }
}

/// The place of a filesystem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct JoinedVolume {
    /// From the guest's root; empty: the root.
    pub path: String,
    /// The volume's name in the tree, without slashes.
    pub volume: String,
    /// Type.
    pub filesystem: String,
}

impl JoinedVolume {
    pub(super) fn of(join: &Join) -> JoinedVolume {
        JoinedVolume {
            path: escape(&join.path),
            volume: join.volume.clone(),
            filesystem: join.fstype.clone(),
        }
    }
}

impl Manifest {
    /// The version of the format.
    pub const FORMAT: u32 = 2;

    /// Converts to JSON with sorted keys.
    pub fn to_json(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    /// Converts to the text of the file.
    pub(super) fn to_file(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec_pretty(&self.to_json()).unwrap_or_default();
        text.push(b'\n');
        text
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn test_a_volume_has_the_keys_of_its_document() {
        let volume = |extent, state| FoundVolume {
            extent,
            ..FoundVolume::unreached("p1", state)
        };
        let extent = Some(VolumeExtent {
            bytes: 4096,
            kind: VolumeKind::Whole { disk: 1 },
        });
        let mounted = VolumeState::Mounted {
            filesystem: "ext4".into(),
            uuid: None,
            label: Some("root".into()),
            options: "ro".into(),
            used_bytes: 1024,
        };
        let kind = json!({ "whole": { "disk": 1 } });
        for (found, expected) in [
            (
                volume(extent.clone(), mounted),
                json!({
                    "volume": "p1", "bytes": 4096, "kind": kind, "filesystem": "ext4", "uuid": null,
                    "label": "root", "options": "ro", "used_bytes": 1024,
                }),
            ),
            (
                volume(extent, VolumeState::error("GS-503")),
                json!({ "volume": "p1", "bytes": 4096, "kind": kind, "error": "GS-503" }),
            ),
            (
                volume(None, VolumeState::skipped("swap")),
                json!({ "volume": "p1", "skipped": "swap" }),
            ),
        ] {
            assert_eq!(serde_json::to_value(found).unwrap(), expected);
        }
    }
}
