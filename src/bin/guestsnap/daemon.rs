//! Settings from the daemon's configuration file.

use std::path::{Path, PathBuf};

/// Default path in Debian and other distributions.
pub const FILE: &str = "/etc/bacula/bacula-fd.conf";

/// Debian's working directory.
const WORKING_DIR: &str = "/var/lib/bacula";

/// Returns the value of a setting. `name` is lower case without spaces: Bacula ignores case and
/// spaces in keywords.
pub fn setting<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let settings = text
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default())
        .flat_map(|line| line.split([';', '{', '}']));
    settings
        .filter_map(|setting| setting.split_once('='))
        .find_map(|(key, value)| {
            let key: String = key.split_whitespace().collect();
            key.eq_ignore_ascii_case(name)
                .then(|| value.trim().trim_matches('"'))
        })
}

/// The daemon's working directory, parent of the journal directory.
pub fn working_dir(file: &Path) -> PathBuf {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let found = setting(&text, "workingdirectory").filter(|folder| folder.starts_with('/'));
    PathBuf::from(found.unwrap_or(WORKING_DIR))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_settings_are_found_as_bacula_finds_them() {
        for (text, expected) in [
            (
                "FileDaemon {\n  Plugin Directory = /usr/lib/bacula\n}",
                Some("/usr/lib/bacula"),
            ),
            (
                "FileDaemon { Name = x; plugindirectory=\"/a b\"; }",
                Some("/a b"),
            ),
            ("# Plugin Directory = /x\n", None),
            ("Plugin Options = y\n", None),
        ] {
            assert_eq!(setting(text, "plugindirectory"), expected, "{text}");
        }
    }

    #[test]
    fn test_the_working_directory_is_the_daemons() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("fd.conf");
        assert_eq!(working_dir(&file), Path::new("/var/lib/bacula"));
        for (text, expected) in [
            (
                "FileDaemon {\n WorkingDirectory = /srv/bacula # here\n}",
                "/srv/bacula",
            ),
            ("FileDaemon {\n Working Directory = \"/a b\";\n}", "/a b"),
            ("FileDaemon {\n Name = x\n}", "/var/lib/bacula"),
            (
                "FileDaemon {\n WorkingDirectory = here\n}",
                "/var/lib/bacula",
            ),
        ] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(working_dir(&file), Path::new(expected), "{text}");
        }
    }
}
