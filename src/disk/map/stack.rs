//! Stacked devices for volumes that are more than one run.
//!
//! A thin volume uses these, from bottom to top:
//!
//! ```text
//! guest's disks ─▶ data of the pool ─┐
//! zero ──────────────────────────────┼─▶ base, read-only ─┐
//! external origin ───────────────────┘                    ├─▶ snapshot: the volume
//!       unnamed file ─▶ loop ─▶ linear, without its start ┘
//! ```
//!
//! The pool's data device is omitted if the data are one run, the external origin if the volume has
//! none. All writes, mainly journal replay, go to the unnamed file: another volume may share a
//! chunk, and a gap has no chunk.

use std::fs::File;
use std::sync::Arc;

use super::dm::{Access, Control, DmDevice, Target};
use super::{Base, Ground, Mapped, Namer, Owned, Place, SECTOR, needs_dm};
use crate::disk::layout::{Extent, Layout, Segment, ThinPool, VolumeReader};
use crate::disk::read::{FileDisk, ReadAt};
use crate::disk::thin::{Budget, Mapping, Refused, resolve};
use crate::disk::volume::MAX_VOLUMES;
use crate::snapshot::Device;
use crate::sys::loopdev::LoopDevice;
use crate::{Code, Error, Result};

/// Maximum bytes that journal replays may write for all thin volumes of a guest.
const MAX_STORE: u64 = 4 * 1024 * 1024 * 1024;
/// Minimum room worth attempting a replay with.
const MIN_STORE: u64 = 1024 * 1024;
/// Chunk size of the snapshot in sectors: a filesystem block, so that a replay copies nothing.
const CHUNK: u64 = 8;
/// Unused space at the start of the file. Without it, the first replayed blocks, which the guest
/// controls, would lie where the host's LVM looks for a label on the loop device.
const STORE_START: u64 = 4096;

/// Devices below a device, in order of creation; removed in reverse.
#[derive(Debug, Default)]
pub(super) struct Layers(Vec<Layer>);

#[derive(Debug)]
pub(super) enum Layer {
    Loop(LoopDevice),
    Dm(DmDevice),
    Lines(Lines),
}

impl Layers {
    pub(super) fn loops(&self) -> impl Iterator<Item = &LoopDevice> {
        self.0.iter().filter_map(|layer| match layer {
            Layer::Loop(device) => Some(device),
            Layer::Dm(_) | Layer::Lines(_) => None,
        })
    }

    /// Removes all devices. Continues after a failure and returns the first one.
    pub(super) fn close(mut self) -> Result<()> {
        let mut first = Ok(());
        while let Some(layer) = self.0.pop() {
            let result = match layer {
                Layer::Loop(device) => super::close_loop(device),
                Layer::Dm(device) => device.close(),
                Layer::Lines(lines) => {
                    drop(lines);
                    Ok(())
                }
            };
            first = super::first_of(first, result);
        }
        first
    }
}

impl Drop for Layers {
    fn drop(&mut self) {
        while self.0.pop().is_some() {}
    }
}

/// Table lines taken from the guest's budget; returned on drop.
#[derive(Debug)]
pub(super) struct Lines {
    budget: Arc<Budget>,
    count: usize,
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.budget.give_lines_back(self.count);
    }
}

/// Fields drop in this order: devices before the loop devices below them.
pub(super) struct Stack<'a> {
    control: Control,
    names: &'a mut dyn Namer,
    layers: Layers,
    ground: Ground<'a>,
}

impl<'a> Stack<'a> {
    pub(super) fn new(control: Control, devices: &'a [Device], names: &'a mut dyn Namer) -> Self {
        Stack {
            control,
            names,
            layers: Layers::default(),
            ground: Ground::new(devices),
        }
    }

    /// Maps segments for reading and writing.
    pub(super) fn segments(mut self, segments: &[Segment]) -> Result<Mapped> {
        let targets = self.ground.targets(segments)?;
        let device = DmDevice::create(&self.control, self.names, targets, Access::Write)?;
        Ok(self.mapped(Owned::Dm(device), None))
    }

