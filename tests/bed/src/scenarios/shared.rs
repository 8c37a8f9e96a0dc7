//! Volume groups that LVM marks for use by several hosts, with LVM's own marks on a real group.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::plugin::{bacula, guest_in, restored, run};
use crate::bacula::{Bacula, Selection};
use crate::check;
use crate::guestdisk::{Fs, MIB, classic};
use crate::inside::{Scenario, scenario};
use crate::lvm::{HostVg, lvm};
use crate::populate::rich;
use crate::tree::Manifest;
use crate::workdir::WorkDir;
use crate::{Result, cmd, message};

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("shared_groups", shared).only("bookworm"),
    scenario("shared_lock_daemon", lock_daemon).only("trixie"),
];

/// A file of the machine with other contents; the former ones are back when this is dropped.
struct Replaced(&'static str, Option<Vec<u8>>);

impl Replaced {
    fn with(path: &'static str, text: &str) -> Result<Replaced> {
        let former = Replaced(path, fs::read(path).ok());
        fs::write(path, text)?;
        Ok(former)
    }
}

impl Drop for Replaced {
    fn drop(&mut self) {
        let done = match &self.1 {
            Some(bytes) => fs::write(self.0, bytes),
            None => fs::remove_file(self.0),
        };
        if let Err(error) = done {
            eprintln!("{}: {error}", self.0);
        }
    }
}

const LVM_CONF: &str = "/etc/lvm/lvmlocal.conf";

const CLIENT_FILE: &str = "/etc/bacula/guestsnap.toml";

/// A group of another host, and one with a lock type: refused, until the client file says that this host is alone.
fn shared() -> Result {
    let _lvm = Replaced::with(LVM_CONF, &own("other"))?;
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let root = classic(&vg.lv("web1", "200m")?, 32 * MIB)?;
    let mounted = root.mount(1, &dir.join("mnt"))?;
    rich(mounted.path(), 1, Fs::Ext3.can())?;
    mounted.sync()?;
    let expected = Manifest::of(mounted.path())?;
    mounted.close()?;
    let bacula = bacula("guestsnap: lv=vg0/web1")?;
    let saved = |name: &str| -> Result {
        let job = run(&bacula, "Full")?.clean()?;
        let all = dir.join(name);
        bacula.restore(job.jobid, &Selection::All, &all)?.clean()?;
        Manifest::of(&guest_in(&all, "web1"))?.check_equals(&expected, &restored())
    };
    let refused = |text: &str| -> Result {
        let before = marks()?;
        let job = run(&bacula, "Full")?;
        check!(
            job.status == 'f' && job.log.contains("GS-215") && job.log.contains(text),
            "status {}, not {text:?}:\n{}",
            job.status,
            job.log
        );
        // Nothing wrote to the group's metadata.
        check!(
            marks()? == before,
            "the metadata changed: {before} {}",
            marks()?
        );
        Ok(())
    };
    check!(marks()?.starts_with("other/"), "marks {}", marks()?);
    saved("own")?;

    // LVM activates no volume of another host's group: these are active since this host was the other one.
    fs::write(LVM_CONF, own("me"))?;
    refused("`other`; this host's is `me`")?;
    let mine = Replaced::with(CLIENT_FILE, "[vg.vg0]\nshared = \"mine\"\n")?;
    saved("mine")?;
    drop(mine);
    fs::write(LVM_CONF, own("other"))?;
    saved("again")?;

    with_a_lock_type(&bacula, &dir)
}

/// Settings of a host that has this system id now, and had the other one.
fn own(id: &str) -> String {
    format!(
        "devices {{ global_filter = [ \"r|^/dev/loop|\" ] }}\nglobal {{ system_id_source = \"lvmlocal\" }}\n\
         local {{\nsystem_id = \"{id}\"\nextra_system_ids = [ \"other\" ]\n}}\n"
    )
}

/// The group's system ID, and the number of times its metadata was written.
fn marks() -> Result<String> {
    let columns = [
        "--noheadings",
        "--separator",
        "/",
        "-o",
        "vg_systemid,vg_lock_type,vg_seqno",
        "vg0",
    ];
    Ok(lvm("vgs", &columns)?.trim().to_owned())
}

/// LVM's mark alone, written as a restore of metadata does. There is no lock manager in this machine.
fn with_a_lock_type(bacula: &Bacula, dir: &WorkDir) -> Result {
    let (plain, locked) = (dir.join("plain"), dir.join("locked"));
    let (plain, locked) = (plain.display().to_string(), locked.display().to_string());
    lvm("vgchange", &["-an", "vg0"])?;
    lvm("vgcfgbackup", &["-f", &plain, "vg0"])?;
    cmd::sh(&format!(
        "sed -e '/^\\tsystem_id = /d' -e 's/^\\tseqno = .*/&\\n\\tlock_type = \"dlm\"\\n\\tlock_args = \"1.0.0:bed\"/' \
         -e 's/^\\t\\t\\tsegment_count = .*/\\t\\t\\tlock_args = \"dlm\"\\n&/' {plain} > {locked}"
    ))?;
    lvm("vgcfgrestore", &["-f", &locked, "vg0"])?;
    // LVM shows the group to no command.
    let found = run(bacula, "Full").and_then(|job| {
        check!(
            job.status == 'f' && job.log.contains("GS-201"),
            "status {}",
            job.status
        );
        Ok(())
    });
    let back = lvm("vgcfgrestore", &["-f", &plain, "vg0"]);
    found?;
    back?;
    lvm("vgchange", &["-ay", "vg0"])?;
    Ok(())
}

/// LVM's daemon for locks. Its test mode asks no lock manager of a cluster.
struct LockDaemon;

impl LockDaemon {
    fn start() -> Result<LockDaemon> {
        cmd::run("lvmlockd", ["--test", "--gl-type", "dlm"])?;
        let daemon = LockDaemon;
        lvm("vgchange", &["--lock-start", "vg0"])?;
        Ok(daemon)
    }

    fn stop() -> Result {
        let pid = fs::read_to_string("/run/lvmlockd.pid")?;
        cmd::run("kill", ["-KILL", pid.trim()])?;
        let process = Path::new("/proc").join(pid.trim());
        cmd::wait_for("the end of lvmlockd", Duration::from_secs(10), || {
            Ok((!process.exists()).then_some(()))
        })
    }
}

impl Drop for LockDaemon {
    fn drop(&mut self) {
        if let Err(error) = LockDaemon::stop() {
            eprintln!("{}", message(&error));
        }
    }
}

/// A group under lvmlockd: saved while the daemon runs, refused while it does not.
fn lock_daemon() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let root = classic(&vg.lv("web1", "200m")?, 32 * MIB)?;
    let mounted = root.mount(1, &dir.join("mnt"))?;
    rich(mounted.path(), 1, Fs::Ext3.can())?;
    mounted.sync()?;
    let expected = Manifest::of(mounted.path())?;
    mounted.close()?;
    lvm("vgchange", &["-an", "vg0"])?;
    let own = "devices { global_filter = [ \"r|^/dev/loop|\" ] }\nglobal { use_lvmlockd = 1 }\n";
    let _lvm = Replaced::with(LVM_CONF, own)?;
    let daemon = LockDaemon::start()?;
    lvm("vgchange", &["-y", "--lock-type", "dlm", "vg0"])?;
    lvm("vgchange", &["--lock-start", "vg0"])?;
    lvm("vgchange", &["-aey", "vg0"])?;

    let bacula = bacula("guestsnap: lv=vg0/web1")?;
    let job = run(&bacula, "Full")?.clean()?;
    let all = dir.join("all");
    bacula.restore(job.jobid, &Selection::All, &all)?.clean()?;
    Manifest::of(&guest_in(&all, "web1"))?.check_equals(&expected, &restored())?;

    drop(daemon);
    let job = run(&bacula, "Full")?;
    check!(
        job.status == 'f' && job.log.contains("GS-215") && job.log.contains("lock type dlm"),
        "status {}:\n{}",
        job.status,
        job.log
    );
    let _daemon = LockDaemon::start()?;
    lvm("vgchange", &["-an", "vg0"])?;
    lvm(
        "vgchange",
        &["-y", "--lock-type", "none", "--lock-opt", "force", "vg0"],
    )?;
    drop(vg);
    Ok(())
}
