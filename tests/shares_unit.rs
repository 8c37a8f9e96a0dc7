//! Work that the emulated machines share is done by one of them.

use guestsnap::point::{Needs, Point};
use guestsnap_bed::scenarios::{self, share};
use guestsnap_bed::vm::SUITES;

/// Scenarios of which each machine runs its share.
const SHARED: [&str; 3] = ["points_kill", "points_faults", "points_commands"];

#[test]
fn test_the_machines_together_run_every_point() {
    let of_volumes = |point: &&Point| point.needs() == Needs::Volumes;
    let all = 0..Point::ALL.iter().filter(of_volumes).count();
    assert!(all.len() >= 20);
    let scenarios = scenarios::vm();
    for name in SHARED {
        let scenario = scenarios.iter().find(|s| s.name == name).expect(name);
        let mut run: Vec<usize> = Vec::new();
        for suite in SUITES.iter().filter(|suite| scenario.runs_in(suite)) {
            let share: Vec<usize> = share(suite, all.clone()).collect();
            assert!(!share.is_empty());
            run.extend(share);
        }
        run.sort_unstable();
        run.dedup();
        assert!(all.clone().eq(run), "{name} leaves something out");
    }
}
