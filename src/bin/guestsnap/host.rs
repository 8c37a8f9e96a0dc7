//! `list`, `plan` and `sweep`, and what several commands need of the host's guests.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use guestsnap::config::{ClientFile, Directive, Size, SnapshotKind};
use guestsnap::error::escape;
use guestsnap::guest::{self, DiskSource, Guest, Inventory, LvKind, Selection};
use guestsnap::job::{Host, size_text};
use guestsnap::snapshot::{self, lvm};
use guestsnap::{Code, Error};
use serde_json::{Value, json};

use crate::screen::{Answer, Style};

/// Refuses who is not root.
pub fn root() -> guestsnap::Result<()> {
    match nix::unistd::geteuid().is_root() {
        true => Ok(()),
        false => Err(Error::new(Code::NotRoot, "this command")),
    }
}

/// The directive for a guest: its name, or a directive itself.
pub fn named(guest: &str) -> guestsnap::Result<Directive> {
    match guest.contains('=') {
        true => Directive::parse(guest),
        false => Directive::parse(&format!("guest='{}'", guest.replace('\'', "\\'"))),
    }
}

pub fn list(client: &ClientFile, style: Style) -> guestsnap::Result<Answer> {
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
        let _ = write!(text, "{name:<40} {:>10}  {kind}", size_text(volume.size));
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
    let problems = refused(&defined, &mut text, style);
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
pub fn refused(selection: &Selection, text: &mut String, style: Style) -> Vec<Value> {
    let mut rows = Vec::new();
    for (name, error) in &selection.refused {
        let _ = writeln!(text, "{} {name}: {}", style.bad("ERROR"), error.report());
        rows.push(
            json!({ "name": name, "error": error.report(), "code": error.code().to_string() }),
        );
    }
    for note in &selection.notes {
        let _ = writeln!(text, "note: {}", escape(note.as_bytes()));
    }
    rows
}

pub fn plan(text: &str, client: &ClientFile, style: Style) -> guestsnap::Result<Answer> {
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
                            format!("thick snapshot of {}", size_text(count))
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
            let shown = size.map(size_text).unwrap_or_default();
            let _ = write!(out, "    {:<36} {shown:>10}  {how}", disk.to_string());
            if let Some(problem) = &problem {
                let _ = write!(out, "  {} {problem}", style.bad("ERROR"));
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
    let problems = refused(&selection, &mut out, style);
    Ok(Answer {
        text: out,
        json: json!({ "guests": guests, "refused": problems, "notes": selection.notes }),
        good,
    })
}

pub fn sweep(folder: &Path, dry_run: bool) -> guestsnap::Result<Answer> {
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
