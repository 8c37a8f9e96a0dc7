//! `inspect`, `ls` and `cat`: access to guests through snapshots.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use guestsnap::config::{ClientFile, Directive};
use guestsnap::error::escape;
use guestsnap::guest::{self, Guest, Selection};
use guestsnap::inode::Kind;
use guestsnap::job::{Host, Importance, Look, Reporter, size_text};
use guestsnap::stream::{Entry, find};
use guestsnap::{Code, Error};
use rustix::event::{PollFd, PollFlags, Timespec};
use serde_json::{Value, json};

use crate::args::{Arguments, Place};
use crate::host::{named, refused};
use crate::picture::picture;
use crate::screen::{Answer, Screen, Style, complain, problem, problem_of};

/// Poll interval for the stop flag while the output blocks.
const TICK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 200_000_000,
};

/// A pipe that polls writable accepts this many bytes without blocking.
const AT_ONCE: usize = 4096;

/// Selects the guests that the argument names.
fn select(name: &str, client: &ClientFile) -> guestsnap::Result<(Directive, Selection)> {
    let directive = named(name)?;
    let selection = guest::select(&directive, client, &Host::default())?;
    Ok((directive, selection))
}

/// Starts a look and prints the messages of its sweep.
fn start(client: ClientFile, arguments: &Arguments) -> guestsnap::Result<(Arc<Screen>, Look)> {
    let screen = Arc::new(Screen::new()?);
    let look = Look::start(client, arguments.working_dir(), screen.clone());
    screen.tell(Importance::Info);
    Ok((screen, look?))
}

pub fn inspect(name: &str, arguments: &Arguments, style: Style) -> guestsnap::Result<Answer> {
    let client = arguments.client()?;
    let (directive, selection) = select(name, &client)?;
    let mut text = String::new();
    let mut answer = json!({ "guests": [], "notes": selection.notes });
    let mut errors = Vec::new();
    if !selection.guests.is_empty() {
        let (screen, look) = start(client, arguments)?;
        let mut guests = Vec::new();
        for guest in &selection.guests {
            let found = guest_found(guest, &directive, &look, &screen, &mut text, style);
            guests.push(found.0);
            errors.extend(found.1);
            if screen.cancelled() {
                errors.push(problem(&Error::new(Code::Cancelled, "inspect")));
                break;
            }
        }
        answer["guests"] = json!(guests);
        if let Err(error) = look.end() {
            let _ = writeln!(text, "{} {}", style.bad("ERROR"), error.report());
            errors.push(problem(&error));
        }
    }
    errors.extend(refused(&selection, &mut text, style));
    Ok(Answer {
        text,
        json: answer,
        errors,
    })
}

/// Manifest of one guest, and the errors of opening its volumes.
fn guest_found(
    guest: &Guest,
    directive: &Directive,
    look: &Look,
    screen: &Screen,
    text: &mut String,
    style: Style,
) -> (Value, Vec<Value>) {
    screen.progress(&format!("{}: taking snapshots", guest.name));
    let looked = look.guest(guest.clone(), directive, |_| Ok(()));
    screen.clear();
    let path = format!("{}/{}", directive.path, guest.name);
    let _ = writeln!(text, "{}  saved as {path}", style.heading(&guest.name));
    let manifest = looked.manifest.as_ref();
    if let Some(manifest) = manifest {
        picture(manifest, text, style);
    }
    let messages = taken(screen, guest);
    for decision in manifest.iter().flat_map(|m| &m.decisions) {
        if messages.iter().all(|(_, message)| message != decision) {
            let _ = writeln!(text, "    {decision}");
        }
    }
    for (importance, message) in &messages {
        let shown = match importance {
            Importance::Warning => style.warning("warning:"),
            _ => style.bad("ERROR"),
        };
        let _ = writeln!(text, "    {shown} {message}");
    }
    let errors = messages
        .iter()
        .filter(|(level, _)| *level >= Importance::Error);
    let error = |(_, text): &(Importance, String)| json!({ "guest": guest.name, "text": text });
    let mut errors: Vec<Value> = errors.map(error).collect();
    let mut found = match manifest {
        Some(manifest) => manifest.to_json(),
        None => json!({ "guest": guest.name }),
    };
    if let Err(error) = looked.result {
        let _ = writeln!(text, "    {} {}", style.bad("ERROR"), error.report());
        errors.push(problem_of(&guest.name, &error));
    }
    found["path"] = json!(path);
    let message = |(level, text): &(Importance, String)| {
        let kind = match level {
            Importance::Warning => "warning",
            _ => "error",
        };
        json!({ "kind": kind, "text": text })
    };
    found["messages"] = messages.iter().map(message).collect();
    (found, errors)
}

