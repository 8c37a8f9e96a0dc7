//! The guest's root and its fstab: which filesystem is `/`, and which one is where.
//!
//! These tests need root and loop devices, and fail without.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use guestsnap::error::Code;
use guestsnap::fs::{Filesystem, GuestTree, Hints, MountedVolume, VolumeIdentity};
use guestsnap::stream::{Item, WalkOptions, Walker};
use guestsnap_bed::images::{self, Loop, filesystem_of, volume};
use guestsnap_bed::run;

/// A folder with images.
struct Bench(images::Bench);

impl Bench {
    fn new() -> Bench {
        Bench(images::Bench::alone())
    }

    /// A filesystem with this label, filled by `fill`.
    fn image(&self, label: &str, fstype: &str, fill: &dyn Fn(&Path)) -> PathBuf {
        let name = format!("{label}.img");
        let image = self.0.image(&name, fstype, &["-L", label]);
        self.change(&image, fill);
        image
    }

    fn change(&self, image: &Path, change: &dyn Fn(&Path)) {
        change(&self.0.attach(image).directory);
    }

    /// A copy of an image, as a clone of a disk is.
    fn copy(&self, image: &Path, name: &str) -> PathBuf {
        let copy = self.0.path(&format!("{name}.img"));
        fs::copy(image, &copy).unwrap();
        copy
    }
}

/// A partition `p1` of a disk.
fn on_disk(disk: usize) -> VolumeIdentity {
    let name = match disk {
        0 => "p1".to_owned(),
        _ => format!("disk{}p1", disk + 1),
    };
    VolumeIdentity {
        key: format!("vg0/web-{disk} p1"),
        partition: Some(1),
        start: (disk, 1 << 20),
        name,
        ..VolumeIdentity::default()
    }
}

/// A logical volume of the guest.
fn lv(vg: &str, lv: &str, start: (usize, u64)) -> VolumeIdentity {
    VolumeIdentity {
        name: format!("{vg}-{lv}"),
        lv: Some((vg.into(), lv.into())),
        key: format!("vg0/web-{} {vg}/{lv}", start.0),
        start,
        ..VolumeIdentity::default()
    }
}

fn snapshot(of: &str, identity: VolumeIdentity) -> VolumeIdentity {
    VolumeIdentity {
        snapshot_of: Some(of.into()),
        ..identity
    }
}

/// Writes what makes a system, and a mark.
fn system(top: &Path, fstab: &str, mark: &str) {
    fs::create_dir_all(top.join("etc")).unwrap();
    fs::write(top.join("etc/os-release"), "ID=debian\n").unwrap();
    fs::write(top.join("etc/fstab"), fstab).unwrap();
    fs::write(top.join(mark), "x").unwrap();
}

/// The volumes in this order, joined.
fn assemble(volumes: Vec<(&PathBuf, VolumeIdentity)>, hints: &Hints) -> Joined {
    let (loops, mounted): (Vec<Loop>, Vec<MountedVolume>) = volumes
        .into_iter()
        .map(|(image, identity)| {
            let device = Loop::new(image);
            let mounted = volume(&device, identity);
            (device, mounted)
        })
        .unzip();
    let tree = GuestTree::assemble_with(mounted, hints, &|| false)
        .unwrap_or_else(|e| panic!("{}", e.report()));
    Joined {
        tree: Some(tree),
        _loops: loops,
    }
}

struct Joined {
    tree: Option<GuestTree>,
    _loops: Vec<Loop>,
}

impl Joined {
    fn tree(&self) -> &GuestTree {
        self.tree.as_ref().unwrap()
    }

    /// All paths, folders with a slash at the end.
    fn paths(&self) -> Vec<String> {
        let items = Walker::new(self.tree(), WalkOptions::default());
        let paths = items.filter_map(|item| match item {
            Item::Object(entry) => Some(guestsnap::error::escape(&entry.path)),
            Item::End(entry) => Some(guestsnap::error::escape(&entry.path) + "/"),
            Item::Problem(problem) => panic!("{}", problem.error.report()),
            _ => None,
        });
        paths.filter(|path| !path.contains("lost+found")).collect()
    }

    fn has(&self, path: &str) -> bool {
        self.paths().iter().any(|found| found == path)
    }

