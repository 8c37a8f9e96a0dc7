//! One restore: Bacula's calls per file, in order, onto [`crate::stream::Restorer`].

use std::borrow::Cow;
use std::ffi::CStr;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::caller::{CancelFlag, Importance, Reporter};
use super::into::IntoGuest;
use super::item::FileType;
use super::options::RestoreOptions;
use super::text::shown;
use crate::config::Directive;
use crate::error::{Code, Error, Result, escape};
use crate::inode::{Meta, Time};
use crate::stream::Restorer;
use crate::stream::restore::{Created, Replace, Request, What};

/// A file as Bacula asks for it.
#[derive(Debug, Clone, Copy)]
pub struct RestoreFile<'a> {
    /// Kind.
    pub file_type: FileType,
    /// Path to create, with `where` in front.
    pub name: &'a CStr,
    /// Target of a symbolic link; first name of a hard link, with `where` in front.
    pub link: &'a CStr,
    /// Saved attributes.
    pub stat: libc::stat,
    /// The folder asked for; `None` with RegexWhere.
    pub where_: Option<&'a CStr>,
    /// `a`, `w`, `n` or `o`.
    pub replace: u8,
}

/// The outcome for one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restored {
    /// Kept as it is on the host.
    Skipped,
    /// Data may follow.
    Data,
    /// A symbolic link, FIFO or device: no data follows, but attributes do.
    Node,
    /// No data follows.
    Created,
}

/// Facts and choices of a restore.
#[derive(Debug, Clone, Default)]
pub struct RestoreSettings {
    /// Bacula's JobId.
    pub job_id: u32,
    /// The daemon's working directory.
    pub working_dir: PathBuf,
    /// The answers to our questions.
    pub options: RestoreOptions,
}

/// A restore job.
#[expect(
    missing_debug_implementations,
    reason = "holds the daemon's side as a trait object"
)]
pub struct Restore {
    reporter: Arc<dyn Reporter>,
    cancel: CancelFlag,
    settings: RestoreSettings,
    /// The Plugin line of the backup, and the folder that its guests stand in.
    line: (Vec<u8>, Vec<u8>),
    /// The guest whose folder is stripped from the paths.
    stripped: Option<Vec<u8>>,
    /// The folder it restores below, and the writer. Made with the first file.
    target: Option<(Vec<u8>, Restorer)>,
    /// The guest whose disks it restores into. Closed after the writer.
    into: Option<Box<IntoGuest>>,
    /// The current file takes data.
    data: bool,
    /// The current file is left as it is. The daemon has a folder's record for us all the same.
    kept: bool,
    created: u64,
    skipped: u64,
    /// Files of ours that no guest gets.
    ours: u64,
    errors: u64,
    /// Nothing can be restored: the options or the target do not allow it.
    refused: bool,
    /// Files that were wanted may be missing: it ended early.
    ended: bool,
    said: bool,
    /// It ends without the event that ends a restore.
    dropped: bool,
}

impl Restore {
    /// A restore that has not begun.
    pub fn new(
        settings: RestoreSettings,
        reporter: Arc<dyn Reporter>,
        cancel: CancelFlag,
    ) -> Restore {
        Restore {
            reporter,
            cancel,
            settings,
            line: Default::default(),
            stripped: None,
            target: None,
            into: None,
            data: false,
            kept: false,
            created: 0,
            skipped: 0,
            ours: 0,
            errors: 0,
            refused: false,
            ended: false,
            said: false,
            dropped: false,
        }
    }

    /// The Plugin line that the next files were saved by.
    pub fn begin_command(&mut self, line: &[u8]) -> Result<()> {
        if self.strips() && self.line.0 != line {
            self.line = (line.to_vec(), Directive::from_line(line)?.path.into_bytes());
        }
        Ok(())
    }

    /// Creates a file. An error is one file's and the job goes on, unless it [is
    /// refused](Restore::is_refused).
    pub fn create(&mut self, file: &RestoreFile<'_>) -> Result<Restored> {
        let made = self.make(file);
        if let Err(error) = &made {
            self.errors += 1;
            self.refused |= error.code() == Code::BadRestoreOptions;
            self.ended |= self.refused || error.code() == Code::Cancelled;
            if self.refused && self.into.is_some() {
                // After a fatal error the Director may not listen any more.
                self.finish();
            }
        }
        made
    }

