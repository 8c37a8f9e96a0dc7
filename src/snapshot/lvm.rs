//! The host's LVM: reports, and locks around our own commands.
//!
//! A single `lvs` call reports everything, including volume group figures, because each LVM command
//! scans the host's devices.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

use super::command::{Call, Program};
use crate::error::{Code, Error, Result, escape};
use crate::hostdev::lvname::LvName;
use crate::turn::Turns;

/// Settings for all our commands: no D-Bus notices, no polling daemon, and no dmeventd, which would
/// keep a snapshot open during its removal. Fixes the report format regardless of lvm.conf.
/// Metadata backups follow the host's settings.
const CONFIG: &str = "global/notify_dbus=0 global/use_lvmpolld=0 activation/monitoring=0 \
    report/compact_output=0 report/compact_output_cols=\"\" report/list_item_separator=\",\"";

/// LVM's UUID of a volume or group: 32 characters in dashed groups, as in reports.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LvmUuid(String);

impl LvmUuid {
    /// The 32 characters without dashes, as in device-mapper UUIDs.
    pub fn compact(&self) -> String {
        self.0.replace('-', "")
    }

    /// Converts from 32 characters without dashes.
    pub fn from_compact(text: &str) -> Option<Self> {
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return None;
        }
        let groups = [0..6, 6..10, 10..14, 14..18, 18..22, 22..26, 26..32];
        Some(LvmUuid(groups.map(|g| &text[g]).join("-")))
    }

    /// The form used in reports.
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

/// A visible logical volume, with the needed facts about its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LvInfo {
    /// Names.
    pub name: LvName,
    /// UUID of the volume.
    pub uuid: LvmUuid,
    /// UUID of the group.
    pub vg_uuid: LvmUuid,
    /// Size in bytes.
    pub size: u64,
    /// `lv_attr` in LVM's notation.
    pub attr: String,
    /// Layout: `linear`, `striped`, `thin`, `pool`, `raid1`, `cache` …
    pub layout: Vec<String>,
    /// Role: `public`, `snapshot`, `thicksnapshot`, `origin` …
    pub role: Vec<String>,
    /// Thin pool that contains it.
    pub pool: Option<String>,
    /// Tags.
    pub tags: Vec<String>,
    /// Origin of a snapshot or cached volume.
    pub origin: Option<String>,
    /// Whether its device exists.
    pub active: bool,
    /// Whether the device is open, by a running guest or the host.
    pub open: bool,
    /// Major and minor number if active.
    pub devno: Option<(u32, u32)>,
    /// Extent size of the group in bytes.
    pub extent_size: u64,
    /// Free extents of the group.
    pub vg_free: u64,
    /// Evidence that other hosts write to the group's metadata too.
    pub sharing: Sharing,
}

/// A group's marks for use by several hosts. All empty for an ordinary group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sharing {
    /// `vg_lock_type`: `sanlock`, `dlm`, `idm`, or `clvm` of LVM before 2.03. Empty: none.
    pub lock_type: String,
    /// `vg_clustered`, the mark of LVM before 2.03.
    pub clustered: bool,
    /// `vg_systemid`: the host that owns the group. Empty: any host may use it.
    pub system_id: String,
}

impl LvInfo {
    /// Whether it is a thin volume (not a pool).
    pub fn is_thin(&self) -> bool {
        self.has_layout("thin") && !self.is_pool()
    }

    /// Whether it is a thin or cache pool.
    pub fn is_pool(&self) -> bool {
        self.has_layout("pool")
    }

    /// Whether it is a thick or thin snapshot.
    pub fn is_snapshot(&self) -> bool {
        self.has_role("snapshot")
    }

    /// Whether it is a thick snapshot.
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

/// Columns of [`list`], in the order of [`Row`]. No segment columns: they would produce one row per
/// segment.
const COLUMNS: &str = "vg_name,vg_uuid,vg_extent_size,vg_free_count,lv_name,lv_uuid,lv_size,lv_attr,\
lv_layout,lv_role,pool_lv,lv_tags,origin,lv_active,lv_device_open,lv_kernel_major,lv_kernel_minor,vg_lock_type,vg_clustered,vg_systemid";

#[derive(Deserialize)]
struct Report {
    report: Vec<Part>,
}

#[derive(Deserialize)]
struct Part {
    #[serde(default)]
    lv: Vec<Row>,
}

/// All values are strings; empty means none and `-1` not applicable.
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
    vg_lock_type: String,
    vg_clustered: String,
    vg_systemid: String,
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
            name: LvName::new(&self.vg_name, &*self.lv_name)?,
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
            sharing: Sharing {
                // LVM before 2.03.12 reports `none`, later versions nothing.
                lock_type: Some(self.vg_lock_type)
                    .filter(|kind| kind != "none")
                    .unwrap_or_default(),
                clustered: !matches!(self.vg_clustered.as_str(), "" | "0"),
                system_id: self.vg_systemid,
            },
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

/// Lists all visible logical volumes of the host in LVM's order.
pub fn list() -> Result<Vec<LvInfo>> {
    report(&[])
}

/// Lists the visible logical volumes of these groups. An unknown group is an error.
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

/// Lists all volume groups of the host with their numbers of visible volumes.
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

/// Returns this host's LVM system ID; empty if it has none. Then LVM shows no group that has one,
/// except those of `extra_system_ids`.
pub fn system_id() -> Result<String> {
    let output = Call::new(Program::Lvm).arg("systemid").run()?;
    parse_system_id(&String::from_utf8_lossy(&output.stdout))
}

fn parse_system_id(text: &str) -> Result<String> {
    let id = text.trim().strip_prefix("system ID:").map(str::trim);
    id.map(str::to_owned).ok_or_else(|| {
        let what = format!("lvm systemid says `{}`", escape(text.as_bytes()));
        Error::new(Code::CommandFailed, what)
    })
}

/// Settings of the host's LVM that affect its view of guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSettings {
    /// `devices/scan_lvs`: LVM scans logical volumes for physical volumes, so it reads guest disks.
    pub scan_lvs: bool,
    /// Whether `devices/filter` or `devices/global_filter` rejects any device.
    pub filtered: bool,
    /// `activation/udev_sync` and `activation/udev_rules`: udev creates the nodes, and LVM waits
    /// for it.
    pub udev: bool,
}

