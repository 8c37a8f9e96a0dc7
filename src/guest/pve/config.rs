//! Common parts of the configurations of machines and containers.

/// Maximum size of a file, in bytes.
pub const MAX_BYTES: usize = 1 << 20;

/// Maximum length of a line, in bytes.
pub const MAX_LINE: usize = 64 << 10;

/// The current configuration of a virtual machine or container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// `name:` or `hostname:`, if given; one safe path component.
    pub name: Option<String>,
    /// `template: 1`.
    pub template: bool,
    /// `lock:`, the operation that holds the guest.
    pub lock: Option<String>,
    /// `agent:` of a virtual machine.
    pub agent: Agent,
    /// Drives or mount points in file order.
    pub drives: Vec<Drive>,
}

/// The guest agent of a virtual machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Agent {
    /// Not in the guest.
    #[default]
    Off,
    /// In the guest, but filesystems are not to be frozen.
    NoFreeze,
    /// In the guest.
    On,
}

impl Agent {
    /// Parses `[enabled=]1,freeze-fs=0`. Earlier versions have `freeze-fs-on-backup`.
    fn parse(value: &str) -> Agent {
        let mut agent = Agent::Off;
        let mut freeze = true;
        for part in value.split(',').map(str::trim) {
            match part.split_once('=').unwrap_or(("enabled", part)) {
                ("enabled", on) if boolean(on) == Some(true) => agent = Agent::On,
                ("freeze-fs" | "freeze-fs-on-backup", on) => freeze &= boolean(on) != Some(false),
                _ => {}
            }
        }
        match agent {
            Agent::On if !freeze => Agent::NoFreeze,
            agent => agent,
        }
    }
}

/// A guest, for commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handle {
    /// A container.
    Container,
    /// A virtual machine.
    Machine {
        /// Its number.
        vmid: u32,
        /// Its agent.
        agent: Agent,
    },
}

/// A drive of a virtual machine, or a mount point of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive {
    /// Its key: `scsi0`, `rootfs`, `mp0`.
    pub key: String,
    /// A volume id (`storage:volume`) or an absolute path; empty if the line has none.
    pub volume: String,
    /// `format=`, if given.
    pub format: Option<String>,
    /// Containers: the path in the guest, without slashes at its ends; empty: the root.
    pub place: Option<String>,
    /// The role of the drive.
    pub role: Role,
}

/// The role of a drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A disk to back up.
    Disk,
    /// A disk with `backup=0`: its owner wants no backup.
    NotWanted,
    /// An optical drive, or the configuration disk of cloud-init.
    Cdrom,
    /// A folder of the host that a container sees too.
    Bind,
}

/// Parses the VMID of a file's name, `100.conf`. Refuses leading zeros.
pub fn vmid(file: &str) -> Option<u32> {
    let digits = file.strip_suffix(".conf")?;
    let plain = !digits.starts_with('0') && digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|_| plain)
}

impl Config {
    /// Parses the lines `key: value` before the first section; a line `[name]` begins the section of
    /// a snapshot. `name` is the key of the guest's name, `drive` parses a drive if its key is one.
    /// The error names the line.
    pub(super) fn parse(
        text: &[u8],
        name: &str,
        is_drive: fn(&str) -> bool,
        drive: fn(&str, &str) -> Result<Drive, &'static str>,
    ) -> Result<Config, String> {
        if text.len() > MAX_BYTES {
            return Err(format!("longer than {MAX_BYTES} bytes"));
        }
        let mut config = Config::default();
        for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
            let fail = |problem: &str| format!("line {}: {problem}", index + 1);
            if line.len() > MAX_LINE {
                return Err(fail("too long"));
            }
            let line = line.trim_ascii();
            if line.first() == Some(&b'[') {
                break;
            }
            // Comments may hold any bytes; only known keys must be UTF-8.
            if line.first() == Some(&b'#') {
                continue;
            }
            let Some(colon) = line.iter().position(|byte| *byte == b':') else {
                continue;
            };
            let Ok(key) = std::str::from_utf8(&line[..colon]) else {
                continue;
            };
            if key != name && !matches!(key, "template" | "lock" | "agent") && !is_drive(key) {
                continue;
            }
            let value = std::str::from_utf8(&line[colon + 1..])
                .map_err(|_| fail("not UTF-8"))?
                .trim();
            match key {
                "template" => config.template = boolean(value) == Some(true),
                "lock" => config.lock = Some(value.to_owned()),
                "agent" => config.agent = Agent::parse(value),
                _ if key == name && !is_name(value) => {
                    return Err(fail("the name is not one safe path component"));
                }
                _ if key == name => config.name = Some(value.to_owned()),
                _ if config.drives.iter().any(|drive| drive.key == key) => {
                    return Err(fail("a drive is given twice"));
                }
                _ => config.drives.push(drive(key, value).map_err(fail)?),
            }
        }
        Ok(config)
    }
}

/// A boolean value.
pub(super) fn boolean(text: &str) -> Option<bool> {
    match text {
        "1" | "yes" | "on" | "true" => Some(true),
        "0" | "no" | "off" | "false" => Some(false),
        _ => None,
    }
}

fn is_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..")
        && name.len() <= 255
        && !name.contains(|c: char| c == '/' || c.is_control())
}

/// The number of a key `wordN`, if it is below `limit`.
pub(super) fn number(key: &str, word: &str, limit: u32) -> Option<u32> {
    let digits = key.strip_prefix(word)?;
    let number: u32 = digits.parse().ok()?;
    (number < limit && number.to_string() == digits).then_some(number)
}

/// Parses the settings that all drives have. The volume is the only one that needs no key.
pub(super) fn drive(key: &str, value: &str) -> Drive {
    let mut drive = Drive {
        key: key.to_owned(),
        volume: String::new(),
        format: None,
        place: None,
        role: Role::Disk,
    };
    for part in value.split(',') {
        match part.split_once('=') {
            None if drive.volume.is_empty() => drive.volume = part.to_owned(),
            Some(("file" | "volume", file)) => drive.volume = file.to_owned(),
            Some(("format", format)) => drive.format = Some(format.to_owned()),
            Some(("backup", wanted)) if boolean(wanted) == Some(false) => {
                drive.role = Role::NotWanted;
            }
            _ => {}
        }
    }
    drive
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_agent() {
        for (text, expected) in [
            ("1", Agent::On),
            ("enabled=1,type=virtio", Agent::On),
            ("1,fstrim_cloned_disks=1,freeze-fs-on-backup=1", Agent::On),
            ("1,freeze-fs-on-backup=0", Agent::NoFreeze),
            ("freeze-fs=0,enabled=1", Agent::NoFreeze),
            ("0", Agent::Off),
            ("0,freeze-fs=0", Agent::Off),
            ("", Agent::Off),
            ("type=virtio", Agent::Off),
        ] {
            assert_eq!(Agent::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn test_vmid() {
        assert_eq!(vmid("100.conf"), Some(100));
        for file in [
            "0100.conf",
            "+1.conf",
            ".conf",
            "0.conf",
            "100",
            "99999999999.conf",
        ] {
            assert_eq!(vmid(file), None, "{file}");
        }
    }
}
