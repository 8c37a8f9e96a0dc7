//! Filesystems of loop images: probed, mounted detached, walked, and restored onto another one.
//!
//! These tests need root and loop devices. Without root they say so and pass, unless
//! `GUESTSNAP_REQUIRE_ROOT` is set.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CString, OsStr};
use std::fs::{self, File, OpenOptions};

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};

use guestsnap::error::Code;
use guestsnap::fs::{
    Content, DetachedMount, Filesystem, FsPolicy, GuestTree, MountedVolume, Note, NoteLevel,
    VolumeIdentity, probe,
};
use guestsnap::job::options::RestoreOptions;
use guestsnap::job::{CancelFlag, FileType as Saved, Importance, Reporter, Restore, RestoreFile};
use guestsnap::stream::restore::Created;
use guestsnap::stream::{
    AheadOptions, FileReader, HardLinks, Item, Kind, Meta, ReadAhead, Replace, Request, Restorer,
    Time, WalkOptions, Walker, What, ahead,
};
use rustix::fs::{AtFlags, CWD, FileType, IFlags, Mode, OFlags, SeekFrom, Timestamps, XattrFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// One test at a time: they compare what the whole process and the host hold.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn root() -> Option<MutexGuard<'static, ()>> {
    if !rustix::process::geteuid().is_root() {
        let text = "NOT RUN: this test needs root and loop devices";
        assert!(
            std::env::var_os("GUESTSNAP_REQUIRE_ROOT").is_none(),
            "{text}"
        );
        eprintln!("{text}");
        return None;
    }
    Some(ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner()))
}

fn has_driver(name: &str) -> bool {
    let _ = Command::new("modprobe").arg(name).output();
    let known = fs::read_to_string("/proc/filesystems").unwrap();
    let found = known.split_whitespace().any(|w| w == name);
    if !found {
        let text = format!("NOT RUN: this kernel has no {name}");
        assert!(
            std::env::var_os("GUESTSNAP_REQUIRE_ALL").is_none(),
            "{text}"
        );
        eprintln!("{text}");
    }
    found
}

