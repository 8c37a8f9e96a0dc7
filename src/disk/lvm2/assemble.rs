//! Assembles all volume groups of a guest from its physical volumes.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::group::{Assembled, group};
use super::metadata::{Texts, read_texts};
use super::pv::FoundPv;
use super::vg::Vg;
use crate::disk::read::ReadAt;
use crate::disk::volume::{Skipped, SkippedKind};

/// Maximum groups of one guest.
const MAX_GROUPS: usize = 256;

/// Groups the PVs and resolves their volumes. Fails only if a disk cannot be read.
pub(in crate::disk) fn assemble(disks: &[&dyn ReadAt], pvs: &[FoundPv]) -> io::Result<Assembled> {
    let mut out = Assembled::default();
    let Texts {
        texts,
        bytes,
        problems,
    } = read_texts(disks, pvs, &mut out)?;
    let mut groups: BTreeMap<&str, (&Vg, &[u8])> = BTreeMap::new();
    for (pv, vg) in &texts {
        let text = bytes.get(pv).map_or(&[][..], Vec::as_slice);
        let (newest, newest_text) = groups.entry(&vg.uuid).or_insert((vg, text));
        if newest.seqno != vg.seqno {
            let (low, high) = (newest.seqno.min(vg.seqno), newest.seqno.max(vg.seqno));
            out.notes
                .push(format!("{}: metadata {low} is outdated by {high}", vg.name));
        }
        if vg.seqno > newest.seqno {
            (*newest, *newest_text) = (vg, text);
        }
    }
    let used: BTreeSet<&str> = groups
        .values()
        .flat_map(|(vg, _)| vg.pvs.values())
        .map(|pv| pv.uuid.as_str())
        .collect();
    for pv in pvs
        .iter()
        .filter(|pv| !used.contains(pv.header.uuid.as_str()))
    {
        // Unreadable metadata may hide a group. A PV without metadata is new, or was removed from
        // its group.
        let (kind, reason) = match problems.get(&pv.name) {
            Some(problem) if !texts.contains_key(&pv.name) => (
                SkippedKind::DamagedPv,
                format!("an LVM physical volume whose group cannot be read: {problem}"),
            ),
            _ => (
                SkippedKind::UnusedPv,
                "an LVM physical volume that belongs to no volume group".to_owned(),
            ),
        };
        out.skipped.push(Skipped {
            name: pv.name.clone(),
            kind,
            reason,
            disk: Some(pv.place.disk),
            volume: None,
        });
    }
    if let Some((vg, _)) = groups.values().nth(MAX_GROUPS) {
        out.skipped.push(Skipped {
            name: vg.name.clone(),
            kind: SkippedKind::TooMany,
            reason: format!("a guest has {MAX_GROUPS} volume groups at most"),
            disk: None,
            volume: None,
        });
    }
    let by_uuid = by_uuid(pvs);
    let mut names = BTreeSet::new();
    let mut work = 0;
    for (uuid, (vg, text)) in groups.into_iter().take(MAX_GROUPS) {
        // A PV whose own metadata name another group was removed from this one.
        let mine: Vec<&FoundPv> = members(vg, &by_uuid)
            .into_iter()
            .map(|number| &pvs[number])
            .filter(|pv| texts.get(&pv.name).is_none_or(|own| own.uuid == uuid))
            .collect();
        let mut shown = vg.name.clone();
        if names.contains(&shown) {
            out.notes
                .push(format!("two volume groups are named {}", vg.name));
        }
        while !names.insert(shown.clone()) {
            shown.push('+');
        }
        work = group(disks, (vg, text), &shown, &mine, work, &mut out);
    }
    Ok(out)
}

/// Indexes of the found PVs, by UUID.
fn by_uuid(pvs: &[FoundPv]) -> BTreeMap<&str, Vec<usize>> {
    let mut places: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (number, pv) in pvs.iter().enumerate() {
        places.entry(&pv.header.uuid).or_default().push(number);
    }
    places
}

