//! What LVM reports of the host.

use serde::Deserialize;

use super::command::lvm;
use crate::error::{Code, Error, Result};

/// A logical volume of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LvInfo {
    /// Volume group.
    pub vg: String,
    /// Name.
    pub lv: String,
    /// UUID: says that a name is still the same LV.
    pub uuid: String,
    /// Bytes.
    pub size: u64,
    /// `lv_attr`: its first letter is the type.
    pub attr: String,
    /// Name of the origin, of snapshots.
    pub origin: Option<String>,
    /// Name of the thin pool, of thin LVs.
    pub pool: Option<String>,
    /// Tags.
    pub tags: Vec<String>,
    /// Device number, when active.
    pub devno: Option<(u32, u32)>,
}

impl LvInfo {
    /// A thin volume (a snapshot or not).
    pub fn is_thin(&self) -> bool {
        self.attr.starts_with('V')
    }

    /// A thick snapshot.
    pub fn is_thick_snapshot(&self) -> bool {
        self.attr.starts_with(['s', 'S'])
    }

    /// Why it cannot be a guest's disk; `None`: it can.
    pub fn unfit(&self) -> Option<&'static str> {
        match self.attr.chars().next() {
            Some('-' | 'o' | 'V' | 'm' | 'M' | 'r' | 'R' | 'C') => None,
            Some('s' | 'S') => Some("it is a snapshot"),
            Some('t') => Some("it is a thin pool"),
            Some('O') => Some("a snapshot is being merged into it"),
            _ => Some("it is internal to LVM"),
        }
    }
}

/// A volume group's room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VgInfo {
    /// Bytes of an extent.
    pub extent: u64,
    /// Free bytes.
    pub free: u64,
}

#[derive(Deserialize)]
struct Report {
    report: Vec<Section>,
}

#[derive(Deserialize)]
struct Section {
    #[serde(default)]
    lv: Vec<LvRow>,
    #[serde(default)]
    vg: Vec<VgRow>,
}

/// Every value is text: "" is none, "-1" not applicable.
#[derive(Deserialize)]
struct LvRow {
    vg_name: String,
    lv_name: String,
    lv_uuid: String,
    lv_size: String,
    lv_attr: String,
    origin: String,
    pool_lv: String,
    lv_tags: String,
    lv_kernel_major: String,
    lv_kernel_minor: String,
}

#[derive(Deserialize)]
struct VgRow {
    vg_extent_size: String,
    vg_free: String,
}

const LV_FIELDS: &str = "vg_name,lv_name,lv_uuid,lv_size,lv_attr,origin,pool_lv,lv_tags,lv_kernel_major,lv_kernel_minor";
const FORMAT: [&str; 6] = ["--reportformat", "json", "--units", "b", "--nosuffix", "-o"];

fn sections(text: &str) -> Result<Vec<Section>> {
    let report: Report = serde_json::from_str(text).map_err(|e| {
        Error::new(Code::CommandFailed, "LVM's report cannot be understood").because(e)
    })?;
    Ok(report.report)
}

fn number(text: &str) -> Result<u64> {
    text.parse().map_err(|e| {
        Error::new(
            Code::CommandFailed,
            format!("LVM reports {text:?} as a number"),
        )
        .because(e)
    })
}

fn some(text: String) -> Option<String> {
    // Hidden LVs are in brackets.
    let text = text.trim_matches(['[', ']']);
    (!text.is_empty()).then(|| text.to_owned())
}

fn parse_lvs(text: &str) -> Result<Vec<LvInfo>> {
    let rows = sections(text)?.into_iter().flat_map(|s| s.lv);
    rows.map(|row| {
        Ok(LvInfo {
            size: number(&row.lv_size)?,
            origin: some(row.origin),
            pool: some(row.pool_lv),
            tags: row
                .lv_tags
                .split(',')
                .filter(|t| !t.is_empty())
                .map(str::to_owned)
                .collect(),
            devno: row
                .lv_kernel_major
                .parse()
                .ok()
                .zip(row.lv_kernel_minor.parse().ok()),
            vg: row.vg_name,
            lv: row.lv_name,
            uuid: row.lv_uuid,
            attr: row.lv_attr,
        })
    })
    .collect()
}

/// All visible logical volumes, with one command.
pub fn list() -> Result<Vec<LvInfo>> {
    parse_lvs(&lvm("lvs", &[&FORMAT[..], &[LV_FIELDS]].concat())?)
}

/// One logical volume.
pub fn get(vg: &str, lv: &str) -> Result<LvInfo> {
    let name = format!("{vg}/{lv}");
    let text = lvm("lvs", &[&FORMAT[..], &[LV_FIELDS, &name]].concat())
        .map_err(|e| Error::new(Code::OriginGone, name.clone()).because(e))?;
    parse_lvs(&text)?
        .pop()
        .ok_or_else(|| Error::new(Code::OriginGone, name))
}

/// A volume group's room.
pub fn room(vg: &str) -> Result<VgInfo> {
    let text = lvm(
        "vgs",
        &[&FORMAT[..], &["vg_extent_size,vg_free", vg]].concat(),
    )?;
    let row = sections(&text)?.into_iter().flat_map(|s| s.vg).next();
    let row = row.ok_or_else(|| Error::new(Code::OriginGone, format!("volume group {vg}")))?;
    Ok(VgInfo {
        extent: number(&row.vg_extent_size)?,
        free: number(&row.vg_free)?,
    })
}

/// The device-mapper name of an LV: `-` in names is doubled.
pub fn dm_name(vg: &str, lv: &str) -> String {
    format!("{}-{}", vg.replace('-', "--"), lv.replace('-', "--"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_report_of_lvm_2_03_16() {
        let text = r#"{ "report": [ { "lv": [
            {"vg_name":"vg0","lv_name":"domu-a","lv_uuid":"u1","lv_size":"1073741824","lv_attr":"owi-aos---",
             "origin":"","pool_lv":"","lv_tags":"a,b","lv_kernel_major":"254","lv_kernel_minor":"3"},
            {"vg_name":"vg0","lv_name":"s","lv_uuid":"u2","lv_size":"1073741824","lv_attr":"swi-a-s---",
             "origin":"domu-a","pool_lv":"","lv_tags":"","lv_kernel_major":"-1","lv_kernel_minor":"-1"} ] } ] }"#;
        let lvs = parse_lvs(text).unwrap();
        assert_eq!(lvs[0].tags, ["a", "b"]);
        assert_eq!(lvs[0].devno, Some((254, 3)));
        assert_eq!(lvs[0].unfit(), None);
        assert_eq!(
            (lvs[1].origin.as_deref(), lvs[1].devno),
            (Some("domu-a"), None)
        );
        assert!(lvs[1].is_thick_snapshot() && lvs[1].unfit().is_some());
        assert!(parse_lvs("{").is_err());
    }

    #[test]
    fn test_dm_names_double_hyphens() {
        assert_eq!(dm_name("vg-0", "domu-a"), "vg--0-domu--a");
    }
}
