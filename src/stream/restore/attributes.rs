//! Sets saved attributes in the only order that preserves them: owner, mode, extended attributes,
//! times, inode flags.

use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, CWD, Gid, IFlags, Mode, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::fences::{FENCES, is_lacking};
use super::file::Current;
use super::request::Wanted;
use crate::error::escape;
use crate::inode::{Kind, Meta, Time, proc_path};
use crate::point::{Point, reach};
use crate::stream::losses::flag_name;

/// Maximum failed extended attributes reported by name per file; more are counted.
pub(super) const MAX_NAMED_XATTRS: usize = 8;

const ACL_ACCESS: &[u8] = b"system.posix_acl_access";
const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";

/// Gives root's rights to every user that runs the file. Other attributes give none: ACLs and
/// labels only control access, and `trusted.*` is for root alone.
const CAPABILITY: &[u8] = b"security.capability";

/// The namespaces of Linux. ntfs3 shows the attributes of an NTFS by their own names: `$LXUID`.
const NAMESPACES: [&[u8]; 4] = [b"user.", b"system.", b"security.", b"trusted."];

fn is_in_namespace(name: &[u8]) -> bool {
    NAMESPACES.iter().any(|space| name.starts_with(space))
}

/// Inode flags to restore. The others describe how the filesystem stores the file.
const SETTABLE: IFlags = IFlags::SECURE_REMOVAL
    .union(IFlags::UNRM)
    .union(IFlags::SYNC)
    .union(IFlags::IMMUTABLE)
    .union(IFlags::APPEND)
    .union(IFlags::NODUMP)
    .union(IFlags::NOATIME)
    .union(IFlags::COMPRESSED)
    .union(IFlags::JOURNALING)
    .union(IFlags::NOTAIL)
    .union(IFlags::DIRSYNC)
    .union(IFlags::TOPDIR)
    .union(IFlags::NOCOW);

/// Removes ACLs that a new object inherited from its directory. Usually there are none, or the
/// filesystem has none. Uses the path in /proc, because special files are open with O_PATH.
pub(super) fn drop_inherited(file: &OwnedFd) {
    for name in [ACL_ACCESS, ACL_DEFAULT] {
        let _ = rustix::fs::removexattr(proc_path(file), name);
    }
}

impl Current {
    pub(super) fn times(&self) -> Timestamps {
        let pick = |exact: Option<Time>, coarse: Time| exact.unwrap_or(coarse).into();
        Timestamps {
            last_access: pick(self.record.atime, self.meta.atime),
            last_modification: pick(self.record.mtime, self.meta.mtime),
        }
    }

    /// Sets owner, mode, extended attributes, times, inode flags. In another order one would undo
    /// or prevent a later one. Leaves out the `later` flags.
    pub(super) fn put_on(&mut self, file: &OwnedFd, wanted: Wanted, later: IFlags) {
        // Links and special files are open with O_PATH; only a path in /proc works for them.
        let name = proc_path(file);
        let owned = wanted.owners && self.put_on_owner(file);
        let is_acl = |name: &[u8]| name == ACL_ACCESS || name == ACL_DEFAULT;
        let mut lost_rights = !owned && self.meta.mode & 0o6000 != 0 && self.kind != Kind::Symlink;
        self.record.xattrs.retain(|(name, _)| {
            if is_acl(name) {
                return wanted.acls;
            }
            let withheld = wanted.xattrs && !owned && name == CAPABILITY;
            lost_rights |= withheld;
            wanted.xattrs && !withheld
        });
        self.lost_rights = lost_rights;
        if self.kind == Kind::Directory {
            self.drop_old_acls(file);
        }
        if self.kind != Kind::Symlink {
            // A setuid program whose owner is not restored would belong to root and run as root for
            // any user.
            let bits = if owned { 0o7777 } else { 0o1777 };
            let mode = Mode::from_raw_mode(self.meta.mode & bits);
            let result = rustix::fs::chmod(name.as_str(), mode);
            self.check("setting the mode", result);
        }
        self.put_on_xattrs(&name);
        let times = reach(Point::RestoreTimes).and_then(|()| {
            rustix::fs::utimensat(CWD, name.as_str(), &self.times(), AtFlags::empty())
        });
        self.check("setting the times", times);
        if matches!(self.kind, Kind::Regular | Kind::Directory) {
            self.put_on_flags(file, later);
        }
    }

