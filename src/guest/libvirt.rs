//! libvirt's XML: a guest's name and disks, and the storage pools that disks may be in.

use std::path::{Path, PathBuf};

use roxmltree::{Document, Node, ParsingOptions};

use super::definition::{DefinedDisk, Definition, MAX_DISKS, device_name};
use crate::error::escape;

/// Maximum XML nodes; more than any domain definition has.
const MAX_NODES: u32 = 100_000;

/// Parses XML within bounds.
fn document(text: &[u8]) -> Result<Document<'_>, String> {
    let text = std::str::from_utf8(text)
        .map_err(|error| format!("not UTF-8 at byte {}", error.valid_up_to() + 1))?;
    // Entities could expand without bound; libvirt writes none.
    let options = ParsingOptions {
        allow_dtd: false,
        nodes_limit: MAX_NODES,
        ..ParsingOptions::default()
    };
    Document::parse_with_options(text, options).map_err(|error| {
        let place = error.pos();
        format!("line {}, column {}: {error}", place.row, place.col)
    })
}

/// A storage pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// The pool's name.
    pub name: String,
    /// Where its volumes are.
    pub volumes: Volumes,
}

/// The place of a pool's volumes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Volumes {
    /// Logical volumes of this group.
    Group(String),
    /// Files directly in this folder.
    Folder(PathBuf),
    /// Volumes that are not covered; the pool's type.
    Other(String),
}

impl Pool {
    /// The path of a volume; an error if a volume of this pool cannot have this name.
    pub fn path(&self, volume: &str) -> Result<PathBuf, String> {
        // Names of volumes are file names and LVM's names, never paths.
        if volume.is_empty() || matches!(volume, "." | "..") || volume.contains(['/', '\0']) {
            return Err("that is not the name of a volume".to_owned());
        }
        match &self.volumes {
            Volumes::Group(group) => Ok(Path::new("/dev").join(group).join(volume)),
            Volumes::Folder(folder) => Ok(folder.join(volume)),
            Volumes::Other(kind) => Err(format!("the pool is of type {kind}")),
        }
    }
}

/// Parses a storage pool. The error names line and column.
pub fn parse_pool(text: &[u8]) -> Result<Pool, String> {
    let document = document(text)?;
    let pool = document.root_element();
    let fail = |problem: &str| {
        let place = document.text_pos_at(pool.range().start);
        Err(format!(
            "line {}, column {}: {problem}",
            place.row, place.col
        ))
    };
    if !pool.has_tag_name("pool") {
        return fail("this is no <pool>");
    }
    let text = |node: Option<Node<'_, '_>>| {
        let text = node.and_then(|node| node.text()).unwrap_or_default();
        text.trim().to_owned()
    };
    let name = text(child(pool, "name"));
    if name.is_empty() {
        return fail("the <pool> has no <name>");
    }
    let volumes = match pool.attribute("type").unwrap_or_default() {
        "logical" => {
            // libvirt takes the pool's own name for a group that is not named.
            let group = text(child(pool, "source").and_then(|source| child(source, "name")));
            let group = if group.is_empty() {
                name.clone()
            } else {
                group
            };
            if matches!(group.as_str(), "." | "..") || group.contains('/') {
                return fail("the <source> of the <pool> is not the name of a volume group");
            }
            Volumes::Group(group)
        }
        // All three are folders of files; the latter two are mounted there by libvirt.
        "dir" | "fs" | "netfs" => {
            let path = text(child(pool, "target").and_then(|target| child(target, "path")));
            let good = |path: &Path| {
                use std::path::Component::{Normal, RootDir};
                path.is_absolute() && path.components().all(|c| matches!(c, Normal(_) | RootDir))
            };
            if !good(Path::new(&path)) {
                return fail("the <target> of the <pool> has no absolute <path>");
            }
            Volumes::Folder(path.into())
        }
        other => Volumes::Other(other.to_owned()),
    };
    Ok(Pool { name, volumes })
}

/// Parses a guest's name and disks. The error names line and column.
pub fn parse(text: &[u8]) -> Result<Definition, String> {
    let document = document(text)?;
    let domain = document.root_element();
    let fail = |node: Node<'_, '_>, problem: &str| {
        let place = document.text_pos_at(node.range().start);
        Err(format!(
            "line {}, column {}: {problem}",
            place.row, place.col
        ))
    };
    if !domain.has_tag_name("domain") {
        return fail(domain, "this is no <domain>");
    }
    let name = match child(domain, "name").and_then(|name| name.text()) {
        Some(name) => name.trim().to_owned(),
        None => return fail(domain, "the <domain> has no <name>"),
    };
    let mut disks = Vec::new();
    for devices in children(domain, "devices") {
        for disk in children(devices, "disk") {
            if disks.len() == MAX_DISKS {
                return fail(disk, "too many disks");
            }
            let target = child(disk, "target").and_then(|target| target.attribute("dev"));
            disks.push((target.and_then(device_name), parse_disk(disk)));
        }
    }
    Ok(Definition { name, disks })
}