    fn unsure(&self) -> Option<String> {
        let unsure = self.tree().unsure();
        assert!(unsure.is_none_or(|e| e.code() == Code::RootUnsure));
        unsure.map(ToString::to_string)
    }

    fn notes(&self) -> String {
        let notes = self.tree().notes().iter().map(|note| note.text.clone());
        notes.collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.tree.take().map(GuestTree::close) {
            eprintln!("{}", error.report());
        }
    }
}

#[test]
fn root_the_first_line_for_a_mount_point_has_it() {
    let bench = Bench::new();
    let mark = |mark: &'static str| move |top: &Path| drop(fs::write(top.join(mark), "x"));
    let old = bench.image("old", "ext4", &mark("is-old"));
    let new = bench.image("new", "ext4", &mark("is-new"));
    let root = bench.image("root", "ext4", &|top| {
        system(top, "", "is-root");
        fs::create_dir(top.join("data")).unwrap();
    });
    for (lines, wanted) in [
        ("LABEL=new /data ext4\nLABEL=old /data ext4\n", "new"),
        ("LABEL=old /data ext4 noauto\nLABEL=new /data ext4\n", "new"),
        ("LABEL=old /data ext4 nofail\nLABEL=new /data ext4\n", "new"),
        (
            "LABEL=gone /data ext4 nofail\nLABEL=new /data ext4 nofail\n",
            "new",
        ),
        (
            "LABEL=old /data ext4 x-systemd.automount\nLABEL=new /data ext4\n",
            "new",
        ),
    ] {
        bench.change(&root, &|top| {
            let text = format!("LABEL=root / ext4\n{lines}");
            fs::write(top.join("etc/fstab"), text).unwrap();
        });
        let volumes = vec![(&old, on_disk(1)), (&new, on_disk(2)), (&root, on_disk(0))];
        let joined = assemble(volumes, &Hints::default());
        let text = format!("{lines}{:?}\n{}", joined.paths(), joined.notes());
        assert!(joined.has(&format!("data/is-{wanted}")), "{text}");
        assert!(joined.has(".guestsnap/volumes/disk2p1/is-old"), "{text}");
        assert!(joined.tree().missing().is_empty(), "{text}");
    }
}

#[test]
fn root_files_below_a_mount_point_that_need_not_be_mounted_are_saved() {
    let bench = Bench::new();
    let data = bench.image("data", "ext4", &|top| {
        drop(fs::write(top.join("on-data"), "x"))
    });
    let root = bench.image("root", "ext4", &|top| {
        system(top, "", "is-root");
        fs::create_dir_all(top.join("srv/data/deep")).unwrap();
        fs::write(top.join("srv/data/deep/real"), "x").unwrap();
    });
    let hidden = ".guestsnap/hidden/srv/data/deep/real";
    for (options, saved) in [("noauto", true), ("nofail", true), ("defaults", false)] {
        bench.change(&root, &|top| {
            let text = format!("LABEL=root / ext4\nLABEL=data /srv/data ext4 {options}\n");
            fs::write(top.join("etc/fstab"), text).unwrap();
        });
        let joined = assemble(
            vec![(&root, on_disk(0)), (&data, on_disk(1))],
            &Hints::default(),
        );
        let text = format!("{options}: {:?}\n{}", joined.paths(), joined.notes());
        assert!(joined.has("srv/data/on-data"), "{text}");
        assert_eq!(joined.has(hidden), saved, "{text}");
        let told = "/srv/data has files below the filesystem that need not be mounted there";
        assert_eq!(joined.notes().contains(told), saved, "{text}");
    }
    // An empty folder hides nothing.
    bench.change(&root, &|top| {
        fs::remove_dir_all(top.join("srv/data/deep")).unwrap();
        let text = "LABEL=root / ext4\nLABEL=data /srv/data ext4 noauto\n";
        fs::write(top.join("etc/fstab"), text).unwrap();
    });
    let joined = assemble(
        vec![(&root, on_disk(0)), (&data, on_disk(1))],
        &Hints::default(),
    );
    assert!(!joined.has(".guestsnap/"), "{:?}", joined.paths());
}

