//! Guests in image files, snapshotted by reflink, through the real Bacula of this machine. Needs no
//! device-mapper.

use crate::check;
use crate::support::bacula::{Bacula, BaculaOptions, JobResult, Selection, fileset_plugin};
use crate::support::guestdisk::{Content, Fs, GuestDisk, MIB, Mounted, Part, Table, image};
use crate::support::populate::{many, rich};
use crate::support::tree::{Ignore, Manifest};
use crate::support::workdir::WorkDir;
use crate::support::{Result, cmd, message, plugin_so};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// An XFS with reflinks, in a file.
fn store(dir: &WorkDir) -> Result<Mounted> {
    let file = dir.join("store.img");
    image(&file, 4 << 30)?;
    let disk = GuestDisk::create(&file, Table::Whole, &[Part::fs(4 << 30, Fs::Xfs, "store")])?;
    disk.mount(1, &dir.join("store"))
}

fn bacula(store: &Path, so: PathBuf, filesets: &[(&str, String)]) -> Result<Bacula> {
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(so),
        filesets: filesets
            .iter()
            .map(|(name, text)| ((*name).to_owned(), text.clone()))
            .collect(),
        client_file: Some(format!("allow = [\"{}/*\"]\n", store.display())),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    Ok(bacula)
}

fn run(bacula: &Bacula, fileset: &str, level: &str) -> Result<JobResult> {
    let before = bacula.host_state()?;
    let job = bacula.run_backup(fileset, level)?;
    println!("{}", job.log);
    bacula
        .check_host_state(&before)
        .map_err(|e| format!("after job {}: {}", job.jobid, message(&e)))?;
    Ok(job)
}

fn guest_in(base: &Path, guest: &str) -> PathBuf {
    base.join("@guestsnap").join(guest)
}

fn ignore() -> Ignore {
    Ignore {
        sockets: true,
        below: vec![".guestsnap".into()],
        // What XFS shows of its own storage of an ACL; it follows the ACL.
        xattrs: vec!["trusted.SGI_ACL_".into()],
        ..Ignore::default()
    }
}

/// A guest with a rich tree per filesystem: everything comes back, bit for bit and to the nanosecond.
pub fn fidelity() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let mut expected = Vec::new();
    for (name, table, fs) in [
        ("a.img", Table::Mbr, Fs::Ext4),
        ("b.img", Table::Gpt, Fs::Xfs),
        ("c.img", Table::Whole, Fs::Btrfs),
        ("d.img", Table::Gpt4096, Fs::Ext3),
    ] {
        let path = store.path().join(name);
        image(&path, 400 * MIB)?;
        let disk = GuestDisk::create(
            &path,
            table,
            &[
                Part::fs(360 * MIB, fs, "root"),
                Part::new(8 * MIB, Content::Swap),
            ][..if table == Table::Whole { 1 } else { 2 }],
        )?;
        let mounted = disk.mount(1, &dir.join(format!("mnt-{name}")))?;
        rich(mounted.path(), 1, fs.can())?;
        many(mounted.path(), 500, 1)?;
        mounted.sync()?;
        expected.push((name, Manifest::of(mounted.path())?));
        mounted.close()?;
    }
    let directive = format!("guestsnap: image={}/*.img", store.path().display());
    let bacula = bacula(
        store.path(),
        plugin_so()?,
        &[("g", fileset_plugin(&directive))],
    )?;
    let estimate = bacula.estimate("g", "Full")?;
    let job = run(&bacula, "g", "Full")?.clean()?;
    check!(estimate.contains("files="), "estimate: {estimate}");
    let all = dir.join("all");
    bacula.restore(job.jobid, &Selection::All, &all)?.clean()?;
    let mut problems = String::new();
    for (name, manifest) in &expected {
        let restored = Manifest::of(&guest_in(&all, name.trim_end_matches(".img")))?;
        if let Err(error) = restored.check_equals(manifest, &ignore()) {
            problems += &format!("{name}: {}\n", message(&error));
        }
    }
    check!(problems.is_empty(), "{problems}");
    store.close()
}

