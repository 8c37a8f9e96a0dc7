//! `guestsnap`: what the plugin sees and would do, from the command line. It uses the plugin's own
//! library and changes nothing, except for `sweep`.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use guestsnap::config::client::CLIENT_FILE;
use guestsnap::config::{ClientFile, Directive, Size, SnapshotKind};
use guestsnap::disk::{self, FileDisk, ReadAt};
use guestsnap::error::escape;
use guestsnap::fs::{self, Content};
use guestsnap::guest::{self, DiskSource, Guest, Inventory, LvKind, Selection, quiesce};
use guestsnap::job::{Host, journal_folder, rights};
use guestsnap::snapshot::{self, lvm};
use guestsnap::{Code, Error};
use lexopt::prelude::*;
use serde_json::{Value, json};

const HELP: &str = "\
guestsnap: files of Xen and KVM guests for Bacula, from snapshots of their disks.

This tool shows what the plugin in bacula-fd sees and would do on this host.

USAGE
    guestsnap [OPTIONS] COMMAND

COMMANDS
    list                 Logical volumes and what they are to guestsnap; guests that are defined here
    plan DIRECTIVE       The guests a Plugin line selects, with disks and snapshots; takes none.
                         DIRECTIVE is what stands behind `guestsnap:`, in one argument:
                             guestsnap plan 'lv=vg0/domu-* strip=domu-'
    inspect GUEST        What is on a guest's disks: tables, LVM, filesystems. Reads the disks as they
                         are now, without snapshot or mount. GUEST is a name or a directive.
    check                Whether a job could run: rights, commands, client file, leftovers
    sweep [--dry-run]    Removes what jobs that are gone left behind. The plugin does the same at
                         the start of every job. Only what is proven to be guestsnap's is removed.

OPTIONS
    --json               Print JSON
    --client-file FILE   Instead of /etc/bacula/guestsnap.toml
    --working-dir DIR    Bacula's working directory (Working Directory in bacula-fd.conf),
                         default /var/lib/bacula
    -h, --help           This text
    -V, --version        The version

EXIT STATUS
    0  all is well
    1  something is wrong: an error, a guest that is refused, a failed check
    2  the command line is not understood
";

/// What to do.
#[derive(Debug, PartialEq, Eq)]
enum Command {
    List,
    Plan(String),
    Inspect(String),
    Check,
    Sweep {
        dry_run: bool,
    },
    /// A text to print.
    Say(String),
}

/// The command line.
#[derive(Debug, PartialEq, Eq)]
struct Arguments {
    command: Command,
    json: bool,
    client_file: PathBuf,
    working_dir: PathBuf,
}

impl Arguments {
    fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Arguments, lexopt::Error> {
        let mut parser = lexopt::Parser::from_args(words);
        let mut json = false;
        let mut dry_run = false;
        let mut client_file = PathBuf::from(CLIENT_FILE);
        let mut working_dir = PathBuf::from("/var/lib/bacula");
        let mut values: Vec<String> = Vec::new();
        while let Some(argument) = parser.next()? {
            match argument {
                Short('h') | Long("help") => {
                    values = vec!["help".to_owned()];
                    break;
                }
                Short('V') | Long("version") => {
                    values = vec!["version".to_owned()];
                    break;
                }
                Long("json") => json = true,
                Long("dry-run") => dry_run = true,
                Long("client-file") => client_file = parser.value()?.into(),
                Long("working-dir") => working_dir = parser.value()?.into(),
                Value(value) => values.push(value.string()?),
                other => return Err(other.unexpected()),
            }
        }
        let words: Vec<&str> = values.iter().map(String::as_str).collect();
        let command = match words.as_slice() {
            ["help"] => Command::Say(HELP.to_owned()),
            ["version"] => Command::Say(format!("guestsnap {}\n", env!("CARGO_PKG_VERSION"))),
            ["list"] => Command::List,
            ["plan", directive] => Command::Plan((*directive).to_owned()),
            ["inspect", name] => Command::Inspect((*name).to_owned()),
            ["check"] => Command::Check,
            ["sweep"] => Command::Sweep { dry_run },
            [] => return Err("a command is needed: list, plan, inspect, check or sweep".into()),
            ["plan" | "inspect"] => return Err(format!("{} needs an argument", words[0]).into()),
            ["plan" | "inspect", ..] => {
                return Err(format!("{} takes one argument; quote it", words[0]).into());
            }
            _ => return Err(format!("unknown command: {}", words.join(" ")).into()),
        };
        if dry_run && !matches!(command, Command::Sweep { .. } | Command::Say(_)) {
            return Err("--dry-run belongs to sweep".into());
        }
        Ok(Arguments {
            command,
            json,
            client_file,
            working_dir,
        })
    }
}

