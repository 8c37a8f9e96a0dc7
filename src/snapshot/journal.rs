//! What a job is about to create, written down before it is created.
//!
//! One file per job in a folder of the daemon. The file is locked (`flock`) for as long as the job
//! or anything it created lives, and it goes when nothing is left. So a file that is not locked is
//! the sweep's business, whatever became of its process.
//!
//! A file is lines of JSON: a header, then records. An intent reaches the disk before the object
//! is created. Other records need not: an object that is gone without a record is found to be gone.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{
    AtFlags, FlockOperation, Mode, OFlags, RenameFlags, flock, fstat, fsync, mkdirat, openat,
    renameat_with, unlinkat,
};
use serde::{Deserialize, Serialize};

use super::dm;
use super::lvm::{LvName, LvmUuid};
use super::names::JobTag;

use crate::error::{Code, Error, Result};
use crate::point::{Point, pass, reach};

/// The layout of journal files.
const VERSION: u32 = 1;
/// How journal files end.
pub(super) const SUFFIX: &str = ".journal";
/// How journal files begin that are not yet complete; nothing was created for them.
pub(super) const UNFINISHED: &str = ".new-";

/// Something that outlives the process that made it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Object {
    /// A snapshot volume.
    Lv {
        /// Volume group.
        vg: String,
        /// The snapshot's name.
        name: String,
        /// The origin's name.
        origin: String,
        /// The snapshot's UUID once it is known.
        uuid: Option<String>,
    },
    /// A device-mapper device of our own.
    Dm {
        /// Its name.
        name: String,
    },
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Object::Lv { vg, name, .. } => write!(f, "volume {vg}/{name}"),
            Object::Dm { name } => write!(f, "device {name}"),
        }
    }
}

/// One line of a journal.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Record {
    Journal { version: u32, job: JobTag },
    Intend { n: u32, object: Object },
    Created { n: u32, uuid: String },
    Removed { n: u32 },
}

/// What a journal file says.
#[derive(Debug)]
pub(super) struct Contents {
    /// Whose it is.
    pub job: JobTag,
    /// What may exist, by number; later numbers were created later.
    pub open: BTreeMap<u32, Object>,
    /// Lines that cannot be read. The last line may be torn by a crash: nothing was created for it.
    pub damaged: usize,
}

/// Reads a journal. `None`: there is no header, so that nothing was created.
pub(super) fn parse(text: &[u8]) -> Option<Contents> {
    let complete = text.iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1);
    let mut lines = text[..complete]
        .split(|&b| b == b'\n')
        .filter(|l| !l.is_empty());
    let job = match serde_json::from_slice(lines.next()?) {
        Ok(Record::Journal {
            version: VERSION,
            job,
        }) => job,
        _ => return None,
    };
    let mut contents = Contents {
        job,
        open: BTreeMap::new(),
        damaged: 0,
    };
    for line in lines {
        match serde_json::from_slice(line) {
            Ok(Record::Intend { n, object }) => {
                contents.open.insert(n, object);
            }
            Ok(Record::Created { n, uuid: known }) => {
                if let Some(Object::Lv { uuid, .. }) = contents.open.get_mut(&n) {
                    *uuid = Some(known);
                }
            }
            Ok(Record::Removed { n }) => {
                contents.open.remove(&n);
            }
            Ok(Record::Journal { .. }) | Err(_) => contents.damaged += 1,
        }
    }
    Some(contents)
}

/// Opens the folder of the journals, making it if needed. It must be a real folder of ours that
/// nobody else can write to: what stands in a journal is removed by root.
pub(crate) fn open_folder(path: &Path) -> Result<OwnedFd> {
    let failed = |step: &str, error: rustix::io::Errno| {
        Error::new(Code::JournalFailed, format!("{step} {}", path.display()))
            .because(std::io::Error::from(error))
    };
    match mkdirat(rustix::fs::CWD, path, Mode::RWXU) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(error) => return Err(failed("making", error)),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = openat(rustix::fs::CWD, path, flags, Mode::empty())
        .map_err(|error| failed("opening", error))?;
    let stat = fstat(&folder).map_err(|error| failed("reading", error))?;
    if stat.st_uid != rustix::process::geteuid().as_raw() || stat.st_mode & 0o022 != 0 {
        return Err(Error::new(
            Code::JournalFailed,
            format!("{} can be changed by others", path.display()),
        ));
    }
    Ok(folder)
}

/// The journal of one job.
#[derive(Debug)]
pub struct Journal {
    tag: JobTag,
    folder: OwnedFd,
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    file: File,
    length: u64,
    last: u32,
    open: BTreeMap<u32, Object>,
    closed: bool,
}

