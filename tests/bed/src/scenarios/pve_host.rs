//! Proxmox VE at work meanwhile: operations that hold a guest, its command `qm`, and a folder that does not answer.

use super::image::{guest_in, run, store};
use super::pve::{disk, node, put};
use super::settings::Definitions;
use crate::bacula::{Bacula, BaculaOptions, Selection, answer, fileset_plugin, has_thread};
use crate::check;
use crate::guestdisk::{Mounted, Table};
use crate::inside::{Scenario, scenario};
use crate::workdir::WorkDir;
use crate::{Result, cmd, plugin_so};
use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// On this machine.
pub const ROOT: &[Scenario] = &[
    scenario("root_pve_locks", locks),
    scenario("root_pve_quiesce", quiesce),
    scenario("root_pve_silent", silent),
];

/// Longer than anything takes here.
const PATIENCE: Duration = Duration::from_secs(60);

/// Time that the jobs of [`locks`] wait, in seconds.
const LOCK_WAIT: u64 = 8;

/// A guest's disk in the storage, with a file `hello` that holds the guest's number.
fn small(store: &Path, vmid: u32, dir: &WorkDir) -> Result {
    let volume = format!("{vmid}/vm-{vmid}-disk-0.raw");
    let mounted = disk(store, &volume, Table::Gpt)?.mount(1, &dir.join("mnt"))?;
    fs::write(mounted.path().join("hello"), vmid.to_string())?;
    mounted.close()
}

/// The node's folder with a storage, and these configurations.
fn host(home: &Definitions, store: &Path, files: &[(u32, &str)]) -> Result {
    node(home)?;
    put(
        home,
        "storage.cfg",
        &format!("dir: local\n\tpath {}\n", store.display()),
    )?;
    files.iter().try_for_each(|(vmid, text)| {
        let disk = format!("scsi0: local:{vmid}/vm-{vmid}-disk-0.raw\n");
        put(
            home,
            &format!("qemu-server/{vmid}.conf"),
            &format!("{text}{disk}"),
        )
    })
}

fn bacula(home: &Definitions, more: &str, lines: &[(&str, &str)]) -> Result<Bacula> {
    let line = |(name, text): &(&str, &str)| {
        let text = fileset_plugin(&format!("guestsnap: {text}"));
        ((*name).to_owned(), text)
    };
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: lines.iter().map(line).collect(),
        client_file: Some(format!(
            "{more}\n[sources]\npve = '{}'\n",
            home.join("").display()
        )),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    Ok(bacula)
}

/// A guest that an operation holds is waited for, but not for ever; others are saved; a cancel ends the wait.
fn locks() -> Result {
    const FREE: &str = "name: busy\n";
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    for vmid in [100, 101] {
        small(store.path(), vmid, &dir)?;
    }
    let home = Definitions::new()?;
    let held = "lock: backup\nname: busy\n";
    host(&home, store.path(), &[(100, "name: web\n"), (101, held)])?;
    let held = fs::read_to_string(home.join("qemu-server/101.conf"))?;
    let free = held.replace("lock: backup\n", "");
    check!(free.starts_with(FREE), "the lock stays");
    let client = format!("[pve]\nlock_wait = {LOCK_WAIT}\n");
    let bacula = bacula(&home, &client, &[("all", "pve=*")])?;
    let pid = bacula.fd_pid().ok_or("no File Daemon")?;
    let begin = || -> Result<u32> {
        put(&home, "qemu-server/101.conf", &held)?;
        let job = bacula.start_backup("all", "Full")?;
        cmd::wait_for("the job to begin", PATIENCE, || {
            Ok(has_thread(pid, "(guestsnap-disk)")?.then_some(()))
        })?;
        sleep(Duration::from_secs(2));
        Ok(job)
    };

    let job = begin()?;
    put(&home, "qemu-server/101.conf", &free)?;
    let job = bacula.wait_job(job)?.clean()?;
    println!("{}", job.log);
    check!(
        job.log.contains("s for operations of Proxmox VE on busy"),
        "nothing was waited for"
    );
    let files = bacula.list_files(job.jobid)?;
    for name in ["web", "busy"] {
        let path = format!("/@guestsnap/{name}/hello");
        check!(files.contains(&path), "{path} is not saved: {files:?}");
    }

    let begun = Instant::now();
    let job = begin()?;
    let job = bacula.wait_job(job)?;
    println!("{}", job.log);
    check!(
        job.status == 'T' && job.errors == 1 && job.log.contains("GS-216"),
        "status {}, {} errors",
        job.status,
        job.errors
    );
    check!(job.log.contains("lock: backup"), "the lock is not named");
    let took = begun.elapsed().as_secs();
    check!(
        (LOCK_WAIT..LOCK_WAIT + 40).contains(&took),
        "it took {took} s"
    );
    let files = bacula.list_files(job.jobid)?;
    check!(files.contains(&"/@guestsnap/web/hello".into()), "{files:?}");

    let before = bacula.host_state()?;
    let job = begin()?;
    bacula.cancel_cleanly(job, &before)?;
    drop(bacula);
    store.close()
}