fn children<'a, 'b>(node: Node<'a, 'b>, name: &'static str) -> impl Iterator<Item = Node<'a, 'b>> {
    node.children()
        .filter(move |child| child.has_tag_name(name))
}

fn child<'a, 'b>(node: Node<'a, 'b>, name: &'static str) -> Option<Node<'a, 'b>> {
    children(node, name).next()
}

fn parse_disk(disk: Node<'_, '_>) -> DefinedDisk {
    let source = child(disk, "source");
    let attribute = |name| {
        source
            .and_then(|source| source.attribute(name))
            .unwrap_or("")
    };
    let target = child(disk, "target")
        .and_then(|target| target.attribute("dev"))
        .unwrap_or("?");
    let kind = disk.attribute("type").unwrap_or("file");
    let path = match kind {
        "block" => attribute("dev"),
        "file" => attribute("file"),
        _ => "",
    };
    let (pool, volume) = (attribute("pool"), attribute("volume"));
    let what = if kind == "volume" {
        format!("{target}, volume {volume} of the storage pool {pool}")
    } else if path.is_empty() {
        target.to_owned()
    } else {
        format!("{target} {path}")
    };
    let what = what.as_bytes();
    match disk.attribute("device").unwrap_or("disk") {
        "cdrom" => return DefinedDisk::removable(what, "CD"),
        "floppy" => return DefinedDisk::removable(what, "floppy"),
        "disk" | "lun" => {}
        other => return DefinedDisk::uncovered(what, format!("a device of type {other}")),
    }
    match kind {
        "block" | "file" | "volume" => {}
        "network" => {
            let protocol = attribute("protocol");
            return DefinedDisk::uncovered(what, format!("on the network ({protocol})"));
        }
        other => return DefinedDisk::uncovered(what, format!("a disk of type {other}")),
    }
    let format = child(disk, "driver")
        .and_then(|driver| driver.attribute("type"))
        .unwrap_or("raw");
    if !matches!(format, "raw" | "aio") {
        return DefinedDisk::uncovered(what, format!("an image in the format {format}"));
    }
    if source.is_some_and(|source| child(source, "slices").is_some()) {
        return DefinedDisk::uncovered(what, "a slice of a larger image");
    }
    if kind == "volume" {
        return DefinedDisk::InPool {
            pool: pool.to_owned(),
            volume: volume.to_owned(),
            what: escape(what),
        };
    }
    match Path::new(path).is_absolute() {
        true => DefinedDisk::Raw(path.into()),
        false if path.is_empty() => DefinedDisk::uncovered(what, "it has no source"),
        false => DefinedDisk::uncovered(what, "its path is not absolute"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Absence;

    fn picture(disk: &DefinedDisk) -> String {
        match disk {
            DefinedDisk::Raw(path) => path.display().to_string(),
            DefinedDisk::InPool { pool, volume, .. } => format!("{volume} in {pool}"),
            DefinedDisk::Uncovered(d) if d.absence == Absence::NoDisk => format!("({})", d.reason),
            DefinedDisk::Uncovered(d) => format!("! {}: {}", d.what, d.reason),
        }
    }

    #[test]
    fn test_disks() {
        let cases = [
            (
                "<disk type='block' device='disk'><driver name='qemu' type='raw' cache='none'/>\
                 <source dev='/dev/vg0/web1'/><target dev='vda' bus='virtio'/></disk>",
                "/dev/vg0/web1",
            ),
            (
                "<disk type='block'><source dev='/dev/vg0/a'/><target dev='vda'/></disk>",
                "/dev/vg0/a",
            ),
            (
                "<disk type='block' device='lun'><source dev='/dev/vg0/a'/></disk>",
                "/dev/vg0/a",
            ),
            (
                "<disk type='file'><driver type='raw'/><source file='/srv/a &amp; b.img'/></disk>",
                "/srv/a & b.img",
            ),
            (
                "<disk type='file'><driver type='qcow2'/><source file='/srv/a.q'/><target dev='vda'/></disk>",
                "! vda /srv/a.q: an image in the format qcow2",
            ),
            (
                "<disk type='file' device='cdrom'><target dev='hda'/></disk>",
                "(a CD drive)",
            ),
            ("<disk type='file' device='floppy'/>", "(a floppy drive)"),
            (
                "<disk type='network'><source protocol='rbd' name='p/i'/><target dev='vda'/></disk>",
                "! vda: on the network (rbd)",
            ),
            (
                "<disk type='volume'><source pool='p' volume='v'/><target dev='vda'/></disk>",
                "v in p",
            ),
            (
                "<disk type='volume' device='cdrom'><source pool='p' volume='v'/></disk>",
                "(a CD drive)",
            ),
            (
                "<disk type='volume'><driver type='qcow2'/><source pool='p' volume='v'/>\
                 <target dev='vda'/></disk>",
                "! vda, volume v of the storage pool p: an image in the format qcow2",
            ),
            (
                "<disk type='nvme'><target dev='vda'/></disk>",
                "! vda: a disk of type nvme",
            ),
            (
                "<disk type='block'><target dev='vda'/></disk>",
                "! vda: it has no source",
            ),
            (
                "<disk type='file'><source file='a.img'/><target dev='vda'/></disk>",
                "! vda a.img: its path is not absolute",
            ),
            (
                "<disk type='file'><source file='/a'><slices><slice type='storage' offset='1' size='2'/></slices>\
                 </source><target dev='vda'/></disk>",
                "! vda /a: a slice of a larger image",
            ),
        ];
        for (disk, expected) in cases {
            let text = format!(
                "<?xml version='1.0' encoding='utf-8'?><!--\nWARNING: THIS IS AN AUTO-GENERATED FILE\n-->\n\
                 <domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\
                 <name>web1</name><devices><emulator/>{disk}</devices></domain>"
            );
            let definition = parse(text.as_bytes()).unwrap();
            assert_eq!(definition.name, "web1");
            let found: Vec<String> = definition.disks.iter().map(|(_, d)| picture(d)).collect();
            assert_eq!(found, [expected], "{disk}");
        }
    }

    #[test]
    fn test_pools() {
        let path = |text: &str| {
            let path = parse_pool(text.as_bytes()).unwrap().path("web1");
            path.map(|path| path.display().to_string())
        };
        let lvm = "<pool type='logical'><name>p</name><source><device path='/dev/sda'/><name>vg0</name>\
             <format type='lvm2'/></source><target><path>/dev/vg0</path></target></pool>";
        assert_eq!(path(lvm).unwrap(), "/dev/vg0/web1");
        let unnamed = "<pool type='logical'><name>vg1</name></pool>";
        assert_eq!(path(unnamed).unwrap(), "/dev/vg1/web1");
        for kind in ["dir", "fs", "netfs"] {
            let text = format!(
                "<!--\nWARNING\n--><pool type='{kind}'><name>d</name><target>\
                 <path>/srv/a &amp; b</path></target></pool>"
            );
            assert_eq!(path(&text).unwrap(), "/srv/a & b/web1");
        }
        for kind in ["rbd", "iscsi", "zfs", "disk", "scsi", "new"] {
            let text = format!("<pool type='{kind}'><name>x</name></pool>");
            assert_eq!(
                path(&text).unwrap_err(),
                format!("the pool is of type {kind}")
            );
        }
        let pool = parse_pool(lvm.as_bytes()).unwrap();
        for bad in ["", ".", "..", "a/b", "/etc/passwd", "../x"] {
            assert!(pool.path(bad).is_err(), "{bad}");
        }
        let cases = [
            ("<domain/>", "this is no <pool>"),
            ("<pool type='dir'/>", "has no <name>"),
            (
                "<pool type='dir'><name>d</name></pool>",
                "no absolute <path>",
            ),
            (
                "<pool type='dir'><name>d</name><target><path>/srv/../etc</path></target></pool>",
                "no absolute <path>",
            ),
            (
                "<pool type='logical'><name>p</name><source><name>../sda</name></source></pool>",
                "not the name of a volume group",
            ),
            ("<!DOCTYPE x [<!ENTITY a 'b'>]><pool/>", "line 1, column 1"),
        ];
        for (text, expected) in cases {
            let error = parse_pool(text.as_bytes()).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn test_bad_files() {
        let deep = [b"<domain>".as_slice(), &b"<a>".repeat(300_000)].concat();
        let cases: &[(&[u8], &str)] = &[
            (b"", "line 1, column 1"),
            (b"<domain>", "line 1, column "),
            (b"<network/>", "this is no <domain>"),
            (
                b"\n<domain><devices/></domain>",
                "line 2, column 1: the <domain> has no <name>",
            ),
            (b"<domain>\xff</domain>", "not UTF-8 at byte 9"),
            (
                b"<!DOCTYPE x [<!ENTITY a 'b'>]><domain><name>&a;</name></domain>",
                "line 1, column 1",
            ),
            (&deep, "line 1"),
        ];
        for (text, expected) in cases {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