/// What a command found: for people, for programs, and whether all is well.
struct Answer {
    text: String,
    json: Value,
    good: bool,
}

fn main() -> ExitCode {
    let arguments = match Arguments::parse(std::env::args_os().skip(1)) {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = writeln!(
                std::io::stderr(),
                "guestsnap: {error}\nTry guestsnap --help."
            );
            return ExitCode::from(2);
        }
    };
    let answer = match run(&arguments) {
        Ok(answer) => answer,
        Err(error) => {
            let report = error.report();
            if !arguments.json {
                let _ = writeln!(std::io::stderr(), "guestsnap: {report}");
            }
            Answer {
                text: String::new(),
                json: json!({ "error": report, "code": error.code().to_string() }),
                good: false,
            }
        }
    };
    let text = match arguments.json {
        true => format!("{:#}\n", answer.json),
        false => answer.text,
    };
    // Nobody may be reading any more.
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::from(u8::from(!answer.good))
}

fn run(arguments: &Arguments) -> guestsnap::Result<Answer> {
    match &arguments.command {
        Command::Say(text) => Ok(Answer {
            text: text.clone(),
            json: json!(text),
            good: true,
        }),
        Command::List => list(&ClientFile::load(&arguments.client_file)?),
        Command::Plan(text) => plan(text, &ClientFile::load(&arguments.client_file)?),
        Command::Inspect(name) => inspect(name, &ClientFile::load(&arguments.client_file)?),
        Command::Check => Ok(check(arguments)),
        Command::Sweep { dry_run } => {
            root()?;
            sweep(&journal_folder(arguments.working_dir.clone()), *dry_run)
        }
    }
}

fn root() -> guestsnap::Result<()> {
    match nix::unistd::geteuid().is_root() {
        true => Ok(()),
        false => Err(Error::new(Code::NotRoot, "this command")),
    }
}

/// Bytes for people.
fn bytes(count: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut unit = 0;
    let mut whole = count;
    let mut rest = 0;
    while whole >= 1024 && unit + 1 < units.len() {
        rest = whole % 1024 * 10 / 1024;
        whole /= 1024;
        unit += 1;
    }
    match rest {
        0 => format!("{whole} {}", units[unit]),
        _ => format!("{whole}.{rest} {}", units[unit]),
    }
}

fn list(client: &ClientFile) -> guestsnap::Result<Answer> {
    let devices: BTreeMap<String, _> = lvm::list()?
        .into_iter()
        .filter_map(|lv| Some((lv.name.to_string(), lv.devno?)))
        .collect();
    let mut volumes = Host.volumes()?;
    volumes.sort_by(|a, b| (&a.vg, &a.lv).cmp(&(&b.vg, &b.lv)));
    let mut text = String::new();
    let mut rows = Vec::new();
    for volume in &volumes {
        let kind = match volume.kind {
            LvKind::Plain => "volume",
            LvKind::Thin if volume.origin.is_some() => "thin snapshot",
            LvKind::Thin => "thin volume",
            LvKind::Snapshot => "snapshot",
            LvKind::Pool => "pool",
            LvKind::Hidden => "part of a volume",
        };
        let kind = if volume.is_ours() {
            "snapshot of guestsnap's"
        } else {
            kind
        };
        let name = format!("{}/{}", volume.vg, volume.lv);
        let in_use = devices
            .get(&name)
            .and_then(|devno| snapshot::host_use(*devno));
        let _ = write!(text, "{name:<40} {:>10}  {kind}", bytes(volume.size));
        if let Some(origin) = &volume.origin {
            let _ = write!(text, " of {origin}");
        }
        if !volume.tags.is_empty() {
            let _ = write!(text, ", tags {}", volume.tags.join(" "));
        }
        if let Some(reason) = &in_use {
            let _ = write!(text, ", not for backups: {reason}");
        }
        text.push('\n');
        rows.push(json!({
            "vg": volume.vg,
            "lv": volume.lv,
            "bytes": volume.size,
            "kind": kind,
            "origin": volume.origin,
            "tags": volume.tags,
            "in_use": in_use,
        }));
    }
    if volumes.is_empty() {
        text.push_str("no logical volumes\n");
    }
    let defined = match guest::select(&Directive::parse("guest=*")?, client, &Host) {
        Ok(selection) => selection,
        Err(error) if error.code() == Code::NothingMatches => Selection::default(),
        Err(error) => return Err(error),
    };
    if !defined.guests.is_empty() {
        text.push_str("\nguests defined on this host (guest=NAME):\n");
    }
    for guest in &defined.guests {
        let disks: Vec<String> = guest.disks.iter().map(ToString::to_string).collect();
        let _ = writeln!(text, "{:<40} {}", guest.name, disks.join(", "));
    }
    let problems = refused(&defined, &mut text);
    let guests: Vec<Value> = defined.guests.iter().map(guest_json).collect();
    Ok(Answer {
        text,
        json: json!({ "volumes": rows, "guests": guests, "refused": problems, "notes": defined.notes }),
        good: true,
    })
}

