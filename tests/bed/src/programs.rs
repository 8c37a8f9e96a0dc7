//! A suite's programs without its kernel: the root filesystem that its machines boot, as the root of a process on this
//! machine. A scenario that needs another Bacula, and no device-mapper, takes seconds there and minutes under emulation.

use super::workdir::{self, WorkDir};
use super::{Result, cmd, inside, ours, vm};
use std::ffi::OsStr;
use std::fs::File;
use std::path::PathBuf;
use std::process::Stdio;

/// Runs a scenario there; what it printed. Everything of it ends with its first process.
pub fn run(suite: &str, name: &str, seconds: u64, files: &[(PathBuf, String)]) -> Result<String> {
    let image = vm::image(suite)?;
    let dir = WorkDir::new()?;
    std::fs::create_dir(dir.join("bed"))?;
    for (from, name) in files {
        vm::copy_lean(from, &dir.join("bed").join(name))?;
    }
    std::fs::write(dir.join("programs"), include_str!("../machine/programs"))?;
    let said = dir.join("output");
    let out = File::create(&said)?;
    let mut command = cmd::command("timeout");
    command.args(["-k", "10", &seconds.to_string()]);
    command.args(["unshare", "--mount", "--propagation", "private"]);
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "sh"]);
    command.arg(dir.join("programs")).arg(dir.path());
    command
        .arg(&image.root)
        .args(["/bed/test", "--bed-programs", name])
        .env(inside::PROGRAMS, suite)
        .env("GUESTSNAP_SO", "/bed/guestsnap-fd.so")
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out);
    let number = dir.path().extension().ok_or("a folder without a number")?;
    command.env(workdir::OUTER, number);
    // The runner, and whose the processes and mounts are.
    command.env(ours::TEST, format!("{}.{name}", std::process::id()));
    for variable in ["GUESTSNAP_BED_KEEP", "GUESTSNAP_DEB"] {
        command.env_remove(OsStr::new(variable));
    }
    let status = command.status()?;
    let text = String::from_utf8_lossy(&std::fs::read(&said)?).into_owned();
    match status.code() {
        Some(0) => Ok(text),
        Some(124 | 137) => Err(format!("took longer than {seconds} s\n{text}").into()),
        _ => Err(format!("{status}\n{text}").into()),
    }
}
