//! Matching of sources to volumes, and of lines to mount points.

use std::collections::BTreeMap;

use super::line::Line;
use super::source::Source;
use crate::fs::probe::Filesystem;
use crate::fs::volume::VolumeIdentity;

/// Relation between a line's source and a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// The source names this volume.
    Yes,
    /// The source names another volume.
    No,
    /// The source does not name this volume, but its form depends on the machine and proves
    /// nothing.
    Unknown,
}

/// Whether a line's source names this volume.
pub fn matches(source: &Source, volume: &VolumeIdentity, filesystem: &Filesystem) -> bool {
    compare(source, volume, filesystem) == Match::Yes
}

/// Compares a line's source with a volume, or with any device of a filesystem on several.
pub fn compare(source: &Source, volume: &VolumeIdentity, filesystem: &Filesystem) -> Match {
    volume.devices().fold(Match::No, |found, device| {
        match (found, compare_device(source, device, filesystem)) {
            (Match::Yes, _) | (_, Match::Yes) => Match::Yes,
            (Match::No, other) | (other, _) => other,
        }
    })
}

fn compare_device(source: &Source, volume: &VolumeIdentity, filesystem: &Filesystem) -> Match {
    let text = |wanted: &[u8], found: Option<&str>| {
        proof(found.map(|found| wanted.eq_ignore_ascii_case(found.as_bytes())))
    };
    match source {
        Source::Uuid(uuid) => text(uuid, filesystem.uuid.as_deref()),
        Source::Label(label) => sure(filesystem.label.as_ref() == Some(label)),
        Source::PartUuid(uuid) => text(uuid, volume.partuuid.as_deref()),
        Source::PartLabel(label) => proof(volume.partlabel.as_ref().map(|found| found == label)),
        // `/dev/md/0` and the like have the same form.
        Source::Lv(vg, lv) => {
            proof((volume.lv.as_ref()).map(|(v, l)| v.as_bytes() == vg && l.as_bytes() == lv))
        }
        Source::Mapper(name) => proof(volume.lv.as_ref().map(|(vg, lv)| {
            // Device-mapper name: dashes within the two names are doubled.
            let double = |text: &str| text.replace('-', "--");
            format!("{}-{}", double(vg), double(lv)).as_bytes() == name
        })),
        Source::LvUuid(uuids) => proof(volume.lv_uuids.as_ref().map(|u| u.as_bytes() == uuids)),
        Source::DiskLink(_, partition) if volume.only_disk && volume.lv.is_none() => {
            sure(*partition == volume.partition)
        }
        Source::Device(name) if is_device(name, volume) => Match::Yes,
        Source::Defined(disk) => sure(volume.is_whole_disk(*disk)),
        Source::DiskLink(..) | Source::Device(_) | Source::Other(_) => Match::Unknown,
    }
}

fn sure(same: bool) -> Match {
    if same { Match::Yes } else { Match::No }
}

/// `None`: the volume has no identifier of this type.
fn proof(same: Option<bool>) -> Match {
    same.map_or(Match::Unknown, sure)
}

/// Returns the effective lines, outer mount points first, and the other lines for mount points
/// already claimed. The first line for a mount point wins, as in systemd. Lines that need not be
/// mounted yield to others; among them, the first whose volume is `there` wins.
pub fn claim(lines: Vec<Line>, there: impl Fn(&Line) -> bool) -> (Vec<Line>, Vec<Line>) {
    let mut places: BTreeMap<Vec<u8>, Vec<Line>> = BTreeMap::new();
    for line in lines {
        places
            .entry(line.mount_point.clone())
            .or_default()
            .push(line);
    }
    let (mut first, mut others) = (Vec::new(), Vec::new());
    for mut lines in places.into_values() {
        let strong = lines.iter().position(|line| !line.weak);
        let found = strong.or_else(|| lines.iter().position(&there));
        first.push(lines.remove(found.unwrap_or(0)));
        others.extend(lines);
    }
    (first, others)
}

/// Whether the guest uses this device name for the volume.
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

