//! External commands: named once, found in fixed folders, never through a shell.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use std::os::unix::process::CommandExt;

use crate::error::{Code, Error, Result, escape};

/// Where commands may be. `PATH` belongs to the daemon's environment, which is not ours to trust.
const FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// LVM takes a lock per volume group and waits for it; our own calls wait here instead.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Settings for every LVM command: nothing that talks to other daemons, no hints file of ours.
const LVM_CONFIG: &str = "global/notify_dbus=0 global/use_lvmpolld=0 activation/monitoring=0";

fn find(name: &str) -> Result<PathBuf> {
    let found = FOLDERS
        .iter()
        .map(|f| Path::new(f).join(name))
        .find(|p| p.exists());
    found.ok_or_else(|| {
        Error::new(
            Code::CommandMissing,
            format!("{name}, looked for in {}", FOLDERS.join(", ")),
        )
    })
}

/// Runs an LVM command to its end and gives what it printed.
///
/// It runs in its own process group, so that a signal to the daemon's group does not stop LVM
/// between two of its steps, and it is never killed: a killed LVM command leaves a volume group
/// suspended.
pub(super) fn lvm(name: &str, arguments: &[&str]) -> Result<String> {
    let program = find(name)?;
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    log::debug!("{name} {}", arguments.join(" "));
    let output = Command::new(&program)
        .arg("--config")
        .arg(LVM_CONFIG)
        .args(arguments)
        .env_clear()
        .env("LC_ALL", "C")
        .env("PATH", FOLDERS.join(":"))
        .env("LVM_SUPPRESS_FD_WARNINGS", "1")
        .current_dir("/")
        .stdin(Stdio::null())
        .process_group(0)
        .output()
        .map_err(|e| {
            Error::new(
                Code::CommandFailed,
                format!("{}: cannot be started", program.display()),
            )
            .because(e)
        })?;
    let said = escape(
        String::from_utf8_lossy(&output.stderr)
            .trim()
            .replace('\n', "; ")
            .as_bytes(),
    );
    if !output.status.success() {
        let text = format!("{name} {} ({}): {said}", arguments.join(" "), output.status);
        return Err(Error::new(Code::CommandFailed, text));
    }
    if !said.is_empty() {
        // LVM warns on success too (leaked descriptors, missing devices of others).
        log::debug!("{name}: {said}");
    }
    String::from_utf8(output.stdout).map_err(|e| {
        Error::new(
            Code::CommandFailed,
            format!("{name}: its answer is not UTF-8"),
        )
        .because(e)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_a_missing_command_says_where_it_was_looked_for() {
        let error = lvm("guestsnap-no-such-command", &[]).unwrap_err();
        assert_eq!(error.code(), Code::CommandMissing);
        assert!(error.report().contains("/usr/sbin"));
    }

    #[test]
    fn test_a_failing_command_says_what_it_was_and_said() {
        // Takes `--config …` as a file name that does not exist.
        let error = lvm("ls", &["/nonexistent"]).unwrap_err();
        assert_eq!(error.code(), Code::CommandFailed);
        assert!(
            error.report().contains("ls /nonexistent"),
            "{}",
            error.report()
        );
    }
}
