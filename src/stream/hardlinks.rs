//! Hard links: the names of files with several names.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat};

use crate::inode::{InodeId, Meta};

/// Bytes per entry besides its path: key and value, in a table that has just grown.
const PER_ENTRY: usize = 130;

/// Maximum bytes of paths in the file.
const MAX_FILE: u64 = 1 << 30;

/// First name sent of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirstName {
    /// Path, as sent.
    pub path: Box<[u8]>,
    /// Its FileIndex in Bacula.
    pub file_index: i32,
}

/// First names of files with more names to come.
///
/// The last name removes an entry. Half of the memory may hold paths too; the paths of later
/// entries go to an unnamed file. Files that exceed both are counted; their later names are sent in
/// full.
#[derive(Debug)]
pub struct HardLinks {
    table: HashMap<InodeId, Known>,
    bytes: usize,
    limit: usize,
    paths: Paths,
    forgotten: u64,
    crowded: u64,
    /// Unsent names of files of which no name has been sent yet.
    unsent: HashMap<InodeId, Vec<Box<[u8]>>>,
    /// Those of the file sent last.
    late: Vec<Box<[u8]>>,
}

/// A file with more names to come.
#[derive(Debug)]
struct Known {
    path: Kept,
    file_index: i32,
    names_left: u32,
}

impl Known {
    fn cost(&self) -> usize {
        match &self.path {
            Kept::Memory(path) => path.len() + PER_ENTRY,
            Kept::File(..) => PER_ENTRY,
        }
    }
}

/// Location of a path.
#[derive(Debug)]
enum Kept {
    Memory(Box<[u8]>),
    /// Offset and length.
    File(u64, u32),
}

/// Paths in a file that disappears when closed.
#[derive(Debug)]
struct Paths {
    /// Directory for the file. `None`: no file.
    folder: Option<PathBuf>,
    file: Option<File>,
    length: u64,
}

