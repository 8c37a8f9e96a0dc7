//! The directive: the text after `guestsnap:` in a `Plugin =` line.
//!
//! ```text
//! guestsnap: lv=vg0/domu-* strip=domu- exclude='domu-test*' size=10G
//! ```
//!
//! White space separates settings. A value may be enclosed in single or double quotes. Inside them
//! `\'`, `\"` and `\\` stand for the second character; any other backslash is literal, so that `\*`
//! reaches the pattern. Positions in errors are bytes of the text after the colon, counted from 1.

mod scanner;
mod values;

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

use crate::config::defaults;
use crate::config::pattern::Pattern;
use crate::hostdev::lvname::VgName;
use crate::{Code, Error, Result};

use scanner::{Scanner, Setting};
use values::{check_path, check_tag, digits};
pub(crate) use values::{parse_bytes, parse_chunk, vg_name};

/// Maximum length; longer directives are refused.
const MAX_LENGTH: usize = 64 * 1024;

/// Start of the tag that Ganeti sets on all volumes of an instance; the instance's name follows.
pub const INSTANCE_TAG: &str = "originstname+";

/// All keys and their meanings, in the order of the documentation.
pub const KEYS: &[(&str, &str)] = &[
    ("lv", "VG/GLOB: each matching logical volume is a guest"),
    ("tag", "logical volumes with this LVM tag are guests"),
    (
        "guest",
        "guests by name, from the client file and the host's definitions",
    ),
    ("xl", "guests defined by these xl.cfg files"),
    ("libvirt", "guests defined by these libvirt XML files"),
    (
        "pve",
        "virtual machines and containers of Proxmox VE, by VMID or name",
    ),
    ("image", "raw image files are guests"),
    ("exclude", "names of guests to leave out"),
    ("strip", "prefix taken off the names"),
    (
        "id",
        "yes or no: put the VMID after the names of guests of Proxmox VE",
    ),
    ("snapshot", "auto, thick, thin or none"),
    (
        "snapshots",
        "auto, all or turn: when the snapshots of the guests are taken",
    ),
    ("size", "size of a thick snapshot: 20% or 10G"),
    ("chunk", "chunk of a thick snapshot: 64k"),
    ("path", "where the guests stand in the catalog"),
    ("on_error", "continue or fail"),
];

/// A selector of guests.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Selector {
    /// `lv=VG/GLOB`: each matching LV is a guest with one disk.
    Lv {
        /// Volume group, not a pattern.
        vg: VgName,
        /// Pattern of LV names.
        pattern: Pattern,
    },
    /// `tag=TAG`: LVs with this LVM tag. A `*` may end the tag of Ganeti's instances.
    Tag(String),
    /// `guest=GLOB`: guests by name from the client file and the host's definitions.
    Guest(Pattern),
    /// `xl=GLOB`: xl.cfg files.
    Xl(Pattern),
    /// `libvirt=GLOB`: libvirt domain XML files.
    Libvirt(Pattern),
    /// `pve=GLOB`: guests of Proxmox VE by VMID or name.
    Pve(Pattern),
    /// `image=GLOB`: raw image files, one guest each.
    Image(Pattern),
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Selector::Lv { vg, pattern } => write!(f, "lv={vg}/{pattern}"),
            Selector::Tag(tag) => write!(f, "tag={tag}"),
            Selector::Guest(pattern) => write!(f, "guest={pattern}"),
            Selector::Xl(pattern) => write!(f, "xl={pattern}"),
            Selector::Libvirt(pattern) => write!(f, "libvirt={pattern}"),
            Selector::Pve(pattern) => write!(f, "pve={pattern}"),
            Selector::Image(pattern) => write!(f, "image={pattern}"),
        }
    }
}

/// Snapshot method of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotKind {
    /// Thin for thin LVs, thick for others, reflink for files.
    Auto,
    /// Copy-on-write LV in the origin's group.
    Thick,
    /// Thin snapshot in the origin's pool.
    Thin,
    /// No snapshot: for an image file of a guest that is shut down.
    None,
}