#[test]
fn root_links_of_udev_name_their_volumes() {
    let bench = Bench::new();
    let mark = |mark: &'static str| move |top: &Path| drop(fs::write(top.join(mark), "x"));
    let part = bench.image("part", "ext4", &mark("on-part"));
    let home = bench.image("home", "ext4", &mark("on-home"));
    let root = bench.image("root", "ext4", &|top| {
        let text = "/dev/disk/by-id/dm-uuid-LVM-GROUProot / ext4\n\
                    /dev/disk/by-id/dm-uuid-LVM-GROUPhome /home ext4\n\
                    /dev/disk/by-path/pci-0000:00:05.0-part2 /boot ext4\n";
        system(top, text, "is-root");
        fs::create_dir(top.join("home")).unwrap();
        fs::create_dir(top.join("boot")).unwrap();
    });
    let group = |name: &str, at| VolumeIdentity {
        lv_uuids: Some(format!("GROUP{name}")),
        ..lv("vg", name, (0, at))
    };
    let boot = VolumeIdentity {
        partition: Some(2),
        only_disk: true,
        ..on_disk(0)
    };
    let volumes = vec![
        (&part, boot),
        (&home, group("home", 5)),
        (&root, group("root", 9)),
    ];
    let joined = assemble(volumes, &Hints::default());
    let text = format!("{:?}\n{}", joined.paths(), joined.notes());
    for path in ["is-root", "home/on-home", "boot/on-part"] {
        assert!(joined.has(path), "{text}");
    }
    assert!(
        text.contains("root: vg-root (its own fstab says so)"),
        "{text}"
    );
}

/// A snapshot of the root has all that the root has, and its name may come first.
#[test]
fn root_a_snapshot_never_goes_before_its_origin() {
    let bench = Bench::new();
    let root = bench.image("root", "ext4", &|top| {
        system(top, "LABEL=root / ext4\nLABEL=home /home ext4\n", "x");
        fs::create_dir(top.join("home")).unwrap();
    });
    let home = bench.image("home", "ext4", &|top| drop(fs::write(top.join("y"), "x")));
    let root_before = bench.copy(&root, "before-update");
    let home_before = bench.copy(&home, "a-home");
    for (image, mark) in [(&root, "now"), (&home, "now-home")] {
        bench.change(image, &|top| drop(fs::write(top.join(mark), "x")));
    }
    let at = (0, 7);
    let snapshots = || {
        vec![
            (&home_before, snapshot("home", lv("vg", "a-home", at))),
            (
                &root_before,
                snapshot("root", lv("vg", "before-update", at)),
            ),
        ]
    };
    let mut all = snapshots();
    all.push((&home, lv("vg", "home", at)));
    all.push((&root, lv("vg", "root", at)));
    // Though the job before took it, once.
    for before in ["", "vg0/web-0 vg/before-update"] {
        let hints = Hints {
            before: [(Vec::new(), before.to_owned())].into(),
            ..Hints::default()
        };
        let joined = assemble(all.clone(), &hints);
        let text = format!("{:?}\n{}", joined.paths(), joined.notes());
        assert!(joined.has("now") && joined.has("home/now-home"), "{text}");
        assert!(
            joined.has(".guestsnap/volumes/vg-before-update/x"),
            "{text}"
        );
        assert_eq!(joined.unsure(), None);
        assert!(!text.contains("fits several"), "{text}");
    }
    // The origins cannot be read: their snapshots do not stand in for them.
    let device = Loop::new(&root);
    let filesystem = |image| filesystem_of(&Loop::new(image).open());
    let closed = |name, image| (lv("vg", name, at), filesystem(image));
    let hints = Hints {
        closed: vec![closed("root", &root), closed("home", &home)],
        ..Hints::default()
    };
    drop(device);
    let joined = assemble(snapshots(), &hints);
    let text = joined.unsure().unwrap_or_default();
    assert!(
        text.contains("its root is vg-root, which cannot be read"),
        "{text}"
    );
    assert!(
        joined
            .paths()
            .iter()
            .all(|p| p == "/" || p.starts_with(".guestsnap/"))
    );
    // The root is there, the rest is not.
    let hints = Hints {
        closed: vec![closed("home", &home)],
        ..Hints::default()
    };
    let volumes = vec![snapshots().remove(0), (&root, lv("vg", "root", at))];
    let joined = assemble(volumes, &hints);
    assert!(
        joined.has("now") && !joined.has("home/y"),
        "{:?}",
        joined.paths()
    );
    assert_eq!(joined.tree().missing().len(), 1);
}

