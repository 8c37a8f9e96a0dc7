//! Reads at an offset from any source.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use crate::error::escape;
use crate::point::{Point, reach};
use crate::sys::blockdev;
use crate::{Code, Error, Result};

/// A source with a size, readable at any offset.
pub trait ReadAt: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`, or fails; never reads less.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
}

/// Reads `len` bytes, bounded by the caller; fewer at the end of the disk.
pub(super) fn read_up_to(disk: &dyn ReadAt, offset: u64, len: u64) -> io::Result<Vec<u8>> {
    let len = len.min(disk.size().saturating_sub(offset));
    let len = usize::try_from(len).map_err(io::Error::other)?;
    let mut buf = vec![0; len];
    if len > 0 {
        disk.read_exact_at(&mut buf, offset)?;
    }
    Ok(buf)
}

/// A block device or raw file, open for reading.
#[derive(Debug)]
pub struct FileDisk {
    file: File,
    size: u64,
}

impl FileDisk {
    /// Opens a block device or regular file.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_up_to(path, u64::MAX)
    }

    /// Like [`FileDisk::open`], for the first `limit` bytes only.
    pub fn open_up_to(path: &Path, limit: u64) -> Result<Self> {
        let fail = |error: io::Error| {
            let name = escape(path.as_os_str().as_encoded_bytes());
            Error::new(Code::DiskUnreadable, format!("{name}: open")).because(error)
        };
        reach(Point::DiskOpen).map_err(|errno| fail(errno.into()))?;
        let file = File::options()
            .read(true)
            // A FIFO in place of an image must not block the daemon.
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(fail)?;
        let size = size_of(&file).map_err(fail)?.min(limit);
        Ok(FileDisk { file, size })
    }
}

impl FileDisk {
    /// Drops the kernel's cache of the disk. After a failure, reads may return old contents.
    pub fn forget(&self) {
        if let Err(errno) = rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed) {
            log::debug!("fadvise: {errno}");
        }
    }
}

/// Size of a block device or regular file in bytes.
pub(super) fn size_of(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if metadata.file_type().is_block_device() {
        blockdev::size(file.as_fd())
    } else if metadata.is_file() {
        Ok(metadata.len())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "neither a block device nor a file",
        ))
    }
}

impl AsFd for FileDisk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl ReadAt for FileDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        reach(Point::DiskRead)?;
        self.file.read_exact_at(buf, offset)
    }
}

impl ReadAt for &[u8] {
    fn size(&self) -> u64 {
        // A slice never exceeds isize::MAX.
        u64::try_from(self.len()).unwrap_or(u64::MAX)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let part = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(buf.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(part);
        Ok(())
    }
}

impl ReadAt for Vec<u8> {
    fn size(&self) -> u64 {
        self.as_slice().size()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.as_slice().read_exact_at(buf, offset)
    }
}

/// Part of a disk; offsets are relative to its start.
pub(super) struct Part<'a> {
    pub(super) disk: &'a dyn ReadAt,
    pub(super) start: u64,
    pub(super) len: u64,
}

impl ReadAt for Part<'_> {
    fn size(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let len = u64::try_from(buf.len()).map_err(io::Error::other)?;
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        match self.start.checked_add(offset) {
            Some(start) if inside => self.disk.read_exact_at(buf, start),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_file_disk_reads_and_knows_its_size() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"0123456789").unwrap();
        let disk = FileDisk::open(file.path()).unwrap();
        assert_eq!(disk.size(), 10);
        let mut buf = [0; 3];
        disk.read_exact_at(&mut buf, 7).unwrap();
        assert_eq!(&buf, b"789");
        assert!(disk.read_exact_at(&mut buf, 8).is_err());
        assert!(FileDisk::open(Path::new("/")).is_err());
    }

    #[test]
    fn test_part_does_not_read_outside() {
        let bytes = b"0123456789".to_vec();
        let part = Part {
            disk: &bytes,
            start: 2,
            len: 4,
        };
        let mut buf = [0; 2];
        part.read_exact_at(&mut buf, 2).unwrap();
        assert_eq!(&buf, b"45");
        assert!(part.read_exact_at(&mut buf, 3).is_err());
        assert!(part.read_exact_at(&mut buf, u64::MAX).is_err());
        assert_eq!(read_up_to(&part, 3, 100).unwrap(), b"5");
        assert!(read_up_to(&part, 30, 100).unwrap().is_empty());
    }
}
