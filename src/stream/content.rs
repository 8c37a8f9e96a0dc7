//! Reads the contents of regular files.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Advice, AtFlags, OFlags, SeekFrom};
use rustix::io::Errno;

use super::entry::Entry;
use crate::error::{Code, Error, Result, escape};
use crate::inode::{Kind, Meta};
use crate::point::{Point, reach};

/// Files up to this size get no advice: the kernel reads them in one go, and the call would cost
/// more than it saves.
const SMALL: u64 = 128 << 10;

/// Bytes at the start of a large file to read early.
const READ_EARLY: u64 = 1 << 20;

/// Pages behind the reader are dropped in steps of this size.
const DROP_BEHIND: u64 = 8 << 20;

/// An open regular file of a guest. Holes read as zeros without disk access.
#[derive(Debug)]
pub struct FileReader {
    file: OwnedFd,
    position: u64,
    size: u64,
    sparse: bool,
    /// End of the current run of data or hole at `position`.
    known_until: u64,
    in_hole: bool,
    dropped_until: u64,
}

impl FileReader {
    /// Opens the file and verifies that it is the one looked up.
    pub fn open(entry: &Entry) -> Result<FileReader> {
        let failed = |step: &str| {
            Error::new(
                Code::ReadFailed,
                format!("/{}: {step}", escape(&entry.path)),
            )
        };
        if entry.kind != Kind::Regular {
            return Err(failed("only regular files are read"));
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = reach(Point::FileOpen)
            .and_then(|()| entry.open(flags))
            .map_err(|e| failed("open").because(e))?
            .ok_or_else(|| failed("it exists only in our tree"))?;
        let found = Meta::read(&file, b"", AtFlags::EMPTY_PATH)
            .map_err(|e| failed("stat after open").because(e))?;
        let same = (found.id(), found.mode) == (entry.meta.id(), entry.meta.mode);
        if !same {
            return Err(failed("it is not the file that was listed"));
        }
        if found.size > SMALL {
            // Only advice: ignore errors.
            let _ = rustix::fs::fadvise(&file, 0, None, Advice::Sequential);
        }
        Ok(FileReader {
            file,
            position: 0,
            size: found.size,
            sparse: found.is_sparse(),
            known_until: 0,
            in_hole: false,
            dropped_until: 0,
        })
    }

    /// Lets the kernel start reading; the job needs this file soon.
    pub(crate) fn will_need(&self) {
        let length = std::num::NonZeroU64::new(READ_EARLY.min(self.size));
        // Only advice: ignore errors.
        let _ = rustix::fs::fadvise(&self.file, 0, length, Advice::WillNeed);
    }

    /// Size when opened.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Skips a hole at the current position. Returns its length; 0 at data or at the end.
    pub(crate) fn skip_hole(&mut self) -> io::Result<u64> {
        if !self.sparse || self.position >= self.size {
            return Ok(0);
        }
        if self.position >= self.known_until {
            self.look_for_holes()?;
        }
        if !self.in_hole {
            return Ok(0);
        }
        let length = self.known_until.min(self.size) - self.position;
        self.position += length;
        Ok(length)
    }

    /// Reads the next bytes; 0 at the end.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.sparse && self.position < self.size {
            if self.position >= self.known_until {
                self.look_for_holes()?;
            }
            let known = self.known_until.min(self.size) - self.position;
            let length = usize::try_from(known).map_or(buffer.len(), |n| n.min(buffer.len()));
            if self.in_hole {
                buffer[..length].fill(0);
                self.position += length as u64;
                return Ok(length);
            }
            return self.read_data(&mut buffer[..length]);
        }
        self.read_data(buffer)
    }

    fn read_data(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        reach(Point::FileRead)?;
        let length = loop {
            match rustix::io::pread(&self.file, &mut *buffer, self.position) {
                Err(Errno::INTR) => {}
                result => break result?,
            }
        };
        self.position += length as u64;
        if self.position >= self.dropped_until + DROP_BEHIND {
            self.drop_behind();
        }
        Ok(length)
    }

    /// Determines whether data or a hole starts here, and its end.
    fn look_for_holes(&mut self) -> io::Result<()> {
        match rustix::fs::seek(&self.file, SeekFrom::Data(self.position)) {
            Ok(data) if data > self.position => {
                self.in_hole = true;
                self.known_until = data;
            }
            // No data from here on.
            Err(Errno::NXIO) => {
                self.in_hole = true;
                self.known_until = self.size;
            }
            Ok(_) => {
                self.in_hole = false;
                self.known_until = rustix::fs::seek(&self.file, SeekFrom::Hole(self.position))?
                    .max(self.position + 1);
            }
            // Unsupported by the filesystem: read everything.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                self.in_hole = false;
                self.known_until = self.size;
            }
            Err(errno) => return Err(errno.into()),
        }
        Ok(())
    }

    /// Drops the pages already read, so that a backup does not evict the host's cache.
    fn drop_behind(&mut self) {
        let length = self.position - self.dropped_until;
        // Only advice: ignore errors.
        let _ = rustix::fs::fadvise(
            &self.file,
            self.dropped_until,
            std::num::NonZeroU64::new(length),
            Advice::DontNeed,
        );
        self.dropped_until = self.position;
    }
}

impl Drop for FileReader {
    fn drop(&mut self) {
        if self.size > SMALL && self.position > self.dropped_until {
            self.drop_behind();
        }
    }
}

impl AsFd for FileReader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
