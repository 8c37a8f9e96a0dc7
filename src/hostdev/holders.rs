//! Finds the holders of a block device or image file, so that errors can name them.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::uses::{self, Devno};
use crate::error::escape;

/// Maximum devices visited by one [`stack`]; no real stack has more.
const MAX_STACK: usize = 64;

/// A device or file that may be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// A block device.
    Device(Devno),
    /// A file.
    File {
        /// Device number of its filesystem.
        dev: u64,
        /// Inode number.
        ino: u64,
    },
}

/// One holder of a device or file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Holder {
    /// A process with an open descriptor for the device, or for a file on its filesystem.
    Process {
        /// Process.
        process: Process,
        /// `working directory`, `root`, or `open` and the path.
        what: String,
    },
    /// A mount namespace where the device's filesystem is mounted, with one of its processes.
    Mount {
        /// A process in the namespace.
        process: Process,
        /// Inode number of the namespace.
        namespace: u64,
        /// Mount point in that namespace.
        point: String,
    },
    /// A device stacked on this one.
    Device {
        /// Name in sysfs.
        name: String,
        /// Device-mapper name.
        dm_name: Option<String>,
    },
    /// Swap of the host.
    Swap,
}

/// A process, for display.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Process {
    /// Process id.
    pub pid: u32,
    /// Command name.
    pub command: String,
    /// systemd unit, if any.
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

/// `; held by …` for an error message; empty if no holder is found.
pub(crate) fn describe(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return String::new();
    }
    // Show only the first few of a process tree.
    let some: Vec<String> = holders.iter().take(8).map(Holder::to_string).collect();
    let more = match holders.len().saturating_sub(some.len()) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    format!("; held by {}{more}", some.join(", "))
}

/// Like `describe`, for a device number that does not go away.
pub(crate) fn describe_device(number: u64) -> String {
    describe(&holders(uses::split(number)))
}

/// Returns all holders of a device on this host. Slow: scans all processes.
pub fn holders(devno: Devno) -> Vec<Holder> {
    holders_of(Target::Device(devno))
}

/// Returns all holders recursively, each with the name of the device that it holds; empty for the
/// target itself.
pub fn stack(target: Target) -> Vec<(String, Holder)> {
    let mut found = Vec::new();
    let mut todo = vec![(String::new(), target)];
    let mut next = 0;
    while let Some((on, target)) = todo.get(next).cloned() {
        next += 1;
        let mut above = match target {
            Target::Device(devno) => uses::partitions(&uses::folder(devno)),
            Target::File { .. } => Vec::new(),
        };
        for holder in holders_of(target) {
            if let Holder::Device { name, .. } = &holder {
                let devno = uses::read_devno(&Path::new("/sys/class/block").join(name));
                above.extend(devno.map(|devno| (name.clone(), devno)));
            }
            found.push((on.clone(), holder));
        }
        for (name, devno) in above {
            let device = Target::Device(devno);
            if todo.len() < MAX_STACK && todo.iter().all(|(_, known)| *known != device) {
                todo.push((name, device));
            }
        }
    }
    found
}

fn holders_of(target: Target) -> Vec<Holder> {
    let mut found = BTreeSet::new();
    let mut above = uses::loops_on(|backing| match target {
        Target::Device(devno) => uses::block_devno(backing) == Some(devno),
        Target::File { dev, ino } => {
            fs::metadata(backing).is_ok_and(|meta| (meta.dev(), meta.ino()) == (dev, ino))
        }
    });
    if let Target::Device(devno) = target {
        above.extend(uses::names(&uses::folder(devno).join("holders")));
        if uses::is_swap(devno) {
            found.insert(Holder::Swap);
        }
    }
    for name in above {
        let dm_name = uses::read_line(&Path::new("/sys/class/block").join(&name).join("dm/name"));
        let dm_name = Some(dm_name).filter(|name| !name.is_empty());
        found.insert(Holder::Device { name, dm_name });
    }
    let mut namespaces = BTreeSet::new();
    for name in uses::names(Path::new("/proc")) {
        if let Ok(pid) = name.parse::<u32>() {
            process_holds(pid, target, &mut namespaces, &mut found);
        }
    }
    found.into_iter().collect()
}

/// Tests one process. Processes come and go: an unreadable one holds nothing.
fn process_holds(
    pid: u32,
    target: Target,
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
        if on(&proc.join(link), target) == Some(On::Filesystem) {
            add(what.to_owned());
        }
    }
    for fd in uses::names(&proc.join("fd")) {
        let link = proc.join("fd").join(&fd);
        if on(&link, target).is_some() {
            let name = fs::read_link(&link).unwrap_or_default();
            add(format!("open {}", escape(name.as_os_str().as_bytes())));
        }
    }
    let Target::Device(devno) = target else {
        return;
    };
    let Ok(namespace) = fs::metadata(proc.join("ns/mnt")).map(|meta| meta.ino()) else {
        return;
    };
    if namespaces.insert(namespace) {
        for point in uses::mount_points(pid, devno) {
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
    /// The device or file itself.
    Target,
    /// A file on its filesystem.
    Filesystem,
}

/// Uses cached attributes only: the process may have a file open on a network filesystem that
/// hangs.
fn on(link: &Path, target: Target) -> Option<On> {
    let wanted = StatxFlags::TYPE | StatxFlags::INO;
    let stat = statx(CWD, link, AtFlags::STATX_DONT_SYNC, wanted).ok()?;
    let dev = (stat.stx_dev_major, stat.stx_dev_minor);
    let is_block = u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFBLK;
    match target {
        Target::File { dev: wanted, ino } => {
            ((uses::split(wanted), ino) == (dev, stat.stx_ino)).then_some(On::Target)
        }
        Target::Device(devno)
            if is_block && (stat.stx_rdev_major, stat.stx_rdev_minor) == devno =>
        {
            Some(On::Target)
        }
        Target::Device(devno) => (devno == dev).then_some(On::Filesystem),
    }
}

/// Extracts the unit from `/proc/PID/cgroup`: the innermost component that names one.
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
        let dev = uses::split(fs::metadata(cwd).unwrap().dev());
        let me = std::process::id();
        assert!(
            holders(dev).iter().any(|holder| matches!(holder,
            Holder::Process { process, what } if process.pid == me && what == "working directory"))
        );
    }

    #[test]
    fn test_who_has_a_file_open() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("image"), dir.path().join("other"));
        let open = fs::File::create(&path).unwrap();
        fs::File::create(&other).unwrap();
        let holders = |path: &Path| {
            let meta = fs::metadata(path).unwrap();
            let (dev, ino) = (meta.dev(), meta.ino());
            stack(Target::File { dev, ino })
        };
        let shown = format!("open {}", path.display());
        let found = holders(&path);
        assert!(
            matches!(&found[..], [(on, Holder::Process { process, what })]
                if on.is_empty() && process.pid == std::process::id() && *what == shown),
            "{found:?}"
        );
        assert_eq!(holders(&other), []);
        drop(open);
        assert_eq!(holders(&path), []);
    }
}
