//! Lines: a filesystem and its mount point.

use super::source::{Source, parse_source};

/// Maximum bytes read of the file.
pub const MAX_FILE: usize = 256 << 10;

/// Maximum lines used.
pub const MAX_LINES: usize = 512;

/// Maximum length of a mount point.
const MAX_MOUNT_POINT: usize = 4096;

/// A usable line: a filesystem and its mount point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Source field.
    pub source: Source,
    /// Path from the guest's root, no slash at either end, no `.` or `..`; empty: the root.
    pub mount_point: Vec<u8>,
    /// Type field.
    pub fstype: Vec<u8>,
    /// btrfs: subvolume path without leading slash.
    pub subvolume: Option<Vec<u8>>,
    /// btrfs: subvolume id.
    pub subvolume_id: Option<u64>,
    /// Absence of the volume is expected: not needed at boot (`noauto`, `nofail`), removable media,
    /// network, or backed by a file of the guest.
    pub optional: bool,
    /// The guest may run with it unmounted (`noauto`, `nofail`, `x-systemd.automount`): other lines
    /// for its mount point take precedence, and the directory below may hold files.
    pub weak: bool,
}

impl Line {
    /// A place that the guest's definition on the host gives to a disk.
    pub(in crate::fs) fn defined(place: &[u8], disk: usize) -> Line {
        Line {
            source: Source::Defined(disk),
            mount_point: place.to_vec(),
            fstype: Vec::new(),
            subvolume: None,
            subvolume_id: None,
            optional: false,
            weak: false,
        }
    }
}

/// Returns the lines that name a disk filesystem, and a note for each unusable line.
pub fn parse(bytes: &[u8]) -> (Vec<Line>, Vec<String>) {
    let mut lines = Vec::new();
    let mut remarks = Vec::new();
    let bytes = if bytes.len() > MAX_FILE {
        remarks.push("fstab is very long: only its start is used".to_owned());
        &bytes[..MAX_FILE]
    } else {
        bytes
    };
    for (number, text) in bytes.split(|&b| b == b'\n').enumerate() {
        if lines.len() == MAX_LINES {
            remarks.push(format!(
                "fstab has more than {MAX_LINES} lines: the rest is not used"
            ));
            break;
        }
        match parse_line(text) {
            Ok(Some(line)) => lines.push(line),
            Ok(None) => {}
            Err(why) => remarks.push(format!("fstab line {} is not used: {why}", number + 1)),
        }
    }
    remarks.truncate(20);
    (lines, remarks)
}

/// Filesystem types that are not on a guest disk.
fn is_elsewhere(fstype: &[u8]) -> bool {
    const NO_DISK: &[&[u8]] = &[
        b"swap",
        b"none",
        b"ignore",
        b"proc",
        b"sysfs",
        b"tmpfs",
        b"devpts",
        b"devtmpfs",
        b"nfs",
        b"nfs4",
        b"cifs",
        b"smb3",
        b"overlay",
        b"cgroup",
        b"cgroup2",
        b"debugfs",
        b"tracefs",
        b"securityfs",
        b"hugetlbfs",
        b"mqueue",
        b"ramfs",
        b"glusterfs",
        b"ceph",
        b"9p",
        b"virtiofs",
        b"autofs",
        b"efivarfs",
        b"configfs",
        b"binfmt_misc",
        b"usbfs",
        b"rpc_pipefs",
        b"smbfs",
        b"ncpfs",
        b"afs",
        b"coda",
        b"davfs",
        b"lustre",
        b"beegfs",
        b"orangefs",
        b"pvfs2",
        b"vboxsf",
        b"vmhgfs",
        b"aufs",
        b"pstore",
        b"bpf",
        b"cpuset",
        b"devfs",
        b"usbdevfs",
        b"selinuxfs",
        b"nfsd",
        b"xenfs",
    ];
    NO_DISK.contains(&fstype) || fstype.starts_with(b"fuse")
}

