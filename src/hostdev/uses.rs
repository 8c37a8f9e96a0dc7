//! Detects use of a disk by the host. A disk that a running guest has open is fine. A disk that the
//! host has mounted, swaps on, or has stacked devices on is not a guest's disk.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::error::{Code, Error, escape};

/// Maximum depth of stacked devices; no real stack has more.
const MAX_DEPTH: u32 = 8;

/// Major and minor number.
pub type Devno = (u32, u32);

/// The number of the block device at a path.
pub fn block_devno(path: &Path) -> Option<Devno> {
    let meta = fs::metadata(path).ok()?;
    meta.file_type()
        .is_block_device()
        .then(|| split(meta.rdev()))
}

/// Splits a device number from `stat`.
pub(crate) fn split(dev: u64) -> Devno {
    (rustix::fs::major(dev), rustix::fs::minor(dev))
}

/// The host's use of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostUse {
    text: String,
    drbd: bool,
}

impl HostUse {
    fn new(text: String) -> HostUse {
        HostUse { text, drbd: false }
    }

    /// A device stacked on it; `name` is for display, `uuid` that of a map.
    fn held(holder: &str, name: &str, uuid: &str) -> HostUse {
        let drbd = is_numbered(holder, "drbd");
        let kind = match uuid.split_once('-') {
            Some((kind, _)) => kind,
            None if holder.starts_with("md") => "md",
            None if drbd => "DRBD",
            None => "device",
        };
        HostUse {
            text: format!("held by {name} ({kind})"),
            drbd,
        }
    }

    /// The error for a disk in use by the host.
    pub fn error(&self, disk: impl std::fmt::Display) -> Error {
        let code = if self.drbd {
            Code::BelowDrbd
        } else {
            Code::DiskInUse
        };
        Error::new(code, format!("{disk}: {self}"))
    }
}

impl std::fmt::Display for HostUse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

/// Whether a kernel name is `word` followed by a number.
fn is_numbered(name: &str, word: &str) -> bool {
    name.strip_prefix(word)
        .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
}

/// Returns the host's use of the device; `None`: at most a guest uses it.
///
/// Checks mounts (of this process and PID 1), swap, and stacked devices: LVM, crypt, md, multipath,
/// and partition maps in use. Ignores guestsnap's own maps, and loop devices: hosts put those below
/// guest disks, and administrators inspect disks with them.
pub fn host_use(devno: Devno) -> Option<HostUse> {
    used(devno, &Tables::read(), MAX_DEPTH)
}

/// Like [`host_use`], for the volume of a container: mounts by LXC are the container's own.
pub fn host_use_beside_containers(devno: Devno) -> Option<HostUse> {
    let mut tables = Tables::read();
    tables.mounts.retain(|mount| !mount.is_container());
    used(devno, &tables, MAX_DEPTH)
}

/// Whether a kernel driver that can be frozen has a filesystem mounted on the device, in any mount
/// namespace. LVM freezes it while a snapshot is taken.
pub fn is_frozen_by_lvm(devno: Devno) -> bool {
    // ext4 serves ext3 too. btrfs follows a freeze only in recent kernels.
    let drivers = ["/sys/fs/ext4", "/sys/fs/xfs"];
    let name = fs::read_link(folder(devno)).ok();
    let name = name.as_deref().and_then(Path::file_name);
    name.is_some_and(|name| drivers.iter().any(|fs| Path::new(fs).join(name).exists()))
}

/// The host's mounts and swaps, read once.
struct Tables {
    mounts: Vec<Mount>,
    swaps: Vec<(Devno, String)>,
}

#[derive(Debug, PartialEq, Eq)]
struct Mount {
    devno: Devno,
    source: Vec<u8>,
    point: Vec<u8>,
}

impl Tables {
    fn read() -> Tables {
        // The daemon may run in its own mount namespace (systemd's PrivateTmp=).
        let mounts = ["self", "1"].into_iter().flat_map(read_mounts).collect();
        Tables {
            mounts,
            swaps: read_swaps(),
        }
    }

    fn mounted(&self, devno: Devno) -> Option<&Mount> {
        self.mounts.iter().find(|mount| mount.is_of(devno))
    }
}

impl Mount {
    /// Proxmox VE mounts containers below this folder. Those of a running one are usually in a mount
    /// namespace of their own.
    fn is_container(&self) -> bool {
        self.point.starts_with(b"/var/lib/lxc/")
    }

