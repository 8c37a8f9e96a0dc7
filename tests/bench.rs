//! `make bench`: how fast a backup through the plugin is, beside Bacula's own walk over a mount of the same snapshot,
//! beside tar, and beside the ceiling: a plugin that sends the same from memory. No test: nothing fails for being slow.
//!
//! All sides run in the same run, one after the other, round by round, on the same tree. Each round every side gets a
//! fresh copy (reflink) of the image, so that each finds the guest's files equally cold, and the image itself in memory
//! or on the disk, as the benchmark says.
//!
//! The clock: the Director counts whole seconds, so two things are used that both sides go through alike. It starts when
//! the File Daemon runs the job's `Before` script, and stops with the last byte on the volume (the volume file's time):
//! the session's end label, which the Storage Daemon writes when the File Daemon has sent everything and the plugin has
//! released its snapshot. Taking and releasing the snapshot are in the plugin's time; making and mounting the copy is
//! *not* in the rivals'. Attributes are spooled, so that the catalog is not written meanwhile.

use guestsnap::guest::DiskSource;
use guestsnap::hostdev::lvname::LvName;
use guestsnap::snapshot;
use guestsnap_bed::bacula::{Bacula, BaculaOptions, JobResult};
use guestsnap_bed::guestdisk::{Fs, GuestDisk, Loop, MIB, Mounted, Part, Table, image};
use guestsnap_bed::inside::{is_inside, say, suite};
use guestsnap_bed::lvm::HostVg;
use guestsnap_bed::populate::bytes;
use guestsnap_bed::scenarios::snapshot::take_all;
use guestsnap_bed::workdir::{self, WorkDir};
use guestsnap_bed::{Result, check, cmd, fail, message, plugin_so, vm};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Length of our record of an ordinary file, for the ceiling that sends one too.
const RECORD: u32 = 112;

fn main() -> ExitCode {
    let mut names: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match names.first().map(String::as_str) {
        Some("--bed-bench") => inside(&names.split_off(1)),
        _ => outside(&names),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            say(&format!("bench: FAILED: {}", message(&e)));
            ExitCode::FAILURE
        }
    }
}

fn outside(names: &[String]) -> Result {
    check!(
        rustix::process::geteuid().is_root(),
        "the benchmarks need root"
    );
    workdir::sweep()?;
    for name in names {
        println!("\n=== {name} (load {})", load()?);
        match name.as_str() {
            "small" => small(false)?,
            "md5" => small(true)?,
            "large" => large()?,
            "mixed" => mixed()?,
            "unchanged" => unchanged(Ground::Here)?,
            "slow" => slow()?,
            "slow-unchanged" => unchanged(Ground::Slow)?,
            "memory" => memory()?,
            "vm" => emulated(&["cold", "setup", "origin"])?,
            "cold" | "setup" | "origin" => emulated(&[name])?,
            other => fail!("{other}: no such benchmark"),
        }
    }
    Ok(())
}

fn number(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => Ok(text.parse().map_err(|e| format!("{name}={text}: {e}"))?),
        Err(_) => Ok(default),
    }
}

fn load() -> Result<String> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    Ok(text.split(' ').take(3).collect::<Vec<_>>().join(" "))
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

/// The clock of jobs: a script that the File Daemon runs before a job, and the time of the volume's last byte.
struct Clock {
    begun: PathBuf,
    script: PathBuf,
}

impl Clock {
    fn new(dir: &WorkDir) -> Result<Self> {
        let (begun, script) = (dir.join("begun"), dir.join("mark"));
        let text = format!("#!/bin/sh\ndate +%s.%N > {}\n", begun.display());
        std::fs::write(&script, text)?;
        cmd::run("chmod", ["755", &script.display().to_string()])?;
        Ok(Self { begun, script })
    }

    /// For the Director's job.
    fn job_conf(&self) -> String {
        format!(
            "Spool Attributes = yes\n  RunScript {{ RunsWhen = Before; RunsOnClient = yes; RunsOnSuccess = yes; \
             RunsOnFailure = yes; Command = \"{}\" }}",
            self.script.display()
        )
    }

