//! Guests on DRBD: real resources of the kernel's own DRBD 8.4, one of them with a peer on the same machine.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::plugin::{bacula, guest_in, restored, run};
use crate::bacula::{Bacula, JobResult, Selection, fileset_plugin};
use crate::check;
use crate::guestdisk::{Fs, GuestDisk, MIB, Mounted, Part, Table, classic, size_of};
use crate::hoststate::{HostState, Scope};
use crate::inside::{Scenario, scenario};
use crate::lvm::HostVg;
use crate::points::Points;
use crate::populate::rich;
use crate::tree::{Ignore, Manifest};
use crate::workdir::WorkDir;
use crate::{Result, cmd, message, tool};

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("drbd_guest", guests).only("bookworm"),
    scenario("points_drbd", changes).only("trixie"),
];

/// Names the resources for DRBD's udev rules.
const CONFIG: &str = "/etc/drbd.d/bed.res";
const XL: &str = "/etc/xen/web1.cfg";
const LIBVIRT: &str = "/etc/libvirt/qemu/inst1.xml";
/// Addresses of `web1` and of its peer.
const ENDS: [&str; 2] = ["ipv4:127.0.0.1:7700", "ipv4:127.0.0.1:7701"];

fn drbdsetup(words: &str) -> Result {
    cmd::run("drbdsetup", words.split(' ')).map(drop)
}

/// DRBD in the kernel, with resources; all are gone when it is dropped.
struct Drbd {
    resources: Vec<&'static str>,
}

impl Drbd {
    fn load() -> Result<Drbd> {
        let host = |name: &str, minor: u32, disk: &str| {
            let other = format!("on other {{ address 127.0.0.1:{}; }}", 7900 + minor);
            format!(
                "resource {name} {{ device /dev/drbd{minor}; disk {disk}; meta-disk internal; \
                 on bed {{ address 127.0.0.1:{}; }} {other} }}\n",
                7800 + minor
            )
        };
        fs::write(
            CONFIG,
            host("web1", 0, "/dev/vg0/web1") + &host("inst1", 2, "/dev/vg0/u1.disk0_data"),
        )?;
        // The resources that only the kernel knows have no helper.
        cmd::run("modprobe", ["drbd", "usermode_helper=/bin/true"])?;
        Ok(Drbd {
            resources: Vec::new(),
        })
    }

    /// A resource that has just got its disk: Secondary and Inconsistent.
    fn resource(&mut self, name: &'static str, minor: u32, disk: &str, metadata: &str) -> Result {
        let (kind, index, on) = match metadata {
            "internal" => ("internal", "internal", disk),
            other => ("flex-external", "flexible", other),
        };
        let words = format!("--force {minor} v08 {on} {kind} create-md");
        cmd::run("drbdmeta", words.split(' '))?;
        drbdsetup(&format!("new-resource {name}"))?;
        self.resources.push(name);
        drbdsetup(&format!("new-minor {name} {minor} 0"))?;
        drbdsetup(&format!("attach {minor} {disk} {on} {index}"))
    }

    /// A resource without a peer, in use.
    fn primary(&mut self, name: &'static str, minor: u32, disk: &str, metadata: &str) -> Result {
        self.resource(name, minor, disk, metadata)?;
        drbdsetup(&format!("primary {minor} --force"))
    }

    fn remove(&mut self) -> Result {
        for name in self.resources.drain(..) {
            drbdsetup(&format!("down {name}"))?;
        }
        fs::remove_file(CONFIG)?;
        cmd::run("udevadm", ["settle"])?;
        cmd::run("rmmod", ["drbd"]).map(drop)
    }
}

impl Drop for Drbd {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("{}", message(&error));
        }
    }
}

/// Roles and states of all devices.
fn states() -> Result<Vec<String>> {
    let text = fs::read_to_string("/proc/drbd")?;
    let lines = text.lines().filter(|line| line.contains(" cs:"));
    Ok(lines.map(str::to_owned).collect())
}

