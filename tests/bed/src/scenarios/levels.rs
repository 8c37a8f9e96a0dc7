//! Levels of messages: files missing from the backup are errors of the job, other omissions are not.

use super::image::{run, store};
use crate::Result;
use crate::bacula::{Bacula, BaculaOptions, JobResult, fileset_plugin};
use crate::check;
use crate::guestdisk::{
    Content, Fs, GuestDisk, GuestLv, GuestVg, MIB, Mounted, Part, Table, image,
};
use crate::inside::{Scenario, scenario};
use crate::lvm::HostVg;
use crate::workdir::WorkDir;
use crate::{cmd, plugin_so, tool};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// On this machine.
pub const ROOT: &[Scenario] = &[
    scenario("root_levels_encrypted_root", encrypted_root),
    scenario("root_levels_failed_thaw", failed_thaw),
    scenario("root_levels_disks_without_files", disks_without_files),
    scenario("root_levels_vanished_guest", vanished_guest),
    scenario("root_levels_estimates", estimates),
];

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("levels_encrypted_root", encrypted_root)
        .only("trixie")
        .programs(),
    scenario("levels_disks_without_files", disks_without_files)
        .only("trixie")
        .programs(),
    scenario("levels_snapshot_inside", snapshot_inside).only("bookworm"),
    scenario("levels_root_and_its_snapshot", root_and_its_snapshot).only("trixie"),
    scenario("levels_clones_and_snapshots", clones_and_snapshots).only("trixie"),
    scenario("levels_vanished_guest", vanished_guest)
        .only("trixie")
        .programs(),
    scenario("levels_estimates", estimates)
        .only("trixie")
        .programs(),
];

/// The signature by which the kernel and libblkid know LUKS.
const LUKS: &[u8] = b"LUKS\xba\xbe\x00\x01";

fn write(path: &Path, bytes: &[u8], at: u64) -> Result {
    let file = std::fs::File::options().write(true).open(path)?;
    Ok(file.write_all_at(bytes, at)?)
}

fn with_guests(client_file: String, guests: &[&str]) -> Result<Bacula> {
    let filesets = guests.iter().map(|guest| {
        let line = fileset_plugin(&format!("guestsnap: guest={guest}"));
        ((*guest).to_owned(), line)
    });
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: filesets.collect(),
        client_file: Some(client_file),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    Ok(bacula)
}

/// An encrypted Linux guest, of which only /boot can be saved, is no guest that is backed up. The same volume is
/// no error where the client file says that it is not wanted.
fn encrypted_root() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let path = store.path().join("web.img");
    image(&path, 64 * MIB)?;
    let parts = [
        Part::fs(32 * MIB, Fs::Ext4, "boot"),
        Part::new(16 * MIB, Content::Empty),
    ];
    let disk = GuestDisk::create(&path, Table::Mbr, &parts)?;
    let boot = disk.mount(1, &dir.join("boot"))?;
    std::fs::write(boot.path().join("vmlinuz"), "a kernel")?;
    boot.close()?;
    write(&path, LUKS, disk.part(2)?.offset)?;
    let qcow2 = dir.join("data.qcow2");
    std::fs::write(&qcow2, b"QFI\xfb")?;
    let xl = dir.join("two.cfg");
    let definition = format!(
        "name = 'two'\ndisk = ['{},raw,xvda,w', '{},qcow2,xvdb,w', ',,hdc,cdrom']\n",
        path.display(),
        qcow2.display()
    );
    std::fs::write(&xl, definition)?;
    let guest = |name: &str, more: &str| {
        let disk = path.display();
        format!("[guest.{name}]\ndisks = ['{disk}']\n{more}\n")
    };
    let skip = "skip = ['/.guestsnap/volumes/p2']";
    let client_file = format!(
        "{}{}[guest.two]\n{skip}\n[sources]\nxl = ['{}']\n",
        guest("web", ""),
        guest("known", skip),
        xl.display()
    );
    let bacula = with_guests(client_file, &["web", "known", "two"])?;
    let job = run(&bacula, "web", "Full")?;
    check!(
        job.status == 'T' && job.errors == 1,
        "status {}, {} errors",
        job.status,
        job.errors
    );
    for text in [
        "web: p2: ERROR GS-404 a volume of the guest cannot be read: encrypted with LUKS",
        "Nothing of this volume is in this backup.",
        "Backup OK -- with warnings",
        // The guest's last line counts what was said while it was opened.
        " sent, 1 errors, ",
    ] {
        check!(job.log.contains(text), "the log does not say {text:?}");
    }
    let files = bacula.list_files(job.jobid)?;
    check!(
        files.iter().any(|f| f.ends_with("web/vmlinuz")),
        "{files:?}"
    );
    let job = run(&bacula, "known", "Full")?.clean()?;
    let text = "p2: encrypted with LUKS, and no key is given; left out by `skip`";
    check!(job.log.contains(text), "the log does not say {text:?}");
    // A disk that is not covered; the CD drive beside it does not count.
    let job = run(&bacula, "two", "Full")?;
    check!(
        job.status == 'T' && job.errors == 1 && job.log.contains("two: ERROR GS-204"),
        "status {}, {} errors",
        job.status,
        job.errors
    );
    store.close()
}