fn run(program: &str, args: &[&OsStr]) -> String {
    let output = Command::new(program).args(args).output().expect(program);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

macro_rules! run {
    ($program:literal $(, $arg:expr)*) => {
        run($program, &[$(OsStr::new($arg)),*])
    };
}

/// A loop device over an image file; detached on drop.
struct Loop {
    device: String,
}

impl Loop {
    fn new(image: &Path) -> Loop {
        let device = run!("losetup", "--find", "--show", image);
        Loop {
            device: device.trim().to_owned(),
        }
    }

    fn read_only(image: &Path) -> Loop {
        let device = run!("losetup", "--find", "--show", "--read-only", image);
        Loop {
            device: device.trim().to_owned(),
        }
    }

    fn name(&self) -> &str {
        self.device.strip_prefix("/dev/").unwrap()
    }

    fn open(&self) -> File {
        let mut options = OpenOptions::new();
        let opened = options.read(true).write(true).open(&self.device);
        opened.unwrap_or_else(|_| File::open(&self.device).unwrap())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run!("losetup", "--detach", &self.device);
    }
}

/// An ordinary mount for preparing images and as a restore target.
struct Attached {
    directory: PathBuf,
    _device: Loop,
}

impl Attached {
    fn new(image: &Path, directory: PathBuf, options: &str) -> Attached {
        let device = Loop::new(image);
        fs::create_dir_all(&directory).unwrap();
        run!("mount", "-o", options, &device.device, &directory);
        Attached {
            directory,
            _device: device,
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        run!("umount", &self.directory);
    }
}

struct Bench {
    dir: tempfile::TempDir,
    _one: MutexGuard<'static, ()>,
}

impl Bench {
    fn new() -> Option<Bench> {
        let _one = root()?;
        let dir = tempfile::Builder::new().prefix("guestsnap-test-").tempdir();
        Some(Bench {
            dir: dir.unwrap(),
            _one,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// An image with an empty filesystem.
    fn image(&self, name: &str, fstype: &str, more: &[&str]) -> PathBuf {
        let image = self.path(name);
        let file = File::create(&image).unwrap();
        file.set_len(400 << 20).unwrap();
        let program = format!("mkfs.{fstype}");
        let quiet: &[&str] = match fstype {
            "xfs" | "btrfs" => &["-q", "-f"],
            "vfat" => &[],
            _ => &["-q", "-F", "-b", "4096"],
        };
        let args: Vec<&OsStr> = quiet
            .iter()
            .chain(more)
            .map(OsStr::new)
            .chain([image.as_os_str()])
            .collect();
        run(&program, &args);
        image
    }

    fn attach(&self, image: &Path) -> Attached {
        Attached::new(image, self.path("mnt"), "noatime")
    }
}

fn filesystem_of(device: &File) -> Filesystem {
    match probe(device, "test").unwrap() {
        Content::Filesystem(filesystem) => filesystem,
        other => panic!("{other:?}"),
    }
}

fn mount(device: &Loop) -> DetachedMount {
    let file = device.open();
    let filesystem = filesystem_of(&file);
    DetachedMount::open(file.as_fd(), &filesystem, &FsPolicy::default(), "test")
        .unwrap_or_else(|e| panic!("{}", e.report()))
        .0
}

fn volume(device: &Loop, identity: VolumeIdentity) -> MountedVolume {
    MountedVolume {
        filesystem: filesystem_of(&device.open()),
        mount: mount(device),
        identity,
    }
}

fn single(device: &Loop) -> GuestTree {
    GuestTree::assemble(vec![volume(device, named("p1"))]).unwrap()
}

fn named(name: &str) -> VolumeIdentity {
    VolumeIdentity {
        name: name.into(),
        ..VolumeIdentity::default()
    }
}

fn open_descriptors() -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc/self/fd").unwrap() {
        // The descriptor of this listing itself is gone by now.
        if let Ok(target) = fs::read_link(entry.unwrap().path()) {
            found.insert(target);
        }
    }
    found
}

// ---- a tree with every kind of object, and what it looks like from outside ----

const POSIX_ACL: &[u8] = &[
    2, 0, 0, 0, // version
    1, 0, 7, 0, 0xff, 0xff, 0xff, 0xff, // owner rwx
    2, 0, 5, 0, 0xe8, 3, 0, 0, // user 1000 r-x
    4, 0, 5, 0, 0xff, 0xff, 0xff, 0xff, // group r-x
    16, 0, 5, 0, 0xff, 0xff, 0xff, 0xff, // mask r-x
    32, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, // others ---
];

/// cap_net_raw+ep, as setcap writes it.
const CAPABILITY: &[u8] = &[
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

fn set_times(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = rustix::fs::Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())
        .unwrap_or_else(|e| panic!("{name}: {e}"));
}

fn populate(top: &Path) {
    let file = |name: &str, content: &[u8]| {
        let path = top.join(name);
        fs::write(&path, content).unwrap();
        path
    };
    let mode = |path: &Path, bits| rustix::fs::chmod(path, Mode::from_raw_mode(bits)).unwrap();
    for name in ["etc", "a", "b", "b/deep", "many", "empty"] {
        fs::create_dir(top.join(name)).unwrap();
    }
    file("etc/fstab", b"# nothing\n");
    file("empty-file", b"");
    let big: Vec<u8> = (0..3_000_017u32)
        .map(|n| n.to_le_bytes()[n as usize % 3])
        .collect();
    file("big", &big);

    let sparse = File::create(top.join("sparse")).unwrap();
    sparse.write_all_at(b"start", 0).unwrap();
    sparse.write_all_at(b"middle", (64 << 20) + 5).unwrap();
    sparse.set_len(200 << 20).unwrap();
    let hole = File::create(top.join("only-a-hole")).unwrap();
    hole.set_len((1 << 20) + 1).unwrap();

    symlink("big", top.join("link")).unwrap();
    symlink("/etc/passwd", top.join("link-absolute")).unwrap();
    symlink(OsStr::from_bytes(&[b'x'; 1000]), top.join("link-long")).unwrap();
    symlink(OsStr::from_bytes(b"not\xff-utf8"), top.join("link-bytes")).unwrap();
    rustix::fs::chownat(
        CWD,
        top.join("link"),
        Some(rustix::fs::Uid::from_raw(1234)),
        Some(rustix::fs::Gid::from_raw(4321)),
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .unwrap();
    set_xattr(&top.join("link"), "trusted.on-a-link", b"yes");

    let first = file("a/first-name", b"one inode");
    fs::hard_link(&first, top.join("b/second-name")).unwrap();
    fs::hard_link(&first, top.join("b/deep/third-name")).unwrap();
    let ping = file("a/capable", b"#!");
    mode(&ping, 0o755);
    fs::hard_link(&ping, top.join("b/capable-too")).unwrap();
    set_xattr(&ping, "security.capability", CAPABILITY);
    symlink("x", top.join("a/link-with-two-names")).unwrap();
    rustix::fs::linkat(
        CWD,
        top.join("a/link-with-two-names"),
        CWD,
        top.join("b/link-with-two-names"),
        AtFlags::empty(),
    )
    .unwrap();

    let node = |name: &str, kind, bits, device| {
        let bits = Mode::from_raw_mode(bits);
        rustix::fs::mknodat(CWD, top.join(name), kind, bits, device).unwrap();
    };
    node("fifo", FileType::Fifo, 0o640, 0);
    node(
        "null",
        FileType::CharacterDevice,
        0o666,
        rustix::fs::makedev(1, 3),
    );
    node(
        "disk",
        FileType::BlockDevice,
        0o660,
        rustix::fs::makedev(259, 200_000),
    );
    node("socket", FileType::Socket, 0o777, 0);

    let setuid = file("setuid", b"x");
    std::os::unix::fs::chown(&setuid, Some(1000), Some(2000)).unwrap();
    mode(&setuid, 0o6755);
    mode(&top.join("empty"), 0o1777);
    let secret = file("no-rights", b"secret");
    mode(&secret, 0);

    let attributes = file("attributes", b"x");
    set_xattr(&attributes, "user.empty", b"");
    set_xattr(&attributes, "user.binary", b"a\0b\xff");
    set_xattr(&attributes, "user.large", &[7; 2000]);
    set_xattr(&attributes, "trusted.t", b"t");
    set_xattr(
        &attributes,
        "security.selinux",
        b"system_u:object_r:etc_t:s0\0",
    );
    let acl = file("acl", b"x");
    set_xattr(&acl, "system.posix_acl_access", POSIX_ACL);
    set_xattr(&top.join("b"), "system.posix_acl_default", POSIX_ACL);
    set_xattr(&top.join("b"), "user.on-a-directory", b"d");
    // What is made below an ACL by default, has one.
    file("b/inherits", b"x");

    set_times(&file("old", b"x"), -1_000_000_000, 123_456_789);
    set_times(&file("future", b"x"), 4_102_444_800, 987_654_321);
    set_times(&top.join("link"), 1_000_000_000, 1);
    set_times(&top.join("fifo"), 1_000_000_001, 999_999_999);

    file("name with \n newline and \u{1b}[31m", b"x");
    fs::write(top.join(OsStr::from_bytes(b"bytes-\xff\xfe\x80")), b"x").unwrap();
    fs::write(top.join("n".repeat(255)), b"x").unwrap();

    // Deeper than one path can name.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut here: OwnedFd = rustix::fs::open(top, flags, Mode::empty()).unwrap();
    let name = "d".repeat(200);
    for _ in 0..50 {
        rustix::fs::mkdirat(&here, name.as_str(), Mode::from_raw_mode(0o755)).unwrap();
        here = rustix::fs::openat(&here, name.as_str(), flags, Mode::empty()).unwrap();
    }
    let create = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
    let bottom = rustix::fs::openat(&here, c"bottom", create, Mode::from_raw_mode(0o644)).unwrap();
    rustix::io::write(&bottom, b"down here").unwrap();

    for n in 0..5000 {
        fs::write(top.join(format!("many/file-{n}")), n.to_string()).unwrap();
    }
    for (name, flags) in [
        ("immutable", IFlags::IMMUTABLE),
        ("append-only", IFlags::APPEND),
        ("nodump", IFlags::NODUMP | IFlags::NOATIME),
    ] {
        let path = file(name, b"fenced");
        fs::hard_link(&path, top.join(format!("{name}-2"))).unwrap();
        set_times(&path, 1_500_000_000, 5);
        add_flags(&path, flags);
    }
    fs::create_dir(top.join("immutable-directory")).unwrap();
    file("immutable-directory/inside", b"x");
    add_flags(&top.join("immutable-directory"), IFlags::IMMUTABLE);
    for (name, seconds) in [
        ("b/deep", 1_111_111_111),
        ("b", 1_222_222_222),
        ("many", -7),
    ] {
        set_times(&top.join(name), seconds, 42);
    }
}

fn add_flags(path: &Path, flags: IFlags) {
    let file = File::open(path).unwrap();
    let before = rustix::fs::ioctl_getflags(&file).unwrap();
    rustix::fs::ioctl_setflags(&file, before | flags).unwrap();
}

/// What an object looks like, read in another way than the code under test reads it.
#[derive(Debug, PartialEq, Eq, Clone)]
struct Look {
    mode: u32,
    owner: (u32, u32),
    nlink: u64,
    rdev: u64,
    size: u64,
    mtime: (i64, i64),
    atime: (i64, i64),
    /// Paths of the same inode.
    names: usize,
    content: Vec<u8>,
    data_extents: Vec<(u64, u64)>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    flags: u32,
}

/// Flags that are the user's, not the filesystem's.
const USER_FLAGS: u32 = 0x10 | 0x20 | 0x40 | 0x80;

fn look_at(top: &Path) -> BTreeMap<Vec<u8>, Look> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOATIME;
    let directory = rustix::fs::open(top, flags, Mode::empty()).unwrap();
    let mut found = BTreeMap::new();
    let mut inodes: BTreeMap<u64, usize> = BTreeMap::new();
    let mut inode_of = BTreeMap::new();
    look_into(&directory, &mut Vec::new(), &mut found, &mut |path, ino| {
        *inodes.entry(ino).or_default() += 1;
        inode_of.insert(path, ino);
    });
    for (path, look) in &mut found {
        look.names = inodes[&inode_of[path]];
    }
    found
}

fn look_into(
    directory: &OwnedFd,
    path: &mut Vec<u8>,
    found: &mut BTreeMap<Vec<u8>, Look>,
    seen: &mut impl FnMut(Vec<u8>, u64),
) {
    let names: Vec<Vec<u8>> = rustix::fs::Dir::read_from(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_bytes().to_vec())
        .filter(|name| name != b"." && name != b"..")
        .collect();
    for name in names {
        let stat = rustix::fs::statat(directory, &name, AtFlags::SYMLINK_NOFOLLOW).unwrap();
        let length = path.len();
        if length > 0 {
            path.push(b'/');
        }
        path.extend_from_slice(&name);
        let kind = FileType::from_raw_mode(stat.st_mode);
        // The directory, not the object, is named by descriptor: no link of the object's is
        // followed, and the path is short.
        let by_name = [
            format!("/proc/self/fd/{}/", directory.as_raw_fd()).into_bytes(),
            name.clone(),
        ]
        .concat();
        let mut look = Look {
            mode: stat.st_mode,
            owner: (stat.st_uid, stat.st_gid),
            nlink: if kind == FileType::Directory {
                0
            } else {
                stat.st_nlink
            },
            rdev: stat.st_rdev,
            size: if kind == FileType::Directory {
                0
            } else {
                stat.st_size as u64
            },
            mtime: (stat.st_mtime, stat.st_mtime_nsec as i64),
            atime: (stat.st_atime, stat.st_atime_nsec as i64),
            names: 0,
            content: Vec::new(),
            data_extents: Vec::new(),
            xattrs: all_xattrs(&by_name),
            flags: 0,
        };
        let open = |more| {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NOATIME | more;
            rustix::fs::openat(directory, &name, flags, Mode::empty()).unwrap()
        };
        match kind {
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(directory, &name, Vec::new()).unwrap();
                look.content = target.into_bytes();
            }
            FileType::RegularFile => {
                let file = open(OFlags::empty());
                look.flags = rustix::fs::ioctl_getflags(&file).unwrap().bits() & USER_FLAGS;
                look.data_extents = data_extents(&file);
                let file = File::from(file);
                for &(start, end) in &look.data_extents {
                    let mut part = vec![0; (end - start) as usize];
                    file.read_exact_at(&mut part, start).unwrap();
                    look.content.extend(part);
                }
            }
            FileType::Directory => {
                let inner = open(OFlags::DIRECTORY);
                look.flags = rustix::fs::ioctl_getflags(&inner).unwrap().bits() & USER_FLAGS;
                look_into(&inner, path, found, seen);
            }
            _ => {}
        }
        seen(path.clone(), stat.st_ino);
        found.insert(path.clone(), look);
        path.truncate(length);
    }
}

fn all_xattrs(path: &[u8]) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut list = vec![0; 65536];
    let length = rustix::fs::llistxattr(path, &mut list).unwrap();
    let mut all = BTreeMap::new();
    for name in list[..length].split(|&b| b == 0).filter(|n| !n.is_empty()) {
        if name.starts_with(b"trusted.SGI_ACL") {
            continue;
        }
        let mut value = vec![0; 65536];
        let length = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
        value.truncate(length);
        all.insert(name.to_vec(), value);
    }
    all
}

fn data_extents(file: &OwnedFd) -> Vec<(u64, u64)> {
    let mut extents = Vec::new();
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(file, SeekFrom::Data(at)) {
        at = rustix::fs::seek(file, SeekFrom::Hole(start)).unwrap();
        extents.push((start, at));
    }
    extents
}

// ---- backup and restore in one go, as Bacula drives them ----

/// Bacula's stat record has whole seconds.
fn as_bacula_keeps_it(meta: &Meta) -> Meta {
    let whole = |t: Time| Time {
        seconds: t.seconds,
        nanoseconds: 0,
    };
    Meta {
        atime: whole(meta.atime),
        mtime: whole(meta.mtime),
        ctime: whole(meta.ctime),
        btime: None,
        ..*meta
    }
}

/// Copies the whole tree below `target`; gives all problems, notes and warnings.
fn copy(tree: &GuestTree, options: WalkOptions, target: &Path) -> Vec<String> {
    copy_items(Walker::new(tree, options).map(ahead::Item::from), target)
}

fn copy_items(items: impl Iterator<Item = ahead::Item>, target: &Path) -> Vec<String> {
    let mut log = Vec::new();
    let target = target.as_os_str().as_bytes();
    let mut restorer = Restorer::new(Some(target)).unwrap();
    let mut links = HardLinks::new(1 << 20);
    let mut buffer = vec![0; 65536];
    let mut index = 0;
    for item in items {
        let mut prepared = match item {
            ahead::Item::Begin(_) => continue,
            ahead::Item::Object(prepared) | ahead::Item::End(prepared) => prepared,
            ahead::Item::Problem(problem) => {
                log.push(problem.error.report());
                continue;
            }
            ahead::Item::Note(note) => {
                log.push(note.text);
                continue;
            }
        };
        let entry = prepared.entry.clone();
        if entry.kind == Kind::Socket {
            continue;
        }
        index += 1;
        let path = [target, b"/guest/", &entry.path].concat();
        let first = links.find(&entry.meta);
        let request = Request {
            path: &path,
            what: match (&first, &entry.link) {
                (Some(first), _) => What::HardLink(&first.path),
                (None, Some(target)) => What::Symlink(target),
                (None, None) => What::Object,
            },
            meta: as_bacula_keeps_it(&entry.meta),
            replace: Replace::Always,
        };
        let created = restorer
            .create(&request)
            .unwrap_or_else(|e| panic!("{}", e.report()));
        if first.is_some() {
            assert_eq!(created, Created::Created);
            log.extend(restorer.finish().unwrap().iter().map(|e| e.report()));
            continue;
        }
        if entry.kind == Kind::Regular {
            assert_eq!(created, Created::Extract);
            let mut contents = prepared.contents().unwrap();
            loop {
                let length = contents.read(&mut buffer).unwrap();
                if length == 0 {
                    break;
                }
                restorer.write(&buffer[..length]).unwrap();
            }
            restorer.finish_data().unwrap();
        }
        let (record, problems) = prepared.attributes().unwrap();
        log.extend(problems.iter().map(|e| e.report()));
        for bytes in record.encode() {
            restorer.apply_record(&bytes).unwrap();
        }
        log.extend(restorer.finish().unwrap().iter().map(|e| e.report()));
        assert!(links.insert(&entry.meta, &path, index));
    }
    log.extend(restorer.end(|problem| panic!("{}", problem.report())));
    log
}

fn clear_fences(top: &Path) {
    let _ = Command::new("chattr")
        .args(["-R", "-f", "-i", "-a"])
        .arg(top)
        .output();
}

fn assert_same(before: &BTreeMap<Vec<u8>, Look>, after: &BTreeMap<Vec<u8>, Look>) {
    let names = |m: &BTreeMap<Vec<u8>, Look>| m.keys().cloned().collect::<BTreeSet<_>>();
    let (old, new) = (names(before), names(after));
    let shown = |path: &Vec<u8>| guestsnap::error::escape(path);
    let missing: Vec<String> = old.difference(&new).map(shown).collect();
    let extra: Vec<String> = new.difference(&old).map(shown).collect();
    assert!(
        missing.is_empty() && extra.is_empty(),
        "missing {missing:?}, extra {extra:?}"
    );
    for (path, look) in before {
        let other = &after[path];
        let mut short = (look.clone(), other.clone());
        assert!(look.content == other.content, "content of {}", shown(path));
        short.0.content.clear();
        short.1.content.clear();
        assert_eq!(short.0, short.1, "{}", shown(path));
    }
}

/// Puts every kind of object on `from`, copies it to `to`, and compares.
fn round_trip(from: &str, to: &str, options: &WalkOptions) {
    let Some(bench) = Bench::new() else { return };
    let source = bench.image("source.img", from, &[]);
    let target = bench.image("target.img", to, &[]);
    let attached = bench.attach(&source);
    populate(&attached.directory);
    let before = {
        run!("sync", "-f", &attached.directory);
        let mut before = look_at(&attached.directory);
        before.remove(&b"socket"[..]);
        before
    };
    drop(attached);

    let descriptors = open_descriptors();
    let device = Loop::new(&source);
    let tree = GuestTree::assemble(vec![volume(&device, named("p1"))]).unwrap();
    let target = Attached::new(&target, bench.path("target"), "noatime");
    let log = copy(&tree, options.clone(), &target.directory);
    assert_eq!(log, Vec::<String>::new());
    tree.close().unwrap();
    assert_eq!(open_descriptors(), descriptors);
    assert_gone(&device);
    drop(device);

    let mut after = look_at(&target.directory.join("guest"));
    if from != to {
        // Where an extent ends is the filesystem's business; that holes stayed holes is ours.
        let total = |look: &Look| look.data_extents.iter().map(|(a, b)| b - a).sum::<u64>();
        let allocated = total(&after[&b"sparse"[..]]);
        assert!(allocated <= 256 << 10, "{allocated}");
    }
    let mut before = before;
    for look in before.values_mut().chain(after.values_mut()) {
        // Content was compared extent by extent above when the extents are the same.
        if from != to {
            look.content.retain(|&b| b != 0);
            look.data_extents.clear();
        }
    }
    assert_same(&before, &after);
    clear_fences(&target.directory);
}

/// Nothing holds the device any more.
fn assert_gone(device: &Loop) {
    for _ in 0..50 {
        if !Path::new("/proc/fs/ext4").join(device.name()).exists()
            && !Path::new("/sys/fs/xfs").join(device.name()).exists()
        {
            let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
            assert!(!mounts.contains(&device.device), "{mounts}");
            // Only a device without a holder can be opened exclusively.
            let mut options = OpenOptions::new();
            std::os::unix::fs::OpenOptionsExt::custom_flags(options.read(true), libc::O_EXCL);
            if options.open(&device.device).is_ok() {
                return;
            }
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("{} is still in use", device.device);
}

#[test]
fn root_every_object_survives_ext4_to_ext4() {
    round_trip("ext4", "ext4", &WalkOptions::default());
}

#[test]
fn root_every_object_survives_xfs_to_xfs() {
    round_trip("xfs", "xfs", &WalkOptions::default());
}

#[test]
fn root_every_object_survives_btrfs_to_btrfs() {
    round_trip("btrfs", "btrfs", &WalkOptions::default());
}

#[test]
fn root_every_object_survives_xfs_to_ext4() {
    round_trip("xfs", "ext4", &WalkOptions::default());
}

#[test]
fn root_every_object_survives_btrfs_to_ext4() {
    round_trip("btrfs", "ext4", &WalkOptions::default());
}

#[test]
fn root_every_object_survives_with_the_smallest_bounds() {
    for fstype in ["ext4", "xfs", "btrfs"] {
        let options = WalkOptions {
            open_directories: 2,
            batch_bytes: 500,
            names_bytes: 0,
        };
        round_trip(fstype, "ext4", &options);
    }
}

// ---- mounting what a guest may prepare ----

#[test]
fn root_dirty_journal_is_replayed() {
    for fstype in ["ext3", "ext4", "xfs", "btrfs"] {
        let Some(bench) = Bench::new() else { return };
        let image = bench.image("guest.img", fstype, &[]);
        let copy = bench.path("copy.img");
        {
            let attached = bench.attach(&image);
            let file = File::create(attached.directory.join("in-the-journal")).unwrap();
            file.write_all_at(b"written and synced", 0).unwrap();
            file.sync_all().unwrap();
            fs::copy(&image, &copy).unwrap();
        }
        // A read-only device cannot be replayed: that must be an error with a reason, not a torn
        // view. (btrfs has nothing to replay if its last commit holds everything.)
        if fstype != "btrfs" {
            let device = Loop::read_only(&copy);
            let file = device.open();
            let filesystem = filesystem_of(&file);
            let policy = FsPolicy::default();
            let error =
                DetachedMount::open(file.as_fd(), &filesystem, &policy, "web1").unwrap_err();
            assert_eq!(error.code(), Code::MountFailed);
            let report = error.report();
            assert!(
                report.contains("web1") && report.contains("read-only"),
                "{report}"
            );
        }
        let device = Loop::new(&copy);
        let tree = single(&device);
        let mut content = Vec::new();
        for item in Walker::new(&tree, WalkOptions::default()) {
            if let Item::Object(entry) = item {
                if entry.path == b"in-the-journal" {
                    content = read_all(&mut FileReader::open(&entry).unwrap());
                }
            }
        }
        assert_eq!(content, b"written and synced", "{fstype}");
        tree.close().unwrap();
        assert_gone(&device);
    }
}

fn read_all(reader: &mut FileReader) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = [0; 1000];
    loop {
        let length = reader.read(&mut buffer).unwrap();
        if length == 0 {
            return all;
        }
        all.extend_from_slice(&buffer[..length]);
    }
}

#[test]
fn root_skipping_recovery_is_only_done_when_asked_and_warns() {
    for fstype in ["ext4", "xfs", "btrfs"] {
        let Some(bench) = Bench::new() else { return };
        let image = bench.image("guest.img", fstype, &[]);
        let device = Loop::new(&image);
        let file = device.open();
        let policy = FsPolicy {
            skip_recovery: true,
            ..FsPolicy::default()
        };
        let filesystem = filesystem_of(&file);
        let (mount, notes) = DetachedMount::open(file.as_fd(), &filesystem, &policy, "web1")
            .unwrap_or_else(|e| panic!("{}", e.report()));
        assert!(
            notes.iter().any(|n| n.level == NoteLevel::Warning),
            "{notes:?}"
        );
        mount.close().unwrap();
    }
}

#[test]
fn root_panic_on_errors_is_overridden() {
    let Some(bench) = Bench::new() else { return };
    for fstype in ["ext2", "ext3", "ext4"] {
        let image = bench.image(&format!("{fstype}.img"), fstype, &[]);
        run!("tune2fs", "-e", "panic", &image);
        run!("tune2fs", "-E", "mount_opts=errors=panic", &image);
        let device = Loop::new(&image);
        let mount = mount(&device);
        let options = format!("/proc/fs/ext4/{}/options", device.name());
        let options = fs::read_to_string(options).unwrap();
        assert!(options.lines().any(|l| l == "errors=continue"), "{options}");
        assert!(!options.contains("panic"), "{options}");
        mount.close().unwrap();
        assert_gone(&device);
    }
}

#[test]
fn root_external_journal_is_refused() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "ext4", &[]);
    run!("tune2fs", "-E", "mount_opts=journal_path=/dev/sda", &image);
    let device = Loop::new(&image);
    let file = device.open();
    let filesystem = filesystem_of(&file);
    let policy = FsPolicy::default();
    let error = DetachedMount::open(file.as_fd(), &filesystem, &policy, "web1").unwrap_err();
    assert!(
        error.report().contains("journal device"),
        "{}",
        error.report()
    );
}

