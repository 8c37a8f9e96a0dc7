//! The tests of the tiers `root` and `vm`, a file for each subject. A file lists those that run on this machine in `ROOT`,
//! those of the emulated machines in `VM`; a new file gets its lines here.

use crate::inside::Scenario;

mod bacula;
mod bad_disk;
mod bed;
mod boots;
mod clones;
mod definitions;
mod disk;
mod drbd;
mod foreign;
mod guests;
mod hostile;
mod image;
mod instant;
mod into;
mod layouts;
mod levels;
mod look;
mod members;
mod overflow;
mod package;
mod plugin;
mod points;
mod pve;
mod pve_host;
mod pve_thin;
mod quiet_host;
mod rebuild;
mod rebuild_lvm;
mod recipes;
mod rights;
mod room;
mod samples;
mod settings;
mod shared;
pub mod snapshot;
mod soak;
mod stalled;
mod systemd;
mod thin;

pub use points::share;

/// The tests that run on this machine, as root.
pub fn root() -> Vec<Scenario> {
    [
        bed::ROOT,
        foreign::ROOT,
        snapshot::ROOT,
        image::ROOT,
        into::ROOT,
        levels::ROOT,
        settings::ROOT,
        pve::ROOT,
        pve_host::ROOT,
        clones::ROOT,
        samples::ROOT,
        bacula::ROOT,
        points::ROOT,
        layouts::ROOT,
        hostile::ROOT,
        stalled::ROOT,
        boots::ROOT,
        rebuild::ROOT,
        recipes::ROOT,
        rights::ROOT,
        look::ROOT,
        members::ROOT,
        soak::ROOT,
    ]
    .concat()
}

/// The tests that run in the emulated machines.
pub fn vm() -> Vec<Scenario> {
    [
        bacula::VM,
        bad_disk::VM,
        bed::VM,
        clones::VM,
        definitions::VM,
        disk::VM,
        drbd::VM,
        guests::VM,
        instant::VM,
        into::VM,
        levels::VM,
        look::VM,
        members::VM,
        overflow::VM,
        package::VM,
        plugin::VM,
        points::VM,
        pve_thin::VM,
        quiet_host::VM,
        rebuild_lvm::VM,
        recipes::VM,
        room::VM,
        shared::VM,
        snapshot::VM,
        soak::VM,
        stalled::VM,
        systemd::VM,
        thin::VM,
    ]
    .concat()
}
