//! Snapshots below the maps: open, and as block devices.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::PathBuf;

use super::dm::{self, Target};
use super::label;
use crate::disk::layout::{Extent, Segment};
use crate::disk::read::{ReadAt, size_of};
use crate::error::escape;
use crate::snapshot::Device;
use crate::sys::blkid::{Answer, safe_probe};
use crate::sys::loopdev::LoopDevice;
use crate::{Code, Error, Result};

pub(super) const SECTOR: u64 = 512;
/// Sector size of a loop device where the filesystem allows it: some filesystems accept direct I/O
/// only in such blocks (XFS for reflinked files, since Linux 6.14).
const LARGE_SECTOR: u64 = 4096;

/// An open snapshot and its size.
pub(super) struct Base {
    /// Opened for reading only: closing a writable device makes udev probe it, which blocks its
    /// removal.
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) size: u64,
    /// Device number; `None` for a file.
    pub(super) number: Option<u64>,
    pub(super) read_only: bool,
}

impl Base {
    pub(super) fn open(devices: &[Device], disk: usize) -> Result<Self> {
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
    pub(super) fn check(&self, extent: Extent) -> Result<u64> {
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

    pub(super) fn unread(&self, error: std::io::Error) -> Error {
        let name = escape(self.path.as_os_str().as_encoded_bytes());
        Error::new(Code::DiskUnreadable, format!("{name}: its first sectors")).because(error)
    }

    /// A loop device from the best start offset that covers `lowest` to the end of the device.
    pub(super) fn attach_below(&self, lowest: u64) -> Result<(u64, LoopDevice)> {
        let start = label::beginning(self, lowest)
            .map_err(|error| self.unread(error))?
            .ok_or_else(|| self.refused())?;
        let len = self.size - start;
        Ok((start, self.attach(start, len - len % SECTOR)?))
    }

    pub(super) fn refused(&self) -> Error {
        label::refused(&escape(self.path.as_os_str().as_encoded_bytes()))
    }

    /// A loop device needs write access to its backing device, unless that is read-only.
    pub(super) fn attach(&self, start: u64, len: u64) -> Result<LoopDevice> {
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
pub(super) fn sector_for(file: &File, start: u64, len: u64) -> u64 {
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
pub(super) struct Ground<'a> {
    pub(super) devices: &'a [Device],
    /// Open snapshots with their loop devices and start offsets.
    pub(super) opened: BTreeMap<usize, (Base, Vec<(u64, LoopDevice)>)>,
}

impl<'a> Ground<'a> {
    pub(super) fn new(devices: &'a [Device]) -> Self {
        Ground {
            devices,
            opened: BTreeMap::new(),
        }
    }

    /// Locates an extent.
    pub(super) fn place(&mut self, extent: Extent) -> Result<Place> {
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
    pub(super) fn targets(&mut self, segments: &[Segment]) -> Result<Vec<Target>> {
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

    pub(super) fn into_loops(self) -> impl Iterator<Item = LoopDevice> {
        let loops = self.opened.into_values().flat_map(|(_, loops)| loops);
        loops.map(|(_, device)| device)
    }
}

/// A position on a device in the form of tables.
pub(super) struct Place {
    /// `major:minor`
    pub(super) device: String,
    pub(super) sector: u64,
}

impl Place {
    /// The position this many sectors further on.
    pub(super) fn plus(&self, sectors: u64) -> String {
        format!("{} {}", self.device, self.sector + sectors)
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.plus(0))
    }
}
