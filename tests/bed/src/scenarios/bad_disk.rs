//! Disks of the host that fail under a guest: some sectors that cannot be read, and a whole disk that is gone in the
//! middle of a job.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::plugin::{guest_in, restored, run};
use crate::bacula::{Bacula, BaculaOptions, Selection, fileset_plugin};
use crate::check;
use crate::guestdisk::{Fs, GuestDisk, MIB, Part, Table};
use crate::inside::{Scenario, scenario};
use crate::lvm::{HostVg, Trouble};
use crate::populate::{bytes, many};
use crate::tree::{Ignore, Manifest};
use crate::workdir::WorkDir;
use crate::{Result, cmd, plugin_so};

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("bad_disk_sectors", sectors).only("trixie"),
    scenario("bad_disk_gone", gone).only("bookworm"),
];

/// A guest `vg0/web` of one ext4 with blocks of 4 KiB.
fn guest(
    vg: &HostVg,
    dir: &WorkDir,
    mib: u64,
    fill: impl FnOnce(&Path) -> Result,
) -> Result<GuestDisk> {
    let lv = vg.lv("web", &format!("{mib}m"))?;
    let disk = GuestDisk::create(&lv, Table::Whole, &[Part::fs(mib * MIB, Fs::Ext4, "root")])?;
    Fs::Ext4.make(disk.volume(1)?.device(), "root", &["-b", "4096"])?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    fill(mounted.path())?;
    mounted.close()?;
    Ok(disk)
}

/// Where a file or folder of the guest lies on the disk of [`HostVg::on_mapped`]: first sector and number.
fn place(name: &str) -> Result<(u64, u64)> {
    let blocks = cmd::run("debugfs", ["-R", &format!("blocks {name}"), "/dev/vg0/web"])?;
    let mut numbers = Vec::new();
    for word in blocks.split_whitespace() {
        numbers.push(
            word.parse::<u64>()
                .map_err(|e| format!("{blocks:?}: {e}"))?,
        );
    }
    let (Some(first), Some(last)) = (numbers.first(), numbers.last()) else {
        return Err(format!("{name} has no blocks").into());
    };
    check!(
        last - first + 1 == numbers.len() as u64,
        "{name} is not in one piece: {blocks}"
    );
    // "0 819200 linear 253:0 2048"
    let table = cmd::run("dmsetup", ["table", "vg0-web"])?;
    let start = table
        .split_whitespace()
        .nth(4)
        .ok_or_else(|| format!("{table:?}"))?;
    let start: u64 = start.parse().map_err(|e| format!("{table:?}: {e}"))?;
    Ok((start + first * 8, numbers.len() as u64 * 8))
}

fn bacula(fd_conf: &str) -> Result<Bacula> {
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![("g".into(), fileset_plugin("guestsnap: lv=vg0/web"))],
        fd_conf: fd_conf.to_owned(),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    Ok(bacula)
}

/// A file's contents, a folder's names, the start of a large file: each that cannot be read is an error with its name,
/// everything else is saved.
fn sectors() -> Result {
    let vg = HostVg::on_mapped("vg0")?;
    let dir = WorkDir::new()?;
    let mut expected = None;
    let disk = guest(&vg, &dir, 160, |root| {
        many(root, 60, 3)?;
        std::fs::write(root.join("bad-small"), bytes(1, 40_000))?;
        std::fs::write(root.join("bad-large"), bytes(2, 600_000))?;
        std::fs::write(root.join("good"), bytes(3, 200_000))?;
        std::fs::create_dir(root.join("bad-folder"))?;
        std::fs::write(root.join("bad-folder/lost"), "lost")?;
        expected = Some(Manifest::of(root)?);
        Ok(())
    })?;
    let expected = expected.ok_or("no manifest")?;
    let small = place("/bad-small")?;
    // The second half: what was read before the error is no excuse.
    let large = place("/bad-large")?;
    let large = (large.0 + large.1 / 2, large.1 - large.1 / 2);
    let mut bad = vec![small, large, place("/bad-folder")?];
    bad.sort_unstable();
    let bacula = bacula("")?;
    vg.set_trouble(Trouble::Bad(bad))?;
    let job = run(&bacula, "Full")?;
    check!(
        job.errors >= 3 && job.status != 'f',
        "status {}, {} errors",
        job.status,
        job.errors
    );
    for name in ["bad-small", "bad-large", "bad-folder"] {
        let told = job
            .log
            .lines()
            .any(|l| l.contains(name) && l.contains("Input/output error"));
        check!(told, "{name} is not named with its error");
    }
    let all = dir.join("all");
    bacula.restore(job.jobid, &Selection::All, &all)?;
    let below = [".guestsnap", "bad-small", "bad-large", "bad-folder"];
    Manifest::of(&guest_in(&all, "web"))?.check_equals(
        &expected,
        &Ignore {
            below: below.map(PathBuf::from).to_vec(),
            ..restored()
        },
    )?;
    vg.set_trouble(Trouble::None)?;
    made_up_for(&bacula)?;
    let job = run(&bacula, "Full")?.clean()?;
    // A changed file that cannot be read hides no other.
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    cmd::run(
        "touch",
        [mounted.path().join("bad-small").display().to_string()],
    )?;
    mounted.close()?;
    vg.set_trouble(Trouble::Bad(vec![small]))?;
    hides_none(&bacula)?;
    vg.set_trouble(Trouble::None)?;
    let again = dir.join("again");
    bacula
        .restore(job.jobid, &Selection::All, &again)?
        .clean()?;
    Manifest::of(&guest_in(&again, "web"))?.check_equals(&expected, &restored())
}

