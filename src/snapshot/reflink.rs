//! Snapshots of image files as unnamed reflinked copies.
//!
//! The copy shares its blocks with the image and has no directory entry, so it disappears with the
//! process. XFS and btrfs have reflinks. On other filesystems the image is refused, because a plain
//! copy would not be of one instant.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    CWD, IFlags, Mode, OFlags, ResolveFlags, ioctl_ficlone, ioctl_getflags, ioctl_setflags, openat2,
};
use rustix::io::Errno;

use super::{Device, Snapshot, Status};
use crate::error::{Code, Error, Result, escape};
use crate::point::{Point, pass, reach};

/// Display name of the kind.
pub(super) const KIND: &str = "reflink";

pub(super) fn shown(path: &Path) -> String {
    escape(path.as_os_str().as_encoded_bytes())
}

/// Opens a path without following symbolic links in any component: a user able to replace one could
/// redirect it to any file of the host.
fn open_as_named(path: &Path, flags: OFlags, mode: Mode) -> std::result::Result<OwnedFd, Errno> {
    openat2(
        CWD,
        path,
        flags | OFlags::CLOEXEC,
        mode,
        ResolveFlags::NO_SYMLINKS,
    )
}

/// Opens an image, which must be a regular file. Selection and definitions supply its canonical
/// path.
pub(super) fn open(path: &Path) -> Result<(File, u64)> {
    let missing = |error| Error::new(Code::OriginGone, shown(path)).because(error);
    // Non-blocking, in case it is a FIFO.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK;
    let image = open_as_named(path, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::LOOP => Error::new(
            Code::NotAllowed,
            format!("{}: a part of its path is a symbolic link", shown(path)),
        ),
        Errno::NOSYS => Error::new(Code::KernelTooOld, "openat2").because(errno),
        errno => missing(errno.into()),
    })?;
    let image = File::from(image);
    let meta = image.metadata().map_err(missing)?;
    if meta.is_file() {
        Ok((image, meta.len()))
    } else {
        Err(Error::new(
            Code::UnsupportedDisk,
            format!("{}: it is not a regular file", shown(path)),
        ))
    }
}

/// Creates an unnamed file beside the image, with the attributes that a reflink needs.
fn unnamed(path: &Path, image: &File) -> Result<File> {
    let failed = |error: std::io::Error| {
        let what = format!("{}: an unnamed file in its folder", shown(path));
        Error::new(Code::SnapshotFailed, what).because(error)
    };
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    reach(Point::ReflinkFile).map_err(|error| failed(error.into()))?;
    let mode = Mode::RUSR | Mode::WUSR;
    let copy = open_as_named(folder, OFlags::TMPFILE | OFlags::RDWR, mode)
        .map(File::from)
        .map_err(|errno| failed(errno.into()))?;
    // libvirt creates images on btrfs with copy-on-write off; only files with equal attributes
    // share blocks.
    let nocow = |file: &File| ioctl_getflags(file).unwrap_or(IFlags::empty()) & IFlags::NOCOW;
    if nocow(image) != nocow(&copy) {
        let others = ioctl_getflags(&copy).unwrap_or(IFlags::empty()) - IFlags::NOCOW;
        ioctl_setflags(&copy, others | nocow(image)).map_err(|error| failed(error.into()))?;
    }
    Ok(copy)
}

/// Refuses unsupported images before any snapshot is taken; returns the size. Reflinking zero
/// blocks tests the filesystem.
pub(super) fn check(path: &Path) -> Result<u64> {
    let (image, size) = open(path)?;
    unnamed(path, &image).map(|_| size)
}

/// Takes the snapshot. The kernel first flushes the image's dirty pages.
pub(super) fn take(path: &Path) -> Result<Reflink> {
    let (image, _) = open(path)?;
    let copy = unnamed(path, &image)?;
    let cloned = reach(Point::ReflinkClone).and_then(|()| ioctl_ficlone(&copy, &image));
    cloned.map_err(|error| {
        let error = std::io::Error::from(error);
        let refused = [libc::EOPNOTSUPP, libc::EINVAL, libc::EXDEV];
        if error.raw_os_error().is_some_and(|e| refused.contains(&e)) {
            let what = format!(
                "{}: its filesystem has no reflinks; XFS and btrfs have, or use a logical volume, or \
                 snapshot=none while the guest is off",
                shown(path)
            );
            Error::new(Code::UnsupportedDisk, what).because(error)
        } else {
            Error::new(Code::SnapshotFailed, shown(path)).because(error)
        }
    })?;
    let meta = copy
        .metadata()
        .map_err(|error| Error::new(Code::SnapshotFailed, shown(path)).because(error))?;
    pass(Point::ReflinkDone);
    Ok(Reflink {
        copy,
        size: meta.len(),
    })
}

/// A reflinked copy; freed on close.
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
            read_only: false,
        }
    }

    fn describe(&self) -> String {
        KIND.to_owned()
    }

    fn status(&self) -> Result<Status> {
        // The copy owns its blocks: on a full filesystem our writes fail, existing data stays
        // valid.
        Ok(Status::Valid { used: 0.0 })
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.copy.as_fd())
    }

    fn close(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_what_is_no_image_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let code = |path: &Path| check(path).unwrap_err().code();
        assert_eq!(code(&dir.path().join("none")), Code::OriginGone);
        assert_eq!(code(dir.path()), Code::UnsupportedDisk);
        let file = dir.path().join("file");
        std::fs::write(&file, b"x").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert_eq!(code(&link), Code::NotAllowed);
        let folder = dir.path().join("folder");
        std::os::unix::fs::symlink(dir.path(), &folder).unwrap();
        assert_eq!(code(&folder.join("file")), Code::NotAllowed);
        check(&file).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
    }
}
