//! Access policy: the client administrator's `allow`, and the host's own use of a disk.

use std::path::PathBuf;

use super::selection::{Found, Selection};
use super::volumes::{Volumes, unsupported};
use crate::config::ClientFile;
use crate::config::client::Allow;
use crate::guest::{DiskSource, LvCandidate, LvKind};
use crate::{Code, Error, Result};

/// Disks that the client's administrator lets a Director select.
pub(super) struct Policy<'a> {
    allow: Option<&'a [Allow]>,
    client: &'a ClientFile,
}

impl<'a> Policy<'a> {
    pub(super) fn of(client: &'a ClientFile) -> Policy<'a> {
        Policy {
            allow: client.allow.as_deref(),
            client,
        }
    }

    /// Judges a volume.
    fn judge_volume(&self, disk: &DiskSource, lv: &LvCandidate, defined_here: bool) -> Result<()> {
        self.judge(disk, lv.in_use.as_deref(), defined_here)?;
        match &lv.shared {
            Some(why) if !self.client.is_mine(lv.name.vg()) => {
                Err(Error::new(Code::SharedGroup, format!("{disk}: {why}")))
            }
            _ => Ok(()),
        }
    }

    /// Judges one disk. `in_use` is the host's own use of it.
    fn judge(&self, disk: &DiskSource, in_use: Option<&str>, defined_here: bool) -> Result<()> {
        let name = match disk {
            DiskSource::Lv(name) => PathBuf::from(name.to_string()),
            DiskSource::File(path) => path.clone(),
        };
        let matching: Vec<&Allow> = self
            .allow
            .into_iter()
            .flatten()
            .filter(|pattern| pattern.matches(&name))
            .collect();
        if let Some(use_) = in_use {
            return Err(Error::new(Code::DiskInUse, format!("{disk}: {use_}")));
        }
        match (&self.allow, disk) {
            (Some(_), _) if matching.is_empty() => Err(Error::new(
                Code::NotAllowed,
                format!("{disk} matches nothing in `allow`"),
            )),
            (None, DiskSource::File(_)) if !defined_here => Err(Error::new(
                Code::NotAllowed,
                format!("{disk}: files need a pattern in `allow`"),
            )),
            _ => Ok(()),
        }
    }
}

/// Checks that every disk exists, can be snapshotted, and may be selected. Removes failing disks
/// from their guests and reports them.
pub(super) fn volumes_and_policy(
    found: Vec<Found>,
    volumes: &Volumes,
    policy: &Policy<'_>,
    selection: &mut Selection,
) -> Vec<Found> {
    let mut kept = Vec::new();
    for mut guest in found {
        let mut disks = Vec::new();
        let (mut disk_names, mut places) = (Vec::new(), Vec::new());
        let named = std::mem::take(&mut guest.disk_names);
        let named = named.into_iter().zip(std::mem::take(&mut guest.places));
        for (disk, (names, place)) in std::mem::take(&mut guest.disks).into_iter().zip(named) {
            let verdict = match &disk {
                DiskSource::File(_) => policy.judge(&disk, None, guest.defined_here),
                DiskSource::Lv(name) => match volumes.get(name) {
                    None => Err(Error::new(
                        Code::OriginGone,
                        format!("{disk} ({})", guest.from),
                    )),
                    Some(volume) if matches!(volume.kind, LvKind::Plain | LvKind::Thin) => {
                        policy.judge_volume(&disk, volume, guest.defined_here)
                    }
                    Some(volume) => Err(unsupported(&disk.to_string(), volume.kind)),
                },
            };
            match verdict {
                Ok(()) => {
                    disks.push(disk);
                    disk_names.push(names);
                    places.push(place);
                }
                Err(error) => selection.refused.push((guest.name.clone(), error)),
            }
        }
        guest.disks = disks;
        guest.disk_names = disk_names;
        guest.places = places;
        if !guest.disks.is_empty() {
            kept.push(guest);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::super::select;
    use super::super::testing::{host, picture};
    use super::*;
    use crate::config::Directive;

    /// The Director can change nothing about it: only the client file names a group as safe.
    #[test]
    fn test_a_shared_group_needs_the_client_file() {
        let mut host = host();
        for volume in &mut host.volumes {
            let shared = volume.name.vg().as_str() == "vg1";
            volume.shared = shared.then(|| "vg1 belongs to another host".to_owned());
        }
        let mine = "[vg.vg1]\nshared = 'mine'\n";
        let other = "[vg.vg0]\nshared = 'mine'\n";
        let disks = "[guest.app]\ndisks = ['vg0/domu-web1', 'vg1/web1']\n";
        let cases: &[(&str, &str, &[&str])] = &[
            ("lv=vg1/db1", "", &["!db1 GS-215"]),
            ("lv=vg1/db1", other, &["!db1 GS-215"]),
            ("lv=vg1/db1", "[vg.vg1]\n", &["!db1 GS-215"]),
            ("lv=vg1/db1", mine, &["db1=vg1/db1"]),
            ("tag=backup", "", &["!db1 GS-215"]),
            ("lv=vg0/domu-web1", "", &["domu-web1=vg0/domu-web1"]),
            // The other disks are saved, as with every disk that cannot be.
            ("guest=app", disks, &["app=vg0/domu-web1", "!app GS-215"]),
            ("lv=vg1/db1", "allow = []", &["!db1 GS-104"]),
        ];
        for (text, client, expected) in cases {
            let directive = Directive::parse(text).unwrap();
            let client = ClientFile::parse(client).unwrap();
            let selection = select(&directive, &client, &host).unwrap();
            assert_eq!(picture(&selection), *expected, "{text} {client:?}");
        }
    }
}
