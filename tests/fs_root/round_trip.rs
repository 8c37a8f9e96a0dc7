//! Backup and restore in one go, as Bacula drives them.

use crate::populate::{clear_fences, populate};
use guestsnap::fs::GuestTree;
use guestsnap::inode::{Kind, Meta, Time};
use guestsnap::stream::restore::Created;
use guestsnap::stream::{HardLinks, Replace, Request, Restorer, WalkOptions, Walker, What, ahead};
use guestsnap_bed::images::{Attached, Bench, Loop, assert_gone, named, open_descriptors, volume};
use guestsnap_bed::message;
use guestsnap_bed::run;
use guestsnap_bed::tree::{Ignore, Manifest};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Bacula's stat record has whole seconds.
pub fn as_bacula_keeps_it(meta: &Meta) -> Meta {
    let whole = |t: Time| Time {
        seconds: t.seconds,
        nanoseconds: 0,
    };
    Meta {
        atime: whole(meta.atime),
        mtime: whole(meta.mtime),
        ctime: whole(meta.ctime),
        btime: None,
        ..*meta
    }
}

/// Copies the whole tree below `target`; gives all problems, notes and warnings.
pub fn copy(tree: &GuestTree, options: WalkOptions, target: &Path) -> Vec<String> {
    copy_items(Walker::new(tree, options).map(ahead::Item::from), target)
}

pub fn copy_items(items: impl Iterator<Item = ahead::Item>, target: &Path) -> Vec<String> {
    let mut log = Vec::new();
    let target = target.as_os_str().as_bytes();
    let mut restorer = Restorer::new(Some(target)).unwrap();
    let mut links = HardLinks::new(1 << 20, None);
    let mut buffer = vec![0; 65536];
    let mut index = 0;
    for item in items {
        let mut prepared = match item {
            ahead::Item::Begin(_) => continue,
            ahead::Item::Object(prepared) | ahead::Item::End(prepared) => prepared,
            ahead::Item::Problem(problem) => {
                log.push(problem.error.report());
                continue;
            }
            ahead::Item::LeftOut(left_out) => {
                log.push(left_out.to_string());
                continue;
            }
        };
        let entry = prepared.entry.clone();
        if entry.kind == Kind::Socket {
            continue;
        }
        index += 1;
        let path = [target, b"/guest/", &entry.path].concat();
        let first = links.find(&entry.meta);
        let request = Request {
            path: &path,
            what: match (&first, &entry.link) {
                (Some(first), _) => What::HardLink(&first.path),
                (None, Some(target)) => What::Symlink(target),
                (None, None) => What::Object,
            },
            meta: as_bacula_keeps_it(&entry.meta),
            replace: Replace::Always,
        };
        let created = restorer
            .create(&request)
            .unwrap_or_else(|e| panic!("{}", e.report()));
        if first.is_some() {
            assert_eq!(created, Created::Created);
            log.extend(restorer.finish().unwrap().iter().map(|e| e.report()));
            continue;
        }
        if entry.kind == Kind::Regular {
            assert_eq!(created, Created::Extract);
            let mut contents = prepared.contents().unwrap();
            loop {
                let length = contents.read(&mut buffer).unwrap();
                if length == 0 {
                    break;
                }
                restorer.write(&buffer[..length]).unwrap();
            }
            restorer.finish_data().unwrap();
        }
        let (record, problems) = prepared.attributes().unwrap();
        log.extend(problems.iter().map(|e| e.report()));
        for bytes in record.encode() {
            restorer.apply_record(&bytes).unwrap();
        }
        log.extend(restorer.finish().unwrap().iter().map(|e| e.report()));
        assert!(links.insert(&entry.meta, &path, index));
    }
    log.extend(restorer.end(|problem| panic!("{}", problem.report())));
    log
}