fn wait_for_state(minor: u32, state: &str) -> Result {
    let start = format!("{minor}: ");
    let seen = || {
        let states = states()?;
        let mut lines = states.iter();
        let found = lines.any(|l| l.trim_start().starts_with(&start) && l.contains(state));
        Ok(found.then_some(()))
    };
    cmd::wait_for(state, Duration::from_secs(60), seen)
}

/// A disk of one filesystem with its name in a file.
fn named(device: &str, name: &str, dir: &WorkDir) -> Result<GuestDisk> {
    let size = size_of(Path::new(device))? / MIB * MIB;
    let disk = GuestDisk::create(
        Path::new(device),
        Table::Whole,
        &[Part::fs(size, Fs::Ext4, "fs")],
    )?;
    let mounted = disk.mount(1, &dir.join("named"))?;
    fs::write(mounted.path().join("name"), name)?;
    mounted.close()?;
    Ok(disk)
}

/// `web1` with a connected peer, `web2` of one filesystem to the end of its device, and an instance as Ganeti lays it
/// out, with external metadata larger than the data.
fn lay_out(vg: &HostVg, drbd: &mut Drbd) -> Result {
    for (name, size) in [
        ("web1", "120m"),
        ("web1-peer", "120m"),
        ("web2", "48m"),
        ("u1.disk0_data", "48m"),
        ("u1.disk0_meta", "52m"),
        ("u2.disk1", "48m"),
        ("fresh", "16m"),
    ] {
        vg.lv(name, size)?;
    }
    for name in ["u1.disk0_data", "u1.disk0_meta", "u2.disk1"] {
        vg.tag(name, "originstname+inst1")?;
    }
    drbd.resource("web1", 0, "/dev/vg0/web1", "internal")?;
    drbd.resource("peer", 9, "/dev/vg0/web1-peer", "internal")?;
    let [here, there] = ENDS;
    drbdsetup(&format!("connect web1 {here} {there} --protocol=C"))?;
    drbdsetup(&format!("connect peer {there} {here} --protocol=C"))?;
    wait_for_state(0, "cs:Connected")?;
    // Their contents so far differ and are never read.
    drbdsetup("new-current-uuid 0 --clear-bitmap")?;
    wait_for_state(9, "ds:UpToDate/UpToDate")?;
    drbdsetup("primary 0")?;
    drbd.primary("web2", 1, "/dev/vg0/web2", "internal")?;
    let (data, metadata) = ("/dev/vg0/u1.disk0_data", "/dev/vg0/u1.disk0_meta");
    drbd.primary("inst1", 2, data, metadata)?;
    drbd.resource("fresh", 5, "/dev/vg0/fresh", "internal")?;
    cmd::run("udevadm", ["settle"]).map(drop)
}

/// Runs a job over these selectors; roles and states stay as they are.
fn job(bacula: &mut Bacula, line: &str) -> Result<JobResult> {
    bacula.set_filesets(&[("g", fileset_plugin(&format!("guestsnap: {line}")))])?;
    let before = states()?;
    let job = run(bacula, "Full")?;
    let after = states()?;
    check!(before == after, "DRBD changed: {before:?} {after:?}");
    Ok(job)
}

fn check_log(job: &JobResult, texts: &[&str]) -> Result {
    for text in texts {
        check!(job.log.contains(text), "the job log does not say {text:?}");
    }
    Ok(())
}

