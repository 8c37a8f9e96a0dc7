//! The command `guestsnap` on real guests: `inspect`, `ls`, `cat`, `who`. After each call the host is as before.

use super::image::store;
use crate::guestdisk::{
    Content, Fs, GuestDisk, GuestLv, GuestVg, Loop, MIB, Mounted, Part, Table, dirty_copy, image,
};
use crate::hoststate::{HostState, Scope};
use crate::inside::{Scenario, scenario};
use crate::lvm::HostVg;
use crate::populate::bytes;
use crate::workdir::WorkDir;
use crate::{Result, cmd, tool};
use crate::{check, fail};
use serde_json::Value;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// On this machine.
pub const ROOT: &[Scenario] = &[
    scenario("root_look_inspect", inspect),
    scenario("root_look_files", files),
    scenario("root_look_stopped", stopped),
    scenario("root_look_who", who_images),
];

/// In the emulated machines.
pub const VM: &[Scenario] = &[scenario("look_volumes", volumes).only("bookworm")];

/// The command, with a client file and a working directory of its own.
pub struct Tool {
    dir: WorkDir,
    before: HostState,
}

/// Output of a call.
pub struct Said {
    pub status: Option<i32>,
    pub out: Vec<u8>,
    pub err: String,
}

impl Said {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }

    /// All lines with single spaces.
    fn lines(&self) -> Vec<String> {
        let text = self.text();
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        text.lines().map(words).collect()
    }

    fn has(&self, wanted: &[&str]) -> Result {
        let lines = self.lines();
        let missing: Vec<_> = wanted
            .iter()
            .filter(|w| !lines.iter().any(|l| l == *w || is_about(l, w)))
            .collect();
        let (out, err) = (self.text(), &self.err);
        check!(missing.is_empty(), "no line {missing:?} in\n{out}\n{err}");
        Ok(())
    }

    pub fn is(&self, status: i32) -> Result {
        let (out, err) = (self.text(), &self.err);
        check!(
            self.status == Some(status),
            "ended with {:?}:\n{out}\n{err}",
            self.status
        );
        Ok(())
    }

    /// Refused with this code, and not a byte on standard output.
    pub fn refused(&self, code: &str) -> Result {
        self.is(1)?;
        let (out, err) = (self.text(), &self.err);
        check!(err.contains(code), "no {code}: {err}");
        check!(out.is_empty(), "{out}");
        Ok(())
    }
}

/// Whether a line of `inspect` begins like this and goes on with the filesystem's use and UUID.
fn is_about(line: &str, start: &str) -> bool {
    let rest = line
        .strip_prefix(start)
        .and_then(|rest| rest.strip_prefix(", "));
    let uuid = rest.and_then(|rest| rest.split_once("iB used, UUID "));
    uuid.is_some_and(|(_, uuid)| uuid.len() == 36 && uuid.matches('-').count() == 4)
}

impl Tool {
    pub fn new(client_file: &str) -> Result<Tool> {
        let dir = WorkDir::new()?;
        fs::create_dir(dir.join("wd"))?;
        fs::write(dir.join("client.toml"), client_file)?;
        let mut tool = Tool {
            dir,
            before: HostState::default(),
        };
        tool.before = HostState::capture_scope(&tool.scope())?;
        Ok(tool)
    }

    fn scope(&self) -> Scope {
        Scope {
            fd_pid: None,
            working_dir: Some(self.dir.join("wd")),
        }
    }

    fn command<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<Command> {
        let mut command = cmd::command(&tool()?.display().to_string());
        command
            .arg("--client-file")
            .arg(self.dir.join("client.toml"))
            .arg("--working-dir")
            .arg(self.dir.join("wd"))
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Ok(command)
    }

