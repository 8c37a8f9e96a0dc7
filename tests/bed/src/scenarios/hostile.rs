//! Guests that mean harm, through the real Bacula: the host is untouched, time and memory are bounded, the log is clear.

use super::look::{Said, Tool};
use super::points::reflink_store;
use crate::bacula::{Bacula, BaculaOptions, JobResult, Selection, fileset_plugin};
use crate::check;
use crate::guestdisk::{Content, Fs, GuestDisk, MIB, Part, Table, image};
use crate::inside::{Scenario, scenario};
use crate::workdir::WorkDir;
use crate::{Result, cmd, plugin_so};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// On this machine.
pub const ROOT: &[Scenario] = &[
    scenario("root_hostile_guests", guests),
    scenario("root_hostile_looks", looks),
    scenario("root_hostile_restore_race", restore_race),
    scenario("root_hostile_director", director),
];

/// Contents of the host's files that guests point at. They must not come out anywhere.
const SECRET: &str = "content-of-the-host";
/// More than all of these guests need.
const SECONDS: u64 = 120;
/// Above the idle daemon, in KiB.
const MEMORY: u64 = 96 << 10;

/// Makes guests in image files.
struct Maker<'a> {
    dir: &'a WorkDir,
    store: &'a Path,
}

impl Maker<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.store.join(format!("{name}.img"))
    }

    /// One ext4 without a table, with a file `good` in it, then this script in its root, then these requests to
    /// debugfs.
    fn ext4(&self, name: &str, script: &str, debugfs: &[&str]) -> Result {
        let path = self.path(name);
        image(&path, 64 * MIB)?;
        Fs::Ext4.make(
            &path.display().to_string(),
            name,
            &["-b", "4096", "-O", "ea_inode,^metadata_csum"],
        )?;
        let disk = GuestDisk {
            path: path.clone(),
            parts: vec![crate::guestdisk::Placed {
                number: 1,
                offset: 0,
                size: 64 * MIB,
                content: Content::Fs(Fs::Ext4, name.to_owned()),
            }],
        };
        let mounted = disk.mount(1, &self.dir.join("mnt"))?;
        let host = self.host().display().to_string();
        cmd::sh(&format!(
            "cd '{}'; echo fine > good; HOST='{host}'\n{script}",
            mounted.path().display()
        ))?;
        mounted.close()?;
        for request in debugfs {
            cmd::run(
                "debugfs",
                ["-w", "-R", request, &path.display().to_string()],
            )?;
        }
        Ok(())
    }

    /// Host files that the guests point at.
    fn host(&self) -> PathBuf {
        self.dir.join("host")
    }
}

/// Each guest, and what the job log must say of it.
fn make(maker: &Maker<'_>) -> Result<Vec<(&'static str, &'static str)>> {
    let host = maker.host();
    fs::create_dir_all(host.join("sub"))?;
    fs::write(host.join("secret"), SECRET)?;
    fs::write(host.join("sub/secret"), SECRET)?;
    fs::write(
        host.join("fstab"),
        format!("LABEL={SECRET} /{SECRET} ext4 defaults 0 0\n"),
    )?;
    panicking(maker)?;
    links_to_the_host(maker)?;
    endless_trees(maker)?;
    huge_contents(maker)?;
    chain_of_tables(maker)?;
    far_volume(maker)?;
    Ok(vec![
        ("panic", "ext4 found"),
        ("links", "0 errors"),
        ("fstab", "0 errors"),
        ("nodes", "0 errors"),
        ("circle", "GS-602"),
        ("ways", "it is at another path too"),
        ("flood", "more errors that are not shown here"),
        ("nothing", "GS-608"),
        ("inodes", "GS-503"),
        ("xattrs", "more than 1 MiB of extended attributes"),
        ("sparse", "0 errors"),
        ("lines", "fstab"),
        ("deep", "0 errors"),
        ("chain", "p1 ext4"),
        ("pv", "GS-"),
    ])
}

