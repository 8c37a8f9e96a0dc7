//! More guests than their volume group has room for snapshots.

use std::fs;
use std::time::Duration;

use super::plugin::{bacula, guest_in, run};
use crate::bacula::{Bacula, BaculaOptions, JobResult, Selection, fileset_plugin};
use crate::check;
use crate::guestdisk::{Fs, GuestDisk, MIB, Part, Table};
use crate::inside::{Scenario, scenario};
use crate::lvm::{HostVg, lvm};
use crate::workdir::WorkDir;
use crate::{Result, cmd, plugin_so};

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("room_turns", turns).only("bookworm"),
    scenario("room_late", late).only("bookworm"),
];

const GUESTS: [&str; 5] = ["g1", "g2", "g3", "g4", "g5"];

/// A group with room for one snapshot saves all guests, one after the other; with room for none, each is an error.
fn turns() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    for name in GUESTS {
        disk(&vg, &dir, name)?;
    }
    // A snapshot of 16 MiB has four extents.
    leave(&vg, 7)?;

    let mut bacula = bacula("guestsnap: lv=vg0/g* size=16M")?;
    let job = run(&bacula, "Full")?.clean()?;
    let waited = job.log.matches("no room for its snapshots yet").count();
    check!(waited == 4, "{waited} guests waited");
    let all = dir.join("all");
    bacula.restore(job.jobid, &Selection::All, &all)?.clean()?;
    for name in GUESTS {
        let found = fs::read_to_string(guest_in(&all, name).join("name"))?;
        check!(found == name, "{name} holds {found}");
    }
    // No room is asked for before a guest's turn.
    bacula.set_filesets(&[(
        "g",
        fileset_plugin("guestsnap: lv=vg0/g* size=16M snapshots=turn"),
    )])?;
    let job = run(&bacula, "Full")?.clean()?;
    check!(!job.log.contains("no room"), "a guest waited for room");
    // The first guest alone has room.
    bacula.set_filesets(&[(
        "g",
        fileset_plugin("guestsnap: lv=vg0/g* size=16M snapshots=all"),
    )])?;
    let job = run(&bacula, "Full")?;
    let errors = job.log.matches("GS-303").count();
    check!(
        job.status == 'T' && job.errors == 4 && errors == 4,
        "status {}, {} errors, {errors} of them without room",
        job.status,
        job.errors
    );
    // Room for none.
    bacula.set_filesets(&[("g", fileset_plugin("guestsnap: lv=vg0/g* size=32M"))])?;
    let job = run(&bacula, "Full")?;
    for name in GUESTS {
        let text = format!("vg0/{name}: 32 MiB needed, 28 MiB free in vg0");
        check!(
            job.status == 'f' && job.log.contains("GS-303") && job.log.contains(&text),
            "status {}, not {text:?}",
            job.status
        );
    }
    Ok(())
}

/// Fills the group but for so many extents.
fn leave(vg: &HostVg, extents: u32) -> Result {
    let free = lvm("vgs", &["--noheadings", "-o", "vg_free_count", "vg0"])?;
    let filler = free.trim().parse::<u32>()? - extents;
    vg.lvcreate(&["-n", "filler", "-l", &filler.to_string()])
}

/// A guest's disk of one filesystem, which has the name in a file.
fn disk(vg: &HostVg, dir: &WorkDir, name: &str) -> Result<GuestDisk> {
    let lv = vg.lv(name, "48m")?;
    let disk = GuestDisk::create(&lv, Table::Whole, &[Part::fs(48 * MIB, Fs::Ext4, "fs")])?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    fs::write(mounted.path().join("name"), name)?;
    mounted.close()?;
    Ok(disk)
}

/// Two lines, with a guest of two disks and a guest that is frozen, both without room at first.
fn late_lines(dir: &WorkDir) -> Result<Bacula> {
    let touch = |name: &str| format!("['/usr/bin/touch', '{}']", dir.join(name).display());
    let client = format!(
        "[guest.two]\ndisks = ['vg0/two-a', 'vg0/two-b']\n[guest.q1]\nquiesce = 'commands'\nfreeze = {}\nthaw = {}\n",
        touch("frozen"),
        touch("thawed")
    );
    let lines = ["lv=vg0/a1 guest=two size=16M", "lv=vg0/q1 size=16M"];
    let lines = lines.map(|line| format!("Plugin = \"guestsnap: {line}\"\n"));
    let options = "Options { signature = MD5 }";
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![(
            "g".into(),
            format!("Include {{\n{options}\n{}}}", lines.concat()),
        )],
        client_file: Some(client),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    Ok(bacula)
}

