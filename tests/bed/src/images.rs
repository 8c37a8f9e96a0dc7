//! Images with filesystems on loop devices, and how the library mounts them. What fails ends the test.

use crate::absent::present;
use crate::message;
use crate::workdir::WorkDir;
use guestsnap::config::FsPolicy;
use guestsnap::fs::{
    Content, DetachedMount, Filesystem, GuestTree, MountedVolume, VolumeIdentity, probe,
};
use guestsnap::stream::{FileReader, Item, WalkOptions, Walker};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard};

/// One test at a time: they compare what the whole process and the host hold.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Ends the test unless this tier can run; the test is alone as long as it keeps the guard.
pub fn root() -> MutexGuard<'static, ()> {
    assert!(
        rustix::process::geteuid().is_root(),
        "these tests need root and loop devices"
    );
    ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner())
}

/// Whether the kernel has the filesystem.
pub fn has_driver(name: &str) -> bool {
    let _ = Command::new("modprobe").arg(name).output();
    let known = fs::read_to_string("/proc/filesystems").unwrap();
    present(name, known.split_whitespace().any(|w| w == name))
}

/// Runs a program to its end; its standard output.
pub fn execute(program: &str, args: &[&OsStr]) -> String {
    let output = Command::new(program).args(args).output().expect(program);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// Runs a program with arguments of any kind that names paths.
#[macro_export]
macro_rules! run {
    ($program:literal $(, $arg:expr)*) => {
        $crate::images::execute($program, &[$(std::ffi::OsStr::new($arg)),*])
    };
}

/// A loop device over an image file; detached on drop.
#[derive(Debug)]
pub struct Loop {
    /// `/dev/loopN`.
    pub device: String,
}

impl Loop {
    /// Attaches an image.
    pub fn new(image: &Path) -> Loop {
        let device = crate::run!("losetup", "--find", "--show", image);
        Loop {
            device: device.trim().to_owned(),
        }
    }

    /// Attaches an image that cannot be written through it.
    pub fn read_only(image: &Path) -> Loop {
        let device = crate::run!("losetup", "--find", "--show", "--read-only", image);
        Loop {
            device: device.trim().to_owned(),
        }
    }

    /// `loopN`.
    pub fn name(&self) -> &str {
        self.device.strip_prefix("/dev/").unwrap()
    }

    /// Opens the device, for writing too where that is possible.
    pub fn open(&self) -> File {
        let mut options = OpenOptions::new();
        let opened = options.read(true).write(true).open(&self.device);
        opened.unwrap_or_else(|_| File::open(&self.device).unwrap())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        crate::run!("losetup", "--detach", &self.device);
    }
}

/// An ordinary mount for preparing images and as a restore target.
#[derive(Debug)]
pub struct Attached {
    /// The mount point.
    pub directory: PathBuf,
    _device: Loop,
}

impl Attached {
    /// Mounts an image.
    pub fn new(image: &Path, directory: PathBuf, options: &str) -> Attached {
        let device = Loop::new(image);
        fs::create_dir_all(&directory).unwrap();
        crate::run!("mount", "-o", options, &device.device, &directory);
        Attached {
            directory,
            _device: device,
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        crate::run!("umount", &self.directory);
    }
}

/// A folder for images, removed with the mounts and loop devices that a failed test leaves in it. One test at a time has
/// one.
#[derive(Debug)]
pub struct Bench {
    dir: WorkDir,
    _one: MutexGuard<'static, ()>,
}

impl Bench {
    /// Makes the folder, when no other test has one.
    pub fn alone() -> Bench {
        let _one = root();
        let dir = WorkDir::new().unwrap_or_else(|e| panic!("{}", message(&e)));
        Bench { dir, _one }
    }

    /// A name in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// An empty image.
    pub fn empty(&self, name: &str) -> PathBuf {
        let image = self.path(name);
        File::create(&image).unwrap().set_len(400 << 20).unwrap();
        image
    }

    /// An image with an empty filesystem.
    pub fn image(&self, name: &str, fstype: &str, more: &[&str]) -> PathBuf {
        let image = self.empty(name);
        self.image_in(&image, fstype, more);
        image
    }

    /// Makes an empty filesystem in a file that is there.
    pub fn image_in(&self, image: &Path, fstype: &str, more: &[&str]) {
        let program = format!("mkfs.{fstype}");
        let quiet: &[&str] = match fstype {
            "xfs" | "btrfs" => &["-q", "-f"],
            "vfat" => &[],
            _ => &["-q", "-F", "-b", "4096"],
        };
        let args: Vec<&OsStr> = quiet
            .iter()
            .chain(more)
            .map(OsStr::new)
            .chain([image.as_os_str()])
            .collect();
        execute(&program, &args);
    }

    /// Mounts an image, to change it.
    pub fn attach(&self, image: &Path) -> Attached {
        Attached::new(image, self.path("mnt"), "noatime")
    }
}

/// Results of probing a device.
pub fn filesystem_of(device: &File) -> Filesystem {
    match probe(device, "test").unwrap() {
        Content::Filesystem(filesystem) => filesystem,
        other => panic!("{other:?}"),
    }
}

/// Mounts what is on a device as a job does.
pub fn mount(device: &Loop) -> DetachedMount {
    let file = device.open();
    let filesystem = filesystem_of(&file);
    DetachedMount::open(file.as_fd(), &filesystem, &FsPolicy::default(), "test")
        .unwrap_or_else(|e| panic!("{}", e.report()))
        .0
}

/// The filesystem on a device as a volume of a guest.
pub fn volume(device: &Loop, identity: VolumeIdentity) -> MountedVolume {
    MountedVolume {
        filesystem: filesystem_of(&device.open()),
        mount: mount(device),
        identity,
    }
}

/// A guest that has only this filesystem.
pub fn single(device: &Loop) -> GuestTree {
    GuestTree::assemble(vec![volume(device, named("p1"))]).unwrap()
}

/// A volume that only has a name.
pub fn named(name: &str) -> VolumeIdentity {
    VolumeIdentity {
        name: name.into(),
        ..VolumeIdentity::default()
    }
}

/// Open descriptors of this process.
pub fn open_descriptors() -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc/self/fd").unwrap() {
        // The descriptor of this listing itself is gone by now.
        if let Ok(target) = fs::read_link(entry.unwrap().path()) {
            found.insert(target);
        }
    }
    found
}

