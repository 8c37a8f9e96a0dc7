//! ext2, ext3 and ext4. Fields and bits: Linux, `fs/ext4/ext4.h`; words: mke2fs(8), tune2fs(8).

use serde::{Deserialize, Serialize};

use super::{Argv, Described, Recipe, argv, label, uuid};
use crate::disk::le::{array, u16_at, u32_at};

/// Offset of the superblock, and its size.
const AT: usize = 1024;
const SIZE: usize = 1024;

/// Feature bits: the word (0: compatible, 1: incompatible, 2: read-only compatible), the bit, the name for mke2fs.
pub(super) const FEATURES: &[(usize, u32, &str)] = &[
    (0, 0x4, "has_journal"),
    (0, 0x8, "ext_attr"),
    (0, 0x10, "resize_inode"),
    (0, 0x20, "dir_index"),
    (0, 0x200, "sparse_super2"),
    (0, 0x400, "fast_commit"),
    (0, 0x800, "stable_inodes"),
    (0, 0x1000, "orphan_file"),
    (1, 0x2, "filetype"),
    (1, 0x10, "meta_bg"),
    (1, 0x40, "extent"),
    (1, 0x80, "64bit"),
    (1, 0x100, "mmp"),
    (1, 0x200, "flex_bg"),
    (1, 0x400, "ea_inode"),
    (1, 0x2000, "metadata_csum_seed"),
    (1, 0x4000, "large_dir"),
    (1, 0x8000, "inline_data"),
    (1, 0x1_0000, "encrypt"),
    (1, 0x2_0000, "casefold"),
    (2, 0x1, "sparse_super"),
    (2, 0x2, "large_file"),
    (2, 0x8, "huge_file"),
    (2, 0x10, "uninit_bg"),
    (2, 0x20, "dir_nlink"),
    (2, 0x40, "extra_isize"),
    (2, 0x100, "quota"),
    (2, 0x200, "bigalloc"),
    (2, 0x400, "metadata_csum"),
    (2, 0x2000, "project"),
    (2, 0x8000, "verity"),
];

/// Bits that describe a state and not a property: a journal to replay, an orphan file in use.
const STATES: [u32; 3] = [0, 0x4, 0x1_0000];

/// Default mount options: the bit and its name for tune2fs.
const MOUNT_OPTIONS: &[(u32, &str)] = &[
    (0x1, "debug"),
    (0x2, "bsdgroups"),
    (0x4, "user_xattr"),
    (0x8, "acl"),
    (0x10, "uid16"),
    (0x100, "nobarrier"),
    (0x200, "block_validity"),
    (0x400, "discard"),
    (0x800, "nodelalloc"),
];

/// Journal modes: the value of the mode bits and its name for tune2fs.
const JOURNAL_MODES: &[(u32, &str)] = &[
    (0x20, "journal_data"),
    (0x40, "journal_data_ordered"),
    (0x60, "journal_data_writeback"),
];

/// The properties of an ext2, ext3 or ext4.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ext {
    /// UUID.
    pub uuid: String,
    /// Label; empty: none.
    pub label: String,
    /// Bytes of a block.
    pub block_size: u64,
    /// Blocks.
    pub blocks: u64,
    /// Blocks of a group.
    pub blocks_per_group: u32,
    /// Bytes of an inode.
    pub inode_size: u32,
    /// Inodes.
    pub inodes: u32,
    /// Features by name.
    pub features: Vec<String>,
    /// Bytes of a cluster, with bigalloc.
    pub cluster_size: Option<u64>,
    /// Groups packed together, with flex_bg.
    pub flex_groups: Option<u32>,
    /// Bytes of the journal.
    pub journal: Option<u64>,
    /// Reserved blocks.
    pub reserved: u64,
    /// User and group that may use them.
    pub reserved_for: (u16, u16),
    /// Default mount options by name.
    pub mount_options: Vec<String>,
    /// `continue`, `remount-ro` or `panic`.
    pub errors: String,
    /// Mounts between checks; -1: none.
    pub check_mounts: i16,
    /// Seconds between checks; 0: none.
    pub check_seconds: u32,
    /// Blocks of a RAID chunk, and of a stripe.
    pub stride: (u16, u32),
    /// Seed of the directory hash.
    pub hash_seed: String,
    /// Whether names in folders that ignore case must be valid UTF-8.
    pub strict_names: bool,
    /// Quota types: `usrquota`, `grpquota`, `prjquota`.
    pub quota: Vec<String>,
}

