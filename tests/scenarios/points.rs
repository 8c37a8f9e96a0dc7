//! Killed at every step, failing at every call: afterwards the host is as before, the result was true, and the next job
//! works. The steps are the points of `src/point.rs`; a point that is never reached fails the test.

use crate::support::guestdisk::{Fs, GuestDisk, MIB, Mounted, Part, Table, image};
use crate::support::hoststate::{HostState, Scope};
use crate::support::inside::{self, Scenario, scenario};
use crate::support::lvm::HostVg;
use crate::support::points::{Outcome, Points};
use crate::support::tree::{Ignore, Manifest};
use crate::support::workdir::WorkDir;
use crate::support::{Result, cmd, message};
use crate::{check, fail};
use guestsnap::point::{Fault, Needs, Phase, Point};
use std::path::{Path, PathBuf};

pub const ALL: &[Scenario] = &[
    scenario("points_kill", kill_with_volumes)
        .seconds(900)
        .only("bookworm"),
    scenario("points_faults", faults_with_volumes)
        .seconds(900)
        .only("trixie"),
    scenario("points_commands", commands)
        .seconds(900)
        .only("trixie"),
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

/// A guest, and jobs that save and restore it.
struct Bed {
    points: Points,
    directive: String,
    /// What is restored.
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

    /// The same with more small files in the guest.
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

    /// On a logical volume.
    fn volume() -> Result<Self> {
        let dir = WorkDir::new()?;
        let vg = HostVg::on_scratch("vg0")?;
        let lv = vg.lv("web", "64m")?;
        let disk = GuestDisk::create(&lv, Table::Mbr, &[Part::fs(56 * MIB, Fs::Ext4, "root")])?;
        Bed::new(dir, &disk, 0, "lv=vg0/web".to_owned(), "", None, Some(vg))
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

    /// As [`Self::copy`], into an empty folder.
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

    /// Killed at this point; the sweep clears up; the next job works.
    fn kill(&self, point: Point) -> Result {
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
        if self._vg.is_some() && !is_long() && point.phase() != Phase::Sweep {
            // The next job sweeps first.
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
        Point::Lvremove | Point::JournalRemove | Point::JournalRecord | Point::CommandStart
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

fn of(needs: Needs) -> impl Iterator<Item = Point> {
    let all = Point::ALL.iter().copied();
    all.filter(move |point| point.needs() == needs)
}

/// Machines are slow: each takes every other one, in the long version all.
fn shared<T>(all: impl Iterator<Item = T>) -> impl Iterator<Item = T> {
    let odd = usize::from(inside::suite() == "trixie");
    let mine = move |(n, _): &(usize, T)| is_long() || n % 2 == odd;
    all.enumerate().filter(mine).map(|(_, one)| one)
}

/// Killed at every step of a backup, a restore and a sweep of guests in image files.
pub fn kill_with_images() -> Result {
    let bed = Bed::image()?;
    for_each(of(Needs::Image), |point| {
        bed.kill(point)?;
        match point.phase() {
            Phase::Restore => bed.check_target(point.name()),
            _ => Ok(()),
        }
    })?;
    bed.check_target("at the end")
}

/// Every call fails, with images.
pub fn faults_with_images() -> Result {
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
    // What a full disk hits.
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

/// Several jobs in one process, of which some are cancelled: the others are as if they were alone.
pub fn together_with_images() -> Result {
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
        // What was cut off is told too.
        let of_cancelled = |error: &&str| {
            let theirs = |n| error.contains(&format!("{target}/{n}/"));
            error.contains("cancel") || theirs(1) || theirs(3)
        };
        let errors = [outcome.of('E'), outcome.of('F')].concat();
        let cut_off = outcome.text.matches("NOT COMPLETE").count();
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
    for_each(shared(of(Needs::Volumes)), |point| bed.kill(point))?;
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

/// LVM's programs fail in every way that programs do.
fn commands() -> Result {
    let bed = Bed::volume()?;
    // What it does, and whether the job can be OK all the same.
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
pub fn shipped_library_has_none() -> Result {
    let shipped = std::fs::read(crate::support::plugin_so()?)?;
    let with = std::fs::read(crate::support::points::built()?.plugin)?;
    let has = |library: &[u8]| {
        let name = b"GUESTSNAP_POINTS";
        library.windows(name.len()).any(|w| w == name)
    };
    check!(has(&with), "the name is not found where it is");
    check!(!has(&shipped), "the shipped library was built for tests");
    Ok(())
}