fn guest_json(guest: &Guest) -> Value {
    let uncovered = guest
        .uncovered
        .iter()
        .map(|disk| json!({ "disk": disk.what, "reason": disk.reason, "expected": disk.expected }));
    json!({
        "name": guest.name,
        "disks": guest.disks.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "not_covered": uncovered.collect::<Vec<_>>(),
    })
}

/// Adds what was refused and noted to the text.
fn refused(selection: &Selection, text: &mut String) -> Vec<Value> {
    let mut rows = Vec::new();
    for (name, error) in &selection.refused {
        let _ = writeln!(text, "ERROR {name}: {}", error.report());
        rows.push(
            json!({ "name": name, "error": error.report(), "code": error.code().to_string() }),
        );
    }
    for note in &selection.notes {
        let _ = writeln!(text, "note: {}", escape(note.as_bytes()));
    }
    rows
}

fn plan(text: &str, client: &ClientFile) -> guestsnap::Result<Answer> {
    let directive = Directive::parse(text)?;
    let selection = guest::select(&directive, client, &Host)?;
    let needs_lvm = selection
        .guests
        .iter()
        .flat_map(|guest| &guest.disks)
        .any(|disk| matches!(disk, DiskSource::Lv { .. }));
    let volumes = match needs_lvm {
        true => lvm::list()?,
        false => Vec::new(),
    };
    let mut good = selection.refused.is_empty();
    let mut out = String::new();
    let mut guests = Vec::new();
    for guest in &selection.guests {
        let _ = writeln!(out, "{}/{}", directive.path, guest.name);
        let mut row = guest_json(guest);
        let mut disks = Vec::new();
        for disk in &guest.disks {
            let (size, how, problem) = match disk {
                DiskSource::Lv { vg, lv } => {
                    let info = volumes
                        .iter()
                        .find(|v| v.name.vg() == vg && v.name.lv() == lv);
                    let kind = client.snapshot_kind(&guest.name, &directive);
                    let thin =
                        info.is_some_and(lvm::LvInfo::is_thin) && kind != SnapshotKind::Thick;
                    let how = match (thin, client.snapshot_size(&guest.name, &directive)) {
                        (true, _) => "thin snapshot".to_owned(),
                        (false, Size::Percent(percent)) => format!("thick snapshot of {percent} %"),
                        (false, Size::Bytes(count)) => {
                            format!("thick snapshot of {}", bytes(count))
                        }
                    };
                    let problem = match info.and_then(|v| v.devno) {
                        None => Some("not active".to_owned()),
                        Some(devno) => snapshot::host_use(devno),
                    };
                    (info.map(|v| v.size), how, problem)
                }
                DiskSource::File(path) => {
                    let size = std::fs::metadata(path).ok().map(|m| m.len());
                    (size, "reflinked copy".to_owned(), None)
                }
                other => (None, format!("{other}"), None),
            };
            good &= problem.is_none();
            let shown = size.map(bytes).unwrap_or_default();
            let _ = write!(out, "    {:<36} {shown:>10}  {how}", disk.to_string());
            if let Some(problem) = &problem {
                let _ = write!(out, "  ERROR {problem}");
            }
            out.push('\n');
            disks.push(json!({ "disk": disk.to_string(), "bytes": size, "snapshot": how, "error": problem }));
        }
        for disk in &guest.uncovered {
            let _ = writeln!(out, "    not covered: {}: {}", disk.what, disk.reason);
        }
        if let Some(rest) = client.quiesce(&guest.name) {
            let _ = writeln!(
                out,
                "    at rest for {} s at most: {}",
                rest.seconds,
                escape(rest.freeze.join(" ").as_bytes())
            );
            row["freeze"] = json!(rest.freeze);
            row["thaw"] = json!(rest.thaw);
            row["freeze_seconds"] = json!(rest.seconds);
        }
        row["path"] = json!(format!("{}/{}", directive.path, guest.name));
        row["disks"] = json!(disks);
        guests.push(row);
    }
    let problems = refused(&selection, &mut out);
    Ok(Answer {
        text: out,
        json: json!({ "guests": guests, "refused": problems, "notes": selection.notes }),
        good,
    })
}