    pub fn call<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<Said> {
        let output = self.command(words)?.output()?;
        Ok(Said {
            status: output.status.code(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
            out: output.stdout,
        })
    }

    /// Runs it to its end; nothing is left.
    fn run<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<Said> {
        let said = self.call(words)?;
        let shown: Vec<_> = words.iter().map(|w| w.as_ref().to_string_lossy()).collect();
        println!(
            "$ guestsnap {}\n{}{}",
            shown.join(" "),
            said.text(),
            said.err
        );
        self.check_host(&shown.join(" "))?;
        Ok(said)
    }

    fn json(&self, words: &[&str]) -> Result<(Option<i32>, Value)> {
        let said = self.run(&[&["--json"], words].concat())?;
        let value = serde_json::from_slice(&said.out)
            .map_err(|e| format!("{words:?}: {e}\n{}", said.text()))?;
        Ok((said.status, value))
    }

    pub fn check_host(&self, what: &str) -> Result {
        let left = HostState::settled_diff(&self.before, &self.scope())?;
        check!(left.is_empty(), "{what}: left:\n  {}", left.join("\n  "));
        Ok(())
    }

    /// A `cat` that is at work: its first bytes have come.
    fn start_cat(&self, place: &str) -> Result<Child> {
        let mut child = self.command(&["cat", place])?.spawn()?;
        let mut first = [0; 4096];
        let out = child.stdout.as_mut().ok_or("no output")?;
        out.read_exact(&mut first)?;
        Ok(child)
    }

    /// Its end, and what it complained about.
    fn end(&self, mut child: Child) -> Result<(Option<i32>, String)> {
        drop(child.stdout.take());
        let status = cmd::wait_for("the command to end", Duration::from_secs(20), || {
            Ok(child.try_wait()?)
        })?;
        let mut err = String::new();
        if let Some(mut pipe) = child.stderr.take() {
            pipe.read_to_string(&mut err)?;
        }
        println!("{status}: {err}");
        Ok((status.code(), err))
    }
}

fn signal(child: &Child, name: &str) -> Result {
    cmd::run("kill", [format!("-{name}"), child.id().to_string()])?;
    Ok(())
}

/// An image of a guest in the store.
fn guest(store: &Path, name: &str, mib: u64, table: Table, parts: &[Part]) -> Result<GuestDisk> {
    let path = store.join(format!("{name}.img"));
    image(&path, mib * MIB)?;
    GuestDisk::create(&path, table, parts)
}

fn with<T>(
    disk: &GuestDisk,
    number: u32,
    dir: &WorkDir,
    work: impl FnOnce(&Path) -> Result<T>,
) -> Result<T> {
    let mounted = disk.mount(number, &dir.join("mnt"))?;
    let done = work(mounted.path())?;
    mounted.close()?;
    Ok(done)
}

fn script(path: &Path, text: &str) -> Result {
    cmd::sh(&format!("cd '{}'\n{text}", path.display()))?;
    Ok(())
}

fn ext4(mib: u64, label: &str) -> Part {
    Part::fs(mib * MIB, Fs::Ext4, label)
}

/// Every kind of table, a guest's fstab, a journal to replay, subvolumes: the right picture, and not a write to the disk.
fn inspect() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let at = store.path();
    partitioned(&dir, at)?;
    unpartitioned(&dir, at)?;
    // Two disks of one guest; and one that the client file does not allow.
    guest(at, "second", 64, Table::Whole, &[ext4(64, "more")])?;
    let looks = Looks {
        at,
        tool: Tool::new(&format!(
            "allow = ['{0}/[a-z]*.img']\n[guest.two]\ndisks = ['{0}/gpt.img', '{0}/second.img']\n",
            at.display()
        ))?,
    };
    image(&at.join("0.img"), 16 * MIB)?;
    let sums = || cmd::sh(&format!("sha256sum '{}'/*.img", at.display()));
    let before = sums()?;
    looks.one_disk()?;
    looks.two_disks()?;
    looks.whole_disks()?;
    looks.files_of_journal_and_subvolumes()?;
    looks.refused()?;
    looks.on_a_terminal()?;
    looks.plan()?;
    looks.several()?;
    check!(sums()? == before, "an image was written to");
    store.close()
}

/// Guests with partition tables.
fn partitioned(dir: &WorkDir, at: &Path) -> Result {
    let swap = || Part::new(8 * MIB, Content::Swap);
    let mbr = guest(
        at,
        "mbr",
        200,
        Table::Mbr,
        &[
            ext4(64, "root"),
            ext4(64, "data").logical(),
            swap().logical(),
        ],
    )?;
    with(&mbr, 1, dir, |path| {
        script(
            path,
            "mkdir etc data; printf 'LABEL=root / ext4 defaults 0 1\\nLABEL=data /data ext4 defaults 0 2\\n' > etc/fstab",
        )
    })?;
    // Two filesystems, one of them a root without an fstab; an empty partition.
    let gpt = guest(
        at,
        "gpt",
        200,
        Table::Gpt,
        &[
            ext4(32, "boot"),
            ext4(64, "root"),
            Part::new(16 * MIB, Content::Empty),
        ],
    )?;
    with(&gpt, 2, dir, |path| {
        script(path, "mkdir etc; echo ID=x > etc/os-release")
    })?;
    Ok(())
}

/// Guests whose disks have one filesystem, or nothing.
fn unpartitioned(dir: &WorkDir, at: &Path) -> Result {
    // It runs: its journal has something to replay.
    let whole = guest(at, "whole", 64, Table::Whole, &[ext4(64, "all")])?;
    let mounted = whole.mount(1, &dir.join("mnt"))?;
    dirty_copy(&mounted, &whole.path, &at.join("dirty.img"))?;
    mounted.close()?;
    let btrfs = Part::fs(200 * MIB, Fs::Btrfs, "pool");
    let btrfs = guest(at, "btrfs", 200, Table::Whole, &[btrfs])?;
    with(&btrfs, 1, dir, |path| {
        script(
            path,
            "btrfs -q subvolume create root; btrfs -q subvolume create home; btrfs -q subvolume create root/nested; mkdir root/etc root/home
            echo here > home/file; echo there > root/nested/file
            btrfs -q subvolume snapshot -r home root/left
            printf 'LABEL=pool / btrfs subvol=root 0 0\\nLABEL=pool /home btrfs subvol=home 0 0\\n' > root/etc/fstab",
        )
    })?;
    image(&at.join("blank.img"), 16 * MIB)?;
    Ok(())
}

