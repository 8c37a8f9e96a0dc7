//! Guests of Proxmox VE on a thin pool, with volumes as Proxmox VE makes them.

use super::image::{guest_in, run};
use super::pve::{node, put};
use super::settings::Definitions;
use crate::bacula::{Bacula, BaculaOptions, Selection, fileset_plugin};
use crate::check;
use crate::guestdisk::{Fs, GuestDisk, MIB, Part, Table};
use crate::inside::{Scenario, scenario};
use crate::lvm::HostVg;
use crate::populate::rich;
use crate::tree::{Ignore, Manifest};
use crate::workdir::WorkDir;
use crate::{Result, cmd, message, plugin_so};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

/// In the emulated machines.
pub const VM: &[Scenario] = &[scenario("pve_guests", guests).seconds(900).only("trixie")];

const STORAGES: &str = "dir: local\n\tpath /var/lib/vz\n\tcontent iso,vztmpl,backup\n\n\
    lvmthin: data\n\tthinpool data\n\tvgname pve\n\tcontent rootdir,images\n";

const CONFIGURATIONS: &[(&str, &str)] = &[
    (
        "qemu-server/100.conf",
        "agent: 1\nboot: order=scsi0\nide2: data:vm-100-cloudinit,media=cdrom\nname: web\n\
         scsi0: data:vm-100-disk-0,iothread=1,size=100M\nscsi1: data:vm-100-disk-1,size=100M\nscsihw: virtio-scsi-single\n",
    ),
    (
        "qemu-server/101.conf",
        "name: back\nparent: before\nvirtio0: data:vm-101-disk-0,size=100M\n\n\
         [before]\nname: back\nsnaptime: 1700000000\nvirtio0: data:vm-101-disk-0,size=100M\n",
    ),
    (
        "qemu-server/102.conf",
        "name: clone\nscsi0: data:vm-102-disk-0,size=100M\n",
    ),
    (
        "qemu-server/103.conf",
        "name: off\nscsi0: data:vm-103-disk-0,size=100M\n",
    ),
    (
        "qemu-server/9000.conf",
        "name: golden\nscsi0: data:base-9000-disk-0,size=100M\ntemplate: 1\n",
    ),
    (
        "lxc/104.conf",
        "arch: amd64\nhostname: ct\nmp0: data:vm-104-disk-1,mp=/srv/data,size=100M\n\
         rootfs: data:vm-104-disk-0,size=100M\nunprivileged: 1\n",
    ),
];

/// A volume of the pool with one ext4.
fn disk(vg: &HostVg, name: &str, table: Table) -> Result<GuestDisk> {
    let lv = vg.thin_lv("data", name, "100m")?;
    GuestDisk::create(&lv, table, &[Part::fs(90 * MIB, Fs::Ext4, name)])
}

/// Fills the filesystem of a disk.
fn filled(disk: &GuestDisk, dir: &WorkDir, fill: impl Fn(&Path) -> Result) -> Result<Manifest> {
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    fill(mounted.path())?;
    mounted.sync()?;
    let expected = Manifest::of(mounted.path())?;
    mounted.close()?;
    Ok(expected)
}

fn says(text: &'static str) -> impl Fn(&Path) -> Result {
    move |root| {
        fs::create_dir_all(root.join("etc"))?;
        Ok(fs::write(root.join("etc/hostname"), text)?)
    }
}

fn lvm(words: &str) -> Result {
    let mut words = words.split(' ');
    cmd::run(words.next().unwrap_or_default(), words).map(drop)
}

/// A virtual machine with two disks, and its configuration disk of cloud-init.
fn two_disks(vg: &HostVg, dir: &WorkDir) -> Result<(Manifest, Manifest)> {
    let root = filled(&disk(vg, "vm-100-disk-0", Table::Gpt)?, dir, |root| {
        rich(root, 1, Fs::Ext4.can())?;
        fs::create_dir_all(root.join("etc"))?;
        fs::create_dir(root.join("data"))?;
        let fstab = "/dev/sda1 / ext4 defaults 0 1\n/dev/sdb1 /data ext4 defaults 0 2\n";
        Ok(fs::write(root.join("etc/fstab"), fstab)?)
    })?;
    let data = filled(&disk(vg, "vm-100-disk-1", Table::Gpt)?, dir, says("data\n"))?;
    vg.thin_lv("data", "vm-100-cloudinit", "4m")?;
    Ok((root, data))
}

