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

/// The restore folder, held open.
#[derive(Debug)]
pub(super) struct Target {
    root: OwnedFd,
    /// Restore folder as Bacula prefixes it to paths, without a trailing slash.
    prefix: Vec<u8>,
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
            root,
            prefix: prefix.to_vec(),
        })
    }

    /// A new descriptor of the folder itself.
    pub(super) fn root(&self) -> std::result::Result<OwnedFd, Errno> {
        resolve(self.root.as_fd(), b".")
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
        let mut directory = self.root()?;
        let mut rest = relative;
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
pub(super) fn split(relative: &[u8]) -> (&[u8], &[u8]) {
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
            root: rustix::fs::open("/", flags, Mode::empty()).unwrap(),
            prefix: folder.as_bytes().to_vec(),
        }
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
