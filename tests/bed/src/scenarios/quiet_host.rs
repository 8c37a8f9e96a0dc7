//! Guests that hide physical volumes, to get into the host's LVM: the host sees nothing of them during a job.

use super::image::store;
use crate::bacula::{Bacula, BaculaOptions, JobResult, UNCOMPRESSED, fileset_plugin};
use crate::check;
use crate::cmd;
use crate::evil_pv::{self, Claim};
use crate::guestdisk::{
    Content, Fs, GuestDisk, GuestLv, GuestVg, Loop, MIB, Mounted, Part, Table, announce, image,
};
use crate::hoststate::host_view;
use crate::inside::{Scenario, scenario};
use crate::lvm::HostVg;
use crate::workdir::WorkDir;
use crate::{Result, plugin_so, tool};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("guests_quiet_host", volumes).seconds(900),
    scenario("guests_quiet_host_scanned", scanned)
        .seconds(900)
        .only("bookworm"),
    scenario("guests_quiet_host_images", images)
        .seconds(900)
        .only("trixie"),
];

/// Takes days to be sent.
const HOLE: u64 = 800 << 30;

/// Another `lvmlocal.conf` for the time of a job; the former one is back when this is dropped.
struct LvmConf(Vec<u8>);

const LVM_CONF: &str = "/etc/lvm/lvmlocal.conf";

impl LvmConf {
    fn set(devices: &str) -> Result<Self> {
        let former = Self(fs::read(LVM_CONF)?);
        fs::write(
            LVM_CONF,
            format!("devices {{\nuse_devicesfile=0\n{devices}\n}}\n"),
        )?;
        Ok(former)
    }
}

impl Drop for LvmConf {
    fn drop(&mut self) {
        if let Err(error) = fs::write(LVM_CONF, &self.0) {
            eprintln!("{LVM_CONF}: {error}");
        }
    }
}

/// A filesystem at the beginning of a place, with a root's look, and a physical volume hidden in and behind it.
fn hostile(disk: &Path, base: u64, size: u64, fs: Fs, claim: &Claim, dir: &Path) -> Result {
    // A decoy before the label, in sectors that the filesystem leaves alone.
    let (length, decoy, more): (_, _, &[&str]) = match fs {
        Fs::Xfs => (304 * MIB, 2, &["-s", "size=4096"]),
        Fs::Btrfs => (112 * MIB, 0, &[]),
        _ => (30 * MIB, 0, &[]),
    };
    let volume = Loop::attach(disk, base, Some(length), 0)?;
    fs.make(volume.device(), "root", more)?;
    let mounted = Mounted::new(volume, fs, &dir.join("mnt"))?;
    for name in ["etc", "bin", "usr"] {
        fs::create_dir(mounted.path().join(name))?;
    }
    fs::write(mounted.path().join("etc/hostname"), "evil\n")?;
    fs::File::create(mounted.path().join("hole"))?.set_len(HOLE)?;
    mounted.close()?;
    evil_pv::hide(disk, base, size, decoy, length + MIB, claim)?;
    announce(disk)
}

/// A guest's LVM with a root that hides a physical volume.
fn in_lvm(disk: &GuestDisk, number: u32, claim: &Claim, dir: &Path) -> Result {
    let root = GuestLv::new("root", "-L 48m", Content::Empty);
    let guest = GuestVg::create(&claim.vg, &[(disk, number)], &[root])?;
    guest.with_lv("root", |device| {
        hostile(Path::new(device), 0, 48 * MIB, Fs::Ext4, claim, dir)
    })
}

/// Words of udev's database on filesystems and LVM, of each disk that is not of a job.
fn udev_says() -> Result<String> {
    let mut said = String::new();
    let mut disks: Vec<_> = fs::read_dir("/sys/block")?.flatten().collect();
    disks.sort_by_key(fs::DirEntry::file_name);
    for disk in disks {
        let fact = |name: &str| fs::read_to_string(disk.path().join(name)).unwrap_or_default();
        let (map, number) = (fact("dm/name"), fact("dev"));
        let map = map.trim_end();
        let ours = map.starts_with("guestsnap-") || map.contains("-guestsnap--");
        if ours || map.ends_with("-real") || map.ends_with("-cow") {
            continue;
        }
        let data = fs::read_to_string(format!("/run/udev/data/b{}", number.trim_end()));
        for line in data.unwrap_or_default().lines() {
            let word = line.strip_prefix("E:").unwrap_or_default();
            if ["ID_FS_", "LVM_", "SYSTEMD_WANTS"]
                .iter()
                .any(|start| word.starts_with(start))
            {
                said += &format!("udev {} {word}\n", disk.file_name().to_string_lossy());
            }
        }
    }
    check!(
        said.contains(" ID_FS_TYPE="),
        "udev knows of no filesystem:\n{said}"
    );
    Ok(said)
}

