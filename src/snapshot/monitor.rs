//! Monitors the fill of snapshots while a job reads them, and extends thick ones in time.
//!
//! One thread per job, joined when the monitor stops. It queries device-mapper, which takes
//! microseconds, and runs `lvextend` past a threshold.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::SigSet;

use super::command::Program;
use super::dm;
use super::lvm::{GROUPS, lvm};
use super::probe::{Fill, OUT_OF_DATA_SPACE, Probe, State};
use crate::config::defaults;
use crate::error::{Code, Error, Result};
use crate::hostdev::lvname::LvName;

/// Additional fill after a failed extension before the next attempt, in percent.
const RETRY_AFTER: f64 = 5.0;

/// Maximum wait for other commands on a group: snapshots in other groups fill up meanwhile.
const GROUP_PATIENCE: Duration = Duration::from_secs(1);

/// Consecutive polls with the group busy before this is reported.
const MAX_REFUSED: u32 = 30;

/// Settings of a [`Monitor`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MonitorSettings {
    /// Poll interval.
    pub interval: Duration,
    /// Fill above which a thick snapshot is extended, in percent.
    pub extend_at: f64,
    /// Extension as a share of the snapshot's size, in percent; 0: never.
    pub extend_by: u8,
    /// Fill above which a thin pool is reported, in percent.
    pub warn_pool_at: f64,
    /// Fill above which the snapshots in a thin pool should be given up, in percent.
    pub give_up_pool_at: f64,
}

impl Default for MonitorSettings {
    fn default() -> Self {
        MonitorSettings {
            interval: Duration::from_secs(1),
            extend_at: defaults::EXTEND_AT.into(),
            extend_by: defaults::EXTEND_BY,
            warn_pool_at: defaults::WARN_POOL_AT.into(),
            give_up_pool_at: defaults::GIVE_UP_POOL_AT.into(),
        }
    }
}

/// An event for the job log.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A thick snapshot was extended.
    Extended {
        /// The snapshot.
        name: LvName,
        /// Fill before the extension, in percent.
        at: f64,
    },
    /// A thick snapshot is filling up and could not be extended.
    NotExtended {
        /// The snapshot.
        name: LvName,
        /// Current fill in percent.
        at: f64,
        /// Reason.
        why: String,
    },
    /// A thin snapshot's pool is filling up.
    PoolFilling {
        /// The snapshot.
        name: LvName,
        /// Fill of the pool's data and metadata.
        fill: Fill,
    },
    /// A thin snapshot's pool is so full that its guests' writes may soon fail: the snapshot should
    /// be given up.
    PoolFull {
        /// The snapshot.
        name: LvName,
        /// Pool as `VG/LV`.
        pool: String,
        /// Fill of the pool's data and metadata.
        fill: Fill,
    },
    /// The snapshot is no longer valid.
    Invalid {
        /// The snapshot.
        name: LvName,
        /// The kernel's term for the state.
        word: String,
    },
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::Extended { name, at } => {
                write!(f, "snapshot {name} was {at:.0} % full and got more room")
            }
            Event::NotExtended { name, at, why } => write!(
                f,
                "snapshot {name} is {at:.0} % full and could not get more room: {why}"
            ),
            Event::PoolFilling { name, fill } => write!(
                f,
                "the thin pool of snapshot {name} is {:.0} % full (metadata {:.0} %)",
                fill.data, fill.metadata
            ),
            Event::PoolFull { name, pool, fill } => write!(
                f,
                "thin pool {pool}, which snapshot {name} is in, is {:.0} % full (metadata {:.0} %)",
                fill.data, fill.metadata
            ),
            Event::Invalid { name, word } => write!(f, "snapshot {name} is invalid: {word}"),
        }
    }
}

