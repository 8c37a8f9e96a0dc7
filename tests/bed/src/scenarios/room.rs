//! More guests than their volume group has room for snapshots.

use std::fs;

use super::plugin::{bacula, guest_in, run};
use crate::Result;
use crate::bacula::{Selection, fileset_plugin};
use crate::check;
use crate::guestdisk::{Fs, GuestDisk, MIB, Part, Table};
use crate::inside::{Scenario, scenario};
use crate::lvm::{HostVg, lvm};
use crate::workdir::WorkDir;

/// In the emulated machines.
pub const VM: &[Scenario] = &[scenario("room_turns", turns).only("bookworm")];

const GUESTS: [&str; 5] = ["g1", "g2", "g3", "g4", "g5"];

/// A group with room for one snapshot saves all guests, one after the other; with room for none, each is an error.
fn turns() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    for name in GUESTS {
        let lv = vg.lv(name, "48m")?;
        let disk = GuestDisk::create(&lv, Table::Whole, &[Part::fs(48 * MIB, Fs::Ext4, name)])?;
        let mounted = disk.mount(1, &dir.join("mnt"))?;
        fs::write(mounted.path().join("name"), name)?;
        mounted.close()?;
    }
    // A snapshot of 16 MiB has four extents: there are seven.
    let extents = lvm("vgs", &["--noheadings", "-o", "vg_free_count", "vg0"])?;
    let filler = extents.trim().parse::<u32>()? - 7;
    vg.lvcreate(&["-n", "filler", "-l", &filler.to_string()])?;

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