    /// Whether the job must end, because its options or its target do not allow it.
    pub fn is_refused(&self) -> bool {
        self.refused
    }

    /// Whether paths are those of a guest, without its folder.
    fn strips(&self) -> bool {
        let options = &self.settings.options;
        options.strip || options.into.is_some()
    }

    fn make(&mut self, file: &RestoreFile<'_>) -> Result<Restored> {
        self.end_file();
        self.data = false;
        // Records of a file that goes nowhere.
        self.kept = true;
        if self.cancel.is_set() {
            return Err(Error::new(Code::Cancelled, shown(file.name)));
        }
        let meta = meta(&file.stat);
        let Some(path) = self.place(file.name.to_bytes(), file.where_)? else {
            self.ours += 1;
            return Ok(Restored::Skipped);
        };
        self.kept = false;
        let first;
        let what = match file.file_type {
            FileType::Symlink => What::Symlink(file.link.to_bytes()),
            FileType::HardLink => {
                first = self.place(file.link.to_bytes(), file.where_)?;
                What::HardLink(first.as_deref().unwrap_or_default())
            }
            _ => What::Object,
        };
        let replace = Replace::from_char(file.replace).unwrap_or(Replace::Never);
        let request = Request {
            path: &path,
            what,
            meta,
            replace,
        };
        let created = self.restorer(file.where_)?.create(&request)?;
        self.created += u64::from(!matches!(created, Created::Skipped(_)));
        Ok(match created {
            Created::Extract => {
                self.data = true;
                Restored::Data
            }
            Created::Created if matches!(file.file_type, FileType::Symlink | FileType::Special) => {
                Restored::Node
            }
            Created::Created => Restored::Created,
            Created::Skipped(_) => {
                self.skipped += 1;
                self.kept = true;
                Restored::Skipped
            }
        })
    }

    /// Data of the current file.
    pub fn write(&mut self, data: &[u8]) -> io::Result<()> {
        self.with(|r| r.write(data))
    }

    /// Position of the next write.
    pub fn seek(&mut self, offset: u64) -> io::Result<()> {
        self.with(|r| r.seek(offset))
    }

    /// The end of the data.
    pub fn close_data(&mut self) -> io::Result<()> {
        if !self.data {
            return Ok(());
        }
        self.with(Restorer::finish_data)
    }

    /// One of our records.
    pub fn record(&mut self, bytes: &[u8]) {
        if self.kept {
            return;
        }
        if let Some((_, restorer)) = &mut self.target {
            if let Err(error) = restorer.apply_record(bytes) {
                self.attribute_problem(&error);
            }
        }
    }

    /// The current file has everything: its attributes are put on.
    pub fn end_file(&mut self) {
        let Some((_, restorer)) = &mut self.target else {
            return;
        };
        match restorer.finish() {
            Ok(problems) => {
                for problem in &problems {
                    self.attribute_problem(problem);
                }
            }
            Err(error) => {
                self.errors += 1;
                self.reporter.message(Importance::Error, &error.report());
            }
        }
    }

    /// The end of the job.
    pub fn finish(&mut self) {
        self.end_file();
        let target = self.target.is_some();
        self.end_target();
        if let Some(into) = self.into.take() {
            self.end_into(*into);
            return;
        }
        if target && !self.said {
            self.said = true;
            let ended = match self.ended || self.cancel.is_set() {
                true => "NOT COMPLETE, it ended early, ",
                false => "",
            };
            let text = format!(
                "restore: {ended}{} kept as they are on the host, {} errors",
                self.skipped, self.errors
            );
            self.reporter.message(Importance::Info, &text);
        }
    }

