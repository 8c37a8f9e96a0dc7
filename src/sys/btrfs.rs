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
    let args = vol_args(device.to_bytes())?;
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
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
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

/// `struct btrfs_ioctl_search_args` of `<linux/btrfs.h>`.
#[repr(C)]
struct Search {
    tree: u64,
    min_object: u64,
    max_object: u64,
    min_offset: u64,
    max_offset: u64,
    min_generation: u64,
    max_generation: u64,
    min_kind: u32,
    max_kind: u32,
    items: u32,
    unused: [u32; 9],
    found: [u8; 3992],
}

// The request number encodes the size.
const _: () = assert!(size_of::<Search>() == 4096);

nix::ioctl_readwrite!(
    /// `BTRFS_IOC_TREE_SEARCH`.
    tree_search,
    0x94,
    17,
    Search
);

/// An item of the tree of roots: its subvolume, kind, third key, bytes.
struct RootItem {
    object: u64,
    kind: u32,
    offset: u64,
    bytes: Vec<u8>,
}

/// The items of the tree of roots that belong to subvolumes. `limit`: how many at most.
fn root_items(top: impl AsFd, limit: usize) -> io::Result<Vec<RootItem>> {
    /// Ids of subvolumes; those above belong to the filesystem itself.
    const FIRST: u64 = 256;
    const LAST: u64 = u64::MAX - 255;
    /// `BTRFS_ROOT_ITEM_KEY` to `BTRFS_ROOT_BACKREF_KEY`.
    const KINDS: (u32, u32) = (132, 144);
    const TREE_OF_ROOTS: u64 = 1;
    /// Items of all kinds.
    const MAX_SEEN: usize = 1_000_000;
    let field = |bytes: &[u8], at: usize| -> Option<u64> {
        Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
    };
    let mut items: Vec<RootItem> = Vec::new();
    let mut next = (FIRST, KINDS.0, 0);
    // Keys are compared as a whole: items of other kinds come along.
    let mut seen = 0;
    while items.len() < limit && seen < MAX_SEEN {
        let mut search = Search {
            tree: TREE_OF_ROOTS,
            min_object: next.0,
            max_object: LAST,
            min_offset: next.2,
            max_offset: u64::MAX,
            min_generation: 0,
            max_generation: u64::MAX,
            min_kind: next.1,
            max_kind: KINDS.1,
            items: 4096,
            unused: [0; 9],
            found: [0; 3992],
        };
        // SAFETY: the request reads and writes this struct, whose size is part of its number.
        unsafe { tree_search(top.as_fd().as_raw_fd(), &mut search) }?;
        if search.items == 0 {
            return Ok(items);
        }
        let mut rest = &search.found[..];
        let mut last = None;
        for _ in 0..search.items {
            // `struct btrfs_ioctl_search_header`: generation, object, offset, kind, length.
            let (Some(object), Some(offset), Some(kind_len)) =
                (field(rest, 8), field(rest, 16), field(rest, 24))
            else {
                break;
            };
            let kind = u32::try_from(kind_len & 0xFFFF_FFFF).unwrap_or(0);
            let len = usize::try_from(kind_len >> 32).unwrap_or(usize::MAX);
            let Some(bytes) = rest.get(32..).and_then(|rest| rest.get(..len)) else {
                break;
            };
            if kind == KINDS.0 || kind == KINDS.1 {
                items.push(RootItem {
                    object,
                    kind,
                    offset,
                    bytes: bytes.to_vec(),
                });
            }
            seen += 1;
            last = Some((object, kind, offset));
            rest = &rest[32 + len..];
        }
        next = match last {
            Some((object, kind, offset)) if offset < u64::MAX => (object, kind, offset + 1),
            Some((object, kind, _)) if kind < u32::MAX => (object, kind + 1, 0),
            _ => return Err(io::Error::other("items that cannot be told apart")),
        };
    }
    Err(io::Error::other("too many subvolumes"))
}

/// A subvolume with its path from the top.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subvolume {
    /// Its id.
    pub id: u64,
    /// Path, without slashes at its ends.
    pub path: Vec<u8>,
    /// Its properties.
    pub kind: SubvolumeKind,
}

/// All subvolumes of a btrfs except its top, by id. `top` is a directory of it, open for reading.
/// Needs `CAP_SYS_ADMIN`.
pub fn subvolumes(top: impl AsFd) -> io::Result<Vec<Subvolume>> {
    /// Items of the tree of roots.
    const MAX_ITEMS: usize = 40_000;
    const ROOT_ITEM: u32 = 132;
    const ROOT_BACKREF: u32 = 144;
    const TOP: u64 = 5;
    /// Bytes of one path, which the kernel accepts in a mount option; and of all paths.
    const MAX_PATH: usize = 4096;
    const MAX_PATHS: usize = 4 << 20;
    let items = root_items(&top, MAX_ITEMS)?;
    let kinds: std::collections::BTreeMap<u64, SubvolumeKind> = items
        .iter()
        .filter(|item| item.kind == ROOT_ITEM)
        .map(|item| (item.object, kind_of(&item.bytes)))
        .collect();
    // By id: the parent, and the path in it.
    let mut places = std::collections::BTreeMap::new();
    for item in items.iter().filter(|item| item.kind == ROOT_BACKREF) {
        // `struct btrfs_root_ref`: directory, sequence, length of the name, name.
        let Some(directory) = item.bytes.get(..8).and_then(|b| b.try_into().ok()) else {
            continue;
        };
        let name = item.bytes.get(18..).unwrap_or_default();
        let mut path = folder_in(&top, item.offset, u64::from_le_bytes(directory))?;
        path.extend_from_slice(name);
        places.insert(item.object, (item.offset, path));
    }
    let mut found = Vec::new();
    let mut bytes = 0;
    for id in places.keys() {
        let (mut at, mut path) = (*id, Vec::new());
        // Each step leads to another subvolume; a circle ends with the last of them.
        for _ in 0..=places.len() {
            let Some((parent, inner)) = places.get(&at) else {
                break;
            };
            path = match path.is_empty() {
                true => inner.clone(),
                false => [&inner[..], &path].join(&b'/'),
            };
            at = *parent;
            if path.len() > MAX_PATH {
                break;
            }
        }
        bytes += path.len();
        if path.len() > MAX_PATH || bytes > MAX_PATHS {
            return Err(io::Error::other("paths of subvolumes are too long"));
        }
        if at == TOP {
            found.push(Subvolume {
                id: *id,
                path,
                kind: kinds.get(id).copied().unwrap_or_default(),
            });
        }
    }
    Ok(found)
}

