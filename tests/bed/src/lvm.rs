//! The host's own LVM for a test: a throwaway VG on scratch disks (in the emulated machine) or on image files.

use super::guestdisk::{Loop, image};
use super::workdir::WorkDir;
use super::{Result, cmd, hoststate};
use crate::check;
use std::path::{Path, PathBuf};

const CONFIG: &str = "global/notify_dbus=0 backup/backup=0 backup/archive=0 devices/hints=\"none\"";

/// The emulated machine's empty disks.
pub const SCRATCH: [&str; 2] = ["/dev/vdc", "/dev/vdd"];

/// The device of [`HostVg::on_mapped`].
const MAPPED: &str = "bed-disk";

/// Not from the disk's start: LVM would see the same volume twice. In sectors.
const MAPPED_FROM: u64 = 2048;

/// Empties a scratch disk: what the test before has hidden in a volume may lie where LVM looks for labels now.
fn blank(disk: &str) -> Result {
    cmd::run("blkdiscard", ["-f", disk]).map(drop)
}

/// A VG that is removed, with all its LVs, when dropped.
#[derive(Debug)]
pub struct HostVg {
    /// Its name.
    pub name: String,
    /// Its physical volumes.
    pub devices: Vec<String>,
    _loops: Vec<Loop>,
    _dir: Option<WorkDir>,
}

impl HostVg {
    /// On the scratch disks; only in the emulated machine.
    pub fn on_scratch(name: &str) -> Result<Self> {
        check!(
            super::inside::is_inside(),
            "the scratch disks exist only in the emulated machine"
        );
        Self::on_devices(name, SCRATCH.map(str::to_string).to_vec(), Vec::new(), None)
    }

    /// On one of the scratch disks, for several groups; only in the emulated machine.
    pub fn on_scratch_disk(name: &str, disk: usize) -> Result<Self> {
        check!(
            super::inside::is_inside(),
            "the scratch disks exist only in the emulated machine"
        );
        Self::on_devices(name, vec![SCRATCH[disk].to_string()], Vec::new(), None)
    }

    /// One that [`HostVg::on_scratch`] made before the machine was booted again.
    pub fn found(name: &str) -> Self {
        Self {
            name: name.to_string(),
            devices: SCRATCH.map(str::to_string).to_vec(),
            _loops: Vec::new(),
            _dir: None,
        }
    }

    /// On sparse image files behind loop devices, for a host that has device-mapper itself.
    pub fn on_loops(name: &str, count: usize, size: u64) -> Result<Self> {
        check!(
            hoststate::have_dm("snapshot-origin"),
            "no device-mapper snapshots in this kernel"
        );
        let dir = WorkDir::new()?;
        let mut loops = Vec::new();
        for n in 0..count {
            let file = dir.join(format!("pv{n}"));
            image(&file, size)?;
            loops.push(Loop::attach(&file, 0, None, 0)?);
        }
        let devices = loops.iter().map(|l| l.device().to_string()).collect();
        Self::on_devices(name, devices, loops, Some(dir))
    }

    /// On a scratch disk whose reads take longer by some milliseconds; only in the emulated machine.
    pub fn on_delayed(name: &str, milliseconds: u32) -> Result<Self> {
        cmd::run("modprobe", ["dm-delay"])?;
        let disk = SCRATCH[0];
        Self::on_table(
            name,
            &format!(
                "0 {} delay {disk} {MAPPED_FROM} {milliseconds} {disk} {MAPPED_FROM} 0",
                mapped_sectors()?
            ),
        )
    }

    /// On a scratch disk that can be made bad by [`Trouble`]; only in the emulated machine.
    pub fn on_mapped(name: &str) -> Result<Self> {
        Self::on_table(name, &Trouble::None.table()?)
    }

    /// From now on the disk of [`HostVg::on_mapped`] is like this.
    pub fn set_trouble(&self, trouble: Trouble) -> Result {
        let table = trouble.table()?;
        // Nothing is held back in the queue: who reads now gets the answer of the disk as it was.
        cmd::run("dmsetup", ["suspend", MAPPED])?;
        let loaded = cmd::run_with_input("dmsetup", ["load", MAPPED], table.as_bytes());
        cmd::run("dmsetup", ["resume", MAPPED])?;
        loaded.map(drop)
    }

    fn on_table(name: &str, table: &str) -> Result<Self> {
        check!(
            super::inside::is_inside(),
            "the scratch disks exist only in the emulated machine"
        );
        blank(SCRATCH[0])?;
        cmd::run("dmsetup", ["create", MAPPED, "--table", table])?;
        let device = format!("/dev/mapper/{MAPPED}");
        Self::on_devices(name, vec![device], Vec::new(), None)
    }

