//! Answers to `.query` (Bacula 11 and later): which guests and disks a Plugin line selects.

use std::time::{Duration, Instant};

use super::aside::{self, Aside};
use super::host::Host;
use super::prepare::client_file;
use crate::config::{ClientFile, Directive};
use crate::error::{Code, Error, Result, escape};
use crate::guest::{self, Selection};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Lines `key=value` for a Plugin line, without line ends; an error is one of them. Selects as a job
/// does, with the client file's `allow`, and touches no disk.
pub fn answer(line: &[u8], parameter: &[u8]) -> Vec<String> {
    let (line, parameter) = (line.to_vec(), parameter.to_vec());
    in_time(move || asked(&line, &parameter))
        .unwrap_or_else(|error| vec![format!("error={}", error.report())])
}

/// LVM may wait for a disk that does not answer, and a query cannot be cancelled.
fn in_time(ask: impl FnOnce() -> Result<Vec<String>> + Send + 'static) -> Result<Vec<String>> {
    let (mut aside, began) = (Aside::default(), Instant::now());
    let late = move || began.elapsed() >= PATIENCE;
    let answer = aside.run(late, ask, drop)?;
    aside::join(aside.stop().into_iter().collect(), late);
    answer.unwrap_or_else(|| {
        let what = format!(
            ".query: no answer of this host within {} s",
            PATIENCE.as_secs()
        );
        Err(Error::new(Code::DiskStalled, what))
    })
}

fn asked(line: &[u8], parameter: &[u8]) -> Result<Vec<String>> {
    let rows: fn(&Selection) -> Vec<String> = match parameter {
        b"guests" => guests,
        b"disks" => disks,
        b"version" => return Ok(vec![format!("version={}", env!("CARGO_PKG_VERSION"))]),
        other => {
            let what = format!(
                "parameter \"{}\" is not known: there are guests, disks and version",
                escape(other)
            );
            return Err(Error::new(Code::BadDirective, what));
        }
    };
    let directive = Directive::from_line(line)?;
    let selection = guest::select(
        &directive,
        &ClientFile::load(&client_file())?,
        &Host::default(),
    )?;
    let mut lines = rows(&selection);
    let mut not_allowed = 0;
    for (name, error) in &selection.refused {
        match error.code() {
            // Names that the client file does not allow are not shown.
            Code::NotAllowed => not_allowed += 1,
            _ => lines.push(format!(
                "refused={}: {}",
                escape(name.as_bytes()),
                error.report()
            )),
        }
    }
    lines.extend(
        selection
            .misses
            .iter()
            .chain(selection.unread.iter().map(|(_, error)| error))
            .map(|error| format!("refused={}", error.report())),
    );
    if not_allowed > 0 {
        lines.push(format!("not_allowed={not_allowed}"));
    }
    Ok(lines)
}

fn guests(selection: &Selection) -> Vec<String> {
    let name = |guest: &guest::Guest| format!("guest={}", escape(guest.name.as_bytes()));
    selection.guests.iter().map(name).collect()
}

fn disks(selection: &Selection) -> Vec<String> {
    let mut lines = Vec::new();
    for guest in &selection.guests {
        let name = escape(guest.name.as_bytes());
        for disk in &guest.disks {
            lines.push(format!(
                "disk={name}: {}",
                escape(disk.to_string().as_bytes())
            ));
        }
        for disk in &guest.uncovered {
            let (what, why) = (escape(disk.what.as_bytes()), escape(disk.reason.as_bytes()));
            lines.push(format!("not_covered={name}: {what}: {why}"));
        }
    }
    lines
}