impl Journal {
    /// Starts the journal of a new job of this process, in a folder that is made if its parent
    /// exists.
    pub fn open(folder: &Path, job_id: u32) -> Result<Journal> {
        let tag = JobTag::new(job_id)?;
        let name = tag.journal_name();
        let path = folder.join(&name);
        let failed = |step: &str, error: std::io::Error| {
            Error::new(Code::JournalFailed, format!("{step} {}", path.display())).because(error)
        };
        let folder = open_folder(folder)?;
        // The file gets its name only when it is locked and has its header: a sweep never sees
        // a journal that looks abandoned.
        let unfinished = format!("{UNFINISHED}{name}");
        let flags = OFlags::WRONLY
            | OFlags::APPEND
            | OFlags::CREATE
            | OFlags::EXCL
            | OFlags::NOFOLLOW
            | OFlags::CLOEXEC;
        let fd = reach(Point::JournalCreate)
            .and_then(|()| openat(&folder, &unfinished, flags, Mode::RUSR | Mode::WUSR))
            .map_err(|error| failed("creating", error.into()))?;
        let mut file = File::from(fd);
        let header = line(&Record::Journal {
            version: VERSION,
            job: tag.clone(),
        })?;
        let ready = flock(&file, FlockOperation::NonBlockingLockExclusive)
            .and_then(|()| reach(Point::JournalHeader))
            .map_err(std::io::Error::from)
            .and_then(|()| file.write_all(&header))
            .and_then(|()| file.sync_all())
            .and_then(|()| {
                reach(Point::JournalRename)?;
                let flags = RenameFlags::NOREPLACE;
                Ok(renameat_with(&folder, &unfinished, &folder, &name, flags)?)
            })
            .and_then(|()| Ok(fsync(&folder)?));
        if let Err(error) = ready {
            for leftover in [&unfinished, &name] {
                let _ = unlinkat(&folder, leftover, AtFlags::empty());
            }
            return Err(failed("writing", error));
        }
        pass(Point::JournalReady);
        let length = u64::try_from(header.len()).unwrap_or(0);
        Ok(Journal {
            tag,
            folder,
            path,
            state: Mutex::new(State {
                file,
                length,
                last: 0,
                open: BTreeMap::new(),
                closed: false,
            }),
        })
    }

