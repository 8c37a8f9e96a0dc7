//! Guests with several disks: their snapshots are of one instant, or the job says that they are not; and whatever
//! happens, no disk of a guest stays suspended.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::bacula::{Bacula, BaculaOptions, fileset_plugin};
use crate::check;
use crate::guestdisk::{Content, Fs, GuestDisk, GuestLv, GuestVg, Loop, Part, Table};
use crate::hoststate::{HostState, Scope};
use crate::inside::{Scenario, scenario};
use crate::lvm::{HostVg, lvm};
use crate::points::{self, Outcome, Points};
use crate::workdir::WorkDir;
use crate::{Result, cmd, message};
use guestsnap::config::{Size, SnapshotKind};
use guestsnap::guest::DiskSource;
use guestsnap::hostdev::lvname::LvName;
use guestsnap::point::Point;
use guestsnap::snapshot::{self, How, Journal, Request, Together};

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("instant_counters", counters)
        .seconds(900)
        .only("bookworm"),
    scenario("points_instant_job", job)
        .seconds(900)
        .only("trixie"),
    scenario("points_instant_killed", killed)
        .seconds(1200)
        .only("bookworm"),
    scenario("points_instant_cancelled", cancelled)
        .seconds(900)
        .only("trixie"),
    scenario("points_inactive", inactive)
        .seconds(1200)
        .only("bookworm"),
];

const VG: &str = "vg0";

/// Longer than any `lvcreate` of a busy machine.
const LONG: Duration = Duration::from_secs(60);

/// A block as direct writes need it.
#[repr(align(4096))]
struct Block([u8; 4096]);

/// A guest that writes the same counter first to its disk A, then to B, over and over: at one instant they are equal, or A is
/// one ahead.
struct Counters {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<std::io::Result<()>>>,
}

impl Counters {
    fn start(a: &Path, b: &Path, at: u64) -> Result<Self> {
        let open = |path: &Path| {
            let flags = libc::O_DIRECT | libc::O_SYNC;
            File::options().write(true).custom_flags(flags).open(path)
        };
        let (a, b) = (open(a)?, open(b)?);
        let (stop, count) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (stopped, counted) = (stop.clone(), count.clone());
        let thread = std::thread::spawn(move || {
            let mut block = Block([0; 4096]);
            let mut n = 0_u64;
            while !stopped.load(Ordering::Relaxed) {
                n += 1;
                block.0[..8].copy_from_slice(&n.to_le_bytes());
                a.write_all_at(&block.0, at)?;
                b.write_all_at(&block.0, at)?;
                // The rest of the machine has work too.
                std::thread::sleep(Duration::from_millis(2));
                counted.store(n, Ordering::Relaxed);
            }
            Ok(())
        });
        let counters = Counters {
            stop,
            count,
            thread: Some(thread),
        };
        cmd::wait_for("the writer", Duration::from_secs(30), || {
            Ok((counters.written() > 10).then_some(()))
        })?;
        Ok(counters)
    }

    fn written(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    fn end(&mut self) -> Result {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| "the writer panicked")??;
        }
        Ok(())
    }
}

impl Drop for Counters {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("{}", message(&error));
        }
    }
}

fn counter(path: &Path, at: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    File::open(path)?.read_exact_at(&mut bytes, at)?;
    Ok(u64::from_le_bytes(bytes))
}

fn request(lv: &str) -> Request {
    Request {
        origin: DiskSource::Lv(LvName::new(VG, lv).expect("the name of a volume")),
        kind: SnapshotKind::Auto,
        size: Size::Bytes(32 << 20),
        chunk: None,
        activate: true,
        in_container: false,
    }
}

fn suspended() -> Result<Vec<String>> {
    let all = cmd::run(
        "dmsetup",
        [
            "info",
            "-c",
            "--noheadings",
            "--separator",
            " ",
            "-o",
            "name,suspended",
        ],
    )?;
    let names = all.lines().filter(|line| line.ends_with("Suspended"));
    Ok(names.map(str::to_owned).collect())
}

/// The counters in the snapshots: A, B, and whether they are said to be of one instant.
fn take(journal: &Arc<Journal>, disks: [&str; 2]) -> Result<(u64, u64, Together)> {
    let report = |error: guestsnap::Error| error.report();
    let locked = snapshot::prepare(&disks.map(request), journal)
        .map_err(report)?
        .lock()
        .map_err(report)?;
    let how = How {
        hold: Duration::from_secs(300),
        at_rest: false,
    };
    let mut snapshots = Vec::new();
    let taken = locked.take_into(&mut snapshots, &how);
    let taken = taken.map_err(|not_all| not_all.undo().report())?;
    check!(taken.problems.is_empty(), "{:?}", taken.problems);
    println!(
        "{disks:?}: {:?}, writes held {:?}",
        taken.together, taken.held
    );
    check!(suspended()?.is_empty(), "{:?}", suspended()?);
    let a = counter(&snapshots[0].device().path, 0)?;
    let b = counter(&snapshots[1].device().path, 0)?;
    snapshot::close_all(snapshots).map_err(report)?;
    Ok((a, b, taken.together))
}

