//! Emulated machines: a Debian with LVM, udev and Bacula in QEMU without hardware support. The root filesystem of a
//! suite is built once (`target/bed`), each run starts from a fresh copy-on-write view of it.

use super::workdir::{self, WorkDir};
use super::{Result, cmd, emulator};
use crate::{check, fail};
use rustix::fs::FlockOperation;
use std::fmt::Write as _;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The suites: Bacula 9.6.7 with kernel 6.1, Bacula 15.0.3 with kernel 6.12.
pub const SUITES: [&str; 2] = ["bookworm", "trixie"];

const PACKAGES: &str = "bacula-common,bacula-common-sqlite3,bacula-director,bacula-director-sqlite3,bacula-sd,bacula-fd,\
    bacula-console,sqlite3,lvm2,lvm2-lockd,drbd-utils,thin-provisioning-tools,dmsetup,udev,kmod,e2fsprogs,xfsprogs,\
    btrfs-progs,dosfstools,ntfs-3g,fdisk,acl,attr,jq,libcap2-bin,libblkid1,libdevmapper1.02.1,iproute2,procps,kpartx,\
    mount,util-linux,systemd,openssl";
/// Inserted by the initrd before the root disk is mounted; what is built into the kernel is left out by itself.
const BOOT_MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "ext4", "crc32c_generic"];
/// The kernel without its packaging: the image package would pull in a whole initramfs toolchain.
const KERNEL_HOOK: &str = r#"chroot "$1" sh -euc '
    cd /tmp
    package=$(apt-cache depends linux-image-cloud-amd64 | sed -n "s/^ *Depends: \(linux-image-.*\)/\1/p" | head -n1)
    apt-get -q download "$package"
    dpkg-deb -x linux-image-*.deb unpacked
    for dir in unpacked/lib/modules unpacked/usr/lib/modules; do
        [ ! -d $dir ] || cp -a $dir /usr/lib/
    done
    cp unpacked/boot/vmlinuz-* /boot/
    rm -rf unpacked linux-image-*.deb
    for dir in /usr/lib/modules/*; do depmod "${dir##*/}"; done'"#;
const ROOT_SIZE: &str = "6G";
/// Raised when the way of building changes in a manner the constants above do not show.
const RECIPE: u32 = 2;

/// The built files of a suite.
#[derive(Clone, Debug)]
pub struct Image {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initrd, with the modules for the root disk.
    pub initrd: PathBuf,
    /// Image of the root filesystem, never changed.
    pub root: PathBuf,
}

/// The folder `name-<hash of the recipe>` below `target/bed`, made by `build` if there is none of this recipe yet.
pub fn built(
    name: &str,
    recipe: &impl Hash,
    build: impl FnOnce(&Path) -> Result,
) -> Result<PathBuf> {
    let mut hash = DefaultHasher::new();
    (RECIPE, name, recipe).hash(&mut hash);
    let dir = super::target().join("bed");
    std::fs::create_dir_all(&dir)?;
    let done = dir.join(format!("{name}-{:016x}", hash.finish()));
    // One builder of each name; the lock goes with the process.
    let lock = File::create(dir.join(format!("{name}.lock")))?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
    if !done.is_dir() {
        let building = dir.join(format!("{name}.building"));
        // We hold the lock: what lies there is of a run that was killed, or an older recipe.
        for entry in std::fs::read_dir(&dir)?.flatten() {
            let found = entry.file_name().to_string_lossy().into_owned();
            if found.starts_with(&format!("{name}-")) || entry.path() == building {
                remove_tree(&entry.path())?;
            }
        }
        std::fs::create_dir(&building)?;
        eprintln!("building {name} for the emulated machines (once, about a minute)");
        let started = Instant::now();
        build(&building)?;
        std::fs::rename(&building, &done)?;
        eprintln!("{name}: built in {:.0} s", started.elapsed().as_secs_f64());
    }
    Ok(done)
}

/// Packages of a suite in the folder `root` of `dir`, by a variant of mmdebstrap.
pub fn mmdebstrap(
    suite: &str,
    variant: &str,
    packages: &str,
    dir: &Path,
    more: &[String],
) -> Result {
    let said = dir.join("mmdebstrap.log");
    let log = File::create(&said)?;
    let mut command = cmd::command("mmdebstrap");
    command.args(["--mode=root", "--format=directory"]);
    command
        .arg(format!("--variant={variant}"))
        .arg(format!("--include={packages}"));
    for unread in ["man", "locale", "doc"] {
        command.arg(format!("--dpkgopt=path-exclude=/usr/share/{unread}/*"));
    }
    command
        .args(more)
        .arg(suite)
        .arg(dir.join("root"))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    command.env("TMPDIR", dir);
    let status = command
        .status()
        .map_err(|e| format!("mmdebstrap: {e} (scripts/install-deps installs it)"))?;
    check!(
        status.success(),
        "mmdebstrap {suite}: {status}\n{}",
        tail(&said, 40)
    );
    Ok(())
}

