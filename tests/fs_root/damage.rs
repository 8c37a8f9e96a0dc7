//! Damaged filesystems: an error with a reason, and the rest is walked.

use crate::populate::set_xattr;
use guestsnap::config::FsPolicy;
use guestsnap::fs::{DetachedMount, GuestTree, Note, NoteLevel};
use guestsnap::stream::{AheadOptions, Item, ReadAhead, WalkOptions, Walker, ahead};
use guestsnap_bed::images::{
    Bench, Loop, assert_gone, filesystem_of, named, paths, single, volume,
};
use guestsnap_bed::run;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

#[test]
fn root_damage_is_an_error_with_a_reason() {
    let bench = Bench::alone();
    let image = bench.image("guest.img", "xfs", &[]);
    let device = Loop::new(&image);
    let file = device.open();
    let filesystem = filesystem_of(&file);
    // The root inode's block group header: the superblock stays good.
    file.write_all_at(&[0x5a; 1536], 512).unwrap();
    file.write_all_at(&[0x5a; 65536], 65536).unwrap();
    file.sync_all().unwrap();
    let policy = FsPolicy::default();
    match DetachedMount::open(file.as_fd(), &filesystem, &policy, "web1") {
        Ok(_) => panic!("a damaged xfs was mounted"),
        Err(error) => {
            let report = error.report();
            assert!(
                report.starts_with("GS-503") && report.contains("web1"),
                "{report}"
            );
            eprintln!("{report}");
        }
    }
}

#[test]
fn root_a_damaged_folder_is_a_problem_and_the_rest_is_walked() {
    let bench = Bench::alone();
    let image = bench.image("guest.img", "ext4", &["-O", "^metadata_csum"]);
    {
        let attached = bench.attach(&image);
        for folder in ["good", "lost", "broken"] {
            fs::create_dir(attached.directory.join(folder)).unwrap();
            for n in 0..500 {
                fs::write(attached.directory.join(format!("{folder}/{n:060}")), "x").unwrap();
            }
        }
    }
    // One directory loses its inode, the other a block in its middle.
    run!("debugfs", "-w", "-R", "clri lost", &image);
    let block = run!("debugfs", "-R", "bmap broken 5", &image);
    let block: u64 = block.trim().parse().unwrap();
    let file = OpenOptions::new().write(true).open(&image).unwrap();
    file.write_all_at(&[0xff; 4096], block * 4096).unwrap();
    drop(file);

    let device = Loop::new(&image);
    let tree = single(&device);
    let mut problems = BTreeMap::new();
    let mut good = 0;
    let mut broken = 0;
    let mut incomplete = BTreeSet::new();
    for item in Walker::new(&tree, WalkOptions::default()) {
        match item {
            Item::Problem(problem) => {
                assert!(problem.subtree);
                problems.insert(problem.path, problem.error.report());
            }
            Item::Object(entry) if entry.path.starts_with(b"good/") => good += 1,
            Item::Object(entry) if entry.path.starts_with(b"broken/") => broken += 1,
            Item::End(entry) if entry.incomplete => {
                incomplete.insert(entry.path);
            }
            _ => {}
        }
    }
    assert_eq!(good, 500);
    assert!(broken < 500, "{broken}");
    // ext4 passes over the block without failing a call: all that tells is its counter.
    let paths: Vec<&[u8]> = problems.keys().map(Vec::as_slice).collect();
    assert_eq!(paths, [&b""[..], b"lost"], "{problems:?}");
    assert!(problems[&b""[..]].contains("ext4 found"), "{problems:?}");
    assert_eq!(incomplete, BTreeSet::from([Vec::new()]));
    tree.close().unwrap();
}

