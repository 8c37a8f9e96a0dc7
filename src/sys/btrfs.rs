//! btrfs ioctls.
#![expect(unsafe_code, reason = "ioctl with a struct of the kernel")]

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

/// Removes an unmounted device from the kernel's list of btrfs devices. `control` is
/// `/dev/btrfs-control`.
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

/// Id of the subvolume that contains a directory; ids are never reused. `directory` is open for
/// reading.
pub fn subvolume_id(directory: impl AsFd) -> io::Result<u64> {
    let mut lookup = InoLookup {
        // The tree of the directory itself.
        tree: 0,
        // The root of any subvolume: naming it needs no disk access.
        object: 256,
        name: [0; 4080],
    };
    // SAFETY: the request writes this struct, whose size is part of its number.
    unsafe { ino_lookup(directory.as_fd().as_raw_fd(), &mut lookup) }?;
    Ok(lookup.tree)
}

/// `struct btrfs_ioctl_get_subvol_info_args` of `<linux/btrfs.h>`: the fields we read.
#[repr(C)]
struct SubvolumeInfo {
    id: u64,
    name: [u8; 256],
    parent: u64,
    directory: u64,
    generation: u64,
    flags: u64,
    uuid: [u8; 16],
    parent_uuid: [u8; 16],
    received_uuid: [u8; 16],
    rest: [u64; 20],
}

// The request number encodes the size.
const _: () = assert!(size_of::<SubvolumeInfo>() == 504);

nix::ioctl_read!(
    /// `BTRFS_IOC_GET_SUBVOL_INFO`, since Linux 4.18.
    get_subvol_info,
    0x94,
    60,
    SubvolumeInfo
);

/// Properties of a subvolume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubvolumeKind {
    /// Created as a snapshot of another subvolume.
    pub snapshot: bool,
    /// Read-only.
    pub read_only: bool,
    /// Received from another filesystem (`btrfs receive`).
    pub received: bool,
}

impl SubvolumeKind {
    /// Whether all its content was once in another subvolume of this filesystem, unchanged since.
    pub fn is_past(self) -> bool {
        self.snapshot && self.read_only && !self.received
    }
}

/// Properties of the subvolume that contains a directory. `directory` is open for reading.
pub fn subvolume_kind(directory: impl AsFd) -> io::Result<SubvolumeKind> {
    /// `BTRFS_ROOT_SUBVOL_RDONLY`.
    const READ_ONLY: u64 = 1;
    let mut info = SubvolumeInfo {
        id: 0,
        name: [0; 256],
        parent: 0,
        directory: 0,
        generation: 0,
        flags: 0,
        uuid: [0; 16],
        parent_uuid: [0; 16],
        received_uuid: [0; 16],
        rest: [0; 20],
    };
    // SAFETY: the request writes this struct, whose size is part of its number.
    unsafe { get_subvol_info(directory.as_fd().as_raw_fd(), &mut info) }?;
    Ok(SubvolumeKind {
        snapshot: info.parent_uuid != [0; 16],
        read_only: info.flags & READ_ONLY != 0,
        received: info.received_uuid != [0; 16],
    })
}

/// `struct btrfs_ioctl_fs_info_args` of `<linux/btrfs.h>`: the fields we read.
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

/// The kernel's id of a mounted btrfs; for a clone of a mounted one, not the id in its superblock.
/// `root` is open for reading.
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
