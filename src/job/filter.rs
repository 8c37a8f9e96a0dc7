//! Exclusions of the client's administrator.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};

use crate::config::client::FilterSettings;
use crate::inode::Kind;
use crate::stream::Entry;

/// The first bytes of a cache directory tag (<https://bford.info/cachedir/>).
const CACHE_TAG: &[u8] = b"Signature: 8a477f597d28d172789f06886806bc55";

/// Exclusion filter of one guest, with the count of excluded objects.
#[derive(Debug)]
pub(super) struct Filter {
    settings: FilterSettings,
    /// Number of excluded objects. Objects below an excluded directory are not counted.
    pub(super) left_out: u64,
}

impl Filter {
    pub(super) fn new(settings: FilterSettings) -> Filter {
        Filter {
            settings,
            left_out: 0,
        }
    }

    /// Whether the name excludes this object and everything below it. The root is never excluded.
    pub(super) fn names(&mut self, entry: &Entry) -> bool {
        let left_out = !entry.path.is_empty() && self.named(&entry.path);
        self.left_out += u64::from(left_out);
        left_out
    }

    /// Decides whether the contents of a directory exclude it; reads the guest's
    /// disk. `None`: no such rule is set.
    pub(super) fn look(&self, entry: &Entry) -> Option<impl FnOnce() -> bool + Send + use<>> {
        let settings = &self.settings;
        if entry.path.is_empty()
            || (settings.skip_dirs_containing.is_empty() && !settings.skip_caches)
        {
            return None;
        }
        let (entry, settings) = (entry.clone(), settings.clone());
        Some(move || marked(&settings, &entry).unwrap_or(false))
    }

    /// Whether this file is too large; then the limit.
    pub(super) fn too_large(&mut self, entry: &Entry) -> Option<u64> {
        let limit = self.settings.max_file_size?;
        let over = entry.kind == Kind::Regular && entry.meta.size > limit;
        self.left_out += u64::from(over);
        over.then_some(limit)
    }

    fn named(&self, path: &[u8]) -> bool {
        if self.settings.skip.is_empty() {
            return false;
        }
        let absolute = [b"/", path].concat();
        let absolute = OsStr::from_bytes(&absolute);
        self.settings.skip.iter().any(|p| p.matches(absolute))
    }
}

/// Whether a directory contains an exclusion marker. The walk reports a directory that cannot be opened.
fn marked(settings: &FilterSettings, entry: &Entry) -> rustix::io::Result<bool> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK;
    let Some(directory) = entry.open(flags)? else {
        return Ok(false);
    };
    let holds = |name: &String| {
        rustix::fs::statat(&directory, name.as_str(), AtFlags::SYMLINK_NOFOLLOW).is_ok()
    };
    if settings.skip_dirs_containing.iter().any(holds) {
        return Ok(true);
    }
    Ok(settings.skip_caches && is_cache(directory).unwrap_or(false))
}

fn is_cache(directory: impl AsFd) -> rustix::io::Result<bool> {
    let flags =
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    // Looked at first: to open a device would be to touch it.
    let found = rustix::fs::statat(&directory, c"CACHEDIR.TAG", AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
        return Ok(false);
    }
    let tag = rustix::fs::openat(&directory, c"CACHEDIR.TAG", flags, Mode::empty())?;
    let mut start = [0; CACHE_TAG.len()];
    let length = rustix::io::pread(&tag, &mut start, 0)?;
    Ok(start[..length] == *CACHE_TAG)
}
