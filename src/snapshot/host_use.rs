//! Whether a disk belongs to the host itself.

use std::fs;

/// Who on this host uses a block device as its own: a mount in any namespace, swap, or a device
/// stacked on it. A running guest merely has it open, which is no use in this sense. Snapshots of
/// the device are stacked on it too and do not count.
pub fn host_use(major: u32, minor: u32) -> Option<String> {
    let device = format!("{major}:{minor}");
    if let Some(place) = mounted(&device) {
        return Some(format!("it is mounted on {place}"));
    }
    let name = fs::read_link(format!("/sys/dev/block/{device}"))
        .ok()?
        .file_name()?
        .to_string_lossy()
        .into_owned();
    let alias = fs::read_to_string(format!("/sys/dev/block/{device}/dm/name")).unwrap_or_default();
    for line in fs::read_to_string("/proc/swaps")
        .unwrap_or_default()
        .lines()
        .skip(1)
    {
        let path = line.split_ascii_whitespace().next().unwrap_or_default();
        let target = fs::canonicalize(path).unwrap_or_default();
        if target.file_name().is_some_and(|n| n == name.as_str())
            || path.ends_with(&format!("/mapper/{}", alias.trim()))
        {
            return Some("it is swap space of this host".to_owned());
        }
    }
    for holder in fs::read_dir(format!("/sys/dev/block/{device}/holders"))
        .ok()?
        .flatten()
    {
        let holder = holder.file_name().to_string_lossy().into_owned();
        let uuid =
            fs::read_to_string(format!("/sys/class/block/{holder}/dm/uuid")).unwrap_or_default();
        let stacked =
            fs::read_to_string(format!("/sys/class/block/{holder}/dm/name")).unwrap_or_default();
        // `…-real` and `…-cow` are LVM's own parts of an origin with snapshots.
        let own_part = uuid.trim().ends_with("-real") || uuid.trim().ends_with("-cow");
        let snapshot = uuid.starts_with("LVM-");
        if !own_part && !snapshot {
            return Some(format!("{holder} {} is stacked on it", stacked.trim()));
        }
    }
    None
}

/// The mount point of a device, in the namespace of any process.
fn mounted(device: &str) -> Option<String> {
    let mut seen = std::collections::HashSet::new();
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let path = entry.path();
        let Ok(namespace) = fs::read_link(path.join("ns/mnt")) else {
            continue;
        };
        if !seen.insert(namespace) {
            continue;
        }
        for line in fs::read_to_string(path.join("mountinfo"))
            .unwrap_or_default()
            .lines()
        {
            let mut fields = line.split(' ');
            if fields.nth(2) == Some(device) {
                return fields.nth(1).map(|p| crate::error::escape(p.as_bytes()));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn test_the_root_disk_is_in_use() {
        // Whatever the root is here, its device number is in mountinfo.
        let dev = fs::metadata("/").unwrap().dev();
        let place = mounted(&format!("{}:{}", libc::major(dev), libc::minor(dev)));
        assert!(place.is_some_and(|p| p.starts_with('/')));
        assert_eq!(mounted("4095:1"), None);
    }
}
