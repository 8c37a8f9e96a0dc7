//! Leftovers that a job may leave on a host, as a value that can be compared.
//!
//! In an emulated machine everything counts. Elsewhere other software attaches loop devices and mounts filesystems
//! meanwhile: only the objects count that belong to the running test, see [`Ours`].

use super::ours::Ours;
use super::{Result, cmd};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long [`HostState::settled_diff`] waits for the daemon to come to rest. Bacula's pool threads leave after two
/// idle seconds (30 in some versions for the connection threads), udev removes links a moment after the device.
pub const SETTLE: Duration = Duration::from_secs(40);

/// Objects to look at beside those that all processes share.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    /// The File Daemon: its descriptors, threads and children are part of the state.
    pub fd_pid: Option<i32>,
    /// The File Daemon's working directory: the files in its `guestsnap` folder are part of the state.
    pub working_dir: Option<PathBuf>,
}

impl Scope {
    /// Waits until the File Daemon has no more threads than these. Its threads are cheaper to read than the host's state.
    pub fn rests(&self, resting: usize) -> Result<bool> {
        let end = Instant::now() + SETTLE;
        while self.fd_pid.map_or(Ok(Vec::new()), threads)?.len() > resting {
            if Instant::now() > end {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(true)
    }
}

/// The names of a process's threads.
pub fn threads(pid: i32) -> Result<Vec<String>> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))
        .map_err(|e| format!("process {pid}: {e}"))?;
    // One may end meanwhile.
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm"));
    Ok(tasks.flatten().filter_map(|task| name(task).ok()).collect())
}

/// One picture of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HostState {
    /// Device-mapper devices and their tables.
    pub dm: BTreeSet<String>,
    /// Loop devices of ours with backing file, offset and size limit.
    pub loops: BTreeSet<String>,
    /// LVs with attributes that do not change by use: size, origin, tags.
    pub lvs: BTreeSet<String>,
    /// Mounts seen in any mount namespace, without the namespace: a namespace made meanwhile that only copies what
    /// was mounted before is no leftover, a mount that survives only in a copy is one.
    pub mounts: BTreeSet<String>,
    /// For each mount a process that has it; for messages, not compared.
    #[serde(skip)]
    seen_by: Seen,
    /// Descriptors of the File Daemon as a multiset. Sockets are left out: console, Director and Storage connections
    /// come and go outside of the plugin's control, and the plugin has no business with sockets.
    pub fds: BTreeMap<String, usize>,
    /// Threads of the daemon that carry the plugin's name.
    pub plugin_threads: Vec<String>,
    /// Number of all threads of the daemon.
    pub threads: usize,
    /// Direct children of the daemon, zombies too.
    pub children: BTreeSet<String>,
    /// Files in the plugin's journal folder.
    pub journal: BTreeSet<String>,
    /// `/dev/disk/by-*` links and their targets, and the nodes below `/dev/mapper`.
    pub links: BTreeSet<String>,
}

/// Example processes, equal to every other value.
#[derive(Clone, Debug, Default)]
struct Seen(BTreeMap<String, String>);
impl PartialEq for Seen {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
impl Eq for Seen {}

impl HostState {
    /// Takes a picture. With a File Daemon its process is part of it.
    pub fn capture(fd_pid: Option<i32>) -> Result<Self> {
        Self::capture_scope(&Scope {
            fd_pid,
            working_dir: None,
        })
    }

    /// The state as it is now, within the scope.
    pub fn capture_scope(scope: &Scope) -> Result<Self> {
        if Path::new("/run/udev/control").exists() && cmd::have("udevadm") {
            cmd::run("udevadm", ["settle", "--timeout=30"])?;
        }
        let ours = Ours::now()?;
        let mut state = Self {
            dm: dm(&ours)?,
            loops: loops(&ours)?,
            lvs: lvs(&ours)?,
            links: links(&ours),
            ..Self::default()
        };
        state.read_mounts(&ours);
        if let Some(pid) = scope.fd_pid {
            state.read_process(pid)?;
        }
        if let Some(dir) = &scope.working_dir {
            for entry in std::fs::read_dir(dir.join("guestsnap"))
                .into_iter()
                .flatten()
                .flatten()
            {
                state.journal.insert(entry.path().display().to_string());
            }
        }
        Ok(state)
    }

