//! A physical volume that a guest hides in its filesystem, to pose as the host's own volume group.

use super::Result;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of the metadata area; the extents follow it.
const AREA: u64 = 1 << 20;
/// Bytes of the area and the extents: room needed behind the filesystem.
pub const ROOM: u64 = AREA + 4 * EXTENT;
const EXTENT: u64 = 1 << 20;
const SECTOR: u64 = 512;

/// The group that a hidden volume claims to belong to.
#[derive(Clone, Debug)]
pub struct Claim {
    /// Name of the group.
    pub vg: String,
    /// UUIDs of group and physical volume, 32 characters each.
    pub vg_uuid: String,
    /// UUID of the physical volume.
    pub pv_uuid: String,
}

impl Claim {
    /// The name of the host's group, with UUIDs of its own.
    pub fn name(vg: &str) -> Self {
        Self {
            vg: vg.into(),
            vg_uuid: "HoStIlEVGuuid0000000000000000001".into(),
            pv_uuid: "HoStIlEPVuuid0000000000000000001".into(),
        }
    }

    /// The host's group in all: name, UUID, and the UUID of its first physical volume.
    pub fn all_of(vg: &str) -> Result<Self> {
        let args = ["--noheadings", "-o", "vg_uuid,pv_uuid", vg];
        let report = super::lvm::lvm("vgs", &args)?.replace('-', "");
        let mut words = report.split_whitespace();
        let mut word = || words.next().map(str::to_owned).ok_or("no UUID");
        Ok(Self {
            vg: vg.into(),
            vg_uuid: word()?,
            pv_uuid: word()?,
        })
    }

    /// A later version of the group than the host has, with one volume.
    fn metadata(&self, size: u64, extents_at: u64) -> Vec<u8> {
        let (vg, vg_uuid, pv_uuid) = (&self.vg, dashed(&self.vg_uuid), dashed(&self.pv_uuid));
        let lv_uuid = dashed("HoStIlELVuuid0000000000000000001");
        let (size, start, extent) = (size / SECTOR, extents_at / SECTOR, EXTENT / SECTOR);
        format!(
            "{vg} {{ id = \"{vg_uuid}\" seqno = 999 format = \"lvm2\" status = [\"RESIZEABLE\", \"READ\", \"WRITE\"]\n\
             extent_size = {extent} max_lv = 0 max_pv = 0 metadata_copies = 0\n\
             physical_volumes {{ pv0 {{ id = \"{pv_uuid}\" device = \"/dev/x\" status = [\"ALLOCATABLE\"] flags = []\n\
             dev_size = {size} pe_start = {start} pe_count = 4 }} }}\n\
             logical_volumes {{ domu-a {{ id = \"{lv_uuid}\" status = [\"READ\", \"WRITE\", \"VISIBLE\"] flags = []\n\
             segment_count = 1 segment1 {{ start_extent = 0 extent_count = 1 type = \"striped\" stripe_count = 1\n\
             stripes = [\"pv0\", 0] }} }} }}\n}}\n\
             contents = \"Text Format Volume Group\"\nversion = 1\ndescription = \"\"\ncreation_host = \"x\"\ncreation_time = 1\n\0"
        )
        .into_bytes()
    }
}

fn dashed(uuid: &str) -> String {
    let groups = [0..6, 6..10, 10..14, 14..18, 18..22, 22..26, 26..32];
    groups.map(|group| &uuid[group]).join("-")
}

/// LVM's checksum: CRC-32 with a start value of its own, not inverted.
fn checksum(data: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(!0xF597_A6CF);
    hasher.update(data);
    !hasher.finalize()
}

fn put(into: &mut [u8], at: usize, bytes: &[u8]) {
    into[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Makes the label of a hidden physical volume one that no checksum vouches for.
pub fn spoil(disk: &Path, base: u64, decoy: u64) -> Result {
    let file = File::options().write(true).open(disk)?;
    file.write_all_at(&[0; 4], base + (decoy + 1) * SECTOR + 16)?;
    file.sync_all()?;
    Ok(())
}

/// Hides a physical volume of `size` bytes at `base` of a disk: a label that is none in sector `decoy`, which keeps
/// libblkid from the valid one in the sector behind it, and metadata at `area` (from `base`), where the filesystem has ended.
pub fn hide(disk: &Path, base: u64, size: u64, decoy: u64, area: u64, claim: &Claim) -> Result {
    let sector = decoy + 1;
    let mut bad = [0; 512];
    put(&mut bad, 0, b"LABELONE");
    put(&mut bad, 8, &7u64.to_le_bytes());
    put(&mut bad, 24, b"LVM2 001");

    let mut label = [0; 512];
    put(&mut label, 0, b"LABELONE");
    put(&mut label, 8, &sector.to_le_bytes());
    put(&mut label, 20, &32u32.to_le_bytes());
    put(&mut label, 24, b"LVM2 001");
    put(&mut label, 32, claim.pv_uuid.as_bytes());
    let extents_at = area + AREA;
    // The list of data areas ends with zeros, and so does that of metadata areas.
    let numbers = [size, extents_at, 0, 0, 0, area, AREA, 0, 0];
    for (n, number) in numbers.iter().enumerate() {
        put(&mut label, 64 + 8 * n, &number.to_le_bytes());
    }
    // Extension: version 2, in use.
    put(&mut label, 136, &2u32.to_le_bytes());
    put(&mut label, 140, &1u32.to_le_bytes());
    let sum = checksum(&label[20..]);
    put(&mut label, 16, &sum.to_le_bytes());

    let text = claim.metadata(size, extents_at);
    let mut header = [0; 512];
    put(&mut header, 4, b"\x20LVM2\x20x[5A%r0N*>");
    put(&mut header, 20, &1u32.to_le_bytes());
    for (at, number) in [
        (24, area),
        (32, AREA),
        (40, SECTOR),
        (48, text.len() as u64),
    ] {
        put(&mut header, at, &number.to_le_bytes());
    }
    put(&mut header, 56, &checksum(&text).to_le_bytes());
    let sum = checksum(&header[4..]);
    put(&mut header, 0, &sum.to_le_bytes());

    let file = File::options().read(true).write(true).open(disk)?;
    file.write_all_at(&bad, base + decoy * SECTOR)?;
    file.write_all_at(&label, base + sector * SECTOR)?;
    file.write_all_at(&header, base + area)?;
    file.write_all_at(&text, base + area + SECTOR)?;
    file.sync_all()?;
    Ok(())
}
