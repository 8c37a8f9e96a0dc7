//! The host's LVM: reports and the locks around our own commands.
//!
//! One `lvs` call answers everything, volume group figures included: each LVM command costs
//! a scan of the host's devices.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

use super::command::{Call, Program};
use crate::error::{Code, Error, Result, escape};
use crate::turn::Turns;

/// Settings for every command of ours: no D-Bus notices, no polling daemon, and no dmeventd, which
/// would keep a snapshot open while we remove it. Reports look as we read them, whatever lvm.conf says of
/// them. Metadata backups stay as the host has them.
const CONFIG: &str = "global/notify_dbus=0 global/use_lvmpolld=0 activation/monitoring=0 \
    report/compact_output=0 report/compact_output_cols=\"\" report/list_item_separator=\",\"";

/// The longest LV or VG name LVM takes.
const MAX_NAME: usize = 127;

/// A logical volume by its names, both checked: nothing that LVM would not accept, nothing that
/// could be read as an option.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LvName {
    vg: String,
    lv: String,
}

impl LvName {
    /// Checks both names.
    pub fn new(vg: impl Into<String>, lv: impl Into<String>) -> Result<Self> {
        let name = LvName {
            vg: vg.into(),
            lv: lv.into(),
        };
        if valid_name(&name.vg) && valid_name(&name.lv) {
            Ok(name)
        } else {
            Err(Error::new(
                Code::OriginGone,
                format!("`{name}` is not the name of a logical volume"),
            ))
        }
    }

    /// Volume group.
    pub fn vg(&self) -> &str {
        &self.vg
    }

    /// Logical volume.
    pub fn lv(&self) -> &str {
        &self.lv
    }

    /// The name of its device-mapper device: both names with `-` doubled, joined by `-`.
    pub fn dm_name(&self) -> String {
        format!(
            "{}-{}",
            self.vg.replace('-', "--"),
            self.lv.replace('-', "--")
        )
    }
}

impl fmt::Display for LvName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.vg, self.lv)
    }
}

/// Whether LVM takes this as a name of a volume group or volume.
fn valid_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME
        && !name.starts_with('-')
        && name != "."
        && name != ".."
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"+_.-".contains(&b))
}

/// LVM's UUID of a volume or group: 32 characters in groups, as reports print it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LvmUuid(String);

impl LvmUuid {
    /// The 32 characters without dashes, as device-mapper UUIDs hold them.
    pub fn compact(&self) -> String {
        self.0.replace('-', "")
    }

    /// From 32 characters without dashes.
    pub fn from_compact(text: &str) -> Option<Self> {
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return None;
        }
        let groups = [0..6, 6..10, 10..14, 14..18, 18..22, 22..26, 26..32];
        Some(LvmUuid(groups.map(|g| &text[g]).join("-")))
    }

    /// As reports print it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for LvmUuid {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        let uuid = LvmUuid::from_compact(&text.replace('-', "")).ok_or(())?;
        if uuid.0 == text { Ok(uuid) } else { Err(()) }
    }
}

impl fmt::Display for LvmUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One visible logical volume, with what we need to know of its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LvInfo {
    /// Names.
    pub name: LvName,
    /// UUID of the volume.
    pub uuid: LvmUuid,
    /// UUID of the group.
    pub vg_uuid: LvmUuid,
    /// Bytes.
    pub size: u64,
    /// `lv_attr` as LVM prints it.
    pub attr: String,
    /// What it is made of: `linear`, `striped`, `thin`, `pool`, `raid1`, `cache` …
    pub layout: Vec<String>,
    /// What it is for: `public`, `snapshot`, `thicksnapshot`, `origin` …
    pub role: Vec<String>,
    /// Thin pool it lives in.
    pub pool: Option<String>,
    /// Tags.
    pub tags: Vec<String>,
    /// Origin, for snapshots (and for cached volumes).
    pub origin: Option<String>,
    /// Whether a device of it exists.
    pub active: bool,
    /// Whether something has it open: a running guest, or the host.
    pub open: bool,
    /// Major and minor number when active.
    pub devno: Option<(u32, u32)>,
    /// Extent size of the group in bytes.
    pub extent_size: u64,
    /// Free extents of the group.
    pub vg_free: u64,
}

