//! A look into guests without Bacula, for the command line: the very steps of a backup up to the
//! tree, and back. Guests are not brought to rest, and no configured command runs.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;

use super::open::{How, OpenGuest};
use super::prepare::{self, Wanted};
use super::watch::Watch;
use super::{Importance, Reporter};
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

/// What came of a look into one guest.
#[derive(Debug)]
pub struct Looked<T> {
    /// The guest's manifest (`docs/manifest.md`), as far as it was opened.
    pub manifest: Value,
    /// What the work gave, if everything it has read can be trusted.
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

    /// Snapshots a guest, opens it, and takes everything down when the work is done. What is wrong
    /// with the guest is told to the reporter.
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
            let wanted = Wanted { guest, directive };
            prepare::running(wanted, &self.client, &self.journal, reporter)
        });
        let prepared = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                return Looked {
                    manifest: Value::Null,
                    result: Err(error),
                };
            }
        };
        self.watch.add(&prepared.snapshots);
        let mut open = OpenGuest::new(prepared);
        let how = How {
            policy: self.client.fs_policy(&name),
            fsck: Fsck::None,
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
        // What a snapshot that is lost gave is worth nothing.
        if let Err(error) = open.check() {
            result = Err(error);
        }
        self.watch.end(open.snapshots());
        self.watch.tell(reporter);
        let manifest = open.found().clone();
        for error in open.close() {
            reporter.message(Importance::Error, &format!("{name}: {}", error.report()));
        }
        Looked { manifest, result }
    }

    /// Ends the journal. An error names what is left for the sweep.
    pub fn end(self) -> Result<()> {
        drop(self.watch);
        self.journal.close()
    }
}