fn parse_line(text: &[u8]) -> Result<Option<Line>, &'static str> {
    let mut fields = text
        .split(|b| matches!(b, b' ' | b'\t' | b'\r'))
        .filter(|f| !f.is_empty());
    let Some(source) = fields.next() else {
        return Ok(None);
    };
    if source.starts_with(b"#") {
        return Ok(None);
    }
    let mount_point = unescape(fields.next().ok_or("no mount point")?);
    let fstype = fields.next().ok_or("no type")?.to_vec();
    let options: Vec<&[u8]> = fields
        .next()
        .unwrap_or_default()
        .split(|&b| b == b',')
        .collect();
    if is_elsewhere(&fstype) || mount_point == b"none" || mount_point == b"swap" {
        return Ok(None);
    }
    // A second view of a directory: its files are saved at their original place.
    if options.iter().any(|o| matches!(*o, b"bind" | b"rbind")) {
        return Ok(None);
    }
    let value_of = |key: &[u8]| options.iter().find_map(|o| o.strip_prefix(key));
    let subvolume = match value_of(b"subvol=") {
        Some(path) => Some(clean(&unescape(path)).ok_or("a subvolume path with dots")?),
        None => None,
    };
    let subvolume_id = match value_of(b"subvolid=") {
        Some(digits) => Some(number(digits).ok_or("a subvolume number that is none")?),
        None => None,
    };
    if !mount_point.starts_with(b"/") {
        return Err("the mount point is not a path");
    }
    if mount_point.len() > MAX_MOUNT_POINT {
        return Err("the mount point is too long");
    }
    let source = parse_source(&unescape(source));
    let optional = options.iter().any(|o| {
        matches!(
            *o,
            b"noauto" | b"nofail" | b"nobootwait" | b"_netdev" | b"loop"
        ) || o.starts_with(b"loop=")
    });
    let weak = options.iter().any(|o| {
        matches!(
            *o,
            b"noauto" | b"nofail" | b"x-systemd.automount" | b"comment=systemd.automount"
        )
    });
    Ok(Some(Line {
        weak,
        mount_point: clean(&mount_point).ok_or("the mount point has dots in it")?,
        subvolume,
        subvolume_id,
        optional: optional || is_removable(&source, &fstype) || is_no_disk(&source, &fstype),
        source,
        fstype,
    }))
}

/// Whether a line describes an optical drive, a floppy, or similar.
fn is_removable(source: &Source, fstype: &[u8]) -> bool {
    const DRIVES: [&[u8]; 9] = [
        b"cdrom", b"cdrw", b"dvd", b"sr", b"scd", b"fd", b"floppy", b"loop", b"ram",
    ];
    let of_discs = |kind: &[u8]| matches!(kind, b"iso9660" | b"udf");
    // Prefixes such as `cdrom1`, `dvdrw`, `fd0`; no disk name begins so.
    let drive = match source {
        Source::Device(name) => DRIVES.iter().any(|drive| name.starts_with(drive)),
        _ => false,
    };
    drive || fstype.split(|&b| b == b',').any(of_discs)
}

/// Whether a source is not a device: another host, a file or a keyword.
fn is_no_disk(source: &Source, fstype: &[u8]) -> bool {
    match source {
        // ZFS names pools without a device.
        Source::Other(text) => !text.starts_with(b"/dev/") && fstype != b"zfs",
        _ => false,
    }
}

