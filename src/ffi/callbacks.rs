//! The functions that the daemon calls. Every callback makes safe values of its arguments, a [`Call`] of the context
//! first. The rest of it is safe code: one step of [`crate::job`].

use std::collections::VecDeque;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::abi::{Callbacks, bEvent, bpContext, io_pkt, number, query_pkt, xacl_pkt};
use super::daemon::Job;
use super::packet::{
    Event, IoPacket, QueryPacket, RestoreFields, RestorePacket, SaveFields, SavePacket, XaclPacket,
    text,
};
use crate::job::options::{self, RestoreOptions};
use crate::job::{
    Backup, BackupSettings, CancelFlag, Daemon, FileType, Importance, Item, Reporter, Restore,
    RestoreFile, RestoreSettings, Restored, Step, query as queries,
};
use crate::{Code, Error};

/// Our functions.
pub static TABLE: Callbacks = Callbacks {
    new_plugin,
    free_plugin,
    plugin_value,
    event,
    start_backup_file,
    end_backup_file,
    start_restore_file,
    end_restore_file,
    io,
    create_file,
    set_attributes,
    check_file,
    xacl,
    query,
    metadata_restore,
};

/// The private data of one connection of the daemon.
struct Connection {
    /// Set by the thread that delivers a cancel, read by the job's thread.
    cancelled: CancelFlag,
    /// Set when a callback panicked: nothing of this job can be trusted any more.
    broken: AtomicBool,
    state: Mutex<State>,
}

/// The state of the connection.
#[derive(Default)]
struct State {
    /// Directives of the FileSet, in order.
    directives: Vec<Vec<u8>>,
    level: u8,
    since: i64,
    backup: Option<Box<Backup>>,
    restore_options: RestoreOptions,
    restore: Option<Box<Restore>>,
    /// The rest of the answer to a `.query`; `None` before one.
    answers: Option<VecDeque<CString>>,
    /// Kept for the daemon while it uses the pointer.
    answer: CString,
    /// Kept for the daemon while it uses the pointer.
    xattr: Vec<u8>,
}

impl Connection {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic is remembered in `broken`; clean-up still needs the data.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One call of the daemon, made from its context.
struct Call<'a> {
    /// `None` without a connection, and before `loadPlugin`.
    of: Option<(Job, &'a Connection)>,
}

impl<'a> Call<'a> {
    /// # Safety
    /// `context` is NULL or the daemon's context, whose `pContext` was set by [`new_plugin`]; it is not freed
    /// during `'a`.
    unsafe fn new(context: *mut bpContext) -> Call<'a> {
        // SAFETY: NULL or the daemon's own structure.
        let private = unsafe { context.as_ref() }.map(|context| context.pContext);
        // SAFETY: NULL, or made by `new_plugin` from a `Box` and valid until `free_plugin`.
        let connection =
            private.and_then(|private| unsafe { private.cast::<Connection>().as_ref() });
        let of = connection.and_then(|connection| Some((Job::new(context)?, connection)));
        Call { of }
    }

    /// Runs the callback: catches panics, answers `failed` when it cannot run.
    fn answer(self, failed: c_int, body: impl FnOnce(&Job, &Connection) -> c_int) -> c_int {
        let Some((job, connection)) = self.of else {
            return failed;
        };
        if connection.broken.load(Ordering::Relaxed) {
            return failed;
        }
        match catch_unwind(AssertUnwindSafe(|| body(&job, connection))) {
            Ok(answer) => answer,
            Err(panic) => {
                connection.broken.store(true, Ordering::Relaxed);
                report_panic(&job, panic.as_ref());
                failed
            }
        }
    }
}

fn report_panic(job: &Job, panic: &(dyn std::any::Any + Send)) {
    let what = panic
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no text".to_owned());
    job.message(
        Importance::Fatal,
        &Error::new(Code::Internal, format!("panic: {what}")).report(),
    );
}

unsafe extern "C" fn new_plugin(context: *mut bpContext) -> c_int {
    if context.is_null() {
        return number::RC_ERROR;
    }
    // Also called for every console connection: cheap and quiet.
    let connection = Box::new(Connection {
        cancelled: CancelFlag::default(),
        broken: AtomicBool::new(false),
        state: Mutex::default(),
    });
    // SAFETY: not NULL; the daemon gives the field to us.
    unsafe { (*context).pContext = Box::into_raw(connection).cast() };
    number::RC_OK
}