pub(super) fn parse(head: &[u8]) -> Option<Result<Described, String>> {
    let sb = head.get(AT..AT + SIZE)?;
    if u16_at(sb, 56)? != 0xEF53 {
        return None;
    }
    Some(features(sb).and_then(|features| {
        let mut lost = Vec::new();
        let ext = fields(sb, features, &mut lost).ok_or("its superblock is damaged")?;
        let recipe = Recipe::Ext(ext);
        Ok(Described { recipe, lost })
    }))
}

/// The names of the features. The error names those that are not known.
fn features(sb: &[u8]) -> Result<Vec<String>, String> {
    let words = [92, 96, 100].map(|at| u32_at(sb, at).unwrap_or(u32::MAX));
    if words[1] & 0x8 != 0 {
        return Err("an external journal is not made again".to_owned());
    }
    let mut names = Vec::new();
    let mut rest = words;
    for (word, state) in rest.iter_mut().zip(STATES) {
        *word &= !state;
    }
    for (word, bit, name) in FEATURES {
        if rest[*word] & bit != 0 {
            rest[*word] &= !bit;
            names.push((*name).to_owned());
        }
    }
    match rest {
        [0, 0, 0] => Ok(names),
        [a, b, c] => Err(format!("its features {a:#x}, {b:#x}, {c:#x} are not known")),
    }
}

fn fields(sb: &[u8], features: Vec<String>, lost: &mut Vec<String>) -> Option<Ext> {
    let has = |name: &str| features.iter().any(|one| one == name);
    let high = |at| match has("64bit") {
        true => Some(u64::from(u32_at(sb, at)?) << 32),
        false => Some(0),
    };
    let shift = |at, least: u64| Some(least << u32_at(sb, at).filter(|log| *log <= 20)?);
    let options = u32_at(sb, 256)?;
    let mode = JOURNAL_MODES.iter().find(|(m, _)| options & 0x60 == *m);
    let named = MOUNT_OPTIONS.iter().filter(|(bit, _)| options & bit != 0);
    let block_size = shift(24, 1024)?;
    if sb.get(512..576)?.iter().any(|b| *b != 0) {
        lost.push("its extended mount options".to_owned());
    }
    let quota = [(576, "usrquota"), (580, "grpquota"), (620, "prjquota")];
    let quota = quota.iter().filter(|(at, _)| u32_at(sb, *at) != Some(0));
    let flex = *sb.get(372)?;
    Some(Ext {
        uuid: uuid(array(sb, 104)?),
        label: label(sb.get(120..136)?, lost),
        block_size,
        blocks: u64::from(u32_at(sb, 4)?) | high(336)?,
        blocks_per_group: u32_at(sb, 32)?,
        inode_size: if u32_at(sb, 76)? == 0 {
            128
        } else {
            u16_at(sb, 88)?.into()
        },
        inodes: u32_at(sb, 0)?,
        cluster_size: if has("bigalloc") {
            Some(shift(28, 1024)?)
        } else {
            None
        },
        flex_groups: if has("flex_bg") {
            1u32.checked_shl(flex.into())
        } else {
            None
        },
        journal: journal(sb, has("has_journal"), lost),
        reserved: u64::from(u32_at(sb, 8)?) | high(340)?,
        reserved_for: (u16_at(sb, 80)?, u16_at(sb, 82)?),
        mount_options: mode
            .map(|(_, name)| name)
            .into_iter()
            .chain(named.map(|(_, name)| name))
            .map(|name| (*name).to_owned())
            .collect(),
        errors: match u16_at(sb, 60)? {
            2 => "remount-ro",
            3 => "panic",
            _ => "continue",
        }
        .to_owned(),
        check_mounts: i16::from_le_bytes(array(sb, 54)?),
        check_seconds: u32_at(sb, 68)?,
        stride: (u16_at(sb, 356)?, u32_at(sb, 368)?),
        hash_seed: uuid(array(sb, 236)?),
        strict_names: has("casefold") && u16_at(sb, 638)? & 1 != 0,
        quota: match has("quota") {
            true => quota.map(|(_, name)| (*name).to_owned()).collect(),
            false => Vec::new(),
        },
        features,
    })
}

/// Bytes of the journal, from the copy of its inode.
fn journal(sb: &[u8], has: bool, lost: &mut Vec<String>) -> Option<u64> {
    if !has {
        return None;
    }
    let copied = *sb.get(253)? == 1;
    let size = u64::from(u32_at(sb, 268 + 60)?) << 32 | u64::from(u32_at(sb, 268 + 64)?);
    if !copied || size == 0 {
        lost.push("the size of its journal".to_owned());
    }
    (copied && size != 0).then_some(size)
}

