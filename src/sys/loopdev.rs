//! Loop devices over a part of a file or device.
//!
//! One `LOOP_CONFIGURE` (kernel 5.8) sets everything at once, including autoclear: the kernel frees
//! the device with its last user, even a killed one.
//!
//! Direct I/O is requested; the kernel silently omits it if the backing file cannot do it. With
//! direct I/O, requests reach the disk side by side, without it a single kernel thread takes them one
//! after the other (measured on 6.18: 32 readers on a disk of 5 ms got 6131 against 192 reads a
//! second). The data read is the same: the kernel writes back cached data of the backing file before it reads.
#![expect(unsafe_code, reason = "ioctls")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FlockOperation, flock};

use super::blockdev;
use crate::hostdev::holders;
use crate::point::{Point, pass, reach};

const CONTROL: &str = "/dev/loop-control";
/// Attempts to get a free device while other processes compete.
const ATTEMPTS: u32 = 64;
/// Time limit for the kernel to free the device in `close`.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(10);

const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// `struct loop_info64` of `linux/loop.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of `linux/loop.h`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopInfo64>() == 232 && size_of::<LoopConfig>() == 304);

const EMPTY: LoopInfo64 = LoopInfo64 {
    device: 0,
    inode: 0,
    rdevice: 0,
    offset: 0,
    sizelimit: 0,
    number: 0,
    encrypt_type: 0,
    encrypt_key_size: 0,
    flags: 0,
    file_name: [0; 64],
    crypt_name: [0; 64],
    encrypt_key: [0; 32],
    init: [0; 2],
};

mod ioctls {
    use super::{LoopConfig, LoopInfo64};
    nix::ioctl_none_bad!(ctl_get_free, 0x4C82);
    nix::ioctl_write_ptr_bad!(configure, 0x4C0A, LoopConfig);
    nix::ioctl_read_bad!(get_status64, 0x4C05, LoopInfo64);
}

/// A loop device of ours. `flock` on its node tells systemd-udevd not to probe it.
#[derive(Debug)]
pub struct LoopDevice {
    file: Option<File>,
    index: u32,
    path: PathBuf,
    size: u64,
    binding: Option<Binding>,
}

/// sysfs attributes of a bound device, to recognise it later. The number alone is soon reused.
#[derive(Debug, PartialEq, Eq)]
struct Binding([Vec<u8>; 3]);

impl Binding {
    fn read(number: u32) -> Option<Self> {
        let dir = PathBuf::from(format!("/sys/block/loop{number}"));
        Some(Binding([
            std::fs::read(dir.join("loop/backing_file")).ok()?,
            std::fs::read(dir.join("loop/offset")).ok()?,
            // Changes with each binding; since kernel 5.15.
            std::fs::read(dir.join("diskseq")).unwrap_or_default(),
        ]))
    }
}

