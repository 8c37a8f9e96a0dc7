//! Killed at every step, failing at every call: afterwards the host is as before, the result was true, and the next job
//! works. The steps are the points of `src/point.rs`; a point that is never reached fails the test.

use crate::bacula::{Bacula, BaculaOptions, JobResult, Selection, fileset_plugin};
use crate::guestdisk::{Fs, GuestDisk, MIB, Mounted, Part, Table, image};
use crate::hoststate::{HostState, Scope};
use crate::inside::{self, Scenario, scenario};
use crate::lvm::{HostVg, lvm};
use crate::points::{Outcome, Points};
use crate::tree::{Ignore, Manifest};
use crate::vm::SUITES;
use crate::workdir::WorkDir;
use crate::{Result, cmd, message};
use crate::{check, fail};
use guestsnap::point::{Fault, Needs, Phase, Point};
use std::path::{Path, PathBuf};

/// On this machine.
pub const ROOT: &[Scenario] = &[
    scenario("root_points_kill", kill_with_images),
    scenario("root_points_faults", faults_with_images),
    scenario("root_points_second_fault", second_fault),
    scenario("root_points_journal_on_a_full_disk", journal_on_a_full_disk),
    scenario("root_faults_in_bacula", faults_in_bacula),
    scenario("root_points_together", together_with_images),
    scenario("root_points_not_shipped", shipped_library_has_none),
];

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    // Not for one suite only: each runs its share, see `share`.
    scenario("points_kill", kill_with_volumes).seconds(1500),
    scenario("points_faults", faults_with_volumes).seconds(1500),
    scenario("points_commands", commands).seconds(1200),
    scenario("points_pool_full", pool_full).only("bookworm"),
    scenario("points_few_commands", few_commands).only("trixie"),
];

/// `make soak` runs everything, other runs what says the most.
pub fn is_long() -> bool {
    std::env::var_os("GUESTSNAP_SOAK").is_some()
}

/// One of each thing that takes a step of its own to save or to restore.
fn populate(path: &Path) -> Result {
    cmd::sh(&format!(
        "cd '{}'
        mkdir -p etc var/log home/user
        echo root:x:0:0 > etc/passwd
        ln etc/passwd home/hard
        ln -s ../etc/passwd home/link
        mkfifo home/fifo
        head -c 700000 /dev/urandom > home/large
        truncate -s 3M home/sparse
        echo tail >> home/sparse
        setfattr -n user.colour -v green etc/passwd
        for n in $(seq 20); do echo $n > var/log/$n; done
        chmod 750 home/user; chown 1000:1000 home/user",
        path.display()
    ))?;
    Ok(())
}

/// Remover of a killed job's leftovers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Clearing {
    /// The sweep, and a job follows.
    SweepAndJob,
    /// The next job, which sweeps first.
    Job,
    /// The sweep alone: it has made the host what it was before.
    Sweep,
}

/// A guest, and jobs that save and restore it.
struct Bed {
    points: Points,
    directive: String,
    /// The restored tree.
    expected: Manifest,
    target: PathBuf,
    before: HostState,
    // Last to go: the guest's disk.
    _store: Option<Mounted>,
    _vg: Option<HostVg>,
    _dir: WorkDir,
}

impl Bed {
    /// In an image file on a filesystem with reflinks.
    fn image() -> Result<Self> {
        Bed::image_with(0)
    }

    /// A bed with more small files in the guest.
    fn image_with(more: u32) -> Result<Self> {
        let dir = WorkDir::new()?;
        let store = reflink_store(&dir)?;
        let path = store.path().join("web.img");
        image(&path, 64 * MIB)?;
        let disk = GuestDisk::create(&path, Table::Mbr, &[Part::fs(56 * MIB, Fs::Ext4, "root")])?;
        let directive = format!("image={}/web.img", store.path().display());
        let client_file = format!("allow = [\"{}/*\"]\n", store.path().display());
        Bed::new(dir, &disk, more, directive, &client_file, Some(store), None)
    }

    /// On logical volumes.
    fn volume() -> Result<Self> {
        let dir = WorkDir::new()?;
        let vg = HostVg::on_scratch("vg0")?;
        let lv = vg.lv("web", "64m")?;
        let disk = GuestDisk::create(&lv, Table::Mbr, &[Part::fs(56 * MIB, Fs::Ext4, "root")])?;
        // A second disk, so that its writes are held; one that is not active.
        let swap = vg.lv("web-swap", "32m")?;
        cmd::run("mkswap", [&swap])?;
        lvm("lvchange", &["-an", "vg0/web-swap"])?;
        let client_file =
            "[limits]\nhold_seconds = 60\n[guest.web]\ndisks = [\"vg0/web\", \"vg0/web-swap\"]\n";
        let directive = "guest=web".to_owned();
        Bed::new(dir, &disk, 0, directive, client_file, None, Some(vg))
    }

