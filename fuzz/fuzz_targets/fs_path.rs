//! A guest's fstab, and folders and links that its mount points lead through. All of it is resolved within the
//! guest's root and within one budget.
//!
//! The bytes are the lines `d PATH` and `l PATH TARGET` of a tree, an empty line, and the fstab.
#![no_main]

use std::cell::Cell;
use std::collections::BTreeMap;

use guestsnap::fs::fstab;
use guestsnap::fs::path::{Budget, MAX_PARTS, Names, resolve};
use guestsnap::inode::Kind;
use libfuzzer_sys::fuzz_target;
use rustix::io::Errno;

/// Paths without a slash at their ends; a link has a target.
struct Tree {
    objects: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    joined: Vec<Vec<u8>>,
    looks: Cell<usize>,
}

impl Names for Tree {
    type Object = Vec<u8>;

    fn look(&self, folder: &Vec<u8>, name: &[u8]) -> Result<(Vec<u8>, Option<Kind>), Errno> {
        assert!(!name.is_empty() && !name.contains(&b'/') && name != b"." && name != b"..");
        self.looks.set(self.looks.get() + 1);
        let path = [folder, &b"/"[..], name].concat();
        match self.objects.get(&path) {
            Some(Some(_)) => Ok((path, Some(Kind::Symlink))),
            Some(None) => Ok((path, Some(Kind::Directory))),
            None => Err(Errno::NOENT),
        }
    }

    fn target(&self, link: &Vec<u8>) -> Result<Vec<u8>, Errno> {
        Ok(self.objects[link].clone().unwrap())
    }

    fn joined(&self, path: &[u8]) -> Option<Vec<u8>> {
        let path = [b"/", path].concat();
        self.joined.contains(&path).then_some(path)
    }
}

fuzz_target!(|bytes: &[u8]| {
    let end = bytes.windows(2).position(|two| two == b"\n\n");
    let (tree, text) = bytes.split_at(end.unwrap_or(bytes.len()));
    let mut names = Tree {
        objects: BTreeMap::new(),
        joined: Vec::new(),
        looks: Cell::new(0),
    };
    for line in tree.split(|&b| b == b'\n') {
        let mut words = line.splitn(3, |&b| b == b' ');
        match (words.next(), words.next(), words.next()) {
            (Some(b"d"), Some(path), None) => drop(names.objects.insert(path.to_vec(), None)),
            (Some(b"l"), Some(path), Some(target)) => {
                names.objects.insert(path.to_vec(), Some(target.to_vec()));
            }
            _ => {}
        }
    }
    let never = || false;
    let budget = Budget::new(&never);
    for line in fstab::parse(text).0 {
        let Ok(found) = resolve(&names, Vec::new(), &line.mount_point, &budget) else {
            continue;
        };
        let parts: Vec<&[u8]> = found.path.split(|&b| b == b'/').collect();
        assert!(parts.len() <= 200 && !parts.contains(&&b".."[..]) && !parts.contains(&&b"."[..]));
        names.joined.push([&b"/"[..], &found.path].concat());
    }
    assert!(names.looks.get() <= MAX_PARTS);
});
