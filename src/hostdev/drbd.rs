//! DRBD on this host: its devices in sysfs, the state of their local disks, and its metadata on volumes.
//!
//! The formats are those of DRBD 8.4 (`/proc/drbd`) and DRBD 9 (`drbdsetup status --json`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::uses::{names, read_line};

/// The state of all devices in DRBD 8.4; the version only in DRBD 9. Absent: no DRBD in this kernel.
pub const PROC: &str = "/proc/drbd";

/// Bytes of a superblock of DRBD's metadata.
pub const SUPERBLOCK: u64 = 4096;

/// Position of the magic number in a superblock.
const MAGIC_AT: usize = 60;

/// The magic numbers of versions 7, 8, 8.4 in use, and 9.
const MAGIC: std::ops::RangeInclusive<u32> = 0x8374_026a..=0x8374_026d;

/// Maximum length of a state in messages.
const MAX_WORD: usize = 32;

/// Connection states in which the other host's writes do not arrive here.
const APART: [&str; 10] = [
    "StandAlone",
    "Disconnecting",
    "Unconnected",
    "Timeout",
    "BrokenPipe",
    "NetworkFailure",
    "ProtocolError",
    "TearDown",
    "WFConnection",
    "WFReportParams",
];

/// A DRBD device's state on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// `Primary` or `Secondary`.
    pub role: String,
    /// `UpToDate`, `Inconsistent`, `Diskless`, …
    pub disk: String,
    /// Whether writes of another host arrive here.
    pub connected: bool,
}

impl State {
    /// Why the volume below has no current data, with the remedy; `None`: it has.
    ///
    /// A primary is no exception: without a good disk of its own it reads from its peer.
    pub fn refusal(&self) -> Option<String> {
        let remedy = match self.disk.as_str() {
            "UpToDate" => return None,
            "Inconsistent" => "run the job again when the synchronisation has ended",
            "Outdated" | "Consistent" => "connect it to its peer (`drbdadm connect`)",
            "Diskless" | "Failed" | "Detaching" => {
                "attach its disk (`drbdadm attach`), and look for errors of the disk"
            }
            _ => "run the job again when it is UpToDate",
        };
        Some(format!("{self} here: {remedy}"))
    }

    /// Why data may be missing although the disk counts as current.
    pub fn doubt(&self) -> Option<String> {
        (self.role != "Primary" && !self.connected).then(|| {
            format!(
                "{self} here without a connection: writes of the other host since then are missing"
            )
        })
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.role, self.disk)
    }
}

/// A state's word as the kernel writes it, for display.
fn word(text: &str) -> Option<String> {
    let good = !text.is_empty() && text.len() <= MAX_WORD;
    (good && text.bytes().all(|b| b.is_ascii_alphanumeric())).then(|| text.to_owned())
}

/// Parses `/proc/drbd` of DRBD 8: ` 0: cs:Connected ro:Primary/Secondary ds:UpToDate/UpToDate C r-----`.
pub fn parse_proc(text: &str) -> BTreeMap<u32, State> {
    let device = |line: &str| {
        let (minor, rest) = line.trim_start().split_once(": ")?;
        let field = |key: &str| {
            let value = rest.split(' ').find_map(|field| field.strip_prefix(key))?;
            word(value.split('/').next()?)
        };
        let connection = field("cs:")?;
        let state = State {
            role: field("ro:")?,
            disk: field("ds:")?,
            connected: !APART.contains(&connection.as_str()),
        };
        Some((minor.parse().ok()?, state))
    };
    text.lines().filter_map(device).collect()
}

#[derive(Deserialize)]
struct Resource {
    role: String,
    #[serde(default)]
    devices: Vec<Device>,
    #[serde(default)]
    connections: Vec<Connection>,
}

#[derive(Deserialize)]
struct Device {
    minor: u32,
    #[serde(rename = "disk-state")]
    disk: String,
}

#[derive(Deserialize)]
struct Connection {
    #[serde(rename = "connection-state")]
    state: String,
}

/// Parses the output of `drbdsetup status --json` of DRBD 9.
pub fn parse_status(json: &[u8]) -> Result<BTreeMap<u32, State>, serde_json::Error> {
    let resources: Vec<Resource> = serde_json::from_slice(json)?;
    let mut states = BTreeMap::new();
    for resource in resources {
        // Any of several peers may be the primary.
        let mut peers = resource.connections.iter().peekable();
        let connected = peers.peek().is_some() && peers.all(|peer| peer.state == "Connected");
        for device in resource.devices {
            if let (Some(role), Some(disk)) = (word(&resource.role), word(&device.disk)) {
                let state = State {
                    role,
                    disk,
                    connected,
                };
                states.insert(device.minor, state);
            }
        }
    }
    Ok(states)
}

/// The minor number in a kernel name `drbdN`.
pub fn minor(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("drbd")?;
    let good = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    good.then(|| digits.parse().ok()).flatten()
}

