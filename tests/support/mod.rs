//! The test bed: a private Bacula, guest disks, manifests of trees, the state of the host, and the emulated machines.
//!
//! See `tests/README.md` for how the pieces fit together.

#![allow(dead_code, reason = "every test target uses another part of the bed")]

pub mod bacula;
pub mod cmd;
pub mod guestdisk;
pub mod hoststate;
pub mod inside;
pub mod lvm;
pub mod points;
pub mod populate;
pub mod tree;
pub mod vm;
pub mod workdir;

/// What a test returns. `?` turns any error that can be displayed into a failed test.
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

/// The command under test: the one cargo built together with the running test.
pub fn tool() -> Result<std::path::PathBuf> {
    Ok(match inside::is_inside() {
        true => "/bed/guestsnap".into(),
        false => env!("CARGO_BIN_EXE_guestsnap").into(),
    })
}

/// The Debian package under test: `GUESTSNAP_DEB`, which the Makefile sets to what `make deb` built.
#[allow(dead_code, reason = "for the emulated machines only")]
pub fn package() -> Result<std::path::PathBuf> {
    let path = std::env::var_os("GUESTSNAP_DEB").unwrap_or_default();
    let path = std::path::PathBuf::from(path);
    check!(
        path.is_file(),
        "GUESTSNAP_DEB=\"{}\" is not a file: `make test-vm` builds the package and sets it",
        path.display()
    );
    Ok(path)
}

/// The plugin under test: `GUESTSNAP_SO`, or the library cargo built together with the running test.
pub fn plugin_so() -> Result<std::path::PathBuf> {
    use std::path::PathBuf;
    if let Some(path) = std::env::var_os("GUESTSNAP_SO") {
        let path = PathBuf::from(path);
        check!(
            path.is_file(),
            "GUESTSNAP_SO={} is not a file",
            path.display()
        );
        return Ok(path);
    }
    let exe = std::env::current_exe()?;
    let deps = exe.parent().ok_or("test binary without a folder")?;
    let mut tried = Vec::new();
    for dir in [Some(deps), deps.parent()].into_iter().flatten() {
        let path = dir.join("libguestsnap.so");
        if path.is_file() {
            return Ok(path);
        }
        tried.push(path.display().to_string());
    }
    fail!("the plugin is not built, looked for: {}", tried.join(", "))
}
