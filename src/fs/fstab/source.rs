//! Sources: names of a volume.

use crate::error::escape;

/// Source of a line.
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
    /// `/dev/disk/by-id/dm-uuid-LVM-`: UUIDs of the volume group and the logical volume, without
    /// dashes.
    LvUuid(Vec<u8>),
    /// Link named by properties invisible from the host (`/dev/disk/by-id/`, `/dev/disk/by-path/`),
    /// and the partition number.
    DiskLink(Vec<u8>, Option<u32>),
    /// No device: the guest's definition on the host gives the place to a whole disk, by its index.
    Defined(usize),
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
            Source::LvUuid(uuids) => write!(f, "/dev/disk/by-id/dm-uuid-LVM-{}", escape(uuids)),
            Source::DiskLink(path, _) => f.write_str(&escape(path)),
            Source::Defined(disk) => write!(f, "disk {}", disk + 1),
            Source::Other(text) => f.write_str(&escape(text)),
        }
    }
}

/// A source prefix and the variant it selects.
type Prefix = (&'static [u8], fn(Vec<u8>) -> Source);

pub(super) fn parse_source(source: &[u8]) -> Source {
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
    if let Some(id) = source.strip_prefix(b"ID=") {
        return parse_source(&[b"/dev/disk/by-id/", &unquote(id)[..]].concat());
    }
    for folder in [&b"/dev/disk/by-id/"[..], b"/dev/disk/by-path/"] {
        if let Some(name) = source.strip_prefix(folder) {
            return disk_link(source, name);
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

/// A link below `/dev/disk/by-id/` or `/dev/disk/by-path/`.
fn disk_link(source: &[u8], name: &[u8]) -> Source {
    if let Some(uuids) = name.strip_prefix(b"dm-uuid-LVM-") {
        return Source::LvUuid(uuids.to_vec());
    }
    // Prefixes of links to devices without a filesystem or table: physical volumes, arrays, other
    // maps.
    const NO_DISK: [&[u8]; 3] = [b"lvm-pv-uuid-", b"md-", b"dm-"];
    if NO_DISK.iter().any(|prefix| name.starts_with(prefix)) {
        return Source::Other(source.to_vec());
    }
    let at = name.windows(5).rposition(|w| w == b"-part");
    let digits = at.and_then(|at| std::str::from_utf8(&name[at + 5..]).ok());
    let partition = digits.and_then(|digits| digits.parse().ok());
    Source::DiskLink(source.to_vec(), partition)
}

/// Decodes `\xNN`, udev's escape in link names.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::fstab::parse;

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
            /dev/disk/by-path/pci-0000 /f ext4\n\
            /dev/disk/by-id/scsi-0QEMU_drive-part1-part12 /g ext4\n\
            ID=virtio-a-part2 /h ext4\n\
            /dev/disk/by-id/dm-uuid-LVM-AbC /i ext4\n\
            /dev/disk/by-id/dm-name-vg-a--b /j ext4\n\
            /dev/disk/by-id/lvm-pv-uuid-A-part1 /k ext4\n";
        // fstab does not quote: the blank in the value leaves the line with too few fields.
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
                Source::DiskLink(b"/dev/disk/by-path/pci-0000".into(), None),
                Source::DiskLink(
                    b"/dev/disk/by-id/scsi-0QEMU_drive-part1-part12".into(),
                    Some(12)
                ),
                Source::DiskLink(b"/dev/disk/by-id/virtio-a-part2".into(), Some(2)),
                Source::LvUuid(b"AbC".into()),
                Source::Mapper(b"vg-a--b".into()),
                Source::Other(b"/dev/disk/by-id/lvm-pv-uuid-A-part1".into()),
            ]
        );
    }
}
