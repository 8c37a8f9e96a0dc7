//! Safe values of the packets and strings that the daemon hands over for one call.
//!
//! Each is made once, at the head of a callback, from the daemon's pointer. The rest of a callback is safe code. Our
//! strings and records whose addresses are written into a packet live until the callback that ends their use; only the
//! addresses are kept here.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::io;

use super::abi::{
    self, Version, bEvent, io_pkt, number, query_pkt, restore_object_pkt, v14, v21, v22, v23,
    xacl_pkt,
};

/// A packet whose layout is the version's.
macro_rules! packet_of_version {
    ($(#[$doc:meta])* $name:ident, $packet:ident) => {
        $(#[$doc])*
        pub enum $name<'a> {
            /// [`Version::V14`].
            V14(&'a mut v14::$packet),
            /// [`Version::V21`].
            V21(&'a mut v21::$packet),
            /// [`Version::V22`].
            V22(&'a mut v22::$packet),
            /// [`Version::V23`].
            V23(&'a mut v23::$packet),
        }
    };
}

/// Runs `$body` with `$packet` as the packet in the layout of its version.
macro_rules! with_packet {
    ($from:expr, $packet:ident => $body:expr) => {
        match $from {
            Self::V14($packet) => $body,
            Self::V21($packet) => $body,
            Self::V22($packet) => $body,
            Self::V23($packet) => $body,
        }
    };
}

packet_of_version!(
    /// The daemon's save packet.
    SavePacket,
    save_pkt
);

/// A file's description for the daemon.
#[derive(Debug, Clone, Copy)]
pub struct SaveFields<'a> {
    /// `FT_…`
    pub file_type: c_int,
    /// Path.
    pub name: &'a CStr,
    /// Link target, or the path with a trailing slash for directories.
    pub link: Option<&'a CStr>,
    /// The stat record for the catalog.
    pub stat: &'a libc::stat,
    /// Nothing is to be read.
    pub no_read: bool,
    /// FileIndex of the first name of a hard link.
    pub link_file_index: i32,
    /// The daemon is to leave out blocks of zeros.
    pub sparse: bool,
}

impl<'a> SavePacket<'a> {
    /// `None` for NULL, and for a packet of another size than the version's layout says.
    ///
    /// # Safety
    /// `packet` is NULL or a save packet of the daemon, used by nothing else for `'a`.
    pub unsafe fn new(version: Version, packet: *mut c_void) -> Option<SavePacket<'a>> {
        macro_rules! fitting {
            ($abi:ident) => {{
                let packet = packet.cast::<$abi::save_pkt>();
                // SAFETY: the daemon's packet; its first field is its size in every version.
                let size = unsafe { (*packet).pkt_size };
                let fits = usize::try_from(size) == Ok(size_of::<$abi::save_pkt>());
                // SAFETY: read only when the size is the layout's.
                let end = fits.then(|| unsafe { (*packet).pkt_end });
                if end != Some(size) {
                    return None;
                }
                // SAFETY: a packet of this layout, ours for `'a`.
                unsafe { &mut *packet }
            }};
        }
        if packet.is_null() {
            return None;
        }
        Some(match version {
            Version::V14 => SavePacket::V14(fitting!(v14)),
            Version::V21 => SavePacket::V21(fitting!(v21)),
            Version::V22 => SavePacket::V22(fitting!(v22)),
            Version::V23 => SavePacket::V23(fitting!(v23)),
        })
    }

    /// For the daemon's own functions.
    pub fn as_ptr(&mut self) -> *mut c_void {
        with_packet!(self, packet => std::ptr::from_mut(*packet).cast())
    }

    /// Describes a file, once: the daemon's questions leave the packet alone. The strings must live as long as the
    /// daemon uses the packet: for a file that is sent, until `endBackupFile`.
    pub fn fill(&mut self, file: &SaveFields<'_>) {
        with_packet!(self, packet => {
            packet.type_ = file.file_type;
            // The daemon declares them mutable but copies both and writes to neither.
            packet.fname = file.name.as_ptr().cast_mut();
            packet.link = file.link.map_or(std::ptr::null_mut(), |l| l.as_ptr().cast_mut());
            packet.statp = *file.stat;
            packet.no_read = file.no_read;
            packet.LinkFI = file.link_file_index;
            if file.sparse {
                packet.flags |= abi::FO_SPARSE;
            } else {
                packet.flags &= !abi::FO_SPARSE;
            }
        });
    }

    /// Gives the file another name, which must live as long as those of [`SavePacket::fill`].
    pub fn rename(&mut self, name: &CStr) {
        with_packet!(self, packet => packet.fname = name.as_ptr().cast_mut());
    }

    /// Describes an object for the catalog.
    pub fn fill_object(&mut self, name: &'static CStr, text: &'static CStr) {
        // Not longer than a constant of ours.
        let length = i32::try_from(text.count_bytes()).unwrap_or(0);
        macro_rules! fill {
            ($packet:expr, $object:expr) => {{
                $packet.type_ = number::FT_PLUGIN_CONFIG;
                // The daemon declares them mutable but writes to neither.
                $object.object_name = name.as_ptr().cast_mut();
                $object.object = text.as_ptr().cast_mut();
                $object.object_len = length;
                $object.index = 0;
            }};
        }
        match self {
            SavePacket::V14(packet) => fill!(packet, packet),
            SavePacket::V21(packet) => fill!(packet, packet),
            SavePacket::V22(packet) => fill!(packet, packet.restore_obj),
            SavePacket::V23(packet) => fill!(packet, packet.restore_obj),
        }
    }
}

packet_of_version!(
    /// The daemon's restore packet.
    RestorePacket,
    restore_pkt
);

/// The daemon's description of a file to restore.
#[derive(Debug, Clone, Copy)]
pub struct RestoreFields<'a> {
    /// `FT_…`
    pub file_type: c_int,
    /// Saved attributes.
    pub stat: libc::stat,
    /// Path to create, `where` applied.
    pub name: &'a CStr,
    /// Link target.
    pub link: &'a CStr,
    /// The folder asked for; empty, or `None` when RegexWhere is in use.
    pub where_: Option<&'a CStr>,
    /// `a`, `w`, `n` or `o`.
    pub replace: u8,
}

impl<'a> RestorePacket<'a> {
    /// `None` for NULL.
    ///
    /// # Safety
    /// `packet` is NULL or a restore packet of the daemon in this version's layout, used by nothing else for `'a`.
    pub unsafe fn new(version: Version, packet: *mut c_void) -> Option<RestorePacket<'a>> {
        if packet.is_null() {
            return None;
        }
        macro_rules! own {
            ($abi:ident) => {
                // SAFETY: not NULL; the caller promises the rest.
                unsafe { &mut *packet.cast::<$abi::restore_pkt>() }
            };
        }
        Some(match version {
            Version::V14 => RestorePacket::V14(own!(v14)),
            Version::V21 => RestorePacket::V21(own!(v21)),
            Version::V22 => RestorePacket::V22(own!(v22)),
            Version::V23 => RestorePacket::V23(own!(v23)),
        })
    }

    /// The file; `None` when the packet's size is not this version's or a string that is always there is missing.
    pub fn fields(&self) -> Option<RestoreFields<'_>> {
        with_packet!(self, packet => {
            if usize::try_from(packet.pkt_size) != Ok(size_of_val(&**packet)) {
                return None;
            }
            Some(RestoreFields {
                file_type: packet.type_,
                stat: packet.statp,
                // SAFETY: strings of the daemon's packet, valid as long as it is.
                name: unsafe { text(packet.ofname) }?,
                // SAFETY: as above.
                link: unsafe { text(packet.olname) }.unwrap_or(c""),
                // SAFETY: as above.
                where_: unsafe { text(packet.where_) },
                replace: u8::try_from(packet.replace).unwrap_or(b'a'),
            })
        })
    }

    /// Answers `createFile` or `setFileAttributes`.
    pub fn set_status(&mut self, status: c_int) {
        with_packet!(self, packet => packet.create_status = status);
    }
}

