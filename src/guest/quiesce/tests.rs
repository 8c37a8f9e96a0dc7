use super::*;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::process::TICK;

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

fn quiesce(freeze: &str, thaw: &str, seconds: u64) -> Quiesce {
    Quiesce {
        way: QuiesceWay::Commands,
        freeze: words(freeze),
        thaw: words(thaw),
        status: None,
        seconds,
        by_name: true,
        number: None,
    }
}

#[test]
fn test_what_could_freeze_another_guest_is_refused() {
    let mut guest = super::Guest {
        name: "web1".into(),
        disks: Vec::new(),
        disk_names: Vec::new(),
        places: Vec::new(),
        uncovered: Vec::new(),
        file: None,
        pve: None,
        doubt: None,
    };
    let mut quiesce = quiesce("/f", "/t", 1);
    assert!(refusal(&guest, &quiesce).is_none());
    quiesce.number = Some("12".into());
    let error = refusal(&guest, &quiesce).unwrap();
    assert_eq!(error.code(), Code::QuiesceFailed);
    assert!(
        error.report().contains("the number of any domain"),
        "{error}"
    );
    quiesce.number = None;
    guest.doubt = Some("it may be xweb1".into());
    assert!(refusal(&guest, &quiesce).is_some());
    quiesce.by_name = false;
    assert!(refusal(&guest, &quiesce).is_none());
}

#[test]
fn test_qm_gets_the_number_of_a_machine_that_allows_it() {
    let machine = |agent| Some(Handle::Machine { vmid: 100, agent });
    let says = |way: &str, pve: Option<Handle>| {
        let text = format!("[defaults]\nquiesce = '{way}'\n");
        let guest = super::Guest {
            name: "7".into(),
            disks: Vec::new(),
            disk_names: Vec::new(),
            places: Vec::new(),
            uncovered: Vec::new(),
            file: None,
            pve,
            doubt: Some("its name".into()),
        };
        let quiesce = of(&guest, &ClientFile::parse(&text).unwrap());
        quiesce.map(|quiesce| match refusal(&guest, &quiesce) {
            Some(error) => error.report(),
            None => [quiesce.freeze.join(" "), quiesce.thaw.join(" ")].join("; "),
        })
    };
    let freeze = "qm guest cmd 100 fsfreeze-freeze; qm guest cmd 100 fsfreeze-thaw";
    let suspend = "qm suspend 100; qm resume 100";
    let cases = [
        ("qm-freeze", machine(Agent::On), Some(freeze)),
        ("qm-freeze", machine(Agent::NoFreeze), None),
        ("qm-freeze", machine(Agent::Off), Some("agent: 1")),
        ("qm-freeze", Some(Handle::Container), None),
        ("qm-freeze", None, Some("has found it")),
        ("qm-suspend", machine(Agent::Off), Some(suspend)),
        ("qm-suspend", Some(Handle::Container), None),
        ("qm-suspend", None, Some("has found it")),
    ];
    for (way, pve, expected) in cases {
        let said = says(way, pve);
        assert_eq!(said.is_some(), expected.is_some(), "{way} {pve:?}");
        let contains = said.iter().zip(expected).all(|(said, e)| said.contains(e));
        assert!(contains, "{way} {pve:?}: {said:?}");
    }
}

struct Guest {
    folder: tempfile::TempDir,
}

impl Guest {
    fn new() -> Guest {
        Guest {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn touch(&self, name: &str) -> String {
        format!("touch {}", self.path(name))
    }

    fn has(&self, name: &str) -> bool {
        self.folder.path().join(name).exists()
    }

    fn waits_for(&self, name: &str, seconds: u64) {
        let begun = Instant::now();
        while !self.has(name) {
            assert!(begun.elapsed().as_secs() < seconds, "no {name}");
            std::thread::sleep(TICK);
        }
    }
}

fn codes(outcome: &Outcome) -> Vec<Code> {
    outcome.problems.iter().map(Error::code).collect()
}

#[test]
fn test_the_guest_is_at_rest_during_the_work_only() {
    let guest = Guest::new();
    let quiesce = quiesce(&guest.touch("frozen"), &guest.touch("thawed"), 20);
    let (seen, outcome) = during("web1", Some(&quiesce), |_| {
        (guest.has("frozen"), guest.has("thawed"))
    });
    assert_eq!(seen, (true, false), "{outcome:?}");
    assert!(guest.has("thawed"));
    assert_eq!(outcome.consistency, Consistency::Application);
    assert!(outcome.problems.is_empty(), "{outcome:?}");
}

#[test]
fn test_freezes_with_one_thaw_command_wait_for_each_other() {
    let guest = Guest::new();
    let quiesce = quiesce(&guest.touch("frozen"), &guest.touch("thawed"), 20);
    let other = Guest::new();
    let other = self::quiesce(&other.touch("frozen"), &other.touch("thawed"), 20);
    std::thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::channel();
        let (quiesce, seen) = (&quiesce, &guest);
        let ((), outcome) = during("web1", Some(quiesce), |_| {
            scope.spawn(move || during("web2", Some(quiesce), |_| tell.send(seen.has("thawed"))));
            // Each one's thaw would wake the other.
            assert!(told.recv_timeout(Duration::from_millis(500)).is_err());
            // Other commands do not wait, nor does a guest that is not quiesced.
            during("web3", Some(&other), |_| ());
            during("web4", None, |_| ());
        });
        assert!(outcome.problems.is_empty(), "{outcome:?}");
        // The first one is awake by now.
        assert!(told.recv_timeout(Duration::from_secs(20)).unwrap());
    });
}