/// Offsets of all copies of these bytes.
fn find_all(image: &Path, needle: &[u8]) -> Vec<u64> {
    let bytes = fs::read(image).unwrap();
    let windows = bytes.windows(needle.len()).enumerate();
    let found = windows.filter(|(_, window)| *window == needle);
    let at: Vec<u64> = found.map(|(at, _)| at as u64).collect();
    assert!(!at.is_empty(), "{needle:?} is nowhere");
    at
}

/// Wrong checksums of blocks with names, and of a file's contents where there are such: each object is given, or a
/// problem names it or a folder it is in.
#[test]
fn root_blocks_with_wrong_checksums_are_problems_and_the_rest_is_walked() {
    for kind in ["xfs", "btrfs"] {
        let bench = Bench::alone();
        let image = bench.image("guest.img", kind, &[]);
        let mut expected = BTreeSet::from([b"contents".to_vec()]);
        {
            let attached = bench.attach(&image);
            // So many that neither the root nor the last folder shares a block with the one in the middle.
            for folder in ["top", "top/first", "top/broken", "top/between", "top/good"] {
                fs::create_dir(attached.directory.join(folder)).unwrap();
                for n in 0..500 {
                    let path = format!("{folder}/{}-{n:060}", folder.replace('/', "."));
                    fs::write(attached.directory.join(&path), "x").unwrap();
                    expected.insert(path.into_bytes());
                }
            }
            let mut contents = vec![b'c'; 64 << 10];
            contents[..12].copy_from_slice(b"a file's own");
            fs::write(attached.directory.join("contents"), contents).unwrap();
        }
        let mut damage = find_all(&image, format!("top.broken-{:060}", 250).as_bytes());
        if kind == "btrfs" {
            damage.extend(find_all(&image, b"a file's own"));
        }
        let file = OpenOptions::new().write(true).open(&image).unwrap();
        for at in damage {
            file.write_all_at(b"?", at).unwrap();
        }
        drop(file);

        let device = Loop::new(&image);
        let tree = single(&device);
        let mut problems = BTreeSet::new();
        let mut given = BTreeSet::new();
        let mut unread = Vec::new();
        let ahead = ReadAhead::start(&tree, WalkOptions::default(), AheadOptions::default());
        for item in ahead.unwrap() {
            match item {
                ahead::Item::Problem(problem) => {
                    problems.insert(problem.path);
                }
                ahead::Item::Object(mut prepared) => {
                    let mut buffer = vec![0; 128 << 10];
                    if prepared.contents().unwrap().read(&mut buffer).is_err() {
                        unread.push(prepared.entry.path.clone());
                    }
                    given.insert(prepared.entry.path);
                }
                _ => {}
            }
        }
        let told = |path: &[u8]| {
            let parents = path.iter().enumerate().filter(|(_, byte)| **byte == b'/');
            problems.contains(path)
                || parents
                    .map(|(at, _)| &path[..at])
                    .any(|p| problems.contains(p))
        };
        let missing: Vec<_> = expected.difference(&given).collect();
        assert!(!missing.is_empty(), "{kind}: nothing was damaged");
        assert!(
            missing.iter().all(|path| told(path)),
            "{kind}: not all is told"
        );
        let good = |path: &&Vec<u8>| path.starts_with(b"top/good/");
        assert_eq!(given.iter().filter(good).count(), 500, "{kind}");
        // Contents of small files are in the blocks of btrfs that hold names: a neighbour may be unread, which is told.
        let unread_good = unread.iter().filter(good).count();
        let lost = unread.contains(&b"contents".to_vec());
        assert_eq!((unread_good, lost), (0, kind == "btrfs"), "{kind}");
        tree.close().unwrap();
    }
}

