//! The queue of results between the threads and the job. A slot holds an object's work, then its result.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::item::{Item, Prepared};
use crate::error::Result;
use crate::stream::content::FileReader;
use crate::stream::entry::Entry;
use crate::stream::walk::{Problem, Unread};

/// Maximum queued directory begin/end markers. Also bounds the queue's open directories: those
/// entered since the next result, and those on the way back.
pub(super) const MAX_DIRECTORIES: usize = 96;

/// Maximum queued results.
pub(super) const MAX_WAITING: usize = 8192;

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) slots: VecDeque<Slot>,
    /// Number of the first slot.
    pub(super) first: u64,
    /// First slot that may still have to be read.
    next_work: u64,
    pub(super) used: usize,
    /// Directory begin/end markers among the slots.
    pub(super) directories: usize,
    /// Readers waiting for room.
    pub(super) waiting: usize,
    /// Whether the walk waits for room.
    pub(super) walk_waits: bool,
    /// Readers waiting for work.
    pub(super) idle: usize,
    /// Whether the job waits for the head of the queue.
    pub(super) wanted: bool,
    pub(super) soon: VecDeque<(Arc<OwnedFd>, Vec<u8>)>,
    /// Directories that the job leaves out and the walk may still be in.
    pub(super) left_out: Vec<u64>,
    pub(super) walked: bool,
    pub(super) stop: bool,
    pub(super) failed: bool,
}

#[derive(Debug)]
pub(super) struct Slot {
    pub(super) cost: usize,
    pub(super) content: SlotContent,
}

#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "a box more would be an allocation more per object"
)]
pub(super) enum SlotContent {
    ToRead(Work),
    Reading,
    Ready(Box<Output>),
}

pub(super) fn ready(output: Output) -> SlotContent {
    SlotContent::Ready(Box::new(output))
}

#[derive(Debug)]
pub(super) enum Work {
    Object(Unread),
    Entry(Entry),
    End(u64, Entry),
}

/// An object between opening and reading.
#[derive(Debug)]
pub(super) enum Opened {
    Problem(Problem),
    /// Not a regular file, or not read ahead.
    Entry(Entry),
    File(Entry, Result<FileReader>),
    End(u64, Entry),
}

#[derive(Debug)]
pub(super) enum Output {
    Item(Item),
    Begin(u64, Entry),
    End(u64, Prepared),
    /// End of a directory that is left out.
    Gone(u64),
    /// A thread has failed, so results are missing.
    Failed,
}

impl State {
    /// Takes a fair share of the queued work.
    pub(super) fn take_work(&mut self, threads: usize, most: usize, batch: &mut Vec<(u64, Work)>) {
        self.next_work = self.next_work.max(self.first);
        let end = self.first + self.slots.len() as u64;
        let waiting = usize::try_from(end - self.next_work).unwrap_or(usize::MAX);
        let share = (waiting / threads.max(1)).clamp(1, most);
        while batch.len() < share && self.next_work < end {
            let number = self.next_work;
            self.next_work += 1;
            let Some(slot) = usize::try_from(number - self.first)
                .ok()
                .and_then(|index| self.slots.get_mut(index))
            else {
                return;
            };
            if let SlotContent::ToRead(_) = slot.content {
                let content = std::mem::replace(&mut slot.content, SlotContent::Reading);
                if let SlotContent::ToRead(work) = content {
                    batch.push((number, work));
                }
            }
        }
    }

    /// Stores a result in its slot. [`reserve`](super::worker::Shared::reserve) has already counted
    /// its contents; its attributes are counted now.
    pub(super) fn finish(&mut self, number: u64, output: Output, extra: usize) {
        let cost = match &output {
            Output::Item(Item::Object(prepared)) | Output::End(_, prepared) => prepared.cost(),
            _ => 0,
        };
        let Some(index) = number
            .checked_sub(self.first)
            .and_then(|n| usize::try_from(n).ok())
        else {
            return;
        };
        if let Some(slot) = self.slots.get_mut(index) {
            let before = slot.cost;
            slot.cost = before.max(cost) + extra;
            self.used += slot.cost - before - extra;
            slot.content = ready(output);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inode::{Kind, Meta};
    use crate::stream::ahead::item::cost_of;
    use crate::stream::entry::Place;
    use crate::stream::record::Record;

    #[test]
    fn test_targets_and_attributes_count_as_memory() {
        let link = |target: &[u8]| {
            Prepared::new(Entry {
                path: b"link".to_vec(),
                kind: Kind::Symlink,
                meta: Meta::default(),
                link: Some(target.to_vec()),
                incomplete: false,
                place: Place::Nowhere,
            })
        };
        let mut prepared = link(&[b'x'; 4000]);
        assert_eq!(prepared.cost(), link(b"").cost() + 4000);
        // The actual cost replaces the estimate once the object is looked up.
        let mut state = State {
            used: cost_of(b"link"),
            ..State::default()
        };
        state.slots.push_back(Slot {
            cost: state.used,
            content: SlotContent::Reading,
        });
        let record = Record {
            xattrs: vec![(b"user.x".to_vec(), vec![0; 94])],
            ..Record::default()
        };
        prepared.attributes = Some(Ok((record, Vec::new())));
        state.finish(0, Output::Item(Item::Object(prepared)), 0);
        assert_eq!(state.used, cost_of(b"link") + 4000 + 100);
    }
}
