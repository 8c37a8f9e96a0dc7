//! Command-line parsing and help texts.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use guestsnap::config::ClientFile;
use guestsnap::config::client::CLIENT_FILE;
use guestsnap::error::escape;
use guestsnap::{Code, Error};
use lexopt::prelude::*;

use crate::daemon;

/// A command: name, argument synopsis, summary line, help text.
pub struct Help {
    pub name: &'static str,
    arguments: &'static str,
    brief: &'static str,
    text: &'static str,
}

const GUEST: &str = "\
GUEST is a name (`web1`, selected like `guest=web1` in a Plugin line) or a directive
(`lv=vg0/domu-web1`, the text after `guestsnap:` in a Plugin line).
";

const FROM_A_SNAPSHOT: &str = "\
The command takes snapshots like a job and removes them before it exits, also on Ctrl-C. If it is
killed, the next job or `guestsnap sweep` removes them. The guest is not quiesced: the client file's
commands (quiesce, hooks) and fsck do not run. Before Linux 6.7 a btrfs cannot be opened twice: a
job that reaches such a guest at the same moment reports it as an error.
";

const ONE_PATH: &str = "\
The path starts at the first `:/` and may contain any bytes, colons included. It is a path in the
guest: filesystems are joined as in a backup, and symbolic links are followed within the guest only.
";

/// Every command, in the order of the help.
pub const COMMANDS: &[Help] = &[
    Help {
        name: "list",
        arguments: "",
        brief: "List logical volumes with their role, and guests defined on this host",
        text: "Reads LVM, the client file and the host's guest definitions. Takes no snapshot.\n",
    },
    Help {
        name: "plan",
        arguments: "DIRECTIVE",
        brief: "Show what a Plugin line selects: guests, disks, planned snapshots, room",
        text: "\
DIRECTIVE is the text of the Plugin line, with or without `guestsnap:`, in one argument:
    guestsnap plan 'lv=vg0/domu-* strip=domu-'
The checks are those of a job. The output names refused disks with the reason, and volume groups
without room for all snapshots of the job. Takes no snapshot.
",
    },
    Help {
        name: "inspect",
        arguments: "GUEST",
        brief: "Show a guest's disks, and the volumes that a backup would save or skip",
        text: "\
Shows partition tables, LVM and filesystems on the guest's disks, the place of each filesystem in
the guest's tree, and skipped or unreadable volumes with the reason. With --json: the guest's
manifest (see manifest.md). If a directive selects several guests, shows each in turn.
",
    },
    Help {
        name: "ls",
        arguments: "GUEST[:/PATH]",
        brief: "List a directory of a guest",
        text: "\
Prints the names in the directory, by default of the guest's root.
    -l               Print mode, link count, owner and group by number, size (device numbers for
                     a device), modification time (UTC), name, link target
    -R, --recursive  List all that lies below, each with its path, in the order of a backup
Bytes that are not text appear as \\xNN. A link itself is listed, unless PATH ends in a slash.
",
    },
    Help {
        name: "cat",
        arguments: "GUEST:/PATH",
        brief: "Print a file of a guest",
        text: "\
Copies a regular file to standard output, byte for byte. --json does not apply. A read error, a
write error and an overflowed snapshot are errors.
",
    },
    Help {
        name: "who",
        arguments: "GUEST",
        brief: "List the holders of a guest's disks and of guestsnap's snapshots",
        text: "\
Lists processes (with their systemd unit), mounts in every mount namespace, stacked devices, swap.
Snapshots of image files have no name; only the process that made them holds them.
",
    },
    Help {
        name: "check",
        arguments: "",
        brief: "Test whether jobs could run: kernel, plugin, rights, disks, room, leftovers",
        text: "\
Prints one line per check; each problem comes with its remedy. Checks the guests defined on this
host like a job, with all their snapshots at once. Changes nothing.
",
    },
    Help {
        name: "rebuild",
        arguments: "KIT --disk TARGET...",
        brief: "Make a guest's disks again from the kit in its backup",
        text: "\
KIT is the guest's restored folder `.guestsnap`. Makes partition tables, boot areas, LVM and empty
filesystems with their UUIDs, labels and features; a restore then brings the files (see restore.md).
    --disk TARGET    Where to make a disk; once for each disk of the guest, in its order
    --size SIZE      Make the disk before it larger: 40G (or M, T). Its last partition grows with
                     the filesystem in it (ext, XFS, btrfs); for LVM run pvresize in the guest
    --plan           Show what would be made, and change nothing
    --wipe           Empty a target that exists and is not empty
    --definition FILE
                     Write the guest's definition of the backup to FILE, with the new names of its
                     disks
TARGET is the absolute path of an image file, VG/LV, or VG/POOL/LV for a volume in a thin pool. What
does not exist is created, and removed again if a step fails. What exists must be empty, unused and
large enough.
",
    },
    Help {
        name: "status",
        arguments: "[--max-age HOURS]",
        brief: "Show when each guest was last saved, with files and errors",
        text: "\
Reads the records that jobs leave in Bacula's working directory; asks neither Director nor LVM. A
guest counts as saved when a job has read it to its end, with or without errors.
    --max-age HOURS  Call a guest an error whose last save is older
A last save with errors, and a guest that the newest job has nothing of, are errors too. See
examples/check_guestsnap (Nagios, Icinga) and examples/guestsnap-metrics (Prometheus).
",
    },
    Help {
        name: "sweep",
        arguments: "[--dry-run]",
        brief: "Remove leftovers of dead jobs",
        text: "\
The plugin does this at the start of every job. Only objects that are provably guestsnap's are
removed; look-alikes and objects in use are named. With --dry-run, nothing is removed.
If no job has run yet, volumes are found by their tags alone. A directory given with --working-dir
must exist.
The exit status is 1 if an object of guestsnap's remains because it is in use or cannot be removed.
",
    },
];

