//! Guests made from one image: every id in them is the same.

use super::image::{bacula, guest_in, ignore, run, store};
use crate::check;
use crate::support::bacula::{Selection, fileset_plugin};
use crate::support::cmd;
use crate::support::guestdisk::{Fs, GuestDisk, MIB, Part, Table, image};
use crate::support::inside::{Scenario, scenario};
use crate::support::populate::{many, rich};
use crate::support::tree::Manifest;
use crate::support::workdir::WorkDir;
use crate::support::{Result, message, plugin_so};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub const ALL: &[Scenario] = &[scenario("clones", clones)];

/// XFS and btrfs clones in one job, then in two jobs at once.
pub fn clones() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let mut expected = Vec::new();
    for (kind, name) in [(Fs::Xfs, "xfs"), (Fs::Btrfs, "btrfs")] {
        let path = |n: u32| store.path().join(format!("{name}{n}.img"));
        image(&path(1), 400 * MIB)?;
        let disk = GuestDisk::create(&path(1), Table::Gpt, &[Part::fs(390 * MIB, kind, "root")])?;
        let mounted = disk.mount(1, &dir.join("mnt"))?;
        rich(mounted.path(), 1, kind.can())?;
        many(mounted.path(), 200, 1)?;
        mounted.close()?;
        let clone = |to: PathBuf| -> Result<GuestDisk> {
            let (from, into) = (path(1).display().to_string(), to.display().to_string());
            cmd::run("cp", ["--reflink=always", "--", &from, &into])?;
            Ok(GuestDisk {
                path: to,
                ..disk.clone()
            })
        };
        let second = clone(path(2))?;
        if kind == Fs::Btrfs {
            // Takes hours to be sent.
            let mounted = clone(store.path().join("held.img"))?.mount(1, &dir.join("mnt"))?;
            fs::File::create(mounted.path().join("hole"))?.set_len(800 << 30)?;
            mounted.close()?;
        }
        for (n, disk) in [(1, &disk), (2, &second)] {
            let mounted = disk.mount(1, &dir.join("mnt"))?;
            fs::write(mounted.path().join("who"), format!("{name}{n}"))?;
            mounted.sync()?;
            expected.push((format!("{name}{n}"), Manifest::of(mounted.path())?));
            mounted.close()?;
        }
    }
    let fileset = |glob: &str| {
        fileset_plugin(&format!(
            "guestsnap: image={}/{glob}.img",
            store.path().display()
        ))
    };
    let bacula = bacula(
        store.path(),
        plugin_so()?,
        &[
            ("all", fileset("*[12]")),
            ("held", fileset("held")),
            ("one", fileset("*1")),
            ("two", fileset("*2")),
        ],
    )?;
    let compare = |jobid: u32, of: &str| -> Result {
        let to = dir.join(format!("restored-{jobid}"));
        bacula.restore(jobid, &Selection::All, &to)?.clean()?;
        for (name, manifest) in expected.iter().filter(|(name, _)| name.ends_with(of)) {
            Manifest::of(&guest_in(&to, name))?
                .check_equals(manifest, &ignore())
                .map_err(|e| format!("{name} of job {jobid}: {}", message(&e)))?;
        }
        fs::remove_dir_all(&to)?;
        Ok(())
    };
    let job = run(&bacula, "all", "Full")?.clean()?;
    compare(job.jobid, "")?;

    let before = bacula.host_state()?;
    // A third clone is open for as long as we want.
    let held = bacula.start_backup("held", "Full")?;
    bacula.wait_processing("held/hole", Duration::from_secs(60))?;
    let jobs = [
        bacula.start_backup("one", "Full")?,
        bacula.start_backup("two", "Full")?,
    ];
    std::thread::sleep(Duration::from_secs(5));
    bacula.cancel(held)?;
    bacula.wait_job(held)?;
    let mut both = Vec::new();
    for job in jobs {
        let job = bacula.wait_job(job)?.clean()?;
        println!("{}", job.log);
        both.push(job);
    }
    bacula.check_host_state(&before)?;
    let turns = !Path::new("/sys/fs/btrfs/features/temp_fsid").exists();
    check!(
        both.iter()
            .all(|job| job.log.contains("waiting for another job") == turns),
        "this kernel needs turns: {turns}"
    );
    compare(both[0].jobid, "1")?;
    compare(both[1].jobid, "2")?;
    check!(both.iter().all(|job| job.files > 400), "a guest is missing");
    store.close()
}