    /// How long the last job took. Its volume is removed.
    fn seconds(&self, bacula: &Bacula) -> Result<f64> {
        let text = std::fs::read_to_string(&self.begun)?;
        let begun: f64 = text.trim().parse().map_err(|e| format!("{text:?}: {e}"))?;
        let mut ended = 0.0_f64;
        for volume in std::fs::read_dir(bacula.path().join("volumes"))?.flatten() {
            let meta = volume.metadata()?;
            ended = ended.max(meta.mtime() as f64 + meta.mtime_nsec() as f64 / 1e9);
            std::fs::remove_file(volume.path())?;
        }
        Ok(ended - begun)
    }
}

// ---- the sides ----

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Plugin,
    FileRo,
    FileRw,
    FileRoAcl,
    Ceiling,
    CeilingRecord,
    Tar,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Side::Plugin => "plugin",
            Side::FileRo => "File=, mounted ro",
            Side::FileRw => "File=, mounted rw",
            Side::FileRoAcl => "File=, mounted ro, ACLs and xattrs",
            Side::Ceiling => "ceiling",
            Side::CeilingRecord => "ceiling with our record",
            Side::Tar => "tar | cat >/dev/null",
        }
    }

    fn fileset(self) -> &'static str {
        match self {
            Side::Plugin => "plugin",
            Side::FileRoAcl => "file-acl",
            Side::Ceiling => "ceiling",
            Side::CeilingRecord => "ceiling-record",
            _ => "file",
        }
    }
}

/// Result of a run of one side.
#[derive(Debug, Clone, Copy, Default)]
struct Outcome {
    seconds: f64,
    files: u64,
    bytes: u64,
    /// How far the File Daemon's resident memory went above what it was before, in KiB.
    grown: u64,
    /// Processor time of the File Daemon.
    cpu: f64,
    /// The part that its own threads took, without those that read ahead.
    own: f64,
}

/// A disk whose reads take milliseconds each, any number of them at once (`bench/slow.c`).
struct SlowDisk {
    mounted: PathBuf,
}

impl SlowDisk {
    /// Over a file that exists.
    fn over(file: &Path, milliseconds: u32, dir: &WorkDir) -> Result<Self> {
        let program = dir.join("slow-disk");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench/slow.c");
        cmd::sh(&format!(
            "flags=$(pkg-config --cflags --libs fuse3) || {{ echo 'install libfuse3-dev' >&2; exit 1; }}\n\
             cc -O2 -Wall -Werror '{}' -o '{}' $flags",
            source.display(),
            program.display()
        ))?;
        let mounted = dir.join("slow");
        std::fs::create_dir(&mounted)?;
        let names = [file, &mounted].map(|p| p.display().to_string());
        let [file, point] = &names;
        cmd::run(
            &program.display().to_string(),
            [&milliseconds.to_string(), file, point],
        )?;
        Ok(Self { mounted })
    }

    fn device(&self) -> PathBuf {
        self.mounted.join("disk")
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        if let Err(e) = cmd::run("umount", [&self.mounted]) {
            say(&format!("slow disk: {}", message(&e)));
        }
    }
}

/// Storage of the guest's disk.
#[derive(Clone, Copy, PartialEq)]
enum Ground {
    /// Where temporary files are.
    Here,
    /// A disk that takes 5 ms for every read.
    Slow,
}

/// A guest in an image file on a filesystem with reflinks, and a Bacula.
struct Arena {
    bacula: Bacula,
    clock: Clock,
    store: Mounted,
    disk: GuestDisk,
    _slow: Option<SlowDisk>,
    /// The File Daemon, which has a mount namespace of its own, sees mounts in here too.
    _shared: Mounted,
    dir: WorkDir,
}

