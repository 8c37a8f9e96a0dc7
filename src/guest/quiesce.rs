//! Bringing a guest to rest while its snapshots are taken, and waking it up whatever happens.
//!
//! A guest that stays frozen because a backup went wrong is worse than no backup. So the wake-up is
//! armed before the freeze, in processes that do not need us:
//!
//! ```text
//! we ──stdin──► timeout SECONDS tee ──pipe──► xargs THAW…
//! ```
//!
//! `xargs` runs the thaw command when its input ends. It ends when `tee` does: when we close our
//! side (all is well), when the time is over, when this process is gone. There is one way for all
//! three, and the command runs once. A line sent through `tee` and back proves that it stands
//! before anything is frozen. The freeze command holds our side open too: if we die while it runs,
//! the guest is not woken before the freeze is through. Where systemd runs, both start in scopes of
//! their own, because stopping a service kills all processes in it.

use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::Guest;
use crate::config::client::{Quiesce, QuiesceWay};
use crate::error::escape;
use crate::process::{self, Ended, TICK, argv, base, find, memory, said, wait};
use crate::sys::child::isolate;
use crate::turn::Turns;
use crate::{Code, Error, Result};

/// How long the wake-up may take to stand, on a host that is busy.
const ARM_PATIENCE: Duration = Duration::from_secs(30);

/// How long the thaw command may take before we say that the guest may still be frozen.
const THAW_PATIENCE: Duration = Duration::from_secs(60);

/// A freeze command is ended by this, or a quarter of the time, before the guest is woken in any
/// case: what it froze after that would stay frozen.
const MARGIN: Duration = Duration::from_secs(1);

/// The thaw commands of guests that are being brought to rest, by other jobs too. A command that several
/// guests share wakes them all, so that only one of them can be at rest.
static THAWS: Turns = Turns::new();

/// What a backup holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// What a power failure would have left.
    Crash,
    /// The same, of all disks at one instant.
    CrashOneInstant,
    /// Filesystems at rest.
    Filesystem,
    /// Applications at rest, as the configured commands see to.
    Application,
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Consistency::Crash => "crash-consistent",
            Consistency::CrashOneInstant => "crash-consistent, all disks at one instant",
            Consistency::Filesystem => "filesystem-consistent",
            Consistency::Application => "application-consistent",
        })
    }
}

/// What became of a guest's rest.
#[derive(Debug)]
pub struct Outcome {
    /// What was reached.
    pub consistency: Consistency,
    /// How long the guest was at rest.
    pub frozen: Duration,
    /// What went wrong. The guest goes on being backed up; [`Code::ThawFailed`] needs a human.
    pub problems: Vec<Error>,
}

/// Does `work` (taking snapshots) while the guest is at rest. A guest that cannot be frozen is
/// no reason to leave it out: the outcome says what was reached. Waits for others with the same thaw
/// command, which hold their volume groups meanwhile: `work` must not wait for a group.
pub fn during<T>(guest: &str, quiesce: Option<&Quiesce>, work: impl FnOnce() -> T) -> (T, Outcome) {
    let mut problems = Vec::new();
    let _turn = quiesce.map(|quiesce| THAWS.take(&quiesce.thaw.join("\0")));
    let frozen = quiesce.and_then(|quiesce| match freeze(guest, quiesce) {
        Ok(frozen) => Some(frozen),
        Err(mut failed) => {
            problems.append(&mut failed);
            None
        }
    });
    let result = work();
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

/// Whether the commands to freeze, thaw and guard are there.
pub fn check(quiesce: &Quiesce) -> Result<()> {
    argv(&quiesce.freeze)?;
    argv(&quiesce.thaw)?;
    for name in ["timeout", "tee", "xargs"] {
        find(name)?;
    }
    Ok(())
}

/// Why a guest must not be brought to rest this way: it could be another one that is frozen, or any.
pub fn refusal(guest: &Guest, quiesce: &Quiesce) -> Option<Error> {
    let doubt = guest.doubt.clone().filter(|_| quiesce.by_name);
    let number = quiesce.number.as_ref().map(|number| {
        format!(
            "xl and virsh take {number} for the number of any domain: rename the domain, or for virsh set domain to its UUID"
        )
    });
    doubt
        .or(number)
        .map(|why| Error::new(Code::QuiesceFailed, format!("{}: {why}", guest.name)))
}

/// Freezes a guest; on an error it is awake, or an error says that it may not be.
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
    /// Why the guard survives less than it should.
    weaker: Option<Error>,
}