/// The words of the host's LVM, udev and blkid. Lines of races with devices that come and go are left out.
fn seen() -> Result<String> {
    let volumes =
        cmd::sh("lvs -a --noheadings -o vg_name,lv_name,lv_uuid -S 'tags!=guestsnap' 2>&1")?;
    let text = host_view()? + &udev_says()? + &volumes;
    let gone =
        |line: &&str| !(line.contains("open failed") || line.contains("Failed to find device"));
    Ok(text
        .lines()
        .filter(gone)
        .map(|line| line.to_owned() + "\n")
        .collect())
}

/// The kernel's log without what filesystems and loop devices say of themselves, and a slow machine of its clocks.
fn kernel_log() -> Result<String> {
    let left_out = "EXT4-fs|XFS|BTRFS|loop[0-9]+: |clocksource|hrtimer|rcu|workqueue|perf:";
    cmd::sh(&format!(
        "dmesg | grep -vE '{left_out}' | sed 's/^\\[[^]]*\\] //'"
    ))
}

/// The job of a guest whose file takes hours to be sent is held there while the host is looked at.
fn held(bacula: &Bacula, fileset: &str) -> Result {
    let state = bacula.host_state()?;
    let (before, log) = (seen()?, kernel_log()?);
    check!(!before.to_lowercase().contains("warning"), "{before}");
    let job = bacula.start_slow(fileset)?;
    bacula.wait_processing("/hole", Duration::from_secs(480))?;
    let during = seen()?;
    let ours = cmd::run("dmsetup", ["ls"])?;
    bacula.cancel(job)?;
    bacula.wait_job(job)?;
    check!(
        ours.lines().any(|line| line.starts_with("guestsnap-")),
        "nothing of {fileset} was mapped at that time:\n{ours}"
    );
    check!(
        during == before,
        "before:\n{before}\nduring the job of {fileset}:\n{during}"
    );
    bacula.check_host_state(&state)?;
    same_as(&before, &log)
}

/// A job to its end.
fn whole(bacula: &Bacula, fileset: &str) -> Result<JobResult> {
    let state = bacula.host_state()?;
    let (before, log) = (seen()?, kernel_log()?);
    let job = bacula.run_backup(fileset, "Full")?;
    println!("{}", job.log);
    bacula.check_host_state(&state)?;
    same_as(&before, &log)?;
    Ok(job)
}

/// `guestsnap check` says this of LVM's settings, and reads no guest for it.
fn checked(settings: &str) -> Result {
    let (before, log) = (seen()?, kernel_log()?);
    let output = cmd::command(&tool()?.display().to_string())
        .arg("check")
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find(|line| line.contains(" lvm settings "));
    check!(
        line.is_some_and(|l| l.contains(settings)),
        "no {settings}:\n{text}"
    );
    same_as(&before, &log)
}

fn same_as(before: &str, log: &str) -> Result {
    let (after, now) = (seen()?, kernel_log()?);
    check!(
        after == before,
        "before:\n{before}\nafter the job:\n{after}"
    );
    check!(
        now == log,
        "the kernel says more than before:\n{log}\nnow:\n{now}"
    );
    Ok(())
}

fn start(dir: &WorkDir, vg: &HostVg) -> Result<Bacula> {
    // The command of udev's rule at boot. It activates a group only once: one that poses as a known group stays as it is.
    let boot =
        "pvscan --cache --listvg --checkcomplete --vgonline --autoactivation event --udevoutput";
    for device in &vg.devices {
        cmd::run("lvm", boot.split(' ').chain([device.as_str()]))?;
    }
    let alone = |name: &str, size: u64, fs, claim: &Claim| -> Result {
        let lv = vg.lv(&format!("domu-w{name}"), &format!("{}m", size / MIB))?;
        hostile(&lv, 0, size, fs, claim, dir.path())
    };
    let (name, all) = (Claim::name(&vg.name), Claim::all_of(&vg.name)?);
    alone("ext4", 64 * MIB, Fs::Ext4, &name)?;
    alone("xfs", 320 * MIB, Fs::Xfs, &all)?;
    alone("btrfs", 128 * MIB, Fs::Btrfs, &name)?;
    let lv = vg.lv("domu-pa", "80m")?;
    let disk = GuestDisk::create(&lv, Table::Mbr, &[Part::new(60 * MIB, Content::Empty)])?;
    let part = disk.part(1)?;
    hostile(&lv, part.offset, part.size, Fs::Ext4, &all, dir.path())?;
    let lv = vg.lv("domu-la", "80m")?;
    let disk = GuestDisk::create(&lv, Table::Mbr, &[Part::new(60 * MIB, Content::Pv)])?;
    in_lvm(&disk, 1, &name, dir.path())?;
    let lv = vg.lv("domu-wlvm", "60m")?;
    let disk = GuestDisk::create(&lv, Table::Whole, &[Part::new(60 * MIB, Content::Pv)])?;
    in_lvm(&disk, 1, &all, dir.path())?;
    let fileset = |name: &str, guests: &str| {
        let line = format!("guestsnap: lv={}/domu-{guests} strip=domu-", vg.name);
        (name.to_owned(), fileset_plugin(&line))
    };
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![
            fileset("la", "la"),
            fileset("wlvm", "wlvm"),
            fileset("others", "[pw][abex]*"),
        ],
        fd_conf: UNCOMPRESSED.into(),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    Ok(bacula)
}

