//! The end of a guest's run: its snapshots are checked, then everything is taken down.

use std::thread::JoinHandle;
use std::time::Instant;

use super::context::Context;
use super::guest::{GuestRun, HARD_LINK_BYTES};
use super::notes::log_late;
use super::tally::Tally;
use crate::error::{Code, Error, Result};
use crate::job::caller::Importance;
use crate::job::open::OpenGuest;
use crate::job::saves::Summary;
use crate::job::text::size_text;
use crate::point::{Point, pass};
use crate::stream::HardLinks;

/// Ends a guest's run, complete or not.
pub(super) fn release(guest: GuestRun, context: &mut Context) {
    pass(Point::Release);
    let GuestRun {
        open,
        walk,
        links,
        filter,
        mut tally,
        mut ledger,
        file,
        ..
    } = guest;
    let name = open.name().to_owned();
    ledger.tell_left_out(&name, context.desk(), &mut tally);
    ledger.end(&mut context.ledger);
    let complete = walk.is_complete();
    // Both hold folders of the guest open.
    drop(file);
    let stuck = context.helper.end_with(walk.stop());
    tally.tell_untold();
    tell_forgotten(&name, &links, context);
    drop(links);
    if !stuck.is_empty() {
        leave_stalled(open, stuck, context);
        return;
    }
    let Some((open, checked)) = check(open, context) else {
        return;
    };
    let result = Summary {
        ended: std::time::UNIX_EPOCH
            .elapsed()
            .map_or(0, |since| since.as_secs()),
        full: context.settings.full,
        files: tally.files,
        bytes: tally.bytes,
        errors: tally.errors,
        kit: open.kit_digests(),
        consistency: open.consistency().to_string(),
    };
    let (peak, begun) = (open.peak(), Instant::now());
    let closed = context.unhurried(&name, "its release", move || open.close(), log_late);
    let Some(closed) = closed else {
        return;
    };
    let text = summary(&tally, complete, peak, filter.left_out, begun);
    context
        .desk()
        .message(Importance::Info, &format!("{name}: {text}"));
    match checked {
        Err(error) => cannot_be_trusted(&name, &error, context),
        Ok(()) if complete => ledger.saved(result, &mut context.ledger),
        Ok(()) => {}
    }
    for error in closed {
        let text = format!("{name}: {}", error.report());
        context.desk().message(Importance::Error, &text);
    }
    pass(Point::Released);
}

/// Reports files whose further names were no longer known.
fn tell_forgotten(name: &str, links: &HardLinks, context: &Context) {
    if links.forgotten() > 0 {
        let text = format!(
            "{name}: {} files with several names are more than can be remembered ({} MiB of memory, and a file in \
             the daemon's working directory): their further names are saved as files of their own, and are no hard \
             links after a restore",
            links.forgotten(),
            HARD_LINK_BYTES >> 20
        );
        // Warning: many links.
        context.desk().message(Importance::Warning, &text);
    }
    if links.crowded() > 0 {
        let text = format!(
            "{name}: {} unchanged names of files with several names were saved again: more than {} MiB of memory hold",
            links.crowded(),
            HARD_LINK_BYTES >> 20
        );
        context.desk().message(Importance::Info, &text);
    }
}

/// Checks the snapshots of a guest, and ends the watch over them. `None`: the guest was left behind.
fn check(mut open: OpenGuest, context: &mut Context) -> Option<(OpenGuest, Result<()>)> {
    let name = open.name().to_owned();
    let check = move || {
        let checked = open.check();
        (open, checked)
    };
    let late = |(open, checked): (OpenGuest, Result<()>)| {
        log_late(checked.err().into_iter().chain(open.close()));
    };
    let (mut open, checked) =
        context.unhurried(&name, "the state of its snapshots", check, late)?;
    if let Some(watch) = &context.watch {
        open.seen(watch.end(open.snapshots()));
        watch.tell(context.desk().reporter());
    }
    Some((open, checked))
}

/// Leaves a guest whose disk does not answer to the threads blocked on it. They release their objects
/// when they return.
fn leave_stalled(mut open: OpenGuest, stuck: Vec<JoinHandle<()>>, context: &mut Context) {
    if let Some(watch) = &context.watch {
        open.seen(watch.end(open.snapshots()));
    }
    let what = format!(
        "{}: the job was cancelled while {} reads wait for it; its snapshots stay until they come back",
        open.name(),
        stuck.len()
    );
    let error = Error::new(Code::DiskStalled, what);
    context.helper.give_up_on(&error);
    context.helper.later(move || {
        for thread in stuck {
            // Its messages were for a job that is over.
            let _ = thread.join();
        }
        log_late(open.close());
    });
}

/// Reports that the snapshots of a guest did not last to its end. That fails the job.
fn cannot_be_trusted(name: &str, error: &Error, context: &mut Context) {
    let rest = match error.code() {
        Code::PoolNearlyFull => format!("Only a part of {name} is in this backup."),
        _ => format!("What was saved of {name} in this job cannot be trusted."),
    };
    let text = format!("{name}: ERROR {}. {rest}", error.report());
    context.desk().message(Importance::Error, &text);
    context.ledger.fail(Error::new(error.code(), name));
}

/// The last line of a guest in the job log. `begun`: when its release began.
fn summary(
    tally: &Tally,
    complete: bool,
    peak: Option<f64>,
    left_out: u64,
    begun: Instant,
) -> String {
    let mut text = format!(
        "{} files, {} {}, {} errors{}, in {:.1} s, released in {:.2} s",
        tally.files,
        size_text(tally.bytes),
        match complete {
            true => "sent",
            false => "sent, NOT COMPLETE",
        },
        tally.errors,
        peak.map(|p| format!(", COW peak {p:.0} %"))
            .unwrap_or_default(),
        tally.started.elapsed().as_secs_f64(),
        begun.elapsed().as_secs_f64(),
    );
    if tally.sockets > 0 {
        text.push_str(&format!(
            ", {} sockets not saved (Bacula saves none)",
            tally.sockets
        ));
    }
    if left_out > 0 {
        text.push_str(&format!(", {left_out} left out as the client file says"));
    }
    text
}
