//! Snapshots that fill up under a running job, through the real Bacula: an overflow is an error of its guest and fails
//! the job, and one that got more room in time is neither.

use std::path::Path;
use std::time::Duration;

use super::plugin::{guest_in, restored};
use crate::bacula::{Bacula, BaculaOptions, JobResult, Selection, fileset_plugin};
use crate::check;
use crate::guestdisk::{Fs, GuestDisk, MIB, Part, Table};
use crate::hoststate::HostState;
use crate::inside::{Scenario, scenario};
use crate::lvm::{HostVg, lvm};
use crate::points::{self, Points};
use crate::populate::{bytes, many};
use crate::tree::Manifest;
use crate::workdir::WorkDir;
use crate::{Result, cmd, message};
use guestsnap::point::Point;

/// In the emulated machines.
pub const VM: &[Scenario] = &[scenario("points_overflow", overflow)
    .seconds(600)
    .only("trixie")];

/// Where the guest's filesystem ends: what is written behind it fills the snapshot, and leaves the guest as it is.
const UNUSED: u64 = 48;

/// A guest `vg0/NAME`; what is in it.
fn guest(vg: &HostVg, dir: &WorkDir, name: &str) -> Result<Manifest> {
    let lv = vg.lv(name, "128m")?;
    let parts = [Part::fs((UNUSED - 4) * MIB, Fs::Ext4, "root")];
    let disk = GuestDisk::create(&lv, Table::Mbr, &parts)?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    many(mounted.path(), 10, 1)?;
    // More than is read ahead of a file.
    std::fs::write(mounted.path().join("large"), bytes(2, 12 << 20))?;
    mounted.sync()?;
    let expected = Manifest::of(mounted.path())?;
    mounted.close()?;
    Ok(expected)
}

/// Writes behind the guest's filesystem: megabytes, from that one on.
fn write(from: u64, count: u64) -> Result {
    cmd::sh(&format!(
        "dd if=/dev/zero of=/dev/vg0/busy bs=1M seek={} count={count} oflag=direct conv=notrunc status=none",
        UNUSED + from
    ))?;
    Ok(())
}

/// How full the snapshot of `busy` is, in percent.
fn fill() -> Result<u64> {
    let select = "origin=busy && lv_name=~^guestsnap-";
    let columns = ["--noheadings", "-o", "lv_dm_path", "-S", select, "vg0"];
    let device = lvm("lvs", &columns)?;
    // "0 262144 snapshot 2064/32768 16"
    let status = cmd::run("dmsetup", ["status", device.trim()])?;
    let parts = status.split_whitespace().nth(3).and_then(|word| {
        let (used, all) = word.split_once('/')?;
        Some(used.parse::<u64>().ok()? * 100 / all.parse::<u64>().ok()?)
    });
    Ok(parts.ok_or_else(|| format!("of a snapshot: {status:?}"))?)
}

struct Bed {
    points: Points,
    bacula: Bacula,
    before: HostState,
}

impl Bed {
    /// A job that is held at a point of its first guest, `busy`, while something happens to that guest's disk.
    fn job(&self, point: Point, meanwhile: impl FnOnce() -> Result) -> Result<JobResult> {
        self.points.act(point, "hang")?;
        let id = self.bacula.start_backup("g", "Full")?;
        let reached = self.points.wait_acted(Duration::from_secs(120));
        let done = reached.and_then(|()| meanwhile());
        self.points.clear()?;
        let job = self.bacula.wait_job(id)?;
        println!("=== {}\n{}", point.name(), job.log);
        done?;
        self.bacula.check_host_state(&self.before)?;
        Ok(job)
    }

    /// Restores the job: these guests are whole.
    fn check_whole(&self, job: &JobResult, guests: &[(&str, &Manifest)], to: &Path) -> Result {
        // The Director has no names of files of a job that failed: it gives all of them, or none.
        let restore = self.bacula.restore(job.jobid, &Selection::All, to)?;
        println!("{}", restore.log);
        for (name, expected) in guests {
            Manifest::of(&guest_in(to, name))?
                .check_equals(expected, &restored())
                .map_err(|e| format!("{name}: {}", message(&e)))?;
        }
        Ok(())
    }
}

/// The job failed because of `busy`, and says so.
fn check_failed(job: &JobResult) -> Result {
    let told = job
        .log
        .lines()
        .any(|l| l.contains("busy: ERROR GS-305") && l.contains("vg0/busy"));
    check!(
        job.status == 'f' && job.errors > 0 && told,
        "status {}, {} errors, told: {told}",
        job.status,
        job.errors
    );
    check!(
        !job.log.contains("calm: ERROR"),
        "the other guest has an error"
    );
    Ok(())
}

fn overflow() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let busy = guest(&vg, &dir, "busy")?;
    let calm = guest(&vg, &dir, "calm")?;
    let points = Points::new("")?;
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(points::built()?.plugin),
        fd_env: vec![points.env()],
        filesets: vec![(
            "g".into(),
            fileset_plugin("guestsnap: lv=vg0/busy lv=vg0/calm size=16M"),
        )],
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let before = bacula.host_state()?;
    let bed = Bed {
        points,
        bacula,
        before,
    };

    // After the last byte was read, more than it holds at once: all bytes read are right, but no fact proves it.
    let job = bed.job(Point::LastFile, || write(0, 64))?;
    check_failed(&job)?;
    check!(
        job.log.contains("COW peak 100 %"),
        "the snapshot is not said to be full"
    );
    bed.check_whole(&job, &[("calm", &calm)], &dir.join("last"))?;

    // Before the first byte, and there is no room to give.
    let job = bed.job(Point::FirstFile, || {
        vg.lvcreate(&["-n", "filler", "-l", "100%FREE"])?;
        write(0, 12)?;
        check!((70..100).contains(&fill()?), "{} % full", fill()?);
        // It is looked at every second.
        std::thread::sleep(Duration::from_secs(4));
        write(12, 20)?;
        lvm("lvremove", &["-y", "vg0/filler"])?;
        Ok(())
    })?;
    check_failed(&job)?;
    check!(
        job.log.contains("could not get more room"),
        "nothing is said of the room"
    );
    check!(
        job.log
            .lines()
            .any(|l| l.contains("busy/large") && l.contains("Input/output error")),
        "the file that could not be read is not named"
    );
    bed.check_whole(&job, &[("calm", &calm)], &dir.join("first"))?;

    // More than it holds, no faster than it can be given room.
    let job = bed.job(Point::FirstFile, || {
        for n in 0..20 {
            write(n, 1)?;
            cmd::wait_for("more room", Duration::from_secs(30), || {
                Ok((fill()? < 85).then_some(()))
            })?;
        }
        Ok(())
    })?;
    check!(
        job.log.contains("% full and got more room"),
        "nothing is said of the room"
    );
    let job = job.clean()?;
    bed.check_whole(&job, &[("busy", &busy), ("calm", &calm)], &dir.join("room"))
}
