//! Which filesystems are mounted, with which options; and what in a superblock is refused.

use std::collections::BTreeSet;

use crate::error::{Code, Error, Result, escape};

/// Types that are mounted unless the client file says otherwise, as libblkid names them.
///
/// Kernel code reads what the guest wrote, so the list is short: the types that Linux and its
/// installers use and that the kernel's own developers test against damage.
pub const DEFAULT_TYPES: &[&str] = &["ext2", "ext3", "ext4", "xfs", "btrfs", "vfat", "ntfs"];

/// What the client file says about filesystems.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsPolicy {
    /// Types to mount, as libblkid names them.
    pub allowed: BTreeSet<String>,
    /// Leave the journal alone (`noload`, `norecovery`, `nologreplay`): the view may be torn. Off
    /// by default; each such mount gives a warning.
    pub skip_recovery: bool,
}

impl Default for FsPolicy {
    fn default() -> Self {
        FsPolicy {
            allowed: DEFAULT_TYPES.iter().map(|t| (*t).to_owned()).collect(),
            skip_recovery: false,
        }
    }
}

/// How one type is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// Kernel drivers, best first.
    pub drivers: &'static [&'static str],
    /// Options as flag (`None`) or with a value. `ro` is not among them: every mount has it.
    pub options: Vec<(&'static str, Option<&'static str>)>,
    /// `f_type` values that statfs may show.
    pub magic: &'static [u32],
}

impl Recipe {
    /// The options as `mount -o` would take them.
    pub fn describe(&self) -> String {
        let mut text = "ro".to_owned();
        for (key, value) in &self.options {
            text.push(',');
            text.push_str(key);
            if let Some(value) = value {
                text.push('=');
                text.push_str(value);
            }
        }
        text
    }
}

impl FsPolicy {
    /// How a filesystem of this type is mounted; an error if it is not.
    pub fn recipe(&self, fstype: &str) -> Result<Recipe> {
        let refused = |why: &str| {
            Error::new(
                Code::FsNotAllowed,
                format!("{}: {why}", escape(fstype.as_bytes())),
            )
        };
        if !self.allowed.contains(fstype) {
            return Err(refused("not among the allowed types"));
        }
        let (drivers, mut options, no_recovery, magic): (&[_], Vec<_>, _, &[_]) = match fstype {
            // errors=continue ALWAYS: the superblock may say errors=panic, and that is the host's.
            "ext2" => (
                &["ext4", "ext2"],
                vec![("errors", Some("continue"))],
                None,
                &[0xef53],
            ),
            "ext3" => (
                &["ext4", "ext3"],
                vec![("errors", Some("continue"))],
                Some(("noload", None)),
                &[0xef53],
            ),
            "ext4" => (
                &["ext4"],
                vec![("errors", Some("continue"))],
                Some(("noload", None)),
                &[0xef53],
            ),
            // Clones of one image have one UUID, and their snapshots are open at the same time.
            "xfs" => (
                &["xfs"],
                vec![("nouuid", None)],
                Some(("norecovery", None)),
                &[0x5846_5342],
            ),
            "btrfs" => (
                &["btrfs"],
                vec![],
                Some(("rescue", Some("nologreplay"))),
                &[0x9123_683e],
            ),
            // The mask would otherwise be the daemon's umask. Short names are shown as Linux
            // guests see them by default.
            "vfat" => (
                &["vfat"],
                vec![("utf8", Some("1")), ("umask", Some("022"))],
                None,
                &[0x4d44],
            ),
            "ntfs" => (
                &["ntfs3"],
                vec![("iocharset", Some("utf8")), ("umask", Some("022"))],
                None,
                &[0x7366_746e],
            ),
            _ => return Err(refused("guestsnap has no mount options for this type")),
        };
        if self.skip_recovery {
            options.extend(no_recovery);
        }
        Ok(Recipe {
            drivers,
            options,
            magic,
        })
    }
}

/// Where the ext2/3/4 superblock is, and how much of it is looked at.
pub const EXT_SUPERBLOCK: (u64, usize) = (1024, 1024);

