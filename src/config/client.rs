//! The client file `/etc/bacula/guestsnap.toml`: what the client's administrator decides.
//!
//! The Director is not root: whatever widens access stands here, in a file that only root can
//! change.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use serde::Deserialize;

use super::pattern::Pattern;
use super::{Directive, Size, SnapshotKind};
use crate::error::{Code, Error, Result};
use crate::guest::DiskSource;

/// Larger files are a mistake.
const MAX_BYTES: u64 = 1 << 20;

/// Size of a thick snapshot unless configured: a fifth of the origin.
const DEFAULT_SIZE: Size = Size::Percent(20);

/// The parsed file; the default is what a missing file means.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClientFile {
    /// Patterns over `VG/LV` and image paths that a Director may select. Not set: any LV that is
    /// not in use by the host itself, and no image file.
    pub allow: Option<Vec<String>>,
    /// For all guests.
    pub defaults: GuestSettings,
    /// For one guest, by name; what is not set comes from the defaults.
    pub guest: BTreeMap<String, GuestSettings>,
}

/// Settings of guests.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuestSettings {
    /// `auto`, `thick` or `thin`.
    pub snapshot: Option<SnapshotName>,
    /// `20%` or `10G`.
    pub size: Option<String>,
    /// Bytes of a COW chunk.
    pub chunk: Option<u64>,
    /// Filesystem types that are mounted.
    pub filesystems: Option<Vec<String>>,
    /// Mount without replaying journals; the job log warns each time.
    pub skip_recovery: Option<bool>,
}

/// [`SnapshotKind`] by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotName {
    /// See [`SnapshotKind::Auto`].
    Auto,
    /// See [`SnapshotKind::Thick`].
    Thick,
    /// See [`SnapshotKind::Thin`].
    Thin,
}

impl ClientFile {
    /// Reads the file. A missing file is the default; one that others than root can change is
    /// refused.
    pub fn load(path: &Path) -> Result<ClientFile> {
        let shown = path.display().to_string();
        let text = match read_trusted(path, MAX_BYTES) {
            Ok(bytes) => String::from_utf8(bytes).map_err(|e| {
                Error::new(Code::BadClientFile, format!("{shown}: not UTF-8")).because(e)
            })?,
            Err(error) if is_missing(&error) => return Ok(ClientFile::default()),
            Err(error) => return Err(error),
        };
        ClientFile::parse(&text).map_err(|e| Error::new(e.code(), shown).because(e))
    }

    /// Parses the text. TOML errors name line and column.
    pub fn parse(text: &str) -> Result<ClientFile> {
        let file: ClientFile = toml::from_str(text)
            .map_err(|e| Error::new(Code::BadClientFile, "cannot be understood").because(e))?;
        for (name, settings) in file
            .guest
            .iter()
            .map(|(n, s)| (n.as_str(), s))
            .chain([("defaults", &file.defaults)])
        {
            if let Some(size) = &settings.size {
                size.parse::<Size>().map_err(|why| {
                    Error::new(
                        Code::BadClientFile,
                        format!("{name}: size = {size:?}: {why}"),
                    )
                })?;
            }
        }
        for pattern in file.allow.iter().flatten() {
            matcher(pattern)?;
        }
        Ok(file)
    }

    fn setting<T>(&self, guest: &str, get: impl Fn(&GuestSettings) -> Option<T>) -> Option<T> {
        self.guest
            .get(guest)
            .and_then(&get)
            .or_else(|| get(&self.defaults))
    }

    /// Whether a Director may select this disk.
    pub fn allows(&self, guest: &str, disk: &DiskSource) -> Result<()> {
        let allowed = match &self.allow {
            None => matches!(disk, DiskSource::Lv { .. }),
            Some(patterns) => {
                let text = match disk {
                    DiskSource::Lv { vg, lv } => format!("{vg}/{lv}").into(),
                    DiskSource::File(path) => path.clone().into_os_string(),
                };
                let mut found = false;
                for pattern in patterns {
                    found |= matcher(pattern)?.matches(&text);
                }
                found
            }
        };
        if allowed {
            return Ok(());
        }
        let why = if self.allow.is_none() {
            "image files need `allow`"
        } else {
            "no pattern of `allow` matches"
        };
        Err(Error::new(
            Code::NotAllowed,
            format!("{guest}: {disk}: {why}"),
        ))
    }

    /// Filesystem types and whether journals are replayed.
    pub fn fs_policy(&self, guest: &str) -> crate::fs::FsPolicy {
        let mut policy = crate::fs::FsPolicy::default();
        if let Some(types) = self.setting(guest, |s| s.filesystems.clone()) {
            policy.allowed = types.into_iter().collect();
        }
        policy.skip_recovery = self.setting(guest, |s| s.skip_recovery).unwrap_or(false);
        policy
    }

