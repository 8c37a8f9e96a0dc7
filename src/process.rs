//! Runs configured commands and external tools.
//!
//! Commands get no shell, a fixed environment, their own process group, and no inherited
//! descriptors. LVM commands follow other rules: see [`crate::snapshot::command`].

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal, killpg};
use nix::unistd::Pid;

use crate::error::escape;
use crate::{Code, Error, Result};

/// Search path for programs named without a path, and the `PATH` of children. The daemon's own
/// `PATH` is not trusted.
pub(crate) const FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// Poll interval for a child.
pub(crate) const TICK: Duration = Duration::from_millis(10);

/// Time limit for a killed command to die.
const LAST_PATIENCE: Duration = Duration::from_secs(2);

/// Maximum bytes kept of a command's messages.
const MAX_SAID: u64 = 4096;

/// Bytes of messages at which the excess is dropped while the command runs.
const MAX_HELD: u64 = 1 << 20;

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Its exit status.
    pub(crate) status: ExitStatus,
    /// Start of its output, safe to print.
    pub(crate) said: String,
}

/// Runs a command to completion, whatever its status. On timeout or when `stop` returns true, kills
/// it and returns an error.
pub(crate) fn run(argv: &[String], patience: Duration, stop: &dyn Fn() -> bool) -> Result<Ended> {
    run_holding(argv, None, patience, stop).map_err(Failed::error)
}

/// Why there is no end of a command.
#[derive(Debug)]
pub(crate) enum Failed {
    /// It was not started.
    NotStarted(Error),
    /// It was started, and was killed.
    Killed(Error),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Failed {
        Failed::NotStarted(error)
    }
}

impl Failed {
    fn error(self) -> Error {
        match self {
            Failed::NotStarted(error) | Failed::Killed(error) => error,
        }
    }
}

/// Like [`run`], but the command and its children inherit a descriptor.
pub(crate) fn run_holding(
    argv: &[String],
    held: Option<OwnedFd>,
    patience: Duration,
    stop: &dyn Fn() -> bool,
) -> std::result::Result<Ended, Failed> {
    let shown = escape(argv.join(" ").as_bytes());
    let failed = |text: String| Error::new(Code::CommandFailed, text);
    let argv = self::argv(argv)?;
    let mut output = memory()?;
    let copy = || {
        let copy = output.try_clone();
        copy.map(Stdio::from)
            .map_err(|error| failed(shown.clone()).because(error))
    };
    let mut command = base(Path::new(&argv[0]));
    if let Some(held) = held {
        crate::sys::child::keep(&mut command, held);
    }
    let mut child = command
        .args(&argv[1..])
        .stdin(Stdio::null())
        .stdout(copy()?)
        .stderr(copy()?)
        .spawn()
        .map_err(|error| failed(format!("{shown}: cannot be started")).because(error))?;
    drop(command);
    let begun = Instant::now();
    loop {
        bound(&output);
        let error = match child.try_wait() {
            Ok(Some(status)) => {
                return Ok(Ended {
                    status,
                    said: said(&mut output),
                });
            }
            Ok(None) if stop() => Error::new(Code::Cancelled, shown.clone()),
            Ok(None) if begun.elapsed() < patience => {
                std::thread::sleep(TICK);
                continue;
            }
            Ok(None) => failed(format!(
                "{shown}: not done after {patience:.0?}: {}",
                said(&mut output)
            )),
            Err(error) => failed(format!("{shown}: cannot be waited for")).because(error),
        };
        kill(child);
        return Err(Failed::Killed(error));
    }
}

