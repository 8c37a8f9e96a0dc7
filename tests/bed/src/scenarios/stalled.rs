//! Jobs that are cut off: cancelled while a disk does not answer, and with a daemon lost.

use super::points::reflink_store;
use crate::bacula::{Bacula, BaculaOptions, answer, fileset_plugin, has_thread};
use crate::check;
use crate::guestdisk::{Fs, GuestDisk, MIB, Mounted, Part, Table, image};
use crate::hoststate::HostState;
use crate::inside::{Scenario, scenario};
use crate::lvm::HostVg;
use crate::points::Points;
use crate::workdir::WorkDir;
use crate::{Result, cmd, message, plugin_so, points};
use guestsnap::point::Point;
use std::path::Path;
use std::time::{Duration, Instant};

/// On this machine.
pub const ROOT: &[Scenario] = &[
    scenario("root_stalled_calls", calls),
    scenario("root_stalled_one_file", one_file),
    scenario("root_stalled_daemons_lost", daemons_lost),
    scenario("root_stalled_peer_silent", peer_silent),
];

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("points_stalled_device", device).only("bookworm"),
    scenario("points_stalled_commands", commands).only("trixie"),
];

/// Delay that makes a job of [`populate`] long.
const SLOW: &str = "Maximum Bandwidth Per Job = 4 mb/s";

fn populate(disk: &GuestDisk, dir: &WorkDir, large: u64) -> Result {
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    let at = mounted.path().display();
    cmd::sh(&format!(
        "cd '{at}'; mkdir -p etc d/e; echo x > etc/passwd; ln -s passwd etc/link; echo y > d/e/f
        setfattr -n user.a -v b etc/passwd; head -c {large}M /dev/urandom > large"
    ))?;
    mounted.close()
}

fn guest(store: &Mounted, dir: &WorkDir, large: u64) -> Result {
    let path = store.path().join("web.img");
    image(&path, (large + 40) * MIB)?;
    let size = (large + 30) * MIB;
    let disk = GuestDisk::create(&path, Table::Mbr, &[Part::fs(size, Fs::Ext4, "root")])?;
    populate(&disk, dir, large)
}

fn options(store: &Path) -> BaculaOptions {
    BaculaOptions {
        filesets: vec![(
            "g".into(),
            fileset_plugin(&format!("guestsnap: image={}/web.img", store.display())),
        )],
        client_file: Some(format!("allow = [\"{}/*\"]\n", store.display())),
        ..BaculaOptions::default()
    }
}

/// A call that touches a guest's disk and does not come back: the job ends when it is cancelled, and what it had goes
/// when the call comes back.
fn calls() -> Result {
    let dir = WorkDir::new()?;
    let store = reflink_store(&dir)?;
    guest(&store, &dir, 3)?;
    let points = Points::new("")?;
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(points::built()?.plugin),
        fd_env: vec![points.env()],
        ..options(store.path())
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    bacula.run_backup("g", "Full")?.clean()?;
    let before = bacula.host_state()?;
    let pid = bacula.fd_pid();
    let mut problems = Vec::new();
    let all = [
        Point::DiskRead,
        Point::FileRead,
        Point::WalkStat,
        Point::ReflinkClone,
        Point::MountCreate,
        Point::WalkNames,
        Point::XattrGet,
    ];
    for point in all {
        let run = || -> Result {
            points.act(point, "hang")?;
            let job = bacula.start_backup("g", "Full")?;
            points.wait_acted(Duration::from_secs(60))?;
            std::thread::sleep(Duration::from_millis(300));
            let took = bacula.cancel_timed(job)?;
            check!(took < answer(), "it took {:.1} s", took.as_secs_f64());
            // The daemon's own part takes ten seconds more, whatever the call was: waited for once.
            if point == all[0] {
                bacula.wait_ended(job)?;
            }
            points.clear()?;
            cmd::wait_for("what was held to go", Duration::from_secs(10), || {
                let now = HostState::capture_scope(&bacula.scope())?;
                Ok(now.diff_of_ours(&before).is_empty().then_some(()))
            })
        };
        println!("=== {}", point.name());
        if let Err(e) = run() {
            problems.push(format!("{}: {}", point.name(), message(&e)));
        }
        points.clear()?;
    }
    bacula.check_host_state(&before)?;
    check!(problems.is_empty(), "{}", problems.join("\n\n"));
    bacula.run_backup("g", "Full")?.clean()?;
    bacula.check_host_state(&before)?;
    check!(bacula.fd_pid() == pid, "the daemon is another one");
    drop(bacula);
    store.close()
}

