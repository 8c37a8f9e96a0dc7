//! Classic snapshots within the guest.

use std::collections::{BTreeMap, BTreeSet};

use super::names::printable;
use super::vg::{SegmentKind, Vg};

/// Classic snapshots within the guest.
pub(super) struct Snapshots<'a> {
    /// COW volumes and their origins.
    pub(super) cows: BTreeMap<&'a str, &'a str>,
    merging: BTreeSet<&'a str>,
}

impl<'a> Snapshots<'a> {
    pub(super) fn of(vg: &'a Vg) -> Self {
        let mut all = Snapshots {
            cows: BTreeMap::new(),
            merging: BTreeSet::new(),
        };
        for segment in vg.lvs.values().flat_map(|lv| &lv.segments) {
            if let SegmentKind::Snapshot {
                origin,
                cow,
                merging,
            } = &segment.kind
            {
                all.cows.insert(cow, origin);
                if *merging {
                    all.merging.insert(origin);
                }
            }
        }
        all
    }

    /// Reason to leave out a volume. `None` for an origin: its own extents are always current.
    pub(super) fn reason(&self, name: &str) -> Option<String> {
        if let Some(origin) = self.cows.get(name) {
            let origin = printable(origin);
            return Some(format!("a snapshot of {origin} inside the guest"));
        }
        self.merging
            .contains(name)
            .then(|| "a snapshot is being merged into it".into())
    }
}