/// The kernel name in a path `/dev/drbdN`.
pub fn device_name(path: &Path) -> Option<&str> {
    let name = path.strip_prefix("/dev").ok()?.to_str()?;
    minor(name).map(|_| name)
}

/// Directory of a DRBD device in sysfs.
fn folder(minor: u32) -> PathBuf {
    PathBuf::from(format!("/sys/class/block/drbd{minor}"))
}

/// Bytes of the device, which its users see. Internal metadata follow them on the volume below.
pub fn size(minor: u32) -> Option<u64> {
    sectors(&folder(minor))
}

fn sectors(folder: &Path) -> Option<u64> {
    let sectors: u64 = read_line(&folder.join("size")).parse().ok()?;
    sectors.checked_mul(512)
}

/// A device-mapper device below DRBD.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Below {
    dm_name: String,
    bytes: u64,
}

/// The device-mapper device that holds the data of a DRBD device. `None`: it has none here, or several
/// may be it.
pub fn backing(minor: u32) -> Option<PathBuf> {
    let slaves = names(&folder(minor).join("slaves"));
    let below = slaves.iter().filter_map(|name| {
        let folder = Path::new("/sys/class/block").join(name);
        let dm_name = read_line(&folder.join("dm/name"));
        let bytes = sectors(&folder)?;
        (!dm_name.is_empty()).then_some(Below { dm_name, bytes })
    });
    let below = below.collect();
    let name = data(below, size(minor)?)?;
    Some(Path::new("/dev/mapper").join(name))
}

/// The data device among those below DRBD; another one holds external metadata.
fn data(mut below: Vec<Below>, size: u64) -> Option<String> {
    below.retain(|device| device.bytes >= size);
    if below.len() > 1 {
        let all: Vec<String> = below.iter().map(|device| device.dm_name.clone()).collect();
        // Dashes in names of volumes are doubled here, which changes neither ending.
        let is_metadata = |name: &str| data_name(name).is_some_and(|data| all.contains(&data));
        below.retain(|device| !is_metadata(&device.dm_name));
    }
    match below.as_slice() {
        [one] => Some(one.dm_name.clone()),
        _ => None,
    }
}

/// The DRBD devices on a block device.
pub fn on(devno: super::Devno) -> Vec<u32> {
    let holders = names(&super::uses::folder(devno).join("holders"));
    holders.iter().filter_map(|name| minor(name)).collect()
}

/// The data volume's name, if this is how Ganeti (`X_meta` of `X_data`) or LINSTOR (`X.meta_00000` of `X_00000`) names
/// a volume for external metadata.
pub fn data_name(name: &str) -> Option<String> {
    if let Some(stem) = name.strip_suffix("_meta") {
        return Some(format!("{stem}_data"));
    }
    let (stem, number) = name.rsplit_once(".meta_")?;
    let good = number.len() == 5 && number.bytes().all(|b| b.is_ascii_digit());
    good.then(|| format!("{stem}_{number}"))
}

/// Whether a block is a superblock of DRBD's metadata.
pub fn is_superblock(block: &[u8]) -> bool {
    let magic = block.get(MAGIC_AT..MAGIC_AT + 4);
    let magic = magic.and_then(|bytes| bytes.try_into().ok());
    magic.is_some_and(|bytes| MAGIC.contains(&u32::from_be_bytes(bytes)))
}

