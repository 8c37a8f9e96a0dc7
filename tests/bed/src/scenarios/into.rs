//! Restores into a guest's own disks (`into`), through the real Bacula.

use crate::bacula::{Bacula, BaculaOptions, JobResult, answer, fileset_plugin};
use crate::guestdisk::{
    Content, Fs, GuestDisk, GuestLv, GuestVg, Loop, MIB, Mounted, Part, Table, image,
};
use crate::hoststate::{HostState, Scope};
use crate::inside::{Scenario, scenario};
use crate::lvm::{HostVg, lvm};
use crate::points::Points;
use crate::populate::{bytes, rich};
use crate::tree::{Ignore, Manifest};
use crate::workdir::WorkDir;
use crate::{Result, check, cmd, message, plugin_so};
use guestsnap::point::{Fault, Phase, Point};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::image::store;
use super::points::reflink_store;

/// On this machine.
pub const ROOT: &[Scenario] = &[
    scenario("root_into_image", into_image),
    scenario("root_into_btrfs", into_btrfs),
    scenario("root_into_refused", refused),
    scenario("root_into_mixed", mixed),
    scenario("root_into_no_space", no_space),
    scenario("root_into_cancel", cancel),
    scenario("root_into_points", points),
];

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("into_lvm", into_lvm).only("bookworm"),
    scenario("into_image", into_image).only("trixie").programs(),
    scenario("points_into", points_lvm).only("trixie"),
];

const ROOT_FSTAB: &str = "LABEL=root / ext4 defaults 0 1\nLABEL=var /var xfs defaults 0 2\n";

/// A guest with a root on ext4 and an XFS of its own below `/var`.
struct Web {
    disk: GuestDisk,
    point: PathBuf,
}

impl Web {
    fn new(dir: &WorkDir, path: &Path) -> Result<Web> {
        image(path, 500 * MIB)?;
        let parts = [
            Part::fs(128 * MIB, Fs::Ext4, "root"),
            Part::fs(330 * MIB, Fs::Xfs, "var"),
        ];
        let disk = GuestDisk::create(path, Table::Mbr, &parts)?;
        let point = dir.join("mnt-web");
        let web = Web { disk, point };
        let root = web.disk.mount(1, &web.point)?;
        rich(root.path(), 1, Fs::Ext4.can())?;
        std::fs::write(root.path().join("etc/fstab"), ROOT_FSTAB)?;
        cmd::sh(&format!(
            "rm -rf '{0}/var'; mkdir '{0}/var'",
            web.point.display()
        ))?;
        root.close()?;
        web.with(|root| rich(&root.join("var"), 2, Fs::Xfs.can()))?;
        Ok(web)
    }

    /// Works in the guest's whole tree.
    fn with<T>(&self, work: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        let root = self.disk.mount(1, &self.point)?;
        let var = self.disk.mount(2, &self.point.join("var"))?;
        let done = work(&self.point)?;
        var.close()?;
        root.close()?;
        Ok(done)
    }

    fn sh(&self, script: &str) -> Result<String> {
        self.with(|root| cmd::sh(&format!("set -e; cd '{}'; {script}", root.display())))
    }

    fn manifest(&self) -> Result<Manifest> {
        self.with(Manifest::of)
    }

    /// The filesystems are in order and need no replay.
    fn check_clean(&self) -> Result {
        let (root, var) = (self.disk.volume(1)?, self.disk.volume(2)?);
        cmd::run("e2fsck", ["-fn", root.device()])?;
        let head = cmd::run("dumpe2fs", ["-h", root.device()])?;
        check!(!head.contains("needs_recovery"), "{head}");
        cmd::run("xfs_repair", ["-n", var.device()])?;
        Ok(())
    }
}

/// Differences that a restore into a guest may leave: only those that Bacula itself leaves.
fn ignore() -> Ignore {
    Ignore {
        sockets: true,
        // An attribute in which XFS shows its storage of an ACL; it follows the ACL.
        xattrs: vec!["trusted.SGI_ACL_".into()],
        ..Ignore::default()
    }
}