/// With LVM's usual settings and no devices file.
fn volumes() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let bacula = start(&dir, &vg)?;
    let _conf = LvmConf::set("")?;
    checked("ok    lvm settings   LVM does not look into guests")?;
    for guest in ["la", "wlvm"] {
        held(&bacula, guest)?;
    }
    // To our own reader a valid label is one too: what is hidden so is read as the guest's LVM, and the job says that
    // nothing is in it.
    let job = whole(&bacula, "others")?;
    for guest in ["pa", "wext4", "wxfs", "wbtrfs"] {
        // The bytes where the forged volume would be may look like a part of a filesystem.
        let told = ["GS-406", "GS-503"].map(|code| format!("{guest}: ERROR {code}"));
        let any = told.iter().any(|told| job.log.contains(told));
        check!(any, "none of {told:?}");
    }
    Ok(())
}

/// With an LVM that looks into volumes. What lies at the beginning of a volume, and of the snapshot of it, it sees always,
/// job or not: those the administrator's filter has to leave out.
fn scanned() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let bacula = start(&dir, &vg)?;
    let filter = [
        "/vg0/domu-w",
        "vg0-domu--w",
        "/vg0/guestsnap-",
        "vg0-guestsnap--",
    ]
    .map(|pattern| format!("\"r|{pattern}|\""));
    let filter = format!("scan_lvs=1\nglobal_filter=[{}]", filter.join(","));
    let conf = LvmConf::set(&filter)?;
    checked("ERROR lvm settings   scan_lvs is 1: udev's rule")?;
    held(&bacula, "wlvm")?;
    drop(conf);
    // Without any filter, and without the guests whose volumes are physical volumes in all.
    for lv in ["wext4", "wxfs", "wbtrfs", "wlvm"] {
        let lv = format!("{}/domu-{lv}", vg.name);
        crate::lvm::lvm("lvremove", &["-f", &lv])?;
    }
    let _conf = LvmConf::set("scan_lvs=1")?;
    checked("ERROR lvm settings   scan_lvs is 1: LVM takes")?;
    held(&bacula, "la")
}

/// Image files, with an LVM that reads loop devices.
fn images() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let path = |name: &str| -> PathBuf { store.path().join(name) };
    let all = Claim::all_of(&vg.name)?;
    let mut disks = Vec::new();
    for name in ["a.img", "b.img"] {
        image(&path(name), 80 * MIB)?;
        let part = [Part::new(80 * MIB, Content::Pv)];
        disks.push(GuestDisk::create(&path(name), Table::Whole, &part)?);
    }
    let root = GuestLv::new("root", "-i 2 -I 64k -L 64m", Content::Empty);
    let guest = GuestVg::create("guestvg", &[(&disks[0], 1), (&disks[1], 1)], &[root])?;
    guest.with_lv("root", |device| {
        hostile(Path::new(device), 0, 64 * MIB, Fs::Ext4, &all, dir.path())
    })?;
    image(&path("part.img"), 80 * MIB)?;
    let parts = [Part::new(60 * MIB, Content::Empty)];
    let disk = GuestDisk::create(&path("part.img"), Table::Mbr, &parts)?;
    let part = disk.part(1)?.clone();
    hostile(
        &disk.path,
        part.offset,
        part.size,
        Fs::Ext4,
        &all,
        dir.path(),
    )?;
    image(&path("whole.img"), 64 * MIB)?;
    hostile(&path("whole.img"), 0, 64 * MIB, Fs::Ext4, &all, dir.path())?;
    // Not valid: to our own reader these are filesystems.
    evil_pv::spoil(&disk.path, part.offset, 0)?;
    evil_pv::spoil(&path("whole.img"), 0, 0)?;

    let shown = store.path().display();
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: ["stripes", "part", "whole"]
            .map(|name| {
                (
                    name.to_owned(),
                    fileset_plugin(&format!("guestsnap: guest={name}")),
                )
            })
            .to_vec(),
        client_file: Some(format!(
            "[guest.stripes]\ndisks = ['{shown}/a.img', '{shown}/b.img']\n[guest.part]\ndisks = ['{shown}/part.img']\n\
             [guest.whole]\ndisks = ['{shown}/whole.img']\n"
        )),
        fd_conf: UNCOMPRESSED.into(),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let _conf = LvmConf::set("")?;
    held(&bacula, "stripes")?;
    held(&bacula, "part")?;
    let job = whole(&bacula, "whole")?;
    check!(
        job.errors > 0 && job.log.contains("GS-409"),
        "no word of the label on the loop device:\n{}",
        job.log
    );
    Ok(())
}
