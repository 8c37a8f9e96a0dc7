//! The ledger of a job: catalog entries that must not count as deleted, paths that the next job has to
//! save again, and the reasons to fail.

use std::collections::{BTreeMap, BTreeSet};
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
    /// Catalog trees of guests that jobs before have saved and this one has not, so far. `true`: not the job before,
    /// but an earlier one.
    absent: BTreeMap<Vec<u8>, bool>,
    /// Guests of a job before that the lines leave out.
    dropped: BTreeSet<Vec<u8>>,
    /// Errors of guests that are saved without some of their disks, by catalog tree.
    partly: BTreeMap<Vec<u8>, u64>,
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
            absent: BTreeMap::new(),
            dropped: BTreeSet::new(),
            partly: BTreeMap::new(),
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
        let tree = prepare::prefix(directive, name, true);
        if partly {
            *self.partly.entry(tree.clone()).or_default() += 1;
        }
        self.keep(tree);
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
        let before: BTreeSet<&str> = saves.guests_before().collect();
        let known: BTreeSet<&str> = before.iter().copied().chain(saves.guests_known()).collect();
        // A guest that one line leaves out may be another one's.
        let mut wanted = found.clone();
        let missed = vanished::vanished(known.iter().copied(), lines, found);
        wanted.extend(missed.into_iter().map(|guest| guest.tree));
        for tree in known {
            let (earlier, tree) = (!before.contains(tree), tree.as_bytes().to_vec());
            match wanted.contains(&tree) {
                true => drop(self.absent.insert(tree, earlier)),
                false => drop(self.dropped.insert(tree)),
            }
        }
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
        mut result: Summary,
    ) {
        if self.settings.estimate {
            return;
        }
        result.errors += self.partly.get(tree).copied().unwrap_or_default();
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
        let mut noted = absent
            .iter()
            .map(|(tree, earlier)| saves.absent(tree, *earlier))
            .chain(dropped);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::caller::{CancelFlag, Reporter};
    use crate::job::last_saves;

    #[derive(Debug)]
    struct Silent;

    impl Reporter for Silent {
        fn message(&self, _: Importance, _: &str) {}

        fn cancelled(&self) -> bool {
            false
        }
    }

    /// Runs a job that finds and saves guests; those named `…-partly` lack a disk.
    fn run(dir: &std::path::Path, hour: u32, full: bool, lines: &[&str], saved: &[&str]) {
        let job = |hour| format!("Nightly.2026-11-25_{hour:02}.00.00_01");
        let previous = if full { String::new() } else { job(hour - 1) };
        let settings = BackupSettings {
            job_id: hour,
            job: job(hour),
            previous: previous.clone(),
            working_dir: dir.to_owned(),
            full,
            accurate: true,
            estimate: false,
            since: 0,
        };
        let desk = Desk::new(Arc::new(Silent), CancelFlag::default());
        let mut ledger = Ledger::new(Arc::new(settings), desk);
        ledger.remember(Saves::open(dir, &job(hour), hour, &previous));
        let lines: Vec<_> = lines.iter().map(|l| Directive::parse(l).unwrap()).collect();
        let tree = |name: &str| format!("/@guestsnap/{name}/").into_bytes();
        let found = saved.iter().map(|name| tree(name)).collect();
        ledger.vanished(&lines, &found);
        for name in saved {
            let result = Summary {
                ended: hour.into(),
                full,
                files: 1,
                bytes: 1,
                errors: 0,
                kit: Default::default(),
                consistency: String::new(),
            };
            if name.ends_with("-partly") {
                let error = Error::new(Code::OriginGone, "vg/data");
                ledger.guest_failed(&lines[0], name, &error, true);
            }
            let none = Paths::default();
            ledger.saved(&tree(name), Vec::new(), &none, &none, result);
        }
        ledger.opened = 1;
        ledger.verdict().unwrap();
    }

    /// Each guest with the hour of its last save, its errors, and whether the newest job lacks it.
    fn status(dir: &std::path::Path) -> Vec<(String, u64, u64, bool)> {
        let saves = last_saves(dir).unwrap();
        let row = saves.into_iter().map(|save| {
            let (ended, errors) = save.summary.map_or((0, 0), |s| (s.ended, s.errors));
            let name = save.tree["/@guestsnap/".len()..].trim_end_matches('/');
            (name.to_owned(), ended, errors, save.absent)
        });
        row.collect()
    }

    #[test]
    fn test_the_records_of_guests_that_a_job_lacks_or_leaves_out() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let row = |name: &str, hour, errors, absent| (name.to_owned(), hour, errors, absent);
        let lines = ["lv=vg/*"];
        run(dir, 1, true, &lines, &["db-partly", "old", "web"]);
        assert_eq!(
            status(dir),
            [
                row("db-partly", 1, 1, false),
                row("old", 1, 0, false),
                row("web", 1, 0, false)
            ]
        );
        // A guest that one line leaves out belongs to another line.
        let lines = ["lv=vg/* exclude=web exclude=old", "guest=web"];
        run(dir, 2, false, &lines, &["db-partly", "web"]);
        let both = [row("db-partly", 2, 1, false), row("web", 2, 0, false)];
        assert_eq!(status(dir), both);
        // A full job lacks one.
        run(dir, 3, true, &lines, &["web"]);
        let lacks = [row("db-partly", 2, 1, true), row("web", 3, 0, false)];
        assert_eq!(status(dir), lacks);
        run(dir, 4, false, &lines, &["web"]);
        assert_eq!(
            status(dir),
            [row("db-partly", 2, 1, true), row("web", 4, 0, false)]
        );
        let lines = ["lv=vg/* exclude=web exclude=db-partly", "guest=web"];
        run(dir, 5, false, &lines, &["web"]);
        assert_eq!(status(dir), [row("web", 5, 0, false)]);
    }
}
