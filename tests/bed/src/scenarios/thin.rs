//! Guests with thin pools of their own: real ones, dirty ones, forged ones.

use crate::bacula::{Bacula, BaculaOptions, Selection, fileset_plugin};
use crate::check;
use crate::guestdisk::{Content, Fs, GuestDisk, GuestLv, GuestVg, MIB, Mounted, Part, Table};
use crate::hoststate::HostState;
use crate::inside::{Scenario, scenario};
use crate::lvm::HostVg;
use crate::points::Points;
use crate::populate::{bytes, rich};
use crate::thinpool::{Root, make_circle, scatter};
use crate::tree::{Ignore, Manifest};
use crate::workdir::WorkDir;
use crate::{Result, cmd, message, plugin_so};
use guestsnap::disk::map::CountingNamer;
use guestsnap::disk::thin::{Budget, Wanted, resolve};
use guestsnap::disk::{FileDisk, Layout, ReadAt, Segment, VolumeReader, examine, map};
use guestsnap::snapshot::Device;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("thin_circles", circles)
        .seconds(900)
        .only("bookworm"),
    scenario("thin_guests", guests).seconds(900).only("trixie"),
    scenario("thin_limits", limits).only("trixie"),
    scenario("thin_replay", replay)
        .seconds(600)
        .only("bookworm"),
    scenario("points_thin_store_full", store_full).only("trixie"),
];

fn bacula(directive: &str) -> Result<Bacula> {
    Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![("guests".into(), fileset_plugin(directive))],
        ..BaculaOptions::default()
    })
}

/// A guest whose disk is one physical volume.
fn pv(vg: &HostVg, name: &str, mib: u64) -> Result<GuestDisk> {
    let lv = vg.lv(name, &format!("{mib}m"))?;
    GuestDisk::create(&lv, Table::Whole, &[Part::new(mib * MIB, Content::Pv)])
}

fn thin(name: &str, mib: u64, fs: Fs) -> GuestLv {
    GuestLv::thin(name, mib, "pool", Content::Fs(fs, name.into()))
}

fn copy(from: &Path, to: &Path) -> Result {
    // The bytes below the guest's devices, not those read before.
    let (from, to) = (from.display(), to.display());
    cmd::sh(&format!(
        "dd if={from} of={to} bs=1M iflag=direct oflag=direct status=none"
    ))?;
    Ok(())
}

fn ignores() -> Result<Ignore> {
    Ignore::after_plugin_restore()
}

/// Two guests whose pool's metadata lead in a circle are errors; the third one is saved, the host's LVM answers.
fn circles() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let good = pv(&vg, "domu-good", 200)?;
    let pool = GuestLv::pool("pool", 120);
    let guest = GuestVg::create(
        "guestvg",
        &[(&good, 1)],
        &[pool, thin("root", 150, Fs::Ext4)],
    )?;
    let expected = guest.with_mounted("root", Fs::Ext4, &dir.join("mnt"), |point| {
        rich(point, 1, Fs::Ext4.can())?;
        Manifest::of(point)
    })?;
    for (name, root) in [("details", Root::Details), ("mapping", Root::Mapping)] {
        let lv = vg.lv(&format!("domu-{name}"), "200m")?;
        copy(&good.path, &lv)?;
        make_circle(&lv, root)?;
    }
    let bacula = bacula("guestsnap: lv=vg0/domu-* strip=domu-")?;
    let host = HostState::capture(None)?;
    let job = bacula.start_backup("guests", "Full")?;
    let ended = bacula.wait_job_limit(job, Duration::from_secs(500));
    cmd::sh("timeout 60 lvs -a > /dev/null").map_err(|e| format!("lvs: {}", message(&e)))?;
    let job = ended?;
    println!("{}", job.log);
    for name in ["details", "mapping"] {
        check!(
            job.log
                .contains(&format!("{name}: guestvg/root: ERROR GS-408"))
                && job.log.contains(&format!("{name}: block"))
                && job.log.contains("is reached twice"),
            "{name} is not named:\n{}",
            job.log
        );
    }
    check!(job.errors >= 2, "{} errors:\n{}", job.errors, job.log);
    let left = HostState::settled_diff(&host, &Default::default())?;
    check!(left.is_empty(), "left on the host: {left:?}");
    let to = dir.join("all");
    bacula.restore(job.jobid, &Selection::All, &to)?.clean()?;
    Manifest::of(&to.join("@guestsnap/good"))?.check_equals(&expected, &ignores()?)?;
    let sweep = crate::tool()?;
    cmd::sh(&format!("timeout 60 {} sweep", sweep.display()))?;
    Ok(())
}

