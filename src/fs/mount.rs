//! The detached mount: a filesystem as a descriptor, attached to nothing.

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatVfsMountFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount;

use super::btrfs::{BtrfsDevice, forget_others};
use super::compat::{self, Exclusive};
use super::policy::{self, FsPolicy, Recipe};
use super::{Filesystem, Note};
use crate::error::{Code, Error, Result, escape};
use crate::point::{Point, pass, reach};

/// Lines of the kernel's message log that go into an error or into notes.
const MAX_LOG_LINES: usize = 16;

/// A mounted filesystem that is in no mount table. Closing it is the unmount (the kernel finishes
/// it when the last descriptor inside is closed too).
#[derive(Debug)]
pub struct DetachedMount {
    // The order matters for drop: both roots are closed before the kernel is told to forget.
    /// The root: O_PATH, read-only mount. For btrfs, the default subvolume.
    root: OwnedFd,
    /// btrfs only: the top of all subvolumes.
    top: Option<OwnedFd>,
    /// btrfs only.
    forget: Option<BtrfsDevice>,
    fstype: String,
    driver: &'static str,
    recipe: Recipe,
    damage: Option<DamageCounter>,
}

impl DetachedMount {
    /// Mounts the filesystem on `device` (opened for reading and writing, so that the kernel can
    /// replay the journal). `what` names it for errors and notes.
    pub fn open(
        device: BorrowedFd<'_>,
        filesystem: &Filesystem,
        policy: &FsPolicy,
        what: &str,
    ) -> Result<(DetachedMount, Vec<Note>)> {
        let recipe = policy
            .recipe(&filesystem.fstype)
            .map_err(|e| Error::new(e.code(), what).because(e))?;
        let mut notes = check_superblock(device, filesystem, what)?;
        if policy.skip_recovery {
            notes.push(Note::warning(format!(
                "{what}: the journal is not replayed, as configured: files may be stale or torn"
            )));
        }

        let source = format!("/proc/self/fd/{}", device.as_raw_fd());
        let mut created = superblock(&source, &recipe, what)?;
        if let (Err(Errno::EXIST), Some(uuid)) = (&created.exclusive, &filesystem.uuid) {
            let others = forget_others(uuid);
            if !others.is_empty() {
                let others = others.join(", ");
                notes.push(Note::info(format!(
                    "{what}: a clone of it was in the kernel's list of btrfs devices; taken out: {others}"
                )));
                created = superblock(&source, &recipe, what)?;
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
                .and_then(|()| compat::detached_mount(&context))
                .map_err(|errno| failed(what, "fsmount").because(errno))?,
            top: None,
            forget: None,
            fstype: filesystem.fstype.clone(),
            driver,
            recipe,
            damage: None,
        };
        if driver == "btrfs" {
            mount.forget = Some(BtrfsDevice::new(device, what)?);
            mount.top = Some(mount.btrfs_subvolume(5, what)?);
            mount.check_btrfs_device(device, what)?;
        }
        for line in read_log(&context) {
            notes.push(Note::info(format!("{what}: kernel: {line}")));
        }
        notes.extend(mount.verify(what)?);
        pass(Point::Mounted);
        Ok((mount, notes))
    }

    /// The root directory. For btrfs, that of the default subvolume.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// btrfs: the top of all subvolumes.
    pub fn top(&self) -> Option<BorrowedFd<'_>> {
        self.top.as_ref().map(OwnedFd::as_fd)
    }

    /// The type as libblkid names it.
    pub fn fstype(&self) -> &str {
        &self.fstype
    }

    /// The kernel's driver.
    pub fn driver(&self) -> &str {
        self.driver
    }

    /// The options as `mount -o` would take them.
    pub fn options(&self) -> String {
        self.recipe.describe()
    }

    /// btrfs: the root of a subvolume by its number, from the superblock that is ours alone.
    pub(crate) fn btrfs_subvolume(&self, number: u64, what: &str) -> Result<OwnedFd> {
        let Some(device) = self.forget.as_ref().and_then(BtrfsDevice::device) else {
            return Err(failed(what, "only btrfs has subvolumes"));
        };
        let step = |e: Errno| failed(what, &format!("subvolume {number}")).because(e);
        let context = mount::fsopen("btrfs", mount::FsOpenFlags::FSOPEN_CLOEXEC).map_err(step)?;
        let source = format!("/proc/self/fd/{}", device.as_raw_fd());
        configure(&context, &source, &self.recipe.options, what)?;
        mount::fsconfig_set_string(&context, "subvolid", number.to_string()).map_err(step)?;
        mount::fsconfig_create(&context)
            .map_err(|e| create_error(&context, e, &self.recipe, what))?;
        compat::detached_mount(&context).map_err(step)
    }

    /// Counts damage that the driver finds and does not report as an error of a call.
    pub(crate) fn damage(&self) -> Option<&DamageCounter> {
        self.damage.as_ref()
    }

    /// Closes our descriptors. The superblock goes with the last one that is open inside.
    pub fn close(self) -> Result<()> {
        let DetachedMount {
            root, top, forget, ..
        } = self;
        pass(Point::Unmount);
        drop(root);
        drop(top);
        pass(Point::Unmounted);
        match forget {
            Some(device) => device.close(),
            None => Ok(()),
        }
    }