    /// How to snapshot: the directive, else the guest's setting, else `auto`.
    pub fn snapshot_kind(&self, guest: &str, directive: &Directive) -> SnapshotKind {
        if directive.snapshot != SnapshotKind::Auto {
            return directive.snapshot;
        }
        match self.setting(guest, |s| s.snapshot) {
            Some(SnapshotName::Thick) => SnapshotKind::Thick,
            Some(SnapshotName::Thin) => SnapshotKind::Thin,
            Some(SnapshotName::Auto) | None => SnapshotKind::Auto,
        }
    }

    /// Size of a thick snapshot: the directive, else the guest's setting, else 20 %.
    pub fn snapshot_size(&self, guest: &str, directive: &Directive) -> Size {
        let configured = || {
            self.setting(guest, |s| {
                s.size.as_deref().and_then(|size| size.parse().ok())
            })
        };
        directive.size.or_else(configured).unwrap_or(DEFAULT_SIZE)
    }

    /// Chunk size of a thick snapshot in bytes, if any is asked for.
    pub fn snapshot_chunk(&self, guest: &str, directive: &Directive) -> Option<u64> {
        directive.chunk.or_else(|| self.setting(guest, |s| s.chunk))
    }
}

fn matcher(pattern: &str) -> Result<Pattern> {
    Pattern::path(pattern)
        .map_err(|why| Error::new(Code::BadClientFile, format!("allow: {pattern:?}: {why}")))
}

/// Whether an error says that a file does not exist.
fn is_missing(error: &Error) -> bool {
    let cause = std::error::Error::source(error).and_then(|e| e.downcast_ref::<std::io::Error>());
    cause.is_some_and(|e| e.kind() == std::io::ErrorKind::NotFound)
}

/// Reads a file that decides what runs as root: a regular file of at most `limit` bytes that, like
/// all folders above it, only root can change.
pub fn read_trusted(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let shown = path.display().to_string();
    let failed = |e: std::io::Error| Error::new(Code::BadClientFile, shown.clone()).because(e);
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    trusted(&shown, &meta)?;
    for folder in path
        .ancestors()
        .skip(1)
        .filter(|p| !p.as_os_str().is_empty())
    {
        trusted(
            &folder.display().to_string(),
            &std::fs::metadata(folder).map_err(failed)?,
        )?;
    }
    if !meta.is_file() || meta.len() > limit {
        return Err(Error::new(
            Code::BadClientFile,
            format!("{shown}: not a file of at most {limit} bytes"),
        ));
    }
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

fn trusted(path: &str, meta: &std::fs::Metadata) -> Result<()> {
    // A sticky folder (/tmp) lets others add names, not replace root's.
    let writable = meta.mode() & 0o022 != 0 && meta.mode() & 0o1000 == 0;
    // Debian gives /etc/bacula to root:bacula; the group reads, it must not write.
    if meta.uid() != 0 || writable {
        let text = format!(
            "{path}: owner {}, mode {:o}",
            meta.uid(),
            meta.mode() & 0o7777
        );
        return Err(Error::new(Code::UntrustedClientFile, text));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lv(vg: &str, lv: &str) -> DiskSource {
        DiskSource::Lv {
            vg: vg.into(),
            lv: lv.into(),
        }
    }

    #[test]
    fn test_settings_fall_back_to_defaults() {
        let file = ClientFile::parse(
            "allow = ['vg0/domu-*', '/srv/*.img']\n[defaults]\nsize = '10%'\n[guest.db1]\nsize = '4G'\nfilesystems = ['ext4']\n",
        )
        .unwrap();
        let directive = Directive::parse("lv=vg0/domu-*").unwrap();
        assert_eq!(file.snapshot_size("db1", &directive), Size::Bytes(4 << 30));
        assert_eq!(file.snapshot_size("web1", &directive), Size::Percent(10));
        assert_eq!(file.fs_policy("db1").allowed.len(), 1);
        assert!(file.allows("x", &lv("vg0", "domu-x")).is_ok());
        assert!(
            file.allows("x", &DiskSource::File("/srv/a.img".into()))
                .is_ok()
        );
        assert_eq!(
            file.allows("x", &lv("vg0", "root")).unwrap_err().code(),
            Code::NotAllowed
        );
        assert_eq!(
            file.allows("x", &DiskSource::File("/srv/sub/a.img".into()))
                .unwrap_err()
                .code(),
            Code::NotAllowed
        );
    }

    #[test]
    fn test_a_missing_file_allows_lvs_only() {
        let file = ClientFile::load(Path::new("/nonexistent/guestsnap.toml")).unwrap();
        assert!(file.allows("x", &lv("vg0", "x")).is_ok());
        assert!(
            file.allows("x", &DiskSource::File("/srv/a.img".into()))
                .is_err()
        );
    }

    #[test]
    fn test_mistakes_name_the_line() {
        for (text, needle) in [
            ("alow = []", "line 1, column 1"),
            ("[defaults]\nsize = 5", "line 2"),
            ("[defaults]\nsize = 'big'", "size = \"big\""),
            ("allow = ['vg0/[']", "allow"),
        ] {
            let error = ClientFile::parse(text).unwrap_err();
            assert!(
                error.report().contains(needle),
                "{text}: {}",
                error.report()
            );
        }
    }
}
