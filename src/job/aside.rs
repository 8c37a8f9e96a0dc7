//! Work on a guest's disk, on a thread beside the job's.
//!
//! A read from a disk that does not answer cannot be interrupted: not by a signal, not by closing
//! the file. The daemon's thread must be able to give up all the same when the job is cancelled, so
//! it leaves all access to guest disks to another thread, and watches for a cancel while it waits.
//! An abandoned thread continues when the disk answers, and then releases everything it holds.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;

use crate::error::{Code, Error, Result};
use crate::stream::FileReader;

/// How often a cancel is looked at while the job waits.
pub(super) const TICK: Duration = Duration::from_millis(100);
/// How long threads may take to end once the job is cancelled.
const GRACE: Duration = Duration::from_secs(1);
/// Bytes of a file that are handed over at once.
const PIECE: usize = 256 << 10;
/// Pieces that wait to be taken.
const PIECES: usize = 3;

/// The state of work that the job has given up.
const PANICKED: &str = "panic beside a job that is over";

type Task = Box<dyn FnOnce() + Send>;

/// A thread that does one thing after the other. It is started with the first.
#[derive(Debug, Default)]
pub(super) struct Aside {
    running: Option<(Sender<Task>, JoinHandle<()>)>,
}

impl Aside {
    /// Runs the work on the thread and waits for it. `None`: `stopped` came first; the work continues,
    /// and `late` gets its result. A panic of the work is passed to the caller.
    pub(super) fn run<T: Send + 'static>(
        &mut self,
        stopped: impl Fn() -> bool,
        work: impl FnOnce() -> T + Send + 'static,
        late: impl FnOnce(T) + Send + 'static,
    ) -> Result<Option<T>> {
        let (give, take) = channel();
        let waits = Arc::new(Mutex::new(true));
        let waiting = waits.clone();
        self.start(move || {
            let result = catch_unwind(AssertUnwindSafe(work));
            // Held across the send, so a waiter that gives up cannot miss a sent result.
            let waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            match result {
                result if *waiting => {
                    let _ = give.send(result);
                }
                Ok(result) => late(result),
                Err(_) => log::error!("{}", Error::new(Code::Internal, PANICKED).report()),
            }
        })?;
        let result = loop {
            match take.recv_timeout(TICK) {
                Err(RecvTimeoutError::Timeout) if !stopped() => {}
                Err(RecvTimeoutError::Timeout) => {
                    let mut waiting = waits.lock().unwrap_or_else(PoisonError::into_inner);
                    *waiting = false;
                    match take.try_recv() {
                        Ok(result) => break result,
                        Err(_) => return Ok(None),
                    }
                }
                Ok(result) => break result,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::new(
                        Code::Internal,
                        "a thread beside the job is gone",
                    ));
                }
            }
        };
        match result {
            Ok(result) => Ok(Some(result)),
            Err(panic) => resume_unwind(panic),
        }
    }

    fn start(&mut self, work: impl FnOnce() + Send + 'static) -> Result<()> {
        if self.running.is_none() {
            let (give, take) = channel::<Task>();
            let thread = std::thread::Builder::new()
                .name("guestsnap-disk".to_owned())
                .spawn(move || {
                    // The daemon's signals are handled by the daemon's threads.
                    let _ = SigSet::all().thread_block();
                    take.into_iter().for_each(|task| task());
                })
                .map_err(|e| Error::new(Code::Internal, "starting a thread").because(e))?;
            self.running = Some((give, thread));
        }
        let sent = self
            .running
            .as_ref()
            .map(|(give, _)| give.send(Box::new(work)));
        match sent {
            Some(Ok(())) => Ok(()),
            _ => Err(Error::new(
                Code::Internal,
                "a thread beside the job is gone",
            )),
        }
    }

    /// Ends the thread after its current work. Returns its handle.
    pub(super) fn stop(&mut self) -> Option<JoinHandle<()>> {
        self.running.take().map(|(_, thread)| thread)
    }

    /// Reads a file ahead of the caller.
    pub(super) fn pump(&mut self, mut file: FileReader) -> Result<Pump> {
        let (give, take) = sync_channel(PIECES);
        let (give_back, empty) = channel();
        self.start(move || fill(&mut file, &give, &empty))?;
        Ok(Pump {
            take,
            give_back,
            data: Vec::new(),
            position: 0,
            hole: 0,
            ended: false,
        })
    }
}

/// Waits for threads to end, but not much longer than until `stopped`; those that have not.
pub(crate) fn join(
    threads: Vec<JoinHandle<()>>,
    stopped: impl Fn() -> bool,
) -> Vec<JoinHandle<()>> {
    let mut deadline = None;
    let mut left = threads;
    let mut wait = Duration::from_micros(100);
    loop {
        let mut busy = Vec::new();
        for thread in left {
            if thread.is_finished() {
                // The work has reported a panic already.
                let _ = thread.join();
            } else {
                busy.push(thread);
            }
        }
        left = busy;
        if deadline.is_none() && stopped() {
            deadline = Some(Instant::now() + GRACE);
        }
        if left.is_empty() || deadline.is_some_and(|end| Instant::now() >= end) {
            return left;
        }
        sleep(wait);
        wait = (wait * 2).min(Duration::from_millis(20));
    }
}

