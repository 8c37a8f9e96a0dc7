//! Subvolumes and snapshots of btrfs in the tree of a guest.

use guestsnap::Code;
use guestsnap::fs::{GuestTree, Note, NoteLevel};
use guestsnap::stream::{Item, WalkOptions, Walker};
use guestsnap_bed::images::{
    Attached, Bench, Loop, assert_gone, has_driver, named, paths, single, volume,
};
use guestsnap_bed::run;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

#[test]
fn root_btrfs_subvolumes_are_joined_by_fstab() {
    let bench = Bench::alone();
    let image = bench.image("guest.img", "btrfs", &["-L", "sys"]);
    lay_out(&bench.attach(&image).directory);
    let device = Loop::new(&image);
    let tree = GuestTree::assemble(vec![volume(&device, named("p1"))]).unwrap();
    let mut all = paths(&tree, WalkOptions::default());
    all.sort();
    assert_eq!(
        all,
        [
            "/",
            "etc/",
            "etc/fstab",
            "home/",
            "home/user",
            "nested/",
            "nested/below/",
            "nested/below/joined/",
            "nested/below/joined/deep",
            // A subvolume that is no snapshot is a folder.
            "nested/inside",
            "srv/",
            "srv/served",
        ],
        "{:?}",
        tree.notes()
    );
    tree.close().unwrap();
    assert_gone(&device);

    // Without an fstab all subvolumes are walked.
    {
        let attached = bench.attach(&image);
        for name in ["@", "@old-root"] {
            fs::remove_file(attached.directory.join(name).join("etc/fstab")).unwrap();
        }
    }
    let tree = GuestTree::assemble(vec![volume(&device, named("p1"))]).unwrap();
    let all = paths(&tree, WalkOptions::default());
    assert!(all.contains(&"@/nested/inside".to_owned()), "{all:?}");
    assert!(all.contains(&"@by-number/served".to_owned()), "{all:?}");
    tree.close().unwrap();
}

/// Two roots of which one is old, and subvolumes that their fstab names by path and by number.
fn lay_out(top: &Path) {
    for name in [
        "@",
        "@home",
        "@old-root",
        "@/nested",
        "@by-number",
        "@below",
    ] {
        run!("btrfs", "subvolume", "create", &top.join(name));
    }
    let number = run!(
        "btrfs",
        "inspect-internal",
        "rootid",
        &top.join("@by-number")
    );
    let fstab = format!(
        "LABEL=sys / btrfs subvol=@ 0 0\n\
             LABEL=sys /home btrfs subvol=/@home 0 0\n\
             LABEL=sys /srv btrfs subvolid={} 0 0\n\
             LABEL=sys /nested/below/joined btrfs subvol=@below 0 0\n",
        number.trim()
    );
    for name in ["@", "@old-root"] {
        fs::create_dir(top.join(name).join("etc")).unwrap();
        fs::write(top.join(name).join("etc/fstab"), &fstab).unwrap();
    }
    fs::create_dir(top.join("@/home")).unwrap();
    fs::create_dir(top.join("@/srv")).unwrap();
    fs::create_dir_all(top.join("@/nested/below/joined")).unwrap();
    fs::write(top.join("@below/deep"), "x").unwrap();
    fs::write(top.join("@home/user"), "x").unwrap();
    fs::write(top.join("@by-number/served"), "x").unwrap();
    fs::write(top.join("@/nested/inside"), "x").unwrap();
}

fn create(path: &Path) {
    run!("btrfs", "subvolume", "create", path);
}

fn with_file(path: &Path) {
    create(path);
    fs::write(path.join("file"), "x").unwrap();
}

/// Changes the image from the top of its tree.
fn change(bench: &Bench, image: &Path, work: &dyn Fn(&Path)) {
    let attached = Attached::new(image, bench.path("mnt"), "subvolid=5");
    work(&attached.directory);
}