/// A thaw that fails is an error of the guest, which its last line counts.
fn failed_thaw() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let path = store.path().join("web.img");
    image(&path, 32 * MIB)?;
    let root = Part::fs(32 * MIB, Fs::Ext4, "root");
    GuestDisk::create(&path, Table::Whole, &[root])?;
    let commands = "quiesce = 'commands'\nfreeze = ['/bin/true']\nthaw = ['/bin/false']";
    let client = format!("[guest.web]\ndisks = ['{}']\n{commands}\n", path.display());
    let bacula = with_guests(client, &["web"])?;
    let job = run(&bacula, "web", "Full")?;
    check!(
        job.status == 'T' && job.errors == 1 && job.log.contains("web: GS-208"),
        "status {}, {} errors",
        job.status,
        job.errors
    );
    let text = " sent, 1 errors, ";
    check!(job.log.contains(text), "the log does not say {text:?}");
    store.close()
}

/// Volumes that a host makes beside its guests' disks, and swap, are no errors of a job that takes them by a pattern.
fn disks_without_files() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let path = |name: &str| store.path().join(format!("{name}.img"));
    image(&path("web"), 32 * MIB)?;
    GuestDisk::create(
        &path("web"),
        Table::Whole,
        &[Part::fs(32 * MIB, Fs::Ext4, "root")],
    )?;
    for name in ["swap", "seed", "efi", "tpm", "blank"] {
        image(&path(name), 4 * MIB)?;
    }
    cmd::sh(&format!("mkswap '{}'", path("swap").display()))?;
    let mut volume = [b' '; 2048];
    volume[..8].copy_from_slice(b"\x01CD001\x01\0");
    volume[40..46].copy_from_slice(b"cidata");
    write(&path("seed"), &volume, 16 * 2048)?;
    write(&path("seed"), b"\xffCD001\x01", 17 * 2048)?;
    let kind = b"\x8d\x2b\xf1\xff\x96\x76\x8b\x4c\xa9\x85\x27\x47\x07\x5b\x4f\x50";
    write(&path("efi"), kind, 16)?;
    write(&path("efi"), b"\0\0\x08\0\0\0\0\0_FVH", 32)?;
    write(&path("tpm"), b"nilmptws\x01", 0)?;
    let line = format!("guestsnap: image={}/*.img", store.path().display());
    let bacula = super::image::bacula(
        store.path(),
        plugin_so()?,
        &[
            ("all", fileset_plugin(&format!("{line} exclude=blank"))),
            ("blank", fileset_plugin(&line)),
        ],
    )?;
    let job = run(&bacula, "all", "Full")?.clean()?;
    for text in [
        "swap: its disks hold no files: disk skipped (swap space holds no files)",
        "seed: its disks hold no files: disk skipped (settings for cloud-init)",
        "efi: its disks hold no files: disk skipped (variables of EFI firmware)",
        "tpm: its disks hold no files: disk skipped (the state of an emulated TPM)",
    ] {
        check!(job.log.contains(text), "the log does not say {text:?}");
    }
    // A disk that is blank may be one that was lost.
    let job = run(&bacula, "blank", "Full")?;
    check!(
        job.errors == 1 && job.log.contains("blank: ERROR GS-406"),
        "{} errors",
        job.errors
    );
    store.close()
}

