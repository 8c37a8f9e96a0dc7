//! Counters and messages of one guest.

use std::time::Instant;

use super::desk::Desk;
use crate::config::defaults;
use crate::error::{Code, Error, Result, escape, shorten};
use crate::job::caller::Importance;
use crate::job::text::size_text;
use crate::stream::Entry;

/// Bytes of messages about single files of one guest; the rest is counted. A guest may be made so that
/// every name in it is worth a message, of a long path.
const MAX_TOLD: usize = 256 << 10;

/// Counts files, bytes and errors of a guest, and bounds its messages.
pub(super) struct Tally {
    name: String,
    desk: Desk,
    pub(super) started: Instant,
    pub(super) files: u64,
    pub(super) bytes: u64,
    pub(super) errors: u64,
    pub(super) sockets: u64,
    /// Bytes of the messages that were given.
    told: usize,
    /// Messages that were not given any more: errors, and others.
    untold: (u64, u64),
}

impl Tally {
    /// `errors`: those reported so far, of its quiescing, snapshots, disks and volumes.
    pub(super) fn new(name: &str, errors: u64, desk: &Desk) -> Tally {
        Tally {
            name: name.to_owned(),
            desk: desk.clone(),
            started: Instant::now(),
            files: 0,
            bytes: 0,
            errors,
            sockets: 0,
            told: 0,
            untold: (0, 0),
        }
    }

    /// A message about something in the guest. There may be any number: see [`MAX_TOLD`].
    pub(super) fn tell(&mut self, importance: Importance, text: &str) {
        if self.told <= MAX_TOLD {
            let text = format!("{}: {}", self.name, shorten(text));
            self.told += text.len();
            self.desk.message(importance, &text);
        } else if importance >= Importance::Error {
            self.untold.0 += 1;
        } else {
            self.untold.1 += 1;
        }
    }

    /// Counts an error and reports it.
    pub(super) fn error(&mut self, error: &Error) {
        self.errors += 1;
        self.tell(Importance::Error, &error.report());
    }

    /// Reports how many messages were not given.
    pub(super) fn tell_untold(&self) {
        let (errors, others) = self.untold;
        for (count, importance, what) in [
            (errors, Importance::Error, "errors"),
            (others, Importance::Info, "messages"),
        ] {
            if count > 0 {
                let name = &self.name;
                let text = format!("{name}: {count} more {what} that are not shown here");
                self.desk.message(importance, &text);
            }
        }
    }

    /// Reports that the guest is still being read.
    pub(super) fn tell_progress(&self) {
        let text = format!(
            "{}: {} files, {}, still running",
            self.name,
            self.files,
            size_text(self.bytes)
        );
        self.desk.message(Importance::Info, &text);
    }
}

/// Bytes of holes that the daemon was promised of one guest, as zeros.
pub(super) struct Holes {
    promised: u64,
    most: u64,
}

impl Holes {
    /// `most`: the client file's limit.
    pub(super) fn new(most: Option<u64>) -> Holes {
        Holes {
            promised: 0,
            most: most.unwrap_or(defaults::HOLES),
        }
    }

    /// Counts a file's holes, as long as there are not too many.
    pub(super) fn take(&mut self, entry: &Entry) -> Result<()> {
        let (size, data) = (entry.meta.size, entry.meta.blocks.saturating_mul(512));
        let holes = self.promised.saturating_add(size.saturating_sub(data));
        if holes > self.most {
            let text = format!(
                "/{}: a file of {} with {} of data; of holes {} are delivered",
                escape(&entry.path),
                size_text(size),
                size_text(data),
                size_text(self.most),
            );
            return Err(Error::new(Code::TooManyHoles, text));
        }
        self.promised = holes;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::job::caller::{CancelFlag, Reporter};

    #[derive(Default)]
    struct Told(Mutex<Vec<String>>);

    impl Reporter for Told {
        fn message(&self, _: Importance, message: &str) {
            self.0.lock().unwrap().push(message.into());
        }

        fn cancelled(&self) -> bool {
            false
        }
    }

    #[test]
    fn test_messages_beyond_the_bound_are_counted() {
        let told = Arc::new(Told::default());
        let desk = Desk::new(told.clone(), CancelFlag::default());
        let mut tally = Tally::new("web", 0, &desk);
        let text = "x".repeat(128);
        let files = MAX_TOLD / text.len();
        for _ in 0..files {
            tally.error(&Error::new(Code::ReadFailed, text.as_str()));
            tally.tell(Importance::Info, &text);
        }
        tally.tell_untold();
        let told = told.0.lock().unwrap();
        let bytes: usize = told.iter().map(String::len).sum();
        assert!(bytes < MAX_TOLD + 2048, "{bytes}");
        assert_eq!(tally.errors, files as u64);
        let last = &told[told.len() - 2..];
        let (errors, others) = tally.untold;
        assert!(errors > 0 && others > 0);
        assert_eq!(
            last,
            [
                format!("web: {errors} more errors that are not shown here"),
                format!("web: {others} more messages that are not shown here"),
            ]
        );
        assert_eq!(told.len() as u64 + errors + others, 2 * files as u64 + 2);
    }
}
