//! Looks up one path of a guest's tree: an object, a directory's entries, a file's contents. Uses
//! the backup's walk, so it finds exactly the objects that a backup would save.

use std::collections::VecDeque;

use super::content::FileReader;
use super::entry::{Entry, Place};
use super::walk::{Item, Step, WalkOptions, Walker};
use crate::error::{Code, Error, Result, escape};
use crate::fs::GuestTree;
use crate::inode::Kind;

/// Maximum symbolic links followed for one path, as in the kernel.
const MAX_LINKS: usize = 40;

/// Gives each entry of a directory, in the walk's order; with `recursive`, all that lies below; or
/// the single object that is not a directory. The entries hold no descriptors. Does not follow a
/// link at the end of the path unless a slash follows it. Returns the read errors.
pub fn list(
    tree: &GuestTree,
    path: &[u8],
    recursive: bool,
    stop: &dyn Fn() -> bool,
    mut each: impl FnMut(Entry) -> Result<()>,
) -> Result<Vec<Error>> {
    let (mut walker, found) = find(tree, path, path.ends_with(b"/"), stop)?;
    let mut problems = Vec::new();
    let mut add = |mut entry: Entry| {
        // An open place would hold its directory, and so the guest's disk.
        entry.place = Place::Nowhere;
        each(entry)
    };
    if found.kind != Kind::Directory {
        add(found)?;
        return Ok(problems);
    }
    let mut depth = 0;
    while let Some(item) = walker.next() {
        match item {
            Item::Begin(entry) => {
                match recursive {
                    true => depth += 1,
                    false => walker.leave_out(),
                }
                add(entry)?;
            }
            Item::Object(entry) => add(entry)?,
            Item::Problem(problem) => problems.push(problem.error),
            Item::LeftOut(_) => {}
            Item::End(_) if depth == 0 => break,
            Item::End(_) => depth -= 1,
        }
        if stop() {
            return Err(Error::new(Code::Cancelled, shown(path)));
        }
    }
    Ok(problems)
}

/// Opens a regular file, following links within the guest.
pub fn open(tree: &GuestTree, path: &[u8], stop: &dyn Fn() -> bool) -> Result<FileReader> {
    let (_, found) = find(tree, path, true, stop)?;
    match found.kind {
        Kind::Regular => FileReader::open(&found),
        _ => {
            let text = format!("{} is no regular file", shown(&found.path));
            Err(Error::new(Code::NoSuchFile, text))
        }
    }
}

fn shown(path: &[u8]) -> String {
    let path = path.strip_prefix(b"/").unwrap_or(path);
    format!("/{}", escape(path))
}

/// Components of a path, without empty ones and dots.
fn parts(path: &[u8]) -> impl DoubleEndedIterator<Item = Vec<u8>> + '_ {
    path.split(|&b| b == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .map(<[u8]>::to_vec)
}

/// Resolves a path as the guest would: absolute links start at its root, `..` stops there. Also
/// returns the walk, which continues with the content of a directory found.
fn find(
    tree: &GuestTree,
    path: &[u8],
    follow: bool,
    stop: &dyn Fn() -> bool,
) -> Result<(Walker, Entry)> {
    let missing = |why: &str| Error::new(Code::NoSuchFile, format!("{}: {why}", shown(path)));
    let mut pending: VecDeque<Vec<u8>> = parts(path).collect();
    // Free of links and dots.
    let mut done: Vec<Vec<u8>> = Vec::new();
    let mut links = 0;
    loop {
        while let Some(part) = pending.front() {
            if part == b".." {
                break;
            }
            done.extend(pending.pop_front());
        }
        let wanted = done.join(&b'/');
        let (walker, entry) = go(tree, &wanted, stop)?;
        let depth = parts(&entry.path).count();
        let is_last = depth == done.len() && pending.is_empty();
        match entry.kind {
            Kind::Symlink if follow || !is_last => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(missing("too many symbolic links"));
                }
                for part in done.drain(depth..).rev() {
                    pending.push_front(part);
                }
                done.pop();
                let target = entry.link.as_deref().unwrap_or_default();
                if target.starts_with(b"/") {
                    done.clear();
                }
                for part in parts(target).rev() {
                    pending.push_front(part);
                }
            }
            kind if is_last => {
                if path.ends_with(b"/") && kind != Kind::Directory {
                    return Err(missing("it is no folder"));
                }
                return Ok((walker, entry));
            }
            Kind::Directory if depth == done.len() => {
                // The next part is `..`.
                pending.pop_front();
                done.pop();
            }
            _ => {
                let text = format!("{} is no folder", shown(&entry.path));
                return Err(missing(&text));
            }
        }
    }
}

/// Walks to a path without links and dots. Returns the object there, or the one on the way that is
/// not a directory.
fn go(tree: &GuestTree, wanted: &[u8], stop: &dyn Fn() -> bool) -> Result<(Walker, Entry)> {
    let mut walker = Walker::new(tree, WalkOptions::default());
    let mut note = String::new();
    while let Some(step) = walker.next_step() {
        if stop() {
            return Err(Error::new(Code::Cancelled, shown(wanted)));
        }
        let item = match step {
            Step::Object(object) if on_way(&object.path, wanted) => object.look(),
            Step::Object(_) | Step::Passed => continue,
            Step::Item(item) => item,
        };
        match item {
            Item::Begin(entry) if entry.path == wanted => return Ok((walker, entry)),
            Item::Begin(entry) if !on_way(&entry.path, wanted) => walker.leave_out(),
            Item::Object(entry) if on_way(&entry.path, wanted) => return Ok((walker, entry)),
            Item::Problem(problem) if on_way(&problem.path, wanted) => return Err(problem.error),
            // For the directory just entered.
            Item::LeftOut(left_out) => note = format!(" ({left_out})"),
            // A directory on the way lacks this name.
            Item::End(_) => break,
            _ => {}
        }
    }
    let text = format!("{}{note}", shown(wanted));
    Err(Error::new(Code::NoSuchFile, text))
}

/// Whether `path` is `wanted` or a directory above it.
fn on_way(path: &[u8], wanted: &[u8]) -> bool {
    let rest = wanted.strip_prefix(path);
    path.is_empty() || rest.is_some_and(|rest| rest.first().is_none_or(|b| *b == b'/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_what_is_on_the_way() {
        for (path, wanted, expected) in [
            ("", "a/b", true),
            ("a", "a/b", true),
            ("a/b", "a/b", true),
            ("a/b/c", "a/b", false),
            ("a", "ab", false),
            ("ab", "a", false),
            ("", "", true),
            ("a", "", false),
        ] {
            let found = on_way(path.as_bytes(), wanted.as_bytes());
            assert_eq!(found, expected, "{path} {wanted}");
        }
    }

    #[test]
    fn test_parts_are_plain_names() {
        let found: Vec<_> = parts(b"//a/./b/../c:d/").collect();
        assert_eq!(found, [&b"a"[..], b"b", b"..", b"c:d"]);
    }
}
