//! A manifest of a directory tree, and the comparison of two.

use super::Result;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, SeekFrom, Stat, seek};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Flags of files that are the user's, not the filesystem's: immutable, append-only, no dump, no access times.
const USER_FLAGS: u32 = 0x10 | 0x20 | 0x40 | 0x80;

/// Facts of one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// `f` file, `d` directory, `l` link, `p` fifo, `s` socket, `b` and `c` devices.
    pub kind: char,
    /// Permissions, with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Seconds and nanoseconds.
    pub atime: (i64, i64),
    /// Names of the inode, in the tree or not; 0 for directories.
    pub nlink: u64,
    /// Immutable, append-only and the like, of files and directories.
    pub flags: u32,
    /// Size of the contents; 0 for all but files.
    pub hash: u128,
    /// Where a file has data: starts and ends.
    pub extents: Vec<(u64, u64)>,
    /// Where a link leads.
    pub target: Option<PathBuf>,
    /// Device number of a device; 0 for all others.
    pub rdev: u64,
    /// The first name (in order) of the group of hard links, if there is more than one in the tree.
    pub link_of: Option<PathBuf>,
    /// All xattrs, POSIX ACLs among them as `system.posix_acl_*`.
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

impl Entry {
    /// Bytes of a file that lie outside of holes.
    pub fn data(&self) -> u64 {
        self.extents.iter().map(|(start, end)| end - start).sum()
    }
}

/// Names relative to the root (`""` is the root itself) and what they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    /// By name; the order is that of paths.
    pub entries: BTreeMap<PathBuf, Entry>,
}

/// Parts that the comparison leaves out.
#[derive(Clone, Debug, Default)]
pub struct Ignore {
    /// Sockets: Bacula does not save them.
    pub sockets: bool,
    /// Fractions of seconds: Bacula's own File= restore does not set them.
    pub nanoseconds: bool,
    /// Fractions of seconds of fifos and devices: Bacula calls no plugin for their extended record at a restore.
    pub special_nanoseconds: bool,
    /// Fractions of seconds and xattrs of symbolic links: with 9.6 the same.
    pub link_extras: bool,
    /// Times of directories.
    pub dir_times: bool,
    /// Times before 1970 or after 2038 and so on, by name.
    pub times_of: Vec<PathBuf>,
    /// Whether holes stayed holes.
    pub holes: bool,
    /// Xattr names that start with one of these.
    pub xattrs: Vec<String>,
    /// Names and all below them.
    pub below: Vec<PathBuf>,
    /// The root directory's own owner, mode, times.
    pub root: bool,
}

impl Ignore {
    /// Objects that no plugin can bring back through the installed Bacula: sockets, and the fields above of fifos,
    /// devices and links; and the plugin's own folder, which the guest did not have.
    pub fn after_plugin_restore() -> Result<Self> {
        Ok(Self {
            sockets: true,
            special_nanoseconds: true,
            link_extras: super::bacula::Bacula::version()?.starts_with("9."),
            below: vec![".guestsnap".into()],
            root: true,
            ..Self::default()
        })
    }
}

impl Manifest {
    /// Reads a tree, however deep, and leaves no access times behind. Mount points inside are followed like directories.
    pub fn of(root: &Path) -> Result<Self> {
        let is_dir = std::fs::symlink_metadata(root)
            .map_err(|e| format!("{}: {e}", root.display()))?
            .is_dir();
        let (directory, name) = match (root.parent(), root.file_name()) {
            (Some(parent), Some(name)) if !is_dir => (parent, name),
            _ => (root, OsStr::new(".")),
        };
        let directory = rustix::fs::openat(CWD, directory, DIRECTORY, Mode::empty())?;
        let mut reader = Reader::default();
        reader.object(&directory, name, PathBuf::new())?;
        let Reader { mut entries, names } = reader;
        // A partner outside of the tree makes no group.
        for group in names.values().filter(|group| group.len() > 1) {
            let first = group.iter().min().cloned();
            for name in group {
                if let Some(entry) = entries.get_mut(name) {
                    entry.link_of.clone_from(&first);
                }
            }
        }
        Ok(Self { entries })
    }

