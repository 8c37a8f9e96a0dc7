//! The snapshot room on real LVM: taking, refusing, overflowing, extending, holding, killing, sweeping.

use crate::guestdisk::{Fs, Loop, Mounted, image};
use crate::hoststate::HostState;
use crate::inside::{Scenario, scenario};
use crate::lvm::{HostVg, lvm};
use crate::workdir::WorkDir;
use crate::{Result, cmd};
use crate::{check, fail};
use guestsnap::Code;
use guestsnap::config::{Size, SnapshotKind};
use guestsnap::guest::DiskSource;
use guestsnap::hostdev::lvname::LvName;
use guestsnap::snapshot::{
    self, Event, JobTag, Journal, Monitor, MonitorSettings, Object, Request, Snapshot, State,
    Status,
};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Snapshots all disks of one guest, or none.
pub fn take_all(
    requests: &[Request],
    journal: &Arc<Journal>,
) -> guestsnap::Result<Vec<Box<dyn Snapshot>>> {
    take(snapshot::prepare(requests, journal)?.lock()?)
}

fn take(locked: snapshot::Locked) -> guestsnap::Result<Vec<Box<dyn Snapshot>>> {
    let mut taken = Vec::new();
    match locked.take_into(&mut taken, &snapshot::How::default()) {
        Ok(_) => Ok(taken),
        Err(not_all) => Err(not_all.undo()),
    }
}

/// On this machine.
pub const ROOT: &[Scenario] = &[scenario("root_snapshot_reflink", reflink)];

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("snapshot_one_instant", one_instant).only("trixie"),
    scenario("snapshot_refused", refused).only("bookworm"),
    scenario("snapshot_all_or_nothing", all_or_nothing).only("trixie"),
    scenario("snapshot_overflow", overflow),
    scenario("snapshot_extended", extended),
    scenario("snapshot_thin_pool_full", thin_pool_full),
    scenario("snapshot_held", held).only("trixie"),
    scenario("snapshot_of_ours", of_ours).only("bookworm"),
    scenario("snapshot_killed", killed).only("bookworm"),
    scenario("snapshot_killed_while_taking", killed_while_taking).only("trixie"),
    scenario("snapshot_probed", probed).only("bookworm"),
    scenario("snapshot_lookalikes", lookalikes).only("trixie"),
    scenario("snapshot_cost", cost).only("bookworm"),
    scenario("snapshot_reflink", reflink).only("trixie"),
];

const VG: &str = "vg0";

fn ok<T>(result: guestsnap::Result<T>) -> Result<T> {
    result.map_err(|error| error.report().into())
}

fn code<T>(result: guestsnap::Result<T>) -> Option<Code> {
    let error = result.err()?;
    println!("{}", error.report());
    Some(error.code())
}

fn request(lv: &str, kind: SnapshotKind, size: Size) -> Request {
    Request {
        origin: DiskSource::Lv(LvName::new(VG, lv).expect("the name of a volume")),
        kind,
        size,
        chunk: None,
        activate: true,
        in_container: false,
    }
}

fn auto(lv: &str) -> Request {
    request(lv, SnapshotKind::Auto, Size::Percent(20))
}

/// Journals in a folder of their own.
struct Journals {
    _dir: WorkDir,
    folder: PathBuf,
}

impl Journals {
    fn new() -> Result<Self> {
        let dir = WorkDir::new()?;
        let folder = dir.join("guestsnap");
        Ok(Journals { _dir: dir, folder })
    }

    fn open(&self) -> Result<Arc<Journal>> {
        Ok(Arc::new(ok(Journal::open(&self.folder, 7))?))
    }

    fn files(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        Ok(names)
    }
}

fn write_at_start(path: &Path, text: &[u8]) -> Result {
    let mut file = File::options().write(true).open(path)?;
    file.write_all(text)?;
    file.sync_all()?;
    Ok(())
}

fn start_of(mut file: File, length: usize) -> Result<Vec<u8>> {
    let mut buffer = vec![0; length];
    file.seek(SeekFrom::Start(0))?;
    file.read_exact(&mut buffer)?;
    Ok(buffer)
}

fn overwrite(path: &Path, mib: u32) -> Result {
    cmd::run(
        "dd",
        [
            "if=/dev/zero",
            &format!("of={}", path.display()),
            "bs=1M",
            &format!("count={mib}"),
            "oflag=direct",
            "conv=notrunc",
            "status=none",
        ],
    )?;
    Ok(())
}

fn ours(vg: &HostVg) -> Result<Vec<String>> {
    Ok(vg
        .names()?
        .into_iter()
        .filter(|name| name.contains("guestsnap"))
        .collect())
}

