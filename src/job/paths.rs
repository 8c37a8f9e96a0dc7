//! A set of paths and of whole trees.

use std::collections::BTreeSet;
use std::ops::Bound;

/// Paths of the catalog; one with a trailing slash stands for all below it too.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Paths {
    files: BTreeSet<Vec<u8>>,
    /// None of these is inside of another one.
    trees: BTreeSet<Vec<u8>>,
}

impl Paths {
    pub(super) fn insert(&mut self, path: Vec<u8>) {
        if self.contains(&path) {
            return;
        }
        if path.last() != Some(&b'/') {
            self.files.insert(path);
            return;
        }
        for set in [&mut self.files, &mut self.trees] {
            let from = (Bound::Included(&path), Bound::Unbounded);
            let below = set.range::<Vec<u8>, _>(from);
            let below: Vec<_> = below
                .take_while(|p| p.starts_with(&path))
                .cloned()
                .collect();
            below.iter().for_each(|path| {
                set.remove(path);
            });
        }
        self.trees.insert(path);
    }

    pub(super) fn contains(&self, path: &[u8]) -> bool {
        if self.files.contains(path) {
            return true;
        }
        // Between a tree and what is in it, only things in it could stand, and there are none.
        let until = (Bound::Unbounded, Bound::Included(path));
        let before = self.trees.range::<[u8], _>(until).next_back();
        before.is_some_and(|tree| path.starts_with(tree))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.trees.iter().chain(&self.files)
    }
}

impl Extend<Vec<u8>> for Paths {
    fn extend<T: IntoIterator<Item = Vec<u8>>>(&mut self, paths: T) {
        paths.into_iter().for_each(|path| self.insert(path));
    }
}

impl FromIterator<Vec<u8>> for Paths {
    fn from_iter<T: IntoIterator<Item = Vec<u8>>>(paths: T) -> Paths {
        let mut set = Paths::default();
        set.extend(paths);
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_a_path_or_a_tree_above_it() {
        let paths = ["/g/a", "/g/d/x", "/g/d/", "/g/d/e/", "/g/f/"];
        let set: Paths = paths.iter().map(|p| p.as_bytes().to_vec()).collect();
        let kept: Vec<_> = set.iter().map(|p| String::from_utf8_lossy(p)).collect();
        assert_eq!(kept, ["/g/d/", "/g/f/", "/g/a"]);
        for inside in ["/g/a", "/g/d/", "/g/d/e", "/g/d/e/f/", "/g/f/\u{ff}"] {
            assert!(set.contains(inside.as_bytes()), "{inside}");
        }
        for outside in [
            "/g/a/", "/g/ab", "/g/d", "/g/e/", "/g/", "/g/d0/", "/g/g/x", "",
        ] {
            assert!(!set.contains(outside.as_bytes()), "{outside}");
        }
        assert!(!Paths::default().contains(b"/g/a"));
    }
}