/// The image of a suite.
pub fn image(suite: &str) -> Result<Image> {
    let recipe = (PACKAGES, BOOT_MODULES, KERNEL_HOOK, ROOT_SIZE, INITRD_INIT);
    let done = built(suite, &recipe, |dir| build(suite, dir))?;
    Ok(Image {
        kernel: done.join("vmlinuz"),
        initrd: done.join("initrd"),
        root: done.join("root.img"),
    })
}

/// Removes a build folder; refuses when something is still mounted in it (mmdebstrap was killed half way).
fn remove_tree(dir: &Path) -> Result {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    for point in mounts.lines().rev().filter_map(|l| l.split(' ').nth(4)) {
        if Path::new(&super::hoststate::unescape(point)).starts_with(dir) {
            cmd::run("umount", [point])?;
        }
    }
    std::fs::remove_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    Ok(())
}

fn build(suite: &str, dir: &Path) -> Result {
    let root = dir.join("root");
    let hook = format!("--customize-hook={KERNEL_HOOK}");
    mmdebstrap(suite, "minbase", PACKAGES, dir, &[hook])?;
    let find = |sub: &str| -> Result<PathBuf> {
        let mut found: Vec<_> = std::fs::read_dir(root.join(sub))?
            .flatten()
            .map(|e| e.path())
            .collect();
        found.sort();
        Ok(found.pop().ok_or_else(|| format!("nothing in {sub}"))?)
    };
    let modules = find("usr/lib/modules")?;
    let version = modules
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    std::fs::copy(
        root.join(format!("boot/vmlinuz-{version}")),
        dir.join("vmlinuz"),
    )?;
    write_initrd(&root, &version, &dir.join("initrd"))?;
    std::fs::create_dir_all(root.join("bed"))?;
    let image = dir.join("root.img");
    super::guestdisk::image(&image, 0)?;
    let paths = [root.display().to_string(), image.display().to_string()];
    // Neither tables to initialise nor blocks reserved: the first boot shall not write them.
    cmd::run(
        "mkfs.ext4",
        [
            "-q",
            "-F",
            "-m",
            "0",
            "-E",
            "lazy_itable_init=0,lazy_journal_init=0",
            "-d",
            &paths[0],
            &paths[1],
            ROOT_SIZE,
        ],
    )?;
    remove_tree(&root)
}

const INITRD_INIT: &str = include_str!("../machine/initrd-init");

/// busybox, the few modules the root disk needs, and the init above, as an uncompressed cpio archive.
fn write_initrd(root: &Path, version: &str, to: &Path) -> Result {
    let mut order = String::new();
    let mut files: Vec<(String, u32, Vec<u8>)> = vec![
        ("init".into(), 0o100755, INITRD_INIT.into()),
        (
            "bin/busybox".into(),
            0o100755,
            std::fs::read("/bin/busybox").map_err(|e| format!("busybox-static: {e}"))?,
        ),
    ];
    for module in BOOT_MODULES {
        let args = [
            "-d",
            &root.display().to_string(),
            "-S",
            version,
            "--show-depends",
            module,
        ];
        for line in cmd::run("modprobe", args)?.lines() {
            let Some(path) = line.strip_prefix("insmod ") else {
                continue;
            };
            let path = path.trim();
            let file = Path::new(path)
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let name = file.trim_end_matches(".xz").to_string();
            if order.lines().any(|l| l == name) {
                continue;
            }
            let plain = if file.ends_with(".xz") {
                let out = cmd::command("xz").args(["-dc", path]).output()?;
                check!(out.status.success(), "xz -dc {path} failed");
                out.stdout
            } else {
                std::fs::read(path)?
            };
            let _ = writeln!(order, "{name}");
            files.push((format!("modules/{name}"), 0o100644, plain));
        }
    }
    files.push(("modules/order".into(), 0o100644, order.into_bytes()));
    let mut out = Vec::new();
    for dir in ["bin", "dev", "modules", "proc", "root", "sys"] {
        cpio(&mut out, dir, 0o040755, &[]);
    }
    for (name, mode, contents) in &files {
        cpio(&mut out, name, *mode, contents);
    }
    cpio(&mut out, "TRAILER!!!", 0, &[]);
    std::fs::write(to, out)?;
    Ok(())
}

