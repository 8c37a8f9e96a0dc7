//! The commands of the client file for the start and the end of a job.

use super::context::Context;
use crate::config::client::Hooks;
use crate::error::{Code, Error, Result};
use crate::process;

/// Runs the command that the client file wants to run before the first snapshot.
pub(super) fn before(context: &Context) -> Result<()> {
    let hooks = &context.client.hooks;
    let Some(hook) = &hooks.before else {
        return Ok(());
    };
    let argv = Hooks::argv(hook, context.settings.job_id);
    let stopped = || context.desk().is_stopped();
    process::run_well(&argv, hooks.patience(), &stopped)
        .map_err(|error| Error::new(Code::HookFailed, "before").because(error))
}

/// Runs the command for the end of the job, cancelled or not: it undoes the other one.
pub(super) fn after(context: &Context) {
    let hooks = &context.client.hooks;
    let Some(hook) = &hooks.after else {
        return;
    };
    let argv = Hooks::argv(hook, context.settings.job_id);
    if let Err(error) = process::run_well(&argv, hooks.patience(), &|| false) {
        let error = Error::new(Code::HookFailed, "after").because(error);
        context.desk().error(&error);
    }
}
