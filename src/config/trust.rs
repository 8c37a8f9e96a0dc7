//! Reads files that only root can have written.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path};

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;

use crate::error::escape;
use crate::{Code, Error, Result};

/// Reason why a file was not read.
#[derive(Debug)]
pub enum Refusal {
    /// The file does not exist.
    Missing,
    /// A user other than root can change it.
    Untrusted(Error),
    /// It cannot be read, is not a regular file, or is too long.
    Unreadable(std::io::Error),
}

/// Reads a file of at most `limit` bytes. The file and all directories above it must belong to root
/// or our own user, and no other user may be able to write to them. Each directory is opened
/// relative to the one before, so the checked file is the one read.
pub fn read(path: &Path, limit: u64) -> std::result::Result<Vec<u8>, Refusal> {
    let us = nix::unistd::geteuid().as_raw();
    let shown = |path: &Path| escape(path.as_os_str().as_encoded_bytes());
    let unreadable = |error: nix::Error| match std::io::Error::from(error) {
        error if error.kind() == ErrorKind::NotFound => Refusal::Missing,
        error => Refusal::Unreadable(error),
    };
    let real = path.canonicalize().map_err(|error| match error.kind() {
        ErrorKind::NotFound => Refusal::Missing,
        _ => Refusal::Unreadable(error),
    })?;
    let folder_flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file_flags = OFlag::O_RDONLY
        | OFlag::O_NONBLOCK
        | OFlag::O_NOCTTY
        | OFlag::O_NOFOLLOW
        | OFlag::O_CLOEXEC;
    let mut place = std::path::PathBuf::from("/");
    let mut at = File::from(open("/", folder_flags, Mode::empty()).map_err(unreadable)?);
    let mut parts = real
        .components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .peekable();
    while let Some(name) = parts.next() {
        let metadata = at.metadata().map_err(Refusal::Unreadable)?;
        judge(&shown(&place), metadata.uid(), metadata.mode(), us).map_err(Refusal::Untrusted)?;
        let flags = if parts.peek().is_some() {
            folder_flags
        } else {
            file_flags
        };
        at = File::from(openat(&at, name, flags, Mode::empty()).map_err(unreadable)?);
        place.push(name);
    }
    let metadata = at.metadata().map_err(Refusal::Unreadable)?;
    if !metadata.is_file() {
        return Err(Refusal::Unreadable(std::io::Error::other(
            "not a regular file",
        )));
    }
    judge(&shown(&place), metadata.uid(), metadata.mode(), us).map_err(Refusal::Untrusted)?;
    let mut bytes = Vec::new();
    at.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(Refusal::Unreadable)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > limit) {
        return Err(Refusal::Unreadable(std::io::Error::other(format!(
            "longer than {limit} bytes"
        ))));
    }
    Ok(bytes)
}

/// Whether this owner and mode allow changes only by root or `us`.
fn judge(path: &str, uid: u32, mode: u32, us: u32) -> Result<()> {
    const FOLDER: u32 = 0o040000;
    const TYPE: u32 = 0o170000;
    const STICKY: u32 = 0o1000;
    let problem = if uid != 0 && uid != us {
        format!("it belongs to user {uid}")
    } else if mode & 0o022 == 0 || (mode & TYPE == FOLDER && mode & STICKY != 0) {
        // In a sticky directory other users cannot replace root's files.
        return Ok(());
    } else {
        format!("its mode is {:04o}", mode & 0o7777)
    };
    Err(Error::new(
        Code::UntrustedClientFile,
        format!("{path}: {problem}"),
    ))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn test_judge() {
        let cases = [
            (0, 0o100644, true),
            (0, 0o100640, true),
            (1000, 0o100600, true),
            (1001, 0o100600, false),
            (0, 0o100664, false),
            (0, 0o100646, false),
            (0, 0o040755, true),
            (0, 0o040775, false),
            (0, 0o041777, true),
            (1001, 0o041755, false),
            (0, 0o101666, false),
        ];
        for (uid, mode, expected) in cases {
            assert_eq!(
                judge("/x", uid, mode, 1000).is_ok(),
                expected,
                "{uid} {mode:o}"
            );
        }
    }

    #[test]
    fn test_reading() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a");
        std::fs::write(&file, "hello").unwrap();
        let mode = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(&file, 0o640);
        assert_eq!(read(&file, 5).unwrap(), b"hello");
        assert!(matches!(read(&file, 4), Err(Refusal::Unreadable(_))));
        assert!(matches!(
            read(folder.path(), 5),
            Err(Refusal::Unreadable(_))
        ));
        assert!(matches!(
            read(&folder.path().join("b"), 5),
            Err(Refusal::Missing)
        ));
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert_eq!(read(&link, 5).unwrap(), b"hello");
        mode(&file, 0o660);
        assert!(matches!(read(&file, 5), Err(Refusal::Untrusted(_))));
        mode(&file, 0o640);
        mode(folder.path(), 0o777);
        let Err(Refusal::Untrusted(error)) = read(&file, 5) else {
            panic!("a folder that everybody can write to was trusted");
        };
        assert!(
            error.report().contains("mode is 0777"),
            "{}",
            error.report()
        );
    }
}