/// Exclude and wild patterns, two Options blocks, and an incremental in accurate mode.
pub fn filesets_and_levels() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let path = store.path().join("web.img");
    image(&path, 200 * MIB)?;
    let disk = GuestDisk::create(&path, Table::Mbr, &[Part::fs(150 * MIB, Fs::Ext4, "root")])?;
    let change = |script: &str| -> Result {
        let mounted = disk.mount(1, &dir.join("mnt"))?;
        cmd::sh(&format!("cd '{}' && {script}", mounted.path().display()))?;
        mounted.close()
    };
    change(
        "mkdir -p etc var/cache home && echo a > etc/a && echo b > etc/b && echo c > etc/c.tmp && echo d > var/cache/d && echo e > home/e",
    )?;
    let directive = format!("guestsnap: image={}/web.img", store.path().display());
    let filtered = format!(
        "Include {{\n Options {{ signature = SHA1; compression = GZIP; wilddir = \"/@guestsnap/web/var/cache\"; exclude = yes }}\n \
         Options {{ wildfile = \"*.tmp\"; exclude = yes }}\n Options {{ signature = SHA1; compression = GZIP }}\n \
         Plugin = \"{directive}\"\n }}\n Exclude {{ File = \"/@guestsnap/web/home\" }}"
    );
    let bacula = bacula(
        store.path(),
        plugin_so()?,
        &[("g", fileset_plugin(&directive)), ("filtered", filtered)],
    )?;

    let job = run(&bacula, "filtered", "Full")?.clean()?;
    let names = bacula.list_files(job.jobid)?;
    check!(names.iter().any(|n| n.ends_with("/etc/a")), "{names:?}");
    for gone in ["c.tmp", "/var/cache", "/home"] {
        check!(
            !names.iter().any(|n| n.contains(gone)),
            "{gone} is in {names:?}"
        );
    }
    check!(names.iter().any(|n| n.ends_with("/web/var/")), "{names:?}");

    run(&bacula, "g", "Full")?.clean()?;
    std::thread::sleep(Duration::from_secs(2));
    change("echo A > etc/a && echo n > etc/new && rm etc/b && chmod 600 etc/c.tmp")?;
    let job = run(&bacula, "g", "Incremental")?.clean()?;
    let names = bacula.list_files(job.jobid)?;
    for sent in ["/etc/a", "/etc/new", "/etc/c.tmp"] {
        check!(
            names.iter().any(|n| n.ends_with(sent)),
            "{sent} is missing in {names:?}"
        );
    }
    check!(
        !names.iter().any(|n| n.ends_with("/var/cache/d")),
        "unchanged files are in {names:?}"
    );
    store.close()
}

/// A deliberate panic in a callback ends the job with an error; the daemon runs the next one.
pub fn panic_is_contained() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let path = store.path().join("web.img");
    image(&path, 64 * MIB)?;
    let disk = GuestDisk::create(&path, Table::Whole, &[Part::fs(64 * MIB, Fs::Ext4, "root")])?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    many(mounted.path(), 10, 1)?;
    mounted.close()?;
    let directive = format!("guestsnap: image={}/web.img", store.path().display());
    let filesets: Vec<_> = [
        ("start", " debug=panic-start"),
        ("read", " debug=panic-read"),
        ("g", ""),
    ]
    .map(|(name, more)| (name, fileset_plugin(&format!("{directive}{more}"))))
    .into();
    let bacula = bacula(
        store.path(),
        crate::support::points::built()?.plugin,
        &filesets,
    )?;
    let pid = bacula.fd_pid();
    for fileset in ["start", "read"] {
        let job = run(&bacula, fileset, "Full")?;
        check!(
            job.status == 'f' && job.log.contains("GS-701"),
            "{fileset}: status {}\n{}",
            job.status,
            job.log
        );
    }
    run(&bacula, "g", "Full")?.clean()?;
    check!(
        bacula.fd_pid() == pid && pid.is_some(),
        "the daemon is another process now"
    );
    store.close()
}

/// A cancel is answered at once, and nothing is left.
pub fn cancel() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let path = store.path().join("web.img");
    image(&path, 600 * MIB)?;
    let disk = GuestDisk::create(
        &path,
        Table::Whole,
        &[Part::fs(600 * MIB, Fs::Ext4, "root")],
    )?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    many(mounted.path(), 100, 1)?;
    // One hole, delivered as zeros: the job would take minutes.
    std::fs::File::create(mounted.path().join("huge"))?.set_len(800 << 30)?;
    mounted.close()?;
    let directive = format!("guestsnap: image={}/web.img", store.path().display());
    let bacula = bacula(
        store.path(),
        plugin_so()?,
        &[("g", fileset_plugin(&directive))],
    )?;
    let before = bacula.host_state()?;
    let job = bacula.start_backup("g", "Full")?;
    bacula.wait_processing("web/huge", Duration::from_secs(60))?;
    bacula.cancel(job)?;
    let asked = Instant::now();
    let result = bacula.wait_job(job)?;
    println!(
        "{}\nended {:.1} s after the cancel",
        result.log,
        asked.elapsed().as_secs_f64()
    );
    check!(
        result.status == 'A',
        "status {} after a cancel:\n{}",
        result.status,
        result.log
    );
    bacula.check_host_state(&before)?;
    store.close()
}
