//! The part of the bed that runs inside of the emulated machine: asks for scenarios one by one, runs each in a process of
//! its own, and reports them, all over the virtio port.

use super::{Result, cmd, hoststate::HostState, message, ours};
use crate::check;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// Where reports go; the machine's only way out.
pub const PORT: &str = "/dev/virtio-ports/bed.results";
const INSIDE: &str = "GUESTSNAP_BED_INSIDE";
/// Set in a suite's root filesystem on this machine's kernel: see [`Place::Programs`].
pub const PROGRAMS: &str = "GUESTSNAP_BED_PROGRAMS";

/// A test of the tiers `root` and `vm`.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Its name, without tier and suite for `VM`.
    pub name: &'static str,
    /// The test itself.
    pub run: fn() -> Result,
    /// Ended as failed after that time.
    pub seconds: u64,
    /// Runs in this suite's machine alone (in both with `GUESTSNAP_SOAK`): it takes long, and does not depend on
    /// the suite, or the other one's Bacula is tested elsewhere.
    pub only: Option<&'static str>,
    /// Where it runs.
    pub place: Place,
}

/// Needs of a scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// Its kernel, with LVM, device-mapper and udev: an emulated machine.
    Machine,
    /// A machine with systemd as process 1, and with boots in between.
    Systemd,
    /// Its programs only (Bacula), with guests in image files: the suite's root filesystem on this machine's kernel.
    Programs,
}

impl Scenario {
    /// Whether it runs in this suite's machine.
    pub fn runs_in(&self, suite: &str) -> bool {
        let soak = std::env::var_os("GUESTSNAP_SOAK").is_some();
        soak || self.only.is_none_or(|only| only == suite)
    }

    /// Runs it in a machine with systemd. It may boot the machine again and is then run again,
    /// see [`boot`].
    pub const fn systemd(self) -> Scenario {
        Scenario {
            place: Place::Systemd,
            ..self
        }
    }

    /// Runs it with the suite's programs on this machine's kernel, which takes seconds: for guests in image files.
    pub const fn programs(self) -> Scenario {
        Scenario {
            place: Place::Programs,
            ..self
        }
    }

    /// Sets another time limit.
    pub const fn seconds(self, seconds: u64) -> Scenario {
        Scenario { seconds, ..self }
    }

    /// The time limit; five hours with `GUESTSNAP_SOAK`, which runs the long versions.
    pub fn limit(&self) -> u64 {
        match std::env::var_os("GUESTSNAP_SOAK") {
            Some(_) => self.seconds.max(5 * 3600),
            None => self.seconds,
        }
    }

    /// Limits it to one suite.
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
        // Three times what the longest takes in a machine that shares its processor with another one.
        seconds: 600,
        only: None,
        place: Place::Machine,
    }
}

/// Whether this process runs in the emulated machine.
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Whether what is under test is in `/bed`.
pub fn is_staged() -> bool {
    is_inside() || std::env::var_os(PROGRAMS).is_some()
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
    let mut port = open_port(File::options().write(true))?;
    port.write_all(format!("{value}\n").as_bytes())?;
    Ok(())
}

