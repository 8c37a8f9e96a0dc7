//! Volumes without files, and why.

use crate::disk::VolumeKind;
use crate::fs::{Filesystem, SkipReason, VolumeIdentity};

/// Why there are no files in a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Nothing {
    /// Something else is in it.
    Known(SkipReason),
    /// A physical volume that cannot be used as one.
    DamagedPv,
    /// Its start is blank.
    Blank,
    /// Its partition type holds no filesystem; boot loader data has no signature.
    NotForFiles,
    /// It has no known signature.
    Unknown,
    /// It shows the contents of another volume, which is read.
    Copy(String),
}

impl Nothing {
    pub(super) fn known(reason: SkipReason, kind: &VolumeKind) -> Nothing {
        match (&reason, kind) {
            // In a logical volume it is the disk of a guest of this guest. Anywhere else it would
            // have been found, were it in order.
            (SkipReason::LvmMember, VolumeKind::Whole { .. } | VolumeKind::Partition { .. }) => {
                Nothing::DamagedPv
            }
            _ => Nothing::Known(reason),
        }
    }

    /// Whether files may be lost with it: a database without a filesystem, a filesystem that lost its
    /// superblock, an encrypted volume, or a part of a set that cannot be read from here.
    pub(super) fn may_hold_files(&self) -> bool {
        match self {
            Nothing::Known(reason) => reason.may_hold_files(),
            Nothing::DamagedPv | Nothing::Unknown => true,
            Nothing::Blank | Nothing::NotForFiles | Nothing::Copy(_) => false,
        }
    }

    pub(super) fn unknown(blank: bool, kind: &VolumeKind) -> Nothing {
        match kind {
            _ if blank => Nothing::Blank,
            VolumeKind::Partition { kind, .. } if NOT_FOR_FILES.contains(&kind.as_str()) => {
                Nothing::NotForFiles
            }
            _ => Nothing::Unknown,
        }
    }
}

impl std::fmt::Display for Nothing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Nothing::Known(reason) => reason.fmt(f),
            Nothing::DamagedPv => f.write_str("an LVM physical volume that cannot be read"),
            Nothing::NotForFiles => f.write_str("of a type that holds no files"),
            Nothing::Blank => f.write_str("no known content"),
            Nothing::Unknown => f.write_str("no known content, but not blank"),
            Nothing::Copy(reason) => f.write_str(reason),
        }
    }
}

/// Partition types without files: boot loaders, Microsoft reserved, and swap, which may be encrypted
/// with a new key at each start.
const NOT_FOR_FILES: [&str; 6] = [
    "0x41",
    "0x82",
    "21686148-6449-6e6f-744e-656564454649",
    "9e1a2d38-c612-4316-aa26-8b49521e5a8b",
    "e3c9e316-0b5c-4db8-817d-f92df00215ae",
    "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f",
];

/// A volume without a filesystem in the tree.
pub(super) struct Closed {
    pub(super) name: String,
    pub(super) identity: VolumeIdentity,
    /// Empty where it is unknown.
    pub(super) filesystem: Filesystem,
    /// `None`: it is an error of the job already.
    pub(super) reason: Option<Nothing>,
}

impl Closed {
    pub(super) fn new(name: &str, identity: VolumeIdentity, reason: Option<Nothing>) -> Closed {
        Closed {
            name: name.to_owned(),
            identity,
            filesystem: Filesystem::default(),
            reason,
        }
    }
}

/// Whether it is known of all volumes that they hold no files, and why of one at least: a guest's blank disk may be
/// one that lost its content.
pub(super) fn hold_no_files(closed: &[Closed]) -> bool {
    let nothing = |c: &Closed| c.reason.as_ref().is_some_and(|n| !n.may_hold_files());
    let known = |c: &Closed| matches!(c.reason, Some(Nothing::Known(_)));
    closed.iter().all(nothing) && closed.iter().any(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn partition(number: u32, kind: &str) -> VolumeKind {
        VolumeKind::Partition {
            disk: 0,
            number,
            kind: kind.into(),
            partuuid: None,
            partlabel: None,
        }
    }

    #[test]
    fn test_what_a_volume_without_files_is() {
        let bios = "21686148-6449-6e6f-744e-656564454649";
        let lv = VolumeKind::Lv {
            vg: "vg".into(),
            lv: "db".into(),
            snapshot_of: None,
            uuids: None,
        };
        let linux = partition(1, "0x83");
        assert_eq!(Nothing::unknown(true, &linux), Nothing::Blank);
        assert_eq!(Nothing::unknown(false, &linux), Nothing::Unknown);
        assert_eq!(Nothing::unknown(false, &lv), Nothing::Unknown);
        for kind in [bios, "0x82"] {
            let kind = partition(1, kind);
            assert_eq!(Nothing::unknown(false, &kind), Nothing::NotForFiles);
        }
        let pv = |kind: &VolumeKind| Nothing::known(SkipReason::LvmMember, kind);
        assert_eq!(pv(&linux), Nothing::DamagedPv);
        assert_eq!(pv(&lv), Nothing::Known(SkipReason::LvmMember));
        let swap = Nothing::known(SkipReason::Swap, &linux);
        assert_eq!(swap, Nothing::Known(SkipReason::Swap));
        let holds = |reason| Nothing::known(reason, &linux).may_hold_files();
        assert!(!holds(SkipReason::Swap) && !Nothing::Blank.may_hold_files());
        assert!(holds(SkipReason::Luks) && holds(SkipReason::MdMember) && pv(&lv).may_hold_files());
    }
}
