//! Emulated machines: a Debian with LVM, udev and Bacula in QEMU without hardware support. The root filesystem of a
//! suite is built once (`target/bed`), each run starts from a fresh copy-on-write view of it.

use super::workdir::{self, WorkDir};
use super::{Result, cmd};
use crate::{check, fail};
use rustix::fs::FlockOperation;
use std::fmt::Write as _;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// The suites: Bacula 9.6.7 with kernel 6.1, Bacula 15.0.3 with kernel 6.12.
pub const SUITES: [&str; 2] = ["bookworm", "trixie"];

const PACKAGES: &str = "bacula-common,bacula-common-sqlite3,bacula-director,bacula-director-sqlite3,bacula-sd,bacula-fd,\
    bacula-console,sqlite3,lvm2,thin-provisioning-tools,dmsetup,udev,kmod,e2fsprogs,xfsprogs,btrfs-progs,dosfstools,\
    fdisk,acl,attr,libcap2-bin,libblkid1,libdevmapper1.02.1,iproute2,procps,kpartx,mount,util-linux,systemd,openssl";
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
const RECIPE: u32 = 1;

/// The built files of a suite.
#[derive(Clone, Debug)]
pub struct Image {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub root: PathBuf,
}

fn bed_dir() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target"))
        .join("bed")
}

/// The image of a suite, built if there is none of this recipe yet.
pub fn image(suite: &str) -> Result<Image> {
    let mut hash = DefaultHasher::new();
    (
        RECIPE,
        suite,
        PACKAGES,
        BOOT_MODULES,
        KERNEL_HOOK,
        ROOT_SIZE,
        INITRD_INIT,
    )
        .hash(&mut hash);
    let dir = bed_dir();
    std::fs::create_dir_all(&dir)?;
    let done = dir.join(format!("{suite}-{:016x}", hash.finish()));
    // One builder per suite; the lock goes with the process.
    let lock = File::create(dir.join(format!("{suite}.lock")))?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
    if !done.is_dir() {
        let building = dir.join(format!("{suite}.building"));
        // We hold the lock: what lies there is of a run that was killed, or an older recipe.
        for entry in std::fs::read_dir(&dir)?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(&format!("{suite}-")) || entry.path() == building {
                remove_tree(&entry.path())?;
            }
        }
        std::fs::create_dir(&building)?;
        eprintln!("building the root filesystem of {suite} (once, about a minute)");
        let started = Instant::now();
        build(suite, &building)?;
        std::fs::rename(&building, &done)?;
        eprintln!("{suite}: built in {:.0} s", started.elapsed().as_secs_f64());
    }
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
    let log = File::create(dir.join("mmdebstrap.log"))?;
    let mut command = cmd::command("mmdebstrap");
    command.args([
        "--mode=root",
        "--variant=minbase",
        "--format=directory",
        &format!("--include={PACKAGES}"),
    ]);
    command.args([
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
    ]);
    command
        .arg("--dpkgopt=path-exclude=/usr/share/doc/*")
        .arg(format!("--customize-hook={KERNEL_HOOK}"));
    command
        .arg(suite)
        .arg(&root)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    command.env("TMPDIR", dir);
    let status = command
        .status()
        .map_err(|e| format!("mmdebstrap: {e} (scripts/install-deps installs it)"))?;
    if !status.success() {
        fail!(
            "mmdebstrap {suite}: {status}\n{}",
            tail(&dir.join("mmdebstrap.log"), 40)
        );
    }
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

const INITRD_INIT: &str = include_str!("../bed/initrd-init");

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

/// What is said of a machine that nobody ended.
const BY_ITSELF: &str = "the machine ended by itself";

/// One run of a machine.
#[derive(Clone, Debug)]
pub struct Run {
    pub suite: String,
    /// Files for `/bed` in the machine: where they are and their names there.
    pub files: Vec<(PathBuf, String)>,
    /// Small files for `/bed`: name and contents.
    pub texts: Vec<(String, String)>,
    /// Shell script that is run in `/bed`.
    pub command: String,
    /// The machine is ended after that time.
    pub limit: Duration,
    pub memory_mib: u32,
    /// Size of each of the two empty disks `/dev/vdc` and `/dev/vdd` (sparse files).
    pub scratch: u64,
    /// Boots systemd, as a host does; such a machine may boot again (`reboot`, sysrq), with its disks as they are then.
    /// The others know one process 1 of a few lines, which boots faster.
    pub systemd: bool,
}

impl Run {
    pub fn new(suite: &str, command: &str) -> Self {
        Self {
            suite: suite.into(),
            files: Vec::new(),
            texts: Vec::new(),
            command: command.into(),
            limit: Duration::from_secs(4500),
            memory_mib: 2048,
            scratch: 8 << 30,
            systemd: false,
        }
    }

