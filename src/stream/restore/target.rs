//! The restore folder: resolves paths from Bacula below it, never following a link.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::{Code, Error, Result, escape};
use crate::point::{Point, reach};

/// Maximum part of a path resolved by one system call; the kernel accepts less than 4096 bytes.
const MAX_RESOLVE: usize = 3500;

/// A filesystem that stands at a place below the restore folder, in another tree than the host's.
#[derive(Debug)]
pub struct Joined {
    /// Path from the folder, no slash at either end; empty: the folder itself.
    pub path: Vec<u8>,
    /// Its root directory, O_PATH.
    pub root: OwnedFd,
}

/// The restore folder, held open.
#[derive(Debug)]
pub(super) struct Target {
    /// The folder first; then, in a guest's tree, the filesystems joined to it.
    roots: Vec<Joined>,
    /// Restore folder as Bacula prefixes it to paths, without a trailing slash.
    prefix: Vec<u8>,
    /// Whether the roots themselves are restored too.
    whole: bool,
}

impl Target {
    /// Opens this folder and creates it if missing; `None`, empty or `/`: the host's root.
    pub(super) fn open(folder: Option<&[u8]>) -> Result<Target> {
        let mut prefix = folder.unwrap_or_default();
        while let Some(shorter) = prefix.strip_suffix(b"/") {
            prefix = shorter;
        }
        let failed = |step: &str, cause: std::io::Error| {
            let text = format!("the restore folder {}: {step}", escape(prefix));
            Error::new(Code::RestoreFailed, text).because(cause)
        };
        let path: &[u8] = if prefix.is_empty() { b"/" } else { prefix };
        let mut builder = std::fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(builder.recursive(true), 0o700);
        reach(Point::RestoreFolder)
            .map_err(std::io::Error::from)
            .and_then(|()| builder.create(OsStr::from_bytes(path)))
            .map_err(|e| failed("making it", e))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|e| failed("opening it", e.into()))?;
        Ok(Target {
            roots: vec![Joined {
                path: Vec::new(),
                root,
            }],
            prefix: prefix.to_vec(),
            whole: false,
        })
    }

    /// A guest's tree. `prefix` stands in front of its paths. A path without a filesystem is an error.
    pub(super) fn tree(roots: Vec<Joined>, prefix: &[u8]) -> Target {
        Target {
            roots,
            prefix: prefix.to_vec(),
            whole: true,
        }
    }

    /// The filesystem that a path is on, and the path below its root.
    fn on<'a>(&self, relative: &'a [u8]) -> std::result::Result<(BorrowedFd<'_>, &'a [u8]), Errno> {
        let below = |joined: &Joined| {
            let rest = relative.strip_prefix(&joined.path[..])?;
            match joined.path.is_empty() || rest.is_empty() {
                true => Some(rest),
                false => rest.strip_prefix(b"/"),
            }
        };
        let found = self.roots.iter().filter_map(|j| Some((j, below(j)?)));
        let (joined, rest) = found
            .max_by_key(|(joined, _)| joined.path.len())
            .ok_or(Errno::NODEV)?;
        Ok((joined.root.as_fd(), rest))
    }

    /// A new descriptor of the root of the filesystem that a path is on, and the path below it.
    pub(super) fn root<'a>(
        &self,
        relative: &'a [u8],
    ) -> std::result::Result<(OwnedFd, &'a [u8]), Errno> {
        let (root, rest) = self.on(relative)?;
        Ok((resolve(root, b".")?, rest))
    }

    /// Splits a clean relative path into directory and name. The name of a restored root is a dot, that
    /// of another one is empty.
    pub(super) fn split<'a>(&self, relative: &'a [u8]) -> (&'a [u8], &'a [u8]) {
        match self.whole && self.roots.iter().any(|joined| joined.path == relative) {
            true => (relative, b"."),
            false => split(relative),
        }
    }

    /// The folder as Bacula prefixes it to paths.
    pub(super) fn prefix(&self) -> &[u8] {
        &self.prefix
    }

    /// Returns the path below the restore folder, without empty components and dots.
    pub(super) fn relative(&self, path: &[u8]) -> Result<Vec<u8>> {
        let outside = || {
            let text = format!(
                "{} is not below the restore folder {}",
                escape(path),
                escape(&self.prefix)
            );
            Error::new(Code::RestoreOutside, text)
        };
        let rest = path.strip_prefix(&self.prefix[..]).ok_or_else(outside)?;
        if !self.prefix.is_empty() && !rest.is_empty() && !rest.starts_with(b"/") {
            return Err(outside());
        }
        let mut relative = Vec::with_capacity(rest.len());
        for part in rest.split(|&b| b == b'/') {
            match part {
                b"" | b"." => {}
                b".." => return Err(outside()),
                part if part.contains(&0) => return Err(outside()),
                part => {
                    if !relative.is_empty() {
                        relative.push(b'/');
                    }
                    relative.extend_from_slice(part);
                }
            }
        }
        Ok(relative)
    }

    /// Opens a directory below the root, never following links.
    pub(super) fn open_directory(&self, relative: &[u8]) -> std::result::Result<OwnedFd, Errno> {
        let (mut directory, mut rest) = self.root(relative)?;
        while !rest.is_empty() {
            let end = if rest.len() <= MAX_RESOLVE {
                rest.len()
            } else {
                let slash = rest[..MAX_RESOLVE].iter().rposition(|&b| b == b'/');
                slash.ok_or(Errno::NAMETOOLONG)?
            };
            directory = resolve(directory.as_fd(), &rest[..end])?;
            rest = rest.get(end + 1..).unwrap_or_default();
        }
        Ok(directory)
    }
}

