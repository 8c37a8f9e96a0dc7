//! The kernel's word on a snapshot.

use std::sync::OnceLock;

use devicemapper::{DM, DevId, DmFlags, DmName, DmOptions};

use super::Status;
use crate::error::{Code, Error, Result};

/// One handle on `/dev/mapper/control` for the process; the ioctls need no state of it.
static DM_HANDLE: OnceLock<DM> = OnceLock::new();

fn dm() -> Result<&'static DM> {
    if let Some(dm) = DM_HANDLE.get() {
        return Ok(dm);
    }
    let dm = DM::new().map_err(|e| Error::new(Code::SnapshotStatus, "device-mapper").because(e))?;
    Ok(DM_HANDLE.get_or_init(|| dm))
}

/// The status of the only target of a device: its type and text.
fn target(name: &str) -> Result<(String, String)> {
    let failed =
        |e: devicemapper::DmError| Error::new(Code::SnapshotStatus, name.to_owned()).because(e);
    let id = DmName::new(name).map_err(failed)?;
    // NOFLUSH: asking must not wait for the pool to write its metadata.
    let options = DmOptions::default().set_flags(DmFlags::DM_NOFLUSH);
    let (_, mut lines) = dm()?
        .table_status(&DevId::Name(id), options)
        .map_err(failed)?;
    match (lines.pop(), lines.is_empty()) {
        (Some((_, _, kind, text)), true) => Ok((kind, text)),
        _ => Err(Error::new(
            Code::SnapshotStatus,
            format!("{name}: not one target"),
        )),
    }
}

/// The state of a thick snapshot by its device-mapper name.
pub(super) fn thick(name: &str) -> Result<Status> {
    let (kind, text) = target(name)?;
    if kind != "snapshot" {
        return Err(Error::new(
            Code::SnapshotStatus,
            format!("{name} is a {kind} target, not a snapshot"),
        ));
    }
    parse_thick(&text).ok_or_else(|| Error::new(Code::SnapshotStatus, format!("{name}: {text:?}")))
}

/// `used/total metadata` in sectors, or one word.
fn parse_thick(text: &str) -> Option<Status> {
    match text.trim() {
        "Invalid" | "Overflow" | "Merge failed" | "Unknown" => return Some(Status::Invalid),
        _ => {}
    }
    let (used, total) = text.split_ascii_whitespace().next()?.split_once('/')?;
    let (used, total): (f64, f64) = (used.parse().ok()?, total.parse().ok()?);
    (total > 0.0).then(|| Status::Valid {
        used: used / total * 100.0,
    })
}

/// The state of a thin snapshot: that of its pool.
pub(super) fn thin(pool: &str) -> Result<Status> {
    let (kind, text) = target(pool)?;
    if kind != "thin-pool" {
        return Err(Error::new(
            Code::SnapshotStatus,
            format!("{pool} is a {kind} target, not a thin pool"),
        ));
    }
    parse_pool(&text).ok_or_else(|| Error::new(Code::SnapshotStatus, format!("{pool}: {text:?}")))
}

/// `tx used/total used/total held mode …`: the fuller of metadata and data counts.
fn parse_pool(text: &str) -> Option<Status> {
    let words: Vec<_> = text.split_ascii_whitespace().collect();
    if words.first() == Some(&"Fail")
        || words
            .iter()
            .any(|w| matches!(*w, "out_of_data_space" | "ro" | "needs_check"))
    {
        return Some(Status::Invalid);
    }
    let share = |word: &str| {
        let (used, total) = word.split_once('/')?;
        let (used, total): (f64, f64) = (used.parse().ok()?, total.parse().ok()?);
        (total > 0.0).then(|| used / total * 100.0)
    };
    Some(Status::Valid {
        used: share(words.get(1)?)?.max(share(words.get(2)?)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_thick_status_lines() {
        assert_eq!(
            parse_thick("4096/16384 16"),
            Some(Status::Valid { used: 25.0 })
        );
        for word in ["Invalid", "Overflow", "Merge failed", "Unknown"] {
            assert_eq!(parse_thick(word), Some(Status::Invalid));
        }
        for garbage in ["", "x", "1/0 0", "a/b"] {
            assert_eq!(parse_thick(garbage), None);
        }
    }

    #[test]
    fn test_pool_status_lines() {
        let good = "1 20/1024 512/1024 - rw discard_passdown queue_if_no_space - 1024";
        assert_eq!(parse_pool(good), Some(Status::Valid { used: 50.0 }));
        for bad in [
            "Fail",
            "1 20/1024 1024/1024 - out_of_data_space d q - 1",
            "1 1/2 1/2 - ro d q needs_check 1",
        ] {
            assert_eq!(parse_pool(bad), Some(Status::Invalid));
        }
        assert_eq!(parse_pool("1"), None);
    }
}