    /// The kernel finds btrfs devices by an id that guests share. Not the wrong one, in silence.
    fn check_btrfs_device(&self, device: BorrowedFd<'_>, what: &str) -> Result<()> {
        let step = |e: std::io::Error| failed(what, "which device was mounted").because(e);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(&self.root, c".", flags, Mode::empty())
            .map_err(|e| step(e.into()))?;
        let id = crate::sys::btrfs::fsid(&root).map_err(step)?;
        let mut uuid: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
        for at in [20, 16, 12, 8] {
            uuid.insert(at, '-');
        }
        let folder = Path::new("/sys/fs/btrfs").join(uuid).join("devices");
        let number = rustix::fs::fstat(device)
            .map_err(|e| step(e.into()))?
            .st_rdev;
        let ours = device_name(libc::major(number), libc::minor(number));
        let mounted: Vec<OsString> = std::fs::read_dir(folder)
            .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect())
            .map_err(step)?;
        if mounted.len() == 1 && mounted.first() == ours.as_ref() {
            Ok(())
        } else {
            Err(failed(
                what,
                "the kernel mounted another device with the same btrfs id",
            ))
        }
    }

    /// Reads back what was asked for.
    fn verify(&mut self, what: &str) -> Result<Vec<Note>> {
        let wrong = |text: &str| failed(what, text);
        let statfs = reach(Point::MountVerify).and_then(|()| rustix::fs::fstatfs(&self.root));
        let statfs = statfs.map_err(|e| wrong("statfs").because(e))?;
        let magic = u32::try_from(statfs.f_type & 0xffff_ffff);
        if !magic.is_ok_and(|magic| self.recipe.magic.contains(&magic)) {
            return Err(wrong("the kernel mounted another type than asked"));
        }
        let statvfs = rustix::fs::fstatvfs(&self.root).map_err(|e| wrong("statvfs").because(e))?;
        let needed = StatVfsMountFlags::RDONLY
            | StatVfsMountFlags::NOSUID
            | StatVfsMountFlags::NODEV
            | StatVfsMountFlags::NOEXEC;
        if !statvfs.f_flag.contains(needed) {
            return Err(wrong("the mount is not read-only, nosuid, nodev, noexec"));
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
        // The superblock's `errors=panic` would let a guest stop the host.
        let options = name.as_ref().and_then(|name| {
            std::fs::read_to_string(Path::new("/proc/fs/ext4").join(name).join("options")).ok()
        });
        match options {
            Some(options) if options.lines().any(|line| line == "errors=continue") => {}
            Some(_) => return Err(wrong("errors=continue did not take effect")),
            None => notes.push(not_shown("options; errors=continue was accepted")),
        }
        match name.and_then(DamageCounter::new) {
            Some(counter) => {
                if counter.before > 0 {
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

/// ext4 passes over a damaged block of a directory: the names in it are missing, and no call
/// fails. What it does is count.
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

    /// What was found since the mount, in words. Damage found in the last moments shows up here a
    /// little later: the driver counts in a task of its own.
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

/// What must hold before the kernel sees the filesystem.
fn check_superblock(
    device: BorrowedFd<'_>,
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
                .map_err(|why| failed(what, why))?;
            Ok(Vec::new())
        }
        "btrfs" => check_btrfs(&read(policy::BTRFS_SUPERBLOCK)?, filesystem, what),
        _ => Ok(Vec::new()),
    }
}

/// The kernel finds the devices of a btrfs filesystem by its id in a list of its own, so an id
/// that the host or another guest uses may bring in the wrong device.
fn check_btrfs(superblock: &[u8], filesystem: &Filesystem, what: &str) -> Result<Vec<Note>> {
    match policy::btrfs_devices(superblock) {
        Some(1) => {}
        Some(count) => {
            return Err(failed(
                what,
                &format!("btrfs over {count} devices is not supported"),
            ));
        }
        None => return Err(failed(what, "the superblock is cut off")),
    }
    let in_use = filesystem
        .uuid
        .as_ref()
        .is_some_and(|uuid| Path::new("/sys/fs/btrfs").join(uuid).exists());
    if !in_use {
        return Ok(Vec::new());
    }
    if compat::btrfs_has_temp_fsid() {
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

/// Sets source and options. Each call is checked: after a failed one the kernel would carry on
/// without the option.
fn configure(
    context: &OwnedFd,
    source: &str,
    options: &[(&'static str, Option<&'static str>)],
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
    one(
        "ro",
        reach(Point::MountConfigure).and_then(|()| mount::fsconfig_set_flag(context, "ro")),
    )?;
    for (key, value) in options {
        one(
            key,
            match value {
                Some(value) => mount::fsconfig_set_string(context, *key, *value),
                None => mount::fsconfig_set_flag(context, *key),
            },
        )?;
    }
    Ok(())
}

/// What a mount is made of.
struct Superblock {
    context: OwnedFd,
    driver: &'static str,
    /// The errors of the kernel's filesystem are told with what is in the context.
    exclusive: std::result::Result<Exclusive, Errno>,
}

/// Opens the filesystem with the first driver that the kernel has.
fn superblock(source: &str, recipe: &Recipe, what: &str) -> Result<Superblock> {
    let opened = reach(Point::MountOpen).and_then(|()| compat::open_context(recipe.drivers));
    let opened = opened.map_err(|errno| match errno {
        Errno::NOSYS => Error::new(Code::KernelTooOld, "fsopen"),
        _ => failed(what, "fsopen").because(errno),
    })?;
    let Some((context, driver)) = opened else {
        let drivers = recipe.drivers.join(" or ");
        return Err(failed(
            what,
            &format!("this kernel has no driver for {drivers}"),
        ));
    };
    configure(&context, source, &recipe.options, what)?;
    let exclusive = reach(Point::MountCreate).and_then(|()| compat::create_superblock(&context));
    Ok(Superblock {
        context,
        driver,
        exclusive,
    })
}

/// The error of a mount, with what the kernel says, and else with the likely reason: xfs answers
/// some refusals with a bare number.
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

/// The messages the kernel left in the context, safe to print.
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