/// Thick and thin snapshots in one go: what was there at that time is in them, whatever is written later.
fn one_instant() -> Result {
    let vg = HostVg::on_scratch(VG)?;
    vg.thin_pool("pool", "256m")?;
    let disks = [
        vg.lv("domu-a", "200m")?,
        vg.lv("domu_b.1", "100m")?,
        vg.thin_lv("pool", "thin", "300m")?,
    ];
    for disk in &disks {
        write_at_start(disk, b"before")?;
    }
    let before = HostState::capture(None)?;
    let journals = Journals::new()?;
    let journal = journals.open()?;
    let requests = [
        auto("domu-a"),
        request("domu_b.1", SnapshotKind::Thick, Size::Bytes(10 << 20)),
        auto("thin"),
    ];
    let snapshots = ok(take_all(&requests, &journal))?;
    for disk in &disks {
        write_at_start(disk, b"after!")?;
    }
    let described: Vec<String> = snapshots.iter().map(|s| s.describe()).collect();
    check!(
        described == ["40 MiB thick", "12 MiB thick", "thin"],
        "{described:?}"
    );
    for (snapshot, size) in snapshots.iter().zip([200, 100, 300]) {
        check!(
            snapshot.device().size == size << 20,
            "{:?}",
            snapshot.device()
        );
        check!(
            start_of(File::open(snapshot.device().path)?, 6)? == b"before",
            "not the instant of the snapshot"
        );
        // Writable, and the origin does not notice.
        write_at_start(&snapshot.device().path, b"replay")?;
        check!(
            matches!(ok(snapshot.status())?, Status::Valid { .. }),
            "not valid"
        );
    }
    for disk in &disks {
        check!(
            start_of(File::open(disk)?, 6)? == b"after!",
            "the origin was written to"
        );
    }
    check!(journals.files()?.len() == 1, "no journal");
    marked(&vg, &journal)?;
    ok(snapshot::close_all(snapshots))?;
    ok(journal.close())?;
    drop(journal);
    check!(journals.files()?.is_empty(), "{:?}", journals.files()?);
    let left = HostState::settled_diff(&before, &Default::default())?;
    check!(left.is_empty(), "{left:?}");
    Ok(())
}

/// Three snapshots have the job's tags, and none of them is a disk of a guest.
fn marked(vg: &HostVg, journal: &Arc<Journal>) -> Result {
    let columns = [
        "--noheadings",
        "-o",
        "lv_tags",
        "-S",
        "lv_tags={guestsnap}",
        VG,
    ];
    let tags = lvm("lvs", &columns)?;
    let of_job = tags.lines().filter(|l| l.contains("guestsnap.job=1:7:"));
    check!(of_job.count() == 3, "{tags}");
    let own = ours(vg)?
        .into_iter()
        .find(|n| !n.starts_with('['))
        .ok_or("no snapshot")?;
    let again = take_all(&[auto(&own)], journal);
    check!(
        code(again) == Some(Code::UnsupportedDisk),
        "a snapshot of ours was snapshotted"
    );
    Ok(())
}

/// Volumes that must not be snapshotted are refused with the reason, and nothing is made for them.
fn refused() -> Result {
    let vg = HostVg::on_scratch(VG)?;
    let dir = WorkDir::new()?;
    vg.thin_pool("pool", "64m")?;
    vg.lv("good", "64m")?;
    let mounted = vg.lv("mounted", "64m")?;
    Fs::Ext4.make(&mounted.display().to_string(), "mounted", &[])?;
    let parted = vg.lv("parted", "64m")?;
    let swap = vg.lv("swap", "64m")?;
    let pv = vg.lv("pv", "64m")?;
    vg.lv("inactive", "64m")?;
    lvm("lvchange", &["-an", "vg0/inactive"])?;
    vg.lv("origin", "64m")?;
    lvm(
        "lvcreate",
        &["-y", "-s", "-L", "8m", "-n", "foreign", "vg0/origin"],
    )?;
    vg.lv("large", "6g")?;
    let point = dir.join("mnt");
    fs::create_dir(&point)?;
    let (point, mounted, swap, pv) = (
        point.display().to_string(),
        mounted.display().to_string(),
        swap.display().to_string(),
        pv.display().to_string(),
    );
    cmd::run("mount", [&mounted, &point])?;
    cmd::run("mkswap", [&swap])?;
    cmd::run("swapon", [&swap])?;
    let scan = "devices/scan_lvs=1 global/notify_dbus=0";
    cmd::run("vgcreate", ["--config", scan, "-y", "inner", &pv])?;
    cmd::run(
        "lvcreate",
        ["--config", scan, "-y", "-L", "8m", "-n", "lv", "inner"],
    )?;
    // An admin looks into a guest's disk through a loop device: no use of the host's own.
    let admin = dir.join("admin");
    fs::create_dir(&admin)?;
    Fs::Ext4.make(&parted.display().to_string(), "parted", &[])?;
    let looped = Loop::attach(&parted, 0, None, 0)?;
    cmd::run("mount", [looped.device(), &admin.display().to_string()])?;

    let journals = Journals::new()?;
    let journal = journals.open()?;
    let outcome = each_refused(&vg, &journal);
    cmd::run("umount", [&admin])?;
    drop(looped);
    cmd::run("vgremove", ["--config", scan, "-f", "-y", "inner"])?;
    cmd::run("swapoff", [&swap])?;
    cmd::run("umount", [&point])?;
    outcome?;
    ok(journal.close())?;
    check!(journals.files()?.is_empty(), "the journal stays");
    // It has no user any more.
    let journal = journals.open()?;
    ok(snapshot::close_all(ok(take_all(
        &[auto("mounted")],
        &journal,
    ))?))
}