    /// The job.
    pub fn tag(&self) -> &JobTag {
        &self.tag
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Records are appended whole or taken back, also when a thread panicked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes down the snapshot volumes that are about to be created, one for each origin, with
    /// names that are not `taken`. When this returns, the intents are on the disk.
    pub fn intend_volumes(
        self: &Arc<Self>,
        origins: &[&LvName],
        taken: impl Fn(&LvName) -> bool,
    ) -> Result<Vec<Intent>> {
        let mut state = self.state();
        let mut n = state.last;
        let mut objects = Vec::new();
        let mut intents = Vec::new();
        for origin in origins {
            let name = loop {
                n += 1;
                let name = LvName::new(origin.vg(), self.tag.name(n))?;
                if !taken(&name) {
                    break name;
                }
            };
            let object = Object::Lv {
                vg: name.vg().to_owned(),
                name: name.lv().to_owned(),
                origin: origin.lv().to_owned(),
                uuid: None,
            };
            objects.push((n, object));
            intents.push(Intent {
                journal: Arc::clone(self),
                n,
                name,
            });
        }
        self.announce(&mut state, objects)?;
        Ok(intents)
    }

    /// A name that nothing else has, for a device.
    pub fn new_name(&self) -> String {
        let mut state = self.state();
        state.last += 1;
        self.tag.name(state.last)
    }

    /// Writes down that a device is about to be created. On the disk when it returns.
    pub fn intend(&self, object: &Object) -> Result<()> {
        let mut state = self.state();
        let n = state.last + 1;
        self.announce(&mut state, vec![(n, object.clone())])
    }

    /// Writes down that what was announced is gone, or was never made.
    pub fn gone(&self, object: &Object) {
        let found = self
            .state()
            .open
            .iter()
            .find_map(|(n, open)| (open == object).then_some(*n));
        if let Some(n) = found {
            self.removed(n);
        }
    }

    fn removed(&self, n: u32) {
        self.record(&Record::Removed { n });
        self.state().open.remove(&n);
    }

    /// Removes the file if nothing of the job is left; else it stays for the sweep, and the error
    /// names what is left.
    pub fn close(&self) -> Result<()> {
        let mut state = self.state();
        if state.closed {
            return Ok(());
        }
        // Devices go by themselves when nobody uses them any more. Volumes have an Intent each.
        state.open.retain(|_, object| match object {
            Object::Dm { name } => match dm::by_name(name) {
                Ok(device) => device.is_some(),
                Err(error) => {
                    log::warn!("{}", error.report());
                    true
                }
            },
            Object::Lv { .. } => true,
        });
        if !state.open.is_empty() {
            let left: Vec<String> = state.open.values().map(Object::to_string).collect();
            let text = format!(
                "{}; {} stays for the next sweep",
                left.join(", "),
                self.path.display()
            );
            return Err(Error::new(Code::ReleaseFailed, text));
        }
        state.closed = true;
        let removed = reach(Point::JournalRemove)
            .map_err(std::io::Error::from)
            .and_then(|()| remove_file(&self.folder, file_name(&self.path)));
        pass(Point::JournalRemoved);
        removed.map_err(|error| {
            Error::new(
                Code::JournalFailed,
                format!("removing {}", self.path.display()),
            )
            .because(error)
        })
    }

    fn announce(&self, state: &mut State, objects: Vec<(u32, Object)>) -> Result<()> {
        let mut text = Vec::new();
        for (n, object) in &objects {
            let (n, object) = (*n, object.clone());
            text.extend(line(&Record::Intend { n, object })?);
            state.last = n;
        }
        self.append(state, &text, true)?;
        pass(Point::JournalIntended);
        state.open.extend(objects);
        Ok(())
    }

    fn record(&self, record: &Record) {
        let written = line(record).and_then(|text| self.append(&mut self.state(), &text, false));
        if let Err(error) = written {
            // Harmless: a sweep finds out by itself.
            log::warn!("{}", error.report());
        }
    }

    /// Appends whole lines or nothing.
    fn append(&self, state: &mut State, text: &[u8], sync: bool) -> Result<()> {
        if state.closed {
            let what = format!("{} is closed", self.path.display());
            return Err(Error::new(Code::Internal, what));
        }
        let point = match sync {
            true => Point::JournalIntend,
            false => Point::JournalRecord,
        };
        let written = reach(point)
            .map_err(std::io::Error::from)
            .and_then(|()| state.file.write_all(text))
            .and_then(|()| if sync { state.file.sync_data() } else { Ok(()) });
        if let Err(error) = written {
            if let Err(undo) = state.file.set_len(state.length) {
                log::warn!("{}: {undo}", self.path.display());
            }
            return Err(Error::new(
                Code::JournalFailed,
                format!("writing {}", self.path.display()),
            )
            .because(error));
        }
        state.length += u64::try_from(text.len()).unwrap_or(0);
        Ok(())
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            log::error!("{}", error.report());
        }
    }
}

/// Removes a file of the folder for good.
pub(super) fn remove_file(folder: &OwnedFd, name: &Path) -> std::io::Result<()> {
    unlinkat(folder, name, AtFlags::empty())?;
    Ok(fsync(folder)?)
}

fn file_name(path: &Path) -> &Path {
    path.file_name().map_or(path, Path::new)
}

fn line(record: &Record) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec(record)
        .map_err(|error| Error::new(Code::JournalFailed, "a record").because(error))?;
    text.push(b'\n');
    Ok(text)
}

/// A volume that was announced to the journal. Dropping it leaves the volume to the sweep.
#[derive(Debug)]
pub struct Intent {
    journal: Arc<Journal>,
    n: u32,
    name: LvName,
}

impl Intent {
    /// The volume's name.
    pub fn name(&self) -> &LvName {
        &self.name
    }

    /// The job's journal.
    pub fn journal(&self) -> &Arc<Journal> {
        &self.journal
    }

    /// The volume exists; LVM gave it this UUID.
    pub fn created(&self, uuid: &LvmUuid) {
        self.journal.record(&Record::Created {
            n: self.n,
            uuid: uuid.to_string(),
        });
        if let Some(Object::Lv { uuid: slot, .. }) = self.journal.state().open.get_mut(&self.n) {
            *slot = Some(uuid.to_string());
        }
    }

    /// The volume was removed, or was never created.
    pub fn removed(self) {
        self.journal.removed(self.n);
    }
}

/// A journal file that the sweep holds the lock of.
#[derive(Debug)]
pub(super) struct Abandoned {
    /// What it says; `None` when it has no header.
    pub contents: Option<Contents>,
    _lock: OwnedFd,
}

impl Abandoned {
    /// One with a single entry.
    #[cfg(test)]
    pub fn for_test(job: JobTag, object: Object) -> Self {
        Abandoned {
            contents: Some(Contents {
                job,
                open: BTreeMap::from([(1, object)]),
                damaged: 0,
            }),
            _lock: File::open("/dev/null").unwrap().into(),
        }
    }
}

