//! Ownership and names of created objects. Generates every name that LVM or the kernel sees.
//!
//! A name has the form `guestsnap-<JobId>-<pid>.<serial>-<n>`. Daemons on a host differ in pid,
//! jobs of a daemon in serial (estimates all have JobId 0), objects of a job in `n`. LVM and
//! device-mapper allow all the characters, and LVM does not reserve the prefix.
//!
//! Length: 10 for `guestsnap-`, at most 10 digits per number, 3 separators: at most 53, about 25 in
//! practice. Device-mapper allows 127 for `VG-LV-cow`, where each `-` inside a name counts twice:
//! 53 + 3 + 5 leaves at least 66 for the group. `lvcreate` refuses longer names.

use std::fmt;
use std::fs;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::error::{Code, Error, Result};
use crate::hostdev::names::PREFIX;

/// Tag of every volume we create.
pub const TAG: &str = "guestsnap";
/// Prefix of the tag that names the job.
const JOB_TAG: &str = "guestsnap.job=";
/// Format version of that tag.
const TAG_VERSION: &str = "1";
/// A process, distinguished from those on other hosts, in other boots or containers, and later ones
/// with the same pid.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Owner {
    host: String,
    boot: String,
    pid_ns: u64,
    pid: u32,
    start: u64,
}

/// State of an [`Owner`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnerState {
    /// Running.
    Alive,
    /// No longer running.
    Gone,
    /// Not visible from here, for this reason; treat as alive.
    Unknown(&'static str),
}

impl Owner {
    /// This process.
    pub fn current() -> Result<Owner> {
        let pid = std::process::id();
        let stat = "/proc/self/stat";
        let start = start_time(pid).map_err(|error| unreadable(stat).because(error))?;
        Ok(Owner {
            host: host()?,
            boot: read("/proc/sys/kernel/random/boot_id")?,
            pid_ns: pid_namespace()?,
            pid,
            start: start.ok_or_else(|| unreadable(stat))?,
        })
    }

    /// Its state as seen from this process.
    pub fn state(&self) -> Result<OwnerState> {
        Ok(self.state_seen_from(&Owner::current()?))
    }

    fn state_seen_from(&self, me: &Owner) -> OwnerState {
        // Boot ids are unique: a process with ours ran on this host. A different one is from an
        // earlier boot of this host, or from another host that may be running.
        if self.boot != me.boot && self.host == me.host {
            OwnerState::Gone
        } else if self.boot != me.boot {
            OwnerState::Unknown("it belongs to another host, or to this one under another name")
        } else if self.pid_ns != me.pid_ns {
            OwnerState::Unknown("its process lives in another pid namespace")
        } else {
            match start_time(self.pid) {
                Ok(Some(start)) if start == self.start => OwnerState::Alive,
                Ok(_) => OwnerState::Gone,
                Err(_) => OwnerState::Unknown("its process cannot be seen"),
            }
        }
    }

    /// Whether it started since this host's boot.
    pub fn is_of_this_boot(&self) -> bool {
        Owner::current().is_ok_and(|me| me.boot == self.boot)
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }
}

/// Identifies one job of one daemon in tags, names and the journal.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct JobTag {
    /// Bacula's JobId; 0 for estimates and the command line.
    pub job_id: u32,
    serial: u32,
    owner: Owner,
}

impl JobTag {
    /// Creates the tag of a new job in this process.
    pub fn new(job_id: u32) -> Result<JobTag> {
        static SERIAL: AtomicU32 = AtomicU32::new(1);
        Ok(JobTag {
            job_id,
            serial: SERIAL.fetch_add(1, Ordering::Relaxed),
            owner: Owner::current()?,
        })
    }

    /// The job's process.
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    /// Common prefix of the job's names.
    pub fn stem(&self) -> String {
        format!("{PREFIX}{}-{}.{}", self.job_id, self.owner.pid, self.serial)
    }

    /// The `n`th name of this job.
    pub(super) fn name(&self, n: u32) -> String {
        format!("{}-{n}", self.stem())
    }

    /// Whether the job could have generated this name.
    pub(super) fn is_name(&self, name: &str) -> bool {
        name.strip_prefix(&self.stem())
            .and_then(|rest| rest.strip_prefix('-'))
            .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    }

    /// This job in a process that is gone.
    #[cfg(test)]
    pub(super) fn gone_for_test(&self) -> JobTag {
        let mut gone = self.clone();
        gone.owner.start += 1;
        gone
    }

    /// File name of the job's journal, unique across reboots.
    pub(super) fn journal_name(&self) -> String {
        let boot = self.owner.boot.get(..8).unwrap_or(&self.owner.boot);
        format!("{}-{boot}.{}.journal", self.stem(), self.owner.start)
    }

