//! A volume as a block device, and the way to one.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use super::base::{Base, SECTOR};
use super::dm::{Control, DmDevice};
use super::label;
use super::name::Namer;
use super::stack::{self, Layers, Stack};
use crate::disk::layout::{Extent, Layout, Segment};
use crate::disk::volume::Volume;
use crate::error::escape;
use crate::snapshot::Device;
use crate::sys::loopdev::LoopDevice;
use crate::{Code, Error, Result};

/// A volume as a block device. `close` removes it; `Drop` does the same and logs errors. Close its
/// mounts first.
#[derive(Debug)]
pub struct Mapped {
    pub(super) device: Owned,
    pub(super) size: u64,
    /// For a thin volume: capacity for writes in bytes.
    pub(super) room: Option<u64>,
    pub(super) layers: Layers,
}

#[derive(Debug)]
pub(super) enum Owned {
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
    pub(super) fn size(&self) -> u64 {
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
pub(super) fn first_of(first: Result<()>, second: Result<()>) -> Result<()> {
    match (first, second) {
        (Ok(()), second) => second,
        (first, Ok(())) => first,
        (first, Err(error)) => {
            log::error!("{}", error.report());
            first
        }
    }
}

pub(super) fn close_loop(device: LoopDevice) -> Result<()> {
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

pub(super) fn map_segments(
    segments: &[Segment],
    devices: &[Device],
    names: &mut dyn Namer,
) -> Result<Mapped> {
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

pub(super) fn needs_dm() -> Error {
    Error::new(
        Code::UnsupportedVolume,
        "a volume of several segments needs device-mapper, which this host does not offer",
    )
}
