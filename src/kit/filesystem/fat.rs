//! FAT. Fields: Microsoft's FAT specification; words: mkfs.fat(8).

use serde::{Deserialize, Serialize};

use super::{Argv, Described, Recipe, argv, label};
use crate::disk::le::{array, u16_at, u32_at};

/// The properties of a FAT filesystem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fat {
    /// Volume id, as fstab names it: `12AB-34CD`.
    pub uuid: String,
    /// Label; empty: none.
    pub label: String,
    /// 12, 16 or 32.
    pub bits: u8,
    /// Bytes of a sector.
    pub sector_size: u32,
    /// Sectors of a cluster.
    pub cluster_sectors: u8,
    /// Sectors in front of the first table.
    pub reserved_sectors: u16,
    /// Number of tables.
    pub tables: u8,
    /// Names in the root folder; 0 with 32 bits.
    pub root_names: u16,
    /// Sectors in front of the partition, as the boot sector says.
    pub hidden_sectors: u32,
    /// Sectors.
    pub sectors: u32,
}

pub(super) fn parse(head: &[u8]) -> Option<Result<Described, String>> {
    let sector_size = u16_at(head, 11)?;
    let tables = *head.get(16)?;
    let cluster_sectors = *head.get(13)?;
    let jump = matches!(array::<3>(head, 0)?, [0xEB, _, 0x90] | [0xE9, _, _]);
    let fits = jump
        && u16_at(head, 510)? == 0xAA55
        && matches!(sector_size, 512 | 1024 | 2048 | 4096)
        && cluster_sectors.is_power_of_two()
        && matches!(tables, 1 | 2)
        && u16_at(head, 14)? != 0;
    if !fits {
        return None;
    }
    let small_table = u32::from(u16_at(head, 22)?);
    let wide = small_table == 0;
    let at = if wide { 64 } else { 36 };
    // An extended boot signature with an id and a label.
    if *head.get(at + 2)? != 0x29 {
        return Some(Err("its boot sector has no volume id".to_owned()));
    }
    let root_names = u16_at(head, 17)?;
    let sectors = match u16_at(head, 19)? {
        0 => u32_at(head, 32)?,
        few => few.into(),
    };
    let table = if wide { u32_at(head, 36)? } else { small_table };
    let root = (u32::from(root_names) * 32).div_ceil(sector_size.into());
    let front =
        u64::from(u16_at(head, 14)?) + u64::from(tables) * u64::from(table) + u64::from(root);
    let clusters = u64::from(sectors).checked_sub(front)? / u64::from(cluster_sectors);
    let bits = match clusters {
        _ if wide => 32,
        0..=4084 => 12,
        _ => 16,
    };
    let mut lost = Vec::new();
    let text = label(head.get(at + 7..at + 18)?, &mut lost);
    let text = text.trim_end();
    let id = u32_at(head, at + 3)?;
    let fat = Fat {
        uuid: format!("{:04X}-{:04X}", id >> 16, id & 0xFFFF),
        label: if text == "NO NAME" {
            String::new()
        } else {
            text.to_owned()
        },
        bits,
        sector_size: sector_size.into(),
        cluster_sectors,
        reserved_sectors: u16_at(head, 14)?,
        tables,
        root_names,
        hidden_sectors: u32_at(head, 28)?,
        sectors,
    };
    let recipe = Recipe::Vfat(fat);
    Some(Ok(Described { recipe, lost }))
}

impl Fat {
    pub(super) fn command(&self, device: &str) -> Argv {
        let names = match self.bits {
            32 => String::new(),
            _ => self.root_names.to_string(),
        };
        // In KiB, as the program counts.
        let size = u64::from(self.sectors) * u64::from(self.sector_size) / 1024;
        argv(
            "mkfs.fat",
            &[
                ("-F", self.bits.to_string()),
                ("-i", self.uuid.replace('-', "")),
                ("-n", self.label.clone()),
                ("-S", self.sector_size.to_string()),
                ("-s", self.cluster_sectors.to_string()),
                ("-R", self.reserved_sectors.to_string()),
                ("-f", self.tables.to_string()),
                ("-r", names),
                ("-h", self.hidden_sectors.to_string()),
            ],
            &["-a".to_owned(), device.to_owned(), size.to_string()],
        )
    }
}
