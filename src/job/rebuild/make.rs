//! The steps of a rebuild.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::plan::Plan;
use super::table;
use super::target::Target;
use super::tree;
use crate::disk::{self, Examined, FileDisk, ReadAt, VolumeKind};
use crate::error::{Code, Error, Result, escape};
use crate::fs::{self, Content, SkipReason};
use crate::job::caller::{Importance, Reporter};
use crate::job::open::MappedVolume;
use crate::job::prepare;
use crate::job::text::size_text;
use crate::kit::Loaded;
use crate::kit::filesystem::Recipe;
use crate::kit::format::{Disk, Volume};
use crate::point::{Point, reach};
use crate::process;
use crate::snapshot::{Device, Journal};

/// Time limit of one program that makes a filesystem.
const PATIENCE: Duration = Duration::from_secs(3600);

/// A rebuild that can run.
#[expect(
    missing_debug_implementations,
    reason = "holds the caller's side as a trait object"
)]
pub struct Rebuild {
    plan: Plan,
    journal: Arc<Journal>,
    reporter: Arc<dyn Reporter>,
}

/// The new disks, as a backup would find them.
pub(super) struct Made<'a> {
    examined: Examined,
    devices: Vec<Device>,
    journal: &'a Arc<Journal>,
    pub(super) reporter: &'a dyn Reporter,
}

impl Made<'_> {
    /// Maps a volume of the new disks.
    pub(super) fn map(&self, name: &str) -> Result<MappedVolume> {
        let mut all = self.examined.volumes.iter();
        let found = all.find(|volume| volume.name == name).ok_or_else(|| {
            let text = format!("{}: it is not on the new disks", escape(name.as_bytes()));
            Error::new(Code::RebuildFailed, text)
        })?;
        let stop = || self.reporter.cancelled();
        MappedVolume::map(found, &self.devices, self.journal, &stop)
    }
}

/// Result of a rebuild.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rebuilt {
    /// The disks, by the names of their targets.
    pub disks: Vec<String>,
    /// Filesystems and swap areas.
    pub volumes: usize,
}

impl Rebuild {
    /// Sweeps and begins a journal, as a job does. `working_dir` is the daemon's.
    pub fn start(plan: Plan, working_dir: PathBuf, reporter: Arc<dyn Reporter>) -> Result<Rebuild> {
        let journal = prepare::journal(working_dir, 0, reporter.as_ref())?;
        Ok(Rebuild {
            plan,
            journal,
            reporter,
        })
    }

    /// Makes all disks, or leaves nothing.
    pub fn run(self) -> Result<Rebuilt> {
        let mut targets = Vec::new();
        let made = self.make(&mut targets);
        // None has its name before all are written back.
        let made = made.and_then(|made| {
            targets.iter_mut().try_for_each(Target::settle)?;
            Ok(made)
        });
        let result = match made {
            Ok(made) => self.name(targets).map(|()| made),
            Err(error) => {
                for target in targets.into_iter().rev() {
                    if target.is_changed() {
                        let text = format!("{} is made in part only", target.name());
                        self.reporter.message(Importance::Error, &text);
                    }
                    if let Err(error) = target.undo() {
                        self.reporter.message(Importance::Error, &error.report());
                    }
                }
                Err(error)
            }
        };
        let closed = self.journal.close();
        result.and_then(|made| closed.map(|()| made))
    }

    /// Gives the disks their names. If one does not get it, those before it are there all the same.
    fn name(&self, targets: Vec<Target>) -> Result<()> {
        let mut named: Vec<String> = Vec::new();
        for target in targets {
            let name = target.name().to_string();
            if let Err(error) = target.finish() {
                for disk in &named {
                    let text = format!("{disk} is complete, and stays");
                    self.reporter.message(Importance::Error, &text);
                }
                return Err(error);
            }
            named.push(name);
        }
        Ok(())
    }

    fn say(&self, text: &str) {
        self.reporter.message(Importance::Info, text);
    }

