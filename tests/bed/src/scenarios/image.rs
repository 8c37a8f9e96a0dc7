//! Guests in image files, snapshotted by reflink, through the real Bacula of this machine. Needs no
//! device-mapper.

use crate::bacula::{Bacula, BaculaOptions, JobResult, Selection, answer, fileset_plugin};
use crate::check;
use crate::guestdisk::{Content, Fs, GuestDisk, MIB, Mounted, Part, Table, image};
use crate::inside::{Scenario, scenario};
use crate::populate::{bytes, many, rich};
use crate::tree::{Ignore, Manifest};
use crate::workdir::WorkDir;
use crate::{Result, cmd, message, plugin_so};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// On this machine.
pub const ROOT: &[Scenario] = &[
    scenario("root_image_fidelity", fidelity),
    scenario("root_image_filesets_and_levels", filesets_and_levels),
    scenario("root_image_panic_is_contained", panic_is_contained),
    scenario("root_image_cancel", cancel),
    scenario("root_restore_cancel", restore_cancel),
    scenario("root_image_least_memory", least_memory),
];

/// An XFS with reflinks, in a file.
pub fn store(dir: &WorkDir) -> Result<Mounted> {
    let file = dir.join("store.img");
    image(&file, 4 << 30)?;
    let disk = GuestDisk::create(&file, Table::Whole, &[Part::fs(4 << 30, Fs::Xfs, "store")])?;
    disk.mount(1, &dir.join("store"))
}

pub fn bacula(store: &Path, so: PathBuf, filesets: &[(&str, String)]) -> Result<Bacula> {
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

pub fn run(bacula: &Bacula, fileset: &str, level: &str) -> Result<JobResult> {
    let before = bacula.host_state()?;
    let job = bacula.run_backup(fileset, level)?;
    println!("{}", job.log);
    bacula
        .check_host_state(&before)
        .map_err(|e| format!("after job {}: {}", job.jobid, message(&e)))?;
    Ok(job)
}

pub fn guest_in(base: &Path, guest: &str) -> PathBuf {
    base.join("@guestsnap").join(guest)
}

pub fn ignore() -> Ignore {
    Ignore {
        sockets: true,
        below: vec![".guestsnap".into()],
        // An attribute in which XFS shows its storage of an ACL; it follows the ACL.
        xattrs: vec!["trusted.SGI_ACL_".into()],
        ..Ignore::default()
    }
}

/// A guest with a rich tree per filesystem: everything comes back, bit for bit and to the nanosecond.
fn fidelity() -> Result {
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
    for (name, _) in &expected {
        let guest = guest_in(&all, name.trim_end_matches(".img"));
        check_manifest(&guest.join(".guestsnap/manifest.json"))?;
    }
    store.close()
}

/// Every key of a manifest stands in its document.
fn check_manifest(path: &Path) -> Result {
    fn keys(value: &serde_json::Value, found: &mut Vec<String>) {
        match value {
            serde_json::Value::Object(map) => {
                found.extend(map.keys().cloned());
                map.values().for_each(|value| keys(value, found));
            }
            serde_json::Value::Array(list) => list.iter().for_each(|value| keys(value, found)),
            _ => {}
        }
    }
    let document = include_str!("../../../../docs/manifest.md");
    let manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(path)?)?;
    let mut found = Vec::new();
    keys(&manifest, &mut found);
    found.retain(|key| !document.contains(&format!("`{key}`")));
    check!(
        found.is_empty(),
        "docs/manifest.md does not know {found:?} of {manifest:#}"
    );
    for key in ["guest", "disks", "volumes", "tree", "consistency"] {
        check!(!manifest[key].is_null(), "no {key} in {manifest:#}");
    }
    Ok(())
}