fn inspect(name: &str, client: &ClientFile) -> guestsnap::Result<Answer> {
    let directive = match name.contains('=') {
        true => Directive::parse(name)?,
        false => Directive::parse(&format!("guest='{}'", name.replace('\'', "\\'")))?,
    };
    let selection = guest::select(&directive, client, &Host)?;
    let mut out = String::new();
    let mut guests = Vec::new();
    let mut good = selection.refused.is_empty();
    for guest in &selection.guests {
        let _ = writeln!(out, "{}", guest.name);
        match look(guest, &mut out) {
            Ok(found) => guests.push(found),
            Err(error) => {
                good = false;
                let _ = writeln!(out, "    ERROR {}", error.report());
                guests.push(json!({ "name": guest.name, "error": error.report() }));
            }
        }
    }
    let problems = refused(&selection, &mut out);
    Ok(Answer {
        text: out,
        json: json!({ "guests": guests, "refused": problems, "notes": selection.notes }),
        good,
    })
}

/// Reads a guest's disks as they are.
fn look(guest: &Guest, out: &mut String) -> guestsnap::Result<Value> {
    let mut paths = Vec::new();
    for disk in &guest.disks {
        paths.push(match disk {
            DiskSource::Lv { vg, lv } => Path::new("/dev").join(vg).join(lv),
            DiskSource::File(path) => path.clone(),
            other => {
                return Err(Error::new(Code::UnsupportedDisk, other.to_string()));
            }
        });
    }
    let disks = paths
        .iter()
        .map(|path| FileDisk::open(path))
        .collect::<guestsnap::Result<Vec<_>>>()?;
    let views: Vec<&dyn ReadAt> = disks.iter().map(|disk| disk as &dyn ReadAt).collect();
    let examined = disk::examine(&views)?;
    for (source, report) in guest.disks.iter().zip(&examined.disks) {
        let partitions = match report.table.partitions.len() {
            0 => "no partitions".to_owned(),
            1 => "1 partition".to_owned(),
            count => format!("{count} partitions"),
        };
        let _ = writeln!(
            out,
            "    {}: {source}, {}, {partitions}",
            report.name,
            bytes(report.size)
        );
    }
    let mut contents = Vec::new();
    for volume in &examined.volumes {
        let content = match volume.layout.contiguous() {
            // Only a device of its own would show it; that is for jobs.
            None => "in several pieces, not looked into".to_owned(),
            Some(extent) => {
                let path = &paths[extent.disk];
                let file = std::fs::File::open(path).map_err(|error| {
                    let shown = escape(path.as_os_str().as_encoded_bytes());
                    Error::new(Code::DiskUnreadable, shown).because(error)
                })?;
                match fs::probe::probe_range(&file, extent.start, extent.len, &volume.name) {
                    Ok(Content::Filesystem(filesystem)) => match &filesystem.label {
                        Some(label) => format!("{} \"{}\"", filesystem.fstype, escape(label)),
                        None => filesystem.fstype,
                    },
                    Ok(Content::Skip(reason)) => reason.to_string(),
                    Ok(Content::Unknown { blank: true }) => "blank".to_owned(),
                    Ok(Content::Unknown { blank: false }) => "nothing known".to_owned(),
                    Err(error) => format!("ERROR {}", error.report()),
                }
            }
        };
        let size = bytes(volume.size());
        let _ = writeln!(out, "    {:<36} {size:>10}  {content}", volume.name);
        contents.push(json!({ "name": volume.name, "bytes": volume.size(), "content": content }));
    }
    for skipped in &examined.skipped {
        let reason = escape(skipped.reason.as_bytes());
        let _ = writeln!(
            out,
            "    {:<36} {:>10}  skipped: {reason}",
            skipped.name, ""
        );
    }
    for note in &examined.notes {
        let _ = writeln!(out, "    note: {}", escape(note.as_bytes()));
    }
    for disk in &guest.uncovered {
        let _ = writeln!(out, "    not covered: {}: {}", disk.what, disk.reason);
    }
    let mut found = guest_json(guest);
    found["volumes"] = json!(contents);
    found["examined"] = json!(examined);
    Ok(found)
}

