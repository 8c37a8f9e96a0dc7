//! Settings of the client file: commands around the job, filesystem checks, guests that are off.

use super::image::{guest_in, ignore, run, store};
use crate::bacula::{Bacula, BaculaOptions, Selection, fileset_plugin};
use crate::check;
use crate::cmd;
use crate::guestdisk::{Fs, GuestDisk, MIB, Part, Table, dirty_copy, image};
use crate::inside::{Scenario, scenario};
use crate::populate::rich;
use crate::tree::Manifest;
use crate::workdir::{self, WorkDir};
use crate::{Result, plugin_so};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// On this machine.
pub const ROOT: &[Scenario] = &[
    scenario("root_settings_hooks", hooks),
    scenario("root_settings_fsck", fsck),
    scenario("root_settings_off", off),
    scenario("root_settings_storage_pool", storage_pool),
];

fn bacula(client_file: String, filesets: &[(&str, String)]) -> Result<Bacula> {
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: filesets
            .iter()
            .map(|(name, directive)| ((*name).to_owned(), fileset_plugin(directive)))
            .collect(),
        client_file: Some(client_file),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    Ok(bacula)
}

/// A guest of one filesystem without table, with one file.
fn small(path: &Path, fs: Fs, dir: &WorkDir) -> Result {
    image(path, 400 * MIB)?;
    let disk = GuestDisk::create(path, Table::Whole, &[Part::fs(400 * MIB, fs, "root")])?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    fs::write(mounted.path().join("hello"), "there")?;
    mounted.close()
}

/// The commands of [hooks] run before the first snapshot and when nothing is left.
fn hooks() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    small(&store.path().join("web.img"), Fs::Ext4, &dir)?;
    let directive = format!("guestsnap: image={}/web.img", store.path().display());
    let client = |before: &str, after: &str| {
        format!(
            "allow = ['{}/*']\n[hooks]\nbefore = ['/usr/bin/{before}', '{1}/before-{{job}}']\n\
             after = ['/usr/bin/{after}', '{1}/after-{{job}}']\nseconds = 20\n",
            store.path().display(),
            dir.path().display()
        )
    };
    let there = |name: &str, jobid: u32| dir.join(format!("{name}-{jobid}")).exists();

    let good = bacula(client("touch", "touch"), &[("g", directive.clone())])?;
    let job = run(&good, "g", "Full")?.clean()?;
    check!(
        there("before", job.jobid) && there("after", job.jobid),
        "a hook did not run"
    );
    drop(good);

    let bad = bacula(client("false", "touch"), &[("g", directive.clone())])?;
    let job = run(&bad, "g", "Full")?;
    check!(
        job.status == 'f' && job.log.contains("GS-209") && job.files == 0,
        "the job of a failed hook: {}\n{}",
        job.status,
        job.log
    );
    check!(
        there("after", job.jobid),
        "what the first hook began is not undone"
    );
    drop(bad);

    let late = bacula(client("touch", "false"), &[("g", directive)])?;
    let job = run(&late, "g", "Full")?;
    check!(
        job.errors > 0 && job.log.contains("GS-209") && job.files > 0,
        "a failed last hook is no error:\n{}",
        job.log
    );
    drop(late);
    store.close()
}