impl Arena {
    fn new(
        ground: Ground,
        size: u64,
        inode_ratio: &str,
        signature: bool,
        fill: impl FnOnce(&Path) -> Result,
    ) -> Result<Self> {
        let dir = WorkDir::new()?;
        let file = dir.join("store.img");
        image(&file, size + (1 << 30))?;
        let store = GuestDisk::create(&file, Table::Whole, &[Part::fs(size, Fs::Xfs, "store")])?;
        let (slow, volume) = match ground {
            Ground::Here => (None, store.volume(1)?),
            Ground::Slow => {
                let slow = SlowDisk::over(&file, 5, &dir)?;
                let volume = Loop::attach_direct(&slow.device())?;
                (Some(slow), volume)
            }
        };
        let store = Mounted::new(volume, Fs::Xfs, &dir.join("store"))?;
        let path = store.path().join("web.img");
        image(&path, size)?;
        let disk = GuestDisk::create(&path, Table::Whole, &[Part::fs(size, Fs::Ext4, "root")])?;
        Fs::Ext4.make(disk.volume(1)?.device(), "root", &["-i", inode_ratio])?;
        let shared = Mounted::shared(&dir.join("shared"))?;
        let mounted = disk.mount(1, &dir.join("shared/mnt"))?;
        fill(mounted.path())?;
        std::fs::write(dir.join("list"), list(mounted.path())?)?;
        mounted.close()?;
        cmd::sh("sync")?;
        let clock = Clock::new(&dir)?;
        let bacula = Self::bacula(&dir, &store, &clock, signature)?;
        bacula.run_backup("Empty", "Full")?.clean()?;
        Ok(Self {
            bacula,
            clock,
            store,
            disk,
            _slow: slow,
            _shared: shared,
            dir,
        })
    }

    fn bacula(dir: &WorkDir, store: &Mounted, clock: &Clock, signature: bool) -> Result<Bacula> {
        let ceiling = dir.join("ceiling.so");
        ceiling_so(&ceiling)?;
        let signature = if signature { "signature = MD5;" } else { "" };
        let include = |options: &str, what: &str| {
            format!("Include {{\n Options {{ {signature} {options} }}\n {what}\n }}")
        };
        let mount = dir.join("shared/mnt");
        let list = dir.join("list");
        let filesets = [
            (
                "plugin",
                include(
                    "",
                    &format!(
                        "Plugin = \"guestsnap: image={}/web.img\"",
                        store.path().display()
                    ),
                ),
            ),
            (
                "file",
                include("", &format!("File = \"{}\"", mount.display())),
            ),
            (
                "file-acl",
                include(
                    "aclsupport = yes; xattrsupport = yes",
                    &format!("File = \"{}\"", mount.display()),
                ),
            ),
            (
                "ceiling",
                include("", &format!("Plugin = \"ceiling: 0 {}\"", list.display())),
            ),
            (
                "ceiling-record",
                include(
                    "",
                    &format!("Plugin = \"ceiling: {RECORD} {}\"", list.display()),
                ),
            ),
        ];
        // Such as `readers = 2`.
        let limits = std::env::var("BENCH_LIMITS").unwrap_or_default();
        Bacula::start(BaculaOptions {
            plugin_so: Some(plugin_so()?),
            more_plugins: vec![(ceiling, "ceiling-fd.so".into())],
            filesets: filesets.map(|(name, text)| (name.to_owned(), text)).into(),
            client_file: Some(format!(
                "allow = [\"{}/*\"]\n[limits]\n{limits}\n",
                store.path().display()
            )),
            job_conf: clock.job_conf(),
            ..BaculaOptions::default()
        })
    }

    /// Mounts a copy of the guest's filesystem.
    fn copy(&self, read_only: bool) -> Result<(Mounted, PathBuf)> {
        let copy = self.store.path().join("copy.img");
        cmd::run(
            "cp",
            [
                "--reflink=always",
                &self.disk.path.display().to_string(),
                &copy.display().to_string(),
            ],
        )?;
        let mounted = Mounted::new(
            Loop::attach_direct(&copy)?,
            Fs::Ext4,
            &self.dir.join("shared/mnt"),
        )?;
        if read_only {
            cmd::run(
                "mount",
                ["-o", "remount,ro", &mounted.path().display().to_string()],
            )?;
        }
        Ok((mounted, copy))
    }

    fn run(&self, side: Side, level: &str, cold: bool) -> Result<Outcome> {
        let copy = match side {
            Side::FileRo | Side::FileRoAcl | Side::Tar => Some(self.copy(true)?),
            Side::FileRw => Some(self.copy(false)?),
            _ => None,
        };
        // Earlier writes must not be written back meanwhile.
        cmd::sh("sync")?;
        if cold {
            std::fs::write("/proc/sys/vm/drop_caches", "3")?;
        }
        let outcome = if side == Side::Tar {
            let mount = self.dir.join("shared/mnt");
            let begun = Instant::now();
            cmd::sh(&format!(
                "tar -C '{}' -cf - . | cat > /dev/null",
                mount.display()
            ))?;
            Outcome {
                seconds: begun.elapsed().as_secs_f64(),
                ..Outcome::default()
            }
        } else {
            self.job(side, level)?
        };
        if let Some((mounted, copy)) = copy {
            mounted.close()?;
            std::fs::remove_file(copy)?;
        }
        Ok(outcome)
    }