/// A bed with one client file.
fn bed(store: &Mounted, filesets: &[(&str, &str)]) -> Result<Bacula> {
    let folder = store.path().display();
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: filesets
            .iter()
            .map(|(name, line)| ((*name).to_owned(), fileset_plugin(line)))
            .collect(),
        client_file: Some(format!(
            "allow = [\"{folder}/*\"]\n[restore]\ninto = [\"web1\", \"{folder}/free*.img\"]\n\
             [guest.web1]\ndisks = [\"{folder}/web1.img\"]\n\
             [guest.web2]\ndisks = [\"{folder}/web2.img\"]\n"
        )),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    Ok(bacula)
}

/// Starts a restore into this target; `which` are the words that mark files, `more` further answers.
fn start(
    bacula: &Bacula,
    id: u32,
    (to, into): (&str, &str),
    which: &str,
    more: &[(&str, &str)],
) -> Result<u32> {
    let words = format!("fileset=g jobid={id} where={to} replace=always select\n{which}\ndone");
    bacula.start_restore_with_options(&words, &[&[("into", into)], more].concat())
}

/// A restore that starts like this. Bacula 9.6 with SQLite loses answers of some lengths.
fn restore_to(bacula: &Bacula, id: u32, to: (&str, &str), which: &str) -> Result<JobResult> {
    let mut job = bacula.wait_job(start(bacula, id, to, which, &[])?)?;
    if job.log.contains("they did not arrive") {
        job = bacula.wait_job(start(bacula, id, to, which, &[("acl", "yes")])?)?;
    }
    println!("{}", job.log);
    Ok(job)
}

fn restore(bacula: &Bacula, id: u32, into: &str, which: &str) -> Result<JobResult> {
    restore_to(bacula, id, ("/", into), which)
}

const ALL: &str = "cd \"/@guestsnap\"\nmark web1";

/// One file and the whole guest come back into its disk; a new disk gets everything.
fn into_image() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let path = store.path().join("web1.img");
    let web = Web::new(&dir, &path)?;
    let expected = web.manifest()?;
    let bacula = bed(&store, &[("g", "guestsnap: guest=web1")])?;
    let id = bacula.run_backup("g", "Full")?.clean()?.jobid;
    let before = bacula.host_state()?;

    web.sh(
        "rm etc/passwd; echo x > home/user/big; rm -rf var/home; chmod 700 var; echo new > etc/new",
    )?;
    let job = restore(
        &bacula,
        id,
        "web1",
        "cd \"/@guestsnap/web1/etc\"\nmark passwd",
    )?
    .clean()?;
    for text in [
        "restoring into web1 (",
        "p1 ext4 /, p2 xfs /var",
        "1 files written",
        "nothing is left on this host",
    ] {
        check!(job.log.contains(text), "{text}: {}", job.log);
    }
    bacula.check_host_state(&before)?;
    web.check_clean()?;
    let state = web.sh("cat etc/passwd etc/new home/user/big; [ ! -e var/home ]")?;
    check!(
        state.starts_with("root:x:0:0:root") && state.ends_with("new\nx\n"),
        "one file: {state}"
    );

    let job = restore(&bacula, id, "web1", ALL)?.clean()?;
    check!(
        job.log.contains("of guestsnap's own left out, 0 errors"),
        "{}",
        job.log
    );
    bacula.check_host_state(&before)?;
    web.check_clean()?;
    web.sh("rm etc/new")?;
    web.sh("touch -d @0 etc; [ ! -e .guestsnap ]")?;
    let again = Ignore {
        dir_times: true,
        ..ignore()
    };
    web.manifest()?.check_equals(&expected, &again)?;

    // A new disk: nothing but a table, filesystems and an fstab.
    for (number, fs, label) in [(1, Fs::Ext4, "root"), (2, Fs::Xfs, "var")] {
        let volume: Loop = web.disk.volume(number)?;
        cmd::run("wipefs", ["-qa", volume.device()])?;
        fs.make(volume.device(), label, &[])?;
    }
    let root = web.disk.mount(1, &web.point)?;
    std::fs::create_dir(root.path().join("etc"))?;
    std::fs::write(root.path().join("etc/fstab"), ROOT_FSTAB)?;
    cmd::sh(&format!(
        "touch -d @0 '{}/etc/fstab'",
        root.path().display()
    ))?;
    root.close()?;
    restore(&bacula, id, "web1", ALL)?.clean()?;
    bacula.check_host_state(&before)?;
    web.check_clean()?;
    web.manifest()?.check_equals(&expected, &ignore())?;
    let root = web.disk.mount(1, &web.point)?;
    let mode = cmd::sh(&format!("stat -c %a:%u '{}/var'", root.path().display()))?;
    check!(mode.trim() == "755:0", "the mount point: {mode}");
    root.close()?;
    drop(bacula);
    store.close()
}