impl FromStr for SnapshotKind {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(SnapshotKind::Auto),
            "thick" => Ok(SnapshotKind::Thick),
            "thin" => Ok(SnapshotKind::Thin),
            "none" => Ok(SnapshotKind::None),
            other => Err(format!(
                "\"{other}\" is not a kind of snapshot: write auto, thick, thin or none"
            )),
        }
    }
}

/// When the snapshots of a line's guests are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// At the start of the job as far as their groups have room, the others when room comes back.
    Auto,
    /// All at the start of the job; without room, a guest is an error.
    All,
    /// Each guest's when it is to be read.
    Turn,
}

impl FromStr for When {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(When::Auto),
            "all" => Ok(When::All),
            "turn" => Ok(When::Turn),
            other => Err(format!("\"{other}\" is unknown: write auto, all or turn")),
        }
    }
}

/// Size of a thick snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Size {
    /// Share of the origin, in percent (1 to 100).
    Percent(u8),
    /// Bytes.
    Bytes(u64),
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.strip_suffix('%') {
            Some(number) => match digits(number) {
                Some(percent @ 1..=100) => Ok(Size::Percent(percent as u8)),
                _ => Err(format!("\"{text}\" is not a share from 1% to 100%")),
            },
            None => Ok(Size::Bytes(parse_bytes(text)?)),
        }
    }
}

impl TryFrom<String> for Size {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

/// Effect on the job of a guest that cannot be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// Count an error and continue with the other guests.
    Continue,
    /// Fail the job.
    Fail,
}

impl FromStr for OnError {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "continue" => Ok(OnError::Continue),
            "fail" => Ok(OnError::Fail),
            other => Err(format!("\"{other}\" is unknown: write continue or fail")),
        }
    }
}

/// Where to panic on purpose: `debug=` tests that a panic does not reach the daemon.
#[cfg(feature = "debug-panic")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DebugPanic {
    /// `panic-start`: when the job starts.
    Start,
    /// `panic-read`: when the first file is read.
    Read,
}

/// One parsed directive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directive {
    /// Selectors in the order written; never empty.
    pub selectors: Vec<Selector>,
    /// Prefix to strip from guest names.
    pub strip: Option<String>,
    /// Whether the names of guests of Proxmox VE always end with their VMID.
    pub id: bool,
    /// Patterns of guest names to leave out; tested before and after `strip`.
    pub exclude: Vec<Pattern>,
    /// Snapshot method.
    pub snapshot: SnapshotKind,
    /// When the snapshots are taken.
    pub snapshots: When,
    /// Size of thick snapshots; `None`: from the client file.
    pub size: Option<Size>,
    /// Chunk size of thick snapshots in bytes; `None`: from the client file.
    pub chunk: Option<u64>,
    /// Parent of the guests in the catalog: absolute, no trailing slash.
    pub path: String,
    /// How to handle guests that cannot be opened.
    pub on_error: OnError,
    /// Where to panic on purpose.
    #[cfg(feature = "debug-panic")]
    pub debug: Option<DebugPanic>,
}

impl Directive {
    /// Parses a `Plugin =` line: a name, a colon, and a text for [`Directive::parse`].
    pub fn from_line(line: &[u8]) -> Result<Directive> {
        let line = std::str::from_utf8(line)
            .map_err(|e| Error::new(Code::BadDirective, "not UTF-8").because(e))?;
        let (_, rest) = line
            .split_once(':')
            .ok_or_else(|| Error::new(Code::BadDirective, format!("no colon in {line:?}")))?;
        Directive::parse(rest)
    }