#[test]
fn root_clones_are_open_at_the_same_time() {
    let Some(bench) = Bench::new() else { return };
    for fstype in ["ext4", "xfs", "btrfs"] {
        if fstype == "btrfs" && !Path::new("/sys/fs/btrfs/features/temp_fsid").exists() {
            eprintln!("NOT RUN: btrfs clones need Linux 6.7");
            continue;
        }
        let image = bench.image(&format!("{fstype}.img"), fstype, &[]);
        {
            let attached = bench.attach(&image);
            fs::write(attached.directory.join("who"), "original").unwrap();
        }
        let clone = bench.path("clone.img");
        fs::copy(&image, &clone).unwrap();
        let (first, second) = (Loop::new(&image), Loop::new(&clone));
        let one = mount(&first);
        let two = mount(&second);
        one.close().unwrap();
        two.close().unwrap();
        assert_gone(&first);
        assert_gone(&second);
    }
}

#[test]
fn root_a_mounted_device_is_not_shared() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "ext4", &[]);
    let device = Loop::new(&image);
    let first = mount(&device);
    let file = device.open();
    let filesystem = filesystem_of(&file);
    let policy = FsPolicy::default();
    let error = DetachedMount::open(file.as_fd(), &filesystem, &policy, "web1").unwrap_err();
    assert!(error.report().contains("busy"), "{}", error.report());
    first.close().unwrap();
}

#[test]
fn root_two_signatures_are_never_mounted() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "ext4", &[]);
    let other = bench.image("other.img", "xfs", &[]);
    let mut start = vec![0; 512];
    File::open(other)
        .unwrap()
        .read_exact_at(&mut start, 0)
        .unwrap();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&image)
        .unwrap();
    file.write_all_at(&start, 0).unwrap();
    let error = probe(&file, "web1 p1").unwrap_err();
    assert_eq!(error.code(), Code::ProbeFailed);
    assert!(
        error.report().contains("several kinds"),
        "{}",
        error.report()
    );
}

#[test]
fn root_damage_is_an_error_with_a_reason() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "xfs", &[]);
    let device = Loop::new(&image);
    let file = device.open();
    let filesystem = filesystem_of(&file);
    // The root inode's block group header: the superblock stays good.
    file.write_all_at(&[0x5a; 1536], 512).unwrap();
    file.write_all_at(&[0x5a; 65536], 65536).unwrap();
    file.sync_all().unwrap();
    let policy = FsPolicy::default();
    match DetachedMount::open(file.as_fd(), &filesystem, &policy, "web1") {
        Ok(_) => panic!("a damaged xfs was mounted"),
        Err(error) => {
            let report = error.report();
            assert!(
                report.starts_with("GS-503") && report.contains("web1"),
                "{report}"
            );
            eprintln!("{report}");
        }
    }
}

#[test]
fn root_a_damaged_folder_is_a_problem_and_the_rest_is_walked() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "ext4", &["-O", "^metadata_csum"]);
    {
        let attached = bench.attach(&image);
        for folder in ["good", "lost", "broken"] {
            fs::create_dir(attached.directory.join(folder)).unwrap();
            for n in 0..500 {
                fs::write(attached.directory.join(format!("{folder}/{n:060}")), "x").unwrap();
            }
        }
    }
    // One directory loses its inode, the other a block in its middle.
    run!("debugfs", "-w", "-R", "clri lost", &image);
    let block = run!("debugfs", "-R", "bmap broken 5", &image);
    let block: u64 = block.trim().parse().unwrap();
    let file = OpenOptions::new().write(true).open(&image).unwrap();
    file.write_all_at(&[0xff; 4096], block * 4096).unwrap();
    drop(file);

    let device = Loop::new(&image);
    let tree = single(&device);
    let mut problems = BTreeMap::new();
    let mut good = 0;
    let mut broken = 0;
    let mut incomplete = BTreeSet::new();
    for item in Walker::new(&tree, WalkOptions::default()) {
        match item {
            Item::Problem(problem) => {
                assert!(problem.subtree);
                problems.insert(problem.path, problem.error.report());
            }
            Item::Object(entry) if entry.path.starts_with(b"good/") => good += 1,
            Item::Object(entry) if entry.path.starts_with(b"broken/") => broken += 1,
            Item::End(entry) if entry.incomplete => {
                incomplete.insert(entry.path);
            }
            _ => {}
        }
    }
    assert_eq!(good, 500);
    assert!(broken < 500, "{broken}");
    // ext4 passes over the block without failing a call: all that tells is its counter.
    let paths: Vec<&[u8]> = problems.keys().map(Vec::as_slice).collect();
    assert_eq!(paths, [&b""[..], b"lost"], "{problems:?}");
    assert!(problems[&b""[..]].contains("ext4 found"), "{problems:?}");
    assert_eq!(incomplete, BTreeSet::from([Vec::new()]));
    tree.close().unwrap();
}

/// Offsets of all copies of these bytes.
fn find_all(image: &Path, needle: &[u8]) -> Vec<u64> {
    let bytes = fs::read(image).unwrap();
    let windows = bytes.windows(needle.len()).enumerate();
    let found = windows.filter(|(_, window)| *window == needle);
    let at: Vec<u64> = found.map(|(at, _)| at as u64).collect();
    assert!(!at.is_empty(), "{needle:?} is nowhere");
    at
}

/// Wrong checksums of blocks with names, and of a file's contents where there are such: each object is given, or a
/// problem names it or a folder it is in.
#[test]
fn root_blocks_with_wrong_checksums_are_problems_and_the_rest_is_walked() {
    for kind in ["xfs", "btrfs"] {
        let Some(bench) = Bench::new() else { return };
        let image = bench.image("guest.img", kind, &[]);
        let mut expected = BTreeSet::from([b"contents".to_vec()]);
        {
            let attached = bench.attach(&image);
            // So many that neither the root nor the last folder shares a block with the one in the middle.
            for folder in ["top", "top/first", "top/broken", "top/between", "top/good"] {
                fs::create_dir(attached.directory.join(folder)).unwrap();
                for n in 0..500 {
                    let path = format!("{folder}/{}-{n:060}", folder.replace('/', "."));
                    fs::write(attached.directory.join(&path), "x").unwrap();
                    expected.insert(path.into_bytes());
                }
            }
            let mut contents = vec![b'c'; 64 << 10];
            contents[..12].copy_from_slice(b"a file's own");
            fs::write(attached.directory.join("contents"), contents).unwrap();
        }
        let mut damage = find_all(&image, format!("top.broken-{:060}", 250).as_bytes());
        if kind == "btrfs" {
            damage.extend(find_all(&image, b"a file's own"));
        }
        let file = OpenOptions::new().write(true).open(&image).unwrap();
        for at in damage {
            file.write_all_at(b"?", at).unwrap();
        }
        drop(file);

        let device = Loop::new(&image);
        let tree = single(&device);
        let mut problems = BTreeSet::new();
        let mut given = BTreeSet::new();
        let mut unread = Vec::new();
        let ahead = ReadAhead::start(&tree, WalkOptions::default(), AheadOptions::default());
        for item in ahead.unwrap() {
            match item {
                ahead::Item::Problem(problem) => {
                    problems.insert(problem.path);
                }
                ahead::Item::Object(mut prepared) => {
                    let mut buffer = vec![0; 128 << 10];
                    if prepared.contents().unwrap().read(&mut buffer).is_err() {
                        unread.push(prepared.entry.path.clone());
                    }
                    given.insert(prepared.entry.path);
                }
                _ => {}
            }
        }
        let told = |path: &[u8]| {
            let parents = path.iter().enumerate().filter(|(_, byte)| **byte == b'/');
            problems.contains(path)
                || parents
                    .map(|(at, _)| &path[..at])
                    .any(|p| problems.contains(p))
        };
        let missing: Vec<_> = expected.difference(&given).collect();
        assert!(!missing.is_empty(), "{kind}: nothing was damaged");
        assert!(
            missing.iter().all(|path| told(path)),
            "{kind}: not all is told"
        );
        let good = |path: &&Vec<u8>| path.starts_with(b"top/good/");
        assert_eq!(given.iter().filter(good).count(), 500, "{kind}");
        // Contents of small files are in the blocks of btrfs that hold names: a neighbour may be unread, which is told.
        let unread_good = unread.iter().filter(good).count();
        let lost = unread.contains(&b"contents".to_vec());
        assert_eq!((unread_good, lost), (0, kind == "btrfs"), "{kind}");
        tree.close().unwrap();
    }
}