    fn new(
        dir: WorkDir,
        disk: &GuestDisk,
        more: u32,
        directive: String,
        client_file: &str,
        store: Option<Mounted>,
        vg: Option<HostVg>,
    ) -> Result<Self> {
        let mounted = disk.mount(1, &dir.join("mnt"))?;
        populate(mounted.path())?;
        for n in 0..more {
            let folder = mounted.path().join(format!("more/{}", n % 40));
            std::fs::create_dir_all(&folder)?;
            std::fs::write(
                folder.join(n.to_string()),
                vec![b'x'; n as usize * 7 % 9000],
            )?;
        }
        mounted.sync()?;
        let expected = Manifest::of(mounted.path())?;
        mounted.close()?;
        let mut bed = Bed {
            points: Points::new(client_file)?,
            directive,
            expected,
            target: dir.join("target"),
            before: HostState::default(),
            _store: store,
            _vg: vg,
            _dir: dir,
        };
        // With the folders that a first job makes.
        let first = bed.copy()?;
        check!(first.is_clean(), "the first job:\n{}", first.text);
        bed.before = HostState::capture_scope(&bed.scope())?;
        Ok(bed)
    }

    fn scope(&self) -> Scope {
        Scope {
            fd_pid: None,
            working_dir: Some(self.points.working_dir()),
        }
    }

    /// Like [`Self::copy`], into an empty folder.
    fn copy_anew(&self) -> Result<Outcome> {
        if self.target.exists() {
            std::fs::remove_dir_all(&self.target)?;
        }
        self.copy()
    }

    /// Saves and restores at once.
    fn copy(&self) -> Result<Outcome> {
        let (work, target) = (
            self.points.working_dir().display().to_string(),
            self.target.display().to_string(),
        );
        self.points
            .drive(&["copy", &work, &self.directive, &target])
    }

    fn sweep(&self) -> Result<Outcome> {
        let work = self.points.working_dir().display().to_string();
        self.points.drive(&["sweep", &work])
    }

    /// Objects that stay are named.
    fn check_named(&self, what: &str, outcome: &Outcome) -> Result {
        let now = HostState::capture_scope(&self.scope())?;
        for left in now.lvs.difference(&self.before.lvs) {
            // "vg0|guestsnap-1-2.3-1|…"
            let name = left.split('|').nth(1).unwrap_or_default();
            check!(
                outcome.text.contains(name),
                "{what}: {left} stays and is not named:\n{}",
                outcome.text
            );
        }
        Ok(())
    }

    /// The host is as it was before.
    fn check(&self, what: &str) -> Result {
        let left = HostState::settled_diff(&self.before, &self.scope())?;
        check!(left.is_empty(), "{what}: left:\n  {}", left.join("\n  "));
        Ok(())
    }

    /// The tree that was restored is the guest's.
    fn check_target(&self, what: &str) -> Result {
        self.check_restored(what, &self.target)
    }

    fn check_restored(&self, what: &str, target: &Path) -> Result {
        let restored = Manifest::of(&target.join("@guestsnap/web"))?;
        let ignore = Ignore {
            below: vec![".guestsnap".into()],
            root: true,
            ..Ignore::default()
        };
        restored
            .check_equals(&self.expected, &ignore)
            .map_err(|e| format!("{what}: {}", message(&e)).into())
    }

    /// A job that was killed, and so left all it had.
    fn leave_something(&self) -> Result {
        self.points.act(Point::GuestOpened, "kill")?;
        let killed = self.copy()?;
        check!(killed.killed, "not killed:\n{}", killed.text);
        self.points.clear()
    }

    /// Killed at this point; what is left goes, and the next job works.
    fn kill(&self, point: Point, by: Clearing) -> Result {
        let what = point.name();
        let outcome = if point.phase() == Phase::Sweep {
            self.leave_something()?;
            self.points.act(point, "kill")?;
            self.sweep()?
        } else {
            self.points.act(point, "kill")?;
            self.copy_anew()?
        };
        check!(
            outcome.killed && self.points.acted(),
            "{what} was not reached:\n{}",
            outcome.text
        );
        self.points.clear()?;
        if by == Clearing::Job && point.phase() != Phase::Sweep {
            let next = self.copy()?;
            check!(next.is_clean(), "{what}: the next job:\n{}", next.text);
            return self.check(what);
        }
        let swept = self.sweep()?;
        check!(
            swept.is_clean() && !swept.text.contains("left alone"),
            "{what}: sweep:\n{}",
            swept.text
        );
        self.check(what)?;
        if by == Clearing::Sweep {
            return Ok(());
        }
        let next = self.copy()?;
        check!(
            next.is_clean() && next.of('W').is_empty(),
            "{what}: the next job:\n{}",
            next.text
        );
        Ok(())
    }

