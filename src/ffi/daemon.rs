//! The daemon's functions as safe calls.

use std::ffi::{CStr, CString, c_char, c_int};
use std::ptr;
use std::sync::OnceLock;

use super::abi::{Numbers, Version, bFuncs, bpContext, number};
use super::packet::{SavePacket, text};
use crate::error::escape;
use crate::job::{Importance, Reporter};

/// The daemon cuts longer texts (its buffer holds 2000 bytes); long ones go out in pieces.
const MESSAGE_PIECE: usize = 1500;

static FUNCTIONS: OnceLock<(Version, &'static bFuncs)> = OnceLock::new();

/// Keeps the daemon's table; it never changes in one process.
pub fn set_functions(version: Version, functions: &'static bFuncs) {
    // A second load brings the same table: the daemon keeps it in static memory.
    let _ = FUNCTIONS.set((version, functions));
}

/// Tells the daemon's log why we do not load. `JobMessage` is at the same place in all versions,
/// but the numbers of its kinds are not known for this one: only a debug message is safe.
pub fn refuse(functions: &bFuncs, interface: u32) {
    let message = format!(
        "guestsnap: {} {}: the daemon has number {interface}, known are 14, 21, 22, 23. {}\n",
        crate::Code::UnknownInterface,
        crate::Code::UnknownInterface.title(),
        crate::Code::UnknownInterface.remedy(),
    );
    debug_with(functions, ptr::null_mut(), &message);
}

fn debug_with(functions: &bFuncs, context: *mut bpContext, message: &str) {
    let (Some(debug), Ok(message)) = (functions.DebugMessage, CString::new(message)) else {
        return;
    };
    // SAFETY: a variadic of the daemon with "%s" and one string; a NULL context is allowed.
    unsafe {
        debug(
            context,
            c"guestsnap".as_ptr(),
            0,
            50,
            c"%s".as_ptr(),
            message.as_ptr(),
        )
    };
}

/// A debug message of the daemon (shown from debug level 50 on).
pub fn debug(message: &str) {
    if let Some((_, functions)) = FUNCTIONS.get() {
        debug_with(
            functions,
            ptr::null_mut(),
            &(escape(message.as_bytes()) + "\n"),
        );
    }
}

/// The daemon's working directory, also without a job.
pub fn working_dir() -> Option<std::path::PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    let (_, functions) = FUNCTIONS.get()?;
    let mut value: *const c_char = ptr::null();
    let get = functions.getBaculaValue?;
    // Without a context the daemon writes the value and still answers with an error.
    // SAFETY: the daemon writes one pointer to its own string, or leaves it NULL.
    unsafe {
        get(
            ptr::null_mut(),
            number::VAR_WORKING_DIR,
            (&raw mut value).cast(),
        )
    };
    // SAFETY: a string of the daemon's configuration.
    let folder = unsafe { text(value) }?;
    Some(std::ffi::OsStr::from_bytes(folder.to_bytes()).into())
}

/// A message that belongs to no job: the daemon's own messages.
pub fn daemon_message(importance: Importance, message: &str) {
    if let Some(job) = Job::new(ptr::null_mut()) {
        job.message(importance, message);
    }
}

/// One job's context of the daemon, and its functions.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    context: *mut bpContext,
    version: Version,
    functions: &'static bFuncs,
}

// SAFETY: the daemon allows messages and values from any thread while the context is valid. Every
// thread of ours that has a `Job` ends before `freePlugin` returns; those that are left to a disk
// that does not answer have none.
unsafe impl Send for Job {}
// SAFETY: as above.
unsafe impl Sync for Job {}

impl Job {
    /// `None` before `loadPlugin`.
    pub fn new(context: *mut bpContext) -> Option<Job> {
        let (version, functions) = *FUNCTIONS.get()?;
        Some(Job {
            context,
            version,
            functions,
        })
    }

    /// The interface version.
    pub fn version(&self) -> Version {
        self.version
    }

    fn numbers(&self) -> Numbers {
        self.version.numbers()
    }

    /// An integer variable; `None` when the daemon does not answer.
    pub fn integer(&self, variable: c_int) -> Option<i32> {
        let mut value: c_int = 0;
        let get = self.functions.getBaculaValue?;
        // SAFETY: the daemon writes exactly four bytes for an integer variable.
        let answer = unsafe { get(self.context, variable, (&raw mut value).cast()) };
        (answer == number::RC_OK).then_some(value)
    }

