//! Bounds of the cost of a guest's filesystem, with real filesystems that a guest made to be expensive.
//!
//! These tests need root and loop devices, and fail without.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};

use guestsnap::error::{Code, escape};
use guestsnap::fs::GuestTree;
use guestsnap::stream::{Item, WalkOptions, Walker};
use guestsnap_bed::images::{Bench, Loop, named, single, volume};
use guestsnap_bed::run;

/// A filesystem with what `fill` puts into its mounted folder.
fn guest(fstype: &str, more: &[&str], fill: impl FnOnce(&Path)) -> (Bench, Loop) {
    let bench = Bench::alone();
    let image = bench.image("guest.img", fstype, more);
    fill(&bench.attach(&image).directory);
    let device = Loop::new(&image);
    (bench, device)
}

/// Each of 511 lines leads through 40 links, and each of these through 2000 folders.
fn maze(root: &Path) {
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::create_dir_all(root.join("d")).unwrap();
    let mut fstab = "LABEL=sys / ext4 defaults 0 1\n".to_owned();
    for line in 0..511 {
        fstab += &format!("LABEL=gone /links/l0/x{line} ext4 defaults 0 2\n");
    }
    fs::write(root.join("etc/fstab"), fstab).unwrap();
    fs::create_dir(root.join("links")).unwrap();
    for link in 0..40 {
        let target = format!("{}links/l{}", "d/../".repeat(800), link + 1);
        let target: PathBuf = Path::new("/").join(target);
        std::os::unix::fs::symlink(target, root.join(format!("links/l{link}"))).unwrap();
    }
}

#[test]
fn root_an_fstab_of_mazes_has_an_end() {
    let (_bench, device) = guest("ext4", &["-L", "sys"], maze);
    let all = || vec![volume(&device, named("p1"))];
    let error = GuestTree::assemble(all()).unwrap_err();
    assert_eq!(error.code(), Code::PathsTooLong, "{}", error.report());
    // A cancel is answered at once, and nothing else is blamed.
    let asked = Cell::new(0);
    let stop = || {
        asked.set(asked.get() + 1);
        asked.get() > 5
    };
    let error = GuestTree::assemble_unless(all(), &stop).unwrap_err();
    assert_eq!(error.code(), Code::Cancelled, "{}", error.report());
    assert_eq!(asked.get(), 6);
}

fn subvolumes(root: &Path) {
    for folder in ["a", "b"] {
        fs::create_dir(root.join(folder)).unwrap();
        for number in 0..6 {
            let path = root.join(folder).join(format!("s{number}"));
            run!("btrfs", "-q", "subvolume", "create", &path);
            fs::write(path.join("file"), "x").unwrap();
        }
        fs::write(root.join(folder).join("plain"), "x").unwrap();
    }
}

#[test]
fn root_subvolumes_of_a_guest_are_bounded() {
    let (_bench, device) = guest("btrfs", &[], subvolumes);
    let tree = single(&device);
    let walk = |most: usize| {
        let options = WalkOptions {
            subvolumes: most,
            ..WalkOptions::default()
        };
        let (mut entered, mut plain, mut problems, mut incomplete) = (0, 0, Vec::new(), 0);
        for item in Walker::new(&tree, options) {
            match item {
                Item::Begin(entry) => entered += usize::from(entry.name().starts_with(b"s")),
                Item::Object(entry) => plain += usize::from(entry.name() == b"plain"),
                Item::End(entry) => incomplete += usize::from(entry.incomplete),
                Item::Problem(problem) => problems.push(problem),
                Item::LeftOut(left_out) => panic!("{left_out}"),
            }
        }
        (entered, plain, problems, incomplete)
    };
    let (entered, plain, problems, incomplete) = walk(12);
    assert_eq!((entered, plain, incomplete), (12, 2, 0));
    assert!(problems.is_empty(), "{problems:?}");
    // Beyond the bound: one error, all that is missing is marked, and plain files of known folders are there.
    let (entered, plain, problems, incomplete) = walk(8);
    assert_eq!((entered, plain, incomplete), (8, 2, 1));
    let [problem] = &problems[..] else {
        panic!("{problems:?}")
    };
    let text = problem.error.report();
    assert_eq!(problem.error.code(), Code::TooManySubvolumes);
    assert!(problem.subtree && problem.path.is_empty(), "{text}");
    assert!(
        text.contains("p1: more than 8 subvolumes") && text.contains("`skip`"),
        "{text}"
    );
    tree.close().unwrap();
}

/// A folder with fscrypt's flag, as the kernel shows it without the key; an encrypted file beside it, moved out of one.
#[test]
fn root_an_encrypted_folder_is_one_problem() {
    let fill = |root: &Path| {
        fs::create_dir_all(root.join("secret/inner")).unwrap();
        for number in 0..20 {
            fs::write(root.join(format!("secret/name{number}")), "x").unwrap();
        }
        fs::write(root.join("alone"), "").unwrap();
        fs::write(root.join("plain"), "x").unwrap();
    };
    let (_bench, device) = guest("ext4", &["-O", "encrypt"], fill);
    for (name, flags) in [("secret", "0x80800"), ("alone", "0x80800")] {
        let command = format!("set_inode_field /{name} flags {flags}");
        run!("debugfs", "-w", "-R", &command, &device.device);
    }
    let tree = single(&device);
    let (mut seen, mut problems) = (Vec::new(), Vec::new());
    for item in Walker::new(&tree, WalkOptions::default()) {
        match item {
            Item::Object(entry) | Item::End(entry) => seen.push(escape(&entry.path)),
            Item::Problem(problem) => problems.push(problem),
            Item::Begin(_) | Item::LeftOut(_) => {}
        }
    }
    seen.sort();
    // The folder itself has a name; nothing in it has.
    assert_eq!(seen, ["", "lost+found", "plain", "secret"]);
    let codes: Vec<Code> = problems.iter().map(|p| p.error.code()).collect();
    assert_eq!(codes, [Code::Encrypted; 2], "{problems:?}");
    for (path, subtree) in [("secret", true), ("alone", false)] {
        let found = problems.iter().find(|p| p.path == path.as_bytes()).unwrap();
        assert_eq!(found.subtree, subtree);
    }
    tree.close().unwrap();
}