/// Each of the volumes of [`refused`] has its code, and none a snapshot.
fn each_refused(vg: &HostVg, journal: &Arc<Journal>) -> Result {
    let expected = [
        ("mounted", Code::DiskInUse),
        ("swap", Code::DiskInUse),
        ("pv", Code::DiskInUse),
        ("foreign", Code::UnsupportedDisk),
        ("pool", Code::UnsupportedDisk),
        ("pool_tdata", Code::OriginGone),
        ("none", Code::OriginGone),
    ];
    check!(LvName::new(VG, "-f").is_err(), "a name that LVM refuses");
    for (lv, wanted) in expected {
        let got = code(take_all(&[auto("good"), auto(lv)], journal));
        check!(got == Some(wanted), "{lv}: {got:?} instead of {wanted:?}");
    }
    ok(snapshot::close_all(ok(take_all(
        &[auto("parted")],
        journal,
    ))?))?;
    let inactive = Request {
        activate: false,
        ..auto("inactive")
    };
    check!(
        code(take_all(&[inactive], journal)) == Some(Code::SnapshotFailed),
        "activated without leave"
    );
    let thin = request("good", SnapshotKind::Thin, Size::Percent(20));
    check!(
        code(take_all(&[thin], journal)) == Some(Code::UnsupportedDisk),
        "thin of a thick LV"
    );
    let full = || request("large", SnapshotKind::Auto, Size::Percent(100));
    check!(
        code(take_all(&[full(), full()], journal)) == Some(Code::NoRoom),
        "room for two"
    );
    let gone = Request {
        origin: DiskSource::Lv(LvName::new("nogroup", "x")?),
        ..auto("x")
    };
    check!(
        take_all(&[gone], journal).is_err(),
        "a group that does not exist"
    );
    check!(ours(vg)?.is_empty(), "{:?}", ours(vg)?);
    Ok(())
}

/// The second of three fails: the first is undone, the third is not begun.
fn all_or_nothing() -> Result {
    let vg = HostVg::on_scratch(VG)?;
    for lv in ["a", "b", "c"] {
        vg.lv(lv, "64m")?;
    }
    let journals = Journals::new()?;
    let journal = journals.open()?;
    let prepared = ok(snapshot::prepare(
        &[auto("a"), auto("b"), auto("c")],
        &journal,
    ))?;
    lvm("lvremove", &["-y", "vg0/b"])?;
    check!(
        code(take(ok(prepared.lock())?)) == Some(Code::SnapshotFailed),
        "taken of an LV that is gone"
    );
    check!(ours(&vg)?.is_empty(), "{:?}", ours(&vg)?);
    drop(ok(snapshot::prepare(&[auto("a")], &journal))?);
    ok(journal.close())?;
    check!(journals.files()?.is_empty(), "the journal stays");
    Ok(())
}

/// Events of a monitor, in order.
#[derive(Clone, Default)]
struct Events(Arc<Mutex<Vec<Event>>>);

impl Events {
    fn monitor(&self, settings: MonitorSettings) -> Result<Monitor> {
        let events = self.clone();
        ok(Monitor::start(settings, move |event| {
            println!("{event}");
            events.0.lock().unwrap().push(event);
        }))
    }

    fn wait(&self, what: &str, wanted: impl Fn(&Event) -> bool) -> Result {
        cmd::wait_for(what, Duration::from_secs(60), || {
            Ok(self.0.lock().unwrap().iter().any(&wanted).then_some(()))
        })
    }
}

fn state(snapshot: &dyn Snapshot) -> Result<State> {
    ok(snapshot.probe().ok_or("no probe")?.fill())
}

/// A full copy-on-write area is an invalid snapshot: by its status and by the monitor, not by what is read from it.
fn overflow() -> Result {
    let vg = HostVg::on_scratch(VG)?;
    let disk = vg.lv("domu", "200m")?;
    let journals = Journals::new()?;
    let journal = journals.open()?;
    let snapshots = ok(take_all(
        &[request("domu", SnapshotKind::Thick, Size::Bytes(8 << 20))],
        &journal,
    ))?;
    let events = Events::default();
    let monitor = events.monitor(MonitorSettings {
        extend_by: 0,
        ..MonitorSettings::default()
    })?;
    let probe = snapshots[0].probe().ok_or("no probe")?;
    let name = probe.name().clone();
    monitor.watch(probe);
    overwrite(&disk, 4)?;
    let Status::Valid { used } = ok(snapshots[0].status())? else {
        fail!("invalid too early")
    };
    check!(
        (45.0..65.0).contains(&used),
        "{used} % used after 4 of 8 MiB"
    );
    overwrite(&disk, 20)?;
    check!(ok(snapshots[0].status())? == Status::Invalid, "not invalid");
    events.wait(
        "the event",
        |e| matches!(e, Event::Invalid { word, .. } if word == "Invalid"),
    )?;
    std::thread::sleep(Duration::from_millis(2500));
    check!(events.0.lock().unwrap().len() == 1, "told more than once");
    check!(monitor.unwatch(&name) == Some(100.0), "no peak");
    let started = Instant::now();
    monitor.stop();
    check!(
        started.elapsed() < Duration::from_millis(500),
        "the monitor took {:?} to stop",
        started.elapsed()
    );
    ok(snapshot::close_all(snapshots))?;
    ok(journal.close())
}

/// The monitor gives a snapshot more room in time, as long as there is some.
fn extended() -> Result {
    let vg = HostVg::on_scratch(VG)?;
    let disk = vg.lv("domu", "400m")?;
    let journals = Journals::new()?;
    let journal = journals.open()?;
    let snapshots = ok(take_all(
        &[request("domu", SnapshotKind::Thick, Size::Bytes(40 << 20))],
        &journal,
    ))?;
    let events = Events::default();
    let monitor = events.monitor(MonitorSettings::default())?;
    let probe = snapshots[0].probe().ok_or("no probe")?;
    let name = probe.name().clone();
    monitor.watch(probe);
    let mut file = File::options().write(true).open(&disk)?;
    let block = vec![7; 1 << 20];
    for n in 0..60 {
        file.write_all(&block)?;
        file.sync_all()?;
        // About 3 MiB a second; waits for the monitor where it is close.
        cmd::wait_for("room", Duration::from_secs(60), || {
            Ok(match state(snapshots[0].as_ref())? {
                State::Valid(fill) if fill.data < 85.0 => Some(()),
                State::Valid(_) => None,
                other => fail!("after {n} MiB: {other:?}"),
            })
        })?;
    }
    check!(
        matches!(ok(snapshots[0].status())?, Status::Valid { .. }),
        "invalid"
    );
    let times = events
        .0
        .lock()
        .unwrap()
        .iter()
        .filter(|e| matches!(e, Event::Extended { .. }))
        .count();
    check!(times >= 2, "extended {times} times");
    let peak = monitor.unwatch(&name).unwrap_or(0.0);
    check!((70.0..100.0).contains(&peak), "peak {peak}");
    // No room left: told, and the snapshot stays as it is.
    lvm("lvcreate", &["-y", "-l", "100%FREE", "-n", "filler", VG])?;
    let probe = snapshots[0].probe().ok_or("no probe")?;
    let tight = MonitorSettings {
        extend_at: 1.0,
        ..MonitorSettings::default()
    };
    let second = events.monitor(tight)?;
    second.watch(probe);
    events.wait("the event", |e| matches!(e, Event::NotExtended { .. }))?;
    check!(
        matches!(ok(snapshots[0].status())?, Status::Valid { .. }),
        "invalid"
    );
    second.stop();
    monitor.stop();
    ok(snapshot::close_all(snapshots))?;
    ok(journal.close())
}

