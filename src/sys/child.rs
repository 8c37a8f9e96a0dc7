//! Setup of a child process between fork and exec.
#![expect(
    unsafe_code,
    reason = "the closure of `pre_exec` runs in a forked child of a threaded process"
)]

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Signals blocked in children that change LVM metadata or wake a guest: stopping the daemon with
/// `systemctl stop` sends SIGTERM to every process of the service.
const MASKED: [libc::c_int; 5] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGTSTP,
];

/// Gives the child its own process group and only the three standard descriptors. Our threads block
/// all signals and children inherit that, so resets the mask: to empty or, with `masked`, to the
/// signals that would end it early.
pub fn isolate(command: &mut Command, masked: bool) {
    command.process_group(0);
    let hook = move || {
        // Since Linux 5.11. Earlier kernels pass the daemon's files without CLOEXEC to the child,
        // as to the daemon's other children.
        //
        // SAFETY: close_range takes no pointers. With CLOSE_RANGE_CLOEXEC it closes nothing before
        // exec, so that std's own error pipe stays usable. It is a bare system call.
        let _ = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 4) };
        block_only(if masked { &MASKED } else { &[] })
    };
    // SAFETY: the closure allocates nothing, takes no locks and calls only async-signal-safe
    // functions (close_range, sigemptyset, sigaddset, sigprocmask).
    unsafe { command.pre_exec(hook) };
}

/// Makes the child and its descendants keep a descriptor open. Call this after [`isolate`], which
/// closes it.
pub fn keep(command: &mut Command, held: OwnedFd) {
    let hook = move || {
        Ok(rustix::io::fcntl_setfd(
            &held,
            rustix::io::FdFlags::empty(),
        )?)
    };
    // SAFETY: the closure is one system call; it allocates nothing and takes no locks.
    unsafe { command.pre_exec(hook) };
}

fn block_only(signals: &[libc::c_int]) -> io::Result<()> {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    for &signal in signals {
        // SAFETY: the set was initialised above, the numbers are valid signals.
        unsafe { libc::sigaddset(set.as_mut_ptr(), signal) };
    }
    // SAFETY: the set is initialised; the old mask is not asked for. The forked child has one
    // thread, so that sigprocmask is defined here.
    match unsafe { libc::sigprocmask(libc::SIG_SETMASK, set.as_ptr(), std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::SigSet;

    /// The signals blocked in a child started from such a thread.
    fn blocked(masked: bool) -> u64 {
        let thread = std::thread::spawn(move || {
            SigSet::all().thread_block().unwrap();
            let mut command = Command::new("/bin/cat");
            command.arg("/proc/self/status");
            isolate(&mut command, masked);
            command.output().unwrap().stdout
        });
        let text = String::from_utf8(thread.join().unwrap()).unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix("SigBlk:"));
        u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
    }

    #[test]
    fn test_children_block_what_they_should_and_nothing_else() {
        assert_eq!(blocked(false), 0);
        let bits = MASKED.iter().map(|signal| 1 << (signal - 1));
        assert_eq!(blocked(true), bits.sum::<u64>());
    }
}
