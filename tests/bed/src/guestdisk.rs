//! Guest disks: partition tables, guest LVM, filesystems, on image files or block devices. Nothing needs the kernel to
//! scan partitions: every volume is reached through a loop device with an offset.

use super::{Result, cmd, hoststate};
use crate::{check, fail};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// Bytes of a MiB.
pub const MIB: u64 = 1 << 20;

/// A loop device, detached when dropped.
#[derive(Debug)]
pub struct Loop {
    device: String,
}

impl Loop {
    /// Attaches a file or block device, or a part of it; `sector` 0 leaves the default of 512.
    pub fn attach(path: &Path, offset: u64, size: Option<u64>, sector: u32) -> Result<Self> {
        let mut args = vec![
            "--find".into(),
            "--show".into(),
            format!("--offset={offset}"),
        ];
        if let Some(size) = size {
            args.push(format!("--sizelimit={size}"));
        }
        if sector != 0 {
            args.push(format!("--sector-size={sector}"));
        }
        args.push(path.display().to_string());
        // Another process may take the free number first.
        let mut last = None;
        for _ in 0..5 {
            match cmd::run("losetup", &args) {
                Ok(out) => {
                    return Ok(Self {
                        device: out.trim().to_string(),
                    });
                }
                Err(e) => last = Some(e),
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        Err(last.unwrap_or_else(|| "losetup failed".into()))
    }

    /// Attaches a whole file without caching its contents a second time.
    pub fn attach_direct(path: &Path) -> Result<Self> {
        let path = path.display().to_string();
        let out = cmd::run("losetup", ["--find", "--show", "--direct-io=on", &path])?;
        Ok(Self {
            device: out.trim().to_string(),
        })
    }

    /// `/dev/loopN`.
    pub fn device(&self) -> &str {
        &self.device
    }
}

impl Drop for Loop {
    /// Waits until the device is free: udev may have it open for a moment, and what is below stays
    /// in use as long. Not for a daemon that still has a mount of it in a namespace of its own.
    fn drop(&mut self) {
        let bound = || {
            Path::new(&self.device.replace("/dev", "/sys/block"))
                .join("loop")
                .exists()
        };
        let freed = cmd::run("losetup", ["-d", &self.device]).and_then(|_| {
            cmd::wait_for("the loop device to be free", FREED, || {
                Ok((!bound() || is_mounted(&self.device)?).then_some(()))
            })
        });
        if let Err(e) = freed {
            eprintln!("{}", super::message(&e));
        }
    }
}

/// Whether any process has a mount of the device.
fn is_mounted(device: &str) -> Result<bool> {
    let device = format!(" {device} ");
    for process in std::fs::read_dir("/proc")?.flatten() {
        // Most of what is there is no process, and some have gone.
        let mounts = std::fs::read_to_string(process.path().join("mountinfo"));
        if mounts.is_ok_and(|mounts| mounts.contains(&device)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// How long a loop device may take to be free.
const FREED: std::time::Duration = std::time::Duration::from_secs(20);

/// A filesystem type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fs {
    /// ext2.
    Ext2,
    /// ext3.
    Ext3,
    /// ext4.
    Ext4,
    /// xfs.
    Xfs,
    /// FAT32.
    Vfat,
    /// btrfs.
    Btrfs,
    /// NTFS, by the kernel's own driver.
    Ntfs,
}

impl Fs {
    /// The kernel's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext2 => "ext2",
            Self::Ext3 => "ext3",
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Vfat => "vfat",
            Self::Btrfs => "btrfs",
            Self::Ntfs => "ntfs3",
        }
    }

    /// Features that [`super::populate::rich`] may use on it.
    pub fn can(self) -> super::populate::Can {
        super::populate::Can {
            unix: !matches!(self, Self::Vfat | Self::Ntfs),
            big_times: !matches!(self, Self::Vfat | Self::Ntfs),
        }
    }

    /// Makes the filesystem on a block device. xfs needs 300 MiB, btrfs 110 MiB.
    pub fn make(self, device: &str, label: &str, more: &[&str]) -> Result {
        let mut args: Vec<&str> = match self {
            Self::Ext2 | Self::Ext3 | Self::Ext4 => vec!["-q", "-F", "-L", label],
            Self::Xfs => vec!["-q", "-f", "-L", label],
            Self::Vfat => vec!["-n", label],
            Self::Btrfs => vec!["-q", "-f", "-L", label],
            Self::Ntfs => vec!["-q", "-f", "-F", "-L", label],
        };
        args.extend_from_slice(more);
        args.push(device);
        let program = match self {
            Self::Ntfs => "mkfs.ntfs".to_string(),
            _ => format!("mkfs.{}", self.name()),
        };
        cmd::run(&program, args)?;
        announce(Path::new(device))
    }
}

/// Lets udev see what a volume of the host holds now: else that is seen at some later event, in the middle of a test.
pub fn announce(device: &Path) -> Result {
    let name = device.display().to_string();
    if name.starts_with("/dev/") && !name.starts_with("/dev/loop") && cmd::have("udevadm") {
        let how = ["trigger", "--settle", "--action=change", &name];
        cmd::run("udevadm", how)?;
    }
    Ok(())
}

/// The partition table of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// No table: the first part is the whole disk.
    Whole,
    /// MBR, with an extended partition if a part is logical.
    Mbr,
    /// GPT.
    Gpt,
    /// GPT written for 4096-byte sectors, as a guest with such a disk makes it.
    Gpt4096,
}

/// Contents of a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing.
    Empty,
    /// A filesystem with this label.
    Fs(Fs, String),
    /// Swap space.
    Swap,
    /// A physical volume; [`GuestVg::create`] makes it.
    Pv,
}

