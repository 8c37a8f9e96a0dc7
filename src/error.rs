//! The crate's error type: a stable code, details, the cause, and a remedy.
//!
//! The table below defines every code with title and remedy; a test checks the documentation of
//! messages against it. The interface to Bacula (or the command line) prints an error once, with
//! [`Error::report`]. Code that returns an error does not log it.

use std::borrow::Cow;
use std::fmt;

/// Bytes kept at the start and the end of a long text.
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
            /// All codes in numeric order.
            pub const ALL: &'static [Code] = &[$(Code::$name,)*];

            /// The number behind `GS-`.
            pub fn number(self) -> u16 {
                match self { $(Code::$name => $number,)* }
            }

            /// Short description of the failure.
            pub fn title(self) -> &'static str {
                match self { $(Code::$name => $title,)* }
            }

            /// Remedy for the administrator.
            pub fn remedy(self) -> &'static str {
                match self { $(Code::$name => $remedy,)* }
            }
        }
    };
}

codes! {
    // 1xx: configuration
    BadDirective = 101, "the Plugin directive is not valid", "correct the Plugin line in the FileSet";
    BadClientFile = 102, "the client file is not valid", "correct the client file";
    UntrustedClientFile = 103, "users other than root can change the client file", "chown root and chmod go-w the client file and its directory";
    NotAllowed = 104, "the client file does not allow this", "add a matching pattern to `allow` in the client file, on the client";
    // 2xx: guests
    NothingMatches = 201, "no guest matches", "compare the patterns with `guestsnap list`; select a volume without a definition by lv=VG/LV";
    BadGuestDefinition = 202, "a guest definition cannot be read", "correct the guest's configuration file";
    DiskInUse = 203, "the disk is in use by this host", "exclude it with exclude=, or unmount it on the host";
    UnsupportedDisk = 204, "snapshots of the guest's type of disk are not supported", "logical volumes and raw image files are supported; back up other disks inside the guest, or list the disks to save in `disks` of [guest.NAME] in the client file";
    DuplicateGuest = 205, "two guests have the same name", "exclude one with exclude=, or select them in two Plugin lines, each with its own path=";
    GuestsFailed = 206, "the job has no good backup of its guests", "see the errors above";
    QuiesceFailed = 207, "the guest could not be quiesced", "see the cause; the backup continues with the guest running";
    ThawFailed = 208, "the guest may still be frozen", "thaw it now: run the command given here";
    HookFailed = 209, "a configured hook command failed", "see the cause; the client file defines the commands";
    PassedOver = 210, "the pattern does not select a volume that may be a guest's disk", "leave the volume out with exclude=; a pattern selects a guest's thin volume only while it is active: otherwise give its exact name or a definition";
    GuestVanished = 211, "a guest of the previous job was not found", "restore its disk or definition, or confirm with exclude=NAME that it is gone for good";
    BelowDrbd = 212, "DRBD may have no current data on the disk of this host", "see the cause; or back up the guest on the host where `drbdadm status` shows the resource as UpToDate, and leave the volume out here with exclude=";
    Restarted = 213, "the job was restarted after it had sent files", "run it anew (`run` instead of `restart`); with `Reschedule Incomplete Jobs = no` in the Job resource Bacula does not continue jobs by itself";
    SharedGroup = 215, "the volume group is shared with other hosts", "stop the use by other hosts, or let lvmlockd run here; if this host alone writes to the group, say so in the client file: `shared = \"mine\"` in [vg.NAME]";
    GuestLocked = 216, "an operation of Proxmox VE holds the guest", "run the job again when the operation has ended, or let jobs wait longer (`lock_wait` in [pve] of the client file); if none runs, `qm unlock VMID` or `pct unlock VMID` removes the lock";
    DefinitionsSilent = 217, "a folder of guest definitions does not answer", "see whether its filesystem works; on Proxmox VE: `systemctl status pve-cluster`, `pvecm status`";
    // 3xx: snapshots
    CommandFailed = 301, "a command failed", "see the command's own message";
    CommandMissing = 302, "a required command is missing", "install its package (lvm2 for LVM commands)";
    NoRoom = 303, "there is no room for the snapshot", "free extents in the volume group, or request a smaller snapshot with size=; extend a thin pool that is nearly full";
    SnapshotFailed = 304, "the snapshot could not be taken", "see the cause";
    SnapshotInvalid = 305, "the snapshot overflowed and is invalid", "give the snapshot more room with size=";
    SnapshotStatus = 306, "the state of the snapshot cannot be read", "see the cause";
    ReleaseFailed = 307, "an object created by guestsnap could not be removed", "remove it by hand or wait for the next sweep";
    JournalFailed = 308, "the journal cannot be written", "free space in the daemon's working directory and check its permissions";
    NotRoot = 309, "root privileges are required", "run this command as root, and bacula-fd with the capabilities in docs/reliability.md";
    OriginGone = 310, "the disk does not exist", "compare with `lvs`";
    GuestNotOff = 311, "the guest is not off, as snapshot=none requires", "shut it down for the job, or allow a snapshot: of a logical volume, or of an image on XFS or btrfs";
    PoolNearlyFull = 312, "the snapshot was given up because the thin pool is nearly full", "extend the pool or free space in it, then run the job again; `give_up_pool_at` of [limits] in the client file sets the limit";
    NotOneInstant = 313, "the snapshots of the guest's disks are not of one instant", "see the cause: run the job when the guest writes less, or set `quiesce` in the client file to pause the guest during the snapshots";
    // 4xx: disks
    DiskUnreadable = 401, "the disk cannot be read", "check the disk and the kernel log";
    BadPartitionTable = 402, "the partition table is damaged", "check the guest with `sfdisk --verify`";
    BadGuestLvm = 403, "the guest's LVM metadata is damaged", "check the guest with `vgck`";
    UnsupportedVolume = 404, "a volume of the guest cannot be read", "see the cause: list all disks of the guest, or back up the volume inside the guest; if it is not wanted, add `/.guestsnap/volumes/NAME` to `skip` in the client file";
    MapFailed = 405, "a volume could not be mapped to a device", "see the cause";
    NoContent = 406, "no known content on the disk", "exclude the disk if it is blank on purpose";
    DiskStalled = 407, "the guest's disk does not respond", "find the cause (`dmsetup info`, the kernel log); leftovers are removed when it responds, or by the next sweep";
    BadThinPool = 408, "the metadata of a thin pool in the guest are damaged", "in the guest, check the pool with `thin_check` and repair it with `lvconvert --repair`; the guest's other volumes are saved";
    HiddenLabel = 409, "a loop device would show an LVM label to the host", "in the guest, overwrite the word LABELONE at the start of a sector (one of the first four); a guest disk on a logical volume needs no loop device";
    // 5xx: filesystems
    ProbeFailed = 501, "the content of a volume could not be determined", "check the guest's filesystem";
    FsNotAllowed = 502, "this filesystem type is not allowed", "if guestsnap supports the type, allow it in the client file (filesystems)";
    MountFailed = 503, "a guest filesystem cannot be opened", "see the cause; repair damage in the guest, with the filesystem's own check";
    KernelTooOld = 505, "the kernel lacks a required system call", "use Linux 5.8 or newer";
    CheckFailed = 506, "the filesystem check found errors", "check the guest's filesystem with its fsck; the backup has the readable files";
    VolumeMissing = 507, "a filesystem in the guest's fstab is missing", "list all disks of the guest; in the guest, mark optional filesystems with nofail; list intended omissions in `skip` of the client file";
    PathsTooLong = 508, "guest paths lead through too many symbolic links", "shorten the symbolic links of /etc, /usr/lib and the mount points in the guest";
    RootUnsure = 509, "the guest's root filesystem is ambiguous", "name it in the client file: `root = \"VG/LV\"` or a UUID in [guest.NAME]";
    NoDriver = 510, "this host's kernel has no driver for a filesystem", "boot a kernel that has the driver, or install its module (ntfs3: in Debian 13's kernel, not in Debian 12's); or back up those files inside the guest";
    ForeignJournal = 511, "a filesystem's journal is on another device", "in the guest, create an internal journal (ext4, unmounted: `tune2fs -O ^has_journal DEVICE`, then `tune2fs -j DEVICE`), or back up those files there";
    NoPlace = 512, "btrfs subvolumes have no mount point in the guest", "add the wanted ones to the guest's fstab; list the others in `skip` of the client file, by their path from the top of the btrfs";
    KitIncomplete = 513, "the rebuild kit of the guest is not complete", "check the guest's disk and the kernel log; the files of the guest are in the backup";
    // 6xx: streams
    ReadFailed = 601, "a file cannot be read", "check the guest's filesystem and the kernel log";
    WalkFailed = 602, "a directory cannot be read", "check the guest's filesystem and the kernel log";
    RestoreFailed = 603, "a file cannot be restored", "see the cause";
    RestoreAttributes = 604, "attributes of a restored file cannot be set", "see the cause; the file's contents are restored";
    RestoreOutside = 605, "the restore would leave its target directory", "remove the symbolic link in the target, or restore elsewhere";
    NoSuchFile = 606, "the guest has no such file", "list the directory with `guestsnap ls GUEST:/DIRECTORY/`";
    BadRestoreOptions = 607, "the restore's plugin options cannot be used", "change the options (mod, Plugin Options), or remove them";
    TooManyHoles = 608, "the holes in the guest's files exceed the limit", "exclude the file (in the FileSet, or with max_file_size), or raise `holes` of [limits] in the client file";
    TooManySubvolumes = 609, "the guest has too many btrfs subvolumes", "add the directory that contains them to `skip` in the client file, or remove unneeded ones in the guest";
    Encrypted = 610, "files of the guest are encrypted (fscrypt)", "back them up inside the guest, where the key is, and add the directory to `skip` in the client file";
    BadKit = 611, "the rebuild kit cannot be used", "restore `.guestsnap` of the guest whole, from one job";
    BadTarget = 612, "the target of the rebuild cannot be used", "name a new image file, a volume that is unused, or VG/LV to create one";
    RebuildFailed = 613, "the disk could not be made", "see the cause; nothing of a disk that was made is left, a disk that was given is to be made again";
    TargetBusy = 621, "the guest is not off, or something uses its disks", "shut the guest down, end what the message names, then run the restore again";
    TargetRefused = 622, "the guest's disks cannot be restored into", "see the cause; files can be restored to a folder with where=";
    IntoNotAllowed = 623, "the client file does not allow a restore into this guest's disks", "add a matching pattern to `into` of [restore] in the client file, on the client";
    NoSuchPlace = 624, "the target has no filesystem for this file", "see the cause: give the target all disks of the guest, or restore the file to a folder with where=";
    HalfRestored = 625, "a guest's disks are restored in part only", "run the restore again, with replace=always, before the guest starts";
    // 7xx: the job and Bacula
    Internal = 701, "internal error in guestsnap", "report it with the job log";
    UnknownInterface = 702, "this Bacula's plugin interface is not known", "use a guestsnap release that supports this Bacula";
    Cancelled = 703, "the job was cancelled", "run it again if needed";
    OutputFailed = 704, "the output cannot be written", "see the cause: the reader has exited, or the disk is full";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GS-{}", self.number())
    }
}

