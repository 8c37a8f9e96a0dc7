//! Filesystems that cannot be opened, although nothing is wrong with them: the error names the cause, and never
//! suggests a filesystem check.
//!
//! These tests need root and loop devices, and fail without.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use guestsnap::config::FsPolicy;
use guestsnap::error::Error;
use guestsnap::fs::{Content, DetachedMount, Filesystem, probe};
use guestsnap_bed::images::{Bench, Loop, filesystem_of};
use guestsnap_bed::run;

const MIB: u64 = 1 << 20;

fn refused(device: &Loop) -> Error {
    let file = device.open();
    let policy = FsPolicy::default();
    match DetachedMount::open(file.as_fd(), &filesystem_of(&file), &policy, "test") {
        Ok(_) => panic!("it was mounted"),
        Err(error) => {
            let report = error.report();
            eprintln!("{report}");
            assert!(
                report.contains("test") && !report.contains("fsck"),
                "{report}"
            );
            error
        }
    }
}

/// A sector that libblkid takes for the beginning of an NTFS, and the two records of its table of files that it reads.
fn ntfs(image: &Path) {
    let file = OpenOptions::new().write(true).open(image).unwrap();
    let mut boot = [0; 512];
    boot[..11].copy_from_slice(b"\xeb\x52\x90NTFS    ");
    boot[11..14].copy_from_slice(&[0, 2, 8]); // 512-byte sectors, 8 in a cluster
    boot[21] = 0xf8;
    boot[40..48].copy_from_slice(&(400 * MIB / 512 - 1).to_le_bytes());
    boot[48] = 4; // cluster of the table of files, and that of its copy
    boot[56] = 8;
    boot[64] = 0xf6; // 1024 bytes a record
    boot[68] = 1;
    boot[72..80].copy_from_slice(&0x1122_3344_5566_7788_u64.to_le_bytes());
    boot[510..].copy_from_slice(&[0x55, 0xaa]);
    file.write_all_at(&boot, 0).unwrap();
    for record in 0..16 {
        let at = 4 * 4096 + record * 1024;
        let mut bytes = [0; 1024];
        bytes[..8].copy_from_slice(b"FILE\x30\0\x03\0");
        bytes[20] = 56;
        bytes[24..28].copy_from_slice(&64_u32.to_le_bytes());
        bytes[28..32].copy_from_slice(&1024_u32.to_le_bytes());
        bytes[56..60].fill(0xff);
        file.write_all_at(&bytes, at).unwrap();
    }
}