/// The superblock asks the kernel to panic at the first error, and there is one.
fn panicking(maker: &Maker<'_>) -> Result {
    maker.ext4(
        "panic",
        "mkdir broken; for n in $(seq 200); do : > broken/a-long-name-that-fills-blocks-$n; done",
        &["set_super_value errors 3"],
    )?;
    let path = maker.path("panic");
    let block = cmd::run(
        "debugfs",
        ["-R", "bmap broken 1", &path.display().to_string()],
    )?;
    let block: u64 = block.trim().parse().map_err(|_| format!("block {block}"))?;
    let file = fs::File::options().write(true).open(&path)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 4096], block * 4096)?;
    drop(file);
    Ok(())
}

/// Links to the host's files, and nodes of its devices.
fn links_to_the_host(maker: &Maker<'_>) -> Result {
    // Links to the host at every component of a path, and where fstab is looked for.
    maker.ext4(
        "links",
        "ln -s $HOST etc; ln -s $HOST boot; mkdir -p a/b usr; ln -s $HOST a/b/c; ln -s $HOST/secret a/file
        ln -s ../../../../../../../../../../../../../..$HOST usr/lib; ln -s / rootdir; ln -s /proc/self/root proc",
        &[],
    )?;
    maker.ext4("fstab", "mkdir etc; ln -s $HOST/fstab etc/fstab", &[])?;
    maker.ext4(
        "nodes",
        "mkdir -p dev; mknod dev/mem c 1 1; mknod dev/tty c 5 0; mknod dev/sda b 8 0; mknod dev/loop0 b 7 0
        mkfifo dev/pipe; mkfifo etc; perl -MSocket -e 'socket(S,PF_UNIX,SOCK_STREAM,0); bind(S,sockaddr_un(\"dev/log\"))'",
        &[],
    )?;
    Ok(())
}

/// Folders without an end, and more problems than a job report has room for.
fn endless_trees(maker: &Maker<'_>) -> Result {
    // A folder that is inside of itself.
    maker.ext4(
        "circle",
        "mkdir -p a/b/c; echo x > a/b/x",
        &["link a a/b/again", "link a/b a/b/c/self"],
    )?;
    // Folders in two places each, inside of each other: 2^30 paths.
    let ways: Vec<String> = (0..30)
        .flat_map(|n| ["a", "b"].map(|name| format!("link w/d{} w/d{n}/{name}", n + 1)))
        .collect();
    let requests: Vec<&str> = ways.iter().map(String::as_str).collect();
    maker.ext4(
        "ways",
        "for n in $(seq 0 30); do mkdir -p w/d$n; echo x > w/d$n/x; done",
        &requests,
    )?;
    // More problems than a job report has room for, each with a path of 64 KiB.
    maker.ext4(
        "flood",
        r#"perl -e 'for (1..256) { mkdir "d" x 255; chdir "d" x 255; } for (1..2000) { open F, ">f$_" }'"#,
        &[],
    )?;
    Ok(())
}

/// Numbers, attributes, sizes, lines and paths beyond all measure.
fn huge_contents(maker: &Maker<'_>) -> Result {
    maker.ext4("inodes", "", &["set_super_value inodes_count 4294967295"])?;
    maker.ext4(
        "xattrs",
        r#"perl -e 'print "x" x 60000' > value; printf '#!/bin/sh\nexec setfattr -n "user.$2" -v "$(cat value)" "$1"\n' > set
        f="$(printf 'bad\033[2J\033[31m\nweb1: everything is fine\r\001\377name')"; : > "$f"
        for n in $(seq 30); do sh ./set "$f" n$n; done; rm value set"#,
        &[],
    )?;
    maker.ext4("sparse", "truncate -s 8G huge; echo end >> huge", &[])?;
    maker.ext4("nothing", "truncate -s 15T huge", &[])?;
    maker.ext4(
        "lines",
        "mkdir etc; printf 'LABEL=\\033[31m /../\\001 ext4 x 0 0\\n' > etc/fstab
        for n in $(seq 10000); do echo \"UUID=$n /mnt/$n/../$n ext4 defaults,$n 0 0\"; done >> etc/fstab",
        &[],
    )?;
    maker.ext4(
        "deep",
        r#"perl -e 'for (1..300) { mkdir "d" x 200; chdir "d" x 200; } open F, ">end"'"#,
        &[],
    )?;
    Ok(())
}

