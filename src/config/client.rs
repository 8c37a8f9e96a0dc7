//! The client file `/etc/bacula/guestsnap.toml`: what the client's administrator decides.
//!
//! The Director need not be trusted with root on its clients. So everything that runs a command
//! or widens access stands in this file, which only root can change; the directive selects and
//! tunes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use super::directive::{check_vg, parse_bytes, parse_chunk};
use super::pattern::Pattern;
use super::trust::{self, Refusal};
use super::{Directive, Size, SnapshotKind};
use crate::error::{escape, place};
use crate::fs::{DEFAULT_TYPES, FsPolicy};
use crate::{Code, Error, Result};

/// Where the file is.
pub const CLIENT_FILE: &str = "/etc/bacula/guestsnap.toml";

/// A longer file is refused.
const MAX_BYTES: u64 = 1 << 20;

/// How long a guest may stay frozen unless configured, in seconds.
const DEFAULT_FREEZE: u64 = 30;

/// The longest freeze that can be configured, in seconds.
const MAX_FREEZE: u64 = 600;

/// The least memory for what is read ahead, in bytes.
const MIN_READ_AHEAD: usize = 64 << 10;

/// The most memory for what is read ahead, in bytes.
const MAX_READ_AHEAD: usize = 4 << 30;

/// Everything the client's administrator decides. The default is what a missing file means.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClientFile {
    /// What a Director may select. `None`: any logical volume that this host does not use itself,
    /// and the files that definitions on this host name.
    pub allow: Option<Vec<Allow>>,
    /// Where `guest=` looks for definitions.
    pub sources: Sources,
    /// Watching snapshots, and the job log.
    pub limits: Limits,
    /// Commands around a job.
    pub hooks: Hooks,
    /// For all guests.
    pub defaults: GuestSettings,
    /// For one guest, by its name in the catalog; what is not set comes from the defaults.
    pub guest: BTreeMap<String, GuestSettings>,
}

/// `[sources]`: where `guest=` looks for definitions, besides `[guest.NAME]` with `disks`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sources {
    /// Patterns of xl.cfg files.
    pub xl: Vec<PathPattern>,
    /// Patterns of libvirt domain XML files.
    pub libvirt: Vec<PathPattern>,
}

impl Default for Sources {
    fn default() -> Self {
        let patterns = |texts: &[&str]| {
            texts
                .iter()
                .filter_map(|text| PathPattern::try_from((*text).to_owned()).ok())
                .collect()
        };
        Sources {
            xl: patterns(&["/etc/xen/*.cfg"]),
            libvirt: patterns(&["/etc/libvirt/qemu/*.xml", "/etc/libvirt/libxl/*.xml"]),
        }
    }
}

/// `[limits]`. `None`: not set.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// A thick snapshot that is fuller gets more room, in percent.
    pub extend_at: Option<Percent>,
    /// By this share of its size, in percent; 0: never.
    pub extend_by: Option<PercentOrNone>,
    /// A thin pool that is fuller gives a warning, in percent.
    pub warn_pool_at: Option<Percent>,
    /// The snapshots in a thin pool that is fuller are given up, in percent.
    pub give_up_pool_at: Option<Percent>,
    /// Minutes between two lines about a long job's progress.
    pub progress_minutes: Option<Minutes>,
    /// Memory for what is read ahead of the job.
    pub read_ahead: Option<ReadAheadBytes>,
    /// Threads that read ahead.
    pub readers: Option<Readers>,
    /// Bytes of holes in files that are delivered, as zeros, of one guest.
    pub holes: Option<FileSize>,
}

/// `[hooks]`: commands around each backup or estimate.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Hooks {
    /// Runs before the first snapshot; if it fails, so does the job.
    pub before: Option<Argv>,
    /// Runs when nothing of the job is left, whenever `before` was started.
    pub after: Option<Argv>,
    /// Seconds that each may take.
    pub seconds: Option<HookSeconds>,
}

