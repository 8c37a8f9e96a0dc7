//! The main job: a running guest's LV through real Bacula, there and back.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::bacula::{Bacula, BaculaOptions, JobResult, Selection, fileset_plugin};
use crate::check;
use crate::guestdisk::{Content, Fs, GuestDisk, MIB, Part, Table, Writer, classic};
use crate::inside::{Scenario, scenario};
use crate::lvm::{HostVg, lvm};
use crate::populate::{many, rich};
use crate::tree::{Ignore, Manifest};
use crate::workdir::WorkDir;
use crate::{Result, cmd, message, plugin_so};

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("plugin_classic", classic_guest),
    scenario("plugin_tables_and_filesystems", tables_and_filesystems),
    scenario("plugin_bad_input", bad_input).only("bookworm"),
    scenario("plugin_cancel", cancel).only("trixie"),
    scenario("plugin_killed_daemon", killed_daemon).only("trixie"),
];

/// A Bacula with one FileSet `g` for this directive. A first job has run: what the daemon keeps
/// open from then on is no leftover.
pub fn bacula(directive: &str) -> Result<Bacula> {
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![("g".into(), fileset_plugin(directive))],
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    Ok(bacula)
}

/// Objects that a restored guest has more, or that Bacula never saves.
pub fn restored() -> Ignore {
    Ignore {
        sockets: true,
        below: vec![".guestsnap".into()],
        // An attribute in which XFS shows its storage of an ACL; it follows the ACL.
        xattrs: vec!["trusted.SGI_ACL_".into()],
        ..Ignore::default()
    }
}

/// A guest's folder below a restore's `where`.
pub fn guest_in(base: &Path, guest: &str) -> PathBuf {
    base.join("@guestsnap").join(guest)
}

/// Runs a job and makes sure that the host is as before, however the job ended.
pub fn run(bacula: &Bacula, level: &str) -> Result<JobResult> {
    let before = bacula.host_state()?;
    let job = bacula.run_backup("g", level)?;
    println!("{}", job.log);
    bacula
        .check_host_state(&before)
        .map_err(|e| format!("after job {}: {}", job.jobid, message(&e)))?;
    Ok(job)
}

/// The first of the old scripts' layouts, being written to: full, incremental, differential; a
/// file, a folder and everything restored.
fn classic_guest() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let disk = classic(&vg.lv("domu-web1", "400m")?, 32 * MIB)?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    rich(mounted.path(), 1, Fs::Ext3.can())?;
    many(mounted.path(), 100, 1)?;
    mounted.sync()?;
    let expected = Manifest::of(mounted.path())?;
    let writer = Writer::start(&mounted.path().join("busy"))?;

    let bacula = bacula("guestsnap: lv=vg0/domu-* strip=domu-")?;
    check!(
        bacula.status_client()?.contains("guestsnap"),
        "status client does not list the plugin"
    );
    let full = run(&bacula, "Full")?.clean()?;
    for text in [
        "web1: disk vg0/domu-web1",
        "crash-consistent",
        "p1 ext3",
        "swap",
        "0 errors",
        "released in",
    ] {
        check!(full.log.contains(text), "the job log does not say {text:?}");
    }
    let ignore = Ignore {
        below: vec!["busy".into(), ".guestsnap".into()],
        root: true,
        ..restored()
    };

    let all = dir.join("all");
    bacula.restore(full.jobid, &Selection::All, &all)?.clean()?;
    Manifest::of(&guest_in(&all, "web1"))?.check_equals(&expected, &ignore)?;

    let one = dir.join("one");
    let path = "/@guestsnap/web1/etc/passwd";
    bacula
        .restore(full.jobid, &Selection::Files(vec![path.into()]), &one)?
        .clean()?;
    let text = std::fs::read(guest_in(&one, "web1").join("etc/passwd"))?;
    check!(
        text == std::fs::read(mounted.path().join("etc/passwd"))?,
        "{path} came back different"
    );

    let folder = dir.join("folder");
    bacula
        .restore(
            full.jobid,
            &Selection::Dir("/@guestsnap/web1/etc/".into()),
            &folder,
        )?
        .clean()?;
    let etc = Manifest::of(&guest_in(&folder, "web1/etc"))?;
    check!(
        etc.entries.len() > 2,
        "a folder's restore brought {} names",
        etc.entries.len()
    );

    std::thread::sleep(Duration::from_secs(2));
    std::fs::write(mounted.path().join("etc/new"), "new\n")?;
    mounted.sync()?;
    changes_alone(&bacula)?;
    let written = writer.stop()?;
    check!(written > 0, "the guest wrote nothing meanwhile");
    mounted.close()
}

