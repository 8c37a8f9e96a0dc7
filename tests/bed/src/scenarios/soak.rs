//! Many jobs: nothing grows, and the host hears nothing of it.

use super::points::reflink_store;
use crate::bacula::{Bacula, BaculaOptions, fileset_plugin};
use crate::check;
use crate::guestdisk::{Content, Fs, GuestDisk, GuestLv, GuestVg, MIB, Part, Table, image};
use crate::hoststate::host_view;
use crate::inside::{self, Scenario, scenario};
use crate::lvm::HostVg;
use crate::ours::Ours;
use crate::populate::many;
use crate::workdir::WorkDir;
use crate::{Result, plugin_so};
use std::cell::Cell;
use std::fs;

/// On this machine.
pub const ROOT: &[Scenario] = &[
    scenario("root_soak", image_guests),
    scenario("root_soak_many_files", many_files),
];

/// In the emulated machines.
pub const VM: &[Scenario] = &[scenario("soak_volumes", volumes)
    .seconds(7200)
    .only("bookworm")];

/// Memory that the daemon may have more at the end, in KiB: its own pools and the allocator's, not a part of each job.
const MEMORY: u64 = 8 << 10;
/// Memory that ten times the files may take more, in KiB: 90 bytes a file.
const GROWTH: u64 = 8 << 10;
/// Jobs at the same time.
const PARALLEL: usize = 4;

/// How many jobs in a row, and how often four at a time.
fn jobs() -> (usize, usize) {
    match super::points::is_long() {
        true => (200, 50),
        false if inside::is_inside() => (4, 1),
        false => (12, 2),
    }
}

/// Resources of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Use {
    files: usize,
    threads: usize,
    memory: u64,
    loops: usize,
    devices: usize,
}

fn entries(path: &str) -> usize {
    fs::read_dir(path).map_or(0, |entries| entries.count())
}

/// A line of a process's status, in KiB.
fn memory(pid: i32, line: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let value = status.lines().find_map(|l| l.strip_prefix(line));
    let value = value.and_then(|l| l.split_whitespace().next()?.parse().ok());
    Ok(value.ok_or_else(|| format!("no {line}"))?)
}

impl Use {
    fn of(pid: i32) -> Result<Self> {
        let mapped = fs::read_dir("/sys/class/block")?
            .flatten()
            .filter(|e| e.file_name().to_string_lossy().starts_with("dm-"));
        Ok(Use {
            files: entries(&format!("/proc/{pid}/fd")),
            threads: entries(&format!("/proc/{pid}/task")),
            memory: memory(pid, "VmRSS:")?,
            loops: Ours::now()?.count(),
            devices: mapped.count(),
        })
    }
}

/// Guests in image files.
fn image_guests() -> Result {
    let dir = WorkDir::new()?;
    let store = reflink_store(&dir)?;
    let mut filesets = Vec::new();
    for n in 0..PARALLEL {
        let path = store.path().join(format!("web{n}.img"));
        image(&path, 64 * MIB)?;
        let disk = GuestDisk::create(&path, Table::Mbr, &[Part::fs(56 * MIB, Fs::Ext4, "root")])?;
        let mounted = disk.mount(1, &dir.join("mnt"))?;
        many(mounted.path(), 200, n as u64)?;
        fs::write(mounted.path().join("large"), vec![7; 3 << 20])?;
        mounted.close()?;
        filesets.push((
            format!("g{n}"),
            fileset_plugin(&format!("guestsnap: image={}", path.display())),
        ));
    }
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets,
        client_file: Some(format!("allow = [\"{}/*\"]\n", store.path().display())),
        ..BaculaOptions::default()
    })?;
    many_jobs(&bacula, &|| Ok(()))?;
    drop(bacula);
    store.close()
}

/// Memory does not grow with the number of files: ten times as many take the daemon no more.
fn many_files() -> Result {
    const FEW: u32 = 10_000;
    let dir = WorkDir::new()?;
    let store = reflink_store(&dir)?;
    let mut filesets = Vec::new();
    for (name, files) in [("few", FEW), ("many", 10 * FEW)] {
        let path = store.path().join(format!("{name}.img"));
        image(&path, 410 * MIB)?;
        let disk = GuestDisk::create(&path, Table::Mbr, &[Part::fs(400 * MIB, Fs::Xfs, "root")])?;
        let mounted = disk.mount(1, &dir.join("mnt"))?;
        for folder in 0..files / 1000 {
            let folder = mounted.path().join(format!("folder-{folder}"));
            fs::create_dir(&folder)?;
            for n in 0..1000 {
                fs::write(folder.join(format!("a file with a name {n}")), "")?;
            }
        }
        mounted.close()?;
        let line = format!("guestsnap: image={}", path.display());
        filesets.push((name.to_owned(), fileset_plugin(&line)));
    }
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets,
        client_file: Some(format!("allow = [\"{}/*\"]\n", store.path().display())),
        ..BaculaOptions::default()
    })?;
    let pid = bacula.fd_pid().ok_or("no File Daemon")?;
    // The first one makes what the daemon keeps.
    bacula.run_backup("few", "Full")?.clean()?;
    let mut peaks = Vec::new();
    for name in ["few", "many"] {
        // proc(5): the peak counts from here.
        fs::write(format!("/proc/{pid}/clear_refs"), "5")?;
        let job = bacula.run_backup(name, "Full")?.clean()?;
        let peak = memory(pid, "VmHWM:")?;
        println!(
            "{name}: {} files, peak {peak} KiB, {:.1} s",
            job.files, job.seconds
        );
        peaks.push((job.files, peak));
    }
    check!(peaks[1].0 > peaks[0].0 + 80_000, "{peaks:?}");
    check!(peaks[1].1 < peaks[0].1 + GROWTH, "{peaks:?}");
    drop(bacula);
    store.close()
}

