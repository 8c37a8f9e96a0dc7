//! Disks made again from the kit in a guest's backup.

use super::image::{bacula, run, store};
use super::points::reflink_store;
use crate::bacula::{Bacula, BaculaOptions, Selection, fileset_plugin};
use crate::guestdisk::{Content, Fs, GuestDisk, Loop, MIB, Part, Table, image};
use crate::hoststate::{HostState, Scope};
use crate::inside::{Scenario, scenario};
use crate::points::Points;
use crate::populate::{bytes, rich};
use crate::tree::{Ignore, Manifest};
use crate::workdir::WorkDir;
use crate::{Result, cmd, plugin_so, tool};
use crate::{check, fail, message};
use guestsnap::point::{Fault, Needs, Phase, Point};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// On this machine.
pub const ROOT: &[Scenario] = &[
    scenario("root_rebuild_images", images),
    scenario("root_rebuild_lost_guest", lost_guest),
    scenario("root_rebuild_points", image_points),
    scenario("root_rebuild_refused", refused),
];

/// The Plugin line's directive for all images of a folder.
fn line(store: &Path) -> String {
    fileset_plugin(&format!("guestsnap: image={}/web*.img", store.display()))
}

/// Restores the kit of a guest from one job; the folder that `guestsnap rebuild` takes.
pub(super) fn restored_kit(bacula: &Bacula, jobid: u32, guest: &str, to: &Path) -> Result<PathBuf> {
    let selection = Selection::Dir(format!("/@guestsnap/{guest}/.guestsnap/"));
    bacula.restore(jobid, &selection, to)?.clean()?;
    Ok(to.join("@guestsnap").join(guest).join(".guestsnap"))
}

/// Identities of a disk's filesystems: the lines of blkid, without the devices.
pub(super) fn identities(disk: &GuestDisk) -> Result<Vec<String>> {
    let of = |number| -> Result<String> {
        let volume = disk.volume(number)?;
        let text = cmd::run("blkid", ["-p", "-o", "export", volume.device()])?;
        let wanted = ["UUID=", "LABEL=", "TYPE=", "VERSION=", "BLOCK_SIZE="];
        let lines = text
            .lines()
            .filter(|l| wanted.iter().any(|w| l.starts_with(w)));
        Ok(lines.collect::<Vec<_>>().join(" "))
    };
    disk.parts
        .iter()
        .filter(|p| p.content != Content::Empty)
        .map(|p| of(p.number))
        .collect()
}

/// The table as sfdisk shows it, without the name of the disk.
fn table(path: &Path) -> Result<String> {
    let name = path.display().to_string();
    Ok(cmd::run("sfdisk", ["--dump", &name])?.replace(&name, "disk"))
}