/// A pool that is nearly full takes no snapshot; one that is full makes its snapshots invalid.
fn thin_pool_full() -> Result {
    let vg = HostVg::on_scratch(VG)?;
    vg.thin_pool("pool", "64m")?;
    lvm("lvchange", &["--errorwhenfull", "y", "vg0/pool"])?;
    let disk = vg.thin_lv("pool", "thin", "100m")?;
    let journals = Journals::new()?;
    let journal = journals.open()?;
    overwrite(&disk, 32)?;
    let snapshots = ok(take_all(&[auto("thin")], &journal))?;
    let State::Valid(fill) = state(snapshots[0].as_ref())? else {
        fail!("not valid")
    };
    check!((49.0..52.0).contains(&fill.data), "{fill:?}");
    let events = Events::default();
    let monitor = events.monitor(MonitorSettings::default())?;
    monitor.watch(snapshots[0].probe().ok_or("no probe")?);
    overwrite(&disk, 28)?;
    check!(
        code(take_all(&[auto("thin")], &journal)) == Some(Code::NoRoom),
        "taken in a full pool"
    );
    events.wait("the warning", |e| matches!(e, Event::PoolFilling { .. }))?;
    check!(
        matches!(ok(snapshots[0].status())?, Status::Valid { .. }),
        "invalid too early"
    );
    check!(overwrite(&disk, 60).is_err(), "the pool did not overflow");
    check!(ok(snapshots[0].status())? == Status::Invalid, "not invalid");
    events.wait("the event", |e| matches!(e, Event::Invalid { .. }))?;
    std::thread::sleep(Duration::from_millis(2500));
    let count = |wanted: fn(&Event) -> bool| {
        let events = events.0.lock().unwrap();
        events.iter().filter(|e| wanted(e)).count()
    };
    let invalid = count(|e| matches!(e, Event::Invalid { .. }));
    let full = count(|e| matches!(e, Event::PoolFull { .. }));
    check!((invalid, full) == (1, 1), "told {invalid} and {full} times");
    monitor.stop();
    ok(snapshot::close_all(snapshots))?;
    check!(ours(&vg)?.is_empty(), "{:?}", ours(&vg)?);
    ok(journal.close())
}

fn sleeper(file: File) -> Result<Child> {
    Ok(Command::new("sleep").arg("1000").stdin(file).spawn()?)
}

fn end(mut child: Child) -> Result {
    child.kill()?;
    child.wait()?;
    Ok(())
}

/// A snapshot that a process holds is named with its holder, the others go, and a later sweep removes it.
fn held() -> Result {
    let vg = HostVg::on_scratch(VG)?;
    for lv in ["a", "b", "c"] {
        vg.lv(lv, "64m")?;
    }
    let journals = Journals::new()?;
    let journal = journals.open()?;
    let snapshots = ok(take_all(&[auto("a"), auto("b"), auto("c")], &journal))?;
    let sleeper_on_a = sleeper(File::open(snapshots[0].device().path)?)?;
    let started = Instant::now();
    let error = snapshot::close_all(snapshots)
        .err()
        .ok_or("a held snapshot was removed")?
        .report();
    println!("after {:?}: {error}", started.elapsed());
    check!(
        error.contains(&format!("sleep (pid {}", sleeper_on_a.id())),
        "the holder is not named"
    );
    check!(
        started.elapsed() < Duration::from_secs(60),
        "took {:?}",
        started.elapsed()
    );
    check!(ours(&vg)?.len() == 1, "{:?}", ours(&vg)?);
    check!(
        code(journal.close()) == Some(Code::ReleaseFailed),
        "the journal lets go of it"
    );
    // Its job is not over: it stays untouched.
    let report = ok(snapshot::sweep(&journals.folder, false))?;
    check!(report.removed.is_empty(), "{report:?}");
    drop(journal);
    // Now it is, but the device is still held.
    let report = ok(snapshot::sweep(&journals.folder, false))?;
    check!(
        report.removed.is_empty() && report.kept.len() == 1 && report.kept[0].contains("sleep"),
        "{report:?}"
    );
    check!(journals.files()?.len() == 1, "the journal is gone");
    end(sleeper_on_a)?;
    let dry = ok(snapshot::sweep(&journals.folder, true))?;
    check!(dry.removed.len() == 1 && ours(&vg)?.len() == 1, "{dry:?}");
    let report = ok(snapshot::sweep(&journals.folder, false))?;
    check!(
        report.removed == dry.removed && report.kept.is_empty(),
        "{report:?}"
    );
    check!(
        ours(&vg)?.is_empty() && journals.files()?.is_empty(),
        "something is left"
    );

    // Held for a short time only: waited for.
    let journal = journals.open()?;
    let snapshots = ok(take_all(&[auto("a")], &journal))?;
    let device = File::open(snapshots[0].device().path)?;
    let holder = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(7));
        drop(device);
    });
    ok(snapshot::close_all(snapshots))?;
    holder.join().map_err(|_| "the holder panicked")?;
    ok(journal.close())
}

