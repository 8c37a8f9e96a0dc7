//! Formats volumes, subvolumes and lines for messages.

use rustix::io::Errno;

use crate::error::{Code, Error, escape};
use crate::fs::MountedVolume;
use crate::fs::fstab::{Line, Source};

/// Maximum names shown, and maximum length of each.
const MAX_SHOWN: usize = 8;
const MAX_SHOWN_NAME: usize = 100;

/// Names for a message: the first ones and the number of others.
#[derive(Debug, Default)]
pub(crate) struct Names {
    pub(super) shown: Vec<String>,
    pub(super) more: usize,
}

impl Names {
    pub(crate) fn push(&mut self, name: String) {
        match self.shown.len() {
            MAX_SHOWN.. => self.more += 1,
            _ => self.shown.push(name),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.shown.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.shown.len() + self.more
    }

    pub(super) fn append(&mut self, other: Names) {
        other.shown.into_iter().for_each(|name| self.push(name));
        self.more += other.more;
    }

    pub(crate) fn list(&self, between: &str) -> String {
        let shown = self.shown.join(between);
        match self.more {
            0 => shown,
            more => format!("{shown} and {more} more"),
        }
    }
}

/// Formats a volume or its subvolume.
pub(super) fn describe(volume: &MountedVolume, subvolume: Option<&[u8]>) -> String {
    let name = escape(volume.identity.name.as_bytes());
    match subvolume {
        Some(path) => format!("{name}, subvolume {}", shown_path(path)),
        None => name,
    }
}

/// Formats a subvolume's path from the top.
pub(super) fn shown_path(path: &[u8]) -> String {
    match path.get(..MAX_SHOWN_NAME) {
        _ if path.is_empty() => "the top itself".to_owned(),
        Some(start) => format!("{}…", escape(start)),
        None => escape(path),
    }
}

/// Formats a line.
pub(super) fn shown(line: &Line) -> String {
    let from = match line.source {
        Source::Defined(_) => "definition",
        _ => "fstab",
    };
    format!("{from}: /{} ({})", escape(&line.mount_point), line.source)
}

pub(super) fn in_volume(volume: &MountedVolume, step: &str, cause: Errno) -> Error {
    let name = escape(volume.identity.name.as_bytes());
    Error::new(Code::MountFailed, format!("{name}: {step}")).because(cause)
}
