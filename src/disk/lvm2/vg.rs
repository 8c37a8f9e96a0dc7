//! A volume group, parsed from its metadata text.

use std::collections::BTreeMap;

use super::text::{Section, Value};

/// 16 GiB, in sectors: more than LVM2 accepts for an extent.
const MAX_EXTENT_SECTORS: u64 = 1 << 25;

/// A volume group.
#[derive(Debug, Clone)]
pub struct Vg {
    /// Name, restricted to the characters that LVM2 allows.
    pub name: String,
    /// UUID, 32 characters.
    pub uuid: String,
    /// Sequence number of the metadata.
    pub seqno: u64,
    /// Bytes per extent.
    pub extent_size: u64,
    /// Physical volumes by their name in the text (`pv0`).
    pub pvs: BTreeMap<String, Pv>,
    /// Logical volumes by name, including hidden ones.
    pub lvs: BTreeMap<String, Lv>,
}

/// A physical volume of a group.
#[derive(Debug, Clone)]
pub struct Pv {
    /// UUID, 32 characters.
    pub uuid: String,
    /// Offset of extent 0 in bytes.
    pub start: u64,
    /// Number of extents.
    pub extents: u64,
}

/// A logical volume.
#[derive(Debug, Clone)]
pub struct Lv {
    /// UUID, 32 characters; `None` if missing or invalid.
    pub uuid: Option<String>,
    /// Whether users see it; component volumes are hidden.
    pub visible: bool,
    /// Whether the status marks this image as not yet rebuilt.
    pub rebuilding: bool,
    /// Whether the status marks this image as write-mostly.
    pub write_mostly: bool,
    /// Origin, if this is a thin snapshot.
    pub thin_origin: Option<String>,
    /// Segments in order, without gaps.
    pub segments: Vec<LvSegment>,
}

/// A segment of a logical volume.
#[derive(Debug, Clone)]
pub struct LvSegment {
    /// First extent in the volume.
    pub start: u64,
    /// Number of extents.
    pub extents: u64,
    /// Segment type.
    pub kind: SegmentKind,
}

/// A run of extents on a physical or logical volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Area {
    /// Name of the PV or LV in the text.
    pub name: String,
    /// First extent on that volume.
    pub extent: u64,
}

/// Supported segment types.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SegmentKind {
    /// One area, or several in stripes of `stripe_size` bytes.
    Striped {
        /// Bytes; 0 with one area.
        stripe_size: u64,
        /// Areas in order.
        areas: Vec<Area>,
    },
    /// Copies of the same data; the first is the primary.
    Mirror(Vec<Area>),
    /// Copies with superblocks: (metadata LV, image LV).
    Raid1(Vec<(String, String)>),
    /// A thin pool.
    ThinPool {
        /// Metadata LV.
        metadata: String,
        /// Data LV.
        data: String,
        /// Transaction id that the pool's metadata must carry.
        transaction_id: u64,
        /// Bytes per block.
        chunk_size: u64,
    },
    /// A thin volume.
    Thin {
        /// Pool LV.
        pool: String,
        /// Device id in the pool.
        device_id: u32,
        /// External origin: an LV outside the pool that supplies blocks never written.
        external_origin: Option<String>,
    },
    /// A thick snapshot: not a volume itself, but a link from a COW volume to its origin.
    Snapshot {
        /// Origin LV.
        origin: String,
        /// LV with the copy-on-write data.
        cow: String,
        /// Whether the snapshot is being merged into its origin.
        merging: bool,
    },
    /// Any other type, by name.
    Other(String),
}

/// Builds the group from parsed metadata. The error names the missing or invalid key.
pub fn from_text(root: &Section) -> Result<Vg, String> {
    if root.string("contents") != Some("Text Format Volume Group")
        || root.number("version") != Some(1)
    {
        return Err("not the metadata of a volume group".into());
    }
    let mut groups = root.sections();
    let (Some((name, vg)), None) = (groups.next(), groups.next()) else {
        return Err("not exactly one volume group".into());
    };
    let extent_sectors = vg.number("extent_size").unwrap_or(0);
    if extent_sectors == 0 || extent_sectors > MAX_EXTENT_SECTORS {
        return Err("extent_size".into());
    }
    Ok(Vg {
        name: checked_name(name)?,
        uuid: vg
            .string("id")
            .and_then(super::uuid)
            .ok_or("id of the group")?,
        seqno: vg.number("seqno").ok_or("seqno")?,
        extent_size: extent_sectors * 512,
        pvs: each(vg, "physical_volumes", pv)?,
        lvs: each(vg, "logical_volumes", lv)?,
    })
}

/// Checks a name, which becomes a path component and log text: only characters that LVM2 allows.
fn checked_name(name: &str) -> Result<String, String> {
    let fine = !name.is_empty()
        && name.len() <= 127
        && !name.starts_with('-')
        && !matches!(name, "." | "..")
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_-+.".contains(&b));
    if fine {
        Ok(name.to_owned())
    } else {
        Err(format!("name {:?}", super::printable(name)))
    }
}

