//! Defaults for settings absent from the Plugin line and the client file. `docs/configuration.md`
//! lists the same values; a test compares the two.

use super::client::Fsck;
use super::{OnError, Size, SnapshotKind, When};

/// `path`: parent of the guests in the catalog.
pub const PATH: &str = "/@guestsnap";

/// `snapshots`.
pub const SNAPSHOTS: When = When::Auto;

/// `on_error`.
pub const ON_ERROR: OnError = OnError::Continue;

/// `snapshot`.
pub const SNAPSHOT: SnapshotKind = SnapshotKind::Auto;

/// `size`: of a thick snapshot.
pub const SIZE: Size = Size::Percent(20);

/// `chunk`: of a thick snapshot, in bytes.
pub const CHUNK: u64 = 64 << 10;

/// `xl` of `[sources]`.
pub const XL: &[&str] = &["/etc/xen/*.cfg"];

/// `libvirt` of `[sources]`.
pub const LIBVIRT: &[&str] = &["/etc/libvirt/qemu/*.xml", "/etc/libvirt/libxl/*.xml"];

/// `pools` of `[sources]`.
pub const POOLS: &[&str] = &["/etc/libvirt/storage/*.xml"];

/// `pve` of `[sources]`.
pub const PVE: &str = "/etc/pve";

/// `lock_wait`, in seconds.
pub const LOCK_WAIT: u64 = 60;

/// `id`.
pub const ID: bool = false;

/// `extend_at`, in percent.
pub const EXTEND_AT: u8 = 70;

/// `extend_by`, in percent.
pub const EXTEND_BY: u8 = 20;

/// `warn_pool_at`, in percent.
pub const WARN_POOL_AT: u8 = 90;

/// `give_up_pool_at`, in percent.
pub const GIVE_UP_POOL_AT: u8 = 95;

/// `hold_seconds`.
pub const HOLD_SECONDS: u64 = 20;

/// `progress_minutes`.
pub const PROGRESS_MINUTES: u64 = 5;

/// `read_ahead`, in bytes.
pub const READ_AHEAD: usize = 32 << 20;

/// `readers`.
pub const READERS: usize = 16;

/// `holes`, in bytes. The daemon reads holes as zeros, at a few gigabytes a second, and any user of
/// a guest can create a file with exabytes of holes.
pub const HOLES: u64 = 16 << 40;

/// `seconds` of `[hooks]`.
pub const HOOK_SECONDS: u64 = 600;

/// `activate`.
pub const ACTIVATE: bool = true;

/// `filesystems`, as libblkid names them; no others can be chosen.
///
/// Kernel code parses data that the guest wrote, so the list is short: types that Linux and its
/// installers use and that the kernel's developers test against damage.
pub const FILESYSTEMS: &[&str] = &["ext2", "ext3", "ext4", "xfs", "btrfs", "vfat", "ntfs"];

/// `skip_recovery`.
pub const SKIP_RECOVERY: bool = false;

/// `fsck`.
pub const FSCK: Fsck = Fsck::None;

/// `freeze_seconds`.
pub const FREEZE_SECONDS: u64 = 30;

/// `skip_caches`.
pub const SKIP_CACHES: bool = false;
