//! The result of a selection, and its intermediate guests.

use crate::guest::pve::Handle;
use crate::guest::{DefinitionFile, DiskSource, Guest, UncoveredDisk};
use crate::{Code, Error};

/// Result of a directive.
#[derive(Debug, Default)]
pub struct Selection {
    /// Guests in the order of the selectors; by name within one selector.
    pub guests: Vec<Guest>,
    /// Selected but impossible to back up, by guest name: each is a job error. A guest may also
    /// stand in `guests` with its other disks.
    pub refused: Vec<(String, Error)>,
    /// Selectors that found nothing while others found something: each is a job error. We cannot
    /// tell whose files are missing, so no file may be marked deleted.
    pub misses: Vec<Error>,
    /// Unreadable definitions by file name. `guest=` does not match these names but may match the
    /// guests' names inside: each is a job warning.
    pub unread: Vec<(String, Error)>,
    /// Other lines for the job log.
    pub notes: Vec<String>,
    /// Volumes of the errors [`Code::PassedOver`] in `refused`, in their order.
    pub(super) passed: Vec<DiskSource>,
}

impl Selection {
    /// Whether `guests` is complete.
    pub fn is_whole(&self) -> bool {
        self.refused.is_empty() && self.misses.is_empty() && self.unread.is_empty()
    }

    /// Whether guests with unknown names may be missing. Then no file saved earlier by this line
    /// may be marked deleted.
    pub fn may_miss_any(&self) -> bool {
        let unread = [Code::BadGuestDefinition, Code::DefinitionsSilent];
        let nameless = |(_, error): &(_, Error)| unread.contains(&error.code());
        !self.misses.is_empty() || !self.unread.is_empty() || self.refused.iter().any(nameless)
    }
}

/// A guest before its name and disks are checked.
#[derive(Debug, Clone)]
pub(super) struct Found {
    /// Name in the source.
    pub(super) source_name: String,
    /// Name in the catalog.
    pub(super) name: String,
    pub(super) disks: Vec<DiskSource>,
    /// See [`Guest::disk_names`].
    pub(super) disk_names: Vec<Vec<String>>,
    /// See [`Guest::places`].
    pub(super) places: Vec<Option<String>>,
    pub(super) uncovered: Vec<UncoveredDisk>,
    /// Origin, for messages.
    pub(super) from: String,
    /// See [`Guest::file`].
    pub(super) file: Option<DefinitionFile>,
    /// See [`Guest::pve`].
    pub(super) pve: Option<Handle>,
    /// Made of one volume or image that a selector found, and not of a definition.
    pub(super) alone: bool,
    /// Whether root on this host assigned these disks to this guest.
    pub(super) defined_here: bool,
    /// See [`Guest::doubt`].
    pub(super) doubt: Option<String>,
}
