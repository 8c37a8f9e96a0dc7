//! From the snapshots of a guest to a walk over its tree, on the helper's thread.

use std::sync::Arc;

use super::context::Context;
use super::notes::{Notes, log_late};
use super::settings::BackupSettings;
use crate::config::client::Fsck;
use crate::config::{FsPolicy, defaults};
use crate::error::{Code, Error, Result, escape, shorten};
use crate::job::caller::{CancelFlag, Importance, Reporter};
use crate::job::open::{self, How, OpenGuest};
use crate::job::paths::Paths;
use crate::job::prepare::Prepared;
use crate::job::saves::{Place, Saves};
use crate::snapshot::Journal;
use crate::stream::ahead::{AheadOptions, ReadAhead};

/// A guest that is being read ahead.
pub(super) struct Opened {
    // In this order: if the job takes neither, the readers go first.
    pub(super) walker: Option<ReadAhead>,
    pub(super) open: OpenGuest,
    /// Paths that the previous job lacks.
    pub(super) anew: Paths,
    pub(super) places: Vec<Place>,
    /// Errors reported so far, of its quiescing, snapshots, disks and volumes.
    pub(super) errors: u64,
}

/// All that the opening of one guest needs.
struct Opening {
    prepared: Prepared,
    settings: Arc<BackupSettings>,
    policy: FsPolicy,
    fsck: Fsck,
    root: Option<String>,
    options: AheadOptions,
    saves: Option<Arc<Saves>>,
    journal: Arc<Journal>,
    cancel: CancelFlag,
    notes: Arc<Notes>,
}

/// Opens a guest. `None`: the job was cancelled meanwhile, and its disks do not answer.
pub(super) fn open(context: &mut Context, prepared: Prepared) -> Result<Option<Opened>> {
    let name = prepared.guest.name.clone();
    let Some(opening) = Opening::new(context, prepared) else {
        return Ok(None);
    };
    let notes = opening.notes.clone();
    let opened = context.helper.run(
        move || opening.run(),
        |opened| {
            log_late(opened.err());
        },
    )?;
    match opened {
        Some(opened) => {
            let errors = notes.tell(context.desk().reporter());
            opened.map(|opened| {
                let errors = opened.errors + errors;
                Some(Opened { errors, ..opened })
            })
        }
        None => {
            notes.leave(context.desk().reporter());
            let what = format!(
                "{name}: it was being opened when the job was cancelled; its snapshots are removed \
                 when its disks answer"
            );
            let error = Error::new(Code::DiskStalled, what);
            context.helper.give_up_on(&error);
            Ok(None)
        }
    }
}

impl Opening {
    /// `None`: the job is at its end.
    fn new(context: &Context, prepared: Prepared) -> Option<Opening> {
        let (settings, client) = (context.settings.clone(), &context.client);
        let limits = &client.limits;
        let name = &prepared.guest.name;
        Some(Opening {
            options: AheadOptions {
                budget: limits
                    .read_ahead
                    .as_deref()
                    .copied()
                    .unwrap_or(defaults::READ_AHEAD),
                threads: limits
                    .readers
                    .as_deref()
                    .copied()
                    .unwrap_or(defaults::READERS),
                names_only: settings.estimate,
                changed_since: (!settings.full).then_some(settings.since),
            },
            policy: client.fs_policy(name),
            fsck: client.fsck(name),
            root: client.root(name),
            saves: context.ledger.saves().filter(|_| !settings.full),
            journal: context.helper.journal()?,
            cancel: context.desk().cancel().clone(),
            notes: Arc::new(Notes::default()),
            settings,
            prepared,
        })
    }

    fn run(self) -> Result<Opened> {
        let reporter: &dyn Reporter = self.notes.as_ref();
        let (settings, saves) = (&self.settings, self.saves.as_deref());
        let of_guest = [&self.prepared.prefix[..], b"/"].concat();
        let before = saves.map(|saves| saves.volumes_before(&of_guest));
        let how = How {
            policy: self.policy,
            fsck: self.fsck,
            root: self.root,
            before: before.unwrap_or_default(),
            journal: &self.journal,
            job_id: settings.job_id,
            reporter,
            stop: &|| self.cancel.is_set(),
        };
        let errors = self.prepared.errors;
        let mut open = open::open(self.prepared, &how)?;
        if let Some(saves) = saves {
            open.kit_was(saves.kit_before(&of_guest));
        }
        let places = open.places();
        let anew = anew(&mut open, &places, saves, settings, reporter);
        let mut options = self.options;
        if anew.contains(&open.catalog_tree()) {
            options.changed_since = None;
        }
        match open.read_ahead(options) {
            Ok(walker) => Ok(Opened {
                walker,
                open,
                anew,
                places,
                errors,
            }),
            Err(error) => {
                for undo in open.close() {
                    reporter.message(Importance::Error, &undo.report());
                }
                Err(error)
            }
        }
    }
}

/// Paths of a guest that the previous job lacks; most are reported. Where volumes have moved,
/// nothing may count as deleted. `saves`: of the job before, unless this one is full.
fn anew(
    open: &mut OpenGuest,
    places: &[Place],
    saves: Option<&Saves>,
    settings: &BackupSettings,
    reporter: &dyn Reporter,
) -> Paths {
    let tree = open.catalog_tree();
    let moved = saves.map(|saves| saves.moved(&tree, places, |volume| open.has_volume(volume)));
    let moved = moved.unwrap_or_default();
    open.keep(&moved);
    let (full, accurate) = (settings.full, settings.accurate);
    let mut anew = match saves {
        Some(saves) if accurate => saves.unread_before(&tree),
        Some(saves) => {
            let mut anew = saves.not_before(&tree, places);
            anew.join(&moved);
            anew
        }
        None if full || accurate => Paths::default(),
        None => [tree.clone()].into_iter().collect(),
    };
    tell_anew(open, &anew, &settings.previous, reporter);
    if let Some(saves) = saves.filter(|_| !accurate) {
        // Most of these are left out again.
        anew.join(&saves.marked_before(&tree));
    }
    anew
}

/// Reports files that are saved although they did not change since the previous job.
fn tell_anew(open: &OpenGuest, anew: &Paths, previous: &str, reporter: &dyn Reporter) {
    const SHOWN: usize = 5;
    let (name, all) = (open.name(), open.catalog_tree());
    let mut text = format!(
        "{name}: saved whole, for the job before ({previous}) does not have it, or has another root of \
         it, or by other rules for what is left out"
    );
    if !anew.contains(&all) {
        let paths = anew.trees().chain(anew.objects());
        let paths: Vec<_> = paths
            .map(|path| shorten(&escape(path)).into_owned())
            .collect();
        let shown = &paths[..paths.len().min(SHOWN)];
        let more = match paths.len() - shown.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        text = format!(
            "{name}: saved whole, for the job before ({previous}) has not read them: {}{more}",
            shown.join(", ")
        );
    }
    if *anew != Paths::default() {
        reporter.message(Importance::Info, &text);
    }
}