/// A partition to make.
#[derive(Clone, Debug)]
pub struct Part {
    /// First 512-byte sector; 0 = the next one on a MiB border.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// Inside of the extended partition (MBR), which reaches from the first logical partition to the end of the disk.
    pub logical: bool,
    /// Contents to make in it.
    pub content: Content,
}

impl Part {
    /// A primary partition on the next MiB border.
    pub fn new(size: u64, content: Content) -> Self {
        Self {
            start: 0,
            size,
            logical: false,
            content,
        }
    }

    /// A partition with a filesystem that has this label.
    pub fn fs(size: u64, fs: Fs, label: &str) -> Self {
        Self::new(size, Content::Fs(fs, label.to_string()))
    }

    /// Begins at this 512-byte sector.
    pub fn at(mut self, sector: u64) -> Self {
        self.start = sector;
        self
    }

    /// Inside of the extended partition.
    pub fn logical(mut self) -> Self {
        self.logical = true;
        self
    }
}

/// A made partition: its number in the table and where it lies, in bytes.
#[derive(Clone, Debug)]
pub struct Placed {
    /// Number in the table, from 1.
    pub number: u32,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// Contents that were made in it.
    pub content: Content,
}

/// A guest's disk.
#[derive(Clone, Debug)]
pub struct GuestDisk {
    /// Image file or block device.
    pub path: PathBuf,
    /// In the order of the table.
    pub parts: Vec<Placed>,
}

/// Makes a sparse image file.
pub fn image(path: &Path, size: u64) -> Result {
    File::create(path)
        .and_then(|f| f.set_len(size))
        .map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(())
}

/// Size of a file or block device.
pub fn size_of(path: &Path) -> Result<u64> {
    Ok(File::open(path)
        .and_then(|mut f| f.seek(SeekFrom::End(0)))
        .map_err(|e| format!("{}: {e}", path.display()))?)
}

impl GuestDisk {
    /// Writes table and filesystems to an existing image file or block device.
    pub fn create(path: &Path, table: Table, parts: &[Part]) -> Result<Self> {
        let total = size_of(path)?;
        let mut file = File::options().write(true).open(path)?;
        let zero = vec![0; MIB as usize];
        file.write_all(&zero)?;
        file.seek(SeekFrom::Start(total - MIB))?;
        file.write_all(&zero)?;
        file.sync_all()?;
        drop(file);
        let disk = Self {
            path: path.to_path_buf(),
            parts: place(table, parts, total)?,
        };
        disk.write_table(table, total)?;
        for part in &disk.parts {
            match &part.content {
                Content::Fs(fs, label) => {
                    fs.make(disk.volume(part.number)?.device(), label, &[])?
                }
                Content::Swap => drop(cmd::run(
                    "mkswap",
                    ["-f", disk.volume(part.number)?.device()],
                )?),
                Content::Pv | Content::Empty => {}
            }
        }
        announce(&disk.path)?;
        Ok(disk)
    }

    /// The partition of this number.
    pub fn part(&self, number: u32) -> Result<&Placed> {
        Ok(self
            .parts
            .iter()
            .find(|p| p.number == number)
            .ok_or_else(|| format!("no partition {number}"))?)
    }