/// Bytes of a disk.
fn read(path: &Path, at: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    File::open(path)?.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

/// Code in front of the first partition, and in a filesystem's first sector.
fn put_boot_code(disk: &GuestDisk) -> Result {
    let file = File::options().write(true).open(&disk.path)?;
    file.write_all_at(&bytes(440, 1), 0)?;
    file.write_all_at(&bytes(50_000, 2), 64 << 10)?;
    file.write_all_at(&bytes(1024, 3), disk.part(1)?.offset)?;
    file.sync_all()?;
    Ok(())
}

fn check_filesystems(disk: &GuestDisk) -> Result {
    for part in &disk.parts {
        let Content::Fs(fs, _) = &part.content else {
            continue;
        };
        let volume = disk.volume(part.number)?;
        match fs {
            Fs::Xfs => cmd::run("xfs_repair", ["-n", volume.device()])?,
            Fs::Vfat => cmd::run("fsck.fat", ["-n", volume.device()])?,
            Fs::Btrfs => cmd::run("btrfs", ["check", volume.device()])?,
            _ => cmd::run("e2fsck", ["-f", "-n", volume.device()])?,
        };
    }
    Ok(())
}

/// An MBR with logical partitions and a GPT with a boot partition: both come back as they were, from a full
/// job and its incremental.
fn images() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let (mbr, gpt) = (store.path().join("web1.img"), store.path().join("web2.img"));
    image(&mbr, 800 * MIB)?;
    image(&gpt, 900 * MIB)?;
    let mbr = GuestDisk::create(
        &mbr,
        Table::Mbr,
        &[
            Part::fs(100 * MIB, Fs::Ext4, "root"),
            Part::new(16 * MIB, Content::Swap).logical(),
            Part::fs(320 * MIB, Fs::Xfs, "data").logical(),
            Part::fs(64 * MIB, Fs::Ext3, "old").logical(),
        ],
    )?;
    let gpt = GuestDisk::create(
        &gpt,
        Table::Gpt,
        &[
            Part::fs(64 * MIB, Fs::Ext2, "boot"),
            Part::new(16 * MIB, Content::Swap),
            Part::fs(200 * MIB, Fs::Btrfs, "pool"),
        ],
    )?;
    put_boot_code(&mbr)?;
    put_boot_code(&gpt)?;
    let bacula = bacula(store.path(), plugin_so()?, &[("g", line(store.path()))])?;
    let full = run(&bacula, "g", "Full")?.clean()?;
    for (guest, disk) in [("web1", &mbr), ("web2", &gpt)] {
        let kit = restored_kit(&bacula, full.jobid, guest, &dir.join("kit"))?;
        let made = dir.join(format!("{guest}.img"));
        let place = made.display().to_string();
        let words = ["rebuild", &kit.display().to_string(), "--disk", &place];
        let working = format!("--working-dir={}", bacula.fd_working_dir().display());
        let command = tool()?.display().to_string();
        let plan = cmd::run(&command, words.iter().copied().chain(["--plan", &working]))?;
        check!(!made.exists(), "a plan made the disk:\n{plan}");
        let said = cmd::run(&command, words.iter().copied().chain([&*working]))?;
        println!("{plan}{said}");
        check!(
            plan.contains("p1: a boot loader is in its first sectors"),
            "{plan}"
        );
        let others = ["p5: a boot", "p6: a boot", "p7: a boot", "p3: a boot"];
        check!(!others.iter().any(|other| plan.contains(other)), "{plan}");
        let again = GuestDisk {
            path: made.clone(),
            parts: disk.parts.clone(),
        };
        check!(
            table(&disk.path)? == table(&made)?,
            "{}\n{}",
            table(&disk.path)?,
            table(&made)?
        );
        let (known, found) = (identities(disk)?, identities(&again)?);
        check!(known == found, "{known:#?}\n{found:#?}");
        let first = disk.part(1)?.offset;
        let front = usize::try_from(first)? - 1024;
        for (at, len) in [(0, 440), (1024, front), (first, 1024)] {
            check!(
                read(&disk.path, at, len)? == read(&made, at, len)?,
                "{guest}: bytes at {at}"
            );
        }
        check_filesystems(&again)?;
    }
    grown(&bacula, &dir, full.jobid)?;
    changes(&bacula, &mbr)?;
    store.close()
}

/// The last partition of a larger disk grows, and the filesystem in it.
fn grown(bacula: &Bacula, dir: &WorkDir, jobid: u32) -> Result {
    let kit = restored_kit(bacula, jobid, "web2", &dir.join("kit"))?;
    let kit = kit.display().to_string();
    let path = dir.join("grown.img");
    let place = path.display().to_string();
    let command = tool()?.display().to_string();
    let working = format!("--working-dir={}", bacula.fd_working_dir().display());
    let words = [
        "rebuild", &kit, "--disk", &place, "--size", "1200M", &working,
    ];
    cmd::run(&command, words)?;
    let shown = cmd::run("sfdisk", ["--verify", &place])?;
    check!(shown.contains("No errors"), "{shown}");
    let shown = table(&path)?;
    check!(shown.contains(" size=     2289664,"), "{shown}");
    let number = 3;
    let part = shown
        .lines()
        .find(|line| line.starts_with("disk3"))
        .ok_or("no p3")?;
    let field = |key: &str| -> Result<u64> {
        let rest = part.split(key).nth(1).ok_or("no such field")?;
        Ok(rest
            .split(',')
            .next()
            .unwrap_or_default()
            .trim()
            .parse::<u64>()?
            * 512)
    };
    let volume = Loop::attach(&path, field("start=")?, Some(field("size=")?), 0)?;
    cmd::run("btrfs", ["check", volume.device()])?;
    let size = cmd::sh(&format!(
        "btrfs inspect-internal dump-super {} | sed -n 's/^total_bytes//p'",
        volume.device()
    ))?;
    check!(
        size.trim().parse::<u64>()? == field("size=")?,
        "p{number}: {size}, {shown}"
    );
    drop(volume);
    for (words, word) in [
        (["--size", "100M"], "a smaller disk is not made"),
        (["--size", "40"], "--size needs a number"),
    ] {
        let all = ["rebuild", &kit, "--disk", "/tmp/none.img", &working]
            .into_iter()
            .chain(words);
        let said = match cmd::run(&command, all) {
            Ok(said) => fail!("{words:?}: {said}"),
            Err(error) => message(&error),
        };
        check!(said.contains(word), "{words:?}: {said}");
    }
    Ok(())
}

