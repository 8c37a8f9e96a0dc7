//! The job's end of the queue.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::SigSet;

use super::item::{Item, SMALL_FILE};
use super::options::AheadOptions;
use super::queue::{MAX_DIRECTORIES, MAX_WAITING, Output, Slot, SlotContent};
use super::worker::{Shared, batch};
use crate::error::{Code, Error, Result};
use crate::fs::GuestTree;
use crate::stream::walk::{Problem, WalkOptions, Walker};

/// Number of results the job takes under one lock.
const AT_ONCE: usize = 32;

/// Interval at which a waiting job checks whether it was stopped.
const LOOK: Duration = Duration::from_millis(100);

/// A walk with read-ahead threads. Dropping it ends them.
#[derive(Debug)]
pub struct ReadAhead {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Taken from the queue but not yet returned.
    taken: VecDeque<Taken>,
    /// Cost of the results returned since the lock was last held.
    given: usize,
    /// Directory announced by the last item.
    announced: Option<u64>,
    /// Directory whose content is being left out.
    leaving_out: Option<u64>,
}

/// A result taken from the queue. Its cost counts until it is returned.
#[derive(Debug)]
struct Taken {
    output: Box<Output>,
    cost: usize,
}

impl ReadAhead {
    /// Starts the threads. One for the walk and one reader suffice.
    pub fn start(tree: &GuestTree, walk: WalkOptions, options: AheadOptions) -> Result<ReadAhead> {
        let walker = Walker::new(tree, walk);
        let readers = options.threads.max(1);
        let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            ready: Condvar::new(),
            room: Condvar::new(),
            small_file: SMALL_FILE.min(options.budget / 4),
            batch: batch(readers, descriptors),
            options,
        });
        let mut ahead = ReadAhead {
            shared: shared.clone(),
            threads: Vec::new(),
            taken: VecDeque::with_capacity(AT_ONCE),
            given: 0,
            announced: None,
            leaving_out: None,
        };
        let walking = shared.clone();
        ahead.spawn("guestsnap-walk", move || {
            walking.run(|| walking.walk(walker))
        })?;
        for number in 0..readers {
            let reading = shared.clone();
            let started = ahead.spawn("guestsnap-read", move || reading.run(|| reading.read()));
            match started {
                Ok(()) => {}
                Err(error) if number == 0 => return Err(error),
                Err(error) => {
                    log::warn!("{number} threads read instead of {readers}: {error}");
                    break;
                }
            }
        }
        Ok(ahead)
    }

    /// On an error, dropping `self` ends the threads already started.
    fn spawn(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(256 << 10)
            .spawn(|| {
                // The daemon's own threads handle its signals.
                let _ = SigSet::all().thread_block();
                body();
            })
            .map_err(|e| Error::new(Code::Internal, "starting a thread").because(e))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Leaves out the directory announced by the last item, with its content.
    pub fn leave_out(&mut self) {
        if let Some(number) = self.announced.take() {
            self.leaving_out = Some(number);
            self.shared.lock().left_out.push(number);
        }
    }

    /// Stops the walk. The returned threads end after their current system calls.
    pub fn stop(mut self) -> Vec<JoinHandle<()>> {
        self.shared.lock().stop = true;
        self.shared.wake_all();
        std::mem::take(&mut self.threads)
    }

    /// Like [`Iterator::next`], but stops waiting once `stopped`.
    pub fn next_unless(&mut self, stopped: impl Fn() -> bool) -> Option<Item> {
        self.announced = None;
        loop {
            let output = self.take_output(&stopped)?;
            if let Output::Failed = output {
                // Even within a directory that is left out.
                self.leaving_out = None;
                return Some(Item::Problem(Problem {
                    path: Vec::new(),
                    subtree: true,
                    error: Error::new(Code::Internal, "a thread that reads ahead has failed"),
                }));
            }
            if let Some(number) = self.leaving_out {
                match output {
                    Output::End(n, _) | Output::Gone(n) if n == number => self.leaving_out = None,
                    _ => {}
                }
                continue;
            }
            match output {
                Output::Item(item) => return Some(item),
                Output::Begin(number, entry) => {
                    self.announced = Some(number);
                    return Some(Item::Begin(entry));
                }
                Output::End(_, prepared) => return Some(Item::End(prepared)),
                Output::Gone(_) | Output::Failed => {}
            }
        }
    }

    /// Returns the next result.
    fn take_output(&mut self, stopped: impl Fn() -> bool) -> Option<Output> {
        if self.taken.is_empty() {
            self.take_some(stopped);
        }
        let Taken { output, cost } = self.taken.pop_front()?;
        self.given += cost;
        Some(*output)
    }

    /// Takes the results ready at the head of the queue, up to [`AT_ONCE`]. Empty: no more results.
    fn take_some(&mut self, stopped: impl Fn() -> bool) {
        let mut state = self.shared.lock();
        state.used -= std::mem::take(&mut self.given);
        loop {
            if state.failed {
                state.failed = false;
                let output = Box::new(Output::Failed);
                self.taken.push_back(Taken { output, cost: 0 });
                return;
            }
            if state.stop || (state.walked && state.slots.is_empty()) {
                return;
            }
            while self.taken.len() < AT_ONCE {
                let Some(Slot {
                    content: SlotContent::Ready(_),
                    ..
                }) = state.slots.front()
                else {
                    break;
                };
                let Some(Slot { cost, content }) = state.slots.pop_front() else {
                    break;
                };
                state.first += 1;
                let SlotContent::Ready(output) = content else {
                    break;
                };
                let directory = matches!(*output, Output::Begin(..) | Output::End(..));
                state.directories -= usize::from(directory);
                self.taken.push_back(Taken { output, cost });
            }
            // Wake the walk only when there is room for several results.
            let room = state.used <= self.shared.options.budget / 4 * 3
                && state.slots.len() <= MAX_WAITING / 4 * 3
                && state.directories <= MAX_DIRECTORIES / 4 * 3;
            if state.waiting > 0 || (state.walk_waits && (room || state.slots.is_empty())) {
                self.shared.room.notify_all();
            }
            if !self.taken.is_empty() {
                return;
            }
            state.wanted = true;
            let (locked, timeout) = self
                .shared
                .ready
                .wait_timeout(state, LOOK)
                .unwrap_or_else(|e| e.into_inner());
            state = locked;
            state.wanted = false;
            if timeout.timed_out() && stopped() {
                return;
            }
        }
    }
}

impl Iterator for ReadAhead {
    type Item = Item;

    fn next(&mut self) -> Option<Item> {
        self.next_unless(|| false)
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake_all();
        for thread in self.threads.drain(..) {
            // Panics were caught inside and reported through the walk.
            let _ = thread.join();
        }
    }
}