    /// Maps a thin volume. Writes to it do not reach the guest's disks.
    pub(super) fn thin(mut self, layout: &Layout, budget: &Budget) -> Result<Mapped> {
        let base = self.device(layout)?;
        let (store, room) = self.store(budget)?;
        let text = format!("{base} {store} N {CHUNK}");
        let target = Target::new(layout.size() / SECTOR, "snapshot", text);
        let device = DmDevice::create(&self.control, self.names, vec![target], Access::Write)?;
        Ok(self.mapped(Owned::Dm(device), Some(room)))
    }

    fn mapped(self, device: Owned, room: Option<u64>) -> Mapped {
        let mut layers: Vec<Layer> = self.ground.into_loops().map(Layer::Loop).collect();
        let mut above = self.layers;
        layers.append(&mut above.0);
        Mapped {
            size: device.size(),
            device,
            room,
            layers: Layers(layers),
        }
    }

    /// Creates a read-only device over a whole layout; returns its number in the form of tables.
    fn device(&mut self, layout: &Layout) -> Result<String> {
        let targets = match layout {
            Layout::Segments(segments) => self.ground.targets(segments)?,
            Layout::Thin {
                pool,
                device_id,
                size,
                external_origin,
                budget,
            } => {
                let devices = self.ground.devices;
                let mapping = read(pool, *device_id, *size, devices, budget, self.names)?;
                self.layers.0.push(Layer::Lines(Lines {
                    budget: Arc::clone(budget),
                    count: mapping.lines,
                }));
                let data = self.place(&pool.data)?;
                let origin = external_origin.as_deref();
                let origin = origin.map(|origin| Ok((self.origin(origin)?, origin.size())));
                table(&mapping, *size, data, origin.transpose()?)
            }
        };
        let device = DmDevice::create(&self.control, self.names, targets, Access::Read)?;
        let number = super::dm::devno(device.number());
        self.layers.0.push(Layer::Dm(device));
        Ok(number)
    }

    /// Locates segments as one run: on a disk, or on a device created for them.
    fn place(&mut self, segments: &[Segment]) -> Result<Place> {
        if let [Segment::Linear(extent)] = segments {
            return self.ground.place(*extent);
        }
        self.device(&Layout::Segments(segments.to_vec()))
            .map(|device| Place { device, sector: 0 })
    }

    fn origin(&mut self, layout: &Layout) -> Result<Place> {
        match layout {
            Layout::Segments(segments) => self.place(segments),
            thin @ Layout::Thin { .. } => {
                self.device(thin).map(|device| Place { device, sector: 0 })
            }
        }
    }

    /// Creates a device for writes to a volume; returns it and its capacity in bytes.
    fn store(&mut self, budget: &Budget) -> Result<(String, u64)> {
        let fail = |step: &str| {
            let detail = format!("store for writes: {step}");
            move |error: std::io::Error| Error::new(Code::MapFailed, detail).because(error)
        };
        let file = self.names.scratch()?;
        let volumes = budget.volumes().min(MAX_VOLUMES);
        let room = room(&file, volumes).map_err(fail("free space"))?;
        if room < MIN_STORE {
            let error = std::io::Error::from(std::io::ErrorKind::StorageFull);
            return Err(fail("the daemon's working directory")(error));
        }
        file.set_len(STORE_START + room).map_err(fail("size"))?;
        let sector = SECTOR as u32;
        let device = LoopDevice::attach(&file, 0, STORE_START + room, sector, false)
            .map_err(fail("loop device"))?;
        let number = device.number().map_err(fail("loop device"))?;
        self.layers.0.push(Layer::Loop(device));
        let place = Place {
            device: super::dm::devno(number),
            sector: STORE_START / SECTOR,
        };
        let target = Target::new(room / SECTOR, "linear", place.to_string());
        let device = DmDevice::create(&self.control, self.names, vec![target], Access::Write)?;
        let number = super::dm::devno(device.number());
        self.layers.0.push(Layer::Dm(device));
        Ok((number, room))
    }
}