    fn make(&self, targets: &mut Vec<Target>) -> Result<Rebuilt> {
        let kit = &self.plan.kit;
        let stop = || self.reporter.cancelled();
        // All is checked before anything that is there is written to.
        let mut pieces = Vec::new();
        for (planned, disk) in self.plan.disks.iter().zip(&kit.kit.disks) {
            let (name, bytes, wipe) = (&planned.target, planned.bytes, self.plan.wipe);
            let target = Target::open(name, bytes, wipe, &self.journal, &stop)?;
            let laid = table::pieces(kit, disk, target.device().size);
            targets.push(target);
            pieces.push(laid.map_err(|why| {
                let what = escape(disk.name.as_bytes());
                Error::new(Code::BadKit, format!("{what}: {why}"))
            })?);
        }
        for ((target, pieces), disk) in targets.iter().zip(&pieces).zip(&kit.kit.disks) {
            let ends = table::ends(disk);
            let (name, size) = (target.name(), size_text(target.device().size));
            self.say(&format!("making {name} ({size})"));
            target.empty()?;
            target.write(&ends)?;
            target.write(pieces)?;
        }
        let devices: Vec<Device> = targets.iter().map(Target::device).collect();
        let examined = examine(&devices)?;
        compare(kit, &examined)?;
        let made = Made {
            examined,
            devices,
            journal: &self.journal,
            reporter: self.reporter.as_ref(),
        };
        for volume in &kit.kit.volumes {
            if self.reporter.cancelled() {
                return Err(Error::new(Code::Cancelled, kit.kit.guest.clone()));
            }
            self.volume(volume, &made)?;
            tree::lay_out(volume, &kit.kit, &made)?;
        }
        for line in self.plan.loaders() {
            // Warning: boot sectors.
            self.reporter.message(Importance::Warning, &line);
        }
        Ok(Rebuilt {
            disks: targets
                .iter()
                .map(|target| target.name().to_string())
                .collect(),
            volumes: kit.kit.volumes.len(),
        })
    }

    /// Makes one filesystem.
    fn volume(&self, volume: &Volume, made: &Made<'_>) -> Result<()> {
        let name = escape(volume.volume.as_bytes());
        let recipe = &volume.recipe;
        self.say(&format!(
            "{name}: {} ({})",
            recipe.fstype(),
            size_text(volume.bytes)
        ));
        let stop = || self.reporter.cancelled();
        let mapped = made.map(&volume.volume)?;
        let made = self.fill(volume, mapped.mapped.path(), &stop);
        let checked = made.and_then(|()| check(volume, &mapped));
        let closed = mapped.close();
        checked.and(closed)
    }

    fn fill(&self, volume: &Volume, device: &Path, stop: &dyn Fn() -> bool) -> Result<()> {
        let text = device.to_str().unwrap_or_default();
        for argv in volume.recipe.commands(text) {
            reach(Point::RebuildMkfs)
                .map_err(|errno| failed(volume, "making it").because(errno))?;
            let Err(first) = run(&argv, stop) else {
                continue;
            };
            let other = volume.recipe.second_try(text);
            let other = other.filter(|(argv, _)| !stop() && run(argv, stop).is_ok());
            let Some((_, lost)) = other else {
                return Err(failed(volume, "making it").because(first));
            };
            if let Some(lost) = lost {
                let text = format!("{}: {lost}", escape(volume.volume.as_bytes()));
                // Warning: another log.
                self.reporter.message(Importance::Warning, &text);
            }
        }
        let written = || -> std::io::Result<()> {
            let file = File::options().read(true).write(true).open(device)?;
            for area in &volume.areas {
                let old = area
                    .file
                    .as_ref()
                    .map_or(&[][..], |file| self.plan.kit.bytes(file));
                let len = usize::try_from(area.len).map_err(std::io::Error::other)?;
                let mut bytes = vec![0; len];
                file.read_exact_at(&mut bytes, area.start)?;
                boot_code(&volume.recipe, old, &mut bytes);
                file.write_all_at(&bytes, area.start)?;
            }
            file.sync_all()
        };
        written().map_err(|error| failed(volume, "its boot sectors").because(error))
    }
}

/// Runs a program with the guest's properties, and none of this host's defaults.
fn run(argv: &[String], stop: &dyn Fn() -> bool) -> Result<()> {
    let words = ["env", "MKE2FS_CONFIG=/dev/null"].map(str::to_owned);
    let program = process::argv(argv)?;
    let argv = process::argv(&[&words[..], &program].concat())?;
    process::run_well(&argv, PATIENCE, stop)
}

