//! Plan of a rebuild: disks, targets, refusals.

use super::target::TargetName;
use crate::error::{Code, Error, Result, escape};
use crate::job::text::size_text;
use crate::kit::Loaded;
use crate::kit::filesystem::Recipe;
use crate::kit::format::Area;
use crate::process;

/// A disk to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedDisk {
    /// Its place in the guest: `disk`, `disk2`, …
    pub name: String,
    /// Where it is made.
    pub target: TargetName,
    /// Bytes.
    pub bytes: u64,
}

/// A rebuild that can begin.
#[derive(Debug)]
pub struct Plan {
    /// The kit.
    pub kit: Loaded,
    /// The disks.
    pub disks: Vec<PlannedDisk>,
    /// Whether a disk that is there and not empty is emptied.
    pub wipe: bool,
}

impl Plan {
    /// Checks that a kit can be made on these targets, one for each disk in the guest's order.
    pub fn new(kit: Loaded, targets: Vec<TargetName>, wipe: bool) -> Result<Plan> {
        let disks = &kit.kit.disks;
        if disks.len() != targets.len() {
            let all: Vec<String> = disks
                .iter()
                .map(|d| format!("{} of {}", d.name, size_text(d.bytes)))
                .collect();
            let text = format!(
                "{} disks are named, and the guest has {}: {}",
                targets.len(),
                disks.len(),
                escape(all.join(", ").as_bytes())
            );
            return Err(Error::new(Code::BadTarget, text));
        }
        for (at, target) in targets.iter().enumerate() {
            if targets[..at].contains(target) {
                return Err(Error::new(
                    Code::BadTarget,
                    format!("{target}: named twice"),
                ));
            }
        }
        if let Some(group) = kit.kit.groups.iter().find(|g| !g.complex.is_empty()) {
            let text = format!(
                "volumes of other types than linear and striped are not made again: {}: {}. Make the disk by hand \
                 after the manifest",
                escape(group.name.as_bytes()),
                escape(group.complex.join(", ").as_bytes())
            );
            return Err(Error::new(Code::BadKit, text));
        }
        let disks = disks.iter().zip(targets);
        let disks = disks.map(|(disk, target)| PlannedDisk {
            name: disk.name.clone(),
            target,
            bytes: disk.bytes,
        });
        let plan = Plan {
            disks: disks.collect(),
            wipe,
            kit,
        };
        for volume in &plan.kit.kit.volumes {
            for argv in volume.recipe.commands("-") {
                let what = || {
                    format!(
                        "{} ({})",
                        escape(volume.volume.as_bytes()),
                        volume.recipe.fstype()
                    )
                };
                let found = argv.first().map(|program| process::find(program));
                found
                    .transpose()
                    .map_err(|e| Error::new(e.code(), what()).because(e))?;
            }
        }
        Ok(plan)
    }

    /// The plan as lines.
    pub fn lines(&self) -> Vec<String> {
        let kit = &self.kit.kit;
        let mut lines = Vec::new();
        for (planned, disk) in self.disks.iter().zip(&kit.disks) {
            let (size, source) = (size_text(disk.bytes), escape(disk.source.as_bytes()));
            lines.push(format!(
                "{} (was {source}, {size}): {}",
                disk.name, planned.target
            ));
            if disk.table != "none" {
                let id = disk.id.as_deref().unwrap_or("none");
                lines.push(format!(
                    "    table {}, id {}",
                    disk.table,
                    escape(id.as_bytes())
                ));
            }
            for p in &disk.partitions {
                let (size, kind) = (size_text(p.len), escape(p.kind.as_bytes()));
                lines.push(format!(
                    "    p{} {size} at {}, type {kind}",
                    p.number, p.start
                ));
            }
            let areas = disk.areas.iter().map(|area| escape(area.what.as_bytes()));
            lines.extend(areas.map(|what| format!("    {what}")));
        }
        for group in &kit.groups {
            let on: Vec<&str> = group
                .physical_volumes
                .iter()
                .map(|pv| pv.volume.as_str())
                .collect();
            let (name, uuid) = (escape(group.name.as_bytes()), escape(group.uuid.as_bytes()));
            lines.push(format!(
                "group {name} ({uuid}) on {}",
                escape(on.join(", ").as_bytes())
            ));
        }
        for volume in &kit.volumes {
            let (name, recipe) = (escape(volume.volume.as_bytes()), &volume.recipe);
            let (size, subvolumes) = (size_text(volume.bytes), volume.subvolumes.len());
            let mut line = format!("{name}: {} {size}, UUID {}", recipe.fstype(), recipe.uuid());
            if subvolumes > 0 {
                line.push_str(&format!(", {subvolumes} subvolumes"));
            }
            lines.push(line);
        }
        lines.extend(self.missing());
        lines.extend(self.loaders());
        lines
    }

    /// Boot loaders that find their files by sectors, which a restore puts elsewhere, as lines.
    pub fn loaders(&self) -> Vec<String> {
        let start = |area: &Area| {
            area.file
                .as_ref()
                .map_or(&[][..], |file| self.kit.bytes(file))
        };
        let again = "install it again before the guest starts from this disk";
        let mut lines = Vec::new();
        for disk in &self.kit.kit.disks {
            let first = disk.areas.iter().find(|area| area.start == 0);
            if first.is_some_and(|area| start(area).get(6..10) == Some(&b"LILO"[..])) {
                lines.push(format!(
                    "{}: LILO finds its files by sectors: {again} (lilo)",
                    disk.name
                ));
            }
        }
        for volume in &self.kit.kit.volumes {
            let code = volume
                .areas
                .iter()
                .map(start)
                .find(|bytes| !bytes.is_empty());
            let by_sectors = match volume.recipe {
                Recipe::Ext(_) | Recipe::Btrfs(_) => code.is_some(),
                // mkfs writes code there too.
                Recipe::Vfat(_) => {
                    code.is_some_and(|code| code.get(3..11) == Some(&b"SYSLINUX"[..]))
                }
                Recipe::Xfs(_) | Recipe::Swap(_) => false,
            };
            if by_sectors {
                let name = escape(volume.volume.as_bytes());
                lines.push(format!(
                    "{name}: a boot loader is in its first sectors, and may find its files by sectors: {again} \
                     (extlinux --install, grub-install)"
                ));
            }
        }
        lines
    }

    /// Omissions, as lines.
    pub fn missing(&self) -> impl Iterator<Item = String> {
        let missing = self.kit.kit.missing.iter();
        missing.map(|what| format!("not made: {}", escape(what.as_bytes())))
    }
}