impl LvInfo {
    /// A thin volume (not a pool).
    pub fn is_thin(&self) -> bool {
        self.has_layout("thin") && !self.is_pool()
    }

    /// A thin or cache pool, which holds other volumes.
    pub fn is_pool(&self) -> bool {
        self.has_layout("pool")
    }

    /// A thick or thin snapshot.
    pub fn is_snapshot(&self) -> bool {
        self.has_role("snapshot")
    }

    /// A thick snapshot.
    pub fn is_thick_snapshot(&self) -> bool {
        self.has_role("thicksnapshot")
    }

    fn has_layout(&self, word: &str) -> bool {
        self.layout.iter().any(|w| w == word)
    }

    fn has_role(&self, word: &str) -> bool {
        self.role.iter().any(|w| w == word)
    }
}

/// The columns of [`list`], in the order of [`Row`]. No segment columns: they would give a volume
/// of several segments several rows.
const COLUMNS: &str = "vg_name,vg_uuid,vg_extent_size,vg_free_count,lv_name,lv_uuid,lv_size,lv_attr,\
lv_layout,lv_role,pool_lv,lv_tags,origin,lv_active,lv_device_open,lv_kernel_major,lv_kernel_minor";

#[derive(Deserialize)]
struct Report {
    report: Vec<Part>,
}

#[derive(Deserialize)]
struct Part {
    #[serde(default)]
    lv: Vec<Row>,
}

/// Every value is a string; empty means none and `-1` not applicable.
#[derive(Deserialize)]
struct Row {
    vg_name: String,
    vg_uuid: String,
    vg_extent_size: String,
    vg_free_count: String,
    lv_name: String,
    lv_uuid: String,
    lv_size: String,
    lv_attr: String,
    lv_layout: String,
    lv_role: String,
    pool_lv: String,
    lv_tags: String,
    origin: String,
    lv_active: String,
    lv_device_open: String,
    lv_kernel_major: String,
    lv_kernel_minor: String,
}

impl Row {
    fn into_info(self) -> Result<LvInfo> {
        let bad = |what: &str, value: &str| {
            Error::new(
                Code::CommandFailed,
                format!(
                    "lvs reports {what} `{value}` for {}/{}",
                    self.vg_name, self.lv_name
                ),
            )
        };
        let number = |what: &str, value: &str| value.parse::<u64>().map_err(|_| bad(what, value));
        let uuid =
            |what: &str, value: &str| value.parse::<LvmUuid>().map_err(|()| bad(what, value));
        let devno = match (self.lv_kernel_major.parse(), self.lv_kernel_minor.parse()) {
            (Ok(major), Ok(minor)) => Some((major, minor)),
            _ => None,
        };
        Ok(LvInfo {
            name: LvName::new(&*self.vg_name, &*self.lv_name)?,
            uuid: uuid("lv_uuid", &self.lv_uuid)?,
            vg_uuid: uuid("vg_uuid", &self.vg_uuid)?,
            size: number("lv_size", &self.lv_size)?,
            layout: words(&self.lv_layout),
            role: words(&self.lv_role),
            tags: words(&self.lv_tags),
            active: devno.is_some() && !self.lv_active.is_empty(),
            open: self.lv_device_open == "1" || self.lv_device_open == "open",
            devno,
            extent_size: number("vg_extent_size", &self.vg_extent_size)?,
            vg_free: number("vg_free_count", &self.vg_free_count)?,
            pool: Some(self.pool_lv).filter(|s| !s.is_empty()),
            origin: Some(self.origin).filter(|s| !s.is_empty()),
            attr: self.lv_attr,
        })
    }
}

