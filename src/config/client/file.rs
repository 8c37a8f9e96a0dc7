//! Reads the client file, and gives its settings for one guest.

use std::path::Path;
use std::time::Duration;

use super::settings::{ClientFile, Fsck, GuestSettings, QuiesceWay, Shared};
use super::values::{Argv, DiskName};
use crate::config::defaults;
use crate::config::directive::vg_name;
use crate::config::filesystems::FsPolicy;
use crate::config::pattern::Pattern;
use crate::config::trust::{self, Refusal};
use crate::config::{Directive, Size, SnapshotKind};
use crate::error::{escape, place};
use crate::hostdev::lvname::VgName;
use crate::{Code, Error, Result};

/// Path of the client file.
pub const CLIENT_FILE: &str = "/etc/bacula/guestsnap.toml";

/// Maximum size; longer files are refused.
const MAX_BYTES: u64 = 1 << 20;

/// Exclusions for one guest, from [`ClientFile::filter`].
#[derive(Debug, Clone, Default)]
pub struct FilterSettings {
    /// Patterns of absolute paths in the guest.
    pub skip: Vec<Pattern>,
    /// Names that mark a directory to leave out.
    pub skip_dirs_containing: Vec<String>,
    /// Whether cache directories are left out.
    pub skip_caches: bool,
    /// Maximum file size, in bytes.
    pub max_file_size: Option<u64>,
}

impl std::fmt::Display for FilterSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let skip: Vec<_> = self.skip.iter().map(Pattern::text).collect();
        let (marks, caches) = (&self.skip_dirs_containing, self.skip_caches);
        write!(f, "{skip:?} {marks:?} {caches} {:?}", self.max_file_size)
    }
}

/// How to quiesce one guest, from [`ClientFile::quiesce`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quiesce {
    /// Method.
    pub way: QuiesceWay,
    /// Freeze command.
    pub freeze: Vec<String>,
    /// Thaw command.
    pub thaw: Vec<String>,
    /// Prints `status: stopped` if the guest is off.
    pub status: Option<Vec<String>>,
    /// Seconds until the guest is thawed unconditionally.
    pub seconds: u64,
    /// Whether the commands act on the guest of this name alone. `false`: they act on all.
    pub by_name: bool,
    /// The domain's name if `xl` or `virsh` would read it as a domain ID.
    pub number: Option<String>,
}

impl ClientFile {
    /// Reads the file. A missing file gives the default. Refuses a file that users other than root
    /// can change.
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

