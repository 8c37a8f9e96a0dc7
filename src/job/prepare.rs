//! From a directive to snapshots: which guests, and one instant of each.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;

use super::aside::TICK;
use super::caller::{CancelFlag, Importance, Reporter};
use super::host::Host;
use super::text::size_text;
use crate::config::client::{FilterSettings, Quiesce};
use crate::config::{ClientFile, Directive, SnapshotKind};
use crate::error::{Code, Error, Result, escape};
use crate::guest::quiesce::{self, Consistency};
use crate::guest::{self, Absence, DiskSource, Guest, Selection};
use crate::hostdev::lvname::VgName;
use crate::snapshot::{self, Journal, Snapshot, Together};

/// The folder of ours below the daemon's working directory.
const JOURNAL_FOLDER: &str = "guestsnap";

/// Volume groups that are worked on at once.
const MAX_LANES: usize = 8;

/// A guest with its snapshots taken, not looked into yet.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) guest: Guest,
    /// In the order of the guest's disks.
    pub(super) snapshots: Vec<Box<dyn Snapshot>>,
    /// The guest's folder in the catalog, without a trailing slash.
    pub(super) prefix: Vec<u8>,
    /// The consistency that quiescing reached.
    pub(super) consistency: Consistency,
    /// Why its disks are not of one instant.
    pub(super) apart: Option<String>,
    /// Errors reported so far, of its quiescing, snapshots and disks.
    pub(super) errors: u64,
    /// Exclusions of the client's administrator.
    pub(super) filter: FilterSettings,
}

/// How often locked guests are looked at.
const LOCK_INTERVAL: Duration = Duration::from_secs(1);

/// Where the client file is.
pub(super) fn client_file() -> PathBuf {
    PathBuf::from(crate::config::client::CLIENT_FILE)
}

/// Where journals are, below the daemon's working directory.
pub fn journal_folder(working_dir: PathBuf) -> PathBuf {
    working_dir.join(JOURNAL_FOLDER)
}

/// Opens the job's journal and removes the leftovers of dead jobs.
pub(super) fn journal(
    working_dir: PathBuf,
    job_id: u32,
    reporter: &dyn Reporter,
) -> Result<Arc<Journal>> {
    super::rights::check()?;
    let folder = journal_folder(working_dir);
    sweep(&folder, reporter);
    Journal::open(&folder, job_id).map(Arc::new)
}

fn sweep(folder: &Path, reporter: &dyn Reporter) {
    match snapshot::sweep(folder, false) {
        Ok(report) => {
            for line in report.lines() {
                reporter.message(Importance::Info, &format!("sweep: {line}"));
            }
        }
        // Warning: sweep.
        Err(error) => reporter.message(Importance::Warning, &error.report()),
    }
}

/// The guests that each directive selects. Those that are refused are for the caller to report, and
/// where a selector found nothing he must keep all that the catalog has.
pub(super) fn select(
    directives: &[Directive],
    client: &ClientFile,
    reporter: &dyn Reporter,
    stop: &CancelFlag,
) -> Result<Vec<Selection>> {
    let selections = unlocked(directives, client, reporter, stop)?;
    for (selection, directive) in selections.iter().zip(directives) {
        for note in &selection.notes {
            reporter.message(Importance::Info, note);
        }
        for miss in &selection.misses {
            reporter.message(Importance::Error, &miss.report());
        }
        for (_, error) in &selection.unread {
            let text = format!(
                "ERROR {}. It may be of a guest that is to be saved: nothing below {} counts as deleted. \
                 exclude= with the name of its file leaves it out",
                error.report(),
                directive.path
            );
            reporter.message(Importance::Error, &text);
        }
    }
    Ok(selections)
}

