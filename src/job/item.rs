//! One file on its way to Bacula.

use std::ffi::{CStr, CString};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::inode::Kind;
use crate::stream::Entry;

/// The type of a file for Bacula.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    /// Has data, perhaps none.
    Regular,
    /// Sent after its content.
    Directory,
    /// Symbolic link.
    Symlink,
    /// A further name of a file that was sent in this job.
    HardLink,
    /// FIFO or device node.
    Special,
}

impl FileType {
    /// `None` for sockets, which Bacula does not save.
    pub(super) fn of(kind: Kind) -> Option<FileType> {
        match kind {
            Kind::Regular => Some(FileType::Regular),
            Kind::Directory => Some(FileType::Directory),
            Kind::Symlink => Some(FileType::Symlink),
            Kind::Fifo | Kind::CharDevice | Kind::BlockDevice => Some(FileType::Special),
            Kind::Socket => None,
        }
    }
}

/// A file as Bacula sees it.
#[derive(Debug, Clone)]
pub struct Item {
    /// Kind.
    pub file_type: FileType,
    /// Path in the catalog; directories end in a slash.
    pub name: CString,
    /// Link target. For directories the path again, because Bacula stores that.
    pub link: Option<CString>,
    /// The path without the slash, for directories.
    pub(super) bare: Option<CString>,
    /// The stat record for the catalog.
    pub stat: libc::stat,
    /// FileIndex of the first name, for hard links.
    pub link_file_index: i32,
    /// Has holes: Bacula is to leave out blocks of zeros.
    pub sparse: bool,
}

impl Item {
    /// `path` is the catalog path without a trailing slash. `None` if it or the target holds a NUL
    /// byte, which no kernel returns.
    pub fn new(
        file_type: FileType,
        path: Vec<u8>,
        target: Option<Vec<u8>>,
        stat: libc::stat,
    ) -> Option<Item> {
        let (name, link, bare) = if file_type == FileType::Directory {
            let mut slashed = path.clone();
            slashed.push(b'/');
            let name = CString::new(slashed).ok()?;
            (name.clone(), Some(name), Some(CString::new(path).ok()?))
        } else {
            let link = match target {
                Some(target) => Some(CString::new(target).ok()?),
                None => None,
            };
            (CString::new(path).ok()?, link, None)
        };
        Some(Item {
            file_type,
            name,
            link,
            bare,
            stat,
            link_file_index: 0,
            sparse: false,
        })
    }

    /// A file of ours, made now.
    pub(super) fn own_file(path: Vec<u8>, length: usize) -> Option<Item> {
        let mut stat = crate::sys::zeroed_stat();
        stat.st_mode = libc::S_IFREG | 0o600;
        stat.st_nlink = 1;
        stat.st_size = i64::try_from(length).unwrap_or(0);
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        stat.st_mtime = i64::try_from(now.as_secs()).unwrap_or(0);
        stat.st_ctime = stat.st_mtime;
        stat.st_atime = stat.st_mtime;
        Item::new(FileType::Regular, path, None, stat)
    }

    /// The item as a further name of a file that was sent. `None`: as for [`Item::new`].
    pub(super) fn linked_to(&self, target: Vec<u8>, file_index: i32) -> Option<Item> {
        let name = self.name.to_bytes().to_vec();
        let linked = Item::new(FileType::HardLink, name, Some(target), self.stat)?;
        Some(Item {
            link_file_index: file_index,
            ..linked
        })
    }

    /// The name that patterns are matched with: no trailing slash.
    pub fn bare_name(&self) -> &CStr {
        self.bare.as_deref().unwrap_or(&self.name)
    }

    /// The name of the accurate list: directories with their slash.
    pub fn accurate_name(&self) -> &CStr {
        &self.name
    }
}

/// The attributes of an entry in the catalog.
pub(super) fn stat(entry: &Entry) -> libc::stat {
    let meta = &entry.meta;
    let mut stat = crate::sys::zeroed_stat();
    let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    stat.st_dev = meta.dev;
    stat.st_ino = meta.ino;
    stat.st_nlink = meta.nlink.into();
    stat.st_mode = meta.mode;
    stat.st_uid = meta.uid;
    stat.st_gid = meta.gid;
    stat.st_rdev = meta.rdev;
    stat.st_size = signed(meta.size);
    stat.st_blksize = meta.blksize.into();
    stat.st_blocks = signed(meta.blocks);
    for (seconds, nanoseconds, time) in [
        (&mut stat.st_atime, &mut stat.st_atime_nsec, meta.atime),
        (&mut stat.st_mtime, &mut stat.st_mtime_nsec, meta.mtime),
        (&mut stat.st_ctime, &mut stat.st_ctime_nsec, meta.ctime),
    ] {
        *seconds = time.seconds;
        *nanoseconds = time.nanoseconds.into();
    }
    stat
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_directories_carry_their_path_as_link() {
        let stat = crate::sys::zeroed_stat();
        let item = Item::new(FileType::Directory, b"/a/b".to_vec(), None, stat).unwrap();
        assert_eq!(item.name.as_c_str(), c"/a/b/");
        assert_eq!(item.link.as_deref(), Some(c"/a/b/"));
        assert_eq!(item.bare_name(), c"/a/b");
        let item = Item::new(
            FileType::Symlink,
            b"/a/l".to_vec(),
            Some(b"x".to_vec()),
            stat,
        )
        .unwrap();
        assert_eq!(
            (item.bare_name(), item.link.as_deref()),
            (c"/a/l", Some(c"x"))
        );
        assert!(Item::new(FileType::Regular, b"/a\0".to_vec(), None, stat).is_none());
    }
}