/// Two systems that are as good: facts beside them decide, and it is an error until the client file does.
#[test]
fn root_of_copies_the_one_that_is_known_is_taken() {
    let bench = Bench::new();
    let fstab = "LABEL=root / ext4\nLABEL=home /home ext4\n";
    let root = bench.image("root", "ext4", &|top| {
        system(top, fstab, "x");
        fs::create_dir(top.join("home")).unwrap();
    });
    let home = bench.image("home", "ext4", &|top| drop(fs::write(top.join("x"), "x")));
    let (root_copy, home_copy) = (bench.copy(&root, "root2"), bench.copy(&home, "home2"));
    for image in [&root, &home] {
        bench.change(image, &|top| drop(fs::write(top.join("now"), "x")));
    }
    let of = |disk: usize, number| VolumeIdentity {
        name: format!("disk{disk}p{number}"),
        partition: Some(number),
        key: format!("vg0/web-{disk} p{number}"),
        ..on_disk(disk)
    };
    let volumes = |bootable: Option<usize>| -> Vec<_> {
        // Not in the order of the disks, as volumes of groups may come.
        let all = [
            (&root_copy, 1, 1),
            (&home_copy, 1, 2),
            (&root, 0, 1),
            (&home, 0, 2),
        ];
        let volumes = all.into_iter().map(|(image, disk, number)| {
            let identity = VolumeIdentity {
                bootable: bootable == Some(disk),
                ..of(disk, number)
            };
            (image, identity)
        });
        volumes.collect()
    };
    let hints = |root: Option<&str>, before: Option<usize>| Hints {
        root: root.map(str::to_owned),
        before: before
            .into_iter()
            .flat_map(|disk| {
                [
                    (Vec::new(), of(disk, 1).key),
                    (b"home".to_vec(), of(disk, 2).key),
                ]
            })
            .collect(),
        ..Hints::default()
    };
    let uuid = filesystem_of(&Loop::new(&root).open()).uuid.unwrap();
    for (bootable, chosen, before, current, sure) in [
        // The first disk; the boot loader's; what the job before had.
        (None, None, None, true, false),
        (Some(1), None, None, false, false),
        (Some(1), None, Some(0), true, false),
        (None, None, Some(1), false, false),
        // The client file.
        (None, Some("disk1p1"), None, false, true),
        (Some(1), Some("disk0p1"), Some(1), true, true),
        (None, Some(uuid.as_str()), None, true, true),
    ] {
        let what = format!("{bootable:?} {chosen:?} {before:?}");
        let joined = assemble(volumes(bootable), &hints(chosen, before));
        let text = format!("{what}: {:?}\n{}", joined.paths(), joined.notes());
        assert_eq!(joined.has("now"), current, "{text}");
        assert_eq!(joined.has("home/now"), current, "{text}");
        let unsure = joined.unsure();
        assert_eq!(unsure.is_none(), sure, "{text}");
        let other = if current { "disk1p1" } else { "disk0p1" };
        let told = format!("{other} looks like a system too");
        assert!(unsure.is_none_or(|text| text.contains(&told)), "{text}");
    }
    // The client file names what is not there: nothing else is taken for it.
    let joined = assemble(volumes(None), &hints(Some("vg/root"), None));
    let text = joined.unsure().unwrap();
    assert!(
        text.contains("the client file says vg/root, which is none of"),
        "{text}"
    );
    assert!(!joined.has("now") && joined.has(".guestsnap/volumes/disk0p1/now"));
}