/// XFS as the root, a volume with a snapshot, and a snapshot of that, all in one fragmented pool; and a volume of the pool
/// whose origin is outside of it.
fn guests() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let lv = vg.lv("domu-rhel", "500m")?;
    let (_guest, root, expected) = fragmented(&lv, &dir)?;
    let lines = tables(&lv)?;
    println!("lines of the tables: {lines:?}");
    let scattered = lines.iter().filter(|n| **n > 100).count();
    check!(scattered == 4, "not fragmented: {lines:?}");

    let bacula = bacula("guestsnap: lv=vg0/domu-* strip=domu-")?;
    let host = HostState::capture(None)?;
    let job = bacula.run_backup("guests", "Full")?.clean()?;
    println!("{}", job.log);
    let left = HostState::settled_diff(&host, &Default::default())?;
    check!(left.is_empty(), "left on the host: {left:?}");
    let to = dir.join("all");
    bacula.restore(job.jobid, &Selection::All, &to)?.clean()?;
    let tree = Manifest::of(&to.join("@guestsnap/rhel"))?;
    let mut ignore = ignores()?;
    ignore.below.extend(["m".into(), "boot".into()]);
    tree.check_equals(&root, &ignore)?;
    for (below, manifest) in &expected {
        let part = tree.below(Path::new(below));
        part.check_equals(manifest, &ignores()?)
            .map_err(|e| format!("{below}: {}", message(&e)))?;
    }
    Ok(())
}

