//! Bounded memory of a restore: finished directories, and files with several names.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, CWD, IFlags, Timestamps};
use rustix::io::Errno;

use super::errors::failed;
use super::fences::FENCES;
use super::file::Current;
use crate::error::{Result, escape};
use crate::inode::{InodeId, Meta, proc_path};

/// Maximum bytes for remembering finished directories and files with several names.
const MEMORY: usize = 64 << 20;

/// Cost of a directory: key and value, in a table that has just grown.
const SETTLED: usize = 130;

/// Cost of a file with several names.
const FIRST: usize = 48;

/// State that later objects of a restore need from earlier ones.
#[derive(Debug)]
pub(super) struct Memory {
    /// Directories created on the way to a file; their own attributes are still to come.
    made: HashSet<InodeId>,
    /// Finished directories.
    settled: HashMap<InodeId, Settled>,
    /// Bytes left.
    left: usize,
    /// Number of directories that did not fit.
    forgotten: u64,
    /// Restored files with several names: only these may get another name.
    firsts: HashSet<InodeId>,
}

/// A finished directory: times to restore after each later file, and flags deferred because they
/// would block such files.
#[derive(Debug)]
struct Settled {
    times: Timestamps,
    /// Its path and the deferred flags.
    fences: Option<Box<(Vec<u8>, IFlags)>>,
}

impl Settled {
    fn cost(&self) -> usize {
        let fences = self.fences.as_ref();
        SETTLED + fences.map_or(0, |f| size_of::<(Vec<u8>, IFlags)>() + f.0.len())
    }
}

impl Memory {
    pub(super) fn new() -> Memory {
        Memory {
            made: HashSet::new(),
            settled: HashMap::new(),
            left: MEMORY,
            forgotten: 0,
            firsts: HashSet::new(),
        }
    }

    /// Remembers a directory created on the way to a file.
    pub(super) fn made(&mut self, key: InodeId) {
        self.made.insert(key);
    }

    /// Whether this directory was created on the way and is not yet finished.
    pub(super) fn is_made(&self, existing: &Meta) -> bool {
        self.made.contains(&existing.id())
    }

    /// Remembers a file with several names.
    pub(super) fn first(&mut self, file: &OwnedFd, path: &[u8]) -> Result<()> {
        let made = Meta::read(file, b"", AtFlags::EMPTY_PATH)
            .map_err(|e| failed(path, "stat").because(e))?;
        if let Some(rest) = self.left.checked_sub(FIRST) {
            self.left = rest;
            self.firsts.insert(made.id());
        }
        Ok(())
    }

    /// Whether this restore wrote the file. Without memory, the saved size and time decide.
    pub(super) fn is_ours(&self, source: &Meta, saved: &Meta) -> bool {
        let alike = source.size == saved.size && source.mtime.seconds == saved.mtime.seconds;
        self.firsts.contains(&source.id()) || self.left < FIRST && alike
    }

    /// Remembers a finished directory. Returns the flags deferred to [`super::Restorer::end`].
    pub(super) fn settle(&mut self, current: &mut Current, file: &OwnedFd) -> IFlags {
        let key = match Meta::read(file, b"", AtFlags::EMPTY_PATH) {
            Ok(meta) => meta.id(),
            Err(errno) => {
                current.warn("stat", Some(errno));
                return IFlags::empty();
            }
        };
        self.made.remove(&key);
        if let Some(old) = self.settled.remove(&key) {
            self.left += old.cost();
        }
        let fences = current.saved_flags() & FENCES;
        let settled = Settled {
            times: current.times(),
            fences: (!fences.is_empty()).then(|| Box::new((current.path.clone(), fences))),
        };
        let Some(rest) = self.left.checked_sub(settled.cost()) else {
            self.forgotten += 1;
            return IFlags::empty();
        };
        self.left = rest;
        self.settled.insert(key, settled);
        fences
    }