unsafe extern "C" fn free_plugin(context: *mut bpContext) -> c_int {
    if context.is_null() {
        return number::RC_ERROR;
    }
    // SAFETY: not NULL; the daemon's own structure.
    let private = unsafe { (*context).pContext }.cast::<Connection>();
    if private.is_null() {
        return number::RC_OK;
    }
    // SAFETY: as above.
    unsafe { (*context).pContext = std::ptr::null_mut() };
    // SAFETY: made by `new_plugin`, and no callback follows this one.
    let connection = unsafe { Box::from_raw(private) };
    // The only sure end of a job: JobEnd is not delivered for failed and cancelled ones.
    let end = catch_unwind(AssertUnwindSafe(move || {
        let mut state = connection.state();
        if let Some(mut backup) = state.backup.take() {
            backup.finish();
        }
        state.restore = None;
    }));
    if let (Err(panic), Some(job)) = (end, Job::new(context)) {
        report_panic(&job, panic.as_ref());
    }
    number::RC_OK
}

unsafe extern "C" fn plugin_value(_: *mut bpContext, _: c_int, _: *mut c_void) -> c_int {
    number::RC_OK
}

unsafe extern "C" fn metadata_restore(_: *mut bpContext, _: *mut c_void) -> c_int {
    number::RC_OK
}

unsafe extern "C" fn query(context: *mut bpContext, packet: *mut query_pkt) -> c_int {
    // SAFETY: the daemon's packet, ours during the call.
    let Some(mut packet) = (unsafe { QueryPacket::new(packet) }) else {
        return number::RC_ERROR;
    };
    // SAFETY: the context is the daemon's.
    let call = unsafe { Call::new(context) };
    call.answer(number::RC_ERROR, |_, connection| {
        let mut state = connection.state();
        let state = &mut *state;
        let answers = state.answers.get_or_insert_with(|| {
            let (line, parameter) = packet.question();
            let line_end = |text| CString::new(format!("{text}\n")).ok();
            let lines = queries::answer(&line, &parameter).into_iter();
            lines.filter_map(line_end).collect()
        });
        let next = answers.pop_front();
        let last = answers.is_empty();
        if last {
            state.answers = None;
        }
        state.answer = next.unwrap_or_default();
        packet.answer(&state.answer);
        if last { number::RC_OK } else { number::RC_MORE }
    })
}

unsafe extern "C" fn event(
    context: *mut bpContext,
    event: *mut bEvent,
    value: *mut c_void,
) -> c_int {
    // SAFETY: the daemon's event with its value.
    let Some(event) = (unsafe { Event::read(event, value) }) else {
        return number::RC_ERROR;
    };
    // SAFETY: the context is the daemon's.
    let call = unsafe { Call::new(context) };
    if let Event::Cancel = event {
        // Another thread than the job's: atomics only, no lock, no message.
        if let Some((_, connection)) = call.of {
            connection.cancelled.set();
        }
        return number::RC_OK;
    }
    call.answer(number::RC_ERROR, |job, connection| {
        let mut state = connection.state();
        handle_event(job, connection, &mut state, event)
    })
}

fn handle_event(job: &Job, connection: &Connection, state: &mut State, event: Event<'_>) -> c_int {
    match event {
        Event::Level(level) => state.level = level,
        Event::Since(since) => state.since = since,
        Event::PluginCommand(line) => state.directives.push(line),
        Event::StartVerifyJob if state.level == b'd' && !state.directives.is_empty() => {
            job.message(
                    Importance::Info,
                    "a Verify job of level DiskToCatalog cannot see guests: Bacula compares files on this host's own disks only. Use VolumeToCatalog or Data.",
                );
        }
        Event::StartBackupJob if !state.directives.is_empty() => {
            return start_backup(job, connection, state, false);
        }
        Event::BackupCommand => return begin_line(job, connection, state, false),
        Event::EstimateCommand => return begin_line(job, connection, state, true),
        Event::Answers(answers) => match RestoreOptions::parse(answers) {
            Ok(options) => {
                job.message(Importance::Info, &options.describe());
                state.restore_options = options;
            }
            Err(error) => job.message(Importance::Fatal, &error.report()),
        },
        Event::RestoreCommand(line) => {
            let options = state.restore_options.clone();
            let restore = state.restore.get_or_insert_with(|| {
                let cancel = connection.cancelled.clone();
                let settings = RestoreSettings {
                    job_id: job_id(job),
                    working_dir: working_dir(job),
                    options,
                };
                Box::new(Restore::new(settings, Arc::new(*job), cancel))
            });
            if let Err(error) = restore.begin_command(&line) {
                job.message(Importance::Fatal, &error.report());
            }
        }
        Event::EndJob => {
            if let Some(backup) = state.backup.as_mut() {
                backup.finish();
            }
        }
        Event::EndRestoreJob => {
            if let Some(restore) = state.restore.as_mut() {
                restore.finish();
            }
        }
        Event::StartVerifyJob | Event::StartBackupJob | Event::Cancel | Event::Other => {}
    }
    number::RC_OK
}

