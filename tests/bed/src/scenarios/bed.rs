//! The bed proves itself: Bacula, LVM, guest disks and the host-state comparison work before the plugin is asked.

use crate::bacula::{Bacula, BaculaOptions, Selection, fileset_files};
use crate::guestdisk::{
    Content, Fs, GuestDisk, GuestLv, GuestVg, MIB, Part, Table, classic, dirty_copy, image,
};
use crate::hoststate::{self, HostState};
use crate::inside::{Scenario, scenario};
use crate::lvm::{HostVg, lvm};
use crate::populate::{many, rich};
use crate::tree::{Ignore, Manifest};
use crate::workdir::WorkDir;
use crate::{Result, cmd};
use crate::{check, fail};
use std::path::{Path, PathBuf};

/// On this machine.
pub const ROOT: &[Scenario] = &[
    scenario("root_bed_file_backup", file_backup),
    scenario("root_bed_host_state", host_state),
    scenario("root_bed_guest_disks", guest_disks_without_vfat),
    scenario("root_bed_guest_lvm", guest_lvm),
    scenario("root_bed_dirty_journal", dirty_journal),
];

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("bed_kernel_targets", kernel_targets),
    scenario("bed_file_backup", file_backup).only("bookworm"),
    scenario("bed_thick_snapshot", thick_snapshot).only("bookworm"),
    scenario("bed_thin_snapshot", thin_snapshot).only("bookworm"),
    scenario("bed_host_state", host_state).only("bookworm"),
    scenario("bed_guest_disks", guest_disks).only("bookworm"),
    scenario("bed_guest_lvm", guest_lvm).only("bookworm"),
    scenario("bed_dirty_journal", dirty_journal).only("bookworm"),
];

/// Objects that Bacula's own File= restore does not bring back.
fn file_restore_ignores() -> Ignore {
    Ignore {
        sockets: true,
        nanoseconds: true,
        // Holes of less than a network buffer are filled; hard links of symbolic links become two links; 9.6 loses the
        // xattrs of symbolic links.
        holes: true,
        below: ["etc/absolute", "etc/dangling", "var/linked-symlink"]
            .map(PathBuf::from)
            .to_vec(),
        ..Ignore::default()
    }
}

fn kernel_targets() -> Result {
    for target in [
        "linear",
        "snapshot",
        "snapshot-origin",
        "thin",
        "thin-pool",
        "mirror",
        "raid",
        "delay",
        "flakey",
    ] {
        check!(
            hoststate::have_dm(target),
            "no device-mapper target {target}"
        );
    }
    let filesystems = std::fs::read_to_string("/proc/filesystems")?;
    for fs in ["ext4", "xfs", "btrfs", "vfat"] {
        check!(filesystems.contains(fs), "no {fs}");
    }
    println!("Bacula {}", Bacula::version()?);
    Ok(())
}

/// A real Bacula saves and restores a rich tree with `File =`; nothing is left on the host.
fn file_backup() -> Result {
    let dir = WorkDir::new()?;
    let tree = dir.join("tree");
    std::fs::create_dir(&tree)?;
    rich(&tree, 1, Fs::Ext4.can())?;
    many(&tree, 300, 7)?;
    let expected = Manifest::of(&tree)?;
    check!(
        expected
            .differences(&Manifest::of(&tree)?, &Ignore::default())
            .is_empty(),
        "a tree differs from itself"
    );

    let started = std::time::Instant::now();
    let mut bacula = Bacula::start(BaculaOptions {
        filesets: vec![("tree".into(), fileset_files(&[&tree]))],
        ..BaculaOptions::default()
    })?;
    println!("Bacula up in {:.1} s", started.elapsed().as_secs_f64());
    bacula.run_backup("tree", "Full")?.clean()?;
    let before = bacula.host_state()?;
    let job = bacula.run_backup("tree", "Full")?.clean()?;
    println!("{} files in {:.1} s\n{}", job.files, job.seconds, job.log);
    bacula.check_host_state(&before)?;
    check!(
        job.log.contains("Termination:"),
        "the job log is not complete:\n{}",
        job.log
    );
    check!(
        job.files as usize + 1 >= expected.entries.len(),
        "{} files of {}",
        job.files,
        expected.entries.len()
    );
    let listed = bacula.list_files_raw(job.jobid)?;
    let name = [
        tree.as_os_str().as_encoded_bytes(),
        b"/opt/names/latin1-\xe4\xf6\xfc",
    ]
    .concat();
    check!(
        listed.contains(&name),
        "a name that is no UTF-8 is not in the catalog"
    );
    check!(
        bacula.estimate("tree", "Full")?.contains("etc/passwd"),
        "estimate lists nothing"
    );
    check!(
        bacula.status_client()?.contains("bed-fd"),
        "status client says nothing"
    );

    restores(&bacula, job.jobid, &dir, &tree, &expected)?;

    // The catalog knows of a failed job, and the daemon can be killed and restarted.
    let mut failing = bacula.start_backup("tree", "Full")?;
    let _ = bacula.cancel(failing)?;
    let cancelled = bacula.wait_job(failing)?;
    check!(
        matches!(cancelled.status, 'A' | 'T'),
        "status of a cancelled job: {}",
        cancelled.status
    );
    bacula.kill_fd()?;
    bacula.restart_fd()?;
    bacula.restart_fd()?;
    failing = bacula.start_backup("tree", "Incremental accurate=yes")?;
    let job = bacula.wait_job(failing)?.clean()?;
    check!(job.files < 20, "the incremental saved {} files", job.files);
    Ok(())
}

