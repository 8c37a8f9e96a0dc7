//! The host as Debian sets it up: the package, bacula-fd's own unit, a freeze that outlives the service, boots in the
//! middle of a job.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use crate::bacula::{Bacula, BaculaOptions, JobResult, Selection, fileset_plugin};
use crate::check;
use crate::guestdisk::{Fs, MIB, classic};
use crate::inside::{Scenario, boot, is_again, scenario};
use crate::lvm::{HostVg, lvm};
use crate::populate::{bytes, rich};
use crate::tree::{Ignore, Manifest};
use crate::workdir::{self, WorkDir};
use crate::{Result, cmd};

use super::plugin::{guest_in, restored};

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("systemd_service", service).systemd(),
    scenario("systemd_wake_up", wake_up)
        .systemd()
        .only("trixie"),
    scenario("systemd_reboot", || {
        again("systemd_reboot", "systemctl reboot")
    })
    .systemd()
    .only("bookworm"),
    scenario("systemd_power_loss", || {
        again("systemd_power_loss", "echo b > /proc/sysrq-trigger")
    })
    .systemd()
    .only("trixie"),
];

const CLIENT_FILE: &str = "/etc/bacula/guestsnap.toml";
const HARDENED: &str = include_str!("../../../../bacula-conf/systemd/hardened.conf");
/// Where the sample allows restores to go.
const RESTORES: &str = "/var/tmp/restored";
const PATIENCE: Duration = Duration::from_secs(60);

/// Size of the guest's large file: more than what fits into the buffers between two daemons (some 10 MiB).
const LARGE: usize = 40 << 20;

/// The package, and a guest that a job cannot send while the Storage Daemon is held.
fn host() -> Result<(HostVg, WorkDir, Manifest)> {
    if !Path::new("/usr/sbin/guestsnap").exists() {
        cmd::sh("dpkg -i /bed/guestsnap-fd.deb")?;
    }
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let disk = classic(&vg.lv("domu-web1", "400m")?, 32 * MIB)?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    rich(mounted.path(), 1, Fs::Ext3.can())?;
    std::fs::write(mounted.path().join("large"), bytes(7, LARGE))?;
    let expected = Manifest::of(mounted.path())?;
    mounted.close()?;
    Ok((vg, dir, expected))
}

/// A trio with the machine's own File Daemon.
fn bacula() -> Result<Bacula> {
    Bacula::start(BaculaOptions {
        service: true,
        filesets: vec![(
            "g".into(),
            fileset_plugin("guestsnap: lv=vg0/domu-* strip=domu-"),
        )],
        ..BaculaOptions::default()
    })
}

/// A clean backup with nothing left in the daemon and on the host.
fn save(bacula: &Bacula) -> Result<JobResult> {
    let before = bacula.host_state()?;
    let job = bacula.run_backup("g", "Full")?.clean()?;
    println!("{}", job.log);
    bacula.check_host_state(&before)?;
    Ok(job)
}

/// A clean backup, restored and compared, with nothing left in the daemon and on the host.
fn save_and_restore(bacula: &Bacula, expected: &Manifest) -> Result {
    let before = bacula.host_state()?;
    let job = save(bacula)?;
    let to = Path::new(RESTORES);
    bacula.restore(job.jobid, &Selection::All, to)?.clean()?;
    let ignore = Ignore {
        root: true,
        ..restored()
    };
    Manifest::of(&guest_in(to, "web1"))?.check_equals(expected, &ignore)?;
    std::fs::remove_dir_all(to).map_err(|e| format!("{RESTORES}: {e}"))?;
    bacula.check_host_state(&before)
}

/// Names of the volumes with our tag.
fn ours() -> Result<String> {
    Ok(
        lvm("lvs", &["--noheadings", "-o", "lv_name", "@guestsnap"])?
            .trim()
            .to_owned(),
    )
}

