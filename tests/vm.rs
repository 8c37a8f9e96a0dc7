//! Tests with real LVM, device-mapper, udev and Bacula in emulated machines, several per Debian suite. Outside, this
//! program boots the machines, hands out the scenarios, and shows one test per suite and scenario; inside, the same
//! program runs them.

#[path = "vm/queue.rs"]
mod queue;

use guestsnap_bed::inside::{Place, Scenario};
use guestsnap_bed::{
    Result, emulator, inside, message, package, plugin_so, points, programs, scenarios, tool, vm,
};
use libtest_mimic::{Arguments, Failed, Trial};
use queue::{Board, Hand, Line, Queues};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let scenarios = scenarios::vm();
    match arguments.get(1).map(String::as_str) {
        Some(how @ ("--bed-one" | "--bed-programs")) => {
            let name = arguments.get(2).cloned().unwrap_or_default();
            let run = match how {
                "--bed-one" => inside::run_one,
                _ => inside::run_programs,
            };
            return match run(&scenarios, &name) {
                0 => ExitCode::SUCCESS,
                _ => ExitCode::FAILURE,
            };
        }
        Some("--bed-images") => {
            let mut suites = vm::SUITES.iter();
            let images = suites.try_for_each(|suite| vm::image(suite).map(drop));
            return ended(images.and_then(|()| emulator::folder().map(drop)));
        }
        Some("--bed-points") => return ended(points::built().map(drop)),
        Some("--bed-inside") => return ended(inside::run_all(&scenarios)),
        _ => {}
    }

    let mut arguments = Arguments::from_args();
    if let Err(e) = vm::sweep() {
        eprintln!(
            "cannot remove the leftovers of an earlier run: {}",
            message(&e)
        );
        return ExitCode::FAILURE;
    }
    let board = Arc::new(Board::default());
    let mut trials = Vec::new();
    let mut lines = Vec::new();
    for suite in vm::SUITES {
        let full = |name: &str| format!("vm_{suite}_{name}");
        let scenarios: Vec<_> = scenarios.iter().filter(|s| s.runs_in(suite)).collect();
        for place in [Place::Systemd, Place::Machine, Place::Programs] {
            let wanted = scenarios
                .iter()
                .filter(|s| s.place == place && wanted(&arguments, &full(s.name)));
            lines.push(Line::new(suite, place, wanted.map(|s| **s).collect()));
        }
        for scenario in scenarios {
            let (board, name) = (board.clone(), full(scenario.name));
            trials.push(Trial::test(name.clone(), move || {
                board.wait(&name).map_err(Failed::from)
            }));
        }
    }
    if arguments.list {
        lines.clear();
    }
    let runner = std::thread::spawn({
        let board = board.clone();
        move || work(Queues::new(lines), board)
    });
    // Each test only waits for its result: all at once, so that every result is shown when it comes.
    arguments.test_threads = Some(trials.len().max(1));
    let conclusion = libtest_mimic::run(&arguments, trials);
    // A machine may still be switching itself off; its files are removed then.
    if runner.join().is_err() {
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

fn ended(result: Result) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{}", message(&e));
            ExitCode::FAILURE
        }
    }
}

/// How long a machine may run with `make soak`.
const LONG: Duration = Duration::from_secs(5 * 3600);
/// A machine says every ten seconds that it lives: one that is silent for so long hangs.
const SILENCE: Duration = Duration::from_secs(300);
/// Memory of this machine that an emulated one takes, bit by bit.
const MEMORY_OF_ONE: u64 = 2 << 30;
/// Scenarios at a time that run on this machine's kernel: they wait for clocks.
const PROGRAMS_AT_ONCE: usize = 4;

/// Choice of tests as in libtest-mimic.
fn wanted(arguments: &Arguments, name: &str) -> bool {
    let matches = |filter: &String| {
        if arguments.exact {
            name == filter
        } else {
            name.contains(filter.as_str())
        }
    };
    arguments.filter.as_ref().is_none_or(matches) && !arguments.skip.iter().any(matches)
}

/// Machines at a time: a scenario waits for a third of its time, so one more than processors, if they fit into the memory
/// (a fourth on two processors saves nothing and makes all slower). Measured in `make soak`, and other words for
/// `GUESTSNAP_BED_MACHINES`: one at a time of each suite.
fn machines() -> usize {
    let wish = std::env::var("GUESTSNAP_BED_MACHINES");
    if let Some(count) = wish.ok().and_then(|n| n.parse::<usize>().ok()) {
        return count.max(1);
    }
    if std::env::var_os("GUESTSNAP_SOAK").is_some() {
        return vm::SUITES.len();
    }
    let free = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = free.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let free = free.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    let fit = free.map_or(1, |kib| (kib << 10) / MEMORY_OF_ONE);
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    (processors + 1).min(fit as usize).max(1)
}

