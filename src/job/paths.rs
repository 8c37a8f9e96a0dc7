//! A set of paths and of whole trees.

use std::collections::BTreeSet;
use std::ops::Bound;

/// Paths of the catalog: of single objects, and of trees, which end in a slash.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Paths {
    objects: BTreeSet<Vec<u8>>,
    /// None of these is inside of another one.
    trees: BTreeSet<Vec<u8>>,
}

impl Paths {
    /// Adds an object: also of a directory, with or without its slash, nothing but itself.
    pub(super) fn insert_object(&mut self, path: Vec<u8>) {
        if !self.contains(&path) {
            self.objects.insert(path);
        }
    }

    /// Adds all below a path with a trailing slash, and the directory itself; or an object.
    pub(super) fn insert(&mut self, path: Vec<u8>) {
        if path.last() != Some(&b'/') || self.in_tree(&path) {
            self.insert_object(path);
            return;
        }
        for set in [&mut self.objects, &mut self.trees] {
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
        self.objects.contains(path) || self.in_tree(path)
    }

    fn in_tree(&self, path: &[u8]) -> bool {
        // Only members of a tree sort between the tree and a path in it, and the set has none.
        let until = (Bound::Unbounded, Bound::Included(path));
        let before = self.trees.range::<[u8], _>(until).next_back();
        before.is_some_and(|tree| path.starts_with(tree))
    }

    pub(super) fn trees(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.trees.iter()
    }

    pub(super) fn objects(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.objects.iter()
    }

    /// Adds all of another set.
    pub(super) fn join(&mut self, other: &Paths) {
        self.extend(other.trees.iter().cloned());
        other
            .objects
            .iter()
            .for_each(|path| self.insert_object(path.clone()));
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
        let mut set: Paths = paths.iter().map(|p| p.as_bytes().to_vec()).collect();
        let kept = set.trees().chain(set.objects());
        let kept: Vec<_> = kept.map(|p| String::from_utf8_lossy(p)).collect();
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
        // A directory alone.
        set.insert_object(b"/g/h/".to_vec());
        assert!(set.contains(b"/g/h/") && !set.contains(b"/g/h/x"));
        set.insert(b"/g/h/".to_vec());
        assert!(set.contains(b"/g/h/x"));
    }
}
