//! Other software attaches loop devices and mounts filesystems while a test runs.

use crate::check;
use crate::guestdisk::{Loop, MIB, image};
use crate::hoststate::HostState;
use crate::inside::{Scenario, scenario};
use crate::workdir::WorkDir;
use crate::{Result, cmd};
use std::path::Path;

/// On this machine.
pub const ROOT: &[Scenario] = &[scenario("root_bed_foreign", come_and_go)];

/// Loop devices and mounts of other software make no difference, in the namespace of the runner, in a copy of it and in
/// the test's own. A loop device and mounts of the test do, wherever they are.
fn come_and_go() -> Result {
    let before = HostState::capture(None)?;
    let foreign = tempfile::tempdir()?;
    let runner = std::env::var(crate::ours::TEST)?;
    let runner = runner.split('.').next().ok_or("no runner")?;
    let outside =
        |script: &str| cmd::run("nsenter", ["-m", "-r", "-t", runner, "sh", "-euc", script]);
    let (file, point) = (foreign.path().join("image"), foreign.path().join("mnt"));
    std::fs::create_dir(&point)?;
    image(&file, 64 * MIB)?;
    cmd::run("mkfs.ext4", [Path::new("-q"), &file])?;
    let device = cmd::run("losetup", [Path::new("--find"), Path::new("--show"), &file])?;
    let device = device.trim();
    let seen = outside(&format!("mount {device} {}", point.display()))
        .and_then(|_| HostState::capture(None));
    outside(&format!("umount {}; losetup -d {device}", point.display()))?;
    let lines = seen?.diff(&before);
    check!(lines.is_empty(), "other software's: {lines:?}");
    let lines = HostState::capture(None)?.diff(&before);
    check!(lines.is_empty(), "other software's, gone: {lines:?}");

    // Seen at once, also without a name of ours.
    let dir = WorkDir::new()?;
    let file = dir.join("image");
    image(&file, 64 * MIB)?;
    cmd::run("mkfs.ext4", [Path::new("-q"), &file])?;
    let planted = Loop::attach(&file, 0, None, 0)?;
    leak(&before, "+ loop: ")?;
    cmd::run("mount", [planted.device(), "/mnt"])?;
    let seen = leak(&before, &format!("+ mount: {} on /mnt", planted.device()));
    cmd::run("umount", ["/mnt"])?;
    seen?;
    cmd::run("mount", ["-t", "tmpfs", "nameless", "/mnt"])?;
    let seen = leak(&before, "+ mount: nameless on /mnt");
    cmd::run("umount", ["/mnt"])?;
    seen?;
    drop(planted);
    let lines = HostState::settled_diff(&before, &Default::default())?;
    check!(lines.is_empty(), "after all was taken away: {lines:?}");
    Ok(())
}

fn leak(before: &HostState, what: &str) -> Result {
    let lines = HostState::capture(None)?.diff(before);
    check!(
        lines.iter().any(|l| l.starts_with(what)),
        "{what}is not seen: {lines:?}"
    );
    Ok(())
}
