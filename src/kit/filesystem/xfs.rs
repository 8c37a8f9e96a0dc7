//! XFS. Fields and bits: Linux, `fs/xfs/libxfs/xfs_format.h`; words: mkfs.xfs(8).

use serde::{Deserialize, Serialize};

use super::{Argv, Described, Recipe, argv, label, uuid};
use crate::disk::le::array;
use crate::kit::be::{u16_at, u32_at, u64_at};

/// Read-only compatible features of version 5: the bit, and mkfs's option and word.
const RO_COMPAT: &[(u32, &str)] = &[
    (1, "finobt"),
    (2, "rmapbt"),
    (4, "reflink"),
    (8, "inobtcount"),
];

/// Smaller filesystems and logs, and single groups, are made by a special option, since xfsprogs 5.19.
const SMALL: u64 = 300 << 20;
const SMALL_LOG: u64 = 64 << 20;

/// The properties of an XFS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Xfs {
    /// UUID.
    pub uuid: String,
    /// Label; empty: none.
    pub label: String,
    /// 4 or 5.
    pub version: u8,
    /// Bytes of a block.
    pub block_size: u32,
    /// Blocks.
    pub blocks: u64,
    /// Allocation groups.
    pub groups: u32,
    /// Bytes of a sector.
    pub sector_size: u32,
    /// Bytes of an inode.
    pub inode_size: u32,
    /// Bytes of a directory block.
    pub directory_size: u64,
    /// Highest share of the space for inodes, in percent.
    pub inode_percent: u8,
    /// Blocks of the log; 0: as many as the program chooses.
    pub log_blocks: u32,
    /// Bytes of a stripe of the log; up to 1: none.
    pub log_stripe: u32,
    /// Blocks of a RAID chunk, and of a stripe.
    pub stripe: (u32, u32),
    /// Whether folders hold the type of each name.
    pub ftype: bool,
    /// Whether names ignore the case of ASCII letters.
    pub ignore_case: bool,
    /// `finobt`, `rmapbt`, `reflink`, `inobtcount`, `bigtime`, `sparse`, `nrext64`, of version 5.
    pub features: Vec<String>,
}

pub(super) fn parse(head: &[u8]) -> Option<Result<Described, String>> {
    if head.get(..4)? != b"XFSB" {
        return None;
    }
    let mut lost = Vec::new();
    let parsed =
        fields(head, &mut lost).unwrap_or_else(|| Err("its superblock is damaged".to_owned()));
    Some(parsed.map(|xfs| Described {
        recipe: Recipe::Xfs(xfs),
        lost,
    }))
}

fn fields(sb: &[u8], lost: &mut Vec<String>) -> Option<Result<Xfs, String>> {
    let versions = u16_at(sb, 100)?;
    let version = u8::try_from(versions & 0xF).ok()?;
    let (ro, incompat, features2) = (u32_at(sb, 212)?, u32_at(sb, 216)?, u32_at(sb, 200)?);
    let v5 = version == 5;
    if !matches!(version, 4 | 5) {
        return Some(Err(format!("version {version} is not made any more")));
    }
    // Beyond the types of names, sparse inodes, a second UUID, large times, a needed repair, and large counters.
    let unknown = (ro & !0xF, incompat & !0x3F);
    if v5 && unknown != (0, 0) {
        let text = format!(
            "its features {:#x}, {:#x} are not known",
            unknown.0, unknown.1
        );
        return Some(Err(text));
    }
    if u64_at(sb, 16)? != 0 {
        return Some(Err("a real-time part is not made again".to_owned()));
    }
    if u64_at(sb, 48)? == 0 {
        return Some(Err("an external log is not made again".to_owned()));
    }
    let block_size = u32_at(sb, 4)?;
    let mut features: Vec<&str> = Vec::new();
    if v5 {
        features.extend(
            RO_COMPAT
                .iter()
                .filter(|(bit, _)| ro & bit != 0)
                .map(|(_, n)| n),
        );
        for (bit, name) in [(0x2, "sparse"), (0x8, "bigtime"), (0x20, "nrext64")] {
            features.extend((incompat & bit != 0).then_some(name));
        }
    }
    let shift = u32::from(*sb.get(192)?);
    Some(Ok(Xfs {
        uuid: uuid(array(sb, 32)?),
        label: label(sb.get(108..120)?, lost),
        version,
        block_size,
        blocks: u64_at(sb, 8)?,
        groups: u32_at(sb, 88)?,
        sector_size: u16_at(sb, 102)?.into(),
        inode_size: u16_at(sb, 104)?.into(),
        directory_size: u64::from(block_size).checked_shl(shift)?,
        inode_percent: *sb.get(127)?,
        log_blocks: u32_at(sb, 96)?,
        log_stripe: u32_at(sb, 196)?,
        stripe: (u32_at(sb, 184)?, u32_at(sb, 188)?),
        ftype: if v5 {
            incompat & 1 != 0
        } else {
            features2 & 0x200 != 0
        },
        ignore_case: versions & 0x4000 != 0,
        features: features.into_iter().map(str::to_owned).collect(),
    }))
}