/// An administrator made a thick snapshot of our thin one: neither goes, and the other of the job does. A thin snapshot of
/// ours is in the way of none.
fn of_ours() -> Result {
    let vg = HostVg::on_scratch(VG)?;
    vg.thin_pool("pool", "64m")?;
    vg.thin_lv("pool", "thin", "64m")?;
    vg.lv("a", "64m")?;
    let journals = Journals::new()?;
    let journal = journals.open()?;
    let snapshots = ok(take_all(&[auto("thin"), auto("a")], &journal))?;
    let own = snapshots[0].probe().ok_or("no probe")?.name().to_string();
    let snapshot_of = |name: &str, how: &[&str]| {
        lvm(
            "lvcreate",
            &[&["-y", "-s", "-n", name], how, &[&own]].concat(),
        )
        .map(drop)
    };
    snapshot_of("admins", &["-L", "8m"])?;
    snapshot_of("thin-one", &[])?;
    let error = snapshot::close_all(snapshots)
        .err()
        .ok_or("a thick snapshot of ours was removed")?
        .report();
    println!("{error}");
    check!(
        error.contains("GS-307") && error.contains("others made thick snapshots"),
        "{error}"
    );
    let left = |wanted: &[&str]| -> Result {
        let names = vg.names()?;
        for name in wanted {
            check!(names.iter().any(|n| n == name), "{name} is gone: {names:?}");
        }
        Ok(())
    };
    left(&["admins", "thin-one"])?;
    check!(ours(&vg)?.len() == 1, "{:?}", ours(&vg)?);
    check!(
        code(journal.close()) == Some(Code::ReleaseFailed),
        "the journal lets go of it"
    );
    drop(journal);
    let report = ok(snapshot::sweep(&journals.folder, false))?;
    check!(
        report.removed.is_empty() && report.kept.len() == 1,
        "{report:?}"
    );
    left(&["admins", "thin-one"])?;
    lvm("lvremove", &["-y", "vg0/admins"])?;
    let report = ok(snapshot::sweep(&journals.folder, false))?;
    check!(
        report.removed.len() == 1 && report.kept.is_empty(),
        "{report:?}"
    );
    left(&["thin-one"])?;
    check!(
        ours(&vg)?.is_empty() && journals.files()?.is_empty(),
        "something is left"
    );
    Ok(())
}

/// In the child of [`killed`]: takes snapshots and waits to be killed.
fn take_and_wait(folder: &Path) -> Result {
    let journal = Arc::new(ok(Journal::open(folder, 42))?);
    let snapshots = ok(take_all(&[auto("a"), auto("thin")], &journal))?;
    // A device of ours on a snapshot, as the disk room makes them.
    let name = journal.new_name();
    ok(journal.intend(&Object::Dm { name: name.clone() }))?;
    let device = snapshots[0].device();
    let table = format!("0 {} linear {} 0", device.size / 512, device.path.display());
    cmd::run(
        "dmsetup",
        [
            "create",
            &name,
            "--uuid",
            &format!("GUESTSNAP-{name}"),
            "--table",
            &table,
        ],
    )?;
    println!("ready");
    std::thread::sleep(Duration::from_secs(600));
    drop(snapshots);
    Ok(())
}

const FOLDER: &str = "GUESTSNAP_TEST_FOLDER";

fn victim(scenario: &str, folder: &Path) -> Result<Child> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--bed-one", scenario])
        .env(FOLDER, folder)
        .stdout(Stdio::piped())
        .spawn()?;
    let output = BufReader::new(child.stdout.take().ok_or("no output")?);
    for line in output.lines() {
        if line? == "ready" {
            return Ok(child);
        }
    }
    end(child)?;
    fail!("the child took no snapshots")
}

/// After kill -9 everything of that process goes, and nothing of one that runs.
fn killed() -> Result {
    if let Some(folder) = std::env::var_os(FOLDER) {
        return take_and_wait(Path::new(&folder));
    }
    let vg = HostVg::on_scratch(VG)?;
    vg.thin_pool("pool", "64m")?;
    vg.lv("a", "64m")?;
    vg.thin_lv("pool", "thin", "64m")?;
    let before = HostState::capture(None)?;
    let journals = Journals::new()?;
    let other_folder = Journals::new()?;
    let first = victim("snapshot_killed", &journals.folder)?;
    let second = victim("snapshot_killed", &journals.folder)?;
    let elsewhere = victim("snapshot_killed", &other_folder.folder)?;
    check!(journals.files()?.len() == 2, "{:?}", journals.files()?);
    let running = ours(&vg)?
        .into_iter()
        .filter(|n| n.contains(&format!("-{}.", second.id())))
        .collect::<Vec<_>>();
    check!(running.len() == 2, "{running:?}");

    // All run: nothing to do.
    let report = ok(snapshot::sweep(&journals.folder, false))?;
    check!(
        report.removed.is_empty() && report.kept.is_empty(),
        "{report:?}"
    );

    let first_id = first.id();
    end(first)?;
    let dry = ok(snapshot::sweep(&journals.folder, true))?;
    println!("{:?}", dry.lines().collect::<Vec<_>>());
    check!(
        dry.removed.len() == 2 + 1 && ours(&vg)?.len() == 6,
        "{dry:?}"
    );
    let removed = sweep_twice_at_once(&journals)?;
    check!(removed == dry.removed, "{removed:?}");
    check!(
        !ours(&vg)?
            .iter()
            .any(|n| n.contains(&format!("-{first_id}."))),
        "{:?}",
        ours(&vg)?
    );
    check!(journals.files()?.len() == 1, "{:?}", journals.files()?);
    check!(
        running
            .iter()
            .all(|n| ours(&vg).is_ok_and(|all| all.contains(n))),
        "a running job lost its snapshots"
    );

    end(second)?;
    without_journal(&journals, elsewhere.id())?;

    // The folder of another daemon.
    end(elsewhere)?;
    let report = ok(snapshot::sweep(&other_folder.folder, false))?;
    check!(
        report.removed.len() == 3 && report.kept.is_empty(),
        "{report:?}"
    );
    let left = HostState::settled_diff(&before, &Default::default())?;
    check!(left.is_empty(), "{left:?}");
    Ok(())
}

