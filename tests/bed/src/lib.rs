//! The test bed: a private Bacula, guest disks, manifests of trees, the state of the host, and the emulated machines.
//!
//! See `tests/README.md` for how the pieces fit together.

pub mod absent;
pub mod bacula;
pub mod cmd;
pub mod emulator;
pub mod evil_pv;
pub mod examined;
pub mod guestdisk;
pub mod hoststate;
pub mod images;
pub mod inside;
mod layouts;
pub mod lvm;
pub mod ours;
pub mod points;
pub mod populate;
pub mod programs;
pub mod scenarios;
pub mod thinpool;
pub mod tree;
pub mod vm;
pub mod workdir;

use std::path::{Path, PathBuf};

/// Result of a test. `?` turns any error that can be displayed into a failed test.
pub type Result<T = ()> = std::result::Result<T, libtest_mimic::Failed>;

/// Ends the test with a formatted message.
#[macro_export]
macro_rules! fail {
    ($($arg:tt)*) => { return Err(format!($($arg)*).into()) };
}

/// Ends the test with a formatted message unless the condition holds.
#[macro_export]
macro_rules! check {
    ($cond:expr, $($arg:tt)*) => { if !$cond { return Err(format!($($arg)*).into()); } };
}

/// The text of a failure.
pub fn message(failed: &libtest_mimic::Failed) -> String {
    failed
        .message()
        .unwrap_or("failed without a message")
        .to_string()
}

/// Writes what a test said to `target/failed/<name>`, for the one who waits: the runner shows it when all others have
/// ended. A test that passed takes its file away.
pub fn write_failure(name: &str, failure: Option<&String>) {
    let file = target().join("failed").join(name);
    let _only_a_help = match failure {
        None => std::fs::remove_file(file),
        Some(text) => std::fs::create_dir_all(file.with_file_name(""))
            .and_then(|()| std::fs::write(file, text)),
    };
}

/// The folder of the repository.
pub fn repository() -> PathBuf {
    let bed = Path::new(env!("CARGO_MANIFEST_DIR"));
    bed.ancestors().nth(2).unwrap_or(bed).to_path_buf()
}

/// The folder that cargo builds in.
pub fn target() -> PathBuf {
    let named = std::env::var_os("CARGO_TARGET_DIR");
    repository().join(named.map_or_else(|| "target".into(), PathBuf::from))
}

/// The command under test: the one cargo built together with the running test.
pub fn tool() -> Result<PathBuf> {
    match inside::is_staged() {
        true => Ok("/bed/guestsnap".into()),
        false => beside("guestsnap"),
    }
}

/// The Debian package under test: `GUESTSNAP_DEB`, which the Makefile sets to what `make deb` built.
pub fn package() -> Result<PathBuf> {
    let path = std::env::var_os("GUESTSNAP_DEB").unwrap_or_default();
    let path = PathBuf::from(path);
    check!(
        path.is_file(),
        "GUESTSNAP_DEB=\"{}\" is not a file: `make test-vm` builds the package and sets it",
        path.display()
    );
    Ok(path)
}

/// The plugin under test: `GUESTSNAP_SO`, or the library cargo built together with the running test.
pub fn plugin_so() -> Result<PathBuf> {
    let Some(path) = std::env::var_os("GUESTSNAP_SO") else {
        return beside("libguestsnap.so");
    };
    let path = PathBuf::from(path);
    check!(
        path.is_file(),
        "GUESTSNAP_SO={} is not a file",
        path.display()
    );
    Ok(path)
}

/// A file that cargo built together with the running test.
fn beside(name: &str) -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let folders = test.ancestors().skip(1).take(2);
    let tried: Vec<PathBuf> = folders.map(|folder| folder.join(name)).collect();
    let found = tried.iter().find(|path| path.is_file()).cloned();
    Ok(found.ok_or_else(|| format!("not built, looked for: {tried:?}"))?)
}