/// Trees of volumes, with the places of these in the guest's tree.
type Volumes = Vec<(&'static str, Manifest)>;

/// The guest, the tree of its root, and those of its other volumes.
fn fragmented(lv: &Path, dir: &WorkDir) -> Result<(GuestVg, Manifest, Volumes)> {
    let parts = [
        Part::fs(60 * MIB, Fs::Ext4, "boot"),
        Part::new(430 * MIB, Content::Pv),
    ];
    let disk = GuestDisk::create(lv, Table::Gpt, &parts)?;
    let lvs = [
        GuestLv::pool("pool", 200),
        GuestLv::new("between", "-L 8m", Content::Empty),
        GuestLv::new("base", "-L 24m", Content::Fs(Fs::Ext4, "base".into())),
        thin("root", 400, Fs::Xfs),
        thin("home", 100, Fs::Ext4),
    ];
    // The extension below makes the data two pieces.
    let guest = GuestVg::create("rhel", &[(&disk, 2)], &lvs)?;
    guest.run("lvextend", &["-L", "+100m", "rhel/pool"])?;
    let point = dir.join("mnt");
    let mut expected = Vec::new();
    let first = guest.with_mounted("home", Fs::Ext4, &point, |point| {
        rich(point, 2, Fs::Ext4.can())?;
        fragment(point, 1)?;
        Manifest::of(point)
    })?;
    expected.push(("m/second", first.clone()));
    guest.run("lvcreate", &["-s", "-n", "first", "-kn", "rhel/home"])?;
    let changed = guest.with_mounted("first", Fs::Ext4, &point, |point| {
        fragment(point, 3)?;
        std::fs::write(point.join("only-here"), bytes(9, 300_000))?;
        Manifest::of(point)
    })?;
    expected.push(("m/first", changed.clone()));
    guest.run("lvcreate", &["-s", "-n", "second", "-kn", "rhel/first"])?;
    expected[0].1 = changed;
    guest.with_mounted("base", Fs::Ext4, &point, |point| {
        std::fs::write(point.join("from-origin"), bytes(10, 3_000_000))?;
        Ok(std::fs::write(point.join("changed"), bytes(11, 3_000_000))?)
    })?;
    guest.run("lvchange", &["-an", "-pr", "rhel/base"])?;
    let pool = ["--thinpool", "rhel/pool"];
    let linked = ["-s", "-n", "linked", "-kn", pool[0], pool[1], "rhel/base"];
    guest.run("lvcreate", &linked)?;
    let linked = guest.with_mounted("linked", Fs::Ext4, &point, |point| {
        let file = File::options().write(true).open(point.join("changed"))?;
        file.write_all_at(&bytes(12, 300_000), 1_000_000)?;
        Manifest::of(point)
    })?;
    expected.push(("m/linked", linked));
    let home = guest.with_mounted("home", Fs::Ext4, &point, |point| {
        std::fs::remove_file(point.join("home/user/big"))?;
        fragment(point, 2)?;
        Manifest::of(point)
    })?;
    expected.push(("m/home", home));
    let root = guest.with_mounted("root", Fs::Xfs, &point, |point| {
        rich(point, 3, Fs::Xfs.can())?;
        fragment(point, 4)?;
        for below in ["m/home", "m/first", "m/second", "m/linked", "boot"] {
            std::fs::create_dir_all(point.join(below))?;
        }
        std::fs::write(
            point.join("etc/fstab"),
            "/dev/mapper/rhel-root / xfs defaults 0 0\nLABEL=boot /boot ext4 defaults 0 2\n\
             /dev/rhel/home /m/home ext4 defaults 0 2\n/dev/rhel/first /m/first ext4 defaults 0 2\n\
             /dev/mapper/rhel-second /m/second ext4 defaults 0 2\n\
             /dev/mapper/rhel-linked /m/linked ext4 defaults 0 2\n",
        )?;
        Manifest::of(point)
    })?;
    Ok((guest, root, expected))
}

/// Two files written by turns: their chunks lie in the pool by turns.
fn fragment(point: &Path, seed: u64) -> Result {
    let files = ["left", "right"].map(|name| File::create(point.join(format!("{name}-{seed}"))));
    let [left, right] = files;
    let (left, right) = (left?, right?);
    for file in [&left, &right] {
        rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, 5 * MIB)?;
    }
    for n in 0..80 {
        for file in [&left, &right] {
            file.write_all_at(&bytes(seed * 1000 + n, 65_536), n * 65_536)?;
            file.sync_data()?;
        }
    }
    Ok(())
}

/// How many lines the tables of a guest's thin volumes have.
fn tables(disk: &Path) -> Result<Vec<usize>> {
    let mut lines = Vec::new();
    each_thin(disk, |_, _, mapping, _| lines.push(mapping.lines))?;
    Ok(lines)
}

/// Resolves each thin volume: its name, size, mapping, and where the pool's data are.
fn each_thin(
    disk: &Path,
    mut work: impl FnMut(&str, u64, guestsnap::disk::thin::Mapping, &[Segment]),
) -> Result {
    let file = FileDisk::open(disk).map_err(|e| e.report())?;
    let found = examine(&[&file]).map_err(|e| e.report())?;
    for volume in &found.volumes {
        let Layout::Thin {
            pool,
            device_id,
            size,
            ..
        } = &volume.layout
        else {
            continue;
        };
        let metadata = Layout::Segments(pool.metadata.clone());
        let disks: [&dyn ReadAt; 1] = [&file];
        let reader = VolumeReader::new(&disks, &metadata).ok_or("no reader")?;
        let wanted = Wanted {
            device_id: *device_id,
            size: *size,
            transaction_id: pool.transaction_id,
            chunk_size: pool.chunk_size,
            data_size: pool.data.iter().map(Segment::len).sum(),
        };
        let mapping = resolve(&reader, &wanted, &Budget::default(), &|| false);
        let mapping = mapping.map_err(|e| format!("{}: {e:?}", volume.name))?;
        work(&volume.name, *size, mapping, &pool.data);
    }
    Ok(())
}

