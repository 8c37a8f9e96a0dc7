//! Detached mounts: filesystems held by a descriptor, attached to no mount tree.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatVfsMountFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount;

use super::btrfs::{BtrfsDevice, forget_others};
use super::compat::{self, Exclusive};
use super::policy::{self, Recipe};
use super::{Filesystem, Note};
use crate::config::FsPolicy;
use crate::error::{Code, Error, Result, escape};
use crate::point::{Point, pass, reach};

/// Maximum kernel messages copied into an error or notes.
const MAX_LOG_LINES: usize = 16;

/// A mounted filesystem outside every mount table, for reading only unless the policy says otherwise. Closing it unmounts (completed when the last
/// descriptor inside is closed).
#[derive(Debug)]
pub struct DetachedMount {
    // Drop order matters: both roots close before the kernel drops the devices.
    /// Root directory, O_PATH. For btrfs, the default subvolume.
    root: OwnedFd,
    /// btrfs only: the top of all subvolumes.
    top: Option<OwnedFd>,
    /// btrfs only: its devices, the one used for opening first.
    forget: Vec<BtrfsDevice>,
    fstype: String,
    driver: &'static str,
    recipe: Recipe,
    damage: Option<DamageCounter>,
    /// Bytes in use when it was opened.
    used: u64,
}

/// Notes on data that a mount of this filesystem does not show.
fn known_limits(filesystem: &Filesystem, policy: &FsPolicy, what: &str) -> Vec<Note> {
    let mut notes: Vec<Note> = policy::not_shown(&filesystem.fstype)
        // Warning: not shown.
        .map(|text| Note::warning(format!("{what}: {text}")))
        .into_iter()
        .collect();
    if filesystem.stale_zfs {
        let kind = &filesystem.fstype;
        notes.push(Note::info(format!(
            "{what}: labels of ZFS behind the {kind} are left from an earlier use"
        )));
    }
    if policy.skip_recovery && !policy.writable {
        // Warning: no replay.
        notes.push(Note::warning(format!(
            "{what}: the journal is not replayed, as configured: files may be stale or torn"
        )));
    }
    notes
}

impl DetachedMount {
    /// Mounts the filesystem on `device`, which must be open for reading and writing so that the
    /// kernel can replay the journal. `what` names it in errors and notes.
    pub fn open(
        device: BorrowedFd<'_>,
        filesystem: &Filesystem,
        policy: &FsPolicy,
        what: &str,
    ) -> Result<(DetachedMount, Vec<Note>)> {
        DetachedMount::open_set(device, &[], filesystem, policy, what)
    }

