//! Whose turn it is with a btrfs that several guests have.
//!
//! Guests made from one image have btrfs filesystems with one id. Kernels before 6.7 know only one
//! device by that id, so that two jobs take turns there. One guest's filesystems are claimed all
//! at once, and a job has one guest open at a time: nobody waits for another while he holds something.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::{Filesystem, compat};
use crate::error::{Code, Error, Result};

/// How often a waiting job looks whether it was cancelled.
const TICK: Duration = Duration::from_millis(250);

static CLAIMED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
static FREED: Condvar = Condvar::new();

/// The right to mount some btrfs filesystems, given back on drop. Drop it after the unmount.
#[derive(Debug)]
pub struct Claim(BTreeSet<String>);

/// Claims the btrfs filesystems among these, if the kernel needs that. While another job has one of
/// them, `waiting` is called again and again, until it answers `true`: stop.
pub fn claim<'a>(
    filesystems: impl IntoIterator<Item = &'a Filesystem>,
    waiting: &mut dyn FnMut() -> bool,
) -> Result<Claim> {
    if compat::btrfs_has_temp_fsid() {
        return Ok(Claim(BTreeSet::new()));
    }
    let btrfs = filesystems.into_iter().filter(|f| f.fstype == "btrfs");
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
