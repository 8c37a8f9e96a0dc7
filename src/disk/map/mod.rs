//! A volume as a block device.
//!
//! | volume | device |
//! |---|---|
//! | all of a block device | the device itself |
//! | one run; file, or no device-mapper | loop device |
//! | one run or several, or stripes; device-mapper | linear and striped targets |
//! | thin | thin-pool and thin targets over mapped parts |
//!
//! What is mapped of a snapshot may be written: journals are replayed into it. Nothing outlives a
//! killed process: loop devices clear themselves, and device-mapper devices are marked for removal
//! at their last close.

mod dm;
mod thin;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::examine::Volume;
use super::layout::{Extent, Layout, Segment};
use super::read::size_of;
use crate::error::escape;
use crate::snapshot::Device;
use crate::snapshot::names::{DM_UUID_PREFIX, PREFIX};
use crate::sys::blkid::{Answer, safe_probe};
use crate::sys::loopdev::LoopDevice;
use crate::{Code, Error, Result};
use dm::{Control, DmDevice, Target};

const SECTOR: u64 = 512;
/// What a loop device has for sectors where the filesystem allows it: some filesystems take direct
/// I/O in such blocks only (XFS for files that share blocks, since Linux 6.14).
const LARGE_SECTOR: u64 = 4096;

/// Name of a device-mapper device of ours: `guestsnap-` and letters, digits, `_.-`; 127 bytes at
/// most, which is the kernel's limit.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DmName(String);

impl DmName {
    /// Checks a name.
    pub fn new(name: impl Into<String>) -> Option<Self> {
        let name = name.into();
        let rest = name.strip_prefix(PREFIX)?;
        let fine = !rest.is_empty()
            // The UUID holds prefix and name in 128 bytes.
            && name.len() + DM_UUID_PREFIX.len() <= 127
            && rest.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
        fine.then_some(DmName(name))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The UUID that goes with it.
    pub fn uuid(&self) -> String {
        format!("{}{}", DM_UUID_PREFIX, self.0)
    }
}

impl std::fmt::Display for DmName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Gives names for device-mapper devices. The one that counts writes each name to the journal
/// before it returns: what is created next can then be found again.
pub trait Namer {
    /// A name that no device has.
    fn next(&mut self) -> Result<DmName>;
}

/// A volume as a block device. `close` undoes it; `Drop` does the same and logs. Close what is
/// mounted from it first.
#[derive(Debug)]
pub struct Mapped {
    device: Owned,
    size: u64,
    /// Below the device, in the order of creation.
    layers: Vec<Layer>,
}

#[derive(Debug)]
enum Owned {
    /// A device that somebody else made: the snapshot itself.
    Borrowed {
        file: File,
        path: PathBuf,
    },
    Loop(LoopDevice),
    Dm(DmDevice),
}

#[derive(Debug)]
enum Layer {
    Loop(LoopDevice),
    Pool(thin::PoolUse),
}

impl Mapped {
    /// The device's node.
    pub fn path(&self) -> &Path {
        match &self.device {
            Owned::Borrowed { path, .. } => path,
            Owned::Loop(device) => device.path(),
            Owned::Dm(device) => device.path(),
        }
    }

    /// The open device.
    pub fn fd(&self) -> BorrowedFd<'_> {
        match &self.device {
            Owned::Borrowed { file, .. } => file.as_fd(),
            Owned::Loop(device) => device.as_fd(),
            Owned::Dm(device) => device.as_fd(),
        }
    }

    /// Bytes, as the kernel has them.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// For the log: `/dev/loop3`, `/dev/dm-7 (guestsnap-12-1)`.
    pub fn describe(&self) -> String {
        match &self.device {
            Owned::Dm(device) => format!("{} ({})", device.path().display(), device.name()),
            _ => escape(self.path().as_os_str().as_encoded_bytes()),
        }
    }

    /// Removes the device and all below it. Goes on after a failure and returns the first one.
    pub fn close(self) -> Result<()> {
        let mut first = match self.device {
            Owned::Borrowed { .. } => Ok(()),
            Owned::Loop(device) => close_loop(device),
            Owned::Dm(device) => device.close(),
        };
        for layer in self.layers.into_iter().rev() {
            let result = match layer {
                Layer::Loop(device) => close_loop(device),
                Layer::Pool(pool) => pool.close(),
            };
            match (&first, result) {
                (Ok(()), result) => first = result,
                (Err(_), Err(next)) => log::error!("{}", next.report()),
                (Err(_), Ok(())) => {}
            }
        }
        first
    }
}