/// A virtual machine after a rollback: its disk is a thin volume whose origin is the snapshot.
fn rolled_back(vg: &HostVg, dir: &WorkDir) -> Result<Manifest> {
    let origin = disk(vg, "vm-101-disk-0", Table::Gpt)?;
    let expected = filled(&origin, dir, says("before\n"))?;
    lvm("lvcreate -qq -n snap_vm-101-disk-0_before -pr -s pve/vm-101-disk-0")?;
    filled(&origin, dir, says("after\n"))?;
    lvm("lvremove -qq -f pve/vm-101-disk-0")?;
    lvm("lvcreate -qq -n vm-101-disk-0 -kn -s pve/snap_vm-101-disk-0_before")?;
    Ok(expected)
}

/// A linked clone of a template, and what it has changed.
fn linked_clone(vg: &HostVg, dir: &WorkDir) -> Result<Manifest> {
    let template = disk(vg, "vm-9000-disk-0", Table::Gpt)?;
    filled(&template, dir, says("golden\n"))?;
    lvm("lvrename -qq pve/vm-9000-disk-0 pve/base-9000-disk-0")?;
    lvm("lvchange -qq -an -pr pve/base-9000-disk-0")?;
    lvm("lvcreate -qq -n vm-102-disk-0 -prw -kn -s pve/base-9000-disk-0")?;
    let clone = GuestDisk {
        path: vg.node("vm-102-disk-0"),
        ..template
    };
    filled(&clone, dir, says("clone\n"))
}

/// A container that runs: its filesystems are mounted in a mount namespace of its own, and it writes to both.
struct Container(Child);

impl Container {
    fn start(vg: &HostVg, root: &Path, ready: &Path) -> Result<Container> {
        let script = format!(
            "mount {} {root} && mount {} {root}/srv/data && cd {root} && mkdir busy srv/data/busy && n=0 || exit 1
             while :; do
                 n=$((n+1)); head -c 20000 /dev/zero > busy/new && mv busy/new busy/$((n % 20)); echo $n >> srv/data/busy/log
                 : > {}; sleep 0.3
             done",
            vg.node("vm-104-disk-0").display(),
            vg.node("vm-104-disk-1").display(),
            ready.display(),
            root = root.display(),
        );
        fs::create_dir_all(root)?;
        let child = cmd::command("unshare")
            .args(["-m", "sh", "-c", &script])
            .spawn()?;
        let container = Container(child);
        cmd::wait_for("the container to write", Duration::from_secs(60), || {
            Ok(ready.exists().then_some(()))
        })?;
        Ok(container)
    }

    /// Whether it has written since this was called last.
    fn writes(&self, ready: &Path) -> Result {
        fs::remove_file(ready)?;
        cmd::wait_for("the container to write", Duration::from_secs(60), || {
            Ok(ready.exists().then_some(()))
        })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let ended = self.0.kill().and_then(|()| self.0.wait());
        if let Err(error) = ended {
            eprintln!("the container: {error}");
        }
    }
}

fn container(vg: &HostVg, dir: &WorkDir) -> Result<(Manifest, Manifest)> {
    let root = filled(&disk(vg, "vm-104-disk-0", Table::Whole)?, dir, |root| {
        rich(root, 2, Fs::Ext4.can())?;
        Ok(fs::create_dir_all(root.join("srv/data"))?)
    })?;
    let data = filled(
        &disk(vg, "vm-104-disk-1", Table::Whole)?,
        dir,
        says("mp0\n"),
    )?;
    Ok((root, data))
}