const OPTIONS: &str = "\
OPTIONS
    --json               Print JSON (not with cat): version, command, result, errors
    --client-file FILE   Read FILE instead of /etc/bacula/guestsnap.toml
    --working-dir DIR    Bacula's working directory; default: Working Directory of
                         /etc/bacula/bacula-fd.conf, or /var/lib/bacula
    -h, --help           Print this text, or a command's: guestsnap ls --help
    -V, --version        Print the version
";

const EXIT: &str = "\
EXIT STATUS
    0  no problem was found
    1  a problem was found: an error, a guest that is refused or incomplete, a failed check
    2  the command line is invalid
";

/// The general help text.
pub fn help() -> String {
    let mut text =
        "guestsnap: files of Xen and KVM guests for Bacula, from snapshots of their disks.\n\n\
        This tool shows what the plugin in bacula-fd sees and would do on this host.\n\n\
        USAGE\n    guestsnap [OPTIONS] COMMAND\n\nCOMMANDS\n"
            .to_owned();
    for command in COMMANDS {
        let usage = format!("{} {}", command.name, command.arguments);
        text.push_str(&format!("    {usage:<20} {}\n", command.brief));
    }
    text + "\n" + OPTIONS + "\n" + EXIT
}

fn help_of(command: &Help) -> String {
    let usage = format!("{} {}", command.name, command.arguments);
    let mut text = format!(
        "USAGE\n    guestsnap [OPTIONS] {}\n\n{}.\n\n{}",
        usage.trim_end(),
        command.brief,
        command.text
    );
    let more: &[&str] = match command.name {
        "inspect" => &[GUEST, FROM_A_SNAPSHOT],
        "ls" | "cat" => &[GUEST, ONE_PATH, FROM_A_SNAPSHOT],
        "who" => &[GUEST],
        _ => &[],
    };
    for part in more {
        text.push('\n');
        text.push_str(part);
    }
    text + "\n" + OPTIONS + "\n" + EXIT
}

