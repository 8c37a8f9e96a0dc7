//! A service that was hardened too much: what it lacks is named, by the job and by `guestsnap check`.

use crate::check;
use crate::inside::{Scenario, scenario};
use crate::points::Points;
use crate::{Result, cmd, tool};

/// On this machine.
pub const ROOT: &[Scenario] = &[scenario("root_rights_missing", missing_capabilities)];

const LESS: [&str; 3] = [
    "--bounding-set",
    "-sys_admin,-dac_read_search",
    "--inh-caps=-sys_admin,-dac_read_search",
];

fn missing_capabilities() -> Result {
    let points = Points::new("")?;
    let mut less = cmd::command("setpriv");
    less.args(LESS).arg(tool()?).arg("check");
    let said = less.output()?;
    let text = String::from_utf8_lossy(&said.stdout);
    println!("{text}");
    check!(!said.status.success(), "all is well without CAP_SYS_ADMIN");
    let line = text.lines().find(|l| l.contains("this process lacks"));
    check!(
        line.is_some_and(|l| {
            l.starts_with("ERROR capabilities")
                && l.contains("CAP_SYS_ADMIN")
                && l.contains("CAP_DAC_READ_SEARCH")
                && !l.contains("CAP_CHOWN")
        }),
        "{text}"
    );

    let mut job = cmd::command("setpriv");
    job.args(LESS)
        .arg(crate::points::built()?.driver)
        .args(["backup", &points.working_dir().display().to_string()])
        .arg("lv=novg/x");
    let text = cmd::output(job, None)?;
    println!("{text}");
    check!(
        text.starts_with("F GS-309") && text.contains("CAP_SYS_ADMIN"),
        "{text}"
    );
    let left = std::fs::read_dir(points.working_dir())?.count();
    check!(left == 0, "a job that cannot begin left {left} files");
    Ok(())
}