/// Two sweeps at the same time: each object is removed once, and both succeed. What they removed.
fn sweep_twice_at_once(journals: &Journals) -> Result<Vec<String>> {
    let reports: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2)
            .map(|_| scope.spawn(|| snapshot::sweep(&journals.folder, false)))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let mut removed = Vec::new();
    for report in reports {
        let report = ok(report)?;
        check!(report.kept.is_empty(), "{report:?}");
        removed.extend(report.removed);
    }
    Ok(removed)
}

/// A journal is lost: the tags of volumes tell enough, and a map has none. `elsewhere` is a process of another daemon.
fn without_journal(journals: &Journals, elsewhere: u32) -> Result {
    for file in journals.files()? {
        fs::remove_file(journals.folder.join(file))?;
    }
    let devices = cmd::sh("dmsetup ls | cut -f1 | grep '^guestsnap-'")?;
    let own: Vec<&str> = devices
        .lines()
        .filter(|n| !n.contains(&format!("-{elsewhere}.")))
        .collect();
    check!(own.len() == 1, "{devices}");
    let report = ok(snapshot::sweep(&journals.folder, false))?;
    check!(
        report.removed.len() == 1 && report.kept.len() == 1 && report.kept[0].contains("in use"),
        "{report:?}"
    );
    cmd::run("dmsetup", ["remove", own[0]])?;
    let report = ok(snapshot::sweep(&journals.folder, false))?;
    check!(
        report.removed.len() == 1 && report.kept.is_empty(),
        "{report:?}"
    );
    Ok(())
}

/// In the child of [`killed_while_taking`].
fn take_many(folder: &Path) -> Result {
    let journal = Arc::new(ok(Journal::open(folder, 43))?);
    println!("ready");
    let snapshots = ok(take_all(&[auto("a"), auto("thin"), auto("b")], &journal))?;
    std::thread::sleep(Duration::from_secs(600));
    drop(snapshots);
    Ok(())
}

/// Killed at any moment of lvcreate: it runs to its end, and a later sweep finds what it made.
fn killed_while_taking() -> Result {
    if let Some(folder) = std::env::var_os(FOLDER) {
        return take_many(Path::new(&folder));
    }
    let vg = HostVg::on_scratch(VG)?;
    vg.thin_pool("pool", "64m")?;
    vg.lv("a", "64m")?;
    vg.lv("b", "64m")?;
    vg.thin_lv("pool", "thin", "64m")?;
    let before = HostState::capture(None)?;
    let journals = Journals::new()?;
    for tenths in [4, 9, 14, 20, 27, 35] {
        let victim = victim("snapshot_killed_while_taking", &journals.folder)?;
        std::thread::sleep(Duration::from_millis(100 * tenths));
        end(victim)?;
        // Also beside an lvcreate that still runs.
        let early = ok(snapshot::sweep(&journals.folder, false))?;
        cmd::wait_for("the end of lvcreate", Duration::from_secs(60), || {
            Ok((!cmd::sh("pgrep -x lvcreate || true")?.contains(char::is_numeric)).then_some(()))
        })?;
        let late = ok(snapshot::sweep(&journals.folder, false))?;
        println!(
            "killed after {} s: {early:?} {late:?}",
            f64::from(u32::try_from(tenths)?) / 10.0
        );
        check!(late.kept.is_empty(), "{late:?}");
        check!(ours(&vg)?.is_empty(), "{:?}", ours(&vg)?);
        check!(journals.files()?.is_empty(), "{:?}", journals.files()?);
    }
    let left = HostState::settled_diff(&before, &Default::default())?;
    check!(left.is_empty(), "{left:?}");
    Ok(())
}

/// Something opens every block device again and again while snapshots are taken and removed.
fn probed() -> Result {
    let vg = HostVg::on_scratch(VG)?;
    vg.lv("a", "64m")?;
    vg.lv("b", "64m")?;
    let prober = Command::new("sh")
        .args(["-c", "while :; do blkid -p /dev/dm-* >/dev/null 2>&1; done"])
        .spawn()?;
    let journals = Journals::new()?;
    let outcome = (|| -> Result {
        for _ in 0..6 {
            let journal = journals.open()?;
            let snapshots = ok(take_all(&[auto("a"), auto("b")], &journal))?;
            ok(snapshot::close_all(snapshots))?;
            ok(journal.close())?;
        }
        Ok(())
    })();
    end(prober)?;
    outcome?;
    check!(ours(&vg)?.is_empty(), "{:?}", ours(&vg)?);
    Ok(())
}

