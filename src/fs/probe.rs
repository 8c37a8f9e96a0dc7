//! Probes a volume's content.
//!
//! libblkid's safe probe decides. Two signatures are an error, never a guess: the kernel would
//! parse bytes that the guest prepared.

use std::os::fd::AsFd;

use rustix::io::Errno;

use crate::error::{Code, Error, Result, escape};
use crate::sys::blkid::{self, Answer};

/// Bytes that must be zero to call a volume blank.
const BLANK_LOOK: usize = 1 << 20;

/// Content of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// A filesystem of any type; policy decides whether it is mounted.
    Filesystem(Filesystem),
    /// A known content that is not a filesystem.
    Skip(SkipReason),
    /// No signature. `blank`: the first MiB is all zero.
    Unknown {
        /// The first MiB is all zero.
        blank: bool,
    },
}

/// Identity of a filesystem.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Filesystem {
    /// Type as named by libblkid: `ext4`, `xfs`, `ntfs`…
    pub fstype: String,
    /// UUID as printed by libblkid.
    pub uuid: Option<String>,
    /// Label; arbitrary bytes.
    pub label: Option<Vec<u8>>,
    /// Version, if the type has one.
    pub version: Option<String>,
    /// Whether labels of an earlier ZFS remain behind the filesystem.
    pub stale_zfs: bool,
    /// Whether it is a btrfs over several devices.
    pub several: bool,
}

/// Why a recognised volume is skipped.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SkipReason {
    /// Swap space or a hibernation image.
    Swap,
    /// Encrypted with LUKS.
    Luks,
    /// Encrypted with BitLocker.
    BitLocker,
    /// Encrypted by other means.
    Encrypted(String),
    /// Software RAID member.
    MdMember,
    /// LVM physical volume.
    LvmMember,
    /// ZFS pool member.
    ZfsMember,
    /// Member of another device set.
    Member(String),
    /// External journal.
    Journal(String),
    /// cloud-init seed, read at a guest's first boot; made by the host.
    CloudInit,
    /// EFI firmware variables.
    EfiVariables,
    /// State of an emulated TPM.
    Tpm,
    /// Disk image in a format other than raw.
    Image(&'static str),
    /// Known to libblkid, but no filesystem.
    Other(String),
}

impl SkipReason {
    /// Whether it may hold files that cannot be read here.
    pub fn may_hold_files(&self) -> bool {
        !matches!(
            self,
            SkipReason::Swap
                | SkipReason::Journal(_)
                | SkipReason::CloudInit
                | SkipReason::EfiVariables
                | SkipReason::Tpm
        )
    }
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
            SkipReason::CloudInit => f.write_str("settings for cloud-init"),
            SkipReason::EfiVariables => f.write_str("variables of EFI firmware"),
            SkipReason::Tpm => f.write_str("the state of an emulated TPM"),
            SkipReason::Image(kind) => write!(
                f,
                "an image of format {kind}, and only raw ones can be read"
            ),
            SkipReason::Other(kind) => write!(f, "not a filesystem ({kind})"),
        }
    }
}

/// Probes an open device or file. `what` names it in errors.
pub fn probe(device: impl AsFd, what: &str) -> Result<Content> {
    probe_range(device, 0, 0, what)
}

/// Like [`probe`], for `size` bytes from `offset` (`size` 0: to the end).
pub fn probe_range(device: impl AsFd, offset: u64, size: u64, what: &str) -> Result<Content> {
    let failed = |text: &str| Error::new(Code::ProbeFailed, format!("{what}: {text}"));
    // libblkid reports an unreadable disk as having no signature, so read the start first.
    let blank = starts_blank(device.as_fd(), offset, size)
        .map_err(|e| failed("the start cannot be read").because(e))?;
    let answer = crate::point::reach(crate::point::Point::Probe)
        .map_err(std::io::Error::from)
        .and_then(|()| blkid::safe_probe(device.as_fd(), offset, size, None))
        .map_err(|e| failed("probing failed").because(e))?;
    match answer {
        Answer::Found(values) => {
            classify(&values).ok_or_else(|| failed("a signature without a type"))
        }
        Answer::Nothing => Ok(without_signature(device.as_fd(), offset)
            .map_err(|e| failed("the start cannot be read").because(e))?
            .map_or(Content::Unknown { blank }, Content::Skip)),
        Answer::Ambivalent => behind_zfs(device.as_fd(), offset, size)
            .map_err(|e| failed("probing failed").because(e))?
            .map(Content::Filesystem)
            .ok_or_else(|| failed(
            "signatures of several kinds. In the guest, `wipefs DEVICE` lists them, and `wipefs --all --types TYPE \
             DEVICE` removes those of the type that it does not use, zfs_member behind an ext4 for example",
        )),
    }
}