/// How long a hook may take unless configured.
const DEFAULT_HOOK: u64 = 600;

/// The longest time that can be configured for a hook, in seconds.
const MAX_HOOK: u64 = 86400;

impl Hooks {
    /// A hook's argument vector for one job.
    pub fn argv(hook: &Argv, job_id: u32) -> Vec<String> {
        let job = job_id.to_string();
        hook.iter().map(|a| a.replace("{job}", &job)).collect()
    }

    /// The time limit of each.
    pub fn patience(&self) -> std::time::Duration {
        let seconds = self.seconds.as_deref().copied();
        std::time::Duration::from_secs(seconds.unwrap_or(DEFAULT_HOOK))
    }
}

/// `[defaults]` or `[guest.NAME]`. `None`: not set.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuestSettings {
    /// The guest's disks in order. A section with disks defines a guest for `guest=`; one without
    /// only tunes a guest that something else selects. Not in `[defaults]`.
    pub disks: Option<Vec<Spanned<DiskName>>>,
    /// Volume group of the disks that name none.
    pub vg: Option<VgName>,
    /// How to snapshot.
    pub snapshot: Option<SnapshotKind>,
    /// Size of a thick snapshot.
    pub size: Option<Size>,
    /// Chunk size of a thick snapshot.
    pub chunk: Option<Chunk>,
    /// Filesystem types that are mounted, as `blkid` names them.
    pub filesystems: Option<Vec<FsType>>,
    /// Leave journals alone; each such mount gives a warning.
    pub skip_recovery: Option<bool>,
    /// Whether the filesystems are checked.
    pub fsck: Option<Fsck>,
    /// How to bring the guest to rest while its snapshots are taken.
    pub quiesce: Option<QuiesceWay>,
    /// The command that brings the guest to rest, for `quiesce = "commands"`.
    pub freeze: Option<Argv>,
    /// The command that wakes it up again, for `quiesce = "commands"`.
    pub thaw: Option<Argv>,
    /// Seconds after which the guest is woken up whatever happens.
    pub freeze_seconds: Option<FreezeSeconds>,
    /// The guest's name for `xl` and `virsh`, if it is another one. Not in `[defaults]`.
    pub domain: Option<DomainName>,
    /// Patterns of paths in the guest that are left out.
    pub skip: Option<Vec<PathPattern>>,
    /// Directories that hold one of these names are left out.
    pub skip_dirs_containing: Option<Vec<FileName>>,
    /// Directories with a `CACHEDIR.TAG` are left out.
    pub skip_caches: Option<bool>,
    /// Larger files are left out.
    pub max_file_size: Option<FileSize>,
}

/// `fsck`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fsck {
    /// Not at all: the kernel replays the journal.
    #[default]
    None,
    /// In the snapshot, before it is read.
    Before,
}

/// `quiesce`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QuiesceWay {
    /// Not at all: as after a power failure.
    None,
    /// `xl pause` and `xl unpause`: all disks at one instant, as after a power failure.
    XlPause,
    /// `virsh suspend` and `virsh resume`: the same with libvirt.
    VirshSuspend,
    /// `virsh domfsfreeze` and `virsh domfsthaw`: filesystems at rest (needs the guest agent).
    VirshFreeze,
    /// `freeze` and `thaw`.
    Commands,
}

