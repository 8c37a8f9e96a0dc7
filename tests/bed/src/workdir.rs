//! Work folders that name their owner, so that what a crashed run left behind can be told from what is in use.

use super::{Result, cmd};
use crate::check;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

/// How the names of all work folders begin.
pub const PREFIX: &str = "guestsnap-bed.";
static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A folder `guestsnap-bed.<pid>.<start time>.<n>` below the temporary folder, removed when dropped.
#[derive(Debug)]
pub struct WorkDir {
    path: PathBuf,
}

impl WorkDir {
    /// Makes one. The first one of a process also removes the leftovers of killed runs.
    pub fn new() -> Result<Self> {
        static SWEPT: Once = Once::new();
        SWEPT.call_once(|| {
            // Another test program may be removing them at this moment.
            if let Err(e) = sweep() {
                eprintln!("leftovers of an earlier run: {}", super::message(&e));
            }
        });
        let n = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("{}{n}", mark()?));
        std::fs::create_dir(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A name in it.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if std::env::var_os("GUESTSNAP_BED_KEEP").is_some() {
            eprintln!("kept: {}", self.path.display());
        } else if let Err(e) = clear(&self.path) {
            eprintln!(
                "cannot remove {}: {}",
                self.path.display(),
                super::message(&e)
            );
        }
    }
}

/// Environment variable with the number of the work folder in which this process has its own processes: there it may
/// have the number and the start time of another test's process.
pub const OUTER: &str = "GUESTSNAP_BED_OUTER";

/// How the names of this process' work folders begin.
pub fn mark() -> Result<String> {
    let pid = std::process::id();
    let start = start_time(pid).ok_or("own start time unknown")?;
    let outer = std::env::var(OUTER).map_or(String::new(), |n| format!("{n}."));
    Ok(format!("{PREFIX}{pid}.{start}.{outer}"))
}

/// Removes what earlier runs left behind when they were killed: only folders of this name whose owner (pid and start
/// time) is gone, and only the processes, mounts and loop devices that refer to such a folder.
pub fn sweep() -> Result {
    for entry in std::fs::read_dir(std::env::temp_dir())?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(rest) = name.strip_prefix(PREFIX) else {
            continue;
        };
        let mut parts = rest.split('.');
        let (Some(pid), Some(start)) = (parts.next(), parts.next()) else {
            continue;
        };
        let (Ok(pid), Ok(start)) = (pid.parse::<u32>(), start.parse::<u64>()) else {
            continue;
        };
        if start_time(pid) != Some(start) {
            eprintln!(
                "removing the leftovers of an earlier run: {}",
                entry.path().display()
            );
            kill_users(&entry.path());
            clear(&entry.path())?;
        }
    }
    Ok(())
}

/// Start time of a process in clock ticks after boot; none if there is no such process.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat[stat.rfind(')')? + 2..]
        .split(' ')
        .nth(19)?
        .parse()
        .ok()
}

/// Ends processes that have the folder in their command line (the daemons of a killed run).
fn kill_users(dir: &Path) {
    let needle = format!("{}/", dir.display());
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        if pid != std::process::id() as i32
            && String::from_utf8_lossy(&line)
                .split('\0')
                .any(|arg| arg.contains(&needle))
        {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _gone = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
    std::thread::sleep(std::time::Duration::from_millis(300));
}

/// Unmounts, detaches and removes everything below the folder.
fn clear(dir: &Path) -> Result {
    // A mount may hold another through a loop device on one of its files: round by round.
    let mut failure = None;
    for _ in 0..4 {
        failure = None;
        let mut points = mounts_below(dir)?;
        points.sort();
        for point in points.iter().rev() {
            if let Err(e) = cmd::run("umount", [point]) {
                failure = Some(e);
            }
        }
        for (device, backing) in loops()? {
            if backing.starts_with(dir) {
                cmd::run("losetup", ["-d", &device])?;
            }
        }
        if failure.is_none() {
            break;
        }
    }
    if let Some(e) = failure {
        return Err(e);
    }
    check!(
        mounts_below(dir)?.is_empty(),
        "still mounted below {}",
        dir.display()
    );
    std::fs::remove_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    Ok(())
}

fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for line in std::fs::read_to_string("/proc/self/mountinfo")?.lines() {
        if let Some(point) = line.split(' ').nth(4) {
            let point = PathBuf::from(super::hoststate::unescape(point));
            if point.starts_with(dir) {
                found.push(point);
            }
        }
    }
    Ok(found)
}

/// Attached loop devices and their backing files.
pub fn loops() -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/sys/block")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("loop") {
            if let Ok(backing) = std::fs::read_to_string(entry.path().join("loop/backing_file")) {
                found.push((
                    format!("/dev/{name}"),
                    PathBuf::from(backing.trim_end_matches('\n')),
                ));
            }
        }
    }
    Ok(found)
}