/// Everything, one file, and one directory.
fn restores(bacula: &Bacula, job: u32, dir: &WorkDir, tree: &Path, expected: &Manifest) -> Result {
    let all = dir.join("all");
    bacula.restore(job, &Selection::All, &all)?.clean()?;
    let inner = tree.strip_prefix("/")?;
    let mut ignore = file_restore_ignores();
    ignore.root = true;
    Manifest::of(&all.join(inner))?.check_equals(expected, &ignore)?;
    let one = dir.join("one");
    bacula
        .restore(
            job,
            &Selection::Files(vec![format!("{}/etc/passwd", tree.display())]),
            &one,
        )?
        .clean()?;
    check!(
        one.join(inner).join("etc/passwd").is_file(),
        "the one file was not restored"
    );
    check!(
        !one.join(inner).join("etc/hostname").exists(),
        "more than the one file was restored"
    );
    let sub = dir.join("sub");
    bacula
        .restore(
            job,
            &Selection::Dir(format!("{}/home", tree.display())),
            &sub,
        )?
        .clean()?;
    Manifest::of(&sub.join(inner).join("home"))?
        .check_equals(&expected.below(Path::new("home")), &ignore)?;
    Ok(())
}

fn thick_snapshot() -> Result {
    let clean = HostState::capture(None)?;
    {
        let vg = HostVg::on_scratch("vg0")?;
        let lv = vg.lv("domu-web1", "400m")?;
        let disk = classic(&lv, 32 * MIB)?;
        let dir = WorkDir::new()?;
        let mounted = disk.mount(1, &dir.join("mnt"))?;
        rich(mounted.path(), 3, Fs::Ext3.can())?;
        let before = HostState::capture(None)?;
        let started = std::time::Instant::now();
        lvm(
            "lvcreate",
            &["-y", "-s", "-L", "100m", "-n", "snap", "vg0/domu-web1"],
        )?;
        println!("lvcreate -s: {:.2} s", started.elapsed().as_secs_f64());
        let lines = HostState::capture(None)?.diff(&before);
        check!(
            lines.iter().any(|l| l.contains("dm") && l.contains("snap")),
            "the snapshot is not seen: {lines:?}"
        );
        check!(
            lines.iter().any(|l| l.contains("lv: ")),
            "the snapshot LV is not seen: {lines:?}"
        );
        lvm("lvremove", &["-f", "-y", "vg0/snap"])?;
        let lines = HostState::settled_diff(&before, &Default::default())?;
        check!(lines.is_empty(), "left after lvremove: {lines:?}");
        mounted.close()?;
    }
    let lines = HostState::settled_diff(&clean, &Default::default())?;
    check!(lines.is_empty(), "left after the VG: {lines:?}");
    Ok(())
}

fn thin_snapshot() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    vg.thin_pool("pool", "1g")?;
    let lv = vg.thin_lv("pool", "domu-thin", "400m")?;
    GuestDisk::create(&lv, Table::Whole, &[Part::fs(0, Fs::Ext4, "root")])?;
    lvm(
        "lvcreate",
        &["-y", "-s", "-kn", "-n", "snap", "vg0/domu-thin"],
    )?;
    check!(vg.names()?.iter().any(|n| n == "snap"), "no snapshot");
    lvm("lvremove", &["-f", "-y", "vg0/snap"])?;
    Ok(())
}