/// A virtual machine that runs: a process that writes to its two disks, in turn.
struct Machine {
    child: Child,
    disks: [Option<Mounted>; 2],
}

impl Machine {
    fn start(store: &Path, state: &Path, dir: &WorkDir) -> Result<Machine> {
        let mount = |number: u32| -> Result<Mounted> {
            let disk = disk(store, &format!("100/vm-100-disk-{number}.raw"), Table::Gpt)?;
            disk.mount(1, &dir.join(format!("disk{number}")))
        };
        let disks = [mount(0)?, mount(1)?];
        let etc = disks[0].path().join("etc");
        fs::create_dir(&etc)?;
        fs::write(
            etc.join("fstab"),
            "/dev/sda1 / ext4 defaults 0 1\n/dev/sdb1 /data ext4 defaults 0 2\n",
        )?;
        fs::create_dir(disks[0].path().join("data"))?;
        let script = format!(
            "n=0; put() {{ echo $n > $1/new; mv $1/new $1/count; }}; while :; do n=$((n+1)); put {0}; put {1}; sleep 0.01; done",
            disks[0].path().display(),
            disks[1].path().display()
        );
        // A group, for `mv` is to stop too.
        let mut command = cmd::command("sh");
        let child = command.args(["-c", &script]).process_group(0).spawn()?;
        fs::write(state.join("pid"), child.id().to_string())?;
        Ok(Machine {
            child,
            disks: disks.map(Some),
        })
    }

    /// Its process is there and not stopped.
    fn runs(&self) -> Result {
        let pid = i32::try_from(self.child.id())?;
        check!(!has_thread(pid, ") T ")?, "the writer is stopped");
        check!(has_thread(pid, "(sh)")?, "the writer is gone");
        Ok(())
    }

    fn close(mut self) -> Result {
        self.end()?;
        self.disks
            .iter_mut()
            .flat_map(Option::take)
            .try_for_each(Mounted::close)
    }

    fn end(&mut self) -> Result {
        let group = Pid::from_child(&self.child);
        kill_process_group(group, Signal::KILL)?;
        self.child.wait()?;
        cmd::wait_for("the writer's end", PATIENCE, || {
            Ok(test_kill_process_group(group).is_err().then_some(()))
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Killed already if it was closed.
        let _ended = self.end();
    }
}

/// A command `qm` beside this machine's programs, for this test's processes only. It stops and continues the writer.
fn stand_in(state: &Path, disks: [&Path; 2], dir: &WorkDir) -> Result<Overlay> {
    let folder = dir.join("programs");
    fs::create_dir(&folder)?;
    let script = format!(
        "#!/bin/sh
         cd {} || exit 1
         echo \"$*\" >> calls
         case \"$*\" in
             'status 100') echo 'status: running';;
             'status '*) echo 'status: stopped';;
             'guest cmd 100 fsfreeze-freeze')
                 kill -STOP -$(cat pid) && fsfreeze -f {root} && fsfreeze -f {data} && cp {root}/count frozen && echo 2;;
             'guest cmd 100 fsfreeze-thaw')
                 cp {root}/count thawed; fsfreeze -u {data}; fsfreeze -u {root}; kill -CONT -$(cat pid);;
             'suspend 100') kill -STOP -$(cat pid) && sync -f {root} && sync -f {data} && cp {root}/count frozen;;
             'resume 100') cp {root}/count thawed; kill -CONT -$(cat pid);;
             *) echo unexpected; exit 1;;
         esac\n",
        state.display(),
        root = disks[0].display(),
        data = disks[1].display(),
    );
    let path = folder.join("qm");
    fs::write(&path, script)?;
    fs::set_permissions(&path, Permissions::from_mode(0o755))?;
    let layers = format!("lowerdir={}:/usr/sbin", folder.display());
    cmd::run(
        "mount",
        ["-t", "overlay", "bed", "-o", &layers, "/usr/sbin"],
    )?;
    Ok(Overlay)
}