/// A part of a file.
#[derive(Debug)]
enum Piece {
    Data(Vec<u8>),
    Hole(u64),
    End,
}

/// Reads to the end, to an error, or until the receiver is gone.
fn fill(file: &mut FileReader, give: &SyncSender<io::Result<Piece>>, empty: &Receiver<Vec<u8>>) {
    loop {
        let piece = next_piece(file, empty);
        let last = !matches!(piece, Ok(Piece::Data(_) | Piece::Hole(_)));
        if give.send(piece).is_err() || last {
            return;
        }
    }
}

fn next_piece(file: &mut FileReader, empty: &Receiver<Vec<u8>>) -> io::Result<Piece> {
    match file.skip_hole()? {
        0 => {}
        length => return Ok(Piece::Hole(length)),
    }
    let mut data = empty.try_recv().unwrap_or_default();
    data.resize(PIECE, 0);
    let length = file.read(&mut data)?;
    data.truncate(length);
    Ok(match length {
        0 => Piece::End,
        _ => Piece::Data(data),
    })
}

/// The taking end of a file that is read by another thread.
#[derive(Debug)]
pub(super) struct Pump {
    take: Receiver<io::Result<Piece>>,
    give_back: Sender<Vec<u8>>,
    data: Vec<u8>,
    position: usize,
    hole: u64,
    ended: bool,
}

impl Pump {
    /// Reads on. 0: the end.
    pub(super) fn read(
        &mut self,
        buffer: &mut [u8],
        stopped: impl Fn() -> bool,
    ) -> io::Result<usize> {
        loop {
            if self.hole > 0 {
                let length =
                    usize::try_from(self.hole).map_or(buffer.len(), |n| n.min(buffer.len()));
                buffer[..length].fill(0);
                self.hole -= length as u64;
                return Ok(length);
            }
            let rest = &self.data[self.position..];
            if !rest.is_empty() {
                let length = rest.len().min(buffer.len());
                buffer[..length].copy_from_slice(&rest[..length]);
                self.position += length;
                return Ok(length);
            }
            if self.ended {
                return Ok(0);
            }
            let piece = loop {
                match self.take.recv_timeout(TICK) {
                    Ok(piece) => break piece,
                    Err(RecvTimeoutError::Timeout) if stopped() => {
                        return Err(io::Error::from_raw_os_error(libc::ECANCELED));
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    // It ended without a word: it panicked.
                    Err(RecvTimeoutError::Disconnected) => {
                        break Err(io::ErrorKind::BrokenPipe.into());
                    }
                }
            };
            self.position = 0;
            match piece {
                Ok(Piece::Data(data)) => {
                    let empty = std::mem::replace(&mut self.data, data);
                    // At the end of the file the receiver may be gone.
                    let _ = self.give_back.send(empty);
                }
                Ok(Piece::Hole(length)) => {
                    self.data.clear();
                    self.hole = length;
                }
                Ok(Piece::End) => {
                    self.data.clear();
                    self.ended = true;
                }
                Err(error) => {
                    self.data.clear();
                    self.ended = true;
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn test_work_that_does_not_end_is_given_up_and_its_result_is_late() {
        let (came, gate) = (Arc::new(AtomicBool::new(false)), Arc::new(Barrier::new(2)));
        let mut aside = Aside::default();
        assert_eq!(aside.run(|| true, || 7, |_| ()).unwrap(), Some(7));
        let (late, inside) = (came.clone(), gate.clone());
        let started = Instant::now();
        let given_up = aside.run(
            || true,
            move || {
                inside.wait();
                8
            },
            move |result| late.store(result == 8, Ordering::SeqCst),
        );
        assert!(given_up.unwrap().is_none());
        let stuck = join(aside.stop().into_iter().collect(), || true);
        assert_eq!(stuck.len(), 1);
        assert!(started.elapsed() < Duration::from_secs(2));
        assert!(!came.load(Ordering::SeqCst));
        gate.wait();
        assert!(join(stuck, || false).is_empty());
        assert!(came.load(Ordering::SeqCst));
    }

    #[test]
    fn test_a_panic_of_the_work_is_the_callers() {
        let mut aside = Aside::default();
        let caught = catch_unwind(AssertUnwindSafe(|| {
            aside.run(|| false, || panic!("inside"), |()| ())
        }));
        assert!(caught.is_err());
        assert_eq!(aside.run(|| false, || 1, |_| ()).unwrap(), Some(1));
        assert!(join(aside.stop().into_iter().collect(), || false).is_empty());
    }
}