/// Two counters under a writer, thick, thin and mixed.
fn counters() -> Result {
    let vg = HostVg::on_scratch(VG)?;
    vg.thin_pool("pool", "400m")?;
    let node = |name: &str| vg.node(name);
    for name in ["a", "b"] {
        vg.lv(name, "64m")?;
    }
    for name in ["ta", "tb"] {
        vg.thin_lv("pool", name, "64m")?;
    }
    // A volume that cannot be suspended while LVM works: something of the host stands on it.
    vg.lv("looped", "64m")?;
    let looped = Loop::attach(&node("looped"), 0, None, 0)?;
    let before = HostState::capture(None)?;
    let dir = WorkDir::new()?;
    let journal = Journal::open(&dir.join("guestsnap"), 7).map_err(|error| error.report())?;
    let journal = Arc::new(journal);

    let mut writer = Counters::start(&node("a"), &node("b"), 0)?;
    // That the writer would show it: one snapshot after the other.
    for (name, origin) in [("sa", "vg0/a"), ("sb", "vg0/b")] {
        lvm("lvcreate", &["-y", "-s", "-L", "16m", "-n", name, origin])?;
    }
    let (a, b) = (counter(&node("sa"), 0)?, counter(&node("sb"), 0)?);
    lvm("lvremove", &["-y", "vg0/sa", "vg0/sb"])?;
    check!(b > a + 1, "plain snapshots: {a} and {b}");
    for _ in 0..2 {
        let (a, b, together) = take(&journal, ["a", "b"])?;
        check!(a == b || a == b + 1, "thick: {a} and {b}");
        check!(matches!(together, Together::Yes), "{together:?}");
    }
    let was = writer.written();
    cmd::wait_for("the writer to go on", Duration::from_secs(30), || {
        Ok((writer.written() > was + 10).then_some(()))
    })?;
    writer.end()?;

    // Thick and thin: the thin one while the other is suspended.
    let mut writer = Counters::start(&node("ta"), &node("b"), 0)?;
    let (a, b, together) = take(&journal, ["ta", "b"])?;
    check!(a == b || a == b + 1, "mixed: {a} and {b}");
    check!(matches!(together, Together::Yes), "{together:?}");
    writer.end()?;

    for disks in [["ta", "tb"], ["a", "looped"]] {
        let mut writer = Counters::start(&node(disks[0]), &node(disks[1]), 0)?;
        let (_, _, together) = take(&journal, disks)?;
        // The writer waits for the suspended one, so that the other is at rest too.
        let proven = disks[0] == "a";
        match together {
            Together::No(why) if !proven => check!(why.contains("written to"), "{why}"),
            Together::Yes if proven => {}
            other => crate::fail!("{disks:?} with a writer: {other:?}"),
        }
        writer.end()?;
        let (a, b, together) = take(&journal, disks)?;
        check!(a == b, "{disks:?} idle: {a} and {b}");
        check!(matches!(together, Together::Yes), "{disks:?}: {together:?}");
    }
    // A write that is in the host's memory only counts too.
    let mut file = File::options().write(true).open(node("ta"))?;
    std::io::Write::write_all(&mut file, b"12345678")?;
    let (a, _, together) = take(&journal, ["ta", "tb"])?;
    check!(a.to_le_bytes() == *b"12345678", "{a}");
    check!(matches!(together, Together::Yes), "{together:?}");
    drop(file);

    journal.close().map_err(|error| error.report())?;
    let left = HostState::settled_diff(&before, &Scope::default())?;
    drop(looped);
    check!(left.is_empty(), "{left:?}");
    Ok(())
}

/// A guest with a volume that is striped over two disks.
struct Bed {
    points: Points,
    before: HostState,
    nodes: [PathBuf; 2],
    /// Where no volume of the guest lies.
    unused: u64,
    _vg: HostVg,
}