/// A btrfs that is not the root: the folder whose inode is lost is a problem, and the guest is saved.
#[test]
fn root_a_lost_folder_at_the_top_of_btrfs_is_no_lost_guest() {
    let Some(bench) = Bench::new() else { return };
    let system = bench.image("system.img", "ext4", &["-L", "system"]);
    {
        let attached = bench.attach(&system);
        for folder in ["etc", "data"] {
            fs::create_dir(attached.directory.join(folder)).unwrap();
        }
        let text = "LABEL=system / ext4\nLABEL=data /data btrfs\n";
        fs::write(attached.directory.join("etc/fstab"), text).unwrap();
    }
    let data = bench.image("data.img", "btrfs", &["-L", "data"]);
    {
        let attached = bench.attach(&data);
        for folder in ["good", "lost", "also-good"] {
            let folder = attached.directory.join(folder);
            fs::create_dir(&folder).unwrap();
            for n in 0..500 {
                fs::write(folder.join(format!("{n:060}")), "x").unwrap();
            }
        }
        let lost = attached.directory.join("lost");
        run!(
            "setfattr",
            "-n",
            "user.mark",
            "-v",
            "beside the inode",
            &lost
        );
    }
    let file = OpenOptions::new().write(true).open(&data).unwrap();
    for at in find_all(&data, b"beside the inode") {
        file.write_all_at(b"?", at).unwrap();
    }
    drop(file);

    let (first, second) = (Loop::new(&system), Loop::new(&data));
    let alone = GuestTree::assemble(vec![volume(&second, named("p2"))]);
    let error = alone.expect_err("a root could be in what is lost").report();
    assert!(error.contains("p2: listing it"), "{error}");
    let volumes = vec![volume(&first, named("p1")), volume(&second, named("p2"))];
    let tree = GuestTree::assemble(volumes).unwrap();
    let (mut files, mut problems) = (0, BTreeSet::new());
    for item in Walker::new(&tree, WalkOptions::default()) {
        match item {
            Item::Object(entry) => files += usize::from(entry.path.starts_with(b"data/")),
            Item::Problem(problem) => drop(problems.insert(problem.path)),
            _ => {}
        }
    }
    assert!(problems.contains(&b"data/lost"[..]), "{problems:?}");
    assert!((500..=1000).contains(&files), "{files}");
    let unsure =
        |note: &Note| note.level == NoteLevel::Warning && note.text.contains("p2: listing it");
    assert!(tree.notes().iter().any(unsure), "{:?}", tree.notes());
    tree.close().unwrap();
}

/// A disk that the guest mounts below a nested subvolume: the walk comes back from deep inside it, and still leaves out
/// what is beside it.
#[test]
fn root_what_is_left_out_of_btrfs_stays_out_around_a_joined_disk() {
    let Some(bench) = Bench::new() else { return };
    let system = bench.image("system.img", "btrfs", &["-L", "system"]);
    {
        let attached = bench.attach(&system);
        let top = &attached.directory;
        fs::create_dir(top.join("etc")).unwrap();
        let text = "LABEL=system / btrfs\nLABEL=data /srv/data ext4\n";
        fs::write(top.join("etc/fstab"), text).unwrap();
        run!("btrfs", "subvolume", "create", &top.join("srv"));
        fs::create_dir(top.join("srv/data")).unwrap();
        fs::write(top.join("srv/left-out"), "x").unwrap();
    }
    let data = bench.image("data.img", "ext4", &["-L", "data"]);
    {
        let attached = bench.attach(&data);
        fs::create_dir_all(attached.directory.join("a/b/c/d/e/f")).unwrap();
    }
    let (first, second) = (Loop::new(&system), Loop::new(&data));
    let volumes = vec![volume(&first, named("p1")), volume(&second, named("p2"))];
    let tree = GuestTree::assemble(volumes).unwrap();
    let options = WalkOptions {
        open_directories: 2,
        ..WalkOptions::default()
    };
    let all = paths(&tree, options);
    assert!(all.contains(&"srv/data/a/b/c/d/e/f/".to_owned()), "{all:?}");
    assert!(!all.contains(&"srv/left-out".to_owned()), "{all:?}");
    tree.close().unwrap();
}

// ---- trees ----

fn paths(tree: &GuestTree, options: WalkOptions) -> Vec<String> {
    Walker::new(tree, options)
        .filter_map(|item| match item {
            Item::Object(entry) => Some(guestsnap::error::escape(&entry.path)),
            Item::End(entry) => Some(guestsnap::error::escape(&entry.path) + "/"),
            Item::Problem(problem) => panic!("{}", problem.error.report()),
            _ => None,
        })
        .collect()
}

#[test]
fn root_absolute_links_stay_in_the_guest() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "ext4", &["-L", "system"]);
    {
        let attached = bench.attach(&image);
        let top = &attached.directory;
        fs::create_dir_all(top.join("real/etc")).unwrap();
        fs::create_dir_all(top.join("run/data")).unwrap();
        symlink("/real/etc", top.join("etc")).unwrap();
        symlink("/real/etc/true-fstab", top.join("real/etc/fstab")).unwrap();
        let text = "LABEL=system / ext4\nLABEL=other /data ext4\n";
        fs::write(top.join("real/etc/true-fstab"), text).unwrap();
        symlink("/run/data", top.join("data")).unwrap();
    }
    let data = bench.image("data.img", "ext4", &["-L", "other"]);
    let (first, second) = (Loop::new(&data), Loop::new(&image));
    let volumes = vec![volume(&first, named("p1")), volume(&second, named("p2"))];
    let tree = GuestTree::assemble(volumes).unwrap();
    let joins: Vec<(&[u8], &str)> = tree
        .joins()
        .iter()
        .map(|j| (j.path.as_slice(), j.volume.as_str()))
        .collect();
    assert_eq!(
        joins,
        [(&b""[..], "p2"), (b"run/data", "p1")],
        "{:?}",
        tree.notes()
    );
    let all = paths(&tree, WalkOptions::default());
    assert!(all.contains(&"run/data/lost+found/".to_owned()), "{all:?}");
    assert!(all.contains(&"data".to_owned()));
    tree.close().unwrap();
}

#[test]
fn root_filesystems_are_joined_and_the_rest_is_kept() {
    let Some(bench) = Bench::new() else { return };
    let images = [
        bench.image("root.img", "ext4", &["-L", "root"]),
        bench.image("var.img", "xfs", &["-L", "var"]),
        bench.image("log.img", "ext4", &["-L", "log"]),
        bench.image("extra.img", "ext4", &["-L", "extra"]),
    ];
    {
        let attached = bench.attach(&images[0]);
        let top = &attached.directory;
        fs::create_dir_all(top.join("etc")).unwrap();
        fs::create_dir_all(top.join("var/hidden-below-the-mount")).unwrap();
        fs::create_dir(top.join(".guestsnap")).unwrap();
        let text = "LABEL=root / ext4 defaults 0 1\n\
                    LABEL=log /var/log ext4\n\
                    LABEL=var /var xfs\n\
                    LABEL=gone /gone ext4\n\
                    LABEL=extra /no-such-folder ext4\n\
                    LABEL=root /again ext4\n";
        fs::write(top.join("etc/fstab"), text).unwrap();
    }
    {
        let attached = bench.attach(&images[1]);
        fs::create_dir_all(attached.directory.join("log")).unwrap();
        fs::write(attached.directory.join("in-var"), "x").unwrap();
    }
    {
        let attached = bench.attach(&images[2]);
        fs::write(attached.directory.join("in-log"), "x").unwrap();
    }
    let loops: Vec<Loop> = images.iter().map(|i| Loop::new(i)).collect();
    let names = ["log", "extra", "root", "var"];
    let order = [2, 3, 0, 1];
    let volumes = order
        .iter()
        .zip(names)
        .map(|(&n, name)| volume(&loops[n], named(name)))
        .collect();
    let tree = GuestTree::assemble(volumes).unwrap();
    assert_eq!(tree.private(), b".guestsnap-1");
    for options in [
        WalkOptions::default(),
        WalkOptions {
            open_directories: 2,
            batch_bytes: 1,
            names_bytes: 0,
        },
    ] {
        let mut all = paths(&tree, options);
        assert_eq!(all.pop().unwrap(), "/");
        all.sort();
        assert_eq!(
            all,
            [
                ".guestsnap-1/",
                ".guestsnap-1/volumes/",
                ".guestsnap-1/volumes/extra/",
                ".guestsnap-1/volumes/extra/lost+found/",
                ".guestsnap/",
                "etc/",
                "etc/fstab",
                "lost+found/",
                "var/",
                "var/in-var",
                "var/log/",
                "var/log/in-log",
                "var/log/lost+found/",
            ]
        );
    }
    let warned = |text: &str| {
        tree.notes()
            .iter()
            .any(|n| n.level == NoteLevel::Warning && n.text.contains(text))
    };
    let missing: Vec<String> = tree.missing().iter().map(ToString::to_string).collect();
    assert_eq!(
        missing,
        ["fstab: /gone (LABEL=gone) is not among the guest's opened filesystems"]
    );
    assert_eq!(tree.unlisted(), 1);
    assert!(warned("/no-such-folder"), "{:?}", tree.notes());
    assert!(warned("not saved twice"), "{:?}", tree.notes());
    let target = bench.path("target");
    assert_eq!(
        copy(&tree, WalkOptions::default(), &target),
        Vec::<String>::new()
    );
    assert!(target.join("guest/var/log/in-log").exists());
    tree.close().unwrap();
    for device in &loops {
        assert_gone(device);
    }
}

#[test]
fn root_a_guest_without_a_root_is_kept_volume_by_volume() {
    let Some(bench) = Bench::new() else { return };
    let images = [
        bench.image("a.img", "ext4", &[]),
        bench.image("b.img", "ext4", &[]),
    ];
    let loops: Vec<Loop> = images.iter().map(|i| Loop::new(i)).collect();
    let volumes = loops
        .iter()
        .map(|l| volume(l, named("same/name")))
        .collect();
    let tree = GuestTree::assemble(volumes).unwrap();
    assert_eq!(
        paths(&tree, WalkOptions::default()),
        [
            ".guestsnap/volumes/same-name/lost+found/",
            ".guestsnap/volumes/same-name/",
            ".guestsnap/volumes/same-name-2/lost+found/",
            ".guestsnap/volumes/same-name-2/",
            ".guestsnap/volumes/",
            ".guestsnap/",
            "/",
        ]
    );
    assert!(tree.notes().iter().any(|n| n.level == NoteLevel::Warning));
    let target = bench.path("target");
    assert_eq!(
        copy(&tree, WalkOptions::default(), &target),
        Vec::<String>::new()
    );
    tree.close().unwrap();
}

#[test]
fn root_btrfs_subvolumes_are_joined_by_fstab() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "btrfs", &["-L", "sys"]);
    {
        let attached = bench.attach(&image);
        let top = &attached.directory;
        for name in [
            "@",
            "@home",
            "@old-root",
            "@/nested",
            "@by-number",
            "@below",
        ] {
            run!("btrfs", "subvolume", "create", &top.join(name));
        }
        let number = run!(
            "btrfs",
            "inspect-internal",
            "rootid",
            &top.join("@by-number")
        );
        let fstab = format!(
            "LABEL=sys / btrfs subvol=@ 0 0\n\
             LABEL=sys /home btrfs subvol=/@home 0 0\n\
             LABEL=sys /srv btrfs subvolid={} 0 0\n\
             LABEL=sys /nested/below/joined btrfs subvol=@below 0 0\n",
            number.trim()
        );
        for name in ["@", "@old-root"] {
            fs::create_dir(top.join(name).join("etc")).unwrap();
            fs::write(top.join(name).join("etc/fstab"), &fstab).unwrap();
        }
        fs::create_dir(top.join("@/home")).unwrap();
        fs::create_dir(top.join("@/srv")).unwrap();
        fs::create_dir_all(top.join("@/nested/below/joined")).unwrap();
        fs::write(top.join("@below/deep"), "x").unwrap();
        fs::write(top.join("@home/user"), "x").unwrap();
        fs::write(top.join("@by-number/served"), "x").unwrap();
        fs::write(top.join("@/nested/inside"), "x").unwrap();
    }
    let device = Loop::new(&image);
    let tree = GuestTree::assemble(vec![volume(&device, named("p1"))]).unwrap();
    let mut all = paths(&tree, WalkOptions::default());
    all.sort();
    assert_eq!(
        all,
        [
            "/",
            "etc/",
            "etc/fstab",
            "home/",
            "home/user",
            "nested/",
            // Joined by fstab, though what is around it is left out.
            "nested/below/",
            "nested/below/joined/",
            "nested/below/joined/deep",
            "srv/",
            "srv/served",
        ],
        "{:?}",
        tree.notes()
    );
    let notes: Vec<String> = Walker::new(&tree, WalkOptions::default())
        .filter_map(|item| match item {
            Item::Note(note) => Some(note.text),
            _ => None,
        })
        .collect();
    assert_eq!(notes.len(), 1);
    assert!(notes[0].contains("/nested"), "{notes:?}");
    tree.close().unwrap();
    assert_gone(&device);

    // The same without an fstab: all subvolumes are walked.
    {
        let attached = bench.attach(&image);
        for name in ["@", "@old-root"] {
            fs::remove_file(attached.directory.join(name).join("etc/fstab")).unwrap();
        }
    }
    let tree = GuestTree::assemble(vec![volume(&device, named("p1"))]).unwrap();
    let all = paths(&tree, WalkOptions::default());
    assert!(all.contains(&"@/nested/inside".to_owned()), "{all:?}");
    assert!(all.contains(&"@by-number/served".to_owned()), "{all:?}");
    tree.close().unwrap();
}

