//! The plan of a job: its `Plugin =` lines, the guests of each, and their snapshots.
//!
//! Snapshots are taken at the start of the job as far as there is room. Guests without room wait: their
//! snapshots are tried again after each guest, and for the last time when the guest is to be read.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::context::Context;
use super::notes::log_late;
use crate::config::{Directive, When};
use crate::error::{Code, Error, Result, escape};
use crate::guest::{Guest, Selection};
use crate::job::caller::{Importance, Reporter};
use crate::job::prepare::{self, Prepared, Wanted};
use crate::job::vanished;
use crate::job::watch::Watch;
use crate::snapshot::{Journal, Snapshot};

/// One `Plugin =` line.
struct Line {
    directive: Directive,
    waiting: VecDeque<Prepared>,
    /// Guests without snapshots so far.
    late: VecDeque<Guest>,
    /// Like that of the directive, but no guest takes the room of one before it whose turn is to come.
    when: When,
    done: bool,
}

/// The lines of a job, and the guests that wait for their turn.
pub(super) struct Plan {
    /// In the order of the FileSet, in which the daemon runs them.
    lines: Vec<Line>,
    /// Lines that the daemon has begun.
    begun: usize,
    /// The line that the daemon runs.
    current: Option<usize>,
    /// A guest was handed out since the late ones were tried.
    room: bool,
}

/// A guest that is given up before its turn, because its thin pool is nearly full.
pub(super) struct GivenUp {
    pub(super) directive: Directive,
    pub(super) prepared: Prepared,
    pub(super) why: Error,
}

impl Plan {
    pub(super) fn parse(texts: &[Vec<u8>]) -> Result<Plan> {
        let mut turn = false;
        let lines = texts.iter().map(|text| {
            let directive = Directive::from_line(text)?;
            turn |= directive.snapshots == When::Turn;
            Ok(Line {
                waiting: VecDeque::new(),
                late: VecDeque::new(),
                when: match directive.snapshots {
                    When::Auto if turn => When::Turn,
                    when => when,
                },
                directive,
                done: false,
            })
        });
        Ok(Plan {
            lines: lines.collect::<Result<_>>()?,
            begun: 0,
            current: None,
            room: false,
        })
    }

    fn directives(&self) -> Vec<Directive> {
        self.lines
            .iter()
            .map(|line| line.directive.clone())
            .collect()
    }

    /// Whether a line asks for this panic.
    #[cfg(feature = "debug-panic")]
    pub(super) fn panics_at(&self, point: crate::config::directive::DebugPanic) -> bool {
        self.lines
            .iter()
            .any(|line| line.directive.debug == Some(point))
    }

    /// Looks for the guests of all lines, and takes their snapshots. An error fails the job.
    pub(super) fn make(&mut self, context: &mut Context, journal: &Arc<Journal>) -> Result<()> {
        let directives = self.directives();
        let (lines, client) = (directives.clone(), context.client.clone());
        let stop = context.desk().cancel().clone();
        let select = move |told: &dyn Reporter| prepare::select(&lines, &client, told, &stop);
        let selections = context.helper.ask("while guests were looked for", select)?;
        let mut found = BTreeSet::new();
        for (selection, directive) in selections.iter().zip(&directives) {
            found.extend(vanished::trees(selection, directive));
        }
        context.ledger.vanished(&directives, &found);
        let mut folders = prepare::Folders::default();
        let mut wanted = Vec::new();
        for (line, (selection, directive)) in selections.into_iter().zip(&directives).enumerate() {
            let guests = guests(selection, directive, &mut folders, context);
            match self.lines[line].when {
                When::Turn => self.lines[line].late.extend(guests),
                _ => wanted.extend(guests.into_iter().map(|guest| (line, guest))),
            }
        }
        let late = self.take(wanted, context, journal)?;
        for (line, guest, error) in late {
            let why = error.to_string();
            let why = why.split_once(": ").map_or("", |(_, why)| why);
            let text = format!(
                "{}: no room for its snapshots yet ({}): they are taken when room comes back",
                guest.name,
                escape(why.as_bytes())
            );
            context.desk().message(Importance::Info, &text);
            self.lines[line].late.push_back(guest);
        }
        Ok(())
    }

