//! Filesystems joined to one tree by the fstab of the guest.

use crate::round_trip::copy;
use guestsnap::fs::{GuestTree, Note, NoteLevel};
use guestsnap::stream::{Item, WalkOptions, Walker};
use guestsnap_bed::images::{
    Bench, Loop, assert_gone, named, open_descriptors, paths, single, volume,
};
use guestsnap_bed::run;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

/// A disk that the guest mounts below a nested subvolume: the walk comes back from deep inside it, and still leaves out
/// what is beside it.
#[test]
fn root_what_is_left_out_of_btrfs_stays_out_around_a_joined_disk() {
    let bench = Bench::alone();
    let system = bench.image("system.img", "btrfs", &["-L", "system"]);
    {
        let attached = bench.attach(&system);
        let top = &attached.directory;
        fs::create_dir(top.join("etc")).unwrap();
        let text = "LABEL=system / btrfs\nLABEL=data /srv/data ext4\n";
        fs::write(top.join("etc/fstab"), text).unwrap();
        run!("btrfs", "subvolume", "create", &top.join("from"));
        run!(
            "btrfs",
            "subvolume",
            "snapshot",
            &top.join("from"),
            &top.join("srv")
        );
        fs::create_dir(top.join("srv/data")).unwrap();
        fs::write(top.join("srv/left-out"), "x").unwrap();
    }
    let data = bench.image("data.img", "ext4", &["-L", "data"]);
    {
        let attached = bench.attach(&data);
        fs::create_dir_all(attached.directory.join("a/b/c/d/e/f")).unwrap();
    }
    let (first, second) = (Loop::new(&system), Loop::new(&data));
    let volumes = vec![volume(&first, named("p1")), volume(&second, named("p2"))];
    let tree = GuestTree::assemble(volumes).unwrap();
    let options = WalkOptions {
        open_directories: 2,
        ..WalkOptions::default()
    };
    let all = paths(&tree, options);
    assert!(all.contains(&"srv/data/a/b/c/d/e/f/".to_owned()), "{all:?}");
    assert!(!all.contains(&"srv/left-out".to_owned()), "{all:?}");
    tree.close().unwrap();
}

#[test]
fn root_absolute_links_stay_in_the_guest() {
    let bench = Bench::alone();
    let image = bench.image("guest.img", "ext4", &["-L", "system"]);
    {
        let attached = bench.attach(&image);
        let top = &attached.directory;
        fs::create_dir_all(top.join("real/etc")).unwrap();
        fs::create_dir_all(top.join("run/data")).unwrap();
        symlink("/real/etc", top.join("etc")).unwrap();
        symlink("/real/etc/true-fstab", top.join("real/etc/fstab")).unwrap();
        let text = "LABEL=system / ext4\nLABEL=other /data ext4\n";
        fs::write(top.join("real/etc/true-fstab"), text).unwrap();
        symlink("/run/data", top.join("data")).unwrap();
    }
    let data = bench.image("data.img", "ext4", &["-L", "other"]);
    let (first, second) = (Loop::new(&data), Loop::new(&image));
    let volumes = vec![volume(&first, named("p1")), volume(&second, named("p2"))];
    let tree = GuestTree::assemble(volumes).unwrap();
    let joins: Vec<(&[u8], &str)> = tree
        .joins()
        .iter()
        .map(|j| (j.path.as_slice(), j.volume.as_str()))
        .collect();
    assert_eq!(
        joins,
        [(&b""[..], "p2"), (b"run/data", "p1")],
        "{:?}",
        tree.notes()
    );
    let all = paths(&tree, WalkOptions::default());
    assert!(all.contains(&"run/data/lost+found/".to_owned()), "{all:?}");
    assert!(all.contains(&"data".to_owned()));
    tree.close().unwrap();
}