    /// Parses the text after `guestsnap:`.
    pub fn parse(text: &str) -> Result<Directive> {
        if text.len() > MAX_LENGTH {
            return Err(Error::new(
                Code::BadDirective,
                format!(
                    "it is {} bytes long, at most {MAX_LENGTH} are read",
                    text.len()
                ),
            ));
        }
        let mut directive = Directive {
            selectors: Vec::new(),
            strip: None,
            id: defaults::ID,
            exclude: Vec::new(),
            snapshot: defaults::SNAPSHOT,
            snapshots: defaults::SNAPSHOTS,
            size: None,
            chunk: None,
            path: defaults::PATH.to_owned(),
            on_error: defaults::ON_ERROR,
            #[cfg(feature = "debug-panic")]
            debug: None,
        };
        // Keys allowed only once, with their positions.
        let mut seen: Vec<(&str, usize)> = Vec::new();
        for setting in (Scanner { text, at: 0 }) {
            let setting = setting?;
            let Setting { key, key_at, .. } = setting;
            if !matches!(
                key,
                "lv" | "tag" | "guest" | "xl" | "libvirt" | "pve" | "image" | "exclude"
            ) {
                if let Some((_, first)) = seen.iter().find(|(name, _)| *name == key) {
                    return Err(error_at(
                        text,
                        key_at,
                        format!(
                            "{key} stands here a second time, first at byte {}",
                            first + 1
                        ),
                    ));
                }
                seen.push((key, key_at));
            }
            directive.set(&setting).map_err(|problem| {
                let at = if known(key) { setting.value_at } else { key_at };
                error_at(text, at, problem)
            })?;
        }
        if directive.selectors.is_empty() {
            return Err(Error::new(
                Code::BadDirective,
                "it selects no guest: at least one of lv=, tag=, guest=, xl=, libvirt=, pve=, image= is needed",
            ));
        }
        Ok(directive)
    }

    fn set(&mut self, setting: &Setting<'_>) -> std::result::Result<(), String> {
        let key = setting.key;
        let value = setting.value.as_str();
        if known(key) {
            if value.is_empty() {
                return Err(format!("{key}= has no value"));
            }
            if value.chars().any(char::is_control) {
                return Err(format!("the value of {key}= holds a control character"));
            }
        }
        match key {
            "lv" => {
                let (vg, pattern) = value
                    .split_once('/')
                    .filter(|(vg, pattern)| !vg.is_empty() && !pattern.is_empty())
                    .ok_or_else(|| format!("\"{value}\" is not VG/GLOB"))?;
                let vg = vg_name(vg)?;
                if pattern.contains('/') {
                    return Err(format!(
                        "\"{pattern}\" holds a slash: the names of logical volumes have none"
                    ));
                }
                self.selectors.push(Selector::Lv {
                    vg,
                    pattern: Pattern::name(pattern)?,
                });
            }
            "tag" => {
                check_tag(value)?;
                self.selectors.push(Selector::Tag(value.to_owned()));
            }
            "guest" => self.selectors.push(Selector::Guest(Pattern::name(value)?)),
            "xl" => self.selectors.push(Selector::Xl(Pattern::path(value)?)),
            "libvirt" => {
                let pattern = Pattern::path(value)?;
                self.selectors.push(Selector::Libvirt(pattern));
            }
            "pve" => self.selectors.push(Selector::Pve(Pattern::name(value)?)),
            "image" => self.selectors.push(Selector::Image(Pattern::path(value)?)),
            "exclude" => self.exclude.push(Pattern::name(value)?),
            "strip" => self.strip = Some(value.to_owned()),
            "id" => {
                self.id = match value {
                    "yes" => true,
                    "no" => false,
                    other => return Err(format!("\"{other}\" is unknown: write yes or no")),
                };
            }
            "snapshot" => self.snapshot = value.parse()?,
            "snapshots" => self.snapshots = value.parse()?,
            "size" => self.size = Some(value.parse()?),
            "chunk" => self.chunk = Some(parse_chunk(value)?),
            "path" => {
                check_path(value)?;
                self.path = value.to_owned();
            }
            "on_error" => self.on_error = value.parse()?,
            #[cfg(feature = "debug-panic")]
            "debug" => {
                self.debug = Some(match value {
                    "panic-start" => DebugPanic::Start,
                    "panic-read" => DebugPanic::Read,
                    other => return Err(format!("\"{other}\" is no place to panic at")),
                });
            }
            other => {
                let names: Vec<&str> = KEYS.iter().map(|(name, _)| *name).collect();
                return Err(format!(
                    "unknown key \"{other}\"; the keys are {}",
                    names.join(", ")
                ));
            }
        }
        Ok(())
    }
}

