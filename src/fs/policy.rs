//! Mount policy: filesystem types, options, and superblocks that are refused.

use std::collections::{BTreeMap, BTreeSet};

use std::os::fd::AsFd;

use crate::config::FsPolicy;
use crate::error::{Code, Error, Result, escape};

/// Mount recipe of a type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// Kernel drivers in order of preference.
    pub drivers: &'static [&'static str],
    /// Options: flags (`None`) or with a value. Excludes `ro` and `rw`.
    pub options: Vec<(&'static str, Option<&'static str>)>,
    /// Whether the filesystem is written to.
    pub writable: bool,
    /// Accepted `f_type` values of statfs.
    pub magic: &'static [u32],
}

impl Recipe {
    /// `ro` or `rw`.
    pub fn access(&self) -> &'static str {
        if self.writable { "rw" } else { "ro" }
    }

    /// Reaction of ext to an error. The superblock has no say: `errors=panic` would panic the host.
    /// A damaged filesystem is read as far as it goes, and not written to.
    pub fn at_errors(&self) -> &'static str {
        ext_errors(self.writable)
    }

    /// Options in the form of `mount -o`.
    pub fn describe(&self) -> String {
        let mut text = self.access().to_owned();
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

fn ext_errors(writable: bool) -> &'static str {
    if writable { "remount-ro" } else { "continue" }
}

impl FsPolicy {
    /// Returns the recipe of a type; an error if the type is not mounted.
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
        let ext = vec![("errors", Some(ext_errors(self.writable)))];
        let (drivers, mut options, no_recovery, magic): (&[_], Vec<_>, _, &[_]) = match fstype {
            "ext2" => (&["ext4", "ext2"], ext, None, &[0xef53]),
            "ext3" => (&["ext4", "ext3"], ext, Some(("noload", None)), &[0xef53]),
            "ext4" => (&["ext4"], ext, Some(("noload", None)), &[0xef53]),
            // Clones share a UUID, and their snapshots are mounted at the same time.
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
            // Otherwise the daemon's umask would apply. Short names are shown as in Linux guests by
            // default.
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
        if self.skip_recovery && !self.writable {
            options.extend(no_recovery);
        }
        Ok(Recipe {
            drivers,
            options,
            writable: self.writable,
            magic,
        })
    }
}

/// Offset and length of the ext2/3/4 superblock that is checked.
pub const EXT_SUPERBLOCK: (u64, usize) = (1024, 1024);

/// Reason for refusing a superblock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// It names an external journal; the text describes it.
    Journal(String),
    /// It is truncated.
    CutOff,
}

impl Refusal {
    /// Converts to an error. `cut_off` is the code for a truncated superblock.
    pub fn error(&self, cut_off: Code, what: &str) -> Error {
        match self {
            Refusal::Journal(text) => Error::new(Code::ForeignJournal, format!("{what}: {text}")),
            Refusal::CutOff => Error::new(cut_off, format!("{what}: {self}")),
        }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Refusal::Journal(text) => text,
            Refusal::CutOff => "the superblock is cut off",
        })
    }
}

/// Content that the driver of such a filesystem does not show, so the backup lacks it.
pub fn not_shown(fstype: &str) -> Option<&'static str> {
    match fstype {
        "ntfs" => Some(
            "alternate data streams, owners and access lists of NTFS are not saved: the kernel's driver does not show them",
        ),
        _ => None,
    }
}

/// Refuses an ext superblock that would make the kernel open another device of the host: it finds
/// an external journal by a device number or path that the guest wrote.
pub fn check_ext_superblock(superblock: &[u8]) -> std::result::Result<(), Refusal> {
    let u32_at = |at: usize| {
        superblock
            .get(at..at + 4)
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    };
    const HAS_JOURNAL: u32 = 0x4;
    let features = u32_at(0x5c).ok_or(Refusal::CutOff)?;
    let journal_inode = u32_at(0xe0).ok_or(Refusal::CutOff)?;
    let uuid = superblock.get(0xd0..0xe0).ok_or(Refusal::CutOff)?;
    let mount_options = superblock.get(0x200..0x240).ok_or(Refusal::CutOff)?;
    if features & HAS_JOURNAL != 0 && journal_inode == 0 {
        let text = format!(
            "its journal is on another device, by the UUID {}",
            uuid_text(uuid)
        );
        return Err(Refusal::Journal(text));
    }
    if mount_options.windows(7).any(|w| w == b"journal") {
        let text = "the mount options in its superblock name a journal device (`tune2fs -E mount_opts= DEVICE` in the \
                    guest removes them)";
        return Err(Refusal::Journal(text.to_owned()));
    }
    Ok(())
}

/// Formats a 16-byte UUID like libblkid.
pub(super) fn uuid_text(bytes: &[u8]) -> String {
    let mut text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    for at in [20, 16, 12, 8] {
        if at <= text.len() {
            text.insert(at, '-');
        }
    }
    text
}