/// The command and the guests that it looks at.
struct Looks<'a> {
    tool: Tool,
    at: &'a Path,
}

impl Looks<'_> {
    fn image(&self, name: &str) -> String {
        format!("image={}/{name}.img", self.at.display())
    }

    /// Partitions, primary and logical; no progress and no colours without a terminal.
    fn one_disk(&self) -> Result {
        let said = self.tool.run(&["inspect", &self.image("mbr")])?;
        said.is(0)?;
        said.has(&[
            "mbr saved as /@guestsnap/mbr",
            &format!(
                "{}/mbr.img 200.0 MiB disk: MBR, snapshot: reflink",
                self.at.display()
            ),
            "p1 64.0 MiB ext4 \"root\" on / (the root)",
            "p5 64.0 MiB ext4 \"data\" on /data",
            "p6 8.0 MiB skipped: swap space holds no files",
            "root: p1 (its own fstab says so)",
        ])?;
        check!(
            said.text().matches("iB used, UUID ").count() == 2,
            "no UUIDs in {}",
            said.text()
        );
        check!(
            said.err.is_empty(),
            "progress without a terminal: {}",
            said.err
        );
        check!(!said.text().contains('\x1b'), "colours without a terminal");
        Ok(())
    }

    /// A guest of the client file, as text and as JSON.
    fn two_disks(&self) -> Result {
        let said = self.tool.run(&["inspect", "two"])?;
        said.is(0)?;
        said.has(&[
            "p1 32.0 MiB ext4 \"boot\" on /.guestsnap/volumes/p1",
            "p2 64.0 MiB ext4 \"root\" on / (the root)",
            "p3 16.0 MiB skipped: no known content",
            "disk2 ext4 \"more\" on /.guestsnap/volumes/disk2",
            "root: p2 (it has an os-release file)",
            "disk2 is not in the guest's fstab: it is saved under /.guestsnap/volumes/disk2",
        ])?;
        let (status, value) = self.tool.json(&["inspect", "two"])?;
        let found = &value["result"]["guests"][0];
        check!(
            status == Some(0)
                && found["path"] == "/@guestsnap/two"
                && found["disks"][0]["contents"]["table"]["kind"] == "gpt"
                && found["disks"][1]["contents"]["table"]["kind"] == "none"
                && found["tree"][0]["path"] == ""
                && found["tree"][0]["volume"] == "p2"
                && found["messages"].as_array().is_some_and(Vec::is_empty),
            "{value:#}"
        );
        Ok(())
    }

    /// Without a table: one of a guest that runs, and subvolumes.
    fn whole_disks(&self) -> Result {
        for name in ["whole", "dirty"] {
            let said = self.tool.run(&["inspect", &self.image(name)])?;
            said.is(0)?;
            said.has(&[
                "disk ext4 \"all\" on / (the root)",
                "root: disk (the only filesystem)",
            ])?;
        }
        self.tool.run(&["inspect", &self.image("btrfs")])?.has(&[
            "disk btrfs \"pool\" on / (the root), /home",
            "root: disk, subvolume root (its own fstab says so)",
        ])?;
        Ok(())
    }

    /// The journal is replayed for a look; snapshots are in no backup.
    fn files_of_journal_and_subvolumes(&self) -> Result {
        // Files that only the journal knew of.
        let said = self.tool.run(&["ls", "-l", &self.image("dirty")])?;
        said.is(0)?;
        check!(said.text().contains(" dirty-19\n"), "{}", said.text());
        let place = |path: &str| format!("{}:{path}", self.image("btrfs"));
        let said = self.tool.run(&["cat", &place("/home/file")])?;
        check!(said.out == b"here\n", "{}", said.text());
        // A nested subvolume is a folder like others; a snapshot is in no backup.
        let said = self.tool.run(&["cat", &place("/nested/file")])?;
        check!(said.out == b"there\n", "{}", said.text());
        let said = self.tool.run(&["ls", "-l", &place("/left/")])?;
        check!(
            said.status == Some(0) && said.out.is_empty(),
            "{}",
            said.text()
        );
        let said = self.tool.run(&["cat", &place("/left/file")])?;
        said.refused("GS-606")?;
        check!(said.err.contains("left out"), "{}", said.err);
        Ok(())
    }

    /// Nothing known on a disk; a disk that is not allowed; no such guest; more than one.
    fn refused(&self) -> Result {
        let said = self.tool.run(&["inspect", &self.image("blank")])?;
        said.is(1)?;
        check!(
            said.text().contains("ERROR GS-406")
                && said.text().contains("skipped: no known content"),
            "{}",
            said.text()
        );
        for command in ["inspect", "ls", "cat"] {
            let path = if command == "inspect" { "" } else { ":/etc" };
            let said = self
                .tool
                .run(&[command, &format!("{}{path}", self.image("0"))])?;
            said.is(1)?;
            let all = said.text() + &said.err;
            check!(all.contains("GS-104"), "{command}: {all}");
            let said = self.tool.run(&[command, &format!("nobody{path}")])?;
            said.refused("GS-201")?;
        }
        let (status, value) = self.tool.json(&["ls", &format!("{}:/", self.image("0"))])?;
        check!(
            status == Some(1) && value["errors"][0]["code"] == "GS-104",
            "{value:#}"
        );
        // One guest only.
        self.tool
            .run(&["ls", &format!("{}:/", self.image("*"))])?
            .is(1)?;
        Ok(())
    }

    /// Progress and colours, as far as they are wanted.
    fn on_a_terminal(&self) -> Result {
        let call = format!(
            "'{}' --client-file '{1}/client.toml' --working-dir '{1}/wd' inspect two",
            crate::tool()?.display(),
            self.tool.dir.path().display()
        );
        let on_terminal = |before: &str| {
            let line = format!("TERM=xterm {before} {call}");
            cmd::run("script", ["-qec", &line, "/dev/null"])
        };
        let text = on_terminal("")?;
        for wanted in ["\x1b[1mtwo\x1b[0m", "\r\x1b[Ktwo: taking snapshots"] {
            check!(text.contains(wanted), "no {wanted:?} in {text:?}");
        }
        let text = on_terminal("NO_COLOR=1")?;
        check!(
            !text.contains("\x1b[1m") && text.contains("two: taking"),
            "{text:?}"
        );
        self.tool.check_host("on a terminal")?;
        Ok(())
    }

    /// How a job would take its snapshots.
    fn plan(&self) -> Result {
        let said = self.tool.run(&["plan", &self.image("mbr")])?;
        said.is(0)?;
        said.has(&[&format!(
            "{}/mbr.img 200.0 MiB snapshot: reflink",
            self.at.display()
        )])?;
        self.tool
            .run(&["plan", &format!("{} snapshot=none", self.image("mbr"))])?
            .is(0)?;
        let writer = File::options().write(true).open(self.at.join("mbr.img"))?;
        let said = self
            .tool
            .run(&["plan", &format!("{} snapshot=none", self.image("mbr"))])?;
        drop(writer);
        said.is(1)?;
        check!(said.text().contains("ERROR GS-311"), "{}", said.text());
        Ok(())
    }

    /// The bad one does not hide the good ones.
    fn several(&self) -> Result {
        let said = self.tool.run(&["inspect", &self.image("[bmw]*")])?;
        said.is(1)?;
        said.has(&[
            "mbr saved as /@guestsnap/mbr",
            "whole saved as /@guestsnap/whole",
        ])?;
        Ok(())
    }
}

