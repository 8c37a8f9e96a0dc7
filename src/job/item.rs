//! One file on its way to Bacula.

use std::ffi::{CStr, CString};

use super::FileType;

/// A file as Bacula sees it.
#[derive(Debug, Clone)]
pub struct Item {
    /// Kind.
    pub file_type: FileType,
    /// Path in the catalog; directories end in a slash.
    pub name: CString,
    /// Link target; for directories the path again, which is what Bacula stores.
    pub link: Option<CString>,
    /// The path without the slash, for directories.
    pub(super) bare: Option<CString>,
    /// As it goes to the catalog.
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

    /// The name that patterns are matched with: no trailing slash.
    pub fn bare_name(&self) -> &CStr {
        self.bare.as_deref().unwrap_or(&self.name)
    }

    /// The name of the accurate list: directories with their slash.
    pub fn accurate_name(&self) -> &CStr {
        &self.name
    }
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