    /// The part below a name, with names relative to it.
    pub fn below(&self, top: &Path) -> Self {
        let cut = |p: &Path| p.strip_prefix(top).map(Path::to_path_buf).ok();
        let entries = self.entries.iter().filter_map(|(name, entry)| {
            let mut entry = entry.clone();
            entry.link_of = entry.link_of.as_deref().and_then(cut);
            Some((cut(name)?, entry))
        });
        Self {
            entries: entries.collect(),
        }
    }

    /// Differences from the tree that is expected, one line each.
    pub fn differences(&self, expected: &Self, ignore: &Ignore) -> Vec<String> {
        self.compared(expected, ignore, compare)
    }

    fn compared(&self, expected: &Self, ignore: &Ignore, compare: Compare) -> Vec<String> {
        let mut lines = Vec::new();
        let skip = |name: &Path, entry: &Entry| {
            ignore.below.iter().any(|b| name.starts_with(b))
                || (ignore.sockets && entry.kind == 's')
                || (ignore.root && name.as_os_str().is_empty())
        };
        for (name, old) in expected.entries.iter().filter(|(n, e)| !skip(n, e)) {
            match self.entries.get(name) {
                None => lines.push(format!("{}: missing", show(name))),
                Some(new) => compare(name, old, new, ignore, &mut lines),
            }
        }
        for (name, _) in self.entries.iter().filter(|(n, e)| !skip(n, e)) {
            if !expected.entries.contains_key(name) {
                lines.push(format!("{}: not expected", show(name)));
            }
        }
        lines
    }

    /// Fails with (the first of) the differences.
    pub fn check_equals(&self, expected: &Self, ignore: &Ignore) -> Result {
        equal(&self.differences(expected, ignore))
    }

    /// Like [`Self::check_equals`]; access times, flags, numbers of links, SELinux labels and the very extents count too.
    pub fn check_same(&self, expected: &Self, ignore: &Ignore) -> Result {
        equal(&self.compared(expected, ignore, compare_all))
    }
}

/// Adds a line for each difference between what is expected of a name, and what was found.
type Compare = fn(&Path, &Entry, &Entry, &Ignore, &mut Vec<String>);

fn equal(differences: &[String]) -> Result {
    if differences.is_empty() {
        return Ok(());
    }
    let shown = differences[..differences.len().min(40)].join("\n  ");
    Err(format!(
        "the trees differ in {} points:\n  {shown}",
        differences.len()
    )
    .into())
}

fn show(name: &Path) -> String {
    if name.as_os_str().is_empty() {
        ".".into()
    } else {
        format!("{name:?}")
    }
}

fn compare(name: &Path, old: &Entry, new: &Entry, ignore: &Ignore, lines: &mut Vec<String>) {
    let mut differ = |what: &str, old: String, new: String| {
        if old != new {
            lines.push(format!("{}: {what} {new}, expected {old}", show(name)));
        }
    };
    differ("type", old.kind.to_string(), new.kind.to_string());
    differ("mode", format!("{:o}", old.mode), format!("{:o}", new.mode));
    differ(
        "owner",
        format!("{}:{}", old.uid, old.gid),
        format!("{}:{}", new.uid, new.gid),
    );
    differ(
        "target",
        format!("{:?}", old.target),
        format!("{:?}", new.target),
    );
    differ("device", old.rdev.to_string(), new.rdev.to_string());
    differ(
        "hard link of",
        format!("{:?}", old.link_of),
        format!("{:?}", new.link_of),
    );
    if old.kind == 'f' {
        differ("size", old.size.to_string(), new.size.to_string());
        differ(
            "contents",
            format!("{:032x}", old.hash),
            format!("{:032x}", new.hash),
        );
        // Filesystems differ in where a hole can begin: one block more at each of a few borders is no loss.
        let (before, after) = (old.data(), new.data());
        if !ignore.holes && before + 65536 <= old.size && after > before + 65536 {
            differ(
                "bytes outside of holes",
                before.to_string(),
                after.to_string(),
            );
        }
    }
    let untimed =
        (ignore.dir_times && old.kind == 'd') || ignore.times_of.iter().any(|n| n == name);
    if !untimed {
        let whole = ignore.nanoseconds
            || (ignore.special_nanoseconds && matches!(old.kind, 'p' | 'b' | 'c'))
            || (ignore.link_extras && old.kind == 'l');
        let nsec = |t: (i64, i64)| if whole { 0 } else { t.1 };
        differ(
            "mtime",
            format!("{}.{:09}", old.mtime.0, nsec(old.mtime)),
            format!("{}.{:09}", new.mtime.0, nsec(new.mtime)),
        );
    }
    let wanted = |e: &Entry| -> BTreeMap<String, Vec<u8>> {
        let keep = |n: &String| {
            // The host's own label, given by the kernel to every new file where SELinux is on.
            let left_out = ignore.link_extras && old.kind == 'l' || *n == LABEL;
            !left_out && !ignore.xattrs.iter().any(|i| n.starts_with(i.as_str()))
        };
        e.xattrs
            .iter()
            .filter(|(n, _)| keep(n))
            .map(|(n, v)| (n.clone(), v.clone()))
            .collect()
    };
    differ(
        "xattrs",
        format!("{:?}", wanted(old)),
        format!("{:?}", wanted(new)),
    );
}

