//! Mounting what a guest may have prepared.

use crate::round_trip::copy;
use guestsnap::config::FsPolicy;
use guestsnap::error::Code;
use guestsnap::fs::{DetachedMount, NoteLevel, probe};
use guestsnap::stream::{FileReader, Item, WalkOptions, Walker};
use guestsnap_bed::absent::present;
use guestsnap_bed::images::{
    Attached, Bench, Loop, assert_gone, filesystem_of, has_driver, mount, paths, read_all, single,
};
use guestsnap_bed::run;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

#[test]
fn root_dirty_journal_is_replayed() {
    for fstype in ["ext3", "ext4", "xfs", "btrfs"] {
        let bench = Bench::alone();
        let image = bench.image("guest.img", fstype, &[]);
        let copy = bench.path("copy.img");
        {
            let attached = bench.attach(&image);
            let file = File::create(attached.directory.join("in-the-journal")).unwrap();
            file.write_all_at(b"written and synced", 0).unwrap();
            file.sync_all().unwrap();
            fs::copy(&image, &copy).unwrap();
        }
        // A read-only device cannot be replayed: that must be an error with a reason, not a torn
        // view. (btrfs has nothing to replay if its last commit holds everything.)
        if fstype != "btrfs" {
            let device = Loop::read_only(&copy);
            let file = device.open();
            let filesystem = filesystem_of(&file);
            let policy = FsPolicy::default();
            let error =
                DetachedMount::open(file.as_fd(), &filesystem, &policy, "web1").unwrap_err();
            assert_eq!(error.code(), Code::MountFailed);
            let report = error.report();
            assert!(
                report.contains("web1") && report.contains("read-only"),
                "{report}"
            );
        }
        let device = Loop::new(&copy);
        let tree = single(&device);
        let mut content = Vec::new();
        for item in Walker::new(&tree, WalkOptions::default()) {
            if let Item::Object(entry) = item {
                if entry.path == b"in-the-journal" {
                    content = read_all(&mut FileReader::open(&entry).unwrap());
                }
            }
        }
        assert_eq!(content, b"written and synced", "{fstype}");
        tree.close().unwrap();
        assert_gone(&device);
    }
}

#[test]
fn root_skipping_recovery_is_only_done_when_asked_and_warns() {
    for fstype in ["ext4", "xfs", "btrfs"] {
        let bench = Bench::alone();
        let image = bench.image("guest.img", fstype, &[]);
        let device = Loop::new(&image);
        let file = device.open();
        let policy = FsPolicy {
            skip_recovery: true,
            ..FsPolicy::default()
        };
        let filesystem = filesystem_of(&file);
        let (mount, notes) = DetachedMount::open(file.as_fd(), &filesystem, &policy, "web1")
            .unwrap_or_else(|e| panic!("{}", e.report()));
        assert!(
            notes.iter().any(|n| n.level == NoteLevel::Warning),
            "{notes:?}"
        );
        mount.close().unwrap();
    }
}

#[test]
fn root_panic_on_errors_is_overridden() {
    let bench = Bench::alone();
    for fstype in ["ext2", "ext3", "ext4"] {
        let image = bench.image(&format!("{fstype}.img"), fstype, &[]);
        run!("tune2fs", "-e", "panic", &image);
        run!("tune2fs", "-E", "mount_opts=errors=panic", &image);
        let device = Loop::new(&image);
        let mount = mount(&device);
        let options = format!("/proc/fs/ext4/{}/options", device.name());
        let options = fs::read_to_string(options).unwrap();
        assert!(options.lines().any(|l| l == "errors=continue"), "{options}");
        assert!(!options.contains("panic"), "{options}");
        mount.close().unwrap();
        assert_gone(&device);
    }
}

#[test]
fn root_external_journal_is_refused() {
    let bench = Bench::alone();
    let image = bench.image("guest.img", "ext4", &[]);
    run!("tune2fs", "-E", "mount_opts=journal_path=/dev/sda", &image);
    let device = Loop::new(&image);
    let file = device.open();
    let filesystem = filesystem_of(&file);
    let policy = FsPolicy::default();
    let error = DetachedMount::open(file.as_fd(), &filesystem, &policy, "web1").unwrap_err();
    assert!(
        error.report().contains("journal device"),
        "{}",
        error.report()
    );
}

#[test]
fn root_clones_are_open_at_the_same_time() {
    let bench = Bench::alone();
    for fstype in ["ext4", "xfs", "btrfs"] {
        let clones = Path::new("/sys/fs/btrfs/features/temp_fsid").exists();
        if fstype == "btrfs" && !present("btrfs clones (Linux 6.7)", clones) {
            continue;
        }
        let image = bench.image(&format!("{fstype}.img"), fstype, &[]);
        {
            let attached = bench.attach(&image);
            fs::write(attached.directory.join("who"), "original").unwrap();
        }
        let clone = bench.path("clone.img");
        fs::copy(&image, &clone).unwrap();
        let (first, second) = (Loop::new(&image), Loop::new(&clone));
        let one = mount(&first);
        let two = mount(&second);
        one.close().unwrap();
        two.close().unwrap();
        assert_gone(&first);
        assert_gone(&second);
    }
}

#[test]
fn root_a_mounted_device_is_not_shared() {
    let bench = Bench::alone();
    let image = bench.image("guest.img", "ext4", &[]);
    let device = Loop::new(&image);
    let first = mount(&device);
    let file = device.open();
    let filesystem = filesystem_of(&file);
    let policy = FsPolicy::default();
    let error = DetachedMount::open(file.as_fd(), &filesystem, &policy, "web1").unwrap_err();
    assert!(error.report().contains("busy"), "{}", error.report());
    first.close().unwrap();
}

#[test]
fn root_two_signatures_are_never_mounted() {
    let bench = Bench::alone();
    let image = bench.image("guest.img", "ext4", &[]);
    let other = bench.image("other.img", "xfs", &[]);
    let mut start = vec![0; 512];
    File::open(other)
        .unwrap()
        .read_exact_at(&mut start, 0)
        .unwrap();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&image)
        .unwrap();
    file.write_all_at(&start, 0).unwrap();
    let error = probe(&file, "web1 p1").unwrap_err();
    assert_eq!(error.code(), Code::ProbeFailed);
    assert!(
        error.report().contains("several kinds"),
        "{}",
        error.report()
    );
}

#[test]
fn root_vfat_is_mounted() {
    if !has_driver("vfat") {
        return;
    }
    let bench = Bench::alone();
    let image = bench.image("guest.img", "vfat", &["-F", "32"]);
    {
        let attached = Attached::new(&image, bench.path("mnt"), "utf8");
        fs::create_dir(attached.directory.join("EFI")).unwrap();
        fs::write(attached.directory.join("EFI/größe"), "x").unwrap();
    }
    let device = Loop::new(&image);
    let tree = single(&device);
    assert_eq!(
        paths(&tree, WalkOptions::default()),
        ["EFI/größe", "EFI/", "/"]
    );
    let target = bench.path("target");
    assert_eq!(
        copy(&tree, WalkOptions::default(), &target),
        Vec::<String>::new()
    );
    tree.close().unwrap();
}
