//! A disk to make: an image or volume that is created, or one that is there and empty.

use std::cell::Cell;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FallocateFlags, RenameFlags};

use super::table::Piece;
use crate::disk::{FileDisk, ReadAt};
use crate::error::{Code, Error, Result, escape};
use crate::guest::DiskSource;
use crate::hostdev::lvname::LvName;
use crate::job::open::MappedVolume;
use crate::point::{Point, pass, reach};
use crate::snapshot::lvm;
use crate::snapshot::{Device, Direct, FreshVolume, Journal, Object, PARTIAL, take_for_writing};

/// Bytes at both ends of a disk that must be zero to call it empty.
const ENDS: u64 = 4 << 20;

/// The name of a target, as the command line gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetName {
    /// An image file.
    Image(PathBuf),
    /// A logical volume.
    Volume {
        /// Group and volume.
        name: LvName,
        /// The thin pool to create it in.
        pool: Option<String>,
    },
}

impl TargetName {
    /// Parses `/PATH`, `VG/LV` or `VG/POOL/LV`.
    pub fn parse(text: &OsStr) -> Result<TargetName> {
        let bad = || {
            let shown = escape(text.as_bytes());
            let why = "neither the absolute path of an image, nor VG/LV or VG/POOL/LV";
            Error::new(Code::BadTarget, format!("{shown}: {why}"))
        };
        let path = Path::new(text);
        if path.starts_with("/dev") {
            return Err(match LvName::of_device(path) {
                Some(name) => bad().because(Error::new(Code::BadTarget, format!("write {name}"))),
                None => bad(),
            });
        }
        if path.is_absolute() {
            let names_file = path.file_name().is_some() && !text.as_bytes().ends_with(b"/");
            return match names_file {
                true => Ok(TargetName::Image(path.to_owned())),
                false => Err(bad()),
            };
        }
        let words: Vec<&str> = text.to_str().ok_or_else(bad)?.split('/').collect();
        let (vg, pool, lv) = match words[..] {
            [vg, lv] => (vg, None, lv),
            [vg, pool, lv] => (vg, Some(pool), lv),
            _ => return Err(bad()),
        };
        // A pool's name follows the rules of a volume's.
        let name = LvName::new(vg, lv).map_err(|error| bad().because(error))?;
        let pool = pool.map(|pool| LvName::new(vg, pool)).transpose();
        let pool = pool.map_err(|error| bad().because(error))?;
        Ok(TargetName::Volume {
            name,
            pool: pool.map(|pool| pool.lv().to_owned()),
        })
    }

    /// Whether there is such a disk.
    fn exists(&self) -> Result<bool> {
        Ok(match self {
            TargetName::Image(path) => path.symlink_metadata().is_ok(),
            TargetName::Volume { name, .. } => lvm::list_in(&[name.vg()])?
                .iter()
                .any(|lv| lv.name == *name),
        })
    }
}

impl std::fmt::Display for TargetName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            TargetName::Image(path) => f.write_str(&escape(path.as_os_str().as_bytes())),
            TargetName::Volume { name, pool: None } => write!(f, "{name}"),
            TargetName::Volume {
                name,
                pool: Some(pool),
            } => write!(f, "{}/{pool}/{}", name.vg(), name.lv()),
        }
    }
}

/// Origin of a disk, with the means to undo it.
#[derive(Debug)]
enum Origin {
    Image(NewImage),
    Volume(FreshVolume),
    Given,
}

/// An image that has another name until it is complete. Dropped before that, it is removed.
#[derive(Debug)]
struct NewImage {
    partial: PathBuf,
    path: PathBuf,
    object: Object,
    journal: Arc<Journal>,
    done: bool,
}

/// A disk that is being made. Nothing else can use it meanwhile.
#[derive(Debug)]
pub(super) struct Target {
    name: TargetName,
    // Dropped in this order: each holds the next busy.
    /// Keeps a block device from all others; maps are stacked on it.
    hold: Option<MappedVolume>,
    direct: Option<Direct>,
    origin: Origin,
    device: Device,
    /// It is not empty.
    full: bool,
    /// It was written to.
    written: Cell<bool>,
}

