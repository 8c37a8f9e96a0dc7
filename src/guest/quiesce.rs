//! Quiesces a guest while its snapshots are taken, and wakes it up in every case.
//!
//! A guest left frozen by a failed backup is worse than no backup. The wake-up is therefore armed
//! before the freeze, in processes independent of ours:
//!
//! ```text
//! we ──stdin──► timeout SECONDS tee ──pipe──► xargs THAW…
//! ```
//!
//! `crate::wake` implements the wake-up. The freeze command also holds our end of the pipe open: if
//! we die while it runs, the guest is woken only after the freeze has ended.

use std::fmt;
use std::time::{Duration, Instant};

use super::Guest;
use super::pve::{Agent, Handle};
use crate::config::ClientFile;
use crate::config::client::{Quiesce, QuiesceWay};
use crate::error::escape;
use crate::process::{self, Ended, Failed, argv, find};
use crate::turn::Turns;
use crate::wake::{Guard, WAKE_PATIENCE};
use crate::{Code, Error, Result};

/// Thaw commands of guests being quiesced, including by other jobs. A command shared by several
/// guests wakes them all, so only one of them may be at rest.
static THAWS: Turns = Turns::new();

/// Consistency of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// Crash-consistent: the state after a power failure.
    Crash,
    /// Crash-consistent, all disks at one instant.
    CrashOneInstant,
    /// Each disk crash-consistent, but at different times.
    Apart,
    /// Filesystems frozen.
    Filesystem,
    /// Filesystems frozen, each at a different time.
    FilesystemApart,
    /// Applications quiesced by the configured commands.
    Application,
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Consistency::Crash => "crash-consistent",
            Consistency::CrashOneInstant => "crash-consistent, all disks at one instant",
            Consistency::Apart => "each disk at an instant of its own",
            Consistency::Filesystem => "filesystem-consistent",
            Consistency::FilesystemApart => {
                "filesystem-consistent, each disk at an instant of its own"
            }
            Consistency::Application => "application-consistent",
        })
    }
}

/// Result of quiescing a guest.
#[derive(Debug)]
pub struct Outcome {
    /// Consistency reached.
    pub consistency: Consistency,
    /// Time the guest was at rest.
    pub frozen: Duration,
    /// Problems. The backup of the guest continues; [`Code::ThawFailed`] requires a human.
    pub problems: Vec<Error>,
}

/// Runs `work` (taking snapshots) while the guest is at rest. If it cannot be frozen, `work` runs
/// anyway, with `false`; the outcome gives the consistency. Waits for guests with the same thaw
/// command, whose jobs hold their volume groups meanwhile: `work` must not wait for a group.
pub fn during<T>(
    guest: &str,
    quiesce: Option<&Quiesce>,
    work: impl FnOnce(bool) -> T,
) -> (T, Outcome) {
    let mut problems = Vec::new();
    let _turn = quiesce.map(|quiesce| THAWS.take(&quiesce.thaw.join("\0")));
    let frozen = quiesce.and_then(|quiesce| match freeze(guest, quiesce) {
        Ok(frozen) => Some(frozen),
        Err(mut failed) => {
            problems.append(&mut failed);
            None
        }
    });
    let result = work(frozen.is_some());
    let outcome = match frozen {
        None => Outcome {
            consistency: Consistency::Crash,
            frozen: Duration::ZERO,
            problems,
        },
        Some(frozen) => frozen.thaw(),
    };
    (result, outcome)
}

/// How a guest is to be quiesced. `None`: not at all. Containers are not quiesced by `qm`, and a
/// virtual machine's owner can forbid a freeze.
pub fn of(guest: &Guest, client: &ClientFile) -> Option<Quiesce> {
    let vmid = match guest.pve {
        Some(Handle::Machine { vmid, .. }) => Some(vmid),
        _ => None,
    };
    let quiesce = client.quiesce(&guest.name, vmid)?;
    let needless = match (quiesce.way, guest.pve) {
        (QuiesceWay::QmSuspend | QuiesceWay::QmFreeze, Some(Handle::Container)) => true,
        (QuiesceWay::QmFreeze, Some(Handle::Machine { agent, .. })) => agent == Agent::NoFreeze,
        _ => false,
    };
    (!needless).then_some(quiesce)
}

/// Whether the guest is off.
pub fn is_off(quiesce: &Quiesce) -> bool {
    let Some(status) = &quiesce.status else {
        return false;
    };
    let ended = argv(status).and_then(|argv| process::run(&argv, WAKE_PATIENCE, &|| false));
    // Otherwise the freeze command tells the cause.
    ended.is_ok_and(|ended| ended.status.success() && ended.said == "status: stopped")
}

/// Checks that the freeze, thaw and guard commands exist.
pub fn check(quiesce: &Quiesce) -> Result<()> {
    argv(&quiesce.freeze)?;
    argv(&quiesce.thaw)?;
    for name in ["timeout", "tee", "xargs"] {
        find(name)?;
    }
    Ok(())
}

/// Reason not to quiesce a guest this way: the commands could freeze another guest.
pub fn refusal(guest: &Guest, quiesce: &Quiesce) -> Option<Error> {
    let doubt = guest.doubt.clone().filter(|_| quiesce.by_name);
    let number = quiesce.number.as_ref().map(|number| {
        format!(
            "xl and virsh take {number} for the number of any domain: rename the domain, or for virsh set domain to its UUID"
        )
    });
    let qm = match (quiesce.way, guest.pve) {
        (way, None) if way.is_qm() => {
            Some("neither pve= nor guest= has found it in a configuration of Proxmox VE")
        }
        (
            QuiesceWay::QmFreeze,
            Some(Handle::Machine {
                agent: Agent::Off, ..
            }),
        ) => Some("its configuration does not say agent: 1"),
        _ => None,
    };
    doubt
        .or(number)
        .or(qm.map(str::to_owned))
        .map(|why| Error::new(Code::QuiesceFailed, format!("{}: {why}", guest.name)))
}