fn each<T>(
    vg: &Section,
    key: &str,
    read: impl Fn(&Section) -> Result<T, String>,
) -> Result<BTreeMap<String, T>, String> {
    let mut all = BTreeMap::new();
    for (name, section) in vg.section(key).into_iter().flat_map(Section::sections) {
        let value = read(section).map_err(|why| format!("{}: {why}", super::printable(name)))?;
        if all.insert(checked_name(name)?, value).is_some() {
            return Err(format!("{name} is there twice"));
        }
    }
    Ok(all)
}

fn pv(section: &Section) -> Result<Pv, String> {
    Ok(Pv {
        uuid: section.string("id").and_then(super::uuid).ok_or("id")?,
        start: section
            .number("pe_start")
            .and_then(|sectors| sectors.checked_mul(512))
            .ok_or("pe_start")?,
        extents: section.number("pe_count").ok_or("pe_count")?,
    })
}

fn lv(section: &Section) -> Result<Lv, String> {
    let mut segments = section
        .sections()
        .filter(|(name, _)| name.starts_with("segment"))
        .map(|(name, s)| segment(s).map_err(|why| format!("{}: {why}", super::printable(name))))
        .collect::<Result<Vec<LvSegment>, String>>()?;
    segments.sort_by_key(|s| s.start);
    let mut next = 0;
    for segment in &segments {
        if segment.start != next {
            return Err("gap or overlap of segments".into());
        }
        next = next.checked_add(segment.extents).ok_or("extent_count")?;
    }
    let thin_origin = section
        .sections()
        .filter(|(_, s)| s.string("type") == Some("thin"))
        .find_map(|(_, s)| s.string("origin"))
        .map(super::printable);
    let marked = |flag: &str| section.has("status", flag) || section.has("flags", flag);
    Ok(Lv {
        uuid: section.string("id").and_then(super::uuid),
        visible: section.has("status", "VISIBLE"),
        rebuilding: marked("REBUILD") || marked("LV_REBUILD"),
        write_mostly: marked("WRITEMOSTLY") || marked("LV_WRITEMOSTLY"),
        thin_origin,
        segments,
    })
}

fn segment(section: &Section) -> Result<LvSegment, String> {
    let extents = section
        .number("extent_count")
        .filter(|n| *n > 0)
        .ok_or("extent_count")?;
    Ok(LvSegment {
        start: section.number("start_extent").ok_or("start_extent")?,
        extents,
        kind: kind(section)?,
    })
}

fn kind(section: &Section) -> Result<SegmentKind, String> {
    let name = |key: &'static str| section.string(key).map(str::to_owned).ok_or(key);
    let sectors = |key: &'static str| {
        section
            .number(key)
            .and_then(|n| n.checked_mul(512))
            .filter(|n| *n > 0)
            .ok_or(key)
    };
    let kind = section.string("type").ok_or("type")?;
    Ok(match kind {
        "striped" | "linear" => {
            let areas = areas(section, "stripes")?;
            let stripe_size = if areas.len() > 1 {
                sectors("stripe_size")?
            } else {
                0
            };
            SegmentKind::Striped { stripe_size, areas }
        }
        "mirror" => SegmentKind::Mirror(areas(section, "mirrors")?),
        "raid0" => SegmentKind::Striped {
            stripe_size: sectors("stripe_size")?,
            areas: names(section, "raid0_lvs")?
                .into_iter()
                .map(|name| Area { name, extent: 0 })
                .collect(),
        },
        "raid1" => SegmentKind::Raid1(
            names(section, "raids")?
                .chunks_exact(2)
                .map(|pair| (pair[0].clone(), pair[1].clone()))
                .collect(),
        ),
        "thin-pool" => SegmentKind::ThinPool {
            metadata: name("metadata")?,
            data: name("pool")?,
            transaction_id: section.number("transaction_id").ok_or("transaction_id")?,
            chunk_size: sectors("chunk_size")?,
        },
        "thin" => SegmentKind::Thin {
            pool: name("thin_pool")?,
            device_id: section
                .number("device_id")
                .and_then(|id| u32::try_from(id).ok())
                .ok_or("device_id")?,
            external_origin: name("external_origin").ok(),
        },
        "snapshot" => SegmentKind::Snapshot {
            origin: name("origin")?,
            cow: name("cow_store").or_else(|_| name("merging_store"))?,
            merging: section.string("merging_store").is_some(),
        },
        // Newer types append flags after a plus sign.
        other => {
            let base = other.split('+').next().unwrap_or_default();
            SegmentKind::Other(super::printable(base))
        }
    })
}

/// `["pv0", 0, "pv1", 7]`
fn areas(section: &Section, key: &str) -> Result<Vec<Area>, String> {
    let areas = section
        .list(key)
        .chunks(2)
        .map(|pair| match pair {
            [Value::Str(name), Value::Int(extent)] => Some(Area {
                name: name.clone(),
                extent: u64::try_from(*extent).ok()?,
            }),
            _ => None,
        })
        .collect::<Option<Vec<Area>>>();
    areas
        .filter(|a| !a.is_empty())
        .ok_or_else(|| key.to_owned())
}

/// `["a", "b"]`
fn names(section: &Section, key: &str) -> Result<Vec<String>, String> {
    let names = section
        .list(key)
        .iter()
        .map(|value| match value {
            Value::Str(name) => Some(name.clone()),
            _ => None,
        })
        .collect::<Option<Vec<String>>>();
    names
        .filter(|n| !n.is_empty())
        .ok_or_else(|| key.to_owned())
}