    /// A loop device over one partition (1 for a disk without a table).
    pub fn volume(&self, number: u32) -> Result<Loop> {
        let part = self.part(number)?;
        Loop::attach(&self.path, part.offset, Some(part.size), 0)
    }

    /// Mounts one partition read-write at a folder (made if it is missing).
    pub fn mount(&self, number: u32, point: &Path) -> Result<Mounted> {
        let fs = match &self.part(number)?.content {
            Content::Fs(fs, _) => *fs,
            other => fail!("partition {number} holds {other:?}"),
        };
        Mounted::new(self.volume(number)?, fs, point)
    }

    fn write_table(&self, table: Table, total: u64) -> Result {
        let (label, sector) = match table {
            Table::Whole => return Ok(()),
            Table::Mbr => ("dos", 512),
            Table::Gpt => ("gpt", 512),
            Table::Gpt4096 => ("gpt", 4096),
        };
        let mut script = format!("label: {label}\nunit: sectors\n\n");
        let mut extended = false;
        for part in &self.parts {
            let kind = match (&part.content, table) {
                (Content::Swap, Table::Mbr) => "82",
                (Content::Pv, Table::Mbr) => "8e",
                (Content::Fs(Fs::Vfat, _), Table::Mbr) => "c",
                (_, Table::Mbr) => "83",
                (Content::Swap, _) => "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F",
                (Content::Pv, _) => "E6D6D379-F507-44C2-A23C-238F2A3DF928",
                (Content::Fs(Fs::Vfat, _), _) => "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
                _ => "0FC63DAF-8483-4772-8E79-3D69D8477DE4",
            };
            if table == Table::Mbr && part.number >= 5 && !extended {
                extended = true;
                let start = part.offset / 512 - 63;
                let _ = writeln!(
                    script,
                    "start={start}, size={}, type=5",
                    total / 512 - start
                );
            }
            let _ = writeln!(
                script,
                "start={}, size={}, type={kind}",
                part.offset / sector,
                part.size / sector
            );
        }
        let args = ["--no-reread", "--no-tell-kernel", "--force", "--quiet"]
            .map(str::to_string)
            .to_vec();
        if sector == 4096 {
            let whole = Loop::attach(&self.path, 0, None, 4096)?;
            cmd::run_with_input(
                "sfdisk",
                [args, vec![whole.device().into()]].concat(),
                script.as_bytes(),
            )?;
        } else {
            let path = self.path.display().to_string();
            cmd::run_with_input("sfdisk", [args, vec![path]].concat(), script.as_bytes())?;
        }
        Ok(())
    }
}

fn place(table: Table, parts: &[Part], total: u64) -> Result<Vec<Placed>> {
    let mut placed = Vec::new();
    if table == Table::Whole {
        let part = parts
            .first()
            .ok_or("a disk without a table still needs one part")?;
        placed.push(Placed {
            number: 1,
            offset: 0,
            size: total,
            content: part.content.clone(),
        });
        return Ok(placed);
    }
    let (mut primary, mut logical, mut next) = (1, 5, MIB);
    for part in parts {
        let number = if part.logical {
            &mut logical
        } else {
            &mut primary
        };
        // A logical partition has its own table 63 sectors before it.
        let room = if part.logical { 63 * 512 } else { 0 };
        let offset = match part.start {
            0 => (next + room).next_multiple_of(MIB),
            sector => sector * 512,
        };
        let size = part.size / 4096 * 4096;
        let tail = if table == Table::Mbr { 0 } else { MIB };
        check!(
            offset + size + tail <= total,
            "partition {number} does not fit: {offset} + {size} of {total}"
        );
        placed.push(Placed {
            number: *number,
            offset,
            size,
            content: part.content.clone(),
        });
        *number += 1;
        next = offset + size;
    }
    Ok(placed)
}

/// A mounted guest volume; unmounted and detached when dropped.
#[derive(Debug)]
pub struct Mounted {
    point: PathBuf,
    mounted: bool,
    _loop: Option<Loop>,
}

impl Mounted {
    /// Mounts the filesystem on a loop device, which goes with the mount.
    pub fn new(volume: Loop, fs: Fs, point: &Path) -> Result<Self> {
        let mut mounted = Self::device(volume.device(), fs, point)?;
        mounted._loop = Some(volume);
        Ok(mounted)
    }