/// Messages on the tree, and of the walk; everything must be told.
fn told_but(image: &Path, leave_out: &[u8], silent: &[&[u8]]) -> Vec<String> {
    let device = Loop::new(image);
    let tree = single(&device);
    let mut notes = tree.notes().to_vec();
    notes.extend(tree.placeless(|path| silent.contains(&path)));
    let mut walker = Walker::new(&tree, WalkOptions::default());
    while let Some(item) = walker.next() {
        match item {
            Item::Begin(entry) if entry.path == leave_out => walker.leave_out(),
            Item::LeftOut(left_out) => notes.push(Note::warning(left_out.to_string())),
            Item::Problem(problem) => panic!("{}", problem.error.report()),
            _ => {}
        }
    }
    drop(walker);
    tree.close().unwrap();
    assert_gone(&device);
    notes.retain(|note| note.level != NoteLevel::Info);
    notes.into_iter().map(|note| note.text).collect::<Vec<_>>()
}

fn told(image: &Path, leave_out: &[u8]) -> Vec<String> {
    told_but(image, leave_out, &[])
}

fn of_tree(names: &str) -> String {
    format!(
        "ERROR GS-512 btrfs subvolumes have no mount point in the guest: p1: subvolumes without a place in \
         the guest's tree: {names}. A line with subvol= and noauto in its fstab gives a place to one. To do: {}. \
         Their content is not in this backup.",
        Code::NoPlace.remedy()
    )
}

fn of_walk(path: &str) -> String {
    format!("/{path} is a snapshot without a line in the guest's fstab: its content is left out")
}

/// A folder is no loss, a subvolume inside of one is; the list has an end.
#[test]
fn root_subvolumes_without_a_place_are_named() {
    let bench = Bench::alone();
    let image = bench.image("guest.img", "btrfs", &["-L", "sys"]);
    change(&bench, &image, &|top| {
        for name in ["@", "@home", "@empty", "@folders"] {
            create(&top.join(name));
        }
        for folder in ["@/etc", "@/home", "@folders/a/b"] {
            fs::create_dir_all(top.join(folder)).unwrap();
        }
        let text = "LABEL=sys / btrfs subvol=@\nLABEL=sys /home btrfs subvol=@home,nofail\n";
        fs::write(top.join("@/etc/fstab"), text).unwrap();
        fs::write(top.join("@home/file"), "x").unwrap();
    });
    assert_eq!(told(&image, b"-"), [""; 0]);
    change(&bench, &image, &|top| {
        with_file(&top.join("@data"));
        with_file(&top.join("@folders/a/b/inner"));
        create(&top.join("@/machines"));
        with_file(&top.join("@/plain"));
        run!(
            "btrfs",
            "subvolume",
            "snapshot",
            &top.join("@/plain"),
            &top.join("@/docker")
        );
    });
    let tree = of_tree("@data, @folders/a/b/inner");
    assert_eq!(told(&image, b"-"), [tree.clone(), of_walk("docker")]);
    assert_eq!(told(&image, b"docker"), [tree]);
    names_have_an_end(&bench, &image);
    let image = bench.image("suse.img", "btrfs", &["-L", "sys"]);
    suse(&bench.attach(&image).directory);
    assert_eq!(told(&image, b"-"), [of_walk(".snapshots/2/snapshot")]);
}

fn names_have_an_end(bench: &Bench, image: &Path) {
    change(bench, image, &|top| {
        fs::write(top.join("file"), "x").unwrap();
        for number in 0..20 {
            with_file(&top.join(format!("@s{number:02}")));
        }
    });
    let names =
        "the top itself, @data, @folders/a/b/inner, @s00, @s01, @s02, @s03, @s04 and 15 more";
    assert_eq!(told(image, b"docker"), [of_tree(names)]);
    // Names without end are not looked at.
    change(bench, image, &|top| {
        for number in 0..1100 {
            fs::create_dir(top.join(format!("@folders/a/{number}"))).unwrap();
        }
        create(&top.join("@folders/a/unseen"));
    });
    let names = "the top itself, @data, @s00, @s01, @s02, @s03, @s04, @s05 and 14 more, and maybe some that were \
                 not looked at";
    assert_eq!(told(image, b"docker"), [of_tree(names)]);
    // Subvolumes left out on purpose are not told, and nothing in them is looked at; of the top itself nothing else is meant.
    let left_out: Vec<String> = (0..20).map(|number| format!("@s{number:02}")).collect();
    let mut silent: Vec<&[u8]> = left_out.iter().map(|name| name.as_bytes()).collect();
    silent.extend([&b"@folders/a"[..], b""]);
    assert_eq!(told_but(image, b"docker", &silent), [of_tree("@data")]);
    silent.push(b"@data");
    assert_eq!(told_but(image, b"docker", &silent), [""; 0]);
}

