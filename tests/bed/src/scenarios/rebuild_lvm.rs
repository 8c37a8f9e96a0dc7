//! Guests with LVM of their own, made again on volumes of the host.

use super::points::reflink_store;
use super::rebuild::{each_point, identities, rebuild, restored_kit, small_kit};
use crate::bacula::{Bacula, BaculaOptions, fileset_plugin};
use crate::guestdisk::{Content, Fs, GuestDisk, GuestLv, GuestVg, MIB, Part, Table};
use crate::inside::{Scenario, scenario};
use crate::lvm::HostVg;
use crate::points::Points;
use crate::populate::rich;
use crate::tree::{Ignore, Manifest};
use crate::workdir::WorkDir;
use crate::{Result, check, cmd, plugin_so};
use guestsnap::point::Needs;
use std::path::{Path, PathBuf};

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("rebuild_lvm", lvm),
    scenario("points_rebuild", points).only("trixie"),
];

const FSTAB: &str = "/dev/vg0/root / ext4 defaults 0 1\nLABEL=boot /boot ext3 defaults 0 2\n\
    LABEL=EFI /boot/efi vfat defaults 0 2\n/dev/vg0/data /srv/data xfs defaults 0 2\n";

/// A guest whose group has the name of the host's, with a volume in two pieces.
struct Guest {
    disk: GuestDisk,
    vg: GuestVg,
}

impl Guest {
    fn new(lv: &Path, point: &Path) -> Result<Guest> {
        let parts = [
            Part::fs(64 * MIB, Fs::Vfat, "EFI"),
            Part::new(700 * MIB, Content::Pv),
            Part::fs(64 * MIB, Fs::Ext3, "boot"),
        ];
        let disk = GuestDisk::create(lv, Table::Gpt, &parts)?;
        let lvs = [
            GuestLv::new("root", "-L 150m", Content::Fs(Fs::Ext4, "root".into())),
            GuestLv::new("data", "-L 320m", Content::Fs(Fs::Xfs, "data".into())),
            GuestLv::new("swap", "-L 16m", Content::Swap),
        ];
        let vg = GuestVg::create("vg0", &[(&disk, 2)], &lvs)?;
        vg.run("lvextend", &["-L", "+40m", "vg0/root"])?;
        vg.with_mounted("root", Fs::Ext4, point, |root| {
            rich(root, 1, Fs::Ext4.can())?;
            let folder = root.display();
            cmd::sh(&format!(
                "set -e; cd '{folder}'; mkdir -p etc boot srv/data; rm -rf boot/*"
            ))?;
            Ok(std::fs::write(root.join("etc/fstab"), FSTAB)?)
        })?;
        vg.with_mounted("data", Fs::Xfs, point, |data| rich(data, 2, Fs::Xfs.can()))?;
        let boot = disk.mount(3, point)?;
        std::fs::create_dir(boot.path().join("efi"))?;
        boot.close()?;
        Ok(Guest { disk, vg })
    }

    /// The same guest on another volume of the host.
    fn on(&self, lv: &str) -> Result<Guest> {
        let disk = GuestDisk {
            path: PathBuf::from(format!("/dev/vg0/{lv}")),
            parts: self.disk.parts.clone(),
        };
        let vg = self.vg.on(&[(&disk, 2)])?;
        Ok(Guest { disk, vg })
    }

    fn trees(&self, point: &Path) -> Result<Vec<Manifest>> {
        let mounted = self.disk.mount(3, point)?;
        let boot = Manifest::of(mounted.path())?;
        mounted.close()?;
        let of = |lv: &str, fs| self.vg.with_mounted(lv, fs, point, Manifest::of);
        Ok(vec![boot, of("root", Fs::Ext4)?, of("data", Fs::Xfs)?])
    }
}

/// Physical volumes that the host's LVM sees.
fn seen() -> Result<String> {
    cmd::run("pvs", ["--noheadings", "-o", "pv_name,vg_name"])
}

/// Into a new volume, a thin one, and one that is there; the host's LVM sees nothing of it.
fn made_on_each(host: &HostVg, bacula: &Bacula, guest: &Guest, kit: &Path) -> Result {
    let known = identities(&guest.disk)?;
    let before_all = seen()?;
    host.thin_pool("pool", "1200m")?;
    // The first volume of a pool changes its devices.
    host.thin_lv("pool", "other", "100m")?;
    host.lv("new-given", "1100m")?;
    for (target, name) in [
        ("vg0/new-thick", "new-thick"),
        ("vg0/pool/new-thin", "new-thin"),
        ("vg0/new-given", "new-given"),
    ] {
        let before = bacula.host_state()?;
        rebuild(bacula, kit, Path::new(target))?;
        let found = identities(&guest.on(name)?.disk)?;
        check!(found == known, "{target}: {known:#?}\n{found:#?}");
        check!(
            seen()? == before_all,
            "the host's LVM sees a guest's: {}",
            seen()?
        );
        if name != "new-given" {
            cmd::run("lvremove", ["-y", &format!("vg0/{name}")])?;
        }
        bacula.check_host_state(&before)?;
    }
    Ok(())
}

/// A guest on a volume is saved, its disk is made again, and its files are restored into it.
fn lvm() -> Result {
    let dir = WorkDir::new()?;
    let point = dir.join("mnt");
    let host = HostVg::on_scratch("vg0")?;
    let guest = Guest::new(&host.lv("domu-web1", "1g")?, &point)?;
    let expected = guest.trees(&point)?;
    let line = fileset_plugin("guestsnap: lv=vg0/domu-web1 strip=domu-");
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![("g".into(), line)],
        client_file: Some("allow = [\"vg0/domu-*\"]\n[restore]\ninto = [\"vg0/new-*\"]\n".into()),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let full = bacula.run_backup("g", "Full")?.clean()?;
    let kit = restored_kit(&bacula, full.jobid, "web1", &dir.join("kit"))?;
    made_on_each(&host, &bacula, &guest, &kit)?;
    let again = guest.on("new-given")?;
    let words = format!(
        "fileset=g jobid={} where=/ replace=always select\ncd /@guestsnap\nmark web1\ndone",
        full.jobid
    );
    let job = bacula.start_restore_with_options(&words, &[("into", "vg0/new-given")])?;
    bacula.wait_job(job)?.clean()?;
    again.vg.run("vgck", &["vg0"])?;
    let ignore = Ignore {
        sockets: true,
        xattrs: vec!["trusted.SGI_ACL_".into()],
        // Mount points are in no backup.
        below: ["efi", "boot", "srv/data"].map(Into::into).to_vec(),
        ..Ignore::default()
    };
    for (found, expected) in again.trees(&point)?.iter().zip(&expected) {
        found.check_equals(expected, &ignore)?;
    }
    Ok(())
}

/// Killed at each point of a rebuild onto a new volume, and failing there.
fn points() -> Result {
    let dir = WorkDir::new()?;
    let _host = HostVg::on_scratch("vg0")?;
    let store = reflink_store(&dir)?;
    let points = Points::new(&format!(
        "allow = ['vg0/*', '{}/*']\n",
        store.path().display()
    ))?;
    let kit = small_kit(&points, &dir, store.path())?;
    let there =
        || Ok(cmd::run("lvs", ["--noheadings", "-o", "lv_name", "vg0"])?.contains("new-thick"));
    let remove = || cmd::run("lvremove", ["-y", "vg0/new-thick"]).map(drop);
    each_point(
        &points,
        &kit,
        "vg0/new-thick",
        Needs::Volumes,
        &there,
        &remove,
    )?;
    store.close()
}