    /// Differences from an earlier picture, one line each: `+` is new, `-` is gone.
    pub fn diff(&self, before: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        for (what, old, new) in [
            ("dm", &before.dm, &self.dm),
            ("loop", &before.loops, &self.loops),
            ("lv", &before.lvs, &self.lvs),
            ("mount", &before.mounts, &self.mounts),
            ("child", &before.children, &self.children),
            ("journal", &before.journal, &self.journal),
            ("link", &before.links, &self.links),
        ] {
            for gone in old.difference(new) {
                lines.push(format!("- {what}: {gone}"));
            }
            for added in new.difference(old) {
                let who = match (what, self.seen_by.0.get(added)) {
                    ("mount", Some(process)) => format!(" (seen by {process})"),
                    _ => String::new(),
                };
                lines.push(format!("+ {what}: {added}{who}"));
            }
        }
        let names: BTreeSet<_> = before.fds.keys().chain(self.fds.keys()).collect();
        for name in names {
            let (old, new) = (
                before.fds.get(name).unwrap_or(&0),
                self.fds.get(name).unwrap_or(&0),
            );
            if old != new {
                let sign = if new > old { '+' } else { '-' };
                lines.push(format!("{sign} fd: {name} ({old} before, {new} now)"));
            }
        }
        if before.plugin_threads != self.plugin_threads {
            lines.push(format!(
                "+ plugin threads: {:?}, were {:?}",
                self.plugin_threads, before.plugin_threads
            ));
        }
        // Fewer threads than before are idle pool threads that ended.
        if self.threads > before.threads {
            lines.push(format!(
                "+ threads: {} in the daemon, were {}",
                self.threads, before.threads
            ));
        }
        lines
    }

    /// The differences without the daemon's own descriptors and threads, which come and go with its connections.
    pub fn diff_of_ours(&self, before: &Self) -> Vec<String> {
        let mut lines = self.diff(before);
        let daemons =
            |line: &String| line[1..].starts_with(" fd: ") || line.starts_with("+ threads: ");
        lines.retain(|line| !daemons(line));
        lines
    }