/// Kills a command. A command blocked on an unresponsive disk dies when the disk responds.
pub(crate) fn kill(mut child: Child) {
    // Kills the process group, to include descendants. After the wait, the number may belong to
    // another process.
    if let (Ok(None), Ok(group)) = (child.try_wait(), i32::try_from(child.id())) {
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
    if wait(&mut child, None, LAST_PATIENCE).is_some() {
        return;
    }
    log::warn!(
        "process {} does not die: a disk that it waits for does not answer",
        child.id()
    );
    let reap = std::thread::Builder::new().name("guestsnap-wait".to_owned());
    let reap = reap.spawn(move || {
        // The daemon's threads handle the daemon's signals.
        let _ = SigSet::all().thread_block();
        child.wait()
    });
    if let Err(error) = reap {
        log::warn!("starting a thread: {error}");
    }
}

/// Like `run`, but any exit status except 0 is an error.
pub(crate) fn run_well(argv: &[String], patience: Duration, stop: &dyn Fn() -> bool) -> Result<()> {
    let ended = run(argv, patience, stop)?;
    match ended.status.success() {
        true => Ok(()),
        false => {
            let shown = escape(argv.join(" ").as_bytes());
            let text = format!("{shown} ({}): {}", ended.status, ended.said);
            Err(Error::new(Code::CommandFailed, text))
        }
    }
}
/// A command with the fixed environment and its own process group.
pub(crate) fn base(program: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("LC_ALL", "C")
        .env("PATH", FOLDERS.join(":"))
        .current_dir("/");
    crate::sys::child::isolate(&mut command, false);
    command
}

/// Resolves the program of an argument vector.
pub(crate) fn argv(words: &[String]) -> Result<Vec<String>> {
    let mut words = words.to_vec();
    match words.first_mut() {
        Some(program) if !program.starts_with('/') => {
            *program = find(program)?.to_string_lossy().into_owned();
            Ok(words)
        }
        Some(program) if Path::new(program.as_str()).is_file() => Ok(words),
        Some(program) => Err(Error::new(Code::CommandMissing, escape(program.as_bytes()))),
        None => Err(Error::new(Code::CommandMissing, "an empty command")),
    }
}

/// Finds a program in the search path.
pub(crate) fn find(name: &str) -> Result<PathBuf> {
    FOLDERS
        .iter()
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            Error::new(
                Code::CommandMissing,
                format!("{name} is in none of {}", FOLDERS.join(", ")),
            )
        })
}

/// An in-memory file for a command's messages: needs no reader while the command runs, and stays
/// writable after this process is gone.
pub(crate) fn memory() -> Result<File> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let fd = rustix::fs::memfd_create("guestsnap-messages", flags)
        .map_err(|error| Error::new(Code::CommandFailed, "memfd_create").because(error))?;
    Ok(File::from(fd))
}

/// Drops output beyond the kept part, because a guest may cause endless output. The command notices
/// nothing and keeps writing at its offset, behind a hole.
pub(crate) fn bound(output: &File) {
    if output.metadata().is_ok_and(|meta| meta.len() > MAX_HELD) {
        let _ = output.set_len(MAX_SAID);
    }
}

pub(crate) fn said(output: &mut File) -> String {
    let mut bytes = Vec::new();
    let _ = output.rewind();
    let _ = output.take(MAX_SAID).read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes).trim().replace('\n', "; ");
    match text.is_empty() {
        true => "it said nothing".to_owned(),
        false => escape(text.as_bytes()),
    }
}

/// Waits for the child; `None` on timeout. Bounds its output.
pub(crate) fn wait(
    child: &mut Child,
    output: Option<&File>,
    patience: Duration,
) -> Option<ExitStatus> {
    let begun = Instant::now();
    loop {
        if let Some(output) = output {
            bound(output);
        }
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if begun.elapsed() < patience => std::thread::sleep(TICK),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn test_messages_without_end_take_no_memory() {
        let output = memory().unwrap();
        let mut child = base(Path::new("/bin/sh"))
            .args(["-c", "echo first; head -c 2000000000 /dev/zero; echo last"])
            .stdout(output.try_clone().unwrap())
            .spawn()
            .unwrap();
        let mut most = 0;
        let status = loop {
            // Like `run`; the command prints in between.
            bound(&output);
            most = most.max(output.metadata().unwrap().blocks() * 512);
            match child.try_wait().unwrap() {
                Some(status) => break status,
                None => std::thread::sleep(TICK),
            }
        };
        // It does not fail because of that.
        assert!(status.success(), "{status}");
        assert!(most < 200 << 20, "{most} bytes");
        let mut output = output;
        assert!(said(&mut output).starts_with("first"));
    }

    #[test]
    fn test_much_output_is_cut_in_run() {
        let script = "echo first; head -c 300000000 /dev/zero; exit 3";
        let argv = ["/bin/sh", "-c", script].map(str::to_owned);
        let ended = run(&argv, Duration::from_secs(60), &|| false).unwrap();
        assert_eq!(ended.status.code(), Some(3));
        assert!(ended.said.starts_with("first"));
        assert!(ended.said.len() < 20_000);
    }
}