/// Freezes a guest. After an error the guest is awake, or an error reports that it may not be.
fn freeze(guest: &str, quiesce: &Quiesce) -> std::result::Result<Frozen, Vec<Error>> {
    let freeze = argv(&quiesce.freeze).map_err(|error| vec![error])?;
    let thaw = argv(&quiesce.thaw).map_err(|error| vec![error])?;
    let seconds = Duration::from_secs(quiesce.seconds);
    let (guard, weaker) = Guard::arm(&thaw, seconds).map_err(|error| {
        vec![
            Error::new(
                Code::QuiesceFailed,
                format!("{guest}: the wake-up cannot be armed"),
            )
            .because(error),
        ]
    })?;
    let mut frozen = Frozen {
        guest: guest.to_owned(),
        way: quiesce.way,
        since: Instant::now(),
        thaw,
        guard: Some(guard),
        weaker,
    };
    match frozen.freeze(&freeze) {
        problems if problems.is_empty() => Ok(frozen),
        problems => Err(problems),
    }
}

/// A guest at rest. Dropping it wakes the guest.
#[derive(Debug)]
struct Frozen {
    guest: String,
    way: QuiesceWay,
    since: Instant,
    thaw: Vec<String>,
    guard: Option<Guard>,
    /// Reason why the guard survives less than it should.
    weaker: Option<Error>,
}

impl Frozen {
    /// Runs the freeze command. On problems the guest has been woken, or they report that it may
    /// not be awake.
    fn freeze(&mut self, command: &[String]) -> Vec<Error> {
        let Some(guard) = &mut self.guard else {
            return Vec::new();
        };
        let ended = guard.freeze(command);
        let fired = guard.fired();
        let failed = |text: String| Error::new(Code::CommandFailed, text);
        // `cut`: the command was cut off. `sure`: it reports that it froze nothing.
        let (error, cut, sure) = match ended {
            Ok(ended) if ended.status.success() && !fired => return Vec::new(),
            Ok(ended) if ended.status.success() => {
                let text = "the wake-up came before the freeze was through";
                (failed(text.to_owned()), false, false)
            }
            Ok(Ended { status, said }) => {
                let shown = escape(command.join(" ").as_bytes());
                let error = failed(format!("{shown} ({status}): {said}"));
                // From 128 on, `timeout` and shells report a signal, and ssh a lost connection.
                let cut = status.code().is_none_or(|code| code >= 128);
                (error, cut, !cut && !fired)
            }
            Err(Failed::Killed(error)) => (error, true, false),
            Err(Failed::NotStarted(error)) => (error, false, false),
        };
        let mut problems = vec![Error::new(Code::QuiesceFailed, self.guest.clone()).because(error)];
        // If the wake-up has fired, it came too early: thaw again.
        match self.wake(fired) {
            (_, Ok(())) if cut => problems.push(self.not_woken(failed(
                "the freeze was ended before it was through: what it started elsewhere may still freeze \
                 the guest, see whether the guest runs"
                    .to_owned(),
            ))),
            (_, Ok(())) => {}
            // Expected if nothing was frozen.
            (_, Err(error)) if sure => {
                let text = format!("{}: the thaw after a failed freeze", self.guest);
                problems.push(Error::new(Code::QuiesceFailed, text).because(error));
            }
            (_, Err(error)) => problems.push(self.not_woken(error)),
        }
        problems
    }

    fn thaw(mut self) -> Outcome {
        let (early, result) = self.wake(false);
        let frozen = self.since.elapsed();
        let mut problems: Vec<Error> = self.weaker.take().into_iter().collect();
        let mut consistency = match self.way {
            QuiesceWay::None => Consistency::Crash,
            QuiesceWay::XlPause | QuiesceWay::VirshSuspend | QuiesceWay::QmSuspend => {
                Consistency::CrashOneInstant
            }
            QuiesceWay::VirshFreeze | QuiesceWay::QmFreeze => Consistency::Filesystem,
            QuiesceWay::Commands => Consistency::Application,
        };
        if early {
            consistency = Consistency::Crash;
            let text = format!(
                "{}: it was woken up before its snapshots were there",
                self.guest
            );
            problems.push(Error::new(Code::QuiesceFailed, text));
        }
        problems.extend(result.err().map(|error| self.not_woken(error)));
        Outcome {
            consistency,
            frozen,
            problems,
        }
    }

    /// Wakes the guest; with `again`, thaws once more after a successful wake-up. Returns whether
    /// it had been woken earlier, and the result.
    fn wake(&mut self, again: bool) -> (bool, Result<()>) {
        let Some(mut guard) = self.guard.take() else {
            return (false, Ok(()));
        };
        let early = guard.fired();
        let released = guard.release();
        if released.is_ok() && !again {
            return (early, Ok(()));
        }
        // Retry once from this process.
        let result = process::run_well(&self.thaw, WAKE_PATIENCE, &|| false)
            .map_err(|error| released.err().unwrap_or(error));
        (early, result)
    }

    fn not_woken(&self, error: Error) -> Error {
        let thaw = escape(self.thaw.join(" ").as_bytes());
        Error::new(Code::ThawFailed, format!("{}: {thaw}", self.guest)).because(error)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let (_, Err(error)) = self.wake(false) {
            log::error!("{}", self.not_woken(error).report());
        }
    }
}

#[cfg(test)]
mod tests;