    /// Like `open`, for a btrfs with `more` devices. Only these are used, whatever devices the
    /// kernel has registered.
    pub fn open_set(
        device: BorrowedFd<'_>,
        more: &[BorrowedFd<'_>],
        filesystem: &Filesystem,
        policy: &FsPolicy,
        what: &str,
    ) -> Result<(DetachedMount, Vec<Note>)> {
        let recipe = policy
            .recipe(&filesystem.fstype)
            .map_err(|e| Error::new(e.code(), what).because(e))?;
        let mut notes = check_superblock(device, more, filesystem, what)?;
        notes.extend(known_limits(filesystem, policy, what));

        let source = format!("/proc/self/fd/{}", device.as_raw_fd());
        let mut forget_clones = || {
            let others = filesystem
                .uuid
                .as_deref()
                .map(forget_others)
                .unwrap_or_default();
            if others.is_empty() {
                return false;
            }
            let others = others.join(", ");
            notes.push(Note::info(format!(
                "{what}: a clone of it was in the kernel's list of btrfs devices; taken out: {others}"
            )));
            true
        };
        // Naming a device registers it with the kernel, even if the mount fails.
        let mut forget = Vec::new();
        if !more.is_empty() {
            forget_clones();
            for device in [&[device], more].concat() {
                forget.push(BtrfsDevice::new(device, what)?);
            }
        }
        let mut created = superblock(&source, more, &recipe, what)?;
        if let Err(Errno::EXIST) = &created.exclusive {
            if forget_clones() {
                created = superblock(&source, more, &recipe, what)?;
            }
        }
        let Superblock {
            context,
            driver,
            exclusive,
        } = created;
        let exclusive = exclusive.map_err(|errno| create_error(&context, errno, &recipe, what))?;
        if exclusive == Exclusive::NotSupported {
            log::debug!("{what}: mounted without FSCONFIG_CMD_CREATE_EXCL (Linux 6.6)");
        }
        let mut mount = DetachedMount {
            root: reach(Point::MountFsmount)
                .and_then(|()| compat::detached_mount(&context, recipe.writable))
                .map_err(|errno| failed(what, "fsmount").because(errno))?,
            top: None,
            forget,
            fstype: filesystem.fstype.clone(),
            driver,
            recipe,
            damage: None,
            used: 0,
        };
        if driver == "btrfs" {
            if mount.forget.is_empty() {
                mount.forget.push(BtrfsDevice::new(device, what)?);
            }
            mount.top = Some(mount.btrfs_subvolume(5, what)?);
            mount.check_btrfs_devices(&[&[device], more].concat(), what)?;
        }
        for line in read_log(&context) {
            notes.push(Note::info(format!("{what}: kernel: {line}")));
        }
        notes.extend(mount.verify(what)?);
        pass(Point::Mounted);
        Ok((mount, notes))
    }

    /// The root directory; for btrfs, that of the default subvolume.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// btrfs: the top of all subvolumes.
    pub fn top(&self) -> Option<BorrowedFd<'_>> {
        self.top.as_ref().map(OwnedFd::as_fd)
    }

    /// Type as named by libblkid.
    pub fn fstype(&self) -> &str {
        &self.fstype
    }

    /// Name of the kernel's driver.
    pub fn driver(&self) -> &str {
        self.driver
    }

    /// Bytes in use when it was opened, as `df` counts them.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Mount options in the form of `mount -o`.
    pub fn options(&self) -> String {
        self.recipe.describe()
    }

    /// btrfs: root of a subvolume by id, in the unshared superblock.
    pub(crate) fn btrfs_subvolume(&self, number: u64, what: &str) -> Result<OwnedFd> {
        let Some(device) = self.forget.first().and_then(BtrfsDevice::device) else {
            return Err(failed(what, "only btrfs has subvolumes"));
        };
        let step = |e: Errno| failed(what, &format!("subvolume {number}")).because(e);
        let context = mount::fsopen("btrfs", mount::FsOpenFlags::FSOPEN_CLOEXEC).map_err(step)?;
        let source = format!("/proc/self/fd/{}", device.as_raw_fd());
        configure(&context, &source, &[], &self.recipe, what)?;
        mount::fsconfig_set_string(&context, "subvolid", number.to_string()).map_err(step)?;
        mount::fsconfig_create(&context)
            .map_err(|e| create_error(&context, e, &self.recipe, what))?;
        compat::detached_mount(&context, self.recipe.writable).map_err(step)
    }

    /// Counter of damage that the driver finds but reports through no failing call.
    pub(crate) fn damage(&self) -> Option<&DamageCounter> {
        self.damage.as_ref()
    }

    /// Closes the descriptors. The superblock is released with the last descriptor inside.
    pub fn close(self) -> Result<()> {
        let DetachedMount {
            root, top, forget, ..
        } = self;
        pass(Point::Unmount);
        drop(root);
        drop(top);
        pass(Point::Unmounted);
        let closed: Vec<_> = forget.into_iter().map(BtrfsDevice::close).collect();
        closed.into_iter().collect()
    }