/// The guests that each directive selects. If operations of Proxmox VE hold some of them, this waits
/// for their end as long as the client file says; `stop` ends the wait.
fn unlocked(
    directives: &[Directive],
    client: &ClientFile,
    reporter: &dyn Reporter,
    stop: &CancelFlag,
) -> Result<Vec<Selection>> {
    let look = |host: &Host| {
        let selections = directives.iter().map(|d| guest::select(d, client, host));
        selections.collect::<Result<Vec<_>>>()
    };
    let locked = |selections: &[Selection]| {
        let refused = selections.iter().flat_map(|selection| &selection.refused);
        let locked = refused.filter(|(_, error)| error.code() == Code::GuestLocked);
        locked.map(|(name, _)| name.clone()).collect::<Vec<_>>()
    };
    let (begun, limit) = (Instant::now(), client.lock_wait());
    let host = Host::default();
    let first = look(&host)?;
    let names = locked(&first);
    if names.is_empty() || limit.is_zero() {
        return Ok(first);
    }
    let mut looked = begun;
    while !stop.is_set() && begun.elapsed() < limit {
        sleep(TICK);
        if looked.elapsed() >= LOCK_INTERVAL {
            looked = Instant::now();
            // LVM is not asked again. Errors are those of the last look.
            if look(&host).map_or(true, |now| locked(&now).is_empty()) {
                break;
            }
        }
    }
    if stop.is_set() {
        return Ok(first);
    }
    let text = format!(
        "waited {} s for operations of Proxmox VE on {}",
        begun.elapsed().as_secs(),
        names.join(", ")
    );
    reporter.message(Importance::Info, &text);
    // The operations may have changed volumes.
    look(&host.anew())
}

/// `path=` and the guest's name.
pub(super) fn prefix(directive: &Directive, name: &str, slash: bool) -> Vec<u8> {
    let end = if slash { "/" } else { "" };
    format!("{}/{name}{end}", directive.path).into_bytes()
}

/// Owners of catalog folders, over all `Plugin =` lines of a job.
#[derive(Debug, Default)]
pub(super) struct Folders(BTreeMap<Vec<u8>, Vec<DiskSource>>);

impl Folders {
    /// Claims a guest's folder. `false`: the same guest has it already. An error if it is another
    /// guest's, or one is inside of the other: their files would be one tree.
    pub(super) fn claim(&mut self, directive: &Directive, guest: &Guest) -> Result<bool> {
        let folder = prefix(directive, &guest.name, false);
        if self.0.get(&folder) == Some(&guest.disks) {
            return Ok(false);
        }
        let inside = |inner: &[u8], outer: &[u8]| {
            let rest = inner.strip_prefix(outer);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
        };
        let taken = self
            .0
            .iter()
            .find(|(other, _)| inside(&folder, other) || inside(other, &folder));
        if let Some((other, disks)) = taken {
            let list = |disks: &[DiskSource]| {
                let names: Vec<String> = disks.iter().map(ToString::to_string).collect();
                names.join(", ")
            };
            let text = format!(
                "{} for {}: another Plugin line saves {} as {}",
                escape(&folder),
                list(&guest.disks),
                list(disks),
                escape(other),
            );
            return Err(Error::new(Code::DuplicateGuest, text));
        }
        self.0.insert(folder, guest.disks.clone());
        Ok(true)
    }
}

/// The disks of a guest to snapshot, and how.
pub fn requests(
    guest: &Guest,
    directive: &Directive,
    client: &ClientFile,
) -> Vec<snapshot::Request> {
    let disks = guest.disks.iter().enumerate();
    disks
        .map(|(number, disk)| snapshot::Request {
            origin: disk.clone(),
            kind: client.snapshot_kind(&guest.name, directive),
            size: client.snapshot_size(&guest.name, directive),
            chunk: client.snapshot_chunk(&guest.name, directive),
            activate: client.activate(&guest.name),
            in_container: guest.places.get(number).is_some_and(Option::is_some),
        })
        .collect()
}

/// A guest of a job, and the line it is saved by.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) guest: Guest,
    pub(super) directive: Directive,
    /// If it may wait for room: the number of its line.
    pub(super) place: Option<usize>,
}

/// A guest whose snapshots can be taken, and its number in the job.
struct Ready {
    number: usize,
    wanted: Wanted,
    disks: snapshot::Prepared,
}

/// Takes the snapshots of all guests, one guest after the other where they share a volume group:
/// LVM does one thing at a time in a group. `done` gets each guest's result with its number as soon
/// as it is known, from several threads. After `stop`, no further guest is begun.
pub(super) fn snapshots(
    guests: Vec<Wanted>,
    client: &ClientFile,
    journal: &Arc<Journal>,
    reporter: &dyn Reporter,
    stop: &CancelFlag,
    done: &(dyn Fn(usize, Result<Prepared>) + Sync),
) {
    let asked: Vec<_> = guests
        .iter()
        .map(|wanted| snapshot::Asked {
            requests: requests(&wanted.guest, &wanted.directive, client),
            place: wanted.place,
        })
        .collect();
    let mut ready = Vec::new();
    let prepared = snapshot::prepare_each(&asked, journal);
    for (number, (wanted, disks)) in guests.into_iter().zip(prepared).enumerate() {
        match disks {
            Ok(disks) => ready.push(Ready {
                number,
                wanted,
                disks,
            }),
            Err(error) => done(number, Err(error)),
        }
    }
    let lanes = lanes(ready);
    let threads = lanes.len().min(MAX_LANES);
    let lanes = Mutex::new(lanes);
    let next = || lanes.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let work = || {
        while let Some(lane) = next() {
            for ready in lane.into_iter().take_while(|_| !stop.is_set()) {
                let quiesce = quiesce::of(&ready.wanted.guest, client);
                let taken = take(ready.wanted, ready.disks, quiesce, client, reporter);
                done(ready.number, taken);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            let helper = std::thread::Builder::new().name("guestsnap-take".to_owned());
            let helper = helper.spawn_scoped(scope, || {
                // The daemon's signals are handled by the daemon's threads.
                let _ = SigSet::all().thread_block();
                work();
            });
            if let Err(error) = helper {
                // Those that are there do all of it.
                log::debug!("starting a thread: {error}");
            }
        }
        work();
    });
}