/// A checked value made from a string or number of the file, so that the parser can name the
/// place when the check fails.
macro_rules! checked {
    ($($(#[$doc:meta])* $name:ident($inner:ty) from $raw:literal $raw_type:ty, $check:expr;)*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Deserialize)]
            #[serde(try_from = $raw)]
            pub struct $name($inner);

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
    /// One pattern of `allow`: `VG/GLOB` (the group may be a pattern too) or a path pattern.
    Allow(Pattern) from "String" String, |text| {
        if text.starts_with('/') {
            return Pattern::path(&text);
        }
        match text.split('/').collect::<Vec<_>>().as_slice() {
            [vg, lv] if !vg.is_empty() && !lv.is_empty() => Pattern::name(&text),
            _ => Err(format!("\"{text}\" is neither VG/GLOB nor an absolute path")),
        }
    };
    /// A pattern over absolute paths.
    PathPattern(Pattern) from "String" String, |text| Pattern::path(&text);
    /// The name of a volume group.
    VgName(String) from "String" String, |text| check_vg(&text).map(|()| text);
    /// A chunk size in bytes.
    Chunk(u64) from "String" String, |text| parse_chunk(&text);
    /// Seconds a guest may stay frozen.
    FreezeSeconds(u64) from "u64" u64, |seconds| match seconds {
        1..=MAX_FREEZE => Ok(seconds),
        _ => Err(format!("{seconds} is not a number of seconds from 1 to {MAX_FREEZE}")),
    };
    /// Seconds a hook may take.
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
    /// Up to a day, in minutes.
    Minutes(u64) from "u64" u64, |minutes| match minutes {
        1..=1440 => Ok(minutes),
        _ => Err(format!("{minutes} is not a number of minutes from 1 to 1440")),
    };
    /// A name without a slash.
    FileName(String) from "String" String, |text| {
        if text.is_empty() || matches!(text.as_str(), "." | "..") || text.contains(['/', '\0']) {
            return Err(format!("\"{}\" is not the name of a file", escape(text.as_bytes())));
        }
        Ok(text)
    };
    /// The size of a file in bytes.
    FileSize(u64) from "String" String, |text| parse_bytes(&text);
    /// Memory for what is read ahead.
    ReadAheadBytes(usize) from "String" String, |text| match usize::try_from(parse_bytes(&text)?) {
        Ok(bytes @ MIN_READ_AHEAD..=MAX_READ_AHEAD) => Ok(bytes),
        _ => Err(format!("\"{text}\" is not a size from 64k to 4G")),
    };
    /// A number of threads.
    Readers(usize) from "u64" u64, |number| match usize::try_from(number) {
        Ok(number @ 1..=64) => Ok(number),
        _ => Err(format!("{number} is not a number of threads from 1 to 64")),
    };
    /// A filesystem type that can be mounted.
    FsType(String) from "String" String, |text| {
        if DEFAULT_TYPES.contains(&text.as_str()) {
            return Ok(text);
        }
        Err(format!("\"{}\" is none of {}", escape(text.as_bytes()), DEFAULT_TYPES.join(", ")))
    };
    /// A domain's name: nothing a command could take for an option.
    DomainName(String) from "String" String, |text| {
        if text.is_empty() || text.starts_with('-') || text.chars().any(char::is_control) {
            return Err(format!("\"{}\" cannot be a domain's name", escape(text.as_bytes())));
        }
        Ok(text)
    };
    /// A program by its absolute path, and its arguments. No shell reads it.
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
    /// `VG/LV`, or `LV` alone.
    Lv {
        /// Volume group, if the name has one.
        vg: Option<String>,
        /// Logical volume.
        lv: String,
    },
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
        let (vg, lv) = match text.split_once('/') {
            Some((vg, lv)) => (Some(vg), lv),
            None => (None, text.as_str()),
        };
        let good = |name: &str| check_vg(name).is_ok();
        if !vg.is_none_or(good) || !good(lv) {
            return Err(format!(
                "\"{text}\" is neither VG/LV, LV nor an absolute path"
            ));
        }
        Ok(DiskName::Lv {
            vg: vg.map(str::to_owned),
            lv: lv.to_owned(),
        })
    }
}

/// What is left out of one guest: what [`ClientFile::filter`] works out.
#[derive(Debug, Clone, Default)]
pub struct FilterSettings {
    /// Patterns of absolute paths in the guest.
    pub skip: Vec<Pattern>,
    /// Names that mark a directory.
    pub skip_dirs_containing: Vec<String>,
    /// Whether cache directories are left out.
    pub skip_caches: bool,
    /// The largest file, in bytes.
    pub max_file_size: Option<u64>,
}

impl std::fmt::Display for FilterSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let skip: Vec<_> = self.skip.iter().map(Pattern::text).collect();
        let (marks, caches) = (&self.skip_dirs_containing, self.skip_caches);
        write!(f, "{skip:?} {marks:?} {caches} {:?}", self.max_file_size)
    }
}