/// An incremental job has the part of the kit that changed, and nothing else of it.
fn changes(bacula: &Bacula, disk: &GuestDisk) -> Result {
    let kit = |jobid| -> Result<Vec<String>> {
        let files = bacula.list_files(jobid)?.into_iter();
        Ok(files
            .filter(|f| f.contains("/.guestsnap/rebuild/") && !f.ends_with('/'))
            .collect())
    };
    let same = run(bacula, "g", "Incremental")?.clean()?;
    check!(kit(same.jobid)?.is_empty(), "{:?}", kit(same.jobid)?);
    let file = File::options().write(true).open(&disk.path)?;
    file.write_all_at(&bytes(440, 9), 0)?;
    file.sync_all()?;
    let changed = run(bacula, "g", "Incremental")?.clean()?;
    let names = kit(changed.jobid)?;
    let expected =
        ["area-0", "kit.json"].map(|n| format!("/@guestsnap/web1/.guestsnap/rebuild/{n}"));
    check!(names == expected, "{names:?}");
    Ok(())
}

/// A btrfs root in a subvolume, and an XFS. The ids of its subvolumes have gaps.
fn make_guest(dir: &WorkDir, path: &Path) -> Result<GuestDisk> {
    image(path, 800 * MIB)?;
    let disk = GuestDisk::create(
        path,
        Table::Gpt,
        &[
            Part::fs(320 * MIB, Fs::Btrfs, "system"),
            Part::fs(320 * MIB, Fs::Xfs, "data"),
            Part::new(16 * MIB, Content::Swap),
        ],
    )?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    cmd::sh(&format!(
        "set -e; cd '{}'; for one in a @ b @home; do btrfs -q subvolume create $one; done
         btrfs -q subvolume delete -C a b; btrfs -q subvolume create @/nested
         btrfs -q subvolume snapshot -r @ snapshot
         btrfs -q subvolume set-default @; mkdir -p @/etc @/srv/data @/home
         echo 'LABEL=system / btrfs subvol=@ 0 0
               LABEL=system /home btrfs subvol=/@home 0 0
               LABEL=data /srv/data xfs defaults 0 0' > @/etc/fstab",
        mounted.path().display()
    ))?;
    mounted.close()?;
    with_tree(&disk, dir, |root| {
        rich(&root.join("srv/data"), 2, Fs::Xfs.can())?;
        rich(&root.join("home"), 3, Fs::Btrfs.can())?;
        std::fs::write(root.join("nested/file"), "in a nested subvolume")?;
        cmd::sh(&format!(
            "btrfs property set '{}/nested' ro true",
            root.display()
        ))?;
        cmd::sh(&format!(
            "echo secret > '{0}/etc/shadow'; chmod 600 '{0}/etc/shadow'",
            root.display()
        ))?;
        Ok(())
    })?;
    Ok(disk)
}

/// Works in the guest's tree.
fn with_tree<T>(
    disk: &GuestDisk,
    dir: &WorkDir,
    work: impl FnOnce(&Path) -> Result<T>,
) -> Result<T> {
    let root = disk.mount(1, &dir.join("mnt"))?;
    let data = disk.mount(2, &root.path().join("srv/data"))?;
    let folder = root.path().display();
    cmd::sh(&format!(
        "mount -t btrfs -o subvol=@home \"$(findmnt -nvo SOURCE '{folder}')\" '{folder}/home'"
    ))?;
    let done = work(root.path());
    cmd::sh(&format!("umount '{folder}/home'"))?;
    let done = done?;
    data.close()?;
    root.close()?;
    Ok(done)
}