    fn is_of(&self, devno: Devno) -> bool {
        // btrfs mounts have anonymous device numbers; their source names the device.
        self.devno == devno
            // Outside /dev, a lookup could block on a network filesystem.
            || (self.source.starts_with(b"/dev/")
                && block_devno(Path::new(OsStr::from_bytes(&self.source))) == Some(devno))
    }
}

fn read_mounts(process: &str) -> Vec<Mount> {
    let text = fs::read(format!("/proc/{process}/mountinfo")).unwrap_or_default();
    parse_mountinfo(&text)
}

fn read_swaps() -> Vec<(Devno, String)> {
    let text = fs::read("/proc/swaps").unwrap_or_default();
    parse_swaps(&text)
        .filter_map(|path| {
            let devno = block_devno(Path::new(OsStr::from_bytes(&path)))?;
            Some((devno, escape(&path)))
        })
        .collect()
}

/// Whether the host swaps on the device.
pub(crate) fn is_swap(devno: Devno) -> bool {
    read_swaps().iter().any(|(swap, _)| *swap == devno)
}

/// Mount points of the device as seen by a process.
pub(crate) fn mount_points(pid: u32, devno: Devno) -> Vec<String> {
    read_mounts(&pid.to_string())
        .iter()
        .filter(|mount| mount.is_of(devno))
        .map(|mount| escape(&mount.point))
        .collect()
}

fn used(devno: Devno, tables: &Tables, depth: u32) -> Option<HostUse> {
    if let Some(mount) = tables.mounted(devno) {
        return Some(HostUse::new(format!("mounted on {}", escape(&mount.point))));
    }
    if let Some((_, path)) = tables.swaps.iter().find(|(swap, _)| *swap == devno) {
        return Some(HostUse::new(format!("swap ({path})")));
    }
    let depth = depth.checked_sub(1)?;
    let folder = folder(devno);
    for holder in names(&folder.join("holders")) {
        let sys = Path::new("/sys/class/block").join(&holder);
        let uuid = read_line(&sys.join("dm/uuid"));
        let name = read_line(&sys.join("dm/name"));
        if super::names::is_our_device(&name, &uuid) {
            continue;
        }
        if is_partition_map(&uuid) {
            let inner = read_devno(&sys).and_then(|inner| used(inner, tables, depth));
            if let Some(inner) = inner {
                let text = format!("{inner} (through {name})");
                return Some(HostUse { text, ..inner });
            }
            continue;
        }
        let what = if name.is_empty() { &holder } else { &name };
        return Some(HostUse::held(&holder, what, &uuid));
    }
    for (_, partition) in partitions(&folder) {
        if let Some(inner) = used(partition, tables, depth) {
            return Some(inner);
        }
    }
    None
}

/// Whether this is a partition map made by kpartx.
fn is_partition_map(uuid: &str) -> bool {
    uuid.strip_prefix("part")
        .and_then(|rest| rest.split_once('-'))
        .is_some_and(|(number, _)| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

/// Directory of a device in sysfs.
pub(crate) fn folder(devno: Devno) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", devno.0, devno.1))
}

/// Names in a directory of sysfs; empty if it does not exist.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

pub(crate) fn read_line(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&text).trim().to_owned()
}

/// Reads the device number from a device's sysfs directory.
pub(crate) fn read_devno(folder: &Path) -> Option<Devno> {
    parse_devno(&read_line(&folder.join("dev")))
}

fn parse_devno(text: &str) -> Option<Devno> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Kernel partitions of a device, by its sysfs directory.
pub(crate) fn partitions(folder: &Path) -> Vec<(String, Devno)> {
    names(folder)
        .into_iter()
        .filter(|name| folder.join(name).join("partition").exists())
        .filter_map(|name| {
            let devno = read_devno(&folder.join(&name))?;
            Some((name, devno))
        })
        .collect()
}

/// Loop devices whose backing file matches.
pub(crate) fn loops_on(is_it: impl Fn(&Path) -> bool) -> Vec<String> {
    names(Path::new("/sys/block"))
        .into_iter()
        .filter(|name| name.starts_with("loop"))
        .filter_map(|name| {
            let sys = Path::new("/sys/block").join(&name);
            let backing = fs::read(sys.join("loop/backing_file")).ok()?;
            let backing = OsStr::from_bytes(backing.trim_ascii_end());
            is_it(Path::new(backing)).then_some(name)
        })
        .collect()
}