/// How one guest is brought to rest: what [`ClientFile::quiesce`] works out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quiesce {
    /// How.
    pub way: QuiesceWay,
    /// Argument vector that freezes.
    pub freeze: Vec<String>,
    /// Argument vector that thaws.
    pub thaw: Vec<String>,
    /// Seconds until the guest is thawed whatever happens.
    pub seconds: u64,
    /// The commands are for the guest of this name, and no other. `false`: they are for all.
    pub by_name: bool,
    /// What `xl` or `virsh` would take for the number of any domain.
    pub number: Option<String>,
}

impl ClientFile {
    /// Reads the file. A missing file is the default; one that others than root can change is
    /// refused.
    pub fn load(path: &Path) -> Result<ClientFile> {
        let shown = escape(path.as_os_str().as_encoded_bytes());
        let bytes = match trust::read(path, MAX_BYTES) {
            Ok(bytes) => bytes,
            Err(Refusal::Missing) => return Ok(ClientFile::default()),
            Err(Refusal::Untrusted(error)) => return Err(error),
            Err(Refusal::Unreadable(error)) => {
                return Err(Error::new(Code::BadClientFile, shown).because(error));
            }
        };
        let text = String::from_utf8(bytes).map_err(|error| {
            let place = place(error.as_bytes(), error.utf8_error().valid_up_to());
            Error::new(Code::BadClientFile, format!("{shown}: {place}: not UTF-8"))
        })?;
        ClientFile::parse_named(&text, &shown)
    }

    /// Reads the text. Errors name line and column.
    pub fn parse(text: &str) -> Result<ClientFile> {
        ClientFile::parse_named(text, "guestsnap.toml")
    }

    fn parse_named(text: &str, name: &str) -> Result<ClientFile> {
        let bad = |at: Option<usize>, problem: &str| {
            let detail = match at {
                Some(at) => format!("{name}: {}: {problem}", place(text.as_bytes(), at)),
                None => format!("{name}: {problem}"),
            };
            Error::new(Code::BadClientFile, detail)
        };
        let file: ClientFile =
            toml::from_str(text).map_err(|e| bad(e.span().map(|span| span.start), e.message()))?;
        if file.defaults.disks.is_some() || file.defaults.domain.is_some() {
            return Err(bad(
                None,
                "disks and domain belong to one guest, not to [defaults]",
            ));
        }
        for (guest, settings) in &file.guest {
            let section = format!("[guest.{}]", escape(guest.as_bytes()));
            if guest.is_empty()
                || guest.starts_with('.')
                || guest.contains('/')
                || guest.chars().any(char::is_control)
            {
                return Err(bad(
                    None,
                    &format!("{section}: this cannot be a guest's name"),
                ));
            }
            for disk in settings.disks.iter().flatten() {
                if let DiskName::Lv { vg: None, lv } = disk.get_ref() {
                    if settings.vg.is_none() && file.defaults.vg.is_none() {
                        let problem =
                            format!("{lv} names no volume group: write VG/{lv} or set vg");
                        return Err(bad(Some(disk.span().start), &problem));
                    }
                }
            }
            if settings.disks.as_ref().is_some_and(Vec::is_empty) {
                return Err(bad(None, &format!("{section}: disks is empty")));
            }
        }
        let sections = file
            .guest
            .iter()
            .map(|(name, s)| (format!("[guest.{name}]"), s));
        for (section, settings) in sections.chain([("[defaults]".to_owned(), &file.defaults)]) {
            let way = settings.quiesce.or(file.defaults.quiesce);
            let both = settings
                .freeze
                .as_ref()
                .or(file.defaults.freeze.as_ref())
                .is_some()
                && settings
                    .thaw
                    .as_ref()
                    .or(file.defaults.thaw.as_ref())
                    .is_some();
            if way == Some(QuiesceWay::Commands) && !both {
                return Err(bad(
                    None,
                    &format!("{section}: quiesce = \"commands\" needs freeze and thaw"),
                ));
            }
            if way != Some(QuiesceWay::Commands)
                && (settings.freeze.is_some() || settings.thaw.is_some())
            {
                return Err(bad(
                    None,
                    &format!("{section}: freeze and thaw need quiesce = \"commands\""),
                ));
            }
        }
        Ok(file)
    }

