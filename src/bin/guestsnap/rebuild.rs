//! `rebuild`: a guest's disks from the kit in its backup.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use guestsnap::error::escape;
use guestsnap::job::rebuild::definition::with_new_disks;
use guestsnap::job::rebuild::{Rebuild, TargetName};
use guestsnap::job::{Importance, rebuild::plan::Plan};
use guestsnap::{Code, Error, kit};
use serde_json::json;

use crate::args::{Arguments, RebuildOptions};
use crate::screen::{Answer, Screen};

pub fn rebuild(
    folder: &Path,
    options: &RebuildOptions,
    arguments: &Arguments,
) -> guestsnap::Result<Answer> {
    let wanted = options.definition.as_deref();
    let targets = options.disks.iter().map(|text| TargetName::parse(text));
    let targets = targets.collect::<guestsnap::Result<Vec<_>>>()?;
    let mut kit = kit::load(folder)?;
    for (disk, bytes) in &options.sizes {
        let grown = kit.grow(*disk, *bytes);
        grown.map_err(|why| Error::new(Code::BadTarget, format!("--size: {why}")))?;
    }
    let plan = Plan::new(kit, targets, options.wipe)?;
    let definition = Definition::of(folder, &plan, wanted)?;
    let mut text = String::new();
    let lines = plan.lines();
    if options.plan {
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
    let (disks, volumes) = (made.disks.join(", "), made.volumes);
    let _ = writeln!(
        text,
        "made {disks} with {volumes} filesystems and swap areas"
    );
    if let Some(definition) = &definition {
        definition.write(wanted, &mut text)?;
    }
    Ok(Answer {
        text,
        json: json!({ "disks": made.disks, "volumes": made.volumes, "missing": missing, "made": true }),
        errors,
    })
}

/// The guest's definition in the backup, with the new names of its disks.
struct Definition {
    path: PathBuf,
    text: String,
    missing: Vec<String>,
}

impl Definition {
    /// `None`: the backup has none. `wanted`: where it is to be written, which must be free.
    fn of(
        folder: &Path,
        plan: &Plan,
        wanted: Option<&Path>,
    ) -> guestsnap::Result<Option<Definition>> {
        // KIT may be `rebuild` in the folder too.
        let outer = match folder.ends_with(kit::FOLDER) {
            true => folder.parent().unwrap_or(folder),
            false => folder,
        };
        let inner = outer.join("definition");
        let found = fs::read_dir(&inner).into_iter().flatten().flatten().next();
        let bad = |what: String| Error::new(Code::BadKit, what);
        let Some(path) = found.map(|entry| entry.path()) else {
            return match wanted {
                Some(_) => Err(bad(format!(
                    "{}: it holds no definition of the guest",
                    shown(&inner)
                ))),
                None => Ok(None),
            };
        };
        let Some(wanted) = wanted else {
            return Ok(Some(Definition {
                path,
                text: String::new(),
                missing: Vec::new(),
            }));
        };
        if wanted.symlink_metadata().is_ok() {
            let text = format!("--definition {}: it exists", shown(wanted));
            return Err(Error::new(Code::BadTarget, text));
        }
        let text = fs::read_to_string(&path).map_err(|error| bad(shown(&path)).because(error))?;
        let disks = plan.kit.kit.disks.iter().zip(&plan.disks);
        let disks = disks.map(|(old, new)| (old.source.clone(), new.target.clone()));
        let (text, missing) = with_new_disks(&text, &disks.collect::<Vec<_>>());
        Ok(Some(Definition {
            path,
            text,
            missing,
        }))
    }

    fn write(&self, to: Option<&Path>, text: &mut String) -> guestsnap::Result<()> {
        let Some(to) = to else {
            let _ = writeln!(text, "its definition: {}", shown(&self.path));
            return Ok(());
        };
        // Definitions may hold passwords.
        let mut options = File::options();
        let created = options.write(true).create_new(true).mode(0o600).open(to);
        let written = created.and_then(|mut file| file.write_all(self.text.as_bytes()));
        written.map_err(|error| Error::new(Code::OutputFailed, shown(to)).because(error))?;
        let _ = writeln!(text, "its definition: {}", shown(to));
        for disk in &self.missing {
            let disk = escape(disk.as_bytes());
            let _ = writeln!(text, "it does not name {disk}: put the new disk in by hand");
        }
        Ok(())
    }
}

fn shown(path: &Path) -> String {
    escape(path.as_os_str().as_encoded_bytes())
}
