//! `storage.cfg`: sections that begin with `type: name`, then indented lines `key value`.

use std::path::{Component, Path, PathBuf};

use super::{Drive, MAX_BYTES, MAX_LINE, boolean};
use crate::hostdev::lvname::{LvName, VgName};

/// Maximum number of storages.
pub const MAX_STORAGES: usize = 1024;

/// A storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    /// Name, as volume ids have it before the colon.
    pub name: String,
    /// Its type: `lvmthin`, `dir`, `rbd`, …
    pub kind: String,
    /// `vgname`: volume group.
    pub vg: Option<VgName>,
    /// `path`, absolute.
    pub path: Option<PathBuf>,
    /// `shared 1`: other hosts use it too.
    pub shared: bool,
    /// `content-dirs`: images are in another folder than `images`.
    pub moved: bool,
}

impl Storage {
    /// The path of a volume, or the reason why it is not covered. `mine`: whether this host alone
    /// writes to a volume group.
    fn path(&self, volume: &str, mine: &dyn Fn(&VgName) -> bool) -> Result<PathBuf, String> {
        let Storage { name, kind, .. } = self;
        match kind.as_str() {
            "lvm" | "lvmthin" => {
                let name = self.vg.clone();
                let name = name.and_then(|vg| LvName::within(vg, volume).ok());
                let Some(name) = name else {
                    return Err("not the name of a logical volume".to_owned());
                };
                let vg = name.vg();
                if self.shared && !mine(vg) {
                    return Err(format!(
                        "the storage {name} is shared with other hosts, and changes by two hosts destroy its volume \
                         group: if this host alone writes to it, say shared = \"mine\" in [vg.{vg}] of the client file"
                    ));
                }
                Ok(Path::new("/dev").join(name.to_string()))
            }
            "dir" | "nfs" | "cifs" if self.moved => Err(format!(
                "the storage {name} sets content-dirs, which is not supported"
            )),
            "dir" | "nfs" | "cifs" => {
                let relative = Path::new(volume);
                let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
                match &self.path {
                    _ if volume.is_empty() || !relative.components().all(plain) => {
                        Err("not the name of a volume".to_owned())
                    }
                    Some(path) => Ok(path.join("images").join(relative)),
                    None => Err(format!("the storage {name} has no path")),
                }
            }
            _ => Err(format!(
                "the storage {name} is of type {kind}: back up the guest from inside"
            )),
        }
    }
}

/// The path of a drive's disk, or the reason why it is not covered. `mine`: whether this host alone
/// writes to a volume group.
pub fn path(
    storages: &[Storage],
    drive: &Drive,
    mine: &dyn Fn(&VgName) -> bool,
) -> Result<PathBuf, String> {
    let volume = drive.volume.as_str();
    let (path, in_folder) = if volume.starts_with('/') {
        (PathBuf::from(volume), false)
    } else {
        let (name, volume) = volume.split_once(':').ok_or("its line names no volume")?;
        let storage = storages.iter().find(|storage| storage.name == name);
        let storage = storage.ok_or_else(|| format!("storage.cfg has no storage {name}"))?;
        let path = storage.path(volume, mine)?;
        let in_folder = !path.starts_with("/dev");
        (path, in_folder)
    };
    let suffix = path.extension().and_then(|suffix| suffix.to_str());
    let format = match (&drive.format, suffix) {
        (Some(format), _) => Some(format.as_str()),
        (None, Some(suffix @ ("qcow2" | "qcow" | "vmdk" | "qed" | "subvol"))) => Some(suffix),
        (None, Some("raw")) => None,
        // Proxmox VE tells the format of a file by its suffix.
        (None, suffix) if in_folder => Some(suffix.unwrap_or("unknown")),
        _ => None,
    };
    match format.filter(|format| *format != "raw") {
        Some(format) => Err(format!("its format is {format}, not raw")),
        None => Ok(path),
    }
}