fn known(key: &str) -> bool {
    KEYS.iter().any(|(name, _)| *name == key) || (cfg!(feature = "debug-panic") && key == "debug")
}

/// Creates an error with the position and the text found there.
fn error_at(text: &str, at: usize, problem: impl fmt::Display) -> Error {
    let near: String = text[at..]
        .split(char::is_whitespace)
        .next()
        .unwrap_or_default()
        .chars()
        .take(40)
        .collect();
    let place = if near.is_empty() {
        "the end".to_owned()
    } else {
        format!("\"{near}\"")
    };
    Error::new(
        Code::BadDirective,
        format!("at byte {} ({place}): {problem}", at + 1),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain() -> Directive {
        Directive::parse("guest=*").unwrap()
    }

    #[test]
    fn test_directives() {
        let lv = |vg: &str, pattern: &str| Selector::Lv {
            vg: VgName::new(vg).unwrap(),
            pattern: Pattern::name(pattern).unwrap(),
        };
        let name = |text: &str| Pattern::name(text).unwrap();
        let path = |text: &str| Pattern::path(text).unwrap();
        let cases: &[(&str, Directive)] = &[
            (
                " lv=vg0/domu-* strip=domu- ",
                Directive {
                    selectors: vec![lv("vg0", "domu-*")],
                    strip: Some("domu-".into()),
                    ..plain()
                },
            ),
            (
                "lv=vg0/a lv=vg1/b* tag=backup exclude=x exclude='y z'",
                Directive {
                    selectors: vec![
                        lv("vg0", "a"),
                        lv("vg1", "b*"),
                        Selector::Tag("backup".into()),
                    ],
                    exclude: vec![name("x"), name("y z")],
                    ..plain()
                },
            ),
            (
                "guest=web[0-9] xl=/etc/xen/*.cfg\tlibvirt=/etc/libvirt/qemu/*.xml image=/srv/*.raw",
                Directive {
                    selectors: vec![
                        Selector::Guest(name("web[0-9]")),
                        Selector::Xl(path("/etc/xen/*.cfg")),
                        Selector::Libvirt(path("/etc/libvirt/qemu/*.xml")),
                        Selector::Image(path("/srv/*.raw")),
                    ],
                    ..plain()
                },
            ),
            (
                "image=\"/srv/my \\\"disk\\\".raw\" exclude='it\\'s' exclude='a\\*b\\\\c'",
                Directive {
                    selectors: vec![Selector::Image(path("/srv/my \"disk\".raw"))],
                    exclude: vec![name("it's"), name("a\\*b\\c")],
                    ..plain()
                },
            ),
            (
                "lv=vg/x snapshot=thick size=20% chunk=64k path=/mnt/old on_error=fail",
                Directive {
                    selectors: vec![lv("vg", "x")],
                    snapshot: SnapshotKind::Thick,
                    size: Some(Size::Percent(20)),
                    chunk: Some(65536),
                    path: "/mnt/old".into(),
                    on_error: OnError::Fail,
                    ..plain()
                },
            ),
            (
                "size=10G lv=vg/x\nsnapshot=thin",
                Directive {
                    selectors: vec![lv("vg", "x")],
                    snapshot: SnapshotKind::Thin,
                    size: Some(Size::Bytes(10 << 30)),
                    ..plain()
                },
            ),
        ];
        for (text, expected) in cases {
            match Directive::parse(text) {
                Ok(directive) => assert_eq!(&directive, expected, "{text}"),
                Err(error) => panic!("{text}: {}", error.report()),
            }
        }
    }

    #[test]
    fn test_bad_directives_name_place_and_cause() {
        let cases = [
            ("", "selects no guest"),
            ("size=10G", "selects no guest"),
            (
                "lv=vg0/a siez=10G",
                "at byte 10 (\"siez=10G\"): unknown key \"siez\"; the keys are lv, tag,",
            ),
            ("lv", "at byte 1 (\"lv\"): this is not key=value"),
            ("lv = vg0/a", "at byte 1 (\"lv\"): this is not key=value"),
            ("=x", "at byte 1 (\"=x\"): this is not key=value"),
            ("lv=", "at byte 4 (the end): lv= has no value"),
            ("lv='' tag=x", "at byte 4 (\"''\"): lv= has no value"),
            ("lv=vg0", "\"vg0\" is not VG/GLOB"),
            ("lv=vg0/", "\"vg0/\" is not VG/GLOB"),
            ("lv=/a", "\"/a\" is not VG/GLOB"),
            ("lv=vg*/a", "\"vg*\" is a pattern"),
            ("lv=-vg/a", "\"-vg\" cannot be the name"),
            ("lv=dev/vg0/a", "holds a slash"),
            ("lv=vg0/[a", "\"[a\" is not a pattern"),
            ("lv=vg0/{a", "\"{a\" is not a pattern"),
            ("guest=", "guest= has no value"),
            ("tag=@x", "without @"),
            ("tag=a*", "cannot be an LVM tag"),
            ("tag=originstname+*x", "cannot be an LVM tag"),
            ("tag=originstname*", "cannot be an LVM tag"),
            ("tag=guestsnap.job=1", "marks the snapshots"),
            (
                "xl=xen/*.cfg",
                "at byte 4 (\"xen/*.cfg\"): \"xen/*.cfg\" is not absolute",
            ),
            ("image=/a/../b", "must not hold"),
            (
                "lv='vg0/a",
                "at byte 4 (\"'vg0/a\"): the closing quote is missing",
            ),
            ("lv='vg0/a\\'", "the closing quote is missing"),
            ("lv='vg0/a'b", "at byte 11 (\"b\"): a blank is needed"),
            ("lv=vg0/a'b'", "at byte 9 (\"'b'\"): a quote may only stand"),
            (
                "lv=vg/a size=10",
                "at byte 14 (\"10\"): \"10\" is not a size",
            ),
            ("lv=vg/a size=0%", "is not a share"),
            ("lv=vg/a size=101%", "is not a share"),
            ("lv=vg/a size=-1G", "is not a size"),
            ("lv=vg/a size=+1G", "is not a size"),
            ("lv=vg/a size=G", "is not a size"),
            ("lv=vg/a size=0k", "is nothing"),
            ("lv=vg/a size=99999999999T", "is too much"),
            ("lv=vg/a size=1é", "is not a size"),
            ("lv=vg/a chunk=3k", "power of two"),
            ("lv=vg/a chunk=1M", "power of two"),
            ("lv=vg/a snapshot=zfs", "write auto, thick, thin or none"),
            ("lv=vg/a on_error=stop", "write continue or fail"),
            ("lv=vg/a path=mnt", "is not absolute"),
            ("lv=vg/a path=/mnt/", "a slash too many"),
            ("lv=vg/a path=//mnt", "a slash too many"),
            ("lv=vg/a path=/", "among the host's own files"),
            ("lv=vg/a path=/a/../b", "must not hold . or .."),
            (
                "lv=vg/a size=1G size=2G",
                "at byte 17 (\"size=2G\"): size stands here a second time, first at byte 9",
            ),
            ("lv=vg/a exclude='a\x07'", "control character"),
        ];
        for (text, expected) in cases {
            let report = Directive::parse(text).expect_err(text).report();
            assert!(
                report.contains("GS-101") && report.contains(expected),
                "{text}: {report}"
            );
        }
        assert!(Directive::parse(&"x".repeat(MAX_LENGTH + 1)).is_err());
    }

    #[test]
    fn test_every_start_of_a_directive_ends() {
        let text = "lv=vg0/dömu-* exclude='a \\' b' image=\"/x y\" size=1G";
        for (end, _) in text.char_indices() {
            let _ = Directive::parse(&text[..end]);
        }
    }

    #[test]
    #[cfg(feature = "debug-panic")]
    fn test_debug_key() {
        let directive = Directive::parse("lv=vg/a debug=panic-read").unwrap();
        assert_eq!(directive.debug, Some(DebugPanic::Read));
        assert!(Directive::parse("lv=vg/a debug=x").is_err());
    }

    #[test]
    #[cfg(not(feature = "debug-panic"))]
    fn test_debug_key_is_unknown() {
        assert!(Directive::parse("lv=vg/a debug=panic-read").is_err());
    }
}