    fn setting<T>(&self, guest: &str, get: impl Fn(&GuestSettings) -> Option<T>) -> Option<T> {
        self.guest
            .get(guest)
            .and_then(&get)
            .or_else(|| get(&self.defaults))
    }

    /// How to snapshot: the directive, else the client file, else `auto`.
    pub fn snapshot_kind(&self, guest: &str, directive: &Directive) -> SnapshotKind {
        match directive.snapshot {
            SnapshotKind::Auto => self.setting(guest, |s| s.snapshot).unwrap_or_default(),
            kind => kind,
        }
    }

    /// Size of a thick snapshot: the directive, else the client file, else 20 %.
    pub fn snapshot_size(&self, guest: &str, directive: &Directive) -> Size {
        directive
            .size
            .or_else(|| self.setting(guest, |s| s.size))
            .unwrap_or_default()
    }

    /// Chunk size of a thick snapshot in bytes, if one is asked for.
    pub fn snapshot_chunk(&self, guest: &str, directive: &Directive) -> Option<u64> {
        directive
            .chunk
            .or_else(|| self.setting(guest, |s| s.chunk.as_deref().copied()))
    }

    /// Filesystem types, and whether journals are replayed.
    pub fn fs_policy(&self, guest: &str) -> FsPolicy {
        let mut policy = FsPolicy::default();
        if let Some(types) = self.setting(guest, |s| s.filesystems.clone()) {
            policy.allowed = types.into_iter().map(|kind| kind.0).collect();
        }
        if let Some(skip) = self.setting(guest, |s| s.skip_recovery) {
            policy.skip_recovery = skip;
        }
        policy
    }

    /// Whether the filesystems are checked before they are read.
    pub fn fsck(&self, guest: &str) -> Fsck {
        self.setting(guest, |s| s.fsck).unwrap_or_default()
    }

    /// What is left out of the guest.
    pub fn filter(&self, guest: &str) -> FilterSettings {
        FilterSettings {
            skip: self
                .setting(guest, |s| s.skip.clone())
                .into_iter()
                .flatten()
                .map(|p| p.0)
                .collect(),
            skip_dirs_containing: self
                .setting(guest, |s| s.skip_dirs_containing.clone())
                .into_iter()
                .flatten()
                .map(|n| n.0)
                .collect(),
            skip_caches: self.setting(guest, |s| s.skip_caches).unwrap_or_default(),
            max_file_size: self.setting(guest, |s| s.max_file_size.as_deref().copied()),
        }
    }

    /// The guest's name for `xl` and `virsh`.
    pub fn domain(&self, guest: &str) -> String {
        self.setting(guest, |s| s.domain.as_deref().cloned())
            .unwrap_or_else(|| guest.to_owned())
    }

