//! Reads ahead of the job.
//!
//! One thread walks. Others read the objects it finds: metadata, attributes, the contents of small
//! files. The job takes the results in walk order and rarely waits for the disk. A disk with high
//! latency gets many requests at a time. Large files are only opened here; the consumer reads them.
//!
//! All queued results are counted, and the walk pauses when the budget is used up. The head of the
//! queue may always be read, so the smallest budget is slow but never stuck. Queued directories are
//! limited as well: each holds a descriptor.

mod item;
mod options;
mod queue;
mod reader;
mod worker;

pub use item::{Contents, InMemory, Item, Prepared};
pub use options::AheadOptions;
pub use reader::ReadAhead;