/// In the child of [`lookalikes`].
fn take_one(folder: &Path) -> Result {
    let journal = Arc::new(ok(Journal::open(folder, 44))?);
    let snapshots = ok(take_all(&[auto("a")], &journal))?;
    println!("ready");
    std::thread::sleep(Duration::from_secs(600));
    drop(snapshots);
    Ok(())
}

/// An administrator renames the disk while we have a snapshot of it, and gives its name to another: our snapshot goes, by
/// its own job's hand or by a sweep, and nothing else.
fn origin_renamed(vg: &HostVg, journals: &Journals) -> Result {
    let before = vg.names()?;
    let rename = |new: &str| -> Result {
        lvm("lvrename", &["vg0/a", &format!("vg0/{new}")])?;
        vg.lv("a", "8m")?;
        let admins = format!("{new}-s");
        lvm(
            "lvcreate",
            &["-y", "-s", "-L", "8m", "-n", &admins, "vg0/a"],
        )?;
        Ok(())
    };
    let back = |new: &str| -> Result {
        lvm("lvremove", &["-y", "vg0/a"])?;
        lvm("lvrename", &[&format!("vg0/{new}"), "vg0/a"]).map(drop)
    };
    let check_rest = |new: &str| -> Result {
        let mut wanted = before.clone();
        wanted.extend([new.to_owned(), format!("{new}-s")]);
        let mut left = vg.names()?;
        wanted.sort();
        left.sort();
        check!(left == wanted, "{left:?} instead of {wanted:?}");
        Ok(())
    };
    let journal = journals.open()?;
    let snapshots = ok(take_all(&[auto("a")], &journal))?;
    rename("new")?;
    check!(
        matches!(ok(snapshots[0].status())?, Status::Valid { .. }),
        "not valid any more"
    );
    ok(snapshot::close_all(snapshots))?;
    ok(journal.close())?;
    check_rest("new")?;
    back("new")?;

    let victim = victim("snapshot_lookalikes", &journals.folder)?;
    rename("newer")?;
    end(victim)?;
    let report = ok(snapshot::sweep(&journals.folder, false))?;
    check!(
        report.removed.len() == 1 && report.kept.is_empty(),
        "{report:?}"
    );
    check_rest("newer")?;
    check!(journals.files()?.is_empty(), "{:?}", journals.files()?);
    back("newer")
}

/// A journal of a killed job on this host that names a volume which is not that job's.
fn forge_journal(journals: &Journals, host: &str) -> Result {
    drop(journals.open()?);
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let namespace = fs::read_link("/proc/self/ns/pid")?.display().to_string();
    let namespace = namespace
        .trim_start_matches("pid:[")
        .trim_end_matches(']')
        .to_owned();
    fs::write(
        journals.folder.join("guestsnap-9-4194305.1-forged.journal"),
        format!(
            "{{\"journal\":{{\"version\":1,\"job\":{{\"job_id\":9,\"serial\":1,\"owner\":{{\"host\":\"{host}\",\
             \"boot\":\"{}\",\"pid_ns\":{namespace},\"pid\":4194305,\"start\":1}}}}}}}}\n\
             {{\"intend\":{{\"n\":1,\"object\":{{\"lv\":{{\"vg\":\"vg0\",\"name\":\"a\",\"origin\":\"x\",\"uuid\":null}}}}}}}}\n\
             {{\"intend\":{{\"n\":2,\"object\":{{\"dm\":{{\"name\":\"vg0-a\"}}}}}}}}\n\
             {{\"intend\":{{\"n\":3,\"object\":{{\"lv\":{{\"vg\":\"away\",\"name\":\"a\",\"origin\":\"x\",\"uuid\":null}}}}}}}}\n",
            boot.trim()
        ),
    )?;
    Ok(())
}

/// Look-alikes that are not ours stay.
fn lookalikes() -> Result {
    if let Some(folder) = std::env::var_os(FOLDER) {
        return take_one(Path::new(&folder));
    }
    let vg = HostVg::on_scratch(VG)?;
    vg.lv("a", "64m")?;
    let journals = Journals::new()?;
    origin_renamed(&vg, &journals)?;
    let gone = "guestsnap.job=1:5:1:4194305:1:4026531836:no-such-boot:";
    let mine = ok(JobTag::new(5))?.to_lvm_tag();
    let (_, host) = mine.rsplit_once(':').ok_or("no host")?;
    let gone_here = format!("{gone}{host}");
    let snapshots: [(&str, &[&str]); 6] = [
        ("guestsnap-5-4194305.1-1", &[]),
        ("guestsnap-5-4194305.1-2", &["guestsnap"]),
        (
            "guestsnap-5-4194305.1-3",
            &["guestsnap", "guestsnap.job=1:5:1:1:1:4026531836:boot"],
        ),
        ("admins", &["guestsnap", &gone_here]),
        (
            "guestsnap-5-4194305.1-4",
            // A clone of this host.
            &["guestsnap", &format!("{gone}{host}-2")],
        ),
        ("guestsnap-5-4194305.1-5", &["guestsnap", &gone_here]),
    ];
    for (name, tags) in &snapshots {
        lvm("lvcreate", &["-y", "-s", "-L", "8m", "-n", name, "vg0/a"])?;
        for tag in *tags {
            vg.tag(name, tag)?;
        }
    }
    vg.lv("guestsnap-5-4194305.1-6", "8m")?;
    for tag in ["guestsnap", &gone_here] {
        vg.tag("guestsnap-5-4194305.1-6", tag)?;
    }
    forge_journal(&journals, host)?;
    let before = vg.names()?;
    let report = ok(snapshot::sweep(&journals.folder, false))?;
    for line in report.lines() {
        println!("{line}");
    }
    check!(
        report.removed.len() == 1 && report.removed[0].contains("-5 of job 5"),
        "{:?}",
        report.removed
    );
    check!(report.alike.len() == 8, "{} alike", report.alike.len());
    check!(report.kept.is_empty(), "{:?}", report.kept);
    check!(
        report.notes.len() == 1 && report.notes[0].contains("no group away"),
        "{:?}",
        report.notes
    );
    let missing: Vec<String> = {
        let after = vg.names()?;
        before.into_iter().filter(|n| !after.contains(n)).collect()
    };
    check!(missing == ["guestsnap-5-4194305.1-5"], "{missing:?}");
    check!(journals.files()?.len() == 1, "the journal is gone");
    Ok(())
}