    fn job(&self, side: Side, level: &str) -> Result<Outcome> {
        let pid = self.bacula.fd_pid().ok_or("no File Daemon")?;
        let idle = resident(pid)?;
        let cpu = cpu_time(pid)?;
        let peak = AtomicU64::new(idle);
        let ahead = AtomicU64::new(0);
        let over = AtomicBool::new(false);
        let job: Result<JobResult> = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    peak.fetch_max(resident(pid).unwrap_or(0), Ordering::Relaxed);
                    ahead.fetch_max(cpu_ahead(pid).unwrap_or(0), Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(20));
                }
            });
            let job = self.bacula.run_backup(side.fileset(), level);
            over.store(true, Ordering::Relaxed);
            job
        });
        let job = job?;
        let seconds = self.clock.seconds(&self.bacula)?;
        check!(
            job.files > 1 || level != "Full",
            "nothing was saved:\n{}",
            job.log
        );
        check!(
            matches!(job.status, 'T' | 'W'),
            "status {}:\n{}",
            job.status,
            job.log
        );
        if std::env::var_os("BED_OUTPUT").is_some() {
            println!("{}", job.log);
        }
        let cpu = cpu_time(pid)? - cpu;
        Ok(Outcome {
            seconds,
            files: job.files,
            bytes: job.bytes,
            grown: peak.into_inner().saturating_sub(idle),
            cpu,
            own: cpu - ahead.into_inner() as f64 / 1e9,
        })
    }

    /// All sides, round by round, and a table of what they took.
    fn compare(&self, sides: &[Side], level: &str, cold: bool) -> Result {
        let wanted = std::env::var("BENCH_SIDES").unwrap_or_default();
        let sides: Vec<Side> = sides
            .iter()
            .copied()
            .filter(|s| {
                wanted.is_empty()
                    || wanted
                        .split(',')
                        .any(|w| s.fileset() == w || format!("{s:?}") == w)
            })
            .collect();
        let mut results: BTreeMap<Side, Vec<Outcome>> = BTreeMap::new();
        for round in 0..number("BENCH_ROUNDS", 3)? as usize {
            for at in 0..sides.len() {
                // Each side is first in some round.
                let side = sides[(at + round) % sides.len()];
                let outcome = self.run(side, level, cold)?;
                say(&format!(
                    "  round {} {:38} {:8.2} s  {:5.2} s of the daemon's CPU, {:5.2} s without reading ahead  {} files, {:.1} MB, +{} KiB, load {}",
                    round + 1,
                    side.name(),
                    outcome.seconds,
                    outcome.cpu,
                    outcome.own,
                    outcome.files,
                    outcome.bytes as f64 / 1e6,
                    outcome.grown,
                    load()?,
                ));
                results.entry(side).or_default().push(outcome);
            }
        }
        let middle = |side: Side, of: fn(&Outcome) -> f64| {
            let mut all: Vec<f64> = results.get(&side)?.iter().map(of).collect();
            Some(median(&mut all))
        };
        let ours = middle(Side::Plugin, |o| o.seconds).unwrap_or(f64::NAN);
        let mut table = String::new();
        for (&side, all) in &results {
            let time = middle(side, |o| o.seconds).unwrap_or(f64::NAN);
            let own = middle(side, |o| o.own).unwrap_or(f64::NAN);
            let files = all.iter().map(|o| o.files).max().unwrap_or(0);
            let rate = match files {
                0 => String::new(),
                files => format!("{:.0} files/s", files as f64 / time),
            };
            let _ = writeln!(
                table,
                "| {:38} | {time:8.2} s | {:6.2} | {own:6.2} s | {rate} |",
                side.name(),
                time / ours
            );
        }
        say(&format!(
            "| side | median | time / plugin's time | the daemon's CPU without reading ahead | |\n{table}"
        ));
        Ok(())
    }
}