/// A snapshot that a guest made of its own volume holds nothing that is lost.
fn snapshot_inside() -> Result {
    let dir = WorkDir::new()?;
    let vg = HostVg::on_scratch("vg0")?;
    let lv = vg.lv("web", "400m")?;
    let parts = [Part::new(380 * MIB, Content::Pv)];
    let disk = GuestDisk::create(&lv, Table::Mbr, &parts)?;
    let root = GuestLv::new("root", "-L 100m", Content::Fs(Fs::Ext4, "root".into()));
    let guest = GuestVg::create("VolGroup00", &[(&disk, 1)], &[root])?;
    guest.run(
        "lvcreate",
        &["-s", "-L", "40m", "-n", "before", "VolGroup00/root"],
    )?;
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![("g".into(), fileset_plugin("guestsnap: lv=vg0/web"))],
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let job = run(&bacula, "g", "Full")?.clean()?;
    let text = "VolGroup00/before skipped (a snapshot of root inside the guest)";
    check!(job.log.contains(text), "the log does not say {text:?}");
    drop(dir);
    Ok(())
}

/// A thin snapshot of the root, made between two jobs, comes before the root by its name: the root stays the root, and of
/// the accurate chain only what the guest deleted counts as deleted.
fn root_and_its_snapshot() -> Result {
    let dir = WorkDir::new()?;
    let vg = HostVg::on_scratch("vg0")?;
    let lv = vg.lv("web", "400m")?;
    let disk = GuestDisk::create(&lv, Table::Mbr, &[Part::new(380 * MIB, Content::Pv)])?;
    let root = Content::Fs(Fs::Ext4, "root".into());
    let lvs = [
        GuestLv::pool("pool", 300),
        GuestLv::thin("root", 200, "pool", root),
    ];
    let guest = GuestVg::create("system", &[(&disk, 1)], &lvs)?;
    let point = dir.join("mnt");
    let change = |work: &dyn Fn(&Path) -> std::io::Result<()>| {
        guest.with_mounted("root", Fs::Ext4, &point, |point| Ok(work(point)?))
    };
    change(&|point| {
        std::fs::create_dir(point.join("etc"))?;
        std::fs::write(point.join("etc/fstab"), "/dev/mapper/system-root / ext4\n")?;
        std::fs::write(point.join("etc/os-release"), "ID=debian\n")?;
        std::fs::write(point.join("stays"), "x")?;
        std::fs::write(point.join("goes"), "x")
    })?;
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![("g".into(), fileset_plugin("guestsnap: lv=vg0/web"))],
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    run(&bacula, "g", "Full")?.clean()?;
    let snapshot = ["-s", "-kn", "-n", "before-update", "system/root"];
    guest.run("lvcreate", &snapshot)?;
    change(&|point| {
        std::fs::remove_file(point.join("goes"))?;
        std::fs::write(point.join("comes"), "x")
    })?;
    let job = run(&bacula, "g", "Incremental accurate=yes")?.clean()?;
    let sent = bacula.list_files(job.jobid)?;
    check!(
        sent.iter().any(|path| path.ends_with("/web/comes")),
        "what is new at the root is not sent: {sent:?}"
    );
    let stayed = sent.iter().filter(|path| path.ends_with("/web/stays"));
    check!(stayed.count() == 0, "what did not change is sent: {sent:?}");
    let deleted = bacula.deleted(job.jobid)?;
    check!(
        deleted == ["/@guestsnap/web/goes"],
        "counted as deleted: {deleted:?}"
    );
    Ok(())
}