/// An extended partition whose chain of tables leads back to its start.
fn chain_of_tables(maker: &Maker<'_>) -> Result {
    let path = maker.path("chain");
    image(&path, 64 * MIB)?;
    let disk = GuestDisk::create(
        &path,
        Table::Mbr,
        &[
            Part::fs(16 * MIB, Fs::Ext4, "good"),
            Part::fs(16 * MIB, Fs::Ext4, "logical").logical(),
        ],
    )?;
    // The second entry of the first logical partition's table: the chain's next, counted from its start.
    let at = disk.part(5)?.offset - 63 * 512 + 446 + 16;
    let mut entry = [0_u8; 16];
    entry[4] = 5;
    entry[12..16].copy_from_slice(&2048_u32.to_le_bytes());
    // And the entry after that leads to the first again.
    let file = fs::File::options().write(true).open(&path)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &entry, at)?;
    let again = disk.part(5)?.offset - 63 * 512 + 2048 * 512 + 446 + 16;
    entry[8..12].copy_from_slice(&0_u32.to_le_bytes());
    std::os::unix::fs::FileExt::write_all_at(&file, &entry, again)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &[0x55, 0xaa], again - 462 + 510)?;
    drop(file);
    Ok(())
}

/// A physical volume whose header points far outside of it.
fn far_volume(maker: &Maker<'_>) -> Result {
    let path = maker.path("pv");
    image(&path, 64 * MIB)?;
    let mut label = vec![0_u8; 512];
    label[..8].copy_from_slice(b"LABELONE");
    label[8..16].copy_from_slice(&1_u64.to_le_bytes());
    label[20..24].copy_from_slice(&32_u32.to_le_bytes());
    label[24..32].copy_from_slice(b"LVM2 001");
    for word in label[32..].chunks_mut(8) {
        word.copy_from_slice(&0x7fff_ffff_ffff_fff0_u64.to_le_bytes());
    }
    let file = fs::File::options().write(true).open(&path)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &label, 512)?;
    Ok(())
}

/// All of them in one job: what is good of each is saved, what is not is named.
fn guests() -> Result {
    let dir = WorkDir::new()?;
    let store = reflink_store(&dir)?;
    let maker = Maker {
        dir: &dir,
        store: store.path(),
    };
    let expected = make(&maker)?;
    let host_before = tree(&maker.host())?;
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![(
            "g".into(),
            fileset_plugin(&format!(
                "guestsnap: image={}/*.img",
                store.path().display()
            )),
        )],
        client_file: Some(format!(
            "allow = [\"{}/*\"]\n[limits]\nholes = \"10G\"\n",
            store.path().display()
        )),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let pid = bacula.fd_pid().ok_or("no File Daemon")?;
    let before = bacula.host_state()?;
    let idle = peak(pid)?;
    let job = bacula.run_backup("g", "Full")?;
    println!("{}", job.log);
    let grown = peak(pid)?.saturating_sub(idle);
    println!("{:.1} s, {grown} KiB more", job.seconds);
    check!(
        (job.seconds as u64) < SECONDS,
        "it took {:.0} s",
        job.seconds
    );
    check!(grown < MEMORY, "it took {grown} KiB of memory");
    check!(job.status == 'T', "status {}", job.status);
    check!(job.errors > 0, "guests that are damaged, and no errors");
    for (guest, text) in &expected {
        let mark = format!("{guest}: ");
        let mut lines = job.log.lines().filter(|l| l.contains(&mark));
        check!(
            lines.any(|l| l.contains(text)),
            "the log does not say {text:?} of {guest}"
        );
    }
    check!(job.log.len() < 2 << 20, "a log of {} bytes", job.log.len());
    // A log that a guest could write to could say anything.
    let raw = job
        .log
        .bytes()
        .find(|b| b.is_ascii_control() && *b != b'\n');
    check!(raw.is_none(), "byte {raw:?} of a guest is in the log");
    check!(
        !job.log.lines().any(|l| l.starts_with("web1: everything")),
        "a guest wrote a line of the log"
    );
    check!(
        !job.log.contains(SECRET),
        "the host's file is in the log: it was read"
    );
    bacula.check_host_state(&before)?;
    check!(bacula.fd_pid() == Some(pid), "the daemon is another one");
    check!(
        tree(&maker.host())? == host_before,
        "the host's files were changed"
    );

    restored(&bacula, &job, &maker)?;
    drop(bacula);
    store.close()
}

