//! The run of one file: its attributes, its data, and our record of it.

use std::collections::VecDeque;
use std::io;

use super::helper::Helper;
use crate::error::{Error, Result};
use crate::job::aside::Pump;
use crate::job::caller::Step;
use crate::job::item::{FileType, Item};
use crate::stream::HardLinks;
use crate::stream::ahead::{self, Contents};

/// Where the data of a file comes from.
pub(super) enum Source {
    Nothing,
    Read(Contents),
    Pump(Pump),
    Memory(io::Cursor<Vec<u8>>),
}

/// The file that Bacula is being sent.
pub(super) struct FileRun {
    pub(super) item: Item,
    /// The daemon accepted the item as it is.
    accepted: bool,
    /// `None` for a file of ours.
    entry: Option<ahead::Prepared>,
    source: Source,
    /// The records were collected.
    recorded: bool,
    records: VecDeque<Vec<u8>>,
}

impl FileRun {
    /// A file that the daemon accepted just now.
    pub(super) fn accepted(item: Item, entry: Option<ahead::Prepared>, source: Source) -> FileRun {
        FileRun {
            item,
            accepted: true,
            entry,
            source,
            recorded: false,
            records: VecDeque::new(),
        }
    }

    /// A file without data, of which the daemon knows nothing, or something else.
    pub(super) fn other(item: Item, entry: Option<ahead::Prepared>) -> FileRun {
        FileRun {
            accepted: false,
            ..FileRun::accepted(item, entry, Source::Nothing)
        }
    }

    /// The answer to the daemon's request for a file.
    pub(super) fn step(&self) -> Step<'_> {
        match self.accepted {
            true => Step::Accepted(&self.item),
            false => Step::Other(&self.item),
        }
    }

    /// The file's name in the accurate list.
    pub(super) fn path(&self) -> &[u8] {
        self.item.accurate_name().to_bytes()
    }

    /// The next [`FileRun::read`] gives no more than this.
    pub(super) fn at_most(&self) -> usize {
        match &self.source {
            Source::Nothing => 0,
            Source::Read(contents) => contents.at_most(),
            Source::Pump(_) => usize::MAX,
            Source::Memory(data) => data.get_ref().len(),
        }
    }

    /// Data of the file; 0 at its end.
    pub(super) fn read(
        &mut self,
        buffer: &mut [u8],
        stopped: impl Fn() -> bool,
    ) -> io::Result<usize> {
        match &mut self.source {
            Source::Nothing => Ok(0),
            Source::Read(contents) => contents.read(buffer),
            Source::Pump(pump) => pump.read(buffer, stopped),
            Source::Memory(data) => io::Read::read(data, buffer),
        }
    }

    /// Collects the file's records, once. Returns an error for each missing part.
    pub(super) fn collect(&mut self, helper: &mut Helper) -> Result<Vec<Error>> {
        if std::mem::replace(&mut self.recorded, true) {
            return Ok(Vec::new());
        }
        let Some(mut entry) = self.entry.take() else {
            return Ok(Vec::new());
        };
        let collected = if entry.has_attributes() {
            entry.attributes()
        } else {
            // The data are through: Bacula asks for this last.
            self.source = Source::Nothing;
            let collect = move || {
                let collected = entry.attributes();
                (entry, collected)
            };
            let Some((back, collected)) = helper.run(collect, drop)? else {
                return Ok(Vec::new());
            };
            entry = back;
            collected
        };
        self.entry = Some(entry);
        Ok(match collected {
            Ok((record, problems)) => {
                self.records = record.encode().into();
                problems
            }
            Err(error) => vec![error],
        })
    }

    /// The next record that was collected.
    pub(super) fn record(&mut self) -> Option<Vec<u8>> {
        self.records.pop_front()
    }

    /// The file was sent as `file_index`.
    pub(super) fn end(&mut self, file_index: i32, links: &mut HardLinks) {
        self.source = Source::Nothing;
        self.records.clear();
        let entry = self.entry.as_ref();
        if let Some(sent) = entry.filter(|_| self.item.file_type != FileType::HardLink) {
            links.insert(&sent.entry.meta, self.item.name.as_bytes(), file_index);
        }
    }
}