    /// The call at this point fails: nothing is left, and the result says so if something is missing.
    fn fail(&self, point: Point, errno: i32) -> Result {
        let what = format!("{} fails with {errno}", point.name());
        let action = format!("error={errno}");
        let outcome = if point.phase() == Phase::Sweep {
            self.leave_something()?;
            self.points.act(point, &action)?;
            self.sweep()?
        } else {
            self.points.act(point, &action)?;
            self.copy_anew()?
        };
        check!(
            self.points.acted(),
            "{}: it was not reached:\n{}",
            what,
            outcome.text
        );
        self.points.clear()?;
        judge(&what, point.fault(), &outcome)?;
        if point.fault() == Fault::Error {
            check_names(&what, point, errno, &outcome)?;
        }
        if may_stay(point) {
            self.check_named(&what, &outcome)?;
        }
        if point.phase() == Phase::Sweep || may_stay(point) {
            let swept = self.sweep()?;
            check!(swept.is_clean(), "{what}: sweep:\n{}", swept.text);
        }
        self.check(&what)
    }
}

/// Where what could not be removed stays for the sweep: the call that removes it is the one that fails.
fn may_stay(point: Point) -> bool {
    matches!(
        point,
        Point::Lvremove
            | Point::Deactivate
            | Point::JournalRemove
            | Point::JournalRecord
            | Point::CommandStart
    )
}

/// Whether a failure was told as it must be.
fn judge(what: &str, fault: Fault, outcome: &Outcome) -> Result {
    check!(
        !outcome.killed && outcome.text.ends_with("end\n"),
        "{what}: the job did not come to its end:\n{}",
        outcome.text
    );
    let errors = [outcome.of('E'), outcome.of('F')].concat();
    match fault {
        Fault::Error => {
            check!(!errors.is_empty(), "{what}: a false OK:\n{}", outcome.text);
            for error in &errors {
                check!(
                    error.contains("GS-")
                        && (error.contains("To do: ") || error.contains("read error")),
                    "{what}: an error without a code or a remedy: {error}"
                );
                check!(
                    !error.contains("GS-701"),
                    "{what}: a fault of ours: {error}"
                );
            }
        }
        Fault::Harmless => {
            let told = !outcome.of('W').is_empty()
                || !outcome.of('L').is_empty()
                || !errors.is_empty()
                || outcome.text.contains("left alone");
            check!(told, "{what}: nobody was told:\n{}", outcome.text);
        }
        Fault::Border => fail!("{what}: nothing can fail there"),
    }
    Ok(())
}

/// Whether an error says which guest it is about, and what the kernel said.
fn check_names(what: &str, point: Point, errno: i32, outcome: &Outcome) -> Result {
    // Those of the job as a whole, and of the folder that all guests are restored into.
    let any_guest = point.name().starts_with("journal-")
        || [Point::CommandStart, Point::RestoreFolder].contains(&point);
    let cause = std::io::Error::from_raw_os_error(errno).to_string();
    let named = |error: &&str| any_guest || error.contains("web: ") || error.contains("/web/");
    let errors = [outcome.of('E'), outcome.of('F')].concat();
    check!(
        errors
            .iter()
            .any(|error| named(error) && error.contains(&cause)),
        "{what}: no error with the guest and {cause:?}:\n{}",
        outcome.text
    );
    Ok(())
}

/// An XFS with reflinks in a file.
pub fn reflink_store(dir: &WorkDir) -> Result<Mounted> {
    let file = dir.join("store.img");
    image(&file, 4 << 30)?;
    let disk = GuestDisk::create(&file, Table::Whole, &[Part::fs(4 << 30, Fs::Xfs, "store")])?;
    disk.mount(1, &dir.join("store"))
}

/// Runs something for each point, and tells about all that went wrong, not only the first.
fn for_each(points: impl Iterator<Item = Point>, mut run: impl FnMut(Point) -> Result) -> Result {
    let (mut count, mut problems) = (0, Vec::new());
    for point in points {
        count += 1;
        if let Err(e) = run(point) {
            problems.push(message(&e));
        }
        if problems.len() > 5 {
            break;
        }
    }
    println!("{count} points");
    check!(problems.is_empty(), "{}", problems.join("\n\n"));
    check!(count > 0, "no points");
    Ok(())
}

