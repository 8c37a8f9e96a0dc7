//! No loop device of ours shows LVM a label. Needs root, loop devices and e2fsprogs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use guestsnap::Code;
use guestsnap::disk::map::CountingNamer;
use guestsnap::disk::{FileDisk, examine, map};
use guestsnap::snapshot::Device;
use guestsnap_bed::workdir::WorkDir;

const SIZE: u64 = 8 << 20;

/// Ends the test unless this tier can run.
fn root() {
    assert!(
        rustix::process::geteuid().is_root() && Path::new("/dev/loop-control").exists(),
        "these tests need root and loop devices"
    );
}

/// An ext4 that is all of an image with a label in this sector is refused. Without one it is mapped; when a replay of its
/// journal, which writes through the loop device, has put one there, that is found.
#[test]
fn root_no_loop_device_shows_a_label() {
    root();
    let folder = WorkDir::new().unwrap();
    let path = folder.path().join("disk.img");
    let image = File::create(&path).unwrap();
    image.set_len(SIZE).unwrap();
    let made = Command::new("mkfs.ext4").arg("-q").arg(&path).status();
    assert!(made.unwrap().success());
    let found = || {
        let disk = FileDisk::open(&path).unwrap();
        examine(&[&disk]).unwrap().volumes.remove(0)
    };
    let device = [Device {
        path: path.clone(),
        size: SIZE,
        read_only: false,
    }];
    let mapped = || map(&found(), &device, &mut CountingNamer::new("label"));

    for sector in 0..2 {
        image.write_all_at(b"LABELONE", sector * 512).unwrap();
        let error = mapped().unwrap_err();
        assert_eq!(error.code(), Code::HiddenLabel, "{}", error.report());
        image.write_all_at(&[0; 8], sector * 512).unwrap();
    }
    let volume = mapped().unwrap();
    volume.check_labels().unwrap();
    // The first look has left its sectors in the cache.
    let through = File::options().write(true).open(volume.path()).unwrap();
    through.write_all_at(b"LABELONE", 512).unwrap();
    drop(through);
    let error = volume.check_labels().unwrap_err();
    assert_eq!(error.code(), Code::HiddenLabel, "{}", error.report());
    volume.close().unwrap();
}
