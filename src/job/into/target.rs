//! The guest that a restore names, and the proof that its disks may be written to.

use crate::config::{ClientFile, Directive};
use crate::error::{Code, Error, Result, escape};
use crate::guest::{self, Absence, Guest, state};
use crate::job::host::Host;

/// Finds the guest that `into` names, if the client file allows it and it is off.
pub(super) fn find(into: &str, client: &ClientFile) -> Result<Guest> {
    if !client.allows_into(into) {
        let patterns = client.restore.into.iter().flatten();
        let patterns: Vec<_> = patterns.map(|pattern| pattern.text()).collect();
        let allowed = match patterns.is_empty() {
            true => "nothing".to_owned(),
            false => patterns.join(", "),
        };
        let text = format!("into={}: allowed is {allowed}", escape(into.as_bytes()));
        return Err(Error::new(Code::IntoNotAllowed, text));
    }
    let line = line(into)?;
    let client = match into.contains('/') {
        true => &client.for_into(),
        false => client,
    };
    let mut selection = guest::select(&line, client, &Host::default())?;
    if let Some((_, error)) = selection.refused.pop() {
        return Err(error);
    }
    let one = selection
        .guests
        .pop()
        .filter(|_| selection.guests.is_empty());
    let Some(guest) = one else {
        let text = format!("into={}: it names several guests", escape(into.as_bytes()));
        return Err(Error::new(Code::BadRestoreOptions, text));
    };
    let lost = guest.uncovered.iter().find(|d| d.absence == Absence::Lost);
    if let Some(disk) = lost {
        let text = format!("{}: disk {}: {}", guest.name, disk.what, disk.reason);
        return Err(Error::new(Code::TargetRefused, text));
    }
    state::check_off(&guest, client)?;
    Ok(guest)
}

/// The line that selects the target alone.
fn line(into: &str) -> Result<Directive> {
    let bad = || {
        let shown = escape(into.as_bytes());
        let text = format!("into={shown}: neither a guest's name, nor VG/LV, nor a path");
        Error::new(Code::BadRestoreOptions, text)
    };
    let plain = |c: char| !c.is_control() && !"*?[]{}\\'\"".contains(c);
    if into.is_empty() || !into.chars().all(plain) {
        return Err(bad());
    }
    let key = match into.split('/').count() {
        _ if into.starts_with('/') => "image",
        1 => "guest",
        2 => "lv",
        _ => return Err(bad()),
    };
    Directive::parse(&format!("{key}='{into}'")).map_err(|error| bad().because(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_a_target_is_one_guest_one_volume_or_one_image() {
        for (into, selector) in [
            ("web1", "guest=web1"),
            ("vg0/domu-web1", "lv=vg0/domu-web1"),
            ("/srv/a b.img", "image=/srv/a b.img"),
        ] {
            let line = line(into).unwrap();
            assert_eq!(line.selectors.len(), 1);
            assert_eq!(line.selectors[0].to_string(), selector);
        }
        for into in [
            "",
            "*",
            "web?",
            "vg0/",
            "/lv",
            "a/b/c",
            "web1' pve='1",
            "a\nb",
            "vg*/x",
        ] {
            let error = match line(into) {
                // An absolute path that is none of an image is refused by the selection.
                Ok(line) if into == "/lv" => {
                    assert_eq!(line.selectors[0].to_string(), "image=/lv");
                    continue;
                }
                found => found.unwrap_err(),
            };
            assert_eq!(error.code(), Code::BadRestoreOptions, "{into}");
        }
        let error = find("web1", &ClientFile::default()).unwrap_err();
        assert_eq!(error.code(), Code::IntoNotAllowed);
        assert!(error.report().contains("allowed is nothing"));
    }
}
