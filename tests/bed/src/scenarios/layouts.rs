//! All disks of `src/layouts/` in one job.

use super::image::{bacula, guest_in, run, store};
use crate::bacula::{Selection, fileset_plugin};
use crate::check;
use crate::guestdisk::{MIB, image};
use crate::inside::{Scenario, scenario};
use crate::layouts::{ALL, Expected};
use crate::workdir::WorkDir;
use crate::{Result, message, plugin_so};

/// On this machine.
pub const ROOT: &[Scenario] = &[scenario("root_layouts", images)];

/// Each as a guest in an image file.
fn images() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    for (name, layout) in ALL {
        let disk = store.path().join(format!("{name}.img"));
        image(&disk, layout.mib * MIB)?;
        (layout.build)(&disk, &dir.join(format!("mnt-{name}")))
            .map_err(|e| format!("{name}: {}", message(&e)))?;
    }
    let directive = format!("guestsnap: image={}/*.img", store.path().display());
    let filesets = [("g", fileset_plugin(&directive))];
    let bacula = bacula(store.path(), plugin_so()?, &filesets)?;
    let job = run(&bacula, "g", "Full")?;
    check!(
        job.status == 'T' && job.errors > 0,
        "status {}, {} errors",
        job.status,
        job.errors
    );
    let all = dir.join("all");
    bacula.restore(job.jobid, &Selection::All, &all)?.clean()?;
    let mut problems = String::new();
    for (name, layout) in ALL {
        let mark = format!("{name}: ");
        let said: Vec<_> = job.log.lines().filter(|l| l.contains(&mark)).collect();
        let fine = match layout.expected {
            Expected::Says(code) => said.iter().any(|l| l.contains(code)),
            Expected::Back(files) => {
                !said.iter().any(|l| l.contains("ERROR"))
                    && files.iter().all(|(path, text)| {
                        std::fs::read_to_string(guest_in(&all, name).join(path))
                            .is_ok_and(|found| found == *text)
                    })
            }
        };
        if !fine {
            problems += &format!(
                "{name}: {} Expected {:?}, the job said {said:#?}\n",
                layout.shows, layout.expected
            );
        }
    }
    check!(problems.is_empty(), "{problems}");
    store.close()
}
