//! Resolves guest paths as the guest would, and reads files there.

use std::cell::{Cell, RefCell};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RawDir, ResolveFlags};
use rustix::io::Errno;

use super::Join;
use crate::error::escape;
use crate::fs::MountedVolume;
use crate::fs::fstab::{self, Line};
use crate::fs::path::{self, Budget};
use crate::inode::{InodeId, Kind, Meta, proc_path};

/// Inode number of every btrfs subvolume root.
const SUBVOLUME_ROOT: u64 = 256;

const LOOK: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Opens a directory beneath another, O_PATH, without following links.
pub(super) fn open_beneath(
    root: BorrowedFd<'_>,
    path: &[u8],
) -> std::result::Result<OwnedFd, Errno> {
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(root, path, LOOK | OFlags::DIRECTORY, Mode::empty(), how)
}

/// Identity of an open object.
pub(super) fn id(fd: BorrowedFd<'_>) -> std::result::Result<InodeId, Errno> {
    Meta::read(fd, b"", AtFlags::EMPTY_PATH).map(|m| m.id())
}

/// Opens a subvolume's root by path; empty: the top.
pub(super) fn open_subvolume(
    top: BorrowedFd<'_>,
    path: &[u8],
) -> std::result::Result<OwnedFd, Errno> {
    open_beneath(top, if path.is_empty() { b"." } else { path })
}

/// Opens the subvolume that a line names; `None`: it names none.
pub(super) fn open_named(
    volume: &MountedVolume,
    line: &Line,
) -> Option<std::result::Result<OwnedFd, String>> {
    let mount = &volume.mount;
    match (mount.top()?, &line.subvolume, line.subvolume_id) {
        (top, Some(path), _) => {
            Some(open_subvolume(top, path).map_err(|e| format!("subvolume {}: {e}", escape(path))))
        }
        (_, None, Some(number)) => Some(
            mount
                .btrfs_subvolume(number, &volume.identity.name)
                .map_err(|e| e.report()),
        ),
        _ => None,
    }
}

/// Calls a function for each name in a directory until it returns `false`.
pub(super) fn each_name(
    folder: BorrowedFd<'_>,
    mut call: impl FnMut(&[u8]) -> bool,
) -> std::result::Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(folder, c".", flags, Mode::empty())?;
    let mut buffer = vec![MaybeUninit::uninit(); 8192];
    let mut names = RawDir::new(&directory, &mut buffer);
    while let Some(entry) = names.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." && !call(name) {
            break;
        }
    }
    Ok(())
}

/// Opens the root of the subvolume with this name, if it is one.
pub(super) fn subvolume_root(
    top: BorrowedFd<'_>,
    name: &[u8],
) -> std::result::Result<Option<OwnedFd>, Errno> {
    let meta = Meta::read(top, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let is_directory = Kind::from_mode(meta.mode) == Some(Kind::Directory);
    if is_directory && meta.ino == SUBVOLUME_ROOT {
        return open_beneath(top, name).map(Some);
    }
    Ok(None)
}

/// A resolved guest path; O_PATH holds the object.
pub(super) type Resolved = path::Resolved<Arc<OwnedFd>>;

/// The filesystems joined so far.
struct Disk<'a> {
    joins: &'a [Join],
    /// The last object on the path that is no link.
    at: RefCell<Vec<u8>>,
    by_link: Cell<bool>,
}

impl path::Names for Disk<'_> {
    type Object = Arc<OwnedFd>;

    fn look(
        &self,
        folder: &Arc<OwnedFd>,
        name: &[u8],
    ) -> std::result::Result<(Arc<OwnedFd>, Option<Kind>), Errno> {
        let file = rustix::fs::openat(folder, name, LOOK, Mode::empty())?;
        let meta = Meta::read(&file, b"", AtFlags::EMPTY_PATH)?;
        Ok((Arc::new(file), Kind::from_mode(meta.mode)))
    }

    fn target(&self, link: &Arc<OwnedFd>) -> std::result::Result<Vec<u8>, Errno> {
        self.by_link.set(true);
        Ok(rustix::fs::readlinkat(link, c"", Vec::new())?.into_bytes())
    }

    fn joined(&self, path: &[u8]) -> Option<Arc<OwnedFd>> {
        self.at.replace(path.to_vec());
        let join = self.joins.iter().find(|join| join.path == path);
        join?.root.clone()
    }
}

/// Where an unresolvable path ends.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stop {
    pub(super) errno: Errno,
    /// The last directory on the path.
    pub(super) at: Vec<u8>,
    /// Whether a link led there.
    pub(super) by_link: bool,
}