/// Subvolumes are filesystems of their own in the tree; the image is the target by its path.
fn into_btrfs() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let path = store.path().join("web1.img");
    let new = store.path().join("free1.img");
    let make = |path: &Path| -> Result<(GuestDisk, Mounted)> {
        image(path, 400 * MIB)?;
        let disk = GuestDisk::create(path, Table::Gpt, &[Part::fs(390 * MIB, Fs::Btrfs, "root")])?;
        let mounted = disk.mount(1, &dir.join("mnt"))?;
        cmd::sh(&format!(
            "cd '{}'; btrfs -q subvolume create @; btrfs -q subvolume create @home; mkdir @/etc
             echo 'LABEL=root / btrfs subvol=@ 0 0
                   LABEL=root /home btrfs subvol=@home 0 0' > @/etc/fstab; touch -d @0 @/etc/fstab",
            mounted.path().display()
        ))?;
        Ok((disk, mounted))
    };
    let (_disk, mounted) = make(&path)?;
    rich(&mounted.path().join("@"), 1, Fs::Btrfs.can())?;
    cmd::sh(&format!(
        "rm -r '{0}/@/home'; mkdir '{0}/@/home'",
        mounted.path().display()
    ))?;
    rich(&mounted.path().join("@home"), 2, Fs::Btrfs.can())?;
    let home = Manifest::of(&mounted.path().join("@home"))?;
    let root = Manifest::of(&mounted.path().join("@"))?;
    mounted.close()?;
    let bacula = bed(&store, &[("g", "guestsnap: guest=web1")])?;
    let id = bacula.run_backup("g", "Full")?.clean()?.jobid;
    let (disk, mounted) = make(&new)?;
    mounted.close()?;
    let before = bacula.host_state()?;
    let job = restore(&bacula, id, &new.display().to_string(), ALL)?.clean()?;
    check!(job.log.contains("btrfs /home"), "{}", job.log);
    bacula.check_host_state(&before)?;
    let volume = disk.volume(1)?;
    cmd::run("btrfs", ["check", "--readonly", volume.device()])?;
    drop(volume);
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    Manifest::of(&mounted.path().join("@home"))?.check_equals(&home, &ignore())?;
    // The mount point, which is in no backup.
    let ignore = Ignore {
        below: vec!["home".into()],
        ..ignore()
    };
    Manifest::of(&mounted.path().join("@"))?.check_equals(&root, &ignore)?;
    mounted.close()?;
    drop(bacula);
    store.close()
}

/// Two guests with one small filesystem each.
struct Small {
    disks: Vec<GuestDisk>,
    paths: Vec<PathBuf>,
}