/// A [`Code`], details, and the cause.
#[derive(Debug)]
pub struct Error {
    code: Code,
    detail: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// Creates an error without a cause. `detail` names the guest, disk or file and the step.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Error {
            code,
            detail: detail.into(),
            source: None,
        }
    }

    /// Adds the cause.
    #[must_use]
    pub fn because(mut self, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(cause.into());
        self
    }

    /// The stable code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// One line with code, detail, every cause, and the remedy. Escapes control characters: details
    /// contain names that guests chose.
    pub fn report(&self) -> String {
        let text = escape(self.with_causes().as_bytes());
        format!("{}. To do: {}", shorten(&text), self.code.remedy())
    }

    /// The error and its causes in one line without the remedy, for use inside another error.
    /// Causes sharing this error's code contribute only their detail.
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

/// Invisible characters that change how a line is displayed: they reverse text, join or hide
/// letters, or break the line on some terminals. Covers Unicode's format characters (Cf), line and
/// paragraph separators (Zl, Zp), and Default_Ignorable_Code_Point.
const INVISIBLE: [(char, char); 25] = [
    ('\u{ad}', '\u{ad}'),
    ('\u{34f}', '\u{34f}'),
    ('\u{600}', '\u{605}'),
    ('\u{61c}', '\u{61c}'),
    ('\u{6dd}', '\u{6dd}'),
    ('\u{70f}', '\u{70f}'),
    ('\u{890}', '\u{891}'),
    ('\u{8e2}', '\u{8e2}'),
    ('\u{115f}', '\u{1160}'),
    ('\u{17b4}', '\u{17b5}'),
    ('\u{180b}', '\u{180f}'),
    ('\u{200b}', '\u{200f}'),
    ('\u{2028}', '\u{202e}'),
    ('\u{2060}', '\u{206f}'),
    ('\u{3164}', '\u{3164}'),
    ('\u{fe00}', '\u{fe0f}'),
    ('\u{feff}', '\u{feff}'),
    ('\u{ffa0}', '\u{ffa0}'),
    ('\u{fff0}', '\u{fffb}'),
    ('\u{110bd}', '\u{110bd}'),
    ('\u{110cd}', '\u{110cd}'),
    ('\u{13430}', '\u{1343f}'),
    ('\u{1bca0}', '\u{1bca3}'),
    ('\u{1d173}', '\u{1d17a}'),
    ('\u{e0000}', '\u{e0fff}'),
];