#[test]
fn test_without_quiesce_the_work_is_just_done() {
    let (result, outcome) = during("web1", None, |_| 7);
    assert_eq!((result, outcome.consistency), (7, Consistency::Crash));
}

#[test]
fn test_time_over_wakes_the_guest_and_is_told() {
    let guest = Guest::new();
    let quiesce = quiesce(&guest.touch("frozen"), &guest.touch("thawed"), 1);
    let ((), outcome) = during("web1", Some(&quiesce), |_| guest.waits_for("thawed", 10));
    assert_eq!(outcome.consistency, Consistency::Crash);
    assert_eq!(codes(&outcome), [Code::QuiesceFailed]);
}

#[test]
fn test_a_failed_freeze_is_thawed_and_told() {
    let guest = Guest::new();
    let quiesce = quiesce("ls /nonexistent", &guest.touch("thawed"), 20);
    let (thawed, outcome) = during("web1", Some(&quiesce), |_| guest.has("thawed"));
    assert!(thawed);
    assert_eq!(outcome.consistency, Consistency::Crash);
    assert_eq!(codes(&outcome), [Code::QuiesceFailed]);
    let report = outcome.problems[0].report();
    assert!(report.contains("/nonexistent"), "{report}");
}

#[test]
fn test_a_hanging_freeze_is_ended() {
    let guest = Guest::new();
    let quiesce = quiesce("sleep 60", &guest.touch("thawed"), 1);
    let begun = Instant::now();
    let ((), outcome) = during("web1", Some(&quiesce), |_| ());
    assert!(begun.elapsed().as_secs() < 20 && guest.has("thawed"));
    assert_eq!(codes(&outcome), [Code::QuiesceFailed, Code::ThawFailed]);
}

#[test]
fn test_a_freeze_that_was_cut_off_may_freeze_the_guest_after_the_thaw() {
    use Code::{QuiesceFailed, ThawFailed};
    for (freeze, expected) in [
        ("sleep 60", &[QuiesceFailed, ThawFailed][..]),
        ("kill -9 $$", &[QuiesceFailed, ThawFailed]),
        // ssh exits like this when the connection is lost.
        ("exit 255", &[QuiesceFailed, ThawFailed]),
        // Exited by itself, for example `timeout` on the remote side.
        ("exit 124", &[QuiesceFailed]),
        // Not started.
        ("exec /no/such/program", &[QuiesceFailed]),
    ] {
        let guest = Guest::new();
        let mut quiesce = quiesce("x", &guest.touch("thawed"), 1);
        quiesce.freeze = script(freeze);
        let ((), outcome) = during("web1", Some(&quiesce), |_| ());
        assert!(guest.has("thawed"), "{freeze}");
        assert_eq!(codes(&outcome), expected, "{freeze}");
        for problem in &outcome.problems[1..] {
            let report = problem.report();
            for part in ["touch", "see whether the guest runs"] {
                assert!(report.contains(part), "{freeze}: {report}");
            }
        }
    }
}

#[test]
fn test_a_freeze_must_be_through_before_the_wake_up_can_come() {
    let guest = Guest::new();
    let quiesce = quiesce("sleep 0.9", &guest.touch("thawed"), 1);
    let (thawed, outcome) = during("web1", Some(&quiesce), |_| guest.has("thawed"));
    assert!(thawed);
    assert_eq!(outcome.consistency, Consistency::Crash);
    assert_eq!(codes(&outcome), [Code::QuiesceFailed, Code::ThawFailed]);
}

#[test]
fn test_a_wake_up_during_the_freeze_does_not_count() {
    let guest = Guest::new();
    let thaw = script(&format!("echo >> {}", guest.path("thawed")));
    let (guard, weaker) = Guard::arm(&thaw, Duration::from_secs(20)).unwrap();
    let group = Pid::from_raw(guard.timer.id().try_into().unwrap());
    let mut frozen = Frozen {
        guest: "web1".into(),
        way: QuiesceWay::Commands,
        since: Instant::now(),
        thaw,
        guard: Some(guard),
        weaker,
    };
    killpg(group, Signal::SIGTERM).unwrap();
    guest.waits_for("thawed", 10);
    let problems = frozen.freeze(&argv(&words(&guest.touch("frozen"))).unwrap());
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].report().contains("before the freeze"));
    let thaws = std::fs::read(guest.path("thawed")).unwrap().len();
    assert_eq!((guest.has("frozen"), thaws), (true, 2));
}