fn words(list: &str) -> Vec<String> {
    list.split(',')
        .filter(|w| !w.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Every visible logical volume of the host, in LVM's order.
pub fn list() -> Result<Vec<LvInfo>> {
    report(&[])
}

/// The visible logical volumes of these groups. An unknown group is an error.
pub fn list_in(vgs: &[&str]) -> Result<Vec<LvInfo>> {
    report(vgs)
}

fn report(vgs: &[&str]) -> Result<Vec<LvInfo>> {
    let output = lvm(Program::Lvs)
        .args("--reportformat json --units b --nosuffix --binary -o".split(' '))
        .arg(COLUMNS)
        .args(vgs.iter().copied())
        .run()?;
    parse(&output.stdout)
}

fn parse(json: &[u8]) -> Result<Vec<LvInfo>> {
    let report: Report = serde_json::from_slice(json).map_err(|error| {
        Error::new(Code::CommandFailed, "the report of lvs is not understood").because(error)
    })?;
    report
        .report
        .into_iter()
        .flat_map(|part| part.lv)
        .map(Row::into_info)
        .collect()
}

/// Every volume group of the host, and how many visible volumes it has.
pub fn groups() -> Result<Vec<(String, u64)>> {
    let output = lvm(Program::Vgs)
        .args("--noheadings --separator / -o vg_name,lv_count".split(' '))
        .run()?;
    parse_groups(&String::from_utf8_lossy(&output.stdout))
}

fn parse_groups(text: &str) -> Result<Vec<(String, u64)>> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines
        .map(|line| {
            let row = line.split_once('/');
            row.and_then(|(vg, count)| Some((vg.to_owned(), count.parse().ok()?)))
                .ok_or_else(|| {
                    let what = format!("vgs reports `{}`", escape(line.as_bytes()));
                    Error::new(Code::CommandFailed, what)
                })
        })
        .collect()
}

/// Settings of the host's LVM that decide what it sees of guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSettings {
    /// `devices/scan_lvs`: it looks for physical volumes on logical volumes, so inside of guests.
    pub scan_lvs: bool,
    /// A `devices/filter` or `devices/global_filter` leaves something out.
    pub filtered: bool,
    /// `activation/udev_sync` and `activation/udev_rules`: udev makes the nodes, and LVM waits for it.
    pub udev: bool,
}

/// The settings in force, as `lvmconfig` says them.
pub fn host_settings() -> Result<HostSettings> {
    // Not with our settings: what the host's own commands do.
    let output = Call::new(Program::Lvmconfig)
        .args("--type full devices/scan_lvs devices/filter devices/global_filter".split(' '))
        .args(["activation/udev_sync", "activation/udev_rules"])
        .run()?;
    settings(&String::from_utf8_lossy(&output.stdout))
}

fn settings(text: &str) -> Result<HostSettings> {
    let value = |key: &str| {
        let mut pairs = text.lines().filter_map(|line| line.trim().split_once('='));
        let found = pairs.find_map(|(k, value)| (k == key).then_some(value));
        found
            .ok_or_else(|| Error::new(Code::CommandFailed, format!("lvmconfig does not say {key}")))
    };
    let all = "[\"a|.*|\"]";
    Ok(HostSettings {
        scan_lvs: value("scan_lvs")? != "0",
        filtered: value("filter")? != all || value("global_filter")? != all,
        udev: value("udev_sync")? == "1" && value("udev_rules")? == "1",
    })
}

/// A call of an LVM program with our settings.
pub(super) fn lvm(program: Program) -> Call {
    Call::new(program).args(["--config", CONFIG])
}

