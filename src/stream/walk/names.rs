//! Names of a directory, read in batches.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, RawDir, SeekFrom};
use rustix::io::Errno;

use crate::point::{Point, reach};

/// Maximum path length in bytes, as in the catalog's path column.
pub(super) const MAX_PATH: usize = 65_535;

/// Buffer size for reading names.
pub(super) const NAMES_AT_ONCE: usize = 64 << 10;

/// Names of a directory, sorted by inode number.
#[derive(Debug)]
pub(super) struct Batch {
    names: Vec<u8>,
    pub(super) index: Vec<Name>,
    /// Start of the next batch; `None`: this is the last.
    pub(super) next: Option<u64>,
}

/// A name in a batch, ordered by inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Name {
    pub(super) ino: u64,
    start: u32,
    pub(super) length: u16,
    /// Not a directory, according to the kernel.
    pub(super) plain: bool,
    /// A directory, according to the kernel.
    pub(super) directory: bool,
}

impl Batch {
    pub(super) fn name(&self, number: usize) -> Option<(Name, &[u8])> {
        let name = self.index.get(number)?;
        let start = name.start as usize;
        let text = &self.names[start..start + usize::from(name.length)];
        Some((*name, text))
    }

    pub(super) fn empty() -> Batch {
        Batch {
            names: Vec::new(),
            index: Vec::new(),
            next: None,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.names.capacity() + self.index.capacity() * size_of::<Name>()
    }
}

pub(super) fn join_path(directory: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(directory.len() + 1 + name.len());
    if !directory.is_empty() {
        path.extend_from_slice(directory);
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

/// Reads names from a position until there are `enough`, sorted by inode number. With an error, the
/// batch holds the names read before it.
pub(super) fn read_batch(
    directory: &OwnedFd,
    start: u64,
    enough: usize,
    buffer: &mut [MaybeUninit<u8>],
) -> (Batch, Result<(), Errno>) {
    let mut batch = Batch::empty();
    let result = read_names(directory, start, enough, buffer, &mut batch);
    batch.index.sort_unstable();
    batch.names.shrink_to_fit();
    batch.index.shrink_to_fit();
    (batch, result)
}

fn read_names(
    directory: &OwnedFd,
    start: u64,
    enough: usize,
    buffer: &mut [MaybeUninit<u8>],
    batch: &mut Batch,
) -> Result<(), Errno> {
    reach(Point::WalkNames)?;
    rustix::fs::seek(directory, SeekFrom::Start(start))?;
    let mut names = RawDir::new(directory, buffer);
    while let Some(entry) = names.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        // The limits on a batch and on a name keep both far below their types' maximum.
        let at = u32::try_from(batch.names.len()).map_err(|_| Errno::OVERFLOW)?;
        let length = u16::try_from(name.len()).map_err(|_| Errno::OVERFLOW)?;
        batch.names.extend_from_slice(name);
        let directory = entry.file_type() == FileType::Directory;
        batch.index.push(Name {
            ino: entry.ino(),
            start: at,
            length,
            plain: !directory && entry.file_type() != FileType::Unknown,
            directory,
        });
        let used = batch.names.len() + batch.index.len() * size_of::<Name>();
        if used >= enough {
            let next = entry.next_entry_cookie();
            // Positions only grow. Names forged to share one would never end.
            if next <= start {
                return Err(Errno::LOOP);
            }
            batch.next = Some(next);
            return Ok(());
        }
    }
    Ok(())
}