/// Effective settings reported by `lvmconfig`.
pub fn host_settings() -> Result<HostSettings> {
    // Without our settings: shows the behaviour of the host's own commands.
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
    let settings = format!("{CONFIG}{}", super::filter::config());
    Call::new(program).args(["--config", &settings])
}

/// Like `lvm`, for use while volumes are suspended: forbids reads from volumes even if the host
/// sets `scan_lvs`.
pub(super) fn lvm_beside_suspended(program: Program) -> Call {
    let settings = format!(
        "{CONFIG}{} devices/ignore_suspended_devices=1",
        super::filter::config()
    );
    Call::new(program).args(["--config", &settings])
}

/// Volumes that the host's own LVM commands scan under the effective settings.
pub fn looked_into(volumes: &[LvInfo]) -> Result<Vec<String>> {
    let output = Call::new(Program::Pvs)
        .args("-a --noheadings -o pv_name".split(' '))
        .run()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let devices: Vec<&str> = text.lines().map(str::trim).collect();
    let is_seen = |lv: &&LvInfo| {
        let paths = [
            format!("/dev/{}", lv.name),
            format!("/dev/mapper/{}", lv.name.dm_name()),
        ];
        paths.iter().any(|path| devices.contains(&path.as_str()))
    };
    let seen = volumes.iter().filter(is_seen);
    Ok(seen.map(|lv| lv.name.to_string()).collect())
}

/// Volume groups being changed by our commands; other jobs of this process wait.
pub static GROUPS: Turns = Turns::new();

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A linear volume for tests in other modules.
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
       "lv_kernel_major":"253","lv_kernel_minor":"0","vg_lock_type":"","vg_clustered":"0","vg_systemid":""},
      {"vg_name":"vg0","vg_uuid":"Cx0yCh-OXKp-hlrC-BM9W-E5Hs-SoaW-uUnEeG","vg_extent_size":"4194304",
       "vg_free_count":"491","lv_name":"s1","lv_uuid":"czMlG0-ZF7q-0XKn-Q3DF-Se3f-9WOh-wYdaa9",
       "lv_size":"16777216","lv_attr":"swi-a-s---","lv_layout":"linear",
       "lv_role":"public,snapshot,thicksnapshot","pool_lv":"","lv_tags":"","origin":"domu-a",
       "lv_active":"","lv_device_open":"-1","lv_kernel_major":"-1","lv_kernel_minor":"-1","vg_lock_type":"","vg_clustered":"0","vg_systemid":""}]}]}"#;

    #[test]
    fn test_marks_of_a_shared_group() {
        let report = std::str::from_utf8(REPORT).unwrap();
        let of = |marks: &str| {
            let usual = r#""vg_lock_type":"","vg_clustered":"0","vg_systemid":"""#;
            let text = report.replacen(usual, marks, 1);
            parse(text.as_bytes()).unwrap().remove(0).sharing
        };
        assert_eq!(parse(REPORT).unwrap()[0].sharing, Sharing::default());
        let none = of(r#""vg_lock_type":"none","vg_clustered":"","vg_systemid":"""#);
        assert_eq!(none, Sharing::default());
        let all = of(r#""vg_lock_type":"sanlock","vg_clustered":"1","vg_systemid":"host2""#);
        assert_eq!(all.lock_type, "sanlock");
        assert!(all.clustered);
        assert_eq!(all.system_id, "host2");
        // An LVM that does not report a column says so itself; no mark is assumed.
        let text = report.replace(r#","vg_lock_type":"""#, "");
        assert!(parse(text.as_bytes()).is_err());
    }

    #[test]
    fn test_system_id() {
        assert_eq!(parse_system_id("  system ID: host1\n").unwrap(), "host1");
        assert_eq!(parse_system_id("  system ID: \n").unwrap(), "");
        assert!(parse_system_id("").is_err());
    }

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
        // A missing setting is not taken for a good one.
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
    fn test_uuid_round_trips_through_its_compact_form() {
        let uuid: LvmUuid = "mPXMxM-bWVk-nYwJ-1uwL-VDTm-JTnD-RvdenH".parse().unwrap();
        assert_eq!(LvmUuid::from_compact(&uuid.compact()), Some(uuid));
        assert!("mPXMxM".parse::<LvmUuid>().is_err());
    }
}
