//! How to make a filesystem: a superblock's properties, and the commands.

use std::io;

use serde::{Deserialize, Serialize};

use super::{Btrfs, Ext, Fat, Swap, Xfs, btrfs, ext, fat, swap, xfs};
use crate::disk::ReadAt;

/// Bytes from a volume's start that hold all superblocks read here.
const HEAD: u64 = 0x1_0000 + 4096;

/// How to make a filesystem or swap area.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Recipe {
    /// ext2, ext3 or ext4.
    Ext(Ext),
    /// XFS.
    Xfs(Xfs),
    /// btrfs on one device.
    Btrfs(Btrfs),
    /// FAT.
    Vfat(Fat),
    /// Swap.
    Swap(Swap),
}

/// A recipe, with the properties that it does not keep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    /// The recipe.
    pub recipe: Recipe,
    /// Properties that are not in it.
    pub lost: Vec<String>,
}

/// A program and its arguments.
pub type Argv = Vec<String>;

impl Recipe {
    /// The type, as fstab names it.
    pub fn fstype(&self) -> &str {
        match self {
            Recipe::Ext(ext) => ext.fstype(),
            Recipe::Xfs(_) => "xfs",
            Recipe::Btrfs(_) => "btrfs",
            Recipe::Vfat(_) => "vfat",
            Recipe::Swap(_) => "swap",
        }
    }

    /// The UUID, as fstab names it.
    pub fn uuid(&self) -> &str {
        match self {
            Recipe::Ext(ext) => &ext.uuid,
            Recipe::Xfs(xfs) => &xfs.uuid,
            Recipe::Btrfs(btrfs) => &btrfs.uuid,
            Recipe::Vfat(fat) => &fat.uuid,
            Recipe::Swap(swap) => &swap.uuid,
        }
    }

    /// The commands that make it on a device, in order.
    pub fn commands(&self, device: &str) -> Vec<Argv> {
        match self {
            Recipe::Ext(ext) => ext.commands(device),
            Recipe::Xfs(xfs) => vec![xfs.command(device)],
            Recipe::Btrfs(btrfs) => vec![btrfs.command(device, false)],
            Recipe::Vfat(fat) => vec![fat.command(device)],
            Recipe::Swap(swap) => vec![swap.command(device)],
        }
    }

    /// Makes it larger, as far as its kind grows: FAT and swap keep their size.
    pub(in crate::kit) fn grow(&mut self, bytes: u64) {
        match self {
            Recipe::Ext(ext) => ext.grow(bytes),
            Recipe::Xfs(xfs) => xfs.grow(bytes),
            Recipe::Btrfs(btrfs) => {
                btrfs.bytes = bytes - bytes % u64::from(btrfs.sector_size.max(1))
            }
            Recipe::Vfat(_) | Recipe::Swap(_) => {}
        }
    }

    /// A second command to try if the first one fails, and the property it loses. Programs raise their minimum of an XFS
    /// log from time to time, and those of btrfs have changed an option's name.
    pub fn second_try(&self, device: &str) -> Option<(Argv, Option<&'static str>)> {
        match self {
            Recipe::Xfs(xfs) => {
                let other = Xfs {
                    log_blocks: 0,
                    ..xfs.clone()
                };
                let lost = "its log has the size that this host's mkfs.xfs chooses";
                Some((other.command(device), Some(lost)))
            }
            Recipe::Btrfs(btrfs) => Some((btrfs.command(device, true), None)),
            _ => None,
        }
    }

    /// Checks a recipe that was read from a file: text that becomes an argument must look like one.
    pub fn check(&self) -> Result<(), String> {
        let uuid = self.uuid();
        if !(uuid.len() <= 36 && uuid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')) {
            return Err(format!("UUID {uuid:?}"));
        }
        let (label, words): (&str, &[String]) = match self {
            Recipe::Ext(ext) => (&ext.label, &ext.features),
            Recipe::Xfs(xfs) => (&xfs.label, &[]),
            Recipe::Btrfs(btrfs) => (&btrfs.label, &btrfs.features),
            Recipe::Vfat(fat) => (&fat.label, &[]),
            Recipe::Swap(swap) => (&swap.label, &[]),
        };
        if !is_label(label) {
            return Err(format!("label {label:?}"));
        }
        let known = |word: &String| match self {
            Recipe::Ext(_) => ext::FEATURES.iter().any(|(_, _, name)| name == word),
            _ => btrfs::FEATURES.iter().any(|(_, name)| name == word),
        };
        if let Some(word) = words.iter().find(|word| !known(word)) {
            return Err(format!("feature {word:?}"));
        }
        match self {
            Recipe::Ext(ext) => ext.check_words(),
            Recipe::Btrfs(btrfs) => btrfs.check_words(),
            Recipe::Xfs(_) | Recipe::Vfat(_) | Recipe::Swap(_) => Ok(()),
        }
    }
}

