//! What a job is about to create, written down before it is created; and the names it gives.
//!
//! One file per job. The first line names the owner: a process is known by its number, its start
//! time and the boot it lives in, so that a number that was used again is not taken for it. Every
//! further line is one intention or one removal. The file goes when nothing of the job is left.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::error::{Code, Error, Result};

/// Starts every name we give to an LV or a device.
///
/// Longest name: `guestsnap-` 10 + JobId 10 + `-` + process 7 + `.` + serial 10 + `-` + count 10
/// = 49 bytes; LVM allows 127 together with the volume group, device-mapper 127.
pub const NAME_PREFIX: &str = "guestsnap-";

/// The tag of every LV of ours.
pub const TAG: &str = "guestsnap";

/// Starts the tag that names the owner.
const OWNER_TAG: &str = "guestsnap.job=";

/// Counts the jobs of this process: JobId 0 is shared by estimates and the command line.
static SERIAL: AtomicU32 = AtomicU32::new(1);

/// Names one job of one process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobTag {
    /// Bacula's JobId; 0 for estimates and the command line.
    pub job_id: u32,
    /// The process.
    pub pid: u32,
    /// Its start, in clock ticks since boot.
    pub start: u64,
    /// The boot's id, without hyphens.
    pub boot: String,
    /// The job's number in the process.
    pub serial: u32,
}

impl JobTag {
    /// A tag for a new job of this process.
    pub fn new(job_id: u32) -> Result<JobTag> {
        let failed = |what| move |e| Error::new(Code::JournalFailed, what).because(e);
        let pid = std::process::id();
        Ok(JobTag {
            job_id,
            pid,
            start: process_start(pid).map_err(failed("reading our own start time"))?,
            boot: boot_id().map_err(failed("reading the boot's id"))?,
            serial: SERIAL.fetch_add(1, Ordering::Relaxed),
        })
    }

    /// As an LVM tag.
    pub fn lvm_tag(&self) -> String {
        format!(
            "{OWNER_TAG}{}_{}_{}_{}_{}",
            self.job_id, self.pid, self.start, self.boot, self.serial
        )
    }

    /// From an LVM tag; `None` for tags of others.
    pub fn from_lvm_tag(tag: &str) -> Option<JobTag> {
        let mut parts = tag.strip_prefix(OWNER_TAG)?.split('_');
        let tag = JobTag {
            job_id: parts.next()?.parse().ok()?,
            pid: parts.next()?.parse().ok()?,
            start: parts.next()?.parse().ok()?,
            boot: parts.next()?.to_owned(),
            serial: parts.next()?.parse().ok()?,
        };
        parts.next().is_none().then_some(tag)
    }

    /// Whether the process that made this still runs. When in doubt, it does.
    pub fn owner_lives(&self) -> bool {
        if boot_id().is_ok_and(|boot| boot != self.boot) {
            return false;
        }
        match process_start(self.pid) {
            Ok(start) => start == self.start,
            Err(error) => error.kind() != std::io::ErrorKind::NotFound,
        }
    }

    fn file_name(&self) -> String {
        format!("job-{}-{}.{}.journal", self.job_id, self.pid, self.serial)
    }
}

fn boot_id() -> std::io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .replace('-', ""))
}

/// Field 22 of `/proc/PID/stat`. The command's name before it may hold blanks and brackets.
fn process_start(pid: u32) -> std::io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let field = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.split_ascii_whitespace().nth(19));
    field
        .and_then(|f| f.parse().ok())
        .ok_or_else(|| std::io::Error::other("unexpected format of /proc/PID/stat"))
}

/// Something of ours on the host that outlives the process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Object {
    /// A snapshot LV.
    Lv {
        /// Volume group.
        vg: String,
        /// Name.
        lv: String,
    },
    /// A device-mapper device.
    Dm {
        /// Name.
        name: String,
    },
}

#[derive(Serialize, Deserialize)]
enum Line {
    Owner(JobTag),
    Intend(Object),
    Gone(Object),
}

/// The journal of one job.
#[derive(Debug)]
pub struct Journal {
    tag: JobTag,
    path: PathBuf,
    folder: File,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    file: File,
    counter: u32,
    left: Vec<Object>,
    closed: bool,
}

/// Opens the journal folder, made if missing: root's own, closed to others.
pub(super) fn open_folder(folder: &Path) -> Result<File> {
    let failed = |step: &str, e: std::io::Error| {
        Error::new(Code::JournalFailed, format!("{}: {step}", folder.display())).because(e)
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|e| failed("making it", e))?;
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(folder)
        .map_err(|e| failed("opening it", e))?;
    let meta = opened.metadata().map_err(|e| failed("stat", e))?;
    if meta.uid() != nix::unistd::geteuid().as_raw() || meta.mode() & 0o022 != 0 {
        return Err(Error::new(
            Code::JournalFailed,
            format!("{}: others can write to it", folder.display()),
        ));
    }
    Ok(opened)
}

