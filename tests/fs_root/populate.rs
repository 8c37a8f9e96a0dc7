//! A tree with every kind of object.

use rustix::fs::{AtFlags, CWD, FileType, IFlags, Mode, OFlags, Timestamps, XattrFlags};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

pub const POSIX_ACL: &[u8] = &[
    2, 0, 0, 0, // version
    1, 0, 7, 0, 0xff, 0xff, 0xff, 0xff, // owner rwx
    2, 0, 5, 0, 0xe8, 3, 0, 0, // user 1000 r-x
    4, 0, 5, 0, 0xff, 0xff, 0xff, 0xff, // group r-x
    16, 0, 5, 0, 0xff, 0xff, 0xff, 0xff, // mask r-x
    32, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, // others ---
];

/// cap_net_raw+ep, as setcap writes it.
pub const CAPABILITY: &[u8] = &[
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

pub fn set_times(path: &Path, seconds: i64, nanoseconds: i64) {
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

pub fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())
        .unwrap_or_else(|e| panic!("{name}: {e}"));
}

/// Makes all of it.
pub fn populate(top: &Path) {
    plain(top);
    links(top);
    nodes_and_rights(top);
    attributes(top);
    times_and_names(top);
    deep(top);
    flags(top);
    // Last: what is made in a folder changes its times.
    for (name, seconds) in [
        ("b/deep", 1_111_111_111),
        ("b", 1_222_222_222),
        ("many", -7),
    ] {
        set_times(&top.join(name), seconds, 42);
    }
}

fn file(top: &Path, name: &str, content: &[u8]) -> PathBuf {
    let path = top.join(name);
    fs::write(&path, content).unwrap();
    path
}

fn mode(path: &Path, bits: u32) {
    rustix::fs::chmod(path, Mode::from_raw_mode(bits)).unwrap();
}

/// Folders, files, holes, and many names.
fn plain(top: &Path) {
    for name in ["etc", "a", "b", "b/deep", "many", "empty"] {
        fs::create_dir(top.join(name)).unwrap();
    }
    file(top, "etc/fstab", b"# nothing\n");
    file(top, "empty-file", b"");
    let big: Vec<u8> = (0..3_000_017u32)
        .map(|n| n.to_le_bytes()[n as usize % 3])
        .collect();
    file(top, "big", &big);

    let sparse = File::create(top.join("sparse")).unwrap();
    sparse.write_all_at(b"start", 0).unwrap();
    sparse.write_all_at(b"middle", (64 << 20) + 5).unwrap();
    sparse.set_len(200 << 20).unwrap();
    let hole = File::create(top.join("only-a-hole")).unwrap();
    hole.set_len((1 << 20) + 1).unwrap();

    for n in 0..5000 {
        fs::write(top.join(format!("many/file-{n}")), n.to_string()).unwrap();
    }
}

/// Symbolic and hard links.
fn links(top: &Path) {
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

    let first = file(top, "a/first-name", b"one inode");
    fs::hard_link(&first, top.join("b/second-name")).unwrap();
    fs::hard_link(&first, top.join("b/deep/third-name")).unwrap();
    let ping = file(top, "a/capable", b"#!");
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
}

/// Devices and the like; modes and owners.
fn nodes_and_rights(top: &Path) {
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

    let setuid = file(top, "setuid", b"x");
    std::os::unix::fs::chown(&setuid, Some(1000), Some(2000)).unwrap();
    mode(&setuid, 0o6755);
    mode(&top.join("empty"), 0o1777);
    let secret = file(top, "no-rights", b"secret");
    mode(&secret, 0);
}

/// Extended attributes and ACLs.
fn attributes(top: &Path) {
    let attributes = file(top, "attributes", b"x");
    set_xattr(&attributes, "user.empty", b"");
    set_xattr(&attributes, "user.binary", b"a\0b\xff");
    set_xattr(&attributes, "user.large", &[7; 2000]);
    set_xattr(&attributes, "trusted.t", b"t");
    set_xattr(
        &attributes,
        "security.selinux",
        b"system_u:object_r:etc_t:s0\0",
    );
    let acl = file(top, "acl", b"x");
    set_xattr(&acl, "system.posix_acl_access", POSIX_ACL);
    set_xattr(&top.join("b"), "system.posix_acl_default", POSIX_ACL);
    set_xattr(&top.join("b"), "user.on-a-directory", b"d");
    // Objects made below a default ACL have one.
    file(top, "b/inherits", b"x");
}

/// Times before 1970 and after 2038; names of any bytes.
fn times_and_names(top: &Path) {
    set_times(&file(top, "old", b"x"), -1_000_000_000, 123_456_789);
    set_times(&file(top, "future", b"x"), 4_102_444_800, 987_654_321);
    set_times(&top.join("link"), 1_000_000_000, 1);
    set_times(&top.join("fifo"), 1_000_000_001, 999_999_999);

    file(top, "name with \n newline and \u{1b}[31m", b"x");
    fs::write(top.join(OsStr::from_bytes(b"bytes-\xff\xfe\x80")), b"x").unwrap();
    fs::write(top.join("n".repeat(255)), b"x").unwrap();
}

/// Deeper than one path can name.
fn deep(top: &Path) {
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
}

/// Files and folders that cannot be changed.
fn flags(top: &Path) {
    for (name, flags) in [
        ("immutable", IFlags::IMMUTABLE),
        ("append-only", IFlags::APPEND),
        ("nodump", IFlags::NODUMP | IFlags::NOATIME),
    ] {
        let path = file(top, name, b"fenced");
        fs::hard_link(&path, top.join(format!("{name}-2"))).unwrap();
        set_times(&path, 1_500_000_000, 5);
        add_flags(&path, flags);
    }
    fs::create_dir(top.join("immutable-directory")).unwrap();
    file(top, "immutable-directory/inside", b"x");
    add_flags(&top.join("immutable-directory"), IFlags::IMMUTABLE);
}

pub fn add_flags(path: &Path, flags: IFlags) {
    let file = File::open(path).unwrap();
    let before = rustix::fs::ioctl_getflags(&file).unwrap();
    rustix::fs::ioctl_setflags(&file, before | flags).unwrap();
}

pub fn clear_fences(top: &Path) {
    let _ = Command::new("chattr")
        .args(["-R", "-f", "-i", "-a"])
        .arg(top)
        .output();
}