/// Sends only the changes since the full job.
fn changes_alone(bacula: &Bacula) -> Result {
    for level in ["Incremental", "Differential"] {
        let job = run(bacula, level)?.clean()?;
        let names = bacula.list_files(job.jobid)?;
        check!(
            names.iter().any(|n| n.ends_with("/web1/etc/new")),
            "{level} lacks etc/new: {names:?}"
        );
        check!(
            !names.iter().any(|n| n.ends_with("/etc/passwd")),
            "{level} sends what did not change"
        );
    }
    Ok(())
}

/// A guest: its LV, its size, its table and partitions, and which of them are mounted.
type Layout = (&'static str, &'static str, Table, Vec<Part>, Vec<(u32, Fs)>);

/// A guest of each kind of table and filesystem.
fn layouts() -> [Layout; 6] {
    let fs = |size, fs, label| Part::fs(size * MIB, fs, label);
    [
        (
            "whole",
            "64m",
            Table::Whole,
            vec![fs(64, Fs::Ext4, "whole")],
            vec![(1, Fs::Ext4)],
        ),
        (
            "logical",
            "160m",
            Table::Mbr,
            vec![
                fs(40, Fs::Ext2, "one"),
                fs(40, Fs::Ext4, "five").logical(),
                Part::new(16 * MIB, Content::Swap).logical(),
            ],
            vec![(1, Fs::Ext2), (5, Fs::Ext4)],
        ),
        (
            "gpt",
            "400m",
            Table::Gpt,
            vec![fs(32, Fs::Vfat, "EFI"), fs(330, Fs::Xfs, "root")],
            vec![(1, Fs::Vfat), (2, Fs::Xfs)],
        ),
        (
            "gpt4k",
            "128m",
            Table::Gpt4096,
            vec![fs(100, Fs::Ext4, "big")],
            vec![(1, Fs::Ext4)],
        ),
        (
            "xfs",
            "320m",
            Table::Whole,
            vec![fs(320, Fs::Xfs, "x")],
            vec![(1, Fs::Xfs)],
        ),
        (
            "vfat",
            "40m",
            Table::Whole,
            vec![fs(40, Fs::Vfat, "V")],
            vec![(1, Fs::Vfat)],
        ),
    ]
}

/// One guest of each layout and filesystem, in one job.
fn tables_and_filesystems() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let guests = layouts();
    let mut expected = Vec::new();
    for (name, size, table, parts, mounts) in &guests {
        let disk = GuestDisk::create(&vg.lv(name, size)?, *table, parts)?;
        let several = mounts.len() > 1;
        for (number, fs) in mounts {
            let mounted = disk.mount(*number, &dir.join(format!("{name}{number}")))?;
            rich(mounted.path(), u64::from(*number), fs.can())?;
            mounted.sync()?;
            // Several filesystems and none is the root: each is a volume of its own.
            let place = if several {
                format!("{name}/.guestsnap/volumes/p{number}")
            } else {
                (*name).to_owned()
            };
            expected.push((place, *fs, Manifest::of(mounted.path())?));
            mounted.close()?;
        }
    }
    let bacula = bacula("guestsnap: lv=vg0/* size=30%")?;
    let job = run(&bacula, "Full")?.clean()?;
    let all = dir.join("all");
    bacula.restore(job.jobid, &Selection::All, &all)?.clean()?;
    for (place, fs, manifest) in expected {
        let mut ignore = Ignore {
            below: vec![".guestsnap".into()],
            ..restored()
        };
        if fs == Fs::Vfat {
            // FAT keeps times in its own steps and zone, and no holes.
            ignore = Ignore {
                root: true,
                holes: true,
                ..ignore
            };
        }
        if fs == Fs::Ext2 {
            ignore.root = true;
        }
        Manifest::of(&guest_in(&all, &place))?
            .check_equals(&manifest, &ignore)
            .map_err(|e| format!("{place}: {}", message(&e)))?;
    }
    Ok(())
}

