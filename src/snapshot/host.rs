//! Whether this host itself uses a disk. A disk that a running guest has open is fine; one that
//! the host has mounted, swaps on, or built something of is not a guest's disk.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::error::escape;

/// A device on top of a device on top of … ; more than any real stack has.
const MAX_DEPTH: u32 = 8;

/// Major and minor number.
pub type Devno = (u32, u32);

/// The number of the block device a path leads to.
pub fn block_devno(path: &Path) -> Option<Devno> {
    let meta = fs::metadata(path).ok()?;
    meta.file_type()
        .is_block_device()
        .then(|| split(meta.rdev()))
}

/// Splits a device number as `stat` gives it.
pub(super) fn split(dev: u64) -> Devno {
    (rustix::fs::major(dev), rustix::fs::minor(dev))
}

/// Who on this host uses the device, in words; `None`: nobody but maybe a guest.
///
/// Looks at mounts (of this process and of PID 1), swap, and what stands on the device: LVM,
/// crypt, md, multipath, or a partition map if that is used itself. Maps of our own do not count,
/// nor do loop devices: hosts put them below guests' disks, and admins use them to look into one.
pub fn host_use(devno: Devno) -> Option<String> {
    used(devno, &Tables::read(), MAX_DEPTH)
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
        // The daemon may run in a mount namespace of its own (systemd's PrivateTmp=).
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
    fn is_of(&self, devno: Devno) -> bool {
        // btrfs mounts have numbers of their own; their source tells the device.
        self.devno == devno
            // Elsewhere than below /dev a look could wait for a network filesystem.
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
pub(super) fn is_swap(devno: Devno) -> bool {
    read_swaps().iter().any(|(swap, _)| *swap == devno)
}

/// Where a process sees the device mounted.
pub(super) fn mount_points(pid: u32, devno: Devno) -> Vec<String> {
    read_mounts(&pid.to_string())
        .iter()
        .filter(|mount| mount.is_of(devno))
        .map(|mount| escape(&mount.point))
        .collect()
}

fn used(devno: Devno, tables: &Tables, depth: u32) -> Option<String> {
    if let Some(mount) = tables.mounted(devno) {
        return Some(format!("mounted on {}", escape(&mount.point)));
    }
    if let Some((_, path)) = tables.swaps.iter().find(|(swap, _)| *swap == devno) {
        return Some(format!("swap ({path})"));
    }
    let depth = depth.checked_sub(1)?;
    let folder = PathBuf::from(format!("/sys/dev/block/{}:{}", devno.0, devno.1));
    for holder in names(&folder.join("holders")) {
        let sys = Path::new("/sys/class/block").join(&holder);
        let uuid = read_line(&sys.join("dm/uuid"));
        let name = read_line(&sys.join("dm/name"));
        if uuid.starts_with(super::names::DM_UUID_PREFIX) {
            continue;
        }
        if is_partition_map(&uuid) {
            let inner = read_devno(&sys).and_then(|inner| used(inner, tables, depth));
            if let Some(inner) = inner {
                return Some(format!("{inner} (through {name})"));
            }
            continue;
        }
        let what = if name.is_empty() { &holder } else { &name };
        let kind = match uuid.split_once('-') {
            Some((kind, _)) => kind,
            None if holder.starts_with("md") => "md",
            None => "device",
        };
        return Some(format!("held by {what} ({kind})"));
    }
    for (_, partition) in partitions(&folder) {
        if let Some(inner) = used(partition, tables, depth) {
            return Some(inner);
        }
    }
    None
}

/// Maps that kpartx makes for the partitions of a disk.
fn is_partition_map(uuid: &str) -> bool {
    uuid.strip_prefix("part")
        .and_then(|rest| rest.split_once('-'))
        .is_some_and(|(number, _)| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

/// Names in a folder of sysfs; none when it does not exist.
pub(super) fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

pub(super) fn read_line(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&text).trim().to_owned()
}

/// The device number in a device's folder of sysfs.
pub(super) fn read_devno(folder: &Path) -> Option<Devno> {
    parse_devno(&read_line(&folder.join("dev")))
}

fn parse_devno(text: &str) -> Option<Devno> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The kernel's partitions of a device, by its folder in sysfs.
pub(super) fn partitions(folder: &Path) -> Vec<(String, Devno)> {
    names(folder)
        .into_iter()
        .filter(|name| folder.join(name).join("partition").exists())
        .filter_map(|name| {
            let devno = read_devno(&folder.join(&name))?;
            Some((name, devno))
        })
        .collect()
}

/// Loop devices whose backing file is this one.
pub(super) fn loops_on(is_it: impl Fn(&Path) -> bool) -> Vec<String> {
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

/// The file names of `/proc/swaps`, below its headline.
fn parse_swaps(text: &[u8]) -> impl Iterator<Item = Vec<u8>> + '_ {
    text.split(|&b| b == b'\n')
        .skip(1)
        .filter_map(|line| line.split(|b| b" \t".contains(b)).next())
        .filter(|name| name.starts_with(b"/"))
        .map(unescape)
}

/// The kernel writes space, tab, newline and backslash as `\ooo`.
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
    fn test_root_of_this_machine_is_in_use() {
        // The root may be no block device (a container); then there is nothing to ask.
        let dev = split(fs::metadata("/").unwrap().dev());
        if Path::new(&format!("/sys/dev/block/{}:{}", dev.0, dev.1)).exists() {
            assert!(host_use(dev).unwrap().starts_with("mounted on"));
        }
    }
}
