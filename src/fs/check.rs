//! The filesystem check that the client file may ask for, run on the snapshot.
//!
//! Every tool's exit status is read by its own manual; what it cannot say for sure is an error.

use std::path::Path;
use std::time::Duration;

use super::Note;
use crate::error::{Code, Error, Result};
use crate::process;

/// A check of a huge filesystem takes hours; one that takes longer than a day hangs.
const PATIENCE: Duration = Duration::from_secs(86400);

/// e2fsck's exit bit for "errors corrected" (1) and "reboot needed" (2, which means the same where
/// the filesystem is not the running root).
const E2FSCK_FINE: i32 = 1 | 2;

/// How a type is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Check {
    /// The command; the device follows.
    command: &'static [&'static str],
    /// The tool does not replay the journal itself: it must have been mounted before.
    pub needs_replay: bool,
    /// Bits of the exit status that leave the filesystem in order.
    fine: i32,
}

/// The check of a type, as libblkid names it; `None`: there is none.
pub fn of_type(fstype: &str) -> Option<Check> {
    Some(match fstype {
        // -p repairs what is safe to repair without a question, in the snapshot.
        "ext2" | "ext3" | "ext4" => Check {
            command: &["e2fsck", "-p"],
            needs_replay: false,
            fine: E2FSCK_FINE,
        },
        "xfs" => Check {
            command: &["xfs_repair", "-n"],
            needs_replay: true,
            fine: 0,
        },
        "btrfs" => Check {
            command: &["btrfs", "check", "--readonly"],
            needs_replay: true,
            fine: 0,
        },
        _ => return None,
    })
}

impl Check {
    /// Runs the check on an unmounted device. An error: it found damage, or could not run.
    pub fn run(&self, device: &Path, what: &str, stop: &dyn Fn() -> bool) -> Result<Vec<Note>> {
        let mut argv: Vec<String> = self.command.iter().map(|a| (*a).to_owned()).collect();
        argv.push(device.display().to_string());
        let shown = argv.join(" ");
        let ended = process::run(&argv, PATIENCE, stop)?;
        match ended.status.code() {
            Some(0) => Ok(vec![Note::info(format!("{what}: {shown}: in order"))]),
            Some(status) if status & !self.fine == 0 => Ok(vec![Note::warning(format!(
                "{what}: {shown}: repaired in the snapshot; the guest's own disk has the damage still: {}",
                ended.said
            ))]),
            _ => Err(Error::new(
                Code::CheckFailed,
                format!("{what}: {shown} ({}): {}", ended.status, ended.said),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_exit_statuses() {
        let run = |command: &'static [&'static str], fine| {
            let check = Check {
                command,
                needs_replay: false,
                fine,
            };
            check.run(Path::new("/dev/null"), "web1: p1", &|| false)
        };
        let notes = run(&["true"], 0).unwrap();
        assert_eq!(notes[0].level, super::super::NoteLevel::Info);
        // `false` exits with 1.
        let notes = run(&["false"], E2FSCK_FINE).unwrap();
        assert_eq!(notes[0].level, super::super::NoteLevel::Warning);
        assert_eq!(run(&["false"], 0).unwrap_err().code(), Code::CheckFailed);
        let error = run(&["no-such-tool"], 0).unwrap_err();
        assert_eq!(error.code(), Code::CommandMissing);
    }
}
