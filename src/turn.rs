//! Per-name mutual exclusion within this process.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The names being worked on.
#[derive(Debug)]
pub struct Turns {
    busy: Mutex<BTreeSet<String>>,
    freed: Condvar,
}

/// The right to work on a name; released on drop.
#[derive(Debug)]
pub struct Turn {
    turns: &'static Turns,
    name: String,
}

impl Turns {
    /// Creates an empty set.
    pub const fn new() -> Turns {
        Turns {
            busy: Mutex::new(BTreeSet::new()),
            freed: Condvar::new(),
        }
    }

    /// Waits for the turn. A caller that takes several takes them in name order.
    pub fn take(&'static self, name: &str) -> Turn {
        let busy = self
            .freed
            .wait_while(self.busy(), |busy| busy.contains(name));
        self.begin(busy.unwrap_or_else(PoisonError::into_inner), name)
    }

    /// Like `take`, with a time limit; `None`: still taken.
    pub fn take_within(&'static self, name: &str, patience: Duration) -> Option<Turn> {
        let waited = self
            .freed
            .wait_timeout_while(self.busy(), patience, |busy| busy.contains(name));
        let (busy, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        (!waited.timed_out()).then(|| self.begin(busy, name))
    }

    fn begin(&'static self, mut busy: MutexGuard<'_, BTreeSet<String>>, name: &str) -> Turn {
        busy.insert(name.to_owned());
        Turn {
            turns: self,
            name: name.to_owned(),
        }
    }

    fn busy(&self) -> MutexGuard<'_, BTreeSet<String>> {
        // The set is never half changed, so a panic in another thread is harmless.
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turns.busy().remove(&self.name);
        self.turns.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    static TURNS: Turns = Turns::new();

    #[test]
    fn test_one_at_a_time_works_on_a_name() {
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let _turn = TURNS.take("one");
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
    }

    #[test]
    fn test_a_turn_is_waited_for_and_not_for_ever() {
        let other = TURNS.take("two");
        assert!(
            TURNS
                .take_within("two", Duration::from_millis(20))
                .is_none()
        );
        assert!(TURNS.take_within("three", Duration::ZERO).is_some());
        let waits = std::thread::spawn(|| TURNS.take_within("two", Duration::from_secs(20)));
        std::thread::sleep(Duration::from_millis(50));
        drop(other);
        assert!(waits.join().unwrap().is_some());
        assert!(TURNS.take_within("two", Duration::ZERO).is_some());
    }
}