/// The volume groups that a command of ours changes at the moment; other jobs of this process wait.
pub static GROUPS: Turns = Turns::new();

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A linear volume for tests of other modules.
    pub(in crate::snapshot) fn origin(size: u64, extent_size: u64) -> LvInfo {
        let mut lv = parse(REPORT).unwrap().remove(0);
        lv.size = size;
        lv.extent_size = extent_size;
        lv
    }

    /// A thick snapshot.
    pub(in crate::snapshot) fn snapshot() -> LvInfo {
        parse(REPORT).unwrap().remove(1)
    }

    const REPORT: &[u8] = br#"{"report":[{"lv":[
      {"vg_name":"vg0","vg_uuid":"Cx0yCh-OXKp-hlrC-BM9W-E5Hs-SoaW-uUnEeG","vg_extent_size":"4194304",
       "vg_free_count":"491","lv_name":"domu-a","lv_uuid":"mPXMxM-bWVk-nYwJ-1uwL-VDTm-JTnD-RvdenH",
       "lv_size":"67108864","lv_attr":"owi-a-s---","lv_layout":"linear","lv_role":"public,origin,thickorigin",
       "pool_lv":"","lv_tags":"a,b=c","origin":"","lv_active":"active","lv_device_open":"0",
       "lv_kernel_major":"253","lv_kernel_minor":"0"},
      {"vg_name":"vg0","vg_uuid":"Cx0yCh-OXKp-hlrC-BM9W-E5Hs-SoaW-uUnEeG","vg_extent_size":"4194304",
       "vg_free_count":"491","lv_name":"s1","lv_uuid":"czMlG0-ZF7q-0XKn-Q3DF-Se3f-9WOh-wYdaa9",
       "lv_size":"16777216","lv_attr":"swi-a-s---","lv_layout":"linear",
       "lv_role":"public,snapshot,thicksnapshot","pool_lv":"","lv_tags":"","origin":"domu-a",
       "lv_active":"","lv_device_open":"-1","lv_kernel_major":"-1","lv_kernel_minor":"-1"}]}]}"#;

    #[test]
    fn test_groups() {
        let found = parse_groups("  vg0/3\n  vg-1/0\n\n").unwrap();
        assert_eq!(found, [("vg0".to_owned(), 3), ("vg-1".to_owned(), 0)]);
        assert!(parse_groups("").unwrap().is_empty());
        for bad in ["vg0", "vg0/", "vg0/x", "  WARNING: something\n"] {
            assert!(parse_groups(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn test_settings_of_the_host() {
        let all = "scan_lvs=0\nfilter=[\"a|.*|\"]\nglobal_filter=[\"a|.*|\"]\nudev_sync=1\nudev_rules=1\n";
        let usual = settings(all).unwrap();
        assert_eq!(
            (usual.scan_lvs, usual.filtered, usual.udev),
            (false, false, true)
        );
        let other = |from: &str, to: &str| settings(&all.replacen(from, to, 1));
        assert!(other("scan_lvs=0", "scan_lvs=1").unwrap().scan_lvs);
        assert!(other("a|.*|", "r|^/dev/loop|").unwrap().filtered);
        assert!(!other("udev_rules=1", "udev_rules=0").unwrap().udev);
        // What is not said is not fine.
        assert!(other("scan_lvs=0\n", "").is_err());
        assert!(other("udev_sync=1\n", "").is_err());
    }

    #[test]
    fn test_report_of_strings_becomes_values() {
        let lvs = parse(REPORT).unwrap();
        assert_eq!(lvs.len(), 2);
        assert_eq!(lvs[0].name.to_string(), "vg0/domu-a");
        assert_eq!(lvs[0].name.dm_name(), "vg0-domu--a");
        assert_eq!(lvs[0].tags, ["a", "b=c"]);
        assert_eq!(lvs[0].devno, Some((253, 0)));
        assert!(lvs[0].active && !lvs[0].is_snapshot() && !lvs[0].open);
        assert_eq!(lvs[1].origin.as_deref(), Some("domu-a"));
        assert!(lvs[1].is_thick_snapshot() && !lvs[1].active);
        assert_eq!(lvs[1].devno, None);
    }

    #[test]
    fn test_report_that_is_not_one_is_refused() {
        assert!(parse(b"").is_err());
        assert!(parse(br#"{"report":[{"lv":[{"vg_name":"x"}]}]}"#).is_err());
        assert!(parse(br#"{"report":[]}"#).unwrap().is_empty());
    }

    #[test]
    fn test_names_that_could_be_options_are_refused() {
        for bad in ["-f", "", ".", "..", "a/b", "a b", "ä", "a\n"] {
            assert!(LvName::new("vg0", bad).is_err(), "{bad:?}");
            assert!(LvName::new(bad, "lv").is_err(), "{bad:?}");
        }
        assert!(LvName::new("vg-0", "domu_a.b+c").is_ok());
    }

    #[test]
    fn test_uuid_round_trips_through_its_compact_form() {
        let uuid: LvmUuid = "mPXMxM-bWVk-nYwJ-1uwL-VDTm-JTnD-RvdenH".parse().unwrap();
        assert_eq!(LvmUuid::from_compact(&uuid.compact()), Some(uuid));
        assert!("mPXMxM".parse::<LvmUuid>().is_err());
    }
}