impl LoopDevice {
    /// Binds a free device to `len` bytes of `backing` from `offset`, for reading and, unless
    /// `read_only`, writing. `sector` is the logical sector size (512 or 4096); by default, direct
    /// I/O would use that of the backing device.
    ///
    /// The kernel silently truncates a length that is not a multiple of the sector size, so that is
    /// an error here.
    pub fn attach(
        backing: &File,
        offset: u64,
        len: u64,
        sector: u32,
        read_only: bool,
    ) -> io::Result<Self> {
        let whole = |bytes: u64| bytes % u64::from(sector) == 0;
        if !whole(offset) || !whole(len) || len == 0 || offset.checked_add(len).is_none() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("offset and length must be multiples of {sector}"),
            ));
        }
        let control = File::options().read(true).write(true).open(CONTROL)?;
        reach(Point::LoopAttach)?;
        let mut attempt = 0;
        loop {
            attempt += 1;
            match Self::try_attach(&control, backing, offset, len, sector, read_only) {
                Ok(device) => return device.verified(backing, offset, read_only),
                Err(error) if attempt < ATTEMPTS && is_race(&error) => sleep(pause(attempt)),
                Err(error) => return Err(error),
            }
        }
    }

    fn try_attach(
        control: &File,
        backing: &File,
        offset: u64,
        len: u64,
        sector: u32,
        read_only: bool,
    ) -> io::Result<Self> {
        // SAFETY: the descriptor is open for the call; the ioctl takes no argument.
        let number = unsafe { ioctls::ctl_get_free(control.as_raw_fd()) }?;
        let number = u32::try_from(number).map_err(io::Error::other)?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)?;
        // Before binding, which notifies udev at once.
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        let config = LoopConfig {
            fd: u32::try_from(backing.as_raw_fd()).map_err(io::Error::other)?,
            block_size: sector,
            info: LoopInfo64 {
                offset,
                sizelimit: len,
                flags: LO_FLAGS_AUTOCLEAR
                    | LO_FLAGS_DIRECT_IO
                    | if read_only { LO_FLAGS_READ_ONLY } else { 0 },
                ..EMPTY
            },
            reserved: [0; 8],
        };
        // SAFETY: both descriptors are open for the call, which reads one `loop_config`.
        unsafe { ioctls::configure(file.as_raw_fd(), &config) }?;
        let binding = Binding::read(number);
        Ok(LoopDevice {
            file: Some(file),
            index: number,
            path,
            size: len,
            binding,
        })
    }

    /// Verifies the kernel's settings against the request.
    fn verified(self, backing: &File, offset: u64, read_only: bool) -> io::Result<Self> {
        reach(Point::LoopAttached)?;
        let mut info = EMPTY;
        // SAFETY: the descriptor is open for the call, which writes one `loop_info64`.
        unsafe { ioctls::get_status64(self.as_fd().as_raw_fd(), &mut info) }?;
        let as_asked = info.offset == offset
            && info.sizelimit == self.size
            && info.inode == backing.metadata()?.ino()
            && info.flags & LO_FLAGS_AUTOCLEAR != 0
            && (info.flags & LO_FLAGS_READ_ONLY != 0) == read_only
            && blockdev::size(self.as_fd())? == self.size
            && blockdev::is_read_only(self.as_fd())? == read_only;
        if as_asked {
            Ok(self)
        } else {
            Err(io::Error::other(format!(
                "{}: the kernel did not bind it as asked",
                self.path.display()
            )))
        }
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device number.
    pub fn number(&self) -> io::Result<u64> {
        Ok(rustix::fs::fstat(self.as_fd())?.st_rdev)
    }

    /// Reads the first bytes of the device, bypassing earlier cached reads.
    pub fn beginning(&self, len: usize) -> io::Result<Vec<u8>> {
        let same = format!("/proc/self/fd/{}", self.as_fd().as_raw_fd());
        super::direct::beginning(Path::new(&same), len)
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Releases the device and waits until the kernel has freed it.
    pub fn close(mut self) -> io::Result<()> {
        self.release()
    }

    fn release(&mut self) -> io::Result<()> {
        pass(Point::LoopRelease);
        let Some(file) = self.file.take() else {
            return Ok(());
        };
        let number = rustix::fs::fstat(&file)?.st_rdev;
        drop(file);
        reach(Point::LoopReleased)?;
        let deadline = Instant::now() + RELEASE_TIMEOUT;
        while self.binding.is_some() && Binding::read(self.index) == self.binding {
            if Instant::now() > deadline {
                let holders = holders::describe_device(number);
                return Err(io::Error::new(
                    io::ErrorKind::ResourceBusy,
                    format!("{} is still in use{holders}", self.path.display()),
                ));
            }
            sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

impl AsFd for LoopDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // Only `release` takes the file, at the end of the value's life.
        self.file.as_ref().expect("an open loop device").as_fd()
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            log::error!("loop device: {error}");
        }
    }
}

/// Whether another process took the number first, or the node was missing at that moment.
fn is_race(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBUSY | libc::ENXIO | libc::ENOENT | libc::ENODEV | libc::EAGAIN)
    )
}

/// A growing, randomised wait, so that two rivals do not stay in step.
fn pause(attempt: u32) -> Duration {
    let noise = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |now| now.subsec_nanos() % 4000);
    Duration::from_micros(u64::from(attempt.min(20) * 1000 + noise))
}