impl Paths {
    fn write(&mut self, path: &[u8]) -> io::Result<Kept> {
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let folder = self.folder.as_ref().ok_or_else(full)?;
        let size = u32::try_from(path.len()).map_err(io::Error::other)?;
        if self.length + u64::from(size) > MAX_FILE {
            return Err(full());
        }
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
                let fd = openat(CWD, folder, flags, Mode::RUSR | Mode::WUSR)?;
                none.insert(fd.into())
            }
        };
        file.write_all_at(path, self.length)?;
        self.length += u64::from(size);
        Ok(Kept::File(self.length - u64::from(size), size))
    }

    fn read(&self, kept: &Kept) -> io::Result<Box<[u8]>> {
        match (kept, &self.file) {
            (Kept::Memory(path), _) => Ok(path.clone()),
            (Kept::File(at, size), Some(file)) => {
                let mut path = vec![0; *size as usize];
                file.read_exact_at(&mut path, *at)?;
                Ok(path.into())
            }
            (Kept::File(..), None) => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

impl HardLinks {
    /// Creates a table of at most `limit` bytes, with a file in `folder` for paths that do not fit.
    pub fn new(limit: usize, folder: Option<&Path>) -> HardLinks {
        HardLinks {
            table: HashMap::new(),
            bytes: 0,
            limit,
            paths: Paths {
                folder: folder.map(Path::to_owned),
                file: None,
                length: 0,
            },
            forgotten: 0,
            crowded: 0,
            unsent: HashMap::new(),
            late: Vec::new(),
        }
    }

    /// Remembers a name that is not sent because it is unchanged. The catalog may have it as a link
    /// to a name that is gone. If a new name of the file comes, [`HardLinks::take_late`] returns
    /// it. `false`: no room.
    pub fn unsent(&mut self, meta: &Meta, path: &[u8]) -> bool {
        let Some(key) = meta.link_key() else {
            return true;
        };
        let names = self.unsent.entry(key).or_default();
        let last = names.len() + 1 >= meta.nlink as usize;
        let cost = path.len() + PER_ENTRY;
        if !last && self.bytes + cost <= self.limit {
            self.bytes += cost;
            names.push(path.into());
            return true;
        }
        // Last name: none of them is new. No room: the remembered names follow the one to be sent now.
        if last || names.is_empty() {
            let names = self.unsent.remove(&key).unwrap_or_default();
            self.bytes -= names
                .iter()
                .map(|name| name.len() + PER_ENTRY)
                .sum::<usize>();
        }
        self.crowded += u64::from(!last);
        last
    }

    /// Counts the unchanged names that had no room: see [`HardLinks::unsent`].
    pub fn crowded(&self) -> u64 {
        self.crowded
    }

    /// Takes the unsent names that become links to the name sent last.
    pub fn take_late(&mut self) -> Vec<Box<[u8]>> {
        std::mem::take(&mut self.late)
    }

    /// Whether a name of this file has been sent.
    pub fn knows(&self, meta: &Meta) -> bool {
        meta.link_key()
            .is_some_and(|key| self.table.contains_key(&key))
    }

    /// Number of files whose later names are sent as separate files.
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// Returns the first name of this file, if sent before. Counts as one of its names.
    pub fn find(&mut self, meta: &Meta) -> Option<FirstName> {
        let key = meta.link_key()?;
        let known = self.table.get_mut(&key)?;
        known.names_left = known.names_left.saturating_sub(1);
        let first = self.paths.read(&known.path).map(|path| FirstName {
            path,
            file_index: known.file_index,
        });
        if known.names_left == 0 || first.is_err() {
            let known = self.table.remove(&key)?;
            self.bytes -= known.cost();
        }
        self.forgotten += u64::from(first.is_err());
        first.ok()
    }

    /// Remembers the first name of a file after it was sent. `false`: no room.
    pub fn insert(&mut self, meta: &Meta, path: &[u8], file_index: i32) -> bool {
        let Some(key) = meta.link_key() else {
            return true;
        };
        self.late = self.unsent.remove(&key).unwrap_or_default();
        let late = self.late.iter().map(|name| name.len() + PER_ENTRY);
        self.bytes -= late.sum::<usize>();
        let names_left = meta.nlink.saturating_sub(self.late.len() as u32 + 1);
        if names_left == 0 {
            return true;
        }
        let in_memory = self.bytes + path.len() + PER_ENTRY <= self.limit / 2;
        let kept = if in_memory {
            Ok(Kept::Memory(path.into()))
        } else if self.bytes + PER_ENTRY <= self.limit {
            self.paths.write(path)
        } else {
            Err(io::ErrorKind::OutOfMemory.into())
        };
        let Ok(path) = kept else {
            self.forgotten += 1;
            return false;
        };
        let known = Known {
            path,
            file_index,
            names_left,
        };
        self.bytes += known.cost();
        if let Some(old) = self.table.insert(key, known) {
            self.bytes -= old.cost();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(ino: u64, nlink: u32) -> Meta {
        Meta {
            mode: 0o100_644,
            ino,
            nlink,
            ..Meta::default()
        }
    }

    #[test]
    fn test_entries_go_with_the_last_name() {
        let mut links = HardLinks::new(1000, None);
        let meta = file(5, 3);
        assert_eq!(links.find(&meta), None);
        assert!(links.insert(&meta, b"/a", 7));
        assert_eq!(links.find(&meta).unwrap().file_index, 7);
        assert_eq!(&*links.find(&meta).unwrap().path, b"/a");
        assert_eq!(links.find(&meta), None);
        assert_eq!(links.bytes, 0);
    }

    #[test]
    fn test_names_that_were_not_sent_follow_a_new_first_name() {
        let mut links = HardLinks::new(10 * PER_ENTRY, None);
        let (three, two) = (file(5, 3), file(6, 2));
        // Neither is new.
        assert!(links.unsent(&two, b"/a") && links.unsent(&two, b"/b"));
        assert!(links.bytes == 0 && links.unsent.is_empty());
        // The second one is new.
        assert!(links.unsent(&three, b"/a"));
        assert!(links.find(&three).is_none());
        assert!(links.insert(&three, b"/new", 7));
        assert_eq!(links.take_late(), [b"/a".to_vec().into_boxed_slice()]);
        assert!(links.take_late().is_empty());
        assert_eq!(links.find(&three).unwrap().file_index, 7);
        assert!(links.bytes == 0 && links.table.is_empty());
        // No room: the name must be sent.
        let kept = (0..20).take_while(|&n| links.unsent(&file(n, 2), b"/a"));
        assert_eq!(kept.count(), 9);
        assert_eq!(links.crowded(), 1);
        assert!(links.bytes <= links.limit);
    }

    #[test]
    fn test_single_names_and_directories_are_not_kept() {
        let mut links = HardLinks::new(1000, None);
        assert!(links.insert(&file(5, 1), b"/a", 7));
        let mut directory = file(6, 4);
        directory.mode = 0o040_755;
        assert!(links.insert(&directory, b"/d", 8));
        assert!(links.table.is_empty());
    }

    #[test]
    fn test_names_beyond_the_memory_are_in_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let mut links = HardLinks::new(10 * PER_ENTRY, Some(folder.path()));
        let path = |number: u64| format!("/a/long/path/of/{number}").into_bytes();
        let fits: Vec<u64> = (0..100)
            .filter(|&n| links.insert(&file(n, 2), &path(n), 1))
            .collect();
        // Four have their paths in memory.
        assert_eq!(fits, (0..9).collect::<Vec<_>>());
        assert!(links.bytes <= links.limit && links.forgotten() == 91);
        // The file is unnamed.
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        for number in fits {
            let meta = file(number, 2);
            assert!(links.knows(&meta));
            assert_eq!(*links.find(&meta).unwrap().path, path(number)[..]);
            assert!(!links.knows(&meta));
        }
        assert_eq!(links.bytes, 0);
        assert!(links.insert(&file(1, 2), &path(1), 1));
    }

    #[test]
    fn test_the_limit_holds_where_no_file_can_be() {
        for folder in [None, Some(Path::new("/nowhere"))] {
            let mut links = HardLinks::new(4 * (PER_ENTRY + 2), folder);
            assert!(links.insert(&file(1, 2), b"/a", 1));
            assert!(links.insert(&file(2, 2), b"/b", 2));
            assert!(!links.insert(&file(3, 2), b"/c", 3));
            assert_eq!(links.forgotten(), 1);
            links.find(&file(1, 2));
            assert!(links.insert(&file(3, 2), b"/c", 3));
        }
    }
}