/// The daemon's packet of `pluginIO`, the same in all versions.
pub struct IoPacket<'a>(&'a mut io_pkt);

impl<'a> IoPacket<'a> {
    /// `None` for NULL. Answers with an error until [`IoPacket::answer`] says something else.
    ///
    /// # Safety
    /// `packet` is NULL or the daemon's, with a buffer of `count` bytes or more or none; used by nothing else for `'a`.
    pub unsafe fn new(packet: *mut io_pkt) -> Option<IoPacket<'a>> {
        // SAFETY: the caller promises it.
        let packet = unsafe { packet.as_mut() }?;
        packet.status = -1;
        packet.io_errno = libc::EIO;
        Some(IoPacket(packet))
    }

    /// `IO_…`
    pub fn function(&self) -> c_int {
        self.0.func as c_int
    }

    /// Bytes to read or write, as the daemon counts them.
    pub fn count(&self) -> c_int {
        self.0.count
    }

    /// Where to seek to.
    pub fn offset(&self) -> i64 {
        self.0.offset
    }

    fn length(&self) -> usize {
        usize::try_from(self.0.count).unwrap_or(0)
    }

    /// Room for data, cleared, of at most this many bytes; `None` without a buffer.
    pub fn room(&mut self, most: usize) -> Option<&mut [u8]> {
        let buffer = self.0.buf.cast::<u8>();
        if buffer.is_null() {
            return None;
        }
        let length = self.length().min(most);
        // It may be uninitialised memory: it is cleared first, so that it is read only as written.
        // SAFETY: the daemon gives a buffer of `count` bytes or more for the time of the call.
        unsafe { std::ptr::write_bytes(buffer, 0, length) };
        // SAFETY: as above, and written to just now.
        Some(unsafe { std::slice::from_raw_parts_mut(buffer, length) })
    }

    /// Data to write; `None` without a buffer.
    pub fn data(&self) -> Option<&[u8]> {
        let buffer = self.0.buf.cast::<u8>();
        // SAFETY: the daemon gives `count` bytes of data for the time of the call.
        (!buffer.is_null()).then(|| unsafe { std::slice::from_raw_parts(buffer, self.length()) })
    }

    /// Tells the daemon how it went.
    pub fn answer(&mut self, result: &io::Result<c_int>) {
        (self.0.status, self.0.io_errno) = match result {
            Ok(status) => (*status, 0),
            Err(error) => (-1, error.raw_os_error().unwrap_or(libc::EIO)),
        };
    }
}