    /// How to bring the guest to rest; `None`: not at all.
    pub fn quiesce(&self, guest: &str) -> Option<Quiesce> {
        let way = self.setting(guest, |s| s.quiesce)?;
        let domain = self.domain(guest);
        let commands = way == QuiesceWay::Commands;
        let own_section = self
            .guest
            .get(guest)
            .is_some_and(|s| s.quiesce.is_some() || s.freeze.is_some() || s.thaw.is_some());
        let says_guest =
            |argv: Option<&Argv>| argv.is_some_and(|a| a.iter().any(|w| w.contains("{guest}")));
        let by_name = own_section
            || !commands
            || says_guest(self.defaults.freeze.as_ref())
            || says_guest(self.defaults.thaw.as_ref());
        // As they read it: blanks and a plus before the digits are no matter to virsh.
        let digits = domain.trim_start().trim_start_matches('+');
        let digits = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        let number = (digits && !commands).then(|| domain.clone());
        let own = |get: fn(&GuestSettings) -> Option<Argv>| {
            let argv = self.setting(guest, get)?;
            Some(argv.iter().map(|a| a.replace("{guest}", &domain)).collect())
        };
        // No name of a guest or domain starts with a dash, so none is taken for an option.
        let xl = |verb: &str| vec!["xl".to_owned(), verb.to_owned(), domain.clone()];
        let virsh = |verb: &str| {
            vec![
                "virsh".to_owned(),
                verb.to_owned(),
                "--domain".to_owned(),
                domain.clone(),
            ]
        };
        let (freeze, thaw) = match way {
            QuiesceWay::None => return None,
            QuiesceWay::XlPause => (xl("pause"), xl("unpause")),
            QuiesceWay::VirshSuspend => (virsh("suspend"), virsh("resume")),
            QuiesceWay::VirshFreeze => (virsh("domfsfreeze"), virsh("domfsthaw")),
            QuiesceWay::Commands => (own(|s| s.freeze.clone())?, own(|s| s.thaw.clone())?),
        };
        Some(Quiesce {
            way,
            freeze,
            thaw,
            seconds: self
                .setting(guest, |s| s.freeze_seconds.as_deref().copied())
                .unwrap_or(DEFAULT_FREEZE),
            by_name,
            number,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_filesystems_are_types_that_can_be_mounted() {
        assert!(ClientFile::parse("[defaults]\nfilesystems = ['ext4', 'ntfs']\n").is_ok());
        for wrong in ["xsf", "ntfs3", "f2fs", ""] {
            let text = format!("[defaults]\nfilesystems = ['ext4', '{wrong}']\n");
            let error = ClientFile::parse(&text).unwrap_err().report();
            assert!(error.contains("is none of ext2, ext3, ext4"), "{error}");
        }
    }

    #[test]
    fn test_guest_settings_go_before_defaults_and_the_directive_before_both() {
        let file = ClientFile::parse(
            "allow = ['vg0/domu-*', '/srv/*.img']\n\
             [defaults]\nsize = '10%'\nsnapshot = 'thick'\nvg = 'vg0'\n\
             [guest.db1]\nsize = '4G'\nchunk = '64k'\nfilesystems = ['ext4']\nskip_recovery = true\n\
             disks = ['db1-root', 'vg1/db1-data', '/srv/db1.img']\n",
        )
        .unwrap();
        let plain = Directive::parse("guest=*").unwrap();
        let tuned = Directive::parse("guest=* size=1G snapshot=thin chunk=8k").unwrap();
        let cases = [
            (
                "db1",
                &plain,
                SnapshotKind::Thick,
                Size::Bytes(4 << 30),
                Some(65536),
            ),
            ("web1", &plain, SnapshotKind::Thick, Size::Percent(10), None),
            (
                "db1",
                &tuned,
                SnapshotKind::Thin,
                Size::Bytes(1 << 30),
                Some(8192),
            ),
        ];
        for (guest, directive, kind, size, chunk) in cases {
            assert_eq!(file.snapshot_kind(guest, directive), kind);
            assert_eq!(file.snapshot_size(guest, directive), size);
            assert_eq!(file.snapshot_chunk(guest, directive), chunk);
        }
        assert_eq!(file.fs_policy("db1").allowed.len(), 1);
        assert!(file.fs_policy("db1").skip_recovery);
        assert_eq!(file.fs_policy("web1"), FsPolicy::default());
        let empty = ClientFile::default();
        assert_eq!(empty.snapshot_size("x", &plain), Size::Percent(20));
    }

    #[test]
    fn test_quiesce() {
        let file = ClientFile::parse(
            "[defaults]\nquiesce = 'xl-pause'\n\
             [guest.db1]\nquiesce = 'virsh-freeze'\ndomain = 'prod-db1'\nfreeze_seconds = 10\n\
             [guest.app]\nquiesce = 'commands'\nfreeze = ['/opt/f', '{guest}']\nthaw = ['/opt/t']\n\
             [guest.off]\nquiesce = 'none'\n",
        )
        .unwrap();
        let words = |argv: &[String]| argv.join(" ");
        let cases = [
            ("web1", "xl pause web1", "xl unpause web1", 30),
            (
                "db1",
                "virsh domfsfreeze --domain prod-db1",
                "virsh domfsthaw --domain prod-db1",
                10,
            ),
            ("app", "/opt/f app", "/opt/t", 30),
        ];
        for (guest, freeze, thaw, seconds) in cases {
            let quiesce = file.quiesce(guest).unwrap();
            assert_eq!(words(&quiesce.freeze), freeze);
            assert_eq!(words(&quiesce.thaw), thaw);
            assert_eq!(quiesce.seconds, seconds);
        }
        assert_eq!(file.quiesce("off"), None);
        // A name that is a number would be any domain's, whoever says that it is a name.
        let file = ClientFile::parse(
            "[defaults]\nquiesce = 'virsh-freeze'\n[guest.12]\ndomain = '12'\n\
             [guest.db1]\ndomain = ' +7'\n[guest.14]\ndomain = 'db14'\n\
             [guest.13]\nquiesce = 'commands'\nfreeze = ['/f']\nthaw = ['/t']\n",
        )
        .unwrap();
        let number = |guest: &str| file.quiesce(guest).unwrap().number;
        assert_eq!(number("11").as_deref(), Some("11"));
        assert_eq!(number("12").as_deref(), Some("12"));
        assert_eq!(number("db1").as_deref(), Some(" +7"));
        assert_eq!(number("+7").as_deref(), Some("+7"));
        assert_eq!(
            ["13", "14", "1a", "+"].map(number),
            [None, None, None, None]
        );
        // Commands for all are the same whatever a Plugin line calls the guest.
        let by_name = |text: &str| {
            ClientFile::parse(text)
                .unwrap()
                .quiesce("a")
                .unwrap()
                .by_name
        };
        let all = "[defaults]\nquiesce = 'commands'\nfreeze = ['/f', 'X']\nthaw = ['/t']\n";
        assert!(!by_name(all));
        assert!(!by_name(&format!("{all}[guest.b]\nfreeze = ['/g']\n")));
        assert!(by_name(&format!("{all}[guest.a]\nfreeze = ['/g']\n")));
        assert!(by_name(&all.replace('X', "{guest}")));
        assert!(by_name("[defaults]\nquiesce = 'xl-pause'\n"));
        assert_eq!(ClientFile::default().quiesce("x"), None);
    }

    #[test]
    fn test_mistakes_name_line_and_column() {
        let cases = [
            (
                "alow = []",
                "line 1, column 1: unknown field `alow`, expected one of `allow`",
            ),
            ("\n[defaults]\nsize = 5", "line 3, column 8: "),
            (
                "[defaults]\nsize = 'big'",
                "line 2, column 8: \"big\" is not a size",
            ),
            (
                "[defaults]\nchunk = '3k'",
                "line 2, column 9: \"3k\" is not a chunk size",
            ),
            (
                "allow = ['vg0/[']",
                "line 1, column 9: \"vg0/[\" is not a pattern",
            ),
            (
                "allow = ['vg0']",
                "line 1, column 9: \"vg0\" is neither VG/GLOB",
            ),
            ("allow = ['/a/../b']", "must not hold . or .."),
            (
                "[guest.a]\ndisks = ['vg0/x', 'y']",
                "line 2, column 19: y names no volume group",
            ),
            (
                "[guest.a]\ndisks = ['vg0/x/y']",
                "line 2, column 9: \"vg0/x/y\" is neither",
            ),
            ("[guest.a]\ndisks = []", "[guest.a]: disks is empty"),
            (
                "[guest.a]\ncolour = 1",
                "line 2, column 1: unknown field `colour`",
            ),
            ("[guest.'a/b']\n", "this cannot be a guest's name"),
            ("[defaults]\ndisks = ['vg/x']", "belong to one guest"),
            (
                "[defaults]\nquiesce = 'sleep'",
                "line 2, column 11: unknown variant `sleep`",
            ),
            ("[defaults]\nquiesce = 'commands'", "needs freeze and thaw"),
            ("[defaults]\nfreeze = ['/x']", "need quiesce = \"commands\""),
            (
                "[defaults]\nfreeze = ['x']",
                "line 2, column 10: \"x\" is not a program's absolute path",
            ),
            (
                "[defaults]\nfreeze = []",
                "line 2, column 10: an empty list",
            ),
            (
                "[defaults]\nfreeze_seconds = 0",
                "line 2, column 18: 0 is not a number of seconds",
            ),
            (
                "[guest.a]\ndomain = '-f'",
                "line 2, column 10: \"-f\" cannot be",
            ),
            (
                "[defaults]\nskip = ['tmp/*']",
                "line 2, column 8: \"tmp/*\" is not absolute",
            ),
            (
                "[guest.a]\nskip_dirs_containing = ['a/b']",
                "line 2, column 24: \"a/b\" is not the name of a file",
            ),
            (
                "[guest.a]\nmax_file_size = '10%'",
                "line 2, column 17: \"10%\" is not a size",
            ),
            (
                "[sources]\nxl = ['etc/*']",
                "line 2, column 6: \"etc/*\" is not absolute",
            ),
            ("a = [", "line 1, column "),
        ];
        for (text, expected) in cases {
            let error = ClientFile::parse(text).expect_err(text);
            assert_eq!(error.code(), Code::BadClientFile);
            assert!(error.to_string().contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn test_a_missing_file_is_the_default() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("guestsnap.toml");
        assert!(ClientFile::load(&file).unwrap().allow.is_none());
        std::fs::write(&file, "allow = []\n").unwrap();
        assert!(ClientFile::load(&file).unwrap().allow.is_some());
        std::fs::write(&file, b"# \xff\n").unwrap();
        let error = ClientFile::load(&file).unwrap_err().report();
        assert!(error.contains("line 1, column 3: not UTF-8"), "{error}");
        std::fs::write(&file, "x").unwrap();
        let error = ClientFile::load(&file).unwrap_err().report();
        assert!(error.contains("guestsnap.toml: line 1"), "{error}");
    }

    #[test]
    fn test_reading_ahead_has_bounds() {
        let limits =
            |text: &str| ClientFile::parse(&format!("[limits]\n{text}\n")).map(|f| f.limits);
        let good = limits("read_ahead = '64k'\nreaders = 1").unwrap();
        assert_eq!(good.read_ahead.as_deref(), Some(&65536));
        assert_eq!(good.readers.as_deref(), Some(&1));
        assert_eq!(
            limits("read_ahead = '4G'").unwrap().read_ahead.as_deref(),
            Some(&(4 << 30))
        );
        assert!(limits("").unwrap().readers.is_none());
        assert_eq!(
            limits("holes = '1T'").unwrap().holes.as_deref(),
            Some(&(1 << 40))
        );
        for bad in [
            "read_ahead = '63k'",
            "read_ahead = '5G'",
            "read_ahead = '0k'",
            "read_ahead = 65536",
            "read_ahead = '99999999T'",
            "readers = 0",
            "readers = 65",
            "readers = -1",
            "readers = '4'",
        ] {
            let error = limits(bad).unwrap_err().to_string();
            assert!(error.contains("line 2"), "{bad}: {error}");
        }
    }
}
