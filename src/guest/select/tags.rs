//! Tags that group volumes: Ganeti sets `originstname+INSTANCE` on all volumes of an instance.

use std::collections::BTreeMap;

use super::selection::{Found, Selection};
use super::volumes::{disk, unsupported};
use crate::config::INSTANCE_TAG;
use crate::guest::{LvCandidate, LvKind, definition};
use crate::{Code, Error};

/// Whether a volume's tag is the wanted one. `originstname+*` means all instances.
pub(super) fn matches(wanted: &str, tag: &str) -> bool {
    match wanted.strip_suffix('*') {
        Some(start) => tag.len() > start.len() && tag.starts_with(start),
        None => tag == wanted,
    }
}

/// The instance's name, if `wanted` means a volume as one of an instance.
pub(super) fn instance<'a>(volume: &'a LvCandidate, wanted: &str) -> Option<&'a str> {
    let tag = volume.tags.iter().find(|tag| matches(wanted, tag))?;
    tag.strip_prefix(INSTANCE_TAG)
        .filter(|name| !name.is_empty())
}

/// The number in Ganeti's name of a disk: `UUID.disk1_data` (DRBD) or `UUID.disk1`.
fn number(lv: &str) -> Option<u32> {
    let lv = lv.strip_suffix("_data").unwrap_or(lv);
    let (_, number) = lv.rsplit_once(".disk")?;
    number.parse().ok()
}

/// Instances with their volumes.
#[derive(Default)]
pub(super) struct Instances<'a>(BTreeMap<&'a str, Vec<&'a LvCandidate>>);

impl<'a> Instances<'a> {
    pub(super) fn add(&mut self, name: &'a str, volume: &'a LvCandidate) {
        self.0.entry(name).or_default().push(volume);
    }

    /// Adds a guest for each instance, with its disks in order.
    pub(super) fn find(self, found: &mut Vec<Found>, selection: &mut Selection) {
        for (name, volumes) in self.0 {
            let volumes = match ordered(name, volumes) {
                Ok(volumes) => volumes,
                Err(error) => {
                    selection.refused.push((name.to_owned(), error));
                    continue;
                }
            };
            let numbered = volumes.iter().enumerate();
            let (other, disks): (Vec<_>, Vec<_>) =
                numbered.partition(|(_, volume)| volume.kind == LvKind::Other);
            for (_, volume) in other {
                let whole = format!("{name}: {}", volume.name);
                let error = unsupported(&whole, volume.kind);
                selection.refused.push((name.to_owned(), error));
            }
            if !disks.is_empty() {
                found.push(guest(name, &disks));
            }
        }
    }
}

/// The volumes in the order of the guest's disks.
fn ordered<'a>(
    name: &str,
    mut volumes: Vec<&'a LvCandidate>,
) -> Result<Vec<&'a LvCandidate>, Error> {
    volumes.sort_by_key(|volume| (number(volume.name.lv()), &volume.name));
    let unsure = |what: String| Err(Error::new(Code::UnsupportedDisk, format!("{name}: {what}")));
    // The order of the disks names them in the guest.
    if let [first, _, ..] = volumes.as_slice() {
        if number(first.name.lv()).is_none() {
            return unsure(format!("the name of {} has no number", first.name));
        }
    }
    for pair in volumes.windows(2) {
        if number(pair[0].name.lv()) == number(pair[1].name.lv()) {
            let (one, other) = (&pair[0].name, &pair[1].name);
            return unsure(format!(
                "{one} and {other} are the same disk by their names"
            ));
        }
    }
    Ok(volumes)
}