/// Ids and paths of the subvolumes.
fn subvolumes(disk: &GuestDisk, dir: &WorkDir) -> Result<String> {
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    let folder = mounted.path().display();
    let text = cmd::sh(&format!(
        "btrfs subvolume list '{folder}' | sed 's/gen [0-9]* //'; btrfs subvolume get-default '{folder}' | sed 's/gen [0-9]* //'"
    ))?;
    mounted.close()?;
    Ok(text)
}

/// A disk is lost with all that is in it: the kit makes it again, a restore into it brings the files of a full
/// job and its incremental.
fn lost_guest() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let path = store.path().join("web1.img");
    let disk = make_guest(&dir, &path)?;
    let folder = store.path().display();
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![("g".into(), fileset_plugin("guestsnap: guest=web1"))],
        client_file: Some(format!(
            "allow = [\"{folder}/*\"]\n[restore]\ninto = [\"web1\"]\n[guest.web1]\ndisks = [\"{folder}/web1.img\"]\n"
        )),
        ..BaculaOptions::default()
    })?;
    let full = run(&bacula, "g", "Full")?.clean()?;
    with_tree(&disk, &dir, |root| {
        std::fs::write(root.join("home/new"), "new")?;
        Ok(std::fs::write(root.join("srv/data/more"), "more")?)
    })?;
    let more = run(&bacula, "g", "Incremental")?.clean()?;
    let expected = with_tree(&disk, &dir, Manifest::of)?;
    let (known, ids) = (identities(&disk)?, subvolumes(&disk, &dir)?);
    // Its files are not in the backup.
    let ids = ids.lines().filter(|line| !line.ends_with("path snapshot"));
    let ids: String = ids.map(|line| format!("{line}\n")).collect();
    std::fs::remove_file(&path)?;

    let kit = restored_kit(&bacula, full.jobid, "web1", &dir.join("kit"))?;
    let told = "@/nested is made writable";
    let manifest = std::fs::read_to_string(kit.join("manifest.json"))?;
    check!(manifest.contains(told), "{manifest}");
    let before = bacula.host_state()?;
    let said = rebuild(&bacula, &kit, &path)?;
    check!(said.contains(told), "{said}");
    bacula.check_host_state(&before)?;
    check!(
        identities(&disk)? == known,
        "{known:#?}\n{:#?}\n{said}",
        identities(&disk)?
    );
    check!(
        subvolumes(&disk, &dir)? == ids,
        "{ids}\n{}",
        subvolumes(&disk, &dir)?
    );
    let words = format!(
        "fileset=g jobid={},{} where=/ replace=always select\ncd /@guestsnap\nmark web1\ndone",
        full.jobid, more.jobid
    );
    let job = bacula.start_restore_with_options(&words, &[("into", "web1")])?;
    let job = bacula.wait_job(job)?;
    println!("{}", job.log);
    job.clean()?;
    bacula.check_host_state(&before)?;
    check_filesystems(&disk)?;
    let ignore = Ignore {
        sockets: true,
        xattrs: vec!["trusted.SGI_ACL_".into()],
        ..Ignore::default()
    };
    with_tree(&disk, &dir, Manifest::of)?.check_equals(&expected, &ignore)?;
    drop(bacula);
    store.close()
}

/// Makes a disk from a kit.
pub(super) fn rebuild(bacula: &Bacula, kit: &Path, target: &Path) -> Result<String> {
    let words = [
        "rebuild",
        &kit.display().to_string(),
        "--disk",
        &target.display().to_string(),
    ];
    let working = format!("--working-dir={}", bacula.fd_working_dir().display());
    cmd::run(
        &tool()?.display().to_string(),
        words.iter().copied().chain([&*working]),
    )
}