/// Those of a rebuild and of a restore into a guest's disks have tests of their own.
fn of(needs: Needs) -> impl Iterator<Item = Point> {
    let all = Point::ALL.iter().copied();
    let of_jobs = |point: &Point| !matches!(point.phase(), Phase::Into | Phase::Rebuild);
    all.filter(move |point| point.needs() == needs && of_jobs(point))
}

/// Machines are slow: each suite's takes every other one, in the long version all. A test makes sure that nothing is
/// left out by both.
pub fn share<I: Iterator>(suite: &str, all: I) -> impl Iterator<Item = I::Item> + use<I> {
    let (count, ours) = (SUITES.len(), SUITES.iter().position(|one| *one == suite));
    let mine =
        move |(n, _): &(usize, I::Item)| is_long() || ours.is_none_or(|ours| n % count == ours);
    all.enumerate().filter(mine).map(|(_, one)| one)
}

fn shared<I: Iterator>(all: I) -> impl Iterator<Item = I::Item> + use<I> {
    share(&inside::suite(), all)
}

/// Killed at every step of a backup, a restore and a sweep of guests in image files.
fn kill_with_images() -> Result {
    let bed = Bed::image()?;
    for_each(of(Needs::Image), |point| {
        bed.kill(point, Clearing::SweepAndJob)?;
        match point.phase() {
            Phase::Restore => bed.check_target(point.name()),
            _ => Ok(()),
        }
    })?;
    bed.check_target("at the end")
}

/// Every call fails, with images.
fn faults_with_images() -> Result {
    let bed = Bed::image()?;
    let all: &[i32] = match is_long() {
        true => &[
            libc::EIO,
            libc::ENOSPC,
            libc::EAGAIN,
            libc::ENOMEM,
            libc::EACCES,
        ],
        false => &[libc::EIO],
    };
    for errno in all {
        let failing = of(Needs::Image).filter(|point| point.fault() != Fault::Border);
        for_each(failing, |point| bed.fail(point, *errno))?;
    }
    // The steps that a full disk hits.
    let writing = [
        Point::JournalCreate,
        Point::JournalHeader,
        Point::ReflinkClone,
        Point::RestoreCreate,
        Point::RestoreWrite,
    ];
    for_each(writing.into_iter(), |point| bed.fail(point, libc::ENOSPC))?;
    let next = bed.copy()?;
    check!(next.is_clean(), "the next job:\n{}", next.text);
    bed.check_target("at the end")
}

/// The filesystem with the journals is full: no job starts without one, and nothing is left of it.
fn journal_on_a_full_disk() -> Result {
    let bed = Bed::image()?;
    let work = bed.points.working_dir();
    let at = work.display().to_string();
    cmd::run("mount", ["-t", "tmpfs", "-o", "size=64k", "tmpfs", &at])?;
    let run = || -> Result {
        // The folder and its lock are there.
        let first = bed.copy_anew()?;
        check!(first.is_clean(), "the first job:\n{}", first.text);
        let fill = "cat /dev/zero > filling 2>&1 || :";
        cmd::sh(&format!("cd '{at}'; {fill}"))?;
        let full = bed.copy_anew()?;
        judge("a full disk", Fault::Error, &full)?;
        check!(
            full.text.contains("No space left on device") && full.text.contains(&at),
            "not the reason:\n{}",
            full.text
        );
        std::fs::remove_file(work.join("filling"))?;
        let next = bed.copy_anew()?;
        check!(next.is_clean(), "the next job:\n{}", next.text);
        bed.check_target("at the end")
    };
    let result = run();
    cmd::run("umount", [&at])?;
    result?;
    bed.check("a full disk")
}

