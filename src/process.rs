//! Running the commands that an administrator configured, and the tools they stand for.
//!
//! No shell, a fixed environment, a process group of its own, no inherited descriptors. LVM's own
//! commands have other rules: see [`crate::snapshot::command`].

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

/// Where programs are looked for when they are not given by their path, and what children get as
/// `PATH`. Never our own `PATH`: the daemon's environment is not ours to trust.
pub(crate) const FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// How often a child is looked at.
pub(crate) const TICK: Duration = Duration::from_millis(10);

/// How long a command may take to die.
const LAST_PATIENCE: Duration = Duration::from_secs(2);

/// The most of a command's messages that is kept, in bytes.
const MAX_SAID: u64 = 4096;

/// Messages beyond this are dropped while the command runs, in bytes.
const MAX_HELD: u64 = 1 << 20;

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Its exit status.
    pub(crate) status: ExitStatus,
    /// The beginning of what it printed, safe to print.
    pub(crate) said: String,
}

/// Runs a command to its end, whatever that is. It is killed, and an error, when the time is over
/// or `stop` says so.
pub(crate) fn run(argv: &[String], patience: Duration, stop: &dyn Fn() -> bool) -> Result<Ended> {
    run_holding(argv, None, patience, stop)?
}

/// The same; the command and what it starts hold a descriptor open. The outer error is of a command that
/// was not started, the inner one of a command that was, and was killed.
pub(crate) fn run_holding(
    argv: &[String],
    held: Option<OwnedFd>,
    patience: Duration,
    stop: &dyn Fn() -> bool,
) -> Result<Result<Ended>> {
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
                return Ok(Ok(Ended {
                    status,
                    said: said(&mut output),
                }));
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
        return Ok(Err(error));
    }
}

/// Ends a command. One that waits for a disk that does not answer dies when that does.
pub(crate) fn kill(mut child: Child) {
    // Its own process group, so that what it started goes too.
    // Once it was waited for its number may be another's.
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
        // The daemon's signals are handled by the daemon's threads.
        let _ = SigSet::all().thread_block();
        child.wait()
    });
    if let Err(error) = reap {
        log::warn!("starting a thread: {error}");
    }
}

/// The same; any exit status but 0 is an error too.
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
/// A command with a fixed environment, in a process group of its own.
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

/// An argument vector with its program found.
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

/// A program in the usual folders.
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

/// A file in memory for a command's messages: nobody has to read it while the command runs, and
/// writing to it works when we are gone.
pub(crate) fn memory() -> Result<File> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let fd = rustix::fs::memfd_create("guestsnap-messages", flags)
        .map_err(|error| Error::new(Code::CommandFailed, "memfd_create").because(error))?;
    Ok(File::from(fd))
}

/// Drops what a command has printed beyond the part that is kept: a guest may have it print without
/// end. The command does not notice; it goes on writing where it was, behind a hole.
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

/// The child's status, or `None` when the time is over. What it says is kept within bounds.
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
            // As `run` does; in between the command prints on.
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