fn guests() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let mut drbd = Drbd::load()?;
    lay_out(&vg, &mut drbd)?;
    let disk = classic(Path::new("/dev/drbd0"), 16 * MIB)?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    rich(mounted.path(), 1, Fs::Ext3.can())?;
    mounted.sync()?;
    let expected = Manifest::of(mounted.path())?;
    named("/dev/drbd1", "web2", &dir)?;
    named("/dev/drbd2", "disk0", &dir)?;
    named("/dev/vg0/u2.disk1", "disk1", &dir)?;

    let mut bacula = bacula("guestsnap: lv=vg0/web1")?;
    selected(&mut bacula, &dir, &expected)?;
    defined(&mut bacula, &dir, &expected)?;
    let listed = cmd::run(&tool()?.display().to_string(), ["list"])?;
    for text in ["below drbd0 (Primary/UpToDate)", "not for backups: GS-212"] {
        check!(listed.contains(text), "list does not say {text}:\n{listed}");
    }
    mounted.close()?;
    apart(&mut bacula)?;
    refused(&mut bacula, &dir)?;
    drop(drbd);
    Ok(())
}

/// Both sides of a connected resource, and volumes by pattern and by tag. The running guest's filesystem is dirty.
fn selected(bacula: &mut Bacula, dir: &WorkDir, expected: &Manifest) -> Result {
    let job = job(bacula, "lv=vg0/web* tag=originstname+*")?.clean()?;
    check_log(
        &job,
        &[
            "below drbd0 (Primary/UpToDate)",
            "below drbd9 (Secondary/UpToDate)",
            "below drbd2 (Primary/UpToDate)",
            "left out, metadata of DRBD: vg0/u1.disk0_meta",
        ],
    )?;
    let all = dir.join("all");
    bacula.restore(job.jobid, &Selection::All, &all)?.clean()?;
    let ignore = Ignore {
        root: true,
        ..restored()
    };
    for name in ["web1", "web1-peer"] {
        let saved = guest_in(&all, name);
        Manifest::of(&saved)?.check_equals(expected, &ignore)?;
    }
    let volumes = ".guestsnap/volumes";
    for (path, expected) in [
        ("web2/name".to_owned(), "web2"),
        (format!("inst1/{volumes}/disk/name"), "disk0"),
        (format!("inst1/{volumes}/disk2/name"), "disk1"),
    ] {
        let found = fs::read_to_string(all.join("@guestsnap").join(&path))?;
        check!(found == expected, "{path} holds {found}");
    }
    Ok(())
}

/// Guests whose definitions name DRBD's devices.
fn defined(bacula: &mut Bacula, dir: &WorkDir, expected: &Manifest) -> Result {
    fs::create_dir_all("/etc/xen")?;
    fs::create_dir_all("/etc/libvirt/qemu")?;
    fs::write(XL, "name = 'xen1'\ndisk = [ 'drbd:web1,xvda,w' ]\n")?;
    fs::write(
        LIBVIRT,
        "<domain type='kvm'><name>inst1</name><devices><disk type='block'><source dev='/dev/drbd2'/>\
         <target dev='vda'/></disk></devices></domain>",
    )?;
    let job = job(bacula, &format!("xl={XL} libvirt={LIBVIRT}"));
    fs::remove_file(XL)?;
    fs::remove_file(LIBVIRT)?;
    let job = job?.clean()?;
    check_log(
        &job,
        &["xen1: disk vg0/web1", "inst1: disk vg0/u1.disk0_data"],
    )?;
    let all = dir.join("defined");
    bacula.restore(job.jobid, &Selection::All, &all)?.clean()?;
    let ignore = Ignore {
        root: true,
        ..restored()
    };
    Manifest::of(&guest_in(&all, "xen1"))?.check_equals(expected, &ignore)?;
    let found = fs::read_to_string(guest_in(&all, "inst1").join("name"))?;
    check!(found == "disk0", "inst1 holds {found}");
    Ok(())
}