impl Target {
    /// Creates a disk of at least `size` bytes, or takes one that is there. `wipe`: it may be one that is not
    /// empty.
    pub(super) fn open(
        name: &TargetName,
        size: u64,
        wipe: bool,
        journal: &Arc<Journal>,
        stop: &dyn Fn() -> bool,
    ) -> Result<Target> {
        let given = name.exists()?;
        let origin = match name {
            _ if given => Origin::Given,
            TargetName::Image(path) => Origin::Image(NewImage::create(path, size, journal)?),
            TargetName::Volume { name, pool } => {
                let pool = pool.as_deref();
                Origin::Volume(FreshVolume::create(name, pool, size, journal)?)
            }
        };
        let source = match (&origin, name) {
            (Origin::Image(image), _) => DiskSource::File(image.partial.clone()),
            (_, TargetName::Image(path)) => DiskSource::File(path.clone()),
            (_, TargetName::Volume { name, .. }) => DiskSource::Lv(name.clone()),
        };
        let taken = take_for_writing(&[source], true, journal)?;
        let mut direct = taken
            .into_iter()
            .next()
            .ok_or_else(|| Error::new(Code::Internal, "a disk that is not taken"))?;
        let device = direct.device();
        let failed = |why: String| Error::new(Code::BadTarget, format!("{name}: {why}"));
        if device.size < size {
            let why = format!("it has {} bytes, and the guest's disk {size}", device.size);
            return Err(failed(why));
        }
        let full = given && !is_empty(&device)?;
        if full && !wipe {
            return Err(failed("it is not empty; --wipe empties it".to_owned()));
        }
        let (device, hold) = MappedVolume::hold_alone(&mut direct, journal, stop)?;
        Ok(Target {
            name: name.clone(),
            hold,
            direct: Some(direct),
            origin,
            device,
            full,
            written: Cell::new(false),
        })
    }

    /// Empties a disk that is not empty.
    pub(super) fn empty(&self) -> Result<()> {
        if !self.full {
            return Ok(());
        }
        self.written.set(true);
        empty(&self.device).map_err(|error| {
            let text = format!("{}: emptying it", self.name);
            Error::new(Code::RebuildFailed, text).because(error)
        })
    }

    /// The disk, for the maps.
    pub(super) fn device(&self) -> Device {
        self.device.clone()
    }

    pub(super) fn name(&self) -> &TargetName {
        &self.name
    }

    /// Whether it existed before and has been written to.
    pub(super) fn is_changed(&self) -> bool {
        matches!(self.origin, Origin::Given) && self.written.get()
    }

    /// Writes pieces in order.
    pub(super) fn write(&self, pieces: &[Piece]) -> Result<()> {
        let failed = |what: &str, error: std::io::Error| {
            let text = format!("{}: writing {what}", self.name);
            Error::new(Code::RebuildFailed, text).because(error)
        };
        self.written.set(true);
        let file = File::options().write(true).open(&self.device.path);
        let file = file.map_err(|error| failed("it", error))?;
        for piece in pieces {
            let written = reach(Point::RebuildWrite)
                .map_err(std::io::Error::from)
                .and_then(|()| file.write_all_at(&piece.bytes, piece.start));
            let what = || format!("the {}", escape(piece.what.as_bytes()));
            written.map_err(|error| failed(&what(), error))?;
        }
        file.sync_all().map_err(|error| failed("it back", error))
    }

    /// Everything is written back, and nothing holds the disk any more.
    pub(super) fn settle(&mut self) -> Result<()> {
        let held = self.hold.take().map_or(Ok(()), MappedVolume::close);
        let closed = self.direct.take().map_or(Ok(()), Direct::close);
        held.and(closed)
    }

    /// The disk is complete, and settled.
    pub(super) fn finish(self) -> Result<()> {
        match self.origin {
            Origin::Image(image) => image.finish(),
            Origin::Volume(volume) => volume.keep(),
            Origin::Given => Ok(()),
        }
    }

    /// Removes a created disk. An existing disk stays, with its present contents.
    pub(super) fn undo(mut self) -> Result<()> {
        let settled = self.settle();
        let removed = match self.origin {
            Origin::Image(mut image) => image.remove(),
            Origin::Volume(volume) => volume.remove(),
            Origin::Given => Ok(()),
        };
        settled.and(removed)
    }
}