/// A layer over this machine's programs.
struct Overlay;

impl Drop for Overlay {
    fn drop(&mut self) {
        if let Err(error) = cmd::run("umount", ["-l", "/usr/sbin"]) {
            eprintln!("{}", crate::message(&error));
        }
    }
}

/// The configurations of [`quiesce`].
fn machines(home: &Definitions, store: &Path) -> Result {
    let web = "agent: 1,fstrim_cloned_disks=1\nname: web\nscsi1: local:100/vm-100-disk-1.raw\n";
    let files = [
        (100, web),
        (101, "agent: enabled=1\nname: off\n"),
        (102, "name: deaf\n"),
        (103, "agent: 1,freeze-fs-on-backup=0\nname: no\n"),
    ];
    host(home, store, &files)?;
    let rootfs = "hostname: ct\nrootfs: local:104/vm-104-disk-0.raw\n";
    put(home, "lxc/104.conf", rootfs)
}

/// Jobs over a machine that runs.
struct Jobs<'a> {
    bacula: &'a Bacula,
    machine: &'a Machine,
    state: &'a Path,
    dir: &'a WorkDir,
}

impl Jobs<'_> {
    fn read(&self, name: &str) -> Result<String> {
        let text = fs::read_to_string(self.state.join(name))?;
        Ok(text.trim().to_owned())
    }

    /// A job that calls `qm` so, and saves both disks of the guest as they were while it was at rest.
    fn run(&self, fileset: &str, guest: &str, calls: &[&str], label: &str) -> Result<String> {
        let job = run(self.bacula, fileset, "Full")?;
        self.machine.runs()?;
        let made = self.read("calls")?;
        check!(made == calls.join("\n"), "qm was called so:\n{made}");
        fs::remove_file(self.state.join("calls"))?;
        let of_guest = format!("{guest}: disk ");
        let mut said = job.log.lines().filter(|line| line.contains(&of_guest));
        check!(
            said.all(|line| line.contains(label)),
            "{guest} is not {label}"
        );
        let all = self.dir.join(fileset);
        self.bacula
            .restore(job.jobid, &Selection::All, &all)?
            .clean()?;
        let frozen = self.read("frozen")?;
        check!(
            frozen == self.read("thawed")?,
            "the guest wrote while it was at rest"
        );
        let frozen: u64 = frozen.parse()?;
        for file in ["count", "data/count"] {
            let saved = fs::read_to_string(guest_in(&all, guest).join(file))?;
            let saved: u64 = saved.trim().parse()?;
            // It may have been stopped between its two disks.
            check!(
                saved == frozen || file != "count" && saved + 1 == frozen,
                "{guest}/{file} holds {saved}, and {frozen} at rest"
            );
        }
        Ok(job.log)
    }
}

/// `qm` brings a virtual machine to rest for its snapshots if its configuration allows that. One that is off, and
/// containers, have no need of it.
fn quiesce() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let state = dir.join("state");
    fs::create_dir(&state)?;
    let machine = Machine::start(store.path(), &state, &dir)?;
    let [Some(root), Some(data)] = &machine.disks else {
        return Err("no disks".into());
    };
    let overlay = stand_in(&state, [root.path(), data.path()], &dir)?;
    for vmid in [101, 102, 103, 104] {
        small(store.path(), vmid, &dir)?;
    }
    let home = Definitions::new()?;
    machines(&home, store.path())?;
    let client = "[defaults]\nquiesce = 'qm-freeze'\n[guest.web-100]\nquiesce = 'qm-suspend'\n";
    let lines = [("freeze", "pve=*"), ("suspend", "pve=100 id=yes")];
    let bacula = bacula(&home, client, &lines)?;
    let jobs = Jobs {
        bacula: &bacula,
        machine: &machine,
        state: &state,
        dir: &dir,
    };
    let calls = [
        "status 100",
        "guest cmd 100 fsfreeze-freeze",
        "guest cmd 100 fsfreeze-thaw",
        "status 101",
    ];
    let log = jobs.run("freeze", "web", &calls, "(filesystem-consistent)")?;
    let told = "deaf: its configuration does not say agent: 1";
    check!(
        log.matches("GS-207").count() == 1 && log.contains(told),
        "the guest without an agent is not told, or others are"
    );
    let calls = ["status 100", "suspend 100", "resume 100"];
    let label = "(crash-consistent, all disks at one instant)";
    jobs.run("suspend", "web-100", &calls, label)?;
    drop(bacula);
    drop(overlay);
    machine.close()?;
    store.close()
}