    /// Parses the text. Errors name line and column.
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
        let defaults = &file.defaults;
        if defaults.disks.is_some() || defaults.domain.is_some() || defaults.root.is_some() {
            return Err(bad(
                None,
                "disks, domain and root belong to one guest, not to [defaults]",
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
                if let DiskName::InVg(lv) = disk.get_ref() {
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
        for vg in file.vg.keys() {
            vg_name(vg).map_err(|problem| {
                bad(None, &format!("[vg.{}]: {problem}", escape(vg.as_bytes())))
            })?;
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

    /// Snapshot method: from the directive, the client file, or the default.
    pub fn snapshot_kind(&self, guest: &str, directive: &Directive) -> SnapshotKind {
        match directive.snapshot {
            SnapshotKind::Auto => self
                .setting(guest, |s| s.snapshot)
                .unwrap_or(defaults::SNAPSHOT),
            kind => kind,
        }
    }

    /// Size of a thick snapshot: from the directive, the client file, or the default.
    pub fn snapshot_size(&self, guest: &str, directive: &Directive) -> Size {
        directive
            .size
            .or_else(|| self.setting(guest, |s| s.size))
            .unwrap_or(defaults::SIZE)
    }

    /// Chunk size of a thick snapshot in bytes, if set.
    pub fn snapshot_chunk(&self, guest: &str, directive: &Directive) -> Option<u64> {
        directive
            .chunk
            .or_else(|| self.setting(guest, |s| s.chunk.as_deref().copied()))
    }

    /// Whether this host alone writes to the group, whatever LVM's marks say.
    pub fn is_mine(&self, vg: &VgName) -> bool {
        self.vg
            .get(vg.as_str())
            .and_then(|settings| settings.shared)
            == Some(Shared::Mine)
    }

    /// Whether to activate the guest's inactive volumes for the duration of a backup.
    pub fn activate(&self, guest: &str) -> bool {
        self.setting(guest, |s| s.activate)
            .unwrap_or(defaults::ACTIVATE)
    }

    /// Maximum wait for guests that an operation of Proxmox VE holds.
    pub fn lock_wait(&self) -> Duration {
        let seconds = self.pve.lock_wait.as_deref().copied();
        Duration::from_secs(seconds.unwrap_or(defaults::LOCK_WAIT))
    }

    /// Maximum time to hold a guest's writes while its snapshots are taken.
    pub fn hold(&self) -> Duration {
        let seconds = self.limits.hold_seconds.as_deref().copied();
        Duration::from_secs(seconds.unwrap_or(defaults::HOLD_SECONDS))
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

    /// Whether to check the filesystems before they are read.
    pub fn fsck(&self, guest: &str) -> Fsck {
        self.setting(guest, |s| s.fsck).unwrap_or(defaults::FSCK)
    }

    /// Exclusions for the guest.
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
            skip_caches: self
                .setting(guest, |s| s.skip_caches)
                .unwrap_or(defaults::SKIP_CACHES),
            max_file_size: self.setting(guest, |s| s.max_file_size.as_deref().copied()),
        }
    }

    /// The guest's root volume, if set.
    pub fn root(&self, guest: &str) -> Option<String> {
        self.setting(guest, |s| s.root.as_deref().cloned())
    }

    /// The guest's name for `xl` and `virsh`.
    pub fn domain(&self, guest: &str) -> String {
        self.setting(guest, |s| s.domain.as_deref().cloned())
            .unwrap_or_else(|| guest.to_owned())
    }

    /// How to quiesce the guest; `None`: not at all. `vmid`: of a virtual machine of Proxmox VE.
    pub fn quiesce(&self, guest: &str, vmid: Option<u32>) -> Option<Quiesce> {
        let way = self.setting(guest, |s| s.quiesce)?;
        let domain = self.domain(guest);
        let commands = way == QuiesceWay::Commands;
        // Their number comes from the file that names the disks.
        let named = !commands && !way.is_qm();
        let own_section = self
            .guest
            .get(guest)
            .is_some_and(|s| s.quiesce.is_some() || s.freeze.is_some() || s.thaw.is_some());
        let says_guest =
            |argv: Option<&Argv>| argv.is_some_and(|a| a.iter().any(|w| w.contains("{guest}")));
        let own_commands = commands && own_section;
        let by_name = named
            || own_commands
            || commands && says_guest(self.defaults.freeze.as_ref())
            || commands && says_guest(self.defaults.thaw.as_ref());
        // virsh accepts blanks and a plus sign before the digits of an ID.
        let digits = domain.trim_start().trim_start_matches('+');
        let digits = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        let number = (digits && named).then(|| domain.clone());
        let own = |get: fn(&GuestSettings) -> Option<Argv>| {
            let argv = self.setting(guest, get)?;
            Some(argv.iter().map(|a| a.replace("{guest}", &domain)).collect())
        };
        // Names of guests and domains never start with a dash, so none is taken for an option.
        let xl = |verb: &str| vec!["xl".to_owned(), verb.to_owned(), domain.clone()];
        let virsh = |verb: &str| {
            vec![
                "virsh".to_owned(),
                verb.to_owned(),
                "--domain".to_owned(),
                domain.clone(),
            ]
        };
        let vmid = vmid.map(|vmid| vmid.to_string()).unwrap_or_default();
        let qm = |words: &[&str]| {
            let all = ["qm"].iter().chain(words);
            all.map(|word| (*word).to_owned()).collect::<Vec<_>>()
        };
        let agent = |verb: &str| qm(&["guest", "cmd", &vmid, verb]);
        let (freeze, thaw) = match way {
            QuiesceWay::None => return None,
            QuiesceWay::XlPause => (xl("pause"), xl("unpause")),
            QuiesceWay::VirshSuspend => (virsh("suspend"), virsh("resume")),
            QuiesceWay::VirshFreeze => (virsh("domfsfreeze"), virsh("domfsthaw")),
            QuiesceWay::QmSuspend => (qm(&["suspend", &vmid]), qm(&["resume", &vmid])),
            QuiesceWay::QmFreeze => (agent("fsfreeze-freeze"), agent("fsfreeze-thaw")),
            QuiesceWay::Commands => (own(|s| s.freeze.clone())?, own(|s| s.thaw.clone())?),
        };
        Some(Quiesce {
            status: way.is_qm().then(|| qm(&["status", &vmid])),
            way,
            freeze,
            thaw,
            seconds: self
                .setting(guest, |s| s.freeze_seconds.as_deref().copied())
                .unwrap_or(defaults::FREEZE_SECONDS),
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
            let quiesce = file.quiesce(guest, None).unwrap();
            assert_eq!(words(&quiesce.freeze), freeze);
            assert_eq!(words(&quiesce.thaw), thaw);
            assert_eq!(quiesce.seconds, seconds);
        }
        assert_eq!(file.quiesce("off", None), None);
        // A numeric name could address any domain, wherever it comes from.
        let file = ClientFile::parse(
            "[defaults]\nquiesce = 'virsh-freeze'\n[guest.12]\ndomain = '12'\n\
             [guest.db1]\ndomain = ' +7'\n[guest.14]\ndomain = 'db14'\n\
             [guest.13]\nquiesce = 'commands'\nfreeze = ['/f']\nthaw = ['/t']\n",
        )
        .unwrap();
        let number = |guest: &str| file.quiesce(guest, None).unwrap().number;
        assert_eq!(number("11").as_deref(), Some("11"));
        assert_eq!(number("12").as_deref(), Some("12"));
        assert_eq!(number("db1").as_deref(), Some(" +7"));
        assert_eq!(number("+7").as_deref(), Some("+7"));
        assert_eq!(
            ["13", "14", "1a", "+"].map(number),
            [None, None, None, None]
        );
        // Commands of `[defaults]` without `{guest}` are the same for every guest.
        let by_name = |text: &str| {
            ClientFile::parse(text)
                .unwrap()
                .quiesce("a", None)
                .unwrap()
                .by_name
        };
        let all = "[defaults]\nquiesce = 'commands'\nfreeze = ['/f', 'X']\nthaw = ['/t']\n";
        assert!(!by_name(all));
        assert!(!by_name(&format!("{all}[guest.b]\nfreeze = ['/g']\n")));
        assert!(by_name(&format!("{all}[guest.a]\nfreeze = ['/g']\n")));
        assert!(by_name(&all.replace('X', "{guest}")));
        assert!(by_name("[defaults]\nquiesce = 'xl-pause'\n"));
        assert_eq!(ClientFile::default().quiesce("x", None), None);
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
            ("[defaults]\nroot = 'vg/x'", "belong to one guest"),
            (
                "[guest.a]\nroot = '/dev/vg/x'",
                "line 2, column 8: \"/dev/vg/x\" is neither VG/LV of the guest",
            ),
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
            (
                "[vg.vg0]\nshared = 'yes'",
                "line 2, column 10: unknown variant `yes`",
            ),
            ("[vg.vg0]\nshare = 'mine'", "unknown field `share`"),
            (
                "[vg.'vg*']\nshared = 'mine'",
                "[vg.vg*]: \"vg*\" is a pattern",
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
            "hold_seconds = 0",
            "hold_seconds = 61",
        ] {
            let error = limits(bad).unwrap_err().to_string();
            assert!(error.contains("line 2"), "{bad}: {error}");
        }
    }
}