/// The daemon's packet of `handleXACLdata`, the same in all versions.
pub struct XaclPacket<'a>(&'a mut xacl_pkt);

impl<'a> XaclPacket<'a> {
    /// `None` for NULL.
    ///
    /// # Safety
    /// `packet` is NULL or the daemon's, at a restore with `count` bytes or none; used by nothing else for `'a`.
    pub unsafe fn new(packet: *mut xacl_pkt) -> Option<XaclPacket<'a>> {
        // SAFETY: the caller promises it.
        unsafe { packet.as_mut() }.map(XaclPacket)
    }

    /// `ACL_…` or `XATTR_…`
    pub fn function(&self) -> c_int {
        self.0.func as c_int
    }

    /// No record follows.
    pub fn send_none(&mut self) {
        self.0.count = 0;
    }

    /// The next record, which must live until the daemon asks for another.
    pub fn send(&mut self, record: &mut [u8]) {
        self.0.content = record.as_mut_ptr().cast();
        // A record is at most 128 KiB.
        self.0.count = i32::try_from(record.len()).unwrap_or(0);
    }

    /// The record of a restore; `None` without one.
    pub fn received(&self) -> Option<&[u8]> {
        let length = usize::try_from(self.0.count).unwrap_or(0);
        let content = self.0.content.cast::<u8>();
        // Content of a backup is ours.
        let there = self.function() == number::XATTR_RESTORE && !content.is_null();
        // SAFETY: at a restore the daemon gives `count` bytes for the time of the call.
        there.then(|| unsafe { std::slice::from_raw_parts(content, length) })
    }
}

/// The daemon's packet of `queryParameter`, the same in all versions that have it.
pub struct QueryPacket<'a>(&'a mut query_pkt);

impl<'a> QueryPacket<'a> {
    /// `None` for NULL. Has no answer at first.
    ///
    /// # Safety
    /// `packet` is NULL or the daemon's, its strings valid or NULL; used by nothing else for `'a`.
    pub unsafe fn new(packet: *mut query_pkt) -> Option<QueryPacket<'a>> {
        // SAFETY: the caller promises it.
        let packet = unsafe { packet.as_mut() }?;
        packet.result = std::ptr::null_mut();
        Some(QueryPacket(packet))
    }

    /// The line in question, and the question about it.
    pub fn question(&self) -> (Vec<u8>, Vec<u8>) {
        // SAFETY: strings of the daemon.
        let line = unsafe { copied(self.0.command) };
        // SAFETY: as above.
        (line, unsafe { copied(self.0.parameter) })
    }

    /// An answer, which must live until the next call.
    pub fn answer(&mut self, text: &CStr) {
        self.0.result = text.as_ptr().cast_mut();
    }
}

