//! Attributes that a target cannot store or that a restore withholds: counted, and reported once.

use std::collections::BTreeMap;

use rustix::fs::IFlags;

use crate::error::escape;

/// Inode flags and their letters in `chattr`.
const LETTERS: [(IFlags, char); 13] = [
    (IFlags::SECURE_REMOVAL, 's'),
    (IFlags::UNRM, 'u'),
    (IFlags::COMPRESSED, 'c'),
    (IFlags::SYNC, 'S'),
    (IFlags::IMMUTABLE, 'i'),
    (IFlags::APPEND, 'a'),
    (IFlags::NODUMP, 'd'),
    (IFlags::NOATIME, 'A'),
    (IFlags::JOURNALING, 'j'),
    (IFlags::NOTAIL, 't'),
    (IFlags::DIRSYNC, 'D'),
    (IFlags::TOPDIR, 'T'),
    (IFlags::NOCOW, 'C'),
];

/// Number of files in one restore that lost an attribute, by attribute.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// btrfs: files with data that lost NOCOW.
    pub(super) nocow: u64,
    /// Files and directories with setuid, setgid or a capability, restored without their owner.
    pub(super) rights: u64,
    /// Files and directories that lost extended attributes of NTFS.
    pub(super) ntfs: u64,
    /// Inode flags that the target's filesystem lacks.
    flags: BTreeMap<u32, u64>,
}

impl Losses {
    /// Counts each of these flags for one file.
    pub(super) fn flags(&mut self, lost: IFlags) {
        for flag in lost.iter() {
            *self.flags.entry(flag.bits()).or_default() += 1;
        }
    }

    /// Formats one line per kind of loss.
    pub(super) fn tell(&self, target: &[u8]) -> Vec<String> {
        let target = escape(target);
        let mut told = Vec::new();
        if self.nocow > 0 {
            told.push(format!(
                "restore to {target}/: {} files are not NOCOW (chattr +C) any more, which btrfs takes for empty files \
                 only: where that matters, copy them into a folder that is",
                self.nocow
            ));
        }
        if self.rights > 0 {
            told.push(format!(
                "restore to {target}/: {} files and folders do not have their owner: their setuid and setgid bits and \
                 file capabilities (security.capability) were not set, because they would give the rights of root. \
                 Restore the owner too where they are needed",
                self.rights
            ));
        }
        if self.ntfs > 0 {
            told.push(format!(
                "restore to {target}/: {} files and folders had extended attributes that only NTFS keeps ($LXMOD and the \
                 like, from Linux or Windows); their contents and other attributes are restored",
                self.ntfs
            ));
        }
        for (bits, count) in &self.flags {
            told.push(format!(
                "restore to {target}/: {count} files and folders had the inode flag {}, which the target's filesystem \
                 does not keep; their contents and other attributes are restored",
                flag_name(IFlags::from_bits_retain(*bits))
            ));
        }
        told
    }
}

/// Formats a flag as `+C (chattr)`, or as a number if `chattr` has no letter for it.
pub(super) fn flag_name(flag: IFlags) -> String {
    match LETTERS.iter().find(|(known, _)| *known == flag) {
        Some((_, letter)) => format!("+{letter} (chattr)"),
        None => format!("{:#x}", flag.bits()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_each_loss_is_one_line_with_its_count() {
        let mut losses = Losses::default();
        assert!(losses.tell(b"/r").is_empty());
        losses.flags(IFlags::NOCOW | IFlags::COMPRESSED);
        losses.flags(IFlags::NOCOW);
        losses.rights = 3;
        losses.ntfs = 5;
        losses.nocow = 4;
        let told = losses.tell(b"/r");
        for (line, text) in [
            "4 files are not NOCOW",
            "3 files and folders do not have their owner",
            "5 files and folders had extended attributes that only NTFS keeps",
            "1 files and folders had the inode flag +c (chattr)",
            "2 files and folders had the inode flag +C (chattr)",
        ]
        .iter()
        .enumerate()
        {
            assert!(told[line].contains(text), "{told:?}");
        }
        assert_eq!(told.len(), 5);
    }
}