/// A root whose fstab names three others, one of them for a folder that is not there.
fn images_of_four_filesystems(bench: &Bench) -> [PathBuf; 4] {
    let images = [
        bench.image("root.img", "ext4", &["-L", "root"]),
        bench.image("var.img", "xfs", &["-L", "var"]),
        bench.image("log.img", "ext4", &["-L", "log"]),
        bench.image("extra.img", "ext4", &["-L", "extra"]),
    ];
    {
        let attached = bench.attach(&images[0]);
        let top = &attached.directory;
        fs::create_dir_all(top.join("etc")).unwrap();
        fs::create_dir_all(top.join("var/hidden-below-the-mount")).unwrap();
        fs::create_dir(top.join(".guestsnap")).unwrap();
        let text = "LABEL=root / ext4 defaults 0 1\n\
                    LABEL=log /var/log ext4\n\
                    LABEL=var /var xfs\n\
                    LABEL=gone /gone ext4\n\
                    LABEL=extra /no-such-folder ext4\n\
                    LABEL=root /again ext4\n";
        fs::write(top.join("etc/fstab"), text).unwrap();
    }
    {
        let attached = bench.attach(&images[1]);
        fs::create_dir_all(attached.directory.join("log")).unwrap();
        fs::write(attached.directory.join("in-var"), "x").unwrap();
    }
    {
        let attached = bench.attach(&images[2]);
        fs::write(attached.directory.join("in-log"), "x").unwrap();
    }
    images
}

#[test]
fn root_filesystems_are_joined_and_the_rest_is_kept() {
    let bench = Bench::alone();
    let images = images_of_four_filesystems(&bench);
    let loops: Vec<Loop> = images.iter().map(|i| Loop::new(i)).collect();
    let names = ["log", "extra", "root", "var"];
    let order = [2, 3, 0, 1];
    let volumes = order
        .iter()
        .zip(names)
        .map(|(&n, name)| volume(&loops[n], named(name)))
        .collect();
    let tree = GuestTree::assemble(volumes).unwrap();
    assert_eq!(tree.private(), b".guestsnap-1");
    for options in [
        WalkOptions::default(),
        WalkOptions {
            open_directories: 2,
            batch_bytes: 1,
            names_bytes: 0,
            ..WalkOptions::default()
        },
    ] {
        let mut all = paths(&tree, options);
        assert_eq!(all.pop().unwrap(), "/");
        all.sort();
        assert_eq!(
            all,
            [
                ".guestsnap-1/",
                ".guestsnap-1/volumes/",
                ".guestsnap-1/volumes/extra/",
                ".guestsnap-1/volumes/extra/lost+found/",
                ".guestsnap/",
                "etc/",
                "etc/fstab",
                "lost+found/",
                "var/",
                "var/in-var",
                "var/log/",
                "var/log/in-log",
                "var/log/lost+found/",
            ]
        );
    }
    let warned = |text: &str| {
        tree.notes()
            .iter()
            .any(|n| n.level == NoteLevel::Warning && n.text.contains(text))
    };
    let missing: Vec<String> = tree.missing().iter().map(ToString::to_string).collect();
    assert_eq!(
        missing,
        ["fstab: /gone (LABEL=gone) is not among the guest's opened filesystems"]
    );
    assert_eq!(tree.unlisted(), 1);
    assert!(warned("/no-such-folder"), "{:?}", tree.notes());
    assert!(warned("not saved twice"), "{:?}", tree.notes());
    let target = bench.path("target");
    assert_eq!(
        copy(&tree, WalkOptions::default(), &target),
        Vec::<String>::new()
    );
    assert!(target.join("guest/var/log/in-log").exists());
    tree.close().unwrap();
    for device in &loops {
        assert_gone(device);
    }
}

#[test]
fn root_a_guest_without_a_root_is_kept_volume_by_volume() {
    let bench = Bench::alone();
    let images = [
        bench.image("a.img", "ext4", &[]),
        bench.image("b.img", "ext4", &[]),
    ];
    let loops: Vec<Loop> = images.iter().map(|i| Loop::new(i)).collect();
    let volumes = loops
        .iter()
        .map(|l| volume(l, named("same/name")))
        .collect();
    let tree = GuestTree::assemble(volumes).unwrap();
    assert_eq!(
        paths(&tree, WalkOptions::default()),
        [
            ".guestsnap/volumes/same-name/lost+found/",
            ".guestsnap/volumes/same-name/",
            ".guestsnap/volumes/same-name-2/lost+found/",
            ".guestsnap/volumes/same-name-2/",
            ".guestsnap/volumes/",
            ".guestsnap/",
            "/",
        ]
    );
    assert!(tree.notes().iter().any(|n| n.level == NoteLevel::Warning));
    let target = bench.path("target");
    assert_eq!(
        copy(&tree, WalkOptions::default(), &target),
        Vec::<String>::new()
    );
    tree.close().unwrap();
}