/// The most scattered volume that is taken; one chunk more is an error.
fn limits() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let disk = pv(&vg, "domu-scattered", 200)?;
    let lvs = [
        GuestLv::pool("pool", 120),
        GuestLv::new("root", "-V 16388m --thinpool pool", Content::Empty),
    ];
    GuestVg::create("guestvg", &[(&disk, 1)], &lvs)?;
    let mapped = |count: u64| -> Result<_> {
        scatter(&disk.path, count)?;
        let file = FileDisk::open(&disk.path).map_err(|e| e.report())?;
        let found = examine(&[&file]).map_err(|e| e.report())?;
        let device = Device {
            path: disk.path.clone(),
            size: file.size(),
            read_only: false,
        };
        let volume = found.volumes.first().ok_or("no volume")?;
        Ok(map(volume, &[device], &mut CountingNamer::new("9")).map_err(|e| e.report()))
    };
    let (before, started) = (kernel_memory()?, Instant::now());
    let volume = mapped(131_072)??;
    let (after, took) = (kernel_memory()?, started.elapsed());
    let each = after.saturating_sub(before) / 262_144;
    println!("262144 lines in {took:?}, {each} bytes of the kernel's memory for each");
    check!(each < 400, "a line takes {each} bytes");
    let mut last = [1; 4096];
    let file = File::open(volume.path())?;
    file.read_exact_at(&mut last, volume.size() - 4096)?;
    check!(last == [0; 4096], "the last gap is not empty");
    drop(file);
    let started = Instant::now();
    volume.close().map_err(|e| e.report())?;
    println!("closed in {:?}", started.elapsed());
    let refused = mapped(131_073)?.err().unwrap_or_default();
    check!(
        refused.contains("GS-404") && refused.contains("more than 262144 runs and gaps"),
        "{refused}"
    );
    Ok(())
}

/// Memory that the kernel has taken for itself, in bytes.
fn kernel_memory() -> Result<u64> {
    cmd::sh("sync; echo 3 > /proc/sys/vm/drop_caches")?;
    let info = std::fs::read_to_string("/proc/meminfo")?;
    let field = |name: &str| -> u64 {
        let line = info.lines().find(|line| line.starts_with(name));
        let value = line.and_then(|line| line.split_whitespace().nth(1));
        value.and_then(|kib| kib.parse().ok()).unwrap_or(0)
    };
    Ok((field("Slab:") + field("VmallocUsed:")) * 1024)
}

/// A guest that runs: its journal holds what belongs into chunks that the volume does not have yet.
fn replay() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let source = pv(&vg, "source", 300)?;
    let dirty = vg.lv("domu-dirty", "300m")?;
    let pool = GuestLv::pool("pool", 120);
    let root = thin("root", 1000, Fs::Ext4);
    let guest = GuestVg::create("guestvg", &[(&source, 1)], &[pool, root])?;
    let expected = guest.with_mounted("root", Fs::Ext4, &dir.join("mnt"), |point| {
        rich(point, 1, Fs::Ext4.can())?;
        cmd::run("sync", ["-f", &point.display().to_string()])?;
        // Each new folder goes to another part of the volume.
        for n in 0..40 {
            let folder = point.join(format!("dirty-{n}"));
            std::fs::create_dir(&folder)?;
            std::fs::write(folder.join("file"), bytes(n, 3000))?;
            File::open(folder.join("file"))?.sync_all()?;
            File::open(&folder)?.sync_all()?;
        }
        copy(&source.path, &dirty)?;
        Manifest::of(point)
    })?;
    let bacula = bacula("guestsnap: lv=vg0/domu-* strip=domu-")?;
    let host = HostState::capture(None)?;
    let job = bacula.run_backup("guests", "Full")?.clean()?;
    println!("{}", job.log);
    let left = HostState::settled_diff(&host, &Default::default())?;
    check!(left.is_empty(), "left on the host: {left:?}");
    let to = dir.join("all");
    bacula.restore(job.jobid, &Selection::All, &to)?.clean()?;
    Manifest::of(&to.join("@guestsnap/dirty"))?.check_equals(&expected, &ignores()?)?;
    drop(bacula);
    let lost = lost_without_gaps(&dirty, &dir)?;
    println!("without room in the gaps {lost} of 40 folders are lost");
    check!(lost > 0, "the journal holds nothing for a gap");
    Ok(())
}

