//! btrfs on one device. Fields and bits: Linux, `include/uapi/linux/btrfs_tree.h`; words: mkfs.btrfs(8).

use serde::{Deserialize, Serialize};

use super::{Argv, Described, Recipe, argv, label, uuid};
use crate::disk::le::{array, u16_at, u32_at, u64_at};

const AT: usize = 0x1_0000;

/// Features that mkfs.btrfs can be told: incompatible bit, or with `RO` a compatible one, and the word.
pub(super) const FEATURES: &[(u64, &str)] = &[
    (0x4, "mixed-bg"),
    (0x40, "extref"),
    (0x100, "skinny-metadata"),
    (0x200, "no-holes"),
    (RO | 0x1, "free-space-tree"),
    (RO | 0x8, "block-group-tree"),
];

/// Marks a bit of the word of read-only compatible features.
const RO: u64 = 1 << 63;

/// Incompatible bits that follow from contents: old references, a default subvolume, compression, large
/// metadata, a second UUID.
const CONTENTS: u64 = 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x400;
/// Like `CONTENTS`, read-only compatible: a valid free space tree, files with verity.
const RO_CONTENTS: u64 = 0x2 | 0x4;

const CHECKSUMS: [&str; 4] = ["crc32c", "xxhash", "sha256", "blake2"];

/// The properties of a btrfs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Btrfs {
    /// UUID.
    pub uuid: String,
    /// Label; empty: none.
    pub label: String,
    /// Bytes.
    pub bytes: u64,
    /// Bytes of a metadata block.
    pub node_size: u32,
    /// Bytes of a sector.
    pub sector_size: u32,
    /// `crc32c`, `xxhash`, `sha256` or `blake2`.
    pub checksum: String,
    /// Features by name.
    pub features: Vec<String>,
    /// Whether data is stored twice.
    pub data_twice: bool,
    /// Whether metadata is stored twice.
    pub metadata_twice: bool,
}

pub(super) fn parse(head: &[u8]) -> Option<Result<Described, String>> {
    let sb = head.get(AT..)?;
    if sb.get(0x40..0x48)? != b"_BHRfS_M" {
        return None;
    }
    let mut lost = Vec::new();
    let parsed =
        fields(sb, &mut lost).unwrap_or_else(|| Err("its superblock is damaged".to_owned()));
    Some(parsed.map(|btrfs| Described {
        recipe: Recipe::Btrfs(btrfs),
        lost,
    }))
}

fn fields(sb: &[u8], lost: &mut Vec<String>) -> Option<Result<Btrfs, String>> {
    if u64_at(sb, 0x88)? != 1 {
        return Some(Err(
            "a btrfs over several devices is not made again".to_owned()
        ));
    }
    let (mut incompat, mut ro) = (
        u64_at(sb, 0xbc)? & !CONTENTS,
        u64_at(sb, 0xb4)? & !RO_CONTENTS,
    );
    let mut features = Vec::new();
    for (bit, name) in FEATURES {
        let word = if bit & RO != 0 {
            &mut ro
        } else {
            &mut incompat
        };
        if *word & bit & !RO != 0 {
            *word &= !bit;
            features.push((*name).to_owned());
        }
    }
    if (incompat, ro) != (0, 0) {
        return Some(Err(format!(
            "its features {incompat:#x}, {ro:#x} are not known"
        )));
    }
    let checksum = CHECKSUMS.get(usize::from(u16_at(sb, 0xc4)?))?;
    Some(Ok(Btrfs {
        uuid: uuid(array(sb, 0x20)?),
        label: label(sb.get(0x12b..0x12b + 256)?, lost),
        bytes: u64_at(sb, 0x70)?,
        node_size: u32_at(sb, 0x94)?,
        sector_size: u32_at(sb, 0x90)?,
        checksum: (*checksum).to_owned(),
        // Only the mounted filesystem tells. Mixed groups have one profile.
        data_twice: false,
        metadata_twice: !features.iter().any(|f| f == "mixed-bg"),
        features,
    }))
}

impl Btrfs {
    /// Checks the words that become arguments, beside label and features.
    pub(super) fn check_words(&self) -> Result<(), String> {
        match CHECKSUMS.contains(&self.checksum.as_str()) {
            true => Ok(()),
            false => Err(format!("checksum {:?}", self.checksum)),
        }
    }

    /// `runtime`: in the words of btrfs-progs before 6.3, which have a separate option for read-only
    /// compatible features.
    pub(super) fn command(&self, device: &str, runtime: bool) -> Argv {
        let on = |name: &str| self.features.iter().any(|f| f == name);
        let word = |name: &str| format!("{}{name}", if on(name) { "" } else { "^" });
        let mut features = ["extref", "skinny-metadata", "no-holes"].map(word).to_vec();
        // Older programs do not know the last one: it is named only if it is wanted.
        let tree = on("block-group-tree").then(|| "block-group-tree".to_owned());
        let newer = [word("free-space-tree")].into_iter().chain(tree);
        let mut runtimes = Vec::new();
        if runtime {
            runtimes.extend(newer);
        } else {
            features.extend(newer);
        }
        let profile = |twice| if twice { "dup" } else { "single" }.to_owned();
        let mut rest = vec!["-f".to_owned(), "-q".to_owned(), "-K".to_owned()];
        rest.extend(on("mixed-bg").then(|| "-M".to_owned()));
        rest.push(device.to_owned());
        argv(
            "mkfs.btrfs",
            &[
                ("-U", self.uuid.clone()),
                ("-L", self.label.clone()),
                ("-b", self.bytes.to_string()),
                ("-n", self.node_size.to_string()),
                ("-s", self.sector_size.to_string()),
                ("--csum", self.checksum.clone()),
                ("-d", profile(self.data_twice)),
                ("-m", profile(self.metadata_twice)),
                ("-O", features.join(",")),
                ("-R", runtimes.join(",")),
            ],
            &rest,
        )
    }
}
