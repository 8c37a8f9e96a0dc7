//! File leases: whether anybody has a file open for writing.

// fcntl commands that neither nix nor rustix offers.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Which signal the breaking of a lease sends; `<linux/fcntl.h>`.
const F_SETSIG: libc::c_int = 10;

/// Whether anybody on this host, in whatever namespace, has the file open for writing. `file` must
/// be open for reading only.
///
/// The kernel grants a read lease only on a file without writers. It is given back at once:
/// a guest that starts must not have to wait for a backup. Filesystems without leases are an error; a
/// file of another owner needs `CAP_LEASE` (`EACCES`).
pub fn has_writer(file: BorrowedFd<'_>) -> io::Result<bool> {
    let fcntl = |command: libc::c_int, argument: libc::c_int| {
        // SAFETY: the descriptor is open for the call, and these commands take a number.
        match unsafe { libc::fcntl(file.as_raw_fd(), command, argument) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    // Who opens the file in this moment makes the kernel signal the holder of the lease. The usual
    // SIGIO would end the process; SIGURG is ignored by default.
    fcntl(F_SETSIG, libc::SIGURG)?;
    match fcntl(libc::F_SETLEASE, libc::F_RDLCK) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => return Ok(true),
        Err(error) => return Err(error),
    }
    fcntl(libc::F_SETLEASE, libc::F_UNLCK)?;
    Ok(false)
}
