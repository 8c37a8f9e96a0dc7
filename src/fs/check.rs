//! The optional filesystem check of the client file, run on the snapshot.
//!
//! Exit statuses are interpreted by each tool's manual; an ambiguous status is an error.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use super::{Note, policy};
use crate::error::{Code, Error, Result};
use crate::process;

/// Time limit: a huge filesystem takes hours, a check of more than a day hangs.
const PATIENCE: Duration = Duration::from_secs(86400);

/// e2fsck exit bits: "errors corrected" (1) and "reboot needed" (2, equivalent unless the
/// filesystem is the running root).
const E2FSCK_FINE: i32 = 1 | 2;

/// The checker of a filesystem type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Check {
    /// Command line; the device is appended.
    command: &'static [&'static str],
    /// Whether the filesystem must have been mounted before, because the tool does not replay the
    /// journal.
    pub needs_replay: bool,
    /// Whether to validate the ext superblock before running the tool. For other types the
    /// replaying mount has validated it.
    is_ext: bool,
    /// Bits of the exit status that leave the filesystem consistent.
    fine: i32,
}

/// The checker of a type named by libblkid; `None` if there is none.
pub fn of_type(fstype: &str) -> Option<Check> {
    Some(match fstype {
        // -p makes only safe repairs, in the snapshot. A journal may hold another superblock, which
        // e2fsck reads after the replay: -j confines its search for an external journal, away from
        // the host's devices.
        "ext2" | "ext3" | "ext4" => Check {
            command: &["e2fsck", "-p", "-j", "/dev/null"],
            needs_replay: false,
            is_ext: true,
            fine: E2FSCK_FINE,
        },
        "xfs" => Check {
            command: &["xfs_repair", "-n"],
            needs_replay: true,
            is_ext: false,
            fine: 0,
        },
        "btrfs" => Check {
            command: &["btrfs", "check", "--readonly"],
            needs_replay: true,
            is_ext: false,
            fine: 0,
        },
        _ => return None,
    })
}

impl Check {
    /// Checks an unmounted device. Errors: damage found, or the tool could not run.
    pub fn run(&self, device: &Path, what: &str, stop: &dyn Fn() -> bool) -> Result<Vec<Note>> {
        let mut argv: Vec<String> = self.command.iter().map(|a| (*a).to_owned()).collect();
        argv.push(device.display().to_string());
        let shown = argv.join(" ");
        let unchecked = |why: &str| {
            let text = format!("{what}: {shown} was not run: {why}");
            Error::new(Code::CheckFailed, text)
        };
        if self.is_ext {
            let (at, len) = policy::EXT_SUPERBLOCK;
            let mut superblock = vec![0; len];
            File::open(device)
                .and_then(|device| device.read_exact_at(&mut superblock, at))
                .map_err(|error| unchecked("its superblock cannot be read").because(error))?;
            policy::check_ext_superblock_for_fsck(&superblock)
                .map_err(|refusal| unchecked(&refusal.to_string()))?;
        }
        let ended = process::run(&argv, PATIENCE, stop)?;
        match ended.status.code() {
            Some(0) => Ok(vec![Note::info(format!("{what}: {shown}: in order"))]),
            // Warning: repaired.
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
                is_ext: false,
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

    #[test]
    fn test_e2fsck_looks_at_no_other_device_after_the_replay() {
        let folder = tempfile::tempdir().unwrap();
        let script = "mke2fs -q -t ext4 -b 1024 disk 16M
            cp disk other; debugfs -w -R 'ssv journal_uuid 12345678-1234-1234-1234-123456789abc' other
            dd if=other of=superblock bs=1024 skip=1 count=1
            printf 'jo\\njw -b 1 superblock\\njc\\n' > commands; debugfs -w -f commands disk";
        let made = std::process::Command::new("/bin/sh")
            .args(["-e", "-c", script])
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .current_dir(folder.path())
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let check = of_type("ext4").unwrap();
        let disk = folder.path().join("disk");
        let error = check.run(&disk, "web1: p1", &|| false).unwrap_err();
        let text = error.report();
        assert!(text.contains("GS-506"), "{text}");
        // e2fsck prints this after a search of all devices.
        assert!(!text.contains("external journal"), "{text}");
        // The journal was replayed.
        let text = check
            .run(&disk, "web1: p1", &|| false)
            .unwrap_err()
            .report();
        assert!(
            text.contains("was not run: its superblock names a journal"),
            "{text}"
        );
    }

    #[test]
    fn test_e2fsck_is_not_run_where_another_device_is_named() {
        let mut disk = vec![0_u8; 8192];
        disk[1024 + 0x38..1024 + 0x3a].copy_from_slice(&[0x53, 0xef]);
        // An internal journal, and an external one by UUID.
        disk[1024 + 0x5c] = 4;
        disk[1024 + 0xe0] = 8;
        disk[1024 + 0xd0..1024 + 0xe0].fill(7);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &disk).unwrap();
        let run = || {
            let check = of_type("ext4").unwrap();
            let error = check.run(file.path(), "web1: p1", &|| false).unwrap_err();
            error.report()
        };
        let text = run();
        assert!(
            text.contains("was not run: its superblock names a journal"),
            "{text}"
        );
        disk[1024 + 0xd0..1024 + 0xe0].fill(0);
        disk[1024 + 0xe0] = 0;
        std::fs::write(file.path(), &disk).unwrap();
        let text = run();
        assert!(
            text.contains("was not run: its journal is on another"),
            "{text}"
        );
    }
}