/// The guests that must wait for each other, together; the first guest is in the last of these.
fn lanes(ready: Vec<Ready>) -> Vec<Vec<Ready>> {
    let mut lanes: Vec<(BTreeSet<Option<VgName>>, Vec<Ready>)> = Vec::new();
    for guest in ready {
        let mut groups: BTreeSet<_> = guest.disks.groups().into_iter().map(Some).collect();
        if groups.is_empty() {
            // Image files need no lock of LVM, and take no time.
            groups.insert(None);
        }
        let mut members = Vec::new();
        lanes.retain_mut(|(theirs, guests)| {
            let apart = theirs.is_disjoint(&groups);
            if !apart {
                groups.append(theirs);
                members.append(guests);
            }
            apart
        });
        members.push(guest);
        members.sort_by_key(|guest| guest.number);
        lanes.push((groups, members));
    }
    let mut lanes: Vec<_> = lanes.into_iter().map(|(_, guests)| guests).collect();
    lanes.sort_by_key(|guests| std::cmp::Reverse(guests.first().map(|guest| guest.number)));
    lanes
}

/// Snapshots all disks of a guest, back to back, while it runs on.
pub(super) fn running(
    wanted: Wanted,
    client: &ClientFile,
    journal: &Arc<Journal>,
    reporter: &dyn Reporter,
) -> Result<Prepared> {
    let requests = requests(&wanted.guest, &wanted.directive, client);
    let disks = snapshot::prepare(&requests, journal)?;
    take(wanted, disks, None, client, reporter)
}

/// Prepares the guest while it is at rest, if that is asked for.
fn take(
    wanted: Wanted,
    disks: snapshot::Prepared,
    quiesce: Option<Quiesce>,
    client: &ClientFile,
    reporter: &dyn Reporter,
) -> Result<Prepared> {
    let Wanted {
        guest, directive, ..
    } = wanted;
    // A guest that is off has nothing to be brought to rest.
    let off = client.snapshot_kind(&guest.name, &directive) == SnapshotKind::None;
    let quiesce = quiesce.filter(|_| !off);
    let refused = quiesce.as_ref().and_then(|q| quiesce::refusal(&guest, q));
    if let Some(error) = &refused {
        // Warning: rest.
        reporter.message(Importance::Warning, &error.report());
    }
    let quiesce = quiesce.filter(|quiesce| refused.is_none() && !quiesce::is_off(quiesce));
    // All that can be done while the guest runs is done before it is brought to rest: waiting for
    // another job, which may take long, too.
    let disks = disks.lock()?;
    let mounted = disks.are_frozen_by_lvm();
    let mut snapshots = Vec::new();
    let (taken, rest) = quiesce::during(&guest.name, quiesce.as_ref(), |at_rest| {
        let begun = Instant::now();
        let how = snapshot::How {
            hold: client.hold(),
            at_rest,
        };
        disks
            .take_into(&mut snapshots, &how)
            .map(|taken| (taken, begun.elapsed().as_secs_f64()))
    });
    let mut errors = 0;
    let mut tell = |problem: &Error| {
        // A guest that may still be frozen, or something that is left, is more than a warning.
        let importance = match problem.code() {
            Code::ThawFailed | Code::ReleaseFailed => Importance::Error,
            // Warning: rest.
            _ => Importance::Warning,
        };
        errors += u64::from(importance == Importance::Error);
        reporter.message(importance, &format!("{}: {}", guest.name, problem.report()));
    };
    rest.problems.iter().for_each(&mut tell);
    let (taken, took) = taken.map_err(|not_all| not_all.undo())?;
    taken.problems.iter().for_each(&mut tell);
    let (consistency, apart) = reached(rest.consistency, taken.together, mounted);
    if let Some(why) = &apart {
        let text = format!("the snapshots of its disks: {why}");
        tell(&Error::new(Code::NotOneInstant, text));
    }
    if let Some(held) = taken.held {
        let text = format!(
            "{}: its writes were held for {:.2} s",
            guest.name,
            held.as_secs_f64()
        );
        reporter.message(Importance::Info, &text);
    }
    errors += tell_disks(&guest, &snapshots, took, consistency, reporter);
    let prefix = prefix(&directive, &guest.name, false);
    Ok(Prepared {
        filter: client.filter(&guest.name),
        guest,
        snapshots,
        prefix,
        consistency,
        apart,
        errors,
    })
}