/// Resolves a path as the guest would. (The kernel's RESOLVE_IN_ROOT cannot: these mounts forbid
/// following links, and it ignores the joins.)
pub(super) fn resolve(
    root: BorrowedFd<'_>,
    joins: &[Join],
    path: &[u8],
    budget: &Budget<'_>,
) -> std::result::Result<Resolved, Errno> {
    resolve_or_stop(root, joins, path, budget).map_err(|stop| stop.errno)
}

/// Like `resolve`; the error tells where the path ends.
fn resolve_or_stop(
    root: BorrowedFd<'_>,
    joins: &[Join],
    path: &[u8],
    budget: &Budget<'_>,
) -> std::result::Result<Resolved, Stop> {
    let disk = Disk {
        joins,
        at: RefCell::default(),
        by_link: Cell::new(false),
    };
    let root = open_beneath(root, b".").map(Arc::new);
    let found = root.and_then(|root| path::resolve(&disk, root, path, budget));
    found.map_err(|errno| Stop {
        errno,
        at: disk.at.take(),
        by_link: disk.by_link.get(),
    })
}

/// Why a file is not read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoFile {
    /// No such file.
    Missing(Stop),
    /// Read error.
    Failed(Errno),
}

/// Reads a small regular file of the guest.
pub(super) fn read_file(
    root: BorrowedFd<'_>,
    joins: &[Join],
    path: &[u8],
    budget: &Budget<'_>,
) -> std::result::Result<Vec<u8>, NoFile> {
    let found = resolve_or_stop(root, joins, path, budget).map_err(|stop| match stop.errno {
        Errno::NOENT | Errno::NOTDIR => NoFile::Missing(stop),
        errno => NoFile::Failed(errno),
    })?;
    read(&found).map_err(NoFile::Failed)
}

fn read(found: &Resolved) -> std::result::Result<Vec<u8>, Errno> {
    if found.kind != Some(Kind::Regular) {
        return Err(Errno::INVAL);
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(CWD, proc_path(&found.object), flags, Mode::empty())?;
    // One extra byte, so that the parser notices truncation.
    let mut text = vec![0; fstab::MAX_FILE + 1];
    let mut length = 0;
    while length < text.len() {
        match rustix::io::read(&file, &mut text[length..]) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    text.truncate(length);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::fd::AsFd;
    use std::os::unix::fs::symlink;

    fn resolved(root: &std::path::Path, path: &str) -> std::result::Result<String, Errno> {
        let directory = fs::File::open(root).unwrap();
        let found = resolve(
            directory.as_fd(),
            &[],
            path.as_bytes(),
            &Budget::new(&|| false),
        )?;
        Ok(String::from_utf8(found.path).unwrap())
    }

    #[test]
    fn test_links_never_leave_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("real/etc")).unwrap();
        fs::write(root.join("real/etc/fstab"), "inside").unwrap();
        symlink("/real/etc", root.join("etc")).unwrap();
        symlink("../../../../../../real", root.join("up")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        symlink("/", root.join("top")).unwrap();
        assert_eq!(resolved(root, "etc/fstab").unwrap(), "real/etc/fstab");
        assert_eq!(resolved(root, "up/etc").unwrap(), "real/etc");
        assert_eq!(resolved(root, "top/top/up").unwrap(), "real");
        assert_eq!(resolved(root, "../..").unwrap(), "");
        assert_eq!(resolved(root, "loop").unwrap_err(), Errno::LOOP);
        assert_eq!(resolved(root, "etc/passwd").unwrap_err(), Errno::NOENT);
        assert_eq!(resolved(root, "etc/fstab/x").unwrap_err(), Errno::NOTDIR);
        let directory = fs::File::open(root).unwrap();
        let read = |path: &str| {
            let budget = Budget::new(&|| false);
            read_file(directory.as_fd(), &[], path.as_bytes(), &budget)
        };
        assert_eq!(read("etc/fstab").unwrap(), b"inside");
        let stop = |at: &str, by_link| {
            Err(NoFile::Missing(Stop {
                errno: Errno::NOENT,
                at: at.into(),
                by_link,
            }))
        };
        assert_eq!(read("nothing"), stop("", false));
        symlink("/real/store/x", root.join("out")).unwrap();
        assert_eq!(read("out"), stop("real", true));
        assert_eq!(read("real"), Err(NoFile::Failed(Errno::INVAL)));
    }
}