/// Monitors the snapshots of one job.
#[derive(Debug)]
pub struct Monitor {
    settings: MonitorSettings,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<Watched>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct Watched {
    stop: bool,
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    probe: Probe,
    peak: f64,
    /// Fill below which no extension is attempted.
    extend_at: f64,
    /// Consecutive polls at which other commands kept the group busy.
    refused: u32,
    /// The filling pool was reported.
    told_filling: bool,
    /// The full pool was reported.
    told_full: bool,
    /// The invalid state was reported; no more reports follow.
    told_invalid: bool,
}

impl Entry {
    fn new(probe: Probe, settings: MonitorSettings) -> Entry {
        Entry {
            probe,
            peak: 0.0,
            extend_at: settings.extend_at,
            refused: 0,
            told_filling: false,
            told_full: false,
            told_invalid: false,
        }
    }

    /// Evaluates a state: events to report, and the fill if the snapshot needs an extension.
    fn see(&mut self, state: State, settings: MonitorSettings) -> (Vec<Event>, Option<f64>) {
        let name = self.probe.name().clone();
        let first = |told: &mut bool| !std::mem::replace(told, true);
        let mut events = Vec::new();
        match state {
            State::Invalid(word) => {
                self.peak = 100.0;
                let full = Fill {
                    data: 100.0,
                    metadata: 0.0,
                };
                // A pool can pass from one state to the other between two polls.
                if word == OUT_OF_DATA_SPACE {
                    events.extend(self.full(full));
                }
                if first(&mut self.told_invalid) {
                    events.push(Event::Invalid { name, word });
                }
            }
            State::Valid(fill) if self.probe.is_thick() => {
                self.peak = self.peak.max(fill.data);
                let full = settings.extend_by > 0 && fill.data >= self.extend_at;
                return (events, full.then_some(fill.data));
            }
            State::Valid(fill) => {
                self.peak = self.peak.max(fill.data);
                let most = fill.data.max(fill.metadata);
                if most >= settings.give_up_pool_at {
                    events.extend(self.full(fill));
                } else if most >= settings.warn_pool_at && first(&mut self.told_filling) {
                    events.push(Event::PoolFilling { name, fill });
                }
            }
            State::Gone => {}
        }
        (events, None)
    }

    /// Evaluates the result of an extension.
    fn extended(
        &mut self,
        at: f64,
        result: Result<bool>,
        settings: MonitorSettings,
    ) -> Option<Event> {
        let name = self.probe.name().clone();
        self.refused = match result {
            Ok(false) => self.refused.saturating_add(1),
            _ => 0,
        };
        match result {
            Ok(true) => {
                self.extend_at = settings.extend_at;
                Some(Event::Extended { name, at })
            }
            Ok(false) if self.refused == MAX_REFUSED => {
                let why = format!("other jobs keep the volume group {} busy", name.vg());
                Some(Event::NotExtended { name, at, why })
            }
            // Seen again at the next poll.
            Ok(false) => None,
            Err(error) => {
                self.extend_at = at + RETRY_AFTER;
                let why = error.with_causes();
                Some(Event::NotExtended { name, at, why })
            }
        }
    }

    fn full(&mut self, fill: Fill) -> Option<Event> {
        let pool = self.probe.pool()?.to_owned();
        let name = self.probe.name().clone();
        let told = std::mem::replace(&mut self.told_full, true);
        (!told).then_some(Event::PoolFull { name, pool, fill })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Watched> {
        // Entries are independent; a panic leaves none half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Monitor {
    /// Starts the thread, which calls `tell`.
    pub fn start(
        settings: MonitorSettings,
        tell: impl Fn(Event) + Send + 'static,
    ) -> Result<Monitor> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("guestsnap-fill".to_owned())
            .spawn(move || {
                // The daemon's threads handle the daemon's signals.
                let _ = SigSet::all().thread_block();
                run(&theirs, settings, &tell);
            })
            .map_err(|error| Error::new(Code::SnapshotStatus, "no thread").because(error))?;
        Ok(Monitor {
            settings,
            shared,
            thread: Some(thread),
        })
    }

    /// Starts monitoring a snapshot.
    pub fn watch(&self, probe: Probe) {
        self.shared
            .lock()
            .entries
            .push(Entry::new(probe, self.settings));
        self.shared.wake.notify_all();
    }

    /// Stops monitoring a snapshot; call this before closing it. Returns the highest fill seen, in
    /// percent.
    pub fn unwatch(&self, name: &LvName) -> Option<f64> {
        let mut watched = self.shared.lock();
        let at = watched
            .entries
            .iter()
            .position(|entry| entry.probe.name() == name)?;
        Some(watched.entries.swap_remove(at).peak)
    }

    /// Ends the thread. Waits at most for a command in progress or its turn.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            if thread.join().is_err() {
                log::error!("the thread that watches snapshots has panicked");
            }
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.end();
    }
}