    /// Takes pictures until there is no difference or [`SETTLE`] has passed; the last differences.
    pub fn settled_diff(before: &Self, scope: &Scope) -> Result<Vec<String>> {
        scope.rests(before.threads)?;
        let end = Instant::now() + SETTLE;
        loop {
            let lines = Self::capture_scope(scope)?.diff(before);
            if lines.is_empty() || Instant::now() > end {
                return Ok(lines);
            }
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    fn read_mounts(&mut self, ours: &Ours) {
        let mut outer = ours.outer_mounts();
        let mut namespaces = BTreeSet::new();
        let mut private = BTreeSet::new();
        let mut tests = Vec::new();
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.bytes().all(|b| b.is_ascii_digit()) {
                continue;
            }
            // Processes end while we look at them, kernel threads share the first namespace.
            let Ok(ns) = std::fs::read_link(entry.path().join("ns/mnt")) else {
                continue;
            };
            if !namespaces.insert(ns) {
                continue;
            }
            let comm = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            let whole = ours.has_process(&entry.path());
            for mount in Mount::all(&entry.path()) {
                let key = mount.key();
                if super::ours::is_inherited(&key) {
                    // Its loop device may be ours by now.
                    continue;
                }
                if ours.has_mount(&mount) {
                    self.mounts.insert(key.clone());
                } else if whole {
                    private.insert(key.clone());
                }
                let seen = self.seen_by.0.entry(key);
                seen.or_insert_with(|| format!("{name} {}", comm.trim_end()));
            }
            if whole {
                tests.push(entry.path());
            }
        }
        // A mount of other software reaches our namespaces through the outer one, and goes with it there. It may come or go
        // while we look: one that is in ours before and after a look at the outer one is there in between.
        outer.extend(ours.outer_mounts());
        let again = tests.iter().flat_map(|process| Mount::all(process));
        let still: BTreeSet<_> = again.map(|mount| mount.key()).collect();
        private.retain(|key| !outer.contains(key) && still.contains(key));
        self.mounts.extend(private);
    }

    fn read_process(&mut self, pid: i32) -> Result {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        for entry in std::fs::read_dir(dir.join("fd"))
            .map_err(|e| format!("process {pid}: {e}"))?
            .flatten()
        {
            let Ok(target) = std::fs::read_link(entry.path()) else {
                continue;
            };
            let mut target = target.to_string_lossy().into_owned();
            if target.starts_with("socket:") {
                continue;
            }
            if target.starts_with("pipe:") {
                target = "pipe".into();
            }
            *self.fds.entry(target).or_default() += 1;
        }
        for entry in std::fs::read_dir(dir.join("task"))?.flatten() {
            self.threads += 1;
            let comm = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            if comm.starts_with("guestsnap") {
                self.plugin_threads.push(comm.trim_end().to_string());
            }
            let children =
                std::fs::read_to_string(entry.path().join("children")).unwrap_or_default();
            for child in children.split_whitespace() {
                let comm =
                    std::fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
                self.children.insert(format!("{child} {}", comm.trim_end()));
            }
        }
        self.plugin_threads.sort();
        Ok(())
    }
}

/// Whether the kernel has device-mapper with the given target.
pub fn have_dm(target: &str) -> bool {
    cmd::have("dmsetup")
        && cmd::run("dmsetup", ["targets"])
            .is_ok_and(|t| t.lines().any(|l| l.split(' ').next() == Some(target)))
}

fn dm(ours: &Ours) -> Result<BTreeSet<String>> {
    if !std::fs::read_to_string("/proc/misc").is_ok_and(|t| t.contains("device-mapper"))
        || !cmd::have("dmsetup")
    {
        return Ok(BTreeSet::new());
    }
    let table = cmd::run("dmsetup", ["table"])?;
    Ok(table
        .lines()
        .filter(|l| *l != "No devices found" && ours.has_dm(l))
        .map(str::to_string)
        .collect())
}

fn loops(ours: &Ours) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for (device, backing) in super::workdir::loops()? {
        if !ours.has_device(&device) {
            continue;
        }
        let dir = PathBuf::from("/sys/block")
            .join(device.trim_start_matches("/dev/"))
            .join("loop");
        let read = |name: &str| {
            std::fs::read_to_string(dir.join(name))
                .unwrap_or_default()
                .trim()
                .to_string()
        };
        found.insert(format!(
            "{device} {} offset {} limit {}",
            backing.display(),
            read("offset"),
            read("sizelimit")
        ));
    }
    Ok(found)
}

/// One line of mountinfo.
#[derive(Debug)]
pub struct Mount {
    /// Mounted device or name of the filesystem.
    pub source: String,
    point: String,
    fs: String,
    /// Major and minor number.
    pub device: String,
    root: String,
}

impl Mount {
    /// Those of a process (`/proc/N`); none if it has ended.
    pub fn all(process: &Path) -> Vec<Self> {
        let text = std::fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
        text.lines().filter_map(Self::parse).collect()
    }

    /// None if the line is cut off.
    pub fn parse(line: &str) -> Option<Self> {
        let fields: Vec<_> = line.split(' ').collect();
        let dash = fields.iter().position(|f| *f == "-")?;
        let field = |i: usize| fields.get(i).map(|f| (*f).to_owned());
        Some(Self {
            source: field(dash + 2)?,
            point: unescape(&field(4)?),
            fs: field(dash + 1)?,
            device: field(2)?,
            root: field(3)?,
        })
    }