/// The harmless objects came back unchanged.
fn restored(bacula: &Bacula, job: &JobResult, maker: &Maker<'_>) -> Result {
    let all = maker.dir.join("all");
    let restored = bacula.restore(job.jobid, &Selection::All, &all)?;
    // This host's filesystem may not have room for what is too much of attributes.
    let other = restored.log.lines().filter(|l| l.contains("GS-"));
    let other: Vec<&str> = other
        .filter(|l| !l.contains("GS-604") || !l.contains("xattrs/"))
        .collect();
    check!(other.is_empty(), "{}", other.join("\n"));
    look_for(SECRET, &all)?;
    let guest = |name: &str| all.join("@guestsnap").join(name);
    for name in [
        "panic", "links", "fstab", "nodes", "circle", "ways", "flood", "xattrs", "sparse",
        "nothing", "lines", "deep",
    ] {
        let good = fs::read_to_string(guest(name).join("good"));
        check!(
            good.is_ok_and(|text| text == "fine\n"),
            "{name}: the good file did not come back"
        );
    }
    let link = fs::read_link(guest("links").join("etc"))?;
    check!(link == maker.host(), "a link came back as {link:?}");
    let kind = |name: &str| fs::symlink_metadata(guest("nodes").join(name)).map(|m| m.file_type());
    check!(
        kind("dev/mem")?.is_char_device()
            && kind("dev/sda")?.is_block_device()
            && kind("dev/pipe")?.is_fifo()
            && kind("etc")?.is_fifo(),
        "device nodes came back as something else"
    );
    let huge = fs::metadata(guest("sparse").join("huge"))?;
    check!(
        huge.len() > 8 << 30 && huge.blocks() < 1000,
        "the huge file came back with {} blocks",
        huge.blocks()
    );
    Ok(())
}