/// A folder is no loss, a subvolume inside of one is; the list has an end.
#[test]
fn root_subvolumes_without_a_place_are_named() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "btrfs", &["-L", "sys"]);
    let create = |path: &Path| drop(run!("btrfs", "subvolume", "create", path));
    let change = |work: &dyn Fn(&Path)| {
        let attached = Attached::new(&image, bench.path("mnt"), "subvolid=5");
        work(&attached.directory);
    };
    let with_file = |path: &Path| {
        create(path);
        fs::write(path.join("file"), "x").unwrap();
    };
    // What is told of the tree, and by the walk; everything must be told.
    let told_but = |image: &Path, leave_out: &[u8], silent: &[&[u8]]| {
        let device = Loop::new(image);
        let tree = single(&device);
        let mut notes = tree.notes().to_vec();
        notes.extend(tree.placeless(|path| silent.contains(&path)));
        let mut walker = Walker::new(&tree, WalkOptions::default());
        while let Some(item) = walker.next() {
            match item {
                Item::Begin(entry) if entry.path == leave_out => walker.leave_out(),
                Item::Note(note) => notes.push(note),
                Item::Problem(problem) => panic!("{}", problem.error.report()),
                _ => {}
            }
        }
        drop(walker);
        tree.close().unwrap();
        assert_gone(&device);
        notes.retain(|note| note.level == NoteLevel::Warning);
        notes.into_iter().map(|note| note.text).collect::<Vec<_>>()
    };
    let told = |image: &Path, leave_out: &[u8]| told_but(image, leave_out, &[]);
    let of_tree = |names: &str| {
        format!(
            "p1: subvolumes without a place in the guest's tree are left out: {names}. A line with subvol= and \
             noauto in its fstab gives a place to one"
        )
    };
    let of_walk = |path: &str| {
        format!("p1: subvolume /{path} is not in the guest's fstab: its content is left out")
    };
    change(&|top| {
        for name in ["@", "@home", "@empty", "@folders"] {
            create(&top.join(name));
        }
        for folder in ["@/etc", "@/home", "@folders/a/b"] {
            fs::create_dir_all(top.join(folder)).unwrap();
        }
        let text = "LABEL=sys / btrfs subvol=@\nLABEL=sys /home btrfs subvol=@home,nofail\n";
        fs::write(top.join("@/etc/fstab"), text).unwrap();
        fs::write(top.join("@home/file"), "x").unwrap();
    });
    assert_eq!(told(&image, b"-"), [""; 0]);
    change(&|top| {
        with_file(&top.join("@data"));
        with_file(&top.join("@folders/a/b/inner"));
        create(&top.join("@/machines"));
        with_file(&top.join("@/docker"));
    });
    let tree = of_tree("@data, @folders/a/b/inner");
    assert_eq!(told(&image, b"-"), [tree.clone(), of_walk("docker")]);
    assert_eq!(told(&image, b"docker"), [tree]);
    change(&|top| {
        fs::write(top.join("file"), "x").unwrap();
        for number in 0..20 {
            with_file(&top.join(format!("@s{number:02}")));
        }
    });
    let names =
        "the top itself, @data, @folders/a/b/inner, @s00, @s01, @s02, @s03, @s04 and 15 more";
    assert_eq!(told(&image, b"docker"), [of_tree(names)]);
    // Nobody looks at names without end.
    change(&|top| {
        for number in 0..1100 {
            fs::create_dir(top.join(format!("@folders/a/{number}"))).unwrap();
        }
        create(&top.join("@folders/a/unseen"));
    });
    let names = "the top itself, @data, @s00, @s01, @s02, @s03, @s04, @s05 and 14 more, and maybe some that were \
                 not looked at";
    assert_eq!(told(&image, b"docker"), [of_tree(names)]);
    // What is left out on purpose is not told, and nothing in it is looked at; of the top itself nothing else is meant.
    let left_out: Vec<String> = (0..20).map(|number| format!("@s{number:02}")).collect();
    let mut silent: Vec<&[u8]> = left_out.iter().map(|name| name.as_bytes()).collect();
    silent.extend([&b"@folders/a"[..], b""]);
    assert_eq!(told_but(&image, b"docker", &silent), [of_tree("@data")]);
    silent.push(b"@data");
    assert_eq!(told_but(&image, b"docker", &silent), [""; 0]);

    // As openSUSE has it: the root is a snapshot, and `@` holds nothing but the others.
    let image = bench.image("suse.img", "btrfs", &["-L", "sys"]);
    {
        let attached = bench.attach(&image);
        let top = &attached.directory;
        for name in ["@", "@/.snapshots", "@/usr/local"] {
            fs::create_dir_all(top.join(name).parent().unwrap()).unwrap();
            create(&top.join(name));
        }
        for number in ["1", "2"] {
            fs::create_dir(top.join("@/.snapshots").join(number)).unwrap();
            with_file(&top.join("@/.snapshots").join(number).join("snapshot"));
        }
        let root = top.join("@/.snapshots/1/snapshot");
        for folder in ["usr/local", "etc", ".snapshots"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        let text = "LABEL=sys / btrfs\nLABEL=sys /usr/local btrfs subvol=/@/usr/local\n\
                    LABEL=sys /.snapshots btrfs subvol=/@/.snapshots\n";
        fs::write(root.join("etc/fstab"), text).unwrap();
        run!("btrfs", "subvolume", "set-default", &root);
    }
    assert_eq!(told(&image, b"-"), [of_walk(".snapshots/2/snapshot")]);
}

/// `nofail` is for what may be away. A subvolume that is there and cannot be read is missed.
#[test]
fn root_a_damaged_subvolume_is_missed_though_it_may_be_away() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "btrfs", &["-L", "sys"]);
    {
        let attached = bench.attach(&image);
        let top = &attached.directory;
        for name in ["@", "@data"] {
            run!("btrfs", "subvolume", "create", &top.join(name));
        }
        for folder in ["@/etc", "@/data"] {
            fs::create_dir(top.join(folder)).unwrap();
        }
        let text = "LABEL=sys / btrfs subvol=@\nLABEL=sys /data btrfs subvol=@data,nofail\n";
        fs::write(top.join("@/etc/fstab"), text).unwrap();
        set_xattr(&top.join("@data"), "user.mark", b"beside the inode");
    }
    let file = OpenOptions::new().write(true).open(&image).unwrap();
    for at in find_all(&image, b"beside the inode") {
        file.write_all_at(b"?", at).unwrap();
    }
    drop(file);
    let device = Loop::new(&image);
    let tree = single(&device);
    let [missing] = tree.missing() else {
        panic!("{:?}, {:?}", tree.missing(), tree.notes())
    };
    assert!(missing.line.optional);
    assert_eq!(missing.place.as_deref(), Some(&b"data"[..]));
    let text = missing.to_string();
    assert!(
        text.starts_with("fstab: /data (LABEL=sys): subvolume @data: "),
        "{text}"
    );
    // The rest of the guest is there.
    assert!(paths(&tree, WalkOptions::default()).contains(&"etc/fstab".to_owned()));
    tree.close().unwrap();
    assert_gone(&device);
}

/// A system that moved into a subvolume left its files at the top, and snapshots hold the fstab of what they were made of.
#[test]
fn root_an_old_root_at_the_top_of_btrfs_is_not_the_root() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "btrfs", &["-L", "sys"]);
    // What the fstab in `@` says of the root, whether the default is `@`, and the root.
    for (options, set_default, root) in [
        ("subvol=@", false, "p1, subvolume @ (its own fstab says so)"),
        (
            "subvolid=N",
            false,
            "p1, subvolume @ (its own fstab says so)",
        ),
        ("subvol=@", true, "p1 (its own fstab says so)"),
        // Nothing names it: the default one is right.
        ("defaults", false, "p1 (its own fstab says so)"),
        ("defaults", true, "p1 (its own fstab says so)"),
    ] {
        {
            let attached = Attached::new(&image, bench.path("mnt"), "subvolid=5");
            let top = &attached.directory;
            if !top.join("@").exists() {
                run!("btrfs", "subvolume", "create", &top.join("@"));
                fs::create_dir(top.join("etc")).unwrap();
                fs::create_dir(top.join("@/etc")).unwrap();
                fs::write(top.join("etc/fstab"), "LABEL=sys / btrfs defaults").unwrap();
                fs::write(top.join("@/new"), "x").unwrap();
            }
            let number = run!("btrfs", "inspect-internal", "rootid", &top.join("@"));
            let options = options.replace('N', number.trim());
            let text = format!("LABEL=sys / btrfs {options}\n");
            fs::write(top.join("@/etc/fstab"), text).unwrap();
            for snapshot in ["@-old", "000"] {
                if top.join(snapshot).exists() {
                    run!("btrfs", "subvolume", "delete", &top.join(snapshot));
                }
                run!(
                    "btrfs",
                    "subvolume",
                    "snapshot",
                    &top.join("@"),
                    &top.join(snapshot)
                );
                fs::remove_file(top.join(snapshot).join("new")).unwrap();
            }
            let default = if set_default { number.trim() } else { "5" };
            run!("btrfs", "subvolume", "set-default", default, top);
        }
        let device = Loop::new(&image);
        let tree = single(&device);
        let notes: Vec<&str> = tree.notes().iter().map(|n| n.text.as_str()).collect();
        let what = format!("{options}, {set_default}: {notes:?}");
        assert!(notes.contains(&format!("root: {root}").as_str()), "{what}");
        assert!(!notes.iter().any(|n| n.contains("several")), "{what}");
        let new = set_default || options != "defaults";
        let all = paths(&tree, WalkOptions::default());
        assert_eq!(all.contains(&"new".to_owned()), new, "{what}");
        tree.close().unwrap();
        assert_gone(&device);
    }
}

/// Two filesystems of one place are told apart, also when they are subvolumes of one btrfs.
#[test]
fn root_what_is_shown_at_a_place_has_an_identity() {
    if !has_driver("btrfs") {
        return;
    }
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "btrfs", &["-L", "sys"]);
    let change = |change: &dyn Fn(&Path)| {
        let attached = Attached::new(&image, bench.path("mnt"), "subvolid=5");
        change(&attached.directory);
    };
    let identity = || {
        let device = Loop::new(&image);
        let tree = single(&device);
        let identity = tree.joins()[0].identity();
        tree.close().unwrap();
        assert_gone(&device);
        identity
    };
    change(&|top| {
        run!("btrfs", "subvolume", "create", &top.join("@"));
        fs::create_dir(top.join("@/etc")).unwrap();
        let text = "LABEL=sys / btrfs subvol=@\n";
        fs::write(top.join("@/etc/fstab"), text).unwrap();
    });
    let first = identity();
    assert_eq!(identity(), first);
    // As a rollback does.
    change(&|top| {
        fs::rename(top.join("@"), top.join("@old")).unwrap();
        let (old, new) = (top.join("@old"), top.join("@"));
        run!("btrfs", "subvolume", "snapshot", &old, &new);
    });
    assert_ne!(identity(), first);
}

/// Snapshots hold the fstab of what they were made of: that one is looked at, wherever it is, and if it is damaged.
#[test]
fn root_a_snapshot_is_not_the_root_that_its_fstab_names() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "btrfs", &["-L", "sys"]);
    let change = |work: &dyn Fn(&Path)| {
        let attached = Attached::new(&image, bench.path("mnt"), "subvolid=5");
        work(&attached.directory);
    };
    let create = |path: &Path| drop(run!("btrfs", "subvolume", "create", path));
    change(&|top| {
        create(&top.join("000"));
        fs::create_dir(top.join("000/etc")).unwrap();
        fs::write(top.join("000/etc/os-release"), "").unwrap();
        fs::write(top.join("000/etc/fstab"), "LABEL=sys / btrfs subvol=@").unwrap();
        let copy = top.join("001");
        run!("btrfs", "subvolume", "snapshot", &top.join("000"), &copy);
        // Their order is that in which they were made.
        for number in 0..260 {
            fs::create_dir(top.join(format!("folder{number}"))).unwrap();
        }
        create(&top.join("@"));
    });
    let device = Loop::new(&image);
    let assemble = || GuestTree::assemble(vec![volume(&device, named("p1"))]);
    let error = assemble().expect_err("an empty root").report();
    assert!(
        error.starts_with("GS-503") && error.contains("p1, subvolume @: "),
        "{error}"
    );
    assert_gone(&device);
    for (fstab, why) in [
        (true, "its own fstab says so"),
        // It cannot be read.
        (false, "it has an os-release file"),
    ] {
        change(&|top| {
            run!("btrfs", "subvolume", "delete", &top.join("@"));
            run!(
                "btrfs",
                "subvolume",
                "snapshot",
                &top.join("000"),
                &top.join("@")
            );
            if !fstab {
                fs::remove_file(top.join("@/etc/fstab")).unwrap();
                symlink("fstab", top.join("@/etc/fstab")).unwrap();
            }
        });
        let tree = assemble().unwrap();
        let notes: Vec<&str> = tree.notes().iter().map(|n| n.text.as_str()).collect();
        let root = format!("root: p1, subvolume @ ({why})");
        assert!(notes.contains(&root.as_str()), "{notes:?}");
        assert!(!notes.iter().any(|n| n.contains("several")), "{notes:?}");
        assert_eq!(tree.unread_fstab().is_none(), fstab);
        tree.close().unwrap();
        assert_gone(&device);
    }
}