    /// Restores the times of a finished directory after a new name changed them.
    pub(super) fn times_back(
        &self,
        key: InodeId,
        directory: &OwnedFd,
    ) -> std::result::Result<(), Errno> {
        let Some(Settled { times, .. }) = self.settled.get(&key) else {
            return Ok(());
        };
        rustix::fs::utimensat(CWD, proc_path(directory), times, AtFlags::empty())
    }

    /// Takes the finished directories that have deferred flags.
    pub(super) fn take_fences(
        &mut self,
    ) -> impl Iterator<Item = (InodeId, Vec<u8>, IFlags)> + use<> {
        let settled = std::mem::take(&mut self.settled).into_iter();
        settled.filter_map(|(key, settled)| {
            let (path, fences) = *settled.fences?;
            Some((key, path, fences))
        })
    }

    /// Returns a log line if some directories did not fit.
    pub(super) fn tell(&self, target: &[u8]) -> Option<String> {
        let target = escape(target);
        (self.forgotten > 0).then(|| {
            format!(
                "restore to {target}/: {} folders are more than the {} MiB for it can remember. A file that came \
                 into one of them after the folder itself changed the folder's times, or was refused where the \
                 folder is immutable: restore those folders once more, or in parts",
                self.forgotten,
                MEMORY >> 20
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::MetadataExt;

    use rustix::fs::Mode;

    use super::super::place::READ_DIRECTORY;
    use super::super::testing::{own, put};
    use super::super::{Replace, Request, Restorer, What};
    use super::*;
    use crate::inode::Kind;
    use crate::stream::record::Record;

    #[test]
    fn test_folders_beyond_the_memory_are_counted() {
        let target = tempfile::tempdir().unwrap();
        let top = target.path().as_os_str().as_bytes();
        let at = |name: &str| [top, b"/", name.as_bytes()].concat();
        let mut r = Restorer::new(Some(top)).unwrap();
        r.memory().left = 2 * SETTLED;
        // A repeated directory costs nothing more.
        for folder in ["one", "one", "two", "three", "four"] {
            assert!(put(&mut r, &at(folder), 0o040_700, own()).is_empty());
        }
        for file in ["one/file", "two/file", "three/file", "four/file"] {
            assert!(put(&mut r, &at(file), 0o100_600, own()).is_empty());
        }
        let kept = ["one", "two", "three", "four"].map(|folder| {
            let meta = std::fs::metadata(target.path().join(folder)).unwrap();
            meta.mtime() == 1_000_000_000
        });
        assert_eq!(kept, [true, true, false, false]);
        let told = r.end(|e| panic!("{}", e.report()));
        assert!(told.len() == 1 && told[0].contains("2 folders"), "{told:?}");
    }

    #[test]
    fn test_what_fences_a_folder_waits_while_there_is_memory() {
        let target = tempfile::tempdir().unwrap();
        let file = rustix::fs::open(target.path(), READ_DIRECTORY, Mode::empty()).unwrap();
        let request = Request {
            path: b"/some/folder",
            what: What::Object,
            meta: Meta::default(),
            replace: Replace::Always,
        };
        let mut current = Current::new(&request, Kind::Directory, None, Vec::new());
        current.record = Record {
            flags: Some((FENCES | IFlags::NODUMP).bits()),
            ..Record::default()
        };
        let mut memory = Memory::new();
        assert_eq!(memory.settle(&mut current, &file), FENCES);
        let (left, forgotten) = (memory.left, memory.forgotten);
        assert!(left <= MEMORY - SETTLED - current.path.len() && forgotten == 0);
        // A repeated directory replaces the first.
        assert_eq!(memory.settle(&mut current, &file), FENCES);
        assert_eq!(memory.left, left);
        // Without memory, the flags are set at once and none is deferred.
        memory.left = 0;
        current.path = vec![b'x'; 4000];
        assert_eq!(memory.settle(&mut current, &file), IFlags::empty());
        assert!(memory.settled.is_empty() && memory.forgotten == 1);
    }
}