/// Warnings and errors of a look, without the repeated guest name.
fn taken(screen: &Screen, guest: &Guest) -> Vec<(Importance, String)> {
    let name = format!("{}: ", guest.name);
    let short = |message: String| {
        let text = message.strip_prefix(&name).unwrap_or(&message);
        let text = text.strip_prefix("ERROR ").unwrap_or(text);
        escape(text.as_bytes())
    };
    screen
        .take()
        .into_iter()
        .filter(|(importance, _)| *importance >= Importance::Warning)
        .map(|(importance, message)| (importance, short(message)))
        .collect()
}

/// The single guest that `ls` and `cat` require.
fn only(mut selection: Selection) -> guestsnap::Result<Guest> {
    match (selection.guests.len(), selection.refused.pop()) {
        // Refuse even if only one disk failed: the path may be on it.
        (_, Some((_, error))) => Err(error),
        (1, None) => Ok(selection.guests.remove(0)),
        (count, None) => Err(Error::new(
            Code::BadDirective,
            format!("it selects {count} guests, and one is needed here"),
        )),
    }
}

/// Runs an action on one guest's tree. Returns the errors of the look as well.
fn in_tree<T>(
    place: &Place,
    arguments: &Arguments,
    work: impl FnOnce(&guestsnap::fs::GuestTree, &Screen) -> guestsnap::Result<T>,
) -> guestsnap::Result<(T, Vec<Value>)> {
    let client = arguments.client()?;
    let (directive, selection) = select(&place.guest, &client)?;
    let guest = only(selection)?;
    let (screen, look) = start(client, arguments)?;
    screen.progress(&format!("{}: taking snapshots", guest.name));
    let looked = look.guest(guest, &directive, |tree| {
        screen.clear();
        work(tree, &screen)
    });
    let ended = look.end();
    let mut errors = screen.tell(Importance::Warning);
    let done = looked.result?;
    if let Err(error) = ended {
        // The output so far is valid all the same.
        complain(&error.report());
        errors.push(problem(&error));
    }
    Ok((done, errors))
}

pub fn ls(
    place: &Place,
    long: bool,
    recursive: bool,
    arguments: &Arguments,
) -> guestsnap::Result<Answer> {
    let line = |entry: &Entry| {
        let name = match recursive {
            true => format!("/{}", escape(&entry.path)),
            false => escape(shown_name(entry)),
        };
        match long {
            true => row(entry, &name),
            false => name,
        }
    };
    let mut entries = Vec::new();
    let (problems, mut errors) = in_tree(place, arguments, |tree, screen| {
        find::list(
            tree,
            &place.path,
            recursive,
            &|| screen.cancelled(),
            |entry| {
                // A guest may have more files than fit into memory.
                if recursive && !arguments.json {
                    return write_all(format!("{}\n", line(&entry)).as_bytes(), screen);
                }
                entries.push(entry);
                Ok(())
            },
        )
    })?;
    for error in &problems {
        complain(&error.report());
        errors.push(problem(error));
    }
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    let text = entries.iter().map(|entry| line(entry) + "\n").collect();
    let entries: Vec<Value> = entries.iter().map(entry_json).collect();
    Ok(Answer {
        text,
        json: json!({ "entries": entries }),
        errors,
    })
}

/// One line in the format of `ls -l`.
fn row(entry: &Entry, name: &str) -> String {
    let meta = &entry.meta;
    let size = match entry.kind {
        Kind::CharDevice | Kind::BlockDevice => {
            let (major, minor) = device(meta.rdev);
            format!("{major}, {minor}")
        }
        _ => meta.size.to_string(),
    };
    let mut line = format!(
        "{} {:>3} {:>5} {:>5} {size:>12} {} {}",
        mode(entry),
        meta.nlink,
        meta.uid,
        meta.gid,
        date(meta.mtime.seconds),
        name
    );
    if let Some(target) = &entry.link {
        line.push_str(" -> ");
        line.push_str(&escape(target));
    }
    line
}

fn device(rdev: u64) -> (u32, u32) {
    (rustix::fs::major(rdev), rustix::fs::minor(rdev))
}

/// The root directory has no name.
fn shown_name(entry: &Entry) -> &[u8] {
    match entry.name() {
        b"" => b"/",
        name => name,
    }
}

