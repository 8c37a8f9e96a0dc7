//! LVM filter for our own commands: excludes our snapshots where LVM scans volumes.
//!
//! LVM scans volumes only if `scan_lvs` is set. Then, if a guest's whole disk is a physical volume,
//! its snapshot is a second device with the same PV UUID. `devices/filter` on a command line
//! replaces the administrator's, so their entries follow ours. `global_filter` is a separate
//! setting and stays in force.

use std::fs;

use super::command::{Call, Program};
use crate::error::{Code, Error, Result};

/// LVM's settings files. Our commands have no environment that could name others.
const FILES: [&str; 2] = ["/etc/lvm/lvm.conf", "/etc/lvm/lvmlocal.conf"];
/// Our snapshots by their names below `/dev/VG`, and by their device-mapper names.
const OURS: &str = r#""r|/guestsnap-[0-9]|","r|-guestsnap--[0-9]|""#;
/// A filter that accepts everything.
const ALL: &str = r#"["a|.*|"]"#;

/// The `--config` setting for the filter; empty if LVM scans no volumes.
pub(super) fn config() -> String {
    let set = |file: &&str| fs::read_to_string(file).is_ok_and(|text| mentions_scan(&text));
    if !FILES.iter().any(set) {
        return String::new();
    }
    match read() {
        Ok((true, filter)) => with_ours(&filter)
            .map(|filter| format!(" devices/filter={filter}"))
            .unwrap_or_default(),
        Ok((false, _)) => String::new(),
        Err(error) => {
            log::warn!(
                "our snapshots are not left out of LVM's scan: {}",
                error.report()
            );
            String::new()
        }
    }
}

/// Whether a settings file mentions `scan_lvs`.
fn mentions_scan(text: &str) -> bool {
    let lines = text
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default());
    lines.into_iter().any(|line| line.contains("scan_lvs"))
}

/// Effective settings: `scan_lvs` and the filter.
fn read() -> Result<(bool, String)> {
    let output = Call::new(Program::Lvmconfig)
        .args("--type full devices/scan_lvs devices/filter".split(' '))
        .run()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let value = |key: &str| {
        let mut pairs = text.lines().filter_map(|line| line.trim().split_once('='));
        let found = pairs.find_map(|(k, value)| (k == key).then(|| value.to_owned()));
        found
            .ok_or_else(|| Error::new(Code::CommandFailed, format!("lvmconfig does not say {key}")))
    };
    Ok((value("scan_lvs")? != "0", value("filter")?))
}

/// Appends the administrator's filter to our entries. Without one, ours stand alone: for a device
/// with several names, an accepted name overrides a rejected one.
fn with_ours(filter: &str) -> Option<String> {
    if filter == ALL {
        return Some(format!("[{OURS}]"));
    }
    let entries = filter.strip_prefix('[').unwrap_or(filter);
    let entries = entries.strip_suffix(']').unwrap_or(entries);
    // Leave filters that need quoting unchanged.
    let plain = !entries.is_empty() && !entries.contains('\\');
    plain.then(|| format!("[{OURS},{entries}]"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_the_administrators_filter_stays() {
        let own = r#"["r|/dev/cdrom|","a|.*|"]"#;
        let both = with_ours(own).unwrap();
        assert!(both.starts_with(&format!("[{OURS},")), "{both}");
        assert!(both.ends_with(r#","r|/dev/cdrom|","a|.*|"]"#), "{both}");
        // A single entry, printed without brackets.
        let one = with_ours(r#""r|/dev/loop|""#).unwrap();
        assert_eq!(one, format!(r#"[{OURS},"r|/dev/loop|"]"#));
        assert_eq!(with_ours(ALL).unwrap(), format!("[{OURS}]"));
        assert_eq!(with_ours(r#"["r|a\"b|"]"#), None);
        assert_eq!(with_ours("[]"), None);
    }

    #[test]
    fn test_only_a_setting_counts() {
        assert!(mentions_scan("devices {\n\tscan_lvs = 1\n}"));
        assert!(mentions_scan("devices/scan_lvs=1"));
        assert!(!mentions_scan("devices {\n\t# scan_lvs = 0\n}"));
    }
}
