//! The library with points to break at (`src/point.rs`), and the jobs without a daemon that run in it.

use super::workdir::WorkDir;
use super::{Result, cmd, inside};
use crate::check;
use guestsnap::point::Point;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Target that a sanitizer is built for.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// A job of a test that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// Programs built for the tests, never for users.
#[derive(Clone, Debug)]
pub struct Built {
    /// The plugin.
    pub plugin: PathBuf,
    /// `tests/points/driver.rs`.
    pub driver: PathBuf,
}

/// Builds both in a folder of their own, once; in the emulated machine they are there.
pub fn built() -> Result<Built> {
    static BUILT: OnceLock<std::result::Result<Built, String>> = OnceLock::new();
    BUILT
        .get_or_init(|| build().map_err(|e| super::message(&e)))
        .clone()
        .map_err(Into::into)
}

fn build() -> Result<Built> {
    if inside::is_staged() {
        return Ok(Built {
            plugin: "/bed/points-fd.so".into(),
            driver: "/bed/points".into(),
        });
    }
    let sanitizer = std::env::var("GUESTSNAP_SANITIZER").unwrap_or_default();
    let mut target = super::target().join(format!("tmp/points{sanitizer}"));
    let mut build = std::process::Command::new(env!("CARGO"));
    build
        .current_dir(super::repository())
        .args(["build", "--locked", "--lib", "--bin", "points"])
        .args(["--features", "test-points,debug-panic", "--target-dir"])
        .arg(&target)
        .env("CARGO_PROFILE_DEV_DEBUG", "line-tables-only");
    if !sanitizer.is_empty() {
        // Not stable yet.
        build.args(["--target", TARGET]).env("RUSTC_BOOTSTRAP", "1");
        target.push(TARGET);
    }
    match sanitizer.as_str() {
        "" => {}
        // Takes a wait for a condition variable of a standard library without it for a race: scripts/tsan has
        // what builds that library too, and says with what flags.
        "thread" => {
            let flags = std::env::var("GUESTSNAP_TSAN_FLAGS")
                .map_err(|_| "GUESTSNAP_SANITIZER=thread is for scripts/tsan (make tsan)")?;
            build.arg("-Zbuild-std=std,panic_unwind");
            build.env("RUSTFLAGS", flags);
        }
        // The standard library comes without: its own inner works go unseen.
        _ => {
            let flags = format!("-Zsanitizer={sanitizer} -Cunsafe-allow-abi-mismatch=sanitizer");
            build.env("RUSTFLAGS", flags);
        }
    }
    cmd::output(build, None)?;
    Ok(Built {
        plugin: target.join("debug/libguestsnap.so"),
        driver: target.join("debug/points"),
    })
}

/// A folder that says what happens at which point.
#[derive(Debug)]
pub struct Points {
    dir: WorkDir,
    /// Client file of the jobs, in place of `/etc/bacula/guestsnap.toml`.
    client_file: String,
    driver: PathBuf,
}

/// How a job without a daemon ended.
#[derive(Debug)]
pub struct Outcome {
    /// Its messages.
    pub text: String,
    /// By a signal.
    pub killed: bool,
}

impl Outcome {
    /// Messages of one importance.
    pub fn of(&self, importance: char) -> Vec<&str> {
        let mark = format!("{importance} ");
        let lines = self.text.lines();
        lines.filter_map(|l| l.strip_prefix(&mark)).collect()
    }

    /// Came to its end, with nothing that would make a job anything but OK.
    pub fn is_clean(&self) -> bool {
        let ended = !self.killed && self.text.ends_with("end\n");
        ended && self.of('E').is_empty() && self.of('F').is_empty()
    }
}

impl Points {
    /// Without any action; jobs have this text as their client file.
    pub fn new(client_file: &str) -> Result<Self> {
        let dir = WorkDir::new()?;
        for folder in ["bin", "wd", "etc"] {
            std::fs::create_dir(dir.join(folder))?;
        }
        std::fs::write(dir.join("etc/guestsnap.toml"), client_file)?;
        Ok(Points {
            dir,
            client_file: client_file.to_owned(),
            driver: built()?.driver,
        })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The environment that a daemon or program gets.
    pub fn env(&self) -> (String, String) {
        ("GUESTSNAP_POINTS".into(), self.path().display().to_string())
    }

    /// Working directory of jobs without a daemon.
    pub fn working_dir(&self) -> PathBuf {
        self.dir.join("wd")
    }

    /// From now on this happens at that point.
    pub fn act(&self, point: Point, action: &str) -> Result {
        self.forget("acted")?;
        // At once, so that no process reads half of it.
        let new = self.dir.join("act.new");
        std::fs::write(&new, format!("{} {action}", point.name()))?;
        std::fs::rename(new, self.dir.join("act"))?;
        Ok(())
    }

    /// From now on nothing happens.
    pub fn clear(&self) -> Result {
        self.forget("act")?;
        self.forget("act.done")
    }

    fn forget(&self, file: &str) -> Result {
        match std::fs::remove_file(self.dir.join(file)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
            _ => Ok(()),
        }
    }

    /// Whether the last [`Self::act`] came to pass.
    pub fn acted(&self) -> bool {
        self.dir.join("acted").exists()
    }

    /// Waits until it came to pass.
    pub fn wait_acted(&self, limit: Duration) -> Result {
        cmd::wait_for("the point to be reached", limit, || {
            Ok(self.acted().then_some(()))
        })
    }

    /// Puts a script in the place of one of LVM's programs, or takes it away.
    pub fn stand_in(&self, program: &str, script: Option<&str>) -> Result {
        use std::os::unix::fs::PermissionsExt;
        let path = self.dir.join("bin").join(program);
        let Some(script) = script else {
            std::fs::remove_file(path)?;
            return Ok(());
        };
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n"))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// Runs a job without a daemon.
    pub fn drive(&self, words: &[&str]) -> Result<Outcome> {
        let out = self.dir.join("out");
        let file = std::fs::File::create(&out)?;
        let mut command = if self.client_file.is_empty() {
            cmd::command(&self.driver.display().to_string())
        } else {
            let mut command = cmd::command("unshare");
            let script = r#"mount --bind "$1" /etc/bacula && shift && exec "$@""#;
            command.args(["-m", "sh", "-c", script, "sh"]);
            command.arg(self.dir.join("etc")).arg(&self.driver);
            command
        };
        let (key, value) = self.env();
        let mut child = command
            .args(words)
            .env(key, value)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()?;
        let end = Instant::now() + LIMIT;
        let status = loop {
            match child.try_wait()? {
                Some(status) => break status,
                None if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
                None => {
                    child.kill()?;
                    child.wait()?;
                    let text = std::fs::read_to_string(&out)?;
                    return Err(format!("{words:?} hangs:\n{text}").into());
                }
            }
        };
        let killed = std::os::unix::process::ExitStatusExt::signal(&status).is_some();
        let text = String::from_utf8_lossy(&std::fs::read(&out)?).into_owned();
        check!(
            (killed || status.success()) && !text.contains("Sanitizer:"),
            "{words:?} ended with {status}:\n{text}"
        );
        Ok(Outcome { text, killed })
    }
}