/// A volume cannot be mounted, and then not be taken down in order either: both are told, the first as the reason.
fn second_fault() -> Result {
    let dir = WorkDir::new()?;
    let store = reflink_store(&dir)?;
    let path = store.path().join("web.img");
    image(&path, 80 * MIB)?;
    let parts = ["root", "more"].map(|label| Part::fs(32 * MIB, Fs::Ext4, label));
    let disk = GuestDisk::create(&path, Table::Mbr, &parts)?;
    for number in [1, 2] {
        let volume = disk.volume(number)?;
        let damage = "set_super_value inodes_count 4294967295";
        cmd::run("debugfs", ["-w", "-R", damage, volume.device()])?;
    }
    let points = Points::new(&format!("allow = [\"{}/*\"]\n", store.path().display()))?;
    let work = points.working_dir().display().to_string();
    points.act(Point::LoopReleased, &format!("error={}", libc::EIO))?;
    let directive = format!("image={}/web.img", store.path().display());
    let outcome = points.drive(&["backup", &work, &directive])?;
    check!(points.acted(), "nothing failed:\n{}", outcome.text);
    points.clear()?;
    for volume in ["p1", "p2"] {
        let mark = format!("web: {volume}: ");
        let errors = outcome.of('E').into_iter();
        let errors: Vec<&str> = errors.filter(|e| e.starts_with(&mark)).collect();
        check!(
            errors
                .iter()
                .any(|e| e.starts_with(&format!("{mark}ERROR GS-503")))
                && errors
                    .iter()
                    .any(|e| e.starts_with(&format!("{mark}GS-307"))),
            "{volume}:\n{}",
            outcome.text
        );
    }
    let swept = points.drive(&["sweep", &work])?;
    check!(swept.is_clean(), "sweep:\n{}", swept.text);
    store.close()
}

/// Calls that fail once in a job of the real daemon: the job is not OK, its log says where in which guest, and everything
/// else is saved.
fn faults_in_bacula() -> Result {
    let dir = WorkDir::new()?;
    let store = reflink_store(&dir)?;
    let path = store.path().join("web.img");
    image(&path, 64 * MIB)?;
    let disk = GuestDisk::create(&path, Table::Mbr, &[Part::fs(56 * MIB, Fs::Ext4, "root")])?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    cmd::sh(&format!(
        "cd '{}'
        for d in a b c; do
            mkdir $d; for f in 1 2 3; do echo $d$f > $d/$f; setfattr -n user.colour -v $d $d/$f; done
            head -c 400000 /dev/urandom > $d/large
        done",
        mounted.path().display()
    ))?;
    mounted.sync()?;
    let expected = Manifest::of(mounted.path())?;
    mounted.close()?;
    let points = Points::new("")?;
    let directive = format!("guestsnap: image={}", path.display());
    let mut bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(crate::points::built()?.plugin),
        fd_env: vec![points.env()],
        filesets: vec![("g".into(), fileset_plugin(&directive))],
        client_file: Some(format!("allow = [\"{}/*\"]\n", store.path().display())),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let before = bacula.host_state()?;
    let all = [
        (Point::FileRead, true),
        (Point::WalkStat, true),
        (Point::XattrGet, true),
        // Not about a path.
        (Point::LoopReleased, false),
    ];
    for (point, about_path) in all {
        let what = point.name();
        let job = failing_once(&bacula, &points, point)?;
        let told = |line: &&str| {
            let guest = line.contains("web: ") || line.contains("/@guestsnap/web/");
            guest && line.contains("Input/output error")
        };
        let line = job.log.lines().find(told);
        let line = line.ok_or_else(|| format!("{what}: no line with the guest and the cause"))?;
        check!(
            !(about_path && job.log.contains(" sent, 0 errors")),
            "{what}: the guest's last line knows of no error"
        );
        let mut below = vec![PathBuf::from(".guestsnap")];
        if about_path {
            below.push(
                named_in(line, &expected).ok_or_else(|| format!("{what}: no path in {line}"))?,
            );
        }
        println!("all but {below:?}");
        let target = dir.join(what);
        bacula.restore(job.jobid, &Selection::All, &target)?;
        let ignore = Ignore {
            below,
            root: true,
            ..Ignore::default()
        };
        Manifest::of(&target.join("@guestsnap/web"))?
            .check_equals(&expected, &ignore)
            .map_err(|e| format!("{what}: {}", message(&e)))?;
        bacula.check_host_state(&before)?;
    }
    let job = bacula.run_backup("g", "Full")?.clean()?;
    restore_killed(&mut bacula, &points, job.jobid, &dir.join("killed"))?;
    let whole = Ignore {
        below: vec![".guestsnap".into()],
        root: true,
        ..Ignore::default()
    };
    Manifest::of(&dir.join("killed/@guestsnap/web"))?.check_equals(&expected, &whole)?;
    drop(bacula);
    store.close()
}

/// A job in which this call fails once: it comes to its end, with errors.
fn failing_once(bacula: &Bacula, points: &Points, point: Point) -> Result<JobResult> {
    let what = point.name();
    points.act(point, "once=5")?;
    let job = bacula.run_backup("g", "Full")?;
    points.clear()?;
    println!("=== {what}\n{}", job.log);
    check!(points.acted(), "{what} was not reached");
    check!(
        job.errors > 0 && job.status != 'f',
        "{what}: status {}, {} errors",
        job.status,
        job.errors
    );
    Ok(job)
}

