//! Takes the snapshots of one guest's disks, at one instant where possible.
//!
//! All thick volumes are suspended before the first snapshot: see [`super::hold`]. Disks that
//! cannot be suspended are snapshotted meanwhile. Those are of one instant if the earlier disks had
//! no writes until the last snapshot: see [`super::quiet`]. Disks with writes are snapshotted
//! again, a few times.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::drbd::Below;
use super::hold::{self, Hold};
use super::lvm::LvInfo;
use super::quiet::Quiet;
use super::remove::remove_locked;
use super::volume::{Kind, NotTaken, Plan};
use super::{Journal, Snapshot, dm, off, reflink};
use crate::config::defaults;
use crate::error::{Code, Error, Result};
use crate::hostdev::lvname::LvName;

/// Maximum attempts to reach one instant.
const TRIES: u32 = 3;

/// A disk ready for its snapshot.
#[derive(Debug)]
pub(super) enum Disk {
    Volume(Box<Plan>),
    Image(PathBuf),
    Off(PathBuf),
}

/// Parameters for a guest with several disks.
#[derive(Debug, Clone, Copy)]
pub struct How {
    /// Maximum time its writes are held.
    pub hold: Duration,
    /// The guest is already quiesced: no second attempt.
    pub at_rest: bool,
}

impl Default for How {
    fn default() -> Self {
        How {
            hold: Duration::from_secs(defaults::HOLD_SECONDS),
            at_rest: false,
        }
    }
}

/// Whether the snapshots of a guest's disks are consistent with each other.
#[derive(Debug)]
pub enum Together {
    /// Only one disk.
    Single,
    /// All are of one instant.
    Yes,
    /// They are not, or that is unknown, for this reason.
    No(String),
}

/// Snapshots that were taken.
#[derive(Debug)]
pub struct Taken {
    /// Whether they are consistent with each other.
    pub together: Together,
    /// How long the guest's writes were held, if at all.
    pub held: Option<Duration>,
    /// Errors on the way.
    pub problems: Vec<Error>,
}

/// Why some were not taken, and the remaining disks.
pub(super) struct Failed {
    pub cause: Box<NotTaken>,
    pub rest: Vec<Disk>,
}

/// Source for repeating a disk's snapshot.
enum Source {
    Volume(Box<(LvInfo, Kind, Option<Below>)>, Arc<Journal>),
    Image(PathBuf),
    Off,
}

impl Source {
    fn of(disk: &Disk) -> Source {
        match disk {
            Disk::Volume(plan) => Source::Volume(
                Box::new((plan.origin.clone(), plan.kind.clone(), plan.below.clone())),
                plan.intent.journal().clone(),
            ),
            Disk::Image(path) => Source::Image(path.clone()),
            Disk::Off(_) => Source::Off,
        }
    }

    fn watch(&self) -> Quiet {
        match self {
            Source::Volume(volume, _) => Quiet::device(&volume.0),
            Source::Image(path) => Quiet::file(path),
            Source::Off => Quiet::Fixed,
        }
    }

    /// The volume, if it can be suspended.
    fn holdable(&self) -> Option<&LvInfo> {
        match self {
            Source::Volume(volume, _) if matches!(volume.1, Kind::Thick { .. }) => {
                let refusal = hold::refusal(&volume.0);
                if let Some(why) = &refusal {
                    log::debug!("{} is not suspended: {why}", volume.0.name);
                }
                refusal.is_none().then_some(&volume.0)
            }
            _ => None,
        }
    }
}