/// The comparison sees what is planted, and nothing when all is taken away.
fn host_state() -> Result {
    let dir = WorkDir::new()?;
    let before = HostState::capture(None)?;
    let lines = HostState::capture(None)?.diff(&before);
    check!(lines.is_empty(), "differences without a change: {lines:?}");
    let see = |what: &str, needle: &str| -> Result {
        let lines = HostState::capture(None)?.diff(&before);
        check!(
            lines
                .iter()
                .any(|l| l.starts_with("+ ") && l.contains(needle)),
            "{what} is not seen: {lines:?}"
        );
        Ok(())
    };
    let gone = |what: &str| -> Result {
        let lines = HostState::settled_diff(&before, &Default::default())?;
        check!(lines.is_empty(), "after {what} was taken away: {lines:?}");
        Ok(())
    };
    let file = dir.join("image");
    image(&file, 64 * MIB)?;
    {
        let planted = crate::guestdisk::Loop::attach(&file, 1024 * 1024, None, 0)?;
        see("a loop device", "image offset 1048576")?;
        if hoststate::have_dm("linear") {
            let table = format!("0 1000 linear {} 0", planted.device());
            cmd::run(
                "dmsetup",
                ["create", "guestsnap-planted", "--table", &table],
            )?;
            see("a dm device", "guestsnap-planted: 0 1000 linear")?;
            cmd::run("dmsetup", ["remove", "--retry", "guestsnap-planted"])?;
        }
    }
    gone("a loop device")?;
    // A mount in a private namespace, which no look at our own mounts shows.
    let point = dir.join("private");
    std::fs::create_dir(&point)?;
    let mut child = cmd::command("unshare");
    child.args([
        "-m",
        "--propagation",
        "private",
        "sh",
        "-c",
        "mount -t tmpfs planted \"$1\" && exec sleep 60",
        "sh",
    ]);
    let mut child = child.arg(&point).spawn()?;
    let seen = cmd::wait_for(
        "the private mount",
        std::time::Duration::from_secs(20),
        || Ok(see("a private mount", "planted on").is_ok().then_some(())),
    );
    child.kill()?;
    child.wait()?;
    seen?;
    gone("a private mount")?;
    // A process: a descriptor and a thread more.
    let mut shell = cmd::command("sh");
    shell
        .arg("-c")
        .arg(format!("sleep 1; exec 7<{}; exec sleep 30", file.display()));
    let mut child = shell.stdin(std::process::Stdio::null()).spawn()?;
    let pid = Some(child.id() as i32);
    let before = HostState::capture(pid)?;
    let seen = cmd::wait_for("the descriptor", std::time::Duration::from_secs(10), || {
        let lines = HostState::capture(pid)?.diff(&before);
        Ok(lines
            .iter()
            .any(|l| l.starts_with("+ fd: ") && l.contains("image"))
            .then_some(()))
    });
    child.kill()?;
    child.wait()?;
    seen
}

/// Every table and filesystem the bed can make can be mounted and read back.
fn guest_disks() -> Result {
    disks(Fs::Vfat)
}

/// Variant for a kernel without vfat: ext2 in its place.
fn guest_disks_without_vfat() -> Result {
    disks(Fs::Ext2)
}

