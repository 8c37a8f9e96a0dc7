//! Text rendering of a guest's manifest for `inspect`.

use std::fmt::Write as _;

use guestsnap::disk::table::TableKind;
use guestsnap::error::escape;
use guestsnap::job::manifest::{FoundVolume, Manifest, SavedDisk, VolumeState};
use guestsnap::job::size_text;

use crate::screen::Style;

/// Renders a manifest as text. Volume names and labels in it are already escaped.
pub fn picture(found: &Manifest, text: &mut String, style: Style) {
    let mut left: Vec<&FoundVolume> = found.volumes.iter().collect();
    for (number, disk) in found.disks.iter().enumerate() {
        disk_picture(number, disk, found, &mut left, text, style);
    }
    for group in &found.groups {
        let on = format!("LVM group on {}", group.physical_volumes.join(", "));
        line(text, 2, &group.name, "", &on);
        let below = format!("{}/", group.name);
        let (inside, others): (Vec<&FoundVolume>, _) =
            left.into_iter().partition(|v| v.volume.starts_with(&below));
        for volume in inside {
            volume_picture(4, volume, found, text, style);
        }
        left = others;
    }
    for volume in left {
        volume_picture(2, volume, found, text, style);
    }
    for disk in &found.not_covered {
        let said = format!("not covered: {}", escape(disk.reason.as_bytes()));
        line(text, 2, &escape(disk.disk.as_bytes()), "", &said);
    }
}

/// Renders a disk and its partitions; removes their volumes from `left`.
fn disk_picture(
    number: usize,
    disk: &SavedDisk,
    found: &Manifest,
    left: &mut Vec<&FoundVolume>,
    text: &mut String,
    style: Style,
) {
    let mut take = |name: &str| {
        let at = left.iter().position(|v| v.volume == name)?;
        Some(said(left.remove(at), found, style))
    };
    let holds = |name: &str| {
        let group = found
            .groups
            .iter()
            .find(|g| g.physical_volumes.iter().any(|pv| pv == name))?;
        Some(format!("LVM, group {}", group.name))
    };
    let (name, table) = (&disk.contents.name, &disk.contents.table);
    let kind = match table.kind {
        TableKind::Mbr => "MBR",
        TableKind::Gpt => "GPT",
        _ => "no table",
    };
    let about = format!("{name}: {kind}, snapshot: {}", disk.snapshot);
    line(text, 2, &disk.source, &size_text(disk.bytes), &about);
    for partition in &table.partitions {
        let inner = match number {
            0 => format!("p{}", partition.number),
            _ => format!("{name}p{}", partition.number),
        };
        let said = take(&inner).or_else(|| holds(&inner)).unwrap_or_default();
        line(text, 4, &inner, &size_text(partition.len), &said);
    }
    // A disk without a partition table, or one refused as a whole.
    if let Some(said) = take(name).or_else(|| holds(name)) {
        line(text, 4, name, "", &said);
    }
}

fn volume_picture(
    indent: usize,
    volume: &FoundVolume,
    found: &Manifest,
    text: &mut String,
    style: Style,
) {
    let size = volume.extent.as_ref().map(|extent| size_text(extent.bytes));
    let said = said(volume, found, style);
    line(
        text,
        indent,
        &volume.volume,
        &size.unwrap_or_default(),
        &said,
    );
}

fn line(text: &mut String, indent: usize, name: &str, size: &str, said: &str) {
    let width = 36 - indent;
    let line = format!("{:indent$}{name:<width$} {size:>10}  {said}", "");
    let _ = writeln!(text, "{}", line.trim_end());
}

/// Renders a volume's content and its place in the tree.
fn said(volume: &FoundVolume, found: &Manifest, style: Style) -> String {
    let (filesystem, label, uuid, used) = match &volume.state {
        VolumeState::Error { error } => return format!("{} {error}", style.bad("not saved:")),
        VolumeState::Skipped { skipped } => {
            return format!("skipped: {}", escape(skipped.as_bytes()));
        }
        VolumeState::Mounted {
            filesystem,
            label,
            uuid,
            used_bytes,
            ..
        } => (filesystem, label, uuid, used_bytes),
    };
    let mut said = filesystem.clone();
    if let Some(label) = label {
        let _ = write!(said, " \"{label}\"");
    }
    // The tree uses the name that the log uses: a slash would make a directory.
    let name = volume.volume.replace('/', "-");
    let places: Vec<String> = found
        .tree
        .iter()
        .filter(|join| join.volume == name)
        .map(|join| match join.path.as_str() {
            "" => "/ (the root)".to_owned(),
            path => format!("/{path}"),
        })
        .collect();
    match places.is_empty() {
        true => said.push_str(", not in the tree"),
        false => {
            let _ = write!(said, " on {}", places.join(", "));
        }
    }
    let _ = write!(said, ", {} used", size_text(*used));
    if let Some(uuid) = uuid {
        let _ = write!(said, ", UUID {uuid}");
    }
    said
}