/// Takes the snapshots of all disks into `taken`, in order.
pub(super) fn take(
    disks: Vec<Disk>,
    how: &How,
    taken: &mut Vec<Box<dyn Snapshot>>,
) -> std::result::Result<Taken, Failed> {
    let sources: Vec<Source> = disks.iter().map(Source::of).collect();
    let names: Vec<String> = disks.iter().map(Disk::name).collect();
    let mut problems = Vec::new();
    let mut hold = match sources.len() {
        0 | 1 => None,
        _ => start(&sources, how.hold).unwrap_or_else(|error| {
            let text = format!("{}: its writes cannot be held", names.join(", "));
            problems.push(Error::new(Code::QuiesceFailed, text).because(error));
            None
        }),
    };
    let mut work = Work {
        disks: disks.into_iter().map(Some).collect(),
        sources: &sources,
        names: &names,
        numbers: Vec::new(),
        taken,
        problems: &mut problems,
    };
    let done = work.all(hold.as_mut(), how.at_rest);
    let rest: Vec<Disk> = work.disks.into_iter().flatten().collect();
    let mut order: Vec<_> = work.numbers.into_iter().zip(taken.drain(..)).collect();
    let mut held = None;
    let mut early = false;
    if let Some((mut hold, _)) = hold {
        problems.extend(hold.weaker.take());
        let released = hold.release();
        (held, early) = (Some(released.held), released.early);
        problems.extend(released.problem);
    }
    order.sort_by_key(|(number, _)| *number);
    taken.extend(order.into_iter().map(|(_, snapshot)| snapshot));
    let mut doubts = match done {
        Ok(doubts) => doubts,
        Err(mut cause) => {
            for problem in problems {
                log::error!("{}", problem.report());
            }
            if early {
                let seconds = how.hold.as_secs();
                let text = format!("the volumes were resumed after {seconds} s (`hold_seconds`)");
                cause.error = Error::new(Code::SnapshotFailed, text).because(cause.error);
            }
            return Err(Failed { cause, rest });
        }
    };
    if early && doubts.is_empty() {
        let seconds = how.hold.as_secs();
        doubts.push(format!(
            "they were resumed after {seconds} s, before the last snapshot was there"
        ));
    }
    let together = match names.len() {
        0 | 1 => Together::Single,
        _ if doubts.is_empty() => Together::Yes,
        _ => Together::No(doubts.join("; ")),
    };
    Ok(Taken {
        together,
        held,
        problems,
    })
}

/// Suspends the volumes that can be; returns their indexes.
fn start(sources: &[Source], limit: Duration) -> Result<Option<(Hold, Vec<usize>)>> {
    let (mut numbers, mut origins, mut journal) = (Vec::new(), Vec::new(), None);
    for (number, source) in sources.iter().enumerate() {
        if let (Some(origin), Source::Volume(_, theirs)) = (source.holdable(), source) {
            numbers.push(number);
            origins.push(origin);
            journal = Some(theirs);
        }
    }
    match journal {
        Some(journal) => Ok(Some((Hold::start(&origins, journal, limit)?, numbers))),
        None => Ok(None),
    }
}

struct Work<'a> {
    /// Disks not yet snapshotted.
    disks: Vec<Option<Disk>>,
    sources: &'a [Source],
    names: &'a [String],
    /// Indexes of the disks whose snapshots are in `taken`.
    numbers: Vec<usize>,
    taken: &'a mut Vec<Box<dyn Snapshot>>,
    problems: &'a mut Vec<Error>,
}

type Step<T> = std::result::Result<T, Box<NotTaken>>;