    /// Whether the process named by a journal's file name is certainly gone. `None`: not a journal
    /// name.
    pub(super) fn is_journal_of_gone(name: &str) -> Option<bool> {
        let rest = name.strip_prefix(PREFIX)?.strip_suffix(".journal")?;
        let [_job, process, end]: [&str; 3] =
            rest.split('-').collect::<Vec<_>>().try_into().ok()?;
        let (pid, _serial) = process.split_once('.')?;
        let (boot, start) = end.split_once('.')?;
        let (pid, start): (u32, u64) = (pid.parse().ok()?, start.parse().ok()?);
        let this_boot = read("/proc/sys/kernel/random/boot_id").ok()?;
        let other = |found| found != Some(start);
        Some(!this_boot.starts_with(boot) || start_time(pid).is_ok_and(other))
    }

    /// LVM tag that names the job; [`JobTag::from_lvm_tag`] parses it.
    pub fn to_lvm_tag(&self) -> String {
        let o = &self.owner;
        format!(
            "{JOB_TAG}{TAG_VERSION}:{}:{}:{}:{}:{}:{}:{}",
            self.job_id, self.serial, o.pid, o.start, o.pid_ns, o.boot, o.host
        )
    }

    /// Parses an LVM tag; `None` if it is not one of ours.
    pub fn from_lvm_tag(tag: &str) -> Option<JobTag> {
        let fields: Vec<&str> = tag.strip_prefix(JOB_TAG)?.split(':').collect();
        let [version, job_id, serial, pid, start, pid_ns, boot, host] = fields[..] else {
            return None;
        };
        if version != TAG_VERSION || boot.is_empty() || host.is_empty() {
            return None;
        }
        Some(JobTag {
            job_id: job_id.parse().ok()?,
            serial: serial.parse().ok()?,
            owner: Owner {
                host: host.to_owned(),
                boot: boot.to_owned(),
                pid_ns: pid_ns.parse().ok()?,
                pid: pid.parse().ok()?,
                start: start.parse().ok()?,
            },
        })
    }
}

impl fmt::Display for JobTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "job {} of process {}", self.job_id, self.owner.pid)
    }
}

fn unreadable(path: &str) -> Error {
    Error::new(Code::JournalFailed, format!("{path} cannot be read"))
}

fn read(path: &str) -> Result<String> {
    let text = fs::read_to_string(path).map_err(|error| unreadable(path).because(error))?;
    Ok(text.trim().to_owned())
}

/// Distinguishes this host from others that may see the same volume groups:
/// `MACHINE-ID/DMI-UUID/NAME`. Cloned hosts share the first, clones and some boards the second, and
/// either may be missing.
fn host() -> Result<String> {
    let known = |path| read(path).unwrap_or_default();
    let name = read("/proc/sys/kernel/hostname")?;
    let dmi = known("/sys/class/dmi/id/product_uuid");
    Ok(host_token([&known("/etc/machine-id"), &dmi, &name]))
}

fn host_token(parts: [&str; 3]) -> String {
    // Only characters that LVM tags allow, without the separators; host names have at most 64
    // characters.
    let plain = |part: &str| {
        let valid = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        part.chars().filter(valid).take(64).collect::<String>()
    };
    parts.map(plain).join("/")
}

fn pid_namespace() -> Result<u64> {
    let path = "/proc/self/ns/pid";
    let link = fs::read_link(path).map_err(|error| unreadable(path).because(error))?;
    link.to_str()
        .and_then(|text| text.strip_prefix("pid:[")?.strip_suffix(']'))
        .and_then(|number| number.parse().ok())
        .ok_or_else(|| unreadable(path))
}

/// Start time of a process in clock ticks since boot; `None` if it does not exist. Fails if that
/// cannot be determined.
fn start_time(pid: u32) -> io::Result<Option<u64>> {
    start_time_in(fs::read(format!("/proc/{pid}/stat")), pid)
}