/// `fsck = "before"`: in order, repaired in the snapshot only, and beyond repair.
fn fsck() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let at = |name: &str| store.path().join(name);
    small(&at("good-ext4.img"), Fs::Ext4, &dir)?;
    small(&at("good-xfs.img"), Fs::Xfs, &dir)?;
    small(&at("counts.img"), Fs::Ext4, &dir)?;
    let debugfs = |path: &Path, commands: &[&str]| -> Result {
        for command in commands {
            cmd::run(
                "debugfs",
                ["-w", "-R", command, &path.display().to_string()],
            )?;
        }
        Ok(())
    };
    // Marked as damaged, with a wrong count: what e2fsck -p repairs without asking.
    debugfs(
        &at("counts.img"),
        &["ssv free_inodes_count 7", "ssv state 2"],
    )?;
    let before = cmd::run("sha256sum", [at("counts.img")])?;
    // Two files that claim one block: what it does not.
    let path = at("shared.img");
    image(&path, 64 * MIB)?;
    let disk = GuestDisk::create(&path, Table::Whole, &[Part::fs(64 * MIB, Fs::Ext3, "root")])?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    fs::write(mounted.path().join("a"), "a")?;
    fs::write(mounted.path().join("b"), "b")?;
    mounted.close()?;
    let block = cmd::run("debugfs", ["-R", "bmap /a 0", &path.display().to_string()])?;
    debugfs(
        &path,
        &[&format!("sif /b block[0] {}", block.trim()), "ssv state 2"],
    )?;

    let directive = format!("guestsnap: image={}/*.img", store.path().display());
    let client = format!(
        "allow = ['{}/*']\n[defaults]\nfsck = 'before'\n",
        store.path().display()
    );
    let bacula = bacula(client, &[("g", directive)])?;
    let job = run(&bacula, "g", "Full")?;
    let said = |guest: &str, what: &str| {
        let found = job
            .log
            .lines()
            .any(|l| l.contains(guest) && l.contains(what));
        found
            .then_some(())
            .ok_or_else(|| format!("the job log does not say {what:?} of {guest}"))
    };
    said("good-ext4", "in order")?;
    said("good-xfs", "in order")?;
    said("counts", "repaired in the snapshot")?;
    said("shared", "GS-506")?;
    check!(job.errors == 1, "{} errors", job.errors);
    let names = bacula.list_files(job.jobid)?;
    check!(names.iter().any(|n| n.ends_with("/shared/a")), "{names:?}");
    check!(
        cmd::run("sha256sum", [at("counts.img")])? == before,
        "the guest's own disk was repaired"
    );
    store.close()
}

/// `snapshot=none`: only while no process can write, and without a single write of ours.
fn off() -> Result {
    let dir = WorkDir::new()?;
    let path = dir.join("web.img");
    image(&path, 400 * MIB)?;
    let disk = GuestDisk::create(&path, Table::Mbr, &[Part::fs(380 * MIB, Fs::Ext4, "root")])?;
    // Takes a while to be sent.
    let slow = dir.join("slow.img");
    image(&slow, 400 * MIB)?;
    let big = GuestDisk::create(
        &slow,
        Table::Whole,
        &[Part::fs(400 * MIB, Fs::Ext4, "root")],
    )?;
    let mounted = big.mount(1, &dir.join("mnt"))?;
    File::create(mounted.path().join("hole"))?.set_len(300 << 30)?;
    mounted.close()?;
    // Before the guest's disk is mounted: the daemon's namespace would keep it.
    let directive = |name: &str| {
        format!(
            "guestsnap: image={}/{name}.img snapshot=none",
            dir.path().display()
        )
    };
    let client = format!("allow = ['{}/*']\n", dir.path().display());
    let bacula = bacula(
        client,
        &[
            ("web", directive("web")),
            ("crashed", directive("crashed")),
            ("slow", directive("slow")),
        ],
    )?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    rich(mounted.path(), 1, Fs::Ext4.can())?;
    let crashed = dir.join("crashed.img");
    dirty_copy(&mounted, &path, &crashed)?;
    let expected = Manifest::of(mounted.path())?;
    // It runs: its disk is open for writing.
    let job = run(&bacula, "web", "Full")?;
    check!(
        job.status == 'f' && job.log.contains("GS-311") && job.files == 0,
        "a running guest without a snapshot: {}\n{}",
        job.status,
        job.log
    );
    mounted.close()?;

    let before = cmd::run("sha256sum", [&path])?;
    let job = run(&bacula, "web", "Full")?.clean()?;
    check!(job.log.contains("the guest is off"), "{}", job.log);
    check!(
        cmd::run("sha256sum", [&path])? == before,
        "the image was written to"
    );
    let all = dir.join("all");
    bacula.restore(job.jobid, &Selection::All, &all)?.clean()?;
    Manifest::of(&guest_in(&all, "web"))?.check_equals(&expected, &ignore())?;
    fs::remove_dir_all(&all)?;

    // After a crash the journal needs a replay, which would be a write.
    let job = run(&bacula, "crashed", "Full")?;
    check!(
        job.status == 'f' && job.log.contains("GS-503") && job.log.contains("read-only"),
        "a dirty journal without a snapshot: {}\n{}",
        job.status,
        job.log
    );

    started_meanwhile(&bacula, &slow)
}

