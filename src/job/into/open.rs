//! The way into a guest's disks: they are held, examined, mapped and mounted for writing.

use crate::disk::{self, FileDisk, ReadAt};
use crate::error::{Code, Error, Result};
use crate::fs::{
    self, BtrfsMember, Content, DetachedMount, Filesystem, GuestTree, Hints, MountedVolume,
    NoteLevel, VolumeIdentity,
};
use crate::job::caller::Importance;
use crate::job::open::{Disks, How, MappedVolume};
use crate::point::{Point, pass};
use crate::snapshot::Device;

use super::guest::IntoGuest;

/// A volume that holds a filesystem.
struct Found {
    identity: VolumeIdentity,
    filesystem: Filesystem,
    /// The device, and those of a btrfs over several after it.
    maps: Vec<MappedVolume>,
    parts: Vec<VolumeIdentity>,
}

/// The state of an opening.
struct Opening<'a> {
    into: &'a mut IntoGuest,
    how: &'a How<'a>,
    known: Disks,
    /// Volumes that are not written to.
    closed: Vec<(VolumeIdentity, Filesystem)>,
}

/// Mounts the guest's filesystems. On an error the caller closes the open parts.
pub(super) fn mount_all(into: &mut IntoGuest, how: &How<'_>) -> Result<()> {
    let devices = hold(into, how)?;
    let disks = devices
        .iter()
        .map(|d| FileDisk::open_up_to(&d.path, d.size))
        .collect::<Result<Vec<_>>>()?;
    let views: Vec<&dyn ReadAt> = disks.iter().map(|d| d as &dyn ReadAt).collect();
    let examined = disk::examine(&views)?;
    let known = Disks::of(&into.guest, &examined, &views);
    let mut opening = Opening {
        into,
        how,
        known,
        closed: Vec::new(),
    };
    for skipped in &examined.skipped {
        opening.leave(&skipped.name, &skipped.reason);
        if let Some(kind) = &skipped.volume {
            let identity = opening.known.identity(&skipped.name, kind, None);
            opening.closed.push((identity, Filesystem::default()));
        }
    }
    let volumes = examined.volumes.iter();
    let found = volumes.filter_map(|v| opening.probe(v, &devices)).collect();
    let found = opening.gather(found);
    let filesystems = found.iter().map(|found| &found.filesystem);
    let claim = fs::claim(filesystems, &mut || (how.stop)())?;
    opening.into.claim = Some(claim);
    let mounted: Vec<_> = found.into_iter().filter_map(|f| opening.mount(f)).collect();
    opening.join(mounted)
}

/// Keeps everything else from the disks. Maps of block devices stand in for them from here on.
fn hold(into: &mut IntoGuest, how: &How<'_>) -> Result<Vec<Device>> {
    let mut devices = Vec::new();
    for disk in &mut into.disks {
        let (device, hold) = MappedVolume::hold_alone(disk, how.journal, how.stop)?;
        devices.push(device);
        into.holds.extend(hold);
    }
    Ok(devices)
}

