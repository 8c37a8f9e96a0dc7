//! What the client's administrator leaves out of a guest.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};

use crate::config::client::FilterSettings;
use crate::stream::{Entry, Kind};

/// What a tag file of a cache begins with (<https://bford.info/cachedir/>).
const CACHE_TAG: &[u8] = b"Signature: 8a477f597d28d172789f06886806bc55";

/// The filter of one guest, and what it left out.
#[derive(Debug)]
pub(super) struct Filter {
    settings: FilterSettings,
    /// Objects left out; what is below a directory is not counted.
    pub(super) left_out: u64,
}

impl Filter {
    pub(super) fn new(settings: FilterSettings) -> Filter {
        Filter {
            settings,
            left_out: 0,
        }
    }

    /// Whether this object, and what is below it, is left out by its name. The root never is.
    pub(super) fn names(&mut self, entry: &Entry) -> bool {
        let left_out = !entry.path.is_empty() && self.named(&entry.path);
        self.left_out += u64::from(left_out);
        left_out
    }

    /// What finds out whether a directory is left out because of what is in it; it reads the guest's
    /// disk. `None`: nobody asked for that.
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

/// Whether a directory holds a file that says so. A directory that cannot be looked into is left to the
/// walk, which says what is wrong.
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