/// Indexes of the found PVs that a group names: unique, in ascending order.
fn members(vg: &Vg, by_uuid: &BTreeMap<&str, Vec<usize>>) -> BTreeSet<usize> {
    let named = vg.pvs.values().filter_map(|pv| by_uuid.get(&*pv.uuid));
    named.flatten().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::super::label::{self, Held, PvHeader};
    use super::super::names::dashed;
    use super::super::pv::find_pv;
    use super::*;
    use crate::crc::{LVM2_START, register};
    use crate::disk::layout::{Extent, Layout, Segment};
    use crate::disk::table::mbr;
    use crate::disk::volume::{Volume, VolumeKind};
    use crate::disk::{Examined, examine};

    /// Metadata of a guest with LVs of many kinds, as LVM2 2.03.16 writes them.
    const KINDS: &str = include_str!("../../../fuzz/corpus/disk_lvm_text/kinds");
    const PVS: [&str; 3] = [
        "ScdqkZoeyMF4N6d1MAarRhHle4pSRQSe",
        "IjvSwq01jW6jVrA1Ak2DQEaE0Au2FBh3",
        "YJMdpzm2dqH3Fm8cI2YCiYTuqQK6VrO4",
    ];
    const MIB: u64 = 1024 * 1024;

    /// A disk of 200 MiB with data only at its start.
    struct Sparse(Vec<u8>);

    impl ReadAt for Sparse {
        fn size(&self) -> u64 {
            200 * MIB
        }

        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            buf.fill(0);
            let start = usize::try_from(offset).unwrap().min(self.0.len());
            let len = buf.len().min(self.0.len() - start);
            buf[..len].copy_from_slice(&self.0[start..start + len]);
            Ok(())
        }
    }

    /// A PV with one metadata area at 4096.
    fn pv(uuid: &str, text: &str) -> Sparse {
        pv_in(uuid, text, MIB - 4096)
    }

    fn pv_in(uuid: &str, text: &str, area: u64) -> Sparse {
        let mut disk = vec![0; 4096 + 512 + text.len()];
        let put = |disk: &mut [u8], at: usize, value: u64| {
            disk[at..at + 8].copy_from_slice(&value.to_le_bytes());
        };
        disk[512..520].copy_from_slice(b"LABELONE");
        put(&mut disk, 520, 1);
        disk[532] = 32;
        disk[536..544].copy_from_slice(b"LVM2 001");
        disk[544..576].copy_from_slice(uuid.as_bytes());
        put(&mut disk, 576, 200 * MIB);
        put(&mut disk, 584, MIB);
        put(&mut disk, 616, 4096);
        put(&mut disk, 624, area);
        let crc = register(LVM2_START, &disk[532..1024]);
        disk[528..532].copy_from_slice(&crc.to_le_bytes());
        disk[4100..4116].copy_from_slice(b"\x20LVM2\x20x[5A%r0N*>");
        disk[4116] = 1;
        put(&mut disk, 4120, 4096);
        put(&mut disk, 4128, area);
        put(&mut disk, 4136, 512);
        put(&mut disk, 4144, u64::try_from(text.len()).unwrap());
        let crc = register(LVM2_START, text.as_bytes());
        disk[4152..4156].copy_from_slice(&crc.to_le_bytes());
        disk[4608..].copy_from_slice(text.as_bytes());
        let crc = register(LVM2_START, &disk[4100..4608]);
        disk[4096..4100].copy_from_slice(&crc.to_le_bytes());
        Sparse(disk)
    }

    /// A search of all found PVs for each PV of a group would take quadratic time.
    #[test]
    fn test_many_physical_volumes_are_found_in_little_time() {
        const NAMED: usize = 30_000;
        let mut text = "contents = \"Text Format Volume Group\"\nversion = 1\n\
            vg { id = \"vgvgvg-vgvg-vgvg-vgvg-vgvg-vgvg-vgvgvg\" seqno = 1 extent_size = 8192\n\
            physical_volumes {\n"
            .to_owned();
        for number in 0..NAMED {
            text +=
                &format!("pv{number} {{ id = \"{number:032}\" pe_start = 2048 pe_count = 1 }}\n");
        }
        text += "} }\n";
        let area = 64 * MIB - 4096;
        let disk = pv_in(&format!("{:032}", 0), &text, area);
        let found = |number: usize, metadata_areas| FoundPv {
            name: format!("p{number}"),
            place: Extent {
                disk: 0,
                start: 0,
                len: 200 * MIB,
            },
            header: PvHeader {
                uuid: format!("{number:032}"),
                size: 200 * MIB,
                data_start: MIB,
                metadata_areas,
            },
        };
        let mut pvs = vec![found(
            0,
            vec![crate::disk::lvm2::label::AreaPlace {
                start: 4096,
                len: area,
            }],
        )];
        // Only the first few belong to the group.
        pvs.extend((NAMED - 10..2 * NAMED).map(|number| found(number, Vec::new())));
        // CPU time of this thread, independent of the machine's load.
        let cpu = || {
            let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
            let nanoseconds: u64 = text.split(' ').next().unwrap().parse().unwrap();
            nanoseconds / 1_000_000_000
        };
        let begun = cpu();
        let out = assemble(&[&disk], &pvs).unwrap();
        let spent = cpu() - begun;
        assert_eq!(out.groups[0].physical_volumes.len(), 11);
        assert!(spent < 5, "{spent} s");
    }

    fn examined(disks: &[Sparse]) -> Examined {
        let disks: Vec<&dyn ReadAt> = disks.iter().map(|d| d as &dyn ReadAt).collect();
        examine(&disks).unwrap()
    }

    fn volume<'a>(found: &'a Examined, name: &str) -> &'a Volume {
        found
            .volumes
            .iter()
            .find(|v| v.name == format!("VolGroup00/{name}"))
            .unwrap()
    }

    fn reason<'a>(found: &'a Examined, name: &str) -> &'a str {
        let all = &found.skipped;
        &all.iter()
            .find(|s| s.name == format!("VolGroup00/{name}"))
            .unwrap()
            .reason
    }

    /// `len` MiB from extent `extent` of a PV.
    fn run(disk: usize, extent: u64, len: u64) -> Extent {
        Extent {
            disk,
            start: (1 + extent) * MIB,
            len: len * MIB,
        }
    }

    #[test]
    fn test_kinds_of_volumes() {
        let found = examined(&PVS.map(|uuid| pv(uuid, KINDS)));
        let names: Vec<&str> = found.volumes.iter().map(|v| v.name.as_str()).collect();
        let known = [
            "ext", "fromext", "mirror", "raid0", "raid1", "root", "striped", "thin", "thinsnap",
            "wm",
        ];
        assert_eq!(names, known.map(|name| format!("VolGroup00/{name}")));
        // Same extents as `lvs -o devices` shows.
        let linear = |name| volume(&found, name).layout.contiguous();
        assert_eq!(linear("root"), Some(run(0, 0, 8)));
        assert_eq!(linear("mirror"), Some(run(0, 39, 8)));
        assert_eq!(linear("raid1"), Some(run(0, 17, 8)));
        let striped = |stripe_size, stripes: &[Extent]| {
            Layout::Segments(vec![Segment::Striped {
                stripe_size,
                stripes: stripes.to_vec(),
            }])
        };
        let layout = &volume(&found, "striped").layout;
        assert_eq!(*layout, striped(65536, &[run(0, 8, 4), run(1, 0, 4)]));
        let layout = &volume(&found, "raid0").layout;
        assert_eq!(*layout, striped(65536, &[run(0, 12, 4), run(1, 4, 4)]));
        // Image 0 is write-mostly.
        assert_eq!(linear("wm"), Some(run(1, 18, 8)));
        let Layout::Thin {
            pool,
            device_id,
            size,
            external_origin: None,
            ..
        } = &volume(&found, "thinsnap").layout
        else {
            panic!("not thin")
        };
        assert_eq!((*device_id, *size), (2, 64 * MIB));
        assert_eq!(pool.name, "VolGroup00/pool");
        assert_eq!(pool.metadata, [Segment::Linear(run(2, 6, 2))]);
        assert_eq!(pool.data, [Segment::Linear(run(0, 49, 40))]);
        let VolumeKind::Lv { snapshot_of, .. } = &volume(&found, "thinsnap").kind else {
            panic!("not an LV")
        };
        assert_eq!(snapshot_of.as_deref(), Some("thin"));

        let Layout::Thin {
            external_origin: Some(origin),
            ..
        } = &volume(&found, "fromext").layout
        else {
            panic!("no external origin")
        };
        assert_eq!(**origin, volume(&found, "ext").layout);

        assert_eq!(found.skipped.len(), 3, "{:?}", found.skipped);
        assert_eq!(reason(&found, "cached"), "type cache is not supported");
        assert_eq!(reason(&found, "raid5"), "type raid5 is not supported");
        assert_eq!(
            reason(&found, "snap"),
            "a snapshot of root inside the guest"
        );
    }

    #[test]
    fn test_missing_disk_costs_only_what_lies_there() {
        let found = examined(&[pv(PVS[1], KINDS), pv(PVS[2], KINDS)]);
        assert!(reason(&found, "root").starts_with("physical volume pv0 (ScdqkZ-oeyM-"));
        // The other images are present.
        assert_eq!(
            volume(&found, "mirror").layout.contiguous(),
            Some(run(0, 31, 8))
        );
        assert_eq!(
            volume(&found, "raid1").layout.contiguous(),
            Some(run(0, 9, 8))
        );
        let note = "VolGroup00/raid1: raid1 with 1 of 2 images, image 1 is read";
        assert!(found.notes.iter().any(|n| n == note), "{:?}", found.notes);
    }

    #[test]
    fn test_newest_metadata_count() {
        let old = KINDS
            .replace("seqno = 28", "seqno = 27")
            .replace("striped {", "older {");
        let found = examined(&[pv(PVS[0], &old), pv(PVS[1], KINDS), pv(PVS[2], &old)]);
        assert_eq!(found.groups[0].seqno, 28);
        assert!(volume(&found, "striped").size() == 8 * MIB);
        assert!(found.notes.iter().any(|n| n.contains("outdated")));
        // A damaged text counts as missing.
        let mut damaged = pv(PVS[1], KINDS);
        damaged.0[5000] ^= 1;
        let found = examined(&[pv(PVS[0], &old), damaged, pv(PVS[2], &old)]);
        assert_eq!(found.groups[0].seqno, 27);
        assert!(
            found.notes.iter().any(|n| n.contains("checksum")),
            "{:?}",
            found.notes
        );
    }

    #[test]
    fn test_no_more_text_is_read_than_there_is_budget() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        struct Counting(Sparse, AtomicUsize);
        impl ReadAt for Counting {
            fn size(&self) -> u64 {
                self.0.size()
            }
            fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
                self.1.fetch_add(buf.len(), Ordering::Relaxed);
                self.0.read_exact_at(buf, offset)
            }
        }
        let mut damaged = pv(PVS[0], KINDS);
        damaged.0[5000] ^= 1;
        let size = KINDS.len();
        let mut budget = u64::try_from(3 * size - 1).unwrap();
        let too_much = Held::Unusable("too much LVM metadata in one guest");
        let checksum = Held::Unusable("wrong checksum of the text");
        for (disk, expected, read) in [
            (
                pv(PVS[0], KINDS),
                Held::Text(KINDS.as_bytes().to_vec()),
                512 + size,
            ),
            (damaged, checksum, 512 + size),
            (pv(PVS[0], KINDS), too_much, 512),
        ] {
            let disk = Counting(disk, AtomicUsize::new(0));
            let found = label::text(&disk, 4096, MIB - 4096, &mut budget).unwrap();
            assert_eq!(found, expected);
            assert_eq!(disk.1.into_inner(), read);
        }
        assert_eq!(budget, u64::try_from(size - 1).unwrap());
    }

    #[test]
    fn test_entries_for_the_same_place_are_one_physical_volume() {
        let mut disk = vec![0; usize::try_from(MIB).unwrap()];
        for entry in 0..2 {
            mbr::tests::put(&mut disk, 0, entry, 0x8E, 2048, 4096);
        }
        disk.extend(pv(PVS[1], KINDS).0);
        let found = examined(&[Sparse(disk)]);
        assert_eq!(found.groups[0].physical_volumes, ["p1"]);
        let twice = |note: &String| note.contains("twice");
        assert!(!found.notes.iter().any(twice), "{:?}", found.notes);
        // The partition table's own note names the other.
        assert!(
            found.notes.iter().any(|n| n == "disk: p1 and p2 overlap"),
            "{:?}",
            found.notes
        );
    }

    #[test]
    fn test_damaged_metadata_are_a_loss_and_none_are_not() {
        let kinds = |disk: Sparse| {
            let found = examined(&[disk]);
            let skipped = found.skipped.into_iter();
            skipped
                .map(|s| (s.name, s.kind, s.kind.loss(), s.disk))
                .collect::<Vec<_>>()
        };
        let damaged = |at: usize| {
            let mut disk = pv(PVS[0], KINDS);
            disk.0[at] ^= 1;
            disk
        };
        let loss = (
            "disk".to_owned(),
            SkippedKind::DamagedPv,
            Some(crate::Code::BadGuestLvm),
            Some(0),
        );
        // Damage in the header of the metadata area, and in the text.
        assert_eq!(kinds(damaged(4110)), std::slice::from_ref(&loss));
        assert_eq!(kinds(damaged(5000)), std::slice::from_ref(&loss));
        // After pvcreate: an area without a text.
        let mut new = pv(PVS[0], KINDS);
        new.0[4136..4160].fill(0);
        let crc = register(LVM2_START, &new.0[4100..4608]);
        new.0[4096..4100].copy_from_slice(&crc.to_le_bytes());
        let unused = ("disk".to_owned(), SkippedKind::UnusedPv, None, Some(0));
        assert_eq!(kinds(new), [unused]);
    }

    #[test]
    fn test_entangled_volumes_end() {
        use std::fmt::Write;
        // Eight levels, each a mirror of twenty times the next, and the last one is missing.
        let mut lvs = String::new();
        for level in 0..8 {
            let images = vec![format!("\"l{}\", 0", level + 1); 20].join(", ");
            writeln!(
                lvs,
                "l{level} {{ id = \"x\" status = [\"VISIBLE\"] segment1 {{ start_extent = 0 \
                 extent_count = 1 type = \"mirror\" mirrors = [{images}] }} }}"
            )
            .unwrap();
        }
        let text = KINDS.replace("logical_volumes {", &format!("logical_volumes {{ {lvs}"));
        let found = examined(&PVS.map(|uuid| pv(uuid, &text)));
        assert_eq!(reason(&found, "l7"), "l8 is missing in the metadata");
        // Resolution ended; the other volumes are unaffected.
        assert_eq!(reason(&found, "l0"), "l8 is missing in the metadata");
        assert!(volume(&found, "raid1").size() == 8 * MIB);
    }

    #[test]
    fn test_stripes_and_images_count_as_work() {
        use std::fmt::Write;
        let areas = |count: usize| vec!["\"pv0\", 0"; count].join(", ");
        let images = |count: usize| vec!["\"root\", \"root\""; count].join(", ");
        let lv = |name: &str, segments: &str| {
            format!("{name} {{ id = \"x\" status = [\"VISIBLE\"] {segments} }}\n")
        };
        let segment = |number: usize, extents: usize, rest: &str| {
            let start = number * extents;
            format!("segment{number} {{ start_extent = {start} extent_count = {extents} {rest} }}")
        };
        let striped = |count| {
            let rest = "type = \"striped\" stripe_size = 1 stripes";
            segment(0, count, &format!("{rest} = [{}]", areas(count)))
        };
        let mut lvs = lv("most", &striped(128)) + &lv("more", &striped(129));
        let mirrors = format!("type = \"mirror\" mirrors = [{}]", areas(65));
        lvs += &lv("mirrors", &segment(0, 1, &mirrors));
        let raids = format!("type = \"raid1\" raids = [{}]", images(65));
        lvs += &lv("raids", &segment(0, 1, &raids));
        // Fifty times 128 stripes, in each of 200 volumes.
        let part = "type = \"striped\" stripes = [\"most\", 0]";
        let parts: Vec<String> = (0..50).map(|n| segment(n, 128, part)).collect();
        lvs += &lv("parts", &parts.join(" "));
        let whole = segment(0, 50 * 128, "type = \"striped\" stripes = [\"parts\", 0]");
        for number in 0..200 {
            write!(lvs, "{}", lv(&format!("zz{number:03}"), &whole)).unwrap();
        }
        let text = KINDS.replace("logical_volumes {", &format!("logical_volumes {{ {lvs}"));
        // A second group with the same volumes.
        let id = text.find("id = \"").unwrap() + 6;
        let first = text[id..id + 2].to_owned();
        let text2 = text.replacen(&format!("\"{first}"), "\"ZZ", 1);
        let text2 = PVS.iter().fold(text2, |text, uuid| {
            let other = dashed(&format!("ZZ{}", &uuid[2..]));
            text.replace(&dashed(uuid), &other)
        });
        let disks = [
            pv(PVS[0], &text),
            pv(&format!("ZZ{}", &PVS[0][2..]), &text2),
        ];
        let disks: Vec<&dyn ReadAt> = disks.iter().map(|d| d as &dyn ReadAt).collect();
        let pvs: Vec<FoundPv> = (0..2)
            .filter_map(|disk| {
                let place = Extent {
                    disk,
                    start: 0,
                    len: 200 * MIB,
                };
                find_pv(&disks, "disk", place).unwrap().map(|pv| FoundPv {
                    name: format!("disk{disk}"),
                    ..pv
                })
            })
            .collect();
        let found = assemble(&disks, &pvs).unwrap();
        assert_eq!(found.groups.len(), 2, "{:?}", found.notes);
        let reason = |name: &str| {
            let skipped = found.skipped.iter().find(|s| s.name == name);
            skipped.map(|s| s.reason.as_str())
        };
        assert_eq!(reason("VolGroup00/most"), None);
        assert_eq!(reason("VolGroup00/more"), Some("more than 128 stripes"));
        assert_eq!(reason("VolGroup00/mirrors"), Some("more than 64 images"));
        assert_eq!(reason("VolGroup00/raids"), Some("more than 64 images"));
        let entangled = Some("the volume group is too entangled");
        assert_eq!(reason("VolGroup00/zz000"), None);
        assert_eq!(reason("VolGroup00/zz199"), entangled);
        assert_eq!(reason("VolGroup00+/zz000"), entangled);
        // Each run of a result takes memory.
        let runs = found.volumes.iter().map(|v| match &v.layout {
            Layout::Segments(segments) => segments.iter().map(|s| s.extents().len()).sum(),
            Layout::Thin { .. } => 0,
        });
        assert!(runs.sum::<usize>() < 2_000_000);
    }

    #[test]
    fn test_many_volumes_are_told_of_once() {
        use crate::disk::volume::MAX_VOLUMES;
        use std::fmt::Write;
        let mut lvs = String::new();
        for number in 0..2000 {
            let pv = ["pv0", "none"][number % 2];
            writeln!(
                lvs,
                "zz{number} {{ id = \"x\" status = [\"VISIBLE\"] segment1 {{ start_extent = 0 \
                 extent_count = 1 type = \"striped\" stripes = [\"{pv}\", 0] }} }}"
            )
            .unwrap();
        }
        let text = KINDS.replace("logical_volumes {", &format!("logical_volumes {{ {lvs}"));
        let found = examined(&PVS.map(|uuid| pv(uuid, &text)));
        assert_eq!(found.volumes.len(), MAX_VOLUMES);
        assert_eq!(found.skipped.len(), MAX_VOLUMES + 1);
        let many = |s: &&Skipped| s.kind == SkippedKind::TooMany;
        assert_eq!(found.skipped.iter().filter(many).count(), 1);
    }

    #[test]
    fn test_long_names_are_cut() {
        let name = "\u{fc}".repeat(100_000);
        let text = KINDS.replacen("\"mirror_mimage_0\"", &format!("\"{name}\""), 1);
        let text = text.replacen("\"mirror_mimage_1\"", &format!("\"{name}\""), 1);
        let found = examined(&PVS.map(|uuid| pv(uuid, &text)));
        let reason = reason(&found, "mirror");
        assert!(reason.ends_with("is missing in the metadata"), "{reason}");
        assert!(reason.len() < 200, "{} bytes", reason.len());
    }

    #[test]
    fn test_merging_and_circles() {
        let merging = KINDS.replace("cow_store = ", "merging_store = ");
        let found = examined(&PVS.map(|uuid| pv(uuid, &merging)));
        assert_eq!(reason(&found, "root"), "a snapshot is being merged into it");
        // A mirror of itself.
        let circle = KINDS
            .replace("\"mirror_mimage_0\", 0", "\"mirror\", 0")
            .replace("\"mirror_mimage_1\", 0", "\"mirror\", 0");
        let found = examined(&PVS.map(|uuid| pv(uuid, &circle)));
        assert_eq!(reason(&found, "mirror"), "volumes within volumes too deep");
        // Extents that the PV does not have.
        let beyond = KINDS.replace("\"pv0\", 0\n", "\"pv0\", 195\n");
        let found = examined(&PVS.map(|uuid| pv(uuid, &beyond)));
        assert_eq!(
            reason(&found, "root"),
            "extents beyond the end of physical volume pv0"
        );
    }
}
