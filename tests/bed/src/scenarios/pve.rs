//! Guests of Proxmox VE: configurations as it lays them out, over raw images in a `dir` storage.

use super::image::{guest_in, ignore, run, store};
use super::settings::Definitions;
use crate::bacula::{Bacula, BaculaOptions, Selection, fileset_plugin};
use crate::check;
use crate::guestdisk::{Fs, GuestDisk, MIB, Mounted, Part, Table, image};
use crate::inside::{Scenario, scenario};
use crate::populate::rich;
use crate::tree::Manifest;
use crate::workdir::WorkDir;
use crate::{Result, cmd, plugin_so, tool};
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

/// On this machine.
pub const ROOT: &[Scenario] = &[scenario("root_pve_guests", guests)];

/// Group `www-data` of Debian.
const WWW_DATA: u32 = 33;

/// Configurations of the node. The storage `local` has an image for each `local:` volume of 100 and 101, but none of
/// the configuration disk of cloud-init.
const CONFIGURATIONS: &[(&str, &str)] = &[
    (
        "qemu-server/100.conf",
        "#A web server%3A\nagent: 1\nboot: order=scsi0;ide2\nide2: local:100/vm-100-cloudinit.qcow2,media=cdrom\n\
         name: web\nscsi0: local:100/vm-100-disk-0.raw,iothread=1,size=64M\nscsi1: local:100/vm-100-disk-1.raw,size=64M\n\
         scsi2: local:100/vm-100-disk-2.raw,backup=0\nscsihw: virtio-scsi-single\n\n\
         [before]\nname: old\nscsi0: local:100/gone.raw\n",
    ),
    (
        "lxc/101.conf",
        "arch: amd64\nhostname: ct\nmp0: local:101/vm-101-disk-1.raw,mp=/srv/data,size=64M\nmp1: /tank,mp=/tank\n\
         rootfs: local:101/vm-101-disk-0.raw,size=64M\nunprivileged: 1\n",
    ),
    (
        "qemu-server/102.conf",
        "name: golden\nscsi0: local:102/base-102-disk-0.raw\ntemplate: 1\n",
    ),
    (
        "qemu-server/103.conf",
        "name: ceph\nscsi0: ceph:vm-103-disk-0,size=8G\n",
    ),
    (
        "qemu-server/104.conf",
        "lock: migrate\nname: busy\nscsi0: local:104/vm-104-disk-0.raw\n",
    ),
];

/// A disk of one filesystem at the place where the storage has it.
pub(super) fn disk(store: &Path, volume: &str, table: Table) -> Result<GuestDisk> {
    let path = store.join("images").join(volume);
    fs::create_dir_all(path.parent().unwrap_or(store))?;
    image(&path, 400 * MIB)?;
    GuestDisk::create(&path, table, &[Part::fs(360 * MIB, Fs::Ext4, "fs")])
}

/// Unmounts a guest's filesystems; the files that were in them.
fn unmounted(root: Mounted, data: Mounted) -> Result<Manifest> {
    data.sync()?;
    root.sync()?;
    let expected = Manifest::of(root.path())?;
    data.close()?;
    root.close()?;
    Ok(expected)
}

/// Disks of the virtual machine, joined by its fstab; and what must come back.
fn virtual_machine(store: &Path, dir: &WorkDir) -> Result<Manifest> {
    let root = disk(store, "100/vm-100-disk-0.raw", Table::Gpt)?;
    let data = disk(store, "100/vm-100-disk-1.raw", Table::Gpt)?;
    let unwanted = disk(store, "100/vm-100-disk-2.raw", Table::Gpt)?;
    let unwanted = unwanted.mount(1, &dir.join("unwanted"))?;
    fs::write(unwanted.path().join("unwanted"), "of no use")?;
    unwanted.close()?;
    let root = root.mount(1, &dir.join("root"))?;
    rich(root.path(), 1, Fs::Ext4.can())?;
    fs::create_dir_all(root.path().join("etc"))?;
    let fstab = "/dev/sda1 / ext4 defaults 0 1\n/dev/sdb1 /data ext4 defaults 0 2\nUUID=1 /scratch ext4 defaults 0 2\n";
    fs::write(root.path().join("etc/fstab"), fstab)?;
    fs::create_dir(root.path().join("data"))?;
    let data = data.mount(1, &root.path().join("data"))?;
    fs::write(data.path().join("who"), "web's data")?;
    unmounted(root, data)
}

