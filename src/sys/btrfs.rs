//! btrfs ioctls.

// ioctl with a struct of the kernel.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char};
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `struct btrfs_ioctl_vol_args` of `<linux/btrfs.h>`.
#[repr(C)]
struct VolArgs {
    fd: i64,
    name: [c_char; 4088],
}

nix::ioctl_write_ptr_bad!(
    /// `BTRFS_IOC_FORGET_DEV`.
    forget_dev,
    nix::request_code_write!(0x94, 5, size_of::<VolArgs>()),
    VolArgs
);

/// Makes the kernel forget an unmounted device that it keeps in its list of btrfs devices.
/// `control` is `/dev/btrfs-control`.
pub fn forget_device(control: impl AsFd, device: &CStr) -> io::Result<()> {
    let mut args = VolArgs {
        fd: 0,
        name: [0; 4088],
    };
    let bytes = device.to_bytes();
    // The last byte stays NUL.
    if bytes.len() >= args.name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in args.name.iter_mut().zip(bytes) {
        *to = *from as c_char;
    }
    // SAFETY: the request takes this struct, the name in it is NUL-terminated, and the kernel
    // keeps no reference to it.
    unsafe { forget_dev(control.as_fd().as_raw_fd(), &args) }?;
    Ok(())
}

/// `struct btrfs_ioctl_ino_lookup_args` of `<linux/btrfs.h>`.
#[repr(C)]
struct InoLookup {
    tree: u64,
    object: u64,
    name: [u8; 4080],
}

nix::ioctl_readwrite!(
    /// `BTRFS_IOC_INO_LOOKUP`.
    ino_lookup,
    0x94,
    18,
    InoLookup
);

/// The id of the subvolume that a directory is in; no other one ever gets it. `directory` is open
/// for reading.
pub fn subvolume_id(directory: impl AsFd) -> io::Result<u64> {
    let mut lookup = InoLookup {
        // That of the directory.
        tree: 0,
        // The root of any subvolume: its name needs no look at the disk.
        object: 256,
        name: [0; 4080],
    };
    // SAFETY: the request writes this struct, whose size is part of its number.
    unsafe { ino_lookup(directory.as_fd().as_raw_fd(), &mut lookup) }?;
    Ok(lookup.tree)
}

/// `struct btrfs_ioctl_fs_info_args` of `<linux/btrfs.h>`: the parts we read.
#[repr(C)]
struct FsInfo {
    max_id: u64,
    num_devices: u64,
    fsid: [u8; 16],
    rest: [u8; 992],
}

nix::ioctl_read!(
    /// `BTRFS_IOC_FS_INFO`.
    fs_info,
    0x94,
    31,
    FsInfo
);

/// The id by which the kernel knows a mounted btrfs: with a clone of a mounted one, not the id in
/// its superblock. `root` is open for reading.
pub fn fsid(root: impl AsFd) -> io::Result<[u8; 16]> {
    let mut info = FsInfo {
        max_id: 0,
        num_devices: 0,
        fsid: [0; 16],
        rest: [0; 992],
    };
    // SAFETY: the request writes this struct, whose size is part of its number.
    unsafe { fs_info(root.as_fd().as_raw_fd(), &mut info) }?;
    Ok(info.fsid)
}