    /// Takes snapshots of guests that had to wait: of all that have room now, and of the running line's
    /// next one if it would be read next.
    fn take_late(&mut self, current: usize, context: &mut Context) -> Result<()> {
        if self.lines.iter().all(|line| line.late.is_empty()) {
            return Ok(());
        }
        let closed = || {
            Error::new(
                Code::Internal,
                "the journal was closed before all guests had snapshots",
            )
        };
        let journal = context.helper.journal().ok_or_else(closed)?;
        let mut again = Vec::new();
        if std::mem::take(&mut self.room) {
            for (number, line) in self.lines.iter_mut().enumerate() {
                if line.when == When::Auto {
                    again.extend(line.late.drain(..).map(|guest| (number, guest)));
                }
            }
        }
        if !again.is_empty() {
            for (line, guest, _) in self.take(again, context, &journal)? {
                self.lines[line].late.push_back(guest);
            }
        }
        while self.lines[current].waiting.is_empty() {
            let Some(guest) = self.lines[current].late.pop_front() else {
                break;
            };
            for (line, guest, error) in self.take(vec![(current, guest)], context, &journal)? {
                let directive = &self.lines[line].directive;
                let ledger = &mut context.ledger;
                ledger.guest_failed(directive, &guest.name, &error, false);
            }
        }
        Ok(())
    }

    /// Takes the snapshots of guests, each with the number of its line. Returns those that may wait for
    /// room and have none.
    fn take(
        &mut self,
        guests: Vec<(usize, Guest)>,
        context: &mut Context,
        journal: &Arc<Journal>,
    ) -> Result<Vec<(usize, Guest, Error)>> {
        let whose = guests.clone();
        let wanted = guests.into_iter().map(|(line, guest)| Wanted {
            guest,
            directive: self.lines[line].directive.clone(),
            place: (self.lines[line].when != When::All).then_some(line),
        });
        let wanted = wanted.collect();
        let (client, journal) = (context.client.clone(), journal.clone());
        // A job that is given up watches nothing any more.
        let watch = context.watch.as_ref().map(Arc::downgrade);
        let stop = context.desk().cancel().clone();
        let taken = Arc::new(Mutex::new(Some(BTreeMap::new())));
        let give = taken.clone();
        let asked = context
            .helper
            .ask("while snapshots were taken", move |told| {
                prepare::snapshots(wanted, &client, &journal, told, &stop, &|number, result| {
                    let watch = watch.as_ref().and_then(Weak::upgrade);
                    if let (Some(watch), Ok(prepared)) = (watch, &result) {
                        watch.add(&prepared.snapshots);
                    }
                    // Snapshots that arrive after a cancel are removed at once.
                    let mut taken = give.lock().unwrap_or_else(PoisonError::into_inner);
                    match &mut *taken {
                        Some(taken) => {
                            taken.insert(number, result);
                        }
                        None => log_late(result.err()),
                    }
                });
                Ok(())
            });
        let taken = taken.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut late = Vec::new();
        for (number, result) in taken.into_iter().flatten() {
            let (place, guest) = &whose[number];
            let line = &mut self.lines[*place];
            match result {
                Ok(prepared) => line.waiting.push_back(prepared),
                Err(error) if error.code() == Code::NoRoom && line.when != When::All => {
                    late.push((*place, guest.clone(), error));
                }
                Err(error) => {
                    let ledger = &mut context.ledger;
                    ledger.guest_failed(&line.directive, &guest.name, &error, false);
                }
            }
        }
        match asked {
            Ok(()) if context.desk().is_stopped() => {
                Err(Error::new(Code::Cancelled, "while snapshots were taken"))
            }
            asked => asked.map(|()| late),
        }
    }

    /// The daemon runs the next line now.
    pub(super) fn begin_line(&mut self) -> Result<()> {
        if self.begun == self.lines.len() {
            let text = "the daemon runs more lines than it announced";
            return Err(Error::new(Code::Internal, text));
        }
        self.current = Some(self.begun);
        self.begun += 1;
        Ok(())
    }