impl Bed {
    fn new(thin: bool, hold: u64) -> Result<Self> {
        const MIB: u64 = 1 << 20;
        let vg = HostVg::on_scratch(VG)?;
        if thin {
            vg.thin_pool("pool", "400m")?;
        }
        let lv = |name: &str| match thin {
            true => vg.thin_lv("pool", name, "82m"),
            false => vg.lv(name, "84m"),
        };
        let nodes = [lv("web-a")?, lv("web-b")?];
        let disks = [0, 1].map(|n: usize| {
            let part = Part::new(80 * MIB, Content::Pv);
            GuestDisk::create(&nodes[n], Table::Mbr, &[part])
        });
        let [a, b] = disks;
        let (a, b) = (a?, b?);
        let root = GuestLv::new("root", "-i 2 -L 96m", Content::Fs(Fs::Ext4, "root".into()));
        let guest = GuestVg::create("guestvg", &[(&a, 1), (&b, 1)], &[root])?;
        let dir = WorkDir::new()?;
        guest.with_mounted("root", Fs::Ext4, &dir.join("mnt"), |path| {
            std::fs::create_dir(path.join("etc"))?;
            std::fs::write(path.join("etc/passwd"), "root:x:0:0::/:/bin/sh\n")?;
            Ok(())
        })?;
        cmd::run("udevadm", ["settle"])?;
        let client_file = format!(
            "[limits]\nhold_seconds = {hold}\n[guest.web]\ndisks = [\"vg0/web-a\", \"vg0/web-b\"]\n"
        );
        let bed = Bed {
            points: Points::new(&client_file)?,
            before: HostState::default(),
            nodes,
            unused: 82 * MIB,
            _vg: vg,
        };
        // With the folders that a first job makes.
        bed.job()?;
        Ok(Bed {
            before: bed.state()?,
            ..bed
        })
    }

    fn scope(&self) -> Scope {
        Scope {
            fd_pid: None,
            working_dir: Some(self.points.working_dir()),
        }
    }

    fn state(&self) -> Result<HostState> {
        HostState::capture_scope(&self.scope())
    }

    fn job(&self) -> Result<Outcome> {
        let work = self.points.working_dir().display().to_string();
        let outcome = self.points.drive(&["backup", &work, "guest=web"])?;
        println!("{}", outcome.text);
        Ok(outcome)
    }

    fn sweep(&self) -> Result<Outcome> {
        let work = self.points.working_dir().display().to_string();
        let outcome = self.points.drive(&["sweep", &work])?;
        println!("{}", outcome.text);
        check!(outcome.is_clean(), "the sweep");
        Ok(outcome)
    }

    fn check_nothing_left(&self) -> Result {
        check!(suspended()?.is_empty(), "{:?}", suspended()?);
        let left = HostState::settled_diff(&self.before, &self.scope())?;
        check!(left.is_empty(), "left:\n  {}", left.join("\n  "));
        Ok(())
    }

    /// A job, and something that happens when it is held at the point.
    fn meanwhile(&self, point: Point, work: impl FnOnce() -> Result) -> Result<Outcome> {
        self.points.act(point, "hang")?;
        std::thread::scope(|scope| {
            let job = scope.spawn(|| self.job().map_err(|e| message(&e)));
            let reached = self.points.wait_acted(LONG);
            let done = reached.and_then(|()| work());
            self.points.clear()?;
            let outcome = job.join().map_err(|_| "a panic")??;
            done.map(|()| outcome)
        })
    }
}

/// Jobs of a guest with a striped volume: with its writes held, without a way to hold them, and with an `lvcreate` that fails.
fn job() -> Result {
    {
        let bed = Bed::new(false, 60)?;
        let writer = Mutex::new(Counters::start(&bed.nodes[0], &bed.nodes[1], bed.unused)?);
        let outcome = bed.job()?;
        check!(outcome.is_clean(), "with a writer");
        for wanted in ["all disks at one instant", "its writes were held for "] {
            check!(outcome.text.contains(wanted), "no {wanted:?}");
        }
        check!(outcome.of('W').is_empty(), "{:?}", outcome.of('W'));
        writer.lock().unwrap().end()?;
        bed.check_nothing_left()?;
        // The second snapshot cannot be taken.
        let script = "case \"$*\" in *vg0/web-b) exit 5;; esac; exec /usr/sbin/lvcreate \"$@\"";
        bed.points.stand_in("lvcreate", Some(script))?;
        let outcome = bed.job()?;
        bed.points.stand_in("lvcreate", None)?;
        check!(outcome.text.contains("GS-304"), "no error");
        bed.check_nothing_left()?;
    }
    let bed = Bed::new(true, 60)?;
    let outcome = bed.job()?;
    check!(outcome.is_clean(), "idle");
    check!(outcome.text.contains("all disks at one instant"), "idle");
    let mut writer = Counters::start(&bed.nodes[0], &bed.nodes[1], bed.unused)?;
    let outcome = bed.job()?;
    writer.end()?;
    let errors = outcome.of('E').join("\n");
    for wanted in [
        "web: guestvg/root: ERROR GS-313",
        "vg0/web-a, vg0/web-b",
        "written to",
        "To do: ",
    ] {
        check!(errors.contains(wanted), "no {wanted:?}");
    }
    check!(!outcome.text.contains("crash-consistent"), "it is not");
    bed.check_nothing_left()
}

