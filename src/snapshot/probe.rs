//! Queries a snapshot's fill from device-mapper.
//!
//! `lvs` would scan the host's devices and report LVM's view.

use super::thin::Pool;
use super::{Status, dm};
use crate::error::{Code, Error, Result};
use crate::hostdev::lvname::LvName;

/// The kernel's term for a thin pool without free blocks.
pub(super) const OUT_OF_DATA_SPACE: &str = "out_of_data_space";

/// A handle to a snapshot's state that does not own the snapshot. For the monitor.
#[derive(Debug, Clone)]
pub struct Probe {
    name: LvName,
    dm_uuid: String,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Thick,
    Thin { pool: Pool },
}

/// Fill of a snapshot or pool.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fill {
    /// Percent of the copy-on-write area, or of the pool's data.
    pub data: f64,
    /// Percent of the pool's metadata; 0 for thick snapshots, whose area holds both.
    pub metadata: f64,
}

/// Result of [`Probe::fill`].
#[derive(Debug, Clone, PartialEq)]
pub enum State {
    /// Usable.
    Valid(Fill),
    /// No longer valid, with the kernel's term for the reason.
    Invalid(String),
    /// The device no longer exists.
    Gone,
}

impl Probe {
    pub(super) fn thick(name: LvName, dm_uuid: String) -> Self {
        Probe {
            name,
            dm_uuid,
            kind: Kind::Thick,
        }
    }

    pub(super) fn thin(name: LvName, dm_uuid: String, pool: Pool) -> Self {
        Probe {
            name,
            dm_uuid,
            kind: Kind::Thin { pool },
        }
    }

    /// Name of the snapshot.
    pub fn name(&self) -> &LvName {
        &self.name
    }

    pub(super) fn dm_uuid(&self) -> &str {
        &self.dm_uuid
    }

    /// Whether the snapshot has its own, extensible area.
    pub fn is_thick(&self) -> bool {
        matches!(self.kind, Kind::Thick)
    }

    /// Its thin pool as `VG/LV`.
    pub fn pool(&self) -> Option<&str> {
        match &self.kind {
            Kind::Thick => None,
            Kind::Thin { pool } => Some(&pool.name),
        }
    }

    /// Queries the kernel.
    pub fn fill(&self) -> Result<State> {
        let Some(state) = self.single(&self.dm_uuid)? else {
            return Ok(State::Gone);
        };
        match &self.kind {
            Kind::Thick => thick_state(&state),
            Kind::Thin { pool } => {
                if state.kind != "thin" || state.params == "Fail" {
                    return Ok(State::Invalid(state.params));
                }
                match self.single(&pool.dm_uuid)? {
                    Some(pool) => pool_state(&pool),
                    None => Ok(State::Gone),
                }
            }
        }
    }

    fn single(&self, uuid: &str) -> Result<Option<dm::Target>> {
        match dm::status(uuid)? {
            None => Ok(None),
            Some(mut targets) if targets.len() == 1 => Ok(targets.pop()),
            Some(_) => Err(Error::new(
                Code::SnapshotStatus,
                format!("{} has an unexpected table", self.name),
            )),
        }
    }

    /// The fill as [`super::Snapshot::status`] reports it: a missing device counts as invalid.
    pub(super) fn status(&self) -> Result<Status> {
        Ok(match self.fill()? {
            State::Valid(fill) => Status::Valid {
                used: if self.is_thick() { fill.data } else { 0.0 },
            },
            State::Invalid(_) | State::Gone => Status::Invalid,
        })
    }
}

fn not_understood(target: &dm::Target) -> Error {
    Error::new(
        Code::SnapshotStatus,
        format!("status `{}` of a {}", target.params, target.kind),
    )
}

/// Parses `USED/TOTAL METADATA` in sectors, or one word for an unusable snapshot.
fn thick_state(target: &dm::Target) -> Result<State> {
    if target.kind != "snapshot" {
        return Err(not_understood(target));
    }
    match target.params.as_str() {
        "Invalid" | "Overflow" | "Merge failed" => {
            return Ok(State::Invalid(target.params.clone()));
        }
        _ => {}
    }
    let data = target.params.split(' ').next().and_then(share);
    let data = data.ok_or_else(|| not_understood(target))?;
    Ok(State::Valid(Fill {
        data,
        metadata: 0.0,
    }))
}

