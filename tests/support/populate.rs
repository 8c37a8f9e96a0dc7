//! Fills a mounted guest filesystem.

use super::Result;
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags,
};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

/// What the filesystem can hold.
#[derive(Clone, Copy, Debug)]
pub struct Can {
    /// Owners, links, special files, xattrs, ACLs (all but vfat).
    pub unix: bool,
    /// Nanoseconds and times after 2038 (not ext2/3 with 128-byte inodes).
    pub big_times: bool,
}

/// Deterministic bytes that do not compress to nothing.
pub fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut out = Vec::with_capacity(length + 8);
    while out.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(length);
    out
}

/// A tree with one of each thing that backups get wrong. `seed` changes the contents.
pub fn rich(root: &Path, seed: u64, can: Can) -> Result {
    let dir = |name: &str| -> Result {
        std::fs::create_dir_all(root.join(name)).map_err(|e| format!("{name}: {e}"))?;
        Ok(())
    };
    let file = |name: &str, contents: &[u8]| -> Result {
        std::fs::write(root.join(name), contents).map_err(|e| format!("{name}: {e}"))?;
        Ok(())
    };
    for name in ["etc", "home/user/mail", "var/log", "empty", "opt"] {
        dir(name)?;
    }
    file("etc/hostname", format!("guest{seed}\n").as_bytes())?;
    file(
        "etc/passwd",
        b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
    )?;
    file("home/user/empty", b"")?;
    file("home/user/small", &bytes(seed + 1, 1000))?;
    file("home/user/big", &bytes(seed + 2, 3 * 1024 * 1024 + 17))?;
    file("home/user/block", &bytes(seed + 3, 4096))?;
    file(
        &format!("opt/{}", "n".repeat(255)),
        b"a name of 255 bytes\n",
    )?;
    let mut deep = String::from("deep");
    for level in 0..40 {
        deep += &format!("/level{level:02}");
    }
    dir(&deep)?;
    file(&format!("{deep}/bottom"), b"the bottom\n")?;
    if !can.unix {
        return Ok(());
    }

    // Holes: data, 8 MiB hole, data, hole to the end.
    let mut sparse = File::create(root.join("home/user/sparse"))?;
    sparse.write_all(&bytes(seed + 4, 8192))?;
    sparse.seek(SeekFrom::Start(8 << 20))?;
    sparse.write_all(&bytes(seed + 5, 8192))?;
    sparse.set_len(16 << 20)?;
    File::create(root.join("home/user/all-hole"))?.set_len(5 << 20)?;

    symlink("passwd", root.join("etc/link"))?;
    symlink("/nowhere/at/all", root.join("etc/dangling"))?;
    symlink("/etc/passwd", root.join("etc/absolute"))?;
    symlink("..", root.join("etc/up"))?;
    symlink("x".repeat(200), root.join("etc/long-link"))?;
    file("home/user/linked", &bytes(seed + 6, 5000))?;
    std::fs::hard_link(
        root.join("home/user/linked"),
        root.join("home/user/linked-2"),
    )?;
    std::fs::hard_link(root.join("home/user/linked"), root.join("var/linked-3"))?;
    std::fs::hard_link(root.join("etc/dangling"), root.join("var/linked-symlink"))?;

    let node = |name: &str, kind: FileType, device: (u32, u32)| -> Result {
        let device = rustix::fs::makedev(device.0, device.1);
        rustix::fs::mknodat(
            CWD,
            root.join(name),
            kind,
            Mode::from_raw_mode(0o640),
            device,
        )
        .map_err(|e| format!("{name}: {e}"))?;
        Ok(())
    };
    dir("dev")?;
    node("dev/fifo", FileType::Fifo, (0, 0))?;
    node("dev/null", FileType::CharacterDevice, (1, 3))?;
    node("dev/block", FileType::BlockDevice, (7, 259))?;
    node("dev/socket", FileType::Socket, (0, 0))?;

    for (name, mode) in [
        ("opt/setuid", 0o4755),
        ("opt/setgid", 0o2755),
        ("opt/secret", 0o000),
        ("opt/readonly", 0o444),
    ] {
        file(name, &bytes(seed + u64::from(mode), 300))?;
        std::fs::set_permissions(root.join(name), PermissionsExt::from_mode(mode))?;
    }
    dir("tmp")?;
    std::fs::set_permissions(root.join("tmp"), PermissionsExt::from_mode(0o1777))?;
    dir("var/shared")?;
    std::fs::set_permissions(root.join("var/shared"), PermissionsExt::from_mode(0o2775))?;
    for (name, uid, gid) in [
        ("home/user", 1000, 1000),
        ("home/user/small", 1000, 1000),
        ("etc/link", 1000, 1001),
        ("opt/readonly", 65534, 65534),
    ] {
        rustix::fs::chownat(
            CWD,
            root.join(name),
            Some(Uid::from_raw(uid)),
            Some(Gid::from_raw(gid)),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(|e| format!("{name}: {e}"))?;
    }

    file("opt/xattr", b"xattrs\n")?;
    let xattr = |name: &str, key: &str, value: &[u8]| -> Result {
        rustix::fs::lsetxattr(root.join(name), key, value, XattrFlags::empty())
            .map_err(|e| format!("{name}: setxattr {key}: {e}"))?;
        Ok(())
    };
    xattr("opt/xattr", "user.comment", b"a comment with \0 and \xff")?;
    xattr("opt/xattr", "user.empty", b"")?;
    xattr("opt/xattr", "trusted.guest", b"trusted")?;
    xattr("opt/xattr", "user.large", &bytes(seed, 900))?;
    xattr("var/shared", "user.dir", b"on a directory")?;
    xattr("etc/absolute", "trusted.link", b"on a link")?;
    // cap_net_raw+ep, revision 2.
    file("opt/capable", &bytes(seed + 8, 700))?;
    std::fs::set_permissions(root.join("opt/capable"), PermissionsExt::from_mode(0o755))?;
    let mut capability = vec![1, 0, 0, 2];
    capability.extend_from_slice(&(1_u32 << 13).to_le_bytes());
    capability.extend_from_slice(&[0; 12]);
    xattr("opt/capable", "security.capability", &capability)?;

    file("opt/acl", b"acl\n")?;
    xattr(
        "opt/acl",
        "system.posix_acl_access",
        &acl(&[
            (1, 6, None),
            (2, 4, Some(1000)),
            (4, 4, None),
            (8, 6, Some(1001)),
            (16, 6, None),
            (32, 0, None),
        ]),
    )?;
    dir("opt/acl-dir")?;
    xattr(
        "opt/acl-dir",
        "system.posix_acl_default",
        &acl(&[
            (1, 7, None),
            (2, 5, Some(1000)),
            (4, 5, None),
            (16, 5, None),
            (32, 0, None),
        ]),
    )?;

    let odd: [&[u8]; 5] = [
        b"latin1-\xe4\xf6\xfc",
        b"new\nline",
        b"bell\x07",
        b"quote\"back\\slash",
        b" lead and trail ",
    ];
    dir("opt/names")?;
    for name in odd {
        std::fs::write(root.join("opt/names").join(OsStr::from_bytes(name)), name)?;
    }

    let time = |name: &str, seconds: i64, nanoseconds: i64| -> Result {
        let times = Timestamps {
            last_access: Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_OMIT,
            },
            last_modification: Timespec {
                tv_sec: seconds,
                tv_nsec: nanoseconds as _,
            },
        };
        rustix::fs::utimensat(CWD, root.join(name), &times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| format!("{name}: {e}"))?;
        Ok(())
    };
    file("var/old", b"1960\n")?;
    time("var/old", -315_619_200, 0)?;
    file("var/epoch", b"1970\n")?;
    time("var/epoch", 0, 0)?;
    if can.big_times {
        file("var/future", b"2050\n")?;
        time("var/future", 2_524_608_000, 5)?;
        time("home/user/small", 1_600_000_000, 123_456_789)?;
        time("etc/link", 1_500_000_000, 987_654_321)?;
    }
    time("empty", 1_400_000_000, 0)?;
    Ok(())
}

/// Directories of 1000 small files each, 0 to 4 KiB.
pub fn many(root: &Path, count: usize, seed: u64) -> Result {
    for n in 0..count {
        let dir = root.join(format!("many/{:03}", n / 1000));
        if n % 1000 == 0 {
            std::fs::create_dir_all(&dir)?;
        }
        std::fs::write(
            dir.join(format!("file-{n:06}")),
            bytes(seed + n as u64, (n * 37) % 4096),
        )?;
    }
    Ok(())
}

/// A POSIX ACL as the kernel keeps it in its xattr: (tag, permissions, id).
fn acl(entries: &[(u16, u16, Option<u32>)]) -> Vec<u8> {
    let mut out = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        out.extend_from_slice(&tag.to_le_bytes());
        out.extend_from_slice(&permissions.to_le_bytes());
        out.extend_from_slice(&id.unwrap_or(u32::MAX).to_le_bytes());
    }
    out
}
