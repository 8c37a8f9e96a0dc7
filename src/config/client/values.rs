//! Values of the client file, checked while they are parsed.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::config::defaults;
use crate::config::directive::{parse_bytes, parse_chunk};
use crate::config::pattern::Pattern;
use crate::error::escape;
use crate::hostdev::lvname::{LvName, VgName};

/// Maximum configurable freeze, in seconds.
const MAX_FREEZE: u64 = 600;

/// Maximum configurable hold of writes, in seconds: guests time out their disks after a minute or two.
const MAX_HOLD: u64 = 60;

/// Maximum configurable wait for a lock, in seconds.
const MAX_LOCK: u64 = 86400;

/// Maximum configurable time for a hook, in seconds.
const MAX_HOOK: u64 = 86400;

/// Minimum read-ahead memory, in bytes.
const MIN_READ_AHEAD: usize = 64 << 10;

/// Maximum read-ahead memory, in bytes.
const MAX_READ_AHEAD: usize = 4 << 30;

/// Defines types that check a string or number while it is parsed, so that the parser can report
/// the position of an invalid value.
macro_rules! checked {
    ($($(#[$doc:meta])* $name:ident($inner:ty) from $raw:literal $raw_type:ty, $check:expr;)*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Deserialize)]
            #[serde(try_from = $raw)]
            pub struct $name(pub(super) $inner);

            impl TryFrom<$raw_type> for $name {
                type Error = String;

                fn try_from(raw: $raw_type) -> std::result::Result<Self, String> {
                    let check: fn($raw_type) -> std::result::Result<$inner, String> = $check;
                    check(raw).map($name)
                }
            }

            impl std::ops::Deref for $name {
                type Target = $inner;

                fn deref(&self) -> &$inner {
                    &self.0
                }
            }
        )*
    };
}

checked! {
    /// A pattern of `allow`: `VG/GLOB` (the group may be a pattern too) or a path pattern.
    Allow(Pattern) from "String" String, |text| {
        if text.starts_with('/') {
            return Pattern::path(&text);
        }
        match text.split('/').collect::<Vec<_>>().as_slice() {
            [vg, lv] if !vg.is_empty() && !lv.is_empty() => Pattern::name(&text),
            _ => Err(format!("\"{text}\" is neither VG/GLOB nor an absolute path")),
        }
    };
    /// A pattern of `into`: one for guests' names, `VG/GLOB`, or a path pattern.
    IntoPattern(Pattern) from "String" String, |text| match text.contains('/') {
        true => Allow::try_from(text).map(|allow| allow.0),
        false => Pattern::name(&text),
    };
    /// A pattern over absolute paths.
    PathPattern(Pattern) from "String" String, |text| Pattern::path(&text);
    /// An absolute path without characters that patterns use.
    Folder(PathBuf) from "String" String, |text| {
        if !text.starts_with('/') || text.contains(['*', '?', '[', ']', '{', '}', '\\']) {
            return Err(format!("\"{}\" is not the path of a folder", escape(text.as_bytes())));
        }
        Ok(PathBuf::from(text))
    };
    /// A chunk size in bytes.
    Chunk(u64) from "String" String, |text| parse_chunk(&text);
    /// Maximum freeze in seconds.
    FreezeSeconds(u64) from "u64" u64, |seconds| match seconds {
        1..=MAX_FREEZE => Ok(seconds),
        _ => Err(format!("{seconds} is not a number of seconds from 1 to {MAX_FREEZE}")),
    };
    /// Maximum hold of writes in seconds.
    HoldSeconds(u64) from "u64" u64, |seconds| match seconds {
        1..=MAX_HOLD => Ok(seconds),
        _ => Err(format!("{seconds} is not a number of seconds from 1 to {MAX_HOLD}")),
    };
    /// Maximum wait for a lock in seconds.
    LockSeconds(u64) from "u64" u64, |seconds| match seconds {
        0..=MAX_LOCK => Ok(seconds),
        _ => Err(format!("{seconds} is not a number of seconds from 0 to {MAX_LOCK}")),
    };
    /// Time limit of a hook in seconds.
    HookSeconds(u64) from "u64" u64, |seconds| match seconds {
        1..=MAX_HOOK => Ok(seconds),
        _ => Err(format!("{seconds} is not a number of seconds from 1 to {MAX_HOOK}")),
    };
    /// 1 to 100 percent.
    Percent(u8) from "u64" u64, |percent| match u8::try_from(percent) {
        Ok(percent @ 1..=100) => Ok(percent),
        _ => Err(format!("{percent} is not a percentage from 1 to 100")),
    };
    /// 0 to 100 percent.
    PercentOrNone(u8) from "u64" u64, |percent| match u8::try_from(percent) {
        Ok(percent @ 0..=100) => Ok(percent),
        _ => Err(format!("{percent} is not a percentage from 0 to 100")),
    };
    /// Minutes, up to a day.
    Minutes(u64) from "u64" u64, |minutes| match minutes {
        1..=1440 => Ok(minutes),
        _ => Err(format!("{minutes} is not a number of minutes from 1 to 1440")),
    };
    /// A file name, without a slash.
    FileName(String) from "String" String, |text| {
        if text.is_empty() || matches!(text.as_str(), "." | "..") || text.contains(['/', '\0']) {
            return Err(format!("\"{}\" is not the name of a file", escape(text.as_bytes())));
        }
        Ok(text)
    };
    /// File size in bytes.
    FileSize(u64) from "String" String, |text| parse_bytes(&text);
    /// Read-ahead memory in bytes.
    ReadAheadBytes(usize) from "String" String, |text| match usize::try_from(parse_bytes(&text)?) {
        Ok(bytes @ MIN_READ_AHEAD..=MAX_READ_AHEAD) => Ok(bytes),
        _ => Err(format!("\"{text}\" is not a size from 64k to 4G")),
    };
    /// Number of threads.
    Readers(usize) from "u64" u64, |number| match usize::try_from(number) {
        Ok(number @ 1..=64) => Ok(number),
        _ => Err(format!("{number} is not a number of threads from 1 to 64")),
    };
    /// A supported filesystem type.
    FsType(String) from "String" String, |text| {
        if defaults::FILESYSTEMS.contains(&text.as_str()) {
            return Ok(text);
        }
        Err(format!("\"{}\" is none of {}", escape(text.as_bytes()), defaults::FILESYSTEMS.join(", ")))
    };
    /// A domain's name; cannot be taken for an option.
    DomainName(String) from "String" String, |text| {
        if text.is_empty() || text.starts_with('-') || text.chars().any(char::is_control) {
            return Err(format!("\"{}\" cannot be a domain's name", escape(text.as_bytes())));
        }
        Ok(text)
    };
    /// A guest's volume, optionally with a subvolume.
    RootName(String) from "String" String, |text| {
        let volume = text.split(':').next().unwrap_or_default();
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-+./".contains(&b);
        if volume.is_empty() || volume.starts_with('/') || !volume.bytes().all(plain) {
            return Err(format!(
                "\"{}\" is neither VG/LV of the guest, a UUID nor the name of a volume",
                escape(text.as_bytes())
            ));
        }
        Ok(text)
    };
    /// Absolute path of a program, and its arguments. Runs without a shell.
    Argv(Vec<String>) from "Vec<String>" Vec<String>, |argv| match argv.first() {
        Some(program) if program.starts_with('/') && !argv.iter().any(|a| a.contains('\0')) => Ok(argv),
        Some(program) => Err(format!("\"{}\" is not a program's absolute path", escape(program.as_bytes()))),
        None => Err("an empty list is no command".to_owned()),
    };
}

/// A disk in `disks`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum DiskName {
    /// `VG/LV`.
    Lv(LvName),
    /// `LV` alone, in the group that `vg` names.
    InVg(String),
    /// A device or an image file.
    Path(PathBuf),
}

impl TryFrom<String> for DiskName {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        if text.starts_with('/') {
            return match Path::new(&text).components().count() {
                0 | 1 => Err(format!("\"{text}\" is no disk")),
                _ => Ok(DiskName::Path(PathBuf::from(text))),
            };
        }
        let name = match text.split_once('/') {
            Some((vg, lv)) => LvName::new(vg, lv).ok().map(DiskName::Lv),
            // Names of groups and of volumes follow the same rules.
            None => VgName::new(&*text)
                .ok()
                .map(|_| DiskName::InVg(text.clone())),
        };
        name.ok_or_else(|| format!("\"{text}\" is neither VG/LV, LV nor an absolute path"))
    }
}