/// The kernel's partition name: `p` separates digits.
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
    use crate::error::escape;
    use crate::fs::fstab::parse;
    use crate::fs::fstab::source::parse_source;

    #[test]
    fn test_sources_find_their_volume() {
        let filesystem = Filesystem {
            fstype: "ext4".into(),
            uuid: Some("AbC".into()),
            label: Some(b"l\xff".to_vec()),
            ..Filesystem::default()
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
        // Unknown disk names: no match rather than a wrong one.
        volume.disk_names.clear();
        assert!(!hit(b"/dev/xvda2", &volume) && !hit(b"/dev/vda", &volume));
        volume.disk_names = vec!["xvda2".into()];
        volume.lv = Some(("vg-0".into(), "root".into()));
        assert!(hit(b"/dev/mapper/vg--0-root", &volume));
        assert!(hit(b"/dev/vg-0/root", &volume));
        assert!(!hit(b"/dev/xvda2", &volume));
    }

    #[test]
    fn test_links_of_udev_find_their_volume() {
        let filesystem = Filesystem::default();
        let mut volume = VolumeIdentity {
            partition: Some(3),
            only_disk: true,
            ..VolumeIdentity::default()
        };
        let hit = |source: &str, volume: &VolumeIdentity| {
            compare(&parse_source(source.as_bytes()), volume, &filesystem)
        };
        for kind in [
            "by-id/scsi-0QEMU_QEMU_HARDDISK_drive-scsi0",
            "by-id/ata-QEMU_HARDDISK_QM00001",
            "by-id/virtio-b1946ac9",
            "by-id/wwn-0x5000c500a0b1c2d3",
            "by-path/pci-0000:00:05.0-scsi-0:0:0:0",
        ] {
            let link = |end: &str| format!("/dev/disk/{kind}{end}");
            assert_eq!(hit(&link("-part3"), &volume), Match::Yes, "{kind}");
            assert_eq!(hit(&link("-part4"), &volume), Match::No, "{kind}");
            assert_eq!(hit(&link(""), &volume), Match::No, "{kind}");
            // With several disks it may be any of them.
            let many = VolumeIdentity {
                only_disk: false,
                ..volume.clone()
            };
            assert_eq!(hit(&link("-part3"), &many), Match::Unknown, "{kind}");
        }
        volume.partition = None;
        let whole = "/dev/disk/by-id/virtio-b1946ac9";
        assert_eq!(hit(whole, &volume), Match::Yes);
        volume.lv = Some(("vg".into(), "root".into()));
        volume.lv_uuids = Some("Gg4L".into());
        assert_eq!(hit(whole, &volume), Match::Unknown);
        let named = |uuids: &str| format!("/dev/disk/by-id/dm-uuid-LVM-{uuids}");
        assert_eq!(hit(&named("Gg4L"), &volume), Match::Yes);
        assert_eq!(hit(&named("gG4L"), &volume), Match::No);
        // Source forms that prove nothing against a volume, and forms that do.
        for source in [
            "/dev/sda1",
            "/dev/root",
            "/dev/disk/by-id/lvm-pv-uuid-x",
            "PARTUUID=1",
            "tank/root",
        ] {
            assert_eq!(hit(source, &volume), Match::Unknown, "{source}");
        }
        volume.partuuid = Some("2".into());
        let of = Filesystem {
            uuid: Some("A".into()),
            ..Filesystem::default()
        };
        for source in ["PARTUUID=1", "UUID=B", "LABEL=x", "/dev/vg/other"] {
            let source = parse_source(source.as_bytes());
            assert_eq!(compare(&source, &volume, &of), Match::No, "{source}");
        }
    }

    #[test]
    fn test_any_device_of_a_filesystem_names_it() {
        let filesystem = Filesystem {
            uuid: Some("A".into()),
            ..Filesystem::default()
        };
        let device = |name: &str, partuuid: Option<&str>| VolumeIdentity {
            disk_names: vec![name.into()],
            partuuid: partuuid.map(str::to_owned),
            ..VolumeIdentity::default()
        };
        let volume = VolumeIdentity {
            parts: vec![device("vdb", None), device("vdc", Some("2"))],
            ..device("vda", Some("1"))
        };
        for (source, expected) in [
            ("/dev/vda", Match::Yes),
            ("/dev/vdb", Match::Yes),
            ("/dev/vdd", Match::Unknown),
            ("PARTUUID=2", Match::Yes),
            // One of them has none.
            ("PARTUUID=3", Match::Unknown),
            ("UUID=a", Match::Yes),
            ("UUID=b", Match::No),
        ] {
            let found = compare(&parse_source(source.as_bytes()), &volume, &filesystem);
            assert_eq!(found, expected, "{source}");
        }
    }

    #[test]
    fn test_the_first_line_for_a_mount_point_counts() {
        let claimed = |text: &str, there: &str| {
            let (lines, _) = parse(text.as_bytes());
            let (first, others) = claim(lines, |line| line.source.to_string() == there);
            let names = |lines: Vec<Line>| -> Vec<String> {
                let all = lines.iter();
                all.map(|l| format!("{} {}", l.source, escape(&l.mount_point)))
                    .collect()
            };
            (names(first), names(others))
        };
        let two = "UUID=1 /data ext4\nUUID=2 /data/ ext4\nUUID=3 /a ext4\n";
        let (first, others) = claimed(two, "UUID=2");
        assert_eq!(first, ["UUID=3 a", "UUID=1 data"]);
        assert_eq!(others, ["UUID=2 data"]);
        for weak in [
            "noauto",
            "nofail",
            "rw,x-systemd.automount",
            "noauto,comment=systemd.automount",
        ] {
            let text = format!("UUID=1 /data ext4 {weak}\nUUID=2 /data ext4 defaults\n");
            assert_eq!(claimed(&text, "UUID=1").0, ["UUID=2 data"], "{weak}");
            let text = format!("UUID=1 /data ext4 {weak}\nUUID=2 /data ext4 {weak}\n");
            assert_eq!(claimed(&text, "").0, ["UUID=1 data"], "{weak}");
            // Two alternating drives.
            assert_eq!(claimed(&text, "UUID=2").0, ["UUID=2 data"], "{weak}");
        }
    }
}