/// Decodes octal escapes such as `\040`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        if let (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..]) =
            (first, tail)
        {
            out.push((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'));
            rest = tail;
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    out
}

/// Removes duplicate slashes and those at the ends; `None` with `..`, `.` or NUL.
fn clean(path: &[u8]) -> Option<Vec<u8>> {
    let mut out: Vec<u8> = Vec::with_capacity(path.len());
    for part in path.split(|&b| b == b'/').filter(|p| !p.is_empty()) {
        if part == b"." || part == b".." || part.contains(&0) {
            return None;
        }
        if !out.is_empty() {
            out.push(b'/');
        }
        out.extend_from_slice(part);
    }
    Some(out)
}

fn number(digits: &[u8]) -> Option<u64> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_what_is_not_on_a_disk_is_passed_over() {
        let text = "\
            tmpfs /tmp tmpfs defaults 0 0\n\
            server:/export /mnt nfs ro\n\
            /dev/sda2 none swap sw\n\
            /dev/sda3 swap swap sw\n\
            /srv/data /home none bind\n\
            /srv/data /home ext4 rw,bind\n\
            \n   \n";
        assert_eq!(parse(text.as_bytes()), (vec![], vec![]));
    }

    #[test]
    fn test_lines_whose_volume_may_be_missing() {
        let optional = |text: &str| {
            let (lines, remarks) = parse(text.as_bytes());
            assert!(lines.len() == 1 && remarks.is_empty(), "{text}");
            lines[0].optional
        };
        for yes in [
            "/dev/sda3 /a ext4 noauto",
            "UUID=1 /a ext4 defaults,nofail",
            "UUID=1 /a ext4 nobootwait",
            "/dev/sdz1 /iscsi ext4 _netdev",
            "/dev/sr0 /media/cdrom0 udf,iso9660 user",
            "/dev/cdrom /mnt/cdrom auto ro",
            "/dev/hdc /mnt/cdrom iso9660 ro",
            "/dev/fd0 /media/floppy0 auto rw",
            "/srv/disc.img /mnt/disc ext4 loop",
            "/srv/disc.img /mnt/disc squashfs ro",
            "server:/export /mnt auto ro",
            "//server/share /mnt auto ro",
        ] {
            assert!(optional(yes), "{yes}");
        }
        for no in [
            "/dev/sda3 /a ext4 defaults",
            "UUID=1 /a auto",
            "LABEL=cdrom /a ext4",
            "/dev/vg/root /a xfs",
            "/dev/disk/by-id/scsi-1-part1 /a ext4",
            "tank/data /a zfs defaults",
            "/dev/md0 /a ext4",
        ] {
            assert!(!optional(no), "{no}");
        }
    }

    #[test]
    fn test_bad_lines_are_remarked_and_not_used() {
        let text = "\
            /dev/sda1\n\
            /dev/sda1 /\n\
            /dev/sda1 relative ext4\n\
            /dev/sda1 /../../etc ext4\n\
            /dev/sda1 /a\\000b ext4\n\
            /dev/sda1 /a btrfs subvol=../x\n\
            /dev/sda1 /a btrfs subvolid=many\n";
        let (lines, remarks) = parse(text.as_bytes());
        assert!(lines.is_empty());
        assert_eq!(remarks.len(), 7, "{remarks:?}");
    }

    #[test]
    fn test_bounds_hold() {
        let many = "/dev/sda1 /a ext4\n".repeat(100_000);
        let (lines, remarks) = parse(many.as_bytes());
        assert_eq!(lines.len(), MAX_LINES);
        assert_eq!(remarks.len(), 2);
        let bad = "x\n".repeat(10_000);
        assert_eq!(parse(bad.as_bytes()).1.len(), 20);
    }

    #[test]
    fn test_subvolumes_and_mount_points_are_cleaned() {
        let text = "/dev/sda1 //home// btrfs rw,subvol=/@home,subvolid=258\n";
        let line = &parse(text.as_bytes()).0[0];
        assert_eq!(line.mount_point, b"home");
        assert_eq!(line.subvolume.as_deref(), Some(&b"@home"[..]));
        assert_eq!(line.subvolume_id, Some(258));
    }

    #[test]
    fn test_any_bytes_are_survived() {
        const PIECES: &[&[u8]] = &[
            b"/dev/",
            b"UUID=",
            b"LABEL=\"",
            b"\"",
            b"\\04",
            b"\\377",
            b"\\x2",
            b"\\",
            b"/",
            b"..",
            b".",
            b" ",
            b"\t",
            b"\n",
            b"#",
            b"subvol=",
            b"subvolid=",
            b",",
            b"disk/by-label/",
            b"mapper/",
            b"a",
            b"\xff",
            b"\0",
            b"9",
            b"ext4",
            b"swap",
        ];
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..20_000 {
            let mut text = Vec::new();
            for _ in 0..40 {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let pick = usize::from(random.to_le_bytes()[4]);
                text.extend_from_slice(PIECES[pick % PIECES.len()]);
            }
            for line in parse(&text).0 {
                let point = &line.mount_point;
                assert!(!point.starts_with(b"/") && !point.ends_with(b"/"));
                assert!(
                    point.is_empty()
                        || point.split(|&b| b == b'/').all(|p| {
                            !p.is_empty() && p != b"." && p != b".." && !p.contains(&0)
                        })
                );
                let _ = line.source.to_string();
            }
        }
    }
}