/// The daemon runs the next line. An estimate has no event of its own before the first.
fn begin_line(job: &Job, connection: &Connection, state: &mut State, estimate: bool) -> c_int {
    if state.backup.is_none() && start_backup(job, connection, state, estimate) != number::RC_OK {
        return number::RC_ERROR;
    }
    let Some(backup) = state.backup.as_mut() else {
        return number::RC_ERROR;
    };
    if let Err(error) = backup.begin_command() {
        job.message(Importance::Fatal, &error.report());
        return number::RC_ERROR;
    }
    number::RC_OK
}

fn start_backup(job: &Job, connection: &Connection, state: &mut State, estimate: bool) -> c_int {
    let accurate = job.integer(number::VAR_ACCURATE).is_some_and(|v| v != 0);
    let text = |name: Option<CString>| name.unwrap_or_default().to_string_lossy().into_owned();
    let settings = BackupSettings {
        job_id: job_id(job),
        job: text(job.string(number::VAR_JOB_NAME)),
        previous: text(job.previous_job()),
        working_dir: working_dir(job),
        // A full job with a base is told apart by accurate mode: it asks about every file.
        full: matches!(state.level, b'F' | 0) && !accurate,
        accurate,
        estimate,
        since: state.since,
    };
    let directives = state.directives.clone();
    let started = first_part(job, estimate).and_then(|()| {
        let cancel = connection.cancelled.clone();
        Backup::start(settings, &directives, Arc::new(*job), cancel)
    });
    match started {
        Ok(backup) => {
            state.backup = Some(Box::new(backup));
            number::RC_OK
        }
        Err(error) => {
            job.message(Importance::Fatal, &error.report());
            number::RC_ERROR
        }
    }
}

fn job_id(job: &Job) -> u32 {
    let id = job.integer(number::VAR_JOB_ID);
    id.and_then(|id| u32::try_from(id).ok()).unwrap_or(0)
}

fn working_dir(job: &Job) -> PathBuf {
    job.string(number::VAR_WORKING_DIR)
        .map_or_else(|| PathBuf::from("/var/lib/bacula"), |dir| path_of(&dir))
}

/// Refuses a job that continues another part, told by the files counted at its start. Bacula then takes a file that
/// was cut off for one that is saved, and of two files with one path it may restore either.
fn first_part(job: &Job, estimate: bool) -> Result<(), Error> {
    match job.file_index() {
        sent if sent > 0 && !estimate => {
            let text = format!("{sent} files before the restart");
            Err(Error::new(Code::Restarted, text))
        }
        _ => Ok(()),
    }
}

fn path_of(text: &CStr) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    PathBuf::from(std::ffi::OsStr::from_bytes(text.to_bytes()))
}

/// Asks the daemon about candidates with the packet of the running `startBackupFile`.
struct Asking<'a, 'b> {
    job: &'a Job,
    packet: SavePacket<'b>,
}

fn save_fields(item: &Item) -> SaveFields<'_> {
    let file_type = match item.file_type {
        FileType::Regular if item.stat.st_size == 0 => number::FT_REGE,
        FileType::Regular => number::FT_REG,
        FileType::Directory => number::FT_DIREND,
        FileType::Symlink => number::FT_LNK,
        FileType::HardLink => number::FT_LNKSAVED,
        FileType::Special => number::FT_SPEC,
    };
    SaveFields {
        file_type,
        name: &item.name,
        link: item.link.as_deref(),
        stat: &item.stat,
        // The daemon reads whatever is not marked, even directories.
        no_read: item.file_type != FileType::Regular || item.stat.st_size == 0,
        link_file_index: item.link_file_index,
        sparse: item.sparse,
    }
}

impl Daemon for Asking<'_, '_> {
    fn accepts(&mut self, item: &Item) -> bool {
        // The daemon matches a directory's bare name with its patterns, as for its own files.
        self.packet.fill(&SaveFields {
            name: item.bare_name(),
            ..save_fields(item)
        });
        self.job.accept(&mut self.packet)
    }

    fn changed(&mut self, item: &Item) -> bool {
        // The accurate list has directories with their slash; the rest is there.
        self.packet.rename(item.accurate_name());
        self.job.changed(&mut self.packet)
    }

    fn mark_seen(&mut self, item: &Item) {
        self.job.mark_seen(item.accurate_name());
    }
}