/// The port can be open once at a time: scenarios use it too.
fn open_port(how: &OpenOptions) -> Result<File> {
    cmd::wait_for(PORT, Duration::from_secs(10), || match how.open(PORT) {
        Ok(port) => Ok(Some(port)),
        Err(e) if e.kind() == ErrorKind::ResourceBusy => Ok(None),
        Err(e) => Err(format!("{PORT}: {e}").into()),
    })
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

/// The scenario in this process, with nothing of it left on the machine (`--bed-programs NAME`); the exit status.
pub fn run_programs(scenarios: &[Scenario], name: &str) -> i32 {
    let compared = || -> Result<i32> {
        ours::begin();
        let before = HostState::capture(None)?;
        let status = run_one(scenarios, name);
        let left = HostState::settled_diff(&before, &Default::default())?;
        check!(left.is_empty(), "left:\n  {}", left.join("\n  "));
        Ok(status)
    };
    compared().unwrap_or_else(|e| {
        eprintln!("FAILED: {}", message(&e));
        1
    })
}

/// Asks for one scenario after the other, runs it and reports it (`--bed-inside`). One that was cut off by a boot is
/// given again. A machine that a failed scenario has left in disorder ends: the next ones get another.
pub fn run_all(scenarios: &[Scenario]) -> Result {
    while let Some(name) = next()? {
        let started = Instant::now();
        let scenario = scenarios
            .iter()
            .find(|s| s.name == name)
            .ok_or_else(|| format!("no scenario {name}"))?;
        let outcome = run_apart(scenario);
        let (ok, mut output) = match outcome {
            Ok(output) => (true, output),
            Err(e) => (false, message(&e)),
        };
        let cleaned = if ok { Ok(()) } else { clean_machine() };
        if let Err(e) = &cleaned {
            output += &format!("\nand the machine could not be cleaned: {}", message(e));
        }
        report(
            &json!({ "name": name, "ok": ok, "seconds": started.elapsed().as_secs_f64(), "output": output }),
        )?;
        cleaned?;
    }
    Ok(())
}

/// The name of the next scenario, if there is one.
fn next() -> Result<Option<String>> {
    let mut port = open_port(File::options().read(true).write(true))?;
    port.write_all(b"{\"next\":true}\n")?;
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        match port.read(&mut byte)? {
            // The other side is not there yet.
            0 => std::thread::sleep(std::time::Duration::from_millis(20)),
            _ if byte == [b'\n'] => break,
            _ => line.extend(byte),
        }
    }
    let name = String::from_utf8_lossy(&line).into_owned();
    Ok(Some(name).filter(|name| !name.is_empty()))
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
    let mut command = cmd::command(&std::env::current_exe()?.display().to_string());
    command
        .args(["--bed-one", scenario.name])
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out);
    let mut child = command.spawn()?;
    let ended = wait_alive(&mut child, scenario.limit())?;
    let text = String::from_utf8_lossy(&std::fs::read(&file)?).into_owned();
    let mut shown = match ended {
        Ended::Well => String::new(),
        Ended::Badly(how) => format!("{how}\n{text}"),
    };
    let left = match shown.is_empty() {
        true => HostState::settled_diff(&before, &Default::default())?,
        false => HostState::capture(None)?.diff(&before),
    };
    if shown.is_empty() && left.is_empty() {
        return Ok(text);
    }
    if shown.is_empty() {
        shown = text;
    }
    if !left.is_empty() {
        shown += &format!("\nleft in the machine:\n  {}", left.join("\n  "));
    }
    Err(shown.into())
}

/// How a scenario's process ended.
enum Ended {
    Well,
    Badly(String),
}

/// How often a machine says that it lives.
const BEAT: Duration = Duration::from_secs(10);

/// Waits for a scenario's process and says meanwhile that the machine lives. After `seconds` the process is killed; the
/// answer then shows what all processes waited for.
fn wait_alive(child: &mut Child, seconds: u64) -> Result<Ended> {
    let started = Instant::now();
    let mut beaten = started;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(match status.success() {
                true => Ended::Well,
                false => Ended::Badly(status.to_string()),
            });
        }
        if started.elapsed().as_secs() > seconds {
            break;
        }
        if beaten.elapsed() > BEAT {
            report(&json!({ "alive": true }))?;
            beaten = Instant::now();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let waiting = cmd::sh(
        "ps -eo pid,ppid,stat,wchan:32,args | grep -v '\\]$'
        for p in /proc/[0-9]*; do
            grep -q '^State:.D' $p/status 2>/dev/null || continue
            echo \"$(cat $p/comm) (${p#/proc/}):\"; cat $p/stack
        done || true",
    )?;
    if let Some(group) = Pid::from_raw(child.id() as i32) {
        kill_process_group(group, Signal::KILL)?;
    }
    let gone = cmd::wait_for("the end of the killed process", BEAT, || {
        Ok(child.try_wait()?)
    });
    let stays = gone
        .err()
        .map_or(String::new(), |e| format!("{}\n", message(&e)));
    Ok(Ended::Badly(format!(
        "took longer than {seconds} s\n{stays}{waiting}"
    )))
}

/// After a failure: brings the machine back to an empty state for the next scenario. It holds nothing of value.
fn clean_machine() -> Result {
    check!(is_inside(), "this is not the emulated machine");
    // A process that waits for an event of udev that never comes would wait for ever.
    let script = "pkill -KILL bacula- || true; sleep 0.5
        dmsetup udevcomplete_all -y > /dev/null || true
        grep -E ' /tmp/| /mnt' /proc/self/mounts | cut -d' ' -f2 | sort -r | xargs -r -n1 umount -l
        dmsetup remove_all --force --retry --deferred || true
        losetup -D || true
        sleep 0.5
        for d in /dev/vdc /dev/vdd; do wipefs -afq $d; done
        rm -rf /tmp/guestsnap-bed.*
        udevadm settle --timeout=20";
    cmd::run("timeout", ["-k", "5", "120", "sh", "-euc", script])?;
    Ok(())
}