    fn put_on_xattrs(&mut self, name: &str) {
        let mut refused = 0;
        for (key, value) in std::mem::take(&mut self.record.xattrs) {
            let flags = XattrFlags::empty();
            let result = reach(Point::RestoreXattr)
                .and_then(|()| rustix::fs::setxattr(name, key.as_slice(), &value, flags));
            if result == Err(Errno::OPNOTSUPP) && !is_in_namespace(&key) {
                self.lost_ntfs = true;
            } else if let Err(errno) = result {
                refused += 1;
                if refused <= MAX_NAMED_XATTRS {
                    let step = format!("setting the extended attribute {}", escape(&key));
                    self.warn(&step, Some(errno));
                }
            }
        }
        if let Some(more @ 1..) = refused.checked_sub(MAX_NAMED_XATTRS) {
            self.warn(&format!("setting {more} more extended attributes"), None);
        }
    }

    /// Sets the saved owner. Returns whether the target has it: some filesystems accept any owner
    /// and keep their own.
    fn put_on_owner(&mut self, file: &OwnedFd) -> bool {
        let owner = reach(Point::RestoreOwner).and_then(|()| {
            rustix::fs::chownat(
                file,
                c"",
                Some(Uid::from_raw(self.meta.uid)),
                Some(Gid::from_raw(self.meta.gid)),
                AtFlags::EMPTY_PATH,
            )
        });
        let found = owner.and_then(|()| Meta::read(file, b"", AtFlags::EMPTY_PATH));
        match found {
            Ok(found) if (found.uid, found.gid) == (self.meta.uid, self.meta.gid) => return true,
            Ok(found) => {
                let (uid, gid) = (found.uid, found.gid);
                let step = format!("setting the owner: the target's filesystem keeps {uid}:{gid}");
                self.warn(&step, None);
            }
            Err(errno) => self.warn("setting the owner", Some(errno)),
        }
        false
    }

    /// Removes ACLs of a preexisting directory that the saved one did not have.
    fn drop_old_acls(&mut self, file: &OwnedFd) {
        for acl in [ACL_ACCESS, ACL_DEFAULT] {
            if !self.record.xattrs.iter().any(|(name, _)| name == acl) {
                match rustix::fs::fremovexattr(file, acl) {
                    Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
                    Err(errno) => self.warn("removing an ACL that is not its own", Some(errno)),
                }
            }
        }
    }

    /// Saved inode flags to restore.
    pub(super) fn saved_flags(&self) -> IFlags {
        IFlags::from_bits_retain(self.record.flags.unwrap_or(0)) & SETTABLE
    }

