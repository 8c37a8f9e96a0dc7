//! Owners of loop devices, mounts, volumes and links: the running test, or other software.

use super::hoststate::Mount;
use super::{Result, cmd, inside, workdir};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Set for each test that runs in a process and a mount namespace of its own: `<process id of the runner>.<name>`.
/// All processes of the test inherit it.
pub const TEST: &str = "GUESTSNAP_BED_TEST";

/// Mounts that the test's namespace was made with: copies of other software's. They go when its folders do.
static INHERITED: OnceLock<BTreeSet<String>> = OnceLock::new();

/// To be called when a test begins, in a mount namespace of its own: what is mounted now is not the test's.
pub fn begin() {
    INHERITED.get_or_init(|| {
        let mounts = Mount::all(Path::new("/proc/self"));
        mounts.iter().map(Mount::key).collect()
    });
}

/// Whether a mount ([`Mount::key`]) was there when the test began.
pub fn is_inherited(mount: &str) -> bool {
    INHERITED.get().is_some_and(|all| all.contains(mount))
}

/// The running test's marks, and the devices that carry them now.
#[derive(Debug)]
pub struct Ours {
    /// The whole machine is the test's.
    machine: bool,
    /// Beginning of the names of this process' work folders.
    folder: String,
    /// `/dev/loopN`: backing file in a work folder, or a device of ours below it.
    devices: BTreeSet<String>,
    /// All attached loop devices.
    attached: BTreeSet<String>,
    test: Option<String>,
    /// Numbers of the anonymous devices (btrfs, tmpfs) that are mounted below a work folder.
    mounted: BTreeSet<String>,
}

/// For each loop device the number of the device that its backing file lies on.
fn backing_devices(loops: &[(String, PathBuf)]) -> Result<BTreeMap<String, String>> {
    if loops.is_empty() {
        return Ok(BTreeMap::new());
    }
    let columns = "NAME,BACK-MAJ:MIN";
    let text = cmd::run("losetup", ["--list", "--noheadings", "-O", columns])?;
    let pairs = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace().map(str::to_owned);
        Some((words.next()?, words.next()?))
    });
    Ok(pairs.collect())
}

/// A text without the paths of the sources and of what is built from them.
fn without_sources(text: &str) -> String {
    let folders = [super::target(), super::repository()];
    folders.iter().fold(text.to_owned(), |text, folder| {
        text.replace(&*folder.to_string_lossy(), "")
    })
}

impl Ours {
    /// Looks at the loop devices that are attached now.
    pub fn now() -> Result<Self> {
        let loops = workdir::loops()?;
        let files = backing_devices(&loops)?;
        let mut ours = Self {
            machine: inside::is_inside(),
            folder: workdir::mark()?,
            devices: BTreeSet::new(),
            attached: loops.iter().map(|(device, _)| device.clone()).collect(),
            test: std::env::var(TEST).ok(),
            mounted: BTreeSet::new(),
        };
        for mount in Mount::all(Path::new("/proc/self")) {
            if ours.has_folder(&mount.key()) && !mount.device.starts_with("7:") {
                ours.mounted.insert(mount.device);
            }
        }
        loop {
            let before = ours.devices.len();
            for (device, backing) in &loops {
                let backing = backing.to_string_lossy();
                // The path alone does not tell: it is cut short once the namespace with the mount is gone.
                let on = files.get(device).is_some_and(|on| ours.has_number(on));
                if ours.machine || on || ours.has_name(&backing) || ours.has_device(&backing) {
                    ours.devices.insert(device.clone());
                }
            }
            if ours.devices.len() == before {
                return Ok(ours);
            }
        }
    }

    /// Whether the text names a work folder of this process.
    fn has_folder(&self, text: &str) -> bool {
        text.contains(&self.folder)
    }

    /// Whether the text names a work folder of this process, or an object that the plugin made.
    pub fn has_name(&self, text: &str) -> bool {
        self.machine
            || self.has_folder(text)
            // Work folders of other tests hold the plugin's name too, and so may the folder of the sources.
            || without_sources(text).contains("guestsnap") && !text.contains(workdir::PREFIX)
    }

    /// Whether this is the number (`7:1`) of a loop device of ours, or of a filesystem in a work folder.
    fn has_number(&self, number: &str) -> bool {
        let device = number.strip_prefix("7:");
        device.is_some_and(|n| self.has_device(&format!("/dev/loop{n}")))
            || self.mounted.contains(number)
    }

    /// Loop devices of ours.
    pub fn count(&self) -> usize {
        self.devices.len()
    }

    /// Whether this is a loop device of ours.
    pub fn has_device(&self, device: &str) -> bool {
        self.devices.contains(device)
    }

    /// Whether the line of `dmsetup table` is of a device of ours, or of one on a loop device of ours.
    pub fn has_dm(&self, line: &str) -> bool {
        self.has_name(line) || line.split(' ').any(|word| self.has_number(word))
    }

    /// Whether the mount is of a file or device of ours, or lies in a work folder of ours.
    pub fn has_mount(&self, mount: &Mount) -> bool {
        self.machine || self.has_device(&mount.source) || self.has_folder(&mount.key())
    }

    /// Whether the link was made for a device of ours, or for a loop device that is attached no more.
    pub fn has_link(&self, link: &Path, target: &Path) -> bool {
        let device = format!(
            "/dev/{}",
            target.file_name().unwrap_or_default().to_string_lossy()
        );
        let stale = device.starts_with("/dev/loop") && !self.attached.contains(&device);
        self.has_name(&link.to_string_lossy()) || self.has_device(&device) || stale
    }

    /// Whether the process (`/proc/N`) is one of this test, in the test's private mount namespaces.
    pub fn has_process(&self, proc_dir: &Path) -> bool {
        let Some(test) = &self.test else {
            return false;
        };
        let environment = std::fs::read(proc_dir.join("environ")).unwrap_or_default();
        let wanted = format!("{TEST}={test}");
        environment
            .split(|b| *b == 0)
            .any(|variable| variable == wanted.as_bytes())
    }

    /// Mounts of the namespace that the runner is in.
    pub fn outer_mounts(&self) -> BTreeSet<String> {
        let runner = self.test.as_deref().and_then(|t| t.split('.').next());
        let Some(runner) = runner else {
            return BTreeSet::new();
        };
        let mounts = Mount::all(&Path::new("/proc").join(runner));
        mounts.iter().map(Mount::key).collect()
    }
}
