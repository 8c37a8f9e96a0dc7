//! `qemu-server/VMID.conf`: a virtual machine.

use super::{Config, Drive, Role, drive, number};

/// The buses, and the number of drives each can have in Proxmox VE.
const BUSES: [(&str, u32); 4] = [("ide", 4), ("sata", 6), ("scsi", 31), ("virtio", 16)];

/// Parses the current configuration. The error names the line.
pub fn parse(text: &[u8]) -> Result<Config, String> {
    Config::parse(
        text,
        "name",
        |key| bus(key).is_some(),
        |key, value| Ok(parse_drive(key, value)),
    )
}

/// The bus and number of a drive's key.
fn bus(key: &str) -> Option<(&'static str, u32)> {
    let mut buses = BUSES.iter();
    buses.find_map(|(bus, limit)| Some((*bus, number(key, bus, *limit)?)))
}

fn parse_drive(key: &str, value: &str) -> Drive {
    let mut drive = drive(key, value);
    let cdrom = value.split(',').any(|part| part == "media=cdrom");
    if cdrom || matches!(&*drive.volume, "none" | "cdrom") || is_cloud_init(&drive.volume) {
        drive.role = Role::Cdrom;
    }
    drive
}

/// Whether a volume is called `vm-VMID-cloudinit`, with or without a suffix of its format.
fn is_cloud_init(volume: &str) -> bool {
    let name = volume.rsplit([':', '/']).next().unwrap_or_default();
    let middle = name.split('.').next().unwrap_or_default();
    let middle = middle.strip_prefix("vm-");
    let number = middle.and_then(|rest| rest.strip_suffix("-cloudinit"));
    number.is_some_and(|n| !n.is_empty() && n.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The name of each drive in the guest, in the order of `drives`; `None`: it depends on the guest.
/// Linux names the disks of one bus in their order there, also if there are gaps.
pub fn guest_names(drives: &[Drive]) -> Vec<Option<String>> {
    let disks = || drives.iter().filter(|drive| drive.role != Role::Cdrom);
    let slots = || disks().filter_map(|drive| bus(&drive.key));
    // Disks of these buses share the letters of `sd`.
    let shared = |bus: &str| bus != "virtio";
    let name = |drive: &Drive| {
        let (own, number) = bus(&drive.key).filter(|_| drive.role != Role::Cdrom)?;
        let mixed = shared(own) && slots().any(|(other, _)| shared(other) && other != own);
        let before = slots().filter(|(other, n)| *other == own && *n < number);
        let (prefix, place) = match own {
            "virtio" => ("vd", before.count()),
            "ide" => ("hd", usize::try_from(number).ok()?),
            _ => ("sd", before.count()),
        };
        let letter = char::from(b'a' + u8::try_from(place).ok().filter(|place| *place < 26)?);
        (!mixed).then(|| format!("{prefix}{letter}"))
    };
    drives.iter().map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{MAX_BYTES, MAX_LINE};
    use super::*;

    #[test]
    fn test_current_configuration_only() {
        let text = b"# \xff\nname: web\nlock: backup\nscsi0: thin:vm-100-disk-0,size=8G\nscsi1: thin:d,backup=0\n\
            ide2: thin:vm-100-cloudinit,media=cdrom\nide0: local:100/vm-100-cloudinit.qcow2\nide1: none\n\
            scsi2: size=1\nscsi3: file=local:1/a.raw,format=raw\nscsi4: thin:vm-1-cloudinit-x\n\
            efidisk0: thin:e\nunused0: thin:u\nscsi31: thin:x\n\
            [before]\nname: old\ntemplate: 1\nvirtio0: thin:old";
        let config = parse(text).unwrap();
        assert_eq!(config.name.as_deref(), Some("web"));
        assert_eq!(config.lock.as_deref(), Some("backup"));
        assert!(!config.template);
        let drives: Vec<_> = config
            .drives
            .iter()
            .map(|d| (&*d.key, &*d.volume, d.role))
            .collect();
        assert_eq!(
            drives,
            [
                ("scsi0", "thin:vm-100-disk-0", Role::Disk),
                ("scsi1", "thin:d", Role::NotWanted),
                ("ide2", "thin:vm-100-cloudinit", Role::Cdrom),
                ("ide0", "local:100/vm-100-cloudinit.qcow2", Role::Cdrom),
                ("ide1", "none", Role::Cdrom),
                ("scsi2", "", Role::Disk),
                ("scsi3", "local:1/a.raw", Role::Disk),
                ("scsi4", "thin:vm-1-cloudinit-x", Role::Disk),
            ]
        );
        assert_eq!(config.drives[6].format.as_deref(), Some("raw"));
    }

    #[test]
    fn test_hostile_configurations_are_refused() {
        for text in [
            "name: a/b",
            "name: ..",
            "name: a\x01b",
            "name:",
            "ide0: a\nide0: b",
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text:?}");
        }
        assert!(parse(b"scsi0: \xff").is_err());
        assert!(parse(&vec![b'a'; MAX_LINE + 1]).is_err());
        assert!(parse(&vec![b'\n'; MAX_BYTES + 1]).is_err());
        assert!(parse(b"template: 1").unwrap().template);
    }

    #[test]
    fn test_names_in_the_guest() {
        let cases: &[(&str, &[Option<&str>])] = &[
            ("scsi0: a\nscsi1: b", &[Some("sda"), Some("sdb")]),
            (
                "scsi10: a\nscsi2: b\nscsi0: c,media=cdrom",
                &[Some("sdb"), Some("sda"), None],
            ),
            (
                "virtio1: a,backup=0\nvirtio3: b\nscsi0: c",
                &[Some("vda"), Some("vdb"), Some("sda")],
            ),
            (
                "ide0: a\nide2: b,media=cdrom\nide3: c",
                &[Some("hda"), None, Some("hdd")],
            ),
            // Drivers load in any order.
            ("sata0: a\nscsi0: b\nvirtio0: c", &[None, None, Some("vda")]),
            ("ide0: a,backup=0\nscsi0: b", &[None, None]),
        ];
        for (text, expected) in cases {
            let names = guest_names(&parse(text.as_bytes()).unwrap().drives);
            let names: Vec<_> = names.iter().map(|name| name.as_deref()).collect();
            assert_eq!(names, *expected, "{text}");
        }
    }
}
