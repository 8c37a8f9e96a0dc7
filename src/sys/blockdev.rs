//! Questions to a block device.
#![expect(unsafe_code, reason = "ioctls")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

mod ioctls {
    nix::ioctl_read!(blkgetsize64, 0x12, 114, u64);
    nix::ioctl_read_bad!(blkroget, nix::request_code_none!(0x12, 94), libc::c_int);
}

/// Current size in bytes according to the kernel.
pub fn size(device: BorrowedFd<'_>) -> io::Result<u64> {
    let mut size = 0;
    // SAFETY: the descriptor is open for the call and the kernel writes one u64 to `size`.
    unsafe { ioctls::blkgetsize64(device.as_raw_fd(), &mut size) }?;
    Ok(size)
}

/// Whether the kernel refuses writes to the device.
pub fn is_read_only(device: BorrowedFd<'_>) -> io::Result<bool> {
    let mut flag = 0;
    // SAFETY: the descriptor is open for the call and the kernel writes one int to `flag`.
    unsafe { ioctls::blkroget(device.as_raw_fd(), &mut flag) }?;
    Ok(flag != 0)
}
