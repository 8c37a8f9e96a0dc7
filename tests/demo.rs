//! `make demo`: guests at work on LVM volumes are saved with one `Plugin =` line, a single file and everything comes
//! back, and the host is as it was before. Uses this machine's device-mapper if it has one, else (or with `DEMO=vm`) an
//! emulated machine; `DEMO_SUITE=trixie` takes Debian 13 there.

use guestsnap_bed::bacula::{Bacula, BaculaOptions, Selection, fileset_plugin};
use guestsnap_bed::guestdisk::{Fs, MIB, Mounted, Writer, classic};
use guestsnap_bed::hoststate;
use guestsnap_bed::inside::{is_inside, say, suite};
use guestsnap_bed::lvm::HostVg;
use guestsnap_bed::populate::{many, rich};
use guestsnap_bed::tree::{Ignore, Manifest};
use guestsnap_bed::workdir::{self, WorkDir};
use guestsnap_bed::{Result, check, message, plugin_so, vm};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    let outcome = match std::env::args().nth(1).as_deref() {
        Some("--bed-demo") => demo(),
        _ => outside(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            say(&format!("demo: FAILED: {}", message(&e)));
            ExitCode::FAILURE
        }
    }
}

fn outside() -> Result {
    check!(rustix::process::geteuid().is_root(), "the demo needs root");
    workdir::sweep()?;
    let native = hoststate::have_dm("snapshot-origin") && hoststate::have_dm("linear");
    if native && std::env::var("DEMO").as_deref() != Ok("vm") {
        println!("demo: on this machine, with a throwaway VG on loop devices");
        return demo();
    }
    let suite = std::env::var("DEMO_SUITE").unwrap_or_else(|_| vm::SUITES[0].into());
    check!(
        vm::SUITES.contains(&suite.as_str()),
        "DEMO_SUITE={suite}: one of {:?}",
        vm::SUITES
    );
    println!(
        "demo: in an emulated machine with Debian {suite} (no hardware support: everything takes its time)"
    );
    let command = format!(
        "export GUESTSNAP_BED_INSIDE={suite} GUESTSNAP_SO=/bed/guestsnap-fd.so\nchmod 755 /bed/test\nexec /bed/test --bed-demo\n"
    );
    let mut run = vm::Run::new(&suite, &command);
    run.limit = Duration::from_secs(480);
    run.files.push((std::env::current_exe()?, "test".into()));
    run.files.push((plugin_so()?, "guestsnap-fd.so".into()));
    run.run(|line| {
        if let Ok(report) = serde_json::from_str::<serde_json::Value>(line) {
            println!("{}", report["say"].as_str().unwrap_or(line));
        }
    })
}

/// A guest that is running: what was on its root filesystem before its writer began. Dropped in this order.
struct Guest {
    name: &'static str,
    writer: Writer,
    mounted: Mounted,
    expected: Manifest,
}

fn demo() -> Result {
    let begin = Instant::now();
    let step = |text: &str| {
        say(&format!(
            "\n=== [{:5.1} s] {text}",
            begin.elapsed().as_secs_f64()
        ))
    };
    let (vg_name, vg) = if is_inside() {
        say(&format!(
            "Debian {}, Bacula {}, kernel {}",
            suite(),
            Bacula::version()?,
            kernel()?
        ));
        ("vg0", HostVg::on_scratch("vg0")?)
    } else {
        (
            "guestsnapdemo",
            HostVg::on_loops("guestsnapdemo", 2, 4 << 30)?,
        )
    };
    let dir = WorkDir::new()?;

    step("Two guests: MBR disk, ext3 at sector 63, swap in an extended partition behind it");
    let guests = two_guests(&vg, &dir)?;

    step("Bacula, with this FileSet");
    let bacula = bacula(vg_name)?;
    let host = hoststate::HostState::capture(None)?;

    step("Estimate: what would be saved (takes its own snapshots)");
    estimate(&bacula, &host)?;
    // Taken now, the daemon's own part holds what it opens once: the handle of device-mapper.
    let before = bacula.host_state()?;
    say(&format!(
        "host before: {} dm devices, {} LVs, {} loop devices, {} mounts, {} descriptors and {} threads in the File Daemon",
        before.dm.len(),
        before.lvs.len(),
        before.loops.len(),
        before.mounts.len(),
        before.fds.values().sum::<usize>(),
        before.threads
    ));

    step("Backup, level Full, while the guests go on writing");
    let job = backup(&bacula)?;

    step("The host after the job");
    bacula.check_host_state(&before)?;
    say(
        "as before: no dm device, LV, loop device, mount in any namespace, descriptor, thread or file is left",
    );

    step("Restore of a single file");
    restore_one(&bacula, job, &dir.join("one"), &guests[0])?;

    step("Restore of everything, compared with the guests");
    let all = dir.join("all");
    bacula.restore(job, &Selection::All, &all)?.clean()?;
    for guest in guests {
        compare(guest, &all)?;
    }
    step("Done");
    Ok(())
}

