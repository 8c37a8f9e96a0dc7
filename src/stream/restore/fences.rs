//! Inode flags that forbid changes, and errors for unsupported flags.

use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, IFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::inode::Meta;

/// Inode flags that forbid changes.
pub(super) const FENCES: IFlags = IFlags::IMMUTABLE.union(IFlags::APPEND);

/// Runs an action on a regular file while its immutable and append-only flags are cleared.
pub(super) fn without_fences(
    directory: BorrowedFd<'_>,
    name: &[u8],
    action: impl Fn() -> std::result::Result<(), Errno>,
) -> std::result::Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, name, flags, Mode::empty())?;
    let before = rustix::fs::ioctl_getflags(&file)?;
    if !before.intersects(FENCES) {
        return Err(Errno::PERM);
    }
    rustix::fs::ioctl_setflags(&file, before - FENCES)?;
    let result = action();
    // Not if its last name is gone.
    if Meta::read(&file, b"", AtFlags::EMPTY_PATH).is_ok_and(|meta| meta.nlink == 0) {
        return result;
    }
    result.and(rustix::fs::ioctl_setflags(&file, before))
}

/// Whether the filesystem does not support an inode flag, at all or for this type of file.
pub(super) fn is_lacking(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::NOTTY | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL
    )
}
