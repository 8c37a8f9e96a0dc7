//! `check`: can jobs run on this host?

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use guestsnap::config::{ClientFile, Directive};
use guestsnap::error::escape;
use guestsnap::guest::{self, quiesce};
use guestsnap::job::{self, Host, rights, size_text};
use guestsnap::snapshot::{self, lvm};
use guestsnap::{Code, Error};
use serde_json::json;

use crate::args::Arguments;
use crate::daemon;
use crate::host::{leftovers, root};
use crate::loaded::{self, PLUGIN};
use crate::screen::{Answer, Style};

/// Oldest supported kernel: major, minor.
const KERNEL: (u32, u32) = (5, 8);

/// A check's name and its result.
type Row = (&'static str, Result<String, String>);

/// A finding that the administrator must judge; not an error.
type Note = (&'static str, String);

pub fn check(arguments: &Arguments, style: Style) -> Answer {
    let mut rows: Vec<Row> = Vec::new();
    let mut notes: Vec<Note> = Vec::new();
    let report = |error: Error| error.report();
    rows.push(("root", root().map(|()| "yes".to_owned()).map_err(report)));
    let client = arguments.client();
    rows.push((
        "client file",
        match &client {
            Ok(client) => {
                let file = arguments.client_file();
                let shown = file.display();
                Ok(match file.exists() {
                    true => format!("{shown} is valid, {} guests in it", client.guest.len()),
                    false => format!("{shown} is not there: defaults"),
                })
            }
            Err(error) => Err(error.report()),
        },
    ));
    if let Ok(client) = &client {
        rows.extend(quiescing(client));
    }
    rows.push(("kernel", kernel()));
    let installed = plugin(Path::new(daemon::FILE));
    let file = installed.clone().ok().flatten();
    rows.push((
        "plugin",
        installed.map(|file| match &file {
            Some(file) => loaded::described(file),
            None => format!("not checked: there is no {}", daemon::FILE),
        }),
    ));
    let capabilities = |process: &str, whose: &str| match rights::missing(process) {
        Ok(missing) if missing.is_empty() => Ok(format!("{whose} has what it needs")),
        Ok(missing) => Err(format!("{whose} lacks {}", missing.join(", "))),
        Err(error) => Err(format!("{whose}: {error}")),
    };
    rows.push(("capabilities", capabilities("self", "this process")));
    // A systemd unit may deny the daemon rights that an administrator's shell has.
    for process in rights::daemons() {
        if let Some(file) = &file {
            rows.push(("daemon", loaded::check(&process, file)));
        }
        let whose = format!("bacula-fd (process {process})");
        rows.push(("capabilities", capabilities(&process, &whose)));
    }
    rows.extend(devices());
    rows.push((
        "lvm",
        lvm::list()
            .map(|volumes| format!("{} logical volumes", volumes.len()))
            .map_err(report),
    ));
    rows.push(("lvm settings", lvm_settings()));
    notes.extend(looked_into());
    if let Ok(client) = &client {
        disks(client, &mut rows);
        notes.extend(sections(client));
    }
    const LEFTOVERS: &str = "leftovers";
    match leftovers(arguments, true) {
        Err(error) => rows.push((LEFTOVERS, Err(error.report()))),
        Ok(report) => {
            let lines: Vec<String> = report.lines().collect();
            match report.removed.is_empty() && report.kept.is_empty() {
                true if lines.is_empty() => rows.push((LEFTOVERS, Ok("none".to_owned()))),
                true => notes.push((LEFTOVERS, lines.join("; "))),
                false => rows.push((LEFTOVERS, Err(lines.join("; ")))),
            }
        }
    }
    answer(rows, notes, style)
}

/// Whether the commands that bring guests to rest are there.
fn quiescing(client: &ClientFile) -> Vec<Row> {
    let defaults = [String::new()];
    let mut rows = Vec::new();
    for guest in client.guest.keys().chain(&defaults) {
        if let Some(rest) = client.quiesce(guest, None) {
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
    rows
}

/// Whether this process may open the devices that jobs need.
fn devices() -> impl Iterator<Item = Row> {
    rights::DEVICES.into_iter().map(|(path, what)| {
        let usable = match rights::usable(path) {
            Ok(()) => Ok(path.to_owned()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(format!("{path} is missing: load the kernel module"))
            }
            Err(error) => Err(format!("{path} cannot be opened: {error}")),
        };
        (what, usable)
    })
}

/// Sections of the client file that fit no guest. Only the Director knows every guest name, so none is an error.
fn sections(client: &ClientFile) -> Vec<Note> {
    const SECTION: &str = "section";
    match guest::unknown_sections(client, &Host::default()) {
        Ok(sections) => {
            let note = |name| {
                let text = format!(
                    "[guest.{name}] fits no definition, volume or allowed image of this host: it has no effect, unless a \
                     Plugin line selects a guest of that name by xl= or libvirt= files that [sources] does not name"
                );
                (SECTION, text)
            };
            sections.into_iter().map(note).collect()
        }
        Err(error) => vec![(SECTION, format!("not checked: {}", error.report()))],
    }
}

fn answer(rows: Vec<Row>, notes: Vec<Note>, style: Style) -> Answer {
    let failed = |(what, result): &Row| {
        let said = result.as_ref().err()?;
        Some(json!({ "check": what, "text": said }))
    };
    let errors = rows.iter().filter_map(failed).collect();
    let mut text = String::new();
    let mut list = Vec::new();
    let rows = rows.into_iter().map(|(what, result)| match result {
        Ok(said) => (style.good("ok   "), what, said, json!({ "ok": true })),
        Err(said) => (style.bad("ERROR"), what, said, json!({ "ok": false })),
    });
    let notes = notes.into_iter().map(|(what, said)| {
        let marks = json!({ "ok": true, "note": true });
        (style.warning("note "), what, said, marks)
    });
    for (mark, what, said, mut row) in rows.chain(notes) {
        let _ = writeln!(text, "{mark} {what:<14} {}", escape(said.as_bytes()));
        row["check"] = json!(what);
        row["says"] = json!(said);
        list.push(row);
    }
    Answer {
        text,
        json: json!(list),
        errors,
    }
}

/// Checks that the host's LVM does not scan guest volumes.
fn lvm_settings() -> Result<String, String> {
    let settings = lvm::host_settings().map_err(|error| error.report())?;
    if !settings.udev {
        return Err(
            "udev_sync or udev_rules is 0: nodes of snapshots may be missing when they are opened, set both to 1 in lvm.conf"
                .into(),
        );
    }
    match (settings.scan_lvs, settings.filtered) {
        (false, _) => Ok("LVM does not look into guests".into()),
        (true, true) => Err(
            "scan_lvs is 1: udev's rule for LVM knows a volume by its kernel name only, so it activates guests' volume \
             groups on this host whatever the filter says; set it to 0 in lvm.conf"
                .into(),
        ),
        (true, false) => Err(
            "scan_lvs is 1: LVM takes guests' volume groups for the host's, and snapshots of them for duplicates; \
             set it to 0 in lvm.conf"
                .into(),
        ),
    }
}

/// Volumes that LVM scans despite its filter. Some may be the host's own physical volumes.
fn looked_into() -> Option<Note> {
    let settings = lvm::host_settings().ok()?;
    if !settings.scan_lvs || !settings.filtered {
        return None;
    }
    let text = match lvm::list().and_then(|volumes| lvm::looked_into(&volumes)) {
        Ok(seen) if seen.is_empty() => return None,
        Ok(seen) => format!(
            "LVM looks into {} (scan_lvs): guests can write there what it takes for a volume group of the host. Leave \
             their volumes, and those named guestsnap-…, out with global_filter",
            seen.join(", ")
        ),
        Err(error) => format!("not checked: {}", error.report()),
    };
    Some(("lvm settings", text))
}

fn kernel() -> Result<String, String> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease");
    let release = release.map_err(|error| error.to_string())?;
    let shown = format!("Linux {}", release.trim());
    match version(&release) {
        Some(version) if version < KERNEL => Err(Error::new(Code::KernelTooOld, shown).report()),
        _ => Ok(shown),
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The file that the daemon will load as the plugin; `None` without a daemon's configuration.
fn plugin(file: &Path) -> Result<Option<PathBuf>, String> {
    let shown = file.display();
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(None);
        }
        Err(error) => return Err(format!("{shown}: {error}")),
    };
    let Some(folder) = daemon::setting(&text, "plugindirectory") else {
        return Err(format!(
            "{shown} has no Plugin Directory: set it to the folder of {PLUGIN} and restart bacula-fd"
        ));
    };
    let plugin = Path::new(folder).join(PLUGIN);
    // Bacula does not load plugins through symbolic links.
    match plugin.symlink_metadata().is_ok_and(|found| found.is_file()) {
        true => Ok(Some(plugin)),
        false => Err(format!(
            "{} is not there as a regular file: install it in the Plugin Directory of {shown}, and restart bacula-fd",
            plugin.display()
        )),
    }
}

/// Checks that all guests defined on this host can be snapshotted at the same time.
fn disks(client: &ClientFile, rows: &mut Vec<Row>) {
    let mut try_all = || -> guestsnap::Result<()> {
        let directive = Directive::parse("guest=*")?;
        let selection = guest::select(&directive, client, &Host::default())?;
        for (name, error) in &selection.refused {
            rows.push(("guest", Err(format!("{name}: {}", error.report()))));
        }
        for miss in &selection.misses {
            rows.push(("guest", Err(miss.report())));
        }
        let mut owners = Vec::new();
        let mut requests = Vec::new();
        for guest in &selection.guests {
            let of_guest = job::requests(guest, &directive, client);
            owners.extend(of_guest.iter().map(|_| &guest.name));
            requests.push(of_guest);
        }
        let (planned, rooms) = snapshot::plan(&requests)?;
        let count = planned.len();
        let mut good = 0;
        for (owner, planned) in owners.iter().zip(planned) {
            match planned {
                Ok(_) => good += 1,
                Err(error) => rows.push(("guest", Err(format!("{owner}: {}", error.report())))),
            }
        }
        let guests = selection.guests.len();
        let text = format!("{good} of {count} disks of {guests} defined guests can be snapshotted");
        rows.push(("guests", if good == count { Ok(text) } else { Err(text) }));
        for room in &rooms {
            let (needed, free) = (size_text(room.needed), size_text(room.free));
            let text = format!(
                "{}: their snapshots need {needed}, {free} are free",
                room.vg
            );
            let text = room.check_in_turn().map(|waits| match waits {
                true => format!("{text}: guests wait for those before them"),
                false => text,
            });
            rows.push(("room", text.map_err(|e| e.report())));
        }
        Ok(())
    };
    match try_all() {
        Ok(()) => {}
        // A host that selects guests by lv= or image= defines none.
        Err(error) if error.code() == Code::NothingMatches => {
            rows.push(("guests", Ok("none are defined on this host".to_owned())));
        }
        Err(error) => rows.push(("guests", Err(error.report()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_kernel_versions() {
        assert_eq!(version("6.12.43+deb13-amd64\n"), Some((6, 12)));
        assert!(version("5.4.0").unwrap() < KERNEL);
        assert!(version("6.1.0").unwrap() > KERNEL);
        assert_eq!(version("x"), None);
    }

    #[test]
    fn test_what_is_worth_a_look_is_not_shown_as_ok() {
        let rows = || vec![("kernel", Ok("Linux".to_owned()))];
        let notes = || vec![("section", "[guest.x] fits nothing".to_owned())];
        let found = answer(rows(), notes(), Style::with(false));
        assert!(found.errors.is_empty());
        let lines: Vec<&str> = found.text.lines().collect();
        assert!(
            lines[0].contains("ok   ") && lines[0].contains("kernel"),
            "{lines:?}"
        );
        assert!(
            lines[1].contains("note ") && lines[1].contains("section"),
            "{lines:?}"
        );
        let expected = json!([
            { "check": "kernel", "ok": true, "says": "Linux" },
            { "check": "section", "ok": true, "note": true, "says": "[guest.x] fits nothing" },
        ]);
        assert_eq!(found.json, expected);
        let bad = vec![("kernel", Err("too old".to_owned()))];
        let expected = [json!({ "check": "kernel", "text": "too old" })];
        assert_eq!(answer(bad, notes(), Style::with(false)).errors, expected);
    }

    #[test]
    fn test_the_plugin_is_where_the_daemon_looks() {
        let dir = tempfile::tempdir().unwrap();
        let (file, so) = (dir.path().join("fd.conf"), dir.path().join(PLUGIN));
        assert_eq!(plugin(&file), Ok(None));
        std::fs::write(&file, "FileDaemon {}").unwrap();
        assert!(
            plugin(&file)
                .unwrap_err()
                .contains("has no Plugin Directory")
        );
        std::fs::write(&file, format!("PluginDirectory = {}", dir.path().display())).unwrap();
        assert!(plugin(&file).unwrap_err().contains("is not there"));
        std::fs::write(&so, "").unwrap();
        assert_eq!(plugin(&file), Ok(Some(so)));
    }
}