impl Small {
    fn new(dir: &WorkDir, folder: &Path, size: u64) -> Result<Small> {
        let (mut disks, mut paths) = (Vec::new(), Vec::new());
        for name in ["web1", "web2"] {
            let path = folder.join(format!("{name}.img"));
            image(&path, size)?;
            let disk = GuestDisk::create(&path, Table::Whole, &[Part::fs(size, Fs::Ext4, "root")])?;
            let mounted = disk.mount(1, &dir.join("mnt"))?;
            std::fs::write(mounted.path().join("file"), format!("{name}\n"))?;
            // The Director waits a minute where a job fails that the Storage Daemon is through with.
            std::fs::write(mounted.path().join("large"), bytes(1, 20 << 20))?;
            mounted.close()?;
            disks.push(disk);
            paths.push(path);
        }
        Ok(Small { disks, paths })
    }

    /// Checks that the first guest has its own small file.
    fn check_file(&self, point: &Path) -> Result {
        let mounted = self.disks[0].mount(1, point)?;
        let file = std::fs::read(mounted.path().join("file"))?;
        check!(file == b"web1\n", "{file:?}");
        mounted.close()
    }
}

/// A target that is not allowed, in use, or no target: the job fails, and no byte of the disk changes.
fn refused() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let small = Small::new(&dir, store.path(), 64 * MIB)?;
    let path = &small.paths[0];
    let link = store.path().join("free-link.img");
    std::os::unix::fs::symlink(path, &link)?;
    let blank = store.path().join("free-blank.img");
    image(&blank, 64 * MIB)?;
    let bacula = bed(&store, &[("g", "guestsnap: guest=web1 guest=web2")])?;
    let id = bacula.run_backup("g", "Full")?.clean()?.jobid;
    let before = bacula.host_state()?;
    let digest = || cmd::run("sha256sum", &small.paths);
    let try_at = |what: &str, to: &str, into: &str, which: &str, expected: &[&str]| -> Result {
        let job = restore_to(&bacula, id, (to, into), which)?;
        for text in expected {
            check!(
                job.status == 'f' && job.log.contains(text),
                "{what}: status {}, not {text:?}:\n{}",
                job.status,
                job.log
            );
        }
        Ok(())
    };
    let link = link.display().to_string();
    let blank = blank.display().to_string();
    for (what, to, into, expected) in [
        ("not allowed", "/", "web2", &["GS-623", "web1, "][..]),
        ("no guest", "/", "*", &["GS-623"]),
        ("a link", "/", &link, &["GS-104", "symbolic link"]),
        ("a blank disk", "/", &blank, &["GS-622", "no filesystem"]),
        ("a folder", "/tmp", "web1", &["GS-607", "where=/"]),
    ] {
        try_at(what, to, into, ALL, expected)?;
        bacula.check_host_state(&before)?;
    }
    let device = Loop::attach(path, 0, None, 0)?;
    // Named by its device, where the path of its file is the same to all.
    try_at("a loop device", "/", "web1", ALL, &["GS-621"])?;
    drop(device);
    let bytes_after = digest()?;
    let mut locked = std::process::Command::new("flock")
        .args([path.as_os_str(), "sleep".as_ref(), "600".as_ref()])
        .spawn()?;
    cmd::wait_for("the lock", Duration::from_secs(10), || {
        Ok(
            cmd::run("flock", ["-n", &path.display().to_string(), "true"])
                .is_err()
                .then_some(()),
        )
    })?;
    let tried = try_at("locked", "/", "web1", ALL, &["GS-621"]);
    cmd::sh(&format!("pkill -P {} || :", locked.id()))?;
    locked.kill()?;
    locked.wait()?;
    tried?;
    bacula.check_host_state(&before)?;
    check!(digest()? == bytes_after, "a refused disk has changed");
    drop(bacula);
    store.close()
}