fn is_shown(c: char) -> bool {
    let invisible = |(first, last): &(char, char)| (*first..=*last).contains(&c);
    !c.is_control() && (c.is_ascii() || !INVISIBLE.iter().any(invisible))
}

/// Makes guest-chosen bytes safe for a log or terminal: shows control characters, invisible
/// characters and invalid bytes as `\xNN`, keeps other UTF-8.
pub fn escape(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if !is_shown(c) {
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

/// Removes the middle of a text longer than a few KiB: guest paths may have 64 KiB each, and there
/// may be many.
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

/// `line 3, column 7`: position of a byte in a text; columns count characters.
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
        assert!(text.starts_with("GS-602 a directory cannot be read: xü"));
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
        // Displays as `sudo.txt` in part, through a right-to-left override.
        assert_eq!(
            escape("a\u{202e}txt.odus".as_bytes()),
            "a\\xe2\\x80\\xaetxt.odus"
        );
        let kept = "grün 日本 العربية \u{a0}é 😀";
        assert_eq!(escape(kept.as_bytes()), kept);
        for hidden in [
            0xad, 0x61c, 0x180e, 0x200b, 0x200d, 0x200f, 0x2028, 0x2029, 0x202a, 0x2060, 0x2066,
            0x2069, 0x206f, 0xfe0f, 0xfeff, 0xfff9, 0xe0001, 0xe0041, 0xe0100,
        ] {
            let hidden = char::from_u32(hidden).unwrap();
            let shown = escape(format!("a{hidden}b").as_bytes());
            assert!(
                shown.is_ascii() && shown.starts_with("a\\x"),
                "{hidden:?}: {shown}"
            );
        }
    }
}