/// An event of the daemon with its value.
#[derive(Debug)]
pub enum Event<'a> {
    /// The job is cancelled. Comes from another thread than the job's.
    Cancel,
    /// The job's level.
    Level(u8),
    /// Since when, in seconds.
    Since(i64),
    /// A `Plugin =` line of the FileSet.
    PluginCommand(Vec<u8>),
    /// A Verify job begins.
    StartVerifyJob,
    /// A backup begins.
    StartBackupJob,
    /// The backup of the next line begins.
    BackupCommand,
    /// The estimate of the next line begins.
    EstimateCommand,
    /// The operator's answers to our questions.
    Answers(&'a [u8]),
    /// Begins the restore of one line's files.
    RestoreCommand(Vec<u8>),
    /// The backup, or whatever the job was, ends.
    EndJob,
    /// The restore ends.
    EndRestoreJob,
    /// Something else.
    Other,
}

impl<'a> Event<'a> {
    /// `None` for NULL.
    ///
    /// # Safety
    /// `event` is NULL or the daemon's, `value` the daemon's value for such an event, valid for `'a`.
    pub unsafe fn read(event: *const bEvent, value: *mut c_void) -> Option<Event<'a>> {
        // SAFETY: NULL or one integer, in every version.
        let kind = unsafe { event.as_ref() }?.eventType;
        // SAFETY: called for the events whose value is a string.
        let line = || unsafe { copied(value.cast()) };
        Some(match c_int::try_from(kind).unwrap_or(-1) {
            number::EVENT_CANCEL_COMMAND => Event::Cancel,
            // Scalars come by value in the pointer.
            number::EVENT_LEVEL => Event::Level(u8::try_from(value.addr()).unwrap_or(b'F')),
            number::EVENT_SINCE => Event::Since(i64::try_from(value.addr()).unwrap_or(0)),
            number::EVENT_PLUGIN_COMMAND => Event::PluginCommand(line()),
            number::EVENT_START_VERIFY_JOB => Event::StartVerifyJob,
            number::EVENT_START_BACKUP_JOB => Event::StartBackupJob,
            number::EVENT_BACKUP_COMMAND => Event::BackupCommand,
            number::EVENT_ESTIMATE_COMMAND => Event::EstimateCommand,
            number::EVENT_RESTORE_OBJECT => {
                // SAFETY: the value of this event is a restore object; the one without a value ends them.
                let object = unsafe { value.cast::<restore_object_pkt>().as_ref() };
                // SAFETY: the daemon's object.
                let answers = object.and_then(|object| unsafe { answers(object) });
                answers.map_or(Event::Other, Event::Answers)
            }
            number::EVENT_RESTORE_COMMAND => Event::RestoreCommand(line()),
            number::EVENT_END_BACKUP_JOB | number::EVENT_JOB_END => Event::EndJob,
            number::EVENT_END_RESTORE_JOB => Event::EndRestoreJob,
            _ => Event::Other,
        })
    }
}

/// Maximum length of an answer to our questions. The daemon's network buffer is larger in every
/// version.
const MAX_OBJECT: usize = 4000;

/// The answers to our questions in an object of a restore; `None` if it is something else.
///
/// The length is the Director's word: its data may be missing, and then the buffer holds something
/// else. So it is read as a text, and not past its end.
///
/// # Safety
/// `object` is the daemon's, its data valid for `'a`.
unsafe fn answers<'a>(object: &restore_object_pkt) -> Option<&'a [u8]> {
    if object.object_type != number::FT_PLUGIN_CONFIG_FILLED {
        return None;
    }
    let length = usize::try_from(object.object_len).unwrap_or(0);
    if object.object.is_null() || length > MAX_OBJECT {
        return Some(&[]);
    }
    // SAFETY: the daemon's buffer is longer than that, whatever it holds.
    let bytes = unsafe { std::slice::from_raw_parts(object.object.cast::<u8>(), length) };
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(length);
    Some(&bytes[..end])
}

/// A C string of the daemon, `None` for NULL.
///
/// # Safety
/// `pointer` is NULL or a terminated string that is valid for `'a`.
pub unsafe fn text<'a>(pointer: *const c_char) -> Option<&'a CStr> {
    if pointer.is_null() {
        return None;
    }
    // SAFETY: not NULL; the caller promises the rest.
    Some(unsafe { CStr::from_ptr(pointer) })
}

/// A C string of the daemon, copied; empty for NULL.
///
/// # Safety
/// The requirements of [`text`].
unsafe fn copied(pointer: *const c_char) -> Vec<u8> {
    // SAFETY: passed on to the caller.
    unsafe { text(pointer) }
        .map(|c| c.to_bytes().to_vec())
        .unwrap_or_default()
}
