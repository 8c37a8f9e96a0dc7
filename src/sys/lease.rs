//! File leases: detect whether a file is open for writing.
#![expect(
    unsafe_code,
    reason = "fcntl commands that neither nix nor rustix offers"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Sets the signal for a lease break; `<linux/fcntl.h>`.
const F_SETSIG: libc::c_int = 10;

/// Whether any process on this host, in any namespace, has the file open for writing. `file` must
/// be open for reading only.
///
/// The kernel grants a read lease only on a file without writers. The lease is released at once, so
/// that a starting guest does not wait for a backup. A filesystem without leases is an error; a
/// file of another owner needs `CAP_LEASE` (`EACCES`).
pub fn has_writer(file: BorrowedFd<'_>) -> io::Result<bool> {
    let fcntl = |command: libc::c_int, argument: libc::c_int| {
        // SAFETY: the descriptor is open for the call, and these commands take a number.
        match unsafe { libc::fcntl(file.as_raw_fd(), command, argument) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    // If the file is opened at this moment, the kernel signals the lease holder. The default SIGIO
    // would end the process; SIGURG is ignored by default.
    fcntl(F_SETSIG, libc::SIGURG)?;
    match fcntl(libc::F_SETLEASE, libc::F_RDLCK) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => return Ok(true),
        Err(error) => return Err(error),
    }
    fcntl(libc::F_SETLEASE, libc::F_UNLCK)?;
    Ok(false)
}