/// The consistency of a guest's snapshots, and why they are not of one instant. `mounted`: LVM froze its filesystems.
fn reached(rest: Consistency, together: Together, mounted: bool) -> (Consistency, Option<String>) {
    match (rest, together) {
        (Consistency::Crash, Together::No(why)) if mounted => {
            (Consistency::FilesystemApart, Some(why))
        }
        (Consistency::Crash, _) if mounted => (Consistency::Filesystem, None),
        (Consistency::Crash, Together::Yes) => (Consistency::CrashOneInstant, None),
        (Consistency::Crash, Together::No(why)) => (Consistency::Apart, Some(why)),
        // A quiesced guest does not change from one snapshot to the next.
        (reached, _) => (reached, None),
    }
}

/// Reports the disks of a guest: those with a snapshot, which `took` so many seconds, and the others. Returns the
/// number of errors.
fn tell_disks(
    guest: &Guest,
    snapshots: &[Box<dyn Snapshot>],
    took: f64,
    consistency: Consistency,
    reporter: &dyn Reporter,
) -> u64 {
    let mut errors = 0;
    for (disk, snapshot) in guest.disks.iter().zip(snapshots) {
        reporter.message(
            Importance::Info,
            &format!(
                "{}: disk {disk} {}, snapshot {}, taken in {took:.2} s ({consistency})",
                guest.name,
                size_text(snapshot.device().size),
                snapshot.describe(),
            ),
        );
    }
    for disk in &guest.uncovered {
        let what = format!("disk {} is not covered: {}", disk.what, disk.reason);
        if disk.absence != Absence::Lost {
            reporter.message(Importance::Info, &format!("{}: {what}", guest.name));
            continue;
        }
        let error = Error::new(Code::UnsupportedDisk, what);
        let text = format!(
            "{}: ERROR {}. Nothing of this disk is in this backup.",
            guest.name,
            error.report()
        );
        reporter.message(Importance::Error, &text);
        errors += 1;
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hostdev::lvname::LvName;

    #[test]
    fn test_a_folder_in_the_catalog_is_one_guest_s() {
        let mut folders = Folders::default();
        let mut claim = |line: &str, name: &str, vg: &str| {
            let disks = vec![DiskSource::Lv(LvName::new(vg, name).unwrap())];
            let guest = Guest {
                name: name.into(),
                disks,
                disk_names: Vec::new(),
                places: Vec::new(),
                uncovered: Vec::new(),
                file: None,
                pve: None,
                doubt: None,
            };
            folders.claim(&Directive::parse(line).unwrap(), &guest)
        };
        assert!(claim("lv=vg0/web", "web", "vg0").unwrap());
        // Again, by another line; and a guest of the same name with other disks.
        assert!(!claim("lv=vg0/w*", "web", "vg0").unwrap());
        let error = claim("lv=vg1/web", "web", "vg1").unwrap_err();
        assert_eq!(error.code(), Code::DuplicateGuest);
        let text = error.report();
        for part in ["/@guestsnap/web", "vg0/web", "vg1/web"] {
            assert!(text.contains(part), "{text}");
        }
        // The first one stays.
        assert!(!claim("lv=vg0/web", "web", "vg0").unwrap());
        // Elsewhere it is no trouble, but not inside of the other.
        assert!(claim("lv=vg1/web path=/@other", "web", "vg1").unwrap());
        assert!(claim("lv=vg1/web path=/@guestsnap/webs", "web", "vg1").unwrap());
        assert!(claim("lv=vg1/etc path=/@guestsnap/web", "etc", "vg1").is_err());
        assert!(claim("lv=vg1/deep path=/@a/b", "deep", "vg1").unwrap());
        assert!(claim("lv=vg1/b path=/@a", "b", "vg1").is_err());
    }
}
