//! Entries of one guest for the job's ledger.

use super::desk::Desk;
use super::ledger::Ledger;
use super::tally::Tally;
use crate::error::{Code, Error, escape, shorten};
use crate::fs::tree::text::Names;
use crate::job::caller::Importance;
use crate::job::paths::Paths;
use crate::job::saves::{Place, Summary};
use crate::stream::LeftOut;

/// Bytes of paths of one guest that are remembered because they must not count as deleted; with more,
/// nothing of the guest does.
const MAX_KEPT: usize = 4 << 20;

/// Catalog paths of a guest that need care: in this job, or in the next one.
pub(super) struct GuestLedger {
    /// The catalog tree of the guest, with a trailing slash.
    tree: Vec<u8>,
    /// Unreadable paths, which must not count as deleted.
    unread: Paths,
    /// Directories excluded because of a marker in them.
    marked: Paths,
    /// Subvolumes that were left out.
    left_out: Paths,
    /// Their names: writable snapshots, and the others.
    subvolumes: [Names; 2],
    /// Bytes of paths in the sets above.
    remembered: usize,
    /// Paths that the previous job lacks: sent whatever their age.
    anew: Paths,
    places: Vec<Place>,
}

impl GuestLedger {
    pub(super) fn new(tree: Vec<u8>, anew: Paths, places: Vec<Place>) -> GuestLedger {
        GuestLedger {
            tree,
            unread: Paths::default(),
            marked: Paths::default(),
            left_out: Paths::default(),
            subvolumes: Default::default(),
            remembered: 0,
            anew,
            places,
        }
    }

    /// Whether the job before does not have this path.
    pub(super) fn is_anew(&self, path: &[u8]) -> bool {
        self.anew.contains(path)
    }

    /// An object could not be read.
    pub(super) fn keep(&mut self, path: &[u8]) {
        self.remember(path.to_vec(), false, |ledger| &mut ledger.unread);
    }

    /// The walk could not read an object, or with `subtree` all that is below it. There may be any
    /// number of them, of long paths.
    pub(super) fn keep_problem(&mut self, mut path: Vec<u8>, subtree: bool) {
        if self.remembered <= MAX_KEPT {
            self.keep(&path);
            path.push(b'/');
            self.remember(path, subtree, |ledger| &mut ledger.unread);
        }
    }

    /// Records a directory excluded because of a marker in it. Without the marker, even its old files are
    /// new to the next job.
    pub(super) fn leave_out_marked(&mut self, path: Vec<u8>) {
        let tree = [&path[..], b"/"].concat();
        self.remember(tree, true, |ledger| &mut ledger.marked);
    }

    /// Records an excluded subvolume. An earlier job's files at its path must not count as deleted.
    pub(super) fn leave_out_subvolume(&mut self, path: Vec<u8>, left_out: &LeftOut) {
        let tree = [&path[..], b"/"].concat();
        self.remember(tree, true, |ledger| &mut ledger.left_out);
        let shown = escape(&left_out.path);
        self.subvolumes[usize::from(left_out.read_only)].push(format!("/{}", shorten(&shown)));
    }

    /// Adds to one of the sets; see [`MAX_KEPT`].
    fn remember(&mut self, path: Vec<u8>, below: bool, set: fn(&mut GuestLedger) -> &mut Paths) {
        self.remembered += size_of::<Vec<u8>>() + path.len();
        match self.remembered {
            ..=MAX_KEPT if below => set(self).insert(path),
            ..=MAX_KEPT => set(self).insert_object(path),
            _ => {
                let all = self.tree.clone();
                set(self).insert(all);
            }
        }
    }

    /// Names the subvolumes that are left out, a line for each kind.
    pub(super) fn tell_left_out(&self, name: &str, desk: &Desk, tally: &mut Tally) {
        let [snapshots, read_only] = &self.subvolumes;
        if !read_only.is_empty() {
            let names = read_only.list(", ");
            let text = format!("{name}: read-only snapshots are left out: {names}");
            desk.message(Importance::Info, &text);
        }
        if !snapshots.is_empty() {
            let text = format!(
                "snapshots without a line in the guest's fstab, which can have files of their own: {}",
                snapshots.list(", ")
            );
            let error = Error::new(Code::UnsupportedVolume, text).report();
            let text = format!("{name}: ERROR {error}. Their content is not in this backup.");
            desk.message(Importance::Error, &text);
            tally.errors += 1;
        }
    }

    /// Adds the unread paths to the job's ledger.
    pub(super) fn end(&mut self, ledger: &mut Ledger) {
        ledger.keep_all(&self.unread);
        ledger.keep_all(&self.left_out);
        // In the next job all of it is new, should it be saved then.
        self.marked.join(&self.left_out);
    }

    /// The guest was read to its end.
    pub(super) fn saved(self, result: Summary, ledger: &mut Ledger) {
        ledger.saved(&self.tree, self.places, &self.unread, &self.marked, result);
    }
}