/// Files of a second guest end the job. The first one's are there by then.
fn mixed() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let small = Small::new(&dir, store.path(), 64 * MIB)?;
    let bacula = bed(&store, &[("g", "guestsnap: guest=web1 guest=web2")])?;
    let id = bacula.run_backup("g", "Full")?.clean()?.jobid;
    let before = bacula.host_state()?;
    let pid = bacula.fd_pid();
    let both = "cd \"/@guestsnap\"\nmark web1\nmark web2";
    let job = restore(&bacula, id, "web1", both)?;
    for text in ["GS-607", "would be mixed", "GS-625"] {
        check!(
            job.status == 'f' && job.log.contains(text),
            "not {text}: {}",
            job.log
        );
    }
    check!(
        bacula.fd_pid() == pid,
        "the daemon is another one:\n{}",
        bacula.daemon_output()
    );
    bacula.check_host_state(&before)?;
    small.check_file(&dir.join("mnt"))?;
    drop(bacula);
    store.close()
}

/// A full filesystem is an error of each file that does not fit; all others come back.
fn no_space() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let small = Small::new(&dir, store.path(), 64 * MIB)?;
    let point = dir.join("mnt");
    let bacula = bed(&store, &[("g", "guestsnap: guest=web1")])?;
    let id = bacula.run_backup("g", "Full")?.clean()?.jobid;
    let before = bacula.host_state()?;
    let mounted = small.disks[0].mount(1, &point)?;
    cmd::sh(&format!(
        "cd '{}'; rm file large; cat /dev/zero > filling 2>/dev/null || :; truncate -s -4M filling",
        mounted.path().display()
    ))?;
    mounted.close()?;
    let job = restore(&bacula, id, "web1", ALL)?;
    check!(
        job.status != 'T' || job.errors > 0,
        "a false OK: {}",
        job.log
    );
    for text in [
        "GS-603",
        "web1:/large",
        "No space left on device",
        "its disks are released",
    ] {
        check!(job.log.contains(text), "{text}: {}", job.log);
    }
    bacula.check_host_state(&before)?;
    small.check_file(&point)?;
    drop(bacula);
    store.close()
}

/// A cancel in the middle of a file: everything is released, and the job says what that means.
fn cancel() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let small = Small::new(&dir, store.path(), 300 * MIB)?;
    let point = dir.join("mnt");
    let mounted = small.disks[0].mount(1, &point)?;
    std::fs::write(mounted.path().join("large"), bytes(2, 200 << 20))?;
    mounted.close()?;
    let bacula = bed(&store, &[("g", "guestsnap: guest=web1")])?;
    let id = bacula.run_backup("g", "Full")?.clean()?.jobid;
    let before = bacula.host_state()?;
    let pid = bacula.fd_pid().ok_or("no File Daemon")?;
    let path = &small.paths[0];
    let open = || -> Result<bool> {
        let mut links = std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
        Ok(links.any(|l| std::fs::read_link(l.path()).is_ok_and(|l| l == *path)))
    };
    // A new disk, which grows with what is written.
    image(path, 300 * MIB)?;
    let disk = GuestDisk::create(path, Table::Whole, &[Part::fs(300 * MIB, Fs::Ext4, "root")])?;
    let used = || -> Result<u64> {
        Ok(std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(path)?) * 512)
    };
    let empty = used()?;
    let job = start(&bacula, id, ("/", "web1"), ALL, &[])?;
    let end = Instant::now() + Duration::from_secs(60);
    while used()? < empty + (20 << 20) {
        check!(Instant::now() < end, "nothing is written");
        std::thread::sleep(Duration::from_millis(1));
    }
    bacula.hold_sd()?;
    let took = bacula.cancel_held(job, || Ok(!open()?))?;
    check!(
        took < answer() * 4,
        "it ended {:.2} s after its cancel",
        took.as_secs_f64()
    );
    // The Director does not listen to a cancelled job: the next one says it.
    let next = bacula.run_backup("g", "Full")?.clean()?;
    check!(
        next.log.contains("GS-625"),
        "nothing says that it is half restored: {}",
        next.log
    );
    bacula.check_host_state(&before)?;
    let volume = disk.volume(1)?;
    cmd::run("e2fsck", ["-fn", volume.device()])?;
    drop(volume);
    let again = restore(&bacula, id, "web1", ALL)?.clean()?;
    check!(again.log.contains("0 errors"), "{}", again.log);
    drop(bacula);
    store.close()
}

