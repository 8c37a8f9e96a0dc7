//! Runs external LVM programs.
//!
//! They run as children of the daemon: no shell, a fixed environment, their own process group, no
//! inherited descriptors. Commands that change LVM metadata are never killed and always waited for,
//! because a killed one can leave devices suspended. The log reports slow ones.

use std::fmt;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use once_cell::sync::OnceCell;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::error::{Code, Error, Result, escape};
use crate::process;

/// Maximum output, more than any report has; excess is an error, never truncated silently.
const MAX_OUTPUT: usize = 64 << 20;
/// Poll interval for the time and, without a pidfd, for the child.
const TICK: Duration = Duration::from_millis(100);
/// Interval at which the log reports a command that still runs.
const REPORT_AFTER: Duration = Duration::from_secs(60);

/// External programs used for snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Reports logical volumes.
    Lvs,
    /// Reports volume groups.
    Vgs,
    /// Reports physical volumes.
    Pvs,
    /// Takes a snapshot.
    Lvcreate,
    /// Removes a snapshot.
    Lvremove,
    /// Extends a snapshot.
    Lvextend,
    /// Activates or deactivates a volume.
    Lvchange,
    /// Reports LVM's settings.
    Lvmconfig,
    /// LVM's commands without a program of their own.
    Lvm,
    /// Reports DRBD's state.
    Drbdsetup,
}

impl Program {
    /// All programs.
    pub const ALL: [Program; 10] = [
        Program::Lvs,
        Program::Vgs,
        Program::Pvs,
        Program::Lvcreate,
        Program::Lvremove,
        Program::Lvextend,
        Program::Lvchange,
        Program::Lvmconfig,
        Program::Lvm,
        Program::Drbdsetup,
    ];

    /// Name of the executable.
    pub fn name(self) -> &'static str {
        match self {
            Program::Lvs => "lvs",
            Program::Vgs => "vgs",
            Program::Pvs => "pvs",
            Program::Lvcreate => "lvcreate",
            Program::Lvremove => "lvremove",
            Program::Lvextend => "lvextend",
            Program::Lvchange => "lvchange",
            Program::Lvmconfig => "lvmconfig",
            Program::Lvm => "lvm",
            Program::Drbdsetup => "drbdsetup",
        }
    }

    /// Whether it changes nothing, so that a signal may kill it.
    fn read_only(self) -> bool {
        matches!(
            self,
            Program::Lvs | Program::Vgs | Program::Pvs | Program::Lvmconfig | Program::Drbdsetup
        )
    }

    /// Path of the executable, looked up at first use.
    pub fn path(self) -> Result<PathBuf> {
        #[cfg(feature = "test-points")]
        if let Some(path) = crate::point::stand_in(self.name()) {
            return Ok(path);
        }
        static FOUND: [OnceCell<PathBuf>; Program::ALL.len()] =
            [const { OnceCell::new() }; Program::ALL.len()];
        // Only success is kept: lvm2 may be installed while the daemon runs.
        let found = FOUND[self as usize].get_or_try_init(|| process::find(self.name()));
        found.cloned()
    }
}

/// Output of a successful command.
#[derive(Debug)]
pub struct Output {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error; may contain warnings.
    pub stderr: String,
}

/// A command line.
#[derive(Debug)]
pub struct Call {
    program: Program,
    args: Vec<String>,
}

impl Call {
    /// Creates a call of `program` without arguments.
    pub fn new(program: Program) -> Self {
        Call {
            program,
            args: Vec::new(),
        }
    }