fn close_loop(device: LoopDevice) -> Result<()> {
    let name = device.path().display().to_string();
    device
        .close()
        .map_err(|error| Error::new(Code::ReleaseFailed, format!("{name}: release")).because(error))
}

/// Makes a volume a block device. `devices` are the snapshots of the guest's disks, in the order in
/// which the disks were examined.
pub fn map(volume: &Volume, devices: &[Device], names: &mut dyn Namer) -> Result<Mapped> {
    let fail = |error: Error| Error::new(error.code(), volume.name.clone()).because(error);
    match &volume.layout {
        Layout::Segments(segments) => map_segments(segments, devices, names),
        Layout::Thin {
            pool,
            device_id,
            size,
        } => thin::map(pool, *device_id, *size, devices, names).map(|(pool, device)| Mapped {
            size: device.size(),
            device: Owned::Dm(device),
            layers: vec![Layer::Pool(pool)],
        }),
    }
    .map_err(fail)
}

fn map_segments(segments: &[Segment], devices: &[Device], names: &mut dyn Namer) -> Result<Mapped> {
    let alone = |device: Owned, size: u64| Mapped {
        device,
        size,
        layers: Vec::new(),
    };
    let control = Control::open();
    if let [Segment::Linear(extent)] = segments {
        let base = Base::open(devices, extent.disk)?;
        let len = base.check(*extent)?;
        if base.number.is_some() && extent.start == 0 && len == base.size {
            return Ok(alone(
                Owned::Borrowed {
                    file: base.file,
                    path: base.path,
                },
                len,
            ));
        }
        if base.number.is_none() || control.is_none() {
            return Ok(alone(Owned::Loop(base.attach(extent.start, len)?), len));
        }
    }
    let control = control.ok_or_else(needs_dm)?;
    let mut ground = Ground::new(devices);
    let device = DmDevice::create(&control, names, &ground.targets(segments)?)?;
    let layers = ground.into_loops().into_iter().map(Layer::Loop).collect();
    Ok(Mapped {
        size: device.size(),
        device: Owned::Dm(device),
        layers,
    })
}

fn needs_dm() -> Error {
    Error::new(
        Code::UnsupportedVolume,
        "a volume of several segments needs device-mapper, which this host does not offer",
    )
}

/// A snapshot, opened and measured.
struct Base {
    /// For reading: closing a device that was open for writing makes udev probe it, which then is
    /// in the way of its removal.
    file: File,
    path: PathBuf,
    size: u64,
    /// Device number; `None` for a file.
    number: Option<u64>,
    read_only: bool,
}

impl Base {
    fn open(devices: &[Device], disk: usize) -> Result<Self> {
        let device = devices
            .get(disk)
            .ok_or_else(|| Error::new(Code::Internal, format!("no snapshot of disk {disk}")))?;
        let fail = |error: std::io::Error| {
            let name = escape(device.path.as_os_str().as_encoded_bytes());
            Error::new(Code::MapFailed, format!("{name}: open")).because(error)
        };
        let file = File::open(&device.path).map_err(fail)?;
        let size = size_of(&file).map_err(fail)?;
        let metadata = file.metadata().map_err(fail)?;
        let block = metadata.file_type().is_block_device();
        let number = block.then(|| metadata.rdev());
        Ok(Base {
            file,
            path: device.path.clone(),
            size,
            number,
            read_only: device.read_only,
        })
    }

    /// Checks that an extent lies on the device; its length in whole sectors.
    fn check(&self, extent: Extent) -> Result<u64> {
        let len = extent.len - extent.len % SECTOR;
        let inside = extent
            .start
            .checked_add(len)
            .is_some_and(|end| end <= self.size);
        if len == 0 || extent.start % SECTOR != 0 || !inside {
            let name = escape(self.path.as_os_str().as_encoded_bytes());
            return Err(Error::new(
                Code::MapFailed,
                format!(
                    "{name}: {} bytes from {} on are not on it",
                    extent.len, extent.start
                ),
            ));
        }
        Ok(len)
    }

    /// A loop device needs to write to what is below it, unless that must not be written to.
    fn attach(&self, start: u64, len: u64) -> Result<LoopDevice> {
        let same = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        File::options()
            .read(true)
            .write(!self.read_only)
            .open(same)
            .and_then(|file| {
                let sector = sector_for(&file, start, len) as u32;
                LoopDevice::attach(&file, start, len, sector, self.read_only)
            })
            .map_err(|error| {
                let name = escape(self.path.as_os_str().as_encoded_bytes());
                Error::new(Code::MapFailed, format!("loop device on {name}")).because(error)
            })
    }
}