fn entry_json(entry: &Entry) -> Value {
    let meta = &entry.meta;
    let mut row = json!({
        "name": escape(shown_name(entry)),
        "path": format!("/{}", escape(&entry.path)),
        "kind": match entry.kind {
            Kind::Regular => "file",
            Kind::Directory => "folder",
            Kind::Symlink => "link",
            Kind::Fifo => "pipe",
            Kind::Socket => "socket",
            Kind::CharDevice => "char-device",
            Kind::BlockDevice => "block-device",
        },
        "mode": format!("{:04o}", meta.mode & 0o7777),
        "links": meta.nlink,
        "uid": meta.uid,
        "gid": meta.gid,
        "size": meta.size,
        "mtime": meta.mtime.seconds,
        "mtime_nanoseconds": meta.mtime.nanoseconds,
    });
    if let Some(target) = &entry.link {
        row["target"] = json!(escape(target));
    }
    if matches!(entry.kind, Kind::CharDevice | Kind::BlockDevice) {
        row["device"] = json!(device(meta.rdev));
    }
    row
}

/// `drwxr-xr-x`.
fn mode(entry: &Entry) -> String {
    let mode = entry.meta.mode;
    let mut text = String::from(match entry.kind {
        Kind::Regular => '-',
        Kind::Directory => 'd',
        Kind::Symlink => 'l',
        Kind::Fifo => 'p',
        Kind::Socket => 's',
        Kind::CharDevice => 'c',
        Kind::BlockDevice => 'b',
    });
    // Read, write, execute; special bits replace the execute letter.
    for (shift, special, set, unset) in [
        (6, 0o4000, 's', 'S'),
        (3, 0o2000, 's', 'S'),
        (0, 0o1000, 't', 'T'),
    ] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (bits & 1 != 0, mode & special != 0) {
            (true, true) => set,
            (false, true) => unset,
            (true, false) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// `2026-11-23 14:55:12`, UTC.
pub fn date(seconds: i64) -> String {
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // With years starting in March, the leap day comes last; 400 years have 146097 days.
    let days = days + 719_468;
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = match month {
        0..=9 => (year, month + 3),
        _ => (year + 1, month - 9),
    };
    let (hours, minutes, seconds) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!(
        "{:04}-{month:02}-{day:02} {hours:02}:{minutes:02}:{seconds:02}",
        year + era * 400
    )
}

pub fn cat(place: &Place, arguments: &Arguments) -> guestsnap::Result<Answer> {
    let ((), errors) = in_tree(place, arguments, |tree, screen| {
        let mut file = find::open(tree, &place.path, &|| screen.cancelled())?;
        let failed =
            |error: io::Error| Error::new(Code::ReadFailed, escape(&place.path)).because(error);
        let (mut buffer, mut done, mut told) = (vec![0; 256 << 10], 0, Instant::now());
        loop {
            let length = file.read(&mut buffer).map_err(failed)?;
            if length == 0 {
                screen.clear();
                return Ok(());
            }
            write_all(&buffer[..length], screen)?;
            done += length as u64;
            // On a terminal, progress would mix with the file's bytes.
            if told.elapsed() > Duration::from_secs(1)
                && !io::IsTerminal::is_terminal(&io::stdout())
            {
                told = Instant::now();
                let (done, whole) = (size_text(done), size_text(file.size()));
                screen.progress(&format!("{done} of {whole}"));
            }
        }
    })?;
    // The file itself was the output.
    Ok(Answer {
        text: String::new(),
        json: Value::Null,
        errors,
    })
}

/// Writes to standard output without blocking on a stalled reader, so that a stop can still remove
/// the snapshot.
fn write_all(mut data: &[u8], screen: &Screen) -> guestsnap::Result<()> {
    let failed =
        |error: io::Error| Error::new(Code::OutputFailed, "standard output").because(error);
    let mut output = io::stdout().lock();
    while !data.is_empty() {
        if screen.cancelled() {
            return Err(Error::new(Code::Cancelled, "standard output"));
        }
        let mut poll = [PollFd::new(&output, PollFlags::OUT)];
        match rustix::event::poll(&mut poll, Some(&TICK)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
        // Bypasses the buffer of `output`, whose writes may block.
        match rustix::io::write(&output, &data[..data.len().min(AT_ONCE)]) {
            Ok(written) => data = &data[written..],
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
    }
    output.flush().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_dates() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_827_696, "2000-02-29 12:34:56"),
            (1_795_446_912, "2026-11-23 15:15:12"),
            (-1, "1969-12-31 23:59:59"),
            (4_107_542_399, "2100-02-28 23:59:59"),
            (253_402_300_800, "10000-01-01 00:00:00"),
        ] {
            assert_eq!(date(seconds), text, "{seconds}");
        }
    }
}
