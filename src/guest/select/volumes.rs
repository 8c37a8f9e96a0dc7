//! Logical volumes of the host: by name, by tag, and the kinds used as guest disks.

use std::collections::BTreeMap;

use super::names::list;
use super::selection::{Found, Selection};
use super::tags::{self, Instances};
use crate::config::pattern::Pattern;
use crate::guest::definition;
use crate::guest::{DiskSource, Inventory, LvCandidate, LvKind};
use crate::hostdev::lvname::{LvName, VgName};
use crate::{Code, Error, Result};

/// The host's logical volumes, sorted.
#[derive(Default)]
pub(super) struct Volumes {
    pub(super) by_name: BTreeMap<LvName, LvCandidate>,
}

impl Volumes {
    pub(super) fn ask(inventory: &dyn Inventory) -> Result<Volumes> {
        let by_name = inventory
            .volumes()?
            .into_iter()
            .map(|volume| (volume.name.clone(), volume))
            .collect();
        Ok(Volumes { by_name })
    }

    pub(super) fn get(&self, name: &LvName) -> Option<&LvCandidate> {
        self.by_name.get(name)
    }

    /// Volumes that a pattern or tag means, without DRBD's metadata.
    fn wanted<'a>(
        &'a self,
        is_meant: impl Fn(&LvCandidate) -> bool,
        selection: &mut Selection,
    ) -> Vec<&'a LvCandidate> {
        let all = self.by_name.values();
        let meant = all.filter(|volume| !volume.is_ours() && is_meant(volume));
        let (metadata, wanted): (Vec<_>, Vec<_>) =
            meant.partition(|volume| volume.metadata_of.is_some());
        if !metadata.is_empty() {
            let names: Vec<String> = metadata.iter().map(|v| v.name.to_string()).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let text = format!("left out, metadata of DRBD: {}", list(&names));
            selection.notes.push(text);
        }
        wanted
    }

    pub(super) fn by_name(
        &self,
        vg: &VgName,
        pattern: &Pattern,
        found: &mut Vec<Found>,
        selection: &mut Selection,
    ) {
        let is_meant = |v: &LvCandidate| v.name.vg() == vg && pattern.matches(v.name.lv());
        for volume in self.wanted(is_meant, selection) {
            match (volume.kind, &volume.origin) {
                (LvKind::Plain, _) | (LvKind::Thin, None) => found.push(one_volume(volume)),
                (LvKind::Thin, Some(_)) if pattern.is_literal() => found.push(one_volume(volume)),
                // A guest cloned from a template or rolled back is such a volume.
                (LvKind::Thin, Some(_)) if volume.writable && volume.ready => {
                    found.push(one_volume(volume));
                }
                (LvKind::Thin | LvKind::Snapshot, origin) if !pattern.is_literal() => {
                    pass_over(volume, origin.as_deref(), selection);
                }
                // Patterns never mean these.
                (LvKind::Pool | LvKind::Hidden, _) if !pattern.is_literal() => {}
                (kind, _) => refuse(volume, kind, selection),
            }
        }
    }

    pub(super) fn by_tag(&self, tag: &str, found: &mut Vec<Found>, selection: &mut Selection) {
        let is_meant = |v: &LvCandidate| v.tags.iter().any(|t| tags::matches(tag, t));
        let mut instances = Instances::default();
        for volume in self.wanted(is_meant, selection) {
            let instance = tags::instance(volume, tag);
            match volume.kind {
                LvKind::Plain | LvKind::Thin | LvKind::Other if instance.is_some() => {
                    instances.add(instance.unwrap_or_default(), volume);
                }
                LvKind::Plain | LvKind::Thin => found.push(one_volume(volume)),
                LvKind::Other => refuse(volume, volume.kind, selection),
                // Snapshots inherit no tags, but an administrator may tag them along with the rest.
                LvKind::Snapshot => pass_over(volume, volume.origin.as_deref(), selection),
                kind => selection.notes.push(format!(
                    "{} has the tag {tag} but is {} and was left out",
                    volume.name,
                    describe(kind)
                )),
            }
        }
        instances.find(found, selection);
    }

    /// Names that a pattern in `vg` may have meant, the likeliest first.
    pub(super) fn hints(&self, vg: &VgName, pattern: &Pattern) -> String {
        let mut names: Vec<&str> = self
            .by_name
            .values()
            .filter(|volume| {
                volume.name.vg() == vg && !volume.is_ours() && volume.metadata_of.is_none()
            })
            .filter(|volume| matches!(volume.kind, LvKind::Plain | LvKind::Thin))
            .map(|volume| volume.name.lv())
            .collect();
        if names.is_empty() {
            let mut vgs: Vec<&str> = self.by_name.keys().map(|name| name.vg().as_str()).collect();
            vgs.dedup();
            return match (vgs.contains(&vg.as_str()), vgs.is_empty()) {
                (true, _) => format!("{vg} holds no volume that could be a guest's disk"),
                (_, true) => "this host has no logical volumes".to_owned(),
                _ => format!("there is no volume group {vg}; there is {}", list(&vgs)),
            };
        }
        names.sort_by_key(|name| {
            let common = name
                .bytes()
                .zip(pattern.text().bytes())
                .take_while(|(a, b)| a == b);
            std::cmp::Reverse(common.count())
        });
        format!("{vg} holds {}", list(&names))
    }
}