/// Position of internal metadata's superblock on a volume; `None`: it is too small for one.
pub fn internal_at(bytes: u64) -> Option<u64> {
    (bytes - bytes % SUPERBLOCK).checked_sub(SUPERBLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(role: &str, disk: &str, connected: bool) -> State {
        State {
            role: role.into(),
            disk: disk.into(),
            connected,
        }
    }

    #[test]
    fn test_states_of_drbd_8() {
        let text = "version: 8.4.11 (api:1/proto:86-101)\nsrcversion: 0\n \
             0: cs:StandAlone ro:Primary/Unknown ds:UpToDate/DUnknown   r-----\n    ns:0 nr:0 dw:8 dr:1 al:1 bm:0\n \
             1: cs:SyncTarget ro:Secondary/Primary ds:Inconsistent/UpToDate C r-----\n\t[>....] sync'ed: 1.0% (9: 9)K\n \
             2: cs:Unconfigured\n12: cs:WFConnection ro:Secondary/Unknown ds:UpToDate/DUnknown C r-----\n\
             13: cs:Connected ro:Pri\u{1b}mary/Secondary ds:UpToDate/UpToDate C r-----\nx: cs:Connected ro:Primary/S ds:UpToDate/U\n";
        let expected = [
            (0, state("Primary", "UpToDate", false)),
            (1, state("Secondary", "Inconsistent", true)),
            (12, state("Secondary", "UpToDate", false)),
        ];
        assert_eq!(parse_proc(text), expected.into());
        // DRBD 9 has no devices here.
        assert!(
            parse_proc("version: 9.2.8 (api:2/proto:86-122)\nTransports (api:20):\n").is_empty()
        );
    }

    #[test]
    fn test_states_of_drbd_9() {
        let json = r#"[
            {"name": "web", "node-id": 0, "role": "Secondary", "suspended": false,
             "devices": [{"volume": 0, "minor": 1000, "disk-state": "UpToDate", "client": false, "quorum": true},
                         {"volume": 1, "minor": 1001, "disk-state": "Diskless"}],
             "connections": [{"peer-node-id": 1, "name": "b", "connection-state": "Connected", "peer-role": "Primary"},
                             {"peer-node-id": 2, "name": "c", "connection-state": "Connecting"}]},
            {"name": "whole", "role": "Secondary", "devices": [{"minor": 7, "disk-state": "UpToDate"}],
             "connections": [{"name": "b", "connection-state": "Connected"}, {"name": "c", "connection-state": "Connected"}]},
            {"name": "alone", "role": "Primary", "devices": [{"minor": 5, "disk-state": "UpToDate"}]}]"#;
        let expected = [
            (5, state("Primary", "UpToDate", false)),
            (7, state("Secondary", "UpToDate", true)),
            // The peer that is cut off may be the primary by now.
            (1000, state("Secondary", "UpToDate", false)),
            (1001, state("Secondary", "Diskless", false)),
        ];
        assert_eq!(parse_status(json.as_bytes()).unwrap(), expected.into());
        assert!(parse_status(b"[]").unwrap().is_empty());
        for bad in ["", "{}", r#"[{"role": 1}]"#] {
            assert!(parse_status(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn test_a_current_disk_alone_is_a_guests_disk() {
        for (role, disk, connected, refusal, doubt) in [
            ("Primary", "UpToDate", true, "", false),
            ("Primary", "UpToDate", false, "", false),
            ("Secondary", "UpToDate", true, "", false),
            ("Secondary", "UpToDate", false, "", true),
            ("Secondary", "Inconsistent", true, "has ended", false),
            ("Primary", "Inconsistent", true, "has ended", false),
            ("Secondary", "Outdated", false, "drbdadm connect", true),
            ("Secondary", "Consistent", false, "drbdadm connect", true),
            ("Primary", "Diskless", true, "drbdadm attach", false),
            (
                "Secondary",
                "Negotiating",
                true,
                "when it is UpToDate",
                false,
            ),
        ] {
            let state = state(role, disk, connected);
            let found = state.refusal().unwrap_or_default();
            assert!(found.is_empty() == refusal.is_empty(), "{state}: {found}");
            assert!(found.contains(refusal), "{state}: {found}");
            assert_eq!(state.doubt().is_some(), doubt, "{state}");
        }
    }

    #[test]
    fn test_metadata_by_name_and_by_content() {
        for (name, expected) in [
            ("6d3a.disk0_meta", Some("6d3a.disk0_data")),
            ("res.meta_00000", Some("res_00000")),
            ("res.meta_0000x", None),
            ("res.meta_0", None),
            ("metadata", None),
        ] {
            assert_eq!(data_name(name).as_deref(), expected, "{name}");
        }
        let mut block = vec![0; 4096];
        assert!(!is_superblock(&block) && !is_superblock(&[]));
        for (last, expected) in [(0x69, false), (0x6b, true), (0x6d, true), (0x6e, false)] {
            block[60..64].copy_from_slice(&[0x83, 0x74, 0x02, last]);
            assert_eq!(is_superblock(&block), expected, "{last:x}");
        }
        assert_eq!(internal_at(10_000), Some(4096));
        assert_eq!(internal_at(4096), Some(0));
        assert_eq!(internal_at(4095), None);
    }

    #[test]
    fn test_the_data_among_the_devices_below() {
        let below = |devices: &[(&str, u64)], size| {
            let devices = devices.iter().map(|(name, bytes)| Below {
                dm_name: (*name).to_owned(),
                bytes: *bytes,
            });
            data(devices.collect(), size)
        };
        let found = |name: &str| Some(name.to_owned());
        assert_eq!(below(&[("vg-web", 10)], 9), found("vg-web"));
        assert_eq!(below(&[("vg-a", 10), ("vg-b", 2)], 10), found("vg-a"));
        let ganeti = [("vg-x.disk0_data", 10), ("vg-x.disk0_meta", 12)];
        assert_eq!(below(&ganeti, 10), found("vg-x.disk0_data"));
        assert_eq!(below(&[("vg-a", 10), ("vg-b", 12)], 10), None);
        assert_eq!(below(&[], 10), None);
    }

    #[test]
    fn test_devices_are_known_by_their_names() {
        for (path, expected) in [
            ("/dev/drbd0", Some("drbd0")),
            ("/dev/drbd1000", Some("drbd1000")),
            ("/dev/drbd", None),
            ("/dev/drbdx", None),
            ("/dev/drbd/by-res/web/0", None),
            ("/dev/drbd99999999999", None),
            ("drbd0", None),
        ] {
            assert_eq!(device_name(Path::new(path)), expected, "{path}");
        }
    }
}