fn expect(job: &JobResult, errors: u64, texts: &[&str]) -> Result {
    check!(
        job.status == 'T' && job.errors == errors,
        "status {}, {} errors, not {errors}:\n{}",
        job.status,
        job.errors,
        job.log
    );
    for text in texts {
        check!(
            job.log.contains(text),
            "the log does not say {text:?}:\n{}",
            job.log
        );
    }
    Ok(())
}

/// A guest whose disk is a thin volume with an origin (from a template, or after a rollback) is taken by a pattern.
/// A volume that a pattern does not take although a guest may use it is an error, until it is excluded.
fn clones_and_snapshots() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    vg.thin_pool("pool", "400m")?;
    vg.thin_lv("pool", "vm-template", "64m")?;
    let template = GuestDisk::create(
        Path::new("/dev/vg0/vm-template"),
        Table::Whole,
        &[Part::fs(64 * MIB, Fs::Ext4, "root")],
    )?;
    drop(template);
    let snapshot = |words: &[&str], of: &str| vg.lvcreate(&[&["-s"], words, &[of]].concat());
    snapshot(&["-kn", "-n", "vm-clone"], "vg0/vm-template")?;
    snapshot(&["-n", "vm-off"], "vg0/vm-template")?;
    snapshot(&["-pr", "-n", "vm-kept"], "vg0/vm-template")?;
    vg.lv("vm-thick", "64m")?;
    GuestDisk::create(
        Path::new("/dev/vg0/vm-thick"),
        Table::Whole,
        &[Part::fs(64 * MIB, Fs::Ext4, "root")],
    )?;
    snapshot(&["-L", "16m", "-n", "vm-used"], "vg0/vm-thick")?;
    let line = "guestsnap: lv=vg0/vm-*";
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![
            ("all".into(), fileset_plugin(line)),
            (
                "known".into(),
                fileset_plugin(&format!("{line} exclude=vm-off exclude=vm-used")),
            ),
        ],
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let job = run(&bacula, "all", "Full")?;
    expect(
        &job,
        2,
        &[
            "vm-off: ERROR GS-210",
            "vg0/vm-off is an inactive thin snapshot of vm-template",
            "vm-used: ERROR GS-210",
            "vg0/vm-used is a copy-on-write snapshot of vm-thick",
            "vg0/vm-kept is an inactive thin snapshot of vm-template, read-only, and was left out",
        ],
    )?;
    let files = bacula.list_files(job.jobid)?;
    for guest in ["vm-clone", "vm-template", "vm-thick"] {
        let folder = format!("/@guestsnap/{guest}/lost+found/");
        check!(files.contains(&folder), "no {folder} in {files:?}");
    }
    run(&bacula, "known", "Full")?.clean()?;
    Ok(())
}