fn check(arguments: &Arguments) -> Answer {
    let mut rows: Vec<(&str, Result<String, String>)> = Vec::new();
    let report = |error: Error| error.report();
    rows.push(("root", root().map(|()| "yes".to_owned()).map_err(report)));
    let client = ClientFile::load(&arguments.client_file);
    rows.push((
        "client file",
        match &client {
            Ok(client) => Ok(match arguments.client_file.exists() {
                true => format!(
                    "{} is valid, {} guests in it",
                    arguments.client_file.display(),
                    client.guest.len()
                ),
                false => format!("{} is not there: defaults", arguments.client_file.display()),
            }),
            Err(error) => Err(error.report()),
        },
    ));
    if let Ok(client) = &client {
        let defaults = ["".to_owned()];
        for guest in client.guest.keys().chain(&defaults) {
            if let Some(rest) = client.quiesce(guest) {
                let shown = match guest.as_str() {
                    "" => "[defaults]",
                    name => name,
                };
                rows.push((
                    "quiesce",
                    match quiesce::check(&rest) {
                        Ok(()) => Ok(format!("{shown}: its commands are there")),
                        Err(error) => Err(format!("{shown}: {}", error.report())),
                    },
                ));
            }
        }
    }
    let capabilities = |process: &str, whose: &str| match rights::missing(process) {
        Ok(missing) if missing.is_empty() => Ok(format!("{whose} has what it needs")),
        Ok(missing) => Err(format!("{whose} lacks {}", missing.join(", "))),
        Err(error) => Err(format!("{whose}: {error}")),
    };
    rows.push(("capabilities", capabilities("self", "this process")));
    // A unit may take from the daemon what an administrator's shell has.
    for process in rights::daemons() {
        let whose = format!("bacula-fd (process {process})");
        rows.push(("capabilities", capabilities(&process, &whose)));
    }
    for (path, what) in rights::DEVICES {
        rows.push((
            what,
            match rights::usable(path) {
                Ok(()) => Ok(path.to_owned()),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    Err(format!("{path} is missing: load the kernel module"))
                }
                Err(error) => Err(format!("{path} cannot be opened: {error}")),
            },
        ));
    }
    rows.push((
        "lvm",
        lvm::list()
            .map(|volumes| format!("{} logical volumes", volumes.len()))
            .map_err(report),
    ));
    let folder = journal_folder(arguments.working_dir.clone());
    let leftovers = match folder.is_dir() {
        false => Ok("no job has run here yet".to_owned()),
        true => match snapshot::sweep(&folder, true) {
            Err(error) => Err(error.report()),
            Ok(report) if report.removed.is_empty() && report.kept.is_empty() => {
                Ok("none".to_owned())
            }
            Ok(report) => Err(report.lines().collect::<Vec<_>>().join("; ")),
        },
    };
    rows.push(("leftovers", leftovers));
    let good = rows.iter().all(|(_, result)| result.is_ok());
    let mut text = String::new();
    let mut list = Vec::new();
    for (what, result) in rows {
        let (mark, said) = match &result {
            Ok(said) => ("ok   ", said),
            Err(said) => ("ERROR", said),
        };
        let _ = writeln!(text, "{mark} {what:<14} {}", escape(said.as_bytes()));
        list.push(json!({ "check": what, "ok": result.is_ok(), "says": said }));
    }
    Answer {
        text,
        json: json!(list),
        good,
    }
}

fn sweep(folder: &Path, dry_run: bool) -> guestsnap::Result<Answer> {
    let report = snapshot::sweep(folder, dry_run)?;
    let mut text = String::new();
    for line in report.lines() {
        let _ = writeln!(text, "{}", escape(line.as_bytes()));
    }
    if text.is_empty() {
        text.push_str("nothing was left behind\n");
    }
    Ok(Answer {
        text,
        json: json!({ "removed": report.removed, "kept": report.kept, "dry_run": report.dry_run }),
        good: report.kept.is_empty(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert!(matches!(command("plan --help"), Command::Say(_)));
        let arguments = parse("--client-file=/x --working-dir /y inspect web1").unwrap();
        assert_eq!(arguments.client_file, Path::new("/x"));
        assert_eq!(arguments.working_dir, Path::new("/y"));
        assert_eq!(arguments.command, Command::Inspect("web1".into()));
        for (line, expected) in [
            ("", "a command is needed"),
            ("plan", "plan needs an argument"),
            ("plan a b", "plan takes one argument; quote it"),
            ("frobnicate", "unknown command"),
            ("list --dry-run", "--dry-run belongs to sweep"),
            ("--colour", "--colour"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }

    #[test]
    fn test_help_names_every_command() {
        for command in ["list", "plan", "inspect", "check", "sweep"] {
            assert!(HELP.contains(&format!("\n    {command} ")), "{command}");
        }
    }

    #[test]
    fn test_bytes() {
        for (count, text) in [(0, "0 bytes"), (1536, "1.5 KiB"), (40 << 30, "40 GiB")] {
            assert_eq!(bytes(count), text);
        }
    }
}
