//! What a job may leave behind on a host, as a value that can be compared.

use super::{Result, cmd};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long [`HostState::settled_diff`] waits for the daemon to come to rest. Bacula's pool threads leave after two
/// idle seconds (30 in some versions for the connection threads), udev removes links a moment after the device.
pub const SETTLE: Duration = Duration::from_secs(40);

/// What to look at beside the things every process shares.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    /// The File Daemon: its descriptors, threads and children are part of the state.
    pub fd_pid: Option<i32>,
    /// The File Daemon's working directory: the files in its `guestsnap` folder are part of the state.
    pub working_dir: Option<PathBuf>,
}

/// One picture of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HostState {
    /// Device-mapper devices and their tables.
    pub dm: BTreeSet<String>,
    /// Loop devices with backing file, offset and size limit.
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

    pub fn capture_scope(scope: &Scope) -> Result<Self> {
        if Path::new("/run/udev/control").exists() && cmd::have("udevadm") {
            cmd::run("udevadm", ["settle", "--timeout=30"])?;
        }
        let mut state = Self {
            dm: dm()?,
            loops: loops()?,
            lvs: lvs()?,
            links: links(),
            ..Self::default()
        };
        state.read_mounts();
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

    /// What differs from an earlier picture, one line each: `+` is new, `-` is gone.
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

    /// The same without the daemon's own descriptors and threads, which come and go with its connections.
    pub fn diff_of_ours(&self, before: &Self) -> Vec<String> {
        let mut lines = self.diff(before);
        let daemons =
            |line: &String| line[1..].starts_with(" fd: ") || line.starts_with("+ threads: ");
        lines.retain(|line| !daemons(line));
        lines
    }

    /// Takes pictures until there is no difference or [`SETTLE`] has passed; the last differences.
    pub fn settled_diff(before: &Self, scope: &Scope) -> Result<Vec<String>> {
        let end = Instant::now() + SETTLE;
        loop {
            let lines = Self::capture_scope(scope)?.diff(before);
            if lines.is_empty() || Instant::now() > end {
                return Ok(lines);
            }
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    fn read_mounts(&mut self) {
        let mut namespaces = BTreeSet::new();
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let proc_dir = entry.path();
            if !entry
                .file_name()
                .to_string_lossy()
                .bytes()
                .all(|b| b.is_ascii_digit())
            {
                continue;
            }
            // Processes end while we look at them, kernel threads share the first namespace.
            let Ok(ns) = std::fs::read_link(proc_dir.join("ns/mnt")) else {
                continue;
            };
            if !namespaces.insert(ns) {
                continue;
            }
            let Ok(text) = std::fs::read_to_string(proc_dir.join("mountinfo")) else {
                continue;
            };
            let comm = std::fs::read_to_string(proc_dir.join("comm")).unwrap_or_default();
            for line in text.lines() {
                let fields: Vec<_> = line.split(' ').collect();
                let Some(dash) = fields.iter().position(|f| *f == "-") else {
                    continue;
                };
                if fields.len() < dash + 3 || fields.len() < 5 {
                    continue;
                }
                let key = format!(
                    "{} on {} type {} ({} {})",
                    fields[dash + 2],
                    unescape(fields[4]),
                    fields[dash + 1],
                    fields[2],
                    fields[3]
                );
                if of_another_run(&key) {
                    continue;
                }
                self.seen_by.0.entry(key.clone()).or_insert_with(|| {
                    format!(
                        "{} {}",
                        entry.file_name().to_string_lossy(),
                        comm.trim_end()
                    )
                });
                self.mounts.insert(key);
            }
        }
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

fn dm() -> Result<BTreeSet<String>> {
    if !std::fs::read_to_string("/proc/misc").is_ok_and(|t| t.contains("device-mapper"))
        || !cmd::have("dmsetup")
    {
        return Ok(BTreeSet::new());
    }
    let table = cmd::run("dmsetup", ["table"])?;
    Ok(table
        .lines()
        .filter(|l| *l != "No devices found")
        .map(str::to_string)
        .collect())
}

fn loops() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for (device, backing) in super::workdir::loops()? {
        let dir = PathBuf::from("/sys/block")
            .join(device.trim_start_matches("/dev/"))
            .join("loop");
        let read = |name: &str| {
            std::fs::read_to_string(dir.join(name))
                .unwrap_or_default()
                .trim()
                .to_string()
        };
        let shown = format!(
            "{device} {} offset {} limit {}",
            backing.display(),
            read("offset"),
            read("sizelimit")
        );
        if !of_another_run(&shown) {
            found.insert(shown);
        }
    }
    Ok(found)
}

/// Whether a mount or loop device belongs to a test run that goes on beside this one: it lies in the work folder of
/// another living process, or in the bed's folder where root filesystems are built, or is the root that `scripts/tsan`
/// runs in.
fn of_another_run(text: &str) -> bool {
    if text.contains("/target/bed/") && (text.contains(".building/") || text.contains("/tsan-")) {
        return true;
    }
    let Some(rest) = text.split("guestsnap-bed.").nth(1) else {
        return false;
    };
    let mut parts = rest.split('.');
    let (Some(Ok(pid)), Some(Ok(start))) = (
        parts.next().map(str::parse),
        parts.next().map(str::parse::<u64>),
    ) else {
        return false;
    };
    pid != std::process::id() && super::workdir::start_time(pid) == Some(start)
}

fn lvs() -> Result<BTreeSet<String>> {
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
    Ok(text.lines().map(|l| l.trim().to_string()).collect())
}

fn links() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut dirs = vec![PathBuf::from("/dev/mapper")];
    // by-diskseq counts every change of a medium: its links stay behind on loop devices that are empty again.
    let by = std::fs::read_dir("/dev/disk")
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path());
    dirs.extend(by.filter(|p| !p.ends_with("by-diskseq")));
    for dir in dirs {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let target = std::fs::read_link(entry.path()).unwrap_or_default();
            // The kernel module's own node appears with the first use of device-mapper.
            if entry.file_name() != "control" {
                found.insert(format!(
                    "{} -> {}",
                    entry.path().display(),
                    target.display()
                ));
            }
        }
    }
    found
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

/// What the host's tools say of its disks. Snapshots of ours are left out: they are the host's to see.
pub fn host_view() -> Result<String> {
    cmd::run("udevadm", ["settle"])?;
    cmd::sh(
        "exec 2>&1; pvs --noheadings -o pv_name,pv_uuid,vg_name; vgs --noheadings -o vg_name,vg_uuid,pv_count; \
         lvs --noheadings -o vg_name,lv_name,lv_uuid,lv_active -S 'tags!=guestsnap'; blkid -c /dev/null | grep -v guestsnap | sort; \
         find /dev/disk -type l -printf '%p %l\\n' | sort | while read -r link to; do \
           name=$(cat /sys/block/${to##*/}/dm/name 2>/dev/null || true); \
           case $link:$name in */dm-name-*guestsnap*|*/dm-uuid-LVM-*guestsnap*|*/by-diskseq/*guestsnap*) ;; *) echo \"$link $to\";; esac; done",
    )
}