/// The right bytes and lines; whatever a guest's links say, nothing of the host.
fn files() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let host = dir.join("host");
    fs::create_dir(&host)?;
    fs::write(host.join("secret"), "content-of-the-host")?;
    let binary = bytes(7, 3 * (1 << 20) + 5);
    let disk = guest_with_links(&dir, store.path(), &host, &binary)?;
    let tool = Tool::new(&format!(
        "[guest.\"o'web:1\"]\ndisks = ['{}']\n",
        disk.path.display()
    ))?;
    cat_of_files(&tool, &binary)?;
    cat_refused(&tool, &host)?;
    list_of_the_root(&tool)?;
    lists(&tool, &host)?;
    store.close()
}

/// A place in the guest.
fn place(path: &str) -> String {
    format!("o'web:1:{path}")
}

/// Every kind of file, and links that lead out of the guest to the folder `host`.
fn guest_with_links(dir: &WorkDir, store: &Path, host: &Path, binary: &[u8]) -> Result<GuestDisk> {
    let parts = [ext4(100, "root"), ext4(32, "data"), ext4(16, "unlisted")];
    let disk = guest(store, "web", 200, Table::Mbr, &parts)?;
    with(&disk, 1, dir, |path| {
        fs::write(path.join("binary"), binary)?;
        fs::write(path.join(OsStr::from_bytes(b"odd\nname\xff:")), "odd")?;
        script(
            path,
            &format!(
                "mkdir -p etc data/hidden many folder
                printf 'LABEL=root / ext4 defaults 0 1\\nLABEL=data /data ext4 defaults 0 2\\n' > etc/fstab
                echo guest-passwd > etc/passwd; echo guest-shadow > etc/shadow
                ln -s /etc/shadow abs; ln -s ../../../../../../etc/passwd up; ln -s etc dir
                ln -s {0}/secret secret; ln -s {0} hostdir; ln -s ../../../../../../../..{0}/secret up-secret
                ln -s /proc/self/root/{0}/secret proc; ln -s /proc/1/root proc-root
                ln -s loop loop; ln -s data/in there; ln -s dir/../etc/passwd through
                mkfifo pipe; mknod null c 1 3; mknod disk b 8 1
                echo hello > folder/file; chown 1000:100 folder/file; chmod 4750 folder/file
                touch -d '2001-02-03 04:05:06.7 UTC' folder/file
                truncate -s 3M sparse; echo end >> sparse
                cd many; seq 3000 | xargs touch",
                host.display()
            ),
        )
    })?;
    with(&disk, 2, dir, |path| {
        script(
            path,
            "mkdir sub; echo inside > in; ln -s ../etc/passwd back; chmod 711 .",
        )
    })?;
    with(&disk, 3, dir, |path| script(path, "echo other > other"))?;
    Ok(disk)
}