/// Offset and length of the XFS superblock that is checked.
pub const XFS_SUPERBLOCK: (u64, usize) = (0, 512);

/// Refuses an XFS with an external log, shown by the missing start of an internal one. The kernel
/// would refuse it with a bare errno.
pub fn check_xfs_superblock(superblock: &[u8]) -> std::result::Result<(), Refusal> {
    let start = superblock.get(0x30..0x38).ok_or(Refusal::CutOff)?;
    if start.iter().all(|byte| *byte == 0) {
        return Err(Refusal::Journal("an XFS with an external log".to_owned()));
    }
    Ok(())
}

/// Refuses an ext superblock that would make `e2fsck` open another device of the host and replay
/// its journal. Unlike the kernel, e2fsck searches for a journal by UUID regardless of other
/// fields.
pub fn check_ext_superblock_for_fsck(superblock: &[u8]) -> std::result::Result<(), Refusal> {
    check_ext_superblock(superblock)?;
    match superblock.get(0xd0..0xe0) {
        Some(uuid) if uuid.iter().all(|byte| *byte == 0) => Ok(()),
        Some(uuid) => Err(Refusal::Journal(format!(
            "its superblock names a journal on another device ({})",
            uuid_text(uuid)
        ))),
        None => Err(Refusal::CutOff),
    }
}

/// Offset and length of the first btrfs superblock that is checked.
pub const BTRFS_SUPERBLOCK: (u64, usize) = (65536, 4096);

/// A btrfs as described by the superblock of one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BtrfsMember {
    /// Filesystem id.
    pub fsid: [u8; 16],
    /// Number of devices.
    pub devices: u64,
    /// Id of this device.
    pub number: u64,
    /// UUIDs, by device id, of the devices that hold the chunk tree.
    pub uuids: BTreeMap<u64, [u8; 16]>,
}

impl BtrfsMember {
    /// Reads the superblock of an open device. `what` names it for the error.
    pub fn read(device: impl AsFd, what: &str) -> Result<BtrfsMember> {
        let failed = |why: &str| {
            let text = format!("{what}: reading the superblock of the btrfs{why}");
            Error::new(Code::MountFailed, text)
        };
        let (offset, length) = BTRFS_SUPERBLOCK;
        let mut superblock = vec![0; length];
        let got = rustix::io::pread(device, &mut superblock, offset)
            .map_err(|error| failed("").because(error))?;
        superblock.truncate(got);
        BtrfsMember::parse(&superblock).ok_or_else(|| failed(": it is cut off"))
    }