fn disks(small: Fs) -> Result {
    let dir = WorkDir::new()?;
    let layouts: &[(&str, Table, Vec<Part>)] = &[
        ("whole", Table::Whole, vec![Part::fs(0, Fs::Ext2, "whole")]),
        (
            "mbr",
            Table::Mbr,
            vec![
                Part::fs(100 * MIB, Fs::Ext3, "root").at(63),
                Part::fs(64 * MIB, small, "DATA"),
                Part::fs(64 * MIB, Fs::Ext4, "logical").logical(),
                Part::new(32 * MIB, Content::Swap).logical(),
            ],
        ),
        (
            "gpt",
            Table::Gpt,
            vec![
                Part::fs(64 * MIB, small, "EFI"),
                Part::fs(320 * MIB, Fs::Xfs, "root"),
                Part::fs(160 * MIB, Fs::Btrfs, "data"),
            ],
        ),
        (
            "gpt4096",
            Table::Gpt4096,
            vec![
                Part::fs(100 * MIB, Fs::Ext4, "root"),
                Part::new(32 * MIB, Content::Swap),
            ],
        ),
    ];
    for (name, table, parts) in layouts {
        let path = dir.join(name);
        image(&path, 640 * MIB)?;
        let disk = GuestDisk::create(&path, *table, parts)
            .map_err(|e| format!("{name}: {}", crate::message(&e)))?;
        let sector = if *table == Table::Gpt4096 {
            "4096"
        } else {
            "512"
        };
        if *table != Table::Whole {
            let shown = cmd::run("fdisk", ["-b", sector, "-l", &path.display().to_string()])?;
            let lines = shown
                .lines()
                .filter(|l| l.starts_with(&path.display().to_string()))
                .count();
            let extended = usize::from(parts.iter().any(|p| p.logical));
            check!(
                lines == parts.len() + extended,
                "{name}: {lines} partitions in:\n{shown}"
            );
        }
        for part in &disk.parts {
            let Content::Fs(fs, _) = part.content else {
                continue;
            };
            let mounted = disk.mount(part.number, &dir.join("mnt"))?;
            rich(mounted.path(), u64::from(part.number), fs.can())
                .map_err(|e| format!("{name} {fs:?}: {}", crate::message(&e)))?;
            let first = Manifest::of(mounted.path())?;
            mounted.close()?;
            let mounted = disk.mount(part.number, &dir.join("mnt"))?;
            Manifest::of(mounted.path())?
                .check_equals(&first, &Ignore::default())
                .map_err(|e| format!("{name} {fs:?} after a new mount: {}", crate::message(&e)))?;
            mounted.close()?;
        }
    }
    Ok(())
}

/// A guest's VG over two disks, made and read without the host's LVM keeping anything of it.
fn guest_lvm() -> Result {
    let dir = WorkDir::new()?;
    let mut disks = Vec::new();
    for name in ["a", "b"] {
        image(&dir.join(name), 400 * MIB)?;
        disks.push(GuestDisk::create(
            &dir.join(name),
            Table::Mbr,
            &[Part::new(390 * MIB, Content::Pv)],
        )?);
    }
    let mut lvs = vec![
        GuestLv::new("root", "-L 200m", Content::Fs(Fs::Ext4, "root".into())),
        GuestLv::new("swap", "-L 16m", Content::Swap),
    ];
    if hoststate::have_dm("striped") {
        lvs.push(GuestLv::new(
            "striped",
            "-i 2 -L 64m",
            Content::Fs(Fs::Ext4, "striped".into()),
        ));
    }
    let vg = GuestVg::create("VolGroup00", &[(&disks[0], 1), (&disks[1], 1)], &lvs)?;
    for lv in lvs.iter().filter(|l| matches!(l.content, Content::Fs(..))) {
        let expected = vg.with_mounted(&lv.name, Fs::Ext4, &dir.join("mnt"), |point| {
            rich(point, 5, Fs::Ext4.can())?;
            Manifest::of(point)
        })?;
        let again = vg.with_mounted(&lv.name, Fs::Ext4, &dir.join("mnt"), Manifest::of)?;
        again.check_equals(&expected, &Ignore::default())?;
    }
    Ok(())
}

/// A copy of a mounted image has something to replay.
fn dirty_journal() -> Result {
    let dir = WorkDir::new()?;
    let (path, copy) = (dir.join("image"), dir.join("copy"));
    image(&path, 200 * MIB)?;
    let disk = GuestDisk::create(
        &path,
        Table::Mbr,
        &[Part::fs(150 * MIB, Fs::Ext4, "root").at(63)],
    )?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    rich(mounted.path(), 9, Fs::Ext4.can())?;
    dirty_copy(&mounted, &path, &copy)?;
    let expected = Manifest::of(mounted.path())?;
    mounted.close()?;
    let copied = GuestDisk {
        path: copy,
        parts: disk.parts.clone(),
    };
    {
        let volume = copied.volume(1)?;
        let state = cmd::run("dumpe2fs", ["-h", volume.device()])?;
        if !state.contains("needs_recovery") {
            fail!("the copy's journal is clean:\n{state}");
        }
    }
    let mounted = copied.mount(1, &dir.join("mnt"))?;
    Manifest::of(mounted.path())?.check_equals(&expected, &Ignore::default())?;
    mounted.close()
}