    /// Appends one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Appends arguments.
    #[must_use]
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Runs the command to completion. Any exit status except 0 is an error that contains the
    /// arguments, the exit reason and the standard error.
    pub fn run(self) -> Result<Output> {
        let mut command = Command::new(self.program.path()?);
        command
            .args(&self.args)
            .env_clear()
            .env("PATH", process::FOLDERS.join(":"))
            .env("LC_ALL", "C")
            .env("LVM_SUPPRESS_FD_WARNINGS", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        crate::sys::child::isolate(&mut command, !self.program.read_only());
        let child = crate::point::reach(crate::point::Point::CommandStart)
            .map_err(std::io::Error::from)
            .and_then(|()| command.spawn())
            .map_err(|error| self.failed("cannot be started", "").because(error))?;
        let started = Instant::now();
        let (status, stdout, stderr) = self.attend(child, started)?;
        log::debug!("{self} took {:.3} s", started.elapsed().as_secs_f64());
        if stdout.len() > MAX_OUTPUT {
            return Err(self.failed("printed too much", ""));
        }
        let stderr = String::from_utf8_lossy(&stderr).trim().to_owned();
        if !status.success() {
            return Err(self.failed(&status.to_string(), &stderr));
        }
        if !stderr.is_empty() {
            log::debug!("{self}: {}", escape(stderr.as_bytes()));
        }
        Ok(Output { stdout, stderr })
    }

    /// Reads both pipes until the child exits. Does not wait for end of file: a grandchild may keep
    /// a pipe open.
    fn attend(&self, child: Child, started: Instant) -> Result<(ExitStatus, Vec<u8>, Vec<u8>)> {
        let pidfd = pid(&child).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        self.attend_with(pidfd, child, started)
    }

    /// Polls the child at each tick if there is no pidfd (no descriptor left, or forbidden by a
    /// seccomp filter).
    fn attend_with(
        &self,
        pidfd: Option<OwnedFd>,
        mut child: Child,
        started: Instant,
    ) -> Result<(ExitStatus, Vec<u8>, Vec<u8>)> {
        let broken = |error: std::io::Error| self.failed("cannot be watched", "").because(error);
        let mut out = Pipe::new(child.stdout.take().map(OwnedFd::from));
        let mut err = Pipe::new(child.stderr.take().map(OwnedFd::from));
        let mut next_report = REPORT_AFTER;
        loop {
            let pipes = [&out, &err].into_iter().filter_map(|pipe| pipe.fd.as_ref());
            let mut fds: Vec<PollFd<'_>> = pidfd
                .iter()
                .map(AsFd::as_fd)
                .chain(pipes.map(AsFd::as_fd))
                .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
                .collect();
            let tick = Timespec {
                tv_sec: 0,
                tv_nsec: i64::from(TICK.subsec_nanos()),
            };
            match poll(&mut fds, Some(&tick)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                // Without poll the child must still be waited for.
                Err(error) => log::warn!("{self}: poll: {error}"),
            }
            let ended = match pidfd {
                Some(_) => fds.first().is_some_and(|fd| !fd.revents().is_empty()),
                None => child.try_wait().map_err(broken)?.is_some(),
            };
            drop(fds);
            out.drain();
            err.drain();
            if ended {
                break;
            }
            if started.elapsed() >= next_report {
                log::warn!(
                    "{self} still runs after {} s; it is waited for, because ending it early could \
                     leave devices suspended",
                    next_report.as_secs()
                );
                next_report += REPORT_AFTER;
            }
        }
        let status = child.wait().map_err(broken)?;
        Ok((status, out.data, err.data))
    }

    fn failed(&self, how: &str, stderr: &str) -> Error {
        let mut text = format!("{self}: {how}");
        if !stderr.is_empty() {
            text.push_str(": ");
            let lines: Vec<&str> = stderr.lines().map(str::trim).collect();
            text.push_str(&lines.join("; "));
        }
        Error::new(Code::CommandFailed, text)
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.program.name())?;
        for arg in &self.args {
            if arg.is_empty() || arg.contains([' ', '"', '\'']) {
                write!(f, " {arg:?}")?;
            } else {
                write!(f, " {arg}")?;
            }
        }
        Ok(())
    }
}

fn pid(child: &Child) -> Option<Pid> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw)
}

/// An output pipe and the data read from it.
struct Pipe {
    fd: Option<std::fs::File>,
    data: Vec<u8>,
}

