//! What differs between kernels, probed by trying, one function each.

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags};

/// Whether a mount was made in a way that no other mount of the device can share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exclusive {
    /// The kernel made a new superblock or refused.
    Yes,
    /// The kernel cannot be asked for that; an existing read-only mount of the device would have
    /// been shared.
    NotSupported,
}

/// Creates the superblock, not sharing one that exists.
///
/// FSCONFIG_CMD_CREATE_EXCL is there since 6.6 and answers EOPNOTSUPP before (EINVAL where the
/// filesystem has no native context). Fallback: FSCONFIG_CMD_CREATE. Sharing would need the same
/// device to be mounted already, which the snapshot or map we just made cannot be.
pub fn create_superblock(context: impl AsFd) -> Result<Exclusive, Errno> {
    match mount::fsconfig_create_exclusive(context.as_fd()) {
        Ok(()) => Ok(Exclusive::Yes),
        Err(Errno::OPNOTSUPP) => {
            mount::fsconfig_create(context.as_fd()).map(|()| Exclusive::NotSupported)
        }
        Err(errno) => Err(errno),
    }
}

/// Attributes that every guest mount has.
const ATTRIBUTES: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_RDONLY
    .union(MountAttrFlags::MOUNT_ATTR_NOSUID)
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC)
    .union(MountAttrFlags::MOUNT_ATTR_NOATIME);

/// Makes the detached mount.
///
/// MOUNT_ATTR_NOSYMFOLLOW is there since 5.14 and answers EINVAL before. Fallback: without it.
/// Every open of ours has O_NOFOLLOW or resolves without links, so it is a second fence only.
pub fn detached_mount(context: impl AsFd) -> Result<OwnedFd, Errno> {
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    let attributes = ATTRIBUTES | MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW;
    match mount::fsmount(context.as_fd(), flags, attributes) {
        Err(Errno::INVAL) => mount::fsmount(context.as_fd(), flags, ATTRIBUTES),
        result => result,
    }
}

/// Opens a filesystem context with the first driver that the kernel has (or can load).
///
/// `None`: the kernel has none of them. ext3 lost its own driver in 4.3, and ext2 may be left out
/// of a kernel: ext4 serves all three.
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

/// Whether btrfs mounts a clone of a mounted filesystem under a temporary identity (since 6.7).
/// Before, the kernel would refuse it or, worse, take the one device for the other.
pub fn btrfs_has_temp_fsid() -> bool {
    std::path::Path::new("/sys/fs/btrfs/features/temp_fsid").exists()
}