/// The layout of openSUSE: the root is a snapshot, and `@` holds nothing but the others.
fn suse(top: &Path) {
    for name in ["@", "@/.snapshots", "@/usr/local"] {
        fs::create_dir_all(top.join(name).parent().unwrap()).unwrap();
        create(&top.join(name));
    }
    for number in ["1", "2"] {
        fs::create_dir(top.join("@/.snapshots").join(number)).unwrap();
        let snapshot = top.join("@/.snapshots").join(number).join("snapshot");
        match number {
            "1" => with_file(&snapshot),
            _ => drop(run!(
                "btrfs",
                "subvolume",
                "snapshot",
                &top.join("@/.snapshots/1/snapshot"),
                &snapshot
            )),
        }
    }
    let root = top.join("@/.snapshots/1/snapshot");
    for folder in ["usr/local", "etc", ".snapshots"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    let text = "LABEL=sys / btrfs\nLABEL=sys /usr/local btrfs subvol=/@/usr/local\n\
                LABEL=sys /.snapshots btrfs subvol=/@/.snapshots\n";
    fs::write(root.join("etc/fstab"), text).unwrap();
    run!("btrfs", "subvolume", "set-default", &root);
}

/// A system that moved into a subvolume left its files at the top, and snapshots hold the fstab of what they were made of.
#[test]
fn root_an_old_root_at_the_top_of_btrfs_is_not_the_root() {
    let bench = Bench::alone();
    let image = bench.image("guest.img", "btrfs", &["-L", "sys"]);
    // The fstab's line in `@` for the root, whether the default is `@`, and the root.
    for (options, set_default, root) in [
        ("subvol=@", false, "p1, subvolume @ (its own fstab says so)"),
        (
            "subvolid=N",
            false,
            "p1, subvolume @ (its own fstab says so)",
        ),
        ("subvol=@", true, "p1 (its own fstab says so)"),
        // Nothing names it: the default one is right.
        ("defaults", false, "p1 (its own fstab says so)"),
        ("defaults", true, "p1 (its own fstab says so)"),
    ] {
        {
            let attached = Attached::new(&image, bench.path("mnt"), "subvolid=5");
            let top = &attached.directory;
            if !top.join("@").exists() {
                run!("btrfs", "subvolume", "create", &top.join("@"));
                fs::create_dir(top.join("etc")).unwrap();
                fs::create_dir(top.join("@/etc")).unwrap();
                fs::write(top.join("etc/fstab"), "LABEL=sys / btrfs defaults").unwrap();
                fs::write(top.join("@/new"), "x").unwrap();
            }
            let number = run!("btrfs", "inspect-internal", "rootid", &top.join("@"));
            let options = options.replace('N', number.trim());
            let text = format!("LABEL=sys / btrfs {options}\n");
            fs::write(top.join("@/etc/fstab"), text).unwrap();
            for snapshot in ["@-old", "000"] {
                if top.join(snapshot).exists() {
                    run!("btrfs", "subvolume", "delete", &top.join(snapshot));
                }
                run!(
                    "btrfs",
                    "subvolume",
                    "snapshot",
                    &top.join("@"),
                    &top.join(snapshot)
                );
                fs::remove_file(top.join(snapshot).join("new")).unwrap();
            }
            let default = if set_default { number.trim() } else { "5" };
            run!("btrfs", "subvolume", "set-default", default, top);
        }
        let device = Loop::new(&image);
        let tree = single(&device);
        let notes: Vec<&str> = tree.notes().iter().map(|n| n.text.as_str()).collect();
        let what = format!("{options}, {set_default}: {notes:?}");
        assert!(notes.contains(&format!("root: {root}").as_str()), "{what}");
        assert!(!notes.iter().any(|n| n.contains("several")), "{what}");
        let new = set_default || options != "defaults";
        let all = paths(&tree, WalkOptions::default());
        assert_eq!(all.contains(&"new".to_owned()), new, "{what}");
        tree.close().unwrap();
        assert_gone(&device);
    }
}

/// Two filesystems of one place are told apart, also when they are subvolumes of one btrfs.
#[test]
fn root_what_is_shown_at_a_place_has_an_identity() {
    if !has_driver("btrfs") {
        return;
    }
    let bench = Bench::alone();
    let image = bench.image("guest.img", "btrfs", &["-L", "sys"]);
    let change = |change: &dyn Fn(&Path)| {
        let attached = Attached::new(&image, bench.path("mnt"), "subvolid=5");
        change(&attached.directory);
    };
    let identity = || {
        let device = Loop::new(&image);
        let tree = single(&device);
        let identity = tree.joins()[0].identity();
        tree.close().unwrap();
        assert_gone(&device);
        identity
    };
    change(&|top| {
        run!("btrfs", "subvolume", "create", &top.join("@"));
        fs::create_dir(top.join("@/etc")).unwrap();
        let text = "LABEL=sys / btrfs subvol=@\n";
        fs::write(top.join("@/etc/fstab"), text).unwrap();
    });
    let first = identity();
    assert_eq!(identity(), first);
    // The command of a rollback.
    change(&|top| {
        fs::rename(top.join("@"), top.join("@old")).unwrap();
        let (old, new) = (top.join("@old"), top.join("@"));
        run!("btrfs", "subvolume", "snapshot", &old, &new);
    });
    assert_ne!(identity(), first);
}

/// Snapshots hold the fstab of what they were made of: that one is looked at, wherever it is, and if it is damaged.
#[test]
fn root_a_snapshot_is_not_the_root_that_its_fstab_names() {
    let bench = Bench::alone();
    let image = bench.image("guest.img", "btrfs", &["-L", "sys"]);
    let change = |work: &dyn Fn(&Path)| {
        let attached = Attached::new(&image, bench.path("mnt"), "subvolid=5");
        work(&attached.directory);
    };
    let create = |path: &Path| drop(run!("btrfs", "subvolume", "create", path));
    change(&|top| {
        create(&top.join("000"));
        fs::create_dir(top.join("000/etc")).unwrap();
        fs::write(top.join("000/etc/os-release"), "").unwrap();
        fs::write(top.join("000/etc/fstab"), "LABEL=sys / btrfs subvol=@").unwrap();
        let copy = top.join("001");
        run!("btrfs", "subvolume", "snapshot", &top.join("000"), &copy);
        // Their order is that in which they were made.
        for number in 0..260 {
            fs::create_dir(top.join(format!("folder{number}"))).unwrap();
        }
        create(&top.join("@"));
    });
    let device = Loop::new(&image);
    let assemble = || GuestTree::assemble(vec![volume(&device, named("p1"))]);
    let error = assemble().expect_err("an empty root").report();
    assert!(
        error.starts_with("GS-503") && error.contains("p1, subvolume @: "),
        "{error}"
    );
    assert_gone(&device);
    for (fstab, why) in [
        (true, "its own fstab says so"),
        // It cannot be read.
        (false, "it has an os-release file"),
    ] {
        change(&|top| {
            run!("btrfs", "subvolume", "delete", &top.join("@"));
            run!(
                "btrfs",
                "subvolume",
                "snapshot",
                &top.join("000"),
                &top.join("@")
            );
            if !fstab {
                fs::remove_file(top.join("@/etc/fstab")).unwrap();
                symlink("fstab", top.join("@/etc/fstab")).unwrap();
            }
        });
        let tree = assemble().unwrap();
        let notes: Vec<&str> = tree.notes().iter().map(|n| n.text.as_str()).collect();
        let root = format!("root: p1, subvolume @ ({why})");
        assert!(notes.contains(&root.as_str()), "{notes:?}");
        assert!(!notes.iter().any(|n| n.contains("several")), "{notes:?}");
        assert_eq!(tree.unread_fstab().is_none(), fstab);
        tree.close().unwrap();
        assert_gone(&device);
    }
}