/// A secondary that lost its peer is saved with a warning, and refused once DRBD knows that it is outdated.
fn apart(bacula: &mut Bacula) -> Result {
    let [here, there] = ENDS;
    drbdsetup(&format!("disconnect {there} {here}"))?;
    wait_for_state(9, "cs:StandAlone")?;
    if states()?
        .iter()
        .any(|l| l.contains(" 9: ") && l.contains("ds:Outdated"))
    {
        println!("DRBD knows by itself that the disk is outdated");
    } else {
        let job = job(bacula, "lv=vg0/web1-peer")?;
        check!(
            job.status == 'T' && job.files > 0,
            "status {}, {} files",
            job.status,
            job.files
        );
        check_log(
            &job,
            &["GS-212", "Secondary/UpToDate here without a connection"],
        )?;
        drbdsetup("outdate 9")?;
    }
    let job = job(bacula, "lv=vg0/web1*")?;
    check!(
        job.status == 'T' && job.errors == 1,
        "status {}, {} errors",
        job.status,
        job.errors
    );
    check_log(
        &job,
        &["GS-212", "drbd9 is Secondary/Outdated here: connect it"],
    )
}

/// Disks that are no current copies, and a device that the host uses itself.
fn refused(bacula: &mut Bacula, dir: &WorkDir) -> Result {
    drbdsetup("secondary 0")?;
    drbdsetup("detach 0")?;
    drbdsetup("secondary 2")?;
    drbdsetup("detach 2")?;
    let mounted = Mounted::device("/dev/drbd1", Fs::Ext4, &dir.join("host"))?;
    let job = job(
        bacula,
        "lv=vg0/web1 lv=vg0/fresh lv=vg0/u1.disk0_data lv=vg0/web2",
    )?;
    mounted.close()?;
    check!(job.status == 'f', "status {}", job.status);
    let mounted = format!(
        "vg0/web2: mounted on {} (through drbd1)",
        dir.join("host").display()
    );
    check_log(
        &job,
        &[
            "vg0/web1: it has metadata of DRBD",
            "vg0/fresh: drbd5 is Secondary/Inconsistent here",
            "vg0/u1.disk0_data: it has metadata of DRBD",
            "GS-212",
            "GS-203",
            &mounted,
        ],
    )?;
    // A definition names a device without a disk.
    fs::write(XL, "name = 'xen1'\ndisk = [ '/dev/drbd0,raw,xvda,rw' ]\n")?;
    let job = self::job(bacula, &format!("xl={XL} lv=vg0/u1.disk0_meta"));
    fs::remove_file(XL)?;
    let job = job?;
    check!(job.status == 'f', "status {}", job.status);
    // A guest that has the volume itself open does without DRBD.
    let running = fs::File::open("/dev/vg0/web1")?;
    self::job(bacula, "lv=vg0/web1")?.clean()?;
    drop(running);
    check_log(
        &job,
        &[
            "/dev/drbd0 has no logical volume as its disk here",
            "GS-212",
        ],
    )
}

/// A disk that becomes outdated while its snapshot is taken.
fn changes() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let mut drbd = Drbd::load()?;
    vg.lv("web1", "48m")?;
    drbd.primary("web1", 0, "/dev/vg0/web1", "internal")?;
    let dir = WorkDir::new()?;
    named("/dev/drbd0", "web1", &dir)?;
    drbdsetup("secondary 0")?;
    let points = Points::new("")?;
    let work = points.working_dir().display().to_string();
    let words = ["backup", work.as_str(), "lv=vg0/web1"];
    let before = HostState::capture(None)?;
    let outcome = points.drive(&words)?;
    check!(outcome.of('E').is_empty(), "{}", outcome.text);
    let script = "/usr/sbin/lvcreate \"$@\" && exec drbdsetup outdate 0";
    points.stand_in("lvcreate", Some(script))?;
    let outcome = points.drive(&words)?;
    let errors = outcome.of('E');
    check!(
        errors
            .iter()
            .any(|e| e.contains("drbd0 is Secondary/Outdated here")),
        "{}",
        outcome.text
    );
    let left = HostState::settled_diff(&before, &Scope::default())?;
    check!(left.is_empty(), "left:\n  {}", left.join("\n  "));
    Ok(())
}