/// Returns the only filesystem beside ZFS labels, if those are stale.
///
/// A pool device has four labels, two of them at its start. `mkfs` overwrites the first one and
/// leaves those at the end. If the first label is intact, the filesystem may be the stale one: ZFS
/// does not write to the sectors of its superblock.
fn behind_zfs(
    device: std::os::fd::BorrowedFd<'_>,
    offset: u64,
    size: u64,
) -> std::io::Result<Option<Filesystem>> {
    /// Offset of the first label's configuration.
    const CONFIGURATION: u64 = 16 << 10;
    let mut header = [0; 4];
    let got = rustix::io::pread(device, &mut header, offset + CONFIGURATION)?;
    // A name-value list header, in either byte order.
    if got < header.len() || matches!(header, [1, 0 | 1, 0, 0]) {
        return Ok(None);
    }
    let Answer::Found(values) = blkid::safe_probe(device, offset, size, Some(c"zfs_member"))?
    else {
        return Ok(None);
    };
    Ok(match classify(&values) {
        Some(Content::Filesystem(filesystem)) => Some(Filesystem {
            stale_zfs: true,
            ..filesystem
        }),
        _ => None,
    })
}

/// Identifies content unknown to libblkid by its first bytes.
fn without_signature(
    device: std::os::fd::BorrowedFd<'_>,
    offset: u64,
) -> std::result::Result<Option<SkipReason>, Errno> {
    let mut start = [0; 64];
    let got = rustix::io::pread(device, &mut start, offset)?;
    let start = &start[..got];
    let at = |offset: usize, magic: &[u8]| {
        start
            .get(offset..)
            .is_some_and(|rest| rest.starts_with(magic))
    };
    // An EFI firmware volume that holds variables.
    const EFI_VARIABLES: &[u8] =
        b"\x8d\x2b\xf1\xff\x96\x76\x8b\x4c\xa9\x85\x27\x47\x07\x5b\x4f\x50";
    Ok(if at(16, EFI_VARIABLES) && at(40, b"_FVH") {
        Some(SkipReason::EfiVariables)
    } else if at(0, b"nilmptws") {
        Some(SkipReason::Tpm)
    } else if at(0, b"QFI\xfb") {
        Some(SkipReason::Image("qcow2"))
    } else if at(0, b"KDMV") {
        Some(SkipReason::Image("vmdk"))
    } else if at(0, b"vhdxfile") {
        Some(SkipReason::Image("vhdx"))
    } else if at(0, b"QED\0") {
        Some(SkipReason::Image("qed"))
    } else if at(0, b"<<< ") {
        Some(SkipReason::Image("vdi"))
    } else {
        None
    })
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
    let seed = values.get("LABEL").is_some_and(|label| {
        label.eq_ignore_ascii_case(b"cidata") || label.eq_ignore_ascii_case(b"config-2")
    });
    let skip = match (kind.as_str(), usage.as_str()) {
        // With another filesystem its files are saved.
        ("iso9660", _) if seed => SkipReason::CloudInit,
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
                stale_zfs: false,
                several: false,
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
    fn test_what_libblkid_does_not_know() {
        let efi = b"\x8d\x2b\xf1\xff\x96\x76\x8b\x4c\xa9\x85\x27\x47\x07\x5b\x4f\x50\0\0\x08\0\0\0\0\0_FVH";
        let cases: [(u64, &[u8], SkipReason); 3] = [
            (16, efi, SkipReason::EfiVariables),
            (0, b"nilmptws", SkipReason::Tpm),
            (0, b"QFI\xfb\0\0\0\x03", SkipReason::Image("qcow2")),
        ];
        for (at, bytes, expected) in cases {
            let may_hold_files = matches!(expected, SkipReason::Image(_));
            assert_eq!(expected.may_hold_files(), may_hold_files);
            let found = probe(image(&[(at, bytes)]), "t").unwrap();
            assert_eq!(found, Content::Skip(expected));
        }
    }

    #[test]
    fn test_a_disc_for_cloud_init_holds_no_files() {
        let mut volume = [0; 2048];
        volume[..7].copy_from_slice(b"\x01CD001\x01");
        for (label, expected) in [("cidata", true), ("CIDATA", true), ("GAMES", false)] {
            volume[40..72].fill(b' ');
            volume[40..40 + label.len()].copy_from_slice(label.as_bytes());
            let end = b"\xffCD001\x01";
            let disc = image(&[(16 * 2048, &volume), (17 * 2048, end)]);
            let found = probe(disc, "t").unwrap();
            assert_eq!(
                found == Content::Skip(SkipReason::CloudInit),
                expected,
                "{label}: {found:?}"
            );
        }
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