/// Whether both ends of a disk are zero.
fn is_empty(device: &Device) -> Result<bool> {
    let disk = FileDisk::open(&device.path)?;
    let len = ENDS.min(device.size);
    for start in [0, device.size - len] {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        disk.read_exact_at(&mut bytes, start).map_err(|error| {
            let shown = escape(device.path.as_os_str().as_bytes());
            Error::new(Code::DiskUnreadable, shown).because(error)
        })?;
        if bytes.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Discards all of a disk where that is possible, and writes zeros to its ends in any case.
fn empty(device: &Device) -> std::io::Result<()> {
    let file = File::options().write(true).open(&device.path)?;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(&file, flags, 0, device.size) {
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
        Err(errno) => return Err(errno.into()),
    }
    let len = ENDS.min(device.size);
    let zeros = vec![0; usize::try_from(len).unwrap_or_default()];
    file.write_all_at(&zeros, 0)?;
    file.write_all_at(&zeros, device.size - len)?;
    file.sync_all()
}

impl NewImage {
    fn create(path: &Path, size: u64, journal: &Arc<Journal>) -> Result<NewImage> {
        let failed = |why: &str| {
            let shown = escape(path.as_os_str().as_bytes());
            Error::new(Code::BadTarget, format!("{shown}: {why}"))
        };
        let mut partial = path.to_owned().into_os_string();
        partial.push(PARTIAL);
        let partial = PathBuf::from(partial);
        let folder = path.parent().unwrap_or(Path::new("/"));
        let around = folder
            .metadata()
            .map_err(|error| failed("creating it").because(error))?;
        let object = Object::Image {
            path: partial.clone(),
            folder: around.dev(),
        };
        journal.intend(&object)?;
        let file = reach(Point::RebuildImage)
            .map_err(std::io::Error::from)
            .and_then(|()| {
                File::options()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(&partial)
            });
        let file = file.map_err(|error| {
            journal.gone(&object);
            failed("creating it").because(error)
        })?;
        pass(Point::RebuildImageMade);
        let image = NewImage {
            partial,
            path: path.to_owned(),
            object,
            journal: journal.clone(),
            done: false,
        };
        let sized = file.set_len(size);
        sized.map_err(|error| failed("its size").because(error))?;
        Ok(image)
    }

    fn finish(mut self) -> Result<()> {
        let failed = |step: &str| {
            let shown = escape(self.path.as_os_str().as_bytes());
            Error::new(Code::RebuildFailed, format!("{shown}: {step}"))
        };
        let renamed = reach(Point::RebuildRename).and_then(|()| {
            let cwd = rustix::fs::CWD;
            rustix::fs::renameat_with(cwd, &self.partial, cwd, &self.path, RenameFlags::NOREPLACE)
        });
        renamed.map_err(|errno| failed("giving it its name").because(errno))?;
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        let synced = synced.map_err(|error| failed("its folder").because(error));
        self.done = true;
        pass(Point::RebuildRenamed);
        self.journal.gone(&self.object);
        synced
    }

    fn remove(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.done, true) {
            return Ok(());
        }
        let removed = rustix::fs::unlinkat(rustix::fs::CWD, &self.partial, AtFlags::empty());
        removed.map_err(|errno| {
            let shown = escape(self.partial.as_os_str().as_bytes());
            Error::new(Code::ReleaseFailed, shown).because(errno)
        })?;
        self.journal.gone(&self.object);
        Ok(())
    }
}

impl Drop for NewImage {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            log::error!("{}", error.report());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_names_of_targets() {
        let parse = |text: &str| TargetName::parse(OsStr::new(text)).map(|name| name.to_string());
        for good in ["/srv/web1.img", "vg0/web1", "vg0/pool/web1"] {
            assert_eq!(parse(good).unwrap(), good);
        }
        for bad in [
            "",
            "/",
            "/srv/",
            "web1.img",
            "./web1.img",
            "vg0/",
            "a/b/c/d",
            "vg0/-x",
            "/dev/vg0/web1",
            "/dev/sda",
            "vg0/we b",
        ] {
            assert_eq!(parse(bad).unwrap_err().code(), Code::BadTarget, "{bad}");
        }
    }
}