/// A root whose fstab cannot be read is saved, with an error: what it joins is in other places. Beside one that is
/// sure it does not matter.
#[test]
fn root_an_fstab_that_cannot_be_read_is_told() {
    let Some(bench) = Bench::new() else { return };
    let image = |name: &str, label: &str, fstab: &str| {
        let image = bench.image(name, "ext4", &["-L", label]);
        let attached = bench.attach(&image);
        match fstab {
            "" => fs::create_dir_all(attached.directory.join("etc/fstab")).unwrap(),
            text => {
                fs::create_dir(attached.directory.join("etc")).unwrap();
                fs::write(attached.directory.join("etc/fstab"), text).unwrap();
            }
        }
        drop(attached);
        Loop::new(&image)
    };
    let lost = image("lost.img", "lost", "");
    let sure = image("sure.img", "sure", "LABEL=sure / ext4");
    // It was copied there.
    let other = image("other.img", "other", "LABEL=else / ext4");
    for (beside, told) in [(None, true), (Some(&other), true), (Some(&sure), false)] {
        let mut volumes = vec![volume(&lost, named("p1"))];
        volumes.extend(beside.map(|device| volume(device, named("p2"))));
        let tree = GuestTree::assemble(volumes).unwrap();
        let error = tree.unread_fstab().map(|e| e.report()).unwrap_or_default();
        assert_eq!(error.contains("its /etc/fstab: p1: "), told, "{error}");
        let warned =
            |n: &Note| n.level == NoteLevel::Warning && n.text.contains("its /etc/fstab: p1: ");
        assert_eq!(tree.notes().iter().any(warned), !told, "{:?}", tree.notes());
        tree.close().unwrap();
    }
}

/// However many subvolumes look like the root, few descriptors are open at the same time.
#[test]
fn root_many_roots_need_few_descriptors() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "btrfs", &["-L", "sys"]);
    {
        let attached = bench.attach(&image);
        for number in 100..200 {
            let path = attached.directory.join(number.to_string());
            run!("btrfs", "subvolume", "create", &path);
            fs::create_dir(path.join("etc")).unwrap();
            fs::write(path.join("etc/fstab"), "LABEL=sys / btrfs").unwrap();
        }
    }
    let device = Loop::new(&image);
    let volumes = vec![volume(&device, named("p1"))];
    let before = getrlimit(Resource::Nofile);
    let few = open_descriptors().len() as u64 + 30;
    let limited = Rlimit {
        current: Some(few),
        ..before
    };
    setrlimit(Resource::Nofile, limited).unwrap();
    let tree = GuestTree::assemble(volumes);
    setrlimit(Resource::Nofile, before).unwrap();
    let tree = tree.unwrap();
    let notes: Vec<&str> = tree.notes().iter().map(|n| n.text.as_str()).collect();
    let several = |note: &&str| {
        note.contains("(p1, subvolume 100; ") && note.contains("; p1, subvolume 107 and 92 more)")
    };
    assert!(notes.iter().any(several), "{notes:?}");
    tree.close().unwrap();
    assert_gone(&device);
}

#[test]
fn root_skipped_folders_are_not_walked() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "ext4", &[]);
    {
        let attached = bench.attach(&image);
        fs::create_dir_all(attached.directory.join("skip/inner")).unwrap();
        fs::create_dir_all(attached.directory.join("keep/inner")).unwrap();
    }
    let device = Loop::new(&image);
    let tree = single(&device);
    let mut walker = Walker::new(&tree, WalkOptions::default());
    let mut ends = Vec::new();
    while let Some(item) = walker.next() {
        match item {
            Item::Begin(entry) if entry.name() == b"skip" => walker.leave_out(),
            Item::End(entry) => ends.push(String::from_utf8(entry.path).unwrap()),
            _ => {}
        }
    }
    ends.sort();
    assert_eq!(ends, ["", "keep", "keep/inner", "lost+found"]);
    assert!(tree.close().is_err(), "the walker is still there");
    drop(walker);
}

#[test]
fn root_vfat_is_mounted() {
    if !has_driver("vfat") {
        return;
    }
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "vfat", &["-F", "32"]);
    {
        let attached = Attached::new(&image, bench.path("mnt"), "utf8");
        fs::create_dir(attached.directory.join("EFI")).unwrap();
        fs::write(attached.directory.join("EFI/größe"), "x").unwrap();
    }
    let device = Loop::new(&image);
    let tree = single(&device);
    assert_eq!(
        paths(&tree, WalkOptions::default()),
        ["EFI/größe", "EFI/", "/"]
    );
    let target = bench.path("target");
    assert_eq!(
        copy(&tree, WalkOptions::default(), &target),
        Vec::<String>::new()
    );
    tree.close().unwrap();
}

// ---- restoring into a target that somebody prepared ----

fn meta(mode: u32) -> Meta {
    Meta {
        mode,
        mtime: Time {
            seconds: 1_000_000_000,
            nanoseconds: 0,
        },
        ..Meta::default()
    }
}

fn request<'a>(path: &'a Path, what: What<'a>, mode: u32) -> Request<'a> {
    Request {
        path: path.as_os_str().as_bytes(),
        what,
        meta: meta(mode),
        replace: Replace::Always,
    }
}

/// Restores one small file.
fn put(restorer: &mut Restorer, path: &Path, content: &[u8]) -> guestsnap::Result<()> {
    let mut wanted = request(path, What::Object, 0o100_644);
    wanted.meta.size = content.len() as u64;
    restorer.create(&wanted)?;
    restorer.write(content)?;
    restorer.finish_data()?;
    let warnings = restorer.finish()?;
    assert!(warnings.is_empty(), "{warnings:?}");
    Ok(())
}

#[test]
fn root_restore_never_follows_planted_links() {
    let Some(bench) = Bench::new() else { return };
    let outside = bench.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("victim"), "untouched").unwrap();
    // The restore folder itself may be reached over a link.
    fs::create_dir(bench.path("real")).unwrap();
    symlink("real", bench.path("where")).unwrap();
    let top = bench.path("where");
    let mut restorer = Restorer::new(Some(top.as_os_str().as_bytes())).unwrap();

    symlink(&outside, top.join("dir")).unwrap();
    let error = put(&mut restorer, &top.join("dir/victim"), b"hit").unwrap_err();
    assert_eq!(error.code(), Code::RestoreOutside, "{}", error.report());
    let error = put(&mut restorer, &top.join("dir/new/deeper"), b"hit").unwrap_err();
    assert_eq!(error.code(), Code::RestoreOutside, "{}", error.report());
    let error = put(&mut restorer, &top.join("../outside/victim"), b"hit").unwrap_err();
    assert_eq!(error.code(), Code::RestoreOutside, "{}", error.report());

    // In place of the object itself: replaced, not followed.
    symlink(outside.join("victim"), top.join("file")).unwrap();
    put(&mut restorer, &top.join("file"), b"mine").unwrap();
    assert!(top.join("file").symlink_metadata().unwrap().is_file());
    symlink(&outside, top.join("folder")).unwrap();
    let path = top.join("folder");
    restorer
        .create(&request(&path, What::Object, 0o040_750))
        .unwrap();
    assert!(restorer.finish().unwrap().is_empty());
    assert!(top.join("folder").symlink_metadata().unwrap().is_dir());

    // A link as the source of another name is itself linked.
    symlink(outside.join("victim"), top.join("first")).unwrap();
    let first = top.join("first");
    let path = top.join("second");
    let what = What::HardLink(first.as_os_str().as_bytes());
    restorer.create(&request(&path, what, 0o100_644)).unwrap();
    assert!(top.join("second").symlink_metadata().unwrap().is_symlink());

    assert_eq!(
        fs::read_to_string(outside.join("victim")).unwrap(),
        "untouched"
    );
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
}

#[test]
fn root_restore_replaces_as_asked() {
    let Some(bench) = Bench::new() else { return };
    let top = bench.path("where");
    let mut restorer = Restorer::new(Some(top.as_os_str().as_bytes())).unwrap();
    let path = top.join("a/b/file");
    put(&mut restorer, &path, b"first").unwrap();
    // Folders made on the way are closed to others until their own attributes come.
    let mode = fs::metadata(top.join("a")).unwrap();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode.permissions()),
        0o040_700
    );

    let mut wanted = request(&path, What::Object, 0o100_644);
    for (replace, expected) in [
        (Replace::Never, "first"),
        (Replace::IfNewer, "first"),
        (Replace::IfOlder, "first"),
    ] {
        wanted.replace = replace;
        assert!(matches!(
            restorer.create(&wanted).unwrap(),
            Created::Skipped(_)
        ));
        assert_eq!(fs::read_to_string(&path).unwrap(), expected);
    }
    // But a folder that this restore made itself gets its attributes.
    let folder = top.join("a/b");
    let mut wanted = request(&folder, What::Object, 0o040_755);
    wanted.replace = Replace::Never;
    assert_eq!(restorer.create(&wanted).unwrap(), Created::Created);
    assert!(restorer.finish().unwrap().is_empty());
    // Once it is finished, it is an existing one.
    assert!(matches!(
        restorer.create(&wanted).unwrap(),
        Created::Skipped(_)
    ));
    // A later file in it leaves its times alone.
    put(&mut restorer, &top.join("a/b/later"), b"x").unwrap();
    let modified = fs::metadata(&folder).unwrap();
    assert_eq!(
        std::os::unix::fs::MetadataExt::mtime(&modified),
        1_000_000_000
    );

    // A file in place of a folder is not forced.
    let error = put(&mut restorer, &folder, b"x").unwrap_err();
    assert!(error.report().contains("in the way"), "{}", error.report());
    // An immutable file is replaced.
    add_flags(&path, IFlags::IMMUTABLE);
    put(&mut restorer, &path, b"second").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "second");
}

/// Takes a restore's messages.
#[derive(Default)]
struct Told(Mutex<Vec<String>>);

impl Reporter for Told {
    fn message(&self, importance: Importance, message: &str) {
        let line = format!("{importance:?} {message}");
        self.0.lock().unwrap().push(line);
    }

    fn cancelled(&self) -> bool {
        false
    }
}

fn is_immutable(path: &Path) -> bool {
    let file = File::open(path).unwrap();
    let flags = rustix::fs::ioctl_getflags(&file).unwrap();
    flags.contains(IFlags::IMMUTABLE)
}

/// An immutable folder takes the files that come after it, and is immutable at the end, also when
/// the restore is cancelled. What that end refuses is told.
#[test]
fn root_restore_fences_folders_at_its_end() {
    let Some(bench) = Bench::new() else { return };
    let (top, folder, file) = (
        bench.path("where"),
        bench.path("folder"),
        bench.path("file"),
    );
    fs::create_dir(&folder).unwrap();
    fs::write(&file, "").unwrap();
    set_times(&folder, 1_000_000_000, 0);
    let saved = |path: &Path| nix::sys::stat::stat(path).unwrap();
    let c_string = |path: &Path| CString::new(path.as_os_str().as_bytes()).unwrap();
    let record = guestsnap::stream::Record {
        flags: Some((IFlags::IMMUTABLE | IFlags::NODUMP).bits()),
        ..Default::default()
    };
    let told = Arc::new(Told::default());
    let cancel = CancelFlag::default();
    let mut restore = Restore::new(told.clone(), cancel.clone(), RestoreOptions::default());
    let mut restored = |name: &str, file_type, from: &Path| {
        let created = restore.create(&RestoreFile {
            file_type,
            name: &c_string(&top.join(name)),
            link: c"",
            stat: saved(from),
            where_: Some(&c_string(&top)),
            replace: b'a',
        });
        created.unwrap();
        if file_type == Saved::Directory {
            record.encode().iter().for_each(|r| restore.record(r));
        }
        restore.end_file();
    };
    for name in ["one", "gone"] {
        restored(name, Saved::Directory, &folder);
        restored(&format!("{name}/file"), Saved::Regular, &file);
    }
    assert!(!is_immutable(&top.join("one")));
    fs::rename(top.join("gone"), top.join("away")).unwrap();
    // Somebody else's folder of the same name is not touched.
    fs::create_dir(top.join("gone")).unwrap();
    cancel.set();
    drop(restore);

    assert!(is_immutable(&top.join("one")));
    assert!(!is_immutable(&top.join("gone")));
    assert_eq!(
        std::os::unix::fs::MetadataExt::mtime(&fs::metadata(top.join("one")).unwrap()),
        1_000_000_000
    );
    assert!(top.join("one/file").exists());
    let told = told.0.lock().unwrap().clone();
    let [error, end] = &told[..] else {
        panic!("{told:?}");
    };
    assert!(
        error.starts_with("Error GS-604") && error.contains("where/gone: "),
        "{error}"
    );
    assert!(end.ends_with("1 errors"), "{end}");

    // An immutable file that cannot be replaced stays immutable; so does another name of one that is.
    let mut restorer = Restorer::new(Some(top.as_os_str().as_bytes())).unwrap();
    for name in ["away/file", "one/file"] {
        add_flags(&top.join(name), IFlags::IMMUTABLE);
    }
    let error = put(&mut restorer, &top.join("one/file"), b"new").unwrap_err();
    assert!(error.report().contains("removing"), "{}", error.report());
    assert!(is_immutable(&top.join("one/file")));
    clear_fences(&top.join("away"));
    fs::hard_link(top.join("away/file"), top.join("other-name")).unwrap();
    add_flags(&top.join("away/file"), IFlags::IMMUTABLE);
    put(&mut restorer, &top.join("away/file"), b"new").unwrap();
    assert!(is_immutable(&top.join("other-name")));
    assert_eq!(fs::read(top.join("away/file")).unwrap(), b"new");

    // A folder that was fenced before stays so, though the saved one is not; what that forbids is told.
    let record = guestsnap::stream::Record {
        flags: Some(0),
        ..Default::default()
    };
    for (name, fence) in [("i", IFlags::IMMUTABLE), ("a", IFlags::APPEND)] {
        let path = top.join(name);
        fs::create_dir(&path).unwrap();
        add_flags(&path, fence);
        restorer
            .create(&request(&path, What::Object, 0o040_755))
            .unwrap();
        for bytes in record.encode() {
            restorer.apply_record(&bytes).unwrap();
        }
        let told: Vec<String> = restorer
            .finish()
            .unwrap()
            .iter()
            .map(|e| e.report())
            .collect();
        for step in ["owner", "mode", "times"] {
            assert!(told.iter().any(|t| t.contains(step)), "{name}: {told:?}");
        }
    }
    assert!(restorer.end(|e| panic!("{}", e.report())).is_empty());
    for (name, fence) in [("i", IFlags::IMMUTABLE), ("a", IFlags::APPEND)] {
        let file = File::open(top.join(name)).unwrap();
        assert!(rustix::fs::ioctl_getflags(&file).unwrap().contains(fence));
    }
    clear_fences(&top);
}

