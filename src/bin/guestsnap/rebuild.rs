//! `rebuild`: a guest's disks from the kit in its backup.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use guestsnap::job::rebuild::{Rebuild, TargetName};
use guestsnap::job::{Importance, rebuild::plan::Plan};
use guestsnap::kit;
use serde_json::json;

use crate::args::Arguments;
use crate::screen::{Answer, Screen};

pub fn rebuild(
    folder: &Path,
    disks: &[OsString],
    only_plan: bool,
    wipe: bool,
    arguments: &Arguments,
) -> guestsnap::Result<Answer> {
    let targets = disks.iter().map(|text| TargetName::parse(text));
    let targets = targets.collect::<guestsnap::Result<Vec<_>>>()?;
    let plan = Plan::new(kit::load(folder)?, targets, wipe)?;
    let mut text = String::new();
    let lines = plan.lines();
    if only_plan {
        text = lines.join("\n") + "\n";
        return Ok(Answer {
            text,
            json: json!({ "plan": lines, "made": false }),
            errors: Vec::new(),
        });
    }
    let missing: Vec<String> = plan.missing().collect();
    let screen = Arc::new(Screen::new()?);
    let made = Rebuild::start(plan, arguments.working_dir(), screen.clone()).and_then(Rebuild::run);
    let errors = screen.tell(Importance::Info);
    let made = made?;
    for line in &missing {
        let _ = writeln!(text, "{line}");
    }
    let _ = writeln!(
        text,
        "made {} with {} filesystems",
        made.disks.join(", "),
        made.volumes
    );
    Ok(Answer {
        text,
        json: json!({ "disks": made.disks, "volumes": made.volumes, "missing": missing, "made": true }),
        errors,
    })
}
