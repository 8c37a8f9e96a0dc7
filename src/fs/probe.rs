//! What is in a volume.
//!
//! libblkid decides, with its safe probe: two signatures are an error, never a guess, because the
//! kernel would be handed bytes that a guest prepared.

use std::os::fd::AsFd;

use rustix::io::Errno;

use crate::error::{Code, Error, Result, escape};
use crate::sys::blkid::{self, Answer};

/// How much of the start of a volume is looked at to call it blank.
const BLANK_LOOK: usize = 1 << 20;

/// What a volume holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// A filesystem (of any type; whether it is mounted is for the policy to say).
    Filesystem(Filesystem),
    /// Something known that is not a filesystem.
    Skip(SkipReason),
    /// No signature. `blank`: the first MiB is all zero.
    Unknown {
        /// The first MiB is all zero.
        blank: bool,
    },
}

/// A filesystem's identity.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Filesystem {
    /// libblkid's name of the type: `ext4`, `xfs`, `ntfs`…
    pub fstype: String,
    /// The UUID as text, in the form libblkid prints.
    pub uuid: Option<String>,
    /// The label; any bytes.
    pub label: Option<Vec<u8>>,
    /// The version, if the type has one.
    pub version: Option<String>,
}

/// Why a volume is left out, though it was recognised.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SkipReason {
    /// Swap space or a hibernation image.
    Swap,
    /// Encrypted with LUKS.
    Luks,
    /// Encrypted with BitLocker.
    BitLocker,
    /// Encrypted in another way.
    Encrypted(String),
    /// Member of a software RAID.
    MdMember,
    /// LVM physical volume.
    LvmMember,
    /// Member of a ZFS pool.
    ZfsMember,
    /// Member of another kind of set.
    Member(String),
    /// An external journal.
    Journal(String),
    /// Known to libblkid, but not a filesystem.
    Other(String),
}

impl std::fmt::Display for SkipReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SkipReason::Swap => f.write_str("swap space holds no files"),
            SkipReason::Luks => f.write_str("encrypted with LUKS, and no key is given"),
            SkipReason::BitLocker => f.write_str("encrypted with BitLocker"),
            SkipReason::Encrypted(kind) => write!(f, "encrypted ({kind})"),
            SkipReason::MdMember => f.write_str("member of a software RAID (md)"),
            SkipReason::LvmMember => f.write_str("LVM physical volume"),
            SkipReason::ZfsMember => f.write_str("member of a ZFS pool"),
            SkipReason::Member(kind) => write!(f, "member of a set ({kind})"),
            SkipReason::Journal(kind) => write!(f, "external journal ({kind})"),
            SkipReason::Other(kind) => write!(f, "not a filesystem ({kind})"),
        }
    }
}

/// Looks what an open device or file holds. `what` names it for the error.
pub fn probe(device: impl AsFd, what: &str) -> Result<Content> {
    probe_range(device, 0, 0, what)
}

/// As [`probe`], for `size` bytes from `offset` (`size` 0: to the end).
pub fn probe_range(device: impl AsFd, offset: u64, size: u64, what: &str) -> Result<Content> {
    let failed = |text: &str| Error::new(Code::ProbeFailed, format!("{what}: {text}"));
    // libblkid takes an unreadable disk for one without a signature: read the start first.
    let blank = starts_blank(device.as_fd(), offset, size)
        .map_err(|e| failed("the start cannot be read").because(e))?;
    let answer = crate::point::reach(crate::point::Point::Probe)
        .map_err(std::io::Error::from)
        .and_then(|()| blkid::safe_probe(device.as_fd(), offset, size))
        .map_err(|e| failed("probing failed").because(e))?;
    match answer {
        Answer::Found(values) => {
            classify(&values).ok_or_else(|| failed("a signature without a type"))
        }
        Answer::Nothing => Ok(Content::Unknown { blank }),
        Answer::Ambivalent => Err(failed(
            "signatures of several kinds; wipe the stale one in the guest (wipefs)",
        )),
    }
}

fn starts_blank(
    device: std::os::fd::BorrowedFd<'_>,
    offset: u64,
    size: u64,
) -> std::result::Result<bool, Errno> {
    let mut left = match usize::try_from(size) {
        Ok(0) | Err(_) => BLANK_LOOK,
        Ok(size) => size.min(BLANK_LOOK),
    };
    let mut at = offset;
    let mut buffer = vec![0; 64 << 10];
    while left > 0 {
        let want = left.min(buffer.len());
        let got = rustix::io::pread(device, &mut buffer[..want], at)?;
        if got == 0 {
            break;
        }
        if buffer[..got].iter().any(|&b| b != 0) {
            return Ok(false);
        }
        left -= got;
        at += got as u64;
    }
    Ok(true)
}

fn classify(values: &std::collections::BTreeMap<String, Vec<u8>>) -> Option<Content> {
    let text = |name: &str| values.get(name).map(|v| escape(v));
    let kind = text("TYPE")?;
    let usage = text("USAGE").unwrap_or_default();
    let skip = match (kind.as_str(), usage.as_str()) {
        ("swap" | "swsuspend", _) => SkipReason::Swap,
        ("crypto_LUKS", _) => SkipReason::Luks,
        ("BitLocker", _) => SkipReason::BitLocker,
        ("linux_raid_member", _) => SkipReason::MdMember,
        ("LVM2_member" | "LVM1_member", _) => SkipReason::LvmMember,
        ("zfs_member", _) => SkipReason::ZfsMember,
        ("jbd" | "xfs_external_log", _) => SkipReason::Journal(kind),
        (_, "crypto") => SkipReason::Encrypted(kind),
        (_, "raid") => SkipReason::Member(kind),
        (_, "filesystem") => {
            return Some(Content::Filesystem(Filesystem {
                fstype: kind,
                uuid: text("UUID"),
                label: values.get("LABEL").cloned(),
                version: text("VERSION"),
            }));
        }
        _ => SkipReason::Other(kind),
    };
    Some(Content::Skip(skip))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom, Write};

    fn image(writes: &[(u64, &[u8])]) -> std::fs::File {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(16 << 20).unwrap();
        for (at, bytes) in writes {
            file.seek(SeekFrom::Start(*at)).unwrap();
            file.write_all(bytes).unwrap();
        }
        file
    }

    #[test]
    fn test_blank_and_unknown() {
        let blank = image(&[]);
        assert_eq!(
            probe(&blank, "t").unwrap(),
            Content::Unknown { blank: true }
        );
        let noise = image(&[(4096, b"something")]);
        assert_eq!(
            probe(&noise, "t").unwrap(),
            Content::Unknown { blank: false }
        );
    }

    #[test]
    fn test_swap_luks_and_members_are_skipped() {
        let swap = image(&[(1024, &[1, 0, 0, 0, 255, 15, 0, 0]), (4086, b"SWAPSPACE2")]);
        assert_eq!(probe(&swap, "t").unwrap(), Content::Skip(SkipReason::Swap));

        let mut luks = vec![0; 592];
        luks[..8].copy_from_slice(b"LUKS\xba\xbe\x00\x01");
        let luks = image(&[(0, &luks)]);
        assert_eq!(probe(&luks, "t").unwrap(), Content::Skip(SkipReason::Luks));
    }

    #[test]
    fn test_unreadable_is_an_error() {
        let directory = std::fs::File::open("/").unwrap();
        assert_eq!(
            probe(&directory, "t").unwrap_err().code(),
            Code::ProbeFailed
        );
    }
}