/// Reads the superblock of a volume that holds this type. `Ok(None)`: the type is not made again;
/// `Ok(Some(Err(…)))`: it would be, but this one cannot be described.
pub fn read(fstype: &str, volume: &dyn ReadAt) -> io::Result<Option<Result<Described, String>>> {
    let len = usize::try_from(HEAD.min(volume.size())).map_err(io::Error::other)?;
    let mut head = vec![0; len];
    volume.read_exact_at(&mut head, 0)?;
    Ok(parse(fstype, &head))
}

/// Reads a superblock from the first bytes of a volume.
pub fn parse(fstype: &str, head: &[u8]) -> Option<Result<Described, String>> {
    let found = match fstype {
        "ext2" | "ext3" | "ext4" => ext::parse(head),
        "xfs" => xfs::parse(head),
        "btrfs" => btrfs::parse(head),
        "vfat" => fat::parse(head),
        "swap" => swap::parse(head),
        _ => return None,
    };
    Some(found.unwrap_or_else(|| Err("its superblock is not legible".to_owned())))
}

/// A label that programs take: text without control characters. Others are left out and told.
pub(in crate::kit) fn label(bytes: &[u8], lost: &mut Vec<String>) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    match std::str::from_utf8(&bytes[..end]) {
        Ok(text) if is_label(text) => text.to_owned(),
        _ => {
            lost.push("its label, which is not text".to_owned());
            String::new()
        }
    }
}

fn is_label(text: &str) -> bool {
    text.len() <= 255 && !text.chars().any(char::is_control) && !text.starts_with('-')
}

/// A UUID as text.
pub(super) fn uuid(bytes: [u8; 16]) -> String {
    let hex: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    let groups = [0..4, 4..6, 6..8, 8..10, 10..16];
    groups.map(|group| hex[group].concat()).join("-")
}

pub(super) fn argv(program: &str, options: &[(&str, String)], rest: &[String]) -> Argv {
    let options = options
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .flat_map(|(option, value)| [(*option).to_owned(), value.clone()]);
    [program.to_owned()]
        .into_iter()
        .chain(options)
        .chain(rest.iter().cloned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_hostile_words_become_no_arguments() {
        let swap = |label: &str, uuid: &str| {
            Recipe::Swap(Swap {
                uuid: uuid.to_owned(),
                label: label.to_owned(),
                page_size: 4096,
            })
        };
        let good = "0b7ad1e2-3c5e-4d2a-9c81-2f0de6c4a111";
        assert_eq!(swap("swap 1", good).check(), Ok(()));
        assert!(swap("-f", good).check().is_err());
        assert!(swap("a\nb", good).check().is_err());
        assert!(swap("a", "--help").check().is_err());
        assert!(swap("a", "1 2").check().is_err());
    }

    #[test]
    fn test_bytes_of_any_kind_are_no_panic() {
        let mut head = vec![0xFF; 70_000];
        head[..4].copy_from_slice(b"XFSB");
        head[1080..1082].copy_from_slice(&[0x53, 0xEF]);
        head[0x1_0040..0x1_0048].copy_from_slice(b"_BHRfS_M");
        head[4086..4096].copy_from_slice(b"SWAPSPACE2");
        for fstype in ["ext4", "xfs", "btrfs", "vfat", "swap"] {
            for len in (0..head.len()).step_by(61) {
                let read = parse(fstype, &head[..len]).unwrap();
                assert!(read.is_err() || len > 1024, "{fstype} of {len} bytes");
            }
        }
        assert_eq!(parse("ntfs", &head), None);
    }
}