/// A filesystem for the node's folder, which a FUSE filesystem without an answer can cover. The daemon, in a mount
/// namespace of its own, sees both.
struct Covered {
    point: PathBuf,
    device: Option<File>,
}

impl Covered {
    fn new(point: PathBuf) -> Result<Covered> {
        // Not a bind mount: the filesystem below is shared.
        let words = ["-t", "tmpfs", "-o", "mode=755", "bed"];
        let point_word = point.display().to_string();
        cmd::run("mount", words.into_iter().chain([point_word.as_str()]))?;
        let covered = Covered {
            point,
            device: None,
        };
        cmd::run("mount", ["--make-shared", &point_word])?;
        Ok(covered)
    }

    fn cover(&mut self) -> Result {
        let device = File::options().read(true).write(true).open("/dev/fuse")?;
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            device.as_raw_fd()
        );
        let (flags, options) = (rustix::mount::MountFlags::empty(), CString::new(options)?);
        rustix::mount::mount("bed", &self.point, "fuse", flags, options.as_c_str())?;
        self.device = Some(device);
        Ok(())
    }

    /// Whoever waits for the cover gets an error, and it is gone.
    fn uncover(&mut self) -> Result {
        match self.device.take() {
            Some(_) => self.unmount(),
            None => Ok(()),
        }
    }

    fn unmount(&self) -> Result {
        cmd::run("umount", ["-l".as_ref(), self.point.as_os_str()]).map(drop)
    }
}

impl Drop for Covered {
    fn drop(&mut self) {
        for ended in [self.uncover(), self.unmount()] {
            if let Err(error) = ended {
                eprintln!("{}", crate::message(&error));
            }
        }
    }
}

/// The folder of Proxmox VE does not answer: its guests are errors, others are saved, and a cancel ends the job.
fn silent() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    for vmid in [100, 101] {
        small(store.path(), vmid, &dir)?;
    }
    let home = Definitions::new()?;
    let mut folder = Covered::new(home.join(""))?;
    host(&home, store.path(), &[(100, "name: web\n")])?;
    let client = format!("allow = ['{}/**']", store.path().display());
    let image = store.path().join("images/101/vm-101-disk-0.raw");
    let lines = format!("pve=web image={}", image.display());
    let bacula = bacula(&home, &client, &[("all", lines.as_str())])?;
    run(&bacula, "all", "Full")?.clean()?;
    let before = bacula.host_state()?;
    folder.cover()?;

    let begun = Instant::now();
    let job = bacula.start_backup("all", "Full")?;
    let job = bacula.wait_job_limit(job, Duration::from_secs(100))?;
    println!("{}", job.log);
    let took = begun.elapsed();
    check!(took < Duration::from_secs(60), "it took {took:?}");
    check!(
        job.status == 'T'
            && job.errors > 0
            && job.log.contains("GS-217")
            && job.log.contains("nothing within 10 s"),
        "status {}, {} errors",
        job.status,
        job.errors
    );
    let files = bacula.list_files(job.jobid)?;
    let other = "/@guestsnap/vm-101-disk-0/hello".to_owned();
    check!(
        files.contains(&other),
        "the other guest is not saved: {files:?}"
    );

    let pid = bacula.fd_pid().ok_or("no File Daemon")?;
    let job = bacula.start_backup("all", "Full")?;
    cmd::wait_for("the job to begin", PATIENCE, || {
        Ok(has_thread(pid, "(guestsnap-fill)")?.then_some(()))
    })?;
    sleep(Duration::from_secs(1));
    let took = bacula.cancel_timed(job)?;
    check!(took < answer(), "the cancel took {took:?}");
    bacula.wait_ended(job)?;

    folder.uncover()?;
    bacula.check_host_state(&before)?;
    run(&bacula, "all", "Full")?.clean()?;
    drop(bacula);
    drop(folder);
    store.close()
}
