//! A guest of two disks, found by its xl.cfg, at rest while its snapshots are taken.

use std::fs;
use std::path::Path;

use super::plugin::{bacula, guest_in, restored, run};
use crate::Result;
use crate::bacula::Selection;
use crate::check;
use crate::guestdisk::{Fs, GuestDisk, MIB, Part, Table, classic};
use crate::inside::{Scenario, scenario};
use crate::lvm::HostVg;
use crate::populate::rich;
use crate::tree::{Ignore, Manifest};
use crate::workdir::WorkDir;

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("definitions_xl_quiesce", xl_quiesce).only("bookworm"),
    scenario("definitions_libvirt_and_tags", libvirt_and_tags).only("bookworm"),
];

const CLIENT_FILE: &str = "/etc/bacula/guestsnap.toml";
const XL_FILE: &str = "/etc/xen/web1.cfg";

/// Takes files away that belong to no test folder.
struct Configured;

impl Configured {
    fn new(client: &str, xl: &str) -> Result<Configured> {
        fs::create_dir_all("/etc/bacula")?;
        fs::create_dir_all("/etc/xen")?;
        fs::write(CLIENT_FILE, client)?;
        fs::write(XL_FILE, xl)?;
        Ok(Configured)
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        let _ = fs::remove_file(CLIENT_FILE);
        let _ = fs::remove_file(XL_FILE);
    }
}

fn xl_quiesce() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let root = classic(&vg.lv("web1-root", "400m")?, 32 * MIB)?;
    classic(&vg.lv("web1-data", "400m")?, 32 * MIB)?;
    let mounted = root.mount(1, &dir.join("mnt"))?;
    rich(mounted.path(), 1, Fs::Ext3.can())?;
    mounted.sync()?;
    let expected = Manifest::of(mounted.path())?;
    let path = |name: &str| dir.join(name).display().to_string();
    let client = |thaw_by: &str, seconds: u32| {
        format!(
            "[guest.web1]\nquiesce = 'commands'\nfreeze = ['/usr/bin/touch', '{}']\nthaw = {thaw_by}\nfreeze_seconds = {seconds}\n",
            path("frozen"),
        )
    };
    let touch = format!("['/usr/bin/touch', '{}']", path("thawed"));
    // One volume by its path, one by its device-mapper name.
    let xl = "name = 'web1'\ndisk = [ 'phy:/dev/vg0/web1-root,xvda,w',\n '/dev/mapper/vg0-web1--data,raw,xvdb,rw',\n \
              '/srv/cd.iso,raw,xvdc,r,cdrom' ]\n";
    let configured = Configured::new(&client(&touch, 300), xl)?;

    let bacula = bacula("guestsnap: guest=web1")?;
    let full = run(&bacula, "Full")?.clean()?;
    for text in [
        "disk vg0/web1-root",
        "disk vg0/web1-data",
        "(application-consistent)",
    ] {
        check!(full.log.contains(text), "the job log does not say {text:?}");
    }
    let times = |name: &str| fs::metadata(path(name))?.modified();
    check!(times("frozen")? <= times("thawed")?, "thawed before frozen");

    let all = dir.join("all");
    bacula.restore(full.jobid, &Selection::All, &all)?.clean()?;
    // Which disks, and whether whole; every attribute is `plugin_classic`'s subject.
    let ignore = Ignore {
        root: true,
        nanoseconds: true,
        xattrs: vec!["trusted.".into()],
        ..restored()
    };
    // Neither disk has an fstab: each filesystem stands by itself.
    let saved = guest_in(&all, "web1").join(".guestsnap/volumes/p1");
    Manifest::of(&saved)?.check_equals(&expected, &ignore)?;

    // A thaw that fails: said as an error of the job, and the backup is there all the same.
    drop(configured);
    let _configured = Configured::new(&client("['/bin/false']", 300), xl)?;
    let job = run(&bacula, "Full")?;
    check!(job.log.contains("GS-208"), "nothing about the failed thaw");
    check!(job.files > 0, "the guest was not saved");

    Ok(())
}

/// Guests by libvirt's XML, one on a volume of a storage pool, by tag, one left out; disks that are not covered are named.
fn libvirt_and_tags() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let names = ["kvm1", "kvm2", "tagged", "other"];
    for name in names {
        let lv = vg.lv(name, "32m")?;
        let disk = GuestDisk::create(&lv, Table::Whole, &[Part::fs(32 * MIB, Fs::Ext4, name)])?;
        let mounted = disk.mount(1, &dir.join("mnt"))?;
        fs::write(mounted.path().join("who"), name)?;
        mounted.close()?;
    }
    vg.tag("tagged", "backup")?;
    vg.tag("other", "backup")?;
    let xml = "<domain type='kvm'><name>kvm1</name><devices>\
        <disk type='block' device='disk'><source dev='/dev/vg0/kvm1'/><target dev='vda'/></disk>\
        <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/srv/x.qcow2'/><target dev='vdb'/></disk>\
        <disk type='network' device='disk'><source protocol='rbd' name='pool/x'/><target dev='vdc'/></disk>\
        <disk type='file' device='cdrom'><source file='/srv/cd.iso'/><target dev='hdc'/></disk>\
        </devices></domain>";
    // Not in /tmp: definitions must lie where only root can put them.
    let libvirt = "/etc/libvirt/qemu";
    let files = [
        (format!("{libvirt}/kvm1.xml"), xml),
        (
            format!("{libvirt}/kvm2.xml"),
            "<domain type='kvm'><name>kvm2</name><devices><disk type='volume' device='disk'>\
             <source pool='guests' volume='kvm2'/><target dev='vda'/></disk></devices></domain>",
        ),
        (
            "/etc/libvirt/storage/guests.xml".to_owned(),
            "<pool type='logical'><name>guests</name><source><device path='/dev/vdc'/><name>vg0</name>\
             <format type='lvm2'/></source><target><path>/dev/vg0</path></target></pool>",
        ),
    ];
    for (path, text) in &files {
        fs::create_dir_all(Path::new(path).parent().unwrap_or(Path::new("/")))?;
        fs::write(path, text)?;
    }

    let bacula = bacula(&format!(
        "guestsnap: libvirt={libvirt}/*.xml tag=backup exclude=oth*"
    ))?;
    let job = run(&bacula, "Full");
    for (path, _) in &files {
        fs::remove_file(path)?;
    }
    let job = job?;
    // The qcow2 and the network disk; a CD is not missed.
    check!(
        job.status == 'T' && job.errors == 2,
        "status {}, {} errors",
        job.status,
        job.errors
    );
    for text in ["x.qcow2", "rbd", "cd.iso"] {
        check!(job.log.contains(text), "the job log does not name {text}");
    }
    let all = dir.join("all");
    bacula.restore(job.jobid, &Selection::All, &all)?.clean()?;
    for name in ["kvm1", "kvm2", "tagged"] {
        let who = fs::read_to_string(guest_in(&all, name).join("who"))?;
        check!(who == name, "{name} holds {who}");
    }
    check!(
        !guest_in(&all, "other").exists(),
        "the excluded guest is there"
    );
    Ok(())
}
