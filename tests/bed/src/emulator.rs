//! The emulator of the machines: Debian 13's QEMU, unpacked into `target/bed` and never installed. A host's own QEMU
//! stays as it is, whatever version it has, and the numbers of all developers are those of one version. (Debian 12's takes a
//! quarter more processor time for the same scenario.)

use super::{Result, cmd, vm};
use std::path::{Path, PathBuf};
use std::process::Command;

const SUITE: &str = "trixie";
const PACKAGE: &str = "qemu-system-x86";

/// Where it is, unpacked if it was not yet.
pub fn folder() -> Result<PathBuf> {
    vm::built("qemu", &(SUITE, PACKAGE), |dir| {
        vm::mmdebstrap(SUITE, "extract", PACKAGE, dir, &[])
    })
}

/// The program with its own loader and libraries; the caller adds what the machine is.
pub fn command() -> Result<Command> {
    let root = folder()?.join("root");
    let usr = |path: &str| root.join("usr").join(path);
    let libraries = usr("lib/x86_64-linux-gnu");
    let loader = usr("lib64/ld-linux-x86-64.so.2");
    let mut command = cmd::command(&loader.to_string_lossy());
    command
        .arg("--library-path")
        .arg(&libraries)
        .arg(usr("bin/qemu-system-x86_64"))
        .env("QEMU_MODULE_DIR", libraries.join("qemu"));
    let firmware = ["share/qemu", "share/seabios"].map(usr);
    for dir in firmware.iter().map(PathBuf::as_path) {
        command.arg("-L").arg::<&Path>(dir);
    }
    Ok(command)
}