/// The command to run.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    List,
    Plan(String),
    Inspect(String),
    Ls {
        place: Place,
        long: bool,
        recursive: bool,
    },
    Cat(Place),
    Who(String),
    Check,
    Status {
        /// Seconds.
        max_age: Option<u64>,
    },
    Sweep {
        dry_run: bool,
    },
    Rebuild {
        kit: PathBuf,
        options: RebuildOptions,
    },
    /// Print this text: help or version.
    Say(String),
}

/// The options of `rebuild`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct RebuildOptions {
    /// Targets, in the order of the guest's disks.
    pub disks: Vec<OsString>,
    /// Larger sizes in bytes, by the number of the disk.
    pub sizes: Vec<(usize, u64)>,
    pub plan: bool,
    pub wipe: bool,
    /// Where the guest's definition is written.
    pub definition: Option<PathBuf>,
}

/// A path inside a guest.
#[derive(Debug, PartialEq, Eq)]
pub struct Place {
    /// Guest name or directive.
    pub guest: String,
    /// Absolute path; arbitrary bytes.
    pub path: Vec<u8>,
}

impl Place {
    /// Parses `GUEST:/PATH`; where `path` is given, also `GUEST` for that path.
    fn parse(command: &str, word: &OsString, path: Option<&[u8]>) -> Result<Place, lexopt::Error> {
        let mut bytes = word.as_bytes().to_vec();
        let mut at = bytes.windows(2).position(|two| two == b":/");
        if let (None, Some(path)) = (at, path) {
            at = Some(bytes.len());
            bytes.push(b':');
            bytes.extend(path);
        }
        let place = at.and_then(|at| {
            Some(Place {
                guest: std::str::from_utf8(&bytes[..at]).ok()?.to_owned(),
                path: bytes[at + 1..].to_vec(),
            })
        });
        let place = place.filter(|place| !place.guest.is_empty());
        place.ok_or_else(|| format!("{command} needs a guest and a path: GUEST:/PATH").into())
    }
}

/// Long options.
const OPTION_NAMES: &[&str] = &[
    "json",
    "client-file",
    "working-dir",
    "dry-run",
    "recursive",
    "max-age",
    "disk",
    "plan",
    "size",
    "wipe",
    "definition",
    "help",
    "version",
];

/// Seconds of a number of hours.
fn hours(text: &str) -> Result<u64, lexopt::Error> {
    let seconds = text.parse::<u64>().ok().and_then(|h| h.checked_mul(3600));
    seconds.ok_or_else(|| format!("--max-age needs a number of hours, not \"{text}\"").into())
}

/// Bytes of a size like `40G`.
fn size(text: &str) -> Result<u64, lexopt::Error> {
    let (number, unit) = match text.strip_suffix(['M', 'm']) {
        Some(number) => (number, 1 << 20),
        None => match text.strip_suffix(['G', 'g']) {
            Some(number) => (number, 1 << 30),
            None => (text.strip_suffix(['T', 't']).unwrap_or(""), 1 << 40),
        },
    };
    let bytes = number.parse::<u64>().ok().and_then(|n| n.checked_mul(unit));
    let bytes = bytes.filter(|bytes| *bytes > 0);
    bytes.ok_or_else(|| format!("--size needs a number with M, G or T, not \"{text}\"").into())
}

/// Suggests the name that a mistyped word is closest to, at two edits at most.
fn alike<'a>(word: &str, names: impl Iterator<Item = &'a str>, before: &str) -> String {
    names
        .map(|name| (strsim::osa_distance(word, name), name))
        .filter(|(edits, name)| *edits <= 2 && *edits < name.len())
        .min()
        .map_or(String::new(), |(_, name)| {
            format!("; did you mean {before}{name}?")
        })
}

/// The command line.
#[derive(Debug, PartialEq, Eq)]
pub struct Arguments {
    pub command: Command,
    /// The command's name; empty for a text to print.
    pub name: &'static str,
    pub json: bool,
    /// Value of `--client-file`.
    pub client_file: Option<PathBuf>,
    /// Value of `--working-dir`.
    pub working_dir: Option<PathBuf>,
}

