//! The first fstab of new disks, by which a restore finds the places of their filesystems.

use super::format::{Kit, Place, Subvolume, Volume};

/// The first line of the fstab. The restore replaces the file, which is older than any other.
const HEAD: &str =
    "# Written by `guestsnap rebuild`. The restore of the guest's files replaces it.\n";

impl Kit {
    /// The fstab: a line for each place that a guest's own fstab gives.
    pub fn fstab(&self) -> String {
        let lines = self.tree.iter().filter_map(|place| self.line(place));
        [HEAD.to_owned()].into_iter().chain(lines).collect()
    }

    /// Places without a line, with the consequence.
    pub(super) fn unplaced(&self) -> impl Iterator<Item = String> {
        let all = self.tree.iter().filter(|place| !place.is_private());
        all.filter(|place| self.line(place).is_none()).map(|place| {
            let text = "its filesystem gets no line in the first fstab; a restore puts its files into \
                        the filesystem around it";
            format!("/{}: {text}", place.path)
        })
    }

    /// The line of a place. Names with other characters than text have none, nor have filesystems that are not
    /// made.
    fn line(&self, place: &Place) -> Option<String> {
        let mut volumes = self.volumes.iter();
        let volume = volumes.find(|volume| volume.volume == place.volume)?;
        if !place.is_plain() || place.is_private() {
            return None;
        }
        let field = |path: &str| path.replace(' ', "\\040");
        let subvolume = match (place.subvolume(volume), place.subvolume) {
            (Some(one), _) if is_plain(&one.path) => format!(",subvol=/{}", field(&one.path)),
            (None, Some(5)) => ",subvolid=5".to_owned(),
            (None, None) => String::new(),
            _ => return None,
        };
        Some(format!(
            "UUID={} /{} {} defaults{subvolume} 0 0\n",
            volume.recipe.uuid(),
            field(&place.path),
            volume.recipe.fstype()
        ))
    }
}

impl Place {
    /// Its subvolume of a btrfs.
    pub fn subvolume<'a>(&self, volume: &'a Volume) -> Option<&'a Subvolume> {
        let mut all = volume.subvolumes.iter();
        all.find(|one| Some(one.id) == self.subvolume)
    }

    /// Whether its path is text without escaped bytes.
    pub fn is_plain(&self) -> bool {
        is_plain(&self.path)
    }

    /// Whether it is in the folder of a backup that the guest does not have.
    pub fn is_private(&self) -> bool {
        self.path.starts_with(".guestsnap")
    }
}

fn is_plain(path: &str) -> bool {
    !path.contains('\\') && !path.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kit::filesystem::{Recipe, Swap};
    use crate::kit::format::{Subvolume, Volume};

    #[test]
    fn test_each_place_has_a_line() {
        let volume = |name: &str, uuid: &str| Volume {
            volume: name.into(),
            bytes: 0,
            recipe: Recipe::Swap(Swap {
                uuid: uuid.into(),
                label: String::new(),
                page_size: 4096,
            }),
            subvolumes: vec![Subvolume {
                id: 257,
                path: "@home x".into(),
                default: false,
                read_only: false,
                past: false,
            }],
            areas: Vec::new(),
        };
        let place = |path: &str, volume: &str, subvolume| Place {
            path: path.into(),
            volume: volume.into(),
            subvolume,
        };
        let kit = Kit {
            format: Kit::FORMAT,
            guest: "web".into(),
            disks: Vec::new(),
            groups: Vec::new(),
            volumes: vec![volume("p1", "1-1"), volume("vg/b", "2-2")],
            tree: vec![
                place("", "p1", None),
                place("srv/my files", "vg/b", Some(257)),
                place("top", "vg/b", Some(5)),
                place("gone", "vg/b", Some(300)),
                place("b\\xff", "p1", None),
                place(".guestsnap/volumes/p1", "p1", None),
                place("other", "p9", None),
            ],
            missing: Vec::new(),
        };
        let expected = "UUID=1-1 / swap defaults 0 0\n\
                        UUID=2-2 /srv/my\\040files swap defaults,subvol=/@home\\040x 0 0\n\
                        UUID=2-2 /top swap defaults,subvolid=5 0 0\n";
        assert_eq!(kit.fstab(), HEAD.to_owned() + expected);
        assert_eq!(
            kit.unplaced().collect::<Vec<_>>(),
            ["gone", "b\\xff", "other"].map(|path| format!(
                "/{path}: its filesystem gets no line in the first fstab; a restore puts its files into the filesystem around it"
            ))
        );
    }
}
