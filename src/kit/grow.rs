//! A kit for a larger disk: its last partition grows, and the filesystem in it.

use super::Loaded;
use super::format::{Area, Disk, Entries};

/// Partitions end at whole MiB, as partitioning tools make them.
const ALIGN: u64 = 1 << 20;

/// Why a disk cannot grow.
type Refused = String;

impl Loaded {
    /// Makes a disk of the kit larger. The last partition and the filesystem in it grow; a
    /// physical volume of LVM keeps its size until the guest runs `pvresize`.
    pub fn grow(&mut self, number: usize, bytes: u64) -> Result<(), Refused> {
        let disk = self.kit.disks.get(number).ok_or("there is no such disk")?;
        if bytes < disk.bytes {
            let text = "and a smaller disk is not made";
            return Err(format!("the guest's disk has {} bytes, {text}", disk.bytes));
        }
        let last = disk
            .partitions
            .iter()
            .enumerate()
            .max_by_key(|(_, p)| p.start);
        let (volume, len) = match (disk.table.as_str(), last) {
            ("none", _) => (disk.name.clone(), bytes),
            (_, None) => return Err("it has no partitions".to_owned()),
            (_, Some((at, last))) => {
                let prefix = if number == 0 { "" } else { &disk.name };
                let volume = format!("{prefix}p{}", last.number);
                let len = room(disk, bytes).saturating_sub(last.start).max(last.len);
                self.resize(number, at, len)?;
                (volume, len)
            }
        };
        self.kit.disks[number].bytes = bytes;
        for one in self
            .kit
            .volumes
            .iter_mut()
            .filter(|one| one.volume == volume)
        {
            one.bytes = len;
            one.recipe.grow(len);
        }
        Ok(())
    }

    /// Gives a partition another length, in the table too.
    fn resize(&mut self, number: usize, at: usize, len: u64) -> Result<(), Refused> {
        let disk = &self.kit.disks[number];
        let partition = &disk.partitions[at];
        let sector = u64::from(disk.sector_size);
        let place = match (disk.table.as_str(), disk.entries) {
            ("gpt", Some(Entries { lba, size, .. })) => {
                let entry = u64::from(partition.number.saturating_sub(1)) * u64::from(size);
                let last = ((partition.start + len) / sector).saturating_sub(1);
                (lba * sector + entry + 40, last.to_le_bytes().to_vec())
            }
            ("mbr", _) if partition.number <= 4 => {
                let entry = 446 + 16 * u64::from(partition.number.saturating_sub(1));
                let sectors =
                    u32::try_from(len / sector).map_err(|_| "an MBR counts no more than 2 TiB")?;
                (entry + 12, sectors.to_le_bytes().to_vec())
            }
            _ => {
                return Err(
                    "its last partition is a logical one: grow that in the guest".to_owned(),
                );
            }
        };
        self.patch(number, place.0, &place.1)?;
        self.kit.disks[number].partitions[at].len = len;
        Ok(())
    }

    /// Replaces bytes in the area that holds them.
    fn patch(&mut self, number: usize, start: u64, bytes: &[u8]) -> Result<(), Refused> {
        let end = start + bytes.len() as u64;
        let holds =
            |area: &&Area| area.start <= start && end <= area.start.saturating_add(area.len);
        // The last one counts when they are written.
        let area = self.kit.disks[number].areas.iter().rfind(holds);
        let (area, file) = area
            .and_then(|area| Some((area, area.file.as_ref()?)))
            .ok_or("its table is not in the kit")?;
        let at = usize::try_from(start - area.start).map_err(|e| e.to_string())?;
        let held = self
            .files
            .get_mut(&file.name)
            .ok_or("its table is not in the kit")?;
        if held.len() < at + bytes.len() {
            held.resize(at + bytes.len(), 0);
        }
        held[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

/// The end of the last partition on a disk of so many bytes.
fn room(disk: &Disk, bytes: u64) -> u64 {
    let sector = u64::from(disk.sector_size);
    let behind = disk.entries.map_or(0, |entries| {
        let entries = u64::from(entries.count) * u64::from(entries.size);
        (entries.div_ceil(sector) + 1) * sector
    });
    let end = bytes.saturating_sub(behind);
    end - end % ALIGN
}