#[test]
fn root_of_two_groups_the_one_on_the_first_disk_is_taken() {
    let bench = Bench::new();
    let first = bench.image("first", "ext4", &|top| {
        system(top, "LABEL=first / ext4", "a")
    });
    let second = bench.image("second", "ext4", &|top| {
        system(top, "LABEL=second / ext4", "b")
    });
    let (a, b) = (lv("zz", "root", (0, 9)), lv("aa", "root", (1, 1)));
    let joined = assemble(
        vec![(&second, b.clone()), (&first, a.clone())],
        &Hints::default(),
    );
    assert!(joined.has("a"), "{}", joined.notes());
    assert!(
        joined
            .unsure()
            .unwrap()
            .contains("zz-root is taken, and aa-root looks like")
    );
    drop(joined);
    // The client file may name any device of the filesystem.
    for name in ["aa/root", "aa/more", "aa-more"] {
        let hints = Hints {
            root: Some(name.into()),
            ..Hints::default()
        };
        let second_of_two = VolumeIdentity {
            parts: vec![lv("aa", "more", (2, 1))],
            ..b.clone()
        };
        let joined = assemble(vec![(&second, second_of_two), (&first, a.clone())], &hints);
        let text = format!("{name}: {}", joined.notes());
        assert!(joined.has("b") && joined.unsure().is_none(), "{text}");
    }
    // The second system is a place of the first one.
    bench.change(&first, &|top| {
        fs::create_dir(top.join("old")).unwrap();
        let text = "LABEL=first / ext4\nLABEL=second /old ext4\n";
        fs::write(top.join("etc/fstab"), text).unwrap();
    });
    let joined = assemble(vec![(&second, b), (&first, a)], &Hints::default());
    assert!(joined.has("a") && joined.has("old/b"), "{}", joined.notes());
    assert_eq!(joined.unsure(), None);
}

/// A container has os-release and an fstab, too, but none that names its volume.
#[test]
fn root_a_root_line_that_matches_goes_before_one_that_cannot() {
    let bench = Bench::new();
    let container = bench.image("container", "ext4", &|top| system(top, "# none\n", "c"));
    let root = bench.image("root", "ext4", &|top| system(top, "", "r"));
    let copied = bench.image("copied", "ext4", &|top| {
        system(top, "LABEL=gone / ext4", "f")
    });
    let volumes = || {
        vec![
            (&container, lv("vg", "a-container", (0, 1))),
            (&copied, lv("vg", "b-copied", (0, 2))),
            (&root, lv("vg", "root", (0, 3))),
        ]
    };
    for (fstab, sure) in [
        ("LABEL=root / ext4", true),
        ("/dev/vg/root / ext4", true),
        // These prove nothing, and nothing against it.
        ("/dev/sda2 / ext4", false),
        ("/dev/disk/by-id/scsi-x-part2 / ext4", false),
        ("/dev/root / ext4", false),
    ] {
        bench.change(&root, &|top| drop(fs::write(top.join("etc/fstab"), fstab)));
        let joined = assemble(volumes(), &Hints::default());
        assert!(joined.has("r"), "{fstab}: {}", joined.notes());
        assert_eq!(
            joined.unsure().is_none(),
            sure,
            "{fstab}: {:?}",
            joined.unsure()
        );
    }
    // The root of the job before cannot be read: a container is not the root for that.
    let closed = lv("vg", "root", (0, 3));
    let hints = Hints {
        before: [(Vec::new(), closed.key.clone())].into(),
        closed: vec![(closed, Filesystem::default())],
        ..Hints::default()
    };
    let joined = assemble(volumes()[..1].to_vec(), &hints);
    assert!(
        joined.unsure().unwrap().contains("its root is vg-root"),
        "{}",
        joined.notes()
    );
    assert!(joined.has(".guestsnap/volumes/vg-a-container/c"));
}