/// Parses the storages in file order. The error names the line.
pub fn parse(text: &[u8]) -> Result<Vec<Storage>, String> {
    if text.len() > MAX_BYTES {
        return Err(format!("longer than {MAX_BYTES} bytes"));
    }
    let mut storages: Vec<Storage> = Vec::new();
    for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
        let fail = |problem: &str| format!("line {}: {problem}", index + 1);
        if line.len() > MAX_LINE {
            return Err(fail("too long"));
        }
        if line.trim_ascii().is_empty() || line.trim_ascii_start().first() == Some(&b'#') {
            continue;
        }
        let line = std::str::from_utf8(line).map_err(|_| fail("not UTF-8"))?;
        if !line.starts_with([' ', '\t']) {
            let (kind, name) = line
                .split_once(':')
                .ok_or_else(|| fail("neither a storage nor indented"))?;
            let (kind, name) = (kind.trim().to_owned(), name.trim().to_owned());
            if name.is_empty() || storages.iter().any(|storage| storage.name == name) {
                return Err(fail("a storage without a name, or given twice"));
            }
            if storages.len() == MAX_STORAGES {
                return Err(fail("too many storages"));
            }
            storages.push(Storage {
                name,
                kind,
                vg: None,
                path: None,
                shared: false,
                moved: false,
            });
            continue;
        }
        let storage = storages
            .last_mut()
            .ok_or_else(|| fail("a setting before the first storage"))?;
        let line = line.trim();
        let (key, value) = line
            .split_once([' ', '\t'])
            .map_or((line, ""), |(key, value)| (key, value.trim()));
        match key {
            "vgname" => storage.vg = VgName::new(value).ok(),
            "path" if !value.starts_with('/') => return Err(fail("the path is not absolute")),
            "path" => storage.path = Some(value.into()),
            "shared" => storage.shared = boolean(value) == Some(true),
            "content-dirs" => storage.moved = true,
            _ => {}
        }
    }
    Ok(storages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_storages() {
        let text = b"# x\ndir: local\n\tpath /var/lib/vz\n\tcontent iso\n\nlvm: san\n\tvgname vg1\n\tshared 1\n\
            lvmthin: thin\n        thinpool data\n        vgname pve";
        let storages = parse(text).unwrap();
        let storage = |name: &str, kind: &str| Storage {
            name: name.to_owned(),
            kind: kind.to_owned(),
            vg: None,
            path: None,
            shared: false,
            moved: false,
        };
        assert_eq!(
            storages,
            [
                Storage {
                    path: Some("/var/lib/vz".into()),
                    ..storage("local", "dir")
                },
                Storage {
                    vg: VgName::new("vg1").ok(),
                    shared: true,
                    ..storage("san", "lvm")
                },
                Storage {
                    vg: VgName::new("pve").ok(),
                    ..storage("thin", "lvmthin")
                },
            ]
        );
    }

    #[test]
    fn test_bad_files_are_refused() {
        for text in [
            "\tpath /x",
            "dir:",
            "dir",
            "dir: a\ndir: a",
            "dir: a\n path x",
            "dir: \u{1}\n path",
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text:?}");
        }
    }

    #[test]
    fn test_paths_of_volumes() {
        let storages = parse(
            b"dir: local\n path /srv\nnfs: nfs\n path /mnt/pve/nfs\ndir: odd\n path /o\n content-dirs images=x\n\
              lvmthin: thin\n vgname pve\nlvm: san\n vgname vg1\n shared 1\nlvm: own\n vgname vg2\n shared 1\n\
              lvm: bad\n vgname ../x\nrbd: ceph\n pool p",
        )
        .unwrap();
        let cases = [
            ("thin:vm-100-disk-0,size=8G", Ok("/dev/pve/vm-100-disk-0")),
            ("thin:base-100-disk-0", Ok("/dev/pve/base-100-disk-0")),
            ("own:vm-100-disk-0", Ok("/dev/vg2/vm-100-disk-0")),
            ("/dev/vg9/data", Ok("/dev/vg9/data")),
            ("/srv/a.img", Ok("/srv/a.img")),
            ("local:100/a.raw", Ok("/srv/images/100/a.raw")),
            ("nfs:100/a.raw", Ok("/mnt/pve/nfs/images/100/a.raw")),
            ("san:vm-100-disk-0", Err("[vg.vg1]")),
            ("thin:a/b", Err("not the name of a logical volume")),
            ("thin:..", Err("not the name of a logical volume")),
            ("thin:", Err("not the name of a logical volume")),
            ("bad:x", Err("not the name of a logical volume")),
            ("own:vm-100-disk-0.qcow2", Err("its format is qcow2")),
            ("local:../a.raw", Err("not the name of a volume")),
            ("local:/etc/a.raw", Err("not the name of a volume")),
            ("local:100/../../a.raw", Err("not the name of a volume")),
            ("local:100/a.qcow2", Err("its format is qcow2")),
            ("local:100/a", Err("its format is unknown")),
            (
                "local:101/subvol-101-disk-0.subvol",
                Err("its format is subvol"),
            ),
            ("/srv/a.img,format=vmdk", Err("its format is vmdk")),
            ("/srv/a.qcow2", Err("its format is qcow2")),
            ("odd:100/a.raw", Err("content-dirs")),
            ("ceph:vm-100-disk-0", Err("of type rbd")),
            ("gone:vm-100-disk-0", Err("storage.cfg has no storage gone")),
            ("size=1G", Err("names no volume")),
            ("x", Err("names no volume")),
        ];
        for (text, expected) in cases {
            let drive = super::super::drive("scsi0", text);
            match (
                path(&storages, &drive, &|vg| vg.as_str() == "vg2"),
                expected,
            ) {
                (Ok(path), Ok(expected)) => assert_eq!(path, Path::new(expected), "{text}"),
                (Err(reason), Err(expected)) => {
                    assert!(reason.contains(expected), "{text}: {reason}");
                }
                (other, _) => panic!("{text}: {other:?}"),
            }
        }
    }
}
