//! Tests with real LVM, device-mapper, udev and Bacula in emulated machines, one per Debian suite. Outside, this program
//! boots the machines and shows one test per suite and scenario; inside, the same program runs the scenarios.

mod scenarios;
mod support;

use libtest_mimic::{Arguments, Failed, Trial};
use std::collections::HashMap;
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use support::{inside, message, vm};

/// What came back for one scenario.
type Outcome = Result<(), Failed>;

/// Results of a suite's machines, filled while they run and complete when they are gone.
#[derive(Default)]
struct Board {
    outcomes: Mutex<Outcomes>,
    changed: Condvar,
}

type Outcomes = HashMap<String, Result<(), String>>;

impl Board {
    fn put(&self, change: impl FnOnce(&mut Outcomes)) {
        change(&mut self.outcomes.lock().unwrap_or_else(|e| e.into_inner()));
        self.changed.notify_all();
    }

    fn wait(&self, name: &str) -> Outcome {
        let mut outcomes = self.outcomes.lock().unwrap_or_else(|e| e.into_inner());
        loop {
            if let Some(outcome) = outcomes.get(name) {
                return outcome.clone().map_err(Failed::from);
            }
            outcomes = self
                .changed
                .wait(outcomes)
                .unwrap_or_else(|e| e.into_inner());
        }
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let scenarios = scenarios::all();
    match arguments.get(1).map(String::as_str) {
        Some("--bed-one") => {
            let name = arguments.get(2).cloned().unwrap_or_default();
            return if inside::run_one(&scenarios, &name) == 0 {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            };
        }
        Some("--bed-images") => {
            let built = vm::SUITES
                .iter()
                .try_for_each(|suite| vm::image(suite).map(drop));
            return match built {
                Ok(()) => ExitCode::SUCCESS,
                Err(e) => {
                    eprintln!("{}", message(&e));
                    ExitCode::FAILURE
                }
            };
        }
        Some("--bed-inside") => {
            return match inside::run_all(&scenarios) {
                Ok(()) => ExitCode::SUCCESS,
                Err(e) => {
                    eprintln!("{}", message(&e));
                    ExitCode::FAILURE
                }
            };
        }
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
    let mut trials = Vec::new();
    let mut machines = Vec::new();
    for suite in vm::SUITES {
        let full = |name: &str| format!("vm_{suite}_{name}");
        let scenarios: Vec<_> = scenarios.iter().filter(|s| s.runs_in(suite)).collect();
        let cases = |systemd: bool| -> String {
            scenarios
                .iter()
                .filter(|s| s.systemd == systemd && wanted(&arguments, &full(s.name)))
                .map(|s| format!("{}\n", s.name))
                .collect()
        };
        let board = Arc::new(Board::default());
        let runs: Vec<_> = [(false, cases(false)), (true, cases(true))]
            .into_iter()
            .filter(|(_, cases)| !arguments.list && !cases.is_empty())
            .collect();
        if !runs.is_empty() {
            machines.push(start(suite, runs, board.clone()));
        }
        for scenario in scenarios {
            let (board, name) = (board.clone(), scenario.name);
            trials.push(Trial::test(full(name), move || board.wait(name)));
        }
    }
    // Each test only waits for its result: all at once, so that every result is shown when it comes.
    arguments.test_threads = Some(trials.len().max(1));
    let conclusion = libtest_mimic::run(&arguments, trials);
    for machine in machines {
        // It may still be switching itself off; its files are removed then.
        if machine.join().is_err() {
            return ExitCode::FAILURE;
        }
    }
    conclusion.exit_code()
}

/// How long a machine may run with `make soak`.
const LONG: Duration = Duration::from_secs(5 * 3600);

/// The same choice libtest-mimic makes.
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

/// Boots a suite's machines one after the other in a thread of its own.
fn start(
    suite: &'static str,
    runs: Vec<(bool, String)>,
    board: Arc<Board>,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        for (systemd, cases) in runs {
            let end = match run(suite, systemd, &cases, &board) {
                Ok(()) => "the machine did not report it".to_string(),
                Err(e) => message(&e),
            };
            board.put(|outcomes| {
                for name in cases.lines() {
                    let none = || Err(format!("no result of {name}: {end}"));
                    outcomes.entry(name.to_string()).or_insert_with(none);
                }
            });
        }
    })
}

fn run(suite: &str, systemd: bool, cases: &str, board: &Board) -> support::Result {
    let mut run = vm::Run::new(suite, &inside_command(suite));
    run.systemd = systemd;
    if std::env::var_os("GUESTSNAP_SOAK").is_some() {
        run.limit = LONG;
    }
    run.files.push((std::env::current_exe()?, "test".into()));
    run.files
        .push((support::plugin_so()?, "guestsnap-fd.so".into()));
    run.files.push((support::tool()?, "guestsnap".into()));
    if cases.lines().any(|name| name.starts_with("points_")) {
        let built = support::points::built()?;
        run.files.push((built.plugin, "points-fd.so".into()));
        run.files.push((built.driver, "points".into()));
    }
    if systemd || cases.lines().any(|name| name == "package") {
        run.files
            .push((support::package()?, "guestsnap-fd.deb".into()));
    }
    run.texts.push(("cases".into(), cases.into()));
    run.run(|line| {
        let Ok(report) = serde_json::from_str::<serde_json::Value>(line) else {
            return;
        };
        if let Some(text) = report["say"].as_str() {
            println!("{suite}: {text}");
        }
        let (Some(name), Some(ok)) = (report["name"].as_str(), report["ok"].as_bool()) else {
            return;
        };
        let output = report["output"].as_str().unwrap_or_default().to_string();
        let seconds = report["seconds"].as_f64().unwrap_or_default();
        println!("{suite} {name}: {seconds:.1} s");
        if std::env::var_os("BED_OUTPUT").is_some() {
            println!("{output}");
        }
        let outcome = if ok {
            Ok(())
        } else {
            Err(format!("after {seconds:.1} s: {output}"))
        };
        board.put(|outcomes| drop(outcomes.insert(name.to_string(), outcome)));
    })
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