/// A guest of disks with their numbers.
fn guest(name: &str, disks: &[(usize, &&LvCandidate)]) -> Found {
    let names = disks.iter().map(|(n, _)| definition::names_by_order(*n));
    Found {
        source_name: name.to_owned(),
        name: name.to_owned(),
        disks: disks.iter().map(|(_, volume)| disk(volume)).collect(),
        disk_names: names.collect(),
        places: vec![None; disks.len()],
        uncovered: Vec::new(),
        from: format!("tag {INSTANCE_TAG}{name}"),
        file: None,
        pve: None,
        alone: false,
        defined_here: true,
        doubt: None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::select;
    use super::super::testing::{picture, volume};
    use crate::config::{ClientFile, Directive};
    use crate::guest::{FixedInventory, LvKind, definition};

    /// Otherwise the files of the disk would count as deleted, and the other disk have its name.
    #[test]
    fn test_an_instance_misses_a_disk_that_is_being_converted() {
        let tagged = |lv: &str, kind| {
            let mut volume = volume("xenvg", lv);
            volume.tags = vec!["originstname+web1".to_owned()];
            volume.kind = kind;
            volume
        };
        let host = FixedInventory {
            volumes: vec![
                tagged("a.disk0", LvKind::Other),
                tagged("b.disk1", LvKind::Plain),
            ],
            ..FixedInventory::default()
        };
        let directive = Directive::parse("tag=originstname+*").unwrap();
        let selection = select(&directive, &ClientFile::default(), &host).unwrap();
        let expected = ["web1=xenvg/b.disk1", "!web1 GS-204"];
        assert_eq!(picture(&selection), expected);
        assert_eq!(
            selection.guests[0].disk_names,
            [definition::names_by_order(1)]
        );
    }

    #[test]
    fn test_volumes_of_an_instance_are_one_guest() {
        let tagged = |lv: &str, tag: &str| {
            let mut volume = volume("xenvg", lv);
            volume.tags = vec![tag.to_owned()];
            if let Some(stem) = lv.strip_suffix("_meta") {
                volume.metadata_of = Some(format!("{stem}_data"));
            }
            volume
        };
        let host = FixedInventory {
            volumes: vec![
                tagged("b.disk10_data", "originstname+web1.example"),
                tagged("b.disk10_meta", "originstname+web1.example"),
                tagged("c.disk2_data", "originstname+web1.example"),
                tagged("c.disk2_meta", "originstname+web1.example"),
                tagged("d.disk0", "originstname+db1"),
                tagged("e.disk0", "originstname+twice"),
                tagged("f.disk0", "originstname+twice"),
                tagged("g.disk0", "originstname+odd"),
                tagged("g.swap", "originstname+odd"),
                tagged("old", "originstname+alone"),
                tagged("x1", "backup"),
                tagged("x2", "backup"),
                // A guest's disk by all that is known.
                volume("xenvg", "plain_meta"),
            ],
            ..FixedInventory::default()
        };
        let cases: &[(&str, &[&str])] = &[
            (
                "tag=originstname+web1.example",
                &["web1.example=xenvg/c.disk2_data,xenvg/b.disk10_data"],
            ),
            (
                "tag=originstname+*",
                &[
                    "alone=xenvg/old",
                    "db1=xenvg/d.disk0",
                    "web1.example=xenvg/c.disk2_data,xenvg/b.disk10_data",
                    "!odd GS-204",
                    "!twice GS-204",
                ],
            ),
            ("tag=originstname+* exclude=* lv=xenvg/x1", &[]),
            ("tag=backup", &["x1=xenvg/x1", "x2=xenvg/x2"]),
            (
                "lv=xenvg/{b,plain}*",
                &[
                    "b.disk10_data=xenvg/b.disk10_data",
                    "plain_meta=xenvg/plain_meta",
                ],
            ),
        ];
        let run = |text: &str| {
            let directive = Directive::parse(text).unwrap();
            select(&directive, &ClientFile::default(), &host)
        };
        for (text, expected) in cases {
            if expected.is_empty() {
                assert!(run(text).is_err(), "{text}");
                continue;
            }
            assert_eq!(picture(&run(text).unwrap()), *expected, "{text}");
        }
        let notes = run("tag=originstname+web1.example").unwrap().notes;
        let text = "left out, metadata of DRBD: xenvg/b.disk10_meta, xenvg/c.disk2_meta";
        assert_eq!(notes, [text]);
        // Nothing but metadata.
        let error = run("lv=xenvg/b.disk10_meta").unwrap_err().report();
        assert!(error.contains("metadata of DRBD"), "{error}");
    }
}