/// Killed at every step of a restore into a guest's disk, and with every call failing.
fn points() -> Result {
    let dir = WorkDir::new()?;
    let store = reflink_store(&dir)?;
    let small = Small::new(&dir, store.path(), 64 * MIB)?;
    std::fs::remove_file(&small.paths[1])?;
    image(&small.paths[1], 140 * MIB)?;
    let parts = ["root", "data"].map(|label| Part::fs(64 * MIB, Fs::Ext4, label));
    let target = GuestDisk::create(&small.paths[1], Table::Mbr, &parts)?;
    let folder = store.path().display();
    let points = Points::new(&format!(
        "allow = ['{folder}/*']\n[restore]\ninto = ['web2']\n[guest.web2]\ndisks = ['{folder}/web2.img']\n"
    ))?;
    let work = points.working_dir().display().to_string();
    let line = format!("image={folder}/web1.img");
    // A new disk, so that mount points are made too.
    let part = dir.join("mnt");
    let mounted = small.disks[0].mount(1, &part)?;
    std::fs::create_dir(mounted.path().join("etc"))?;
    std::fs::write(
        mounted.path().join("etc/fstab"),
        "LABEL=root / ext4 defaults 0 1\n",
    )?;
    let expected = Manifest::of(mounted.path())?;
    mounted.close()?;
    let fstab = |more: &str| -> Result {
        let mounted = target.mount(1, &part)?;
        std::fs::create_dir_all(mounted.path().join("etc"))?;
        let text = format!("LABEL=root / ext4 defaults 0 1\n{more}");
        std::fs::write(mounted.path().join("etc/fstab"), text)?;
        mounted.close()
    };
    fstab("")?;
    let scope = Scope {
        fd_pid: None,
        working_dir: Some(points.working_dir()),
    };
    let into = || points.drive(&["into", &work, &line, "web2"]);
    let first = into()?;
    check!(first.is_clean(), "the first:\n{}", first.text);
    let before = HostState::capture_scope(&scope)?;
    let disk = &target;
    let check_disk = |what: &str| -> Result {
        let left = HostState::settled_diff(&before, &scope)?;
        check!(left.is_empty(), "{what}: left:\n  {}", left.join("\n  "));
        let volume = disk.volume(1)?;
        cmd::run("e2fsck", ["-fn", volume.device()])
            .map_err(|e| format!("{what}: {}", message(&e)))?;
        Ok(())
    };
    let all = Point::ALL
        .iter()
        .filter(|point| point.phase() == Phase::Into);
    for point in all {
        let what = point.name();
        if *point == Point::IntoMountPoint {
            // A mount point that is missing, until the restore brings another fstab.
            fstab("LABEL=data /gone/away ext4 defaults 0 0\n")?;
        }
        let journaled = !matches!(point, Point::IntoTaken | Point::IntoReleased);
        points.act(*point, "kill")?;
        let killed = into()?;
        points.clear()?;
        check!(
            killed.killed && points.acted(),
            "{what} was not reached:\n{}",
            killed.text
        );
        let swept = points.drive(&["sweep", &work])?;
        check!(swept.is_clean(), "{what}: sweep:\n{}", swept.text);
        let told = swept.text.contains("GS-625") && swept.text.contains("web2.img");
        check!(
            told == journaled,
            "{what}: what the sweep says:\n{}",
            swept.text
        );
        check_disk(what)?;
        if point.fault() == Fault::Error {
            points.act(*point, "error=5")?;
            let failed = into()?;
            points.clear()?;
            check!(points.acted(), "{what} was not reached:\n{}", failed.text);
            let known = failed
                .of('E')
                .iter()
                .any(|e| e.contains("GS-") && e.contains("web2"));
            check!(known, "{what} fails: a false OK:\n{}", failed.text);
            check_disk(&format!("{what} fails"))?;
        }
        let next = into()?;
        check!(next.is_clean(), "{what}: the next:\n{}", next.text);
        check_disk(what)?;
    }
    let mounted = disk.mount(1, &part)?;
    cmd::sh(&format!("rm -rf '{}/gone'", mounted.path().display()))?;
    let ignore = Ignore {
        root: true,
        ..ignore()
    };
    Manifest::of(mounted.path())?.check_equals(&expected, &ignore)?;
    mounted.close()?;
    store.close()
}