/// Each mistake: one clear message with its code, a job status that shows it, nothing left.
fn bad_input() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let good = GuestDisk::create(
        &vg.lv("good", "64m")?,
        Table::Whole,
        &[Part::fs(64 * MIB, Fs::Ext4, "good")],
    )?;
    let mounted = good.mount(1, &dir.join("mnt"))?;
    many(mounted.path(), 5, 1)?;
    mounted.close()?;
    // Blank, damaged, mounted on the host, swap of the host.
    vg.lv("blank", "32m")?;
    let damaged = GuestDisk::create(
        &vg.lv("damaged", "320m")?,
        Table::Whole,
        &[Part::fs(320 * MIB, Fs::Xfs, "bad")],
    )?;
    let node = damaged.path.display().to_string();
    cmd::sh(&format!(
        "dd if=/dev/zero of={node} bs=512 seek=1 count=3 conv=notrunc,fsync 2>&1"
    ))?;
    let host = vg.lv("hostfs", "32m")?;
    Fs::Ext4.make(&host.display().to_string(), "host", &[])?;
    let hosted = crate::guestdisk::Mounted::device(
        &host.display().to_string(),
        Fs::Ext4,
        &dir.join("hostfs"),
    )?;

    let mut bacula = bacula("guestsnap: lv=vg0/good")?;
    let mut expect = |directive: &str, status: char, texts: &[&str]| {
        says_of(&mut bacula, directive, status, texts)
    };
    expect(
        "lv=vg0/good colour=red",
        'f',
        &["GS-101", "colour", "To do: "],
    )?;
    expect("lv=vg0/good size=0%", 'f', &["GS-101"])?;
    expect("lv=vg0/nothing*", 'f', &["GS-201"])?;
    expect("lv=novg/x", 'f', &["GS-201"])?;
    expect(
        "lv=vg0/hostfs",
        'f',
        &["GS-203", "vg0/hostfs", "mounted on"],
    )?;
    expect("lv=vg0/blank", 'f', &["GS-406", "vg0/blank"])?;
    expect("lv=vg0/damaged", 'f', &["damaged: ", "GS-"])?;
    // A bad guest beside a good one: the good one is saved, the job is not clean.
    expect(
        "lv=vg0/good lv=vg0/blank lv=vg0/damaged",
        'T',
        &["blank: ", "damaged: ", "good: "],
    )?;
    expect("lv=vg0/good lv=vg0/blank on_error=fail", 'f', &["blank: "])?;
    hosted.close()?;
    let swap = vg.lv("hostswap", "32m")?.display().to_string();
    cmd::run("mkswap", [&swap])?;
    cmd::run("swapon", [&swap])?;
    let swapped = expect("lv=vg0/hostswap", 'f', &["GS-203", "vg0/hostswap", "swap"]);
    cmd::run("swapoff", [&swap])?;
    swapped?;
    // The volume group is full.
    vg.lvcreate(&["-n", "filler", "-l", "100%FREE"])?;
    expect("lv=vg0/good", 'f', &["GS-303", "vg0/good", "size="])?;
    // The daemon still works.
    vg.names()?;
    lvm("lvremove", &["-y", "vg0/filler"])?;
    without_lvcreate(&mut bacula)?;
    bacula.set_filesets(&[("g", fileset_plugin("guestsnap: lv=vg0/good"))])?;
    run(&bacula, "Full")?.clean()?;
    Ok(())
}

/// A job of this line ends with this status and these words, and leaves nothing.
fn says_of(bacula: &mut Bacula, directive: &str, status: char, texts: &[&str]) -> Result {
    println!("=== {directive}");
    bacula.set_filesets(&[("g", fileset_plugin(&format!("guestsnap: {directive}")))])?;
    let job = bacula.run_backup("g", "Full")?;
    println!("{}", job.log);
    let left =
        cmd::sh("lvs --noheadings -o lv_name @guestsnap; dmsetup ls | grep guestsnap- || true")?;
    check!(left.trim().is_empty(), "{directive}: left: {left}");
    check!(
        job.status == status,
        "{directive}: status {} instead of {status}:\n{}",
        job.status,
        job.log
    );
    check!(job.errors > 0, "{directive}: no error is counted");
    for text in texts {
        check!(
            job.log.contains(text),
            "{directive}: the job log does not say {text:?}:\n{}",
            job.log
        );
    }
    Ok(())
}