/// A kit of a small guest with a subvolume, made and restored without a daemon.
pub(super) fn small_kit(points: &Points, dir: &WorkDir, store: &Path) -> Result<PathBuf> {
    let path = store.join("web1.img");
    image(&path, 130 * MIB)?;
    let disk = GuestDisk::create(
        &path,
        Table::Gpt,
        &[Part::fs(128 * MIB - MIB, Fs::Btrfs, "root")],
    )?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    cmd::sh(&format!(
        "set -e; cd '{}'; btrfs -q subvolume create @; mkdir @/etc; echo 'LABEL=root / btrfs subvol=@ 0 0' > @/etc/fstab",
        mounted.path().display()
    ))?;
    mounted.close()?;
    let (work, line) = (points.working_dir(), format!("image={}", path.display()));
    let to = dir.join("to").display().to_string();
    let copied = points.drive(&["copy", &work.display().to_string(), &line, &to])?;
    check!(copied.is_clean(), "{}", copied.text);
    Ok(dir.join("to/@guestsnap/web1/.guestsnap"))
}

/// Killed at each point of a rebuild and failing there, nothing is left, and the next rebuild is a whole one.
/// `name`: what the target is called; `there`: whether it exists.
pub(super) fn each_point(
    points: &Points,
    kit: &Path,
    name: &str,
    needs: Needs,
    there: &dyn Fn() -> Result<bool>,
    remove: &dyn Fn() -> Result,
) -> Result {
    let work = points.working_dir().display().to_string();
    let kit = kit.display().to_string();
    let scope = Scope {
        fd_pid: None,
        working_dir: Some(points.working_dir()),
    };
    let make = || points.drive(&["rebuild", &work, &kit, name]);
    let first = make()?;
    check!(first.is_clean() && there()?, "the first:\n{}", first.text);
    remove()?;
    let before = HostState::capture_scope(&scope)?;
    let nothing_left = |what: &str| -> Result {
        let left = HostState::settled_diff(&before, &scope)?;
        check!(left.is_empty(), "{what}: left:\n  {}", left.join("\n  "));
        Ok(())
    };
    let all = Point::ALL
        .iter()
        .filter(|point| point.phase() == Phase::Rebuild && point.needs() == needs);
    for point in all {
        let what = point.name();
        points.act(*point, "kill")?;
        let killed = make()?;
        points.clear()?;
        if !points.acted() {
            // A point of the other kind of target.
            check!(killed.is_clean(), "{what}:\n{}", killed.text);
            remove()?;
            continue;
        }
        check!(killed.killed, "{what}:\n{}", killed.text);
        let swept = points.drive(&["sweep", &work])?;
        check!(swept.is_clean(), "{what}: sweep:\n{}", swept.text);
        let complete = matches!(point, Point::RebuildRenamed | Point::RebuildKept);
        check!(there()? == complete, "{what}: the target:\n{}", swept.text);
        if complete {
            remove()?;
        }
        nothing_left(what)?;
        if point.fault() == Fault::Error {
            points.act(*point, "error=5")?;
            let failed = make()?;
            points.clear()?;
            check!(
                failed.of('F').iter().any(|e| e.contains("GS-")),
                "{what} fails:\n{}",
                failed.text
            );
            check!(
                !there()?,
                "{what} fails: the target is there:\n{}",
                failed.text
            );
            nothing_left(what)?;
        }
    }
    let last = make()?;
    check!(last.is_clean() && there()?, "the last:\n{}", last.text);
    remove()?;
    nothing_left("the last")
}

fn image_points() -> Result {
    let dir = WorkDir::new()?;
    let store = reflink_store(&dir)?;
    let points = Points::new(&format!("allow = ['{}/*']\n", store.path().display()))?;
    let kit = small_kit(&points, &dir, store.path())?;
    let target = dir.join("new.img");
    let remove = || -> Result { Ok(std::fs::remove_file(&target)?) };
    let there = || -> Result<bool> {
        let all = std::fs::read_dir(dir.path())?.flatten();
        let names: Vec<_> = all
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect();
        check!(!names.iter().any(|n| n.contains("partial")), "{names:?}");
        Ok(target.exists())
    };
    each_point(
        &points,
        &kit,
        &target.display().to_string(),
        Needs::Image,
        &there,
        &remove,
    )?;
    store.close()
}