/// NixOS: `/etc/fstab` is a link to `/etc/static`, and that one to `/nix`.
#[test]
fn root_an_fstab_on_another_filesystem_is_found() {
    let bench = Bench::new();
    let store = |top: &Path, fstab: &str| {
        for folder in ["store/1-etc/etc", "store/3-os"] {
            fs::create_dir_all(top.join(folder)).unwrap();
        }
        fs::write(top.join("store/2-fstab"), fstab).unwrap();
        fs::write(top.join("store/3-os/os-release"), "ID=nixos\n").unwrap();
        symlink("/nix/store/2-fstab", top.join("store/1-etc/etc/fstab")).unwrap();
        symlink(
            "/nix/store/3-os/os-release",
            top.join("store/1-etc/etc/os-release"),
        )
        .unwrap();
    };
    let root_of = |top: &Path| {
        for folder in ["etc", "nix", "data"] {
            fs::create_dir_all(top.join(folder)).unwrap();
        }
        symlink("/nix/store/1-etc/etc", top.join("etc/static")).unwrap();
        symlink("/etc/static/fstab", top.join("etc/fstab")).unwrap();
        symlink("/etc/static/os-release", top.join("etc/os-release")).unwrap();
    };
    let data = bench.image("data", "ext4", &|top| {
        drop(fs::write(top.join("on-data"), "x"))
    });
    let lines = "LABEL=data /data ext4\n";
    let text = format!("LABEL=root / ext4\nLABEL=nix /nix ext4\n{lines}");
    let nix = bench.image("nix", "ext4", &|top| store(top, &text));
    let root = bench.image("root", "ext4", &root_of);
    let sub = bench.image("sub", "btrfs", &|top| {
        for name in ["@", "@nix", "@other"] {
            run!("btrfs", "subvolume", "create", &top.join(name));
        }
        root_of(&top.join("@"));
        let text = format!("LABEL=sub / btrfs subvol=@\nLABEL=sub /nix btrfs subvol=@nix\n{lines}");
        store(&top.join("@nix"), &text);
        // It says nothing of itself.
        store(&top.join("@other"), "LABEL=data / ext4\n");
    });
    for volumes in [
        vec![(&data, on_disk(1)), (&nix, on_disk(2)), (&root, on_disk(0))],
        vec![(&data, on_disk(1)), (&sub, on_disk(0))],
    ] {
        let joined = assemble(volumes, &Hints::default());
        let text = format!("{:?}\n{}", joined.paths(), joined.notes());
        for path in ["etc/static", "nix/store/2-fstab", "data/on-data"] {
            assert!(joined.has(path), "{path}: {text}");
        }
        assert!(text.contains("(its own fstab says so)"), "{text}");
        assert!(joined.tree().unread_fstab().is_none());
    }
    // The filesystem it is on is not there.
    let joined = assemble(
        vec![(&data, on_disk(1)), (&root, on_disk(0))],
        &Hints::default(),
    );
    assert!(joined.has("etc/static"), "{}", joined.notes());
    assert!(joined.tree().unread_fstab().is_some());
}

/// Docker, machinectl and snapper make subvolumes where folders were.
#[test]
fn root_a_nested_subvolume_is_a_folder_unless_it_is_a_snapshot() {
    let bench = Bench::new();
    let image = bench.image("sys", "btrfs", &|top| {
        let at = |path: &str| top.join(path);
        for name in ["@", "@/machines"] {
            run!("btrfs", "subvolume", "create", &at(name));
        }
        system(&at("@"), "LABEL=sys / btrfs subvol=@\n", "x");
        for name in ["@/machines/one", "@/read-only"] {
            run!("btrfs", "subvolume", "create", &at(name));
            fs::write(at(name).join("file"), "x").unwrap();
        }
        run!(
            "btrfs",
            "property",
            "set",
            "-ts",
            &at("@/read-only"),
            "ro",
            "true"
        );
        let one = at("@/machines/one");
        run!(
            "btrfs",
            "subvolume",
            "snapshot",
            &one,
            &at("@/machines/clone")
        );
        run!(
            "btrfs",
            "subvolume",
            "snapshot",
            "-r",
            &one,
            &at("@/machines/old")
        );
    });
    let joined = assemble(vec![(&image, on_disk(0))], &Hints::default());
    let text = format!("{:?}", joined.paths());
    // One that is only kept from changes is in no other.
    for saved in ["machines/one/file", "read-only/file"] {
        assert!(joined.has(saved), "{text}");
    }
    for left_out in ["machines/clone", "machines/old"] {
        assert!(joined.has(&format!("{left_out}/")), "{text}");
        assert!(!joined.has(&format!("{left_out}/file")), "{text}");
    }
    let walk = Walker::new(joined.tree(), WalkOptions::default());
    let mut left_out: Vec<(String, bool)> = walk
        .filter_map(|item| match item {
            Item::LeftOut(it) => Some((guestsnap::error::escape(&it.path), it.read_only)),
            _ => None,
        })
        .collect();
    left_out.sort();
    let expected = [("machines/clone", false), ("machines/old", true)];
    assert_eq!(
        left_out,
        expected.map(|(path, read_only)| (path.to_owned(), read_only))
    );
}