/// The bytes of files, by any way that leads to them in the guest.
fn cat_of_files(tool: &Tool, binary: &[u8]) -> Result {
    let said = tool.call(&["cat", &place("/binary")])?;
    tool.check_host("cat")?;
    check!(
        said.status == Some(0) && said.out == binary && said.err.is_empty(),
        "{} bytes came, {}",
        said.out.len(),
        said.err
    );
    let said = tool.call(&["cat", &place("/sparse")])?;
    check!(
        said.out.len() == (3 << 20) + 4 && said.out.ends_with(b"\0end\n"),
        "{} bytes of the sparse file",
        said.out.len()
    );
    for (path, expected) in [
        ("/etc/passwd", "guest-passwd\n"),
        ("//etc/./../etc//passwd", "guest-passwd\n"),
        ("/abs", "guest-shadow\n"),
        ("/up", "guest-passwd\n"),
        ("/dir/passwd", "guest-passwd\n"),
        ("/through", "guest-passwd\n"),
        ("/data/in", "inside\n"),
        ("/there", "inside\n"),
        ("/data/back", "guest-passwd\n"),
        ("/data/sub/../../etc/passwd", "guest-passwd\n"),
        ("/.guestsnap/volumes/p3/other", "other\n"),
    ] {
        let said = tool.run(&["cat", &place(path)])?;
        said.is(0)?;
        check!(said.out == expected.as_bytes(), "{path}: {}", said.text());
    }
    let odd = OsStr::from_bytes(b"o'web:1:/odd\nname\xff:");
    let said = tool.run(&[OsStr::new("cat"), odd])?;
    check!(said.out == b"odd", "{}", said.err);
    Ok(())
}

/// Paths that are no file, are not there, or are not the guest's.
fn cat_refused(tool: &Tool, host: &Path) -> Result {
    let host_secret = format!("{}/secret", host.display());
    for path in [
        "/secret",
        "/hostdir/secret",
        "/up-secret",
        "/proc",
        "/proc-root/etc/passwd",
        "/loop",
        "/pipe",
        "/null",
        "/disk",
        "/folder",
        "/etc/passwd/",
        "/etc/passwd/x",
        "/none",
        "/data/hidden",
        "/etc/passwd/../passwd",
        &host_secret,
    ] {
        tool.run(&["cat", &place(path)])?.refused("GS-606")?;
    }
    Ok(())
}

/// One line for each kind of object.
fn list_of_the_root(tool: &Tool) -> Result {
    let said = tool.run(&["ls", "-l", &place("/")])?;
    said.is(0)?;
    let shown = said.lines();
    let starts = |start: &str, end: &str| {
        let found = shown
            .iter()
            .any(|l| l.starts_with(start) && l.ends_with(end));
        found
            .then_some(())
            .ok_or(format!("no {start} … {end} in {shown:#?}"))
    };
    // The filesystem that is joined there, not the folder below it.
    starts("drwx--x--x ", " data")?;
    starts("lrwxrwxrwx 1 0 0 11 ", " abs -> /etc/shadow")?;
    starts("prw", " pipe")?;
    starts("crw-r--r-- 1 0 0 1, 3 ", " null")?;
    starts("brw-r--r-- 1 0 0 8, 1 ", " disk")?;
    starts("-rw", " odd\\x0aname\\xff:")?;
    starts("drwx------ ", " .guestsnap")?;
    let names: Vec<_> = shown.iter().filter(|l| l.ends_with(" data")).collect();
    check!(names.len() == 1, "{names:?}");
    Ok(())
}