unsafe extern "C" fn start_backup_file(context: *mut bpContext, packet: *mut c_void) -> c_int {
    // SAFETY: the context is the daemon's.
    let call = unsafe { Call::new(context) };
    call.answer(number::RC_MAX, |job, connection| {
        // SAFETY: the daemon's packet, ours during the call.
        let Some(packet) = (unsafe { SavePacket::new(job.version(), packet) }) else {
            let what = "the daemon's save packet has another size than its version says";
            job.message(
                Importance::Fatal,
                &Error::new(Code::UnknownInterface, what).report(),
            );
            return number::RC_MAX;
        };
        let mut state = connection.state();
        let Some(backup) = state.backup.as_mut() else {
            return number::RC_MAX;
        };
        let mut asking = Asking { job, packet };
        match backup.next_file(&mut asking) {
            // The item lives in the backup until the next call.
            Ok(Step::Accepted(item)) => {
                asking.packet.rename(&item.name);
                number::RC_OK
            }
            Ok(Step::Other(item)) => {
                asking.packet.fill(&save_fields(item));
                number::RC_OK
            }
            Ok(Step::Questions) => {
                let packet = &mut asking.packet;
                packet.fill_object(options::NAME, options::QUESTIONS);
                number::RC_OK
            }
            Ok(Step::End) => number::RC_MAX,
            Err(error) => {
                job.message(Importance::Fatal, &error.report());
                number::RC_MAX
            }
        }
    })
}

unsafe extern "C" fn end_backup_file(context: *mut bpContext) -> c_int {
    // SAFETY: the context is the daemon's.
    let call = unsafe { Call::new(context) };
    call.answer(number::RC_ERROR, |job, connection| {
        if let Some(backup) = connection.state().backup.as_mut() {
            backup.end_file(job.file_index());
        }
        // startBackupFile ends the list.
        number::RC_MORE
    })
}

unsafe extern "C" fn io(context: *mut bpContext, packet: *mut io_pkt) -> c_int {
    // SAFETY: the daemon's packet and buffer, ours during the call.
    let Some(mut packet) = (unsafe { IoPacket::new(packet) }) else {
        return number::RC_ERROR;
    };
    // SAFETY: the context is the daemon's.
    let call = unsafe { Call::new(context) };
    call.answer(number::RC_ERROR, |_, connection| {
        let result = transfer(&mut connection.state(), &mut packet);
        packet.answer(&result);
        match result {
            Ok(_) => number::RC_OK,
            Err(_) => number::RC_ERROR,
        }
    })
}

fn transfer(state: &mut State, packet: &mut IoPacket<'_>) -> io::Result<c_int> {
    let no_job = || io::Error::from_raw_os_error(libc::EINVAL);
    match packet.function() {
        number::IO_OPEN => Ok(0),
        number::IO_READ => {
            let backup = state.backup.as_mut().ok_or_else(no_job)?;
            // A small file needs no more of the daemon's 64 KiB, and is sooner cleared.
            let room = packet.room(backup.at_most()).ok_or_else(no_job)?;
            c_int::try_from(backup.read(room)?).map_err(io::Error::other)
        }
        number::IO_WRITE => {
            let data = packet.data().ok_or_else(no_job)?;
            state.restore.as_mut().ok_or_else(no_job)?.write(data)?;
            Ok(packet.count())
        }
        number::IO_SEEK => {
            let offset = u64::try_from(packet.offset()).map_err(io::Error::other)?;
            state.restore.as_mut().ok_or_else(no_job)?.seek(offset)?;
            Ok(0)
        }
        number::IO_CLOSE => {
            if let Some(restore) = state.restore.as_mut() {
                restore.close_data()?;
            }
            Ok(0)
        }
        _ => Err(no_job()),
    }
}

unsafe extern "C" fn start_restore_file(context: *mut bpContext, _: *const c_char) -> c_int {
    // Anything but OK would let the daemon restore the file itself: refuse in createFile instead.
    // SAFETY: the context is the daemon's.
    let call = unsafe { Call::new(context) };
    call.answer(number::RC_OK, |_, _| number::RC_OK)
}

unsafe extern "C" fn end_restore_file(context: *mut bpContext) -> c_int {
    // SAFETY: the context is the daemon's.
    let call = unsafe { Call::new(context) };
    call.answer(number::RC_OK, |_, connection| {
        if let Some(restore) = connection.state().restore.as_mut() {
            restore.end_file();
        }
        number::RC_OK
    })
}