    /// Mounts a block device that the caller owns.
    pub fn device(device: &str, fs: Fs, point: &Path) -> Result<Self> {
        std::fs::create_dir_all(point)?;
        if fs == Fs::Btrfs {
            // The kernel may remember a clone of it, of which udev told it.
            cmd::run("btrfs", ["device", "scan", "--forget"])?;
        }
        let options = match fs {
            Fs::Xfs => "nouuid",
            Fs::Ext2 | Fs::Ext3 | Fs::Ext4 => "acl,user_xattr",
            Fs::Vfat => "utf8",
            Fs::Btrfs => "rw",
            Fs::Ntfs => "iocharset=utf8",
        };
        cmd::run(
            "mount",
            [
                "-t",
                fs.name(),
                "-o",
                options,
                device,
                &point.display().to_string(),
            ],
        )?;
        Ok(Self {
            point: point.to_path_buf(),
            mounted: true,
            _loop: None,
        })
    }

    /// A folder whose mounts are seen by mount namespaces that are made later.
    pub fn shared(point: &Path) -> Result<Self> {
        std::fs::create_dir_all(point)?;
        let name = point.display().to_string();
        cmd::run("mount", ["--bind", &name, &name])?;
        let shared = Self {
            point: point.to_path_buf(),
            mounted: true,
            _loop: None,
        };
        cmd::run("mount", ["--make-shared", &name])?;
        Ok(shared)
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        &self.point
    }

    /// Writes everything back; the filesystem stays mounted and its journal dirty.
    pub fn sync(&self) -> Result {
        cmd::run("sync", ["-f", &self.point.display().to_string()])?;
        Ok(())
    }

    /// Unmounts, with an error if that fails.
    pub fn close(mut self) -> Result {
        self.unmount()
    }

    fn unmount(&mut self) -> Result {
        if self.mounted {
            cmd::run("umount", [&self.point])?;
            self.mounted = false;
        }
        Ok(())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(e) = self.unmount() {
            eprintln!("{}", super::message(&e));
        }
    }
}

/// Makes a copy of an image whose filesystem is mounted at `mounted`: the copy has a journal with something to replay.
/// Writes and fsyncs a file `dirty` first, which only the journal knows of.
pub fn dirty_copy(mounted: &Mounted, image: &Path, copy: &Path) -> Result {
    mounted.sync()?;
    for n in 0..20 {
        let mut file = File::create(mounted.path().join(format!("dirty-{n}")))?;
        file.write_all(&super::populate::bytes(n, 3000))?;
        file.sync_all()?;
    }
    cmd::run(
        "cp",
        [
            "--sparse=always",
            &image.display().to_string(),
            &copy.display().to_string(),
        ],
    )?;
    Ok(())
}

/// The disk of the old days: one ext3 partition at sector 63, an extended partition with swap in it behind.
pub fn classic(path: &Path, swap: u64) -> Result<GuestDisk> {
    let total = size_of(path)?;
    let root = (total - swap - 4 * MIB) / 4096 * 4096;
    let behind = (63 * 512 + root).next_multiple_of(MIB) / 512;
    GuestDisk::create(
        path,
        Table::Mbr,
        &[
            Part::fs(root, Fs::Ext3, "root").at(63),
            Part::new(swap, Content::Swap).at(behind + 63).logical(),
        ],
    )
}

/// A guest at work: keeps writing, renaming and fsyncing below a folder until stopped.
#[derive(Debug)]
pub struct Writer {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Writer {
    /// Begins to write below the folder.
    pub fn start(dir: &Path) -> Result<Self> {
        let dir = dir.to_path_buf();
        std::fs::create_dir_all(&dir)?;
        let (stop, count) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (stopped, counted) = (stop.clone(), count.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let n = counted.fetch_add(1, Ordering::Relaxed);
                let mut file = File::create(dir.join("new"))?;
                file.write_all(&super::populate::bytes(n, 10_000))?;
                file.sync_all()?;
                std::fs::rename(dir.join("new"), dir.join(format!("file-{}", n % 50)))?;
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            Ok(())
        });
        Ok(Self {
            stop,
            count,
            thread: Some(thread),
        })
    }

    /// Ends the writing; how many files were written.
    pub fn stop(mut self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| "the writer panicked")??;
        }
        Ok(self.count.load(Ordering::Relaxed))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _end = thread.join();
        }
    }
}

