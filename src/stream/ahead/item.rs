//! Results, with the data read ahead.

use std::io;

use crate::error::{Code, Error, Result, escape};
use crate::stream::content::FileReader;
use crate::stream::entry::Entry;
use crate::stream::record::Record;
use crate::stream::walk::{self, LeftOut, Problem};
use crate::stream::xattrs;

/// Cost of an entry besides its path and contents.
const ENTRY_COST: usize = 900;

/// Files up to this size are read whole, if they fit into a quarter of the budget.
pub(super) const SMALL_FILE: usize = 128 << 10;

/// A result of the walk, like [`walk::Item`], with the data read ahead.
#[derive(Debug)]
pub enum Item {
    /// A directory that will be walked next, unless
    /// [`ReadAhead::leave_out`](super::ReadAhead::leave_out) is called now.
    Begin(Entry),
    /// An object that is not a directory.
    Object(Prepared),
    /// A directory whose content has been given.
    End(Prepared),
    /// A read error. The walk continues.
    Problem(Problem),
    /// A subvolume left out by policy.
    LeftOut(LeftOut),
}

impl From<walk::Item> for Item {
    fn from(item: walk::Item) -> Item {
        match item {
            walk::Item::Begin(entry) => Item::Begin(entry),
            walk::Item::Object(entry) => Item::Object(Prepared::new(entry)),
            walk::Item::End(entry) => Item::End(Prepared::new(entry)),
            walk::Item::Problem(problem) => Item::Problem(problem),
            walk::Item::LeftOut(left_out) => Item::LeftOut(left_out),
        }
    }
}

/// An entry and the data read ahead for it.
#[derive(Debug)]
pub struct Prepared {
    /// The entry.
    pub entry: Entry,
    pub(super) attributes: Option<Result<(Record, Vec<Error>)>>,
    pub(super) contents: Option<Result<Contents>>,
}

impl Prepared {
    /// Wraps an entry without reading anything.
    pub fn new(entry: Entry) -> Prepared {
        Prepared {
            entry,
            attributes: None,
            contents: None,
        }
    }

    /// Whether the contents, or the error for them, are present.
    pub fn has_contents(&self) -> bool {
        self.contents.is_some()
    }

    /// Whether the attributes, or the error for them, are present.
    pub fn has_attributes(&self) -> bool {
        self.attributes.is_some()
    }

    /// Opens the contents of a regular file, or takes those of a small one; once only.
    pub fn contents(&mut self) -> Result<Contents> {
        if let Some(contents) = self.contents.take() {
            return contents;
        }
        let mut reader = FileReader::open(&self.entry)?;
        Ok(match usize::try_from(reader.size()) {
            Ok(size) if size <= SMALL_FILE => Contents::Memory(InMemory::read(&mut reader, size)),
            _ => Contents::File(reader),
        })
    }

    /// Returns our record and the problems in reading it; once only.
    pub fn attributes(&mut self) -> Result<(Record, Vec<Error>)> {
        match self.attributes.take() {
            Some(attributes) => attributes,
            None => xattrs::collect(&self.entry, None),
        }
    }

    pub(super) fn cost(&self) -> usize {
        let attributes = match &self.attributes {
            Some(Ok((record, _))) => record.xattrs.iter().map(|(n, v)| n.len() + v.len()).sum(),
            _ => 0,
        };
        let link = self.entry.link.as_ref().map_or(0, Vec::len);
        attributes + link + cost_of(&self.entry.path)
    }
}

pub(super) fn cost_of(path: &[u8]) -> usize {
    ENTRY_COST + path.len()
}

/// Contents of a regular file.
#[derive(Debug)]
pub enum Contents {
    /// Read ahead.
    Memory(InMemory),
    /// Open, to be read now.
    File(FileReader),
}

/// Contents of a small file. A read error follows the data read before it.
#[derive(Debug)]
pub struct InMemory {
    data: Vec<u8>,
    position: usize,
    error: Option<io::Error>,
}

impl Contents {
    /// Maximum bytes that the next read returns.
    pub fn at_most(&self) -> usize {
        match self {
            Contents::File(_) => usize::MAX,
            Contents::Memory(memory) => memory.data.len() - memory.position,
        }
    }

    /// Reads the next bytes; 0 at the end.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let memory = match self {
            Contents::File(file) => return file.read(buffer),
            Contents::Memory(memory) => memory,
        };
        let rest = &memory.data[memory.position..];
        if rest.is_empty() {
            return match memory.error.take() {
                Some(error) => Err(error),
                None => Ok(0),
            };
        }
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        memory.position += length;
        Ok(length)
    }
}

impl InMemory {
    pub(super) fn read(reader: &mut FileReader, size: usize) -> InMemory {
        let mut data = vec![0; size];
        let mut length = 0;
        let mut error = None;
        while length < size {
            match reader.read(&mut data[length..]) {
                Ok(0) => break,
                Ok(more) => length += more,
                Err(e) => {
                    error = Some(e);
                    break;
                }
            }
        }
        data.truncate(length);
        InMemory {
            data,
            position: 0,
            error,
        }
    }

    /// Returns an error if the contents are incomplete.
    pub(crate) fn whole(&mut self, entry: &Entry) -> Result<()> {
        self.error.take().map_or(Ok(()), |error| {
            let path = escape(&entry.path);
            Err(Error::new(Code::ReadFailed, format!("/{path}: read")).because(error))
        })
    }
}
