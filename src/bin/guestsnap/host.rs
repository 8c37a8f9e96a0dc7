//! `list`, `plan`, `sweep`, and helpers that other commands share.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use guestsnap::config::{ClientFile, Directive, When};
use guestsnap::error::escape;
use guestsnap::guest::{self, Absence, Guest, Inventory, LvKind, Selection, quiesce};
use guestsnap::job::{self, Host, journal_folder, size_text};
use guestsnap::snapshot::{self, Standing, SweepReport, lvm};
use guestsnap::{Code, Error};
use serde_json::{Value, json};

use crate::args::Arguments;
use crate::screen::{Answer, Style, problem, problem_of};

/// Fails unless run as root.
pub fn root() -> guestsnap::Result<()> {
    match nix::unistd::geteuid().is_root() {
        true => Ok(()),
        false => Err(Error::new(Code::NotRoot, "this command")),
    }
}

/// Parses a directive, with or without the plugin's name before it.
fn directive(text: &str) -> guestsnap::Result<Directive> {
    let text = text.trim_start();
    Directive::parse(text.strip_prefix("guestsnap:").unwrap_or(text))
}

/// Returns the directive for a guest name, or parses a directive.
pub fn named(guest: &str) -> guestsnap::Result<Directive> {
    match guest.contains('=') {
        true => directive(guest),
        false => Directive::parse(&format!("guest='{}'", guest.replace('\'', "\\'"))),
    }
}