/// Time that we add to the LVM commands themselves.
fn cost() -> Result {
    let vg = HostVg::on_scratch(VG)?;
    let names: Vec<String> = (0..4).map(|n| format!("d{n}")).collect();
    for name in &names {
        vg.lv(name, "64m")?;
    }
    let journals = Journals::new()?;
    let (mut plain, mut ours_take, mut plain_remove, mut ours_remove) = (0.0, 0.0, 0.0, 0.0);
    for _ in 0..3 {
        let timed = Instant::now();
        for name in &names {
            lvm(
                "lvcreate",
                &[
                    "-y",
                    "-s",
                    "-L",
                    "16m",
                    "-n",
                    &format!("s{name}"),
                    &format!("vg0/{name}"),
                ],
            )?;
        }
        plain += timed.elapsed().as_secs_f64();
        let all: Vec<String> = names.iter().map(|n| format!("vg0/s{n}")).collect();
        let timed = Instant::now();
        lvm(
            "lvremove",
            &[
                &["-y"],
                &all.iter().map(String::as_str).collect::<Vec<_>>()[..],
            ]
            .concat(),
        )?;
        plain_remove += timed.elapsed().as_secs_f64();

        let journal = journals.open()?;
        let requests: Vec<Request> = names.iter().map(|n| auto(n)).collect();
        let timed = Instant::now();
        let snapshots = ok(take_all(&requests, &journal))?;
        ours_take += timed.elapsed().as_secs_f64();
        let timed = Instant::now();
        ok(snapshot::close_all(snapshots))?;
        ours_remove += timed.elapsed().as_secs_f64();
    }
    println!(
        "4 snapshots, 3 times: taking {plain:.2} s plain, {ours_take:.2} s ours ({:.2}); removing {plain_remove:.2} s plain, {ours_remove:.2} s ours ({:.2})",
        ours_take / plain,
        ours_remove / plain_remove
    );
    Ok(())
}

/// Image files on XFS and btrfs by reflink, elsewhere refused. For this machine.
fn reflink() -> Result {
    let dir = WorkDir::new()?;
    let journals = Journals::new()?;
    let journal = journals.open()?;
    for (fs, size) in [
        (Fs::Xfs, 320_u64 << 20),
        (Fs::Btrfs, 160 << 20),
        (Fs::Ext4, 64 << 20),
    ] {
        let file = dir.join(fs.name());
        image(&file, size)?;
        fs.make(&file.display().to_string(), "images", &[])?;
        let point = dir.join("mnt");
        let volume = Loop::attach(&file, 0, None, 0)?;
        let mounted = Mounted::new(volume, fs, &point)?;
        let disk = mounted.path().join("disk.img");
        image(&disk, 16 << 20)?;
        write_at_start(&disk, b"before")?;
        if fs == Fs::Btrfs {
            // The form that libvirt gives them.
            let nocow = mounted.path().join("nocow.img");
            File::create(&nocow)?;
            cmd::run("chattr", ["+C", &nocow.display().to_string()])?;
            image(&nocow, 1 << 20)?;
            drop(ok(take_all(&[image_request(&nocow)], &journal))?);
        }
        let result = take_all(&[image_request(&disk)], &journal);
        if fs == Fs::Ext4 {
            check!(
                code(result) == Some(Code::UnsupportedDisk),
                "a reflink on ext4"
            );
        } else {
            let snapshots = ok(result)?;
            write_at_start(&disk, b"after!")?;
            let snapshot = &snapshots[0];
            check!(
                snapshot.device().size == 16 << 20,
                "{:?}",
                snapshot.device()
            );
            check!(
                start_of(File::open(snapshot.device().path)?, 6)? == b"before",
                "not the instant of the snapshot"
            );
            check!(snapshot.fd().is_some(), "no descriptor");
            // A loop device takes it, nameless as it is.
            let path = format!(
                "/proc/{}/fd/{}",
                std::process::id(),
                snapshot
                    .device()
                    .path
                    .file_name()
                    .ok_or("no number")?
                    .to_string_lossy()
            );
            let device = Loop::attach(Path::new(&path), 0, None, 0)?;
            let read = start_of(File::open(device.device())?, 6)?;
            drop(device);
            check!(read == b"before", "the loop device shows something else");
            let names: Vec<_> = fs::read_dir(mounted.path())?
                .flatten()
                .map(|e| e.file_name())
                .collect();
            check!(
                !names
                    .iter()
                    .any(|n| n.to_string_lossy().contains("guestsnap")),
                "{names:?}"
            );
            ok(snapshot::close_all(snapshots))?;
        }
        // Nothing holds the filesystem.
        mounted.close()?;
    }
    ok(journal.close())
}

fn image_request(path: &Path) -> Request {
    Request {
        origin: DiskSource::File(path.to_owned()),
        ..auto("x")
    }
}