/// Folders, single files, links, many names, and the same as JSON.
fn lists(tool: &Tool, host: &Path) -> Result {
    tool.run(&["ls", "-l", &place("/folder")])?
        .has(&["-rwsr-x--- 1 1000 100 6 2001-02-03 04:05:06 file"])?;
    tool.run(&["ls", "-l", &place("/folder/file")])?
        .has(&["-rwsr-x--- 1 1000 100 6 2001-02-03 04:05:06 file"])?;
    let said = tool.run(&["ls", "-l", &place("/dir")])?;
    check!(
        said.lines().len() == 1 && said.text().contains("dir -> etc"),
        "{}",
        said.text()
    );
    // Names alone, of the root if no path is given; all below, with paths.
    let said = tool.run(&["ls", &place("/folder")])?;
    check!(said.out == b"file\n", "{}", said.text());
    let root = place("/");
    let root = root.trim_end_matches(":/");
    let said = tool.run(&["ls", root])?;
    said.has(&["data", "odd\\x0aname\\xff:"])?;
    let said = tool.run(&["ls", "-R", &place("/data/")])?;
    said.is(0)?;
    said.has(&["/data/in", "/data/sub"])?;
    let said = tool.run(&["ls", "-lR", &place("/folder/")])?;
    said.has(&["-rwsr-x--- 1 1000 100 6 2001-02-03 04:05:06 /folder/file"])?;
    let all = tool.call(&["ls", "--recursive", root])?;
    check!(
        all.lines().len() > 3030,
        "{} lines of all",
        all.lines().len()
    );
    let said = tool.run(&["ls", "-l", &place("/dir/")])?;
    check!(said.lines().len() == 3, "{}", said.text());
    tool.run(&["ls", "-l", &place("/folder/file/")])?
        .refused("GS-606")?;
    let said = tool.call(&["ls", "-l", &place("/many")])?;
    check!(said.lines().len() == 3000, "{} of many", said.lines().len());
    for path in [
        "/hostdir/",
        "/proc-root/",
        "/none",
        &host.display().to_string(),
    ] {
        tool.run(&["ls", "-l", &place(path)])?.refused("GS-606")?;
    }
    let (status, value) = tool.json(&["ls", "-l", &place("/folder")])?;
    let entry = &value["result"]["entries"][0];
    check!(
        status == Some(0)
            && entry["name"] == "file"
            && entry["path"] == "/folder/file"
            && entry["mode"] == "4750"
            && entry["mtime"] == 981_173_106
            && entry["mtime_nanoseconds"] == 700_000_000,
        "{value:#}"
    );
    let said = tool.run(&["--json", "cat", &place("/etc/passwd")])?;
    check!(
        said.status == Some(2) && said.out.is_empty(),
        "{}",
        said.err
    );
    Ok(())
}

/// The reader goes, the user stops it, a signal kills it: all objects are taken down, or swept.
fn stopped() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let disk = guest(store.path(), "web", 128, Table::Mbr, &[ext4(100, "root")])?;
    // Takes minutes to come.
    with(&disk, 1, &dir, |path| {
        Ok(File::create(path.join("huge"))?.set_len(800 << 30)?)
    })?;
    let tool = Tool::new(&format!(
        "[guest.web]\ndisks = ['{}']\n",
        disk.path.display()
    ))?;
    stop_in_all_ways(&tool, "web:/huge")?;
    store.close()
}

fn stop_in_all_ways(tool: &Tool, place: &str) -> Result {
    let child = tool.start_cat(place)?;
    let (status, err) = tool.end(child)?;
    check!(
        status == Some(1) && err.contains("GS-704"),
        "closed output: {status:?} {err}"
    );
    tool.check_host("a closed output")?;

    for name in ["INT", "TERM", "HUP"] {
        let mut child = tool.start_cat(place)?;
        // The reader has stopped, and the command does not wait for it.
        let output = child.stdout.take();
        std::thread::sleep(Duration::from_millis(300));
        signal(&child, name)?;
        let (status, err) = tool.end(child)?;
        check!(
            status == Some(1) && err.contains("GS-703"),
            "{name}: {status:?} {err}"
        );
        drop(output);
        tool.check_host(name)?;
    }

    let child = tool.start_cat(place)?;
    signal(&child, "KILL")?;
    let (status, _) = tool.end(child)?;
    check!(status.is_none(), "not killed: {status:?}");
    let journals = || -> Result<usize> { Ok(fs::read_dir(tool.dir.join("wd/guestsnap"))?.count()) };
    check!(journals()? == 1, "{} journals", journals()?);
    let said = tool.run(&["sweep"])?;
    said.is(0)?;
    check!(journals()? == 0, "{} journals after the sweep", journals()?);
    Ok(())
}

/// The process that has an image open, and one that uses it through a loop device.
fn who_images() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let disk = guest(store.path(), "web", 64, Table::Whole, &[ext4(64, "root")])?;
    let tool = Tool::new(&format!(
        "[guest.web]\ndisks = ['{}']\n",
        disk.path.display()
    ))?;
    tool.run(&["who", "web"])?.has(&["nobody"])?;
    // The shell that holds it; and a filesystem on a loop device.
    let mut holder = cmd::command("sleep")
        .arg("1000")
        .stdin(File::open(&disk.path)?)
        .spawn()?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    let said = tool.call(&["who", "web"])?;
    println!("{}", said.text());
    let point = mounted.path().display().to_string();
    mounted.close()?;
    let json = tool.json(&["who", "web"]);
    holder.kill()?;
    holder.wait()?;
    said.is(0)?;
    let text = said.text();
    let open = format!("sleep (pid {}", holder.id());
    let expected = [
        open.as_str(),
        "device loop",
        &format!("mounted on {point} in mount namespace"),
    ];
    for wanted in expected {
        check!(text.contains(wanted), "no {wanted} in\n{text}");
    }
    let (status, value) = json?;
    let row = &value["result"]["guests"][0]["disks"][0]["holders"][0];
    check!(
        status == Some(0)
            && row["holder"]["kind"] == "process"
            && row["holder"]["process"]["pid"] == holder.id(),
        "{value:#}"
    );
    store.close()
}