/// One small file is slow: those behind it are read meanwhile, and the job is what it would have been.
fn one_file() -> Result {
    const FILES: u64 = 400;
    const SIZE: u64 = 8192;
    let dir = WorkDir::new()?;
    let store = reflink_store(&dir)?;
    let path = store.path().join("web.img");
    image(&path, 60 * MIB)?;
    let disk = GuestDisk::create(&path, Table::Mbr, &[Part::fs(50 * MIB, Fs::Ext4, "root")])?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    for n in 0..FILES {
        std::fs::write(
            mounted.path().join(n.to_string()),
            vec![b'x'; SIZE as usize],
        )?;
    }
    mounted.close()?;
    let points = Points::new("")?;
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(points::built()?.plugin),
        fd_env: vec![points.env()],
        ..options(store.path())
    })?;
    let first = bacula.run_backup("g", "Full")?.clean()?;
    let pid = bacula.fd_pid().ok_or("no File Daemon")?;
    points.act(Point::FileRead, "hang-one")?;
    let before = io_of(pid, "rchar")?;
    let job = bacula.start_backup("g", "Full")?;
    points.wait_acted(Duration::from_secs(60))?;
    // All but those that the thread with the slow one has taken with it.
    let enough = (FILES - 40) * SIZE;
    let ahead = cmd::wait_for(
        "the other files to be read",
        Duration::from_secs(20),
        || Ok((io_of(pid, "rchar")? - before >= enough).then_some(())),
    );
    points.clear()?;
    ahead?;
    let job = bacula.wait_job(job)?.clean()?;
    check!(
        (job.files, job.bytes) == (first.files, first.bytes),
        "{} files and {} bytes, not {} and {}",
        job.files,
        job.bytes,
        first.files,
        first.bytes
    );
    drop(bacula);
    store.close()
}

/// The Storage Daemon dies, and then the Director, each in the middle of a job: everything is taken down.
fn daemons_lost() -> Result {
    let dir = WorkDir::new()?;
    let store = reflink_store(&dir)?;
    guest(&store, &dir, 40)?;
    let mut bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        fd_conf: SLOW.to_owned(),
        ..options(store.path())
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let before = bacula.host_state()?;
    let job = bacula.start_backup("g", "Full")?;
    bacula.wait_processing("web/large", Duration::from_secs(60))?;
    bacula.kill_sd()?;
    bacula.wait_ended(job)?;
    let status = bacula.status_client()?;
    let line = status
        .lines()
        .find(|l| l.trim().starts_with(&format!("{job}  Full")));
    check!(
        line.is_some_and(|l| l.contains("Error")),
        "no Storage Daemon, and the job is no error:\n{status}"
    );
    bacula.check_host_state(&before)?;
    // The Director waits for the Storage Daemon's word.
    bacula.kill_dir()?;
    bacula.start_sd()?;
    bacula.start_dir()?;

    bacula.start_backup("g", "Full")?;
    bacula.wait_processing("web/large", Duration::from_secs(60))?;
    bacula.kill_dir()?;
    // The daemon goes on until it next speaks to the Director: no longer than the job.
    let left = cmd::wait_for("the job to end", Duration::from_secs(60), || {
        let now = HostState::capture_scope(&bacula.scope())?;
        Ok(now.diff(&before).is_empty().then_some(()))
    });
    if let Err(e) = left {
        bacula.check_host_state(&before)?;
        return Err(e);
    }
    bacula.start_dir()?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    drop(bacula);
    store.close()
}

/// Whether a thread of the plugin waits where nothing can interrupt it.
fn waits(pid: i32) -> Result<bool> {
    Ok(has_thread(pid, "(guestsnap-disk) D ")? || has_thread(pid, "(guestsnap-read) D ")?)
}

/// The network is cut without a word: nothing that is sent is taken any more, and no connection ends. A cancel takes
/// everything down all the same.
fn peer_silent() -> Result {
    let dir = WorkDir::new()?;
    let store = reflink_store(&dir)?;
    guest(&store, &dir, 120)?;
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        fd_conf: SLOW.to_owned(),
        ..options(store.path())
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let before = bacula.host_state()?;
    let pid = bacula.fd_pid().ok_or("no File Daemon")?;
    let job = bacula.start_backup("g", "Full")?;
    bacula.wait_processing("web/large", Duration::from_secs(60))?;
    // Stopped, it takes nothing and closes nothing.
    bacula.hold_sd()?;
    let taken = std::thread::scope(|scope| -> Result {
        // The daemon waits in a write once the connection holds no more.
        cmd::wait_for("a write that waits", Duration::from_secs(60), || {
            let before = io_of(pid, "wchar")?;
            std::thread::sleep(Duration::from_secs(2));
            Ok((io_of(pid, "wchar")? == before).then_some(()))
        })?;
        // The Director talks to the Storage Daemon too, and waits for it.
        let console = scope.spawn(|| bacula.cancel(job).map(drop));
        let asked = Instant::now();
        let over = cmd::wait_for("the end of the job", Duration::from_secs(60), || {
            Ok((!has_thread(pid, "(guestsnap-fill)")?).then_some(()))
        });
        let took = asked.elapsed();
        bacula.let_sd_go()?;
        let console = console.join().map_err(|_| "the console panicked")?;
        over?;
        console?;
        println!("ended {:.2} s after the cancel", took.as_secs_f64());
        check!(took < answer(), "it took {:.2} s", took.as_secs_f64());
        Ok(())
    });
    taken?;
    let result = bacula.wait_job(job)?;
    check!(
        result.status == 'A',
        "status {}:\n{}",
        result.status,
        result.log
    );
    bacula.wait_ended(job)?;
    bacula.check_host_state(&before)?;
    check!(bacula.fd_pid() == Some(pid), "the daemon is another one");
    drop(bacula);
    store.close()
}

