//! Running commands and waiting for things.

use super::Result;
use std::ffi::OsStr;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A command with the environment all of the bed's commands get: C locale, no LVM noise about inherited descriptors.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command
        .env("LC_ALL", "C")
        .env("LVM_SUPPRESS_FD_WARNINGS", "1")
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        );
    command
}

/// Runs a command to its end; its standard output, or an error with everything it said.
pub fn run<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> Result<String> {
    let mut command = command(program);
    command.args(args);
    output(command, None)
}

/// Like [`run`], with bytes on standard input.
pub fn run_with_input<S: AsRef<OsStr>>(
    program: &str,
    args: impl IntoIterator<Item = S>,
    input: &[u8],
) -> Result<String> {
    let mut command = command(program);
    command.args(args);
    output(command, Some(input))
}

/// Runs a shell script (`sh -euc`), for the cases where a shell says it best.
pub fn sh(script: &str) -> Result<String> {
    run("sh", ["-euc", script])
}

/// Runs a prepared command to its end.
pub fn output(mut command: Command, input: Option<&[u8]>) -> Result<String> {
    let shown = format!("{command:?}");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.stdin(if input.is_some() {
        Stdio::piped()
    } else {
        Stdio::null()
    });
    let mut child = command.spawn().map_err(|e| format!("{shown}: {e}"))?;
    let writer = match (input, child.stdin.take()) {
        (Some(bytes), Some(mut stdin)) => {
            let bytes = bytes.to_vec();
            // A child that ends early closes its input; its exit status tells the story then.
            Some(std::thread::spawn(move || drop(stdin.write_all(&bytes))))
        }
        _ => None,
    };
    let out = child.wait_with_output()?;
    if let Some(writer) = writer {
        writer.join().map_err(|_| "the input writer panicked")?;
    }
    let stdout = String::from_utf8_lossy(&out.stdout).into_owned();
    if !out.status.success() {
        let stderr = String::from_utf8_lossy(&out.stderr);
        return Err(format!("{shown}: {}\n{}{}", out.status, stdout, stderr).into());
    }
    Ok(stdout)
}

/// Whether a program is in the usual folders.
pub fn have(program: &str) -> bool {
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .any(|dir| std::path::Path::new(dir).join(program).exists())
}

/// Pauses between two looks.
const SHORTEST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(1);

/// Calls `probe` until it gives a value or the time is up, every 50 ms, or as seldom as it takes long: what runs programs
/// leaves the processor to what is waited for.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        let asked = Instant::now();
        if let Some(value) = probe()? {
            return Ok(value);
        }
        if Instant::now() >= end {
            return Err(format!("waited {} s in vain for {what}", limit.as_secs()).into());
        }
        let pause = asked.elapsed().clamp(SHORTEST, LONGEST);
        std::thread::sleep(pause);
    }
}