    /// Boots the machine, gives each line of its result port to `on_line`, and waits for its end. An error holds the
    /// end of the machine's console.
    ///
    /// An emulated kernel may fall over its own code patching (`Oops: int3`) while it boots: a machine that ended before
    /// it said a word is booted again, and that is shown.
    pub fn run(&self, mut on_line: impl FnMut(&str)) -> Result {
        for boot in 1.. {
            let mut spoke = false;
            let result = self.once(|line| {
                spoke = true;
                on_line(line);
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

    fn once(&self, mut on_line: impl FnMut(&str)) -> Result {
        let image = image(&self.suite)?;
        let dir = WorkDir::new()?;
        let payload = self.payload(&dir)?;
        let (console, results) = (dir.join("console"), dir.join("results"));
        File::create(&results)?;
        let mut command = cmd::command("qemu-system-x86_64");
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-monitor",
            "none",
        ]);
        if !self.systemd {
            command.arg("-no-reboot");
        }
        command.args([
            "-machine",
            "q35",
            "-accel",
            "tcg,thread=multi",
            "-smp",
            "2",
            // Without the later vector instructions and page tables, which cost a fifth more to emulate.
            "-cpu",
            "qemu64",
        ]);
        command.args(["-m", &self.memory_mib.to_string()]);
        command
            .arg("-kernel")
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(&image.initrd);
        // On a busy machine the kernel's boot-time check of the timer fails and panics.
        command.args([
            "-append",
            "console=ttyS0 panic=-1 mitigations=off random.trust_cpu=on net.ifnames=0 no_timer_check",
        ]);
        command
            .arg("-serial")
            .arg(format!("file:{}", console.display()));
        let mut disk = |file: &Path, more: &str| {
            command.arg("-drive").arg(format!(
                "file={},if=virtio,format=raw,cache=unsafe{more}",
                file.display()
            ));
        };
        disk(&image.root, ",snapshot=on");
        disk(&payload, ",readonly=on");
        for n in 0..2 {
            let file = dir.join(format!("scratch{n}"));
            super::guestdisk::image(&file, self.scratch)?;
            disk(&file, ",discard=unmap");
        }
        command.args(["-device", "virtio-serial-pci", "-chardev"]);
        command.arg(format!("file,id=results,path={}", results.display()));
        command.args(["-device", "virtserialport,chardev=results,name=bed.results"]);
        let said = File::create(dir.join("qemu"))?;
        command
            .stdin(Stdio::null())
            .stdout(said.try_clone()?)
            .stderr(said)
            .env("TMPDIR", dir.path());
        let mut child = Qemu(
            command
                .spawn()
                .map_err(|e| format!("qemu-system-x86_64: {e} (scripts/install-deps)"))?,
        );

        let started = Instant::now();
        let mut reader = File::open(&results)?;
        let mut pending: Vec<u8> = Vec::new();
        let mut status = None;
        loop {
            let ended = child.0.try_wait()?;
            reader.read_to_end(&mut pending)?;
            while let Some(end) = pending.iter().position(|b| *b == b'\n') {
                let line = String::from_utf8_lossy(&pending[..end]).into_owned();
                pending.drain(..=end);
                match line.strip_prefix("bed-end ") {
                    Some(code) => status = Some(code.trim().to_string()),
                    None => on_line(&line),
                }
            }
            let trouble = match (ended, status.as_deref()) {
                (_, Some("0")) => return Ok(()),
                (_, Some(code)) => format!("the payload ended with status {code}"),
                (Some(qemu), None) => format!("{BY_ITSELF} ({qemu})"),
                (None, None) if started.elapsed() > self.limit => {
                    format!("the machine ran longer than {} s", self.limit.as_secs())
                }
                _ => {
                    std::thread::sleep(Duration::from_millis(50));
                    continue;
                }
            };
            fail!(
                "{}: {trouble}\n{}--- console\n{}",
                self.suite,
                tail(&dir.join("qemu"), 20),
                tail(&console, 60)
            );
        }
    }

    /// A tar archive of all files, padded to whole sectors.
    fn payload(&self, dir: &WorkDir) -> Result<PathBuf> {
        let stage = dir.join("payload");
        std::fs::create_dir(&stage)?;
        for (from, name) in &self.files {
            std::fs::copy(from, stage.join(name))
                .map_err(|e| format!("{}: {e}", from.display()))?;
        }
        for (name, text) in &self.texts {
            std::fs::write(stage.join(name), text)?;
        }
        std::fs::write(stage.join("command"), &self.command)?;
        std::fs::write(stage.join("init"), include_str!("../bed/init"))?;
        std::fs::write(stage.join("payload"), include_str!("../bed/payload"))?;
        if self.systemd {
            let unit = include_str!("../bed/bed.service");
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

/// Killed when dropped.
struct Qemu(std::process::Child);
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
