//! Tests that run inside of the emulated machine. A new file gets a line here and a list `ALL` of its own.

use crate::support::inside::Scenario;

#[allow(dead_code, reason = "some of them run on the machine itself only")]
mod bacula;
mod bad_disk;
mod bed;
mod clones;
mod definitions;
mod disk;
mod guests;
#[allow(dead_code, reason = "the others run on the machine itself")]
mod image;
#[allow(dead_code, reason = "those of image files need no emulated machine")]
mod look;
mod overflow;
mod package;
mod plugin;
#[allow(dead_code, reason = "those of image files need no emulated machine")]
mod points;
mod snapshot;
#[allow(dead_code, reason = "those of image files need no emulated machine")]
mod soak;
#[allow(dead_code, reason = "those of image files need no emulated machine")]
mod stalled;
mod systemd;

/// All scenarios of all files.
pub fn all() -> Vec<Scenario> {
    [
        bacula::ALL,
        bad_disk::ALL,
        bed::ALL,
        clones::ALL,
        definitions::ALL,
        disk::ALL,
        guests::ALL,
        look::ALL,
        overflow::ALL,
        package::ALL,
        plugin::ALL,
        points::ALL,
        snapshot::ALL,
        soak::ALL,
        stalled::ALL,
        systemd::ALL,
    ]
    .concat()
}
