//! Guests made from one image: every id in them is the same.

use super::image::{guest_in, ignore, run, store};
use crate::bacula::{Bacula, BaculaOptions, JobResult, Selection, UNCOMPRESSED, fileset_plugin};
use crate::check;
use crate::cmd;
use crate::guestdisk::{Fs, GuestDisk, MIB, Mounted, Part, Table, image};
use crate::hoststate::HostState;
use crate::inside::{Scenario, scenario};
use crate::lvm::HostVg;
use crate::populate::{many, rich};
use crate::tree::Manifest;
use crate::workdir::WorkDir;
use crate::{Result, message, plugin_so};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// On this machine.
pub const ROOT: &[Scenario] = &[scenario("root_clones", clones)];

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("clones", clones),
    scenario("clones_remembered", remembered).only("bookworm"),
];

/// XFS and btrfs clones in one job, then in two jobs at once.
fn clones() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let expected = two_of_each(&dir, &store)?;
    let fileset = |glob: &str| {
        fileset_plugin(&format!(
            "guestsnap: image={}/{glob}.img",
            store.path().display()
        ))
    };
    let filesets = [
        ("all", "*[12]"),
        ("held", "held"),
        ("one", "*1"),
        ("two", "*2"),
    ];
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: filesets
            .map(|(name, glob)| (name.to_owned(), fileset(glob)))
            .to_vec(),
        client_file: Some(format!("allow = [\"{}/*\"]\n", store.path().display())),
        fd_conf: UNCOMPRESSED.into(),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let compare = |jobid: u32, of: &str| -> Result {
        let to = dir.join(format!("restored-{jobid}"));
        bacula.restore(jobid, &Selection::All, &to)?.clean()?;
        for (name, manifest) in expected.iter().filter(|(name, _)| name.ends_with(of)) {
            Manifest::of(&guest_in(&to, name))?
                .check_equals(manifest, &ignore())
                .map_err(|e| format!("{name} of job {jobid}: {}", message(&e)))?;
        }
        fs::remove_dir_all(&to)?;
        Ok(())
    };
    let job = run(&bacula, "all", "Full")?.clean()?;
    compare(job.jobid, "")?;
    let both = at_once(&bacula)?;
    compare(both[0].jobid, "1")?;
    compare(both[1].jobid, "2")?;
    check!(both.iter().all(|job| job.files > 400), "a guest is missing");
    store.close()
}

/// Names and contents of `xfs1`, `xfs2`, `btrfs1` and `btrfs2`; `held` is a clone that takes hours to be sent.
fn two_of_each(dir: &WorkDir, store: &Mounted) -> Result<Vec<(String, Manifest)>> {
    let mut expected = Vec::new();
    for (kind, name) in [(Fs::Xfs, "xfs"), (Fs::Btrfs, "btrfs")] {
        let path = |n: u32| store.path().join(format!("{name}{n}.img"));
        image(&path(1), 400 * MIB)?;
        let disk = GuestDisk::create(&path(1), Table::Gpt, &[Part::fs(390 * MIB, kind, "root")])?;
        let mounted = disk.mount(1, &dir.join("mnt"))?;
        rich(mounted.path(), 1, kind.can())?;
        many(mounted.path(), 200, 1)?;
        mounted.close()?;
        let clone = |to: PathBuf| -> Result<GuestDisk> {
            let (from, into) = (path(1).display().to_string(), to.display().to_string());
            cmd::run("cp", ["--reflink=always", "--", &from, &into])?;
            Ok(GuestDisk {
                path: to,
                ..disk.clone()
            })
        };
        let second = clone(path(2))?;
        if kind == Fs::Btrfs {
            let mounted = clone(store.path().join("held.img"))?.mount(1, &dir.join("mnt"))?;
            fs::File::create(mounted.path().join("hole"))?.set_len(800 << 30)?;
            mounted.close()?;
        }
        for (n, disk) in [(1, &disk), (2, &second)] {
            let mounted = disk.mount(1, &dir.join("mnt"))?;
            fs::write(mounted.path().join("who"), format!("{name}{n}"))?;
            mounted.sync()?;
            expected.push((format!("{name}{n}"), Manifest::of(mounted.path())?));
            mounted.close()?;
        }
    }
    Ok(expected)
}