/// The disk is well again: the next job has what the one before has not, changed or not.
fn made_up_for(bacula: &Bacula) -> Result {
    for level in ["Incremental", "Differential accurate=yes"] {
        let job = run(bacula, level)?.clean()?;
        let names = bacula.list_files(job.jobid)?;
        for (name, sent) in [
            ("bad-small", true),
            ("bad-large", true),
            ("bad-folder/lost", true),
            ("good", false),
        ] {
            check!(
                names.contains(&format!("/@guestsnap/web/{name}")) == sent,
                "{name} in the next job, {level}: {names:?}"
            );
        }
        check!(
            bacula.deleted(job.jobid)?.is_empty(),
            "something is recorded as deleted"
        );
    }
    Ok(())
}

/// Jobs that cannot read a changed file name it, and do not have it.
fn hides_none(bacula: &Bacula) -> Result {
    for _ in 0..2 {
        let bad = run(bacula, "Incremental")?;
        check!(
            bad.errors > 0 && bad.log.contains("bad-small"),
            "no error names the file:\n{}",
            bad.log
        );
        let names = bacula.list_files(bad.jobid)?;
        check!(
            !names.iter().any(|name| name.ends_with("/bad-small")),
            "a file that cannot be read hides the one before: {names:?}"
        );
    }
    Ok(())
}

/// The whole disk, LVM's own metadata too, fails in the middle of a job: the job is not OK, and what could not be
/// removed is named. When the disk is back, the next job removes it.
fn gone() -> Result {
    let vg = HostVg::on_mapped("vg0")?;
    let dir = WorkDir::new()?;
    guest(&vg, &dir, 160, |root| {
        many(root, 20, 3)?;
        std::fs::write(root.join("large"), bytes(2, 64 << 20))?;
        Ok(())
    })?;
    let bacula = bacula("Maximum Bandwidth Per Job = 4 mb/s")?;
    let pid = bacula.fd_pid();
    let before = bacula.host_state()?;
    let id = bacula.start_backup("g", "Full")?;
    bacula.wait_processing("web/large", Duration::from_secs(120))?;
    vg.set_trouble(Trouble::Gone)?;
    let job = bacula.wait_job(id);
    vg.set_trouble(Trouble::None)?;
    let job = job?;
    println!("{}", job.log);
    check!(!job.is_clean() && job.errors > 0, "the job is OK");
    check!(
        job.log.contains("web/large") && job.log.contains("Input/output error"),
        "the file is not named with its error"
    );
    let left = vg.names()?;
    if left.len() > 1 {
        let snapshot = left.iter().find(|n| n.starts_with("guestsnap-"));
        check!(
            snapshot.is_some_and(|s| job.log.contains(s.as_str())),
            "{left:?} is left and not named"
        );
    }
    let again = bacula.run_backup("g", "Full")?;
    println!("{}", again.log);
    again.clean()?;
    bacula.check_host_state(&before)?;
    check!(bacula.fd_pid() == pid, "the daemon is another one");
    Ok(())
}
