//! State that a job keeps from its start to its end.

use std::sync::Arc;

use super::desk::Desk;
use super::helper::Helper;
use super::ledger::Ledger;
use super::settings::BackupSettings;
use crate::config::ClientFile;
use crate::error::{Code, Error};
use crate::job::caller::Importance;
use crate::job::watch::Watch;

/// Shared by the plan, the guests and the files of a job.
pub(super) struct Context {
    pub(super) settings: Arc<BackupSettings>,
    pub(super) client: ClientFile,
    pub(super) helper: Helper,
    pub(super) watch: Option<Arc<Watch>>,
    pub(super) ledger: Ledger,
}

impl Context {
    pub(super) fn new(settings: BackupSettings, client: ClientFile, desk: Desk) -> Context {
        let settings = Arc::new(settings);
        Context {
            ledger: Ledger::new(settings.clone(), desk.clone()),
            settings,
            client,
            helper: Helper::new(desk),
            watch: None,
        }
    }

    pub(super) fn desk(&self) -> &Desk {
        self.helper.desk()
    }

    /// Does a part of a guest's end beside the daemon's thread. `None`: the job was cancelled some time
    /// ago and this still waits, or the work was lost; that was told. The work goes on by itself, with
    /// the journal, and its result is for `late`.
    pub(super) fn unhurried<T: Send + 'static>(
        &mut self,
        name: &str,
        step: &str,
        work: impl FnOnce() -> T + Send + 'static,
        late: impl FnOnce(T) + Send + 'static,
    ) -> Option<T> {
        match self.helper.run_patiently(work, late) {
            Ok(Some(done)) => return Some(done),
            Ok(None) => {
                let what = format!("{name}: the job was cancelled while {step} waits for it");
                let error = Error::new(Code::DiskStalled, what);
                self.helper.give_up_on(&error);
            }
            // Everything that the work held was dropped, and so released.
            Err(error) => {
                let text = format!("{name}: {step}: {}", error.report());
                self.desk().message(Importance::Error, &text);
                // Whether its snapshots were valid to the end is not known.
                self.ledger
                    .fail(Error::new(Code::GuestsFailed, format!("{name}: {step}")));
            }
        }
        None
    }
}
