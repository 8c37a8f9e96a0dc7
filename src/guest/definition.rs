//! A guest's own configuration file: its name and disks.

use std::path::{Path, PathBuf};

use super::inventory::Inventory;
use super::{Absence, DiskSource, UncoveredDisk};
use crate::error::{escape, place};
use crate::hostdev::lvname::LvName;
use crate::{Code, Error, Result};

/// Maximum size; longer definitions are refused.
pub const MAX_BYTES: u64 = 1 << 20;

/// Maximum disks; more than any hypervisor supports.
pub const MAX_DISKS: usize = 512;

/// A guest, from its configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    /// The guest's name in the hypervisor.
    pub name: String,
    /// Disks in file order.
    pub disks: Vec<NamedDisk>,
}

/// A disk and its name in the guest, if defined: `vda`, `xvda2`.
pub type NamedDisk = (Option<String>, DefinedDisk);

/// A disk of a definition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DefinedDisk {
    /// A device or raw image file.
    Raw(PathBuf),
    /// A raw volume of a libvirt storage pool; the pool's own definition tells its path.
    InPool {
        /// The pool's name.
        pool: String,
        /// The volume's name.
        volume: String,
        /// Text for messages.
        what: String,
    },
    /// A disk that is not backed up.
    Uncovered(UncoveredDisk),
}

impl DefinedDisk {
    /// A disk that is not covered although a backup should contain its files.
    pub(super) fn uncovered(what: &[u8], reason: impl Into<String>) -> DefinedDisk {
        DefinedDisk::Uncovered(UncoveredDisk {
            what: escape(what),
            reason: escape(reason.into().as_bytes()),
            absence: Absence::Lost,
        })
    }

    /// A drive for removable media.
    pub(super) fn removable(what: &[u8], kind: &str) -> DefinedDisk {
        DefinedDisk::Uncovered(UncoveredDisk {
            what: escape(what),
            reason: format!("a {kind} drive"),
            absence: Absence::NoDisk,
        })
    }
}

/// Prefixes a problem with its position: `line 3, column 7: …`.
pub(super) fn at(text: &[u8], at: usize, problem: impl std::fmt::Display) -> String {
    format!("{}: {problem}", place(text, at))
}

/// Returns a device's name in the guest, if valid. Older syntax appends a type: `phy:vg0/a,xvda2:disk`.
pub(super) fn device_name(text: &str) -> Option<String> {
    let name = text.split(':').next().unwrap_or_default();
    let name = name.strip_prefix("/dev/").unwrap_or(name);
    let good = !name.is_empty()
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    good.then(|| name.to_owned())
}

/// With any driver in the guest, `hda`, `sda` and `xvda` are the same disk. Xen's own driver keeps
/// the other letters as well.
const FAMILY: [&str; 3] = ["hd", "sd", "xvd"];

fn in_family(name: &str) -> Option<(&'static str, &str)> {
    let prefix = FAMILY.into_iter().find(|prefix| name.starts_with(prefix))?;
    Some((prefix, &name[prefix.len()..]))
}

/// All possible names of each disk in the guest; empty if the order is up to its drivers.
pub(super) fn guest_names(disks: &[NamedDisk]) -> Vec<Vec<String>> {
    let removable = |disk: &DefinedDisk| matches!(disk, DefinedDisk::Uncovered(d) if d.absence == Absence::NoDisk);
    let given: Vec<&str> = disks
        .iter()
        .filter(|(_, disk)| !removable(disk))
        .filter_map(|(name, _)| name.as_deref())
        .collect();
    let has = |prefix: &str| given.iter().any(|name| name.starts_with(prefix));
    // Current guests name IDE disks `sd` too, before or after the others.
    let mixed = has("hd") && has("sd");
    let names = |name: &String| match in_family(name) {
        Some(("hd" | "sd", _)) if mixed => Vec::new(),
        Some((prefix, rest)) => {
            let others = FAMILY.into_iter().filter(|other| {
                let first = rest.starts_with('a');
                let free = !given.contains(&format!("{other}{rest}").as_str());
                *other != prefix && free && (first || *other == "xvd")
            });
            let others = others.map(|other| format!("{other}{rest}"));
            std::iter::once(name.clone()).chain(others).collect()
        }
        None => vec![name.clone()],
    };
    disks
        .iter()
        .map(|(name, _)| name.as_ref().map(names).unwrap_or_default())
        .collect()
}