/// The daemon's working directory has no room for what the replay of a guest's journal writes: too little from the start,
/// and too little in the middle. The guest is an error, never a backup that lacks something.
fn store_full() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let source = pv(&vg, "source", 300)?;
    let dirty = vg.lv("domu-dirty", "300m")?;
    let pool = GuestLv::pool("pool", 120);
    let root = thin("root", 1000, Fs::Ext4);
    let guest = GuestVg::create("guestvg", &[(&source, 1)], &[pool, root])?;
    guest.with_mounted("root", Fs::Ext4, &dir.join("mnt"), |point| {
        // A block each, in the journal alone until it is full.
        for n in 0..600 {
            let folder = point.join(format!("dirty-{n}"));
            std::fs::create_dir(&folder)?;
            std::fs::write(folder.join("file"), bytes(n, 100))?;
        }
        cmd::sh(&format!(
            "sync '{}'",
            point.join("dirty-599/file").display()
        ))?;
        copy(&source.path, &dirty)
    })?;
    let points = Points::new("")?;
    let work = points.working_dir().display().to_string();
    // Half of what is free is taken, and a MiB is the least.
    for (size, why) in [
        ("1m", "working directory"),
        ("2500k", "dirty: guestvg/root"),
    ] {
        cmd::sh(&format!("mount -t tmpfs -o size={size} store '{work}'"))?;
        let outcome = points.drive(&["backup", &work, "lv=vg0/domu-*"]);
        cmd::run("umount", [&work])?;
        let outcome = outcome?;
        println!("{}", outcome.text);
        let errors = outcome.of('E').join("\n");
        check!(
            errors.contains(why),
            "{size}: no error with {why:?}: {errors}"
        );
    }
    let outcome = points.drive(&["backup", &work, "lv=vg0/domu-*"])?;
    check!(outcome.is_clean(), "with room: {}", outcome.text);
    Ok(())
}

/// How many folders are not there if writes to gaps are dropped: the proof that the replay wrote to them.
fn lost_without_gaps(disk: &Path, dir: &WorkDir) -> Result<usize> {
    let mut table = String::new();
    each_thin(disk, |_, size, mapping, data| {
        let [Segment::Linear(data)] = data else {
            return;
        };
        let mut end = 0;
        let mut line = |from: u64, to: u64, target: String| {
            if from < to {
                table += &format!("{} {} {target}\n", from / 512, (to - from) / 512);
            }
        };
        for run in &mapping.runs {
            line(end, run.start, "zero".into());
            end = run.start + run.len;
            let at = (data.start + run.data) / 512;
            line(run.start, end, format!("linear {} {at}", disk.display()));
        }
        line(end, size, "zero".into());
    })?;
    cmd::run_with_input("dmsetup", ["create", "dropping"], table.as_bytes())?;
    let point = dir.join("dropping");
    let device = "/dev/mapper/dropping";
    let found = (|| {
        // The first time the replay is seen in memory. The second time the journal is clean.
        Mounted::device(device, Fs::Ext4, &point)?.close()?;
        let mounted = Mounted::device(device, Fs::Ext4, &point)?;
        let found = (0..40)
            .filter(|n| {
                let file = mounted.path().join(format!("dirty-{n}/file"));
                std::fs::read(file).is_ok_and(|have| have == bytes(*n, 3000))
            })
            .count();
        mounted.close()?;
        Ok(found)
    })();
    cmd::run("dmsetup", ["remove", "--retry", "dropping"])?;
    found.map(|found: usize| 40 - found)
}