/// A guest's LVM of every kind, on one disk and on two, one of them missing; who holds a volume and a snapshot of ours.
fn volumes() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let plain = plain_guest(&vg, &dir)?;
    thin_guest(&vg, &dir)?;
    guest_on_two_disks(&vg, &dir)?;
    // Little room is left.
    vg.lv("filler", "13g")?;
    let tool = Tool::new(
        "[guest.two]\ndisks = ['vg0/two-a', 'vg0/two-b']\n[guest.half]\ndisks = ['vg0/two-a']\n",
    )?;
    inspect_one_disk(&tool)?;
    inspect_two_disks(&tool)?;
    files_of_volumes(&tool)?;
    plan_of_volumes(&tool)?;

    // Held by a process, by a filesystem on a loop device; a snapshot of ours by its own process.
    let node = vg.node("domu-plain");
    let mut holder = cmd::command("sleep")
        .arg("1000")
        .stdin(File::open(&node)?)
        .spawn()?;
    let seen = held(&tool, &plain, &node, &holder, &dir);
    holder.kill()?;
    holder.wait()?;
    seen?;
    tool.run(&["who", "lv=vg0/domu-plain"])?.has(&["nobody"])?;
    stop_in_all_ways(&tool, "lv=vg0/domu-plain:/huge")
}

fn lv(name: &str, args: &str, content: Content) -> GuestLv {
    GuestLv::new(name, args, content)
}

fn content(label: &str) -> Content {
    Content::Fs(Fs::Ext4, label.to_owned())
}

/// A layout of an installer; the guest's group has the host's name.
fn plain_guest(vg: &HostVg, dir: &WorkDir) -> Result<GuestDisk> {
    let parts = [ext4(32, "boot"), Part::new(230 * MIB, Content::Pv)];
    let plain = GuestDisk::create(&vg.lv("domu-plain", "300m")?, Table::Mbr, &parts)?;
    let lvs = [
        lv("root", "-L 120m", content("root")),
        lv("swap", "-L 16m", Content::Swap),
    ];
    let group = GuestVg::create("vg0", &[(&plain, 2)], &lvs)?;
    group.with_mounted("root", Fs::Ext4, &dir.join("mnt"), |path| {
        script(path, "mkdir etc boot; echo plain > etc/hostname")?;
        let fstab =
            "/dev/mapper/vg0-root / ext4 defaults 0 1\nLABEL=boot /boot ext4 defaults 0 2\n";
        fs::write(path.join("etc/fstab"), fstab)?;
        Ok(File::create(path.join("huge"))?.set_len(800 << 30)?)
    })?;
    with(&plain, 1, dir, |path| script(path, "echo kernel > vmlinuz"))?;
    Ok(plain)
}

/// On a thin volume of the host, with a thin pool of its own.
fn thin_guest(vg: &HostVg, dir: &WorkDir) -> Result {
    vg.thin_pool("pool", "600m")?;
    let thin = vg.thin_lv("pool", "domu-thin", "300m")?;
    let thin = GuestDisk::create(&thin, Table::Whole, &[Part::new(300 * MIB, Content::Pv)])?;
    let lvs = [
        GuestLv::pool("tpool", 100),
        GuestLv::thin("root", 200, "tpool", content("root")),
    ];
    let group = GuestVg::create("thinvg", &[(&thin, 1)], &lvs)?;
    group.with_mounted("root", Fs::Ext4, &dir.join("mnt"), |path| {
        script(
            path,
            "mkdir etc; echo thin > etc/hostname; echo ID=x > etc/os-release",
        )
    })
}

/// One group on two disks.
fn guest_on_two_disks(vg: &HostVg, dir: &WorkDir) -> Result {
    let mut two = Vec::new();
    for name in ["two-a", "two-b"] {
        let node = vg.lv(name, "300m")?;
        two.push(GuestDisk::create(
            &node,
            Table::Whole,
            &[Part::new(300 * MIB, Content::Pv)],
        )?);
    }
    let lvs = [
        lv("root", "-L 80m", content("root")),
        lv("striped", "-i 2 -I 64k -L 80m", content("striped")),
    ];
    let group = GuestVg::create("twovg", &[(&two[0], 1), (&two[1], 1)], &lvs)?;
    group.with_mounted("root", Fs::Ext4, &dir.join("mnt"), |path| {
        script(path, "mkdir etc data; echo two > etc/hostname")?;
        let text =
            "/dev/twovg/root / ext4 defaults 0 1\n/dev/twovg/striped /data ext4 defaults 0 2\n";
        Ok(fs::write(path.join("etc/fstab"), text)?)
    })?;
    group.with_mounted("striped", Fs::Ext4, &dir.join("mnt"), |path| {
        Ok(fs::write(path.join("bytes"), bytes(3, 200_000))?)
    })
}