impl Frozen {
    /// Runs the freeze command. If there are problems the guest was woken, or they say that it may
    /// not be awake.
    fn freeze(&mut self, command: &[String]) -> Vec<Error> {
        let Some(guard) = &mut self.guard else {
            return Vec::new();
        };
        let ended = guard.freeze(command);
        let fired = guard.fired();
        let failed = |text: String| Error::new(Code::CommandFailed, text);
        // Whether the command was cut off, and whether it says itself that it has frozen nothing.
        let (error, cut, sure) = match ended {
            Ok(Ok(ended)) if ended.status.success() && !fired => return Vec::new(),
            Ok(Ok(ended)) if ended.status.success() => {
                let text = "the wake-up came before the freeze was through";
                (failed(text.to_owned()), false, false)
            }
            Ok(Ok(Ended { status, said })) => {
                let shown = escape(command.join(" ").as_bytes());
                let error = failed(format!("{shown} ({status}): {said}"));
                // Above this `timeout` and shells tell of a signal, and ssh of a lost connection.
                let cut = status.code().is_none_or(|code| code >= 128);
                (error, cut, !cut && !fired)
            }
            Ok(Err(error)) => (error, true, false),
            Err(error) => (error, false, false),
        };
        let mut problems = vec![Error::new(Code::QuiesceFailed, self.guest.clone()).because(error)];
        // A wake-up that came by itself came too early.
        match self.wake(fired) {
            (_, Ok(())) if cut => problems.push(self.not_woken(failed(
                "the freeze was ended before it was through: what it started elsewhere may still freeze \
                 the guest, see whether the guest runs"
                    .to_owned(),
            ))),
            (_, Ok(())) => {}
            // With nothing frozen this is no wonder.
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
            QuiesceWay::XlPause | QuiesceWay::VirshSuspend => Consistency::CrashOneInstant,
            QuiesceWay::VirshFreeze => Consistency::Filesystem,
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

    /// Wakes the guest, with `again` once more when it was woken: whether somebody else did so before,
    /// and whether it worked.
    fn wake(&mut self, again: bool) -> (bool, Result<()>) {
        let Some(mut guard) = self.guard.take() else {
            return (false, Ok(()));
        };
        let early = guard.fired();
        let released = guard.release();
        if released.is_ok() && !again {
            return (early, Ok(()));
        }
        // One more try, by ourselves.
        let result = process::run_well(&self.thaw, THAW_PATIENCE, &|| false)
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

/// The processes that wake the guest.
#[derive(Debug)]
struct Guard {
    // Closed first: that is the signal.
    line: Option<ChildStdin>,
    timer: Child,
    thaw: Child,
    said: File,
    /// When the freeze command has to be gone, and the time from then on until the wake-up.
    end: Instant,
    margin: Duration,
}

impl Guard {
    /// Without systemd's help, where it runs, the guard still survives us, but not a stop of the
    /// whole service: the second value says why.
    fn arm(thaw: &[String], seconds: Duration) -> Result<(Guard, Option<Error>)> {
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
        // Not /dev/stderr: where nobody made that link, tee would make a file of this name.
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
                // Without a scope a stop of the service ends the timer, and so the guest is woken.
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

    /// The same guard if it stands. Else it is ended: nothing is frozen, and a thaw that comes late could be
    /// in the middle of the next freeze.
    fn standing(mut self, echo: Option<ChildStderr>) -> Result<Guard> {
        match self.stands(echo) {
            Ok(()) => Ok(self),
            Err(error) => {
                // First who would run the thaw command when the other ends.
                process::kill(self.thaw);
                process::kill(self.timer);
                Err(error)
            }
        }
    }

    /// Proves that both processes are what they should be: a line goes through the first, the
    /// second is `xargs` and no longer what started it.
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

    /// Runs the freeze command in the time that is left, with a copy of the line. Should we die, another
    /// `timeout` ends it in time.
    fn freeze(&self, command: &[String]) -> Result<Result<Ended>> {
        let failed = |what: &str| Error::new(Code::CommandFailed, what.to_owned());
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(failed("no time is left, arming the wake-up took it all"));
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

    /// Whether the wake-up has begun without us. By the clock as well: who has begun it is not gone at once.
    fn fired(&mut self) -> bool {
        if Instant::now() >= self.end + self.margin {
            return true;
        }
        let gone = |child: &mut Child| !matches!(child.try_wait(), Ok(None));
        gone(&mut self.timer) || gone(&mut self.thaw)
    }

    /// Lets the thaw command run, if it has not yet, and waits for it.
    fn release(mut self) -> Result<()> {
        self.line = None;
        // What the freeze command left behind may still hold the line.
        if let (Ok(None), Ok(group)) = (self.timer.try_wait(), i32::try_from(self.timer.id())) {
            let _ = killpg(Pid::from_raw(group), Signal::SIGTERM);
        }
        let status = wait(&mut self.thaw, Some(&self.said), THAW_PATIENCE);
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
                    THAW_PATIENCE.as_secs()
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

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    fn quiesce(freeze: &str, thaw: &str, seconds: u64) -> Quiesce {
        Quiesce {
            way: QuiesceWay::Commands,
            freeze: words(freeze),
            thaw: words(thaw),
            seconds,
            by_name: true,
            number: None,
        }
    }

    #[test]
    fn test_what_could_freeze_another_guest_is_refused() {
        let mut guest = super::Guest {
            name: "web1".into(),
            disks: Vec::new(),
            disk_names: Vec::new(),
            uncovered: Vec::new(),
            doubt: None,
        };
        let mut quiesce = quiesce("/f", "/t", 1);
        assert!(refusal(&guest, &quiesce).is_none());
        quiesce.number = Some("12".into());
        let error = refusal(&guest, &quiesce).unwrap();
        assert_eq!(error.code(), Code::QuiesceFailed);
        assert!(
            error.report().contains("the number of any domain"),
            "{error}"
        );
        quiesce.number = None;
        guest.doubt = Some("it may be xweb1".into());
        assert!(refusal(&guest, &quiesce).is_some());
        quiesce.by_name = false;
        assert!(refusal(&guest, &quiesce).is_none());
    }

    struct Guest {
        folder: tempfile::TempDir,
    }

    impl Guest {
        fn new() -> Guest {
            Guest {
                folder: tempfile::tempdir().unwrap(),
            }
        }

        fn path(&self, name: &str) -> String {
            self.folder.path().join(name).to_str().unwrap().to_owned()
        }

        fn touch(&self, name: &str) -> String {
            format!("touch {}", self.path(name))
        }

        fn has(&self, name: &str) -> bool {
            self.folder.path().join(name).exists()
        }

        fn waits_for(&self, name: &str, seconds: u64) {
            let begun = Instant::now();
            while !self.has(name) {
                assert!(begun.elapsed().as_secs() < seconds, "no {name}");
                std::thread::sleep(TICK);
            }
        }
    }

    fn codes(outcome: &Outcome) -> Vec<Code> {
        outcome.problems.iter().map(Error::code).collect()
    }

    #[test]
    fn test_the_guest_is_at_rest_during_the_work_only() {
        let guest = Guest::new();
        let quiesce = quiesce(&guest.touch("frozen"), &guest.touch("thawed"), 20);
        let (seen, outcome) = during("web1", Some(&quiesce), || {
            (guest.has("frozen"), guest.has("thawed"))
        });
        assert_eq!(seen, (true, false), "{outcome:?}");
        assert!(guest.has("thawed"));
        assert_eq!(outcome.consistency, Consistency::Application);
        assert!(outcome.problems.is_empty(), "{outcome:?}");
    }

    #[test]
    fn test_freezes_with_one_thaw_command_wait_for_each_other() {
        let guest = Guest::new();
        let quiesce = quiesce(&guest.touch("frozen"), &guest.touch("thawed"), 20);
        let other = Guest::new();
        let other = self::quiesce(&other.touch("frozen"), &other.touch("thawed"), 20);
        std::thread::scope(|scope| {
            let (tell, told) = std::sync::mpsc::channel();
            let (quiesce, seen) = (&quiesce, &guest);
            let ((), outcome) = during("web1", Some(quiesce), || {
                scope
                    .spawn(move || during("web2", Some(quiesce), || tell.send(seen.has("thawed"))));
                // Its thaw would wake this one, and this one's thaw that one.
                assert!(told.recv_timeout(Duration::from_millis(500)).is_err());
                // Other commands are of no interest, nor is a guest that is not brought to rest.
                during("web3", Some(&other), || ());
                during("web4", None, || ());
            });
            assert!(outcome.problems.is_empty(), "{outcome:?}");
            // The first one is awake by then.
            assert!(told.recv_timeout(Duration::from_secs(20)).unwrap());
        });
    }

    #[test]
    fn test_without_quiesce_the_work_is_just_done() {
        let (result, outcome) = during("web1", None, || 7);
        assert_eq!((result, outcome.consistency), (7, Consistency::Crash));
    }

    #[test]
    fn test_time_over_wakes_the_guest_and_is_told() {
        let guest = Guest::new();
        let quiesce = quiesce(&guest.touch("frozen"), &guest.touch("thawed"), 1);
        let ((), outcome) = during("web1", Some(&quiesce), || guest.waits_for("thawed", 10));
        assert_eq!(outcome.consistency, Consistency::Crash);
        assert_eq!(codes(&outcome), [Code::QuiesceFailed]);
    }

    #[test]
    fn test_a_failed_freeze_is_thawed_and_told() {
        let guest = Guest::new();
        let quiesce = quiesce("ls /nonexistent", &guest.touch("thawed"), 20);
        let (thawed, outcome) = during("web1", Some(&quiesce), || guest.has("thawed"));
        assert!(thawed);
        assert_eq!(outcome.consistency, Consistency::Crash);
        assert_eq!(codes(&outcome), [Code::QuiesceFailed]);
        let report = outcome.problems[0].report();
        assert!(report.contains("/nonexistent"), "{report}");
    }

    #[test]
    fn test_a_hanging_freeze_is_ended() {
        let guest = Guest::new();
        let quiesce = quiesce("sleep 60", &guest.touch("thawed"), 1);
        let begun = Instant::now();
        let ((), outcome) = during("web1", Some(&quiesce), || ());
        assert!(begun.elapsed().as_secs() < 20 && guest.has("thawed"));
        assert_eq!(codes(&outcome), [Code::QuiesceFailed, Code::ThawFailed]);
    }

    #[test]
    fn test_a_freeze_that_was_cut_off_may_freeze_the_guest_after_the_thaw() {
        use Code::{QuiesceFailed, ThawFailed};
        for (freeze, expected) in [
            ("sleep 60", &[QuiesceFailed, ThawFailed][..]),
            ("kill -9 $$", &[QuiesceFailed, ThawFailed]),
            // As ssh does when it loses the connection.
            ("exit 255", &[QuiesceFailed, ThawFailed]),
            // It ended by itself: `timeout` on the other side, say.
            ("exit 124", &[QuiesceFailed]),
            // Nothing was started.
            ("exec /no/such/program", &[QuiesceFailed]),
        ] {
            let guest = Guest::new();
            let mut quiesce = quiesce("x", &guest.touch("thawed"), 1);
            quiesce.freeze = script(freeze);
            let ((), outcome) = during("web1", Some(&quiesce), || ());
            assert!(guest.has("thawed"), "{freeze}");
            assert_eq!(codes(&outcome), expected, "{freeze}");
            for problem in &outcome.problems[1..] {
                let report = problem.report();
                for part in ["touch", "see whether the guest runs"] {
                    assert!(report.contains(part), "{freeze}: {report}");
                }
            }
        }
    }

    #[test]
    fn test_a_freeze_must_be_through_before_the_wake_up_can_come() {
        let guest = Guest::new();
        let quiesce = quiesce("sleep 0.9", &guest.touch("thawed"), 1);
        let (thawed, outcome) = during("web1", Some(&quiesce), || guest.has("thawed"));
        assert!(thawed);
        assert_eq!(outcome.consistency, Consistency::Crash);
        assert_eq!(codes(&outcome), [Code::QuiesceFailed, Code::ThawFailed]);
    }

    #[test]
    fn test_a_wake_up_that_does_not_stand_never_comes() {
        let guest = Guest::new();
        let (guard, _) =
            Guard::arm(&words(&guest.touch("thawed")), Duration::from_secs(1)).unwrap();
        let processes = [guard.timer.id(), guard.thaw.id()];
        // As if its timer could not be asked.
        assert!(guard.standing(None).is_err());
        for process in processes {
            assert!(!Path::new(&format!("/proc/{process}")).exists());
        }
        std::thread::sleep(Duration::from_millis(1500));
        assert!(!guest.has("thawed"));
    }

    #[test]
    fn test_a_wake_up_whose_time_has_come_has_begun() {
        let guest = Guest::new();
        let thaw = words(&guest.touch("thawed"));
        let (mut guard, _) = Guard::arm(&thaw, Duration::from_secs(20)).unwrap();
        assert!(!guard.fired());
        guard.end = Instant::now();
        assert!(!guard.fired());
        // Its processes are still there.
        guard.end -= guard.margin;
        assert!(guard.fired() && !guest.has("thawed"));
        guard.release().unwrap();
    }

    #[test]
    fn test_a_wake_up_during_the_freeze_does_not_count() {
        let guest = Guest::new();
        let thaw = script(&format!("echo >> {}", guest.path("thawed")));
        let (guard, weaker) = Guard::arm(&thaw, Duration::from_secs(20)).unwrap();
        let group = Pid::from_raw(guard.timer.id().try_into().unwrap());
        let mut frozen = Frozen {
            guest: "web1".into(),
            way: QuiesceWay::Commands,
            since: Instant::now(),
            thaw,
            guard: Some(guard),
            weaker,
        };
        killpg(group, Signal::SIGTERM).unwrap();
        guest.waits_for("thawed", 10);
        let problems = frozen.freeze(&argv(&words(&guest.touch("frozen"))).unwrap());
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].report().contains("before the freeze"));
        let thaws = std::fs::read(guest.path("thawed")).unwrap().len();
        assert_eq!((guest.has("frozen"), thaws), (true, 2));
    }

    #[test]
    fn test_a_guest_that_may_be_frozen_is_no_matter_of_a_warning() {
        for (freeze, expected) in [
            // It may have frozen something before its time was over.
            ("sleep 60", Code::ThawFailed),
            ("kill -9 $$", Code::ThawFailed),
            // It says itself that it has not.
            ("exit 1", Code::QuiesceFailed),
        ] {
            let mut quiesce = quiesce("x", "false", 1);
            quiesce.freeze = script(freeze);
            let ((), outcome) = during("web1", Some(&quiesce), || ());
            assert_eq!(codes(&outcome), [Code::QuiesceFailed, expected], "{freeze}");
        }
    }

    #[test]
    fn test_what_the_freeze_leaves_behind_does_not_hold_up_the_wake_up() {
        let guest = Guest::new();
        let mut quiesce = quiesce("x", &guest.touch("thawed"), 40);
        quiesce.freeze = script("sleep 30 &");
        let begun = Instant::now();
        let ((), outcome) = during("web1", Some(&quiesce), || ());
        assert!(outcome.problems.is_empty(), "{outcome:?}");
        assert!(guest.has("thawed") && begun.elapsed().as_secs() < 20);
    }

    #[test]
    fn test_a_failed_thaw_is_told() {
        let guest = Guest::new();
        let quiesce = quiesce(&guest.touch("frozen"), "false", 20);
        let ((), outcome) = during("web1", Some(&quiesce), || ());
        assert_eq!(codes(&outcome), [Code::ThawFailed]);
    }

    #[test]
    fn test_missing_programs_freeze_nothing() {
        let guest = Guest::new();
        for (freeze, thaw) in [
            ("guestsnap-no-such-program x", guest.touch("thawed")),
            (
                guest.touch("frozen").as_str(),
                "/no/such/program".to_owned(),
            ),
        ] {
            let ((), outcome) = during("web1", Some(&quiesce(freeze, &thaw, 5)), || ());
            assert_eq!(codes(&outcome), [Code::CommandMissing]);
        }
        assert!(!guest.has("frozen") && !guest.has("thawed"));
    }

    #[test]
    fn test_a_panic_wakes_the_guest() {
        let guest = Guest::new();
        let quiesce = quiesce(&guest.touch("frozen"), &guest.touch("thawed"), 20);
        let result = std::panic::catch_unwind(|| during("web1", Some(&quiesce), || panic!("x")));
        assert!(result.is_err() && guest.has("thawed"));
    }

    fn script(text: &str) -> Vec<String> {
        ["/bin/sh", "-c", text].map(str::to_owned).to_vec()
    }

    /// Kills a daemon that brings a guest to rest, when there is a file of this name in its folder.
    fn killed_at(name: &str, freeze: &str, thaw: &str, seconds: u64) -> Guest {
        let guest = Guest::new();
        let mut daemon = Command::new(std::env::current_exe().unwrap())
            .args([
                "--ignored",
                "--exact",
                "guest::quiesce::tests::daemon_that_is_killed",
            ])
            .env("GUESTSNAP_TEST_FOLDER", guest.folder.path())
            .env("GUESTSNAP_TEST_FREEZE", freeze)
            .env("GUESTSNAP_TEST_THAW", thaw)
            .env("GUESTSNAP_TEST_SECONDS", seconds.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        guest.waits_for(name, 20);
        assert!(!guest.has("thawed"));
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        guest.waits_for("thawed", 10);
        guest
    }

    #[test]
    fn test_a_killed_daemon_leaves_no_guest_frozen() {
        killed_at("at-work", "touch frozen", "touch thawed", 300);
    }

    #[test]
    fn test_a_daemon_killed_in_the_freeze_leaves_no_guest_frozen() {
        // The thaw that comes first finds nothing to thaw.
        let freeze = "touch freezing; sleep 2; touch frozen";
        killed_at("freezing", freeze, "mv frozen thawed", 300);
        // A freeze without an end is ended before.
        let freeze = "echo $$ > pid; sleep 60";
        // An ended process may stay, without words.
        let thaw = "grep -q . /proc/$(cat pid)/cmdline || touch thawed";
        killed_at("pid", freeze, thaw, 4);
    }

    /// The other half of the tests above.
    #[test]
    #[ignore = "run by the tests above"]
    fn daemon_that_is_killed() {
        let var = |name: &str| std::env::var(format!("GUESTSNAP_TEST_{name}")).unwrap();
        let folder = var("FOLDER");
        let script = |name: &str| script(&format!("cd {folder}; {}", var(name)));
        let mut quiesce = quiesce("x", "x", var("SECONDS").parse().unwrap());
        (quiesce.freeze, quiesce.thaw) = (script("FREEZE"), script("THAW"));
        let ((), _) = during("web1", Some(&quiesce), || {
            std::fs::write(format!("{folder}/at-work"), "").unwrap();
            std::thread::sleep(Duration::from_secs(60));
        });
    }
}