/// Parses `TRANSACTION META/TOTAL DATA/TOTAL HELD MODE DISCARD WHEN_FULL NEEDS_CHECK LOW_WATER`, or
/// `Fail` or `Error`.
pub(super) fn pool_state(target: &dm::Target) -> Result<State> {
    if target.kind != "thin-pool" {
        return Err(not_understood(target));
    }
    let words: Vec<&str> = target.params.split(' ').collect();
    if let ["Fail" | "Error", ..] = words[..] {
        return Ok(State::Invalid(target.params.clone()));
    }
    let [_, meta, data, _, mode, _, _, rest @ ..] = &words[..] else {
        return Err(not_understood(target));
    };
    if rest.contains(&"needs_check") {
        return Ok(State::Invalid("needs_check".to_owned()));
    }
    match *mode {
        "rw" => {}
        "ro" | OUT_OF_DATA_SPACE => return Ok(State::Invalid((*mode).to_owned())),
        _ => return Err(not_understood(target)),
    }
    match (share(data), share(meta)) {
        (Some(data), Some(metadata)) => Ok(State::Valid(Fill { data, metadata })),
        _ => Err(not_understood(target)),
    }
}

/// `USED/TOTAL` in percent.
fn share(text: &str) -> Option<f64> {
    let (used, total) = text.split_once('/')?;
    let (used, total) = (used.parse::<u64>().ok()?, total.parse::<u64>().ok()?);
    if total == 0 || used > total {
        return None;
    }
    // Hundredths of a percent are precise enough and need no lossy cast.
    let hundredths = u128::from(used) * 10_000 / u128::from(total);
    u32::try_from(hundredths).ok().map(|h| f64::from(h) / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(kind: &str, params: &str) -> dm::Target {
        dm::Target {
            length: 8,
            kind: kind.into(),
            params: params.into(),
        }
    }

    #[test]
    fn test_thick_status_lines() {
        let state = |params| thick_state(&target("snapshot", params));
        let valid = |data| {
            State::Valid(Fill {
                data,
                metadata: 0.0,
            })
        };
        assert_eq!(state("16/16384 16").unwrap(), valid(0.09));
        assert_eq!(state("8192/16384 48").unwrap(), valid(50.0));
        assert_eq!(state("16384/16384 48").unwrap(), valid(100.0));
        for word in ["Invalid", "Overflow", "Merge failed"] {
            assert_eq!(state(word).unwrap(), State::Invalid(word.into()));
        }
        for odd in ["Unknown", "", "1/0 0", "9/8 1", "x/y"] {
            assert_eq!(
                state(odd).unwrap_err().code(),
                Code::SnapshotStatus,
                "{odd}"
            );
        }
        assert!(thick_state(&target("linear", "")).is_err());
    }

    #[test]
    fn test_pool_status_lines() {
        let state = |params| pool_state(&target("thin-pool", params));
        assert_eq!(
            state("1 10/1000 64/128 - rw no_discard_passdown queue_if_no_space - 1024").unwrap(),
            State::Valid(Fill {
                data: 50.0,
                metadata: 1.0
            })
        );
        for (params, why) in [
            ("Fail", "Fail"),
            ("Error", "Error"),
            (
                "1 10/1000 128/128 - out_of_data_space discard_passdown queue_if_no_space - 1024",
                "out_of_data_space",
            ),
            (
                "1 10/1000 1/128 - ro discard_passdown error_if_no_space - 1024",
                "ro",
            ),
            (
                "1 10/1000 1/128 - rw discard_passdown error_if_no_space needs_check 1024",
                "needs_check",
            ),
        ] {
            assert_eq!(state(params).unwrap(), State::Invalid(why.into()));
        }
        assert!(state("1 10/1000").is_err());
        assert!(state("1 10/1000 1/128 - odd a b - 1").is_err());
    }
}