    /// A text variable, copied.
    pub fn string(&self, variable: c_int) -> Option<CString> {
        let mut value: *const c_char = ptr::null();
        let get = self.functions.getBaculaValue?;
        // SAFETY: the daemon writes one pointer to its own string, or leaves it NULL.
        let answer = unsafe { get(self.context, variable, (&raw mut value).cast()) };
        if answer != number::RC_OK {
            return None;
        }
        // SAFETY: a string of the daemon that lives at least until this callback returns.
        unsafe { text(value) }.map(CStr::to_owned)
    }

    /// FileIndex of the file just sent; right in `endBackupFile` only.
    pub fn file_index(&self) -> i32 {
        self.integer(self.numbers().var_file_index).unwrap_or(0)
    }

    /// The name of the job that an incremental or differential one adds to.
    pub fn previous_job(&self) -> Option<CString> {
        self.string(self.numbers().var_previous_job)
    }

    /// Tells the accurate list that a path still exists.
    pub fn mark_seen(&self, path: &CStr) {
        if let Some(set) = self.functions.setBaculaValue {
            // SAFETY: the daemon reads a string during the call.
            unsafe {
                set(
                    self.context,
                    number::VAR_FILE_SEEN,
                    path.as_ptr().cast_mut().cast(),
                )
            };
        }
    }

    /// Whether the FileSet wants the file that the packet describes; selects its Options block for the following calls.
    pub fn accept(&self, packet: &mut SavePacket<'_>) -> bool {
        let Some(accept) = self.functions.AcceptFile else {
            return true;
        };
        // SAFETY: context and packet are the daemon's own.
        unsafe { accept(self.context, packet.as_ptr().cast()) != number::RC_SKIP }
    }

    /// Whether the file that the packet describes is to be sent at this job's level.
    pub fn changed(&self, packet: &mut SavePacket<'_>) -> bool {
        let Some(check) = self.functions.checkChanges else {
            return true;
        };
        // SAFETY: context and packet are the daemon's own.
        unsafe { check(self.context, packet.as_ptr().cast()) != number::RC_SEEN }
    }
}

impl Reporter for Job {
    fn message(&self, importance: Importance, message: &str) {
        let numbers = self.numbers();
        let kind = match importance {
            Importance::Info => numbers.info,
            Importance::Warning => numbers.warning,
            Importance::Error => numbers.error,
            Importance::Fatal => numbers.fatal,
        };
        let Some(send) = self.functions.JobMessage else {
            return;
        };
        let message = format!("guestsnap: {}", escape(message.as_bytes()));
        let mut rest = message.as_str();
        let mut kind = kind;
        while !rest.is_empty() {
            let mut end = rest.len().min(MESSAGE_PIECE);
            while !rest.is_char_boundary(end) {
                end -= 1;
            }
            let (piece, after) = rest.split_at(end);
            rest = after;
            let Ok(line) = CString::new(format!("{piece}\n")) else {
                return;
            };
            // SAFETY: a variadic of the daemon: "%s" and one string, mtime 0 means now.
            unsafe {
                send(
                    self.context,
                    c"guestsnap".as_ptr(),
                    0,
                    kind,
                    0,
                    c"%s".as_ptr(),
                    line.as_ptr(),
                )
            };
            // One error is counted once, however long its text.
            kind = numbers.info;
        }
    }

    fn cancelled(&self) -> bool {
        if let Some(variable) = self.numbers().var_is_cancelled {
            if self.integer(variable).is_some_and(|v| v != 0) {
                return true;
            }
        }
        // 9.6 has no such variable: cancelled, fatal and error are final states.
        let status = self
            .integer(number::VAR_JOB_STATUS)
            .and_then(|v| u8::try_from(v).ok());
        matches!(status, Some(b'A' | b'f' | b'E'))
    }

    fn came_to_all(&self) -> Option<bool> {
        let status = self.integer(number::VAR_JOB_STATUS);
        match status.and_then(|v| u8::try_from(v).ok())? {
            // Terminated, with warnings, with errors.
            b'T' | b'W' | b'e' | b'E' => Some(true),
            // Cancelled, fatal error.
            b'A' | b'f' => Some(false),
            _ => None,
        }
    }
}