/// Volumes of the container. An fstab in the mount point, and none in the root: only the configuration tells which is
/// which.
fn container(store: &Path, dir: &WorkDir) -> Result<Manifest> {
    let root = disk(store, "101/vm-101-disk-0.raw", Table::Whole)?;
    let data = disk(store, "101/vm-101-disk-1.raw", Table::Whole)?;
    let root = root.mount(1, &dir.join("ct"))?;
    rich(root.path(), 2, Fs::Ext4.can())?;
    fs::create_dir_all(root.path().join("srv/data"))?;
    let data = data.mount(1, &root.path().join("srv/data"))?;
    fs::create_dir(data.path().join("etc"))?;
    fs::write(
        data.path().join("etc/fstab"),
        "/dev/sda1 / ext4 defaults 0 1\n",
    )?;
    chown(data.path(), Some(100_000), Some(100_000))?;
    unmounted(root, data)
}

/// Folders of the node.
pub(super) fn node(home: &Definitions) -> Result {
    for folder in ["qemu-server", "lxc"] {
        fs::create_dir(home.join(folder))?;
    }
    Ok(())
}

/// A file of the node, with owner and mode as Proxmox VE has them.
pub(super) fn put(home: &Definitions, name: &str, text: &str) -> Result {
    let path = home.join(name);
    fs::write(&path, text)?;
    fs::set_permissions(&path, Permissions::from_mode(0o640))?;
    Ok(chown(&path, Some(0), Some(WWW_DATA))?)
}

/// All files of the node.
fn files(home: &Definitions, store: &Path) -> Result {
    node(home)?;
    let storages = format!(
        "dir: local\n\tpath {}\n\tcontent images,rootdir\n\nrbd: ceph\n\tpool rbd\n\tcontent images\n",
        store.display()
    );
    put(home, "storage.cfg", &storages)?;
    CONFIGURATIONS
        .iter()
        .try_for_each(|(name, text)| put(home, name, text))
}

/// Virtual machines and containers by VMID and by name; what is not saved is told, and is an error where its owner
/// would miss it.
fn guests() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let web = virtual_machine(store.path(), &dir)?;
    let ct = container(store.path(), &dir)?;
    let home = Definitions::new()?;
    files(&home, store.path())?;
    let client = format!(
        "[sources]\npve = '{}'\n[pve]\nlock_wait = 1\n",
        home.join("").display()
    );
    let line = |text: &str| fileset_plugin(&format!("guestsnap: {text}"));
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![
            ("good".into(), line("pve={100,ct,golden} id=yes")),
            ("all".into(), line("pve=*")),
            ("named".into(), line("guest=web")),
        ],
        client_file: Some(client.clone()),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;

    let job = run(&bacula, "good", "Full")?.clean()?;
    for text in [
        "golden-102",
        "is a template and was left out",
        "disk scsi2 (local:100/vm-100-disk-2.raw) is not covered: its configuration says backup=0",
        "disk ide2 (local:100/vm-100-cloudinit.qcow2) is not covered",
        "disk mp1 (/tank) is not covered: a folder of the host",
        "its definition on the host says so",
    ] {
        check!(job.log.contains(text), "the job log does not say {text:?}");
    }
    let all = dir.join("all");
    bacula.restore(job.jobid, &Selection::All, &all)?.clean()?;
    for (name, expected) in [("web-100", &web), ("ct-101", &ct)] {
        let saved = guest_in(&all, name);
        Manifest::of(&saved)?.check_equals(expected, &ignore())?;
        check!(
            !saved.join(".guestsnap/volumes").exists(),
            "{name} has a volume without a place"
        );
    }
    for (name, file) in [
        ("web-100", "qemu-server/100.conf"),
        ("ct-101", "lxc/101.conf"),
    ] {
        let source = home.join(file);
        let saved = guest_in(&all, name).join(".guestsnap/definition");
        let saved = saved.join(source.file_name().unwrap_or_default());
        check!(
            fs::read(&saved)? == fs::read(&source)?,
            "{} is not the definition",
            saved.display()
        );
        let mode = fs::metadata(&saved)?.permissions().mode();
        check!(mode & 0o7777 == 0o600, "{}: mode {mode:o}", saved.display());
    }

    // One disk on rbd, and one guest that is locked.
    let job = run(&bacula, "all", "Full")?;
    check!(
        job.status == 'T' && job.errors == 2,
        "status {}, {} errors:\n{}",
        job.status,
        job.errors,
        job.log
    );
    for text in ["the storage ceph is of type rbd", "GS-216", "lock: migrate"] {
        check!(job.log.contains(text), "the job log does not say {text:?}");
    }
    run(&bacula, "named", "Full")?.clean()?;
    command(&home, &client)?;
    drop(bacula);
    store.close()
}

/// The command shows the same guests.
fn command(home: &Definitions, client: &str) -> Result {
    let file = home.join("client.toml");
    fs::write(&file, client)?;
    let option = format!("--client-file={}", file.display());
    let tool = tool()?.display().to_string();
    let plan = cmd::run(&tool, [option.as_str(), "plan", "pve={100,101}"])?;
    for text in ["web", "ct", "backup=0"] {
        check!(plan.contains(text), "plan does not say {text}:\n{plan}");
    }
    Ok(())
}
