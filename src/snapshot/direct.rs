//! A guest's own disks, taken for writing: only while nothing else uses them.
//!
//! A volume is held by an exclusive open, later by the map above it. An image is held by locks: over
//! the whole file, which collides with those that QEMU takes, and `flock`.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use super::active::Activated;
use super::lvm::{self, LvInfo};
use super::reflink::{open, shown};
use super::take::not_a_disk;
use super::{Device, Journal, drbd};
use crate::error::{Code, Error, Result};
use crate::guest::DiskSource;
use crate::hostdev::holders::{self, Holder, Target};
use crate::hostdev::lvname::LvName;
use crate::hostdev::{host_use, names};
use crate::point::{Point, reach};
use crate::sys::{blockdev, lease};

/// Time for udev, which opens volumes for moments.
const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(100);

/// A disk that nothing else uses, open for reading and writing.
#[derive(Debug)]
pub struct Direct {
    name: String,
    target: Target,
    file: File,
    path: PathBuf,
    size: u64,
    activated: Option<Activated>,
}

/// Takes disks for writing, all or none. `activate`: inactive volumes may be activated.
pub fn take_for_writing(
    disks: &[DiskSource],
    activate: bool,
    journal: &Arc<Journal>,
) -> Result<Vec<Direct>> {
    disks
        .iter()
        .map(|disk| match disk {
            DiskSource::Lv(name) => Direct::volume(name, activate, journal),
            DiskSource::File(path) => Direct::image(path.clone()),
        })
        .collect()
}

fn refused(name: &str, why: &str) -> Error {
    Error::new(Code::TargetRefused, format!("{name}: {why}"))
}

fn busy(name: &str, why: &str) -> Error {
    Error::new(Code::TargetBusy, format!("{name}: {why}"))
}

impl Direct {
    fn volume(name: &LvName, activate: bool, journal: &Arc<Journal>) -> Result<Direct> {
        let shown = name.to_string();
        let (lv, _) = volume_of(name)?;
        if let Some(why) = why_not(&lv) {
            return Err(refused(&shown, why));
        }
        if !lv.active && !activate {
            let why = "it is not active, and `activate = false` forbids to make it so";
            return Err(refused(&shown, why));
        }
        let activated = match lv.active {
            true => None,
            false => Activated::of(&lv, journal)?,
        };
        let (lv, all) = volume_of(name)?;
        let devno = lv
            .devno
            .ok_or_else(|| refused(&shown, "it is not active"))?;
        if let Some(who) = host_use(devno) {
            return Err(who.error(&shown));
        }
        drbd::refuse_metadata(&lv, &all, false)?;
        let target = Target::Device(devno);
        wait_until_free(&shown, target, || is_open(name))?;
        let path = PathBuf::from(format!("/dev/dm-{}", devno.1));
        let failed = |error: std::io::Error| match error.raw_os_error() {
            Some(libc::EBUSY) => busy(&shown, "the kernel or a program holds it"),
            _ => refused(&shown, "opening it for writing").because(error),
        };
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_EXCL | libc::O_NOFOLLOW)
            .open(&path)
            .map_err(failed)?;
        let size = blockdev::size(file.as_fd()).map_err(failed)?;
        Ok(Direct {
            name: shown,
            target,
            file,
            path,
            size,
            activated,
        })
    }

    fn image(path: PathBuf) -> Result<Direct> {
        let name = shown(&path);
        let (image, size) = open(&path)?;
        let failed = |error| refused(&name, "opening it for writing").because(error);
        let meta = image.metadata().map_err(failed)?;
        let target = Target::File {
            dev: meta.dev(),
            ino: meta.ino(),
        };
        wait_until_free(&name, target, || Ok(false))?;
        match lease::has_writer(image.as_fd()) {
            Ok(false) => {}
            Ok(true) => return Err(busy(&name, "it is open for writing")),
            Err(error) => {
                let why = "whether it is open for writing cannot be found out";
                return Err(refused(&name, why).because(error));
            }
        }
        let file = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/self/fd/{}", image.as_raw_fd()))
            .map_err(failed)?;
        lock(&file, &name)?;
        Ok(Direct {
            path: PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())),
            name,
            target,
            file,
            size,
            activated: None,
        })
    }

    /// The disk. For an image, the path is valid while this value exists.
    pub fn device(&self) -> Device {
        Device {
            path: self.path.clone(),
            size: self.size,
            read_only: false,
        }
    }

    /// Whether a map can hold it: it is a block device.
    pub fn is_device(&self) -> bool {
        matches!(self.target, Target::Device(_))
    }

    /// Lets a map take the place of the exclusive open.
    pub fn let_go(&mut self) -> Result<()> {
        self.file = File::open(&self.path)
            .map_err(|error| refused(&self.name, "opening it").because(error))?;
        Ok(())
    }

    /// Checks that nothing but this process uses the disk.
    pub fn is_alone(&self) -> Result<()> {
        match used(self.target) {
            None => Ok(()),
            Some(who) => Err(busy(&self.name, &who)),
        }
    }

    /// Writes everything to the disk and lets go of it.
    pub fn close(self) -> Result<()> {
        let Direct {
            name,
            file,
            activated,
            ..
        } = self;
        let written = reach(Point::IntoFlush)
            .map_err(std::io::Error::from)
            .and_then(|()| file.sync_all());
        drop(file);
        let written = written.map_err(|error| {
            let text = format!("{name}: writing back what was restored");
            Error::new(Code::RestoreFailed, text).because(error)
        });
        let inactive = activated.map_or(Ok(()), Activated::close);
        written.and(inactive)
    }
}