    /// Whether the daemon runs a line.
    pub(super) fn is_running(&self) -> bool {
        self.current.is_some()
    }

    /// The next guest of the running line, and the line. The guest before is released. An error fails
    /// the job.
    pub(super) fn next_guest(
        &mut self,
        context: &mut Context,
    ) -> Result<Option<(Directive, Prepared)>> {
        let Some(current) = self.current else {
            return Ok(None);
        };
        self.take_late(current, context)?;
        let line = &mut self.lines[current];
        let next = line.waiting.pop_front();
        self.room |= next.is_some();
        Ok(next.map(|prepared| (line.directive.clone(), prepared)))
    }

    /// The running line is through.
    pub(super) fn end_line(&mut self) {
        if let Some(current) = self.current.take() {
            self.lines[current].done = true;
        }
    }

    /// Whether all lines are through.
    pub(super) fn is_done(&self) -> bool {
        self.lines.iter().all(|line| line.done)
    }

    /// Takes the guests out whose snapshots are in a thin pool that is nearly full.
    pub(super) fn give_up_full_pools(&mut self, watch: &Watch) -> Vec<GivenUp> {
        let mut left = Vec::new();
        for line in &mut self.lines {
            for prepared in std::mem::take(&mut line.waiting) {
                match watch.given_up(&prepared.snapshots) {
                    None => line.waiting.push_back(prepared),
                    Some(why) => {
                        watch.end(&prepared.snapshots);
                        left.push(GivenUp {
                            directive: line.directive.clone(),
                            prepared,
                            why,
                        });
                    }
                }
            }
        }
        left
    }

    /// The snapshots of all guests that still wait.
    pub(super) fn drain(&mut self) -> Vec<Box<dyn Snapshot>> {
        let left = self.lines.iter_mut().flat_map(|l| l.waiting.drain(..));
        left.flat_map(|prepared| prepared.snapshots).collect()
    }
}

/// The guests of a line that are to be saved; the others are reported.
fn guests(
    selection: Selection,
    directive: &Directive,
    folders: &mut prepare::Folders,
    context: &mut Context,
) -> Vec<Guest> {
    context.ledger.selected(&selection, directive);
    let mut guests = selection.guests;
    guests.retain(|guest| match folders.claim(directive, guest) {
        Ok(true) => true,
        Ok(false) => {
            let text = format!("{} is saved by another Plugin line already", guest.name);
            context.desk().message(Importance::Info, &text);
            false
        }
        Err(error) => {
            let ledger = &mut context.ledger;
            ledger.guest_failed(directive, &guest.name, &error, false);
            false
        }
    });
    guests
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_lines_run_in_the_order_of_the_fileset() {
        // Equal texts are two lines.
        let texts = ["lv=vg0/b", "lv=vg0/a", "lv=vg0/b"];
        let texts = texts.map(|text| format!("guestsnap: {text}").into_bytes());
        let mut plan = Plan::parse(&texts).unwrap();
        assert!(!plan.is_running());
        for number in 0..texts.len() {
            assert!(!plan.is_done());
            plan.begin_line().unwrap();
            assert_eq!(plan.current, Some(number));
            plan.end_line();
        }
        assert!(plan.is_done() && !plan.is_running());
        let error = plan.begin_line().unwrap_err().report();
        assert!(error.contains("more lines than it announced"), "{error}");
        assert!(!plan.is_running());
    }

    #[test]
    fn test_a_line_that_did_not_end_is_not_run_again() {
        let texts = [
            b"guestsnap: lv=vg0/a".to_vec(),
            b"guestsnap: lv=vg0/b".to_vec(),
        ];
        let mut plan = Plan::parse(&texts).unwrap();
        plan.begin_line().unwrap();
        plan.begin_line().unwrap();
        assert_eq!(plan.current, Some(1));
        plan.end_line();
        assert!(!plan.is_done());
    }
}
