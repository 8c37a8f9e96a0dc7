//! Differences between kernels, probed by trying; one function each.

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags};

/// Whether the mount is guaranteed not to share a superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exclusive {
    /// The kernel creates a new superblock or refuses.
    Yes,
    /// The kernel lacks the request; it would have shared an existing read-only mount of the
    /// device.
    NotSupported,
}

/// Creates a superblock without sharing an existing one.
///
/// FSCONFIG_CMD_CREATE_EXCL exists since 6.6; older kernels return EOPNOTSUPP (EINVAL if the
/// filesystem has no native context). Fallback: FSCONFIG_CMD_CREATE. Sharing requires the device to
/// be mounted already, which a snapshot or map just created is not.
pub fn create_superblock(context: impl AsFd) -> Result<Exclusive, Errno> {
    match mount::fsconfig_create_exclusive(context.as_fd()) {
        Ok(()) => Ok(Exclusive::Yes),
        Err(Errno::OPNOTSUPP) => {
            mount::fsconfig_create(context.as_fd()).map(|()| Exclusive::NotSupported)
        }
        Err(errno) => Err(errno),
    }
}

/// Attributes of every guest mount.
const ATTRIBUTES: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC)
    .union(MountAttrFlags::MOUNT_ATTR_NOATIME);

/// Creates the detached mount, for reading only unless `writable`.
///
/// MOUNT_ATTR_NOSYMFOLLOW exists since 5.14; older kernels return EINVAL. Fallback: without it. All
/// opens use O_NOFOLLOW or resolve without links, so it is a second line of defence.
pub fn detached_mount(context: impl AsFd, writable: bool) -> Result<OwnedFd, Errno> {
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    let mut attributes = ATTRIBUTES;
    attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, !writable);
    let all = attributes | MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW;
    match mount::fsmount(context.as_fd(), flags, all) {
        Err(Errno::INVAL) => mount::fsmount(context.as_fd(), flags, attributes),
        result => result,
    }
}

/// Opens a filesystem context with the first driver that the kernel has or can load.
///
/// `None`: no driver. ext3 lost its own driver in 4.3 and a kernel may omit ext2; ext4 serves all
/// three.
pub fn open_context(drivers: &[&'static str]) -> Result<Option<(OwnedFd, &'static str)>, Errno> {
    for driver in drivers {
        match mount::fsopen(*driver, FsOpenFlags::FSOPEN_CLOEXEC) {
            Ok(context) => return Ok(Some((context, driver))),
            Err(Errno::NODEV) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(None)
}

/// Whether btrfs mounts a clone of a mounted filesystem under a temporary id (since 6.7). Older
/// kernels refuse it or, worse, mistake one device for the other.
pub fn btrfs_has_temp_fsid() -> bool {
    std::path::Path::new("/sys/fs/btrfs/features/temp_fsid").exists()
}
