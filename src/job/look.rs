//! A look into guests without Bacula, for the command line: the very steps of a backup up to the
//! tree, and back. Guests are not brought to rest, and no configured command runs.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::caller::{Importance, Reporter};
use super::manifest::Manifest;
use super::open::{How, OpenGuest};
use super::prepare::{self, Wanted};
use super::watch::Watch;
use crate::config::client::Fsck;
use crate::config::{ClientFile, Directive};
use crate::error::{Code, Error, Result};
use crate::fs::GuestTree;
use crate::guest::Guest;
use crate::snapshot::Journal;

/// Opens guests, one after the other. Whatever becomes of the process, the next sweep finds all
/// that was made.
#[expect(
    missing_debug_implementations,
    reason = "holds the caller's side as a trait object"
)]
pub struct Look {
    client: ClientFile,
    journal: Arc<Journal>,
    watch: Watch,
    reporter: Arc<dyn Reporter>,
}

/// The result of a look into one guest.
#[derive(Debug)]
pub struct Looked<T> {
    /// The manifest, partial if the guest was not opened in full. `None`: its disks were not examined.
    pub manifest: Option<Manifest>,
    /// The result of the work, if all data it read can be trusted.
    pub result: Result<T>,
}

impl Look {
    /// Checks the rights, sweeps, and begins a journal, as a job does. `working_dir` is the
    /// daemon's.
    pub fn start(
        client: ClientFile,
        working_dir: PathBuf,
        reporter: Arc<dyn Reporter>,
    ) -> Result<Look> {
        let journal = prepare::journal(working_dir, 0, reporter.as_ref())?;
        let watch = Watch::start(&client.limits)?;
        Ok(Look {
            client,
            journal,
            watch,
            reporter,
        })
    }

    /// Snapshots a guest, opens it, and removes everything when the work is done. The reporter gets the
    /// guest's problems.
    pub fn guest<T>(
        &self,
        guest: Guest,
        directive: &Directive,
        work: impl FnOnce(&GuestTree) -> Result<T>,
    ) -> Looked<T> {
        let reporter = self.reporter.as_ref();
        let name = guest.name.clone();
        let stop = || reporter.cancelled();
        let go_on = || match stop() {
            true => Err(Error::new(Code::Cancelled, name.clone())),
            false => Ok(()),
        };
        let prepared = go_on().and_then(|()| {
            let directive = directive.clone();
            let wanted = Wanted {
                guest,
                directive,
                place: None,
            };
            prepare::running(wanted, &self.client, &self.journal, reporter)
        });
        let prepared = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                return Looked {
                    manifest: None,
                    result: Err(error),
                };
            }
        };
        self.watch.add(&prepared.snapshots);
        let mut open = OpenGuest::new(prepared);
        let how = How {
            policy: self.client.fs_policy(&name),
            fsck: Fsck::None,
            root: self.client.root(&name),
            before: BTreeMap::new(),
            journal: &self.journal,
            job_id: 0,
            reporter,
            stop: &stop,
        };
        let opened = open.mount_all(&how).and_then(|()| go_on());
        let mut result = opened.and_then(|()| match open.tree() {
            Some(tree) => {
                let done = work(tree);
                for damage in tree.damage() {
                    let error = Error::new(Code::WalkFailed, damage);
                    reporter.message(Importance::Error, &format!("{name}: {}", error.report()));
                }
                done
            }
            None => Err(Error::new(Code::Internal, "an opened guest without a tree")),
        });
        // Data read from a lost snapshot is worthless.
        if let Err(error) = open.check() {
            result = Err(error);
        }
        self.watch.end(open.snapshots());
        self.watch.tell(reporter);
        let manifest = open.manifest().cloned();
        for error in open.close() {
            reporter.message(Importance::Error, &format!("{name}: {}", error.report()));
        }
        Looked { manifest, result }
    }

    /// Ends the journal. An error names the objects left for the sweep.
    pub fn end(self) -> Result<()> {
        drop(self.watch);
        self.journal.close()
    }
}
