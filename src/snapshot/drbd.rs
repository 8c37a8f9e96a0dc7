//! Volumes below DRBD: whether they have current data, and where those end.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::command::Program;
use super::dm;
use super::lvm::LvInfo;
use crate::error::{Code, Error, Result};
use crate::hostdev::drbd::{self, State};
use crate::hostdev::host_use;
use crate::hostdev::lvname::LvName;

/// A volume's place below a DRBD device whose local disk is current.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Below {
    minor: u32,
    state: State,
    /// Bytes of the guest's disk.
    pub bytes: u64,
}

impl std::fmt::Display for Below {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "below drbd{} ({})", self.minor, self.state)
    }
}

impl Below {
    /// Why data may be missing.
    pub fn doubt(&self, origin: &LvName) -> Option<Error> {
        let doubt = self.state.doubt()?;
        Some(refused(origin, format!("drbd{} is {doubt}", self.minor)))
    }

    /// Checks that the state is still good, after a snapshot was taken.
    pub fn check(&self, origin: &LvInfo) -> Result<()> {
        below(origin, self.minor).map(drop)
    }
}

fn refused(origin: &LvName, why: impl std::fmt::Display) -> Error {
    Error::new(Code::BelowDrbd, format!("{origin}: {why}"))
}

/// The place of a volume that this DRBD device holds. Refuses one without current data.
pub(super) fn below(origin: &LvInfo, minor: u32) -> Result<Below> {
    let refuse = |why: String| Err(refused(&origin.name, format!("drbd{minor} {why}")));
    let Some(state) = state(minor)? else {
        return refuse("has no state: it is being set up or taken down".to_owned());
    };
    if let Some(why) = state.refusal() {
        return refuse(format!("is {why}"));
    }
    match drbd::size(minor) {
        Some(bytes @ 1..) if bytes <= origin.size => Ok(Below {
            minor,
            state,
            bytes,
        }),
        _ => refuse("is larger than this volume: it has only metadata".to_owned()),
    }
}

/// The state of a device, from the kernel (DRBD 8) or from DRBD's own program (DRBD 9).
fn state(minor: u32) -> Result<Option<State>> {
    let text = fs::read_to_string(drbd::PROC).unwrap_or_default();
    if let Some(state) = drbd::parse_proc(&text).remove(&minor) {
        return Ok(Some(state));
    }
    if text.starts_with("version: 8") {
        return Ok(None);
    }
    let output = super::command::Call::new(Program::Drbdsetup)
        .args(["status", "--json"])
        .run()?;
    let mut states = drbd::parse_status(&output.stdout).map_err(|error| {
        let what = "the report of drbdsetup is not understood";
        Error::new(Code::CommandFailed, what).because(error)
    })?;
    Ok(states.remove(&minor))
}

/// Refuses a volume of DRBD's that no device has now, and one with external metadata.
///
/// Without DRBD in the kernel, metadata on a volume are remains of an earlier use. So are those on a volume that is open
/// and not DRBD's: a guest runs on it, maybe with a DRBD of its own.
pub(super) fn refuse_metadata(origin: &LvInfo, lvs: &[LvInfo], held: bool) -> Result<()> {
    if !origin.active || !Path::new(drbd::PROC).exists() {
        return Ok(());
    }
    // Twice: udev opens volumes for moments.
    let in_use = || dm::by_name(&origin.name.dm_name());
    if !held && origin.open && in_use()?.is_some_and(|now| now.open) {
        return Ok(());
    }
    if is_superblock(origin, Some(0))? {
        let why = "it has DRBD's external metadata, no guest's disk: leave it out with exclude=";
        return Err(refused(&origin.name, why));
    }
    if held {
        return Ok(());
    }
    let own = is_superblock(origin, drbd::internal_at(origin.size))?;
    let metadata = lvs.iter().find(|lv| {
        let data = drbd::data_name(lv.name.lv());
        lv.active && lv.name.vg() == origin.name.vg() && data.as_deref() == Some(origin.name.lv())
    });
    let beside = match metadata {
        Some(lv) => is_superblock(lv, Some(0))?,
        None => false,
    };
    if !own && !beside {
        return Ok(());
    }
    let why = "it has metadata of DRBD, and no DRBD device has it as its disk: start the resource (`drbdadm up`) or \
               attach its disk (`drbdadm attach`); if DRBD is not used for it any more, remove the metadata \
               (`drbdadm wipe-md`)";
    Err(refused(&origin.name, why))
}

fn is_superblock(lv: &LvInfo, at: Option<u64>) -> Result<bool> {
    let Some(at) = at.filter(|at| at + drbd::SUPERBLOCK <= lv.size) else {
        return Ok(false);
    };
    let mut block = vec![0; usize::try_from(drbd::SUPERBLOCK).unwrap_or_default()];
    let path = Path::new("/dev/mapper").join(lv.name.dm_name());
    let read = File::open(path).and_then(|file| file.read_exact_at(&mut block, at));
    match read {
        Ok(()) => Ok(drbd::is_superblock(&block)),
        // Gone since LVM's report: the snapshot tells.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::new(Code::DiskUnreadable, lv.name.to_string()).because(error)),
    }
}

/// Use of a volume by its host.
#[derive(Debug)]
pub enum Standing {
    /// None.
    Free,
    /// Below DRBD, with current data; the text tells the device and its state.
    BelowDrbd(String),
    /// One that refuses it as a guest's disk.
    Refused(String),
}

/// Finds the host's use of a volume.
pub fn standing(origin: &LvInfo) -> Standing {
    let Some(found) = origin.devno.and_then(host_use) else {
        return Standing::Free;
    };
    match found.drbd().map(|minor| below(origin, minor)) {
        None => Standing::Refused(found.to_string()),
        Some(Ok(below)) => Standing::BelowDrbd(below.to_string()),
        Some(Err(error)) => Standing::Refused(error.to_string()),
    }
}