impl Xfs {
    /// More allocation groups of the same size.
    pub(super) fn grow(&mut self, bytes: u64) {
        let blocks = bytes / u64::from(self.block_size.max(1));
        if blocks > self.blocks {
            let group = self.blocks.div_ceil(u64::from(self.groups.max(1))).max(1);
            self.groups = u32::try_from(blocks.div_ceil(group)).unwrap_or(u32::MAX);
            self.blocks = blocks;
        }
    }

    pub(super) fn command(&self, device: &str) -> Argv {
        let v5 = self.version == 5;
        let flag = |name: &str| {
            let on = self.features.iter().any(|f| f == name);
            format!("{name}={}", u8::from(on))
        };
        let mut meta = vec![format!("crc={},uuid={}", u8::from(v5), self.uuid)];
        let mut inode = vec![format!(
            "size={},maxpct={}",
            self.inode_size, self.inode_percent
        )];
        if v5 {
            meta.extend(["finobt", "rmapbt", "reflink", "inobtcount", "bigtime"].map(flag));
            inode.push(flag("sparse"));
            // Older programs do not know the word.
            inode.extend(
                self.features
                    .iter()
                    .any(|f| f == "nrext64")
                    .then(|| flag("nrext64")),
            );
        } else {
            // Version 4 has none of these.
            meta.push("finobt=0,rmapbt=0,reflink=0".to_owned());
        }
        let sectors = |blocks: u32| u64::from(blocks) * u64::from(self.block_size) / 512;
        let (unit, width) = (sectors(self.stripe.0), sectors(self.stripe.1));
        let data = match unit {
            0 => ",noalign".to_owned(),
            _ => format!(",sunit={unit},swidth={width}"),
        };
        let data = format!(
            "agcount={},size={}{data}",
            self.groups,
            self.blocks.saturating_mul(self.block_size.into())
        );
        let mut naming = format!("size={}", self.directory_size);
        if self.ignore_case {
            naming.push_str(",version=ci");
        }
        if !v5 {
            naming.push_str(&format!(",ftype={}", u8::from(self.ftype)));
        }
        let size = (self.log_blocks > 0).then(|| format!("size={}b", self.log_blocks));
        let stripe = (self.log_stripe > 1).then(|| format!("su={}", self.log_stripe));
        let log: Vec<String> = size.into_iter().chain(stripe).collect();
        let block = u64::from(self.block_size);
        let small = self.blocks.saturating_mul(block) < SMALL
            || u64::from(self.log_blocks) * block < SMALL_LOG
            || self.groups == 1;
        let mut rest = vec!["-f".to_owned(), "-q".to_owned(), "-K".to_owned()];
        rest.extend(small.then(|| "--unsupported".to_owned()));
        rest.push(device.to_owned());
        argv(
            "mkfs.xfs",
            &[
                ("-m", meta.join(",")),
                ("-i", inode.join(",")),
                ("-b", format!("size={}", self.block_size)),
                ("-s", format!("size={}", self.sector_size)),
                ("-d", data),
                ("-n", naming),
                ("-l", log.join(",")),
                ("-L", self.label.clone()),
            ],
            &rest,
        )
    }
}
