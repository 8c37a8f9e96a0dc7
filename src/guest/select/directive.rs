//! Evaluates the selectors of a directive in order.

use super::definitions::{Definitions, Syntax};
use super::doubts::doubts;
use super::images::{image_name, images};
use super::names::{clean_name, defined_first, leave_out, list, unique};
use super::policy::{Policy, volumes_and_policy};
use super::selection::{Found, Selection};
use super::volumes::Volumes;
use crate::config::{ClientFile, Directive, Selector};
use crate::guest::Inventory;
use crate::{Code, Error, Result};

/// Finds the guests that `directive` selects. Fails only if there is nothing to do: the inventory
/// cannot be queried, or nothing matches.
pub fn select(
    directive: &Directive,
    client: &ClientFile,
    inventory: &dyn Inventory,
) -> Result<Selection> {
    // A host with image files only needs no LVM.
    let volumes = match directive.selectors.as_slice() {
        selectors if selectors.iter().all(|s| matches!(s, Selector::Image(_))) => {
            Volumes::default()
        }
        _ => Volumes::ask(inventory)?,
    };
    let policy = Policy::of(client);
    let mut selection = Selection::default();
    let mut found = Vec::new();
    let mut misses = Vec::new();
    for selector in &directive.selectors {
        let before = (found.len(), selection.refused.len());
        let host = (&volumes, inventory, client);
        let sources = look(selector, directive.id, host, &mut found, &mut selection)?;
        if before == (found.len(), selection.refused.len()) {
            misses.push(match sources {
                Some(names) => unknown_guest(selector, client, names),
                None => miss(selector, &volumes),
            });
        }
    }
    if found.is_empty() && selection.refused.is_empty() {
        // May contain the reason.
        misses.extend(selection.unread.iter().map(|(_, error)| error.to_string()));
        misses.append(&mut selection.notes);
        return Err(Error::new(Code::NothingMatches, misses.join("; ")));
    }
    let miss = |text| Error::new(Code::NothingMatches, text);
    selection.misses.extend(misses.into_iter().map(miss));

    let found = defined_first(found, &mut selection);
    let found = leave_out(found, directive, &mut selection);
    if found.is_empty() && selection.refused.is_empty() {
        return Err(Error::new(
            Code::NothingMatches,
            format!("exclude= leaves nothing: {}", selection.notes.join("; ")),
        ));
    }
    let mut found = volumes_and_policy(found, &volumes, &policy, &mut selection);
    doubts(&mut found, client, &volumes, inventory);
    unique(found, &mut selection);
    Ok(selection)
}

/// Evaluates one selector. Returns the names of all guests that its definitions name, if it selects by name.
fn look(
    selector: &Selector,
    id: bool,
    (volumes, inventory, client): (&Volumes, &dyn Inventory, &ClientFile),
    found: &mut Vec<Found>,
    selection: &mut Selection,
) -> Result<Option<Vec<String>>> {
    let mut sources = Definitions::new(volumes, inventory, client);
    sources.id = id;
    let mut by_name = false;
    match selector {
        Selector::Lv { vg, pattern } => volumes.by_name(vg, pattern, found, selection),
        Selector::Tag(tag) => volumes.by_tag(tag, found, selection),
        Selector::Image(pattern) => images(inventory, pattern, found, selection)?,
        Selector::Xl(pattern) => sources.read(Syntax::Xl, pattern, None, selection),
        Selector::Libvirt(pattern) => sources.read(Syntax::Libvirt, pattern, None, selection),
        Selector::Guest(pattern) => {
            by_name = true;
            sources.by_name(pattern, client, selection)?;
        }
        Selector::Pve(pattern) => {
            by_name = true;
            sources.pve(None, pattern, client, selection)?;
            sources.settle(pattern, selection);
        }
    }
    found.append(&mut sources.found);
    Ok(by_name.then_some(sources.names))
}