impl Arguments {
    /// Value of `--working-dir`, else the daemon's working directory.
    pub fn working_dir(&self) -> PathBuf {
        let own = || daemon::working_dir(Path::new(daemon::FILE));
        self.working_dir.clone().unwrap_or_else(own)
    }

    /// Path of the client file, named or the default.
    pub fn client_file(&self) -> &Path {
        self.client_file
            .as_deref()
            .unwrap_or(Path::new(CLIENT_FILE))
    }

    /// The client file. One that is named must exist.
    pub fn client(&self) -> guestsnap::Result<ClientFile> {
        let file = self.client_file();
        if self.client_file.is_some() && !file.exists() {
            let shown = escape(file.as_os_str().as_bytes());
            let what = format!("--client-file {shown}: there is no such file");
            return Err(Error::new(Code::BadClientFile, what));
        }
        ClientFile::load(file)
    }

    pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Arguments, lexopt::Error> {
        let mut parser = lexopt::Parser::from_args(words);
        let mut json = false;
        let mut dry_run = false;
        let mut help_wanted = false;
        let mut version = false;
        let (mut long, mut recursive) = (false, false);
        let mut max_age = None;
        let mut rebuild = RebuildOptions::default();
        let mut client_file = None;
        let mut working_dir = None;
        let mut values: Vec<OsString> = Vec::new();
        while let Some(argument) = parser.next()? {
            match argument {
                Short('h') | Long("help") => help_wanted = true,
                Short('V') | Long("version") => version = true,
                Long("json") => json = true,
                Long("dry-run") => dry_run = true,
                Long("max-age") => max_age = Some(hours(&parser.value()?.string()?)?),
                Long("disk") => rebuild.disks.push(parser.value()?),
                Long("size") => {
                    let size = size(&parser.value()?.string()?)?;
                    let disk = rebuild.disks.len().checked_sub(1);
                    let disk = disk.ok_or("--size follows the --disk it belongs to")?;
                    rebuild.sizes.push((disk, size));
                }
                Long("plan") => rebuild.plan = true,
                Long("wipe") => rebuild.wipe = true,
                Long("definition") => rebuild.definition = Some(parser.value()?.into()),
                Short('l') => long = true,
                Short('R') | Long("recursive") => recursive = true,
                Long("client-file") => client_file = Some(PathBuf::from(parser.value()?)),
                Long("working-dir") => working_dir = Some(PathBuf::from(parser.value()?)),
                Value(value) => values.push(value),
                Long(other) => {
                    let hint = alike(other, OPTION_NAMES.iter().copied(), "--");
                    return Err(format!("unknown option: --{other}{hint}").into());
                }
                other => return Err(other.unexpected()),
            }
        }
        if values.first().is_some_and(|word| word == "help") {
            help_wanted = true;
            values.remove(0);
        }
        let name = match values.is_empty() {
            true => String::new(),
            false => values.remove(0).string()?,
        };
        let known = COMMANDS.iter().find(|command| command.name == name);
        let command = match (known, values.as_slice()) {
            (Some(command), _) if help_wanted => Command::Say(help_of(command)),
            (None, _) if help_wanted && name.is_empty() => Command::Say(help()),
            _ if version => Command::Say(format!("guestsnap {}\n", env!("CARGO_PKG_VERSION"))),
            (None, _) if name.is_empty() => {
                let names: Vec<&str> = COMMANDS.iter().map(|command| command.name).collect();
                return Err(format!("a command is needed: {}", names.join(", ")).into());
            }
            (None, _) => {
                let hint = alike(&name, COMMANDS.iter().map(|command| command.name), "");
                return Err(format!("unknown command: {name}{hint}").into());
            }
            (Some(_), []) => match name.as_str() {
                "list" => Command::List,
                "check" => Command::Check,
                "status" => Command::Status { max_age },
                "sweep" => Command::Sweep { dry_run },
                _ => return Err(format!("{name} needs an argument").into()),
            },
            (Some(_), [word]) => {
                let ls = (long, recursive);
                Command::about(&name, word, ls, &mut rebuild)?
            }
            (Some(_), _) => return Err(format!("{name} takes one argument; quote it").into()),
        };
        let options = [dry_run, max_age.is_some(), long || recursive, json];
        if let Some(misplaced) = misplaced(&command, options, &rebuild) {
            return Err(misplaced.into());
        }
        Ok(Arguments {
            name: known.map_or("", |command| command.name),
            command,
            json,
            client_file,
            working_dir,
        })
    }
}