/// A guest of the job before that a pattern does not find any more is an error in accurate jobs, and none of its files
/// counts as deleted: in the job after that neither. `exclude=` says that it is gone.
fn vanished_guest() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let lost = store.path().join("b.img");
    for name in ["a", "b"] {
        guest_of_one_file(&dir, &store, name)?;
    }
    let fileset = |more: &str| {
        let line = format!("guestsnap: image={}/*.img {more}", store.path().display());
        let plugin = format!("Plugin = \"{line}\"");
        format!(
            "Ignore FileSet Changes = yes\n Include {{\n Options {{ signature = MD5; accurate = mcs }}\n {plugin}\n }}"
        )
    };
    let mut bacula = super::image::bacula(store.path(), plugin_so()?, &[("acc", fileset(""))])?;
    let bacula_dir = bacula.fd_working_dir();
    let full = run(&bacula, "acc", "Full accurate=yes")?.clean()?;
    let status = |more: &[&str]| {
        let mut command = cmd::command(&tool()?.display().to_string());
        command.arg("--working-dir").arg(bacula_dir.clone());
        let output = command.args(["--json", "status"]).args(more).output()?;
        let value: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        Ok::<_, libtest_mimic::Failed>((output.status.code(), value))
    };
    let samples = dir.join("samples");
    monitoring_samples(&samples, &bacula_dir)?;
    all_is_well(&samples)?;
    let (code, said) = status(&["--max-age", "1"])?;
    let rows = said["result"].as_array().ok_or("no rows")?;
    let files: u64 = rows.iter().filter_map(|row| row["files"].as_u64()).sum();
    check!(
        code == Some(0)
            && rows.len() == 2
            && rows[0]["guest"] == "/@guestsnap/a"
            && rows[0]["full"] == true
            && rows[0]["errors"] == 0
            && rows[0]["age_seconds"].as_u64() < Some(600)
            && files <= full.files
            && files + 2 >= full.files,
        "{} files: {said:#}",
        full.files
    );
    std::fs::remove_file(lost)?;
    for _ in 0..2 {
        let job = run(&bacula, "acc", "Incremental accurate=yes")?;
        expect(
            &job,
            1,
            &["b: ERROR GS-211", "Nothing of b is in this backup."],
        )?;
        let deleted = bacula.deleted(job.jobid)?;
        check!(deleted.is_empty(), "recorded as deleted: {deleted:?}");
        let (code, said) = status(&[])?;
        check!(
            code == Some(1)
                && said["errors"].as_array().map(Vec::len) == Some(1)
                && said["errors"][0]["guest"] == "/@guestsnap/b"
                && said["result"][1]["absent"] == true,
            "{said:#}"
        );
        one_is_missing(&samples)?;
    }
    bacula.set_filesets(&[("acc", fileset("exclude=b"))])?;
    let job = run(&bacula, "acc", "Incremental accurate=yes")?.clean()?;
    let deleted = bacula.deleted(job.jobid)?;
    check!(
        deleted.iter().any(|name| name == "/@guestsnap/b/one"),
        "what is excluded is not recorded as deleted: {deleted:?}"
    );
    let (code, said) = status(&[])?;
    let rows = said["result"].as_array().map(Vec::len);
    check!(code == Some(0) && rows == Some(1), "{said:#}");
    let job = run(&bacula, "acc", "Incremental accurate=yes")?.clean()?;
    check!(bacula.deleted(job.jobid)?.is_empty(), "deleted twice");
    store.close()
}

fn guest_of_one_file(dir: &WorkDir, store: &Mounted, name: &str) -> Result {
    let path = store.path().join(format!("{name}.img"));
    image(&path, 32 * MIB)?;
    let part = Part::fs(32 * MIB, Fs::Ext4, "root");
    let disk = GuestDisk::create(&path, Table::Whole, &[part])?;
    let mounted = disk.mount(1, &dir.join(name))?;
    std::fs::write(mounted.path().join("one"), "1")?;
    mounted.close()
}

/// The samples for monitoring in a folder, with a `guestsnap` that knows the daemon's working directory.
fn monitoring_samples(folder: &Path, working_dir: &Path) -> Result {
    std::fs::create_dir(folder)?;
    let command = format!(
        "#!/bin/sh\nexec '{}' --working-dir '{}' \"$@\"\n",
        tool()?.display(),
        working_dir.display()
    );
    for (name, text) in [
        ("guestsnap", command.as_str()),
        (
            "check_guestsnap",
            include_str!("../../../../bacula-conf/monitoring/check_guestsnap"),
        ),
        (
            "guestsnap-metrics",
            include_str!("../../../../bacula-conf/monitoring/guestsnap-metrics"),
        ),
    ] {
        let path = folder.join(name);
        std::fs::write(&path, text)?;
        cmd::run("chmod", ["755", &path.display().to_string()])?;
    }
    Ok(())
}