/// A guest on a logical volume, with LVM of its own.
struct OnLvm {
    disk: GuestDisk,
    group: GuestVg,
    point: PathBuf,
}

impl OnLvm {
    fn new(dir: &WorkDir, vg: &HostVg, name: &str, fstab: &str) -> Result<OnLvm> {
        let parts = [
            Part::fs(40 * MIB, Fs::Ext4, "boot"),
            Part::new(150 * MIB, Content::Pv),
        ];
        let disk = GuestDisk::create(&vg.lv(name, "200m")?, Table::Mbr, &parts)?;
        let ext4 =
            |name: &str, args: &str| GuestLv::new(name, args, Content::Fs(Fs::Ext4, name.into()));
        let lvs = [ext4("root", "-L 60m"), ext4("data", "-L 40m")];
        let group = GuestVg::create("guestvg", &[(&disk, 2)], &lvs)?;
        let point = dir.join("mnt");
        let guest = OnLvm { disk, group, point };
        guest.root(|root| {
            for folder in ["etc", "boot", "data"] {
                std::fs::create_dir(root.join(folder))?;
            }
            std::fs::write(root.join("etc/fstab"), fstab)?;
            Ok(())
        })?;
        Ok(guest)
    }

    fn root<T>(&self, work: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        self.group.with_mounted("root", Fs::Ext4, &self.point, work)
    }

    fn boot<T>(&self, work: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        let boot = self.disk.mount(1, &self.point)?;
        let done = work(boot.path())?;
        boot.close()?;
        Ok(done)
    }

    /// The trees of both, and that they are in order.
    fn state(&self) -> Result<[Manifest; 2]> {
        let check = |device: &str| cmd::run("e2fsck", ["-fn", device]).map(drop);
        self.group.with_lv("root", check)?;
        check(self.disk.volume(1)?.device())?;
        Ok([self.root(Manifest::of)?, self.boot(Manifest::of)?])
    }

    fn check(&self, expected: &[Manifest; 2]) -> Result {
        let now = self.state()?;
        for (now, expected) in now.iter().zip(expected) {
            let ignore = Ignore {
                dir_times: true,
                ..ignore()
            };
            now.check_equals(expected, &ignore)?;
        }
        Ok(())
    }
}

/// The guest `web1` on a volume, the only one that the Plugin line names, and what may be restored into.
const LVM_CLIENT: &str =
    "[restore]\ninto = ['web1', 'vg0/new*']\n[guest.web1]\ndisks = ['vg0/domu-web1']\n";

const LVM_FSTAB: &str = "/dev/mapper/guestvg-root / ext4 defaults 0 1\n\
                         LABEL=boot /boot ext4 defaults 0 2\n\
                         /dev/guestvg/data /data ext4 defaults 0 2\n";