/// LVM's report on a volume, and on its group.
fn volume_of(name: &LvName) -> Result<(LvInfo, Vec<LvInfo>)> {
    let all = lvm::list_in(&[name.vg()])?;
    let found = all.iter().find(|lv| lv.name == *name).cloned();
    let found = found.ok_or_else(|| Error::new(Code::OriginGone, name.to_string()))?;
    Ok((found, all))
}

/// Why a volume is no disk to write to.
fn why_not(lv: &LvInfo) -> Option<&'static str> {
    let has = |place: usize, letter| lv.attr.chars().nth(place) == Some(letter);
    not_a_disk(lv).or_else(|| {
        if lv.is_snapshot() && has(9, 'k') {
            Some("it is a snapshot itself")
        } else if has(1, 'r') {
            Some("it is read-only")
        } else {
            None
        }
    })
}

/// Whether anything has the volume open, kernel threads of a hypervisor included.
fn is_open(name: &LvName) -> Result<bool> {
    let found = super::dm::by_name(&name.dm_name())?;
    Ok(found.is_some_and(|device| device.open))
}

/// Waits for a moment until nothing uses the disk.
fn wait_until_free(name: &str, target: Target, is_open: impl Fn() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    loop {
        let who = match used(target) {
            None if !is_open()? => return Ok(()),
            None => "the kernel has it open, as it does for a running guest".to_owned(),
            Some(who) => who,
        };
        if begun.elapsed() >= PATIENCE {
            return Err(busy(name, &who));
        }
        sleep(PAUSE);
    }
}

/// The users of a disk, except this process and maps of ours.
fn used(target: Target) -> Option<String> {
    if let Target::Device(devno) = target {
        if let Some(who) = host_use(devno) {
            return Some(who.to_string());
        }
    }
    let own = std::process::id();
    let all = holders::stack(target)
        .into_iter()
        .filter_map(|(on, holder)| {
            let ours = match &holder {
                Holder::Process { process, .. } => process.pid == own,
                Holder::Device { name, .. } => is_ours(name),
                Holder::Mount { .. } | Holder::Swap => false,
            };
            (on.is_empty() && !ours).then_some(holder)
        });
    let all: Vec<Holder> = all.collect();
    (!all.is_empty()).then(|| format!("in use{}", holders::describe(&all)))
}

/// Whether this is a map of ours.
fn is_ours(name: &str) -> bool {
    let folder = PathBuf::from("/sys/class/block").join(name).join("dm");
    let read = |file: &str| std::fs::read_to_string(folder.join(file)).unwrap_or_default();
    names::is_our_device(read("name").trim_end(), read("uuid").trim_end())
}

/// Locks an image against QEMU, which locks bytes of an image that it opens, and against others.
fn lock(file: &File, name: &str) -> Result<()> {
    let whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let locked = nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_OFD_SETLK(&whole));
    let why = |error: std::io::Error| match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => busy(name, "a program has locked it"),
        _ => refused(name, "locking it").because(error),
    };
    locked.map_err(|error| why(error.into()))?;
    flock(file, FlockOperation::NonBlockingLockExclusive).map_err(|error| why(error.into()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn test_an_image_in_use_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let take = || Direct::image(path.clone());
        let code = || take().unwrap_err().code();
        let mut writer = File::create(&path).unwrap();
        writer.write_all(b"1234").unwrap();
        assert_eq!(code(), Code::TargetBusy);
        drop(writer);
        // Locks of another user of the file.
        let other = File::open(&path).unwrap();
        flock(&other, FlockOperation::LockShared).unwrap();
        assert_eq!(code(), Code::TargetBusy);
        drop(other);
        let other = File::open(&path).unwrap();
        let read = libc::flock {
            l_type: libc::F_RDLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 100,
            l_len: 1,
            l_pid: 0,
        };
        nix::fcntl::fcntl(&other, nix::fcntl::FcntlArg::F_OFD_SETLK(&read)).unwrap();
        assert_eq!(code(), Code::TargetBusy);
        drop(other);
        let taken = take().unwrap();
        assert_eq!(taken.device().size, 4);
        // Held: neither a second restore nor a guest gets it.
        assert_eq!(code(), Code::TargetBusy);
        taken.close().unwrap();
        take().unwrap().close().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(Direct::image(link).unwrap_err().code(), Code::NotAllowed);
    }

    #[test]
    fn test_an_image_that_a_process_reads_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, b"1").unwrap();
        let input = File::open(&path).unwrap();
        let mut reader = std::process::Command::new("sleep")
            .arg("60")
            .stdin(input)
            .spawn()
            .unwrap();
        let error = Direct::image(path.clone()).unwrap_err();
        reader.kill().unwrap();
        reader.wait().unwrap();
        assert_eq!(error.code(), Code::TargetBusy);
        assert!(error.report().contains("sleep (pid"), "{}", error.report());
        Direct::image(path).unwrap().close().unwrap();
    }
}
