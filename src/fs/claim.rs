//! Serialises access to btrfs filesystems that share an id.
//!
//! Guests cloned from one image share btrfs ids. Kernels before 6.7 accept one device per id, and
//! all kernels accept one device set per id, so jobs take turns. A job claims all filesystems of a
//! guest at once and opens one guest at a time. It never waits while holding a claim, so there is
//! no deadlock.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::{Filesystem, compat};
use crate::error::{Code, Error, Result};

/// Interval at which a waiting job checks for cancellation.
const TICK: Duration = Duration::from_millis(250);

static CLAIMED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
static FREED: Condvar = Condvar::new();

/// The right to mount certain btrfs filesystems; released on drop. Drop it after the unmount.
#[derive(Debug)]
pub struct Claim(BTreeSet<String>);

/// Claims those btrfs filesystems that need it. While another job holds one, calls `waiting`
/// repeatedly; `true` aborts the wait.
pub fn claim<'a>(
    filesystems: impl IntoIterator<Item = &'a Filesystem>,
    waiting: &mut dyn FnMut() -> bool,
) -> Result<Claim> {
    let apart = compat::btrfs_has_temp_fsid();
    let btrfs = filesystems.into_iter();
    let btrfs = btrfs.filter(|f| f.fstype == "btrfs" && (f.several || !apart));
    wait_for(btrfs.filter_map(|f| f.uuid.clone()).collect(), waiting)
}

fn wait_for(wanted: BTreeSet<String>, waiting: &mut dyn FnMut() -> bool) -> Result<Claim> {
    let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
    while !claimed.is_disjoint(&wanted) {
        if waiting() {
            return Err(Error::new(
                Code::Cancelled,
                "while another job had a btrfs with the same id",
            ));
        }
        (claimed, _) = FREED
            .wait_timeout(claimed, TICK)
            .unwrap_or_else(PoisonError::into_inner);
    }
    claimed.extend(wanted.iter().cloned());
    Ok(Claim(wanted))
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
        claimed.retain(|id| !self.0.contains(id));
        drop(claimed);
        FREED.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_one_after_the_other() {
        let ids = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect();
        let first = wait_for(ids(&["a", "b"]), &mut || true).unwrap();
        let other = wait_for(ids(&["c"]), &mut || true).unwrap();
        let error = wait_for(ids(&["b", "d"]), &mut || true).unwrap_err();
        assert_eq!(error.code(), Code::Cancelled);
        let waiter = std::thread::spawn(move || {
            let mut waited = false;
            let both: BTreeSet<String> = ["b".to_owned(), "c".to_owned()].into();
            wait_for(both, &mut || {
                waited = true;
                false
            })
            .map(|_| waited)
        });
        std::thread::sleep(TICK);
        drop(first);
        drop(other);
        assert!(waiter.join().unwrap().unwrap());
    }
}