/// Guests of two sizes on volumes of the group, at work.
fn two_guests(vg: &HostVg, dir: &WorkDir) -> Result<Vec<Guest>> {
    let mut guests = Vec::new();
    for (n, name) in ["web1", "db1"].into_iter().enumerate() {
        let lv = vg.lv(&format!("domu-{name}"), "480m")?;
        let disk = classic(&lv, 48 * MIB)?;
        let mounted = disk.mount(1, &dir.join(name))?;
        rich(mounted.path(), n as u64 + 1, Fs::Ext3.can())?;
        many(mounted.path(), 1500 - 500 * n, n as u64)?;
        mounted.sync()?;
        let expected = Manifest::of(mounted.path())?;
        // From here on the guest works: its journal is dirty at any moment.
        let writer = Writer::start(&mounted.path().join("busy"))?;
        say(&format!(
            "{}: {} names, being written to",
            lv.display(),
            expected.entries.len()
        ));
        guests.push(Guest {
            name,
            writer,
            mounted,
            expected,
        });
    }
    Ok(guests)
}

fn bacula(vg: &str) -> Result<Bacula> {
    let directive = format!("guestsnap: lv={vg}/domu-* strip=domu-");
    let fileset = fileset_plugin(&directive);
    say(&format!("FileSet {{\n  Name = \"guests\"\n  {fileset}\n}}"));
    Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![("guests".into(), fileset)],
        ..BaculaOptions::default()
    })
}

fn estimate(bacula: &Bacula, host: &hoststate::HostState) -> Result {
    let estimate = bacula.estimate("guests", "Full")?;
    let listed = estimate
        .lines()
        .filter(|l| l.contains("/@guestsnap/"))
        .count();
    check!(
        listed > 2000,
        "the estimate lists {listed} names:\n{estimate}"
    );
    say(&format!("{listed} names"));
    let left = hoststate::HostState::settled_diff(host, &hoststate::Scope::default())?;
    check!(
        left.is_empty(),
        "left behind on the host:\n  {}",
        left.join("\n  ")
    );
    Ok(())
}

/// The number of the job.
fn backup(bacula: &Bacula) -> Result<u32> {
    let job = bacula.run_backup("guests", "Full")?;
    say(job.log.trim_end());
    check!(
        job.is_clean(),
        "job {} ended with status {} and {} errors",
        job.jobid,
        job.status,
        job.errors
    );
    say(&format!(
        "{} files, {:.1} MB in {:.1} s",
        job.files,
        job.bytes as f64 / 1e6,
        job.seconds
    ));
    Ok(job.jobid)
}

fn restore_one(bacula: &Bacula, job: u32, to: &Path, guest: &Guest) -> Result {
    let path = "/@guestsnap/web1/etc/passwd";
    bacula
        .restore(job, &Selection::Files(vec![path.into()]), to)?
        .clean()?;
    let restored = std::fs::read(inside_of(to, path))?;
    check!(
        restored == std::fs::read(guest.mounted.path().join("etc/passwd"))?,
        "{path} came back different"
    );
    say(&format!("{path}: came back with the same contents"));
    Ok(())
}

/// The end of a guest: what came back is what it was.
fn compare(guest: Guest, all: &Path) -> Result {
    let written = guest.writer.stop()?;
    let tree = Manifest::of(&inside_of(all, &format!("/@guestsnap/{}", guest.name)))?;
    let mut ignore = Ignore::after_plugin_restore()?;
    // Written during the job.
    ignore.below.push("busy".into());
    let saved = tree
        .entries
        .keys()
        .filter(|n| n.starts_with("busy") && *n != Path::new("busy"))
        .count();
    tree.check_equals(&guest.expected, &ignore)
        .map_err(|e| format!("{}: {}", guest.name, message(&e)))?;
    let limits = if ignore.link_extras {
        "fifos, devices, links in whole seconds, links without xattrs"
    } else {
        "fifos and devices in whole seconds"
    };
    let mut line = format!(
        "{}: {} names compared: type, contents, holes, mode, owner, time to the nanosecond, hard links, \
         xattrs, ACLs, targets are equal (this Bacula's limits: no sockets; {limits})",
        guest.name,
        guest.expected.entries.len()
    );
    let _ = write!(
        line,
        "; {saved} of its busy files ({written} writes so far) were in the snapshot"
    );
    say(&line);
    guest.mounted.close()
}

/// Where a path of the catalog lies below a restore's `where`.
fn inside_of(base: &Path, path: &str) -> PathBuf {
    base.join(path.trim_start_matches('/'))
}

fn kernel() -> Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/osrelease")?
        .trim()
        .to_string())
}