/// Possible guest names of disk `number` if only the order is known.
pub(super) fn names_by_order(number: usize) -> Vec<String> {
    let Some(letter) = u8::try_from(number).ok().filter(|n| *n < 26) else {
        return Vec::new();
    };
    let letter = char::from(b'a' + letter);
    ["sd", "vd", "xvd", "hd"]
        .iter()
        .map(|prefix| format!("{prefix}{letter}"))
        .chain([format!("nvme{number}n1")])
        .collect()
}

/// The object behind a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolved {
    /// A logical volume, possibly missing, or a file.
    Disk(DiskSource),
    /// Another kind of device.
    Other(PathBuf),
}

/// Resolves a path to a logical volume or file, through symbolic links and device-mapper names.
/// `exists` looks up the host's logical volumes.
pub fn resolve(
    path: &Path,
    exists: &dyn Fn(&LvName) -> bool,
    inventory: &dyn Inventory,
) -> Result<Resolved> {
    let lv = |name| Resolved::Disk(DiskSource::Lv(name));
    let direct = LvName::of_device(path);
    if let Some(name) = direct.as_ref().filter(|name| exists(name)) {
        return Ok(lv(name.clone()));
    }
    let real = match inventory.canonical(path) {
        Ok(real) => real,
        Err(error) => {
            // Report the missing volume rather than the path.
            return direct.map(lv).ok_or(error);
        }
    };
    if let Some(name) = LvName::of_device(&real).filter(|name| exists(name)) {
        return Ok(lv(name));
    }
    if real.starts_with("/dev") {
        return Ok(Resolved::Other(real));
    }
    Ok(Resolved::Disk(DiskSource::File(real)))
}

/// Error for an unusable definition.
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
    fn test_what_a_guest_calls_its_disks() {
        let raw = || DefinedDisk::Raw("/x".into());
        let cases: &[(&[&str], &[&[&str]])] = &[
            (&["vda", "vdc"], &[&["vda"], &["vdc"]]),
            (
                &["xvda2", "xvda1"],
                &[&["xvda2", "hda2", "sda2"], &["xvda1", "hda1", "sda1"]],
            ),
            (
                &["hda", "hdc"],
                &[&["hda", "sda", "xvda"], &["hdc", "xvdc"]],
            ),
            (&["sdb", "vda"], &[&["sdb", "xvdb"], &["vda"]]),
            // Each has its own name and never the other's.
            (&["xvda", "sda"], &[&["xvda", "hda"], &["sda", "hda"]]),
            (&["hda", "sda", "vda"], &[&[], &[], &["vda"]]),
        ];
        for (given, expected) in cases {
            let disks: Vec<NamedDisk> = given
                .iter()
                .map(|name| (Some((*name).to_owned()), raw()))
                .collect();
            assert_eq!(guest_names(&disks), *expected, "{given:?}");
        }
        let cd = DefinedDisk::removable(b"x", "CD");
        let disks = [
            (Some("sda".into()), raw()),
            (Some("hda".into()), cd),
            (None, raw()),
        ];
        let names = guest_names(&disks);
        assert_eq!(names[0], ["sda", "hda", "xvda"]);
        assert!(names[2].is_empty());
        assert_eq!(device_name("xvda2:disk").as_deref(), Some("xvda2"));
        assert_eq!(device_name("/dev/sda").as_deref(), Some("sda"));
        for bad in ["", "w!", "a b", "a/b", "\u{e4}"] {
            assert_eq!(device_name(bad), None, "{bad}");
        }
        assert_eq!(names_by_order(1), ["sdb", "vdb", "xvdb", "hdb", "nvme1n1"]);
        assert!(names_by_order(26).is_empty());
    }

    #[test]
    fn test_resolving() {
        let link = |from: &str, to: &str| (PathBuf::from(from), PathBuf::from(to));
        let inventory = FixedInventory {
            links: [
                link("/dev/disk/by-id/dm-name-vg0-web1", "/dev/mapper/vg0-web1"),
                link("/dev/disk/by-id/wwn-1", "/dev/sda"),
                link("/dev/drbd/by-res/web1", "/dev/drbd0"),
                link("/srv/link.img", "/srv/real.img"),
            ]
            .into(),
            files: [(PathBuf::from("/srv/real.img"), Vec::new())].into(),
            ..FixedInventory::default()
        };
        let exists = |name: &LvName| {
            let name = name.to_string();
            name == "vg0/web1" || name == "vg0/domu-a"
        };
        let lv = |lv: &str| {
            let name = LvName::new("vg0", lv).unwrap();
            Some(Resolved::Disk(DiskSource::Lv(name)))
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
                "/dev/drbd/by-res/web1",
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
