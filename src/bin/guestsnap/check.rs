//! `check`: whether a job could run here.

use std::fmt::Write as _;

use guestsnap::Error;
use guestsnap::config::ClientFile;
use guestsnap::error::escape;
use guestsnap::guest::quiesce;
use guestsnap::job::{journal_folder, rights};
use guestsnap::snapshot::{self, lvm};
use serde_json::json;

use crate::args::Arguments;
use crate::host::root;
use crate::screen::{Answer, Style};

pub fn check(arguments: &Arguments, style: Style) -> Answer {
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
            Ok(said) => (style.good("ok   "), said),
            Err(said) => (style.bad("ERROR"), said),
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
