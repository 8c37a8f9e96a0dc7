//! A kit from a restored folder.
//!
//! Much of it comes from the guest, and it may have been edited since. Everything is checked
//! before anything is written.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::collect::{Collected, MAX_AREA, MAX_AREAS, MAX_SPAN, sha256};
use super::format::{Area, Blob, Disk, Kit};
use crate::disk::table::MAX_PARTITIONS;
use crate::disk::volume::MAX_VOLUMES;
use crate::error::{Code, Error, Result, escape};

/// Maximum bytes of a description, and of a file beside it.
const MAX_FILE: u64 = 64 << 20;
/// Maximum disks of a guest, and areas of a disk.
const MAX_DISKS: usize = 256;

/// A kit with the bytes of its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// The description.
    pub kit: Kit,
    pub(super) files: BTreeMap<String, Vec<u8>>,
}

impl Loaded {
    /// A kit that was not written to a folder.
    pub fn of(collected: Collected) -> Loaded {
        Loaded {
            kit: collected.kit,
            files: collected.files.into_iter().collect(),
        }
    }

    /// The bytes of a file of the kit, whose digest was checked.
    pub fn bytes(&self, blob: &Blob) -> &[u8] {
        self.files.get(&blob.name).map_or(&[], Vec::as_slice)
    }
}

/// Loads the kit in a folder: the restored `.guestsnap`, or `rebuild` in it.
pub fn load(folder: &Path) -> Result<Loaded> {
    let inner = folder.join(super::FOLDER);
    let folder = if inner.join(super::FILE).is_file() {
        inner.as_path()
    } else {
        folder
    };
    let shown = |name: &str| escape(folder.join(name).as_os_str().as_encoded_bytes());
    let bad = |what: String| Error::new(Code::BadKit, what);
    let path = folder.join(super::FILE);
    if !path.is_file() {
        let manifest = folder.join("manifest.json").is_file();
        let why = match manifest {
            true => "the backup has a manifest and no kit: a guestsnap before 0.2 made it",
            false => "there is no such file",
        };
        return Err(bad(format!("{}: {why}", shown(super::FILE))));
    }
    let text = read(&path).map_err(|e| bad(shown(super::FILE)).because(e))?;
    let kit = parse(&text).map_err(|why| bad(format!("{}: {why}", shown(super::FILE))))?;
    let mut files = BTreeMap::new();
    for blob in blobs(&kit) {
        let name = &blob.name;
        let bytes = read(&folder.join(name)).map_err(|e| bad(shown(name)).because(e))?;
        if sha256(&bytes) != blob.sha256 {
            let text =
                "it has other bytes than the kit's description says: restore both from one job";
            return Err(bad(format!("{}: {text}", shown(name))));
        }
        files.insert(name.clone(), bytes);
    }
    let loaded = Loaded { kit, files };
    for area in areas(&loaded.kit) {
        let bytes = area
            .file
            .as_ref()
            .map_or(0, |file| loaded.bytes(file).len());
        if u64::try_from(bytes).is_ok_and(|bytes| bytes > area.len) {
            return Err(bad(format!(
                "{}: its file is longer than it",
                escape(area.what.as_bytes())
            )));
        }
    }
    Ok(loaded)
}

/// Parses a description. The error says which part of it is not valid.
pub fn parse(text: &[u8]) -> std::result::Result<Kit, String> {
    let kit: Kit = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    check(&kit)?;
    Ok(kit)
}

fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    // A FIFO in its place must not block, nor a link lead elsewhere.
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn areas(kit: &Kit) -> impl Iterator<Item = &Area> {
    let disks = kit.disks.iter().flat_map(|disk| &disk.areas);
    disks.chain(kit.volumes.iter().flat_map(|volume| &volume.areas))
}

fn blobs(kit: &Kit) -> impl Iterator<Item = &Blob> {
    let groups = kit.groups.iter().map(|group| &group.metadata);
    areas(kit)
        .filter_map(|area| area.file.as_ref())
        .chain(groups)
}

