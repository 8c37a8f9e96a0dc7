//! Image files of guests that are off: read directly, without a snapshot.
//!
//! The claim is verified: no process may have the image open for writing at the start or the end,
//! and the image must not change in between. The image is never written to, so a filesystem that
//! needs a journal replay is refused.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::reflink::{open, shown};
use super::{Device, Snapshot, Status};
use crate::error::{Code, Error, Result};
use crate::sys::lease;

/// Display name of the kind.
pub(super) const KIND: &str = "none, the guest is off";

/// File attributes that change with a write: size, modification and change time.
type State = (u64, (i64, i64), (i64, i64));

/// An image without writers.
#[derive(Debug)]
pub(super) struct Off {
    /// Reopened through this descriptor for reading only, so that a loop device is read-only too.
    image: File,
    path: PathBuf,
    state: State,
}

/// Opens an image; refuses one that has a writer.
pub(super) fn take(path: &Path) -> Result<Off> {
    let (image, _) = open(path)?;
    check_unused(&image, path)?;
    let state = state(&image, path)?;
    Ok(Off {
        image,
        path: path.to_owned(),
        state,
    })
}

fn check_unused(image: &File, path: &Path) -> Result<()> {
    let name = shown(path);
    match lease::has_writer(image.as_fd()) {
        Ok(false) => Ok(()),
        Ok(true) => Err(Error::new(
            Code::GuestNotOff,
            format!("{name}: it is open for writing"),
        )),
        Err(error) => {
            let where_ = match error.kind() {
                std::io::ErrorKind::PermissionDenied => {
                    "without CAP_LEASE, which the unit of bacula-fd must leave it for an image of another owner"
                }
                _ => "on its filesystem",
            };
            let text =
                format!("{name}: whether it is open for writing cannot be found out {where_}");
            Err(Error::new(Code::UnsupportedDisk, text).because(error))
        }
    }
}

fn state(image: &File, path: &Path) -> Result<State> {
    let meta = image
        .metadata()
        .map_err(|error| Error::new(Code::SnapshotStatus, shown(path)).because(error))?;
    Ok((
        meta.size(),
        (meta.mtime(), meta.mtime_nsec()),
        (meta.ctime(), meta.ctime_nsec()),
    ))
}

impl Snapshot for Off {
    fn device(&self) -> Device {
        Device {
            path: PathBuf::from(format!("/proc/self/fd/{}", self.image.as_raw_fd())),
            size: self.state.0,
            read_only: true,
        }
    }

    fn describe(&self) -> String {
        KIND.to_owned()
    }

    fn status(&self) -> Result<Status> {
        // A writer that has not written yet counts too: the next read may see half of a change.
        check_unused(&self.image, &self.path)?;
        if state(&self.image, &self.path)? == self.state {
            return Ok(Status::Valid { used: 0.0 });
        }
        let text = format!("{}: it has changed since the job began", shown(&self.path));
        Err(Error::new(Code::GuestNotOff, text))
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.image.as_fd())
    }

    fn close(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

    use super::*;

    #[test]
    fn test_an_image_of_another_owner_needs_a_capability_that_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        File::create(&path).unwrap();
        if std::os::unix::fs::chown(&path, Some(12_345), None).is_err() {
            eprintln!("NOT RUN: only root gives files away");
            return;
        }
        assert!(take(&path).is_ok());
        // Capabilities are per thread.
        let without = std::thread::spawn(move || {
            let mut sets = capabilities(None).unwrap();
            sets.effective.remove(CapabilitySet::LEASE);
            set_capabilities(None, sets).unwrap();
            take(&path)
        });
        let error = without.join().unwrap().unwrap_err().report();
        assert!(error.contains("CAP_LEASE"), "{error}");
    }

    #[test]
    fn test_an_image_open_for_writing_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let mut writer = File::create(&path).unwrap();
        assert_eq!(take(&path).unwrap_err().code(), Code::GuestNotOff);
        writer.write_all(b"1").unwrap();
        drop(writer);
        let off = take(&path).unwrap();
        assert_eq!(off.status().unwrap(), Status::Valid { used: 0.0 });
        let writer = File::options().write(true).open(&path).unwrap();
        assert_eq!(off.status().unwrap_err().code(), Code::GuestNotOff);
        drop(writer);
        assert_eq!(off.status().unwrap(), Status::Valid { used: 0.0 });
        std::fs::write(&path, b"22").unwrap();
        assert_eq!(off.status().unwrap_err().code(), Code::GuestNotOff);
    }
}
