//! The names of files with several names.

use std::collections::HashMap;

use super::entry::Meta;

/// Bytes an entry costs beside its path: key, value, and the table's own overhead.
const PER_ENTRY: usize = 80;

/// The first name under which a file was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirstName {
    /// The path as it was sent.
    pub path: Box<[u8]>,
    /// Bacula's FileIndex of it.
    pub file_index: i32,
}

/// First names of files that have names still to come.
///
/// An entry costs the length of its path and about 80 bytes, and goes when the last name was seen.
/// Beyond the limit files are not remembered: their later names are then sent in full.
#[derive(Debug)]
pub struct HardLinks {
    table: HashMap<(u64, u64), (FirstName, u32)>,
    bytes: usize,
    limit: usize,
}

impl HardLinks {
    /// A table of at most `limit` bytes.
    pub fn new(limit: usize) -> HardLinks {
        HardLinks {
            table: HashMap::new(),
            bytes: 0,
            limit,
        }
    }

    /// The first name of this file, if it was sent before. Counts as one of its names.
    pub fn find(&mut self, meta: &Meta) -> Option<FirstName> {
        let key = meta.link_key()?;
        let (first, names_left) = self.table.get_mut(&key)?;
        *names_left -= 1;
        if *names_left > 0 {
            return Some(first.clone());
        }
        let (first, _) = self.table.remove(&key)?;
        self.bytes -= first.path.len() + PER_ENTRY;
        Some(first)
    }

    /// Remembers the first name of a file after it was sent. `false`: there is no room for it.
    pub fn insert(&mut self, meta: &Meta, path: &[u8], file_index: i32) -> bool {
        let Some(key) = meta.link_key() else {
            return true;
        };
        let cost = path.len() + PER_ENTRY;
        if self.bytes + cost > self.limit {
            return false;
        }
        let first = FirstName {
            path: path.into(),
            file_index,
        };
        if let Some((old, _)) = self.table.insert(key, (first, meta.nlink - 1)) {
            self.bytes -= old.path.len() + PER_ENTRY;
        }
        self.bytes += cost;
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
        let mut links = HardLinks::new(1000);
        let meta = file(5, 3);
        assert_eq!(links.find(&meta), None);
        assert!(links.insert(&meta, b"/a", 7));
        assert_eq!(links.find(&meta).unwrap().file_index, 7);
        assert_eq!(&*links.find(&meta).unwrap().path, b"/a");
        assert_eq!(links.find(&meta), None);
        assert_eq!(links.bytes, 0);
    }

    #[test]
    fn test_single_names_and_directories_are_not_kept() {
        let mut links = HardLinks::new(1000);
        assert!(links.insert(&file(5, 1), b"/a", 7));
        let mut directory = file(6, 4);
        directory.mode = 0o040_755;
        assert!(links.insert(&directory, b"/d", 8));
        assert!(links.table.is_empty());
    }

    #[test]
    fn test_the_limit_holds() {
        let mut links = HardLinks::new(200);
        assert!(links.insert(&file(1, 2), b"/a", 1));
        assert!(links.insert(&file(2, 2), b"/b", 2));
        assert!(!links.insert(&file(3, 2), b"/c", 3));
        links.find(&file(1, 2));
        assert!(links.insert(&file(3, 2), b"/c", 3));
    }
}