/// Looked into by the command: nothing of the host comes out, no byte of a guest reaches a terminal as it is, and what is
/// damaged is an error.
fn looks() -> Result {
    let dir = WorkDir::new()?;
    let store = reflink_store(&dir)?;
    let maker = Maker {
        dir: &dir,
        store: store.path(),
    };
    let guests = make(&maker)?;
    let host_before = tree(&maker.host())?;
    let client = format!("allow = [\"{}/*\"]\n", store.path().display());
    let tool = Tool::new(&client)?;
    let image = |name: &str| format!("image={}", maker.path(name).display());
    let begun = Instant::now();
    let call = |words: &[&str]| -> Result<Said> {
        let said = tool.call(words)?;
        let all = said.text() + &said.err;
        let raw = all.bytes().find(|b| b.is_ascii_control() && *b != b'\n');
        check!(raw.is_none(), "{words:?}: byte {raw:?} of a guest:\n{all}");
        check!(
            !all.contains(SECRET),
            "{words:?}: read from the host:\n{all}"
        );
        Ok(said)
    };
    for (guest, _) in &guests {
        let found = call(&["inspect", &image(guest)])?;
        println!("{}{}", found.text(), found.err);
        let damaged = ["inodes", "pv", "chain"].contains(guest);
        found.is(i32::from(damaged))?;
        let listed = call(&["ls", "-l", &format!("{}:/", image(guest))])?;
        listed.is(i32::from(damaged))?;
        if !damaged {
            let good = call(&["cat", &format!("{}:/good", image(guest))])?;
            check!(good.out == b"fine\n", "{guest}: {}", good.err);
        }
    }
    tool.check_host("looks")?;
    let at = |guest: &str, path: &str| format!("{}:{path}", image(guest));
    for path in [
        "/etc/secret",
        "/boot/secret",
        "/a/b/c/secret",
        "/a/b/c/sub/secret",
        "/a/file",
        "/usr/lib/secret",
        "/rootdir/etc/secret",
        "/proc/etc/passwd",
    ] {
        call(&["cat", &at("links", path)])?.refused("GS-606")?;
        call(&["ls", "-l", &at("links", &format!("{path}/"))])?.refused("GS-606")?;
    }
    for path in ["/dev/mem", "/dev/tty", "/dev/sda", "/dev/pipe", "/etc"] {
        call(&["cat", &at("nodes", path)])?.refused("GS-606")?;
    }
    // Names are missing, and no system call says so.
    let broken = call(&["ls", "-l", &at("panic", "/broken/")])?;
    broken.is(1)?;
    check!(broken.err.contains("GS-602"), "{}", broken.err);
    let deep = format!("/{}end", format!("{}/", "d".repeat(200)).repeat(300));
    let said = call(&["cat", &at("deep", &deep)])?;
    check!(
        said.status == Some(0) && said.out.is_empty(),
        "{}",
        said.err
    );
    tool.check_host("looks")?;
    let took = begun.elapsed();
    check!(took.as_secs() < SECONDS, "it took {took:?}");
    check!(
        tree(&maker.host())? == host_before,
        "the host's files were changed"
    );
    store.close()
}

/// The most memory a process ever had, in KiB.
fn peak(pid: i32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let number = line.and_then(|l| l.split_whitespace().next()?.parse().ok());
    Ok(number.ok_or("no VmHWM")?)
}

/// Names, sizes, modes and times of changes.
fn tree(top: &Path) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let mut folders = vec![top.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let meta = entry.path().symlink_metadata()?;
            found.insert(format!(
                "{} {:o} {} {} {}.{}",
                entry.path().display(),
                meta.mode(),
                meta.uid(),
                meta.size(),
                meta.ctime(),
                meta.ctime_nsec()
            ));
            if meta.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    Ok(found)
}

/// Fails if a regular file below holds the text. Links are their target, and may.
fn look_for(text: &str, top: &Path) -> Result {
    let found = cmd::sh(&format!(
        "find '{}' -xdev -type f -size -1024k -exec grep -laF '{text}' {{}} + || true",
        top.display()
    ))?;
    check!(
        found.is_empty(),
        "content of the host came out in:\n{found}"
    );
    Ok(())
}