/// The daemon is killed in a restore. The next one has another daemon, and the same again gives everything.
fn restore_killed(bacula: &mut Bacula, points: &Points, job: u32, target: &Path) -> Result {
    points.act(Point::RestoreWrite, "kill")?;
    let cut = bacula.start_restore(job, &Selection::All, target, "replace=always")?;
    points.wait_acted(std::time::Duration::from_secs(60))?;
    points.clear()?;
    bacula.restart_fd()?;
    let cut = bacula.wait_job(cut)?;
    check!(cut.status != 'T', "the daemon was killed:\n{}", cut.log);
    bacula.run_backup("Empty", "Full")?.clean()?;
    let before = bacula.host_state()?;
    bacula.restore(job, &Selection::All, target)?.clean()?;
    bacula.check_host_state(&before)
}

/// The path of the guest that a line is about.
fn named_in(line: &str, guest: &Manifest) -> Option<PathBuf> {
    let names = guest.entries.keys().filter(|name| {
        let shown = format!("/{}", name.display());
        let ends = |rest: &str| !rest.starts_with(|c: char| c == '/' || c.is_alphanumeric());
        !name.as_os_str().is_empty() && line.split(&shown).skip(1).any(ends)
    });
    names.max_by_key(|name| name.as_os_str().len()).cloned()
}

/// Several jobs in one process, of which some are cancelled: the others are as if they were alone.
fn together_with_images() -> Result {
    let bed = Bed::image_with(300)?;
    let (work, target) = (
        bed.points.working_dir().display().to_string(),
        bed.target.display().to_string(),
    );
    for round in 0..if is_long() { 20 } else { 3 } {
        let what = format!("round {round}");
        std::fs::remove_dir_all(&bed.target)?;
        let outcome = bed
            .points
            .drive(&["together", &work, &bed.directive, &target])?;
        check!(
            !outcome.killed && outcome.text.ends_with("end\n"),
            "{what}: they did not come to their end:\n{}",
            outcome.text
        );
        // The part that was cut off is told too.
        let of_cancelled = |error: &&str| {
            let theirs = |n| error.contains(&format!("{target}/{n}/"));
            error.contains("cancel") || theirs(1) || theirs(3)
        };
        let errors = [outcome.of('E'), outcome.of('F')].concat();
        let cut_off = outcome.text.matches("sent, NOT COMPLETE").count();
        check!(
            cut_off == 2 && errors.iter().all(of_cancelled),
            "{what}: not the two cancels alone:\n{}",
            outcome.text
        );
        for kept in ["2", "4"] {
            bed.check_restored(&what, &bed.target.join(kept))?;
        }
        bed.check(&what)?;
    }
    Ok(())
}

/// Killed at every step with logical volumes and device-mapper.
fn kill_with_volumes() -> Result {
    let bed = Bed::volume()?;
    let mut number = 0;
    for_each(shared(of(Needs::Volumes)), |point| {
        number += 1;
        bed.kill(
            point,
            match number % 4 {
                _ if is_long() => Clearing::SweepAndJob,
                0 => Clearing::Job,
                _ => Clearing::Sweep,
            },
        )
    })?;
    let last = bed.copy_anew()?;
    check!(last.is_clean(), "the last job:\n{}", last.text);
    bed.check_target("at the end")
}

/// Every call fails, with logical volumes and device-mapper.
fn faults_with_volumes() -> Result {
    let bed = Bed::volume()?;
    let failing = of(Needs::Volumes).filter(|point| point.fault() != Fault::Border);
    for_each(shared(failing), |point| bed.fail(point, libc::EIO))?;
    bed.fail(Point::JournalIntend, libc::ENOSPC)?;
    let next = bed.copy()?;
    check!(next.is_clean(), "the next job:\n{}", next.text);
    Ok(())
}