/// Exclude and wild patterns, two Options blocks, and an incremental in accurate mode.
fn filesets_and_levels() -> Result {
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
fn panic_is_contained() -> Result {
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
    let bacula = bacula(store.path(), crate::points::built()?.plugin, &filesets)?;
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
fn cancel() -> Result {
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
    bacula.cancel_cleanly(job, &before)?;
    store.close()
}

/// One thread and 64 KiB to read ahead: everything is saved, and a cancel while all queues are full ends the job.
fn least_memory() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    for name in ["web.img", "stuck.img"] {
        let path = store.path().join(name);
        image(&path, 200 * MIB)?;
        let whole = [Part::fs(200 * MIB, Fs::Ext4, "root")];
        let disk = GuestDisk::create(&path, Table::Whole, &whole)?;
        let mounted = disk.mount(1, &dir.join("mnt"))?;
        if name == "stuck.img" {
            // First in inode order, so that all others wait behind it; one hole, which would take minutes.
            std::fs::File::create(mounted.path().join("huge"))?.set_len(800 << 30)?;
        }
        many(mounted.path(), 2000, 1)?;
        std::fs::write(mounted.path().join("large"), vec![1; 3 << 20])?;
        mounted.close()?;
    }
    let fileset = |name: &str| {
        fileset_plugin(&format!(
            "guestsnap: image={}/{name}.img",
            store.path().display()
        ))
    };
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: ["web", "stuck"].map(|n| (n.to_owned(), fileset(n))).into(),
        client_file: Some(format!(
            "allow = [\"{}/*\"]\n[limits]\nread_ahead = \"64k\"\nreaders = 1\n",
            store.path().display()
        )),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let before = bacula.host_state()?;
    let job = bacula.start_backup("web", "Full")?;
    let job = bacula
        .wait_job_limit(job, Duration::from_secs(120))?
        .clean()?;
    check!(job.files > 2000, "{} files:\n{}", job.files, job.log);
    bacula.check_host_state(&before)?;

    let job = bacula.start_backup("stuck", "Full")?;
    bacula.wait_processing("stuck/huge", Duration::from_secs(60))?;
    std::thread::sleep(Duration::from_secs(1));
    bacula.cancel_cleanly(job, &before)?;
    store.close()
}

/// A restore is cancelled in the middle of a file: it ends at once, with nothing open.
fn restore_cancel() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let path = store.path().join("web.img");
    image(&path, 300 * MIB)?;
    let disk = GuestDisk::create(
        &path,
        Table::Whole,
        &[Part::fs(300 * MIB, Fs::Ext4, "root")],
    )?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    many(mounted.path(), 10, 1)?;
    std::fs::write(mounted.path().join("large"), bytes(2, 200 << 20))?;
    mounted.close()?;
    let directive = format!("guestsnap: image={}", path.display());
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![("g".into(), fileset_plugin(&directive))],
        client_file: Some(format!("allow = [\"{}/*\"]\n", store.path().display())),
        ..BaculaOptions::default()
    })?;
    let job = bacula.run_backup("g", "Full")?.clean()?;
    let before = bacula.host_state()?;
    let pid = bacula.fd_pid().ok_or("no File Daemon")?;
    let target = dir.join("target");
    let large = guest_in(&target, "web").join("large");
    // By its inode: paths depend on the root of the process that asks.
    let open = || -> Result<bool> {
        let Ok(file) = std::fs::metadata(&large) else {
            return Ok(false);
        };
        let mut opened = std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
        Ok(opened.any(|fd| {
            std::fs::metadata(fd.path())
                .is_ok_and(|fd| (fd.dev(), fd.ino()) == (file.dev(), file.ino()))
        }))
    };
    let mut tries = 0;
    let id = loop {
        let id = bacula.start_restore(job.jobid, &Selection::All, &target, "replace=always")?;
        // The rest of the file stays in the Storage Daemon.
        let end = Instant::now() + Duration::from_secs(60);
        while std::fs::metadata(&large).map_or(0, |meta| meta.len()) < 1 << 20 {
            check!(Instant::now() < end, "the large file does not come");
            std::thread::sleep(Duration::from_millis(1));
        }
        bacula.hold_sd()?;
        tries += 1;
        // A busy machine may have looked too late.
        if open()? || tries == 5 {
            break id;
        }
        bacula.let_sd_go()?;
        bacula.wait_job(id)?.clean()?;
        std::fs::remove_file(&large)?;
    };
    check!(open()?, "nothing is open in the middle of a file");
    let took = bacula.cancel_held(id, || Ok(!open()?))?;
    check!(
        took < answer(),
        "the restore ended {:.2} s after its cancel",
        took.as_secs_f64()
    );
    bacula.check_host_state(&before)?;
    let size = std::fs::metadata(&large)?.len();
    check!(size < 200 << 20, "the restore was through");
    check!(bacula.fd_pid() == Some(pid), "the daemon is another one");
    let small = Selection::Dir("/@guestsnap/web/many/".into());
    bacula
        .restore(job.jobid, &small, &dir.join("again"))?
        .clean()?;
    store.close()
}