/// Takes over a journal whose job is gone. `None`: its job runs, or it is gone by now.
pub(super) fn take_over(folder: impl AsFd, name: &str) -> std::io::Result<Option<Abandoned>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = match openat(folder, name, flags, Mode::empty()) {
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        other => other?,
    };
    match flock(&fd, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        other => other?,
    }
    let stat = fstat(&fd)?;
    if stat.st_nlink == 0 {
        return Ok(None);
    }
    if stat.st_mode & libc::S_IFMT != libc::S_IFREG
        || stat.st_uid != rustix::process::geteuid().as_raw()
    {
        return Err(std::io::Error::other("not a file of ours"));
    }
    let mut text = Vec::new();
    let mut file = File::from(fd);
    std::io::Read::read_to_end(&mut file, &mut text)?;
    Ok(Some(Abandoned {
        contents: parse(&text),
        _lock: file.into(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(dir: &Path) -> Arc<Journal> {
        Arc::new(Journal::open(dir, 7).unwrap())
    }

    fn files(dir: &Path) -> Vec<String> {
        std::fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    fn origin() -> LvName {
        LvName::new("vg0", "domu").unwrap()
    }

    #[test]
    fn test_journal_holds_what_is_open_and_goes_when_empty() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("guestsnap");
        let journal = journal(&folder);
        let name = files(&folder).pop().unwrap();
        let other = LvName::new("vg1", "domu").unwrap();
        let mut intents = journal
            .intend_volumes(&[&origin(), &other], |_| false)
            .unwrap();
        let uuid = LvmUuid::from_compact(&"a".repeat(32)).unwrap();
        intents[1].created(&uuid);
        intents.remove(0).removed();

        let text = std::fs::read(folder.join(&name)).unwrap();
        let contents = parse(&text).unwrap();
        assert_eq!(&contents.job, journal.tag());
        assert_eq!(contents.damaged, 0);
        assert_eq!(
            contents.open.into_values().collect::<Vec<_>>(),
            [Object::Lv {
                vg: "vg1".into(),
                name: journal.tag().name(2),
                origin: "domu".into(),
                uuid: Some(uuid.to_string()),
            }]
        );

        // The running job's file cannot be taken over, not even from the same process.
        let dirfd = open_folder(&folder).unwrap();
        assert!(take_over(&dirfd, &name).unwrap().is_none());
        intents.pop().unwrap().removed();
        let device = Object::Dm {
            name: journal.new_name(),
        };
        journal.intend(&device).unwrap();
        journal.gone(&device);
        journal.close().unwrap();
        assert_eq!(journal.intend(&device).unwrap_err().code(), Code::Internal);
        drop(journal);
        assert!(files(&folder).is_empty());
    }

    #[test]
    fn test_journal_with_something_left_stays_and_can_be_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("guestsnap");
        let journal = journal(&folder);
        let intents = journal.intend_volumes(&[&origin()], |_| false).unwrap();
        drop(intents);
        assert_eq!(journal.close().unwrap_err().code(), Code::ReleaseFailed);
        drop(journal);
        let name = files(&folder).pop().unwrap();
        let taken = take_over(open_folder(&folder).unwrap(), &name)
            .unwrap()
            .unwrap();
        assert_eq!(taken.contents.unwrap().open.len(), 1);
    }

    #[test]
    fn test_torn_last_line_is_ignored_and_damage_is_counted() {
        let job = JobTag::new(1).unwrap();
        let mut text = line(&Record::Journal {
            version: VERSION,
            job,
        })
        .unwrap();
        let intent = line(&Record::Intend {
            n: 1,
            object: Object::Dm { name: "x".into() },
        })
        .unwrap();
        text.extend(&intent);
        text.extend(&intent[..intent.len() / 2]);
        let contents = parse(&text).unwrap();
        assert_eq!((contents.open.len(), contents.damaged), (1, 0));
        text.push(b'\n');
        text.extend(&intent);
        assert_eq!(parse(&text).unwrap().damaged, 1);
        assert!(parse(b"").is_none());
        assert!(parse(&intent).is_none());
    }

    #[test]
    fn test_folder_that_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let open = dir.path().join("open");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
        let error = Journal::open(&open, 1).unwrap_err();
        assert_eq!(error.code(), Code::JournalFailed);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        let error = Journal::open(&link, 1).unwrap_err();
        assert_eq!(error.code(), Code::JournalFailed);
    }
}