    /// Ends the restore into a guest's disks. Until everything is closed, nothing is known to be there.
    fn end_into(&mut self, into: IntoGuest) {
        let target = into.describe();
        // The daemon sends no event at the end of a job with errors, nor of one that was cut off.
        let all = self.reporter.came_to_all().unwrap_or(!self.dropped);
        let ended = self.ended || self.cancel.is_set() || !all;
        let half = ended && self.created > 0;
        // The Director does not listen to a job that was cancelled or has failed: the next one tells it.
        let failed = into.close(half && !self.refused);
        for error in &failed {
            self.attribute_problem(error);
        }
        self.said = true;
        let (created, kept, ours, errors) = (self.created, self.skipped, self.ours, self.errors);
        if half {
            let text = format!("{target}: it ended early, after {created} files");
            let error = Error::new(Code::HalfRestored, text);
            self.reporter.message(Importance::Error, &error.report());
        }
        let left = match failed.is_empty() {
            true => "its disks are released, nothing is left on this host",
            false => "see the errors above",
        };
        let text = format!(
            "restore into {target}: {created} files written, {kept} kept as they are in the guest, {ours} of \
             guestsnap's own left out, {errors} errors; {left}"
        );
        self.reporter.message(Importance::Info, &text);
    }

    /// Ends the restore below one folder.
    fn end_target(&mut self) {
        if let Some((_, restorer)) = self.target.take() {
            for text in restorer.end(|problem| self.attribute_problem(problem)) {
                // Warning: restore.
                self.reporter.message(Importance::Warning, &text);
            }
        }
    }

    /// Something of its attributes is not there, or of its content: the job must not look clean.
    fn attribute_problem(&mut self, error: &Error) {
        self.errors += 1;
        self.reporter.message(Importance::Error, &error.report());
    }

    fn with(&mut self, call: impl FnOnce(&mut Restorer) -> Result<()>) -> io::Result<()> {
        if self.cancel.is_set() {
            return Err(io::Error::from_raw_os_error(libc::ECANCELED));
        }
        let Some((_, restorer)) = &mut self.target else {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        };
        call(restorer).map_err(|error| {
            // The daemon prints one line with the error number; the reason is in ours.
            self.errors += 1;
            self.reporter.message(Importance::Error, &error.report());
            let mut cause = std::error::Error::source(&error);
            while let Some(inner) = cause {
                if let Some(errno) = inner.downcast_ref::<rustix::io::Errno>() {
                    return io::Error::from_raw_os_error(errno.raw_os_error());
                }
                cause = inner.source();
            }
            io::Error::from_raw_os_error(libc::EIO)
        })
    }