/// Refuses an ext superblock that would make the kernel open another device of the host: an
/// external journal is found by a device number or a path that the guest wrote.
pub fn check_ext_superblock(superblock: &[u8]) -> std::result::Result<(), &'static str> {
    let u32_at = |at: usize| {
        superblock
            .get(at..at + 4)
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    };
    const HAS_JOURNAL: u32 = 0x4;
    let short = "the superblock is cut off";
    let features = u32_at(0x5c).ok_or(short)?;
    let journal_inode = u32_at(0xe0).ok_or(short)?;
    let mount_options = superblock.get(0x200..0x240).ok_or(short)?;
    if features & HAS_JOURNAL != 0 && journal_inode == 0 {
        return Err("its journal is on another device, which is not supported");
    }
    if mount_options.windows(7).any(|w| w == b"journal") {
        return Err("the mount options in its superblock name a journal device");
    }
    Ok(())
}

/// Refuses an ext superblock that would make `e2fsck` open another device of the host, and replay
/// the journal there: other than the kernel it looks for one that is named by its UUID, whatever
/// else the superblock says.
pub fn check_ext_superblock_for_fsck(superblock: &[u8]) -> std::result::Result<(), &'static str> {
    check_ext_superblock(superblock)?;
    match superblock.get(0xd0..0xe0) {
        Some(uuid) if uuid.iter().all(|byte| *byte == 0) => Ok(()),
        Some(_) => Err("its superblock names a journal on another device"),
        None => Err("the superblock is cut off"),
    }
}

/// Where the first btrfs superblock is, and how much of it is looked at.
pub const BTRFS_SUPERBLOCK: (u64, usize) = (65536, 4096);

/// The number of devices of a btrfs filesystem.
pub fn btrfs_devices(superblock: &[u8]) -> Option<u64> {
    let bytes = superblock.get(0x88..0x90)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_ext_always_overrides_errors() {
        for skip_recovery in [false, true] {
            let policy = FsPolicy {
                skip_recovery,
                ..FsPolicy::default()
            };
            for fstype in ["ext2", "ext3", "ext4"] {
                let recipe = policy.recipe(fstype).unwrap();
                assert!(recipe.options.contains(&("errors", Some("continue"))));
            }
        }
    }

    #[test]
    fn test_recovery_is_skipped_only_when_asked() {
        assert_eq!(
            FsPolicy::default().recipe("xfs").unwrap().describe(),
            "ro,nouuid"
        );
        let policy = FsPolicy {
            skip_recovery: true,
            ..FsPolicy::default()
        };
        assert_eq!(
            policy.recipe("xfs").unwrap().describe(),
            "ro,nouuid,norecovery"
        );
        assert_eq!(
            policy.recipe("btrfs").unwrap().describe(),
            "ro,rescue=nologreplay"
        );
        assert_eq!(
            policy.recipe("ext2").unwrap().describe(),
            "ro,errors=continue"
        );
    }

    #[test]
    fn test_types_outside_the_list_are_refused() {
        for fstype in ["iso9660", "f2fs", "auto", "", "ext4\0"] {
            let error = FsPolicy::default().recipe(fstype).unwrap_err();
            assert_eq!(error.code(), Code::FsNotAllowed);
        }
        let mut policy = FsPolicy::default();
        policy.allowed.insert("f2fs".into());
        assert_eq!(
            policy.recipe("f2fs").unwrap_err().code(),
            Code::FsNotAllowed
        );
    }

    #[test]
    fn test_external_journals_are_refused() {
        let mut superblock = vec![0; 1024];
        superblock[0x5c] = 4;
        superblock[0xe0] = 8;
        assert_eq!(check_ext_superblock(&superblock), Ok(()));
        superblock[0x200..0x20c].copy_from_slice(b"journal_path");
        assert!(check_ext_superblock(&superblock).is_err());
        superblock[0x200] = b'x';
        assert_eq!(check_ext_superblock(&superblock), Ok(()));
        assert_eq!(check_ext_superblock_for_fsck(&superblock), Ok(()));
        superblock[0xdf] = 1;
        assert_eq!(check_ext_superblock(&superblock), Ok(()));
        assert!(check_ext_superblock_for_fsck(&superblock).is_err());
        superblock[0xdf] = 0;
        superblock[0xe0] = 0;
        assert!(check_ext_superblock(&superblock).is_err());
        assert!(check_ext_superblock_for_fsck(&superblock).is_err());
        assert!(check_ext_superblock(&superblock[..100]).is_err());
    }
}
