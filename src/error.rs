//! The one error type: a stable code, what happened to what, the cause, and what to do about it.
//!
//! Every code stands in one table below with its meaning and remedy, so that the documentation of
//! messages can be checked against it. The border to Bacula (or the command line) prints an error
//! once, with [`Error::report`]; nothing else logs errors it also returns.

use std::borrow::Cow;
use std::fmt;

/// What is shown of a long text's start and end, in bytes.
const SHOWN_START: usize = 2048;
const SHOWN_END: usize = 1024;

/// Result with the crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

macro_rules! codes {
    ($($name:ident = $number:literal, $title:literal, $remedy:literal;)*) => {
        /// Stable message codes, printed as `GS-nnn`. Numbers are never reused.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Code {
            $(#[doc = $title] $name,)*
        }

        impl Code {
            /// All codes, in the order of their numbers.
            pub const ALL: &'static [Code] = &[$(Code::$name,)*];

            /// The number behind `GS-`.
            pub fn number(self) -> u16 {
                match self { $(Code::$name => $number,)* }
            }

            /// What failed, in a few words.
            pub fn title(self) -> &'static str {
                match self { $(Code::$name => $title,)* }
            }

            /// What an administrator can do about it.
            pub fn remedy(self) -> &'static str {
                match self { $(Code::$name => $remedy,)* }
            }
        }
    };
}