/// A root whose fstab cannot be read is saved, with an error: what it joins is in other places. Beside one that is
/// sure it does not matter.
#[test]
fn root_an_fstab_that_cannot_be_read_is_told() {
    let bench = Bench::alone();
    let image = |name: &str, label: &str, fstab: &str| {
        let image = bench.image(name, "ext4", &["-L", label]);
        let attached = bench.attach(&image);
        match fstab {
            "" => fs::create_dir_all(attached.directory.join("etc/fstab")).unwrap(),
            text => {
                fs::create_dir(attached.directory.join("etc")).unwrap();
                fs::write(attached.directory.join("etc/fstab"), text).unwrap();
            }
        }
        drop(attached);
        Loop::new(&image)
    };
    let lost = image("lost.img", "lost", "");
    let sure = image("sure.img", "sure", "LABEL=sure / ext4");
    // It was copied there.
    let other = image("other.img", "other", "LABEL=else / ext4");
    for (beside, told) in [(None, true), (Some(&other), true), (Some(&sure), false)] {
        let mut volumes = vec![volume(&lost, named("p1"))];
        volumes.extend(beside.map(|device| volume(device, named("p2"))));
        let tree = GuestTree::assemble(volumes).unwrap();
        let error = tree.unread_fstab().map(|e| e.report()).unwrap_or_default();
        assert_eq!(error.contains("its /etc/fstab: p1: "), told, "{error}");
        let warned =
            |n: &Note| n.level == NoteLevel::Warning && n.text.contains("its /etc/fstab: p1: ");
        assert_eq!(tree.notes().iter().any(warned), !told, "{:?}", tree.notes());
        tree.close().unwrap();
    }
}

/// However many subvolumes look like the root, few descriptors are open at the same time.
#[test]
fn root_many_roots_need_few_descriptors() {
    let bench = Bench::alone();
    let image = bench.image("guest.img", "btrfs", &["-L", "sys"]);
    {
        let attached = bench.attach(&image);
        for number in 100..200 {
            let path = attached.directory.join(number.to_string());
            run!("btrfs", "subvolume", "create", &path);
            fs::create_dir(path.join("etc")).unwrap();
            fs::write(path.join("etc/fstab"), "LABEL=sys / btrfs").unwrap();
        }
    }
    let device = Loop::new(&image);
    let volumes = vec![volume(&device, named("p1"))];
    let before = getrlimit(Resource::Nofile);
    let few = open_descriptors().len() as u64 + 30;
    let limited = Rlimit {
        current: Some(few),
        ..before
    };
    setrlimit(Resource::Nofile, limited).unwrap();
    let tree = GuestTree::assemble(volumes);
    setrlimit(Resource::Nofile, before).unwrap();
    let tree = tree.unwrap();
    let unsure = tree.unsure().map(ToString::to_string).unwrap_or_default();
    assert!(
        unsure.contains("p1, subvolume 100; ")
            && unsure.ends_with("; p1, subvolume 107 and 92 more"),
        "{unsure}"
    );
    tree.close().unwrap();
    assert_gone(&device);
}

#[test]
fn root_skipped_folders_are_not_walked() {
    let bench = Bench::alone();
    let image = bench.image("guest.img", "ext4", &[]);
    {
        let attached = bench.attach(&image);
        fs::create_dir_all(attached.directory.join("skip/inner")).unwrap();
        fs::create_dir_all(attached.directory.join("keep/inner")).unwrap();
    }
    let device = Loop::new(&image);
    let tree = single(&device);
    let mut walker = Walker::new(&tree, WalkOptions::default());
    let mut ends = Vec::new();
    while let Some(item) = walker.next() {
        match item {
            Item::Begin(entry) if entry.name() == b"skip" => walker.leave_out(),
            Item::End(entry) => ends.push(String::from_utf8(entry.path).unwrap()),
            _ => {}
        }
    }
    ends.sort();
    assert_eq!(ends, ["", "keep", "keep/inner", "lost+found"]);
    assert!(tree.close().is_err(), "the walker is still there");
    drop(walker);
}