/// No lvcreate on the host. A daemon that has seen it remembers where it was.
fn without_lvcreate(bacula: &mut Bacula) -> Result {
    let (lvcreate, away) = ("/usr/sbin/lvcreate", "/usr/sbin/lvcreate.away");
    std::fs::rename(lvcreate, away)?;
    bacula.restart_fd()?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    bacula.set_filesets(&[("g", fileset_plugin("guestsnap: lv=vg0/good"))])?;
    let job = run(bacula, "Full");
    std::fs::rename(away, lvcreate)?;
    let job = job?;
    check!(
        job.status == 'f' && job.log.contains("GS-302") && job.log.contains("lvcreate"),
        "without lvcreate: status {}",
        job.status
    );
    Ok(())
}

/// A guest that takes a while: a huge file of one hole, which is delivered as zeros.
fn slow_guest(vg: &HostVg, dir: &WorkDir) -> Result<GuestDisk> {
    let lv = vg.lv("slow", "300m")?;
    let disk = GuestDisk::create(&lv, Table::Whole, &[Part::fs(300 * MIB, Fs::Ext4, "slow")])?;
    let mounted = disk.mount(1, &dir.join("slow"))?;
    many(mounted.path(), 50, 3)?;
    std::fs::File::create(mounted.path().join("huge"))?.set_len(400 << 30)?;
    mounted.close()?;
    Ok(disk)
}

/// Takes the huge file out again.
fn hurry(disk: &GuestDisk, dir: &WorkDir) -> Result {
    let mounted = disk.mount(1, &dir.join("slow"))?;
    std::fs::remove_file(mounted.path().join("huge"))?;
    mounted.close()
}

fn cancel() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let disk = slow_guest(&vg, &dir)?;
    let bacula = bacula("guestsnap: lv=vg0/slow")?;
    let before = bacula.host_state()?;
    let job = bacula.start_backup("g", "Full")?;
    bacula.wait_processing("slow/huge", Duration::from_secs(120))?;
    bacula.cancel_cleanly(job, &before)?;
    hurry(&disk, &dir)?;
    run(&bacula, "Full")?.clean()?;
    Ok(())
}

/// kill -9 in the middle: mounts and maps are gone with the process, the snapshot goes when the
/// daemon starts again, and an LV that only looks like ours stays.
fn killed_daemon() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let disk = slow_guest(&vg, &dir)?;
    lvm(
        "lvcreate",
        &[
            "-y",
            "-s",
            "-n",
            "guestsnap-1-2.3-4",
            "-L",
            "20m",
            "vg0/slow",
        ],
    )?;
    let mut bacula = bacula("guestsnap: lv=vg0/slow")?;
    let before = bacula.host_state()?;
    let job = bacula.start_backup("g", "Full")?;
    bacula.wait_processing("slow/huge", Duration::from_secs(120))?;
    bacula.kill_fd()?;
    let left = vg.names()?;
    check!(
        left.len() == 3,
        "a snapshot of ours should be left now: {left:?}"
    );
    bacula.restart_fd()?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while vg.names()?.len() > 2 {
        check!(Instant::now() < deadline, "not swept: {:?}", vg.names()?);
        std::thread::sleep(Duration::from_millis(500));
    }
    check!(
        vg.names()?.iter().any(|n| n == "guestsnap-1-2.3-4"),
        "somebody else's snapshot was removed"
    );
    let result = bacula.wait_job(job)?;
    check!(result.status != 'T', "a killed job must not be OK");
    let mut after = bacula.host_state()?.diff(&before);
    // Another process: other descriptors of its own.
    after.retain(|line| !line.contains("descriptor") && !line.contains("thread"));
    check!(after.is_empty(), "left: {after:?}");
    hurry(&disk, &dir)?;
    run(&bacula, "Full")?.clean()?;
    Ok(())
}