/// Kits and targets that cannot be used: each with its code, and nothing is written.
fn refused() -> Result {
    let dir = WorkDir::new()?;
    let store = reflink_store(&dir)?;
    let points = Points::new(&format!("allow = ['{}/*']\n", store.path().display()))?;
    let kit = small_kit(&points, &dir, store.path())?;
    let new = dir.join("new.img").display().to_string();
    let command = tool()?.display().to_string();
    let working = format!("--working-dir={}", points.working_dir().display());
    let fails = |kit: &Path, targets: &[&str], more: &[&str], code: &str, word: &str| -> Result {
        let kit = kit.display().to_string();
        let disks = targets.iter().flat_map(|target| ["--disk", target]);
        let words = ["rebuild", &kit, &working]
            .into_iter()
            .chain(disks)
            .chain(more.iter().copied());
        let said = match cmd::run(&command, words) {
            Ok(said) => fail!("{code} is not said: {said}"),
            Err(error) => message(&error),
        };
        check!(
            said.contains(code) && said.contains(word),
            "{code}, {word}: {said}"
        );
        check!(!dir.join("new.img").exists(), "{code}: the target is there");
        Ok(())
    };
    // Targets.
    fails(
        &kit,
        &[&new, "/tmp/other.img"],
        &[],
        "GS-612",
        "the guest has 1",
    )?;
    fails(&kit, &["new.img"], &[], "GS-612", "absolute path")?;
    fails(
        &kit,
        &["/no/such/folder/new.img"],
        &[],
        "GS-612",
        "creating it",
    )?;
    let small = dir.join("small.img");
    image(&small, 8 * MIB)?;
    fails(
        &kit,
        &[&small.display().to_string()],
        &[],
        "GS-612",
        "it has 8388608 bytes",
    )?;
    let full = dir.join("full.img");
    std::fs::copy(store.path().join("web1.img"), &full)?;
    let full_name = full.display().to_string();
    fails(&kit, &[&full_name], &[], "GS-612", "--wipe")?;
    let link = dir.join("link.img");
    std::os::unix::fs::symlink(&full, &link)?;
    fails(
        &kit,
        &[&link.display().to_string()],
        &["--wipe"],
        "GS-",
        "link",
    )?;
    let held = Loop::attach(&full, 0, None, 0)?;
    fails(&kit, &[&full_name], &["--wipe"], "GS-", "in use")?;
    drop(held);
    // Kits.
    fails(&dir.join("nowhere"), &[&new], &[], "GS-611", "no such file")?;
    let old = dir.join("old");
    std::fs::create_dir(&old)?;
    std::fs::copy(kit.join("manifest.json"), old.join("manifest.json"))?;
    fails(&old, &[&new], &[], "GS-611", "no kit")?;
    let edited = dir.join("edited");
    for (script, word) in [
        ("truncate -s 10 rebuild/area-0", "other bytes"),
        ("rm rebuild/area-0", "area-0"),
        ("truncate -s -9 rebuild/kit.json", "kit.json"),
        (
            "sed -i 's/\"format\": 2/\"format\": 3/' rebuild/kit.json",
            "format 3",
        ),
        (
            "sed -i 's/\"area-0\"/\"..\\/..\\/manifest.json\"/' rebuild/kit.json",
            "a file of the name",
        ),
        (
            "sed -i 's/\"start\": 1048576/\"start\": 9048576000/' rebuild/kit.json",
            "beyond",
        ),
        (
            "sed -i 's/\"skinny-metadata\"/\"-f\"/' rebuild/kit.json",
            "feature",
        ),
        (
            "sed -i 's/\"label\": \"root\"/\"label\": \"-f\"/' rebuild/kit.json",
            "label",
        ),
    ] {
        cmd::sh(&format!(
            "rm -rf '{0}'; cp -r '{1}' '{0}'; cd '{0}'; {script}",
            edited.display(),
            kit.display()
        ))?;
        fails(&edited, &[&new], &[], "GS-611", word)?;
    }
    // Emptied when that is asked for.
    let words = [
        "rebuild",
        &kit.display().to_string(),
        "--disk",
        &full_name,
        "--wipe",
        &working,
    ]
    .map(str::to_owned);
    cmd::run(&command, words)?;
    store.close()
}