fn resident(pid: i32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    Ok(line
        .and_then(|l| l.split_whitespace().next()?.parse().ok())
        .ok_or("no VmRSS")?)
}

/// Processor time of a process, in seconds.
fn cpu_time(pid: i32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat[stat.rfind(')').ok_or("no name")? + 2..]
        .split(' ')
        .collect();
    let ticks: u64 = [fields[11], fields[12]]
        .iter()
        .filter_map(|f| f.parse::<u64>().ok())
        .sum();
    Ok(ticks as f64 / 100.0)
}

/// Processor time of the threads that walk and read ahead, in nanoseconds.
fn cpu_ahead(pid: i32) -> Result<u64> {
    let mut sum = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let read = |name: &str| std::fs::read_to_string(task.path().join(name));
        // One that has ended meanwhile says nothing more.
        let (Ok(name), Ok(times)) = (read("comm"), read("schedstat")) else {
            continue;
        };
        if matches!(name.trim_end(), "guestsnap-read" | "guestsnap-walk") {
            let time = times.split(' ').next().and_then(|t| t.parse::<u64>().ok());
            sum += time.ok_or("schedstat without a time")?;
        }
    }
    Ok(sum)
}

/// The objects of a tree for the ceiling, each directory behind its content.
fn list(root: &Path) -> Result<String> {
    let out = cmd::run(
        "find",
        [
            &root.display().to_string(),
            "-depth",
            "-printf",
            "%y %s %P\\n",
        ],
    )?;
    let mut text = String::new();
    for line in out.lines() {
        let mut words = line.splitn(3, ' ');
        let (Some(kind), Some(size), Some(name)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        let slash = if kind == "d" { "/" } else { "" };
        if matches!(kind, "f" | "d" | "l") && !(kind == "d" && name.is_empty()) {
            let _ = writeln!(text, "{kind} {size} /@guestsnap/web/{name}{slash}");
        }
    }
    Ok(text)
}

fn ceiling_so(to: &Path) -> Result {
    let abi = match Bacula::version()?.split('.').next() {
        Some("9") => 14,
        Some("11") => 21,
        Some("13") => 22,
        _ => 23,
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let source = root.join("tests/bench/ceiling.c");
    let mut command = Command::new("cc");
    command
        .args([
            "-O2",
            "-Wall",
            "-shared",
            "-fPIC",
            &format!("-DGUESTSNAP_ABI={abi}"),
            "-I",
        ])
        .arg(root.join("include"))
        .arg(source)
        .arg("-o")
        .arg(to);
    cmd::output(command, None)?;
    Ok(())
}

// ---- on this machine ----

/// Directories of 1000 files each, 0 to 4 KiB.
fn small_files(root: &Path, count: u64) -> Result {
    let noise = bytes(1, 8192);
    for n in 0..count {
        let dir = root.join(format!("many/{:03}", n / 1000));
        if n % 1000 == 0 {
            std::fs::create_dir_all(&dir)?;
        }
        let length = (n * 37 % 4096) as usize;
        let from = (n * 11 % 4096) as usize;
        std::fs::write(
            dir.join(format!("file-{n:06}")),
            &noise[from..from + length],
        )?;
    }
    Ok(())
}

/// Writes all small files anew in an order of chance, so that their places on the disk are in that order too.
fn age(root: &Path, count: u64) -> Result {
    for n in 0..count {
        // 7919 is a prime and no divisor of the number of files.
        let n = n * 7919 % count;
        let path = root.join(format!("many/{:03}/file-{n:06}", n / 1000));
        let content = std::fs::read(&path)?;
        let file = File::create(&path)?;
        file.write_all_at(&content, 0)?;
        file.sync_data()?;
    }
    Ok(())
}

/// Room for small files, and then some.
fn room(files: u64) -> u64 {
    (files * 6144 + 512 * MIB).next_multiple_of(MIB)
}

fn small(signature: bool) -> Result {
    let files = number("BENCH_FILES", 200_000)?;
    let arena = Arena::new(Ground::Here, room(files), "4096", signature, |root| {
        small_files(root, files)
    })?;
    let sides = [
        Side::Plugin,
        Side::FileRo,
        Side::FileRw,
        Side::FileRoAcl,
        Side::Ceiling,
        Side::CeilingRecord,
        Side::Tar,
    ];
    arena.compare(if signature { &sides[..3] } else { &sides }, "Full", false)
}

fn large() -> Result {
    let count = number("BENCH_LARGE", 2)?;
    let arena = Arena::new(
        Ground::Here,
        (count << 30) + (1 << 30),
        "65536",
        false,
        |root| {
            let block = bytes(7, 4 << 20);
            for n in 0..count {
                let file = File::create(root.join(format!("large-{n}")))?;
                for at in 0..256 {
                    file.write_all_at(&block, at * (4 << 20))?;
                }
            }
            Ok(())
        },
    )?;
    arena.compare(
        &[
            Side::Plugin,
            Side::FileRo,
            Side::FileRw,
            Side::Ceiling,
            Side::Tar,
        ],
        "Full",
        false,
    )
}

/// Files of a Debian root, as far as this machine has them.
fn mixed() -> Result {
    let arena = Arena::new(Ground::Here, 6 << 30, "8192", false, |root| {
        let root = root.display();
        cmd::sh(&format!(
            "mkdir '{root}/usr' && cp -a /etc '{root}/' && cp -a /usr/share /usr/bin /usr/sbin '{root}/usr/'"
        ))?;
        Ok(())
    })?;
    arena.compare(
        &[
            Side::Plugin,
            Side::FileRo,
            Side::FileRw,
            Side::FileRoAcl,
            Side::Ceiling,
            Side::Tar,
        ],
        "Full",
        false,
    )
}

/// Small files on a slow disk. Both ends of the copy are the same file, so neither finds anything cached.
fn slow() -> Result {
    let files = number("BENCH_SLOW_FILES", 20_000)?;
    let arena = Arena::new(Ground::Slow, room(files), "4096", false, |root| {
        small_files(root, files)?;
        if std::env::var_os("BENCH_AGED").is_some() {
            age(root, files)?;
        }
        Ok(())
    })?;
    arena.compare(
        &[Side::Plugin, Side::FileRo, Side::FileRw, Side::Tar],
        "Full",
        true,
    )
}

/// An incremental job that finds nothing to do, from cold caches.
fn unchanged(ground: Ground) -> Result {
    let files = number("BENCH_FILES", 200_000)?;
    let arena = Arena::new(ground, room(files), "4096", false, |root| {
        small_files(root, files)
    })?;
    std::thread::sleep(Duration::from_secs(2));
    // The level counts by FileSet. What changed is asked of the time of that job: the rival's may find nothing mounted.
    for side in [Side::Plugin, Side::FileRo] {
        arena.bacula.run_backup(side.fileset(), "Full")?.clean()?;
    }
    std::thread::sleep(Duration::from_secs(2));
    arena.compare(
        &[Side::Plugin, Side::FileRo, Side::FileRw],
        "Incremental",
        true,
    )
}

/// Memory of the File Daemon for many files, a million of them in one directory.
fn memory() -> Result {
    for files in [
        number("BENCH_FILES", 200_000)?,
        number("BENCH_MANY", 1_000_000)?,
    ] {
        let arena = Arena::new(
            Ground::Here,
            files * 4500 + (1 << 30),
            "2048",
            false,
            |root| {
                let dir = root.join("one");
                std::fs::create_dir(&dir)?;
                for n in 0..files {
                    File::create(dir.join(format!("file-{n:07}")))?;
                }
                small_files(root, files / 20)
            },
        )?;
        let outcome = arena.run(Side::Plugin, "Full", false)?;
        say(&format!(
            "| {} files | {:.1} s | {:.1} MiB above the idle daemon |",
            outcome.files,
            outcome.seconds,
            outcome.grown as f64 / 1024.0
        ));
    }
    Ok(())
}

// ---- in an emulated machine, for device-mapper ----

fn emulated(names: &[&str]) -> Result {
    let suite = std::env::var("BENCH_SUITE").unwrap_or_else(|_| vm::SUITES[0].into());
    println!("in an emulated machine with Debian {suite}: slow, only the ratios count");
    let rounds = number("BENCH_ROUNDS", 3)?;
    let files = number("BENCH_COLD_FILES", 1500)?;
    let command = format!(
        "export GUESTSNAP_BED_INSIDE={suite} GUESTSNAP_SO=/bed/guestsnap-fd.so BENCH_ROUNDS={rounds} BENCH_COLD_FILES={files}\n\
         chmod 755 /bed/test\nexec /bed/test --bed-bench {}\n",
        names.join(" ")
    );
    let mut run = vm::Run::new(&suite, &command);
    run.limit = Duration::from_secs(1200);
    run.files.push((std::env::current_exe()?, "test".into()));
    run.files.push((plugin_so()?, "guestsnap-fd.so".into()));
    run.run(|line| {
        if let Ok(report) = serde_json::from_str::<serde_json::Value>(line) {
            println!("{}", report["say"].as_str().unwrap_or(line));
        }
    })
}

fn inside(names: &[String]) -> Result {
    say(&format!(
        "Debian {}, Bacula {}",
        suite(),
        Bacula::version()?
    ));
    check!(is_inside(), "--bed-bench is for the emulated machine");
    for name in names {
        say(&format!("--- {name}"));
        match name.as_str() {
            "cold" => cold()?,
            "setup" => setup()?,
            _ => origin()?,
        }
    }
    Ok(())
}

/// A mounted snapshot of the guest for the daemon's own walk.
fn rival(mount: &Path, read_only: bool) -> Result<Mounted> {
    let snapshot = "lvcreate -y -s -L 40m -c 64k -n rival vg0/domu-web";
    cmd::sh(snapshot)?;
    let mounted = Mounted::device("/dev/vg0/rival", Fs::Ext4, mount)?;
    if read_only {
        cmd::run("mount", ["-o", "remount,ro", &mount.display().to_string()])?;
    }
    Ok(mounted)
}

/// Small files on a disk that takes 5 ms for every read.
fn cold() -> Result {
    let files = number("BENCH_COLD_FILES", 1500)?;
    let vg = HostVg::on_delayed("vg0", 5)?;
    let lv = vg.lv("domu-web", "160m")?;
    let dir = WorkDir::new()?;
    let disk = GuestDisk::create(&lv, Table::Whole, &[Part::fs(160 * MIB, Fs::Ext4, "root")])?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    small_files(mounted.path(), files)?;
    mounted.close()?;
    let clock = Clock::new(&dir)?;
    let mount = dir.join("mnt");
    let include = |what: String| format!("Include {{\n Options {{ sparse = no }}\n {what}\n }}");
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![
            (
                "plugin".into(),
                include("Plugin = \"guestsnap: lv=vg0/domu-* strip=domu-\"".into()),
            ),
            (
                "file".into(),
                include(format!("File = \"{}\"", mount.display())),
            ),
        ],
        job_conf: clock.job_conf(),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let mut times: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for _ in 0..number("BENCH_ROUNDS", 3)? {
        for side in ["plugin", "file ro", "file rw"] {
            let snapshot = match side {
                "plugin" => None,
                _ => Some(rival(&mount, side == "file ro")?),
            };
            cmd::sh("sync")?;
            std::fs::write("/proc/sys/vm/drop_caches", "3")?;
            let job = bacula
                .run_backup(side.split(' ').next().unwrap_or(side), "Full")?
                .clean()?;
            let seconds = clock.seconds(&bacula)?;
            if let Some(mounted) = snapshot {
                mounted.close()?;
                cmd::run("lvremove", ["-y", "vg0/rival"])?;
            }
            say(&format!(
                "  {side:10} {:8.2} s  {} files",
                seconds, job.files
            ));
            if side == "plugin" {
                for line in job
                    .log
                    .lines()
                    .filter(|l| l.contains("released in") || l.contains("taken in"))
                {
                    say(line);
                }
            }
            times.entry(side).or_default().push(seconds);
        }
    }
    let middle: BTreeMap<&str, f64> = times.iter_mut().map(|(s, t)| (*s, median(t))).collect();
    for (side, time) in &middle {
        say(&format!(
            "| {side:10} | {time:8.2} s | {:6.2} |",
            time / middle["plugin"]
        ));
    }
    Ok(())
}

fn ok<T>(result: guestsnap::Result<T>) -> Result<T> {
    result.map_err(|e| e.report().into())
}

/// Snapshots of 1 and 8 disks: ours, and the plain commands.
fn setup() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let names: Vec<String> = (0..8).map(|n| format!("d{n}")).collect();
    for name in &names {
        vg.lv(name, "64m")?;
    }
    let dir = WorkDir::new()?;
    for count in [1, 8] {
        let names = &names[..count];
        let mut times: [Vec<f64>; 4] = Default::default();
        for _ in 0..number("BENCH_ROUNDS", 3)? {
            let begun = Instant::now();
            for name in names {
                cmd::run(
                    "lvcreate",
                    [
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
            times[0].push(begun.elapsed().as_secs_f64());
            let mut remove = vec!["-y".to_owned()];
            remove.extend(names.iter().map(|n| format!("vg0/s{n}")));
            let begun = Instant::now();
            cmd::run("lvremove", remove)?;
            times[1].push(begun.elapsed().as_secs_f64());

            let journal = Arc::new(ok(snapshot::Journal::open(&dir.join("journal"), 1))?);
            let requests: Vec<snapshot::Request> = names
                .iter()
                .map(|name| snapshot::Request {
                    origin: DiskSource::Lv(
                        LvName::new("vg0", name.as_str()).expect("the name of a volume"),
                    ),
                    kind: guestsnap::config::SnapshotKind::Auto,
                    size: guestsnap::config::Size::Bytes(16 << 20),
                    chunk: None,
                    activate: true,
                    in_container: false,
                })
                .collect();
            let begun = Instant::now();
            let taken = ok(take_all(&requests, &journal))?;
            times[2].push(begun.elapsed().as_secs_f64());
            let begun = Instant::now();
            ok(snapshot::close_all(taken))?;
            times[3].push(begun.elapsed().as_secs_f64());
        }
        let [create, remove, take, release] = times.map(|mut t| median(&mut t));
        say(&format!(
            "| {count} disks | lvcreate {create:.2} s, ours {take:.2} s: {:.2} | lvremove {remove:.2} s, ours {release:.2} s: {:.2} |",
            take / create,
            release / remove
        ));
    }
    Ok(())
}

/// Cost of a guest's writes while there is a snapshot of its disk.
fn origin() -> Result {
    let ground = HostVg::on_scratch("vg0")?;
    origin_on(&ground, "")?;
    drop(ground);
    origin_on(&HostVg::on_delayed("vg0", 5)?, ", 5 ms a read")
}

fn origin_on(vg: &HostVg, ground: &str) -> Result {
    let lv = vg.lv("disk", "512m")?;
    let mut times: BTreeMap<(&str, &str), Vec<f64>> = BTreeMap::new();
    for _ in 0..number("BENCH_ROUNDS", 3)? {
        for chunk in ["none", "4k", "64k"] {
            if chunk != "none" {
                cmd::run(
                    "lvcreate",
                    [
                        "-y", "-s", "-L", "400m", "-c", chunk, "-n", "snap", "vg0/disk",
                    ],
                )?;
            }
            let file = File::options()
                .write(true)
                .custom_flags(libc_o_dsync())
                .open(&lv)?;
            let block = bytes(3, 1 << 20);
            for (kind, writes, length, span) in [
                ("random 4 KiB", 400, 4096, 400 * MIB),
                ("sequential 1 MiB", 64, 1 << 20, 64 * MIB),
            ] {
                let mut at = 12_345_u64;
                let begun = Instant::now();
                for n in 0..writes {
                    at = at
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    // The sequential writes go behind the random ones.
                    let place = match kind {
                        "random 4 KiB" => (at >> 20) % (span / 4096) * 4096,
                        _ => 420 * MIB + n * (1 << 20),
                    };
                    file.write_all_at(&block[..length], place)?;
                }
                times
                    .entry((kind, chunk))
                    .or_default()
                    .push(begun.elapsed().as_secs_f64());
            }
            drop(file);
            if chunk != "none" {
                cmd::run("lvremove", ["-y", "vg0/snap"])?;
            }
        }
    }
    let middle: BTreeMap<_, f64> = times.iter_mut().map(|(k, t)| (*k, median(t))).collect();
    for ((kind, chunk), time) in &middle {
        say(&format!(
            "| {kind}{ground} | chunk {chunk} | {time:.2} s | {:.2} of no snapshot |",
            time / middle[&(*kind, "none")]
        ));
    }
    Ok(())
}

fn libc_o_dsync() -> i32 {
    rustix::fs::OFlags::DSYNC.bits() as i32
}