#[test]
fn root_a_kernel_without_the_driver_is_named() {
    let bench = Bench::alone();
    let image = bench.empty("ntfs.img");
    ntfs(&image);
    let device = Loop::new(&image);
    assert_eq!(filesystem_of(&device.open()).fstype, "ntfs");
    let _ = Command::new("modprobe").arg("ntfs3").output();
    let drivers = fs::read_to_string("/proc/filesystems").unwrap();
    let without = !drivers.split_whitespace().any(|word| word == "ntfs3");
    let error = refused(&device);
    // Where there is one, it does not take these few records for a filesystem.
    assert_eq!(error.code().to_string() == "GS-510", without);
    if !without {
        return;
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let text = error.report();
    let expected = format!("test: no ntfs3 in Linux {}. ", release.trim());
    assert!(text.contains(&expected), "{text}");
}

#[test]
fn root_a_journal_on_another_device_is_named() {
    let bench = Bench::alone();
    let journal = bench.image("journal.img", "ext4", &["-O", "journal_dev"]);
    let device = Loop::new(&journal);
    let uuid = run!("blkid", "-p", "-s", "UUID", "-o", "value", &device.device);
    let option = format!("device={}", device.device);
    let ext4 = Loop::new(&bench.image("ext4.img", "ext4", &["-J", &option]));
    let error = refused(&ext4);
    assert_eq!(error.code().to_string(), "GS-511");
    assert!(error.report().contains(uuid.trim()), "{}", error.report());

    let options = format!("logdev={},size=64m", device.device);
    let xfs = Loop::new(&bench.image("xfs.img", "xfs", &["-l", &options]));
    let error = refused(&xfs);
    assert_eq!(error.code().to_string(), "GS-511");
}

/// Labels of ZFS as libblkid sees them: its configuration, a full ring of uberblocks, and the mark at their end.
fn zfs_label(device: &File, at: u64) {
    let configuration = [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    device
        .write_all_at(&configuration, at + (16 << 10))
        .unwrap();
    let mark = 0x0210_da7a_b10c_7a11_u64.to_le_bytes();
    device.write_all_at(&mark, at + (128 << 10) - 40).unwrap();
    for number in 0..128 {
        let uberblock = [0x00ba_b10c_u64, 5000, number, 1, 1].map(u64::to_le_bytes);
        let at = at + (128 << 10) + number * 1024;
        device.write_all_at(&uberblock.concat(), at).unwrap();
    }
}

#[test]
fn root_labels_of_an_earlier_zfs_are_no_error() {
    let label = 256 << 10;
    let all = [0, label, 400 * MIB - 2 * label, 400 * MIB - label];
    // ZFS first: what a new ext4 leaves of it is at the end.
    let bench = Bench::alone();
    let image = bench.empty("guest.img");
    let mut options = File::options();
    let file = options.read(true).write(true).open(&image).unwrap();
    all.iter().for_each(|at| zfs_label(&file, *at));
    let found = probe(&file, "test").unwrap();
    assert!(matches!(found, Content::Skip(_)), "{found:?}");
    bench.image_in(&image, "ext4", &["-E", "nodiscard"]);
    let found = run!("wipefs", "--no-act", &image);
    assert!(
        found.contains("zfs_member") && found.contains("ext4"),
        "{found}"
    );
    let device = Loop::new(&image);
    let opened = device.open();
    let filesystem = filesystem_of(&opened);
    assert_eq!(filesystem.fstype, "ext4");
    let policy = FsPolicy::default();
    let (mount, notes) = DetachedMount::open(opened.as_fd(), &filesystem, &policy, "test").unwrap();
    assert!(
        notes.iter().any(|note| note.text.contains("labels of ZFS")),
        "{notes:?}"
    );
    mount.close().unwrap();
    drop((opened, device));

    // ZFS later, over an ext4 whose superblock it left: no sign tells them apart.
    all.iter().for_each(|at| zfs_label(&file, *at));
    let error = probe(&file, "test").unwrap_err();
    assert!(
        error.report().contains("several kinds"),
        "{}",
        error.report()
    );
}

/// Two devices with one btrfs, and a file on it.
fn btrfs_over_two() -> (Bench, [Loop; 2]) {
    let bench = Bench::alone();
    let two = ["one.img", "two.img"].map(|name| Loop::new(&bench.empty(name)));
    let [one, other] = two.each_ref().map(|device| &device.device);
    run!(
        "mkfs.btrfs",
        "-q",
        "-f",
        "-m",
        "raid1",
        "-d",
        "raid0",
        one,
        other
    );
    let folder = bench.path("mnt");
    fs::create_dir(&folder).unwrap();
    let option = format!("device={other}");
    run!("mount", "-o", &option, one, &folder);
    fs::write(folder.join("large"), vec![7; 5 << 20]).unwrap();
    run!("umount", &folder);
    for device in [one, other] {
        run!("btrfs", "device", "scan", "--forget", device);
    }
    (bench, two)
}

fn links() -> Vec<(PathBuf, PathBuf)> {
    let mut found = Vec::new();
    for folder in ["by-uuid", "by-label", "by-id"] {
        let folder = Path::new("/dev/disk").join(folder);
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let target = fs::read_link(entry.path()).unwrap_or_default();
            found.push((entry.path(), target));
        }
    }
    found.sort();
    found
}

#[test]
fn root_a_btrfs_over_two_devices_is_opened_by_both() {
    let (bench, [one, other]) = btrfs_over_two();
    let before = links();
    // By one alone: which the other is.
    let error = refused(&other);
    let uuid = run!("blkid", "-p", "-s", "UUID_SUB", "-o", "value", &one.device);
    let expected = format!(
        "a btrfs over 2 devices; missing: device 1 (UUID {})",
        uuid.trim()
    );
    assert_eq!(error.code().to_string(), "GS-404");
    assert!(error.report().contains(&expected), "{}", error.report());

    let (first, second) = (one.open(), other.open());
    let filesystem = Filesystem {
        several: true,
        ..filesystem_of(&first)
    };
    let policy = FsPolicy::default();
    let open = || {
        let more = [second.as_fd()];
        DetachedMount::open_set(first.as_fd(), &more, &filesystem, &policy, "test")
    };
    let (mount, _) = open().unwrap();
    let flags = rustix::fs::OFlags::RDONLY;
    let file = rustix::fs::openat(mount.root(), "large", flags, rustix::fs::Mode::empty()).unwrap();
    let mut content = Vec::new();
    std::io::Read::read_to_end(&mut File::from(file), &mut content).unwrap();
    assert_eq!(content, vec![7; 5 << 20]);
    // No second one with its id meanwhile.
    assert!(open().unwrap_err().report().contains("same id"));
    mount.close().unwrap();

    // The kernel knows none of them any more: the mount by one device does not find the other.
    let udev = Path::new("/run/udev/control").exists();
    let folder = bench.path("mnt");
    let alone = Command::new("mount")
        .args(["-o", "ro", &one.device])
        .arg(&folder)
        .output()
        .unwrap();
    if alone.status.success() {
        run!("umount", &folder);
    }
    run!("btrfs", "device", "scan", "--forget");
    assert!(udev || !alone.status.success(), "the kernel remembers both");
    assert_eq!(links(), before);
}
