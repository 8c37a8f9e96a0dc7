//! Checks that the disks under a name belong to the guest that a command would address.

use super::definitions::Definitions;
use super::selection::{Found, Selection};
use super::volumes::Volumes;
use crate::config::ClientFile;
use crate::error::escape;
use crate::guest::Inventory;

/// A Plugin line chooses names: `strip=domu-x` turns the volume `domu-xweb1` into `web1`. Before a
/// command runs for the guest of that name, the host itself must confirm that the disks are that
/// guest's: by a definition or, if none has that name, by the name of the volume or file.
pub(super) fn doubts(
    found: &mut [Found],
    client: &ClientFile,
    volumes: &Volumes,
    inventory: &dyn Inventory,
) {
    let mut sources = None;
    for guest in found {
        if !client.quiesce(&guest.name, None).is_some_and(|q| q.by_name) {
            continue;
        }
        let domain = client.domain(&guest.name);
        let means = |name: &str| name == guest.name || name == domain;
        if guest.defined_here && means(&guest.source_name) {
            continue;
        }
        let (definitions, read, aside) = sources.get_or_insert_with(|| {
            let mut all = Definitions::new(volumes, inventory, client);
            let mut aside = Selection::default();
            let read = all.all(client, &mut aside);
            (all, read, aside)
        });
        let owns = |other: &Found| {
            means(&other.source_name) && guest.disks.iter().all(|disk| other.disks.contains(disk))
        };
        if definitions.found.iter().any(owns) {
            continue;
        }
        // An unreadable definition with this file name may be the guest's.
        let mut bad = aside.refused.iter().filter(|(name, _)| means(name));
        let bad = bad.next().map(|(_, error)| error);
        let why = match read.as_ref().err().or(bad) {
            Some(error) => error.with_causes(),
            None if definitions.names.iter().any(|name| means(name)) => {
                "the definition of that name has other disks".to_owned()
            }
            None if guest.source_name == guest.name => continue,
            None => format!(
                "that name was made of {}, and no definition says so: name its disks in [guest.{}]",
                escape(guest.source_name.as_bytes()),
                guest.name
            ),
        };
        guest.doubt = Some(format!("{} may not be its disk: {why}", guest.from));
    }
}

#[cfg(test)]
mod tests {
    use super::super::select;
    use super::super::testing::{defined, host, volume};
    use super::*;
    use crate::config::Directive;
    use crate::guest::FixedInventory;

    /// The Director sets `strip=`; it must not choose the guest to freeze.
    #[test]
    fn test_only_the_host_says_whose_disks_they_are() {
        let rest = "quiesce = 'xl-pause'\n";
        let section = format!("[guest.web1]\n{rest}");
        let defaults = format!("[defaults]\n{rest}");
        let disks = |names: &str| format!("{section}disks = {names}\n");
        let mut plain = host();
        plain.volumes.push(volume("vg0", "domu-xweb1"));
        let mut with_definitions = defined();
        with_definitions.volumes.push(volume("vg0", "domu-xweb1"));
        with_definitions.volumes.push(volume("vg0", "old"));
        // Host, client file, Plugin line, expected doubt.
        type Case<'a> = (&'a FixedInventory, &'a str, &'a str, Option<&'a str>);
        let cases: &[Case<'_>] = &[
            // Only the volume's own name tells whose disk it is.
            (&plain, &section, "lv=vg1/web1", None),
            (
                &plain,
                &section,
                "lv=vg0/domu-web1 strip=domu-",
                Some("[guest.web1]"),
            ),
            (
                &plain,
                &defaults,
                "lv=vg0/domu-web1 strip=domu-",
                Some("made of domu-web1"),
            ),
            (
                &plain,
                &section,
                "lv=vg0/domu-xweb1 strip=domu-x",
                Some("made of domu-xweb1"),
            ),
            // The client file tells.
            (
                &plain,
                &disks("['vg0/domu-web1']"),
                "lv=vg0/domu-web1 strip=domu-",
                None,
            ),
            (
                &plain,
                &disks("['vg0/domu-web1']"),
                "lv=vg0/domu-xweb1 strip=domu-x",
                Some("other disks"),
            ),
            (
                &plain,
                &disks("['vg0/domu-web1']"),
                "lv=vg1/web1",
                Some("other disks"),
            ),
            (&plain, &disks("['vg0/domu-web1']"), "guest=web1", None),
            // A definition tells, by xl's name of the guest.
            (
                &with_definitions,
                &section,
                "lv=vg0/domu-web1 strip=domu-",
                None,
            ),
            (
                &with_definitions,
                &defaults,
                "lv=vg0/domu-web1 strip=domu-",
                None,
            ),
            (
                &with_definitions,
                &section,
                "lv=vg0/domu-xweb1 strip=domu-x",
                Some("other disks"),
            ),
            (&with_definitions, &section, "guest=web1", None),
            (
                &with_definitions,
                "[guest.x]\nquiesce = 'xl-pause'\ndomain = 'web1'\n",
                "xl=/etc/xen/web1.cfg strip=domu-",
                None,
            ),
            // `ne` is no guest's name here.
            (
                &with_definitions,
                &defaults,
                "guest=gone strip=go",
                Some("made of gone"),
            ),
            (
                &with_definitions,
                "[guest.ne]\nquiesce = 'xl-pause'\ndomain = 'gone'\n",
                "guest=gone strip=go",
                None,
            ),
            // The definition of that name is unreadable and may have other disks.
            (
                &with_definitions,
                &defaults,
                "lv=vg0/old",
                Some("old.cfg: line 1"),
            ),
            (
                &with_definitions,
                "[guest.domu-web2]\nquiesce = 'xl-pause'\ndomain = 'old'\n",
                "lv=vg0/domu-web2",
                Some("old.cfg: line 1"),
            ),
            (
                &with_definitions,
                "[guest.old]\nquiesce = 'xl-pause'\ndisks = ['vg0/old']\n",
                "lv=vg0/old",
                None,
            ),
            // Another guest's definition is irrelevant.
            (&with_definitions, &defaults, "lv=vg0/domu-web2", None),
            // Without commands, no definitions are read.
            (&plain, "", "lv=vg0/domu-xweb1 strip=domu-x", None),
        ];
        for (host, client, text, expected) in cases {
            let directive = Directive::parse(text).unwrap();
            let client = ClientFile::parse(client).unwrap();
            let selection = select(&directive, &client, *host).unwrap();
            let doubt = selection.guests[0].doubt.as_deref();
            match expected {
                None => assert_eq!(doubt, None, "{text}"),
                Some(part) => assert!(doubt.is_some_and(|d| d.contains(part)), "{text}: {doubt:?}"),
            }
        }
    }
}