impl Journal {
    /// A journal for a new job of this process.
    pub fn open(folder: &Path, job_id: u32) -> Result<Journal> {
        let tag = JobTag::new(job_id)?;
        let handle = open_folder(folder)?;
        let path = folder.join(tag.file_name());
        let failed = |step: &str, e| {
            Error::new(Code::JournalFailed, format!("{}: {step}", path.display())).because(e)
        };
        let mut file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| failed("creating it", e))?;
        write(&mut file, &Line::Owner(tag.clone())).map_err(|e| failed("writing", e))?;
        handle
            .sync_all()
            .map_err(|e| failed("sync of its folder", e))?;
        let state = Mutex::new(State {
            file,
            counter: 0,
            left: Vec::new(),
            closed: false,
        });
        Ok(Journal {
            tag,
            path,
            folder: handle,
            state,
        })
    }

    /// Who we are.
    pub fn tag(&self) -> &JobTag {
        &self.tag
    }

    /// A name nothing else has, for an LV or a device.
    pub fn new_name(&self) -> String {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.counter += 1;
        let JobTag {
            job_id,
            pid,
            serial,
            ..
        } = self.tag;
        format!("{NAME_PREFIX}{job_id}-{pid}.{serial}-{}", state.counter)
    }

    /// Writes down that this is about to be created. On disk when it returns.
    pub fn intend(&self, object: &Object) -> Result<()> {
        self.line(&Line::Intend(object.clone()))?;
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .left
            .push(object.clone());
        Ok(())
    }

    /// Writes down that this is gone (or was never made).
    pub fn gone(&self, object: &Object) -> Result<()> {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .left
            .retain(|o| o != object);
        self.line(&Line::Gone(object.clone()))
    }

    /// Removes the file if nothing of the job is left; else it stays for the sweep, and the error
    /// names what is left.
    pub fn close(&self) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.left.is_empty() {
            let text = format!("left over: {:?}; {} stays", state.left, self.path.display());
            return Err(Error::new(Code::ReleaseFailed, text));
        }
        if std::mem::replace(&mut state.closed, true) {
            return Ok(());
        }
        let removed = fs::remove_file(&self.path).and_then(|()| self.folder.sync_all());
        removed.map_err(|e| {
            Error::new(
                Code::JournalFailed,
                format!("removing {}", self.path.display()),
            )
            .because(e)
        })
    }

    fn line(&self, line: &Line) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        write(&mut state.file, line).map_err(|e| {
            Error::new(Code::JournalFailed, self.path.display().to_string()).because(e)
        })
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            log::error!("{}", error.report());
        }
    }
}

fn write(file: &mut File, line: &Line) -> std::io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    file.write_all(&text)?;
    file.sync_data()
}

/// What a journal of an earlier job says is left. A torn last line (power loss) is passed over:
/// its object was not created, the line is synced before.
pub(super) fn read(text: &str) -> Option<(JobTag, Vec<Object>)> {
    let mut owner = None;
    let mut left = Vec::new();
    for line in text.lines() {
        match serde_json::from_str(line) {
            Ok(Line::Owner(tag)) => owner = Some(tag),
            Ok(Line::Intend(object)) => left.push(object),
            Ok(Line::Gone(object)) => left.retain(|o| *o != object),
            Err(_) => break,
        }
    }
    owner.map(|owner| (owner, left))
}

/// Names for device-mapper devices, written down before they are used.
pub type SharedJournal = Arc<Journal>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_lvm_tag_round_trip_and_owner() {
        let tag = JobTag::new(7).unwrap();
        assert_eq!(JobTag::from_lvm_tag(&tag.lvm_tag()), Some(tag.clone()));
        assert!(
            tag.lvm_tag()
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_+.-/=!:#&".contains(&b))
        );
        assert!(tag.owner_lives());
        assert!(
            !JobTag {
                start: tag.start + 1,
                ..tag.clone()
            }
            .owner_lives()
        );
        assert!(
            !JobTag {
                boot: "0".into(),
                ..tag.clone()
            }
            .owner_lives()
        );
        assert!(
            !JobTag {
                pid: 4_194_305,
                ..tag
            }
            .owner_lives()
        );
        for other in [
            "",
            "guestsnap.job=",
            "guestsnap.job=1_2_3_4",
            "guestsnap.job=1_2_3_b_5_6",
            "x",
        ] {
            assert_eq!(JobTag::from_lvm_tag(other), None);
        }
    }

    #[test]
    fn test_journal_tells_what_is_left_and_goes_when_nothing_is() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("guestsnap");
        let journal = Journal::open(&folder, 7).unwrap();
        let lv = Object::Lv {
            vg: "vg0".into(),
            lv: journal.new_name(),
        };
        let dm = Object::Dm {
            name: journal.new_name(),
        };
        assert_ne!(format!("{lv:?}"), format!("{dm:?}"));
        journal.intend(&lv).unwrap();
        journal.intend(&dm).unwrap();
        journal.gone(&dm).unwrap();
        let path = fs::read_dir(&folder)
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(read(&text), Some((journal.tag().clone(), vec![lv.clone()])));
        assert_eq!(read(&text[..text.len() - 5]).unwrap().1.len(), 2);
        assert_eq!(journal.close().unwrap_err().code(), Code::ReleaseFailed);
        journal.gone(&lv).unwrap();
        journal.close().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn test_a_folder_that_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(
            Journal::open(folder.path(), 1).unwrap_err().code(),
            Code::JournalFailed
        );
    }
}