    /// Where a file goes: without the guest's own folder if that is wanted. `None`: nowhere, it is ours.
    fn place<'a>(
        &mut self,
        path: &'a [u8],
        where_: Option<&CStr>,
    ) -> Result<Option<Cow<'a, [u8]>>> {
        if !self.strips() {
            return Ok(Some(Cow::Borrowed(path)));
        }
        let (folder, guest, rest) = self.in_guest(path, where_)?;
        self.only(guest)?;
        if self.settings.options.into.is_none() {
            return Ok(Some(Cow::Owned([folder, rest].concat())));
        }
        let routed = self.target_guest()?.route(rest)?;
        Ok(routed.map(Cow::Owned))
    }

    /// An error of the options.
    fn bad(&self, what: &str) -> Error {
        let option = match &self.settings.options.into {
            Some(into) => format!("into={}", escape(into.as_bytes())),
            None => "strip=yes".to_owned(),
        };
        Error::new(Code::BadRestoreOptions, format!("{option}: {what}"))
    }

    /// The parts of a path: the folder of the restore, the guest's name, and the path in the guest.
    fn in_guest<'a, 'b>(
        &self,
        path: &'a [u8],
        where_: Option<&'b CStr>,
    ) -> Result<(&'b [u8], &'a [u8], &'a [u8])> {
        let Some(folder) = where_ else {
            return Err(self.bad("with RegexWhere or a prefix, strip there"));
        };
        let mut folder = folder.to_bytes();
        while let Some(shorter) = folder.strip_suffix(b"/") {
            folder = shorter;
        }
        match (folder.is_empty(), &self.settings.options.into) {
            (false, Some(_)) => {
                let shown = escape(folder);
                return Err(self.bad(&format!(
                    "files go into the guest's own disks: give where=/ and not {shown}"
                )));
            }
            (true, None) => {
                let what =
                    "without a folder to restore to, this host's own files would be replaced";
                return Err(self.bad(what));
            }
            _ => {}
        }
        let below = path
            .strip_prefix(folder)
            .and_then(|rest| rest.strip_prefix(&self.line.1[..]))
            .and_then(|rest| rest.strip_prefix(b"/"))
            .ok_or_else(|| self.bad(&format!("{} is in no guest's folder", escape(path))))?;
        let end = below.iter().position(|&b| b == b'/').unwrap_or(below.len());
        let (guest, rest) = below.split_at(end);
        Ok((folder, guest, rest))
    }

    /// Takes files of one guest alone. The daemon does not name the marked guests: a second one shows
    /// with its first file.
    fn only(&mut self, guest: &[u8]) -> Result<()> {
        match &self.stripped {
            None => {
                let option = match self.settings.options.into {
                    Some(_) => "into",
                    None => "strip=yes",
                };
                let text = format!(
                    "{option}: this restore takes files of {} alone; it ends where another guest's begin",
                    escape(guest)
                );
                self.reporter.message(Importance::Info, &text);
                self.stripped = Some(guest.to_vec());
                Ok(())
            }
            Some(only) if only == guest => Ok(()),
            Some(only) => Err(self.bad(&format!(
                "{0} and {1} would be mixed: what was restored of {0} stays, nothing of {1} was written; restore \
                 one guest at a time",
                escape(only),
                escape(guest)
            ))),
        }
    }

    /// The guest to restore into, opened with the first file.
    fn target_guest(&mut self) -> Result<&mut IntoGuest> {
        if self.into.is_none() {
            if self.refused {
                return Err(self.bad("it was refused before"));
            }
            let settings = &self.settings;
            let opened = IntoGuest::open(
                settings.options.into.as_deref().unwrap_or_default(),
                settings.working_dir.clone(),
                settings.job_id,
                self.reporter.as_ref(),
                &self.cancel,
            );
            let opened = opened.inspect_err(|_| self.refused = true)?;
            self.into = Some(Box::new(opened));
        }
        match &mut self.into {
            Some(into) => Ok(into),
            None => Err(Error::new(Code::Internal, "no guest to restore into")),
        }
    }

    /// The writer for this folder; a new one when the folder changes within a job.
    fn restorer(&mut self, where_: Option<&CStr>) -> Result<&mut Restorer> {
        let folder = where_.map(|w| w.to_bytes().to_vec()).unwrap_or_default();
        if self.target.as_ref().is_none_or(|(f, _)| *f != folder) {
            self.end_target();
        }
        match &mut self.target {
            Some((_, restorer)) => Ok(restorer),
            none => {
                let mut restorer = match &mut self.into {
                    Some(into) => into.restorer()?,
                    None => Restorer::new(Some(folder.as_slice()))?,
                };
                restorer.choose(self.settings.options.wanted);
                Ok(&mut none.insert((folder, restorer)).1)
            }
        }
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        self.dropped = true;
        self.finish();
    }
}

fn meta(stat: &libc::stat) -> Meta {
    let unsigned = |value: i64| u64::try_from(value).unwrap_or(0);
    let time = |seconds: i64, nanoseconds: i64| Time {
        seconds,
        nanoseconds: u32::try_from(nanoseconds).unwrap_or(0),
    };
    Meta {
        mode: stat.st_mode,
        uid: stat.st_uid,
        gid: stat.st_gid,
        nlink: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
        ino: stat.st_ino,
        dev: stat.st_dev,
        rdev: stat.st_rdev,
        size: unsigned(stat.st_size),
        blocks: unsigned(stat.st_blocks),
        blksize: u32::try_from(stat.st_blksize).unwrap_or(0),
        atime: time(stat.st_atime, stat.st_atime_nsec),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        btime: None,
        encrypted: false,
    }
}