/// A job with several guests: LVM is asked three times, one `lvcreate` per disk, one `lvremove` per guest, and what is in two
/// groups is taken at the same time.
fn few_commands() -> Result {
    const CLIENT_FILE: &str = r#"
        [guest.two]
        disks = ["vg0/two-a", "vg0/two-b"]
        "#;
    let dir = WorkDir::new()?;
    let groups = [
        HostVg::on_scratch_disk("vg0", 0)?,
        HostVg::on_scratch_disk("vg1", 1)?,
    ];
    for (vg, lv) in [
        (0, "two-a"),
        (0, "two-b"),
        (0, "domu-one"),
        (1, "domu-other"),
    ] {
        Fs::Ext4.make(&groups[vg].lv(lv, "32m")?.display().to_string(), lv, &[])?;
    }
    let points = Points::new(CLIENT_FILE)?;
    let calls = points.path().join("calls");
    let log = |program: &str| format!("echo {program} $* >> '{}'", calls.display());
    for program in ["lvs", "vgs", "lvremove", "lvextend", "lvmconfig"] {
        let script = format!("{}; exec /usr/sbin/{program} \"$@\"", log(program));
        points.stand_in(program, Some(&script))?;
    }
    // Waits until a snapshot in the other group is being taken too.
    let script = format!(
        "{}; case \"$*\" in *vg1/*) me=vg1 other=vg0;; *) me=vg0 other=vg1;; esac
        cd '{}'; touch in-$me
        n=0; while [ ! -e in-$other ]; do n=$((n+1)); [ $n -lt 300 ] || exit 9; sleep 0.1; done
        exec /usr/sbin/lvcreate \"$@\"",
        log("lvcreate"),
        dir.path().display()
    );
    points.stand_in("lvcreate", Some(&script))?;
    let before = HostState::capture(None)?;
    let work = points.working_dir().display().to_string();
    let line = "guest=two lv=vg0/domu-* lv=vg1/domu-*";
    let outcome = points.drive(&["backup", &work, line])?;
    check!(outcome.is_clean(), "{}", outcome.text);
    let left = HostState::settled_diff(&before, &Scope::default())?;
    check!(left.is_empty(), "left:\n  {}", left.join("\n  "));
    let calls = std::fs::read_to_string(&calls)?;
    println!("{calls}");
    let count = |program: &str| {
        let of = |line: &&str| line.split(' ').next() == Some(program);
        calls.lines().filter(of).count()
    };
    for (program, wanted) in [
        // For what was left before, for the choice of guests, and for the snapshots.
        ("lvs", 3),
        ("vgs", 0),
        ("lvcreate", 4),
        ("lvremove", 3),
        ("lvextend", 0),
        ("lvmconfig", 0),
    ] {
        let seen = count(program);
        check!(
            seen == wanted,
            "{program} ran {seen} times, not {wanted}:\n{calls}"
        );
    }
    Ok(())
}

/// LVM's programs fail in every way that programs do.
fn commands() -> Result {
    let bed = Bed::volume()?;
    // The action, and whether the job can be OK all the same.
    let ways = [
        ("lvs", "echo no such thing >&2; exit 5", Fault::Error),
        ("lvs", "echo '{\"report\": 7'", Fault::Error),
        ("lvs", "kill -9 $$", Fault::Error),
        ("lvs", "exit 0", Fault::Error),
        ("lvcreate", "echo no space left >&2; exit 5", Fault::Error),
        ("lvcreate", "kill -9 $$", Fault::Error),
        (
            "lvcreate",
            "/usr/sbin/lvcreate \"$@\"; exit 5",
            Fault::Error,
        ),
        (
            "lvcreate",
            "/usr/sbin/lvcreate \"$@\"; kill -9 $$",
            Fault::Error,
        ),
        // Says that it did, and did not.
        ("lvcreate", "exit 0", Fault::Error),
        ("lvremove", "echo no >&2; exit 5", Fault::Error),
        ("lvremove", "kill -9 $$", Fault::Error),
        (
            "lvremove",
            "/usr/sbin/lvremove \"$@\"; exit 5",
            Fault::Error,
        ),
        ("lvremove", "exit 0", Fault::Error),
    ];
    let mut problems = Vec::new();
    for (program, script, fault) in shared(ways.into_iter()) {
        let what = format!("{program}: {script}");
        println!("{what}");
        let run = || -> Result {
            bed.points.stand_in(program, Some(script))?;
            let outcome = bed.copy();
            bed.points.stand_in(program, None)?;
            let outcome = outcome?;
            judge(&what, fault, &outcome)?;
            if program == "lvremove" {
                check!(
                    outcome.text.contains("GS-307") && outcome.text.contains("lvremove"),
                    "{what}:\n{}",
                    outcome.text
                );
                let swept = bed.sweep()?;
                check!(swept.is_clean(), "{what}: sweep:\n{}", swept.text);
            } else {
                let told = outcome.text.contains(program) || outcome.text.contains("GS-304");
                check!(told, "{what}:\n{}", outcome.text);
            }
            bed.check(&what)
        };
        problems.extend(run().err().map(|e| message(&e)));
    }
    check!(problems.is_empty(), "{}", problems.join("\n\n"));
    let next = bed.copy()?;
    check!(next.is_clean(), "the next job:\n{}", next.text);
    Ok(())
}