/// Processes that the job without a daemon has started, by their names.
fn helpers(driver: i32) -> Result<Vec<(i32, String)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
            continue;
        };
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let rest = stat.rsplit(')').next().unwrap_or_default().to_owned();
        let parent = rest.split_whitespace().nth(1).and_then(|p| p.parse().ok());
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if parent == Some(driver) {
            found.push((pid, name.trim().to_owned()));
        }
    }
    Ok(found)
}

/// The process of the job without a daemon.
fn driver() -> Result<i32> {
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let pid = entry.file_name().to_string_lossy().parse::<i32>();
        let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if let (Ok(pid), "points") = (pid, name.trim()) {
            return Ok(pid);
        }
    }
    Err("no driver".into())
}

/// Killed while the guest's writes are held: they go on at once; with the wake-up killed too, with the next sweep; and with
/// a job that does not go on, when the time is over.
fn killed() -> Result {
    let bed = Bed::new(false, 8)?;
    for point in [
        Point::HoldSuspend,
        Point::Held,
        Point::Lvcreate,
        Point::HoldRelease,
    ] {
        println!("=== {}", point.name());
        bed.points.act(point, "kill")?;
        let outcome = bed.job()?;
        check!(outcome.killed, "not killed at {}", point.name());
        bed.points.clear()?;
        cmd::wait_for("the volumes to be resumed", Duration::from_secs(10), || {
            Ok(suspended()?.is_empty().then_some(()))
        })?;
        bed.sweep()?;
        bed.check_nothing_left()?;
    }
    // Only the journal is left.
    let outcome = bed.meanwhile(Point::Held, || {
        check!(suspended()?.len() == 2, "{:?}", suspended()?);
        let driver = driver()?;
        let mut all = helpers(driver)?;
        // First who would resume when the other ends.
        all.sort_by_key(|(_, name)| name != "xargs");
        println!("{all:?}");
        check!(all.len() == 2, "{all:?}");
        for (pid, _) in &all {
            cmd::run("kill", ["-9", &pid.to_string()])?;
        }
        cmd::run("kill", ["-9", &driver.to_string()])?;
        Ok(())
    })?;
    check!(outcome.killed, "not killed");
    check!(suspended()?.len() == 2, "{:?}", suspended()?);
    let swept = bed.sweep()?;
    check!(
        swept.text.contains("resumed suspended volume vg0/web-a"),
        "not told"
    );
    bed.check_nothing_left()?;
    // It hangs: the guest goes on all the same.
    let outcome = bed.meanwhile(Point::Held, || {
        let begun = Instant::now();
        cmd::wait_for("the time to be over", Duration::from_secs(20), || {
            Ok(suspended()?.is_empty().then_some(()))
        })?;
        println!("after {:?}", begun.elapsed());
        Ok(())
    })?;
    // Snapshots taken then are not of one instant.
    check!(!outcome.text.contains("crash-consistent"), "it is not");
    check!(outcome.of('E').join("\n").contains("GS-313"), "no error");
    bed.check_nothing_left()
}

/// Cancelled while the guest's writes are held.
fn cancelled() -> Result {
    let bed = Bed::new(false, 20)?;
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(points::built()?.plugin),
        fd_env: vec![bed.points.env()],
        filesets: vec![("g".into(), fileset_plugin("guestsnap: guest=web"))],
        client_file: Some("[guest.web]\ndisks = [\"vg0/web-a\", \"vg0/web-b\"]\n".to_owned()),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let before = bacula.host_state()?;
    bed.points.act(Point::Held, "hang")?;
    let job = bacula.start_backup("g", "Full")?;
    bed.points.wait_acted(LONG)?;
    bacula.cancel(job)?;
    bed.points.clear()?;
    let job = bacula.wait_job(job)?;
    println!("{}", job.log);
    check!(job.status == 'A', "status {}", job.status);
    // The Director does not wait for the daemon; the time of the hold is longer.
    cmd::wait_for("the volumes to be resumed", Duration::from_secs(10), || {
        Ok(suspended()?.is_empty().then_some(()))
    })?;
    bacula.check_host_state(&before)?;
    let job = bacula.run_backup("g", "Full")?.clean()?;
    check!(job.log.contains("all disks at one instant"), "{}", job.log);
    bacula.check_host_state(&before)
}