codes! {
    // 1xx: configuration
    BadDirective = 101, "the Plugin directive is not valid", "correct the Plugin line of the FileSet";
    BadClientFile = 102, "the client file is not valid", "correct the client file";
    UntrustedClientFile = 103, "the client file can be changed by others than root", "chown root and chmod go-w the client file and its folder";
    NotAllowed = 104, "the client file does not allow this", "add a matching pattern to `allow` in the client file, on the client";
    // 2xx: guests
    NothingMatches = 201, "no guest matches", "compare the patterns with `guestsnap list`; a volume without a definition is selected by lv=VG/LV";
    BadGuestDefinition = 202, "a guest definition cannot be read", "correct the guest's configuration file";
    DiskInUse = 203, "the disk is in use by this host itself", "leave it out with exclude=, or unmount it on the host";
    UnsupportedDisk = 204, "the guest's disk is of a kind that cannot be snapshotted", "only LVM logical volumes and raw files are covered";
    DuplicateGuest = 205, "two guests have one name", "leave one out with exclude=, or select them in two Plugin lines with a path= each";
    GuestsFailed = 206, "the job has no good backup of its guests", "see the errors above";
    QuiesceFailed = 207, "the guest could not be brought to rest", "see the cause; the backup is crash-consistent";
    ThawFailed = 208, "the guest may still be frozen", "wake it by hand, now: run the command named here";
    HookFailed = 209, "a configured hook command failed", "see the cause; the commands stand in the client file";
    // 3xx: snapshots
    CommandFailed = 301, "a command failed", "see the command's own message";
    CommandMissing = 302, "a needed command is missing", "install the package that holds it (lvm2, for LVM's)";
    NoRoom = 303, "there is no room for the snapshot", "free some extents of the volume group, or ask for a smaller snapshot with size=; extend a thin pool that is nearly full";
    SnapshotFailed = 304, "the snapshot could not be taken", "see the cause";
    SnapshotInvalid = 305, "the snapshot overflowed and is not valid any more", "give the snapshot more room with size=";
    SnapshotStatus = 306, "the state of the snapshot cannot be read", "see the cause";
    ReleaseFailed = 307, "something of ours could not be removed", "remove it by hand or wait for the next sweep";
    JournalFailed = 308, "the journal cannot be written", "make room in the daemon's working directory and check its permissions";
    NotRoot = 309, "root is needed", "run this as root, bacula-fd with its capabilities (docs/reliability.md)";
    OriginGone = 310, "the disk does not exist", "compare with `lvs`";
    GuestNotOff = 311, "the guest is not off, as snapshot=none needs", "shut it down for the job, or let it have a snapshot: on a logical volume, or as an image on XFS or btrfs";
    PoolNearlyFull = 312, "the thin pool is nearly full, so that the snapshot was given up", "extend the pool or free some of it, then run the job again; `give_up_pool_at` of [limits] in the client file is the limit";
    // 4xx: disks
    DiskUnreadable = 401, "the disk cannot be read", "check the disk and the kernel log";
    BadPartitionTable = 402, "the partition table is damaged", "check the guest with `sfdisk --verify`";
    BadGuestLvm = 403, "the guest's LVM metadata is damaged", "check the guest with `vgck`";
    UnsupportedVolume = 404, "a volume of the guest cannot be read", "see the cause: name all disks of the guest, or back the volume up inside the guest";
    MapFailed = 405, "a volume could not be mapped to a device", "see the cause";
    NoContent = 406, "no known content on the disk", "exclude the disk if it is blank on purpose";
    DiskStalled = 407, "the guest's disk does not answer", "see what holds it up (`dmsetup info`, the kernel log); what is left goes when it answers, or with the next sweep";
    // 5xx: filesystems
    ProbeFailed = 501, "the content of a volume could not be determined", "check the guest's filesystem";
    FsNotAllowed = 502, "this filesystem type is not allowed", "if guestsnap knows the type, allow it in the client file (filesystems)";
    MountFailed = 503, "a guest filesystem cannot be opened", "check the guest's filesystem with its fsck";
    KernelTooOld = 505, "the kernel lacks a system call that is needed", "Linux 5.8 or newer is needed";
    CheckFailed = 506, "the filesystem check found errors", "check the guest's filesystem with its fsck; what could be read is in the backup";
    VolumeMissing = 507, "a filesystem that the guest's fstab names is not there", "name all disks of the guest; in the guest, mark what may be missing with nofail; what is left out on purpose goes into `skip` in the client file";
    // 6xx: streams
    ReadFailed = 601, "a file cannot be read", "check the guest's filesystem and the kernel log";
    WalkFailed = 602, "a folder cannot be read", "check the guest's filesystem and the kernel log";
    RestoreFailed = 603, "a file cannot be restored", "see the cause";
    RestoreAttributes = 604, "attributes of a restored file cannot be set", "see the cause; the file's contents are restored";
    RestoreOutside = 605, "the restore would leave its target folder", "remove the symbolic link in the target, or restore somewhere else";
    NoSuchFile = 606, "the guest has no such file", "see what it has with `guestsnap ls GUEST:/FOLDER/`";
    BadRestoreOptions = 607, "the restore's plugin options cannot be used", "choose others (mod, Plugin Options), or none";
    TooManyHoles = 608, "the holes of the guest's files are gigantic", "leave the file out (in the FileSet, or with max_file_size), or set `holes` of [limits] in the client file";
    // 7xx: the job and Bacula
    Internal = 701, "a fault inside guestsnap", "report it with the job log";
    UnknownInterface = 702, "this Bacula's plugin interface is not known", "use a guestsnap release that supports this Bacula";
    Cancelled = 703, "the job was cancelled", "run it again when wanted";
    OutputFailed = 704, "the output cannot be written", "see the cause: what reads it has ended, or its disk is full";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GS-{}", self.number())
    }
}

/// What went wrong: a [`Code`], the things it happened to, and the cause.
#[derive(Debug)]
pub struct Error {
    code: Code,
    detail: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error that starts here. `detail` names the guest, disk or file and the step.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Error {
            code,
            detail: detail.into(),
            source: None,
        }
    }

    /// The same error with its cause.
    #[must_use]
    pub fn because(mut self, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(cause.into());
        self
    }

    /// The stable code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// One line with code, detail, every cause, and the remedy. Control characters are escaped:
    /// details hold names that guests chose.
    pub fn report(&self) -> String {
        let text = escape(self.with_causes().as_bytes());
        format!("{}. To do: {}", shorten(&text), self.code.remedy())
    }

    /// The error and its causes in one line, without the remedy: for the inside of another error.
    /// What has the same code as the error says only what is its own.
    pub(crate) fn with_causes(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            match error.downcast_ref::<Error>() {
                Some(same) if same.code == self.code => text.push_str(&same.detail),
                _ => text.push_str(&error.to_string()),
            }
            cause = error.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.code, self.code.title(), self.detail)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

