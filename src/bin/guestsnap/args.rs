//! The command line: what is asked for, and the help.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use guestsnap::config::client::CLIENT_FILE;
use lexopt::prelude::*;

use crate::daemon;

/// A command's name, what follows it, one line about it, and the rest of its help.
pub struct Help {
    pub name: &'static str,
    arguments: &'static str,
    brief: &'static str,
    text: &'static str,
}

const GUEST: &str = "\
GUEST is a name (`web1`: what `guest=web1` in a Plugin line would select), or a directive
(`lv=vg0/domu-web1`: what stands behind `guestsnap:` in a Plugin line).
";

const FROM_A_SNAPSHOT: &str = "\
What is shown comes from snapshots that are taken for it, the way a job takes them, and removed
before the command ends; also on Ctrl-C. If the command is killed, the next job or `guestsnap sweep`
removes them. The guest is not brought to rest: commands of the client file (quiesce, hooks) do not
run, nor does fsck. Before Linux 6.7 a btrfs cannot be open twice: a job that comes to such a guest
at the same moment reports it as an error.
";

const ONE_PATH: &str = "\
The path begins at the first `:/` and may hold anything, also colons. It is what the guest sees: its
filesystems are joined as in a backup, and its symbolic links are followed within the guest only.
";

/// Every command, in the order of the help.
pub const COMMANDS: &[Help] = &[
    Help {
        name: "list",
        arguments: "",
        brief: "Logical volumes and what they are to guestsnap; guests defined here",
        text: "Asks LVM, the client file and the host's guest definitions. Takes no snapshot.\n",
    },
    Help {
        name: "plan",
        arguments: "DIRECTIVE",
        brief: "What a Plugin line selects: guests, disks, snapshots, room; takes none",
        text: "\
DIRECTIVE is what stands behind `guestsnap:` in the Plugin line, in one argument:
    guestsnap plan 'lv=vg0/domu-* strip=domu-'
The checks are those of a job: what would be refused is named with the reason, and so is a volume
group without room for all snapshots of the job.
",
    },
    Help {
        name: "inspect",
        arguments: "GUEST",
        brief: "What is on a guest's disks, and what a backup would save and skip",
        text: "\
Shows disks, partition tables, the guest's LVM and filesystems; where each filesystem stands in the
guest's tree; what is skipped or cannot be read, and why. With --json: the guest's manifest (see
manifest.md). A directive that selects several guests shows them one after the other.
",
    },
    Help {
        name: "ls",
        arguments: "GUEST:/PATH",
        brief: "What is in a folder of a guest",
        text: "\
One line for each name, as `ls -l` has it: mode, names, owner and group by number, size (device
numbers of a device), time of the last change (UTC), name, target of a link. Bytes that are no text
are shown as \\xNN. A link itself is shown, unless PATH ends in a slash.
",
    },
    Help {
        name: "cat",
        arguments: "GUEST:/PATH",
        brief: "A file of a guest, to standard output",
        text: "\
Regular files only; the bytes as they are. There is no --json. A file that cannot be read to its
end, or an output that cannot be written, is an error, and so is a snapshot that overflowed.
",
    },
    Help {
        name: "who",
        arguments: "GUEST",
        brief: "Who holds a guest's disks, and our snapshots of them",
        text: "\
Shows processes (with their systemd unit), mounts in every mount namespace, devices on top, swap.
Snapshots of image files have no name: they are held by the process that made them alone.
",
    },
    Help {
        name: "check",
        arguments: "",
        brief: "Whether jobs could run: kernel, plugin, rights, disks, room, leftovers",
        text: "\
Each line is one check; what is wrong comes with what to do. The guests that are defined on this
host are checked as a job would, all their snapshots at once. Changes nothing.
",
    },
    Help {
        name: "sweep",
        arguments: "[--dry-run]",
        brief: "Removes what jobs that are gone left behind",
        text: "\
The plugin does the same at the start of every job. Only what is proven to be guestsnap's is
removed; what merely looks like it, or is in use, is named. With --dry-run nothing is removed.
Where no job has run yet, volumes are looked for by their tags alone; a folder that is named with
--working-dir has to exist.
The exit status is 1 if something that is guestsnap's is still there, because it is in use or
cannot be removed.
",
    },
];

const OPTIONS: &str = "\
OPTIONS
    --json               Print JSON (not with cat)
    --client-file FILE   Instead of /etc/bacula/guestsnap.toml
    --working-dir DIR    Bacula's working directory; default: Working Directory of
                         /etc/bacula/bacula-fd.conf, or /var/lib/bacula
    -h, --help           This text, or that of a command: guestsnap ls --help
    -V, --version        The version
";

const EXIT: &str = "\
EXIT STATUS
    0  all is well
    1  something is wrong: an error, a guest that is refused or not complete, a failed check
    2  the command line is not understood