pub(super) fn resolve_error(path: &[u8], errno: Errno) -> Error {
    let (code, step) = match errno {
        Errno::NOSYS => (Code::KernelTooOld, "openat2"),
        Errno::NODEV => (Code::NoSuchPlace, "the guest's tree has no root"),
        Errno::LOOP | Errno::XDEV => (
            Code::RestoreOutside,
            "a folder of its path is a symbolic link in the target",
        ),
        Errno::NOTDIR => (
            Code::RestoreFailed,
            "a folder of its path is not a folder in the target",
        ),
        _ => (Code::RestoreFailed, "opening its folder"),
    };
    Error::new(code, format!("{}: {step}", escape(path))).because(errno)
}

/// Opens a directory below another one: never upwards, never through a link.
pub(super) fn resolve(
    directory: BorrowedFd<'_>,
    path: &[u8],
) -> std::result::Result<OwnedFd, Errno> {
    // Without O_NOFOLLOW: RESOLVE_NO_SYMLINKS covers the last component and gives ELOOP.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    reach(Point::RestoreResolve)?;
    // EAGAIN: a concurrent rename.
    for _ in 0..3 {
        match rustix::fs::openat2(directory, path, flags, Mode::empty(), how) {
            Err(Errno::AGAIN) => {}
            result => return result,
        }
    }
    Err(Errno::AGAIN)
}

/// Splits a clean relative path into directory and name.
fn split(relative: &[u8]) -> (&[u8], &[u8]) {
    match relative.iter().rposition(|&b| b == b'/') {
        Some(slash) => (&relative[..slash], &relative[slash + 1..]),
        None => (b"", relative),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(folder: &str) -> Target {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        Target {
            roots: vec![Joined {
                path: Vec::new(),
                root: rustix::fs::open("/", flags, Mode::empty()).unwrap(),
            }],
            prefix: folder.as_bytes().to_vec(),
            whole: false,
        }
    }

    #[test]
    fn test_paths_of_a_tree_are_on_the_filesystem_that_stands_there() {
        let folder = tempfile::tempdir().unwrap();
        let joined = |path: &str| {
            let place = folder.path().join(path.replace('/', "_"));
            std::fs::create_dir_all(&place).unwrap();
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            Joined {
                path: path.into(),
                root: rustix::fs::open(&place, flags, Mode::empty()).unwrap(),
            }
        };
        let roots = ["", "var", "var/lib/db"].map(joined);
        let inodes = roots
            .each_ref()
            .map(|j| rustix::fs::fstat(&j.root).unwrap().st_ino);
        let tree = Target::tree(roots.into(), b"web1:");
        for (path, root, rest) in [
            ("etc/passwd", 0, "etc/passwd"),
            ("variety", 0, "variety"),
            ("var", 1, ""),
            ("var/lib/dbx", 1, "lib/dbx"),
            ("var/lib/db/a/b", 2, "a/b"),
        ] {
            let (found, below) = tree.root(path.as_bytes()).unwrap();
            assert_eq!(
                rustix::fs::fstat(&found).unwrap().st_ino,
                inodes[root],
                "{path}"
            );
            assert_eq!(below, rest.as_bytes(), "{path}");
        }
        assert_eq!(tree.split(b"var/lib/db"), (&b"var/lib/db"[..], &b"."[..]));
        assert_eq!(tree.split(b""), (&b""[..], &b"."[..]));
        assert_eq!(tree.split(b"var/lib"), (&b"var"[..], &b"lib"[..]));
        assert_eq!(target("").split(b""), (&b""[..], &b""[..]));
        assert_eq!(tree.relative(b"web1:/var/./x").unwrap(), b"var/x");
        assert!(tree.relative(b"web1/var").is_err() && tree.relative(b"web1:/../x").is_err());
        // Nothing stands at the root.
        let rootless = Target::tree(vec![joined("srv")], b"web1:");
        assert_eq!(rootless.root(b"etc").unwrap_err(), Errno::NODEV);
    }

    #[test]
    fn test_paths_stay_below_the_folder() {
        let r = target("/tmp/r");
        assert_eq!(r.relative(b"/tmp/r/a//b/./c/").unwrap(), b"a/b/c");
        assert_eq!(r.relative(b"/tmp/r").unwrap(), b"");
        for path in [
            "/tmp/rx/a",
            "/tmp/r/../a",
            "/etc/passwd",
            "a",
            "/tmp/r/a\0b",
        ] {
            let error = r.relative(path.as_bytes()).unwrap_err();
            assert_eq!(error.code(), Code::RestoreOutside, "{path}");
        }
        assert_eq!(
            target("").relative(b"/@guestsnap/w/etc").unwrap(),
            b"@guestsnap/w/etc"
        );
    }
}