fn inspect_one_disk(tool: &Tool) -> Result {
    let said = tool.run(&["inspect", "lv=vg0/domu-plain strip=domu-"])?;
    said.is(0)?;
    said.has(&[
        "plain saved as /@guestsnap/plain",
        "p1 32.0 MiB ext4 \"boot\" on /boot",
        "p2 230.0 MiB LVM, group vg0",
        "vg0 LVM group on p2",
        "vg0/root 120.0 MiB ext4 \"root\" on / (the root)",
        "vg0/swap 16.0 MiB skipped: swap space holds no files",
    ])?;
    check!(
        said.text().contains("disk: MBR, snapshot: 60 MiB thick"),
        "{}",
        said.text()
    );
    let said = tool.run(&["inspect", "lv=vg0/domu-thin"])?;
    said.is(0)?;
    said.has(&[
        "disk LVM, group thinvg",
        "thinvg/root 200.0 MiB ext4 \"root\" on / (the root)",
    ])?;
    check!(
        said.text().contains("no table, snapshot: thin"),
        "{}",
        said.text()
    );
    Ok(())
}

/// With one of them missing too.
fn inspect_two_disks(tool: &Tool) -> Result {
    let said = tool.run(&["inspect", "two"])?;
    said.is(0)?;
    said.has(&[
        "twovg LVM group on disk, disk2",
        "twovg/root 80.0 MiB ext4 \"root\" on / (the root)",
        "twovg/striped 80.0 MiB ext4 \"striped\" on /data",
    ])?;
    let (status, value) = tool.json(&["inspect", "half"])?;
    let found = &value["result"]["guests"][0];
    let missing = found["messages"].as_array().is_some_and(|all| {
        let text = |m: &Value| m["text"].as_str().unwrap_or_default().to_owned();
        all.iter()
            .any(|m| m["kind"] == "error" && text(m).starts_with("twovg/striped: ERROR GS-404"))
    });
    check!(
        status == Some(1) && missing && found["tree"][0]["volume"] == "twovg-root",
        "{value:#}"
    );
    Ok(())
}

fn files_of_volumes(tool: &Tool) -> Result {
    let said = tool.call(&["cat", "two:/data/bytes"])?;
    tool.check_host("cat")?;
    said.is(0)?;
    check!(said.out == bytes(3, 200_000), "other bytes came");
    // The bytes that are there come, but they may not be those that the guest sees.
    let said = tool.run(&["cat", "half:/etc/hostname"])?;
    check!(
        said.out == b"two\n" && said.err.contains("GS-404"),
        "{}",
        said.err
    );
    said.is(1)?;
    tool.run(&["cat", "lv=vg0/domu-thin:/etc/hostname"])?
        .has(&["thin"])?;
    let said = tool.run(&["ls", "-l", "lv=vg0/domu-plain:/boot"])?;
    check!(said.text().contains(" vmlinuz\n"), "{}", said.text());
    Ok(())
}

fn plan_of_volumes(tool: &Tool) -> Result {
    // All snapshots of a job at once.
    let said = tool.run(&["plan", "lv=vg0/domu-* guest=two strip=domu- size=50%"])?;
    said.is(0)?;
    said.has(&[
        "vg0/domu-plain 300.0 MiB snapshot: 152 MiB thick",
        "vg0/domu-thin 300.0 MiB snapshot: thin",
    ])?;
    check!(
        said.text().contains("\nvg0: snapshots need 456.0 MiB, "),
        "{}",
        said.text()
    );
    let (status, value) = tool.json(&["plan", "lv=vg0/filler guest=two size=50%"])?;
    check!(
        status == Some(1) && value["errors"][0]["code"] == "GS-303",
        "{value:#}"
    );
    let said = tool.run(&["check"])?;
    said.has(&["ok guests 3 of 3 disks of 2 defined guests can be snapshotted"])?;
    Ok(())
}

fn held(tool: &Tool, disk: &GuestDisk, node: &Path, holder: &Child, dir: &WorkDir) -> Result {
    let part = disk.part(1)?.clone();
    let volume = Loop::attach(node, part.offset, Some(part.size), 0)?;
    let device = volume.device().trim_start_matches("/dev/").to_owned();
    let mounted = Mounted::new(volume, Fs::Ext4, &dir.join("held"))?;
    let point: PathBuf = mounted.path().to_owned();
    let mut cat = tool.start_cat("lv=vg0/domu-plain:/huge")?;
    let said = tool.call(&["who", "lv=vg0/domu-plain"])?;
    let pid = cat.id();
    let output = cat.stdout.take();
    signal(&cat, "INT")?;
    tool.end(cat)?;
    drop(output);
    mounted.close()?;
    tool.check_host("a look while others hold the volume")?;
    let text = said.text();
    println!("{text}");
    said.is(0)?;
    for wanted in [
        format!("    sleep (pid {}", holder.id()),
        format!("    device {device}"),
        format!("mounted on {} in mount namespace", point.display()),
        format!("(through {device})"),
        format!("our snapshot, of job 0 of process {pid}"),
        format!("    guestsnap (pid {pid}"),
    ] {
        if !text.contains(&wanted) {
            fail!("no {wanted:?} in\n{text}");
        }
    }
    Ok(())
}
