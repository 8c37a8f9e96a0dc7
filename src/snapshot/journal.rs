//! Write-ahead journal of the objects a job creates.
//!
//! Each job has one file in a directory of the daemon. The file stays locked (`flock`) while the
//! job or any of its objects exists, and is removed when none is left. An unlocked file belongs to
//! the sweep, whatever the state of its process.
//!
//! A file consists of JSON lines: a header, then records. An intent is synced to disk before the
//! object is created. Other records need no sync: the sweep notices by itself that an object is
//! gone.

mod record;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{
    AtFlags, FlockOperation, Mode, OFlags, RenameFlags, flock, fstat, fsync, mkdirat, openat,
    renameat_with, unlinkat,
};

use super::dm;
use super::lvm::LvmUuid;
use super::names::JobTag;
use crate::hostdev::lvname::LvName;

use crate::error::{Code, Error, Result};
use crate::point::{Point, pass, reach};

pub use record::Object;
pub(super) use record::{Contents, Unreadable};
use record::{Record, VERSION, parse};

/// Suffix of journal files.
pub(super) const SUFFIX: &str = ".journal";
/// Prefix of incomplete journal files; no object was created for them.
pub(super) const UNFINISHED: &str = ".new-";
/// Ends the name of an image that is being made.
pub const PARTIAL: &str = ".guestsnap-partial";