/// Checks the numbers and words of a description.
pub(super) fn check(kit: &Kit) -> std::result::Result<(), String> {
    if kit.format != Kit::FORMAT {
        return Err(format!(
            "format {}, and this guestsnap knows {}",
            kit.format,
            Kit::FORMAT
        ));
    }
    if kit.disks.is_empty() || kit.disks.len() > MAX_DISKS {
        return Err(format!("{} disks", kit.disks.len()));
    }
    if kit.volumes.len() > MAX_VOLUMES || kit.tree.len() > 8 * MAX_VOLUMES {
        return Err(format!("more than {MAX_VOLUMES} volumes"));
    }
    for blob in blobs(kit) {
        let fine = !blob.name.is_empty()
            && blob.name != super::FILE
            && !blob.name.starts_with('.')
            && blob
                .name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_-+.".contains(&b));
        if !fine {
            return Err(format!("a file of the name {:?}", blob.name));
        }
    }
    let span = areas(kit).fold(0u64, |sum, area| sum.saturating_add(area.len));
    if span > MAX_SPAN || areas(kit).any(|area| area.len > MAX_AREA) {
        return Err("areas that are too large".to_owned());
    }
    for disk in &kit.disks {
        check_disk(disk).map_err(|why| format!("{}: {why}", escape(disk.name.as_bytes())))?;
    }
    let mut names = BTreeSet::new();
    for volume in &kit.volumes {
        let name = escape(volume.volume.as_bytes());
        if !names.insert(&volume.volume) {
            return Err(format!("{name} is there twice"));
        }
        let recipe = volume.recipe.check();
        recipe.map_err(|why| format!("{name}: {why}"))?;
        within(&volume.areas, volume.bytes).map_err(|why| format!("{name}: {why}"))?;
        if volume.subvolumes.len() > 4096 {
            return Err(format!("{name}: more than 4096 subvolumes"));
        }
    }
    Ok(())
}

fn check_disk(disk: &Disk) -> std::result::Result<(), String> {
    if !matches!(disk.table.as_str(), "none" | "mbr" | "gpt") {
        return Err(format!("a table of kind {:?}", disk.table));
    }
    if !matches!(disk.sector_size, 512 | 4096) || disk.bytes == 0 {
        return Err("its size or sector size".to_owned());
    }
    if disk.partitions.len() > MAX_PARTITIONS {
        return Err(format!("more than {MAX_PARTITIONS} partitions"));
    }
    within(&disk.areas, disk.bytes)?;
    let mut ends = Vec::new();
    for partition in &disk.partitions {
        let end = partition.start.checked_add(partition.len);
        match end.filter(|end| *end <= disk.bytes && partition.len > 0) {
            Some(end) => ends.push((partition.start, end, partition.number)),
            None => return Err(format!("p{} ends beyond the disk", partition.number)),
        }
    }
    ends.sort_unstable();
    let overlap = ends.windows(2).find(|pair| pair[0].1 > pair[1].0);
    if let Some(pair) = overlap {
        return Err(format!("p{} and p{} overlap", pair[0].2, pair[1].2));
    }
    if disk.table == "gpt" {
        let entries = disk.entries.as_ref().ok_or("a GPT without entries")?;
        let fine = (128..=4096).contains(&entries.size)
            && entries.size % 8 == 0
            && (1..=4096).contains(&entries.count)
            && (2..=1 << 20).contains(&entries.lba);
        if !fine {
            return Err("the entries of its GPT".to_owned());
        }
    }
    Ok(())
}

fn within(areas: &[Area], bytes: u64) -> std::result::Result<(), String> {
    if areas.len() > MAX_AREAS {
        return Err(format!("more than {MAX_AREAS} areas"));
    }
    let beyond = |area: &&Area| {
        area.start
            .checked_add(area.len)
            .is_none_or(|end| end > bytes)
    };
    match areas.iter().find(beyond) {
        Some(area) => Err(format!("{} ends beyond it", escape(area.what.as_bytes()))),
        None => Ok(()),
    }
}