#[test]
fn root_restore_ignores_acls_of_the_target() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("target.img", "ext4", &[]);
    let attached = bench.attach(&image);
    let top = &attached.directory;
    set_xattr(top, "system.posix_acl_default", POSIX_ACL);
    let mut restorer = Restorer::new(Some(top.as_os_str().as_bytes())).unwrap();
    put(&mut restorer, &top.join("sub/file"), b"x").unwrap();
    let path = top.join("sub");
    restorer
        .create(&request(&path, What::Object, 0o040_755))
        .unwrap();
    assert!(restorer.finish().unwrap().is_empty());
    for (name, mode) in [("fifo", 0o010_644), ("device", 0o020_644)] {
        let path = top.join(name);
        let mut request = request(&path, What::Object, mode);
        request.meta.rdev = rustix::fs::makedev(1, 3);
        restorer.create(&request).unwrap();
        assert!(restorer.finish().unwrap().is_empty());
    }
    for name in ["sub", "sub/file", "fifo", "device"] {
        let found = all_xattrs(top.join(name).as_os_str().as_bytes());
        assert!(found.is_empty(), "{name}: {found:?}");
    }
    let mode = fs::metadata(top.join("sub/file")).unwrap();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode.permissions()),
        0o100_644
    );
}

#[test]
fn root_restore_seeks_over_holes() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("target.img", "ext4", &[]);
    let attached = bench.attach(&image);
    let top = &attached.directory;
    let mut restorer = Restorer::new(Some(top.as_os_str().as_bytes())).unwrap();
    let path = top.join("sparse");
    let mut wanted = request(&path, What::Object, 0o100_600);
    wanted.meta.size = (100 << 20) + 3;
    restorer.create(&wanted).unwrap();
    // Unaligned writes around zeros, then a jump as Bacula's sparse streams make it.
    let mut data = vec![0; 1 << 20];
    data[5000] = 1;
    data[900_001] = 2;
    restorer.write(&data[..3]).unwrap();
    restorer.write(&data[3..700_000]).unwrap();
    restorer.write(&data[700_000..]).unwrap();
    restorer.seek(50 << 20).unwrap();
    restorer.write(b"middle").unwrap();
    restorer.seek((100 << 20) + 2).unwrap();
    restorer.write(&[0]).unwrap();
    restorer.finish_data().unwrap();
    assert!(restorer.finish().unwrap().is_empty());
    let file = File::open(&path).unwrap();
    let mut found = vec![0xff; 1 << 20];
    file.read_exact_at(&mut found, 0).unwrap();
    assert!(found == data);
    let mut middle = [0; 8];
    file.read_exact_at(&mut middle, 50 << 20).unwrap();
    assert_eq!(&middle, b"middle\0\0");
    let stat = file.metadata().unwrap();
    assert_eq!(stat.len(), (100 << 20) + 3);
    assert!(std::os::unix::fs::MetadataExt::blocks(&stat) <= 64);
}

#[test]
fn root_restore_warns_of_what_the_target_cannot_keep() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("target.img", "ext4", &["-I", "128"]);
    let attached = bench.attach(&image);
    let top = &attached.directory;
    let mut restorer = Restorer::new(Some(top.as_os_str().as_bytes())).unwrap();
    let path = top.join("file");
    let mut wanted = request(&path, What::Object, 0o100_600);
    wanted.meta.size = 4;
    restorer.create(&wanted).unwrap();
    restorer.write(b"kept").unwrap();
    restorer.finish_data().unwrap();
    let record = guestsnap::stream::Record {
        flags: Some(0x0080_0000),
        xattrs: vec![
            (b"user.too-large".to_vec(), vec![1; 30_000]),
            (b"unknown.space".to_vec(), vec![1]),
            (b"user.fits".to_vec(), vec![1]),
        ],
        ..Default::default()
    };
    for bytes in record.encode() {
        restorer.apply_record(&bytes).unwrap();
    }
    assert!(restorer.apply_record(b"noise").is_err());
    let warnings: Vec<String> = restorer
        .finish()
        .unwrap()
        .iter()
        .map(|e| e.report())
        .collect();
    assert_eq!(warnings.len(), 3, "{warnings:?}");
    assert!(warnings[0].contains("user.too-large"), "{warnings:?}");
    assert!(warnings[1].contains("unknown.space"), "{warnings:?}");
    assert!(warnings[2].contains("inode flag"), "{warnings:?}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "kept");
    let found = all_xattrs(path.as_os_str().as_bytes());
    assert_eq!(found.len(), 1);
}

/// btrfs takes NOCOW for a file with data, and says so, but does not keep it.
#[test]
fn root_restore_warns_of_flags_that_btrfs_ignores() {
    if !has_driver("btrfs") {
        return;
    }
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("target.img", "btrfs", &[]);
    let attached = bench.attach(&image);
    let top = &attached.directory;
    let mut restorer = Restorer::new(Some(top.as_os_str().as_bytes())).unwrap();
    let record = guestsnap::stream::Record {
        flags: Some((IFlags::NOCOW | IFlags::NODUMP).bits()),
        ..Default::default()
    };
    for (name, content) in [("empty", ""), ("data", "data")] {
        let path = top.join(name);
        let mut wanted = request(&path, What::Object, 0o100_600);
        wanted.meta.size = content.len() as u64;
        restorer.create(&wanted).unwrap();
        restorer.write(content.as_bytes()).unwrap();
        restorer.finish_data().unwrap();
        for bytes in record.encode() {
            restorer.apply_record(&bytes).unwrap();
        }
        assert!(restorer.finish().unwrap().is_empty(), "{name}");
        let flags = rustix::fs::ioctl_getflags(File::open(&path).unwrap()).unwrap();
        assert!(flags.contains(IFlags::NODUMP), "{flags:?}");
        assert_eq!(flags.contains(IFlags::NOCOW), content.is_empty());
    }
    let told = restorer.end(|e| panic!("{}", e.report()));
    assert!(
        told.len() == 1 && told[0].contains("1 files are not NOCOW"),
        "{told:?}"
    );
}

// ---- reading ahead ----

/// What an item is, its place in the order, and all that was read of it.
fn describe(item: ahead::Item) -> String {
    let mut buffer = vec![0; 10_000];
    let mut all = |mut prepared: ahead::Prepared| {
        let mut content = Vec::new();
        if prepared.entry.kind == Kind::Regular && prepared.entry.meta.size < 10_000_000 {
            let mut contents = prepared.contents().unwrap();
            loop {
                let length = contents.read(&mut buffer).unwrap();
                if length == 0 {
                    break;
                }
                content.extend_from_slice(&buffer[..length]);
            }
        }
        let sum = content
            .iter()
            .fold(0u64, |n, &b| n.wrapping_mul(31).wrapping_add(b.into()));
        let entry = &prepared.entry;
        let first = format!("{:?} {:?} {:?} {sum}", entry.path, entry.meta, entry.link);
        format!("{first} {:?}", prepared.attributes().unwrap().0)
    };
    match item {
        ahead::Item::Begin(entry) => format!("begin {:?} {:?}", entry.path, entry.meta),
        ahead::Item::Object(prepared) => all(prepared),
        ahead::Item::End(prepared) => format!("end {}", all(prepared)),
        other => format!("{other:?}"),
    }
}

/// The threads of this process. One that has been joined may still be on the kernel's list while it ends.
fn threads() -> usize {
    const PF_EXITING: u32 = 4;
    let lives = |task: fs::DirEntry| {
        let stat = fs::read_to_string(task.path().join("stat")).ok()?;
        // proc_pid_stat(5): the flags are the seventh field after the name, which is in brackets.
        let flags = stat.rsplit(')').next()?.split_whitespace().nth(6)?;
        (flags.parse::<u32>().unwrap() & PF_EXITING == 0).then_some(())
    };
    fs::read_dir("/proc/self/task")
        .unwrap()
        .flatten()
        .filter_map(lives)
        .count()
}

/// Every setting that changes how far ahead is read.
fn ahead_options() -> Vec<AheadOptions> {
    let mut all = vec![AheadOptions::default()];
    for (budget, threads) in [(64 << 10, 1), (1, 1), (1 << 20, 3), (64 << 10, 16)] {
        all.push(AheadOptions {
            budget,
            threads,
            ..AheadOptions::default()
        });
    }
    all.push(AheadOptions {
        changed_since: Some(1_400_000_000),
        ..AheadOptions::default()
    });
    all.push(AheadOptions {
        names_only: true,
        ..AheadOptions::default()
    });
    all
}

#[test]
fn root_reading_ahead_changes_nothing_but_the_time() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "ext4", &[]);
    populate(&bench.attach(&image).directory);
    let device = Loop::new(&image);
    let tree = single(&device);
    let plain: Vec<String> = Walker::new(&tree, WalkOptions::default())
        .map(|item| describe(item.into()))
        .collect();
    let before = (threads(), open_descriptors());
    for options in ahead_options() {
        let walk = WalkOptions::default();
        let ahead = ReadAhead::start(&tree, walk, options.clone()).unwrap();
        for (number, item) in ahead.enumerate() {
            assert!(plain[number] == describe(item), "{options:?} item {number}");
        }
        assert_eq!((threads(), open_descriptors()), before, "{options:?}");
    }
    let target = bench.path("target");
    let ahead = ReadAhead::start(&tree, WalkOptions::default(), AheadOptions::default()).unwrap();
    let log = copy_items(ahead, &target);
    clear_fences(&target);
    assert_eq!(log, Vec::<String>::new());
    tree.close().unwrap();
    assert_gone(&device);
}

#[test]
fn root_reading_ahead_can_be_dropped_stopped_and_told_to_leave_out() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "xfs", &[]);
    {
        let attached = bench.attach(&image);
        for folder in 0..40 {
            for inner in 0..5 {
                let path = attached.directory.join(format!("f{folder:02}/i{inner}"));
                fs::create_dir_all(&path).unwrap();
                for n in 0..30 {
                    fs::write(path.join(n.to_string()), vec![7; 3000]).unwrap();
                }
            }
        }
    }
    let device = Loop::new(&image);
    let tree = single(&device);
    let before = (threads(), open_descriptors());
    for options in ahead_options() {
        let start = || ReadAhead::start(&tree, WalkOptions::default(), options.clone()).unwrap();
        for taken in [0, 1, 50, 3000] {
            let mut ahead = start();
            assert_eq!(ahead.by_ref().take(taken).count(), taken);
            drop(ahead);
            assert_eq!((threads(), open_descriptors()), before);
        }
        let mut ahead = start();
        let stopper = ahead.stopper();
        let other = std::thread::spawn(move || stopper.stop());
        // It may come to any point.
        let _ = ahead.by_ref().count();
        other.join().unwrap();
        assert!(ahead.next().is_none());
        drop(ahead);

        // Leave out whole folders, inner ones, and the last before an end.
        let mut ahead = start();
        let mut objects = 0;
        let mut ends = BTreeSet::new();
        while let Some(item) = ahead.next() {
            match item {
                ahead::Item::Begin(entry) => {
                    let text = String::from_utf8(entry.path).unwrap();
                    if text.ends_with("0") || text.starts_with("f3") && !text.contains("/") {
                        ahead.leave_out();
                    }
                }
                ahead::Item::Object(prepared) => {
                    assert!(!prepared.entry.path.starts_with(b"f3"));
                    objects += 1;
                }
                ahead::Item::End(prepared) => {
                    ends.insert(String::from_utf8(prepared.entry.path).unwrap());
                }
                other => panic!("{other:?}"),
            }
        }
        // f00, f10, f20, f30-f39 are gone, and i0 of the rest.
        assert_eq!(objects, 27 * 4 * 30, "{options:?}");
        assert_eq!(ends.len(), 27 * 5 + 1);
        drop(ahead);
        assert_eq!((threads(), open_descriptors()), before);
    }
    tree.close().unwrap();
    assert_gone(&device);
}