/// A user of the restore's target swaps folders for links to elsewhere while it is written to: nothing gets there.
fn restore_race() -> Result {
    let dir = WorkDir::new()?;
    let (target, outside) = (dir.join("target"), dir.join("outside"));
    fs::create_dir_all(target.join("d"))?;
    fs::create_dir_all(outside.join("s"))?;
    fs::write(outside.join("f"), SECRET)?;
    fs::set_permissions(outside.join("f"), fs::Permissions::from_mode(0o600))?;
    let before = tree(&dir.join("outside"))?;
    let mut attacker = std::process::Command::new("perl")
        .args(["-e", SWAPS])
        .args([&target, &outside])
        .stdin(Stdio::null())
        .spawn()?;
    let result = restore_often(&target);
    attacker.kill()?;
    attacker.wait()?;
    let (done, refused) = result.map_err(|error| error.report())?;
    let rounds = fs::read_to_string(target.join("rounds")).unwrap_or_default();
    println!("{done} restored, {refused} refused, {rounds} rounds of the attacker");
    check!(done > 100 && refused > 10, "there was no race");
    // The attacker's own hard links changed the time of the file's inode.
    let plain = |tree: BTreeSet<String>| -> BTreeSet<String> {
        let cut = |line: String| line.rsplit_once(' ').map(|(l, _)| l.to_owned());
        tree.into_iter().filter_map(cut).collect()
    };
    let after = plain(tree(&outside)?);
    check!(after == plain(before), "outside of the target: {after:?}");
    check!(
        fs::read_to_string(outside.join("f"))? == SECRET,
        "a file outside was written to"
    );
    Ok(())
}

/// Swaps folders and files of the target for links to elsewhere and back.
const SWAPS: &str = r#"
    my ($t, $o) = @ARGV; my $n = 0;
    while (1) {
        rename "$t/d", "$t/real"; symlink $o, "$t/d"; unlink "$t/d"; rename "$t/real", "$t/d";
        rename "$t/d/s", "$t/d/kept"; symlink "$o/s", "$t/d/s"; unlink "$t/d/s"; rename "$t/d/kept", "$t/d/s";
        unlink "$t/d/f"; symlink "$o/f", "$t/d/f"; link "$o/f", "$t/d/l"; unlink "$t/d/l";
        $n++;
        if ($n % 500 == 0) { open F, ">$t/rounds"; print F $n; close F; }
    }"#;

/// Restores for four seconds; how many objects were restored and refused.
fn restore_often(target: &Path) -> guestsnap::Result<(u32, u32)> {
    use guestsnap::inode::{Kind, Meta};
    use guestsnap::stream::{Replace, Request, Restorer, What};
    let path = |name: &str| format!("{}/{name}", target.display()).into_bytes();
    let meta = |mode: u32| Meta {
        mode,
        uid: 1234,
        gid: 1234,
        nlink: 1,
        size: 4,
        blocks: 8,
        ..Meta::default()
    };
    let (mut done, mut refused) = (0_u32, 0_u32);
    let mut one = |name: &str, mode: u32, what: What<'_>| {
        // A new one each time: what it knows of the target is of no help.
        let result =
            Restorer::new(Some(target.as_os_str().as_encoded_bytes())).and_then(|mut r| {
                let request = Request {
                    path: &path(name),
                    what,
                    meta: meta(mode),
                    replace: Replace::Always,
                };
                r.create(&request)?;
                if Kind::from_mode(mode) == Some(Kind::Regular) && what == What::Object {
                    r.write(b"evil")?;
                }
                r.finish()
            });
        match result {
            Ok(_) => done += 1,
            Err(_) => refused += 1,
        }
    };
    let end = Instant::now() + Duration::from_secs(4);
    while Instant::now() < end {
        one("d/f", 0o104777, What::Object);
        one("d/s/g", 0o104777, What::Object);
        one("d/s", 0o40777, What::Object);
        one("d/s/link", 0o120777, What::Symlink(b"/etc/passwd"));
        one("d/pipe", 0o10666, What::Object);
        let first = path("d/f");
        one("d/s/hard", 0o100777, What::HardLink(&first));
    }
    Ok((done, refused))
}

