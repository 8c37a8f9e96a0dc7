//! The part of the bed that runs inside of the emulated machine: runs scenarios one by one, each in a process of its
//! own, and reports them over the virtio port.

use super::{Result, cmd, hoststate::HostState, message};
use crate::check;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::process::Stdio;
use std::time::Instant;

/// Where reports go; the machine's only way out.
pub const PORT: &str = "/dev/virtio-ports/bed.results";
const INSIDE: &str = "GUESTSNAP_BED_INSIDE";

/// One test that runs in the emulated machine.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    pub name: &'static str,
    pub run: fn() -> Result,
    /// Ended as failed after that time.
    pub seconds: u64,
    /// Runs in this suite's machine alone (in both with `GUESTSNAP_SOAK`): it takes long, and does not depend on
    /// the suite, or the other one's Bacula is tested elsewhere.
    pub only: Option<&'static str>,
    /// Runs in the machine with systemd.
    pub systemd: bool,
}

impl Scenario {
    /// Whether it runs in this suite's machine.
    pub fn runs_in(&self, suite: &str) -> bool {
        let soak = std::env::var_os("GUESTSNAP_SOAK").is_some();
        soak || self.only.is_none_or(|only| only == suite)
    }

    /// The same in the machine with systemd. It may boot the machine again and is then run again,
    /// see [`boot`].
    pub const fn systemd(self) -> Scenario {
        Scenario {
            systemd: true,
            ..self
        }
    }

    /// The same with another time limit.
    pub const fn seconds(self, seconds: u64) -> Scenario {
        Scenario { seconds, ..self }
    }

    /// The time limit; five hours with `GUESTSNAP_SOAK`, which runs the long versions.
    fn limit(&self) -> u64 {
        match std::env::var_os("GUESTSNAP_SOAK") {
            Some(_) => self.seconds.max(5 * 3600),
            None => self.seconds,
        }
    }

    /// The same for one suite.
    pub const fn only(self, suite: &'static str) -> Scenario {
        Scenario {
            only: Some(suite),
            ..self
        }
    }
}

/// A scenario with the usual time limit.
pub const fn scenario(name: &'static str, run: fn() -> Result) -> Scenario {
    Scenario {
        name,
        run,
        seconds: 300,
        only: None,
        systemd: false,
    }
}

/// Whether this process runs in the emulated machine.
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// The suite of the machine this process runs in (`bookworm`, `trixie`).
pub fn suite() -> String {
    std::env::var(INSIDE).unwrap_or_default()
}

/// A file of the machine that a boot does not remove.
fn state(name: &str) -> std::path::PathBuf {
    std::path::Path::new("/var/lib/bed").join(name)
}

fn asked_to_boot(scenario: &str) -> std::path::PathBuf {
    state(&format!("boot.{scenario}"))
}

fn booted(scenario: &str) -> std::path::PathBuf {
    state(&format!("booted.{scenario}"))
}

/// Whether the scenario runs again, after the boot that it asked for.
pub fn is_again(scenario: &str) -> bool {
    booted(scenario).exists()
}

/// Ends the machine with this command, which boots again; the scenario is then run again.
pub fn boot(scenario: &str, how: &str) -> Result {
    remember(&format!("boot.{scenario}"), "")?;
    cmd::sh(how)?;
    std::thread::sleep(std::time::Duration::from_secs(200));
    Err(format!("{how} did nothing").into())
}

/// Writes such a file so that it is there even if the power goes right after.
fn remember(name: &str, text: &str) -> Result {
    std::fs::create_dir_all(state(""))?;
    std::fs::write(state(name), text)?;
    File::open(state(name))?.sync_all()?;
    for dir in [state(""), state("..")] {
        File::open(dir)?.sync_all()?;
    }
    Ok(())
}

/// Writes one line to the outside.
pub fn report(value: &Value) -> Result {
    let mut port = File::options()
        .write(true)
        .open(PORT)
        .map_err(|e| format!("{PORT}: {e}"))?;
    port.write_all(format!("{value}\n").as_bytes())?;
    Ok(())
}

/// A line for the one who watches.
pub fn say(text: &str) {
    if is_inside() {
        let _best_effort = report(&json!({ "say": text }));
    } else {
        println!("{text}");
    }
}

