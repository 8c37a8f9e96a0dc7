//! Tests on this machine, as root: a real Bacula, guest disks in image files on loop devices. No device-mapper needed.

use guestsnap_bed::hoststate::{HostState, Scope};
use guestsnap_bed::inside::Scenario;
use guestsnap_bed::{Result, check, message, ours, scenarios, workdir};
use libtest_mimic::{Arguments, Trial};
use std::io::{Read, Seek};
use std::process::{ExitCode, Stdio};

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().collect();
    if let [_, one, name] = &words[..] {
        if one == "--bed-one" {
            return ExitCode::from(run_one(name));
        }
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(side_by_side());
    if !arguments.list {
        if !rustix::process::geteuid().is_root() {
            eprintln!("these tests need root (loop devices, mounts, Bacula)");
            return ExitCode::FAILURE;
        }
        if let Err(e) = workdir::sweep() {
            eprintln!(
                "cannot remove the leftovers of an earlier run: {}",
                message(&e)
            );
            return ExitCode::FAILURE;
        }
    }
    let trials = scenarios::root()
        .into_iter()
        .map(|s| Trial::test(s.name, move || timed(s)))
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Tests that run at a time: most of their time is waiting for the daemons' clocks. `GUESTSNAP_BED_JOBS` sets another
/// number; the long versions, which measure, run one at a time.
fn side_by_side() -> usize {
    let wish = std::env::var("GUESTSNAP_BED_JOBS");
    match wish.ok().and_then(|n| n.parse().ok()) {
        Some(n) => n,
        None if std::env::var_os("GUESTSNAP_SOAK").is_some() => 1,
        None => 3 * std::thread::available_parallelism().map_or(1, usize::from),
    }
}

/// The test, with a line about its time for the summary.
fn timed(scenario: Scenario) -> Result {
    let started = std::time::Instant::now();
    let result = apart(scenario);
    let failure = result.as_ref().err();
    let failure = failure.map(|e| e.message().unwrap_or_default().to_owned());
    guestsnap_bed::write_failure(scenario.name, failure.as_ref());
    println!(
        "{}: {:.1} s",
        scenario.name,
        started.elapsed().as_secs_f64()
    );
    result
}

/// The test in a process and a mount namespace of its own; mounts of other software come and go in there too.
fn apart(scenario: Scenario) -> Result {
    let mut command = std::process::Command::new("timeout");
    command
        .args(["--foreground", "-k", "10"])
        .arg((4 * scenario.limit()).to_string())
        .args(["unshare", "-m", "--propagation", "slave"])
        .arg(std::env::current_exe()?)
        .args(["--bed-one", scenario.name])
        .env(
            ours::TEST,
            format!("{}.{}", std::process::id(), scenario.name),
        )
        .stdin(Stdio::null());
    if std::env::var_os("BED_OUTPUT").is_some() {
        return match command.status()? {
            status if status.success() => Ok(()),
            status => Err(status.to_string().into()),
        };
    }
    let mut output = tempfile::tempfile()?;
    command.stdout(output.try_clone()?);
    command.stderr(output.try_clone()?);
    let status = command.status()?;
    if status.success() {
        return Ok(());
    }
    let mut text = Vec::new();
    output.rewind()?;
    output.read_to_end(&mut text)?;
    Err(format!("{status}\n{}", String::from_utf8_lossy(&text)).into())
}

/// Runs the test in this process, with the state of the machine before and after it; the exit status.
fn run_one(name: &str) -> u8 {
    let compared = || -> Result {
        let scenario = scenarios::root().into_iter().find(|s| s.name == name);
        let scenario = scenario.ok_or_else(|| format!("no test {name}"))?;
        ours::begin();
        let before = HostState::capture(None)?;
        (scenario.run)()?;
        let left = HostState::settled_diff(&before, &Scope::default())?;
        check!(
            left.is_empty(),
            "left on the machine:\n  {}",
            left.join("\n  ")
        );
        Ok(())
    };
    match compared() {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("FAILED: {}", message(&e));
            1
        }
    }
}