/// Puts every kind of object on `from`, copies it to `to`, and compares.
pub fn round_trip(from: &str, to: &str, options: &WalkOptions) {
    let bench = Bench::alone();
    let source = bench.image("source.img", from, &[]);
    let target = bench.image("target.img", to, &[]);
    let attached = bench.attach(&source);
    populate(&attached.directory);
    run!("sync", "-f", &attached.directory);
    let manifest = |top: &Path| Manifest::of(top).unwrap_or_else(|e| panic!("{}", message(&e)));
    let before = manifest(&attached.directory);
    drop(attached);

    let descriptors = open_descriptors();
    let device = Loop::new(&source);
    let tree = GuestTree::assemble(vec![volume(&device, named("p1"))]).unwrap();
    let target = Attached::new(&target, bench.path("target"), "noatime");
    let log = copy(&tree, options.clone(), &target.directory);
    assert_eq!(log, Vec::<String>::new());
    tree.close().unwrap();
    assert_eq!(open_descriptors(), descriptors);
    assert_gone(&device);
    drop(device);

    let after = manifest(&target.directory.join("guest"));
    let allocated = after.entries[Path::new("sparse")].data();
    assert!(allocated <= 256 << 10, "{allocated}");
    let ignore = Ignore {
        // Bacula does not save them.
        sockets: true,
        // Where an extent ends is the filesystem's business; that holes stayed holes is ours.
        holes: from != to,
        root: true,
        ..Ignore::default()
    };
    let same = after.check_same(&before, &ignore);
    clear_fences(&target.directory);
    same.unwrap_or_else(|e| panic!("{}", message(&e)));
}

#[test]
fn root_every_object_survives_ext4_to_ext4() {
    round_trip("ext4", "ext4", &WalkOptions::default());
}

#[test]
fn root_every_object_survives_xfs_to_xfs() {
    round_trip("xfs", "xfs", &WalkOptions::default());
}

#[test]
fn root_every_object_survives_btrfs_to_btrfs() {
    round_trip("btrfs", "btrfs", &WalkOptions::default());
}

#[test]
fn root_every_object_survives_xfs_to_ext4() {
    round_trip("xfs", "ext4", &WalkOptions::default());
}

#[test]
fn root_every_object_survives_btrfs_to_ext4() {
    round_trip("btrfs", "ext4", &WalkOptions::default());
}

#[test]
fn root_every_object_survives_with_the_smallest_bounds() {
    for fstype in ["ext4", "xfs", "btrfs"] {
        let options = WalkOptions {
            open_directories: 2,
            batch_bytes: 500,
            names_bytes: 0,
            ..WalkOptions::default()
        };
        round_trip(fstype, "ext4", &options);
    }
}

/// Each of these alone is a difference; holes where zeros were, too.
#[test]
fn root_the_comparison_sees_every_difference() {
    let bench = Bench::alone();
    let attached = bench.attach(&bench.image("tree.img", "ext4", &[]));
    let (outside, top) = (
        attached.directory.join("outside"),
        attached.directory.join("tree"),
    );
    let sh = |script: &str| {
        run!("sh", "-euc", &format!("cd '{}'; {script}", top.display()));
    };
    std::fs::create_dir(&top).unwrap();
    sh("dd if=/dev/zero of=file bs=1M count=1 status=none; ln -s a link; mkfifo fifo; sync file");
    let manifest = || Manifest::of(&top).unwrap();
    assert!(
        manifest()
            .check_same(&manifest(), &Ignore::default())
            .is_ok()
    );
    for change in [
        "chmod 600 file",
        "chown 7 file",
        "chgrp 7 file",
        "touch -a -d @1000000000.5 file",
        "touch -m -d @1000000000.000000001 file",
        "touch -h -m -d @1000000000 link",
        "printf x | dd of=file conv=notrunc status=none; touch -m -d @1000000000.000000001 file",
        "fallocate -p -o 65536 -l 65536 file; touch -m -d @1000000000.000000001 file",
        "setfattr -n user.x -v 1 file",
        "setfattr -n security.selinux -v x file",
        "setfacl -m u:77:r file",
        "chattr +d file",
        &format!("ln file '{}'", outside.display()),
        "ln file second; touch -d @1000000000 .",
        "rm second; touch -d @1000000000 .",
        "ln -sfn b link; touch -h -m -d @1000000000 link; touch -d @1000000000 .",
        "rm fifo; mknod fifo c 1 3; touch -d @1000000000 .",
        "rm fifo; mknod fifo c 1 5; touch -d @1000000000 .",
    ] {
        let before = manifest();
        sh(change);
        let same = manifest().check_same(&before, &Ignore::default());
        assert!(same.is_err(), "not seen: {change}");
    }
}