/// Starts a backup, and stops it between its snapshot and its end.
fn stuck(bacula: &Bacula) -> Result<u32> {
    let job = bacula.start_backup("g", "Full")?;
    cmd::wait_for("a snapshot of ours", PATIENCE, || {
        Ok((!ours()?.is_empty()).then_some(()))
    })?;
    bacula.hold_sd()?;
    std::thread::sleep(Duration::from_secs(3));
    check!(!ours()?.is_empty(), "the job was over too early");
    Ok(job)
}

/// The line of `guestsnap check` on the running daemon ends like this.
fn says_of_daemon(end: &str) -> Result {
    let said = cmd::sh("guestsnap check || true")?;
    let line = said.lines().find(|line| line.contains(" daemon "));
    check!(
        line.is_some_and(|line| line.ends_with(end)),
        "no {end}:\n{said}"
    );
    Ok(())
}

/// Debian's unit as it is, stopped in the middle of a job, and hardened as the sample says.
fn service() -> Result {
    let (_vg, _dir, expected) = host()?;
    let mut bacula = bacula()?;
    let status = bacula.status_client()?;
    check!(
        status.contains("guestsnap"),
        "no plugin in the service:\n{status}"
    );
    save_and_restore(&bacula, &expected)?;
    says_of_daemon("has loaded it")?;

    // A daemon keeps the library of before an upgrade until it is restarted.
    cmd::sh("cd /usr/lib/bacula && cp -p guestsnap-fd.so later && mv later guestsnap-fd.so")?;
    let version = cmd::sh("guestsnap --version")?.replace("guestsnap ", "");
    let version = version.trim();
    says_of_daemon(&format!(
        "has loaded another file (version {version}): restart it"
    ))?;

    // The next job removes the leftovers of `systemctl restart` in the middle of a job.
    let job = stuck(&bacula)?;
    bacula.restart_fd()?;
    bacula.kill_sd()?;
    bacula.start_sd()?;
    let ended = bacula.wait_job(job)?;
    check!(
        ended.status != 'T',
        "OK, in spite of a restart:\n{}",
        ended.log
    );
    save(&bacula)?;
    check!(ours()?.is_empty(), "left: {}", ours()?);
    says_of_daemon("has loaded it")?;

    let folder = Path::new("/etc/systemd/system/bacula-fd.service.d");
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join("hardened.conf"), HARDENED)?;
    cmd::run("systemctl", ["daemon-reload"])?;
    bacula.restart_fd()?;
    let effective = cmd::run("systemctl", ["show", "-P", "DevicePolicy", "bacula-fd"])?;
    check!(effective.trim() == "closed", "not hardened: {effective}");
    save_and_restore(&bacula, &expected)?;
    let check = cmd::sh("guestsnap check 2>&1 || true")?;
    println!("{check}");
    check!(
        !check.contains("ERROR"),
        "guestsnap check does not like the sample:\n{check}"
    );
    std::fs::remove_dir_all(folder)?;
    cmd::run("systemctl", ["daemon-reload"])?;
    Ok(())
}

