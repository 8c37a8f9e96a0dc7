//! Guest names: patterns, `strip=` and `exclude=`, valid path components, one guest per name.

use std::collections::BTreeMap;

use super::selection::{Found, Selection};
use crate::config::Directive;
use crate::error::escape;
use crate::guest::{DiskSource, Guest};
use crate::{Code, Error};

/// Maximum file name length on common filesystems, in bytes.
const MAX_NAME: usize = 255;

/// Maximum names listed in an error.
const MAX_HINTS: usize = 8;

pub(super) fn list(names: &[&str]) -> String {
    let mut text = names[..names.len().min(MAX_HINTS)].join(", ");
    if names.len() > MAX_HINTS {
        text.push_str(&format!(" and {} more", names.len() - MAX_HINTS));
    }
    text
}

/// Takes the disks of guests with a definition out of the results of `lv=`, `tag=` and `image=`: there each
/// would be a guest of its own.
pub(super) fn defined_first(found: Vec<Found>, selection: &mut Selection) -> Vec<Found> {
    let mut owners: BTreeMap<DiskSource, String> = BTreeMap::new();
    for guest in found.iter().filter(|guest| !guest.alone) {
        let owner = escape(guest.name.as_bytes());
        let disks = guest.disks.iter().cloned();
        owners.extend(disks.map(|disk| (disk, owner.clone())));
    }
    let mut passed = std::mem::take(&mut selection.passed).into_iter();
    let mut is_owned = || passed.next().is_some_and(|disk| owners.contains_key(&disk));
    let refused = &mut selection.refused;
    refused.retain(|(_, error)| error.code() != Code::PassedOver || !is_owned());
    let mut kept = Vec::new();
    for guest in found {
        let owner = match guest.disks.as_slice() {
            [disk] if guest.alone => owners.get(disk).map(|owner| (disk, owner)),
            _ => None,
        };
        match owner {
            Some((disk, owner)) => selection.notes.push(format!(
                "{disk} is a disk of {owner}, whose definition is selected: it is no guest of its own"
            )),
            None => kept.push(guest),
        }
    }
    kept
}

/// Applies `strip=` and `exclude=`, and turns names into valid path components.
pub(super) fn leave_out(
    found: Vec<Found>,
    directive: &Directive,
    selection: &mut Selection,
) -> Vec<Found> {
    let mut excludes: Vec<_> = directive.exclude.iter().map(|p| (p, false)).collect();
    let mut kept = Vec::new();
    let mut left_out = Vec::new();
    let mut excluded = |name: &str, stripped: &str| {
        let mut excluded = false;
        for (pattern, hit) in &mut excludes {
            if pattern.matches(name) || pattern.matches(stripped) {
                *hit = true;
                excluded = true;
            }
        }
        excluded
    };
    // Errors of excluded guests are irrelevant.
    for errors in [&mut selection.refused, &mut selection.unread] {
        errors.retain_mut(|(name, _)| {
            let prefix = directive.strip.as_deref().unwrap_or_default();
            let stripped = name.strip_prefix(prefix).unwrap_or(name).to_owned();
            let wanted = !excluded(name, &stripped);
            *name = stripped;
            wanted
        });
    }
    for mut guest in found {
        if let Some(prefix) = &directive.strip {
            match guest.source_name.strip_prefix(prefix.as_str()) {
                Some("") => selection.notes.push(format!(
                    "strip={prefix} would leave nothing of the name {}: it was kept",
                    escape(guest.source_name.as_bytes())
                )),
                Some(rest) => guest.name = rest.to_owned(),
                None => {}
            }
        }
        if excluded(&guest.source_name, &guest.name) {
            left_out.push(escape(guest.name.as_bytes()));
            continue;
        }
        match clean_name(&guest.name) {
            Ok(name) => {
                guest.name = name;
                kept.push(guest);
            }
            Err(problem) => selection.refused.push((
                escape(guest.source_name.as_bytes()),
                Error::new(
                    Code::BadGuestDefinition,
                    format!("{}: {problem}", guest.from),
                ),
            )),
        }
    }
    if !left_out.is_empty() {
        left_out.dedup();
        let names: Vec<&str> = left_out.iter().map(String::as_str).collect();
        selection
            .notes
            .push(format!("left out by exclude=: {}", list(&names)));
    }
    for (pattern, hit) in excludes {
        if !hit {
            selection
                .notes
                .push(format!("exclude={} matches no guest", pattern.text()));
        }
    }
    kept
}

/// Turns a guest's name into a path component: slashes and control characters become `_`.
pub(super) fn clean_name(name: &str) -> std::result::Result<String, String> {
    let clean: String = name
        .chars()
        .map(|c| if c == '/' || c.is_control() { '_' } else { c })
        .collect();
    match clean.as_str() {
        "" => Err("the guest's name is empty".to_owned()),
        "." | ".." => Err(format!("\"{clean}\" cannot be a guest's name")),
        // xl and virsh would take it for an option.
        _ if clean.starts_with('-') => Err(format!(
            "the guest's name \"{clean}\" starts with a dash: change strip="
        )),
        _ if clean.len() > MAX_NAME => {
            Err(format!("the guest's name is longer than {MAX_NAME} bytes"))
        }
        _ => Ok(clean),
    }
}

