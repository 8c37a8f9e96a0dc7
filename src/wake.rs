//! A guaranteed wake-up: on request, on timeout, or on the death of this process.
//!
//! ```text
//! we ──stdin──► timeout SECONDS tee ──pipe──► xargs COMMAND…
//! ```
//!
//! `xargs` runs the command at the end of its input, which comes when `tee` ends: we close our side
//! (normal case), the time is over, or this process dies. All three share one path, and the command
//! runs once. A line echoed by `tee` proves that the chain works. With systemd, both start in their
//! own scopes, because stopping a service kills all its processes.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::error::escape;
use crate::process::{self, Ended, Failed, TICK, base, find, memory, said, wait};
use crate::sys::child::isolate;
use crate::{Code, Error, Result};

/// Time limit for starting the wake-up on a busy host.
const ARM_PATIENCE: Duration = Duration::from_secs(30);

/// Time limit for the command before its success is reported as doubtful.
pub(crate) const WAKE_PATIENCE: Duration = Duration::from_secs(60);

/// The freeze command is killed by this margin, or a quarter of the time, before the wake-up fires:
/// anything frozen later would stay frozen.
const MARGIN: Duration = Duration::from_secs(1);

/// The processes of one wake-up. Dropping them triggers the command.
#[derive(Debug)]
pub(crate) struct Guard {
    // Closed first: this triggers the wake-up.
    line: Option<ChildStdin>,
    pub(crate) timer: Child,
    thaw: Child,
    said: File,
    /// Deadline of the freeze command, and the time from it to the wake-up.
    end: Instant,
    margin: Duration,
}

impl Guard {
    /// Without systemd's help, on a systemd host, the guard survives our death but not a stop of
    /// the whole service; the second value gives the reason.
    pub(crate) fn arm(thaw: &[String], seconds: Duration) -> Result<(Guard, Option<Error>)> {
        let mut weaker = None;
        if Path::new("/run/systemd/system").is_dir() {
            match Guard::start(thaw, seconds, true) {
                Ok(guard) => return Ok((guard, None)),
                Err(error) => {
                    let text = "the wake-up runs without a systemd scope: a stop of bacula-fd's service would end it too";
                    weaker = Some(Error::new(Code::CommandFailed, text).because(error));
                }
            }
        }
        Ok((Guard::start(thaw, seconds, false)?, weaker))
    }