/// Bytes that a process has read (`rchar`) or written (`wchar`), connections too.
fn io_of(pid: i32, what: &str) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io"))?;
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(what)?.strip_prefix(": "));
    Ok(line.and_then(|l| l.parse().ok()).ok_or("no such count")?)
}

/// A device-mapper device that is suspended under a job: its reads cannot be interrupted, the job can.
fn device() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let lv = vg.lv("web", "240m")?;
    let disk = GuestDisk::create(&lv, Table::Mbr, &[Part::fs(220 * MIB, Fs::Ext4, "root")])?;
    populate(&disk, &dir, 150)?;
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![("g".into(), fileset_plugin("guestsnap: lv=vg0/web"))],
        fd_conf: SLOW.to_owned(),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let before = bacula.host_state()?;
    let pid = bacula.fd_pid().ok_or("no File Daemon")?;
    let job = bacula.start_backup("g", "Full")?;
    bacula.wait_processing("web/large", Duration::from_secs(120))?;
    let snapshot = vg
        .names()?
        .into_iter()
        .find(|name| name.starts_with("guestsnap-"))
        .ok_or("no snapshot")?;
    let name = format!("vg0-{}", snapshot.replace('-', "--"));
    cmd::run("dmsetup", ["suspend", "--noflush", "--nolockfs", &name])?;
    let cut = || -> Result {
        // The data read ahead of it are used up first.
        cmd::wait_for("a read that hangs", Duration::from_secs(90), || {
            Ok(waits(pid)?.then_some(()))
        })?;
        let took = bacula.cancel_timed(job)?;
        // Slow as this machine is, nothing of LVM is in it.
        check!(
            took < Duration::from_secs(5),
            "the job took {:.1} s to end",
            took.as_secs_f64()
        );
        bacula.wait_ended(job)?;
        check!(waits(pid)?, "the read came back by itself");
        // Not asked of LVM, which would look at all devices and wait too.
        check!(
            cmd::run("dmsetup", ["info", &name]).is_ok(),
            "the snapshot was removed under a read"
        );
        Ok(())
    };
    let result = cut();
    cmd::run("dmsetup", ["resume", &name])?;
    result?;
    cmd::wait_for("what was left to go", Duration::from_secs(60), || {
        Ok((!vg.names()?.contains(&snapshot)).then_some(()))
    })?;
    bacula.check_host_state(&before)?;
    check!(bacula.fd_pid() == Some(pid), "the daemon is another one");
    Ok(())
}

/// A command of LVM that does not end: the job does when it is cancelled, and what it had goes when the command ends.
fn commands() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let lv = vg.lv("web", "64m")?;
    let disk = GuestDisk::create(&lv, Table::Mbr, &[Part::fs(56 * MIB, Fs::Ext4, "root")])?;
    populate(&disk, &dir, 3)?;
    let points = Points::new("")?;
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(points::built()?.plugin),
        fd_env: vec![points.env()],
        filesets: vec![("g".into(), fileset_plugin("guestsnap: lv=vg0/web"))],
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    bacula.run_backup("g", "Full")?.clean()?;
    let before = bacula.host_state()?;
    let pid = bacula.fd_pid();
    // The job's objects are given some time to go.
    for (program, limit) in [("lvs", 5), ("lvcreate", 5), ("lvremove", 15)] {
        println!("=== {program}");
        let (hangs, go) = (dir.join(format!("{program}-hangs")), dir.join("go"));
        let script = format!(
            "touch '{}'; while [ ! -e '{}' ]; do sleep 0.1; done; exec /usr/sbin/{program} \"$@\"",
            hangs.display(),
            go.display()
        );
        points.stand_in(program, Some(&script))?;
        let job = bacula.start_backup("g", "Full")?;
        let cut = || -> Result {
            cmd::wait_for("the command to hang", Duration::from_secs(60), || {
                Ok(hangs.exists().then_some(()))
            })?;
            let took = bacula.cancel_timed(job)?;
            println!(
                "{program}: ended {:.1} s after the cancel",
                took.as_secs_f64()
            );
            check!(
                took < Duration::from_secs(limit),
                "{program}: the job took {:.1} s to end",
                took.as_secs_f64()
            );
            bacula.wait_ended(job)
        };
        let result = cut();
        std::fs::write(&go, "")?;
        result?;
        points.stand_in(program, None)?;
        let gone = cmd::wait_for("what was left to go", Duration::from_secs(60), || {
            let now = HostState::capture_scope(&bacula.scope())?;
            Ok(now.diff_of_ours(&before).is_empty().then_some(()))
        });
        if gone.is_err() {
            bacula.check_host_state(&before)?;
        }
        gone?;
        std::fs::remove_file(&go)?;
    }
    bacula.run_backup("g", "Full")?.clean()?;
    bacula.check_host_state(&before)?;
    check!(bacula.fd_pid() == pid, "the daemon is another one");
    Ok(())
}