/// All of it, and what no backup through Bacula brings back as a rule.
fn compare_all(name: &Path, old: &Entry, new: &Entry, ignore: &Ignore, lines: &mut Vec<String>) {
    compare(name, old, new, ignore, lines);
    let extents = |e: &Entry| {
        if ignore.holes {
            Vec::new()
        } else {
            e.extents.clone()
        }
    };
    let all = |e: &Entry| {
        format!(
            "atime {:?}, {} links, flags {:#x}, label {:?}, data at {:?}",
            e.atime,
            e.nlink,
            e.flags,
            e.xattrs.get(LABEL),
            extents(e)
        )
    };
    let (old, new) = (all(old), all(new));
    if old != new {
        lines.push(format!("{}: {new}, expected {old}", show(name)));
    }
}

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOATIME)
    .union(OFlags::CLOEXEC);
const LABEL: &str = "security.selinux";

/// A tree as far as it was read.
#[derive(Default)]
struct Reader {
    entries: BTreeMap<PathBuf, Entry>,
    /// Names of inodes that have more than one, by device and number.
    names: BTreeMap<(u64, u64), Vec<PathBuf>>,
}

impl Reader {
    /// An object by its name in a directory, and all below it.
    fn object(&mut self, directory: &OwnedFd, file: &OsStr, name: PathBuf) -> Result {
        let failed = |e: Errno| format!("{}: {e}", show(&name));
        let stat =
            rustix::fs::statat(directory, file, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
        let mut entry = plain(&stat);
        // The directory, not the object, is named by descriptor: its links are not followed, and the path is short.
        let path = Path::new("/proc/self/fd")
            .join(directory.as_raw_fd().to_string())
            .join(file);
        entry.xattrs = xattrs(&path)?;
        let open = |more: OFlags| {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NOATIME | OFlags::CLOEXEC;
            rustix::fs::openat(directory, file, flags | more, Mode::empty()).map_err(failed)
        };
        match entry.kind {
            'l' => {
                let target = rustix::fs::readlinkat(directory, file, Vec::new()).map_err(failed)?;
                entry.target = Some(OsString::from_vec(target.into_bytes()).into());
            }
            'f' => {
                let file = open(OFlags::empty())?;
                entry.flags = flags(&file).map_err(failed)?;
                (entry.hash, entry.extents) =
                    contents(File::from(file)).map_err(|e| format!("{}: {e}", show(&name)))?;
            }
            'd' => {
                let inner = open(OFlags::DIRECTORY)?;
                entry.flags = flags(&inner).map_err(failed)?;
                for found in Dir::read_from(&inner).map_err(failed)? {
                    let found = found.map_err(failed)?;
                    let found = OsStr::from_bytes(found.file_name().to_bytes());
                    if found != "." && found != ".." {
                        self.object(&inner, found, name.join(found))?;
                    }
                }
            }
            _ => {}
        }
        if entry.nlink > 1 {
            let names = self.names.entry((stat.st_dev, stat.st_ino)).or_default();
            names.push(name.clone());
        }
        self.entries.insert(name, entry);
        Ok(())
    }
}

/// Inode facts of an object.
fn plain(stat: &Stat) -> Entry {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => 'f',
        FileType::Directory => 'd',
        FileType::Symlink => 'l',
        FileType::Fifo => 'p',
        FileType::Socket => 's',
        FileType::BlockDevice => 'b',
        _ => 'c',
    };
    Entry {
        kind,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: stat.st_size as u64,
        mtime: (stat.st_mtime, stat.st_mtime_nsec as i64),
        atime: (stat.st_atime, stat.st_atime_nsec as i64),
        nlink: if kind == 'd' { 0 } else { stat.st_nlink },
        flags: 0,
        hash: 0,
        extents: Vec::new(),
        target: None,
        rdev: if matches!(kind, 'b' | 'c') {
            stat.st_rdev
        } else {
            0
        },
        link_of: None,
        xattrs: BTreeMap::new(),
    }
}