/// Returns the sections `[guest.NAME]` of the client file without a definition, volume or allowed
/// image on this host whose name ends in NAME (`strip=` removes a prefix). A Plugin line may still
/// use them, with definitions elsewhere.
pub fn unknown_sections<'a>(
    client: &'a ClientFile,
    inventory: &dyn Inventory,
) -> Result<Vec<&'a str>> {
    // A section with disks is itself a definition.
    let sections = client.guest.iter().filter(|(_, s)| s.disks.is_none());
    let mut sections: Vec<&str> = sections.map(|(name, _)| name.as_str()).collect();
    if sections.is_empty() {
        return Ok(sections);
    }
    let volumes = Volumes::ask(inventory)?;
    let mut definitions = Definitions::new(&volumes, inventory, client);
    let mut selection = Selection::default();
    definitions.all(client, &mut selection)?;
    // A folder that cannot be read may define any of them.
    if let Some((_, error)) = selection.unread.pop() {
        return Err(error);
    }
    let mut names = definitions.names;
    names.append(&mut definitions.ids);
    // Unreadable definitions count by file name.
    names.extend(selection.refused.into_iter().map(|(name, _)| name));
    names.extend(volumes.by_name.into_keys().map(|name| name.lv().to_owned()));
    for pattern in client.allow.iter().flatten() {
        if pattern.text().starts_with('/') {
            let files = inventory.files(pattern)?;
            names.extend(files.iter().filter_map(|path| image_name(path)));
        }
    }
    let names: Vec<String> = names.iter().filter_map(|n| clean_name(n).ok()).collect();
    sections.retain(|section| !names.iter().any(|name| name.ends_with(section)));
    Ok(sections)
}

/// Why a selector by name found nothing; `names`: all guests that are defined.
fn unknown_guest(selector: &Selector, client: &ClientFile, mut names: Vec<String>) -> String {
    names.sort_unstable();
    names.dedup();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    match (names.is_empty(), selector) {
        (false, _) => format!("{selector} matches nothing: there are {}", list(&names)),
        (true, Selector::Pve(_)) => format!(
            "{selector} matches nothing: {} defines no guest",
            client.sources.pve.display()
        ),
        (true, _) => format!(
            "{selector} matches nothing: neither [guest.NAME] with disks nor [sources] of the client file define a guest"
        ),
    }
}