#[test]
fn test_a_guest_that_may_be_frozen_is_no_matter_of_a_warning() {
    for (freeze, expected) in [
        // May have frozen something before it was killed.
        ("sleep 60", Code::ThawFailed),
        ("kill -9 $$", Code::ThawFailed),
        // Reports that it froze nothing.
        ("exit 1", Code::QuiesceFailed),
    ] {
        let mut quiesce = quiesce("x", "false", 1);
        quiesce.freeze = script(freeze);
        let ((), outcome) = during("web1", Some(&quiesce), |_| ());
        assert_eq!(codes(&outcome), [Code::QuiesceFailed, expected], "{freeze}");
    }
}

#[test]
fn test_what_the_freeze_leaves_behind_does_not_hold_up_the_wake_up() {
    let guest = Guest::new();
    let mut quiesce = quiesce("x", &guest.touch("thawed"), 40);
    quiesce.freeze = script("sleep 30 &");
    let begun = Instant::now();
    let ((), outcome) = during("web1", Some(&quiesce), |_| ());
    assert!(outcome.problems.is_empty(), "{outcome:?}");
    assert!(guest.has("thawed") && begun.elapsed().as_secs() < 20);
}

#[test]
fn test_a_failed_thaw_is_told() {
    let guest = Guest::new();
    let quiesce = quiesce(&guest.touch("frozen"), "false", 20);
    let ((), outcome) = during("web1", Some(&quiesce), |_| ());
    assert_eq!(codes(&outcome), [Code::ThawFailed]);
}

#[test]
fn test_missing_programs_freeze_nothing() {
    let guest = Guest::new();
    for (freeze, thaw) in [
        ("guestsnap-no-such-program x", guest.touch("thawed")),
        (
            guest.touch("frozen").as_str(),
            "/no/such/program".to_owned(),
        ),
    ] {
        let ((), outcome) = during("web1", Some(&quiesce(freeze, &thaw, 5)), |_| ());
        assert_eq!(codes(&outcome), [Code::CommandMissing]);
    }
    assert!(!guest.has("frozen") && !guest.has("thawed"));
}

#[test]
fn test_a_panic_wakes_the_guest() {
    let guest = Guest::new();
    let quiesce = quiesce(&guest.touch("frozen"), &guest.touch("thawed"), 20);
    let result = std::panic::catch_unwind(|| during("web1", Some(&quiesce), |_| panic!("x")));
    assert!(result.is_err() && guest.has("thawed"));
}

fn script(text: &str) -> Vec<String> {
    ["/bin/sh", "-c", text].map(str::to_owned).to_vec()
}

/// Kills a daemon that quiesces a guest, once this file exists in the guest's directory.
fn killed_at(name: &str, freeze: &str, thaw: &str, seconds: u64) -> Guest {
    let guest = Guest::new();
    let mut daemon = Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "guest::quiesce::tests::daemon_that_is_killed",
        ])
        .env("GUESTSNAP_TEST_FOLDER", guest.folder.path())
        .env("GUESTSNAP_TEST_FREEZE", freeze)
        .env("GUESTSNAP_TEST_THAW", thaw)
        .env("GUESTSNAP_TEST_SECONDS", seconds.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    guest.waits_for(name, 20);
    assert!(!guest.has("thawed"));
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    guest.waits_for("thawed", 10);
    guest
}

#[test]
fn test_a_killed_daemon_leaves_no_guest_frozen() {
    killed_at("at-work", "touch frozen", "touch thawed", 300);
}

#[test]
fn test_a_daemon_killed_in_the_freeze_leaves_no_guest_frozen() {
    // The first thaw finds nothing to thaw.
    let freeze = "touch freezing; sleep 2; touch frozen";
    killed_at("freezing", freeze, "mv frozen thawed", 300);
    // An endless freeze is killed first.
    let freeze = "echo $$ > pid; sleep 60";
    // A zombie may remain, with an empty command line.
    let thaw = "grep -q . /proc/$(cat pid)/cmdline || touch thawed";
    killed_at("pid", freeze, thaw, 4);
}

/// Child process of the tests above.
#[test]
#[ignore = "run by the tests above"]
fn daemon_that_is_killed() {
    let var = |name: &str| std::env::var(format!("GUESTSNAP_TEST_{name}")).unwrap();
    let folder = var("FOLDER");
    let script = |name: &str| script(&format!("cd {folder}; {}", var(name)));
    let mut quiesce = quiesce("x", "x", var("SECONDS").parse().unwrap());
    (quiesce.freeze, quiesce.thaw) = (script("FREEZE"), script("THAW"));
    let ((), _) = during("web1", Some(&quiesce), |_| {
        std::fs::write(format!("{folder}/at-work"), "").unwrap();
        std::thread::sleep(Duration::from_secs(60));
    });
}