/// Two jobs of clones at the same time, while a third clone is open.
fn at_once(bacula: &Bacula) -> Result<Vec<JobResult>> {
    let before = bacula.host_state()?;
    let held = bacula.start_slow("held")?;
    bacula.wait_processing("held/hole", Duration::from_secs(60))?;
    let jobs = [
        bacula.start_backup("one", "Full")?,
        bacula.start_backup("two", "Full")?,
    ];
    let waiting = "waiting for another job";
    let turns = !Path::new("/sys/fs/btrfs/features/temp_fsid").exists();
    // The Director writes what jobs say when they have ended: nothing else tells that both have come so far.
    std::thread::sleep(Duration::from_secs(if turns { 30 } else { 5 }));
    bacula.cancel(held)?;
    bacula.wait_job(held)?;
    let mut both = Vec::new();
    for job in jobs {
        let job = bacula.wait_job(job)?.clean()?;
        println!("{}", job.log);
        both.push(job);
    }
    bacula.check_host_state(&before)?;
    check!(
        both.iter().all(|job| job.log.contains(waiting) == turns),
        "this kernel needs turns: {turns}"
    );
    Ok(both)
}

/// Clones that are whole volumes: udev tells the kernel of them, which remembers the latest, and
/// kernels before 6.7 refuse the others.
fn remembered() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let [old, new] = ["domu-old", "domu-new"].map(|name| vg.lv(name, "160m"));
    let (old, new) = (old?.display().to_string(), new?.display().to_string());
    Fs::Btrfs.make(&old, "root", &[])?;
    let mounted = Mounted::device(&old, Fs::Btrfs, &dir.join("mnt"))?;
    rich(mounted.path(), 1, Fs::Btrfs.can())?;
    let expected = Manifest::of(mounted.path())?;
    mounted.close()?;
    cmd::run("dd", [&format!("if={old}"), &format!("of={new}"), "bs=1M"])?;
    for n in 0..3 {
        let mounted = Mounted::device(&new, Fs::Btrfs, &dir.join("mnt"))?;
        fs::write(mounted.path().join(format!("later-{n}")), "later")?;
        mounted.close()?;
    }
    for device in [&old, &new] {
        cmd::run(
            "udevadm",
            ["trigger", "--settle", "--action=change", device],
        )?;
    }
    let plain = cmd::run(
        "mount",
        ["-t", "btrfs", &old, &dir.join("mnt").display().to_string()],
    );
    let turns = !Path::new("/sys/fs/btrfs/features/temp_fsid").exists();
    check!(
        plain.is_err() == turns,
        "does a plain mount fail? {plain:?}"
    );
    if plain.is_ok() {
        cmd::run("umount", [dir.join("mnt")])?;
    }
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![(
            "clones".into(),
            fileset_plugin("guestsnap: lv=vg0/domu-* strip=domu-"),
        )],
        ..BaculaOptions::default()
    })?;
    let before = bacula.host_state()?;
    let job = bacula.run_backup("clones", "Full")?.clean()?;
    // Which of two clones has the link by their id changes with every event that LVM makes of them.
    let mut left = HostState::capture_scope(&bacula.scope())?.diff_of_ours(&before);
    left.retain(|line| !line.contains(" link: /dev/disk/by-"));
    check!(left.is_empty(), "left: {left:?}");
    println!("{}", job.log);
    let to = dir.join("restored");
    bacula.restore(job.jobid, &Selection::All, &to)?.clean()?;
    Manifest::of(&guest_in(&to, "old"))?.check_equals(&expected, &ignore())?;
    check!(
        guest_in(&to, "new").join("later-2").exists(),
        "the later clone is not itself"
    );
    Ok(())
}