fn miss(selector: &Selector, volumes: &Volumes) -> String {
    match selector {
        Selector::Lv { vg, pattern } => {
            format!("{selector} matches nothing: {}", volumes.hints(vg, pattern))
        }
        Selector::Tag(_) => {
            let mut tags: Vec<&str> = volumes
                .by_name
                .values()
                .filter(|volume| !volume.is_ours())
                .flat_map(|volume| volume.tags.iter().map(String::as_str))
                .collect();
            tags.sort_unstable();
            tags.dedup();
            if tags.is_empty() {
                format!("{selector} matches nothing: no logical volume has a tag")
            } else {
                format!(
                    "{selector} matches nothing: there are the tags {}",
                    list(&tags)
                )
            }
        }
        _ => format!("{selector} matches nothing"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{allow, defined, host, picture};
    use super::*;

    #[test]
    fn test_selections() {
        let open = ClientFile::default();
        let cases: Vec<(&str, ClientFile, &[&str])> = vec![
            (
                "lv=vg0/domu-*",
                open.clone(),
                &[
                    "domu-test1=vg0/domu-test1",
                    "domu-web1=vg0/domu-web1",
                    "domu-web2=vg0/domu-web2",
                    "!domu-snap GS-210",
                ],
            ),
            (
                "lv=vg0/domu-* strip=domu- exclude=test* exclude=snap",
                open.clone(),
                &["web1=vg0/domu-web1", "web2=vg0/domu-web2"],
            ),
            (
                "lv=vg0/domu-* strip=domu- exclude=domu-test* exclude=web1 exclude=domu-snap",
                open.clone(),
                &["web2=vg0/domu-web2"],
            ),
            // Order of the selectors; duplicates are one guest.
            (
                "lv=vg0/domu-web2 lv=vg0/domu-web*",
                open.clone(),
                &["domu-web2=vg0/domu-web2", "domu-web1=vg0/domu-web1"],
            ),
            // Two volumes with one name.
            (
                "lv=vg0/domu-web* lv=vg1/web1 strip=domu-",
                open.clone(),
                &["web2=vg0/domu-web2", "!web1 GS-205"],
            ),
            ("tag=backup", open.clone(), &["db1=vg1/db1"]),
            // A thin snapshot in LVM's default state.
            (
                "lv=vg1/db*",
                open.clone(),
                &["db1=vg1/db1", "!db1-old GS-210"],
            ),
            ("lv=vg1/db* exclude=db1-old", open.clone(), &["db1=vg1/db1"]),
            ("lv=vg1/db1-old", open.clone(), &["db1-old=vg1/db1-old"]),
            (
                "lv=vg1/domu- strip=domu-",
                open.clone(),
                &["domu-=vg1/domu-"],
            ),
            (
                "lv=vg0/*web1 lv=vg0/r*",
                open.clone(),
                &["domu-web1=vg0/domu-web1", "!root GS-203"],
            ),
            ("lv=vg0/root", allow(&["vg0/*"]), &["!root GS-203"]),
            ("lv=vg0/root", allow(&["vg0/root"]), &["!root GS-203"]),
            (
                "lv=vg0/domu-web*",
                allow(&["vg0/domu-web1", "/srv/*"]),
                &["domu-web1=vg0/domu-web1", "!domu-web2 GS-104"],
            ),
            ("lv=vg0/domu-web1", allow(&[]), &["!domu-web1 GS-104"]),
            ("lv=vg0/domu-snap", open.clone(), &["!domu-snap GS-204"]),
            ("lv=vg0/domu-pool", open.clone(), &["!domu-pool GS-204"]),
            ("image=/srv/img/b*", open.clone(), &["!b.qcow GS-104"]),
            (
                "image=/srv/img/*",
                allow(&["/srv/img/*"]),
                &["b.qcow=/srv/img/b.qcow", "!a GS-205"],
            ),
        ];
        for (text, client, expected) in cases {
            let directive = Directive::parse(text).unwrap();
            let selection = select(&directive, &client, &host()).unwrap();
            assert_eq!(picture(&selection), expected, "{text}");
        }
    }

    #[test]
    fn test_nothing_matches_says_what_exists() {
        let cases = [
            (
                "lv=vg0/web*",
                "lv=vg0/web* matches nothing: vg0 holds domu-test1, domu-web1, domu-web2, root",
            ),
            (
                "lv=vg7/web*",
                "there is no volume group vg7; there is vg0, vg1",
            ),
            ("tag=x", "there are the tags backup"),
            ("lv=vg0/guestsnap-7-0", "matches nothing"),
            ("lv=vg0/domu-pool_*", "matches nothing"),
            (
                "lv=vg0/domu-web1 exclude=*",
                "left out by exclude=: domu-web1",
            ),
            ("image=/x/*", "image=/x/* matches nothing"),
        ];
        for (text, expected) in cases {
            let directive = Directive::parse(text).unwrap();
            let error = select(&directive, &ClientFile::default(), &host()).unwrap_err();
            assert_eq!(error.code(), Code::NothingMatches, "{text}");
            assert!(
                error.report().contains(expected),
                "{text}: {}",
                error.report()
            );
        }
    }

    /// With a note only, that selector's guests would vanish from the backup, and in accurate mode
    /// from the catalog, while the job ends OK.
    #[test]
    fn test_a_selector_of_several_that_finds_nothing_is_no_note() {
        let cases = [
            ("lv=vg1/db1 lv=vg1/x", "lv=vg1/x matches nothing: vg1 holds"),
            ("tag=backup tag=x", "there are the tags backup"),
            ("lv=vg1/db1 guest=web*", "[guest.NAME]"),
            ("lv=vg1/db1 xl=/etc/xen/*.cfg", "matches nothing"),
            ("lv=vg1/db1 image=/gone/*.img", "matches nothing"),
        ];
        for (text, expected) in cases {
            let directive = Directive::parse(text).unwrap();
            let selection = select(&directive, &ClientFile::default(), &host()).unwrap();
            assert_eq!(picture(&selection), ["db1=vg1/db1"], "{text}");
            let [miss] = selection.misses.as_slice() else {
                panic!("{text}: {:?}", selection.misses);
            };
            assert_eq!(miss.code(), Code::NothingMatches);
            assert!(miss.report().contains(expected), "{text}: {miss}");
            assert!(selection.notes.is_empty(), "{text}: {:?}", selection.notes);
        }
    }

    #[test]
    fn test_sections_that_fit_no_guest_are_named() {
        let text =
            "allow = ['vg*/*', '/srv/img/*']\n[guest.app]\ndisks = ['vg0/gone']\n".to_owned();
        // Named after a definition, volume, stripped volume, image, unread definition.
        let known = ["kvm1", "domu-web2", "web2", "b.qcow", "old"];
        let unknown = ["wbe1", "db", "x-web2"];
        let sections = known.iter().chain(&unknown);
        let text = sections.fold(text, |text, name| text + &format!("[guest.'{name}']\n"));
        let client = ClientFile::parse(&text).unwrap();
        let found = unknown_sections(&client, &defined()).unwrap();
        assert_eq!(found, ["db", "wbe1", "x-web2"]);
        let client = ClientFile::default();
        assert!(unknown_sections(&client, &defined()).unwrap().is_empty());
    }
}
