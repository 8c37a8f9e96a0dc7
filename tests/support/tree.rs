//! A manifest of a directory tree, and the comparison of two.

use super::Result;
use rustix::fs::{SeekFrom, seek};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What is known of one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// `f` file, `d` directory, `l` link, `p` fifo, `s` socket, `b` and `c` devices.
    pub kind: char,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    /// Seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Of the contents; 0 for all but files.
    pub hash: u128,
    /// Bytes of a file that lie outside of holes.
    pub data: u64,
    pub target: Option<PathBuf>,
    pub rdev: u64,
    /// The first name (in order) of the group of hard links, if there is more than one in the tree.
    pub link_of: Option<PathBuf>,
    /// All xattrs, POSIX ACLs among them as `system.posix_acl_*`.
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

/// Names relative to the root (`""` is the root itself) and what they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    pub entries: BTreeMap<PathBuf, Entry>,
}

/// What the comparison leaves out.
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
    /// What no plugin can bring back through the installed Bacula: sockets, and what the fields above say of fifos,
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
    /// Reads a tree, staying on its filesystem's names (mount points inside are followed like directories).
    pub fn of(root: &Path) -> Result<Self> {
        let mut manifest = Self::default();
        let mut links: BTreeMap<(u64, u64), PathBuf> = BTreeMap::new();
        let mut stack = vec![PathBuf::new()];
        while let Some(name) = stack.pop() {
            let path = if name.as_os_str().is_empty() {
                root.to_path_buf()
            } else {
                root.join(&name)
            };
            let meta =
                std::fs::symlink_metadata(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            if meta.is_dir() {
                for entry in std::fs::read_dir(&path)? {
                    stack.push(name.join(entry?.file_name()));
                }
            }
            if meta.nlink() > 1 && !meta.is_dir() {
                let first = links
                    .entry((meta.dev(), meta.ino()))
                    .or_insert_with(|| name.clone());
                if name < *first {
                    *first = name.clone();
                }
            }
            manifest.entries.insert(name, entry(&path, &meta)?);
        }
        for (name, entry) in &mut manifest.entries {
            let path = root.join(name);
            let meta = std::fs::symlink_metadata(path)?;
            if meta.nlink() > 1 && entry.kind != 'd' {
                entry.link_of = links.get(&(meta.dev(), meta.ino())).cloned();
            }
        }
        // A partner outside of the tree makes no group.
        let mut groups: BTreeMap<PathBuf, usize> = BTreeMap::new();
        for entry in manifest.entries.values() {
            if let Some(first) = &entry.link_of {
                *groups.entry(first.clone()).or_default() += 1;
            }
        }
        for entry in manifest.entries.values_mut() {
            if entry.link_of.as_ref().is_some_and(|f| groups[f] < 2) {
                entry.link_of = None;
            }
        }
        Ok(manifest)
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
        let lines = self.differences(expected, ignore);
        if lines.is_empty() {
            return Ok(());
        }
        let shown = lines
            .iter()
            .take(40)
            .cloned()
            .collect::<Vec<_>>()
            .join("\n  ");
        Err(format!("the trees differ in {} points:\n  {shown}", lines.len()).into())
    }
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
        if !ignore.holes && old.data + 65536 <= old.size && new.data > old.data + 65536 {
            differ(
                "bytes outside of holes",
                old.data.to_string(),
                new.data.to_string(),
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
            let left_out = ignore.link_extras && old.kind == 'l';
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

fn entry(path: &Path, meta: &std::fs::Metadata) -> Result<Entry> {
    let kind = meta.file_type();
    let kind = match () {
        () if kind.is_file() => 'f',
        () if kind.is_dir() => 'd',
        () if kind.is_symlink() => 'l',
        () if kind.is_fifo() => 'p',
        () if kind.is_socket() => 's',
        () if kind.is_block_device() => 'b',
        () => 'c',
    };
    let (hash, data) = if kind == 'f' { contents(path)? } else { (0, 0) };
    Ok(Entry {
        kind,
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        size: meta.size(),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        hash,
        data,
        target: (kind == 'l')
            .then(|| std::fs::read_link(path))
            .transpose()?,
        rdev: if matches!(kind, 'b' | 'c') {
            meta.rdev()
        } else {
            0
        },
        link_of: None,
        xattrs: xattrs(path)?,
    })
}

fn contents(path: &Path) -> Result<(u128, u64)> {
    let mut file = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NOATIME)
        .open(path)
        .map_err(|e| format!("{}: {e}", path.display()))?;
    let size = file.metadata()?.len();
    let mut data = 0;
    let mut at = 0;
    while at < size {
        let Ok(start) = seek(&file, SeekFrom::Data(at)) else {
            break;
        };
        let end = seek(&file, SeekFrom::Hole(start))?;
        data += end - start;
        at = end;
    }
    seek(&file, SeekFrom::Start(0))?;
    let mut hash = Hash::default();
    let mut buffer = vec![0; 1 << 18];
    loop {
        let n = file
            .read(&mut buffer)
            .map_err(|e| format!("{}: {e}", path.display()))?;
        if n == 0 {
            return Ok((hash.end(), data));
        }
        hash.add(&buffer[..n]);
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

fn xattrs(path: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
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
        // The host's own label, given by the kernel to every new file where SELinux is on.
        // xfs shows each ACL a second time under its internal name.
        let name_text = name.to_string_lossy();
        if name_text != "security.selinux" && !name_text.starts_with("trusted.SGI_ACL_") {
            found.insert(name.to_string_lossy().into_owned(), value);
        }
    }
    Ok(found)
}
