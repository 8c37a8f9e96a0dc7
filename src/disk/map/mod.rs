//! A volume as a block device.
//!
//! | volume | device |
//! |---|---|
//! | whole block device | the device itself |
//! | one run; file, or no device-mapper | loop device, unless it would show an LVM label |
//! | one run or several, or stripes; device-mapper | linear and striped targets |
//! | thin, device-mapper | linear and zero targets, with a snapshot target above them for writes |
//! | thin in one run, no device-mapper | loop device |
//!
//! Snapshots are mapped writable, because the kernel replays journals into them. No device outlives
//! a killed process: loop devices have autoclear set, device-mapper devices deferred removal.

mod dm;
mod label;
mod stack;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::layout::{Extent, Layout, Segment};
use super::read::{ReadAt, size_of};
use super::volume::Volume;
use crate::error::escape;
use crate::hostdev::names::{DM_UUID_PREFIX, PREFIX, dm_uuid};
use crate::snapshot::Device;
use crate::sys::blkid::{Answer, safe_probe};
use crate::sys::loopdev::LoopDevice;
use crate::{Code, Error, Result};
use dm::{Control, DmDevice, Target};
use stack::{Layers, Stack};

const SECTOR: u64 = 512;
/// Sector size of a loop device where the filesystem allows it: some filesystems accept direct I/O
/// only in such blocks (XFS for reflinked files, since Linux 6.14).
const LARGE_SECTOR: u64 = 4096;

/// Name of a device-mapper device of ours: `guestsnap-` and letters, digits, `_.-`. At most 58
/// bytes: the UUID adds a prefix of 69, and the kernel accepts 127.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DmName(String);

impl DmName {
    /// Validates a name.
    pub fn new(name: impl Into<String>) -> Option<Self> {
        let name = name.into();
        let rest = name.strip_prefix(PREFIX)?;
        let fine = !rest.is_empty()
            // The UUID holds prefix and name.
            && name.len() + DM_UUID_PREFIX.len() <= 127
            && rest.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
        fine.then_some(DmName(name))
    }

    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The device's UUID.
    pub fn uuid(&self) -> String {
        dm_uuid(&self.0)
    }
}

impl std::fmt::Display for DmName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Services that maps need from their job, mainly device names. The job's implementation journals
/// each name before returning it, so that a sweep can find the device.
pub trait Namer {
    /// Returns an unused device name.
    fn next(&mut self) -> Result<DmName>;

    /// Creates an empty unnamed file for writes to a thin volume.
    fn scratch(&self) -> Result<File>;

    /// Whether the job is cancelled.
    fn cancelled(&self) -> bool {
        false
    }
}

/// A volume as a block device. `close` removes it; `Drop` does the same and logs errors. Close its
/// mounts first.
#[derive(Debug)]
pub struct Mapped {
    device: Owned,
    size: u64,
    /// For a thin volume: capacity for writes in bytes.
    room: Option<u64>,
    layers: Layers,
}

#[derive(Debug)]
enum Owned {
    /// A device owned elsewhere: the snapshot itself.
    Borrowed {
        file: File,
        path: PathBuf,
        size: u64,
    },
    Loop(LoopDevice),
    Dm(DmDevice),
}

impl Owned {
    fn size(&self) -> u64 {
        match self {
            Owned::Borrowed { size, .. } => *size,
            Owned::Loop(device) => device.size(),
            Owned::Dm(device) => device.size(),
        }
    }
}

impl Mapped {
    /// Path of the device node.
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

    /// Size in bytes according to the kernel.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Text for the log: `/dev/loop3`, `/dev/dm-7 (guestsnap-12-1)`.
    pub fn describe(&self) -> String {
        match &self.device {
            Owned::Dm(device) => format!("{} ({})", device.path().display(), device.name()),
            _ => escape(self.path().as_os_str().as_encoded_bytes()),
        }
    }

    /// Checks that no loop device shows an LVM label. A journal replayed since its creation may
    /// have written one.
    pub fn check_labels(&self) -> Result<()> {
        let own = match &self.device {
            Owned::Loop(device) => Some(device),
            Owned::Borrowed { .. } | Owned::Dm(_) => None,
        };
        own.into_iter()
            .chain(self.layers.loops())
            .try_for_each(label::check)
    }

    /// Removes the device and all devices below it. Continues after a failure and returns the first
    /// one.
    pub fn close(self) -> Result<()> {
        let valid = self.valid();
        let device = match self.device {
            Owned::Borrowed { .. } => Ok(()),
            Owned::Loop(device) => close_loop(device),
            Owned::Dm(device) => device.close(),
        };
        first_of(first_of(valid, device), self.layers.close())
    }

