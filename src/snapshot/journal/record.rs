//! The lines of a journal.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::escape;
use crate::hostdev::lvname::VgName;
use crate::snapshot::names::JobTag;

/// Format version of journal files.
pub(super) const VERSION: u32 = 1;

/// An object that outlives its process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Object {
    /// A snapshot volume.
    Lv {
        /// Volume group.
        vg: VgName,
        /// Name of the snapshot.
        name: String,
        /// Name of the origin.
        origin: String,
        /// UUID of the snapshot, once known.
        uuid: Option<String>,
    },
    /// A device-mapper device created by guestsnap.
    Dm {
        /// Device name.
        name: String,
    },
    /// A guest's volume, activated for the duration of a backup.
    Activated {
        /// Volume group.
        vg: VgName,
        /// Volume name.
        name: String,
        /// Volume UUID.
        uuid: String,
        /// Device-mapper UUID.
        dm_uuid: String,
    },
    /// A guest's volume, suspended until its snapshot exists.
    Suspended {
        /// Volume group.
        vg: VgName,
        /// Volume name.
        name: String,
        /// Device-mapper UUID.
        dm_uuid: String,
    },
    /// A volume that is being made. It carries the job's tag until it is complete.
    Fresh {
        /// Volume group.
        vg: VgName,
        /// Volume name.
        name: String,
    },
    /// An image file that is being made. It has another name once it is complete.
    Image {
        /// Its path until then.
        path: PathBuf,
        /// Device number of its folder.
        folder: u64,
    },
    /// No object: a restore is writing to a guest's disks.
    Into {
        /// The guest.
        guest: String,
        /// Its disks.
        disks: Vec<String>,
    },
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Object::Lv { vg, name, .. } => write!(f, "volume {vg}/{name}"),
            Object::Dm { name } => write!(f, "device {name}"),
            Object::Activated { vg, name, .. } => write!(f, "activated volume {vg}/{name}"),
            Object::Suspended { vg, name, .. } => write!(f, "suspended volume {vg}/{name}"),
            Object::Fresh { vg, name } => write!(f, "new volume {vg}/{name}"),
            Object::Image { path, .. } => {
                write!(f, "image {}", escape(path.as_os_str().as_encoded_bytes()))
            }
            Object::Into { guest, disks } => {
                write!(f, "a restore into {guest} ({})", disks.join(", "))
            }
        }
    }
}

/// One line of a journal.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Record {
    Journal { version: u32, job: JobTag },
    Intend { n: u32, object: Object },
    Created { n: u32, uuid: String },
    Removed { n: u32 },
}

/// Content of a journal file.
#[derive(Debug)]
pub(in crate::snapshot) struct Contents {
    /// The job that wrote it.
    pub job: JobTag,
    /// Objects that may exist, by number, in order of creation.
    pub open: BTreeMap<u32, Object>,
    /// Number of unreadable lines. A crash may tear the last line; no object was created for it.
    pub damaged: usize,
}

/// Why a journal is unreadable.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::snapshot) enum Unreadable {
    /// The file is empty.
    Empty,
    /// Another version of guestsnap wrote it.
    Version(u64),
    /// The first line is not a header.
    NoHeader,
}

impl Unreadable {
    /// Describes the journal at `path` and the remedy.
    pub(in crate::snapshot) fn describe(&self, path: &Path) -> String {
        let path = path.display();
        let by_hand = format!(
            "When `lvs -o +tags` and `dmsetup ls` show nothing more of guestsnap that no job uses, remove {path} by hand"
        );
        match self {
            Unreadable::Empty => format!(
                "it is empty: its contents were lost with a filesystem or a disk, and nothing can be told of its job. {by_hand}"
            ),
            Unreadable::Version(version) => format!(
                "it has format version {version}, and this guestsnap knows {VERSION}: another version wrote it. \
                 Sweep once with that version. {by_hand}"
            ),
            Unreadable::NoHeader => {
                format!("its first line is damaged: nothing can be told of its job. {by_hand}")
            }
        }
    }
}

/// Parses a journal.
pub(super) fn parse(text: &[u8]) -> std::result::Result<Contents, Unreadable> {
    let complete = text.iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1);
    let mut lines = text[..complete]
        .split(|&b| b == b'\n')
        .filter(|l| !l.is_empty());
    let header = lines.next().ok_or(match text {
        [] => Unreadable::Empty,
        _ => Unreadable::NoHeader,
    })?;
    let job = match serde_json::from_slice(header) {
        Ok(Record::Journal {
            version: VERSION,
            job,
        }) => job,
        _ => return Err(other_version(header).map_or(Unreadable::NoHeader, Unreadable::Version)),
    };
    let mut contents = Contents {
        job,
        open: BTreeMap::new(),
        damaged: 0,
    };
    for line in lines {
        match serde_json::from_slice(line) {
            Ok(Record::Intend { n, object }) => {
                contents.open.insert(n, object);
            }
            Ok(Record::Created { n, uuid: known }) => {
                if let Some(Object::Lv { uuid, .. }) = contents.open.get_mut(&n) {
                    *uuid = Some(known);
                }
            }
            Ok(Record::Removed { n }) => {
                contents.open.remove(&n);
            }
            Ok(Record::Journal { .. }) | Err(_) => contents.damaged += 1,
        }
    }
    Ok(contents)
}

/// The version in a header of another format; the rest may have any form.
fn other_version(header: &[u8]) -> Option<u64> {
    let header: serde_json::Value = serde_json::from_slice(header).ok()?;
    let version = header.get("journal")?.get("version")?.as_u64()?;
    (version != u64::from(VERSION)).then_some(version)
}