    fn on_devices(
        name: &str,
        devices: Vec<String>,
        loops: Vec<Loop>,
        dir: Option<WorkDir>,
    ) -> Result<Self> {
        for device in devices.iter().filter(|d| SCRATCH.contains(&d.as_str())) {
            blank(device)?;
        }
        lvm(
            "vgcreate",
            &[
                &["-y", "-s", "4m", name],
                &devices.iter().map(String::as_str).collect::<Vec<_>>()[..],
            ]
            .concat(),
        )?;
        Ok(Self {
            name: name.to_string(),
            devices,
            _loops: loops,
            _dir: dir,
        })
    }

    /// Makes a thick LV (`size` as lvcreate's `-L`); its node.
    pub fn lv(&self, name: &str, size: &str) -> Result<PathBuf> {
        self.lvcreate(&["-Wy", "-L", size, "-n", name])?;
        Ok(self.node(name))
    }

    /// Makes a thin pool.
    pub fn thin_pool(&self, name: &str, size: &str) -> Result {
        self.lvcreate(&["--type", "thin-pool", "-L", size, "-n", name])
    }

    /// Makes a thin LV.
    pub fn thin_lv(&self, pool: &str, name: &str, size: &str) -> Result<PathBuf> {
        lvm(
            "lvcreate",
            &[
                "-y",
                "-V",
                size,
                "-n",
                name,
                "--thinpool",
                &format!("{}/{pool}", self.name),
            ],
        )?;
        Ok(self.node(name))
    }

    /// lvcreate with any arguments, in this VG (named unless an argument does so).
    pub fn lvcreate(&self, args: &[&str]) -> Result {
        let inside = format!("{}/", self.name);
        let named = args
            .iter()
            .any(|a| *a == self.name || a.starts_with(&inside));
        let vg = if named {
            None
        } else {
            Some(self.name.as_str())
        };
        lvm("lvcreate", &[&["-y"], args, vg.as_slice()].concat())?;
        Ok(())
    }

    /// Sets a tag on an LV.
    pub fn tag(&self, lv: &str, tag: &str) -> Result {
        lvm(
            "lvchange",
            &["--addtag", tag, &format!("{}/{lv}", self.name)],
        )?;
        Ok(())
    }

    /// Its node in `/dev`, by group and name.
    pub fn node(&self, lv: &str) -> PathBuf {
        Path::new("/dev").join(&self.name).join(lv)
    }

    /// Names of all LVs, hidden ones too.
    pub fn names(&self) -> Result<Vec<String>> {
        let out = lvm("lvs", &["-a", "--noheadings", "-o", "lv_name", &self.name])?;
        Ok(out.lines().map(|l| l.trim().to_string()).collect())
    }
}

impl Drop for HostVg {
    fn drop(&mut self) {
        let mut left = None;
        for _ in 0..10 {
            left = lvm("vgremove", &["-f", "-y", &self.name]).err();
            if left.is_none() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(500));
        }
        if let Some(e) = left {
            eprintln!("{}", super::message(&e));
        }
        for device in &self.devices {
            if let Err(e) = cmd::run("wipefs", ["-a", "-f", "-q", device]) {
                eprintln!("{}", super::message(&e));
            }
            // udev may have looked away at that moment: its link to the wiped PV would stay.
            let again = format!("udevadm trigger --settle --action=change {device}");
            if let Err(e) = cmd::sh(&again) {
                eprintln!("{}", super::message(&e));
            }
            if device.ends_with(MAPPED) {
                if let Err(e) = cmd::run("dmsetup", ["remove", "--retry", MAPPED]) {
                    eprintln!("{}", super::message(&e));
                }
            }
        }
    }
}

/// Faults of the disk of [`HostVg::on_mapped`].
#[derive(Clone, Debug)]
pub enum Trouble {
    /// Nothing.
    None,
    /// These parts cannot be read or written: first sector and number of sectors, in order.
    Bad(Vec<(u64, u64)>),
    /// It fails whatever is asked of it.
    Gone,
}

impl Trouble {
    fn table(&self) -> Result<String> {
        let all = mapped_sectors()?;
        let disk = SCRATCH[0];
        if let Trouble::Gone = self {
            cmd::run("modprobe", ["dm-flakey"])?;
            return Ok(format!("0 {all} flakey {disk} {MAPPED_FROM} 0 3600\n"));
        }
        let bad = match self {
            Trouble::Bad(parts) => &parts[..],
            _ => &[],
        };
        let mut table = String::new();
        let mut at = 0;
        // An empty bad part at the end, for what is good behind the last one.
        for &(first, count) in bad.iter().chain([&(all, 0)]) {
            if at < first {
                let (length, behind) = (first - at, at + MAPPED_FROM);
                table += &format!("{at} {length} linear {disk} {behind}\n");
            }
            if count > 0 {
                table += &format!("{first} {count} error\n");
            }
            at = first + count;
        }
        Ok(table)
    }
}

fn mapped_sectors() -> Result<u64> {
    Ok(super::guestdisk::size_of(Path::new(SCRATCH[0]))? / 512 - MAPPED_FROM)
}

/// An LVM command on the host's devices.
pub fn lvm(command: &str, args: &[&str]) -> Result<String> {
    cmd::run(command, [&["--config", CONFIG], args].concat())
}