    /// Whether all writes to a thin volume found room. If not, the kernel fails every later read of
    /// it.
    fn valid(&self) -> Result<()> {
        let (Some(room), Owned::Dm(device)) = (self.room, &self.device) else {
            return Ok(());
        };
        let fail = |why: String| Error::new(Code::MapFailed, format!("{}: {why}", device.name()));
        let status = device
            .status()
            .map_err(|error| fail("status".into()).because(error))?;
        if status.starts_with(|c: char| c.is_ascii_digit()) {
            return Ok(());
        }
        Err(fail(format!(
            "the replay of its journal found no room ({status}): {} MiB at most, in the daemon's \
             working directory",
            room >> 20
        )))
    }
}

/// Returns the first of two failures and logs the second.
fn first_of(first: Result<()>, second: Result<()>) -> Result<()> {
    match (first, second) {
        (Ok(()), second) => second,
        (first, Ok(())) => first,
        (first, Err(error)) => {
            log::error!("{}", error.report());
            first
        }
    }
}

fn close_loop(device: LoopDevice) -> Result<()> {
    let name = device.path().display().to_string();
    device
        .close()
        .map_err(|error| Error::new(Code::ReleaseFailed, format!("{name}: release")).because(error))
}

/// Maps a volume to a block device. `devices` are the snapshots of the guest's disks, in the order
/// in which the disks were examined.
pub fn map(volume: &Volume, devices: &[Device], names: &mut dyn Namer) -> Result<Mapped> {
    let fail = |error: Error| Error::new(error.code(), volume.name.clone()).because(error);
    match &volume.layout {
        Layout::Segments(segments) => map_segments(segments, devices, names),
        thin @ Layout::Thin { budget, .. } => match Control::open() {
            Some(control) => Stack::new(control, devices, names).thin(thin, budget),
            None => stack::without_dm(thin, devices, names),
        },
    }
    .map_err(fail)
}

/// Maps a whole block device, so that the kernel keeps everything else from it. `None`: there is no
/// device-mapper.
pub fn hold(device: &Device, names: &mut dyn Namer) -> Result<Option<Mapped>> {
    let Some(control) = Control::open() else {
        return Ok(None);
    };
    let whole = Segment::Linear(Extent {
        disk: 0,
        start: 0,
        len: device.size - device.size % SECTOR,
    });
    let stack = Stack::new(control, std::slice::from_ref(device), names);
    stack.segments(&[whole]).map(Some)
}

fn map_segments(segments: &[Segment], devices: &[Device], names: &mut dyn Namer) -> Result<Mapped> {
    let alone = |device: Owned| Mapped {
        size: device.size(),
        device,
        room: None,
        layers: Layers::default(),
    };
    let control = Control::open();
    if let [Segment::Linear(extent)] = segments {
        let base = Base::open(devices, extent.disk)?;
        let len = base.check(*extent)?;
        if base.number.is_some() && extent.start == 0 && len == base.size {
            return Ok(alone(Owned::Borrowed {
                file: base.file,
                path: base.path,
                size: len,
            }));
        }
        let label = || label::is_shown_at(&base, extent.start).map_err(|error| base.unread(error));
        if control.is_none() || base.number.is_none() && !label()? {
            return Ok(alone(Owned::Loop(base.attach(extent.start, len)?)));
        }
    }
    let control = control.ok_or_else(needs_dm)?;
    Stack::new(control, devices, names).segments(segments)
}

fn needs_dm() -> Error {
    Error::new(
        Code::UnsupportedVolume,
        "a volume of several segments needs device-mapper, which this host does not offer",
    )
}

/// An open snapshot and its size.
struct Base {
    /// Opened for reading only: closing a writable device makes udev probe it, which blocks its
    /// removal.
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

    /// Checks that an extent lies on the device; returns its length, rounded down to whole sectors.
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

    fn unread(&self, error: std::io::Error) -> Error {
        let name = escape(self.path.as_os_str().as_encoded_bytes());
        Error::new(Code::DiskUnreadable, format!("{name}: its first sectors")).because(error)
    }

    /// A loop device from the best start offset that covers `lowest` to the end of the device.
    fn attach_below(&self, lowest: u64) -> Result<(u64, LoopDevice)> {
        let start = label::beginning(self, lowest)
            .map_err(|error| self.unread(error))?
            .ok_or_else(|| self.refused())?;
        let len = self.size - start;
        Ok((start, self.attach(start, len - len % SECTOR)?))
    }

    fn refused(&self) -> Error {
        label::refused(&escape(self.path.as_os_str().as_encoded_bytes()))
    }

