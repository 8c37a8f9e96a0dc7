//! One object of a guest's tree and its metadata.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags, StatxTimestamp};
use rustix::io::Errno;

/// A point in time, as filesystems keep it. Before 1970 `seconds` is negative and `nanoseconds`
/// still counts forward.
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

/// What an object is.
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
    /// From the mode's type bits; `None` for an unknown type.
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

/// Metadata of an object, or what a restore is told about one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Meta {
    /// Type and permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names.
    pub nlink: u32,
    /// Inode number.
    pub ino: u64,
    /// Device number of the filesystem (or subvolume). Unique within one guest's tree.
    pub dev: u64,
    /// Device number of a device node.
    pub rdev: u64,
    /// Bytes.
    pub size: u64,
    /// Units of 512 bytes on disk.
    pub blocks: u64,
    /// Preferred size of reads.
    pub blksize: u32,
    /// Last access.
    pub atime: Time,
    /// Last change of the contents.
    pub mtime: Time,
    /// Last change of the metadata.
    pub ctime: Time,
    /// Birth, where the filesystem keeps it.
    pub btime: Option<Time>,
}

impl Meta {
    /// The key of a file with several names, else `None`.
    pub fn link_key(&self) -> Option<(u64, u64)> {
        let several = self.nlink > 1 && Kind::from_mode(self.mode) != Some(Kind::Directory);
        several.then_some((self.dev, self.ino))
    }

    /// Whether the file has fewer blocks than its size needs.
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
        }
    }
}

/// One object of a guest's tree.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Path from the guest's root, no leading or trailing slash; empty: the root itself. Bytes.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Its metadata.
    pub meta: Meta,
    /// The target of a symbolic link.
    pub link: Option<Vec<u8>>,
    /// A directory whose content could not be walked to the end.
    pub incomplete: bool,
    pub(crate) place: Place,
}

/// Where an entry is, by descriptor.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    /// A directory that exists only in our tree.
    Nowhere,
    /// The directory that is open here (maybe O_PATH).
    Open(Arc<OwnedFd>),
    /// The last component of the entry's path, from this byte on, in this directory.
    In(Arc<OwnedFd>, usize),
}

impl Entry {
    /// The last component of the path; empty for the root.
    pub fn name(&self) -> &[u8] {
        self.path.rsplit(|&b| b == b'/').next().unwrap_or_default()
    }

    /// Opens the object (never following a link). `None`: it exists only in our tree.
    pub(crate) fn open(&self, flags: OFlags) -> Result<Option<OwnedFd>, Errno> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let (dir, name): (_, &[u8]) = match &self.place {
            Place::Nowhere => return Ok(None),
            Place::Open(dir) => (dir, b"."),
            Place::In(dir, at) => (dir, &self.path[*at..]),
        };
        rustix::fs::openat(dir, name, flags, Mode::empty()).map(Some)
    }
}

/// The name of an open descriptor that system calls take where they take no descriptor.
pub(crate) fn proc_path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}
