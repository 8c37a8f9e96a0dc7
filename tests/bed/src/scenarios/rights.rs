//! A service that was hardened too much: what it lacks is named, by the job and by `guestsnap check`.

use crate::check;
use crate::inside::{Scenario, scenario};
use crate::points::Points;
use crate::workdir::WorkDir;
use crate::{Result, cmd, tool};

/// On this machine.
pub const ROOT: &[Scenario] = &[
    scenario("root_rights_missing", missing_capabilities),
    scenario("root_rights_daemons", daemons_of_this_host),
];

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

/// A process with the daemon's name counts on this host, and not in a container.
fn daemons_of_this_host() -> Result {
    let dir = WorkDir::new()?;
    let daemon = dir.join("bacula-fd").display().to_string();
    std::fs::copy("/bin/sleep", &daemon)?;
    let mut here = cmd::command(&daemon).arg("60").spawn()?;
    let apart = ["--pid", "--fork", "--kill-child", &daemon, "60"];
    let mut container = cmd::command("unshare").args(apart).spawn()?;
    let children = format!("/proc/{0}/task/{0}/children", container.id());
    let begun = std::time::Instant::now();
    let inside = loop {
        let child = std::fs::read_to_string(&children)?.trim().to_owned();
        let comm = std::fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
        if comm.trim() == "bacula-fd" {
            break child;
        }
        check!(
            begun.elapsed().as_secs() < 30,
            "no process in the namespace"
        );
        std::thread::sleep(std::time::Duration::from_millis(10));
    };
    let mut command = cmd::command(&tool()?.display().to_string());
    let said = command.arg("check").output();
    for child in [&mut here, &mut container] {
        child.kill()?;
        child.wait()?;
    }
    let text = String::from_utf8_lossy(&said?.stdout).into_owned();
    let names = |process: &str| text.contains(&format!("bacula-fd (process {process})"));
    check!(
        names(&here.id().to_string()) && !names(&inside),
        "{inside} is in a container: {text}"
    );
    Ok(())
}