/// Nothing holds the device any more.
pub fn assert_gone(device: &Loop) {
    for _ in 0..50 {
        if !Path::new("/proc/fs/ext4").join(device.name()).exists()
            && !Path::new("/sys/fs/xfs").join(device.name()).exists()
        {
            let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
            assert!(!mounts.contains(&device.device), "{mounts}");
            // Only a device without a holder can be opened exclusively.
            let mut options = OpenOptions::new();
            std::os::unix::fs::OpenOptionsExt::custom_flags(options.read(true), libc::O_EXCL);
            if options.open(&device.device).is_ok() {
                return;
            }
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("{} is still in use", device.device);
}

/// All of a file.
pub fn read_all(reader: &mut FileReader) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = [0; 1000];
    loop {
        let length = reader.read(&mut buffer).unwrap();
        if length == 0 {
            return all;
        }
        all.extend_from_slice(&buffer[..length]);
    }
}

/// Paths of all objects of a tree.
pub fn paths(tree: &GuestTree, options: WalkOptions) -> Vec<String> {
    Walker::new(tree, options)
        .filter_map(|item| match item {
            Item::Object(entry) => Some(guestsnap::error::escape(&entry.path)),
            Item::End(entry) => Some(guestsnap::error::escape(&entry.path) + "/"),
            Item::Problem(problem) => panic!("{}", problem.error.report()),
            _ => None,
        })
        .collect()
}
