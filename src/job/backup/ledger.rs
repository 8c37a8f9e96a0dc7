//! The ledger of a job: catalog entries that must not count as deleted, paths that the next job has to
//! save again, and the reasons to fail.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::desk::Desk;
use super::settings::BackupSettings;
use crate::config::{Directive, OnError};
use crate::error::{Code, Error, Result};
use crate::guest::Selection;
use crate::job::caller::Importance;
use crate::job::paths::Paths;
use crate::job::prepare;
use crate::job::saves::{Place, Saves, Summary};
use crate::job::vanished::{self, Vanished};

/// The account of one job.
pub(super) struct Ledger {
    settings: Arc<BackupSettings>,
    desk: Desk,
    /// Unreadable paths of guests that are done or not opened: never "deleted".
    keep: Paths,
    /// `None`: it could not be opened, which was told.
    saves: Option<Arc<Saves>>,
    /// Catalog trees of guests that jobs before have saved and this one has not, so far.
    absent: BTreeSet<Vec<u8>>,
    /// Guests of a job before that the lines leave out.
    dropped: BTreeSet<Vec<u8>>,
    /// Reasons for the job to fail that wait until the other guests are through.
    fatal: Vec<Error>,
    opened: usize,
}

impl Ledger {
    pub(super) fn new(settings: Arc<BackupSettings>, desk: Desk) -> Ledger {
        Ledger {
            settings,
            desk,
            keep: Paths::default(),
            saves: None,
            absent: BTreeSet::new(),
            dropped: BTreeSet::new(),
            fatal: Vec::new(),
            opened: 0,
        }
    }

    /// Takes the record of earlier jobs. Without one, the next job saves everything again.
    pub(super) fn remember(&mut self, saves: Result<Saves>) {
        match saves {
            Ok(saves) => self.saves = Some(Arc::new(saves)),
            Err(error) => self.will_be_saved_again(&error),
        }
    }

    pub(super) fn saves(&self) -> Option<Arc<Saves>> {
        self.saves.clone()
    }

    /// Nothing in this catalog tree may count as deleted.
    pub(super) fn keep(&mut self, tree: Vec<u8>) {
        self.keep.insert(tree);
    }

    /// Nothing of these may count as deleted.
    pub(super) fn keep_all(&mut self, paths: &Paths) {
        self.keep.join(paths);
    }

    /// Whether a path must not count as deleted.
    pub(super) fn keeps(&self, path: &[u8]) -> bool {
        self.keep.contains(path)
    }

    /// A guest was opened; its trees that are not all there.
    pub(super) fn opened(&mut self, unread: Vec<Vec<u8>>) {
        self.opened += 1;
        self.keep.extend(unread);
    }

    /// Adds a reason for the job to fail at its end.
    pub(super) fn fail(&mut self, error: Error) {
        self.fatal.push(error);
    }

    /// Reports a guest that is not in this backup, or only `partly`.
    pub(super) fn guest_failed(
        &mut self,
        directive: &Directive,
        name: &str,
        error: &Error,
        partly: bool,
    ) {
        self.keep(prepare::prefix(directive, name, true));
        let rest = match partly {
            true => format!("The other disks of {name} are saved."),
            false => format!("Nothing of {name} is in this backup."),
        };
        let text = format!("{name}: ERROR {}. {rest}", error.report());
        self.desk.message(Importance::Error, &text);
        self.fail_if_asked(directive, || format!("{name}, and on_error=fail is set"));
    }

    /// A line selects these guests; reports those that are refused.
    pub(super) fn selected(&mut self, selection: &Selection, directive: &Directive) {
        if selection.may_miss_any() {
            self.keep(format!("{}/", directive.path).into_bytes());
        }
        if !selection.misses.is_empty() {
            self.fail_if_asked(directive, || {
                "a selector found nothing, and on_error=fail is set".to_owned()
            });
        }
        for (name, error) in &selection.refused {
            let partly = selection.guests.iter().any(|guest| guest.name == *name);
            self.guest_failed(directive, name, error, partly);
        }
    }

    fn fail_if_asked(&mut self, directive: &Directive, why: impl FnOnce() -> String) {
        if directive.on_error == OnError::Fail {
            self.fail(Error::new(Code::GuestsFailed, why()));
        }
    }

    /// Reports guests of the previous job that no line finds, and keeps their catalog entries.
    pub(super) fn vanished(&mut self, lines: &[Directive], found: &BTreeSet<Vec<u8>>) {
        let Some(saves) = &self.saves else {
            return;
        };
        let gone = vanished::vanished(saves.guests_before(), lines, found);
        let before = vanished::vanished(saves.guests_before(), lines, &BTreeSet::new());
        self.absent = before.into_iter().map(|guest| guest.tree).collect();
        let left_out = saves.guests_before().map(|tree| tree.as_bytes().to_vec());
        self.dropped = left_out
            .filter(|tree| !self.absent.contains(tree))
            .collect();
        if !self.settings.accurate {
            // Any other job records nothing as deleted.
            return;
        }
        for Vanished { name, tree, line } in gone {
            let text = format!("{name}: job {} has it", self.settings.previous);
            let error = Error::new(Code::GuestVanished, text);
            match line {
                Some(line) => self.guest_failed(&lines[line], &name, &error, false),
                None => {
                    let text = format!("{name}: ERROR {}", error.report());
                    self.desk.message(Importance::Error, &text);
                }
            }
            self.keep(tree);
        }
    }

    /// A guest was read to its end.
    pub(super) fn saved(
        &mut self,
        tree: &[u8],
        places: Vec<Place>,
        unread: &Paths,
        marked: &Paths,
        result: Summary,
    ) {
        if self.settings.estimate {
            return;
        }
        let saves = self.saves.as_ref();
        let saved = saves.map(|saves| saves.saved(tree, places, unread, marked, result));
        self.absent.remove(tree);
        if let Some(Err(error)) = saved {
            self.will_be_saved_again(&error);
        }
    }

    /// Ends the account when all lines are through. An error fails the job.
    pub(super) fn verdict(&mut self) -> Result<()> {
        self.remember_absent();
        if self.opened == 0 {
            self.fail(Error::new(
                Code::GuestsFailed,
                "none of the guests could be opened",
            ));
        }
        self.fatal.drain(..).next().map_or(Ok(()), Err)
    }

    /// Remembers the guests that this job has nothing of, so that the next one misses them too.
    fn remember_absent(&mut self) {
        let absent = std::mem::take(&mut self.absent);
        let Some(saves) = self.saves.as_ref().filter(|_| !self.settings.estimate) else {
            return;
        };
        let dropped = self.dropped.iter().map(|tree| saves.dropped(tree));
        let mut noted = absent.iter().map(|tree| saves.absent(tree)).chain(dropped);
        let failed = noted.find_map(Result::err);
        if let Some(error) = failed {
            // Without the note, the next job may take the guest's old files for saved.
            self.desk.message(Importance::Error, &error.report());
        }
    }

    fn will_be_saved_again(&self, error: &Error) {
        let text = format!(
            "{}. What this job saves is saved again by the next one, changed or not",
            error.report()
        );
        // Warning: saved again.
        self.desk.message(Importance::Warning, &text);
    }
}