fn restore_file<'a>(fields: &RestoreFields<'a>) -> Option<RestoreFile<'a>> {
    let file_type = match fields.file_type {
        number::FT_REG | number::FT_REGE => FileType::Regular,
        number::FT_DIREND => FileType::Directory,
        number::FT_LNK => FileType::Symlink,
        number::FT_LNKSAVED => FileType::HardLink,
        number::FT_SPEC => FileType::Special,
        _ => return None,
    };
    Some(RestoreFile {
        file_type,
        name: fields.name,
        link: fields.link,
        stat: fields.stat,
        where_: fields.where_,
        replace: fields.replace,
    })
}

unsafe extern "C" fn create_file(context: *mut bpContext, packet: *mut c_void) -> c_int {
    // SAFETY: the context is the daemon's.
    let call = unsafe { Call::new(context) };
    call.answer(number::RC_ERROR, |job, connection| {
        // SAFETY: the daemon's packet, ours during the call.
        let Some(mut packet) = (unsafe { RestorePacket::new(job.version(), packet) }) else {
            return number::RC_ERROR;
        };
        packet.set_status(number::CF_ERROR);
        let file = packet.fields().and_then(|fields| restore_file(&fields));
        let mut state = connection.state();
        let (Some(file), Some(restore)) = (file, state.restore.as_mut()) else {
            let what = "the daemon's restore packet is of an unknown kind";
            job.message(
                Importance::Error,
                &Error::new(Code::UnknownInterface, what).report(),
            );
            return number::RC_OK;
        };
        let status = match restore.create(&file) {
            Ok(Restored::Skipped) => number::CF_SKIP,
            // The daemon hands over extended attributes of links and nodes only after this answer, although no
            // data follows.
            Ok(Restored::Data | Restored::Node) => number::CF_EXTRACT,
            Ok(Restored::Created) => number::CF_CREATED,
            Err(error) => {
                let importance = match restore.is_refused() {
                    true => Importance::Fatal,
                    false => Importance::Error,
                };
                job.message(importance, &error.report());
                number::CF_ERROR
            }
        };
        packet.set_status(status);
        number::RC_OK
    })
}

unsafe extern "C" fn set_attributes(context: *mut bpContext, packet: *mut c_void) -> c_int {
    // The attributes came with createFile already; they are set in endRestoreFile, when the data
    // and the extended attributes are there. Here the daemon only asks which side sets them.
    // SAFETY: the context is the daemon's.
    let call = unsafe { Call::new(context) };
    call.answer(number::RC_ERROR, |job, _| {
        // SAFETY: the daemon's packet, ours during the call.
        let Some(mut packet) = (unsafe { RestorePacket::new(job.version(), packet) }) else {
            return number::RC_ERROR;
        };
        packet.set_status(number::CF_CREATED);
        number::RC_OK
    })
}

unsafe extern "C" fn check_file(context: *mut bpContext, name: *mut c_char) -> c_int {
    // SAFETY: NULL or a string of the daemon for the time of the call.
    let name = unsafe { text(name) };
    // SAFETY: the context is the daemon's.
    let call = unsafe { Call::new(context) };
    // RC_SEEN keeps the file in the catalog. After a fault inside us nothing must be recorded as
    // deleted.
    call.answer(number::RC_SEEN, |_, connection| {
        let state = connection.state();
        let backup = name.zip(state.backup.as_ref());
        if backup.is_some_and(|(name, backup)| backup.must_keep(name.to_bytes())) {
            number::RC_SEEN
        } else {
            number::RC_OK
        }
    })
}

unsafe extern "C" fn xacl(context: *mut bpContext, packet: *mut xacl_pkt) -> c_int {
    // SAFETY: the daemon's packet, ours during the call.
    let Some(mut packet) = (unsafe { XaclPacket::new(packet) }) else {
        return number::RC_ERROR;
    };
    let function = packet.function();
    if function == number::ACL_BACKUP || function == number::XATTR_BACKUP {
        // A count that stays above zero would make the daemon ask for ever.
        packet.send_none();
    }
    // SAFETY: the context is the daemon's.
    let call = unsafe { Call::new(context) };
    // RC_OK also on failure: other answers make the daemon print a misleading warning per file.
    call.answer(number::RC_OK, |_, connection| {
        let mut state = connection.state();
        let state = &mut *state;
        if function == number::XATTR_BACKUP {
            if let Some(record) = state.backup.as_mut().and_then(|b| b.record()) {
                state.xattr = record;
                packet.send(&mut state.xattr);
            }
        } else if let (Some(record), Some(restore)) = (packet.received(), state.restore.as_mut()) {
            restore.record(record);
        }
        number::RC_OK
    })
}
