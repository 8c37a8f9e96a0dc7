//! Names and UUIDs of guestsnap's own devices in LVM and the kernel.

/// Prefix of every name.
pub const PREFIX: &str = "guestsnap-";
/// Prefix of the device-mapper UUID of every device that guestsnap maps.
///
/// LVM treats a device as private, and never reads it, if its UUID begins with `LVM-` and is longer
/// than that plus the ids of a group and a volume (64 characters). Real ids contain no `_`, so no
/// lookup of a host volume matches these. No `-` follows them: libblkid refuses to probe a device
/// whose UUID has one there, and guestsnap needs that probe.
pub const DM_UUID_PREFIX: &str = concat!(
    "LVM-",
    "guestsnap_private_device_of_a_backup_job________________________",
    "."
);
/// The UUID prefix of earlier versions. LVM reads such devices.
const OLD_DM_UUID_PREFIX: &str = "GUESTSNAP-";

/// Device-mapper UUID for the device with this name.
pub fn dm_uuid(name: &str) -> String {
    format!("{DM_UUID_PREFIX}{}", name.replace('-', ":"))
}

/// Whether this or an earlier version of guestsnap mapped the device with this name and UUID.
pub fn is_our_device(name: &str, uuid: &str) -> bool {
    let old = uuid.strip_prefix(OLD_DM_UUID_PREFIX) == Some(name);
    name.starts_with(PREFIX) && (uuid == dm_uuid(name) || old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_devices_have_uuids_that_lvm_leaves_alone() {
        let longest = format!("{PREFIX}4294967295-4294967295.4294967295-4294967295");
        for name in ["guestsnap-1-2.3-4", &longest] {
            let uuid = dm_uuid(name);
            // Longer than `LVM-` and two ids of 32, within the kernel's limit.
            assert!((70..128).contains(&uuid.len()), "{uuid}");
            let (ids, rest) = uuid.strip_prefix("LVM-").unwrap().split_at(64);
            let of_an_id = |c: char| c.is_ascii_alphanumeric() || "!#".contains(c);
            assert!(!ids[..32].chars().all(of_an_id) && !ids[32..].chars().all(of_an_id));
            // libblkid does not take it for a private device.
            assert!(!ids.contains('-') && !rest.contains('-'), "{uuid}");
            assert!(is_our_device(name, &uuid));
            assert!(is_our_device(name, &format!("GUESTSNAP-{name}")));
        }
        let uuid = dm_uuid("guestsnap-1-2.3-4");
        for (name, uuid) in [
            ("guestsnap-1-2.3-5", &*uuid),
            ("vg0-root", &dm_uuid("vg0-root")),
            ("guestsnap-1", "GUESTSNAP-guestsnap-2"),
            ("guestsnap-1", "LVM-guestsnap-1"),
            ("guestsnap-1", ""),
        ] {
            assert!(!is_our_device(name, uuid), "{name} {uuid}");
        }
    }
}
