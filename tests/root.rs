//! Tests on this machine, as root: a real Bacula, guest disks in image files on loop devices. No device-mapper needed.

mod support;

#[allow(dead_code, reason = "some of the scenarios need device-mapper")]
#[path = "scenarios/bed.rs"]
mod bed;

#[allow(dead_code, reason = "most of the scenarios need device-mapper")]
#[path = "scenarios/snapshot.rs"]
mod snapshot;

#[path = "scenarios/image.rs"]
mod image;

#[path = "scenarios/settings.rs"]
mod settings;

#[path = "scenarios/samples.rs"]
mod samples;

#[allow(dead_code, reason = "one of the scenarios needs a later Bacula")]
#[path = "scenarios/bacula.rs"]
mod bacula;
#[allow(dead_code, reason = "the list is for the emulated machines")]
#[path = "scenarios/clones.rs"]
mod clones;
#[allow(dead_code, reason = "some of the scenarios need device-mapper")]
#[path = "scenarios/points.rs"]
mod points;

#[path = "scenarios/hostile.rs"]
mod hostile;

#[path = "scenarios/rights.rs"]
mod rights;

#[allow(dead_code, reason = "some of the scenarios need device-mapper")]
#[path = "scenarios/look.rs"]
mod look;

#[allow(dead_code, reason = "that of volumes needs device-mapper")]
#[path = "scenarios/soak.rs"]
mod soak;

#[allow(dead_code, reason = "some of the scenarios need device-mapper")]
#[path = "scenarios/stalled.rs"]
mod stalled;

use libtest_mimic::{Arguments, Failed, Trial};
use std::process::ExitCode;
use support::inside::{Scenario, scenario};
use support::message;

/// All tests of this tier.
fn all() -> Vec<Scenario> {
    vec![
        scenario("root_bed_file_backup", bed::file_backup),
        scenario("root_bed_host_state", bed::host_state),
        scenario("root_bed_guest_disks", bed::guest_disks_without_vfat),
        scenario("root_bed_guest_lvm", bed::guest_lvm),
        scenario("root_snapshot_reflink", snapshot::reflink),
        scenario("root_image_fidelity", image::fidelity),
        scenario("root_image_filesets_and_levels", image::filesets_and_levels),
        scenario("root_image_panic_is_contained", image::panic_is_contained),
        scenario("root_image_cancel", image::cancel),
        scenario("root_restore_cancel", image::restore_cancel),
        scenario("root_settings_hooks", settings::hooks),
        scenario("root_settings_fsck", settings::fsck),
        scenario("root_settings_off", settings::off),
        scenario("root_clones", clones::clones),
        scenario("root_samples_are_valid", samples::samples_are_valid),
        scenario("root_bacula_accurate", bacula::accurate),
        scenario("root_bacula_additions", bacula::additions),
        scenario(
            "root_bacula_unreadable_guest_is_kept",
            bacula::unreadable_guest_is_kept,
        ),
        scenario(
            "root_bacula_unread_definition_is_kept",
            bacula::unread_definition_is_kept,
        ),
        scenario("root_bacula_lost_content", bacula::lost_content),
        scenario("root_bacula_two_lines", bacula::two_lines),
        scenario("root_bacula_fileset_options", bacula::fileset_options),
        scenario("root_bacula_encryption", bacula::encryption),
        scenario("root_bacula_restore_ways", bacula::restore_ways),
        scenario(
            "root_bacula_restore_into_bad_targets",
            bacula::restore_into_bad_targets,
        ),
        scenario("root_bacula_restore_options", bacula::restore_options),
        scenario("root_bacula_without_plugin", bacula::without_plugin),
        scenario("root_bacula_as_file", bacula::as_file),
        scenario("root_bacula_base_job", bacula::base_job),
        scenario("root_bacula_client_filters", bacula::client_filters),
        scenario("root_image_least_memory", image::least_memory),
        scenario("root_bed_dirty_journal", bed::dirty_journal),
        scenario("root_points_kill", points::kill_with_images),
        scenario("root_points_faults", points::faults_with_images),
        scenario("root_points_second_fault", points::second_fault),
        scenario(
            "root_points_journal_on_a_full_disk",
            points::journal_on_a_full_disk,
        ),
        scenario("root_faults_in_bacula", points::faults_in_bacula),
        scenario("root_points_together", points::together_with_images),
        scenario("root_points_not_shipped", points::shipped_library_has_none),
        scenario("root_hostile_guests", hostile::guests),
        scenario("root_hostile_looks", hostile::looks),
        scenario("root_hostile_restore_race", hostile::restore_race),
        scenario("root_hostile_director", hostile::director),
        scenario("root_stalled_calls", stalled::calls),
        scenario("root_stalled_one_file", stalled::one_file),
        scenario("root_stalled_daemons_lost", stalled::daemons_lost),
        scenario("root_stalled_peer_silent", stalled::peer_silent),
        scenario("root_rights_missing", rights::missing_capabilities),
        scenario("root_look_inspect", look::inspect),
        scenario("root_look_files", look::files),
        scenario("root_look_stopped", look::stopped),
        scenario("root_look_who", look::who_images),
        scenario("root_soak", soak::image_guests),
        scenario("root_soak_many_files", soak::many_files),
    ]
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Each test compares the whole machine's state before and after: one at a time.
    arguments.test_threads = Some(1);
    if !arguments.list {
        if !rustix::process::geteuid().is_root() {
            eprintln!("these tests need root (loop devices, mounts, Bacula)");
            return ExitCode::FAILURE;
        }
        if let Err(e) = support::workdir::sweep() {
            eprintln!(
                "cannot remove the leftovers of an earlier run: {}",
                message(&e)
            );
            return ExitCode::FAILURE;
        }
    }
    let trials = all()
        .into_iter()
        .map(|s| Trial::test(s.name, move || run(s)))
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// The test, and the machine's state before and after it.
fn run(scenario: Scenario) -> Result<(), Failed> {
    let before = support::hoststate::HostState::capture(None)?;
    (scenario.run)()?;
    let left = support::hoststate::HostState::settled_diff(&before, &Default::default())?;
    if left.is_empty() {
        Ok(())
    } else {
        Err(format!("left on the machine:\n  {}", left.join("\n  ")).into())
    }
}