impl Opening<'_> {
    /// A volume is not written to. Only files of that volume are errors.
    fn leave(&self, name: &str, why: &str) {
        let text = format!(
            "{}: {name}: nothing is restored into it: {why}",
            self.into.guest.name
        );
        self.how.reporter.message(Importance::Info, &text);
    }

    fn what(&self, name: &str) -> String {
        format!("{}: {name}", self.into.guest.name)
    }

    /// Maps a volume and looks for its filesystem. `None`: it is not written to.
    fn probe(&mut self, volume: &disk::Volume, devices: &[Device]) -> Option<Found> {
        let (how, what) = (self.how, self.what(&volume.name));
        let identity = self.known.volume(volume);
        let mapped = match MappedVolume::map(volume, devices, how.journal, how.stop) {
            Ok(mapped) => mapped,
            Err(error) => {
                self.leave(&volume.name, &error.report());
                self.closed.push((identity, Filesystem::default()));
                return None;
            }
        };
        let (filesystem, why) = match fs::probe(mapped.mapped.fd(), &what) {
            Ok(Content::Filesystem(filesystem)) => match volume.read_only {
                None => {
                    return Some(Found {
                        identity,
                        filesystem,
                        maps: vec![mapped],
                        parts: Vec::new(),
                    });
                }
                Some(why) => (filesystem, why.to_owned()),
            },
            Ok(Content::Skip(reason)) => {
                how.close(mapped, &what);
                if reason.may_hold_files() {
                    self.leave(&volume.name, &reason.to_string());
                    self.closed.push((identity, Filesystem::default()));
                }
                return None;
            }
            Ok(Content::Unknown { .. }) => (Filesystem::default(), "no filesystem".to_owned()),
            Err(error) => (Filesystem::default(), error.report()),
        };
        how.close(mapped, &what);
        self.leave(&volume.name, &why);
        self.closed.push((identity, filesystem));
        None
    }

    /// Brings the devices of each btrfs over several of them together.
    fn gather(&mut self, found: Vec<Found>) -> Vec<Found> {
        let mut gathered = Vec::new();
        let mut members = Vec::new();
        for one in found {
            let what = self.what(&one.identity.name);
            let member = match (&one.filesystem.fstype[..], one.maps.first()) {
                ("btrfs", Some(map)) => BtrfsMember::read(map.mapped.fd(), &what),
                _ => {
                    gathered.push(one);
                    continue;
                }
            };
            match member {
                Ok(member) if member.devices == 1 => gathered.push(one),
                Ok(member) => members.push((one, member)),
                Err(error) => self.give_up(one, &error.report()),
            }
        }
        let (sets, incomplete) = BtrfsMember::sets(members);
        for (one, why) in incomplete {
            self.give_up(one, &why);
        }
        for set in sets {
            let mut set = set.into_iter();
            if let Some(mut first) = set.next() {
                first.filesystem.several = true;
                for part in set {
                    first.maps.extend(part.maps);
                    first.parts.push(part.identity);
                }
                gathered.push(first);
            }
        }
        gathered
    }

    /// Closes a volume that is not written to after all.
    fn give_up(&mut self, found: Found, why: &str) {
        let what = self.what(&found.identity.name);
        for map in found.maps {
            self.how.close(map, &what);
        }
        self.leave(&found.identity.name, why);
        self.closed.push((found.identity, found.filesystem));
    }

    /// Mounts a filesystem. `None`: it cannot be mounted for writing.
    fn mount(&mut self, found: Found) -> Option<MountedVolume> {
        let what = self.what(&found.identity.name);
        let fds: Vec<_> = found.maps.iter().map(|map| map.mapped.fd()).collect();
        let [first, more @ ..] = &fds[..] else {
            return None;
        };
        let opened =
            DetachedMount::open_set(*first, more, &found.filesystem, &self.how.policy, &what);
        let opened = opened.and_then(|opened| {
            let mut maps = found.maps.iter();
            maps.try_for_each(|map| map.mapped.check_labels())?;
            Ok(opened)
        });
        let (mount, notes) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                self.give_up(found, &error.report());
                return None;
            }
        };
        for note in notes {
            match note.level {
                NoteLevel::Info => log::debug!("{}", note.text),
                level => self.how.reporter.message(level.into(), &note.text),
            }
        }
        self.into.mapped.extend(found.maps);
        Some(MountedVolume {
            identity: VolumeIdentity {
                parts: found.parts,
                ..found.identity
            },
            filesystem: found.filesystem,
            mount,
        })
    }

    /// Joins the filesystems to one tree. A tree that may be wrong is refused.
    fn join(self, mounted: Vec<MountedVolume>) -> Result<()> {
        let refused = |why: &str| {
            let text = format!("{}: {why}", self.into.guest.name);
            Err(Error::new(Code::TargetRefused, text))
        };
        if mounted.is_empty() {
            return refused("no filesystem that can be written to");
        }
        let hints = Hints {
            root: self.how.root.clone(),
            before: self.how.before.clone(),
            places: self.into.guest.places.clone(),
            closed: self.closed,
            make: true,
        };
        let tree = GuestTree::assemble_with(mounted, &hints, self.how.stop)?;
        let doubt = tree.unsure().or(tree.unread_fstab());
        let doubt = doubt.map(ToString::to_string);
        let rootless = tree.joins().first().is_none_or(|join| join.root.is_none());
        let why = doubt.or(rootless.then(|| "no filesystem looks like its root".to_owned()));
        self.into.tree = Some(tree);
        match why {
            Some(why) => refused(&why),
            None => {
                pass(Point::IntoOpened);
                Ok(())
            }
        }
    }
}