/// The library that is shipped has no points.
fn shipped_library_has_none() -> Result {
    let shipped = std::fs::read(crate::plugin_so()?)?;
    let with = std::fs::read(crate::points::built()?.plugin)?;
    let has = |library: &[u8]| {
        let name = b"GUESTSNAP_POINTS";
        library.windows(name.len()).any(|w| w == name)
    };
    check!(has(&with), "the name is not found where it is");
    check!(!has(&shipped), "the shipped library was built for tests");
    Ok(())
}

/// A thin pool fills up while a job has snapshots in it: the job gives them up and goes on with what is elsewhere, and
/// the guests go on writing.
fn pool_full() -> Result {
    let dir = WorkDir::new()?;
    let vg = HostVg::on_scratch("vg0")?;
    vg.thin_pool("pool", "64m")?;
    lvm("lvchange", &["--errorwhenfull", "y", "vg0/pool"])?;
    for (name, thin) in [("web1", true), ("web2", true), ("web3", false)] {
        let lv = match thin {
            true => vg.thin_lv("pool", name, "100m")?,
            false => vg.lv(name, "64m")?,
        };
        let disk = GuestDisk::create(&lv, Table::Mbr, &[Part::fs(24 * MIB, Fs::Ext4, "root")])?;
        let mounted = disk.mount(1, &dir.join("mnt"))?;
        cmd::sh(&format!(
            "cd '{}'; mkdir etc; echo x > etc/passwd; head -c 8M /dev/urandom > large",
            mounted.path().display()
        ))?;
        mounted.close()?;
    }
    let ours = || -> Result<usize> {
        let names = vg.names()?;
        let ours = names.iter().filter(|n| n.contains("guestsnap"));
        // The area of a thick snapshot has a name of its own.
        Ok(ours.filter(|n| !n.starts_with('[')).count())
    };
    let used = || -> Result<f64> {
        let out = lvm("lvs", &["--noheadings", "-o", "data_percent", "vg0/pool"])?;
        Ok(out.trim().parse()?)
    };
    let write = |mib: u32| {
        cmd::sh(&format!(
            "dd if=/dev/zero of=/dev/vg0/web1 bs=1M count={mib} oflag=direct conv=notrunc status=none"
        ))
    };
    let points = Points::new("")?;
    let work = points.working_dir().display().to_string();
    let limit = std::time::Duration::from_secs(60);
    points.act(Point::FirstFile, "hang")?;
    let outcome = std::thread::scope(|scope| {
        let job = scope.spawn(|| {
            points
                .drive(&["backup", &work, "lv=vg0/web*"])
                .map_err(|e| message(&e))
        });
        let steps = || -> Result {
            points.wait_acted(limit)?;
            check!(ours()? == 3, "{:?}", vg.names()?);
            let before = used()?;
            // Writes take new blocks now: those that are there belong to the snapshot too.
            let mib = ((96.5 - before) * 0.64).ceil() as u32;
            write(mib)?;
            println!("{before} % used, {} % after {mib} MiB more", used()?);
            check!((95.0..100.0).contains(&used()?), "{} % used", used()?);
            // The monitor looks each second.
            std::thread::sleep(std::time::Duration::from_secs(3));
            points.act(Point::LastFile, "hang")?;
            points.wait_acted(limit)?;
            // The job is in the last guest.
            check!(ours()? == 1, "{:?}", vg.names()?);
            check!((0.0..95.0).contains(&used()?), "{} % used", used()?);
            // More than the pool had room for.
            write(mib + 6)?;
            Ok(())
        };
        let done = steps();
        points.clear()?;
        let outcome = job.join().map_err(|_| "a panic")??;
        println!("{}", outcome.text);
        done.map(|()| outcome)
    })?;
    gave_up(&outcome)?;
    check!(ours()? == 0, "{:?}", vg.names()?);
    Ok(())
}

/// Checks the report of a job that gave up its snapshots in a pool.
fn gave_up(outcome: &Outcome) -> Result {
    let (errors, fatal) = (outcome.of('E').join("\n"), outcome.of('F').join("\n"));
    for (text, wanted) in [
        (&errors, "web1: ERROR GS-312"),
        (&errors, "thin pool vg0/pool is 9"),
        (&errors, "Only a part of web1 is in this backup."),
        (&errors, "web2: ERROR GS-312"),
        (&errors, "Nothing of web2 is in this backup."),
        (&errors, "give_up_pool_at"),
        (&fatal, "GS-312"),
        (&fatal, "web1"),
    ] {
        check!(text.contains(wanted), "no {wanted:?} in\n{text}");
    }
    check!(!errors.contains("web3"), "{errors}");
    let infos = outcome.of('I').join("\n");
    check!(!infos.contains("web3: 0 files"), "{infos}");
    Ok(())
}
