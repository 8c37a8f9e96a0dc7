//! Scenarios still to run, and results.

use guestsnap_bed::inside::{Place, Scenario};
use std::collections::{HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard};

/// Scenarios that take longer than others, in seconds in one of three machines: they are handed out first, for a
/// long one at the end keeps a processor idle. What is not named takes [`USUAL`]. Nothing but the time depends on it.
const EXPECTED: &[(&str, u32)] = &[
    ("systemd_service", 140),
    ("systemd_wake_up", 130),
    ("room_late", 100),
    ("points_kill", 100),
    ("plugin_killed_daemon", 90),
    ("package", 70),
    ("drbd_guest", 70),
    ("clones", 60),
    ("guests_quiet_host", 60),
    ("thin_guests", 60),
    ("bad_disk_", 60),
    ("soak_", 60),
    ("room_turns", 50),
    ("points_", 50),
    ("shared_groups", 50),
    ("plugin_", 45),
    ("guests_lvm_of_many_kinds", 45),
    ("pve_guests", 45),
];
const USUAL: u32 = 25;
/// A machine that boots for less than this takes longer than it saves.
const WORTH_A_BOOT: u32 = 60;

fn expected(name: &str) -> u32 {
    let known = EXPECTED.iter().find(|(start, _)| name.starts_with(start));
    known.map_or(USUAL, |(_, seconds)| *seconds)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Results, by the full names of the tests.
#[derive(Default)]
pub struct Board {
    outcomes: Mutex<HashMap<String, Result<(), String>>>,
    changed: Condvar,
}

impl Board {
    pub fn put(&self, name: String, outcome: Result<(), String>) {
        lock(&self.outcomes).entry(name).or_insert(outcome);
        self.changed.notify_all();
    }

    /// Waits for the result of a test.
    pub fn wait(&self, name: &str) -> Result<(), String> {
        let mut outcomes = lock(&self.outcomes);
        loop {
            if let Some(outcome) = outcomes.get(name) {
                return outcome.clone();
            }
            outcomes = self
                .changed
                .wait(outcomes)
                .unwrap_or_else(|e| e.into_inner());
        }
    }
}

/// The scenarios of one suite that run in machines of the same kind.
pub struct Line {
    pub suite: &'static str,
    pub place: Place,
    all: Vec<Scenario>,
    state: Mutex<State>,
}

struct State {
    waiting: VecDeque<Scenario>,
    /// Machines that are at work.
    machines: u32,
}

impl Line {
    pub fn new(suite: &'static str, place: Place, mut all: Vec<Scenario>) -> Self {
        all.sort_by_key(|s| std::cmp::Reverse(expected(s.name)));
        let waiting = all.iter().copied().collect();
        let state = Mutex::new(State {
            waiting,
            machines: 0,
        });
        Self {
            suite,
            place,
            all,
            state,
        }
    }

    /// All that it began with.
    pub fn names(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.all.iter().map(|s| s.name)
    }

    /// The name that a test is shown with.
    pub fn full(&self, name: &str) -> String {
        format!("vm_{}_{name}", self.suite)
    }

    fn take(&self) -> Option<Scenario> {
        lock(&self.state).waiting.pop_front()
    }

    /// Seconds that all that waits takes, and the machines at work.
    fn load(&self) -> (u32, u32) {
        let state = lock(&self.state);
        let seconds = state.waiting.iter().map(|s| expected(s.name)).sum();
        (seconds, state.machines)
    }
}

/// All lines.
pub struct Queues {
    lines: Vec<Line>,
    choosing: Mutex<()>,
}

impl Queues {
    pub fn new(lines: Vec<Line>) -> Self {
        Self {
            lines,
            choosing: Mutex::new(()),
        }
    }

    pub fn has(&self, place: Place) -> bool {
        self.of(place).any(|line| line.load().0 > 0)
    }

    fn of(&self, place: Place) -> impl Iterator<Item = &Line> {
        self.lines.iter().filter(move |line| line.place == place)
    }

    /// The line that needs one more machine most: one that has none, or else the one whose machines have most to do.
    pub fn machine(&self) -> Option<Hand<'_>> {
        let _one_at_a_time = lock(&self.choosing);
        let needs = |line: &&Line| {
            let (seconds, machines) = line.load();
            let share = seconds / (machines + 1);
            let worth = share > 0 && (machines == 0 || share >= WORTH_A_BOOT);
            worth.then_some((machines == 0, share))
        };
        let emulated = self.lines.iter().filter(|l| l.place != Place::Programs);
        let (line, _) = emulated
            .filter_map(|line| Some((line, needs(&line)?)))
            .max_by_key(|(_, need)| *need)?;
        lock(&line.state).machines += 1;
        Some(Hand {
            line,
            holds: None,
            asked: false,
        })
    }

    /// The next scenario that needs no machine.
    pub fn next_here(&self) -> Option<(&Line, Scenario)> {
        self.of(Place::Programs)
            .find_map(|line| Some((line, line.take()?)))
    }
}

/// A machine's part of its line.
pub struct Hand<'a> {
    pub line: &'a Line,
    /// Given and not reported.
    holds: Option<&'static str>,
    asked: bool,
}

impl Hand<'_> {
    /// The scenario that it has not reported yet (it was booted in the middle), or another one; empty if there is none.
    pub fn next(&mut self) -> String {
        self.asked = true;
        if self.holds.is_none() {
            self.holds = self.line.take().map(|s| s.name);
        }
        self.holds.unwrap_or_default().to_string()
    }

    /// It was reported.
    pub fn done(&mut self, name: &str) {
        if self.holds == Some(name) {
            self.holds = None;
        }
    }

    /// The machine is gone. What it held has failed; all that waits too, if it never came so far as to ask.
    pub fn end(mut self, why: &str, board: &Board) {
        let mut lost: Vec<_> = self.holds.take().into_iter().collect();
        if !self.asked {
            lost.extend(std::iter::from_fn(|| self.line.take()).map(|s| s.name));
        }
        for name in lost {
            board.put(
                self.line.full(name),
                Err(format!("no result of {name}: {why}")),
            );
        }
        lock(&self.line.state).machines -= 1;
    }
}