/// LVM's report on all volumes, and the kernel's devices.
fn volumes() -> Result<String> {
    let lvs = lvm(
        "lvs",
        &["-a", "--noheadings", "-o", "lv_name,lv_attr,lv_active", VG],
    )?;
    Ok(lvs + &cmd::run("dmsetup", ["ls"])?)
}

/// Two guests, thick and thin, with volumes that are not active.
fn guests_that_are_off(vg: &HostVg) -> Result {
    let dir = WorkDir::new()?;
    vg.thin_pool("pool", "100m")?;
    for lv in [
        vg.lv("off-thick", "64m")?,
        vg.thin_lv("pool", "off-thin", "64m")?,
    ] {
        let parts = [Part::fs(24 << 20, Fs::Ext4, "root")];
        let disk = GuestDisk::create(&lv, Table::Mbr, &parts)?;
        let mounted = disk.mount(1, &dir.join("mnt"))?;
        std::fs::write(mounted.path().join("file"), "x")?;
        mounted.close()?;
    }
    // The setting of Proxmox VE 9.
    let all = ["vg0/off-thick", "vg0/off-thin", "vg0/pool"];
    lvm(
        "lvchange",
        &[&["--setautoactivation", "n"], &all[..2]].concat(),
    )?;
    lvm("lvchange", &[&["-an"], &all[..]].concat()).map(drop)
}

/// All volumes and maps are soon what they were before.
fn same_volumes(what: &str, before: &str) -> Result {
    let same = || Ok((volumes()? == before).then_some(()));
    cmd::wait_for(what, Duration::from_secs(20), same).map_err(|_| {
        let now = volumes().unwrap_or_default();
        format!("{what}: {now}\nbefore: {before}").into()
    })
}

/// Guests that are off, thick and thin: they are saved, and the host is as before. So after a crash; and a guest that is
/// started meanwhile keeps its volume.
fn inactive() -> Result {
    let vg = HostVg::on_scratch(VG)?;
    guests_that_are_off(&vg)?;
    let before = volumes()?;
    println!("{before}");
    let points = Points::new("")?;
    let work = points.working_dir().display().to_string();
    let job = || -> Result<Outcome> {
        let outcome = points.drive(&["backup", &work, "lv=vg0/off-*"])?;
        println!("{}", outcome.text);
        Ok(outcome)
    };
    let same = |what: &str| same_volumes(what, &before);
    let outcome = job()?;
    check!(outcome.is_clean(), "the job");
    for guest in ["off-thick", "off-thin"] {
        check!(
            outcome.text.contains(&format!("{guest}: p1 ext4")),
            "{guest} was not saved"
        );
    }
    same("after a job")?;
    for point in [
        Point::Activate,
        Point::Activated,
        Point::Lvcreate,
        Point::FirstFile,
        Point::Deactivated,
    ] {
        println!("=== {}", point.name());
        points.act(point, "kill")?;
        let outcome = job()?;
        check!(outcome.killed, "not killed at {}", point.name());
        points.clear()?;
        let swept = points.drive(&["sweep", &work])?;
        println!("{}", swept.text);
        check!(
            swept.is_clean() && !swept.text.contains("left alone"),
            "the sweep"
        );
        same(point.name())?;
    }
    // It is started while the job runs.
    points.act(Point::FirstFile, "hang")?;
    let outcome = std::thread::scope(|scope| {
        let job = scope.spawn(|| job().map_err(|e| message(&e)));
        let reached = points.wait_acted(LONG);
        let open = reached.and_then(|()| Ok(File::open(vg.node("off-thin"))?));
        points.clear()?;
        let outcome = job.join().map_err(|_| "a panic")??;
        open.map(|open| (outcome, open))
    });
    let (outcome, open) = outcome?;
    check!(outcome.is_clean(), "with a guest that was started");
    check!(vg.node("off-thin").exists(), "its volume was taken away");
    check!(!vg.node("off-thick").exists(), "the other stays active");
    drop(open);
    lvm("lvchange", &["-an", "vg0/off-thin"])?;
    same("at the end")?;
    // Not without leave.
    let points = Points::new("[defaults]\nactivate = false\n")?;
    let work = points.working_dir().display().to_string();
    let outcome = points.drive(&["backup", &work, "lv=vg0/off-*"])?;
    check!(
        outcome.text.contains("GS-304") && outcome.text.contains("activate = false"),
        "{}",
        outcome.text
    );
    same("without leave")
}