    /// Checks the devices in use: the kernel finds btrfs devices by id, and guests share ids.
    fn check_btrfs_devices(&self, devices: &[BorrowedFd<'_>], what: &str) -> Result<()> {
        let step = |e: std::io::Error| failed(what, "which device was mounted").because(e);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(&self.root, c".", flags, Mode::empty())
            .map_err(|e| step(e.into()))?;
        let id = crate::sys::btrfs::fsid(&root).map_err(step)?;
        let folder = Path::new("/sys/fs/btrfs")
            .join(policy::uuid_text(&id))
            .join("devices");
        let mut ours = BTreeSet::new();
        for device in devices {
            let stat = rustix::fs::fstat(device).map_err(|e| step(e.into()))?;
            ours.extend(device_name(
                libc::major(stat.st_rdev),
                libc::minor(stat.st_rdev),
            ));
        }
        let mounted: BTreeSet<OsString> = std::fs::read_dir(folder)
            .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect())
            .map_err(step)?;
        if ours.len() == devices.len() && mounted == ours {
            Ok(())
        } else {
            Err(failed(
                what,
                "the kernel mounted another device with the same btrfs id",
            ))
        }
    }

    /// Verifies the mount's properties.
    fn verify(&mut self, what: &str) -> Result<Vec<Note>> {
        let wrong = |text: &str| failed(what, text);
        let statfs = reach(Point::MountVerify).and_then(|()| rustix::fs::fstatfs(&self.root));
        let statfs = statfs.map_err(|e| wrong("statfs").because(e))?;
        let magic = u32::try_from(statfs.f_type & 0xffff_ffff);
        if !magic.is_ok_and(|magic| self.recipe.magic.contains(&magic)) {
            return Err(wrong("the kernel mounted another type than asked"));
        }
        let blocks = statfs.f_blocks.saturating_sub(statfs.f_bfree);
        self.used = blocks.saturating_mul(u64::try_from(statfs.f_bsize).unwrap_or_default());
        let statvfs = rustix::fs::fstatvfs(&self.root).map_err(|e| wrong("statvfs").because(e))?;
        let needed =
            StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV | StatVfsMountFlags::NOEXEC;
        let writable = !statvfs.f_flag.contains(StatVfsMountFlags::RDONLY);
        if !statvfs.f_flag.contains(needed) || writable != self.recipe.writable {
            let access = self.recipe.access();
            return Err(wrong(&format!(
                "the mount is not {access}, nosuid, nodev, noexec"
            )));
        }
        let root = rustix::fs::statx(
            &self.root,
            c"",
            AtFlags::EMPTY_PATH,
            StatxFlags::BASIC_STATS,
        )
        .map_err(|e| wrong("statx of the root").because(e))?;
        if FileType::from_raw_mode(root.stx_mode.into()) != FileType::Directory {
            return Err(wrong("its root is not a directory"));
        }
        if !self.fstype.starts_with("ext") {
            return Ok(Vec::new());
        }
        let name = device_name(root.stx_dev_major, root.stx_dev_minor);
        let not_shown = |thing: &str| {
            let driver = self.driver;
            Note::info(format!(
                "{what}: the driver {driver} does not show its {thing}"
            ))
        };
        let mut notes = Vec::new();
        // The superblock's `errors=panic` would let a guest panic the host.
        let wanted = format!("errors={}", self.recipe.at_errors());
        let options = name.as_ref().and_then(|name| {
            std::fs::read_to_string(Path::new("/proc/fs/ext4").join(name).join("options")).ok()
        });
        match options {
            Some(options) if options.lines().any(|line| line == wanted) => {}
            Some(_) => return Err(wrong(&format!("{wanted} did not take effect"))),
            None => notes.push(not_shown(&format!("options; {wanted} was accepted"))),
        }
        match name.and_then(DamageCounter::new) {
            Some(counter) => {
                if counter.before > 0 {
                    // Warning: recorded damage.
                    notes.push(Note::warning(format!(
                        "{what}: the guest has recorded {} errors in this filesystem before; \
                         check it with e2fsck",
                        counter.before
                    )));
                }
                self.damage = Some(counter);
            }
            None => notes.push(not_shown("error count")),
        }
        Ok(notes)
    }
}

/// Error counter of ext4, which skips a damaged directory block: its names are missing, and no call
/// fails.
#[derive(Debug, Clone)]
pub(crate) struct DamageCounter {
    folder: PathBuf,
    before: u64,
}

impl DamageCounter {
    fn new(device: OsString) -> Option<DamageCounter> {
        let mut counter = DamageCounter {
            folder: Path::new("/sys/fs/ext4").join(device),
            before: 0,
        };
        counter.before = counter.read("errors_count")?;
        Some(counter)
    }

