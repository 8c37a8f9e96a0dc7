//! What the daemon calls. Every callback is the same thin shell ([`shell`]) around one step of
//! [`crate::job`].

use std::collections::VecDeque;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::abi::{
    Callbacks, RestoreFields, SaveFields, bEvent, bpContext, io_pkt, number, query_pkt,
    read_answers, text, xacl_pkt,
};
use super::daemon::Job;
use crate::job::options::{self, RestoreOptions};
use crate::job::{
    Backup, BackupSettings, CancelFlag, Daemon, FileType, Importance, Item, Reporter, Restore,
    RestoreFile, Restored, Step, query as queries,
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

/// What the connection is doing.
#[derive(Default)]
struct State {
    /// Directives of the FileSet, in order.
    directives: Vec<Vec<u8>>,
    level: u8,
    since: i64,
    backup: Option<Box<Backup>>,
    restore_options: RestoreOptions,
    restore: Option<Box<Restore>>,
    /// What is left of the answer to a `.query`; `None` before one.
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

/// The connection behind a context; `None` for NULL pointers.
///
/// # Safety
/// `context` is NULL or the daemon's context whose `pContext` is what [`new_plugin`] put there.
unsafe fn connection<'a>(context: *mut bpContext) -> Option<&'a Connection> {
    if context.is_null() {
        return None;
    }
    // SAFETY: not NULL; the daemon's own structure.
    let private = unsafe { (*context).pContext }.cast::<Connection>();
    // SAFETY: NULL, or made by `new_plugin` from a `Box` and valid until `free_plugin`.
    unsafe { private.as_ref() }
}

/// Runs one callback: finds the connection, catches panics, answers `failed` when it cannot run.
///
/// # Safety
/// As [`connection`].
unsafe fn shell(
    context: *mut bpContext,
    failed: c_int,
    body: impl FnOnce(&Job, &Connection) -> c_int,
) -> c_int {
    // SAFETY: passed on to the caller.
    let (Some(connection), Some(job)) = (unsafe { connection(context) }, Job::new(context)) else {
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
    if packet.is_null() {
        return number::RC_ERROR;
    }
    // SAFETY: the daemon's packet, the same in all versions that have it, ours during the call.
    let packet = unsafe { &mut *packet };
    packet.result = std::ptr::null_mut();
    // SAFETY: the context is the daemon's.
    unsafe {
        shell(context, number::RC_ERROR, |_, connection| {
            let mut state = connection.state();
            let state = &mut *state;
            let (line, parameter) = (
                command(packet.command.cast()),
                command(packet.parameter.cast()),
            );
            let answers = state.answers.get_or_insert_with(|| {
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
            packet.result = state.answer.as_ptr().cast_mut();
            if last { number::RC_OK } else { number::RC_MORE }
        })
    }
}

unsafe extern "C" fn event(
    context: *mut bpContext,
    event: *mut bEvent,
    value: *mut c_void,
) -> c_int {
    if event.is_null() {
        return number::RC_ERROR;
    }
    // SAFETY: not NULL; one integer in every version.
    let kind = unsafe { (*event).eventType };
    let Ok(kind) = c_int::try_from(kind) else {
        return number::RC_OK;
    };
    if kind == number::EVENT_CANCEL_COMMAND {
        // Another thread than the job's: atomics only, no lock, no message.
        // SAFETY: the context is the daemon's.
        if let Some(connection) = unsafe { connection(context) } {
            connection.cancelled.set();
        }
        return number::RC_OK;
    }
    // SAFETY: the context is the daemon's.
    unsafe {
        shell(context, number::RC_ERROR, |job, connection| {
            let mut state = connection.state();
            handle_event(job, connection, &mut state, kind, value)
        })
    }
}

/// The command behind an event's value, copied.
///
/// # Safety
/// `value` is NULL or a string of the daemon.
unsafe fn command(value: *mut c_void) -> Vec<u8> {
    // SAFETY: passed on to the caller.
    unsafe { text(value.cast::<c_char>()) }
        .map(|c| c.to_bytes().to_vec())
        .unwrap_or_default()
}

fn handle_event(
    job: &Job,
    connection: &Connection,
    state: &mut State,
    kind: c_int,
    value: *mut c_void,
) -> c_int {
    match kind {
        // Scalars come by value in the pointer.
        number::EVENT_LEVEL => state.level = u8::try_from(value.addr()).unwrap_or(b'F'),
        number::EVENT_SINCE => state.since = i64::try_from(value.addr()).unwrap_or(0),
        number::EVENT_PLUGIN_COMMAND => {
            // SAFETY: the value of this event is a string.
            state.directives.push(unsafe { command(value) });
        }
        number::EVENT_START_VERIFY_JOB if state.level == b'd' && !state.directives.is_empty() => {
            job.message(
                    Importance::Info,
                    "a Verify job of level DiskToCatalog cannot see guests: Bacula compares files on this host's own disks only. Use VolumeToCatalog or Data.",
                );
        }
        number::EVENT_START_BACKUP_JOB if !state.directives.is_empty() => {
            return start_backup(job, connection, state, false);
        }
        number::EVENT_BACKUP_COMMAND | number::EVENT_ESTIMATE_COMMAND => {
            let estimate = kind == number::EVENT_ESTIMATE_COMMAND;
            if state.backup.is_none()
                && start_backup(job, connection, state, estimate) != number::RC_OK
            {
                return number::RC_ERROR;
            }
            // SAFETY: the value of this event is a string.
            let command = unsafe { command(value) };
            let Some(backup) = state.backup.as_mut() else {
                return number::RC_ERROR;
            };
            if let Err(error) = backup.begin_command(&command) {
                job.message(Importance::Fatal, &error.report());
                return number::RC_ERROR;
            }
        }
        // The one without a value ends them.
        number::EVENT_RESTORE_OBJECT if !value.is_null() => {
            // SAFETY: the value of this event is a restore object.
            let answers = unsafe { read_answers(value.cast()) };
            match answers.map(RestoreOptions::parse) {
                Some(Ok(options)) => {
                    state.restore_options = options;
                    job.message(Importance::Info, &options.describe());
                }
                Some(Err(error)) => job.message(Importance::Fatal, &error.report()),
                None => {}
            }
        }
        number::EVENT_RESTORE_COMMAND => {
            let options = state.restore_options;
            let restore = state.restore.get_or_insert_with(|| {
                let cancel = connection.cancelled.clone();
                Box::new(Restore::new(Arc::new(*job), cancel, options))
            });
            // SAFETY: the value of this event is a string.
            if let Err(error) = restore.begin_command(&unsafe { command(value) }) {
                job.message(Importance::Fatal, &error.report());
            }
        }
        number::EVENT_END_BACKUP_JOB | number::EVENT_JOB_END => {
            if let Some(backup) = state.backup.as_mut() {
                backup.finish();
            }
        }
        number::EVENT_END_RESTORE_JOB => {
            if let Some(restore) = state.restore.as_mut() {
                restore.finish();
            }
        }
        _ => {}
    }
    number::RC_OK
}

fn start_backup(job: &Job, connection: &Connection, state: &mut State, estimate: bool) -> c_int {
    let job_id = job
        .integer(number::VAR_JOB_ID)
        .and_then(|id| u32::try_from(id).ok())
        .unwrap_or(0);
    let accurate = job.integer(number::VAR_ACCURATE).is_some_and(|v| v != 0);
    let text = |name: Option<CString>| name.unwrap_or_default().to_string_lossy().into_owned();
    let settings = BackupSettings {
        job_id,
        job: text(job.string(number::VAR_JOB_NAME)),
        previous: text(job.previous_job()),
        working_dir: job
            .string(number::VAR_WORKING_DIR)
            .map_or_else(|| PathBuf::from("/var/lib/bacula"), |dir| path_of(&dir)),
        // A full job with a base is told apart by accurate mode: it asks about every file.
        full: matches!(state.level, b'F' | 0) && !accurate,
        accurate,
        estimate,
        since: state.since,
    };
    let directives = state.directives.clone();
    match Backup::start(
        settings,
        &directives,
        Arc::new(*job),
        connection.cancelled.clone(),
    ) {
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

fn path_of(text: &CStr) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    PathBuf::from(std::ffi::OsStr::from_bytes(text.to_bytes()))
}

/// Asks the daemon about candidates with the packet of the running `startBackupFile`.
struct Asking<'a> {
    job: &'a Job,
    packet: *mut c_void,
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
        stat: item.stat,
        // The daemon reads whatever is not marked, even directories.
        no_read: item.file_type != FileType::Regular || item.stat.st_size == 0,
        link_file_index: item.link_file_index,
        sparse: item.sparse,
    }
}

impl Daemon for Asking<'_> {
    fn accepts(&mut self, item: &Item) -> bool {
        // The daemon matches a directory's bare name with its patterns, as for its own files.
        let fields = SaveFields {
            name: item.bare_name(),
            ..save_fields(item)
        };
        // SAFETY: the packet of the running callback.
        unsafe { self.job.accept(self.packet, &fields) }
    }

    fn changed(&mut self, item: &Item) -> bool {
        // SAFETY: the packet of the running callback.
        unsafe { self.job.changed(self.packet, &save_fields(item)) }
    }

    fn mark_seen(&mut self, item: &Item) {
        self.job.mark_seen(item.accurate_name());
    }
}

unsafe extern "C" fn start_backup_file(context: *mut bpContext, packet: *mut c_void) -> c_int {
    // SAFETY: the context is the daemon's.
    unsafe {
        shell(context, number::RC_MAX, |job, connection| {
            // SAFETY: the daemon's packet, its size field leads in every version.
            if packet.is_null() || !job.version().save_packet_fits(packet) {
                let what = "the daemon's save packet has another size than its version says";
                job.message(
                    Importance::Fatal,
                    &Error::new(Code::UnknownInterface, what).report(),
                );
                return number::RC_MAX;
            }
            let mut state = connection.state();
            let Some(backup) = state.backup.as_mut() else {
                return number::RC_MAX;
            };
            match backup.next_file(&mut Asking { job, packet }) {
                Ok(Step::File(item)) => {
                    // SAFETY: the packet of this callback; the item lives in the backup until
                    // the next call.
                    job.version().fill_save(packet, &save_fields(item));
                    number::RC_OK
                }
                Ok(Step::Questions) => {
                    // SAFETY: the packet of this callback.
                    job.version()
                        .fill_object(packet, options::NAME, options::QUESTIONS);
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
}

unsafe extern "C" fn end_backup_file(context: *mut bpContext) -> c_int {
    // SAFETY: the context is the daemon's.
    unsafe {
        shell(context, number::RC_ERROR, |job, connection| {
            if let Some(backup) = connection.state().backup.as_mut() {
                backup.end_file(job.file_index());
            }
            // startBackupFile ends the list.
            number::RC_MORE
        })
    }
}

unsafe extern "C" fn io(context: *mut bpContext, packet: *mut io_pkt) -> c_int {
    if packet.is_null() {
        return number::RC_ERROR;
    }
    // SAFETY: the daemon's packet, the same in all versions, ours during the call.
    let packet = unsafe { &mut *packet };
    packet.status = -1;
    packet.io_errno = libc::EIO;
    // SAFETY: the context is the daemon's.
    unsafe {
        shell(context, number::RC_ERROR, |_, connection| {
            let mut state = connection.state();
            match transfer(&mut state, packet) {
                Ok(status) => {
                    packet.status = status;
                    packet.io_errno = 0;
                    number::RC_OK
                }
                Err(error) => {
                    packet.status = -1;
                    packet.io_errno = error.raw_os_error().unwrap_or(libc::EIO);
                    number::RC_ERROR
                }
            }
        })
    }
}

fn transfer(state: &mut State, packet: &mut io_pkt) -> io::Result<c_int> {
    let count = usize::try_from(packet.count).unwrap_or(0);
    let no_job = || io::Error::from_raw_os_error(libc::EINVAL);
    match packet.func as c_int {
        number::IO_OPEN => Ok(0),
        number::IO_READ => {
            if packet.buf.is_null() {
                return Err(no_job());
            }
            let backup = state.backup.as_mut().ok_or_else(no_job)?;
            // A small file needs no more of the daemon's 64 KiB, and is sooner cleared.
            let count = count.min(backup.at_most());
            // SAFETY: the daemon gives a buffer of `count` bytes or more for the time of the call.
            // It may be uninitialised memory: it is cleared first, so that it is read only as
            // written.
            let buffer = unsafe {
                std::ptr::write_bytes(packet.buf, 0, count);
                std::slice::from_raw_parts_mut(packet.buf.cast::<u8>(), count)
            };
            let read = backup.read(buffer)?;
            c_int::try_from(read).map_err(io::Error::other)
        }
        number::IO_WRITE => {
            if packet.buf.is_null() {
                return Err(no_job());
            }
            // SAFETY: the daemon gives `count` bytes of data for the time of the call.
            let data = unsafe { std::slice::from_raw_parts(packet.buf.cast::<u8>(), count) };
            state.restore.as_mut().ok_or_else(no_job)?.write(data)?;
            Ok(packet.count)
        }
        number::IO_SEEK => {
            let offset = u64::try_from(packet.offset).map_err(io::Error::other)?;
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
    unsafe { shell(context, number::RC_OK, |_, _| number::RC_OK) }
}

unsafe extern "C" fn end_restore_file(context: *mut bpContext) -> c_int {
    // SAFETY: the context is the daemon's.
    unsafe {
        shell(context, number::RC_OK, |_, connection| {
            if let Some(restore) = connection.state().restore.as_mut() {
                restore.end_file();
            }
            number::RC_OK
        })
    }
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
    unsafe {
        shell(context, number::RC_ERROR, |job, connection| {
            if packet.is_null() {
                return number::RC_ERROR;
            }
            let version = job.version();
            version.set_create_status(packet, number::CF_ERROR);
            // SAFETY: the daemon's packet, valid during the callback.
            let file = version
                .read_restore(packet)
                .and_then(|fields| restore_file(&fields));
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
                // The daemon gives the extended attributes of links and nodes only to those who
                // take data, though none follows.
                Ok(Restored::Data | Restored::Node) => number::CF_EXTRACT,
                Ok(Restored::Created) => number::CF_CREATED,
                Err(error) => {
                    let importance = match error.code() {
                        Code::BadRestoreOptions => Importance::Fatal,
                        _ => Importance::Error,
                    };
                    job.message(importance, &error.report());
                    number::CF_ERROR
                }
            };
            version.set_create_status(packet, status);
            number::RC_OK
        })
    }
}

unsafe extern "C" fn set_attributes(context: *mut bpContext, packet: *mut c_void) -> c_int {
    // The attributes came with createFile already; they are set in endRestoreFile, when the data
    // and the extended attributes are there. Here the daemon only wants to know who sets them.
    // SAFETY: the context is the daemon's.
    unsafe {
        shell(context, number::RC_ERROR, |job, _| {
            if packet.is_null() {
                return number::RC_ERROR;
            }
            job.version().set_create_status(packet, number::CF_CREATED);
            number::RC_OK
        })
    }
}

unsafe extern "C" fn check_file(context: *mut bpContext, name: *mut c_char) -> c_int {
    // RC_SEEN keeps the file in the catalog. After a fault inside us nothing must be recorded as
    // deleted.
    // SAFETY: the context is the daemon's.
    unsafe {
        shell(context, number::RC_SEEN, |_, connection| {
            // SAFETY: a string of the daemon for the time of the call.
            let Some(name) = text(name) else {
                return number::RC_OK;
            };
            match connection.state().backup.as_ref() {
                Some(backup) if backup.must_keep(name.to_bytes()) => number::RC_SEEN,
                _ => number::RC_OK,
            }
        })
    }
}

unsafe extern "C" fn xacl(context: *mut bpContext, packet: *mut xacl_pkt) -> c_int {
    if packet.is_null() {
        return number::RC_ERROR;
    }
    // SAFETY: the daemon's packet, the same in all versions, ours during the call.
    let packet = unsafe { &mut *packet };
    let function = packet.func as c_int;
    let received = usize::try_from(packet.count).unwrap_or(0);
    if function == number::ACL_BACKUP || function == number::XATTR_BACKUP {
        // A count that stays above zero would make the daemon ask for ever.
        packet.count = 0;
    }
    // RC_OK also on failure: other answers make the daemon print a misleading warning per file.
    // SAFETY: the context is the daemon's.
    unsafe {
        shell(context, number::RC_OK, |_, connection| {
            let mut state = connection.state();
            let state = &mut *state;
            if function == number::XATTR_BACKUP {
                if let Some(record) = state.backup.as_mut().and_then(|b| b.record()) {
                    state.xattr = record;
                    packet.content = state.xattr.as_mut_ptr().cast();
                    // A record is at most 128 KiB.
                    packet.count = i32::try_from(state.xattr.len()).unwrap_or(0);
                }
            } else if function == number::XATTR_RESTORE && !packet.content.is_null() {
                // SAFETY: the daemon gives `count` bytes for the time of the call.
                let record = std::slice::from_raw_parts(packet.content.cast::<u8>(), received);
                if let Some(restore) = state.restore.as_mut() {
                    restore.record(record);
                }
            }
            number::RC_OK
        })
    }
}