/// Selectors that leave the allowed folder, or try to have a command run, and their names.
fn forbidden(
    allowed: &Path,
    other: &Path,
    deep: &Path,
    mark: &Path,
) -> [(&'static str, String); 13] {
    let (a, o, m) = (allowed.display(), other.display(), mark.display());
    let d = deep.display();
    [
        ("deep", format!("image={d}/a/link/web.img")),
        ("deep-glob", format!("image={d}/**/*.img")),
        ("deep-part", format!("image={d}/a/link/w*.img")),
        ("outside", format!("image={o}/web.img")),
        ("dots", format!("image={a}/../other/web.img")),
        ("link", format!("image={a}/link/web.img")),
        ("last", format!("image={a}/web2.img")),
        ("host", "image=/etc/passwd".to_owned()),
        (
            "shell",
            format!("image='{a}/$(touch {m});`touch {m}`|touch {m}'"),
        ),
        ("path", format!("image={a}/web.img path='/$(touch {m})'")),
        ("strip", format!("image={a}/web.img strip='`touch {m}`'")),
        ("freeze", format!("image={a}/web.img freeze='touch {m}'")),
        ("file", format!("image={a}/web.img client_file={o}/x")),
    ]
}

/// Requests of a Director that was taken over: they stay inside `allow`, and nothing of them is run.
fn director() -> Result {
    let dir = WorkDir::new()?;
    let store = reflink_store(&dir)?;
    let (allowed, other) = (store.path().join("allowed"), store.path().join("other"));
    for folder in [&allowed, &other] {
        fs::create_dir(folder)?;
        let path = folder.join("web.img");
        image(&path, 16 * MIB)?;
        let disk = GuestDisk::create(&path, Table::Whole, &[Part::fs(16 * MIB, Fs::Ext4, "r")])?;
        drop(disk);
    }
    std::os::unix::fs::symlink(&other, allowed.join("link"))?;
    std::os::unix::fs::symlink(other.join("web.img"), allowed.join("web2.img"))?;
    // With `**` in `allow` the names behind a link to a folder match too.
    let deep = store.path().join("deep");
    fs::create_dir_all(deep.join("a"))?;
    std::os::unix::fs::symlink(&other, deep.join("a/link"))?;
    let mark = dir.join("mark");
    let (a, d) = (allowed.display(), deep.display());
    let lines = forbidden(&allowed, &other, &deep, &mark);
    let mut bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: lines
            .iter()
            .map(|(name, line)| {
                (
                    (*name).to_owned(),
                    fileset_plugin(&format!("guestsnap: {line}")),
                )
            })
            .collect(),
        client_file: Some(format!("allow = [\"{a}/*\", \"{d}/**\"]\n")),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let before = bacula.host_state()?;
    for (name, line) in &lines {
        let job = bacula.run_backup(name, "Full")?;
        println!("=== {line}\n{}", job.log);
        // These two are allowed guests under another name.
        let fine = ["path", "strip"].contains(name);
        check!(
            fine || job.status == 'f',
            "{line}: status {}:\n{}",
            job.status,
            job.log
        );
        check!(
            fine || job.log.contains("GS-"),
            "{line}: no code:\n{}",
            job.log
        );
        let files = bacula.list_files(job.jobid)?;
        check!(
            fine || files.is_empty(),
            "{line}: files of it are saved: {files:?}"
        );
        check!(!mark.exists(), "{line}: a command was run");
    }
    bacula.set_filesets(&[(
        "g",
        fileset_plugin(&format!("guestsnap: image={a}/web.img")),
    )])?;
    writable_client_file(&bacula)?;
    bacula.run_backup("g", "Full")?.clean()?;
    bacula.check_host_state(&before)?;
    drop(bacula);
    store.close()
}

/// A client file that others can write to counts for nothing.
fn writable_client_file(bacula: &Bacula) -> Result {
    let client_file = bacula.path().join("etc/guestsnap.toml");
    for script in ["chmod 666", "chown 1000"] {
        cmd::sh(&format!("{script} '{}'", client_file.display()))?;
        let job = bacula.run_backup("g", "Full")?;
        check!(
            job.status == 'f' && job.log.contains("GS-103"),
            "{script}: status {}:\n{}",
            job.status,
            job.log
        );
        cmd::sh(&format!(
            "chmod 644 '{0}'; chown root '{0}'",
            client_file.display()
        ))?;
    }
    Ok(())
}
