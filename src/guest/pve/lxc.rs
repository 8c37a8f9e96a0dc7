//! `lxc/VMID.conf`: a container.

use super::{Config, Drive, Role, drive, number};

/// Number of mount points that a container can have in Proxmox VE.
const MAX_MOUNT_POINTS: u32 = 256;

/// Maximum length of a mount point's path, in bytes.
const MAX_PATH: usize = 4096;

/// Parses the current configuration. The error names the line.
pub fn parse(text: &[u8]) -> Result<Config, String> {
    Config::parse(
        text,
        "hostname",
        |key| key == "rootfs" || number(key, "mp", MAX_MOUNT_POINTS).is_some(),
        mount_point,
    )
}

fn mount_point(key: &str, value: &str) -> Result<Drive, &'static str> {
    let mut drive = drive(key, value);
    let place = match key {
        // Proxmox VE saves it whatever `backup=` says.
        "rootfs" => {
            drive.role = Role::Disk;
            String::new()
        }
        _ => {
            let mp = value.split(',').find_map(|part| part.strip_prefix("mp="));
            let place = mp.and_then(clean).filter(|place| !place.is_empty());
            place.ok_or("mp= is not an absolute path below the root")?
        }
    };
    drive.place = Some(place);
    if drive.volume.starts_with('/') && !drive.volume.starts_with("/dev/") {
        drive.role = Role::Bind;
    }
    Ok(drive)
}

/// A path without slashes at its ends; `None` if it is relative or holds `..`.
fn clean(path: &str) -> Option<String> {
    let bad = |part: &&str| matches!(*part, "." | "..") || part.contains(char::is_control);
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let good = path.starts_with('/') && path.len() <= MAX_PATH && !parts.iter().any(bad);
    good.then(|| parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_a_container() {
        let text = b"arch: amd64\nhostname: ct\nrootfs: thin:vm-101-disk-0,size=8G,backup=0\n\
            mp0: thin:vm-101-disk-1,mp=/srv//data/,backup=1\nmp1: volume=/tank,mp=/tank\nmp2: /dev/sdb1,mp=/b\n\
            mp3: thin:c,mp=/c,backup=0\nmp256: x,mp=/x\nlxc.mount.entry: /a b none\nnet0: name=eth0\n\
            [vzdump]\nhostname: old\nrootfs: old";
        let config = parse(text).unwrap();
        assert_eq!(config.name.as_deref(), Some("ct"));
        let drives: Vec<_> = config
            .drives
            .iter()
            .map(|d| (&*d.key, &*d.volume, d.place.as_deref().unwrap(), d.role))
            .collect();
        assert_eq!(
            drives,
            [
                ("rootfs", "thin:vm-101-disk-0", "", Role::Disk),
                ("mp0", "thin:vm-101-disk-1", "srv/data", Role::Disk),
                ("mp1", "/tank", "tank", Role::Bind),
                ("mp2", "/dev/sdb1", "b", Role::Disk),
                ("mp3", "thin:c", "c", Role::NotWanted),
            ]
        );
    }

    #[test]
    fn test_bad_mount_points_are_refused() {
        for text in [
            "mp0: thin:a",
            "mp0: thin:a,mp=",
            "mp0: thin:a,mp=/",
            "mp0: thin:a,mp=b",
            "mp0: thin:a,mp=/b/../c",
            "mp0: thin:a,mp=/b\x01",
            "mp0: a,mp=/a\nmp0: b,mp=/b",
            "hostname: a/b",
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text:?}");
        }
    }
}