/// Capacity for one of `volumes` stores: together they leave half of the free space to others.
fn room(file: &File, volumes: usize) -> std::io::Result<u64> {
    let free = rustix::fs::fstatvfs(file)?;
    let free = free.f_bavail.saturating_mul(free.f_frsize) / 2;
    let volumes = u64::try_from(volumes).map_err(std::io::Error::other)?;
    Ok(free.min(MAX_STORE) / volumes / 4096 * 4096)
}

/// Reads a thin volume's mapping from its pool.
fn read(
    pool: &ThinPool,
    device_id: u32,
    size: u64,
    devices: &[Device],
    budget: &Budget,
    names: &dyn Namer,
) -> Result<Mapping> {
    let disks = devices
        .iter()
        .map(|device| FileDisk::open_up_to(&device.path, device.size));
    let disks = disks.collect::<Result<Vec<_>>>()?;
    let disks: Vec<&dyn ReadAt> = disks.iter().map(|disk| disk as &dyn ReadAt).collect();
    let metadata = VolumeReader::over(&disks, &pool.metadata);
    let wanted = pool.wanted(device_id, size);
    let mapping = resolve(&metadata, &wanted, budget, &|| names.cancelled());
    let name = &pool.name;
    let mapping = mapping.map_err(|refused| match refused {
        Refused::Unreadable(error) => Error::new(
            Code::DiskUnreadable,
            format!("metadata of thin pool {name}"),
        )
        .because(error),
        Refused::Damaged(why) => Error::new(Code::BadThinPool, format!("thin pool {name}: {why}")),
        Refused::TooLarge(why) => {
            Error::new(Code::UnsupportedVolume, format!("thin pool {name}: {why}"))
        }
        Refused::Cancelled => Error::new(Code::Cancelled, format!("thin pool {name}")),
    })?;
    if mapping.needs_check {
        log::warn!(
            "thin pool {name} needs thin_check in the guest; its volumes are read all the same"
        );
    }
    Ok(mapping)
}

/// Builds the table of a thin volume. Ranges outside all runs come from the external origin or read
/// as zero.
fn table(mapping: &Mapping, size: u64, data: Place, origin: Option<(Place, u64)>) -> Vec<Target> {
    let mut targets = Vec::with_capacity(mapping.lines);
    let gap = |targets: &mut Vec<Target>, from: u64, to: u64| {
        let mut from = from;
        if let Some((place, len)) = &origin {
            let end = to.min(*len);
            if from < end {
                let text = place.plus(from / SECTOR);
                targets.push(Target::new((end - from) / SECTOR, "linear", text));
                from = end;
            }
        }
        if from < to {
            targets.push(Target::new((to - from) / SECTOR, "zero", String::new()));
        }
    };
    let mut end = 0;
    for run in &mapping.runs {
        gap(&mut targets, end, run.start);
        let text = data.plus(run.data / SECTOR);
        targets.push(Target::new(run.len / SECTOR, "linear", text));
        end = run.start + run.len;
    }
    gap(&mut targets, end, size);
    targets
}

/// Maps a thin volume without device-mapper: only if it is a single run of a disk.
pub(super) fn without_dm(layout: &Layout, devices: &[Device], names: &dyn Namer) -> Result<Mapped> {
    let Layout::Thin {
        pool,
        device_id,
        size,
        budget,
        ..
    } = layout
    else {
        return Err(needs_dm());
    };
    let [Segment::Linear(data)] = &pool.data[..] else {
        return Err(needs_dm());
    };
    let mapping = read(pool, *device_id, *size, devices, budget, names)?;
    let _lines = Lines {
        budget: Arc::clone(budget),
        count: mapping.lines,
    };
    let [run] = &mapping.runs[..] else {
        return Err(needs_dm());
    };
    if run.len != *size {
        return Err(needs_dm());
    }
    let extent = Extent {
        disk: data.disk,
        start: data.start + run.data,
        len: *size,
    };
    let mut base = Base::open(devices, extent.disk)?;
    let len = base.check(extent)?;
    // Another volume may share the chunks and would see the writes.
    base.read_only |= !mapping.alone;
    let device = Owned::Loop(base.attach(extent.start, len)?);
    Ok(Mapped {
        device,
        size: len,
        room: None,
        layers: Layers::default(),
    })
}
