//! The two symbols that the daemon looks up, and the values that live as long as the daemon.

use nix::sys::signal::SigSet;
use std::ffi::{c_int, c_void};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::abi::{Version, bFuncs, bInfo, number, pInfo};
use super::{bridge, callbacks, daemon};

/// Mark in the file by which what(1) and `guestsnap check` find its version.
const MARK: &str = "@(#)guestsnap-fd ";

/// The mark, and behind it `plugin_version`, shown by `status client` of Bacula 15: short, no spaces, no brackets.
const MARKED_VERSION: &str = concat!("@(#)guestsnap-fd ", env!("CARGO_PKG_VERSION"), "\0");

/// Tables that the daemon points to for as long as it runs.
struct Registration {
    version: Version,
    info: *mut pInfo,
    table: *mut c_void,
}

// SAFETY: written once before the daemon starts any job, then only handed back to it.
unsafe impl Send for Registration {}
// SAFETY: as above.
unsafe impl Sync for Registration {}

/// The sweep that runs beside the daemon's start.
static FIRST_SWEEP: Mutex<Option<JoinHandle<()>>> = Mutex::new(None);

/// The library stays mapped after `dlclose` (`-z nodelete`), so a second load finds this set.
static REGISTRATION: OnceLock<Registration> = OnceLock::new();

/// Bacula's entry point, called once when the File Daemon starts, before any job.
///
/// Refuses an interface version whose layout is not known: guessing would corrupt the daemon.
///
/// # Safety
/// Called by the daemon with its own tables (which live as long as it does) and two places for
/// the answers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loadPlugin(
    info: *const c_void,
    functions: *const c_void,
    plugin_info: *mut *mut c_void,
    plugin_functions: *mut *mut c_void,
) -> c_int {
    if info.is_null() || functions.is_null() || plugin_info.is_null() || plugin_functions.is_null()
    {
        return number::RC_ERROR;
    }
    let loaded = std::panic::catch_unwind(|| {
        // SAFETY: the daemon's static tables; `size` and `version` lead in every version.
        let (info, functions) = unsafe { (&*info.cast::<bInfo>(), &*functions.cast::<bFuncs>()) };
        load(info, functions)
    });
    let Ok(Some(registration)) = loaded else {
        return number::RC_ERROR;
    };
    // SAFETY: not NULL, checked above; the daemon gives two places to write to.
    unsafe { *plugin_info = registration.info.cast() };
    // SAFETY: as above.
    unsafe { *plugin_functions = registration.table };
    number::RC_OK
}

fn load(info: &bInfo, functions: &'static bFuncs) -> Option<&'static Registration> {
    let Some(version) = Version::from_number(info.version) else {
        daemon::refuse(functions, info.version);
        return None;
    };
    daemon::set_functions(version, functions);
    bridge::install();
    let registration = REGISTRATION.get_or_init(|| Registration {
        version,
        info: Box::into_raw(Box::new(pInfo {
            size: size_of::<pInfo>() as u32,
            version: version.number(),
            plugin_magic: c"*FDPluginData*".as_ptr(),
            // The daemon accepts only its own licence strings; ours is AGPL-3.0-or-later.
            plugin_license: c"AGPLv3".as_ptr(),
            plugin_author: c"The guestsnap developers".as_ptr(),
            plugin_date: c"2026-11-23".as_ptr(),
            plugin_version: MARKED_VERSION[MARK.len()..].as_ptr().cast(),
            plugin_description: c"Files of Xen and KVM guests from snapshots".as_ptr(),
        })),
        table: version.table(&callbacks::TABLE),
    });
    start_sweep();
    // One process, one daemon: a second load reports the same version.
    (registration.version == version).then_some(registration)
}

/// How long the daemon's end waits for the sweep of its start.
const SWEEP_PATIENCE: Duration = Duration::from_secs(9);

/// Removes the leftovers of a killed daemon in the background: LVM may take seconds, and the daemon
/// must answer meanwhile. Every job sweeps again before it begins.
fn start_sweep() {
    let Some(folder) = daemon::working_dir().map(crate::job::journal_folder) else {
        return;
    };
    let sweep = std::thread::Builder::new()
        .name("guestsnap-sweep".into())
        .spawn(move || {
            // The daemon's signals are handled by the daemon's threads.
            let _ = SigSet::all().thread_block();
            let sweep = std::panic::catch_unwind(|| crate::snapshot::sweep(&folder, false));
            match sweep {
                Ok(Ok(report)) => report
                    .lines()
                    .for_each(|line| log::warn!("guestsnap: sweep: {line}")),
                Ok(Err(error)) => log::warn!("guestsnap: sweep: {}", error.report()),
                Err(_) => log::error!(
                    "guestsnap: sweep: {} {}",
                    crate::Code::Internal,
                    crate::Code::Internal.title()
                ),
            }
        });
    match sweep {
        Ok(handle) => *FIRST_SWEEP.lock().unwrap_or_else(PoisonError::into_inner) = Some(handle),
        Err(error) => log::warn!("guestsnap: no sweep at start: {error}"),
    }
}

/// Bacula's exit point; also called when the load failed. Every job has released its objects
/// in `freePlugin`. Only the first sweep may still run. If it waits for a device, the daemon does not
/// wait for it: it ends with the process, and the next sweep continues.
#[unsafe(no_mangle)]
pub extern "C" fn unloadPlugin() -> c_int {
    let sweep = FIRST_SWEEP
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    let begun = Instant::now();
    let left = crate::job::join(sweep.into_iter().collect(), || {
        begun.elapsed() > SWEEP_PATIENCE
    });
    if left.is_empty() {
        number::RC_OK
    } else {
        number::RC_ERROR
    }
}