/// What waits to be taken holds few folders open, however deep or wide the tree is; in the daemon all jobs share the
/// descriptors.
#[test]
fn root_reading_ahead_holds_few_descriptors() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "ext4", &["-N", "20000"]);
    {
        let attached = bench.attach(&image);
        let mut deep = attached.directory.clone();
        for _ in 0..1500 {
            deep.push("d");
        }
        fs::create_dir_all(&deep).unwrap();
        for folder in 0..1500 {
            let path = attached.directory.join(format!("wide/{folder}"));
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("file"), "x").unwrap();
        }
    }
    let device = Loop::new(&image);
    let tree = single(&device);
    let count = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = count();
    let mut most = 0;
    let mut ahead =
        ReadAhead::start(&tree, WalkOptions::default(), AheadOptions::default()).unwrap();
    let mut taken = 0;
    // The line is full each time.
    for _ in 0..40 {
        std::thread::sleep(std::time::Duration::from_millis(50));
        most = most.max(count() - before);
        taken += ahead.by_ref().take(70).count();
    }
    taken += ahead.by_ref().count();
    assert!(taken > 6000, "{taken}");
    drop(ahead);
    println!("{most} descriptors");
    assert!(most < 320, "{most} descriptors");
    tree.close().unwrap();
    assert_gone(&device);
}

/// Ends the whole test run if the work does not end in time: a thread that hangs cannot be ended alone.
fn in_time<T>(seconds: u64, what: &str, work: impl FnOnce() -> T) -> T {
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let text = format!("{what}: not done in {seconds} s");
    let guard = std::thread::spawn(move || {
        let limit = std::time::Duration::from_secs(seconds);
        if wait.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            eprintln!("{text}");
            std::process::abort();
        }
    });
    let result = work();
    drop(done);
    guard.join().unwrap();
    result
}

#[test]
fn root_reading_ahead_with_the_least_memory_is_slow_but_never_stuck() {
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "ext4", &[]);
    {
        let attached = bench.attach(&image);
        for folder in 0..100 {
            let path = attached.directory.join(format!("f{folder:02}"));
            fs::create_dir(&path).unwrap();
            for n in 0..20 {
                // Some larger than the whole budget, some than a quarter of it.
                let length = [0, 100, 5000, 17_000, 70_000][n % 5];
                fs::write(path.join(n.to_string()), vec![n as u8; length]).unwrap();
            }
        }
    }
    let device = Loop::new(&image);
    let tree = single(&device);
    let before = (threads(), open_descriptors());
    for (budget, readers) in [(64 << 10, 1), (64 << 10, 4), (1, 1), (0, 0), (4096, 64)] {
        let options = AheadOptions {
            budget,
            threads: readers,
            ..AheadOptions::default()
        };
        let start = || ReadAhead::start(&tree, WalkOptions::default(), options.clone()).unwrap();
        let what = format!("{budget} bytes, {readers} threads");
        in_time(60, &what, || {
            let mut bytes = 0;
            let mut buffer = vec![0; 65536];
            for item in start() {
                let ahead::Item::Object(mut prepared) = item else {
                    continue;
                };
                let mut contents = prepared.contents().unwrap();
                loop {
                    let length = contents.read(&mut buffer).unwrap();
                    if length == 0 {
                        break;
                    }
                    bytes += length;
                }
            }
            assert_eq!(bytes, 100 * 4 * (100 + 5000 + 17_000 + 70_000), "{what}");
        });
        // All queues are full and everybody waits; then the job ends.
        for taken in [0, 1, 33, 200] {
            let mut ahead = start();
            ahead.by_ref().take(taken).for_each(drop);
            std::thread::sleep(std::time::Duration::from_millis(300));
            in_time(10, &what, || drop(ahead));
            assert_eq!((threads(), open_descriptors()), before, "{what}");
        }
        let mut ahead = start();
        let stopper = ahead.stopper();
        std::thread::sleep(std::time::Duration::from_millis(300));
        stopper.stop();
        in_time(10, &what, || assert!(ahead.by_ref().count() < 100));
        // Either holds what waits in line.
        drop((stopper, ahead));
        assert_eq!((threads(), open_descriptors()), before, "{what}");
    }
    tree.close().unwrap();
    assert_gone(&device);
}

/// Names come in the order of their inodes, so that a disk with heads is asked in the order of its tracks.
#[test]
fn root_reading_ahead_follows_the_inodes() {
    let Some(bench) = Bench::new() else { return };
    for fstype in ["ext4", "xfs"] {
        let image = bench.image(&format!("{fstype}.img"), fstype, &[]);
        let names: Vec<String> = (0..300).map(|n| format!("{:03}", n * 7 % 300)).collect();
        {
            let attached = bench.attach(&image);
            fs::create_dir(attached.directory.join("d")).unwrap();
            for name in &names {
                fs::write(attached.directory.join("d").join(name), "x").unwrap();
            }
        }
        let device = Loop::new(&image);
        let tree = single(&device);
        let options = AheadOptions::default();
        let mut seen = Vec::new();
        for item in ReadAhead::start(&tree, WalkOptions::default(), options).unwrap() {
            if let ahead::Item::Object(prepared) = item {
                seen.push((prepared.entry.meta.ino, prepared.entry.path));
            }
        }
        assert_eq!(seen.len(), names.len(), "{fstype}");
        assert!(seen.is_sorted_by_key(|(ino, _)| *ino), "{fstype}: {seen:?}");
        assert!(!seen.is_sorted_by_key(|(_, path)| path.clone()), "{fstype}");
        tree.close().unwrap();
        assert_gone(&device);
    }
}

/// What this process has read of files.
fn bytes_read() -> u64 {
    let text = fs::read_to_string("/proc/self/io").unwrap();
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix("rchar: "))
        .unwrap();
    line.parse().unwrap()
}

/// Nothing is read of what an incremental job does not ask for, but all of its metadata are there.
#[test]
fn root_reading_ahead_leaves_unchanged_files_alone() {
    const NEW: i64 = 1_600_000_000;
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "ext4", &[]);
    {
        let attached = bench.attach(&image);
        for n in 0..500 {
            let path = attached.directory.join(format!("{n:03}"));
            fs::write(&path, vec![7; 20_000]).unwrap();
        }
    }
    let device = Loop::new(&image);
    let tree = single(&device);
    // The files were made just now.
    let now = std::time::SystemTime::now();
    let now = now.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    for (since, read) in [(NEW, true), (now + 1000, false)] {
        let before = bytes_read();
        let options = AheadOptions {
            changed_since: Some(since),
            ..AheadOptions::default()
        };
        let ahead = ReadAhead::start(&tree, WalkOptions::default(), options).unwrap();
        let mut objects = 0;
        for item in ahead {
            if let ahead::Item::Object(prepared) = item {
                objects += 1;
                assert_eq!(prepared.entry.meta.size, 20_000);
                assert_eq!(
                    (prepared.has_contents(), prepared.has_attributes()),
                    (read, read)
                );
            }
        }
        assert_eq!(objects, 500);
        let bytes = bytes_read() - before;
        println!("changed since {since}: {bytes} bytes read");
        // /proc is read too.
        assert_eq!(bytes > 500 * 20_000, read, "{bytes}");
        assert!(read || bytes < 100_000, "{bytes}");
    }
    tree.close().unwrap();
    assert_gone(&device);
}

/// A backup does not push out the host's page cache.
#[test]
fn root_what_was_read_of_a_large_file_leaves_the_page_cache() {
    const SIZE: usize = 64 << 20;
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "ext4", &[]);
    let content = vec![7; SIZE];
    fs::write(bench.attach(&image).directory.join("large"), &content).unwrap();
    let device = Loop::new(&image);
    let tree = single(&device);
    let ahead = ReadAhead::start(&tree, WalkOptions::default(), AheadOptions::default()).unwrap();
    let objects = ahead.filter_map(|item| match item {
        ahead::Item::Object(prepared) => Some(prepared),
        _ => None,
    });
    let mut large = objects.last().unwrap();
    let mut contents = large.contents().unwrap();
    // The file's own descriptor; the tree has no path.
    let fd = fs::read_dir("/proc/self/fd").unwrap().flatten().find(|fd| {
        let target = fs::read_link(fd.path());
        target.is_ok_and(|target| target.ends_with("large"))
    });
    let path = fd.unwrap().path();
    let path = path
        .display()
        .to_string()
        .replace("self", &std::process::id().to_string());
    let held = File::open(&path).unwrap();
    let cached = || -> usize {
        let out = run!(
            "fincore",
            "--bytes",
            "--noheadings",
            "--output",
            "RES",
            &path
        );
        out.trim().parse().unwrap()
    };
    let mut buffer = vec![0; 65536];
    let (mut read, mut most) = (0, 0);
    loop {
        let length = contents.read(&mut buffer).unwrap();
        if length == 0 {
            break;
        }
        read += length;
        if read % (1 << 20) == 0 {
            most = most.max(cached());
        }
    }
    assert_eq!(read, SIZE);
    assert!(
        (65536..SIZE / 2).contains(&most),
        "{most} bytes in the cache"
    );
    let path = format!("/proc/{}/fd/{}", std::process::id(), held.as_raw_fd());
    drop((contents, large));
    let out = run!(
        "fincore",
        "--bytes",
        "--noheadings",
        "--output",
        "RES",
        &path
    );
    let rest: usize = out.trim().parse().unwrap();
    println!("at most {most} bytes in the cache, {rest} at the end");
    assert!(rest < 1 << 20, "{rest} bytes in the cache");
    drop(held);
    tree.close().unwrap();
    assert_gone(&device);
}

/// In a process without handlers of SIGSEGV and SIGBUS, as the daemon: where there are some, the runtime gives each
/// thread a stack for them, and ends the process if that finds no room.
#[test]
fn root_reading_ahead_makes_do_with_the_threads_it_gets() {
    let script = r#"trap '' SEGV BUS; exec "$0" --ignored --exact few_threads --nocapture"#;
    let exe = std::env::current_exe().unwrap();
    let output = Command::new("sh").arg("-c").arg(script).arg(exe).output();
    let output = output.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}\n{errors}"
    );
}

/// The other half of the test above.
#[test]
#[ignore = "run by the test above"]
fn few_threads() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Some(bench) = Bench::new() else { return };
    let image = bench.image("guest.img", "ext4", &[]);
    {
        let attached = bench.attach(&image);
        for n in 0..500 {
            fs::write(attached.directory.join(n.to_string()), vec![7; 3000]).unwrap();
        }
    }
    let device = Loop::new(&image);
    let tree = single(&device);
    let before = (threads(), open_descriptors());
    // So many that stacks of earlier threads, which the C library keeps, do not do. The small budget keeps them
    // alive until their results are taken.
    let options = AheadOptions {
        threads: 500,
        budget: 64 << 10,
        ..AheadOptions::default()
    };
    // Room in the heap, so that only threads do not fit under the limit.
    let chunks: Vec<Vec<u8>> = (0..1000).map(|_| vec![1; 4000]).collect();
    let top = vec![1; 64];
    drop(chunks);
    let old = getrlimit(Resource::As);
    let start = |room: u64| {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("VmSize:")).unwrap();
        let size: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        let limit = Rlimit {
            current: Some((size << 10) + room),
            ..old
        };
        setrlimit(Resource::As, limit).unwrap();
        let ahead = ReadAhead::start(&tree, WalkOptions::default(), options.clone());
        setrlimit(Resource::As, old).unwrap();
        ahead
    };
    let ahead = start(8 * (260 << 10)).unwrap();
    let readers = threads() - before.0 - 1;
    assert!((1..400).contains(&readers), "{readers} threads");
    // None at all: an error, and nothing is left.
    let error = start(64 << 10).unwrap_err();
    assert_eq!(error.code(), Code::Internal, "{error}");
    assert_eq!(threads(), before.0 + 1 + readers);
    let objects = in_time(60, "few threads", || {
        ahead
            .filter(|item| matches!(item, ahead::Item::Object(_)))
            .count()
    });
    assert_eq!(objects, 500);
    assert_eq!((threads(), open_descriptors()), before);
    drop(top);
    tree.close().unwrap();
    assert_gone(&device);
}