#[cfg(test)]
mod tests {
    use guestsnap::disk::lvm2::GroupReport;
    use guestsnap::disk::table::{Partition, Table};
    use guestsnap::disk::{DiskReport, VolumeKind};
    use guestsnap::job::manifest::{JoinedVolume, NotCovered, VolumeExtent};

    use super::*;

    #[test]
    fn test_picture_of_a_manifest() {
        let partition = |number, len| Partition {
            number,
            start: 0,
            len,
            kind: "0x83".into(),
            partuuid: None,
            partlabel: None,
            flags: 0,
        };
        let disk = |source: &str, bytes, name: &str, kind, partitions| SavedDisk {
            source: source.into(),
            bytes,
            snapshot: "thin".into(),
            contents: DiskReport {
                name: name.into(),
                size: bytes,
                table: Table {
                    kind,
                    sector_size: 512,
                    id: None,
                    partitions,
                    damage: Vec::new(),
                    notes: Vec::new(),
                    records: Default::default(),
                },
            },
        };
        let mounted = |name: &str, filesystem: &str, label: Option<&str>, bytes| FoundVolume {
            extent: Some(VolumeExtent {
                bytes,
                kind: VolumeKind::Whole { disk: 0 },
            }),
            ..FoundVolume::unreached(
                name,
                VolumeState::Mounted {
                    filesystem: filesystem.into(),
                    uuid: label.map(|label| format!("{label}-4711")),
                    label: label.map(str::to_owned),
                    options: "ro".into(),
                    used_bytes: 2048,
                },
            )
        };
        let skipped = |name, reason| FoundVolume::unreached(name, VolumeState::skipped(reason));
        let join = |path: &str, volume: &str| JoinedVolume {
            path: path.into(),
            volume: volume.into(),
            filesystem: "ext4".into(),
        };
        let partitions = vec![
            partition(1, 1 << 20),
            partition(2, 1 << 29),
            partition(5, 4096),
        ];
        let found = Manifest {
            format: Manifest::FORMAT,
            guest: "web".into(),
            job_id: 0,
            consistency: "crash-consistent".into(),
            disks: vec![
                disk("vg0/web1", 1 << 30, "disk", TableKind::Mbr, partitions),
                disk("vg0/web2", 4096, "disk2", TableKind::None, Vec::new()),
            ],
            groups: vec![GroupReport {
                name: "g".into(),
                uuid: String::new(),
                seqno: 1,
                physical_volumes: vec!["p2".into()],
                places: Vec::new(),
                text: Vec::new(),
                complex: Vec::new(),
            }],
            volumes: vec![
                mounted("p1", "ext4", Some("boot"), 1 << 20),
                skipped("p5", "swap space holds no files"),
                FoundVolume::unreached("disk2", VolumeState::error("GS-503 no")),
                mounted("g/root", "xfs", None, 1 << 28),
                skipped("g/raid", "a disk is missing"),
            ],
            tree: vec![join("", "g-root"), join("boot", "p1")],
            not_covered: vec![NotCovered {
                disk: "hdc".into(),
                reason: "a CD drive".into(),
            }],
            decisions: Vec::new(),
            notes: Vec::new(),
            not_rebuilt: Vec::new(),
        };
        let mut text = String::new();
        picture(&found, &mut text, Style::with(false));
        let mut coloured = String::new();
        picture(&found, &mut coloured, Style::with(true));
        assert_ne!(coloured, text, "a terminal shows colours");
        for code in ["1;31", "32", "33", "1", "0"] {
            coloured = coloured.replace(&format!("\x1b[{code}m"), "");
        }
        assert_eq!(coloured, text, "colours change nothing else");
        let lines: Vec<String> = text
            .lines()
            .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(
            lines,
            [
                "vg0/web1 1.0 GiB disk: MBR, snapshot: thin",
                "p1 1.0 MiB ext4 \"boot\" on /boot, 2.0 KiB used, UUID boot-4711",
                "p2 512.0 MiB LVM, group g",
                "p5 4.0 KiB skipped: swap space holds no files",
                "vg0/web2 4.0 KiB disk2: no table, snapshot: thin",
                "disk2 not saved: GS-503 no",
                "g LVM group on p2",
                "g/root 256.0 MiB xfs on / (the root), 2.0 KiB used",
                "g/raid skipped: a disk is missing",
                "hdc not covered: a CD drive",
            ]
        );
    }
}