/// The largest sector with which what lies there can be mounted.
fn sector_for(file: &File, start: u64, len: u64) -> u64 {
    if start % LARGE_SECTOR != 0 || len % LARGE_SECTOR != 0 {
        return SECTOR;
    }
    // What it holds is looked at again, and told, before it is mounted.
    let Ok(Answer::Found(values)) = safe_probe(file.as_fd(), start, len) else {
        return SECTOR;
    };
    let block = values
        .get("BLOCK_SIZE")
        .map(|v| String::from_utf8_lossy(v).parse::<u64>());
    match block {
        Some(Ok(block)) if block % LARGE_SECTOR == 0 => LARGE_SECTOR,
        _ => SECTOR,
    }
}

/// The snapshots as block devices that targets can name; files by a loop device over all of them.
struct Ground<'a> {
    devices: &'a [Device],
    opened: BTreeMap<usize, (Base, Option<LoopDevice>)>,
}

impl<'a> Ground<'a> {
    fn new(devices: &'a [Device]) -> Self {
        Ground {
            devices,
            opened: BTreeMap::new(),
        }
    }

    /// `major:minor sector` of an extent.
    fn place(&mut self, extent: Extent) -> Result<String> {
        let (base, loop_device) = match self.opened.entry(extent.disk) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let base = Base::open(self.devices, extent.disk)?;
                let loop_device = match base.number {
                    Some(_) => None,
                    None => Some(base.attach(0, base.size - base.size % SECTOR)?),
                };
                entry.insert((base, loop_device))
            }
        };
        base.check(extent)?;
        let number = match (loop_device, base.number) {
            (Some(device), _) => device.number().map_err(|error| {
                Error::new(Code::MapFailed, device.path().display().to_string()).because(error)
            })?,
            (None, Some(number)) => number,
            (None, None) => return Err(Error::new(Code::Internal, "a file without loop device")),
        };
        Ok(format!("{} {}", dm::devno(number), extent.start / SECTOR))
    }

    /// Segments as device-mapper targets.
    fn targets(&mut self, segments: &[Segment]) -> Result<Vec<Target>> {
        let mut targets = Vec::new();
        for segment in segments {
            let len = segment.len() / SECTOR;
            targets.push(match segment {
                Segment::Linear(extent) => Target::new(len, "linear", self.place(*extent)?),
                Segment::Striped {
                    stripe_size,
                    stripes,
                } => {
                    let mut text = format!("{} {}", stripes.len(), stripe_size / SECTOR);
                    for stripe in stripes {
                        text.push(' ');
                        text.push_str(&self.place(*stripe)?);
                    }
                    Target::new(len, "striped", text)
                }
            });
        }
        Ok(targets)
    }

    fn into_loops(self) -> Vec<LoopDevice> {
        self.opened
            .into_values()
            .filter_map(|(_, device)| device)
            .collect()
    }
}

/// Names for tests and tools that keep no journal: a prefix and a counter.
#[derive(Debug)]
pub struct CountingNamer {
    stem: String,
    count: u32,
}

impl CountingNamer {
    /// Names `guestsnap-STEM-1`, `guestsnap-STEM-2`, …
    pub fn new(stem: impl Into<String>) -> Self {
        CountingNamer {
            stem: stem.into(),
            count: 0,
        }
    }
}

impl Namer for CountingNamer {
    fn next(&mut self) -> Result<DmName> {
        self.count += 1;
        let name = format!("{}{}-{}", PREFIX, self.stem, self.count);
        DmName::new(name.clone()).ok_or_else(|| Error::new(Code::Internal, format!("name {name}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_names() {
        assert_eq!(
            DmName::new("guestsnap-12-1").unwrap().uuid(),
            "GUESTSNAP-guestsnap-12-1"
        );
        assert!(DmName::new("vg0-root").is_none());
        assert!(DmName::new("guestsnap-").is_none());
        assert!(DmName::new("guestsnap-a/b").is_none());
        assert!(DmName::new(format!("guestsnap-{}", "x".repeat(108))).is_none());
        assert!(DmName::new(format!("guestsnap-{}", "x".repeat(107))).is_some());
    }
}