/// None where the filesystem has none.
fn flags(file: &OwnedFd) -> rustix::io::Result<u32> {
    match rustix::fs::ioctl_getflags(file) {
        Ok(flags) => Ok(flags.bits() & USER_FLAGS),
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL) => Ok(0),
        Err(e) => Err(e),
    }
}

fn contents(mut file: File) -> std::io::Result<(u128, Vec<(u64, u64)>)> {
    let size = file.metadata()?.len();
    let mut extents = Vec::new();
    let mut at = 0;
    while at < size {
        let Ok(start) = seek(&file, SeekFrom::Data(at)) else {
            break;
        };
        at = seek(&file, SeekFrom::Hole(start))?;
        extents.push((start, at));
    }
    seek(&file, SeekFrom::Start(0))?;
    let mut hash = Hash::default();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((hash.end(), extents)),
            n => hash.add(&buffer[..n]),
        }
    }
}

/// Two 64-bit multiply-and-rotate lanes over 8-byte words: enough to tell whether a file came back.
#[derive(Default)]
struct Hash {
    a: u64,
    b: u64,
    length: u64,
    rest: Vec<u8>,
}

impl Hash {
    fn word(&mut self, word: u64) {
        self.a = (self.a ^ word)
            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
            .rotate_left(29);
        self.b = (self.b.wrapping_add(word))
            .wrapping_mul(0xC2B2_AE3D_27D4_EB4F)
            .rotate_left(31)
            ^ self.a;
    }

    fn add(&mut self, mut bytes: &[u8]) {
        self.length += bytes.len() as u64;
        while !self.rest.is_empty() && !bytes.is_empty() {
            self.rest.push(bytes[0]);
            bytes = &bytes[1..];
            if self.rest.len() == 8 {
                let word = u64::from_le_bytes(self.rest[..8].try_into().unwrap_or_default());
                self.rest.clear();
                self.word(word);
            }
        }
        let chunks = bytes.chunks_exact(8);
        self.rest.extend_from_slice(chunks.remainder());
        for chunk in chunks {
            self.word(u64::from_le_bytes(chunk.try_into().unwrap_or_default()));
        }
    }

    fn end(mut self) -> u128 {
        for byte in std::mem::take(&mut self.rest) {
            self.word(u64::from(byte) + 256);
        }
        self.word(self.length);
        self.word(0x5851_F42D_4C95_7F2D);
        u128::from(self.a) << 64 | u128::from(self.b)
    }
}

/// All xattrs of an object, links not followed.
pub fn xattrs(path: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut names = vec![0_u8; 65536];
    let length = match rustix::fs::llistxattr(path, &mut names) {
        Ok(length) => length,
        Err(rustix::io::Errno::NOTSUP) => return Ok(found),
        Err(e) => return Err(format!("{}: listxattr: {e}", path.display()).into()),
    };
    for name in names[..length].split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let mut value = vec![0_u8; 65536];
        let name = OsString::from_vec(name.to_vec());
        let n = rustix::fs::lgetxattr(path, name.as_bytes(), &mut value)
            .map_err(|e| format!("{}: getxattr {name:?}: {e}", path.display()))?;
        value.truncate(n);
        // xfs shows each ACL a second time under its internal name.
        let name = name.to_string_lossy().into_owned();
        if !name.starts_with("trusted.SGI_ACL_") {
            found.insert(name, value);
        }
    }
    Ok(found)
}