impl Pipe {
    fn new(fd: Option<OwnedFd>) -> Self {
        if let Some(fd) = &fd {
            // If this fails, a read merely blocks on the child.
            let _ = rustix::fs::fcntl_setfl(fd, rustix::fs::OFlags::NONBLOCK);
        }
        Pipe {
            fd: fd.map(std::fs::File::from),
            data: Vec::new(),
        }
    }

    /// Reads available data without blocking; keeps slightly more than the limit, to expose the
    /// excess.
    fn drain(&mut self) {
        let mut buffer = [0; 16384];
        while let Some(file) = &mut self.fd {
            match file.read(&mut buffer) {
                Ok(0) => self.fd = None,
                Ok(n) if self.data.len() <= MAX_OUTPUT => self.data.extend_from_slice(&buffer[..n]),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => self.fd = None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_call_is_shown_with_quotes_where_needed() {
        let call = Call::new(Program::Lvcreate).args(["-s", "--config", "a/b=0 c/d=1", ""]);
        assert_eq!(
            call.to_string(),
            "lvcreate -s --config \"a/b=0 c/d=1\" \"\""
        );
    }

    #[test]
    fn test_error_names_arguments_reason_and_stderr() {
        let call = Call::new(Program::Lvs).arg("vg0");
        let error = call.failed("exit status: 5", "  first\n  second");
        assert_eq!(
            error.to_string(),
            "GS-301 a command failed: lvs vg0: exit status: 5: first; second"
        );
    }

    /// A child like those of `run`, running a script.
    fn child(script: &str) -> Child {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        crate::sys::child::isolate(&mut command, true);
        command.spawn().unwrap()
    }

    #[test]
    fn test_both_pipes_are_read_and_a_grandchild_is_not_waited_for() {
        let script = "head -c 3000000 /dev/zero; head -c 2000000 /dev/zero >&2; sleep 5 & exit 3";
        let started = Instant::now();
        let call = Call::new(Program::Lvs);
        let (status, out, err) = call.attend(child(script), started).unwrap();
        assert_eq!(status.code(), Some(3));
        assert_eq!((out.len(), err.len()), (3_000_000, 2_000_000));
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn test_pipes_are_read_without_a_pidfd_too() {
        let script = "head -c 3000000 /dev/zero; head -c 2000000 /dev/zero >&2; sleep 5 & exit 3";
        let started = Instant::now();
        let call = Call::new(Program::Lvs);
        let (status, out, err) = call.attend_with(None, child(script), started).unwrap();
        assert_eq!(status.code(), Some(3));
        assert_eq!((out.len(), err.len()), (3_000_000, 2_000_000));
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn test_children_have_their_own_group_and_no_inherited_files() {
        use std::os::fd::AsRawFd;
        let file = std::fs::File::open("/dev/null").unwrap();
        // Stands for a daemon's file without CLOEXEC.
        let leaked = rustix::io::dup(&file).unwrap();
        let script = "cut -d' ' -f1,5 /proc/$$/stat; ls /proc/$$/fd";
        let call = Call::new(Program::Lvcreate);
        // Not through a shell: some shells clear their signal mask.
        let mut command = Command::new("/bin/grep");
        command
            .args(["SigBlk", "/proc/self/status"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        crate::sys::child::isolate(&mut command, true);
        let masked = call.attend(command.spawn().unwrap(), Instant::now());
        let masked = String::from_utf8(masked.unwrap().1).unwrap();
        let bits = u64::from_str_radix(masked.trim_start_matches("SigBlk:").trim(), 16).unwrap();
        assert_ne!(bits & (1 << (libc::SIGTERM - 1)), 0, "{masked}");

        let (status, out, _) = call.attend(child(script), Instant::now()).unwrap();
        assert!(status.success());
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let (pid, group) = lines[0].split_once(' ').unwrap();
        assert_eq!(pid, group);
        assert!(
            !lines.contains(&leaked.as_raw_fd().to_string().as_str()),
            "{text}"
        );
    }
}