    /// Text without the numbers that differ between namespaces.
    pub fn key(&self) -> String {
        format!(
            "{} on {} type {} ({} {})",
            self.source, self.point, self.fs, self.device, self.root
        )
    }
}

fn lvs(ours: &Ours) -> Result<BTreeSet<String>> {
    if !cmd::have("lvs")
        || !std::fs::read_to_string("/proc/misc").is_ok_and(|t| t.contains("device-mapper"))
    {
        return Ok(BTreeSet::new());
    }
    let config = "global/notify_dbus=0 devices/hints=\"none\"";
    let columns = "vg_name,lv_name,lv_size,origin,pool_lv,lv_tags";
    let text = cmd::run(
        "lvs",
        [
            "-a",
            "--config",
            config,
            "--noheadings",
            "--units",
            "b",
            "--separator",
            "|",
            "-o",
            columns,
        ],
    )?;
    let lines = text.lines().map(|l| l.trim().to_string());
    Ok(lines.filter(|l| ours.has_name(l)).collect())
}

fn links(ours: &Ours) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let maps = std::fs::read_dir("/dev/mapper").into_iter().flatten();
    let maps = maps.flatten().map(|entry| entry.path());
    for link in disk_links().into_iter().chain(maps) {
        let target = std::fs::read_link(&link).unwrap_or_default();
        // The kernel module's own node appears with the first use of device-mapper.
        if !link.ends_with("control") && ours.has_link(&link, &target) {
            let to = match &claimants(&link)[..] {
                [_, _, ..] => claimants(&link).join(" or "),
                _ => target.display().to_string(),
            };
            found.insert(format!("{} -> {to}", link.display()));
        }
    }
    found
}

/// udev's links to disks. Those of by-diskseq, which count every change of a medium, stay behind on loop devices that are
/// empty again: they are left out.
fn disk_links() -> Vec<PathBuf> {
    let entries = |dir: &Path| {
        let all = std::fs::read_dir(dir).into_iter().flatten().flatten();
        all.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let mut kinds = entries(Path::new("/dev/disk"));
    kinds.retain(|kind| !kind.ends_with("by-diskseq"));
    let mut links: Vec<_> = kinds.iter().flat_map(|kind| entries(kind)).collect();
    links.sort();
    links
}

/// The devices that a link of udev could be for, by their numbers (`b254:1`): of several with the same contents, each event
/// of one makes it the link's.
fn claimants(link: &Path) -> Vec<String> {
    let name = link.strip_prefix("/dev").unwrap_or(link);
    let name = name.to_string_lossy().replace('\\', "\\x5c");
    let folder = Path::new("/run/udev/links").join(name.replace('/', "\\x2f"));
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut devices: Vec<_> = names.filter(|name| name.starts_with('b')).collect();
    devices.sort();
    devices
}

/// Whether a device (`b254:1`) is a volume or map of the plugin.
fn is_plugins(device: &str) -> bool {
    let number = device.trim_start_matches('b');
    let name = std::fs::read_to_string(format!("/sys/dev/block/{number}/dm/name"));
    name.is_ok_and(|name| name.contains("guestsnap"))
}

/// Undoes the octal escapes of mountinfo.
pub fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let bytes = text.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        if bytes[i] == b'\\' && i + 3 < bytes.len() {
            if let Ok(value) = u8::from_str_radix(&text[i + 1..i + 4], 8) {
                out.push(value);
                i += 4;
                continue;
            }
        }
        out.push(bytes[i]);
        i += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Output of the host's tools on its disks. Snapshots of ours are left out: they are the host's to see.
pub fn host_view() -> Result<String> {
    // Events of a loop device that a job holds locked stay in udev's queue until it is given back (seen with udev 252).
    cmd::sh("udevadm settle --timeout=15 || true")?;
    let mut seen = cmd::sh(
        "exec 2>&1; pvs --noheadings -o pv_name,pv_uuid,vg_name; vgs --noheadings -o vg_name,vg_uuid,pv_count; \
         lvs --noheadings -o vg_name,lv_name,lv_uuid,lv_active -S 'tags!=guestsnap'; \
         blkid -c /dev/null | grep -v guestsnap | sort",
    )?;
    for link in disk_links() {
        let mut devices = claimants(&link);
        devices.retain(|device| !is_plugins(device));
        if !devices.is_empty() {
            seen += &format!("{} {}\n", link.display(), devices.join(" or "));
        }
    }
    Ok(seen)
}