    fn read(&self, name: &str) -> Option<u64> {
        let text = std::fs::read_to_string(self.folder.join(name)).ok()?;
        text.trim().parse().ok()
    }

    /// Damage counted since the mount, as text. Recent damage appears with a delay: the driver
    /// counts in a separate task.
    pub(crate) fn found(&self) -> Option<String> {
        let now = self.read("errors_count")?;
        if now <= self.before {
            return None;
        }
        let inode = self.read("last_error_ino").unwrap_or(0);
        Some(format!(
            "ext4 found {} errors in the filesystem while it was read, the last one at inode {inode}",
            now - self.before
        ))
    }
}

pub(super) fn failed(what: &str, step: &str) -> Error {
    Error::new(Code::MountFailed, format!("{what}: {step}"))
}

/// The kernel's name of a block device.
fn device_name(major: u32, minor: u32) -> Option<OsString> {
    let link = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    link.file_name().map(OsString::from)
}

/// Validates the superblock before the kernel sees it.
fn check_superblock(
    device: BorrowedFd<'_>,
    more: &[BorrowedFd<'_>],
    filesystem: &Filesystem,
    what: &str,
) -> Result<Vec<Note>> {
    let read = |(offset, length): (u64, usize)| {
        let mut bytes = vec![0; length];
        let got = rustix::io::pread(device, &mut bytes, offset)
            .map_err(|e| failed(what, "reading the superblock").because(e))?;
        bytes.truncate(got);
        Ok::<_, Error>(bytes)
    };
    match filesystem.fstype.as_str() {
        "ext2" | "ext3" | "ext4" => {
            policy::check_ext_superblock(&read(policy::EXT_SUPERBLOCK)?)
                .map_err(|refusal| refusal.error(Code::MountFailed, what))?;
            Ok(Vec::new())
        }
        "xfs" => {
            policy::check_xfs_superblock(&read(policy::XFS_SUPERBLOCK)?)
                .map_err(|refusal| refusal.error(Code::MountFailed, what))?;
            Ok(Vec::new())
        }
        "btrfs" => check_btrfs(
            &read(policy::BTRFS_SUPERBLOCK)?,
            more.len(),
            filesystem,
            what,
        ),
        _ if !more.is_empty() => Err(failed(what, "only btrfs has several devices")),
        _ => Ok(Vec::new()),
    }
}

/// Checks the id of a btrfs: the kernel looks up its devices by id, so an id in use by the host or
/// another guest could bring in the wrong device.
fn check_btrfs(
    superblock: &[u8],
    more: usize,
    filesystem: &Filesystem,
    what: &str,
) -> Result<Vec<Note>> {
    let member = policy::BtrfsMember::parse(superblock)
        .ok_or_else(|| failed(what, "the superblock is cut off"))?;
    if member.devices != more as u64 + 1 {
        let why = policy::BtrfsMember::incomplete(&[&member]).unwrap_or_default();
        let text = format!("{what}: a btrfs over {} devices; {why}", member.devices);
        return Err(Error::new(Code::UnsupportedVolume, text));
    }
    let in_use = filesystem
        .uuid
        .as_ref()
        .is_some_and(|uuid| Path::new("/sys/fs/btrfs").join(uuid).exists());
    if !in_use {
        return Ok(Vec::new());
    }
    if more > 0 {
        Err(failed(
            what,
            "a btrfs with the same id is mounted, and of those over several devices no kernel keeps two apart",
        ))
    } else if compat::btrfs_has_temp_fsid() {
        Ok(vec![Note::info(format!(
            "{what}: a btrfs with the same id is mounted; the kernel gives this one another"
        ))])
    } else {
        Err(failed(
            what,
            "a btrfs with the same id is mounted, and this kernel (before 6.7) cannot keep the \
             two apart",
        ))
    }
}

/// Sets source and options, and checks each call: after a failed one the kernel would continue
/// without the option.
fn configure(
    context: &OwnedFd,
    source: &str,
    more: &[BorrowedFd<'_>],
    recipe: &Recipe,
    what: &str,
) -> Result<()> {
    let one = |key: &str, result: rustix::io::Result<()>| {
        result.map_err(|errno| {
            let log = read_log(context).join("; ");
            failed(what, &format!("option {key} is refused ({log})")).because(errno)
        })
    };
    one(
        "source",
        mount::fsconfig_set_string(context, "source", source),
    )?;
    let access = recipe.access();
    one(
        access,
        reach(Point::MountConfigure).and_then(|()| mount::fsconfig_set_flag(context, access)),
    )?;
    for (key, value) in &recipe.options {
        one(
            key,
            match value {
                Some(value) => mount::fsconfig_set_string(context, *key, *value),
                None => mount::fsconfig_set_flag(context, *key),
            },
        )?;
    }
    // Last: newer kernels open each device when it is named, with the options set so far.
    for device in more {
        let device = format!("/proc/self/fd/{}", device.as_raw_fd());
        one(
            "device",
            mount::fsconfig_set_string(context, "device", device),
        )?;
    }
    Ok(())
}

/// Parts of a mount.
struct Superblock {
    context: OwnedFd,
    driver: &'static str,
    /// Errors of the filesystem are reported with the messages in the context.
    exclusive: std::result::Result<Exclusive, Errno>,
}

/// Creates the superblock with the first driver that the kernel has.
fn superblock(
    source: &str,
    more: &[BorrowedFd<'_>],
    recipe: &Recipe,
    what: &str,
) -> Result<Superblock> {
    let opened = reach(Point::MountOpen).and_then(|()| compat::open_context(recipe.drivers));
    let opened = opened.map_err(|errno| match errno {
        Errno::NOSYS => Error::new(Code::KernelTooOld, "fsopen"),
        _ => failed(what, "fsopen").because(errno),
    })?;
    let Some((context, driver)) = opened else {
        let text = format!(
            "{what}: no {} in Linux {}",
            recipe.drivers.join(" or "),
            escape(rustix::system::uname().release().to_bytes())
        );
        return Err(Error::new(Code::NoDriver, text));
    };
    configure(&context, source, more, recipe, what)?;
    let exclusive = reach(Point::MountCreate).and_then(|()| compat::create_superblock(&context));
    Ok(Superblock {
        context,
        driver,
        exclusive,
    })
}

/// Builds the error of a mount from the kernel's messages, or from the likely reason: xfs returns a
/// bare errno for some refusals.
fn create_error(context: &OwnedFd, errno: Errno, recipe: &Recipe, what: &str) -> Error {
    let log = read_log(context);
    let hint = if !log.is_empty() {
        log.join("; ")
    } else {
        match errno {
            Errno::INVAL => {
                "the superblock is damaged, or has features this kernel does not know; \
                             the kernel log may say more"
                    .into()
            }
            Errno::ROFS => "the journal needs a replay, but the device is read-only".to_owned(),
            Errno::BUSY => "the device is in use, or mounted already".into(),
            Errno::EXIST => {
                "a clone of it is mounted, or in the kernel's list of btrfs devices with a later \
                 generation (btrfs device scan --forget DEVICE)"
                    .into()
            }
            Errno::UCLEAN => "the filesystem is damaged".into(),
            Errno::IO => "the filesystem is damaged, or the device cannot be read".into(),
            _ => "the kernel log may say more".into(),
        }
    };
    failed(
        what,
        &format!(
            "mounting {} with {}: {hint}",
            recipe.drivers[0],
            recipe.describe()
        ),
    )
    .because(errno)
}

/// Reads the kernel's messages from the context, safe to print.
fn read_log(context: &OwnedFd) -> Vec<String> {
    let mut lines = Vec::new();
    let mut buffer = [0; 1024];
    while lines.len() < MAX_LOG_LINES {
        match rustix::io::read(context, &mut buffer) {
            Ok(length) if length > 0 => lines.push(escape(buffer[..length].trim_ascii())),
            // ENODATA: no more messages.
            _ => break,
        }
    }
    lines
}
