//! Proves that a disk had no writes during an interval.
//!
//! For volumes the kernel counts writes; for image files it records their time. Dirty pages of a
//! block device are flushed before both checks, so that they count too.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use super::hold::node;
use super::lvm::LvInfo;
use super::reflink::{self, shown};
use crate::hostdev::uses::{self, Devno};
use crate::sys::direct;

/// Wait longer than the kernel's file clock step: a second write within one step leaves no mark. No
/// kernel has steps longer than 10 ms.
const STEP: Duration = Duration::from_millis(50);

/// Maximum checks of a file until its last write is a step old.
const LOOKS: u32 = 10;

/// A monitored disk.
#[derive(Debug)]
pub(super) enum Quiet {
    /// Not observable, for this reason.
    Unseen(String),
    /// Checked elsewhere not to change.
    Fixed,
    /// A block device.
    Device {
        devno: Devno,
        file: File,
        before: Writes,
    },
    /// A regular file and the loop devices on it.
    File {
        file: File,
        loops: Vec<File>,
        before: Marks,
    },
}

/// The kernel's write counters of a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Writes {
    /// Number of writes and discards.
    count: u64,
    /// Sectors written and discarded.
    sectors: u64,
}

/// File attributes that change with a write: size, modification and change time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Marks {
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Quiet {
    /// Starts monitoring a volume.
    pub fn device(origin: &LvInfo) -> Quiet {
        let begin = || {
            let devno = origin
                .devno
                .ok_or_else(|| unseen("it has no device".into()))?;
            let file = File::open(node(origin))?;
            file.sync_all()?;
            if !is_counted(devno, &node(origin))? {
                return Err(unseen(
                    "the kernel does not count what is written to it".into(),
                ));
            }
            let before = counted(devno)?;
            // Order matters: a write that completes in between was not counted yet.
            if in_flight(devno)? {
                return Err(unseen("it is being written to".to_owned()));
            }
            Ok(Quiet::Device {
                devno,
                file,
                before,
            })
        };
        begin().unwrap_or_else(|error: std::io::Error| {
            Quiet::Unseen(format!("{}: {error}", origin.name))
        })
    }

    /// Starts monitoring an image file.
    pub fn file(path: &Path) -> Quiet {
        let begin = || {
            let (file, _) = reflink::open(path).map_err(|error| unseen(error.with_causes()))?;
            let loops = uses::loops_on(|backing| backing == path)
                .iter()
                .map(|name| File::open(Path::new("/dev").join(name)))
                .collect::<std::io::Result<Vec<File>>>()?;
            sync(&loops)?;
            for _ in 0..LOOKS {
                let before = marks(&file)?;
                let written = file.metadata()?.modified()?;
                // A time in the future proves nothing.
                if SystemTime::now()
                    .duration_since(written)
                    .is_ok_and(|age| age > STEP)
                {
                    return Ok(Quiet::File {
                        file,
                        loops,
                        before,
                    });
                }
                sleep(STEP);
            }
            Err(unseen("it is being written to".to_owned()))
        };
        begin().unwrap_or_else(|error: std::io::Error| {
            Quiet::Unseen(format!("{}: {error}", shown(path)))
        })
    }

    /// Succeeds if there was no write since the start; otherwise returns the reason.
    pub fn check(&self) -> std::result::Result<(), String> {
        let changed = match self {
            Quiet::Unseen(why) => return Err(why.clone()),
            Quiet::Fixed => return Ok(()),
            Quiet::Device {
                devno,
                file,
                before,
            } => device_changed(*devno, file, *before),
            Quiet::File {
                file,
                loops,
                before,
            } => sync(loops).and_then(|()| Ok(marks(file)? != *before)),
        };
        match changed {
            Ok(false) => Ok(()),
            Ok(true) => Err("it was written to before the last snapshot was there".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }
}

fn unseen(why: String) -> std::io::Error {
    std::io::Error::other(why)
}

fn sync(files: &[File]) -> std::io::Result<()> {
    files.iter().try_for_each(File::sync_all)
}

/// Compares twice: as is, and after a flush, which itself counts as a write of no sectors if no
/// page is dirty.
fn device_changed(devno: Devno, file: &File, before: Writes) -> std::io::Result<bool> {
    // Order matters: a write that completes in between is counted afterwards.
    if in_flight(devno)? || counted(devno)? != before {
        return Ok(true);
    }
    file.sync_all()?;
    Ok(in_flight(devno)? || counted(devno)?.sectors != before.sectors)
}

fn marks(file: &File) -> std::io::Result<Marks> {
    let meta = file.metadata()?;
    Ok(Marks {
        size: meta.size(),
        modified: (meta.mtime(), meta.mtime_nsec()),
        changed: (meta.ctime(), meta.ctime_nsec()),
    })
}

/// Numbers in a sysfs file of a device.
fn numbers(devno: Devno, name: &str) -> std::io::Result<(PathBuf, Vec<u64>)> {
    let path = uses::folder(devno).join(name);
    let text = fs::read_to_string(&path)?;
    let numbers = text.split_ascii_whitespace().map(str::parse);
    let numbers = numbers.collect::<std::result::Result<_, _>>();
    Ok((path, numbers.map_err(std::io::Error::other)?))
}

fn odd(path: &Path) -> std::io::Error {
    unseen(format!("{} is not understood", path.display()))
}

fn counted(devno: Devno) -> std::io::Result<Writes> {
    let (path, all) = numbers(devno, "stat")?;
    writes(&all).ok_or_else(|| odd(&path))
}

/// Whether the kernel counts this device's requests: `queue/iostats` is set, or a test read is
/// counted. (Linux 6.1 counts device-mapper requests although iostats says otherwise.)
fn is_counted(devno: Devno, node: &Path) -> std::io::Result<bool> {
    if numbers(devno, "queue/iostats")?.1 == [1] {
        return Ok(true);
    }
    let reads = || Ok::<_, std::io::Error>(numbers(devno, "stat")?.1.first().copied());
    let before = reads()?;
    direct::beginning(node, 1)?;
    Ok(reads()? != before)
}

/// Fields: reads, merged, sectors, time; the same for writes; three for requests in flight; the
/// first four for discards; more in later kernels.
fn writes(all: &[u64]) -> Option<Writes> {
    let [_, _, _, _, writes, _, written, _, _, _, _, rest @ ..] = all else {
        return None;
    };
    let [discards, _, discarded, ..] = rest else {
        return None;
    };
    Some(Writes {
        count: writes.wrapping_add(*discards),
        sectors: written.wrapping_add(*discarded),
    })
}

/// Whether writes are in flight.
fn in_flight(devno: Devno) -> std::io::Result<bool> {
    match numbers(devno, "inflight")? {
        (_, all) if all.len() == 2 => Ok(all[1] != 0),
        (path, _) => Err(odd(&path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn test_what_the_kernel_counts() {
        let all: Vec<u64> = (1..=17).collect();
        let expected = Writes {
            count: 5 + 12,
            sectors: 7 + 14,
        };
        assert_eq!(writes(&all), Some(expected));
        // Kernels that do not count discards.
        assert_eq!(writes(&all[..11]), None);
        assert_eq!(writes(&[]), None);
    }

    #[test]
    fn test_a_write_to_an_image_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        fs::write(&path, [0; 8192]).unwrap();
        let quiet = Quiet::file(&path);
        assert!(matches!(quiet, Quiet::File { .. }), "{quiet:?}");
        quiet.check().unwrap();
        let mut writer = File::options().write(true).open(&path).unwrap();
        writer.write_all(b"x").unwrap();
        assert!(quiet.check().is_err());
        // Right after a write, the file's time does not reveal the next write.
        let started = SystemTime::now();
        let quiet = Quiet::file(&path);
        assert!(started.elapsed().unwrap() >= STEP / 2);
        quiet.check().unwrap();
        // Continuous writes: no proof.
        let later = SystemTime::now() + Duration::from_secs(3600);
        writer.set_modified(later).unwrap();
        let quiet = Quiet::file(&path);
        assert!(quiet.check().unwrap_err().contains("being written to"));
        assert!(Quiet::file(&folder.path().join("none")).check().is_err());
    }
}