/// A guest that is frozen when the service dies, or is stopped, is woken up: by processes in a scope of their own.
fn wake_up() -> Result {
    let (_vg, _dir, _) = host()?;
    let before = std::fs::read_to_string(CLIENT_FILE)?;
    let program = |name: &str, text: &str| -> Result<String> {
        let path = format!("/usr/local/sbin/{name}");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n"))?;
        std::fs::set_permissions(&path, Permissions::from_mode(0o755))?;
        Ok(path)
    };
    let freeze = program(
        "freeze",
        "echo > /run/frozen; exec sleep \"$(cat /run/seconds)\"",
    )?;
    let thaw = program(
        "thaw",
        "cat /proc/self/cgroup > /run/thawed; rm -f /run/frozen",
    )?;
    let settings = format!(
        "[guest.web1]\ndisks = ['vg0/domu-web1']\nquiesce = 'commands'\nfreeze = ['{freeze}']\nthaw = ['{thaw}']\nfreeze_seconds = 300\n"
    );
    std::fs::write(CLIENT_FILE, settings)?;
    let mut bacula = bacula()?;
    let frozen = || Path::new("/run/frozen").exists();
    for how in ["kill --signal=KILL", "stop"] {
        std::fs::write("/run/seconds", "250")?;
        let job = bacula.start_backup("g", "Full")?;
        cmd::wait_for("the freeze", PATIENCE, || Ok(frozen().then_some(())))?;
        cmd::sh(&format!("systemctl {how} bacula-fd"))?;
        cmd::wait_for("the thaw", PATIENCE, || Ok((!frozen()).then_some(())))
            .map_err(|e| format!("after {how}: {}", crate::message(&e)))?;
        let cgroup = std::fs::read_to_string("/run/thawed")?;
        check!(
            cgroup.trim().ends_with(".scope"),
            "the wake-up runs in {cgroup}, not in a scope"
        );
        bacula.restart_fd()?;
        let ended = bacula.wait_job(job)?;
        check!(ended.status != 'T', "OK after {how}:\n{}", ended.log);
    }
    std::fs::write("/run/seconds", "0")?;
    let job = save(&bacula)?;
    check!(
        job.log.contains("application-consistent"),
        "not quiesced:\n{}",
        job.log
    );
    check!(!frozen(), "the guest is frozen");
    // No scope is to be had: the guest is brought to rest all the same, and the job says what that costs.
    let (run, away) = ("/usr/bin/systemd-run", "/usr/bin/systemd-run.away");
    std::fs::rename(run, away)?;
    std::os::unix::fs::symlink("/bin/false", run)?;
    let job = bacula.run_backup("g", "Full");
    std::fs::rename(away, run)?;
    let job = job?;
    println!("{}", job.log);
    for text in [
        "Warning: guestsnap: web1: GS-301",
        "without a systemd scope",
        "application-consistent",
    ] {
        check!(
            job.log.contains(text),
            "the job log does not say {text:?}:\n{}",
            job.log
        );
    }
    check!(!frozen(), "the guest is frozen without a scope");
    let scopes = cmd::sh("systemctl list-units --all --no-legend 'run-*.scope' | wc -l")?;
    check!(scopes.trim() == "0", "{scopes} scopes are left");
    drop(bacula);
    std::fs::write(CLIENT_FILE, before)?;
    Ok(())
}

/// The machine goes down in the middle of a job: the service at boot takes what is left, and nothing else.
fn again(name: &str, how: &str) -> Result {
    if !is_again(name) {
        let (_vg, _dir, _) = host()?;
        // An administrator's own snapshot of the same volume.
        lvm(
            "lvcreate",
            &["-y", "-s", "-L", "20m", "-n", "mine", "vg0/domu-web1"],
        )?;
        let bacula = bacula()?;
        stuck(&bacula)?;
        return boot(name, how);
    }
    let vg = HostVg::found("vg0");
    workdir::sweep()?;
    let said = cmd::sh(
        "systemctl show -P Result guestsnap-sweep; journalctl -b --no-pager -o cat -u guestsnap-sweep",
    )?;
    println!("{said}");
    check!(said.starts_with("success"), "the sweep at boot: {said}");
    check!(ours()?.is_empty(), "left after the boot: {}", ours()?);
    let journals = std::fs::read_dir("/var/lib/bacula/guestsnap")?.count();
    check!(journals == 0, "{journals} journals left after the boot");
    check!(
        vg.names()?.iter().any(|n| n == "mine"),
        "somebody's snapshot is gone: {:?}",
        vg.names()?
    );
    check!(
        said.contains("removed volume vg0/guestsnap-"),
        "the sweep at boot does not say what it removed:\n{said}"
    );
    let bacula = bacula()?;
    let job = bacula.run_backup("g", "Full")?.clean()?;
    check!(job.bytes > LARGE as u64, "{} bytes only", job.bytes);
    Ok(())
}