impl Ext {
    pub(super) fn fstype(&self) -> &'static str {
        // ext3 is a driver that knows these incompatible and read-only compatible features; libblkid names by that.
        const OF_EXT3: [&str; 4] = ["filetype", "meta_bg", "sparse_super", "large_file"];
        let known = |name: &String| FEATURES.iter().find(|(_, _, known)| known == name);
        let is_new = |name: &String| {
            known(name).is_some_and(|(word, _, name)| *word > 0 && !OF_EXT3.contains(name))
        };
        if self.features.iter().any(is_new) {
            "ext4"
        } else if self.features.iter().any(|name| name == "has_journal") {
            "ext3"
        } else {
            "ext2"
        }
    }

    /// Keeps the ratio of inodes to blocks.
    pub(super) fn grow(&mut self, bytes: u64) {
        let blocks = bytes / self.block_size.max(1);
        if blocks > self.blocks && self.blocks > 0 {
            let inodes = u128::from(self.inodes) * u128::from(blocks) / u128::from(self.blocks);
            self.inodes = u32::try_from(inodes).unwrap_or(u32::MAX);
            self.blocks = blocks;
        }
    }

    /// Checks the words that become parts of arguments, beside label and features.
    pub(super) fn check_words(&self) -> Result<(), String> {
        let hex = |c: char| c.is_ascii_hexdigit() || c == '-';
        if self.hash_seed.len() > 36 || !self.hash_seed.chars().all(hex) {
            return Err(format!("hash seed {:?}", self.hash_seed));
        }
        if !["continue", "remount-ro", "panic"].contains(&self.errors.as_str()) {
            return Err(format!("at errors {:?}", self.errors));
        }
        let known = ["usrquota", "grpquota", "prjquota"];
        match self.quota.iter().find(|one| !known.contains(&one.as_str())) {
            Some(one) => Err(format!("quota {one:?}")),
            None => Ok(()),
        }
    }

    pub(super) fn commands(&self, device: &str) -> Vec<Argv> {
        let mut extended = vec![
            format!("hash_seed={}", self.hash_seed),
            "nodiscard".to_owned(),
        ];
        let mut extend = |name: &str, value: u64| {
            if value != 0 {
                extended.push(format!("{name}={value}"));
            }
        };
        extend("stride", self.stride.0.into());
        extend("stripe_width", self.stride.1.into());
        if !self.quota.is_empty() {
            extended.push(format!("quotatype={}", self.quota.join(":")));
        }
        if self.features.iter().any(|f| f == "casefold") {
            extended.push("encoding=utf8".to_owned());
            extended.extend(
                self.strict_names
                    .then(|| "encoding_flags=strict".to_owned()),
            );
        }
        let optional = |value: Option<u64>| value.map_or_else(String::new, |v| v.to_string());
        let group = u64::from(self.blocks_per_group);
        let usual = group == self.block_size.saturating_mul(8) || self.cluster_size.is_some();
        // In whole MiB. The program adds the area for fast commits.
        let journal = self.journal.map(|bytes| (bytes >> 20).max(1));
        let make = argv(
            "mke2fs",
            &[
                ("-b", self.block_size.to_string()),
                ("-I", self.inode_size.to_string()),
                ("-N", self.inodes.to_string()),
                ("-O", ["none", &self.features.join(",")].join(",")),
                ("-E", extended.join(",")),
                ("-U", self.uuid.clone()),
                ("-L", self.label.clone()),
                ("-e", self.errors.clone()),
                ("-m", "0".to_owned()),
                (
                    "-g",
                    if usual {
                        String::new()
                    } else {
                        group.to_string()
                    },
                ),
                ("-C", optional(self.cluster_size)),
                ("-G", optional(self.flex_groups.map(u64::from))),
                (
                    "-J",
                    journal.map_or_else(String::new, |mib| format!("size={mib}")),
                ),
            ],
            &[
                "-F".to_owned(),
                "-q".to_owned(),
                device.to_owned(),
                self.blocks.to_string(),
            ],
        );
        let all = MOUNT_OPTIONS.iter().map(|(_, name)| *name);
        let options = all.map(|name| match self.mount_options.iter().any(|o| o == name) {
            true => name.to_owned(),
            false => format!("^{name}"),
        });
        let mode = JOURNAL_MODES.iter().map(|(_, name)| (*name).to_owned());
        let mode = mode.filter(|name| self.mount_options.contains(name));
        let tune = argv(
            "tune2fs",
            &[
                ("-o", options.chain(mode).collect::<Vec<_>>().join(",")),
                ("-r", self.reserved.to_string()),
                ("-u", self.reserved_for.0.to_string()),
                ("-g", self.reserved_for.1.to_string()),
                ("-c", self.check_mounts.to_string()),
                ("-i", format!("{}s", self.check_seconds)),
            ],
            &[device.to_owned()],
        );
        vec![make, tune]
    }
}