/// Text for a log line from bytes that a guest chose: UTF-8 stays, control characters and
/// invalid bytes are shown as `\xNN`.
pub fn escape(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() {
                let mut buffer = [0; 4];
                for byte in c.encode_utf8(&mut buffer).bytes() {
                    out.push_str(&format!("\\x{byte:02x}"));
                }
            } else {
                out.push(c);
            }
        }
        for byte in chunk.invalid() {
            out.push_str(&format!("\\x{byte:02x}"));
        }
    }
    out
}

/// A text for a message without its middle, if it is longer than a few KiB: a guest's paths may have
/// 64 KiB each, and there may be many.
pub(crate) fn shorten(text: &str) -> Cow<'_, str> {
    if text.len() <= SHOWN_START + SHOWN_END {
        return text.into();
    }
    let start = (0..=SHOWN_START).rfind(|&at| text.is_char_boundary(at));
    let end = (text.len() - SHOWN_END..text.len()).find(|&at| text.is_char_boundary(at));
    let (start, end) = (start.unwrap_or(0), end.unwrap_or(text.len()));
    let between = end - start;
    format!("{}[{between} bytes more]{}", &text[..start], &text[end..]).into()
}

/// `line 3, column 7` of a byte in a text; columns count characters.
pub(crate) fn place(text: &[u8], at: usize) -> String {
    let before = &text[..at.min(text.len())];
    let line = before.iter().filter(|b| **b == b'\n').count() + 1;
    let start = before
        .iter()
        .rposition(|b| *b == b'\n')
        .map_or(0, |p| p + 1);
    let column = String::from_utf8_lossy(&before[start..]).chars().count() + 1;
    format!("line {line}, column {column}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_report_has_code_causes_and_remedy() {
        let error = Error::new(Code::SnapshotFailed, "web1: vg0/domu-web1").because(
            Error::new(Code::CommandFailed, "lvcreate").because(std::io::Error::other("no\nroom")),
        );
        assert_eq!(
            error.report(),
            "GS-304 the snapshot could not be taken: web1: vg0/domu-web1: \
             GS-301 a command failed: lvcreate: no\\x0aroom. To do: see the cause"
        );
        let twice = Error::new(Code::CommandFailed, "web1: no wake-up")
            .because(Error::new(Code::CommandFailed, "its timer ended at once"));
        assert_eq!(
            twice.with_causes(),
            "GS-301 a command failed: web1: no wake-up: its timer ended at once"
        );
    }

    #[test]
    fn test_long_details_lose_their_middle() {
        let path = "ü".repeat(40_000);
        let text = Error::new(Code::WalkFailed, format!("x{path}: stat")).report();
        assert!(text.len() < 4096, "{} bytes", text.len());
        assert!(text.starts_with("GS-602 a folder cannot be read: xü"));
        assert!(text.contains("ü: stat. To do: check the guest's filesystem"));
        assert!(text.contains(" bytes more]"));
        assert_eq!(shorten("short"), "short");
    }

    #[test]
    fn test_codes_are_unique_and_ascending() {
        assert!(Code::ALL.windows(2).all(|w| w[0].number() < w[1].number()));
    }

    #[test]
    fn test_escape_keeps_text_and_shows_bytes() {
        assert_eq!(escape("grün\x1b[31m".as_bytes()), "grün\\x1b[31m");
        assert_eq!(escape(b"a\xff\xc2\x85b"), "a\\xff\\xc2\\x85b");
    }
}
