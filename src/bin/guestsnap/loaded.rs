//! The plugin in a running bacula-fd. A daemon keeps the library that it has loaded, also when the file is replaced.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// The plugin's file.
pub const PLUGIN: &str = "guestsnap-fd.so";

/// Mark in the plugin's file, before its version and a zero byte.
const MARK: &[u8] = b"@(#)guestsnap-fd ";

/// Bytes of a file that are searched for the mark. Any user can run a process with the daemon's name.
const MAX_BYTES: u64 = 256 << 20;

/// The plugin's file with its version.
pub fn described(file: &Path) -> String {
    format!("{} ({})", file.display(), version(file))
}

/// Checks that a daemon has loaded this very file.
pub fn check(process: &str, file: &Path) -> Result<String, String> {
    let whose = format!("bacula-fd (process {process})");
    let maps = fs::read_to_string(format!("/proc/{process}/maps"))
        .map_err(|error| format!("{whose}: its libraries cannot be read: {error}"))?;
    let Some(loaded) = mapped(process, &maps) else {
        return Err(format!(
            "{whose} has not loaded the plugin: restart it, and see its messages if that does not help"
        ));
    };
    let identity = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino()));
    match (identity(&loaded), identity(file)) {
        (Ok(loaded), Ok(file)) if loaded == file => Ok(format!("{whose} has loaded it")),
        (Ok(_), _) => Err(format!(
            "{whose} has loaded another file ({}): restart it",
            version(&loaded)
        )),
        (Err(error), _) => Err(format!("{whose}: {}: {error}", loaded.display())),
    }
}

/// The plugin's file in a process, which may be deleted, from the text of `/proc/PID/maps`.
fn mapped(process: &str, maps: &str) -> Option<PathBuf> {
    maps.lines().find_map(|line| {
        let path = line.strip_suffix(" (deleted)").unwrap_or(line);
        let range = line.split(' ').next()?;
        let is_ours = path.rsplit('/').next() == Some(PLUGIN);
        is_ours.then(|| PathBuf::from(format!("/proc/{process}/map_files/{range}")))
    })
}

/// `version 0.1.0` of a plugin's file.
fn version(file: &Path) -> String {
    let unknown = "unknown version";
    let mut bytes = Vec::new();
    let read = File::open(file).and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes));
    if read.is_err() {
        return unknown.to_owned();
    }
    let at = bytes.windows(MARK.len()).position(|part| part == MARK);
    let found = at.and_then(|at| bytes[at + MARK.len()..].split(|byte| *byte == 0).next());
    match found.and_then(|found| std::str::from_utf8(found).ok()) {
        Some(found) if found.len() < 32 && found.bytes().all(|byte| byte.is_ascii_graphic()) => {
            format!("version {found}")
        }
        _ => unknown.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_versions_of_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(PLUGIN);
        for (bytes, expected) in [
            (
                &b"\x7fELF @(#)guestsnap-fd 1.2.3\0more"[..],
                "version 1.2.3",
            ),
            (b"no mark", "unknown version"),
            (b"@(#)guestsnap-fd \xff\0", "unknown version"),
            (b"@(#)guestsnap-fd \x1b[2J\0", "unknown version"),
        ] {
            fs::write(&file, bytes).unwrap();
            assert_eq!(version(&file), expected);
        }
        assert_eq!(version(&dir.path().join("none")), "unknown version");
    }

    #[test]
    fn test_the_library_of_a_process() {
        let maps = "7f00-7f10 r--p 00000000 fe:00 1 /usr/lib/bacula/bpipe-fd.so\n\
                    7f20-7f30 r--p 00000000 fe:00 2 /usr/lib/bacula/guestsnap-fd.so (deleted)\n";
        let found = mapped("4", maps);
        assert_eq!(found, Some("/proc/4/map_files/7f20-7f30".into()));
        assert_eq!(
            mapped("4", "7f00-7f10 r--p 0 fe:00 1 /x/other-guestsnap-fd.so"),
            None
        );
        let file = Path::new("/usr/lib/bacula/guestsnap-fd.so");
        let said = check("self", file).unwrap_err();
        assert!(said.contains("has not loaded the plugin"), "{said}");
    }
}