/// Makes names unique. Guests with the same disks are merged; different disks under one name are an
/// error for both.
pub(super) fn unique(found: Vec<Found>, selection: &mut Selection) {
    let mut by_name: BTreeMap<&str, Vec<&Found>> = BTreeMap::new();
    for guest in &found {
        let same = by_name.entry(&guest.name).or_default();
        if !same.iter().any(|other| other.disks == guest.disks) {
            same.push(guest);
        }
    }
    let mut disks: BTreeMap<&DiskSource, &str> = BTreeMap::new();
    let mut done: Vec<&str> = Vec::new();
    for guest in &found {
        if done.contains(&guest.name.as_str()) {
            continue;
        }
        done.push(&guest.name);
        let same = &by_name[guest.name.as_str()];
        if let [_, _, ..] = same.as_slice() {
            let sources: Vec<&str> = same.iter().map(|g| g.from.as_str()).collect();
            selection.refused.push((
                guest.name.clone(),
                Error::new(
                    Code::DuplicateGuest,
                    format!("{}: {}", guest.name, sources.join(" and ")),
                ),
            ));
            continue;
        }
        for disk in &guest.disks {
            if let Some(other) = disks.insert(disk, &guest.name) {
                selection.notes.push(format!(
                    "{disk} is a disk of {other} and of {}: its files are saved twice",
                    guest.name
                ));
            }
        }
        // For a guest found by volume and by definition: the definition has its disks' names and
        // the disks that are not saved.
        let best = found
            .iter()
            .find(|other| other.name == guest.name && other.defined_here)
            .unwrap_or(guest);
        selection.guests.push(Guest {
            name: guest.name.clone(),
            disks: guest.disks.clone(),
            disk_names: best.disk_names.clone(),
            places: best.places.clone(),
            uncovered: best.uncovered.clone(),
            file: best.file.clone(),
            pve: best.pve,
            // One selector without doubt suffices.
            doubt: found
                .iter()
                .filter(|other| other.name == guest.name)
                .map(|other| other.doubt.clone())
                .min()
                .flatten(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::select;
    use super::super::testing::{host, picture};
    use super::*;
    use crate::config::ClientFile;

    #[test]
    fn test_notes() {
        let cases = [
            ("lv=vg1/db1 exclude=foo", "exclude=foo matches no guest"),
            ("lv=vg1/domu- strip=domu-", "would leave nothing"),
        ];
        for (text, expected) in cases {
            let directive = Directive::parse(text).unwrap();
            let selection = select(&directive, &ClientFile::default(), &host()).unwrap();
            assert!(
                selection.notes.iter().any(|note| note.contains(expected)),
                "{text}: {:?}",
                selection.notes
            );
        }
    }

    #[test]
    fn test_a_definition_takes_its_disks_out_of_patterns() {
        let client = ClientFile::parse(
            "[guest.web1]\ndisks = ['vg0/domu-web1', 'vg0/domu-web2']\n\
             [guest.old]\ndisks = ['vg1/db1-old']\n",
        )
        .unwrap();
        let cases: &[(&str, &[&str])] = &[
            // One name with other disks is no doubt any more.
            (
                "lv=vg0/domu-* guest=web1 strip=domu- exclude=snap",
                &["test1=vg0/domu-test1", "web1=vg0/domu-web1,vg0/domu-web2"],
            ),
            (
                "guest=web1 lv=vg0/domu-web*",
                &["web1=vg0/domu-web1,vg0/domu-web2"],
            ),
            // A volume's name excludes no guest with another name, whose disk it is.
            (
                "lv=vg0/domu-* guest=web1 exclude=domu-web2 exclude=domu-snap",
                &[
                    "domu-test1=vg0/domu-test1",
                    "web1=vg0/domu-web1,vg0/domu-web2",
                ],
            ),
            // An excluded guest's disks become no guests.
            (
                "lv=vg0/domu-* guest=web1 exclude=web1 exclude=domu-snap",
                &["domu-test1=vg0/domu-test1"],
            ),
            // A volume that the pattern passes over is saved by the definition.
            ("lv=vg1/db1* guest=old", &["db1=vg1/db1", "old=vg1/db1-old"]),
            (
                "lv=vg0/domu-web*",
                &["domu-web1=vg0/domu-web1", "domu-web2=vg0/domu-web2"],
            ),
        ];
        for (text, expected) in cases {
            let directive = Directive::parse(text).unwrap();
            let selection = select(&directive, &client, &host()).unwrap();
            assert_eq!(picture(&selection), *expected, "{text}");
            let named = selection
                .notes
                .iter()
                .any(|n| n.contains("no guest of its own"));
            assert_eq!(
                named,
                text.contains("guest=web1"),
                "{text}: {:?}",
                selection.notes
            );
        }
    }

    #[test]
    fn test_a_definition_takes_no_volume_of_another_group() {
        let mut host = host();
        let old = host
            .volumes
            .iter()
            .find(|volume| volume.name.lv() == "db1-old");
        let mut twin = old.unwrap().clone();
        twin.name = crate::hostdev::lvname::LvName::new("vg0", "db1-old").unwrap();
        host.volumes.push(twin);
        let client = ClientFile::parse("[guest.old]\ndisks = ['vg1/db1-old']\n").unwrap();
        let directive = Directive::parse("lv=vg0/db1* lv=vg1/db1* guest=old").unwrap();
        let selection = select(&directive, &client, &host).unwrap();
        let expected = ["db1=vg1/db1", "old=vg1/db1-old", "!db1-old GS-210"];
        assert_eq!(picture(&selection), expected);
    }

    #[test]
    fn test_clean_names() {
        let long = "x".repeat(256);
        let cases: &[(&str, Option<&str>)] = &[
            ("web1", Some("web1")),
            ("a/b", Some("a_b")),
            ("a\nb", Some("a_b")),
            ("", None),
            (".", None),
            ("..", None),
            ("-web1", None),
            ("...", Some("...")),
            (&long, None),
        ];
        for (name, expected) in cases {
            assert_eq!(clean_name(name).ok().as_deref(), *expected, "{name}");
        }
    }
}