/// Bytes of all configuration files.
fn configuration(home: &Definitions) -> Result<Vec<Vec<u8>>> {
    let names = CONFIGURATIONS.iter().map(|(name, _)| *name);
    let files = names.chain(["storage.cfg"]);
    Ok(files
        .map(|name| fs::read(home.join(name)))
        .collect::<std::io::Result<_>>()?)
}

/// The trees that a restore must bring, by the guests' folders.
type Expected = Vec<(PathBuf, Manifest)>;

fn compare(all: &Path, expected: &Expected) -> Result {
    for (folder, manifest) in expected {
        let mut ignore = Ignore::after_plugin_restore()?;
        ignore
            .below
            .extend(["busy".into(), "data".into(), "srv/data".into()]);
        Manifest::of(&guest_in(all, "").join(folder))?
            .check_equals(manifest, &ignore)
            .map_err(|e| format!("{}: {}", folder.display(), message(&e)))?;
    }
    Ok(())
}

/// All guests of a node by one line in one job, while a container writes; what is no guest is told.
fn guests() -> Result {
    let vg = HostVg::on_scratch("pve")?;
    let dir = WorkDir::new()?;
    vg.thin_pool("data", "2g")?;
    let (web, web_data) = two_disks(&vg, &dir)?;
    let back = rolled_back(&vg, &dir)?;
    let clone = linked_clone(&vg, &dir)?;
    let off = filled(
        &disk(&vg, "vm-103-disk-0", Table::Gpt)?,
        &dir,
        says("off\n"),
    )?;
    lvm("lvchange -qq --setautoactivation n pve/vm-103-disk-0")?;
    lvm("lvchange -qq -an pve/vm-103-disk-0")?;
    let (ct, ct_data) = container(&vg, &dir)?;
    let expected: Expected = [
        ("web", web),
        ("web/data", web_data),
        ("back", back),
        ("clone", clone),
        ("off", off),
        ("ct", ct),
        ("ct/srv/data", ct_data),
    ]
    .map(|(folder, manifest)| (folder.into(), manifest))
    .into();

    let home = Definitions::new()?;
    node(&home)?;
    put(&home, "storage.cfg", STORAGES)?;
    for (name, text) in CONFIGURATIONS {
        put(&home, name, text)?;
    }
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![("all".into(), fileset_plugin("guestsnap: pve=*"))],
        client_file: Some(format!("[sources]\npve = '{}'\n", home.join("").display())),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let files = configuration(&home)?;
    let ready = dir.join("ready");
    let running = Container::start(&vg, &dir.join("ct"), &ready)?;
    cmd::run("dmesg", ["-C"])?;
    let job = run(&bacula, "all", "Full")?;
    running.writes(&ready)?;
    let kernel = cmd::run("dmesg", [""; 0])?;
    drop(running);
    log(&job.log)?;
    // The kernel has nothing to replay in the snapshot of a filesystem that was frozen.
    check!(
        !kernel.contains("recovery complete"),
        "a journal was replayed:\n{kernel}"
    );
    check!(
        configuration(&home)? == files,
        "the configuration has changed"
    );
    let all = dir.join("all");
    bacula.restore(job.jobid, &Selection::All, &all)?.clean()?;
    compare(&all, &expected)
}

/// The lines of the job log.
fn log(log: &str) -> Result {
    for text in [
        "golden (",
        "is a template and was left out",
        "web: disk ide2 (data:vm-100-cloudinit) is not covered: an optical drive or cloud-init",
    ] {
        check!(log.contains(text), "the job log does not say {text:?}");
    }
    let disks = |disk: &str| {
        let mut lines = log.lines().filter(|line| line.contains(disk));
        lines.any(|line| line.contains("filesystem-consistent"))
    };
    for disk in ["ct: disk pve/vm-104-disk-0 ", "ct: disk pve/vm-104-disk-1 "] {
        check!(disks(disk), "{disk}is not filesystem-consistent");
    }
    for disk in ["pve/vm-100-disk-0 ", "pve/vm-103-disk-0 "] {
        check!(!disks(disk), "{disk}is filesystem-consistent");
    }
    check!(!log.contains("ERROR"), "there are errors:\n{log}");
    Ok(())
}