/// Everything that is queued, on as many threads as there may be machines, and some for what needs none.
fn work(queues: Queues, board: Arc<Board>) {
    let spare = queues.has(Place::Programs) as usize * PROGRAMS_AT_ONCE;
    let emulated = match queues.has(Place::Machine) || queues.has(Place::Systemd) {
        true => machines(),
        false => 0,
    };
    std::thread::scope(|threads| {
        for _ in 0..emulated {
            threads.spawn(|| {
                while let Some(mut hand) = queues.machine() {
                    let why = match run(&mut hand, &board) {
                        Ok(()) => "the machine did not report it".to_string(),
                        Err(e) => message(&e),
                    };
                    hand.end(&why, &board);
                }
            });
        }
        for _ in 0..spare {
            threads.spawn(|| {
                while let Some((line, scenario)) = queues.next_here() {
                    let started = Instant::now();
                    let outcome = here(line, &scenario);
                    let took = (started.elapsed().as_secs_f64(), None);
                    show(line, scenario.name, took, outcome, &board);
                }
            });
        }
    });
}

/// A scenario with the suite's programs on this machine's kernel.
fn here(line: &Line, scenario: &Scenario) -> Result<String> {
    programs::run(line.suite, scenario.name, scenario.limit(), &files(line)?)
}

/// Files for machines and roots: this program, and the programs under test.
fn files(line: &Line) -> Result<Vec<(PathBuf, String)>> {
    let mut files = vec![
        (std::env::current_exe()?, "test".to_string()),
        (plugin_so()?, "guestsnap-fd.so".into()),
        (tool()?, "guestsnap".into()),
    ];
    if line.names().any(|name| name.starts_with("points_")) {
        let built = points::built()?;
        files.push((built.plugin, "points-fd.so".into()));
        files.push((built.driver, "points".into()));
    }
    if line.place == Place::Systemd || line.names().any(|name| name == "package") {
        files.push((package()?, "guestsnap-fd.deb".into()));
    }
    Ok(files)
}

/// One machine, until there is nothing left for it.
fn run(hand: &mut Hand, board: &Board) -> Result {
    let line = hand.line;
    let mut run = vm::Run::new(line.suite, &inside_command(line.suite));
    run.systemd = line.place == Place::Systemd;
    if std::env::var_os("GUESTSNAP_SOAK").is_some() {
        run.limit = LONG;
    }
    run.silence = Some(SILENCE);
    run.files = files(line)?;
    let mut began = Duration::ZERO;
    run.converse(|text, taken| {
        let Ok(report) = serde_json::from_str::<serde_json::Value>(text) else {
            return None;
        };
        if let Some(text) = report["say"].as_str() {
            println!("{}: {text}", line.suite);
        }
        if report["next"] == true {
            began = taken;
            return Some(hand.next());
        }
        let (name, ok) = (report["name"].as_str()?, report["ok"].as_bool()?);
        let output = report["output"].as_str().unwrap_or_default().to_string();
        let outcome = match ok {
            true => Ok(output),
            false => Err(output.into()),
        };
        let seconds = report["seconds"].as_f64().unwrap_or_default();
        hand.done(name);
        let taken = Some(taken.saturating_sub(began));
        show(line, name, (seconds, taken), outcome, board);
        None
    })
}

/// Shows the outcome, with the seconds that it took and the time of a processor, if known.
fn show(
    line: &Line,
    name: &str,
    (seconds, taken): (f64, Option<Duration>),
    outcome: Result<String>,
    board: &Board,
) {
    let taken = taken.map_or(String::new(), |t| {
        format!(", {:.1} s of a processor", t.as_secs_f64())
    });
    println!("{} {name}: {seconds:.1} s{taken}", line.suite);
    if let (Ok(output), Some(_)) = (&outcome, std::env::var_os("BED_OUTPUT")) {
        println!("{output}");
    }
    let failed = |e| format!("after {seconds:.1} s: {}", message(&e));
    let full = line.full(name);
    let outcome = outcome.map(drop).map_err(failed);
    guestsnap_bed::write_failure(&full, outcome.as_ref().err());
    board.put(full, outcome);
}

fn inside_command(suite: &str) -> String {
    let soak = match std::env::var_os("GUESTSNAP_SOAK") {
        Some(_) => "GUESTSNAP_SOAK=1",
        None => "",
    };
    format!(
        "export GUESTSNAP_BED_INSIDE={suite} GUESTSNAP_SO=/bed/guestsnap-fd.so RUST_BACKTRACE=1 {soak}\n\
         chmod 755 /bed/test /bed/guestsnap; chmod -f 755 /bed/points\nexec /bed/test --bed-inside\n"
    )
}
