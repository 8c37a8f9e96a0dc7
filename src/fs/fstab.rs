//! The guest's `/etc/fstab`: a bounded parser over bytes, and which volume a line means.

use super::probe::Filesystem;
use super::tree::VolumeIdentity;
use crate::error::escape;

/// Longest file that is read.
pub const MAX_FILE: usize = 256 << 10;

/// Most lines that are used.
pub const MAX_LINES: usize = 512;

/// Longest mount point.
const MAX_MOUNT_POINT: usize = 4096;

/// One usable line: where which filesystem goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The first field.
    pub source: Source,
    /// Path from the guest's root, no slashes at the ends, no `.` or `..`; empty: the root.
    pub mount_point: Vec<u8>,
    /// The type field.
    pub fstype: Vec<u8>,
    /// btrfs: the subvolume by path, no slash at the start.
    pub subvolume: Option<Vec<u8>>,
    /// btrfs: the subvolume by number.
    pub subvolume_id: Option<u64>,
    /// Nobody wonders if its volume is not there: it is not needed at boot (`noauto`, `nofail`), on
    /// removable media, reached over the network, or in a file of the guest.
    pub optional: bool,
}

/// The first field of a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// `UUID=` or `/dev/disk/by-uuid/`.
    Uuid(Vec<u8>),
    /// `LABEL=` or `/dev/disk/by-label/`.
    Label(Vec<u8>),
    /// `PARTUUID=` or `/dev/disk/by-partuuid/`.
    PartUuid(Vec<u8>),
    /// `PARTLABEL=` or `/dev/disk/by-partlabel/`.
    PartLabel(Vec<u8>),
    /// `/dev/VG/LV`.
    Lv(Vec<u8>, Vec<u8>),
    /// `/dev/mapper/NAME`.
    Mapper(Vec<u8>),
    /// `/dev/NAME`.
    Device(Vec<u8>),
    /// Anything else.
    Other(Vec<u8>),
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::Uuid(v) => write!(f, "UUID={}", escape(v)),
            Source::Label(v) => write!(f, "LABEL={}", escape(v)),
            Source::PartUuid(v) => write!(f, "PARTUUID={}", escape(v)),
            Source::PartLabel(v) => write!(f, "PARTLABEL={}", escape(v)),
            Source::Lv(vg, lv) => write!(f, "/dev/{}/{}", escape(vg), escape(lv)),
            Source::Mapper(name) => write!(f, "/dev/mapper/{}", escape(name)),
            Source::Device(name) => write!(f, "/dev/{}", escape(name)),
            Source::Other(text) => f.write_str(&escape(text)),
        }
    }
}

/// The lines that name a filesystem on a disk, and a remark for each that looked like one but is
/// not used.
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

/// Types that are not on a disk of the guest.
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
    // A directory seen twice: its files are saved where they are.
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
    Ok(Some(Line {
        mount_point: clean(&mount_point).ok_or("the mount point has dots in it")?,
        subvolume,
        subvolume_id,
        optional: optional || is_removable(&source, &fstype) || is_no_disk(&source, &fstype),
        source,
        fstype,
    }))
}

/// Whether a line is about a disc, a floppy, or the like.
fn is_removable(source: &Source, fstype: &[u8]) -> bool {
    const DRIVES: [&[u8]; 9] = [
        b"cdrom", b"cdrw", b"dvd", b"sr", b"scd", b"fd", b"floppy", b"loop", b"ram",
    ];
    let of_discs = |kind: &[u8]| matches!(kind, b"iso9660" | b"udf");
    // `cdrom1`, `dvdrw`, `fd0`: nothing that a disk is called begins so.
    let drive = match source {
        Source::Device(name) => DRIVES.iter().any(|drive| name.starts_with(drive)),
        _ => false,
    };
    drive || fstype.split(|&b| b == b',').any(of_discs)
}

/// Whether a source is no device: another host, a file or a word.
fn is_no_disk(source: &Source, fstype: &[u8]) -> bool {
    match source {
        // A ZFS names its pools without a device.
        Source::Other(text) => {
            !text.starts_with(b"/dev/") && !text.starts_with(b"ID=") && fstype != b"zfs"
        }
        _ => false,
    }
}

/// `\040` and the like.
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