/// `ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [FIELDS] - TYPE SOURCE SUPER`
fn parse_mountinfo(text: &[u8]) -> Vec<Mount> {
    text.split(|&b| b == b'\n')
        .filter_map(|line| {
            let fields: Vec<&[u8]> = line.split(|&b| b == b' ').collect();
            let end = fields.iter().skip(6).position(|f| *f == b"-")? + 6;
            Some(Mount {
                devno: parse_devno(std::str::from_utf8(fields.get(2)?).ok()?)?,
                point: unescape(fields.get(4)?),
                source: unescape(fields.get(end + 2)?),
            })
        })
        .collect()
}

/// File names in `/proc/swaps`, without the header line.
fn parse_swaps(text: &[u8]) -> impl Iterator<Item = Vec<u8>> + '_ {
    text.split(|&b| b == b'\n')
        .skip(1)
        .filter_map(|line| line.split(|b| b" \t".contains(b)).next())
        .filter(|name| name.starts_with(b"/"))
        .map(unescape)
}

/// Decodes `\ooo`, the kernel's escape for space, tab, newline and backslash.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', more @ ..] if first == b'\\' => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = more;
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_mountinfo_gives_number_source_and_point() {
        let text =
            b"36 35 98:0 /mnt1 /mnt\\040two rw,noatime master:1 shared:2 - ext3 /dev/root rw\n\
                     37 35 0:25 / / rw - btrfs /dev/mapper/vg0-x rw\nbroken\n";
        let mounts = parse_mountinfo(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].devno, (98, 0));
        assert_eq!(mounts[0].point, b"/mnt two");
        assert_eq!(mounts[0].source, b"/dev/root");
        assert_eq!(mounts[1].source, b"/dev/mapper/vg0-x");
        for (point, expected) in [
            ("/var/lib/lxc/101/rootfs", true),
            ("/var/lib/lxc", false),
            ("/mnt", false),
        ] {
            let line = format!("36 35 98:0 / {point} rw - ext4 /dev/dm-1 rw");
            let mounts = parse_mountinfo(line.as_bytes());
            assert_eq!(mounts[0].is_container(), expected, "{point}");
        }
    }

    #[test]
    fn test_swaps_are_read_below_the_headline() {
        let text =
            b"Filename\tType\tSize\n/dev/dm-1   partition\t1\t0\t-2\n/swap\\040file\tfile\t1\n";
        let swaps: Vec<_> = parse_swaps(text).collect();
        assert_eq!(swaps, [b"/dev/dm-1".to_vec(), b"/swap file".to_vec()]);
    }

    #[test]
    fn test_partition_maps_are_told_from_other_maps() {
        assert!(is_partition_map("part1-LVM-abc"));
        assert!(is_partition_map("part12-mpath-abc"));
        assert!(!is_partition_map("LVM-abc"));
        assert!(!is_partition_map("part-x"));
        assert!(!is_partition_map("partx-y"));
    }

    #[test]
    fn test_a_volume_below_drbd_is_nothing_to_unmount() {
        let error = HostUse::held("drbd10", "drbd10", "").error("vg0/web1");
        let text = error.report();
        assert!(text.contains("vg0/web1: held by drbd10 (DRBD)"), "{text}");
        assert!(
            text.contains("secondary") && !text.contains("unmount"),
            "{text}"
        );
        for (holder, name, uuid, expected) in [
            ("dm-3", "vg0-x", "LVM-abc", "held by vg0-x (LVM)"),
            ("md127", "md127", "", "held by md127 (md)"),
            ("bcache0", "bcache0", "", "held by bcache0 (device)"),
            ("drbdx", "drbdx", "", "held by drbdx (device)"),
        ] {
            let held = HostUse::held(holder, name, uuid);
            assert_eq!(held.to_string(), expected);
            assert_eq!(held.error("vg0/web1").code(), Code::DiskInUse);
        }
    }

    #[test]
    fn test_root_of_this_machine_is_in_use() {
        // The root may not be on a block device (a container).
        let dev = split(fs::metadata("/").unwrap().dev());
        if Path::new(&format!("/sys/dev/block/{}:{}", dev.0, dev.1)).exists() {
            let use_ = host_use(dev).unwrap();
            assert!(use_.to_string().starts_with("mounted on"));
            assert_eq!(use_.error("vg/root").code(), Code::DiskInUse);
        }
    }
}
