//! Subvolumes that are in no backup: which are errors, and which are not missed.
//!
//! These tests need root and loop devices, and fail without.

use guestsnap::fs::NoteLevel;
use guestsnap::stream::{Item, WalkOptions, Walker};
use guestsnap_bed::images::{Bench, Loop, single};
use guestsnap_bed::run;

/// The job's messages on the tree, and the paths that it saves.
fn looked_at(device: &Loop) -> (Vec<(NoteLevel, String)>, Vec<String>) {
    let tree = single(device);
    let notes = tree.placeless(|_| false);
    let mut told: Vec<_> = notes
        .into_iter()
        .map(|note| (note.level, note.text))
        .collect();
    let mut saved = Vec::new();
    for item in Walker::new(&tree, WalkOptions::default()) {
        match item {
            Item::LeftOut(left_out) => {
                let level = if left_out.read_only {
                    NoteLevel::Info
                } else {
                    NoteLevel::Error
                };
                told.push((level, left_out.to_string()));
            }
            Item::Object(entry) => saved.push(String::from_utf8(entry.path.clone()).unwrap()),
            Item::Problem(problem) => panic!("{}", problem.error.report()),
            _ => {}
        }
    }
    tree.close().unwrap();
    (told, saved)
}

#[test]
fn root_only_snapshots_that_cannot_change_are_left_out_without_an_error() {
    let bench = Bench::alone();
    let image = bench.image("guest.img", "btrfs", &["-L", "sys"]);
    let attached = bench.attach(&image);
    let script = "cd \"$1\"
        made() { btrfs -q subvolume create $1; echo x > $1/file; }
        made @; mkdir @/etc; echo 'LABEL=sys / btrfs subvol=@' > @/etc/fstab
        # Nested, and beside the root: an image that is kept from changes, a snapshot, one that can change.
        for at in @ .; do
            made $at/image; btrfs property set $at/image ro true
            made $at/changing; btrfs -q subvolume snapshot -r $at/changing $at/past; btrfs -q subvolume snapshot $at/changing $at/clone
        done
        # Of another filesystem's, a chain of two.
        mkdir received; btrfs -q subvolume snapshot -r @/changing @/.one; echo y > @/changing/more
        btrfs -q subvolume snapshot -r @/changing @/.two
        btrfs -q send @/.one 2> /dev/null | btrfs -q receive received
        btrfs -q send -p @/.one @/.two 2> /dev/null | btrfs -q receive received";
    run!("sh", "-euc", script, "sh", &attached.directory);
    drop(attached);
    let device = Loop::new(&image);
    let (told, saved) = looked_at(&device);
    for file in ["image/file", "changing/file"] {
        assert!(saved.iter().any(|path| path == file), "{file}: {saved:?}");
    }
    let of = |wanted: NoteLevel| {
        let texts = told.iter().filter(|(level, _)| *level == wanted);
        texts.map(|(_, text)| text.as_str()).collect::<Vec<_>>()
    };
    assert_eq!(of(NoteLevel::Warning), [""; 0]);
    let info = of(NoteLevel::Info).join("\n");
    assert!(
        info.contains("p1: read-only snapshots are left out: past\n"),
        "{info}"
    );
    for path in ["/past", "/.one", "/.two"] {
        assert!(
            info.contains(&format!("{path} is a read-only snapshot")),
            "{info}"
        );
    }
    let errors = of(NoteLevel::Error).join("\n");
    let names = "changing, clone, image, received/.one, received/.two. ";
    assert!(errors.contains(&format!("tree: {names}")), "{errors}");
    assert!(
        errors.contains("/clone is a snapshot without a line"),
        "{errors}"
    );
}