/// Into a volume that is not active, through private maps; refused while anything has it.
fn into_lvm() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let web = OnLvm::new(&dir, &vg, "domu-web1", LVM_FSTAB)?;
    web.root(|root| rich(root, 1, Fs::Ext4.can()))?;
    web.boot(|boot| Ok(std::fs::write(boot.join("vmlinuz"), "kernel")?))?;
    let expected = web.state()?;
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![("g".into(), fileset_plugin("guestsnap: guest=web1"))],
        client_file: Some(LVM_CLIENT.into()),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let id = bacula.run_backup("g", "Full")?.clean()?.jobid;

    // A snapshot of the data inside the guest: that volume is not written to.
    web.group.run(
        "lvcreate",
        &["-s", "-n", "past", "-L", "8m", "guestvg/data"],
    )?;
    web.root(|root| {
        std::fs::remove_file(root.join("etc/passwd"))?;
        Ok(std::fs::write(root.join("home/user/big"), "x")?)
    })?;
    web.boot(|boot| Ok(std::fs::remove_file(boot.join("vmlinuz"))?))?;
    let node = vg.node("domu-web1");
    let before = bacula.host_state()?;
    let refused = |what: &str, into: &str, code: &str| -> Result {
        let job = restore(&bacula, id, into, ALL)?;
        check!(
            job.status == 'f' && job.log.contains(code),
            "{what}: {}",
            job.log
        );
        bacula.check_host_state(&before)
    };
    let mut reader = std::process::Command::new("sleep")
        .arg("600")
        .stdin(std::fs::File::open(&node)?)
        .spawn()?;
    let tried = restore(&bacula, id, "web1", ALL);
    reader.kill()?;
    reader.wait()?;
    let tried = tried?;
    check!(
        tried.status == 'f' && tried.log.contains("GS-621"),
        "open: {}",
        tried.log
    );
    vg.lvcreate(&["-s", "-n", "new-past", "-L", "8m", "vg0/domu-web1"])?;
    let with_snapshot = restore(&bacula, id, "vg0/new-past", ALL)?;
    check!(
        with_snapshot.status == 'f',
        "a snapshot: {}",
        with_snapshot.log
    );
    lvm("lvremove", &["-y", "vg0/new-past"])?;
    refused("none", "vg0/newer", "GS-201")?;

    lvm("lvchange", &["-an", "vg0/domu-web1"])?;
    let inactive = bacula.host_state()?;
    let job = restore(&bacula, id, "web1", ALL)?;
    check!(
        job.errors > 0
            && !job.log.contains("GS-604")
            && job.log.contains("GS-624")
            && job.log.contains("it has snapshots inside the guest"),
        "a volume with snapshots: {}",
        job.log
    );
    bacula.check_host_state(&inactive)?;
    lvm("lvchange", &["-ay", "vg0/domu-web1"])?;
    web.check(&expected)
}

/// Killed at its steps while it writes to another volume than the one that is saved.
fn points_lvm() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let web = OnLvm::new(&dir, &vg, "domu-web1", LVM_FSTAB)?;
    web.root(|root| rich(root, 1, Fs::Ext4.can()))?;
    web.boot(|boot| Ok(std::fs::write(boot.join("vmlinuz"), "kernel")?))?;
    let expected = web.state()?;
    let new = OnLvm::new(&dir, &vg, "new", LVM_FSTAB)?;
    let points = Points::new(LVM_CLIENT)?;
    let work = points.working_dir().display().to_string();
    let scope = Scope {
        fd_pid: None,
        working_dir: Some(points.working_dir()),
    };
    let into = || points.drive(&["into", &work, "guest=web1", "vg0/new"]);
    let first = into()?;
    check!(first.is_clean(), "the first:\n{}", first.text);
    let before = HostState::capture_scope(&scope)?;
    for point in [
        Point::IntoJournaled,
        Point::IntoOpened,
        Point::IntoUnmounted,
    ] {
        let what = point.name();
        points.act(point, "kill")?;
        let killed = into()?;
        points.clear()?;
        check!(killed.killed && points.acted(), "{what}: {}", killed.text);
        let swept = points.drive(&["sweep", &work])?;
        check!(
            swept.is_clean() && swept.text.contains("GS-625") && !swept.text.contains("left alone"),
            "{what}: sweep:\n{}",
            swept.text
        );
        let left = HostState::settled_diff(&before, &scope)?;
        check!(left.is_empty(), "{what}: left:\n  {}", left.join("\n  "));
    }
    let last = into()?;
    check!(last.is_clean(), "the last:\n{}", last.text);
    new.check(&expected)
}