pub(super) fn failed(volume: &Volume, step: &str) -> Error {
    let name = escape(volume.volume.as_bytes());
    Error::new(Code::RebuildFailed, format!("{name}: {step}"))
}

/// Puts the code of a boot loader into the sectors that a new filesystem has.
fn boot_code(recipe: &Recipe, old: &[u8], new: &mut [u8]) {
    let all = [0..new.len(), 0..0];
    let ranges = match recipe {
        // Between jump and code are the parameters of the new filesystem.
        Recipe::Vfat(fat) => [0..3, if fat.bits == 32 { 90..510 } else { 62..510 }],
        _ => all,
    };
    for range in ranges {
        let from = old
            .get(range.start..old.len().min(range.end))
            .unwrap_or_default();
        if let Some(to) = new.get_mut(range) {
            to.fill(0);
            to[..from.len()].copy_from_slice(from);
        }
    }
}

/// Checks type and UUID of a new filesystem against the kit.
fn check(volume: &Volume, mapped: &MappedVolume) -> Result<()> {
    let what = escape(volume.volume.as_bytes());
    let wrong = |found: String| failed(volume, &format!("after it was made it is {found}"));
    match fs::probe(mapped.mapped.fd(), &what)? {
        Content::Filesystem(found) => {
            let uuid = found.uuid.unwrap_or_default();
            let same = found.fstype == volume.recipe.fstype() && uuid == volume.recipe.uuid();
            same.then_some(())
                .ok_or_else(|| wrong(format!("{} {uuid}", found.fstype)))
        }
        Content::Skip(SkipReason::Swap) if matches!(volume.recipe, Recipe::Swap(_)) => Ok(()),
        Content::Skip(reason) => Err(wrong(reason.to_string())),
        Content::Unknown { .. } => Err(wrong("nothing known".to_owned())),
    }
}

/// Reads the new disks as a backup would.
fn examine(devices: &[Device]) -> Result<Examined> {
    let disks = devices
        .iter()
        .map(|d| FileDisk::open(&d.path))
        .collect::<Result<Vec<_>>>()?;
    let views: Vec<&dyn ReadAt> = disks.iter().map(|d| d as &dyn ReadAt).collect();
    disk::examine(&views)
}

/// Whether tables, groups and volumes are those of the kit.
fn compare(kit: &Loaded, examined: &Examined) -> Result<()> {
    let kit = &kit.kit;
    let differs = |what: &str| {
        let text = format!(
            "{}: what was written is not what the kit describes",
            escape(what.as_bytes())
        );
        Err(Error::new(Code::BadKit, text))
    };
    for (disk, found) in kit.disks.iter().zip(&examined.disks) {
        if !same_table(disk, &found.table) {
            return differs(&disk.name);
        }
    }
    for group in &kit.groups {
        if !examined
            .groups
            .iter()
            .any(|found| found.uuid == group.uuid && found.name == group.name)
        {
            return differs(&group.name);
        }
    }
    if let Some(group) = examined
        .groups
        .iter()
        .find(|group| !group.complex.is_empty())
    {
        return differs(&group.name);
    }
    for volume in &kit.volumes {
        let found = examined
            .volumes
            .iter()
            .find(|found| found.name == volume.volume);
        // A filesystem on a whole disk keeps its size on a larger one.
        let fits = |found: &disk::Volume| match found.kind {
            VolumeKind::Whole { .. } => found.size() >= volume.bytes,
            _ => found.size() == volume.bytes,
        };
        if !found.is_some_and(fits) {
            return differs(&volume.volume);
        }
    }
    Ok(())
}

fn same_table(disk: &Disk, found: &disk::table::Table) -> bool {
    let pairs = disk.partitions.iter().zip(&found.partitions);
    disk.partitions.len() == found.partitions.len()
        && found.damage.is_empty()
        && pairs.into_iter().all(|(known, found)| {
            (known.number, known.start, known.len) == (found.number, found.start, found.len)
                && known.kind == found.kind
                && known.partuuid == found.partuuid
                && known.partlabel == found.partlabel
                && known.flags == found.flags
        })
}