/// A guest is started while the job reads its disk.
fn started_meanwhile(bacula: &Bacula, slow: &Path) -> Result {
    let state = bacula.host_state()?;
    let job = bacula.start_backup("slow", "Full")?;
    bacula.wait_processing("slow/hole", Duration::from_secs(60))?;
    let started = File::options().write(true).open(slow)?;
    let job = bacula.wait_job(job)?;
    drop(started);
    println!("{}", job.log);
    check!(
        job.status == 'f' && job.log.contains("GS-311"),
        "a guest that was started during its backup: {}",
        job.status
    );
    bacula.check_host_state(&state)
}

/// A folder for definitions, which must lie where only root can put them: not in /tmp.
pub struct Definitions(PathBuf);

impl Definitions {
    pub fn new() -> Result<Definitions> {
        let path = Path::new("/var/lib").join(format!("{}definitions", workdir::mark()?));
        fs::create_dir(&path)?;
        Ok(Definitions(path))
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Definitions {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

/// A libvirt domain that names its disks by pool and volume: a folder's is saved, that of another kind of pool is missed.
fn storage_pool() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    small(&store.path().join("kvm1.img"), Fs::Ext4, &dir)?;
    let home = Definitions::new()?;
    let folder = store.path().display();
    let disk = |pool: &str, volume: &str, target: &str| {
        format!(
            "<disk type='volume'><source pool='{pool}' volume='{volume}'/><target dev='{target}'/></disk>"
        )
    };
    let domain = |name: &str, disks: &str| {
        format!("<domain type='kvm'><name>{name}</name><devices>{disks}</devices></domain>")
    };
    let both = disk("images", "kvm1.img", "vda") + &disk("ceph", "kvm1", "vdb");
    for (name, text) in [
        (
            "kvm1.xml",
            domain("kvm1", &disk("images", "kvm1.img", "vda")),
        ),
        ("kvm2.xml", domain("kvm2", &both)),
        (
            "pool-images.xml",
            format!(
                "<pool type='dir'><name>images</name><target><path>{folder}</path></target></pool>"
            ),
        ),
        (
            "pool-ceph.xml",
            "<pool type='rbd'><name>ceph</name></pool>".to_owned(),
        ),
    ] {
        fs::write(home.join(name), text)?;
    }
    let path = |name: &str| home.join(name).display().to_string();
    let sources = format!("[sources]\npools = ['{}']\n", path("pool-*.xml"));
    let line = |name: &str| format!("guestsnap: libvirt={}", path(name));
    let lines = [("one", line("kvm1.xml")), ("two", line("kvm2.xml"))];
    let bacula = bacula(sources, &lines)?;
    let job = run(&bacula, "one", "Full")?.clean()?;
    let all = dir.join("all");
    bacula.restore(job.jobid, &Selection::All, &all)?.clean()?;
    let hello = fs::read_to_string(guest_in(&all, "kvm1").join("hello"))?;
    check!(hello == "there", "kvm1 holds {hello}");
    let saved = guest_in(&all, "kvm1").join(".guestsnap/definition/kvm1.xml");
    check!(
        fs::read(saved)? == fs::read(home.join("kvm1.xml"))?,
        "the definition is not in the backup"
    );
    let job = run(&bacula, "two", "Full")?;
    check!(
        job.status == 'T' && job.errors == 1 && job.log.contains("the pool is of type rbd"),
        "status {}, {} errors:\n{}",
        job.status,
        job.errors,
        job.log
    );
    // Another user could name any file of the host.
    std::os::unix::fs::chown(home.join("pool-images.xml"), Some(1000), None)?;
    let job = run(&bacula, "one", "Full")?;
    check!(
        job.status == 'f' && job.log.contains("it belongs to user 1000"),
        "status {}:\n{}",
        job.status,
        job.log
    );
    drop(bacula);
    store.close()
}