    /// A loop device needs write access to its backing device, unless that is read-only.
    fn attach(&self, start: u64, len: u64) -> Result<LoopDevice> {
        if label::is_shown_at(self, start).map_err(|error| self.unread(error))? {
            return Err(self.refused());
        }
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

impl ReadAt for Base {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}

/// The largest sector size with which the content can be mounted.
fn sector_for(file: &File, start: u64, len: u64) -> u64 {
    if start % LARGE_SECTOR != 0 || len % LARGE_SECTOR != 0 {
        return SECTOR;
    }
    // Ignore errors: the content is probed again, with messages, before the mount.
    let Ok(Answer::Found(values)) = safe_probe(file.as_fd(), start, len, None) else {
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

/// The snapshots as block devices for targets; files through a loop device over the whole file.
struct Ground<'a> {
    devices: &'a [Device],
    /// Open snapshots with their loop devices and start offsets.
    opened: BTreeMap<usize, (Base, Vec<(u64, LoopDevice)>)>,
}

impl<'a> Ground<'a> {
    fn new(devices: &'a [Device]) -> Self {
        Ground {
            devices,
            opened: BTreeMap::new(),
        }
    }

    /// Locates an extent.
    fn place(&mut self, extent: Extent) -> Result<Place> {
        let (base, loops) = match self.opened.entry(extent.disk) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                entry.insert((Base::open(self.devices, extent.disk)?, Vec::new()))
            }
        };
        base.check(extent)?;
        if let Some(number) = base.number {
            return Ok(Place {
                device: dm::devno(number),
                sector: extent.start / SECTOR,
            });
        }
        if !loops.iter().any(|(start, _)| *start <= extent.start) {
            loops.push(base.attach_below(extent.start)?);
        }
        let found = loops.iter().find(|(start, _)| *start <= extent.start);
        let (start, device) =
            found.ok_or_else(|| Error::new(Code::Internal, "a file without loop device"))?;
        let number = device.number().map_err(|error| {
            Error::new(Code::MapFailed, device.path().display().to_string()).because(error)
        })?;
        Ok(Place {
            device: dm::devno(number),
            sector: (extent.start - start) / SECTOR,
        })
    }

    /// Converts segments to device-mapper targets.
    fn targets(&mut self, segments: &[Segment]) -> Result<Vec<Target>> {
        let mut targets = Vec::new();
        for segment in segments {
            let len = segment.len() / SECTOR;
            targets.push(match segment {
                Segment::Linear(extent) => {
                    Target::new(len, "linear", self.place(*extent)?.to_string())
                }
                Segment::Striped {
                    stripe_size,
                    stripes,
                } => {
                    let mut text = format!("{} {}", stripes.len(), stripe_size / SECTOR);
                    for stripe in stripes {
                        text.push(' ');
                        text.push_str(&self.place(*stripe)?.to_string());
                    }
                    Target::new(len, "striped", text)
                }
            });
        }
        Ok(targets)
    }

    fn into_loops(self) -> impl Iterator<Item = LoopDevice> {
        let loops = self.opened.into_values().flat_map(|(_, loops)| loops);
        loops.map(|(_, device)| device)
    }
}

/// A position on a device in the form of tables.
struct Place {
    /// `major:minor`
    device: String,
    sector: u64,
}

impl Place {
    /// The position this many sectors further on.
    fn plus(&self, sectors: u64) -> String {
        format!("{} {}", self.device, self.sector + sectors)
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.plus(0))
    }
}

/// Device names for tests and tools without a journal: a prefix and a counter.
#[derive(Debug)]
pub struct CountingNamer {
    stem: String,
    count: u32,
}

impl CountingNamer {
    /// Generates `guestsnap-STEM-1`, `guestsnap-STEM-2`, …
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

    fn scratch(&self) -> Result<File> {
        let folder = std::env::temp_dir();
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .open(&folder);
        file.map_err(|error| {
            Error::new(Code::MapFailed, folder.display().to_string()).because(error)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_names() {
        assert_eq!(
            DmName::new("guestsnap-12-1").unwrap().uuid(),
            "LVM-guestsnap_private_device_of_a_backup_job________________________.guestsnap:12:1"
        );
        assert!(DmName::new("vg0-root").is_none());
        assert!(DmName::new("guestsnap-").is_none());
        assert!(DmName::new("guestsnap-a/b").is_none());
        assert!(DmName::new(format!("guestsnap-{}", "x".repeat(49))).is_none());
        assert!(DmName::new(format!("guestsnap-{}", "x".repeat(48))).is_some());
    }
}