/// A guest's LVM: a VG over physical volumes inside of guest disks. The host's LVM only ever sees it through
/// `--devices`, so names may equal the host's or another guest's.
#[derive(Debug)]
pub struct GuestVg {
    /// Its name.
    pub name: String,
    pvs: Vec<(PathBuf, u64, u64)>,
}

/// A logical volume in a guest.
#[derive(Clone, Debug)]
pub struct GuestLv {
    /// Its name.
    pub name: String,
    /// More arguments for lvcreate beside the name (`-L 100m`, `-i 2 -L 200m`, `--type raid1 -m1 -L 100m`).
    pub args: Vec<String>,
    /// Contents to make in it.
    pub content: Content,
}

impl GuestLv {
    /// The arguments for lvcreate are split at spaces.
    pub fn new(name: &str, args: &str, content: Content) -> Self {
        Self {
            name: name.into(),
            args: args.split_whitespace().map(str::to_string).collect(),
            content,
        }
    }

    /// A thin pool with small chunks.
    pub fn pool(name: &str, mib: u64) -> Self {
        let args = format!("--type thin-pool -L {mib}m -c 64k --poolmetadatasize 4m");
        Self::new(name, &args, Content::Empty)
    }

    /// A thin volume of a pool.
    pub fn thin(name: &str, mib: u64, pool: &str, content: Content) -> Self {
        Self::new(name, &format!("-V {mib}m --thinpool {pool}"), content)
    }
}

impl GuestVg {
    /// Makes VG, LVs and filesystems. `pvs`: guest disk and partition number (1 for a whole disk), in order.
    pub fn create(name: &str, pvs: &[(&GuestDisk, u32)], lvs: &[GuestLv]) -> Result<Self> {
        let mut places = Vec::new();
        for (disk, number) in pvs {
            let part = disk.part(*number)?;
            places.push((disk.path.clone(), part.offset, part.size));
        }
        let vg = Self {
            name: name.to_string(),
            pvs: places,
        };
        {
            let loops = vg.loops()?;
            let devices: Vec<_> = loops.iter().map(|l| l.device().to_string()).collect();
            vg.lvm(
                &loops,
                "pvcreate",
                [&["-ff".into(), "-y".into()], &devices[..]].concat(),
            )?;
            vg.lvm(
                &loops,
                "vgcreate",
                [
                    &["-y".into(), "-s".into(), "4m".into(), name.to_string()],
                    &devices[..],
                ]
                .concat(),
            )?;
            for lv in lvs {
                // LVM makes thin pools and volumes active only, and wipes as it likes.
                let thin = lv.args.iter().any(|a| a.contains("thin"));
                let plain = ["-an", "-Zn", "-Wn"].iter().filter(|_| !thin);
                let mut args: Vec<String> =
                    ["-y"].iter().chain(plain).map(|a| a.to_string()).collect();
                args.extend(["-n".to_string(), lv.name.clone()]);
                args.extend(lv.args.iter().cloned());
                args.push(name.to_string());
                vg.lvm(&loops, "lvcreate", args)?;
                if thin {
                    vg.lvm(&loops, "vgchange", vec!["-an".into(), name.to_string()])?;
                }
            }
        }
        for lv in lvs {
            match &lv.content {
                Content::Fs(fs, label) => {
                    vg.with_lv(&lv.name, |device| fs.make(device, label, &[]))?
                }
                Content::Swap => vg.with_lv(&lv.name, |device| {
                    cmd::run("mkswap", ["-f", device]).map(drop)
                })?,
                _ => {}
            }
        }
        Ok(vg)
    }