";

/// The help of everything.
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

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    List,
    Plan(String),
    Inspect(String),
    Ls(Place),
    Cat(Place),
    Who(String),
    Check,
    Sweep {
        dry_run: bool,
    },
    /// A text to print.
    Say(String),
}

/// A path in a guest.
#[derive(Debug, PartialEq, Eq)]
pub struct Place {
    /// Name or directive.
    pub guest: String,
    /// Begins with a slash; any bytes.
    pub path: Vec<u8>,
}

impl Place {
    fn parse(command: &str, word: &OsString) -> Result<Place, lexopt::Error> {
        let bytes = word.as_bytes();
        let at = bytes.windows(2).position(|two| two == b":/");
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

/// The command line.
#[derive(Debug, PartialEq, Eq)]
pub struct Arguments {
    pub command: Command,
    pub json: bool,
    pub client_file: PathBuf,
    /// As given.
    pub working_dir: Option<PathBuf>,
}

impl Arguments {
    /// As given, or the daemon's own.
    pub fn working_dir(&self) -> PathBuf {
        let own = || daemon::working_dir(Path::new(daemon::FILE));
        self.working_dir.clone().unwrap_or_else(own)
    }

    pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Arguments, lexopt::Error> {
        let mut parser = lexopt::Parser::from_args(words);
        let mut json = false;
        let mut dry_run = false;
        let mut help_wanted = false;
        let mut version = false;
        let mut client_file = PathBuf::from(CLIENT_FILE);
        let mut working_dir = None;
        let mut values: Vec<OsString> = Vec::new();
        while let Some(argument) = parser.next()? {
            match argument {
                Short('h') | Long("help") => help_wanted = true,
                Short('V') | Long("version") => version = true,
                Long("json") => json = true,
                Long("dry-run") => dry_run = true,
                Long("client-file") => client_file = parser.value()?.into(),
                Long("working-dir") => working_dir = Some(PathBuf::from(parser.value()?)),
                Value(value) => values.push(value),
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
            (None, _) => return Err(format!("unknown command: {name}").into()),
            (Some(_), []) => match name.as_str() {
                "list" => Command::List,
                "check" => Command::Check,
                "sweep" => Command::Sweep { dry_run },
                _ => return Err(format!("{name} needs an argument").into()),
            },
            (Some(_), [word]) => match name.as_str() {
                "plan" => Command::Plan(word.clone().string()?),
                "inspect" => Command::Inspect(word.clone().string()?),
                "who" => Command::Who(word.clone().string()?),
                "ls" => Command::Ls(Place::parse(&name, word)?),
                "cat" => Command::Cat(Place::parse(&name, word)?),
                _ => return Err(format!("{name} takes no argument").into()),
            },
            (Some(_), _) => return Err(format!("{name} takes one argument; quote it").into()),
        };
        if dry_run && !matches!(command, Command::Sweep { .. } | Command::Say(_)) {
            return Err("--dry-run belongs to sweep".into());
        }
        if json && matches!(command, Command::Cat(_)) {
            return Err("cat gives the file's bytes: it has no --json".into());
        }
        Ok(Arguments {
            command,
            json,
            client_file,
            working_dir,
        })
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
        assert_eq!(command("who web1"), Command::Who("web1".into()));
        let arguments = parse("--client-file=/x --working-dir /y inspect web1").unwrap();
        assert_eq!(arguments.client_file, Path::new("/x"));
        assert_eq!(arguments.working_dir(), Path::new("/y"));
        assert_eq!(arguments.command, Command::Inspect("web1".into()));
        for (line, expected) in [
            ("", "a command is needed: list, plan, inspect, ls, cat,"),
            ("plan", "plan needs an argument"),
            ("plan a b", "plan takes one argument; quote it"),
            ("check a", "check takes no argument"),
            ("frobnicate", "unknown command"),
            ("help frobnicate", "unknown command"),
            ("list --dry-run", "--dry-run belongs to sweep"),
            ("cat --json a:/b", "cat gives the file's bytes"),
            ("ls web1", "GUEST:/PATH"),
            ("ls :/etc", "GUEST:/PATH"),
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
        ] {
            let words = ["ls".into(), OsString::from_vec(word.to_vec())];
            let expected = Place {
                guest: guest.into(),
                path: path.into(),
            };
            assert_eq!(
                Arguments::parse(words).unwrap().command,
                Command::Ls(expected)
            );
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
        ] {
            let script = "source \"$0\"; COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); _guestsnap; \
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

    /// The manual and the completions know every command and option.
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
            let options = [
                "json",
                "client-file",
                "working-dir",
                "dry-run",
                "help",
                "version",
            ];
            for word in COMMANDS.iter().map(|command| command.name).chain(options) {
                assert!(words.contains(&word), "{name} does not know {word}");
            }
        }
    }
}