/// Opens the journal directory, creating it if needed. It must be a real directory of ours that
/// other users cannot write to: root removes the objects that journals name.
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
    /// Creates the journal of a new job in this process. Creates the directory if its parent
    /// exists.
    pub fn open(folder: &Path, job_id: u32) -> Result<Journal> {
        let tag = JobTag::new(job_id)?;
        let name = tag.journal_name();
        let path = folder.join(&name);
        let failed = |step: &str, error: std::io::Error| {
            Error::new(Code::JournalFailed, format!("{step} {}", path.display())).because(error)
        };
        let folder = open_folder(folder)?;
        // The file is renamed only when it is locked and has its header, so that a sweep never
        // takes it for abandoned.
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
        // Records are appended whole or rolled back, even if a thread panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the intent to create one snapshot per origin, with names not in `taken`. Synced to
    /// disk on return.
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
                let name = LvName::within(origin.vg().clone(), self.tag.name(n))?;
                if !taken(&name) {
                    break name;
                }
            };
            let object = Object::Lv {
                vg: name.vg().clone(),
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

    /// A unique device name.
    pub fn new_name(&self) -> String {
        let mut state = self.state();
        state.last += 1;
        self.tag.name(state.last)
    }

    /// Creates an empty unnamed file in the journal directory; it disappears with its last user.
    pub fn scratch(&self) -> Result<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = openat(&self.folder, ".", flags, Mode::RUSR | Mode::WUSR);
        file.map(File::from).map_err(|error| {
            let folder = self.path.parent().unwrap_or(&self.path).display();
            Error::new(
                Code::MapFailed,
                format!("a file without a name (O_TMPFILE) in {folder}"),
            )
            .because(std::io::Error::from(error))
        })
    }

    /// Records the intent to create an object. Synced to disk on return.
    pub fn intend(&self, object: &Object) -> Result<()> {
        let mut state = self.state();
        let n = state.last + 1;
        self.announce(&mut state, vec![(n, object.clone())])
    }

    /// Records that an announced object is gone or was never created.
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

    /// Removes the file if none of the job's objects is left. Otherwise leaves it to the sweep; the
    /// error names the rest.
    pub fn close(&self) -> Result<()> {
        let mut state = self.state();
        if state.closed {
            return Ok(());
        }
        // Devices disappear with their last user. Each volume has its own Intent.
        state.open.retain(|_, object| {
            let left = match object {
                Object::Dm { name } => dm::by_name(name).map(|device| device.is_some()),
                Object::Suspended { dm_uuid, .. } => dm::is_suspended(dm_uuid),
                Object::Image { path, .. } => Ok(path.symlink_metadata().is_ok()),
                Object::Lv { .. }
                | Object::Fresh { .. }
                | Object::Activated { .. }
                | Object::Into { .. } => return true,
            };
            left.unwrap_or_else(|error| {
                log::warn!("{}", error.report());
                true
            })
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

    /// Leaves the file to the next sweep, which reports its objects.
    pub fn leave(&self) {
        self.state().closed = true;
    }

    /// Whether the journal still lists a snapshot of this volume.
    pub(super) fn has_snapshot_of(&self, volume: &LvName) -> bool {
        self.state().open.values().any(|object| {
            matches!(object, Object::Lv { vg, origin, .. } if vg == volume.vg() && origin == volume.lv())
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
            // Harmless: a sweep detects it.
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

/// Removes a file from the directory and syncs.
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

/// An announced volume. Dropping it leaves the volume to the sweep.
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

    /// Records the UUID of the created volume.
    pub fn created(&self, uuid: &LvmUuid) {
        self.journal.record(&Record::Created {
            n: self.n,
            uuid: uuid.to_string(),
        });
        if let Some(Object::Lv { uuid: slot, .. }) = self.journal.state().open.get_mut(&self.n) {
            *slot = Some(uuid.to_string());
        }
    }

    /// Records that the volume was removed or never created.
    pub fn removed(self) {
        self.journal.removed(self.n);
    }
}

/// A journal file locked by the sweep.
#[derive(Debug)]
pub(super) struct Abandoned {
    /// Parsed content.
    pub contents: Contents,
    _lock: OwnedFd,
}

impl Abandoned {
    /// A journal with a single entry.
    #[cfg(test)]
    pub fn for_test(job: JobTag, object: Object) -> Self {
        Abandoned {
            contents: Contents {
                job,
                open: BTreeMap::from([(1, object)]),
                damaged: 0,
            },
            _lock: File::open("/dev/null").unwrap().into(),
        }
    }
}

/// State of a journal found by the sweep.
#[derive(Debug)]
pub(super) enum Found {
    /// The job is running, or the file is gone.
    Busy,
    /// The job is gone, and the journal is unreadable.
    Unreadable(Unreadable),
    /// The job is gone.
    Abandoned(Abandoned),
}

/// Locks a journal whose job is gone.
pub(super) fn take_over(folder: impl AsFd, name: &str) -> std::io::Result<Found> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = match openat(folder, name, flags, Mode::empty()) {
        Err(rustix::io::Errno::NOENT) => return Ok(Found::Busy),
        other => other?,
    };
    match flock(&fd, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(Found::Busy),
        other => other?,
    }
    let stat = fstat(&fd)?;
    if stat.st_nlink == 0 {
        return Ok(Found::Busy);
    }
    if stat.st_mode & libc::S_IFMT != libc::S_IFREG
        || stat.st_uid != rustix::process::geteuid().as_raw()
    {
        return Err(std::io::Error::other("not a file of ours"));
    }
    let mut text = Vec::new();
    let mut file = File::from(fd);
    std::io::Read::read_to_end(&mut file, &mut text)?;
    Ok(match parse(&text) {
        Ok(contents) => Found::Abandoned(Abandoned {
            contents,
            _lock: file.into(),
        }),
        Err(why) => Found::Unreadable(why),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hostdev::lvname::VgName;

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
                vg: VgName::new("vg1").unwrap(),
                name: journal.tag().name(2),
                origin: "domu".into(),
                uuid: Some(uuid.to_string()),
            }]
        );

        // A running job's journal stays locked, even against its own process.
        let dirfd = open_folder(&folder).unwrap();
        assert!(matches!(take_over(&dirfd, &name).unwrap(), Found::Busy));
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
        let taken = take_over(open_folder(&folder).unwrap(), &name).unwrap();
        let Found::Abandoned(taken) = taken else {
            panic!("{taken:?}")
        };
        assert_eq!(taken.contents.open.len(), 1);
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
        assert_eq!(parse(b"").unwrap_err(), Unreadable::Empty);
        for text in [&intent[..], b"{\"journal\":", b"\n", b"\0\0\0\0\n"] {
            assert_eq!(parse(text).unwrap_err(), Unreadable::NoHeader);
        }
        // Whatever else a later version says of its job.
        let newer = b"{\"journal\":{\"version\":7,\"job\":[1]}}\n{}\n";
        assert_eq!(parse(newer).unwrap_err(), Unreadable::Version(7));
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