    fn start(thaw: &[String], seconds: Duration, scope: bool) -> Result<Guard> {
        let failed = |what: &str| Error::new(Code::CommandFailed, what.to_owned());
        let prefix: &[&str] = match scope {
            true => &["systemd-run", "--scope", "--quiet", "--collect", "--"],
            false => &[],
        };
        let command = |words: &[&str]| -> Result<Command> {
            let words: Vec<&str> = prefix.iter().chain(words).copied().collect();
            let mut command = base(&find(words[0])?);
            command.args(&words[1..]);
            Ok(command)
        };
        let (timeout, tee, xargs) = (find("timeout")?, find("tee")?, find("xargs")?);
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let margin = MARGIN.min(seconds / 4);
        let end = Instant::now() + seconds - margin;
        let seconds = seconds.as_secs().max(1).to_string();
        // Not /dev/stderr: where that link is missing, tee would create a file with this name.
        let mut timer = command(&[
            &text(&timeout),
            "-k",
            "1",
            &seconds,
            &text(&tee),
            "/proc/self/fd/2",
        ])?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed("timeout").because(error))?;
        let line = timer.stdin.take();
        let echo = timer.stderr.take();
        let said = memory()?;
        let output = said
            .try_clone()
            .map_err(|error| failed("xargs").because(error))?;
        let mut words = vec![text(&xargs)];
        words.extend_from_slice(thaw);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let started = match timer.stdout.take() {
            Some(pipe) => command(&words).and_then(|mut command| {
                // Without a scope, stopping the service kills the timer, which wakes the guest.
                isolate(&mut command, true);
                command
                    .stdin(Stdio::from(pipe))
                    .stdout(Stdio::null())
                    .stderr(Stdio::from(output))
                    .spawn()
                    .map_err(|error| failed("xargs").because(error))
            }),
            None => Err(failed("timeout has no output")),
        };
        let thaw = match started {
            Ok(thaw) => thaw,
            Err(error) => {
                drop(line);
                reap(&mut timer);
                return Err(error);
            }
        };
        let guard = Guard {
            line,
            timer,
            thaw,
            said,
            end,
            margin,
        };
        guard.standing(echo)
    }

    /// Returns the guard if it works. Otherwise ends it: no guest is frozen yet, and a late thaw
    /// could hit the next freeze.
    fn standing(mut self, echo: Option<ChildStderr>) -> Result<Guard> {
        match self.stands(echo) {
            Ok(()) => Ok(self),
            Err(error) => {
                // First the process that would run the thaw command when the other ends.
                process::kill(self.thaw);
                process::kill(self.timer);
                Err(error)
            }
        }
    }

    /// Proves that both processes run: the first echoes a line, and the second has executed
    /// `xargs`.
    fn stands(&mut self, echo: Option<ChildStderr>) -> Result<()> {
        let not = |what: &str| Error::new(Code::CommandFailed, format!("the wake-up: {what}"));
        let begun = Instant::now();
        let (Some(line), Some(mut echo)) = (self.line.as_mut(), echo) else {
            return Err(not("no pipe"));
        };
        line.write_all(b"\n")
            .map_err(|error| not("its timer is gone").because(error))?;
        let patience = PollTimeout::try_from(ARM_PATIENCE).unwrap_or(PollTimeout::MAX);
        let mut wait = [PollFd::new(echo.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut wait, patience).map_err(|error| not("poll").because(error))?;
        let mut answer = [0; 256];
        let length = match ready {
            0 => return Err(not("its timer does not answer")),
            _ => echo
                .read(&mut answer)
                .map_err(|error| not("its timer").because(error))?,
        };
        match &answer[..length] {
            b"\n" => {}
            b"" => return Err(not("its timer ended at once")),
            text => return Err(not(&format!("its timer says {}", escape(text)))),
        }
        let name = format!("/proc/{}/comm", self.thaw.id());
        loop {
            if std::fs::read_to_string(&name).is_ok_and(|name| name.trim_end() == "xargs") {
                return Ok(());
            }
            if begun.elapsed() > ARM_PATIENCE || self.fired() {
                return Err(not("xargs did not start"));
            }
            std::thread::sleep(TICK);
        }
    }

    /// Runs the freeze command within the remaining time. It inherits the line. If we die, another
    /// `timeout` ends it in time.
    pub(crate) fn freeze(&self, command: &[String]) -> std::result::Result<Ended, Failed> {
        let failed = |what: &str| Error::new(Code::CommandFailed, what.to_owned());
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(failed("no time is left, arming the wake-up took it all").into());
        }
        let line = self.line.as_ref().ok_or_else(|| failed("no pipe"))?;
        let line = line.as_fd().try_clone_to_owned();
        let line = line.map_err(|error| failed("the line").because(error))?;
        let timeout = find("timeout")?.to_string_lossy().into_owned();
        let seconds = (left + self.margin / 2).as_secs_f64().to_string();
        let mut words = vec![timeout, "-s".into(), "KILL".into(), seconds];
        words.extend_from_slice(command);
        process::run_holding(&words, Some(line), left, &|| false)
    }

    /// Whether the wake-up has fired by itself. Check the deadline too: an expired timer process
    /// exits with a delay.
    pub(crate) fn fired(&mut self) -> bool {
        if Instant::now() >= self.end + self.margin {
            return true;
        }
        let gone = |child: &mut Child| !matches!(child.try_wait(), Ok(None));
        gone(&mut self.timer) || gone(&mut self.thaw)
    }

    /// Triggers the thaw command, unless it has run, and waits for it.
    pub(crate) fn release(mut self) -> Result<()> {
        self.line = None;
        // A process left by the freeze command may still hold the line.
        if let (Ok(None), Ok(group)) = (self.timer.try_wait(), i32::try_from(self.timer.id())) {
            let _ = killpg(Pid::from_raw(group), Signal::SIGTERM);
        }
        let status = wait(&mut self.thaw, Some(&self.said), WAKE_PATIENCE);
        reap(&mut self.timer);
        let said = said(&mut self.said);
        match status {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(Error::new(
                Code::CommandFailed,
                format!("the thaw command ({status}): {said}"),
            )),
            // Left running: it may yet wake the guest.
            None => Err(Error::new(
                Code::CommandFailed,
                format!(
                    "the thaw command has run for {} s: {said}",
                    WAKE_PATIENCE.as_secs()
                ),
            )),
        }
    }
}

/// Waits for a process whose input has ended.
fn reap(child: &mut Child) {
    if wait(child, None, ARM_PATIENCE).is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path) -> Vec<String> {
        vec!["/usr/bin/touch".to_owned(), path.display().to_string()]
    }

    #[test]
    fn test_a_wake_up_that_does_not_stand_never_comes() {
        let folder = tempfile::tempdir().unwrap();
        let thawed = folder.path().join("thawed");
        let (guard, _) = Guard::arm(&touch(&thawed), Duration::from_secs(1)).unwrap();
        let processes = [guard.timer.id(), guard.thaw.id()];
        // Simulates a timer that does not answer.
        assert!(guard.standing(None).is_err());
        for process in processes {
            assert!(!Path::new(&format!("/proc/{process}")).exists());
        }
        std::thread::sleep(Duration::from_millis(1500));
        assert!(!thawed.exists());
    }

    #[test]
    fn test_a_wake_up_whose_time_has_come_has_begun() {
        let folder = tempfile::tempdir().unwrap();
        let thawed = folder.path().join("thawed");
        let (mut guard, _) = Guard::arm(&touch(&thawed), Duration::from_secs(20)).unwrap();
        assert!(!guard.fired());
        guard.end = Instant::now();
        assert!(!guard.fired());
        // Its processes still exist.
        guard.end -= guard.margin;
        assert!(guard.fired() && !thawed.exists());
        guard.release().unwrap();
    }
}