/// Reports a snapshot not taken for a guest. A guest cannot run from a read-only one; any other may
/// be a guest's disk.
fn pass_over(volume: &LvCandidate, origin: Option<&str>, selection: &mut Selection) {
    let what = match volume.kind {
        LvKind::Thin => "an inactive thin snapshot",
        _ => "a copy-on-write snapshot",
    };
    let origin = origin.unwrap_or("a volume that is not known");
    let text = format!("{} is {what} of {origin}", volume.name);
    if volume.writable {
        let error = Error::new(Code::PassedOver, text);
        let name = volume.name.lv().to_owned();
        selection.refused.push((name, error));
        selection.passed.push(disk(volume));
    } else {
        let text = format!("{text}, read-only, and was left out");
        selection.notes.push(text);
    }
}

pub(super) fn disk(volume: &LvCandidate) -> DiskSource {
    DiskSource::Lv(volume.name.clone())
}

/// Reports a volume of a kind that is no guest's disk.
fn refuse(volume: &LvCandidate, kind: LvKind, selection: &mut Selection) {
    let error = unsupported(&volume.name.to_string(), kind);
    selection.refused.push((volume.name.lv().to_owned(), error));
}

fn one_volume(volume: &LvCandidate) -> Found {
    Found {
        source_name: volume.name.lv().to_owned(),
        name: volume.name.lv().to_owned(),
        disks: vec![disk(volume)],
        disk_names: vec![definition::names_by_order(0)],
        places: vec![None],
        uncovered: Vec::new(),
        from: format!("logical volume {}", volume.name),
        file: None,
        pve: None,
        alone: true,
        defined_here: false,
        doubt: None,
    }
}

fn describe(kind: LvKind) -> &'static str {
    match kind {
        LvKind::Plain => "a volume",
        LvKind::Thin => "a thin volume",
        LvKind::Snapshot => "a snapshot",
        LvKind::Pool => "a pool",
        LvKind::Hidden => "a part of another volume",
        LvKind::Other => "being merged or converted, or of a kind that is not known",
    }
}

pub(super) fn unsupported(what: &str, kind: LvKind) -> Error {
    Error::new(
        Code::UnsupportedDisk,
        format!("{what} is {}", describe(kind)),
    )
}

#[cfg(test)]
mod tests {
    use super::super::select;
    use super::super::testing::{host, picture, volume};
    use super::*;
    use crate::config::{ClientFile, Directive};

    /// Without an error, a guest would be missing while the job ends OK.
    #[test]
    fn test_a_volume_of_an_unknown_kind_is_refused_by_patterns_and_tags() {
        let mut merging = volume("vg0", "domu-merging");
        merging.kind = LvKind::Other;
        merging.tags = vec!["backup".into()];
        let mut host = host();
        host.volumes.push(merging);
        for (text, expected) in [
            (
                "lv=vg0/domu-{web1,m*}",
                ["domu-web1=vg0/domu-web1", "!domu-merging GS-204"],
            ),
            ("tag=backup", ["db1=vg1/db1", "!domu-merging GS-204"]),
        ] {
            let directive = Directive::parse(text).unwrap();
            let selection = select(&directive, &ClientFile::default(), &host).unwrap();
            assert_eq!(picture(&selection), expected, "{text}");
        }
    }
}