impl Command {
    /// A command with its argument; `long` and `recursive` are those of `ls`.
    fn about(
        name: &str,
        word: &OsString,
        (long, recursive): (bool, bool),
        rebuild: &mut RebuildOptions,
    ) -> Result<Command, lexopt::Error> {
        Ok(match name {
            "plan" => Command::Plan(word.clone().string()?),
            "inspect" => Command::Inspect(word.clone().string()?),
            "who" => Command::Who(word.clone().string()?),
            "ls" => Command::Ls {
                place: Place::parse(name, word, Some(b"/"))?,
                long,
                recursive,
            },
            "cat" => Command::Cat(Place::parse(name, word, None)?),
            "rebuild" if rebuild.disks.is_empty() => {
                return Err("rebuild needs a target for each disk: --disk TARGET".into());
            }
            "rebuild" => Command::Rebuild {
                kit: PathBuf::from(word),
                options: std::mem::take(rebuild),
            },
            _ => return Err(format!("{name} takes no argument").into()),
        })
    }
}

/// Refuses options of other commands: `--dry-run`, `--max-age`, those of `ls`, and `--json`.
/// `rebuild`: options of that command which none has taken.
fn misplaced(
    command: &Command,
    options: [bool; 4],
    rebuild: &RebuildOptions,
) -> Option<&'static str> {
    let [dry_run, max_age, of_ls, json] = options;
    match command {
        Command::Say(_) => None,
        _ if *rebuild != RebuildOptions::default() => {
            Some("--disk, --size, --plan, --wipe and --definition belong to rebuild")
        }
        command if dry_run && !matches!(command, Command::Sweep { .. }) => {
            Some("--dry-run belongs to sweep")
        }
        command if max_age && !matches!(command, Command::Status { .. }) => {
            Some("--max-age belongs to status")
        }
        command if of_ls && !matches!(command, Command::Ls { .. }) => {
            Some("-l and -R belong to ls")
        }
        Command::Cat(_) if json => Some("cat gives the file's bytes: it has no --json"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    fn parse(line: &str) -> Result<Arguments, String> {
        Arguments::parse(line.split_whitespace().map(OsString::from)).map_err(|e| e.to_string())
    }

    #[test]
    fn test_command_lines() {
        let command = |line: &str| parse(line).unwrap().command;
        assert_eq!(command("list"), Command::List);
        assert_eq!(command("plan lv=vg0/*"), Command::Plan("lv=vg0/*".into()));
        assert_eq!(command("sweep --dry-run"), Command::Sweep { dry_run: true });
        assert_eq!(command("--json check"), Command::Check);
        let max_age = Some(36 * 3600);
        assert_eq!(command("status --max-age 36"), Command::Status { max_age });
        assert_eq!(command("status"), Command::Status { max_age: None });
        assert_eq!(command("who web1"), Command::Who("web1".into()));
        let arguments = parse("--client-file=/x --working-dir /y inspect web1").unwrap();
        assert_eq!(arguments.client_file(), Path::new("/x"));
        assert_eq!(arguments.working_dir(), Path::new("/y"));
        assert_eq!(arguments.command, Command::Inspect("web1".into()));
        for (line, expected) in [
            ("", "a command is needed: list, plan, inspect, ls, cat,"),
            ("plan", "plan needs an argument"),
            ("plan a b", "plan takes one argument; quote it"),
            ("check a", "check takes no argument"),
            ("frobnicate", "unknown command: frobnicate"),
            (
                "insepct web1",
                "unknown command: insepct; did you mean inspect?",
            ),
            ("lst", "did you mean list?"),
            ("--jsn list", "unknown option: --jsn; did you mean --json?"),
            ("status --max-age 1d", "--max-age needs a number of hours"),
            ("list --max-age 1", "--max-age belongs to status"),
            ("list -l", "-l and -R belong to ls"),
            ("cat -R web1:/", "-l and -R belong to ls"),
            ("help frobnicate", "unknown command"),
            ("list --dry-run", "--dry-run belongs to sweep"),
            ("cat --json a:/b", "cat gives the file's bytes"),
            ("cat web1", "GUEST:/PATH"),
            ("ls :/etc", "GUEST:/PATH"),
            ("ls", "ls needs an argument"),
            ("--colour", "--colour"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }

    #[test]
    fn test_places() {
        for (word, guest, path) in [
            (&b"web1:/etc/passwd"[..], "web1", &b"/etc/passwd"[..]),
            (b"lv=vg0/domu-web1:/", "lv=vg0/domu-web1", b"/"),
            (b"image=/srv/a.img:/b:/c:d", "image=/srv/a.img", b"/b:/c:d"),
            (b"a:b:/\xff", "a:b", b"/\xff"),
            (b"web1", "web1", b"/"),
            (b"lv=vg0/domu-web1", "lv=vg0/domu-web1", b"/"),
        ] {
            let words = ["ls".into(), OsString::from_vec(word.to_vec())];
            let place = Place {
                guest: guest.into(),
                path: path.into(),
            };
            let expected = Command::Ls {
                place,
                long: false,
                recursive: false,
            };
            assert_eq!(Arguments::parse(words).unwrap().command, expected);
        }
    }

    #[test]
    fn test_every_command_has_help() {
        for command in COMMANDS {
            assert!(help().contains(&format!("\n    {} ", command.name)));
            for line in [
                format!("{} --help", command.name),
                format!("help {}", command.name),
            ] {
                let Command::Say(text) = parse(&line).unwrap().command else {
                    panic!("{line}");
                };
                assert!(
                    text.contains(&format!("[OPTIONS] {}", command.name)),
                    "{text}"
                );
                assert!(text.lines().all(|line| line.len() <= 100), "{text}");
            }
        }
        for line in ["--help", "-h", "help"] {
            assert_eq!(parse(line).unwrap().command, Command::Say(help()));
        }
    }

    #[test]
    fn test_bash_completes_commands_and_options() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/guestsnap.bash");
        for (words, expected) in [
            ("guestsnap ins", "inspect"),
            ("guestsnap --json c", "cat check"),
            ("guestsnap sweep --d", "--dry-run"),
            ("guestsnap --client-file x cat --j", ""),
            ("guestsnap help wh", "who"),
            ("guestsnap inspect w", "web1"),
            ("guestsnap ls w", "web1:/"),
            ("guestsnap ls --rec", "--recursive"),
        ] {
            let script = "guestsnap() { printf '  \"name\": \"%s\",\\n' web1 '$(exit)' 'w b'; }; \
                          source \"$0\"; COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); _guestsnap; \
                          printf '%s\\n' \"${COMPREPLY[*]}\"";
            let output = std::process::Command::new("bash")
                .args(["-c", script, file])
                .args(words.split(' '))
                .output()
                .unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            assert_eq!(text.trim(), expected, "{words}");
        }
    }

    /// Manual and completions list every command and option.
    #[test]
    fn test_packaging_knows_every_command() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging");
        for name in [
            "guestsnap.8",
            "guestsnap.bash",
            "_guestsnap",
            "guestsnap.fish",
        ] {
            let text = std::fs::read_to_string(folder.join(name)).unwrap();
            let text = text.replace("\\-", "-");
            let words: Vec<&str> = text
                .split(|c: char| !c.is_ascii_alphanumeric() && c != '-')
                .map(|word| word.trim_start_matches('-'))
                .collect();
            let commands = COMMANDS.iter().map(|command| command.name);
            for word in commands.chain(OPTION_NAMES.iter().copied()) {
                assert!(words.contains(&word), "{name} does not know {word}");
            }
        }
    }
}