fn run(shared: &Shared, settings: MonitorSettings, tell: &impl Fn(Event)) {
    let mut watched = shared.lock();
    while !watched.stop {
        let probes: Vec<Probe> = watched.entries.iter().map(|e| e.probe.clone()).collect();
        drop(watched);
        for probe in probes {
            if shared.lock().stop {
                return;
            }
            look(shared, settings, &probe, tell);
        }
        watched = shared.lock();
        if !watched.stop {
            watched = shared
                .wake
                .wait_timeout(watched, settings.interval)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

fn look(shared: &Shared, settings: MonitorSettings, probe: &Probe, tell: &impl Fn(Event)) {
    let state = match probe.fill() {
        Ok(state) => state,
        Err(error) => {
            // The release asks again, and that answer counts.
            log::debug!("{}", error.with_causes());
            return;
        }
    };
    let (mut events, extend) = {
        let mut watched = shared.lock();
        let same = |entry: &&mut Entry| entry.probe.name() == probe.name();
        let Some(entry) = watched.entries.iter_mut().find(same) else {
            return;
        };
        entry.see(state, settings)
    };
    if let Some(at) = extend {
        let name = probe.name().clone();
        let result = extend_by(probe, settings.extend_by);
        let mut watched = shared.lock();
        let entry = watched.entries.iter_mut().find(|e| *e.probe.name() == name);
        // None: released in the meantime.
        events.extend(entry.and_then(|entry| entry.extended(at, result, settings)));
    }
    events.into_iter().for_each(tell);
}

/// `false`: another command is working on the group.
fn extend_by(probe: &Probe, percent: u8) -> Result<bool> {
    let name = probe.name();
    let Some(_lock) = GROUPS.take_within(name.vg(), GROUP_PATIENCE) else {
        return Ok(false);
    };
    // If the administrator removed the snapshot, another volume may have its name.
    if dm::by_name(&name.dm_name())?.is_none_or(|device| device.uuid != probe.dm_uuid()) {
        return Err(Error::new(Code::SnapshotStatus, format!("{name} is gone")));
    }
    lvm(Program::Lvextend)
        .args(["--yes", "--extents", &format!("+{percent}%LV")])
        .arg(name.to_string())
        .run()
        .map(|_| true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::thin::Pool;
    use std::time::Instant;

    #[test]
    fn test_each_thing_is_told_once() {
        let settings = MonitorSettings::default();
        let name = LvName::new("vg0", "snap").unwrap();
        let valid = |data, metadata| State::Valid(Fill { data, metadata });
        let invalid = || State::Invalid("out_of_data_space".to_owned());
        let told = |entry: &mut Entry, state| entry.see(state, settings).0;
        let pool = || Pool {
            name: "vg0/pool".to_owned(),
            dm_uuid: "LVM-pool-tpool".to_owned(),
        };
        let new = || {
            let probe = Probe::thin(name.clone(), "LVM-a".to_owned(), pool());
            Entry::new(probe, settings)
        };
        let mut thin = new();
        assert_eq!(told(&mut thin, valid(50.0, 10.0)), []);
        let filling = told(&mut thin, valid(10.0, 92.0));
        assert!(matches!(filling[..], [Event::PoolFilling { .. }]));
        assert_eq!(told(&mut thin, valid(93.0, 92.0)), []);
        // After a filling pool was reported, a full one is reported too, once.
        let full = told(&mut thin, valid(93.0, 95.0));
        let fill = Fill {
            data: 93.0,
            metadata: 95.0,
        };
        let event = Event::PoolFull {
            name: name.clone(),
            pool: "vg0/pool".to_owned(),
            fill,
        };
        assert_eq!(full, [event]);
        assert_eq!(told(&mut thin, valid(96.0, 95.0)), []);
        assert!(matches!(
            told(&mut thin, invalid())[..],
            [Event::Invalid { .. }]
        ));
        assert_eq!(told(&mut thin, invalid()), []);
        assert_eq!(told(&mut thin, State::Gone), []);
        // Everything at once, and a pool with a different failure.
        let sudden = told(&mut new(), invalid());
        assert!(matches!(
            sudden[..],
            [Event::PoolFull { .. }, Event::Invalid { .. }]
        ));
        let damaged = told(&mut new(), State::Invalid("needs_check".to_owned()));
        assert!(matches!(damaged[..], [Event::Invalid { .. }]));

        let mut thick = Entry::new(Probe::thick(name.clone(), "LVM-b".to_owned()), settings);
        assert_eq!(thick.see(valid(80.0, 0.0), settings), (vec![], Some(80.0)));
        assert_eq!(told(&mut thick, invalid()).len(), 1);
        assert_eq!(told(&mut thick, invalid()), []);
        assert!(thick.peak >= 100.0);
    }

    #[test]
    fn test_a_group_that_another_command_works_on_is_not_waited_for_long() {
        let name = LvName::new("guestsnap-busy", "guestsnap-none").unwrap();
        let probe = Probe::thick(name.clone(), "LVM-guestsnap-none".to_owned());
        let settings = MonitorSettings::default();
        let mut entry = Entry::new(probe.clone(), settings);
        let extend = || {
            let (probe, (tell, told)) = (probe.clone(), std::sync::mpsc::channel());
            std::thread::spawn(move || tell.send(extend_by(&probe, 20)));
            told.recv_timeout(Duration::from_secs(10)).unwrap()
        };
        let other = GROUPS.take(name.vg());
        assert_eq!(entry.extended(80.0, extend(), settings), None);
        let full = State::Valid(Fill {
            data: 80.0,
            metadata: 0.0,
        });
        assert_eq!(entry.see(full.clone(), settings), (vec![], Some(80.0)));
        // Reported once while the state lasts.
        for look in 2..100 {
            let told = entry.extended(80.0, Ok(false), settings);
            assert_eq!(told.is_some(), look == MAX_REFUSED, "{look}: {told:?}");
        }
        assert_eq!(entry.see(full.clone(), settings), (vec![], Some(80.0)));
        // A holder that nearly always has it releases it briefly.
        let soon = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            drop(other);
        });
        // The attempt reaches the volume, which does not exist: no immediate retry.
        let told = entry.extended(80.0, extend(), settings);
        assert!(matches!(told, Some(Event::NotExtended { .. })), "{told:?}");
        assert_eq!(entry.see(full, settings), (vec![], None));
        assert_eq!(entry.refused, 0);
        soon.join().unwrap();
    }

    #[test]
    fn test_monitor_stops_at_once() {
        let settings = MonitorSettings {
            interval: Duration::from_secs(3600),
            ..MonitorSettings::default()
        };
        let monitor = Monitor::start(settings, |_| {}).unwrap();
        // Monitoring a nonexistent snapshot is harmless.
        let name = LvName::new("guestsnap-none", "guestsnap-none").unwrap();
        monitor.watch(Probe::thick(name.clone(), "LVM-guestsnap-none".to_owned()));
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(monitor.unwatch(&name), Some(0.0));
        assert_eq!(monitor.unwatch(&name), None);
        let started = Instant::now();
        monitor.stop();
        assert!(started.elapsed() < Duration::from_secs(1));
    }
}