pub fn list(client: &ClientFile, style: Style) -> guestsnap::Result<Answer> {
    let known: BTreeMap<String, _> = lvm::list()?
        .into_iter()
        .map(|lv| (lv.name.to_string(), lv))
        .collect();
    let mut volumes = Host::default().volumes()?;
    volumes.sort_by(|a, b| a.name.cmp(&b.name));
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
            LvKind::Other => "volume of another kind",
        };
        let kind = if volume.is_ours() {
            "snapshot of guestsnap's"
        } else {
            kind
        };
        let name = volume.name.to_string();
        let standing = known.get(&name).map_or(Standing::Free, snapshot::standing);
        let metadata = volume.metadata_of.as_ref();
        let in_use = match &standing {
            _ if metadata.is_some() => metadata.map(|data| format!("metadata of DRBD for {data}")),
            Standing::Refused(why) => Some(why.clone()),
            Standing::Free | Standing::BelowDrbd(_) => None,
        };
        let _ = write!(text, "{name:<40} {:>10}  {kind}", size_text(volume.size));
        if let Some(origin) = &volume.origin {
            let _ = write!(text, " of {origin}");
        }
        if !volume.tags.is_empty() {
            let _ = write!(text, ", tags {}", volume.tags.join(" "));
        }
        if let Some(reason) = &in_use {
            let _ = write!(text, ", not for backups: {reason}");
        } else if let Standing::BelowDrbd(place) = &standing {
            let _ = write!(text, ", {place}");
        }
        text.push('\n');
        rows.push(json!({
            "vg": volume.name.vg().as_str(),
            "lv": volume.name.lv(),
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
    let defined = match guest::select(&Directive::parse("guest=*")?, client, &Host::default()) {
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
    let errors = refused(&defined, &mut text, style);
    let guests: Vec<Value> = defined.guests.iter().map(guest_json).collect();
    Ok(Answer {
        text,
        json: json!({ "volumes": rows, "guests": guests, "notes": defined.notes }),
        errors,
    })
}

fn guest_json(guest: &Guest) -> Value {
    let uncovered = guest
        .uncovered
        .iter()
        .map(|disk| json!({ "disk": disk.what, "reason": disk.reason, "expected": disk.absence != Absence::Lost }));
    json!({
        "name": guest.name,
        "disks": guest.disks.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "not_covered": uncovered.collect::<Vec<_>>(),
    })
}

/// Appends the refused, unmatched and noted items to the text; returns the errors. Without any, the
/// selection is whole.
pub fn refused(selection: &Selection, text: &mut String, style: Style) -> Vec<Value> {
    let mut rows = Vec::new();
    for (name, error) in &selection.refused {
        let _ = writeln!(text, "{} {name}: {}", style.bad("ERROR"), error.report());
        rows.push(problem_of(name, error));
    }
    for miss in &selection.misses {
        let _ = writeln!(text, "{} {}", style.bad("ERROR"), miss.report());
        rows.push(problem(miss));
    }
    for (name, error) in &selection.unread {
        let _ = writeln!(text, "{} {}", style.warning("warning:"), error.report());
        rows.push(problem_of(name, error));
    }
    for note in &selection.notes {
        let _ = writeln!(text, "note: {}", escape(note.as_bytes()));
    }
    rows
}

pub fn plan(text: &str, client: &ClientFile, style: Style) -> guestsnap::Result<Answer> {
    let directive = directive(text)?;
    let selection = guest::select(&directive, client, &Host::default())?;
    let requests = |guest| job::requests(guest, &directive, client);
    let all: Vec<_> = selection.guests.iter().map(requests).collect();
    let (planned, rooms) = snapshot::plan(&all)?;
    let mut planned = planned.into_iter();
    let mut errors = Vec::new();
    let mut out = String::new();
    let mut guests = Vec::new();
    for guest in &selection.guests {
        let _ = writeln!(out, "{}/{}", directive.path, style.heading(&guest.name));
        let mut row = guest_json(guest);
        let mut disks = Vec::new();
        for (disk, planned) in guest.disks.iter().zip(planned.by_ref()) {
            let disk = disk.to_string();
            disks.push(match planned {
                Ok(planned) => {
                    let (size, snapshot) = (planned.size, planned.snapshot);
                    let shown = size_text(size);
                    let _ = writeln!(out, "    {disk:<36} {shown:>10}  snapshot: {snapshot}");
                    json!({ "disk": disk, "bytes": size, "snapshot": snapshot })
                }
                Err(error) => {
                    errors.push(problem_of(&guest.name, &error));
                    let report = error.report();
                    let _ = writeln!(out, "    {disk}: {} {report}", style.bad("ERROR"));
                    json!({ "disk": disk, "error": report, "code": error.code().to_string() })
                }
            });
        }
        for disk in &guest.uncovered {
            let said = format!("not covered: {}: {}", disk.what, disk.reason);
            if disk.absence == Absence::Lost {
                errors.push(json!({ "guest": guest.name, "text": said }));
                let _ = writeln!(out, "    {} {said}", style.bad("ERROR"));
            } else {
                let _ = writeln!(out, "    {said}");
            }
        }
        at_rest(guest, client, &mut row, &mut out);
        row["path"] = json!(format!("{}/{}", directive.path, guest.name));
        row["disks"] = json!(disks);
        guests.push(row);
    }
    let mut room = Vec::new();
    for group in &rooms {
        let (row, error) = room_of(group, directive.snapshots, &mut out, style);
        errors.extend(error);
        room.push(row);
    }
    errors.extend(refused(&selection, &mut out, style));
    Ok(Answer {
        text: out,
        json: json!({ "guests": guests, "room": room, "notes": selection.notes }),
        errors,
    })
}

/// How a guest is brought to rest, or why it is not.
fn at_rest(guest: &Guest, client: &ClientFile, row: &mut Value, out: &mut String) {
    let rest = quiesce::of(guest, client);
    let doubt = rest.as_ref().and_then(|rest| quiesce::refusal(guest, rest));
    if let Some(error) = &doubt {
        let _ = writeln!(out, "    not at rest: {}", error.report());
        row["not_at_rest"] = json!(error.report());
    }
    if let Some(rest) = rest.filter(|_| doubt.is_none()) {
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
}

/// The room that snapshots need in a group, and the problem if it is not there.
fn room_of(
    group: &snapshot::Room,
    when: When,
    out: &mut String,
    style: Style,
) -> (Value, Option<Value>) {
    let (needed, free) = (size_text(group.needed), size_text(group.free));
    let _ = writeln!(
        out,
        "{}: snapshots need {needed}, {free} are free",
        group.vg
    );
    let mut row = json!({ "vg": group.vg, "needed": group.needed, "free": group.free });
    let checked = match when {
        When::All => group.check().map(|()| false),
        When::Auto | When::Turn => group.check_in_turn(),
    };
    if checked.as_ref().is_ok_and(|waits| *waits) {
        let _ = writeln!(out, "    guests wait until those before them are released");
        row["waits"] = json!(true);
    }
    let mut failed = None;
    if let Err(error) = checked {
        failed = Some(problem(&error));
        let _ = writeln!(out, "{} {}", style.bad("ERROR"), error.report());
        row["error"] = json!(error.report());
        row["code"] = json!(error.code().to_string());
    }
    (row, failed)
}

/// Lists leftovers of ended jobs; removes them unless `dry_run` is set.
pub fn leftovers(arguments: &Arguments, dry_run: bool) -> guestsnap::Result<SweepReport> {
    let journals = journal_folder(arguments.working_dir());
    if journals.is_dir() {
        return snapshot::sweep(&journals, dry_run);
    }
    if let Some(folder) = arguments.working_dir.as_ref().filter(|dir| !dir.is_dir()) {
        let what = format!(
            "--working-dir {}: there is no such folder; it is the Working Directory of bacula-fd.conf",
            escape(folder.as_os_str().as_encoded_bytes())
        );
        return Err(Error::new(Code::JournalFailed, what));
    }
    // No job has run here, or the directory is lost. The boot unit runs on every host.
    let mut report = snapshot::sweep_by_tags(dry_run)?;
    report.notes.push(format!(
        "there is no {}: volumes were looked for by their tags alone",
        journals.display()
    ));
    Ok(report)
}

pub fn sweep(arguments: &Arguments, dry_run: bool) -> guestsnap::Result<Answer> {
    let report = leftovers(arguments, dry_run)?;
    let mut text = String::new();
    for line in report.lines() {
        let _ = writeln!(text, "{}", escape(line.as_bytes()));
    }
    if text.is_empty() {
        text.push_str("nothing was left behind\n");
    }
    Ok(Answer {
        text,
        json: json!({
            "removed": report.removed,
            "kept": report.kept,
            "alike": report.alike,
            "notes": report.notes,
            "dry_run": report.dry_run,
        }),
        errors: report
            .kept
            .iter()
            .map(|kept| json!({ "text": kept }))
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_a_working_directory_that_is_named_has_to_exist() {
        let dir = tempfile::tempdir().unwrap();
        let leftovers = |folder: &std::path::Path| {
            let words = ["--working-dir".into(), folder.into(), "sweep".into()];
            leftovers(&Arguments::parse(words).unwrap(), true)
        };
        let error = leftovers(&dir.path().join("none")).unwrap_err();
        assert_eq!(error.code(), Code::JournalFailed);
        assert!(error.report().contains("no such folder"), "{error}");
        // A directory without journals is accepted and stays empty. Without root, LVM cannot be
        // queried.
        match leftovers(dir.path()) {
            Ok(report) => assert!(report.notes[0].contains("by their tags alone")),
            Err(error) => assert_ne!(error.code(), Code::JournalFailed),
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
