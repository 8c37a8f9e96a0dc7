//! Rights of the process beyond being root. A hardened service unit removes capabilities and devices;
//! the calls that fail later do not name that reason.

use std::fs;
use std::io;
use std::path::Path;

use crate::error::{Code, Error, Result};

/// Required capabilities: number, name and purpose. Root has all of them unless a service unit
/// removes some.
const NEEDED: [(u32, &str, &str); 9] = [
    (21, "CAP_SYS_ADMIN", "snapshots, maps and mounts"),
    (2, "CAP_DAC_READ_SEARCH", "reading guests' files"),
    (1, "CAP_DAC_OVERRIDE", "writing restored files"),
    (0, "CAP_CHOWN", "owners of restored files"),
    (3, "CAP_FOWNER", "modes and times of restored files"),
    (4, "CAP_FSETID", "setgid of restored files"),
    (27, "CAP_MKNOD", "restored device nodes"),
    (31, "CAP_SETFCAP", "capabilities of restored files"),
    (9, "CAP_LINUX_IMMUTABLE", "flags of restored files"),
];

/// Without these no backup works.
const FOR_BACKUPS: usize = 2;

/// Required devices, each with its purpose.
pub const DEVICES: [(&str, &str); 2] = [
    ("/dev/mapper/control", "device-mapper"),
    ("/dev/loop-control", "loop devices"),
];

/// Lists the capabilities that a process lacks, each with its purpose. `process`: a number or `self`.
pub fn missing(process: &str) -> io::Result<Vec<String>> {
    let held = held(&fs::read_to_string(format!("/proc/{process}/status"))?)?;
    Ok(lacking(&NEEDED, held))
}

fn held(status: &str) -> io::Result<u64> {
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    line.and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
        .ok_or_else(|| io::Error::other("no CapEff in the status of the process"))
}

fn lacking(needed: &[(u32, &str, &str)], held: u64) -> Vec<String> {
    let lacks = needed.iter().filter(|(bit, ..)| held & (1 << bit) == 0);
    lacks
        .map(|(_, name, what)| format!("{name} ({what})"))
        .collect()
}

/// Whether this process may use a device: it can be there and still be closed to a service.
pub fn usable(device: &str) -> io::Result<()> {
    let opened = fs::File::options().read(true).write(true).open(device);
    opened.map(|_| ())
}

/// Running File Daemons, by process number. Those in containers save other systems.
pub fn daemons() -> Vec<String> {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/pid")).ok();
    let ours = namespace("self");
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let comm = fs::read(Path::new("/proc").join(&name).join("comm"));
        if comm.is_ok_and(|comm| comm == b"bacula-fd\n") && namespace(&name) == ours {
            found.push(name);
        }
    }
    found
}

/// Refuses a job whose rights are insufficient, before it creates anything.
pub(super) fn check() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::new(Code::NotRoot, "snapshots and mounts"));
    }
    let status = fs::read_to_string("/proc/self/status").and_then(|text| held(&text));
    // An unreadable path may exist.
    let lacks = status.map_or(Vec::new(), |held| lacking(&NEEDED[..FOR_BACKUPS], held));
    if lacks.is_empty() {
        return Ok(());
    }
    let what = format!(
        "{} is taken away from bacula-fd, probably by CapabilityBoundingSet= in its unit",
        lacks.join(", ")
    );
    Err(Error::new(Code::NotRoot, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_missing_capabilities_are_named() {
        assert!(lacking(&NEEDED, u64::MAX).is_empty());
        let without = !(1 << 21);
        assert_eq!(
            lacking(&NEEDED, without),
            ["CAP_SYS_ADMIN (snapshots, maps and mounts)"]
        );
        assert_eq!(
            held("Name:\tx\nCapEff:\t000001ffffffffff\n").unwrap(),
            0x1ff_ffff_ffff
        );
        assert!(held("Name:\tx\n").is_err());
    }
}
