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

/// Features of the filesystem.
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
    let tree = Rich { root, seed };
    tree.files()?;
    if !can.unix {
        return Ok(());
    }
    tree.holes()?;
    tree.links()?;
    tree.special_files()?;
    tree.rights()?;
    tree.xattrs()?;
    tree.acls()?;
    tree.odd_names()?;
    tree.times(can)
}

struct Rich<'a> {
    root: &'a Path,
    seed: u64,
}

impl Rich<'_> {
    fn dir(&self, name: &str) -> Result {
        std::fs::create_dir_all(self.root.join(name)).map_err(|e| format!("{name}: {e}"))?;
        Ok(())
    }

    fn file(&self, name: &str, contents: &[u8]) -> Result {
        std::fs::write(self.root.join(name), contents).map_err(|e| format!("{name}: {e}"))?;
        Ok(())
    }

    fn xattr(&self, name: &str, key: &str, value: &[u8]) -> Result {
        rustix::fs::lsetxattr(self.root.join(name), key, value, XattrFlags::empty())
            .map_err(|e| format!("{name}: setxattr {key}: {e}"))?;
        Ok(())
    }

    /// Files and folders that every filesystem can hold.
    fn files(&self) -> Result {
        for name in ["etc", "home/user/mail", "var/log", "empty", "opt"] {
            self.dir(name)?;
        }
        self.file("etc/hostname", format!("guest{}\n", self.seed).as_bytes())?;
        self.file(
            "etc/passwd",
            b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
        )?;
        self.file("home/user/empty", b"")?;
        self.file("home/user/small", &bytes(self.seed + 1, 1000))?;
        self.file("home/user/big", &bytes(self.seed + 2, 3 * 1024 * 1024 + 17))?;
        self.file("home/user/block", &bytes(self.seed + 3, 4096))?;
        self.file(
            &format!("opt/{}", "n".repeat(255)),
            b"a name of 255 bytes\n",
        )?;
        let mut deep = String::from("deep");
        for level in 0..40 {
            deep += &format!("/level{level:02}");
        }
        self.dir(&deep)?;
        self.file(&format!("{deep}/bottom"), b"the bottom\n")?;
        Ok(())
    }

    /// Data between holes, and a hole alone.
    fn holes(&self) -> Result {
        // Holes: data, 8 MiB hole, data, hole to the end.
        let mut sparse = File::create(self.root.join("home/user/sparse"))?;
        sparse.write_all(&bytes(self.seed + 4, 8192))?;
        sparse.seek(SeekFrom::Start(8 << 20))?;
        sparse.write_all(&bytes(self.seed + 5, 8192))?;
        sparse.set_len(16 << 20)?;
        File::create(self.root.join("home/user/all-hole"))?.set_len(5 << 20)?;
        Ok(())
    }

    /// Symbolic links that lead anywhere, and hard links.
    fn links(&self) -> Result {
        symlink("passwd", self.root.join("etc/link"))?;
        symlink("/nowhere/at/all", self.root.join("etc/dangling"))?;
        symlink("/etc/passwd", self.root.join("etc/absolute"))?;
        symlink("..", self.root.join("etc/up"))?;
        symlink("x".repeat(200), self.root.join("etc/long-link"))?;
        self.file("home/user/linked", &bytes(self.seed + 6, 5000))?;
        std::fs::hard_link(
            self.root.join("home/user/linked"),
            self.root.join("home/user/linked-2"),
        )?;
        std::fs::hard_link(
            self.root.join("home/user/linked"),
            self.root.join("var/linked-3"),
        )?;
        std::fs::hard_link(
            self.root.join("etc/dangling"),
            self.root.join("var/linked-symlink"),
        )?;
        Ok(())
    }

    /// Fifo, devices, socket.
    fn special_files(&self) -> Result {
        let node = |name: &str, kind: FileType, device: (u32, u32)| -> Result {
            let device = rustix::fs::makedev(device.0, device.1);
            rustix::fs::mknodat(
                CWD,
                self.root.join(name),
                kind,
                Mode::from_raw_mode(0o640),
                device,
            )
            .map_err(|e| format!("{name}: {e}"))?;
            Ok(())
        };
        self.dir("dev")?;
        node("dev/fifo", FileType::Fifo, (0, 0))?;
        node("dev/null", FileType::CharacterDevice, (1, 3))?;
        node("dev/block", FileType::BlockDevice, (7, 259))?;
        node("dev/socket", FileType::Socket, (0, 0))?;
        Ok(())
    }

    /// Modes and owners.
    fn rights(&self) -> Result {
        for (name, mode) in [
            ("opt/setuid", 0o4755),
            ("opt/setgid", 0o2755),
            ("opt/secret", 0o000),
            ("opt/readonly", 0o444),
        ] {
            self.file(name, &bytes(self.seed + u64::from(mode), 300))?;
            std::fs::set_permissions(self.root.join(name), PermissionsExt::from_mode(mode))?;
        }
        self.dir("tmp")?;
        std::fs::set_permissions(self.root.join("tmp"), PermissionsExt::from_mode(0o1777))?;
        self.dir("var/shared")?;
        std::fs::set_permissions(
            self.root.join("var/shared"),
            PermissionsExt::from_mode(0o2775),
        )?;
        for (name, uid, gid) in [
            ("home/user", 1000, 1000),
            ("home/user/small", 1000, 1000),
            ("etc/link", 1000, 1001),
            ("opt/readonly", 65534, 65534),
        ] {
            rustix::fs::chownat(
                CWD,
                self.root.join(name),
                Some(Uid::from_raw(uid)),
                Some(Gid::from_raw(gid)),
                AtFlags::SYMLINK_NOFOLLOW,
            )
            .map_err(|e| format!("{name}: {e}"))?;
        }
        Ok(())
    }

    /// Extended attributes, a capability among them.
    fn xattrs(&self) -> Result {
        self.file("opt/xattr", b"xattrs\n")?;
        self.xattr("opt/xattr", "user.comment", b"a comment with \0 and \xff")?;
        self.xattr("opt/xattr", "user.empty", b"")?;
        self.xattr("opt/xattr", "trusted.guest", b"trusted")?;
        self.xattr("opt/xattr", "user.large", &bytes(self.seed, 900))?;
        self.xattr("var/shared", "user.dir", b"on a directory")?;
        self.xattr("etc/absolute", "trusted.link", b"on a link")?;
        // cap_net_raw+ep, revision 2.
        self.file("opt/capable", &bytes(self.seed + 8, 700))?;
        std::fs::set_permissions(
            self.root.join("opt/capable"),
            PermissionsExt::from_mode(0o755),
        )?;
        let mut capability = vec![1, 0, 0, 2];
        capability.extend_from_slice(&(1_u32 << 13).to_le_bytes());
        capability.extend_from_slice(&[0; 12]);
        self.xattr("opt/capable", "security.capability", &capability)?;
        Ok(())
    }

    /// POSIX ACLs, of a file and by default.
    fn acls(&self) -> Result {
        self.file("opt/acl", b"acl\n")?;
        self.xattr(
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
        self.dir("opt/acl-dir")?;
        self.xattr(
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
        Ok(())
    }

    /// Names that are no UTF-8 or need quotes.
    fn odd_names(&self) -> Result {
        let odd: [&[u8]; 5] = [
            b"latin1-\xe4\xf6\xfc",
            b"new\nline",
            b"bell\x07",
            b"quote\"back\\slash",
            b" lead and trail ",
        ];
        self.dir("opt/names")?;
        for name in odd {
            std::fs::write(
                self.root.join("opt/names").join(OsStr::from_bytes(name)),
                name,
            )?;
        }
        Ok(())
    }

    /// Times before 1970 and, if it can, after 2038.
    fn times(&self, can: Can) -> Result {
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
            rustix::fs::utimensat(CWD, self.root.join(name), &times, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|e| format!("{name}: {e}"))?;
            Ok(())
        };
        self.file("var/old", b"1960\n")?;
        time("var/old", -315_619_200, 0)?;
        self.file("var/epoch", b"1970\n")?;
        time("var/epoch", 0, 0)?;
        if can.big_times {
            self.file("var/future", b"2050\n")?;
            time("var/future", 2_524_608_000, 5)?;
            time("home/user/small", 1_600_000_000, 123_456_789)?;
            time("etc/link", 1_500_000_000, 987_654_321)?;
        }
        time("empty", 1_400_000_000, 0)?;
        Ok(())
    }
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