    /// Gives a block device over the LV to `work`. A linear LV of one piece is a loop device with an offset; any other
    /// is activated for the time, which needs device-mapper and a VG name that is not active on the host.
    pub fn with_lv<T>(&self, lv: &str, work: impl FnOnce(&str) -> Result<T>) -> Result<T> {
        let loops = self.loops()?;
        let columns = "lv_name,segtype,seg_start_pe,seg_size_pe,seg_pe_ranges,vg_extent_size";
        let out = self.lvm(
            &loops,
            "lvs",
            [
                "--noheadings",
                "--units",
                "b",
                "--nosuffix",
                "--separator",
                "|",
                "-o",
                columns,
                &self.name,
            ]
            .map(str::to_string)
            .to_vec(),
        )?;
        let segments: Vec<Vec<&str>> = out
            .lines()
            .map(|l| l.trim().split('|').collect::<Vec<_>>())
            .filter(|f| f.first() == Some(&lv))
            .collect();
        if let [segment] = &segments[..] {
            if segment.len() >= 6 && segment[1] == "linear" {
                // DEVICE:first-last
                let (device, range) = segment[4].rsplit_once(':').ok_or("no range")?;
                let first: u64 = range.split('-').next().unwrap_or_default().parse()?;
                let extent: u64 = segment[5].parse()?;
                let length: u64 = segment[3].parse()?;
                let start = self.lvm(
                    &loops,
                    "pvs",
                    [
                        "--noheadings",
                        "--units",
                        "b",
                        "--nosuffix",
                        "-o",
                        "pe_start",
                        device,
                    ]
                    .map(str::to_string)
                    .to_vec(),
                )?;
                let start: u64 = start.trim().parse()?;
                let at = loops
                    .iter()
                    .position(|l| l.device() == device)
                    .ok_or("unknown PV")?;
                let (path, offset, _) = self.pvs[at].clone();
                drop(loops);
                let volume = Loop::attach(
                    &path,
                    offset + start + first * extent,
                    Some(length * extent),
                    0,
                )?;
                return work(volume.device());
            }
        }
        check!(
            hoststate::have_dm("linear"),
            "{lv} is not linear in one piece, activation needs device-mapper"
        );
        let full = format!("{}/{lv}", self.name);
        self.lvm(
            &loops,
            "lvchange",
            vec!["-ay".into(), "-K".into(), full.clone()],
        )?;
        let result = work(&format!("/dev/{full}"));
        self.lvm(&loops, "vgchange", vec!["-an".into(), self.name.clone()])?;
        result
    }

    /// Mounts an LV for the time of `work`.
    pub fn with_mounted<T>(
        &self,
        lv: &str,
        fs: Fs,
        point: &Path,
        work: impl FnOnce(&Path) -> Result<T>,
    ) -> Result<T> {
        self.with_lv(lv, |device| {
            let mounted = Mounted::device(device, fs, point)?;
            let result = work(mounted.path());
            mounted.close()?;
            result
        })
    }

    /// Runs a command of LVM inside the guest. All its volumes are inactive afterwards.
    pub fn run(&self, command: &str, args: &[&str]) -> Result {
        let loops = self.loops()?;
        let args = ["-y"].iter().chain(args).map(|a| a.to_string()).collect();
        self.lvm(&loops, command, args)?;
        self.lvm(&loops, "vgchange", vec!["-an".into(), self.name.clone()])?;
        Ok(())
    }

    /// The same group on other disks.
    pub fn on(&self, pvs: &[(&GuestDisk, u32)]) -> Result<Self> {
        let places = pvs.iter().map(|(disk, number)| {
            let part = disk.part(*number)?;
            Ok((disk.path.clone(), part.offset, part.size))
        });
        Ok(Self {
            name: self.name.clone(),
            pvs: places.collect::<Result<_>>()?,
        })
    }

    fn loops(&self) -> Result<Vec<Loop>> {
        self.pvs
            .iter()
            .map(|(path, offset, size)| Loop::attach(path, *offset, Some(*size), 0))
            .collect()
    }

    fn lvm(&self, loops: &[Loop], command: &str, args: Vec<String>) -> Result<String> {
        let devices: Vec<_> = loops.iter().map(|l| l.device().to_string()).collect();
        let mut all = vec!["--devices".to_string(), devices.join(",")];
        let mut config = String::from(
            "global/notify_dbus=0 global/use_lvmpolld=0 activation/monitoring=0 backup/backup=0 \
             backup/archive=0 devices/hints=\"none\"",
        );
        let elsewhere = (command == "vgcreate")
            .then(super::workdir::WorkDir::new)
            .transpose()?;
        if let Some(dir) = &elsewhere {
            // It refuses a name that has a folder in /dev, which the host's VG of that name has.
            config += &format!(
                " devices/dir=\"{}\" devices/scan=[\"/dev\"]",
                dir.path().display()
            );
        }
        all.extend(["--config".to_string(), config]);
        if !hoststate::have_dm("linear") {
            all.extend(["--driverloaded".to_string(), "n".to_string()]);
        }
        all.extend(args);
        cmd::run(command, all)
    }
}

/// Whether the path is a block device.
pub fn is_block_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device())
}
