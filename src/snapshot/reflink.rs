//! Snapshots of image files: a reflinked copy without a name.
//!
//! The copy shares its blocks with the image and has no directory entry: whatever happens to the
//! process, nothing is left.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{Device, Snapshot, Status};
use crate::error::{Code, Error, Result, escape};

pub(super) fn take(path: &Path) -> Result<Reflink> {
    let shown = escape(path.as_os_str().as_encoded_bytes());
    let failed = |step: &str| Error::new(Code::SnapshotFailed, format!("{shown}: {step}"));
    let image = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| Error::new(Code::OriginGone, shown.clone()).because(e))?;
    let meta = image.metadata().map_err(|e| failed("stat").because(e))?;
    if !meta.is_file() {
        return Err(Error::new(
            Code::UnsupportedDisk,
            format!("{shown}: not a regular file"),
        ));
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    let copy = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600)
        .open(folder)
        .map_err(|e| failed("an unnamed file beside it").because(e))?;
    rustix::fs::ioctl_ficlone(&copy, &image).map_err(|e| {
        failed("this filesystem has no reflinks (XFS and btrfs have); put the image on an LV or on such a filesystem").because(e)
    })?;
    Ok(Reflink {
        copy,
        size: meta.len(),
    })
}

/// A reflinked copy; gone when it is closed.
#[derive(Debug)]
pub(super) struct Reflink {
    copy: File,
    size: u64,
}

impl Snapshot for Reflink {
    fn device(&self) -> Device {
        Device {
            path: PathBuf::from(format!("/proc/self/fd/{}", self.copy.as_raw_fd())),
            size: self.size,
        }
    }

    fn describe(&self) -> String {
        "reflink".to_owned()
    }

    fn status(&self) -> Result<Status> {
        // Its blocks are its own; a full filesystem fails our writes, not what is there.
        Ok(Status::Valid { used: 0.0 })
    }

    fn close(self: Box<Self>) -> Result<()> {
        Ok(())
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.copy.as_fd())
    }
}