impl Work<'_> {
    /// Takes all snapshots. Returns the doubts about one instant.
    fn all(&mut self, hold: Option<&mut (Hold, Vec<usize>)>, at_rest: bool) -> Step<Vec<String>> {
        let (mut hold, held) = match hold {
            Some((hold, held)) => (Some(hold), &held[..]),
            None => (None, &[][..]),
        };
        let others: Vec<usize> = (0..self.disks.len())
            .filter(|n| !held.contains(n))
            .collect();
        let several = self.disks.len() > 1;
        let mut watched = BTreeMap::new();
        for &number in &others {
            if several {
                watched.insert(number, self.sources[number].watch());
            }
            self.one(number, hold.is_some())?;
        }
        let mut doubts = Vec::new();
        for tries in 1..=TRIES {
            let last = self.numbers.last();
            let earlier = watched.iter().filter(|(number, _)| Some(*number) != last);
            let moved = earlier.filter_map(|(number, quiet)| Some((*number, quiet.check().err()?)));
            let moved: Vec<(usize, String)> = moved.collect();
            let in_time = hold.as_deref().is_none_or(Hold::has_time);
            if moved.is_empty() || at_rest || tries == TRIES || !in_time {
                let doubt = |(n, why): (usize, String)| format!("{}: {why}", self.names[n]);
                doubts.extend(moved.into_iter().map(doubt));
                break;
            }
            for (number, why) in moved {
                log::debug!("{}: {why}", self.names[number]);
                self.again(number, &mut watched, hold.is_some())?;
            }
        }
        for &number in held {
            if let (Some(hold), Source::Volume(volume, _)) = (&mut hold, &self.sources[number]) {
                if !hold.holds(&volume.0) {
                    let name = &volume.0.name;
                    doubts.push(format!(
                        "{name}: it was resumed before its snapshot was taken"
                    ));
                }
            }
            self.one(number, true)?;
        }
        Ok(doubts)
    }

    /// Takes one snapshot.
    fn one(&mut self, number: usize, beside_suspended: bool) -> Step<()> {
        let Some(disk) = self.disks[number].take() else {
            return Ok(());
        };
        let snapshot = disk.take(beside_suspended)?;
        self.taken.push(snapshot);
        self.numbers.push(number);
        Ok(())
    }

    /// Replaces a snapshot.
    fn again(
        &mut self,
        number: usize,
        watched: &mut BTreeMap<usize, Quiet>,
        beside_suspended: bool,
    ) -> Step<()> {
        let source = &self.sources[number];
        let disk = source.again().map_err(NotTaken::without_leftover)?;
        let Some(disk) = disk else {
            return Ok(());
        };
        self.disks[number] = Some(disk);
        if let Some(at) = self.numbers.iter().position(|n| *n == number) {
            self.numbers.remove(at);
            let mut old = self.taken.remove(at);
            if let Some(mut removal) = old.removal() {
                if let Some(Disk::Volume(plan)) = &mut self.disks[number] {
                    plan.activated = removal.take_activated();
                }
                // The old one stays for the sweep.
                self.problems.extend(remove_locked(removal).err());
            }
        }
        watched.insert(number, source.watch());
        self.one(number, beside_suspended)
    }
}

impl Source {
    /// Prepares the disk again, with a new name in the journal. `None`: no repeat possible.
    fn again(&self) -> Result<Option<Disk>> {
        Ok(match self {
            Source::Off => None,
            Source::Image(path) => Some(Disk::Image(path.clone())),
            Source::Volume(volume, journal) => {
                let (origin, kind, below) = &**volume;
                let exists = |name: &LvName| {
                    dm::by_name(&name.dm_name()).is_ok_and(|device| device.is_some())
                };
                let mut intents = journal.intend_volumes(&[&origin.name], exists)?;
                intents.pop().map(|intent| {
                    Disk::Volume(Box::new(Plan {
                        origin: origin.clone(),
                        kind: kind.clone(),
                        intent,
                        activated: None,
                        // Uses by the host were checked before the first attempt.
                        in_container: false,
                        below: below.clone(),
                    }))
                })
            }
        })
    }
}

impl Disk {
    fn name(&self) -> String {
        match self {
            Disk::Volume(plan) => plan.origin.name.to_string(),
            Disk::Image(path) | Disk::Off(path) => reflink::shown(path),
        }
    }

    /// Why data of the disk may be missing.
    pub(super) fn doubt(&self) -> Option<Error> {
        match self {
            Disk::Volume(plan) => plan.below.as_ref()?.doubt(&plan.origin.name),
            Disk::Image(_) | Disk::Off(_) => None,
        }
    }

    fn take(self, beside_suspended: bool) -> Step<Box<dyn Snapshot>> {
        match self {
            Disk::Volume(plan) => plan
                .take(beside_suspended)
                .map(|snapshot| Box::new(snapshot) as _),
            Disk::Image(path) => reflink::take(&path)
                .map(|snapshot| Box::new(snapshot) as _)
                .map_err(NotTaken::without_leftover),
            Disk::Off(path) => off::take(&path)
                .map(|disk| Box::new(disk) as _)
                .map_err(NotTaken::without_leftover),
        }
    }
}
