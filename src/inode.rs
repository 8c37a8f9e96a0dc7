//! Inode metadata, as the kernel reports it.

use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{AtFlags, FileType, Statx, StatxAttributes, StatxFlags, StatxTimestamp};
use rustix::io::Errno;

/// A timestamp. Before 1970 `seconds` is negative; `nanoseconds` still counts forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time {
    /// Seconds since 1970.
    pub seconds: i64,
    /// 0 to 999,999,999.
    pub nanoseconds: u32,
}

impl From<StatxTimestamp> for Time {
    fn from(t: StatxTimestamp) -> Time {
        Time {
            seconds: t.tv_sec,
            nanoseconds: t.tv_nsec,
        }
    }
}

impl From<Time> for rustix::fs::Timespec {
    fn from(t: Time) -> Self {
        rustix::fs::Timespec {
            tv_sec: t.seconds,
            tv_nsec: t.nanoseconds.into(),
        }
    }
}

/// Object type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Regular file.
    Regular,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Named pipe.
    Fifo,
    /// Socket.
    Socket,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
}

impl Kind {
    /// Decodes the mode's type bits; `None` for an unknown type.
    pub fn from_mode(mode: u32) -> Option<Kind> {
        Some(match FileType::from_raw_mode(mode) {
            FileType::RegularFile => Kind::Regular,
            FileType::Directory => Kind::Directory,
            FileType::Symlink => Kind::Symlink,
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            FileType::CharacterDevice => Kind::CharDevice,
            FileType::BlockDevice => Kind::BlockDevice,
            _ => return None,
        })
    }
}

/// Metadata of an object, read from it or to be restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Meta {
    /// Type and permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of hard links.
    pub nlink: u32,
    /// Inode number.
    pub ino: u64,
    /// Device number of the filesystem or subvolume. Unique within one guest's tree.
    pub dev: u64,
    /// Device number that a device node represents.
    pub rdev: u64,
    /// Size in bytes.
    pub size: u64,
    /// Allocated units of 512 bytes.
    pub blocks: u64,
    /// Preferred read size.
    pub blksize: u32,
    /// Last access.
    pub atime: Time,
    /// Last modification of the contents.
    pub mtime: Time,
    /// Last change of the metadata.
    pub ctime: Time,
    /// Birth time, if the filesystem stores it.
    pub btime: Option<Time>,
    /// Encrypted by the guest's kernel (fscrypt): names and contents are unreadable without its key.
    pub encrypted: bool,
}

/// Identity of an object: equal for all its names and descriptors, unique among the filesystems
/// that are mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct InodeId {
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
}

impl Meta {
    /// The object's identity.
    pub fn id(&self) -> InodeId {
        InodeId {
            dev: self.dev,
            ino: self.ino,
        }
    }

    /// Identity of a file with several hard links, else `None`.
    pub fn link_key(&self) -> Option<InodeId> {
        let several = self.nlink > 1 && Kind::from_mode(self.mode) != Some(Kind::Directory);
        several.then_some(self.id())
    }

    /// Whether fewer blocks are allocated than the size needs.
    pub fn is_sparse(&self) -> bool {
        self.blocks.saturating_mul(512) < self.size
    }

    pub(crate) fn read(dir: impl AsFd, name: &[u8], flags: AtFlags) -> Result<Meta, Errno> {
        let flags = flags | AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        rustix::fs::statx(dir, name, flags, mask).map(Meta::from)
    }
}

impl From<Statx> for Meta {
    fn from(s: Statx) -> Meta {
        let has_btime = s.stx_mask & StatxFlags::BTIME.bits() != 0;
        Meta {
            mode: s.stx_mode.into(),
            uid: s.stx_uid,
            gid: s.stx_gid,
            nlink: s.stx_nlink,
            ino: s.stx_ino,
            dev: rustix::fs::makedev(s.stx_dev_major, s.stx_dev_minor),
            rdev: rustix::fs::makedev(s.stx_rdev_major, s.stx_rdev_minor),
            size: s.stx_size,
            blocks: s.stx_blocks,
            blksize: s.stx_blksize,
            atime: s.stx_atime.into(),
            mtime: s.stx_mtime.into(),
            ctime: s.stx_ctime.into(),
            btime: has_btime.then(|| s.stx_btime.into()),
            encrypted: s.stx_attributes.contains(StatxAttributes::ENCRYPTED),
        }
    }
}

/// A path for an open descriptor, for system calls that take only a path.
pub(crate) fn proc_path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}