fn cpio(out: &mut Vec<u8>, name: &str, mode: u32, contents: &[u8]) {
    let inode = out.len();
    let fields = [
        inode,
        mode as usize,
        0,
        0,
        1,
        0,
        contents.len(),
        0,
        0,
        0,
        0,
        name.len() + 1,
        0,
    ];
    out.extend_from_slice(b"070701");
    for field in fields {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(contents);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// How often a machine is booted that does not come up.
const BOOTS: u32 = 3;

/// Message on a machine that ended by itself.
const BY_ITSELF: &str = "the machine ended by itself";

/// One run of a machine.
#[derive(Clone, Debug)]
pub struct Run {
    /// Which of [`SUITES`].
    pub suite: String,
    /// Files for `/bed` in the machine: where they are and their names there.
    pub files: Vec<(PathBuf, String)>,
    /// Small files for `/bed`: name and contents.
    pub texts: Vec<(String, String)>,
    /// Shell script that is run in `/bed`.
    pub command: String,
    /// The machine is ended after that time.
    pub limit: Duration,
    /// The machine is ended when its port was silent for that time. `None` for a command that may be silent.
    pub silence: Option<Duration>,
    /// Memory of the machine.
    pub memory_mib: u32,
    /// Size of each of the two empty disks `/dev/vdc` and `/dev/vdd` (sparse files).
    pub scratch: u64,
    /// Boots systemd, as a host does; such a machine may boot again (`reboot`, sysrq), with its disks as they are then.
    /// The others know one process 1 of a few lines, which boots faster.
    pub systemd: bool,
}

impl Run {
    /// With the usual limits, and nothing in `/bed` but the script.
    pub fn new(suite: &str, command: &str) -> Self {
        Self {
            suite: suite.into(),
            files: Vec::new(),
            texts: Vec::new(),
            command: command.into(),
            limit: Duration::from_secs(4500),
            silence: None,
            memory_mib: 2048,
            scratch: 8 << 30,
            systemd: false,
        }
    }

    /// Boots the machine, gives each line of its port to `on_line`, and waits for its end. An error holds the
    /// end of the machine's console.
    pub fn run(&self, mut on_line: impl FnMut(&str)) -> Result {
        self.converse(|line, _| {
            on_line(line);
            None
        })
    }

    /// Boots the machine like [`Self::run`], with answers, each a line that the machine reads. With each line comes the time of a processor that the
    /// machine has taken so far.
    ///
    /// An emulated kernel may fall over its own code patching (`Oops: int3`) while it boots: a machine that ended before
    /// it said a word is booted again, and that is shown.
    pub fn converse(&self, mut on_line: impl FnMut(&str, Duration) -> Option<String>) -> Result {
        for boot in 1.. {
            let mut spoke = false;
            let result = self.once(&mut |line, taken| {
                spoke = true;
                on_line(line, taken)
            });
            match result {
                Err(e) if !spoke && boot < BOOTS && super::message(&e).contains(BY_ITSELF) => {
                    println!("boot {boot} failed, once more: {}", super::message(&e));
                }
                result => return result,
            }
        }
        Ok(())
    }

    fn once(&self, on_line: &mut dyn FnMut(&str, Duration) -> Option<String>) -> Result {
        let image = image(&self.suite)?;
        let dir = WorkDir::new()?;
        let payload = self.payload(&dir)?;
        let mut command = self.command(&image, &dir, &payload)?;
        let mut child = Qemu(
            command
                .spawn()
                .map_err(|e| format!("qemu-system-x86_64: {e}"))?,
        );
        let started = Instant::now();
        let mut talk = cmd::wait_for("the machine's port", Duration::from_secs(60), || {
            let ended = child.0.try_wait()?;
            check!(ended.is_none(), "{}", tail(&dir.join("qemu"), 20));
            Ok(UnixStream::connect(dir.join("port")).ok())
        })?;
        talk.set_read_timeout(Some(Duration::from_millis(100)))?;
        let mut pending: Vec<u8> = Vec::new();
        let mut status = None;
        let mut heard = Instant::now();
        loop {
            let ended = child.0.try_wait()?;
            if receive(&mut talk, &mut pending)? {
                heard = Instant::now();
            }
            while let Some(end) = pending.iter().position(|b| *b == b'\n') {
                let line = String::from_utf8_lossy(&pending[..end]).into_owned();
                pending.drain(..=end);
                if let Some(code) = line.strip_prefix("bed-end ") {
                    status = Some(code.trim().to_string());
                } else if let Some(answer) = on_line(&line, child.processor_time()?) {
                    talk.write_all(format!("{answer}\n").as_bytes())?;
                }
            }
            if status.as_deref() == Some("0") {
                return Ok(());
            }
            let trouble = match (&status, ended) {
                (Some(code), _) => Some(format!("the payload ended with status {code}")),
                (None, Some(qemu)) => Some(format!("{BY_ITSELF} ({qemu})")),
                (None, None) => self.late(started, heard),
            };
            if let Some(trouble) = trouble {
                return self.failed(&trouble, &dir, ended.is_some(), &mut child);
            }
        }
    }

    /// The emulator with all that the machine is made of; files of it lie in `dir`.
    fn command(&self, image: &Image, dir: &WorkDir, payload: &Path) -> Result<Command> {
        let mut command = emulator::command()?;
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        command.arg("-monitor");
        command.arg(format!(
            "unix:{},server=on,wait=off",
            dir.join("monitor").display()
        ));
        if !self.systemd {
            command.arg("-no-reboot");
        }
        command.args([
            "-machine",
            "q35",
            "-accel",
            "tcg",
            // Each further one is one more thread that waits, spinning, for those that have no processor now.
            "-smp",
            "1",
            // Without the later vector instructions and page tables, which cost a fifth more to emulate; with a source of
            // random numbers, which the kernel else takes a second to gather.
            "-cpu",
            "qemu64,+rdrand",
        ]);
        command.args(["-m", &self.memory_mib.to_string()]);
        command
            .arg("-kernel")
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(&image.initrd);
        // On a busy machine the kernel's boot-time check of the timer fails and panics. The last two are for `why_stuck`.
        command.args([
            "-append",
            "console=ttyS0 panic=-1 mitigations=off init_on_alloc=0 random.trust_cpu=on net.ifnames=0 no_timer_check \
             unknown_nmi_panic panic_print=1",
        ]);
        command
            .arg("-serial")
            .arg(format!("file:{}", dir.join("console").display()));
        let mut disk = |file: &Path, more: &str| {
            command.arg("-drive").arg(format!(
                "file={},if=virtio,format=raw,cache=unsafe{more}",
                file.display()
            ));
        };
        disk(&image.root, ",snapshot=on");
        disk(payload, ",readonly=on");
        for n in 0..2 {
            let file = dir.join(format!("scratch{n}"));
            super::guestdisk::image(&file, self.scratch)?;
            disk(&file, ",discard=unmap");
        }
        command.args(["-device", "virtio-serial-pci", "-chardev"]);
        command.arg(format!(
            "socket,id=results,path={},server=on,wait=off",
            dir.join("port").display()
        ));
        command.args(["-device", "virtserialport,chardev=results,name=bed.results"]);
        let said = File::create(dir.join("qemu"))?;
        command
            .stdin(Stdio::null())
            .stdout(said.try_clone()?)
            .stderr(said)
            .env("TMPDIR", dir.path());
        Ok(command)
    }

    /// Checks the time since the start and since the last sign of life. Returns the complaint, if any.
    fn late(&self, started: Instant, heard: Instant) -> Option<String> {
        if started.elapsed() > self.limit {
            let limit = self.limit.as_secs();
            return Some(format!("the machine ran longer than {limit} s"));
        }
        let silent = heard.elapsed();
        let too_long = self.silence.is_some_and(|limit| silent > limit);
        too_long.then(|| format!("the machine said nothing for {} s", silent.as_secs()))
    }

    /// The failure with what the emulator and the console said, and what a machine that still runs waits for.
    fn failed(&self, trouble: &str, dir: &WorkDir, ended: bool, child: &mut Qemu) -> Result {
        let console = dir.join("console");
        let (said, console_end) = (tail(&dir.join("qemu"), 20), tail(&console, 60));
        let stuck = match ended {
            false => why_stuck(&dir.join("monitor"), &console, child)?,
            true => String::new(),
        };
        fail!(
            "{}: {trouble}\n{said}--- console\n{console_end}{stuck}",
            self.suite
        );
    }

    /// A tar archive of all files, padded to whole sectors.
    fn payload(&self, dir: &WorkDir) -> Result<PathBuf> {
        let stage = dir.join("payload");
        std::fs::create_dir(&stage)?;
        for (from, name) in &self.files {
            copy_lean(from, &stage.join(name))?;
        }
        for (name, text) in &self.texts {
            std::fs::write(stage.join(name), text)?;
        }
        std::fs::write(stage.join("command"), &self.command)?;
        std::fs::write(stage.join("init"), include_str!("../machine/init"))?;
        std::fs::write(stage.join("payload"), include_str!("../machine/payload"))?;
        if self.systemd {
            let unit = include_str!("../machine/bed.service");
            std::fs::write(stage.join("bed.service"), unit)?;
        }
        cmd::run("chmod", ["755", &stage.join("init").display().to_string()])?;
        let tar = dir.join("payload.tar");
        cmd::run(
            "tar",
            [
                "-C",
                &stage.display().to_string(),
                "-cf",
                &tar.display().to_string(),
                ".",
            ],
        )?;
        std::fs::remove_dir_all(stage)?;
        let mut file = File::options().write(true).open(&tar)?;
        let end = file.seek(SeekFrom::End(0))?;
        file.write_all(&vec![0; (end.next_multiple_of(4096) - end) as usize])?;
        Ok(tar)
    }
}

/// A machine that runs too long gets an interrupt on which its kernel panics and prints the stacks of all tasks: those
/// that wait in the kernel, and the one that ran.
fn why_stuck(monitor: &Path, console: &Path, machine: &mut Qemu) -> Result<String> {
    let before = std::fs::metadata(console)?.len() as usize;
    UnixStream::connect(monitor)?.write_all(b"nmi\n")?;
    for _ in 0..300 {
        if machine.0.try_wait()?.is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let text = String::from_utf8_lossy(&std::fs::read(console)?[before..]).into_owned();
    Ok(format!("--- after an interrupt\n{}", waiting_tasks(&text)))
}

/// A panic's text without the stacks of tasks that sleep as tasks do.
fn waiting_tasks(panic: &str) -> String {
    let mut shown = String::new();
    let mut keep = true;
    for line in panic.lines() {
        if line.contains("task:") && line.contains("state:") {
            keep = !["state:S", "state:I"]
                .iter()
                .any(|state| line.contains(state));
        }
        if keep {
            shown += line;
            shown.push('\n');
        }
    }
    shown
}

/// Waits a moment for more of what the machine says; whether there was more.
fn receive(talk: &mut UnixStream, pending: &mut Vec<u8>) -> Result<bool> {
    let mut buffer = [0; 65536];
    match talk.read(&mut buffer) {
        // It is gone: how it ended is seen next.
        Ok(0) => std::thread::sleep(Duration::from_millis(50)),
        Ok(count) => {
            pending.extend(&buffer[..count]);
            return Ok(true);
        }
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
        // QEMU has ended.
        Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
        Err(e) => fail!("the machine's port: {e}"),
    }
    Ok(false)
}

/// Killed when dropped.
struct Qemu(std::process::Child);

impl Qemu {
    /// Time of a processor that it has taken.
    fn processor_time(&self) -> Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        // Fields 14 and 15 of proc(5), after the name in parentheses.
        let after = stat.rsplit(") ").next().unwrap_or_default();
        let mut fields = after.split(' ').skip(11).map(str::parse::<u64>);
        let ticks = fields.next().ok_or("no utime")?? + fields.next().ok_or("no stime")??;
        Ok(Duration::from_millis(
            ticks * 1000 / rustix::param::clock_ticks_per_second(),
        ))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Give the machine a moment to switch itself off, then take the plug.
        for _ in 0..20 {
            if !matches!(self.0.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

/// Copies a program, a library or another file, programs without the sections for debuggers: these are five times as large
/// as what runs, and an emulated machine would unpack them at each boot. The names of functions stay.
pub fn copy_lean(from: &Path, to: &Path) -> Result {
    let mut magic = [0; 4];
    let is_elf = File::open(from).and_then(|mut file| file.read_exact(&mut magic));
    let shown = |e| format!("{}: {e}", from.display());
    if is_elf.is_ok() && magic == *b"\x7fELF" {
        let paths = [from, to].map(|path| path.display().to_string());
        cmd::run("strip", ["--strip-debug", "-o", &paths[1], &paths[0]])?;
        return Ok(());
    }
    std::fs::copy(from, to).map(drop).map_err(shown)?;
    Ok(())
}

/// The last lines of a file.
fn tail(path: &Path, count: usize) -> String {
    let text = String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..]
        .iter()
        .map(|l| format!("{l}\n"))
        .collect()
}

/// Removes the leftovers of killed runs.
pub fn sweep() -> Result {
    workdir::sweep()
}
