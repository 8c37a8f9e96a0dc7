//! `who`: holders of a guest's disks and of guestsnap's snapshots of them.

use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt;

use guestsnap::config::ClientFile;
use guestsnap::guest::{self, DiskSource};
use guestsnap::hostdev::holders::{self, Target};
use guestsnap::job::Host;
use guestsnap::snapshot::lvm::{self, LvInfo};
use guestsnap::snapshot::names::{JobTag, TAG};
use guestsnap::{Code, Error};
use serde_json::{Value, json};

use crate::host::{named, refused};
use crate::screen::{Answer, Style, problem_of};

pub fn who(name: &str, client: &ClientFile, style: Style) -> guestsnap::Result<Answer> {
    let directive = named(name)?;
    let selection = guest::select(&directive, client, &Host::default())?;
    let is_lv = |disk: &DiskSource| matches!(disk, DiskSource::Lv(_));
    let volumes = match selection.guests.iter().any(|g| g.disks.iter().any(is_lv)) {
        true => lvm::list()?,
        false => Vec::new(),
    };
    let mut text = String::new();
    let mut errors = Vec::new();
    let mut guests = Vec::new();
    for guest in &selection.guests {
        let _ = writeln!(text, "{}", style.heading(&guest.name));
        let mut disks = Vec::new();
        for disk in &guest.disks {
            let _ = writeln!(text, "  {disk}");
            let mut row = json!({ "disk": disk.to_string() });
            match target(disk, &volumes) {
                Ok(target) => row["holders"] = held(target, &mut text),
                Err(error) => {
                    errors.push(problem_of(&guest.name, &error));
                    let _ = writeln!(text, "    {} {}", style.bad("ERROR"), error.report());
                    row["error"] = json!(error.report());
                    row["code"] = json!(error.code().to_string());
                }
            }
            let mut snapshots = Vec::new();
            for (snapshot, devno) in ours(disk, &volumes) {
                let job = snapshot
                    .tags
                    .iter()
                    .find_map(|tag| JobTag::from_lvm_tag(tag));
                let of = job.map(|job| job.to_string());
                let shown = of.as_deref().unwrap_or("an unknown job");
                let _ = writeln!(text, "  {}: our snapshot, of {shown}", snapshot.name);
                snapshots.push(json!({
                    "snapshot": snapshot.name.to_string(),
                    "job": of,
                    "holders": held(Target::Device(devno), &mut text),
                }));
            }
            row["snapshots"] = json!(snapshots);
            disks.push(row);
        }
        guests.push(json!({ "name": guest.name, "disks": disks }));
    }
    errors.extend(refused(&selection, &mut text, style));
    Ok(Answer {
        text,
        json: json!({ "guests": guests, "notes": selection.notes }),
        errors,
    })
}

fn target(disk: &DiskSource, volumes: &[LvInfo]) -> guestsnap::Result<Target> {
    match disk {
        DiskSource::Lv(name) => {
            let named = |v: &&LvInfo| v.name == *name;
            let devno = volumes.iter().find(named).and_then(|v| v.devno);
            devno
                .map(Target::Device)
                .ok_or_else(|| Error::new(Code::OriginGone, format!("{disk}: it is not active")))
        }
        DiskSource::File(path) => {
            let meta = std::fs::metadata(path)
                .map_err(|error| Error::new(Code::OriginGone, disk.to_string()).because(error))?;
            Ok(Target::File {
                dev: meta.dev(),
                ino: meta.ino(),
            })
        }
        other => Err(Error::new(Code::UnsupportedDisk, other.to_string())),
    }
}

/// Existing snapshots of a volume that guestsnap made, with their devices.
fn ours<'a>(
    disk: &'a DiskSource,
    volumes: &'a [LvInfo],
) -> impl Iterator<Item = (&'a LvInfo, (u32, u32))> {
    volumes.iter().filter_map(move |snapshot| {
        let DiskSource::Lv(name) = disk else {
            return None;
        };
        let same_group = snapshot.name.vg() == name.vg();
        let is_of = same_group && snapshot.origin.as_deref() == Some(name.lv());
        let is_ours = snapshot.tags.iter().any(|tag| tag == TAG);
        let devno = snapshot.devno.filter(|_| is_of && is_ours)?;
        Some((snapshot, devno))
    })
}

/// Appends every holder of a disk to the text.
fn held(target: Target, text: &mut String) -> Value {
    let mut rows = Vec::new();
    for (on, holder) in holders::stack(target) {
        let through = match on.as_str() {
            "" => String::new(),
            on => format!(" (through {on})"),
        };
        let _ = writeln!(text, "    {holder}{through}");
        rows.push(json!({ "through": on, "holder": holder }));
    }
    if rows.is_empty() {
        text.push_str("    nobody\n");
    }
    json!(rows)
}