/// Without slashes at the ends and doubled ones; `None` with `..`, `.` or NUL.
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

/// How a source starts, and what it is then.
type Prefix = (&'static [u8], fn(Vec<u8>) -> Source);

fn parse_source(source: &[u8]) -> Source {
    let unquote = |value: &[u8]| {
        let inner = value
            .strip_prefix(b"\"")
            .and_then(|v| v.strip_suffix(b"\""));
        inner.unwrap_or(value).to_vec()
    };
    let prefixes: [Prefix; 4] = [
        (b"UUID=", Source::Uuid),
        (b"LABEL=", Source::Label),
        (b"PARTUUID=", Source::PartUuid),
        (b"PARTLABEL=", Source::PartLabel),
    ];
    for (prefix, make) in prefixes {
        if let Some(value) = source.strip_prefix(prefix) {
            return make(unquote(value));
        }
    }
    let links: [Prefix; 5] = [
        (b"/dev/disk/by-uuid/", Source::Uuid),
        (b"/dev/disk/by-label/", Source::Label),
        (b"/dev/disk/by-partuuid/", Source::PartUuid),
        (b"/dev/disk/by-partlabel/", Source::PartLabel),
        (b"/dev/disk/by-id/dm-name-", Source::Mapper),
    ];
    for (prefix, make) in links {
        if let Some(value) = source.strip_prefix(prefix) {
            return make(udev_unescape(value));
        }
    }
    if let Some(name) = source.strip_prefix(b"/dev/mapper/") {
        return Source::Mapper(name.to_vec());
    }
    let parts: Vec<&[u8]> = match source.strip_prefix(b"/dev/") {
        Some(rest) => rest.split(|&b| b == b'/').collect(),
        None => Vec::new(),
    };
    match parts.as_slice() {
        [name] if !name.is_empty() => Source::Device(name.to_vec()),
        [b"disk" | b"mapper", ..] => Source::Other(source.to_vec()),
        [vg, lv] if !vg.is_empty() && !lv.is_empty() => Source::Lv(vg.to_vec(), lv.to_vec()),
        _ => Source::Other(source.to_vec()),
    }
}

/// udev writes unusual bytes in link names as `\xNN`.
fn udev_unescape(name: &[u8]) -> Vec<u8> {
    let hex = |b: u8| {
        char::from(b)
            .to_digit(16)
            .and_then(|d| u8::try_from(d).ok())
    };
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let [first, tail @ ..] = rest {
        if let (b'\\', [b'x', high, low, after @ ..]) = (first, tail) {
            if let (Some(high), Some(low)) = (hex(*high), hex(*low)) {
                out.push(high * 16 + low);
                rest = after;
                continue;
            }
        }
        out.push(*first);
        rest = tail;
    }
    out
}

/// Whether a line's source means this volume.
pub fn matches(source: &Source, volume: &VolumeIdentity, filesystem: &Filesystem) -> bool {
    let same_text = |wanted: &[u8], found: Option<&str>| {
        found.is_some_and(|f| wanted.eq_ignore_ascii_case(f.as_bytes()))
    };
    match source {
        Source::Uuid(uuid) => same_text(uuid, filesystem.uuid.as_deref()),
        Source::Label(label) => filesystem.label.as_ref() == Some(label),
        Source::PartUuid(uuid) => same_text(uuid, volume.partuuid.as_deref()),
        Source::PartLabel(label) => volume.partlabel.as_ref() == Some(label),
        Source::Lv(vg, lv) => volume
            .lv
            .as_ref()
            .is_some_and(|(v, l)| v.as_bytes() == vg && l.as_bytes() == lv),
        Source::Mapper(name) => volume.lv.as_ref().is_some_and(|(vg, lv)| {
            // The device-mapper name: dashes within the two names are doubled.
            let double = |text: &str| text.replace('-', "--");
            format!("{}-{}", double(vg), double(lv)).as_bytes() == name
        }),
        Source::Device(name) => is_device(name, volume),
        Source::Other(_) => false,
    }
}

/// Whether the guest calls this volume by this device name.
fn is_device(name: &[u8], volume: &VolumeIdentity) -> bool {
    if volume.lv.is_some() {
        return false;
    }
    let Ok(name) = std::str::from_utf8(name) else {
        return false;
    };
    volume
        .disk_names
        .iter()
        .any(|disk| name == partition_name(disk, volume.partition))
}

/// The kernel's name for a partition: a `p` goes between digits.
fn partition_name(disk: &str, partition: Option<u32>) -> String {
    match partition {
        None => disk.to_owned(),
        Some(number) if disk.ends_with(|c: char| c.is_ascii_digit()) => format!("{disk}p{number}"),
        Some(number) => format!("{disk}{number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(text: &str) -> Vec<Source> {
        parse(text.as_bytes())
            .0
            .into_iter()
            .map(|l| l.source)
            .collect()
    }

    #[test]
    fn test_every_way_to_name_a_volume() {
        let text = "\
            # comment\n\
            UUID=1b4e28ba-2fa1 / ext4 errors=remount-ro 0 1\n\
            LABEL=\"my disk\" /x ext4 defaults\n\
            LABEL=my\\040disk\t/y\text4 defaults\n\
            PARTUUID=abc /a ext4\n\
            PARTLABEL=EFI /boot/efi vfat umask=0077 0 1\n\
            /dev/mapper/vg--0-lv /b xfs\n\
            /dev/vg0/home /home xfs\n\
            /dev/sda1 /c ext4\n\
            /dev/disk/by-uuid/1234-ABCD /d vfat\n\
            /dev/disk/by-label/a\\x20b /e ext4\n\
            /dev/disk/by-path/pci-0000 /f ext4\n";
        // A quoted value with a blank is not one field in fstab: that line has too few fields.
        let text = text.replace("LABEL=\"my disk\"", "LABEL=\"my\"");
        assert_eq!(
            sources(&text),
            [
                Source::Uuid(b"1b4e28ba-2fa1".into()),
                Source::Label(b"my".into()),
                Source::Label(b"my disk".into()),
                Source::PartUuid(b"abc".into()),
                Source::PartLabel(b"EFI".into()),
                Source::Mapper(b"vg--0-lv".into()),
                Source::Lv(b"vg0".into(), b"home".into()),
                Source::Device(b"sda1".into()),
                Source::Uuid(b"1234-ABCD".into()),
                Source::Label(b"a b".into()),
                Source::Other(b"/dev/disk/by-path/pci-0000".into()),
            ]
        );
    }

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
    fn test_sources_find_their_volume() {
        let filesystem = Filesystem {
            fstype: "ext4".into(),
            uuid: Some("AbC".into()),
            label: Some(b"l\xff".to_vec()),
            version: None,
        };
        let mut volume = VolumeIdentity {
            name: "p3".into(),
            disk_names: vec!["vdb".into(), "nvme1n1".into()],
            partition: Some(3),
            partlabel: Some(b"pl".to_vec()),
            ..VolumeIdentity::default()
        };
        let hit = |source: &[u8], volume: &VolumeIdentity| {
            matches(&parse_source(source), volume, &filesystem)
        };
        for yes in [
            &b"UUID=aBc"[..],
            b"LABEL=l\xff",
            b"PARTLABEL=pl",
            b"/dev/vdb3",
            b"/dev/nvme1n1p3",
        ] {
            assert!(hit(yes, &volume), "{}", escape(yes));
        }
        for no in [
            &b"UUID="[..],
            b"LABEL=",
            b"PARTUUID=",
            b"/dev/vda3",
            b"/dev/sdb3",
            b"/dev/vdb",
        ] {
            assert!(!hit(no, &volume), "{}", escape(no));
        }
        volume.disk_names = vec!["xvda2".into()];
        volume.partition = None;
        assert!(hit(b"/dev/xvda2", &volume));
        assert!(!hit(b"/dev/sdb", &volume));
        // Nobody knows: it is nobody's disk rather than another one's.
        volume.disk_names.clear();
        assert!(!hit(b"/dev/xvda2", &volume) && !hit(b"/dev/vda", &volume));
        volume.disk_names = vec!["xvda2".into()];
        volume.lv = Some(("vg-0".into(), "root".into()));
        assert!(hit(b"/dev/mapper/vg--0-root", &volume));
        assert!(hit(b"/dev/vg-0/root", &volume));
        assert!(!hit(b"/dev/xvda2", &volume));
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
