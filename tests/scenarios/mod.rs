//! Tests that run inside of the emulated machine. A new file gets a line here and a list `ALL` of its own.

use crate::support::inside::Scenario;

#[allow(dead_code, reason = "some of the tests run on the real machine only")]
mod bacula;
mod bed;
mod definitions;
mod disk;
mod guests;
#[allow(dead_code, reason = "the tests themselves run on the real machine")]
mod image;
mod plugin;
mod snapshot;

/// All scenarios of all files.
pub fn all() -> Vec<Scenario> {
    [
        bacula::ALL,
        bed::ALL,
        definitions::ALL,
        disk::ALL,
        guests::ALL,
        plugin::ALL,
        snapshot::ALL,
    ]
    .concat()
}