/// Late snapshots of a guest with two disks and of a frozen guest; cancelled and killed while they exist.
fn late() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    for name in ["a1", "two-b", "q1"] {
        disk(&vg, &dir, name)?;
    }
    let slow = disk(&vg, &dir, "two-a")?;
    let mounted = slow.mount(1, &dir.join("mnt"))?;
    // One hole, which takes long to read.
    fs::File::create(mounted.path().join("huge"))?.set_len(400 << 30)?;
    mounted.close()?;
    leave(&vg, 9)?;
    let mut bacula = late_lines(&dir)?;
    stopped(&vg, &mut bacula)?;
    check!(
        !dir.join("frozen").exists(),
        "q1 was frozen before its turn"
    );

    let mounted = slow.mount(1, &dir.join("mnt"))?;
    fs::remove_file(mounted.path().join("huge"))?;
    mounted.close()?;
    let job = run(&bacula, "Full")?.clean()?;
    in_order(&job)?;
    let time = |name: &str| fs::metadata(dir.join(name))?.modified();
    check!(time("frozen")? <= time("thawed")?, "thawed before frozen");
    let all = dir.join("all");
    bacula.restore(job.jobid, &Selection::All, &all)?.clean()?;
    let volumes = "two/.guestsnap/volumes";
    for (path, expected) in [
        ("a1/name".to_owned(), "a1"),
        ("q1/name".to_owned(), "q1"),
        (format!("{volumes}/disk/name"), "two-a"),
        (format!("{volumes}/disk2/name"), "two-b"),
    ] {
        let found = fs::read_to_string(all.join("@guestsnap").join(&path))?;
        check!(found == expected, "{path} holds {found}");
    }
    Ok(())
}

/// Cancels a job and kills another one while the late snapshots of `two` exist.
fn stopped(vg: &HostVg, bacula: &mut Bacula) -> Result {
    let patience = Duration::from_secs(120);
    let before = bacula.host_state()?;
    let names = vg.names()?;
    let job = bacula.start_backup("g", "Full")?;
    bacula.wait_processing("disk/huge", patience)?;
    let more = vg.names()?.len() - names.len();
    check!(
        more == 2,
        "{more} snapshots while the guest of two disks is read"
    );
    bacula.cancel_cleanly(job, &before)?;

    let job = bacula.start_backup("g", "Full")?;
    bacula.wait_processing("disk/huge", patience)?;
    bacula.kill_fd()?;
    bacula.restart_fd()?;
    cmd::wait_for("the sweep", Duration::from_secs(60), || {
        Ok((vg.names()? == names).then_some(()))
    })?;
    let result = bacula.wait_job(job)?;
    check!(result.status != 'T', "a killed job is OK");
    Ok(())
}

/// Each guest is taken after the one before it was released, whole and at rest.
fn in_order(job: &JobResult) -> Result {
    let at = |parts: &[&str]| {
        let line = job
            .log
            .lines()
            .position(|l| parts.iter().all(|p| l.contains(p)));
        line.ok_or_else(|| format!("no line of the job log has {parts:?}"))
    };
    let steps = [
        at(&["a1: disk vg0/a1"])?,
        at(&["two: no room for its snapshots yet"])?,
        at(&["a1: ", " files, "])?,
        at(&["two: disk vg0/two-b", "all disks at one instant"])?,
        at(&["two: ", " files, "])?,
        at(&["q1: disk vg0/q1", "application-consistent"])?,
        at(&["q1: ", " files, "])?,
    ];
    check!(steps.is_sorted(), "the steps are not in order: {steps:?}");
    at(&["q1: no room for its snapshots yet"])
        .map(drop)
        .map_err(Into::into)
}