/// A btrfs that is not the root: the folder whose inode is lost is a problem, and the guest is saved.
#[test]
fn root_a_lost_folder_at_the_top_of_btrfs_is_no_lost_guest() {
    let bench = Bench::alone();
    let system = bench.image("system.img", "ext4", &["-L", "system"]);
    {
        let attached = bench.attach(&system);
        for folder in ["etc", "data"] {
            fs::create_dir(attached.directory.join(folder)).unwrap();
        }
        let text = "LABEL=system / ext4\nLABEL=data /data btrfs\n";
        fs::write(attached.directory.join("etc/fstab"), text).unwrap();
    }
    let data = bench.image("data.img", "btrfs", &["-L", "data"]);
    {
        let attached = bench.attach(&data);
        for folder in ["good", "lost", "also-good"] {
            let folder = attached.directory.join(folder);
            fs::create_dir(&folder).unwrap();
            for n in 0..500 {
                fs::write(folder.join(format!("{n:060}")), "x").unwrap();
            }
        }
        let lost = attached.directory.join("lost");
        run!(
            "setfattr",
            "-n",
            "user.mark",
            "-v",
            "beside the inode",
            &lost
        );
    }
    let file = OpenOptions::new().write(true).open(&data).unwrap();
    for at in find_all(&data, b"beside the inode") {
        file.write_all_at(b"?", at).unwrap();
    }
    drop(file);

    let (first, second) = (Loop::new(&system), Loop::new(&data));
    let alone = GuestTree::assemble(vec![volume(&second, named("p2"))]);
    let error = alone.expect_err("a root could be in what is lost").report();
    assert!(error.contains("p2: listing it"), "{error}");
    let volumes = vec![volume(&first, named("p1")), volume(&second, named("p2"))];
    let tree = GuestTree::assemble(volumes).unwrap();
    let (mut files, mut problems) = (0, BTreeSet::new());
    for item in Walker::new(&tree, WalkOptions::default()) {
        match item {
            Item::Object(entry) => files += usize::from(entry.path.starts_with(b"data/")),
            Item::Problem(problem) => drop(problems.insert(problem.path)),
            _ => {}
        }
    }
    assert!(problems.contains(&b"data/lost"[..]), "{problems:?}");
    assert!((500..=1000).contains(&files), "{files}");
    let unsure =
        |note: &Note| note.level == NoteLevel::Error && note.text.contains("p2: listing it");
    assert!(tree.notes().iter().any(unsure), "{:?}", tree.notes());
    tree.close().unwrap();
}

/// `nofail` is for what may be away. A subvolume that is there and cannot be read is missed.
#[test]
fn root_a_damaged_subvolume_is_missed_though_it_may_be_away() {
    let bench = Bench::alone();
    let image = bench.image("guest.img", "btrfs", &["-L", "sys"]);
    {
        let attached = bench.attach(&image);
        let top = &attached.directory;
        for name in ["@", "@data"] {
            run!("btrfs", "subvolume", "create", &top.join(name));
        }
        for folder in ["@/etc", "@/data"] {
            fs::create_dir(top.join(folder)).unwrap();
        }
        let text = "LABEL=sys / btrfs subvol=@\nLABEL=sys /data btrfs subvol=@data,nofail\n";
        fs::write(top.join("@/etc/fstab"), text).unwrap();
        set_xattr(&top.join("@data"), "user.mark", b"beside the inode");
    }
    let file = OpenOptions::new().write(true).open(&image).unwrap();
    for at in find_all(&image, b"beside the inode") {
        file.write_all_at(b"?", at).unwrap();
    }
    drop(file);
    let device = Loop::new(&image);
    let tree = single(&device);
    let [missing] = tree.missing() else {
        panic!("{:?}, {:?}", tree.missing(), tree.notes())
    };
    assert!(missing.line.optional);
    assert_eq!(missing.place.as_deref(), Some(&b"data"[..]));
    let text = missing.to_string();
    assert!(
        text.starts_with("fstab: /data (LABEL=sys): subvolume @data: "),
        "{text}"
    );
    // The rest of the guest is there.
    assert!(paths(&tree, WalkOptions::default()).contains(&"etc/fstab".to_owned()));
    tree.close().unwrap();
    assert_gone(&device);
}