    /// `None`: the superblock is truncated.
    pub fn parse(superblock: &[u8]) -> Option<BtrfsMember> {
        let u64_at = |at: usize| {
            let bytes = superblock.get(at..at + 8)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        let id_at = |at: usize| <[u8; 16]>::try_from(superblock.get(at..at + 16)?).ok();
        let number = u64_at(0xc9)?;
        let mut uuids = system_stripes(superblock);
        uuids.insert(number, id_at(0x10b)?);
        Some(BtrfsMember {
            fsid: id_at(0x20)?,
            devices: u64_at(0x88)?,
            number,
            uuids,
        })
    }

    /// Brings the devices of each filesystem together. Those that are not exactly one whole filesystem come
    /// with the reason.
    pub fn sets<T>(members: Vec<(T, BtrfsMember)>) -> (Vec<Vec<T>>, Vec<(T, String)>) {
        let mut sets: Vec<(Vec<T>, Vec<BtrfsMember>)> = Vec::new();
        for (one, member) in members {
            match sets.iter_mut().find(|(_, of)| of[0].fsid == member.fsid) {
                Some((set, of)) => {
                    set.push(one);
                    of.push(member);
                }
                None => sets.push((vec![one], vec![member])),
            }
        }
        let (mut whole, mut parts) = (Vec::new(), Vec::new());
        for (set, members) in sets {
            let Some(why) = BtrfsMember::incomplete(&members.iter().collect::<Vec<_>>()) else {
                whole.push(set);
                continue;
            };
            parts.extend(set.into_iter().zip(members).map(|(one, member)| {
                let (number, devices) = (member.number, member.devices);
                (
                    one,
                    format!("device {number} of a btrfs over {devices}; {why}"),
                )
            }));
        }
        (whole, parts)
    }

    /// Why these devices are not exactly one whole filesystem; `None`: they are. All have one id.
    pub fn incomplete(members: &[&BtrfsMember]) -> Option<String> {
        let first = members.first()?;
        let mut numbers = BTreeSet::new();
        if let Some(twice) = members.iter().find(|m| !numbers.insert(m.number)) {
            return Some(format!("two volumes are its device {}", twice.number));
        }
        if members.iter().any(|m| m.devices != first.devices) {
            return Some("its devices do not agree how many there are".to_owned());
        }
        let there = members.len() as u64;
        if there == first.devices {
            return None;
        }
        if there > first.devices {
            return Some(format!("{there} volumes say that they are of it"));
        }
        let missing = members.iter().flat_map(|m| &m.uuids);
        let missing: BTreeMap<_, _> = missing.filter(|(n, _)| !numbers.contains(n)).collect();
        let named = missing
            .iter()
            .map(|(n, uuid)| format!("device {n} (UUID {})", uuid_text(*uuid)));
        let mut named: Vec<String> = named.collect();
        let unnamed = (first.devices - there).saturating_sub(named.len() as u64);
        if unnamed > 0 {
            let there: Vec<String> = numbers.iter().map(u64::to_string).collect();
            named.push(format!(
                "{unnamed} beside those with the numbers {}",
                there.join(", ")
            ));
        }
        Some(format!("missing: {}", named.join(", ")))
    }
}

/// Devices in the system chunk array of a btrfs superblock. It covers every device that holds the
/// chunk tree.
fn system_stripes(superblock: &[u8]) -> BTreeMap<u64, [u8; 16]> {
    const AT: usize = 0x32b;
    const LONGEST: usize = 2048;
    /// A key, then a chunk header, then stripes of 32 bytes each.
    const KEY: usize = 17;
    const CHUNK: usize = 48;
    const STRIPE: usize = 32;
    let mut found = BTreeMap::new();
    let length = superblock.get(0xa0..0xa4).and_then(|b| b.try_into().ok());
    let length = length.map_or(0, u32::from_le_bytes) as usize;
    let mut rest = superblock
        .get(AT..)
        .and_then(|list| list.get(..length.min(LONGEST)))
        .unwrap_or_default();
    while let Some(chunk) = rest.get(KEY..).filter(|chunk| chunk.len() >= CHUNK) {
        let stripes = usize::from(u16::from_le_bytes([chunk[44], chunk[45]]));
        for stripe in chunk[CHUNK..].chunks_exact(STRIPE).take(stripes) {
            let number = stripe[..8].try_into().map(u64::from_le_bytes);
            if let (Ok(number), Ok(uuid)) = (number, stripe[16..].try_into()) {
                found.insert(number, uuid);
            }
        }
        rest = rest
            .get(KEY + CHUNK + stripes * STRIPE..)
            .unwrap_or_default();
    }
    found
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
                let writable = FsPolicy {
                    writable: true,
                    ..policy.clone()
                };
                let text = writable.recipe(fstype).unwrap().describe();
                assert_eq!(text, "rw,errors=remount-ro");
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
        assert_eq!(
            check_ext_superblock(&superblock[..100]),
            Err(Refusal::CutOff)
        );
    }

    #[test]
    fn test_a_missing_device_of_a_btrfs_is_named() {
        let mut superblock = vec![0_u8; 4096];
        superblock[0x20..0x30].fill(0xab);
        superblock[0x88] = 3;
        superblock[0xc9] = 1;
        superblock[0x10b..0x11b].fill(1);
        // One chunk with two stripes, on devices 1 and 2.
        superblock[0xa0] = 17 + 48 + 64;
        let chunk = 0x32b + 17;
        superblock[chunk + 44] = 2;
        superblock[chunk + 48] = 1;
        superblock[chunk + 48 + 32] = 2;
        superblock[chunk + 48 + 48..chunk + 48 + 64].fill(0x22);
        let one = BtrfsMember::parse(&superblock).unwrap();
        assert_eq!(
            BtrfsMember::incomplete(&[&one]).unwrap(),
            "missing: device 2 (UUID 22222222-2222-2222-2222-222222222222), 1 beside those with the numbers 1"
        );
        let with = |number| BtrfsMember {
            number,
            ..one.clone()
        };
        assert_eq!(BtrfsMember::incomplete(&[&one, &with(2), &with(9)]), None);
        for wrong in [vec![1, 1, 2], vec![1, 2, 3, 4]] {
            let members: Vec<_> = wrong.into_iter().map(with).collect();
            assert!(BtrfsMember::incomplete(&members.iter().collect::<Vec<_>>()).is_some());
        }
        // Arbitrary bytes of any length.
        for length in 0..superblock.len() {
            BtrfsMember::parse(&superblock[..length]);
        }
        superblock[0xa0..0xa4].fill(0xff);
        superblock[0x32b..].fill(0xff);
        assert!(BtrfsMember::parse(&superblock).is_some());
    }

    #[test]
    fn test_what_a_driver_does_not_show_is_told() {
        assert!(not_shown("ntfs").is_some_and(|text| text.contains("alternate data streams")));
        assert_eq!(not_shown("ext4"), None);
    }
}