/// Runs one scenario in this process (`--bed-one NAME`); the exit status.
pub fn run_one(scenarios: &[Scenario], name: &str) -> i32 {
    let Some(scenario) = scenarios.iter().find(|s| s.name == name) else {
        eprintln!("no scenario {name}");
        return 2;
    };
    match (scenario.run)() {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("FAILED: {}", message(&e));
            1
        }
    }
}

/// Runs the scenarios named in `/bed/cases`, one a line, and reports each (`--bed-inside`).
pub fn run_all(scenarios: &[Scenario]) -> Result {
    let wanted = std::fs::read_to_string("/bed/cases")?;
    for name in wanted.lines() {
        if state(&format!("done.{name}")).exists() {
            continue;
        }
        let started = Instant::now();
        let scenario = scenarios
            .iter()
            .find(|s| s.name == name)
            .ok_or_else(|| format!("no scenario {name}"))?;
        report(&json!({ "start": name }))?;
        let outcome = run_apart(scenario);
        let (ok, output) = match outcome {
            Ok(output) => (true, output),
            Err(e) => (false, message(&e)),
        };
        report(
            &json!({ "name": name, "ok": ok, "seconds": started.elapsed().as_secs_f64(), "output": output }),
        )?;
        remember(&format!("done.{name}"), "")?;
    }
    Ok(())
}

/// The scenario in its own process; its output. It must leave the machine as it found it.
fn run_apart(scenario: &Scenario) -> Result<String> {
    let kept = format!("before.{}", scenario.name);
    let mut before = HostState::capture(None)?;
    match std::fs::read_to_string(state(&kept)) {
        // Before the machine was booted again. Mounts end with a boot, and each has others.
        Ok(text) => {
            // Once for each time that was asked for: a crash is no boot.
            std::fs::rename(asked_to_boot(scenario.name), booted(scenario.name))
                .map_err(|e| format!("the machine booted by itself: {e}"))?;
            let mounts = before.mounts;
            before = serde_json::from_str(&text).map_err(|e| format!("{kept}: {e}"))?;
            before.mounts = mounts;
        }
        Err(_) => {
            let text = serde_json::to_string(&before).map_err(|e| format!("{kept}: {e}"))?;
            remember(&kept, &text)?;
        }
    }
    let file = format!("/tmp/output.{}", scenario.name);
    let out = File::create(&file)?;
    let seconds = scenario.limit();
    let mut command = cmd::command("timeout");
    command
        .args(["-k", "10", &seconds.to_string()])
        .arg(std::env::current_exe()?);
    command
        .args(["--bed-one", scenario.name])
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out);
    let status = command.status()?;
    let text = String::from_utf8_lossy(&std::fs::read(&file)?).into_owned();
    let left = if status.success() {
        HostState::settled_diff(&before, &Default::default())?
    } else {
        HostState::capture(None)?.diff(&before)
    };
    if status.success() && left.is_empty() {
        return Ok(text);
    }
    let how = match status.code() {
        Some(124 | 137) => format!("took longer than {seconds} s"),
        _ => status.to_string(),
    };
    let mut shown = format!("{how}\n{text}");
    if !left.is_empty() {
        shown += &format!("\nleft in the machine:\n  {}", left.join("\n  "));
        if let Err(e) = clean_machine() {
            shown += &format!("\nand the machine could not be cleaned: {}", message(&e));
        }
    }
    Err(shown.into())
}

/// After a failure: brings the machine back to an empty state for the next scenario. Nothing in it is anyone's.
fn clean_machine() -> Result {
    check!(is_inside(), "this is not the emulated machine");
    cmd::sh(
        "pkill -KILL bacula- || true; sleep 0.5
        grep -E ' /tmp/| /mnt' /proc/self/mounts | cut -d' ' -f2 | sort -r | xargs -r -n1 umount -l
        dmsetup remove_all --force --retry --deferred || true
        losetup -D || true
        sleep 0.5
        for d in /dev/vdc /dev/vdd; do wipefs -afq $d; done
        rm -rf /tmp/guestsnap-bed.*
        udevadm settle --timeout=20",
    )?;
    Ok(())
}
