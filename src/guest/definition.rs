//! What a guest's own configuration file says: its name and its disks.

use std::path::{Path, PathBuf};

use super::inventory::Inventory;
use super::{DiskSource, UncoveredDisk};
use crate::error::{escape, place};
use crate::{Code, Error, Result};

/// A longer definition is refused.
pub const MAX_BYTES: u64 = 1 << 20;

/// More disks than any hypervisor takes.
pub const MAX_DISKS: usize = 512;

/// A guest as its configuration file describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    /// The guest's name as the hypervisor knows it.
    pub name: String,
    /// Disks in the order of the file.
    pub disks: Vec<DefinedDisk>,
}

/// A disk of a definition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DefinedDisk {
    /// A device or raw image file.
    Raw(PathBuf),
    /// Something else.
    Uncovered(UncoveredDisk),
}

impl DefinedDisk {
    /// A disk whose files one would expect in a backup.
    pub(super) fn uncovered(what: &[u8], reason: impl Into<String>) -> DefinedDisk {
        DefinedDisk::Uncovered(UncoveredDisk {
            what: escape(what),
            reason: escape(reason.into().as_bytes()),
            expected: false,
        })
    }

    /// A drive for removable media.
    pub(super) fn removable(what: &[u8], kind: &str) -> DefinedDisk {
        DefinedDisk::Uncovered(UncoveredDisk {
            what: escape(what),
            reason: format!("a {kind} drive"),
            expected: true,
        })
    }
}

/// `line 3, column 7: …` for a byte of a text.
pub(super) fn at(text: &[u8], at: usize, problem: impl std::fmt::Display) -> String {
    format!("{}: {problem}", place(text, at))
}

/// The logical volume behind the name of a device-mapper device: dashes inside the names are
/// doubled, a single one divides group and volume.
pub fn split_dm_name(name: &str) -> Option<(String, String)> {
    let bytes = name.as_bytes();
    let mut at = 0;
    let mut border = None;
    while at < bytes.len() {
        if bytes[at] != b'-' {
            at += 1;
        } else if bytes.get(at + 1) == Some(&b'-') {
            at += 2;
        } else if border.replace(at).is_some() {
            // A second single dash: a part of a volume (`vg-lv-cow`).
            return None;
        } else {
            at += 1;
        }
    }
    let border = border?;
    let (vg, lv) = (&name[..border], &name[border + 1..]);
    if vg.is_empty() || lv.is_empty() {
        return None;
    }
    Some((vg.replace("--", "-"), lv.replace("--", "-")))
}

/// What a path stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolved {
    /// A logical volume (which may be missing) or a file.
    Disk(DiskSource),
    /// A device of another kind.
    Other(PathBuf),
}

/// Finds the logical volume or file behind a path, through symbolic links and
/// device-mapper names. `exists` knows the host's logical volumes.
pub fn resolve(
    path: &Path,
    exists: &dyn Fn(&str, &str) -> bool,
    inventory: &dyn Inventory,
) -> Result<Resolved> {
    let lv = |(vg, lv): (String, String)| Resolved::Disk(DiskSource::Lv { vg, lv });
    let direct = by_name(path);
    if let Some((vg, volume)) = &direct {
        if exists(vg, volume) {
            return Ok(lv((vg.clone(), volume.clone())));
        }
    }
    let real = match inventory.canonical(path) {
        Ok(real) => real,
        Err(error) => {
            // Say which volume is missing rather than which path.
            return match direct {
                Some(names) if path.starts_with("/dev") => Ok(lv(names)),
                _ => Err(error),
            };
        }
    };
    if let Some((vg, volume)) = by_name(&real) {
        if exists(&vg, &volume) {
            return Ok(lv((vg, volume)));
        }
    }
    if real.starts_with("/dev") {
        return Ok(Resolved::Other(real));
    }
    Ok(Resolved::Disk(DiskSource::File(real)))
}

/// Group and volume that `/dev/VG/LV` or `/dev/mapper/VG-LV` could mean.
fn by_name(path: &Path) -> Option<(String, String)> {
    let parts: Vec<&str> = path
        .strip_prefix("/dev")
        .ok()?
        .iter()
        .map(|part| part.to_str())
        .collect::<Option<_>>()?;
    match parts.as_slice() {
        ["mapper", name] => split_dm_name(name),
        [vg, lv] => Some(((*vg).to_owned(), (*lv).to_owned())),
        _ => None,
    }
}

/// The error for a definition that cannot be used.
pub(super) fn bad(path: &Path, problem: impl std::fmt::Display) -> Error {
    Error::new(
        Code::BadGuestDefinition,
        format!("{}: {problem}", escape(path.as_os_str().as_encoded_bytes())),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::FixedInventory;

    #[test]
    fn test_dm_names() {
        let cases = [
            ("vg0-web1", Some(("vg0", "web1"))),
            ("vg--0-domu--web1", Some(("vg-0", "domu-web1"))),
            // Not `a` and `-b`: no name starts with a dash.
            ("a---b", Some(("a-", "b"))),
            ("a-----b", Some(("a--", "b"))),
            ("vg0-web1-real", None),
            ("vg0", None),
            ("vg0-", None),
            ("-x", None),
            ("", None),
            ("--", None),
        ];
        for (name, expected) in cases {
            let expected = expected.map(|(vg, lv)| (vg.to_owned(), lv.to_owned()));
            assert_eq!(split_dm_name(name), expected, "{name}");
        }
    }

    #[test]
    fn test_resolving() {
        let link = |from: &str, to: &str| (PathBuf::from(from), PathBuf::from(to));
        let inventory = FixedInventory {
            links: [
                link("/dev/disk/by-id/dm-name-vg0-web1", "/dev/mapper/vg0-web1"),
                link("/dev/disk/by-id/wwn-1", "/dev/sda"),
                link("/dev/drbd/by-res", "/dev/drbd0"),
                link("/srv/link.img", "/srv/real.img"),
            ]
            .into(),
            files: [(PathBuf::from("/srv/real.img"), Vec::new())].into(),
            ..FixedInventory::default()
        };
        let exists = |vg: &str, lv: &str| vg == "vg0" && (lv == "web1" || lv == "domu-a");
        let lv = |lv: &str| {
            Some(Resolved::Disk(DiskSource::Lv {
                vg: "vg0".into(),
                lv: lv.into(),
            }))
        };
        let cases = [
            ("/dev/vg0/web1", lv("web1")),
            ("/dev/mapper/vg0-domu--a", lv("domu-a")),
            ("/dev/disk/by-id/dm-name-vg0-web1", lv("web1")),
            ("/dev/vg0/gone", lv("gone")),
            ("/dev/mapper/vg0-gone", lv("gone")),
            (
                "/dev/disk/by-id/wwn-1",
                Some(Resolved::Other("/dev/sda".into())),
            ),
            (
                "/dev/drbd/by-res",
                Some(Resolved::Other("/dev/drbd0".into())),
            ),
            ("/dev/sdz", None),
            (
                "/srv/link.img",
                Some(Resolved::Disk(DiskSource::File("/srv/real.img".into()))),
            ),
            ("/srv/gone.img", None),
        ];
        for (path, expected) in cases {
            let resolved = resolve(Path::new(path), &exists, &inventory).ok();
            assert_eq!(resolved, expected, "{path}");
        }
    }
}
