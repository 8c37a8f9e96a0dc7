//! Watching the snapshots of a job while it reads them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::caller::{Importance, Reporter};
use crate::config::client::Limits;
use crate::error::{Code, Error, Result};
use crate::snapshot::{Event, Fill, Monitor, MonitorSettings, Snapshot};

/// The monitor of one job, with its unreported findings: only the job's thread may send messages to
/// the daemon.
#[derive(Debug)]
pub(super) struct Watch {
    monitor: Monitor,
    events: Arc<Mutex<Vec<Event>>>,
    /// Thin pools whose snapshots are to be given up, and how full they are.
    full: Arc<Mutex<BTreeMap<String, Fill>>>,
}

/// The client file's limits where they are set.
fn settings(limits: &Limits) -> MonitorSettings {
    let mut settings = MonitorSettings::default();
    if let Some(percent) = &limits.extend_at {
        settings.extend_at = f64::from(**percent);
    }
    if let Some(percent) = &limits.extend_by {
        settings.extend_by = **percent;
    }
    if let Some(percent) = &limits.warn_pool_at {
        settings.warn_pool_at = f64::from(**percent);
    }
    if let Some(percent) = &limits.give_up_pool_at {
        settings.give_up_pool_at = f64::from(**percent);
    }
    settings
}

impl Watch {
    pub(super) fn start(limits: &Limits) -> Result<Watch> {
        let events = Arc::new(Mutex::new(Vec::new()));
        let full = Arc::new(Mutex::new(BTreeMap::new()));
        let (theirs, pools) = (Arc::clone(&events), Arc::clone(&full));
        let monitor = Monitor::start(settings(limits), move |event| match event {
            // The job reports the consequences.
            Event::PoolFull { pool, fill, .. } => {
                let mut pools = pools.lock().unwrap_or_else(PoisonError::into_inner);
                pools.insert(pool, fill);
            }
            event => {
                let mut events = theirs.lock().unwrap_or_else(PoisonError::into_inner);
                events.push(event);
            }
        })?;
        Ok(Watch {
            monitor,
            events,
            full,
        })
    }

    /// Whether any pool is nearly full.
    pub(super) fn is_any_full(&self) -> bool {
        let full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        !full.is_empty()
    }

    /// Why snapshots are to be given up before their guests suffer: one of them is in a thin pool
    /// that is nearly full. They make every write of their guest take a new block of it.
    pub(super) fn given_up(&self, snapshots: &[Box<dyn Snapshot>]) -> Option<Error> {
        let full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        if full.is_empty() {
            return None;
        }
        snapshots
            .iter()
            .filter_map(|s| s.probe())
            .find_map(|probe| {
                let pool = probe.pool()?;
                let fill = full.get(pool)?;
                let text = format!(
                    "thin pool {pool} is {:.0} % full (metadata {:.0} %)",
                    fill.data, fill.metadata
                );
                Some(Error::new(Code::PoolNearlyFull, text))
            })
    }

    /// Watches snapshots that were just taken.
    pub(super) fn add(&self, snapshots: &[Box<dyn Snapshot>]) {
        for probe in snapshots.iter().filter_map(|s| s.probe()) {
            self.monitor.watch(probe);
        }
    }

    /// Stops watching snapshots that are about to be released; the highest share of a
    /// copy-on-write area in use that was seen, in percent.
    pub(super) fn end(&self, snapshots: &[Box<dyn Snapshot>]) -> Option<f64> {
        let mut peak = None;
        for probe in snapshots.iter().filter_map(|s| s.probe()) {
            let seen = self.monitor.unwatch(probe.name());
            // The fill of a thin pool is not the snapshot's doing.
            if probe.is_thick() {
                peak = peak.into_iter().chain(seen).reduce(f64::max);
            }
        }
        peak
    }

    /// Reports the findings since the last call.
    pub(super) fn tell(&self, reporter: &dyn Reporter) {
        let events =
            std::mem::take(&mut *self.events.lock().unwrap_or_else(PoisonError::into_inner));
        for event in events {
            let importance = match event {
                Event::Extended { .. } => Importance::Info,
                // Whether the guest is lost is decided when it is released.
                // Warning: filling.
                _ => Importance::Warning,
            };
            reporter.message(importance, &event.to_string());
        }
    }
}