/// Properties in a `struct btrfs_root_item`.
fn kind_of(item: &[u8]) -> SubvolumeKind {
    const FLAGS: usize = 208;
    const PARENT: usize = 263;
    const RECEIVED: usize = 279;
    let uuid = |at: usize| item.get(at..at + 16).is_some_and(|uuid| uuid != [0; 16]);
    SubvolumeKind {
        snapshot: uuid(PARENT),
        read_only: item.get(FLAGS).is_some_and(|flags| flags & 1 != 0),
        received: uuid(RECEIVED),
    }
}

/// Path of a directory in its subvolume, with a slash at its end; empty: the subvolume's root.
fn folder_in(top: impl AsFd, subvolume: u64, directory: u64) -> io::Result<Vec<u8>> {
    let mut lookup = InoLookup {
        tree: subvolume,
        object: directory,
        name: [0; 4080],
    };
    // SAFETY: the request reads and writes this struct, whose size is part of its number.
    unsafe { ino_lookup(top.as_fd().as_raw_fd(), &mut lookup) }?;
    let end = lookup.name.iter().position(|b| *b == 0).unwrap_or(0);
    Ok(lookup.name[..end].to_vec())
}

/// `struct btrfs_ioctl_space_args` of `<linux/btrfs.h>`, with room for its list: flags, total, used.
#[repr(C)]
struct Spaces {
    slots: u64,
    total: u64,
    spaces: [[u64; 3]; 32],
}

nix::ioctl_readwrite_bad!(
    /// `BTRFS_IOC_SPACE_INFO`; its number counts the two first fields alone.
    space_info,
    nix::request_code_readwrite!(0x94, 20, 16),
    Spaces
);

/// Whether all data and all metadata of a btrfs on one device are stored twice. `top` is open for
/// reading.
pub fn stored_twice(top: impl AsFd) -> io::Result<(bool, bool)> {
    const DATA: u64 = 1;
    const METADATA: u64 = 4;
    const DUP: u64 = 1 << 5;
    let mut info = Spaces {
        slots: 32,
        total: 0,
        spaces: [[0; 3]; 32],
    };
    // SAFETY: the request reads and writes this struct, and writes `slots` entries at most.
    unsafe { space_info(top.as_fd().as_raw_fd(), &mut info) }?;
    let used = usize::try_from(info.total).unwrap_or(0).min(32);
    let dup = |kind: u64| {
        let mut of = info.spaces[..used]
            .iter()
            .filter(|s| s[0] & kind != 0)
            .peekable();
        of.peek().is_some() && of.all(|s| s[0] & DUP != 0)
    };
    Ok((dup(DATA), dup(METADATA)))
}

nix::ioctl_write_ptr_bad!(
    /// `BTRFS_IOC_SUBVOL_CREATE`.
    subvol_create,
    nix::request_code_write!(0x94, 14, size_of::<VolArgs>()),
    VolArgs
);

nix::ioctl_write_ptr_bad!(
    /// `BTRFS_IOC_SNAP_DESTROY`.
    snap_destroy,
    nix::request_code_write!(0x94, 15, size_of::<VolArgs>()),
    VolArgs
);

nix::ioctl_write_ptr!(
    /// `BTRFS_IOC_DEFAULT_SUBVOL`.
    default_subvol,
    0x94,
    19,
    u64
);

/// A name as the argument of an ioctl. The last byte stays NUL.
fn vol_args(name: &[u8]) -> io::Result<VolArgs> {
    let mut args = VolArgs {
        fd: 0,
        name: [0; 4088],
    };
    if name.is_empty() || name.len() >= args.name.len() || name.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in args.name.iter_mut().zip(name) {
        *to = *from as c_char;
    }
    Ok(args)
}

/// Creates an empty subvolume in a directory. `directory` is open for reading.
pub fn create_subvolume(directory: impl AsFd, name: &[u8]) -> io::Result<()> {
    let args = vol_args(name)?;
    // SAFETY: the request takes this struct, the name in it is NUL-terminated, and the kernel
    // keeps no reference to it.
    unsafe { subvol_create(directory.as_fd().as_raw_fd(), &args) }?;
    Ok(())
}

/// Deletes a subvolume in a directory. `directory` is open for reading.
pub fn delete_subvolume(directory: impl AsFd, name: &[u8]) -> io::Result<()> {
    let args = vol_args(name)?;
    // SAFETY: like `create_subvolume`.
    unsafe { snap_destroy(directory.as_fd().as_raw_fd(), &args) }?;
    Ok(())
}

/// Makes a mount without `subvol=` show this subvolume. `top` is open for reading.
pub fn set_default(top: impl AsFd, subvolume: u64) -> io::Result<()> {
    // SAFETY: the request reads a u64.
    unsafe { default_subvol(top.as_fd().as_raw_fd(), &subvolume) }?;
    Ok(())
}
