//! Resolves guest paths as the guest would: absolute links start at its root, `..` stops there, and
//! joined filesystems are entered. The work is bounded for a whole guest.

use std::cell::Cell;
use std::collections::VecDeque;

use rustix::io::Errno;

use crate::error::{Code, Error};
use crate::inode::Kind;

/// Maximum path components looked up for one guest, to find its root and its mount points. 256
/// candidate subvolumes and 512 fstab lines with a few links each need a tenth of it.
pub const MAX_PARTS: usize = 100_000;

/// Maximum symbolic links followed for one path, as in the kernel.
const MAX_LINKS: usize = 40;

/// Maximum directories in a resolved path.
const MAX_DEPTH: usize = 200;

/// Path lookup budget of one guest, with the cancellation flag.
pub struct Budget<'a> {
    left: Cell<usize>,
    stop: &'a dyn Fn() -> bool,
    stopped: Cell<bool>,
}

impl std::fmt::Debug for Budget<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Budget")
            .field("left", &self.left)
            .field("stopped", &self.stopped)
            .finish_non_exhaustive()
    }
}

impl<'a> Budget<'a> {
    /// A budget of [`MAX_PARTS`].
    pub fn new(stop: &'a dyn Fn() -> bool) -> Budget<'a> {
        Budget {
            left: Cell::new(MAX_PARTS),
            stop,
            stopped: Cell::new(false),
        }
    }

    /// Spends one component.
    fn spend(&self) -> Result<(), Errno> {
        let left = self.left.get();
        if left % 16 == 0 && !self.stopped.get() && (self.stop)() {
            self.stopped.set(true);
        }
        if left == 0 || self.stopped.get() {
            return Err(Errno::CANCELED);
        }
        self.left.set(left - 1);
        Ok(())
    }

    /// Error if the budget is spent or the job cancelled.
    pub fn check(&self) -> Result<(), Error> {
        if self.stopped.get() {
            let text = "the search for the guest's root and mount points";
            return Err(Error::new(Code::Cancelled, text));
        }
        if self.left.get() == 0 {
            let text = format!(
                "finding its root and the mount points of its fstab takes more than {MAX_PARTS} steps: symbolic \
                 links in these paths lead through too many folders"
            );
            return Err(Error::new(Code::PathsTooLong, text));
        }
        Ok(())
    }
}

/// Directory entries and links, on a disk or in a test.
pub trait Names {
    /// A looked-up object.
    type Object: Clone;

    /// Looks up a name in a directory, without following links.
    fn look(
        &self,
        folder: &Self::Object,
        name: &[u8],
    ) -> Result<(Self::Object, Option<Kind>), Errno>;

    /// The target of a symbolic link.
    fn target(&self, link: &Self::Object) -> Result<Vec<u8>, Errno>;

    /// The root of the filesystem joined at a path.
    fn joined(&self, path: &[u8]) -> Option<Self::Object>;
}

/// A resolved path.
#[derive(Debug)]
pub struct Resolved<O> {
    /// Path without links and dots.
    pub path: Vec<u8>,
    /// The object.
    pub object: O,
    /// File type; `None` if unknown.
    pub kind: Option<Kind>,
}

/// Resolves a path below `root`. `CANCELED`: see [`Budget::check`].
pub fn resolve<N: Names>(
    names: &N,
    root: N::Object,
    path: &[u8],
    budget: &Budget<'_>,
) -> Result<Resolved<N::Object>, Errno> {
    let mut pending: VecDeque<Vec<u8>> = parts(path).collect();
    let mut path = Vec::new();
    // Each with the length of the path before it.
    let mut done: Vec<(usize, N::Object)> = Vec::new();
    let mut links = 0;
    let mut kind = Some(Kind::Directory);
    while let Some(part) = pending.pop_front() {
        budget.spend()?;
        if kind != Some(Kind::Directory) {
            return Err(Errno::NOTDIR);
        }
        if part == b".." {
            path.truncate(done.pop().map_or(0, |(length, _)| length));
            continue;
        }
        let here = done.last().map_or(&root, |(_, object)| object);
        let (object, found) = names.look(here, &part)?;
        if found == Some(Kind::Symlink) {
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::LOOP);
            }
            let target = names.target(&object)?;
            if target.starts_with(b"/") {
                done.clear();
                path.clear();
            }
            parts(&target)
                .rev()
                .for_each(|part| pending.push_front(part));
            continue;
        }
        if done.len() == MAX_DEPTH {
            return Err(Errno::NAMETOOLONG);
        }
        let before = path.len();
        if before > 0 {
            path.push(b'/');
        }
        path.extend_from_slice(&part);
        let joined = names.joined(&path);
        kind = match joined {
            Some(_) => Some(Kind::Directory),
            None => found,
        };
        done.push((before, joined.unwrap_or(object)));
    }
    Ok(Resolved {
        path,
        object: done.pop().map_or(root, |(_, object)| object),
        kind,
    })
}

/// Path components without empty ones and dots.
fn parts(path: &[u8]) -> impl DoubleEndedIterator<Item = Vec<u8>> + '_ {
    path.split(|&b| b == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .map(<[u8]>::to_vec)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every name is a link through 2000 directories to the next name.
    struct Maze(Cell<usize>);

    impl Names for Maze {
        type Object = Vec<u8>;

        fn look(&self, _: &Vec<u8>, name: &[u8]) -> Result<(Vec<u8>, Option<Kind>), Errno> {
            self.0.set(self.0.get() + 1);
            let kind = match name.first() {
                Some(b'l') => Kind::Symlink,
                _ => Kind::Directory,
            };
            Ok((name.to_vec(), Some(kind)))
        }

        fn target(&self, link: &Vec<u8>) -> Result<Vec<u8>, Errno> {
            Ok([&b"d/../".repeat(1000)[..], link].concat())
        }

        fn joined(&self, _: &[u8]) -> Option<Vec<u8>> {
            None
        }
    }

    #[test]
    fn test_all_paths_of_a_guest_have_one_budget() {
        let maze = Maze(Cell::new(0));
        let never = || false;
        let budget = Budget::new(&never);
        // One path per line that an fstab may have.
        let results: Vec<Errno> = (0..511)
            .map(|line| {
                let path = format!("l{line}");
                resolve(&maze, Vec::new(), path.as_bytes(), &budget).unwrap_err()
            })
            .collect();
        assert!(maze.0.get() <= MAX_PARTS, "{}", maze.0.get());
        assert_eq!(results[0], Errno::LOOP);
        assert_eq!(results.last(), Some(&Errno::CANCELED));
        let error = budget.check().unwrap_err();
        assert_eq!(error.code(), Code::PathsTooLong);
        let text = error.report();
        assert!(
            text.contains("100000 steps") && text.contains("fstab"),
            "{text}"
        );
    }

    #[test]
    fn test_a_cancel_ends_the_search() {
        let maze = Maze(Cell::new(0));
        let stop = || maze.0.get() >= 1000;
        let budget = Budget::new(&stop);
        budget.check().unwrap();
        let path = b"d/".repeat(150);
        let ended = (0..100).find_map(|_| resolve(&maze, Vec::new(), &path, &budget).err());
        assert_eq!(ended, Some(Errno::CANCELED));
        assert!(maze.0.get() < 1020, "{}", maze.0.get());
        assert_eq!(budget.check().unwrap_err().code(), Code::Cancelled);
    }
}