/// Guests on logical volumes, one of them with an LVM of its own that has the host's names. The host's LVM, blkid and
/// udev links stay as they are, also while jobs run.
fn volumes() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let mut filesets = Vec::new();
    for n in 0..PARALLEL {
        let lv = vg.lv(&format!("domu-{n}"), "100m")?;
        let content = match n {
            0 => Content::Pv,
            _ => Content::Fs(Fs::Ext4, "root".into()),
        };
        let disk = GuestDisk::create(&lv, Table::Mbr, &[Part::new(90 * MIB, content)])?;
        if n == 0 {
            let root = GuestLv::new("root", "-L 60m", Content::Fs(Fs::Ext4, "root".into()));
            let guest = GuestVg::create("vg0", &[(&disk, 1)], &[root])?;
            guest.with_mounted("root", Fs::Ext4, &dir.join("mnt"), |root| many(root, 50, 0))?;
        } else {
            let mounted = disk.mount(1, &dir.join("mnt"))?;
            many(mounted.path(), 50, n as u64)?;
            mounted.close()?;
        }
        filesets.push((
            format!("g{n}"),
            fileset_plugin(&format!("guestsnap: lv=vg0/domu-{n}")),
        ));
    }
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets,
        ..BaculaOptions::default()
    })?;
    let quiet = host_view()?;
    let looks = Cell::new(0);
    many_jobs(&bacula, &|| {
        // Snapshots of ours come and go while the tools look: what is of a guest would stay longer.
        let mut seen = host_view()?;
        for _ in 0..3 {
            if seen == quiet {
                break;
            }
            seen = host_view()?;
        }
        looks.set(looks.get() + 1);
        check!(
            seen == quiet,
            "the host sees something of a guest:\n{seen}\nbefore:\n{quiet}"
        );
        Ok(())
    })?;
    check!(host_view()? == quiet, "after the jobs: {}", host_view()?);
    println!("looked at the host {} times while jobs ran", looks.get());
    Ok(())
}

/// Jobs one after the other, then four at a time, with a look at the host while they run.
fn many_jobs(bacula: &Bacula, look: &dyn Fn() -> Result) -> Result {
    bacula.run_backup("Empty", "Full")?.clean()?;
    let pid = bacula.fd_pid().ok_or("no File Daemon")?;
    let together = || -> Result {
        let started: Vec<u32> = (0..PARALLEL)
            .map(|n| bacula.start_backup(&format!("g{n}"), "Full"))
            .collect::<Result<_>>()?;
        look()?;
        for job in started {
            bacula.wait_job(job)?.clean()?;
        }
        Ok(())
    };
    // The allocator's arenas and the daemon's pools have the size that they will have.
    together()?;
    together()?;
    bacula.run_backup("g0", "Full")?.clean()?;
    let before = bacula.host_state()?;
    let first = Use::of(pid)?;
    let (jobs, rounds) = jobs();
    for n in 0..jobs {
        bacula
            .run_backup(&format!("g{}", n % PARALLEL), "Full")?
            .clean()?;
    }
    bacula.check_host_state(&before)?;
    let middle = Use::of(pid)?;
    for _ in 0..rounds {
        together()?;
    }
    bacula.check_host_state(&before)?;
    let last = Use::of(pid)?;
    println!("{jobs} jobs in a row, then {rounds} times {PARALLEL} at a time");
    for (when, used) in [("before", first), ("between", middle), ("after", last)] {
        println!("{when}: {used:?}");
    }
    for used in [middle, last] {
        check!(
            used.memory <= first.memory + MEMORY,
            "memory grew from {} to {} KiB",
            first.memory,
            used.memory
        );
        check!(
            (used.loops, used.devices) == (first.loops, first.devices)
                && used.threads <= first.threads,
            "{used:?}, was {first:?}"
        );
    }
    check!(bacula.fd_pid() == Some(pid), "the daemon is another one");
    Ok(())
}