/// Runs a line in the folder of the samples; what it says, and its status unless that is 0.
fn sample(samples: &Path, line: &str) -> Result<String> {
    let folder = samples.display();
    cmd::sh(&format!(
        "cd '{folder}'; PATH='{folder}':/usr/bin:/bin; {{ {line}; }} 2>&1 || echo \"status $?\""
    ))
}

fn all_is_well(samples: &Path) -> Result {
    let said = sample(samples, "./check_guestsnap 1")?;
    check!(said == "OK: 2 guests were saved\n", "{said}");
    let said = sample(samples, "./guestsnap-metrics m.prom && cat m.prom")?;
    for wanted in [
        "# TYPE guestsnap_last_save_time_seconds gauge\n",
        "guestsnap_last_save_errors{guest=\"/@guestsnap/a\",job=\"backup\"} 0\n",
        "guestsnap_absent{guest=\"/@guestsnap/b\",job=\"backup\"} 0\n",
    ] {
        check!(said.contains(wanted), "no {wanted} in\n{said}");
    }
    Ok(())
}

fn one_is_missing(samples: &Path) -> Result {
    let said = sample(samples, "./check_guestsnap 1")?;
    let first = "CRITICAL: /@guestsnap/b: the newest job has nothing of it: see that job's log\n";
    check!(
        said.starts_with(first) && said.ends_with("status 2\n"),
        "{said}"
    );
    let said = sample(samples, "./guestsnap-metrics m.prom && cat m.prom")?;
    let wanted = "guestsnap_absent{guest=\"/@guestsnap/b\",job=\"backup\"} 1\n";
    check!(said.contains(wanted), "{said}");
    Ok(())
}

/// The file entries of an estimate.
fn estimated(text: &str) -> Result<u64> {
    let rest = text.rsplit_once("files=").map(|(_, rest)| rest);
    let digits = rest.map(|rest| {
        let number = rest.chars().take_while(|c| c.is_ascii_digit() || *c == ',');
        number.filter(char::is_ascii_digit).collect::<String>()
    });
    match digits.and_then(|digits| digits.parse().ok()) {
        Some(files) => Ok(files),
        None => crate::fail!("no number in the estimate:\n{text}"),
    }
}

/// An estimate lists what the job would send, in every level and mode.
fn estimates() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let path = store.path().join("web.img");
    image(&path, 32 * MIB)?;
    let disk = GuestDisk::create(&path, Table::Whole, &[Part::fs(32 * MIB, Fs::Ext4, "root")])?;
    let change = |script: &str| -> Result {
        let mounted = disk.mount(1, &dir.join("web"))?;
        cmd::sh(&format!(
            "set -e; cd '{}'; {script}",
            mounted.path().display()
        ))?;
        mounted.close()
    };
    change(
        "for n in 1 2 3 4 5 6; do mkdir -p d$n/e; echo $n > d$n/file; ln d$n/file d$n/again; ln -s file d$n/link; done",
    )?;
    let line = format!("guestsnap: image={}/*.img", store.path().display());
    let fileset = format!(
        "Include {{\n Options {{ signature = MD5; accurate = mcs }}\n Plugin = \"{line}\"\n }}"
    );
    let bacula = super::image::bacula(store.path(), plugin_so()?, &[("g", fileset)])?;
    for level in [
        "Full",
        "Incremental",
        "Differential",
        "Full accurate=yes",
        "Incremental accurate=yes",
        "Differential accurate=yes",
    ] {
        // Times of whole seconds tell what is new.
        std::thread::sleep(std::time::Duration::from_secs(2));
        change("echo more >> d3/file; ln -sf other d4/link")?;
        let listing = bacula.estimate("g", level)?;
        let job = run(&bacula, "g", level)?.clean()?;
        // The job sends the questions for a restore too.
        let files = estimated(&listing)?;
        check!(
            files + 1 == job.files,
            "{level}: the estimate has {files} files, the job {}:\n{listing}",
            job.files
        );
    }
    store.close()
}