fn start_time_in(stat: io::Result<Vec<u8>>, pid: u32) -> io::Result<Option<u64>> {
    // With hidepid=, other users' processes look the same.
    let gone = |error: &io::Error| {
        let errno = error.raw_os_error().map(Errno::from_raw);
        matches!(errno, Some(Errno::ENOENT | Errno::ESRCH)) && !exists(pid)
    };
    match stat {
        Ok(stat) => match parse_start_time(&stat) {
            None => Err(io::ErrorKind::InvalidData.into()),
            start => Ok(start),
        },
        Err(error) if gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Tests for a process with a null signal.
fn exists(pid: u32) -> bool {
    // No process has another number; `kill` would take 0 for a process group.
    let pid = i32::try_from(pid).ok().filter(|&pid| pid > 0);
    pid.is_some_and(|pid| kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH))
}

/// Field 22 of `/proc/PID/stat`. The second field, the command name in parentheses, may contain
/// anything, so counting starts after the last parenthesis.
fn parse_start_time(stat: &[u8]) -> Option<u64> {
    let end = stat.iter().rposition(|&b| b == b')')?;
    let rest = std::str::from_utf8(&stat[end + 1..]).ok()?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_journal_names_tell_whether_their_process_is_gone() {
        let tag = JobTag::new(7).unwrap();
        let gone = |name: &str| JobTag::is_journal_of_gone(name);
        assert_eq!(gone(&tag.journal_name()), Some(false));
        assert_eq!(gone(&tag.gone_for_test().journal_name()), Some(true));
        let mut earlier = tag.clone();
        earlier.owner.boot = "00000000-0000".to_owned();
        assert_eq!(gone(&earlier.journal_name()), Some(true));
        for other in ["guestsnap-1.journal", "x", "guestsnap-1-x.1-a.1.journal"] {
            assert_eq!(gone(other), None, "{other}");
        }
    }

    #[test]
    fn test_lvm_tag_round_trips_and_is_valid_for_lvm() {
        let job = JobTag::new(4711).unwrap();
        let tag = job.to_lvm_tag();
        assert_eq!(JobTag::from_lvm_tag(&tag), Some(job));
        assert!(tag.len() < 1024);
        assert!(
            tag.bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_+.-/=!:#&".contains(&b)),
            "{tag}"
        );
    }

    #[test]
    fn test_tags_of_others_are_not_ours() {
        for tag in [
            "guestsnap",
            "guestsnap.job=",
            "guestsnap.job=1:2:3",
            "guestsnap.job=2:1:1:1:1:1:boot:host",
            "guestsnap.job=1:1:1:1:1:1::host",
            "guestsnap.job=1:x:1:1:1:1:boot:host",
            "other.job=1:1:1:1:1:1:boot:host",
        ] {
            assert_eq!(JobTag::from_lvm_tag(tag), None, "{tag}");
        }
    }

    #[test]
    fn test_owner_is_alive_gone_or_out_of_sight() {
        let me = Owner::current().unwrap();
        assert_eq!(me.state().unwrap(), OwnerState::Alive);
        let change = |f: fn(&mut Owner)| {
            let mut other = me.clone();
            f(&mut other);
            other.state_seen_from(&me)
        };
        assert_eq!(change(|o| o.start += 1), OwnerState::Gone);
        assert_eq!(change(|o| o.boot.push('x')), OwnerState::Gone);
        // One boot means one host, whatever its name was.
        assert_eq!(change(|o| o.host.push('x')), OwnerState::Alive);
        let elsewhere = |o: &mut Owner| {
            o.host.push('x');
            o.boot.push('x');
        };
        assert!(matches!(change(elsewhere), OwnerState::Unknown(_)));
        assert!(matches!(change(|o| o.pid_ns += 1), OwnerState::Unknown(_)));
    }

    #[test]
    fn test_only_a_process_that_is_not_there_is_gone() {
        let me = std::process::id();
        let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
        let gone = child.id();
        child.wait().unwrap();
        let failed = |errno: Errno, pid| start_time_in(Err(errno.into()), pid);
        for errno in [Errno::ENOENT, Errno::ESRCH] {
            for pid in [gone, 0, u32::MAX] {
                assert_eq!(failed(errno, pid).unwrap(), None, "{errno} {pid}");
            }
            // Hidden by hidepid=.
            assert!(failed(errno, me).is_err(), "{errno}");
        }
        for errno in [Errno::EMFILE, Errno::ENOMEM, Errno::EACCES, Errno::EIO] {
            assert!(failed(errno, gone).is_err(), "{errno}");
        }
        assert!(start_time_in(Ok(b"7 (a".to_vec()), gone).is_err());
        assert_eq!(start_time(gone).unwrap(), None);
        assert!(start_time(me).unwrap().is_some());
    }

    #[test]
    fn test_cloned_hosts_have_tokens_of_their_own() {
        let token = host_token(["id", "dmi", "host1.example.org"]);
        assert_eq!(token, "id/dmi/host1.example.org");
        assert_ne!(token, host_token(["id", "dmi", "host2.example.org"]));
        assert_ne!(token, host_token(["id", "dmi2", "host1.example.org"]));
        assert_ne!(host_token(["id", "", "b"]), host_token(["", "id", "b"]));
        assert_eq!(host_token(["", "", "(none):/ä"]), "//none");
        let name = read("/proc/sys/kernel/hostname").unwrap();
        assert!(host().unwrap().ends_with(&format!("/{name}")));
        let longest = host_token(["x"; 3].map(|x| x.repeat(99)).each_ref().map(|x| &**x));
        assert_eq!(longest.len(), 3 * 64 + 2);
    }

    #[test]
    fn test_start_time_survives_odd_command_names() {
        let stat = b"7 (a) b) 1) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 0 0";
        assert_eq!(parse_start_time(stat), Some(4242));
        assert_eq!(parse_start_time(b"7 (a"), None);
    }

    #[test]
    fn test_names_are_unique_and_short() {
        let a = JobTag::new(0).unwrap();
        let b = JobTag::new(0).unwrap();
        assert_ne!(a.name(1), b.name(1));
        let longest = JobTag {
            job_id: u32::MAX,
            serial: u32::MAX,
            owner: Owner {
                pid: u32::MAX,
                ..a.owner
            },
        };
        assert_eq!(longest.name(u32::MAX).len(), 53);
    }
}
