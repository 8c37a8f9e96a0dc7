//! Who holds a block device, so that an error can name the culprit.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::host::{self, Devno};
use crate::error::escape;

/// One holder of a device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Holder {
    /// A process that has the device, or something on the filesystem in it, open.
    Process {
        /// Process.
        process: Process,
        /// `working directory`, `root`, or `open` and the path.
        what: String,
    },
    /// A mount namespace in which the filesystem of the device is mounted; with one process of it.
    Mount {
        /// A process that lives in the namespace.
        process: Process,
        /// Number of the namespace.
        namespace: u64,
        /// Mount point as that process sees it.
        point: String,
    },
    /// A device on top of this one.
    Device {
        /// Its name in sysfs.
        name: String,
        /// Its device-mapper name.
        dm_name: Option<String>,
    },
    /// The host swaps on it.
    Swap,
}

/// A process, for people.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Process id.
    pub pid: u32,
    /// Command name.
    pub command: String,
    /// systemd unit, when it runs in one.
    pub unit: Option<String>,
}

impl Process {
    fn read(pid: u32) -> Process {
        let command = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
        let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        Process {
            pid,
            command: escape(command.trim_ascii_end()),
            unit: unit(&cgroup),
        }
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {}", self.command, self.pid)?;
        if let Some(unit) = &self.unit {
            write!(f, ", {unit}")?;
        }
        f.write_str(")")
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Holder::Process { process, what } => write!(f, "{process}: {what}"),
            Holder::Mount {
                process,
                namespace,
                point,
            } => write!(
                f,
                "mounted on {point} in mount namespace {namespace} of {process}"
            ),
            Holder::Device { name, dm_name } => {
                write!(f, "device {name}")?;
                match dm_name {
                    Some(dm_name) => write!(f, " ({dm_name})"),
                    None => Ok(()),
                }
            }
            Holder::Swap => f.write_str("swap of this host"),
        }
    }
}

/// `; held by …` for an error message; empty when nobody is found.
pub(super) fn describe(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return String::new();
    }
    // A whole tree of processes may hold it; the first few tell enough.
    let some: Vec<String> = holders.iter().take(8).map(Holder::to_string).collect();
    let more = match holders.len().saturating_sub(some.len()) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    format!("; held by {}{more}", some.join(", "))
}

/// Everything on this host that holds the device. Looks at all processes: takes a while.
pub fn holders(devno: Devno) -> Vec<Holder> {
    let mut found = BTreeSet::new();
    let sys = PathBuf::from(format!("/sys/dev/block/{}:{}", devno.0, devno.1));
    for name in host::names(&sys.join("holders")) {
        let dm_name = host::read_line(&Path::new("/sys/class/block").join(&name).join("dm/name"));
        let dm_name = Some(dm_name).filter(|name| !name.is_empty());
        found.insert(Holder::Device { name, dm_name });
    }
    for (name, _) in host::loops_on(devno) {
        let dm_name = None;
        found.insert(Holder::Device { name, dm_name });
    }
    if host::is_swap(devno) {
        found.insert(Holder::Swap);
    }
    let mut namespaces = BTreeSet::new();
    for name in host::names(Path::new("/proc")) {
        if let Ok(pid) = name.parse::<u32>() {
            process_holds(pid, devno, &mut namespaces, &mut found);
        }
    }
    found.into_iter().collect()
}

/// Processes come and go: what cannot be read any more holds nothing.
fn process_holds(
    pid: u32,
    devno: Devno,
    namespaces: &mut BTreeSet<u64>,
    found: &mut BTreeSet<Holder>,
) {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let mut add = |what: String| {
        found.insert(Holder::Process {
            process: Process::read(pid),
            what,
        });
    };
    for (link, what) in [("cwd", "working directory"), ("root", "root")] {
        if on_device(&proc.join(link), devno) == Some(On::Filesystem) {
            add(what.to_owned());
        }
    }
    for fd in host::names(&proc.join("fd")) {
        let link = proc.join("fd").join(&fd);
        let on = on_device(&link, devno);
        if on.is_some() {
            let target = fs::read_link(&link).unwrap_or_default();
            add(format!("open {}", escape(target.as_os_str().as_bytes())));
        }
    }
    let Ok(namespace) = fs::metadata(proc.join("ns/mnt")).map(|meta| meta.ino()) else {
        return;
    };
    if namespaces.insert(namespace) {
        for point in host::mount_points(pid, devno) {
            found.insert(Holder::Mount {
                process: Process::read(pid),
                namespace,
                point,
            });
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum On {
    /// The device itself.
    Device,
    /// A file of the filesystem in it.
    Filesystem,
}

/// Asks the kernel's memory only: a process may have files of a network filesystem open that does
/// not answer.
fn on_device(link: &Path, devno: Devno) -> Option<On> {
    let wanted = StatxFlags::TYPE;
    let stat = statx(CWD, link, AtFlags::STATX_DONT_SYNC, wanted).ok()?;
    let is_block = u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFBLK;
    if is_block && (stat.stx_rdev_major, stat.stx_rdev_minor) == devno {
        Some(On::Device)
    } else if (stat.stx_dev_major, stat.stx_dev_minor) == devno {
        Some(On::Filesystem)
    } else {
        None
    }
}

/// The unit in a `/proc/PID/cgroup`: the innermost part that names one.
fn unit(cgroup: &str) -> Option<String> {
    let is_unit = |part: &&str| {
        [".service", ".scope", ".mount", ".socket", ".swap"]
            .iter()
            .any(|suffix| part.ends_with(suffix))
    };
    cgroup
        .lines()
        .filter_map(|line| line.rsplit(':').next()?.rsplit('/').find(is_unit))
        .next()
        .map(|unit| escape(unit.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_unit_is_read_from_both_cgroup_layouts() {
        assert_eq!(
            unit("0::/system.slice/bacula-fd.service\n").as_deref(),
            Some("bacula-fd.service")
        );
        assert_eq!(
            unit("1:name=systemd:/user.slice/user-0.slice/session-3.scope\n0::/\n").as_deref(),
            Some("session-3.scope")
        );
        assert_eq!(unit("0::/\n"), None);
    }

    #[test]
    fn test_this_process_holds_its_working_directory() {
        let cwd = std::env::current_dir().unwrap();
        let dev = host::split(fs::metadata(cwd).unwrap().dev());
        let me = std::process::id();
        assert!(
            holders(dev).iter().any(|holder| matches!(holder,
            Holder::Process { process, what } if process.pid == me && what == "working directory"))
        );
    }
}
