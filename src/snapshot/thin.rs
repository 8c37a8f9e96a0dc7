//! Thin snapshots: requirements for the pool.

use super::lvm::LvInfo;
use super::probe::{State, pool_state};
use super::{dm, volume};
use crate::error::{Code, Error, Result};

/// Fill above which no snapshot is taken, in percent: snapshots make a pool fill faster, and a full
/// pool stops every guest in it.
pub const MAX_POOL_FILL: f64 = 90.0;

/// A thin pool of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pool {
    /// `VG/LV`.
    pub name: String,
    /// Device-mapper UUID.
    pub dm_uuid: String,
}

/// Finds the pool of a thin volume.
pub(super) fn pool_of(origin: &LvInfo, lvs: &[LvInfo]) -> Result<Pool> {
    let pool = origin
        .pool
        .as_ref()
        .and_then(|name| {
            lvs.iter()
                .find(|lv| lv.name.vg() == origin.name.vg() && lv.name.lv() == name)
        })
        .ok_or_else(|| {
            Error::new(
                Code::SnapshotFailed,
                format!("{} is not in a thin pool", origin.name),
            )
        })?;
    Ok(Pool {
        name: pool.name.to_string(),
        dm_uuid: format!("{}-tpool", volume::dm_uuid(&pool.vg_uuid, &pool.uuid)),
    })
}

/// Refuses a damaged or too full pool.
pub(super) fn check_pool(origin: &LvInfo, pool: &Pool, max_fill: f64) -> Result<()> {
    let named = format!("{}: thin pool {}", origin.name, pool.name);
    let targets = dm::status(&pool.dm_uuid)?.unwrap_or_default();
    let [target] = targets.as_slice() else {
        return Err(Error::new(
            Code::SnapshotStatus,
            format!("{named} has no device"),
        ));
    };
    judge(&named, pool_state(target)?, max_fill)
}

fn judge(named: &str, state: State, max_fill: f64) -> Result<()> {
    match state {
        State::Valid(fill) if fill.data > max_fill || fill.metadata > max_fill => Err(Error::new(
            Code::NoRoom,
            format!(
                "{named} is filled to {:.1} % (metadata {:.1} %), above the limit of {max_fill} %",
                fill.data, fill.metadata
            ),
        )),
        State::Valid(_) => Ok(()),
        State::Invalid(word) => Err(Error::new(
            Code::SnapshotFailed,
            format!("{named} is in trouble: {word}"),
        )),
        State::Gone => Err(Error::new(
            Code::SnapshotStatus,
            format!("{named} has no device"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::probe::Fill;

    #[test]
    fn test_full_and_damaged_pools_are_refused() {
        let fill = |data, metadata| State::Valid(Fill { data, metadata });
        assert!(judge("p", fill(90.0, 10.0), 90.0).is_ok());
        let code = |state| judge("p", state, 90.0).unwrap_err().code();
        assert_eq!(code(fill(90.1, 10.0)), Code::NoRoom);
        assert_eq!(code(fill(10.0, 95.0)), Code::NoRoom);
        assert_eq!(code(State::Invalid("ro".into())), Code::SnapshotFailed);
        assert_eq!(code(State::Gone), Code::SnapshotStatus);
    }
}