    fn put_on_flags(&mut self, file: &OwnedFd, later: IFlags) {
        if self.record.flags.is_none() {
            return;
        }
        let mut wanted = self.saved_flags() - later;
        let before = match rustix::fs::ioctl_getflags(file) {
            Ok(flags) => flags,
            Err(errno) if is_lacking(errno) => {
                self.lost_flags = wanted;
                return;
            }
            Err(errno) => {
                self.warn("inode flags (chattr)", Some(errno));
                return;
            }
        };
        // A directory fenced on the target stays fenced, whatever the saved one was.
        if self.kind == Kind::Directory {
            wanted |= before & FENCES;
        }
        if before & SETTABLE == wanted {
            return;
        }
        if rustix::fs::ioctl_setflags(file, (before - SETTABLE) | wanted).is_err() {
            // Retry one by one, so that a flag unsupported by the target affects only itself.
            // Fences come last.
            let mut now = before;
            for flag in (wanted - FENCES).iter().chain((wanted & FENCES).iter()) {
                if now.contains(flag) {
                    continue;
                }
                match rustix::fs::ioctl_setflags(file, now | flag) {
                    Ok(()) => now |= flag,
                    Err(errno) => {
                        wanted -= flag;
                        if is_lacking(errno) {
                            self.lost_flags |= flag;
                        } else {
                            let step = format!("setting the inode flag {}", flag_name(flag));
                            self.warn(&step, Some(errno));
                        }
                    }
                }
            }
        }
        // Some flags are ignored without an error, such as NOCOW by btrfs for files with data.
        match rustix::fs::ioctl_getflags(file) {
            Ok(now) if now.contains(wanted) => {}
            Ok(now) if wanted - now == IFlags::NOCOW && self.end > 0 => self.lost_nocow = true,
            Ok(now) => self.lost_flags |= wanted - now,
            Err(errno) => self.warn("reading its inode flags (chattr) back", Some(errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::MetadataExt;

    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

    use super::super::Restorer;
    use super::super::testing::{own, put, put_with};
    use super::*;
    use crate::error::Error;
    use crate::stream::record::Record;

    fn capability(path: &std::path::Path) -> std::result::Result<usize, Errno> {
        rustix::fs::getxattr(path, CAPABILITY, &mut [0_u8; 64][..])
    }

    /// Effective capability cap_dac_override, in the kernel's format.
    const DAC_OVERRIDE: [u8; 20] = [1, 0, 0, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

    #[test]
    fn test_without_owner_nothing_has_rights_of_its_own() {
        let target = tempfile::tempdir().unwrap();
        let top = target.path().as_os_str().as_bytes();
        let record = Record {
            xattrs: vec![(CAPABILITY.to_vec(), DAC_OVERRIDE.to_vec())],
            ..Record::default()
        };
        let mut r = Restorer::new(Some(top)).unwrap();
        r.choose(Wanted {
            owners: false,
            ..Wanted::default()
        });
        // The existing owner is the saved one, but owners were not requested.
        for (name, mode, left) in [
            ("plain", 0o100_755, 0o755),
            ("setuid", 0o106_755, 0o755),
            ("folder", 0o042_755, 0o755),
        ] {
            let path = [top, b"/", name.as_bytes()].concat();
            let problems = put_with(&mut r, &path, mode, own(), &record);
            assert!(problems.is_empty(), "{name}: {problems:?}");
            let path = target.path().join(name);
            let mode = std::fs::metadata(&path).unwrap().mode() & 0o7777;
            assert_eq!((mode, capability(&path)), (left, Err(Errno::NODATA)));
        }
        let unharmed = [top, b"/unharmed"].concat();
        assert!(put(&mut r, &unharmed, 0o100_755, own()).is_empty());
        let told = r.end(|e| panic!("{}", e.report()));
        assert!(
            told.len() == 1 && told[0].contains("3 files and folders do not have their owner"),
            "{told:?}"
        );
    }

    #[test]
    fn test_without_its_owner_nothing_is_setuid() {
        // Capabilities are per thread.
        std::thread::spawn(restore_without_chown).join().unwrap();
    }

    fn restore_without_chown() {
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::CHOWN);
        set_capabilities(None, sets).unwrap();
        let target = tempfile::tempdir().unwrap();
        let top = target.path().as_os_str().as_bytes();
        let mut r = Restorer::new(Some(top)).unwrap();
        for (name, mode, uid, left) in [
            ("theirs", 0o106_755, own() + 1, 0o755),
            ("folder", 0o043_775, own() + 1, 0o1775),
            ("own", 0o104_755, own(), 0o4755),
        ] {
            let path = [top, b"/", name.as_bytes()].concat();
            let mut record = Record::default();
            if uid != own() {
                record.xattrs = vec![(CAPABILITY.to_vec(), DAC_OVERRIDE.to_vec())];
            }
            let problems = put_with(&mut r, &path, mode, uid, &record);
            let told: Vec<String> = problems.iter().map(Error::report).collect();
            assert_eq!(told.len(), usize::from(uid != own()), "{name}: {told:?}");
            assert!(told.iter().all(|t| t.contains("owner")), "{name}: {told:?}");
            let meta = std::fs::metadata(target.path().join(name)).unwrap();
            assert_eq!((meta.mode() & 0o7777, meta.uid()), (left, own()), "{name}");
            let kept = capability(&target.path().join(name));
            assert_eq!(kept, Err(Errno::NODATA), "{name}");
        }
        let told = r.end(|e| panic!("{}", e.report()));
        assert!(told.len() == 1 && told[0].contains("2 files"), "{told:?}");
    }
}
