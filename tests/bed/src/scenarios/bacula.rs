//! Bacula's features known from `File =` lines, used with guests: levels in accurate mode, options of
//! FileSets, ways of restoring, estimates, verification, base jobs. Guests are image files; no
//! device-mapper is needed.

use super::image::{bacula, guest_in, ignore, run, store};
use crate::bacula::{Bacula, BaculaOptions, JobResult, Selection, fileset_plugin};
use crate::guestdisk::{Fs, GuestDisk, MIB, Mounted, Part, Table, image};
use crate::inside::{Scenario, scenario};
use crate::populate::{bytes, many, rich};
use crate::tree::{Ignore, Manifest};
use crate::workdir::WorkDir;
use crate::{Result, cmd, message, plugin_so};
use crate::{check, fail};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// This machine has 9.6.7: what depends most on the daemon's version runs with 15.0.3 too.
/// On this machine.
pub const ROOT: &[Scenario] = &[
    scenario("root_bacula_accurate", accurate),
    scenario("root_bacula_holes_under_encryption", holes_under_encryption),
    scenario(
        "root_bacula_second_name_before_the_first",
        second_name_before_the_first,
    ),
    scenario("root_bacula_restarted_job", restarted_job),
    scenario("root_bacula_additions", additions),
    scenario(
        "root_bacula_unreadable_guest_is_kept",
        unreadable_guest_is_kept,
    ),
    scenario(
        "root_bacula_unread_definition_is_kept",
        unread_definition_is_kept,
    ),
    scenario("root_bacula_lost_content", lost_content),
    scenario("root_bacula_two_lines", two_lines),
    scenario("root_bacula_fileset_options", fileset_options),
    scenario("root_bacula_encryption", encryption),
    scenario("root_bacula_restore_ways", restore_ways),
    scenario(
        "root_bacula_restore_into_bad_targets",
        restore_into_bad_targets,
    ),
    scenario("root_bacula_restore_options", restore_options),
    scenario("root_bacula_without_plugin", without_plugin),
    scenario("root_bacula_as_file", as_file),
    scenario("root_bacula_base_job", base_job),
    scenario("root_bacula_client_filters", client_filters),
];

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("bacula_accurate", accurate)
        .only("trixie")
        .programs(),
    scenario("bacula_additions", additions)
        .only("trixie")
        .programs(),
    scenario("bacula_fileset_options", fileset_options)
        .only("trixie")
        .programs(),
    scenario("bacula_encryption", encryption)
        .only("trixie")
        .programs(),
    scenario("bacula_restore_ways", restore_ways)
        .only("trixie")
        .programs(),
    scenario("bacula_restore_options", restore_options)
        .only("trixie")
        .programs(),
    scenario("bacula_as_file", as_file)
        .only("trixie")
        .programs(),
    scenario("bacula_without_plugin", without_plugin)
        .only("trixie")
        .programs(),
    scenario("bacula_base_job", base_job)
        .only("trixie")
        .programs(),
    scenario("bacula_restarted_job", restarted_job)
        .only("trixie")
        .programs(),
    scenario(
        "bacula_second_name_before_the_first",
        second_name_before_the_first,
    )
    .only("trixie")
    .programs(),
    scenario("bacula_lost_content", lost_content)
        .only("trixie")
        .programs(),
    scenario("bacula_holes_under_encryption", holes_under_encryption)
        .only("trixie")
        .programs(),
    scenario("bacula_query", query).only("trixie").programs(),
];

/// One guest: an image file in the store with an ext4 over the whole of it.
struct Guest {
    path: PathBuf,
    disk: GuestDisk,
    point: PathBuf,
}

impl Guest {
    fn new(dir: &WorkDir, store: &Mounted, name: &str, size: u64) -> Result<Self> {
        let path = store.path().join(format!("{name}.img"));
        image(&path, size)?;
        let disk = GuestDisk::create(&path, Table::Whole, &[Part::fs(size, Fs::Ext4, "root")])?;
        let point = dir.join(format!("mnt-{name}"));
        Ok(Self { path, disk, point })
    }

    /// Changes its files.
    fn with(&self, change: impl FnOnce(&Path) -> Result) -> Result {
        let mounted = self.disk.mount(1, &self.point)?;
        change(mounted.path())?;
        mounted.close()
    }

    fn sh(&self, script: &str) -> Result {
        self.with(|root| {
            cmd::sh(&format!("set -e; cd '{}'; {script}", root.display()))?;
            Ok(())
        })
    }

    fn manifest(&self) -> Result<Manifest> {
        let mut manifest = None;
        self.with(|root| {
            manifest = Some(Manifest::of(root)?);
            Ok(())
        })?;
        manifest.ok_or_else(|| "no manifest".into())
    }
}

/// A FileSet with one line and these options.
fn fileset(options: &str, directive: &str) -> String {
    format!("Include {{\n Options {{ {options} }}\n Plugin = \"{directive}\"\n }}")
}

/// Paths of a guest in a job, relative to its root; without our own folder.
fn sent(bacula: &Bacula, job: u32, guest: &str) -> Result<BTreeSet<String>> {
    let prefix = format!("/@guestsnap/{guest}/");
    Ok(bacula
        .list_files(job)?
        .iter()
        .filter_map(|name| name.strip_prefix(&prefix))
        .filter(|name| !name.starts_with(".guestsnap"))
        .map(str::to_owned)
        .collect())
}

fn check_set(what: &str, found: &BTreeSet<String>, expected: &[&str]) -> Result {
    let expected: BTreeSet<String> = expected.iter().map(|s| (*s).to_owned()).collect();
    check!(
        *found == expected,
        "{what}: {found:?}, expected {expected:?}"
    );
    Ok(())
}

/// The latest state of a FileSet: what `restore current` gives.
fn restore_current(bacula: &Bacula, fileset: &str, to: &Path) -> Result<JobResult> {
    restore_words(
        bacula,
        &format!(
            "fileset=\"{fileset}\" where=\"{}\" replace=always current select all done yes",
            to.display()
        ),
    )
}

fn restore_words(bacula: &Bacula, words: &str) -> Result<JobResult> {
    let id = bacula.queued(&format!("restore client=bed-fd restorejob=restore {words}"))?;
    bacula.wait_job(id)
}

/// Bacula with our library and these FileSets; images of the store are allowed.
fn start(store: &Mounted, filesets: &[(&str, String)]) -> Result<Bacula> {
    bacula(store.path(), plugin_so()?, filesets)
}

/// Bacula with the FileSet `g` of these guests, without options.
fn start_one(store: &Mounted, name: &str) -> Result<Bacula> {
    start(store, &[("g", fileset_plugin(&directive(store, name)))])
}

fn directive(store: &Mounted, name: &str) -> String {
    format!("guestsnap: image={}/{name}.img", store.path().display())
}

/// Every way a file can change, in an incremental of accurate mode; and what `mtimeonly` leaves out.
fn accurate() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let web = Guest::new(&dir, &store, "web", 64 * MIB)?;
    web.sh(
        "mkdir keep keep/sub moved; for f in same grow touched gone old-name type chmod ctime back; do echo $f > keep/$f; done; \
         echo x > moved/file; echo y > keep/sub/deep; ln -s a keep/link",
    )?;
    let line = directive(&store, "web");
    let bacula = start(
        &store,
        &[
            ("acc", fileset("signature = MD5; accurate = mcs", &line)),
            ("mtime", fileset("signature = MD5; mtimeonly = yes", &line)),
        ],
    )?;
    let full = run(&bacula, "acc", "Full accurate=yes")?.clean()?;
    run(&bacula, "mtime", "Full")?.clean()?;
    check!(
        sent(&bacula, full.jobid, "web")?.contains("keep/sub/deep"),
        "the full backup lacks files"
    );
    std::thread::sleep(Duration::from_secs(2));
    change_in_every_way(&web)?;
    sent_by_time(&bacula)?;
    sent_by_all_facts(&bacula)?;
    let to = dir.join("current");
    restore_current(&bacula, "acc", &to)?.clean()?;
    Manifest::of(&guest_in(&to, "web"))?.check_equals(&web.manifest()?, &ignore())?;

    // Nothing changed: nothing but our own description is sent.
    let job = run(&bacula, "acc", "Incremental accurate=yes")?.clean()?;
    check_set("nothing changed", &sent(&bacula, job.jobid, "web")?, &[])?;
    store.close()
}

/// Checks the changes that `mtimeonly` sees.
fn sent_by_time(bacula: &Bacula) -> Result {
    let mtime = run(bacula, "mtime", "Incremental")?.clean()?;
    check_set(
        "mtimeonly",
        &sent(bacula, mtime.jobid, "web")?,
        &[
            "keep/",
            "keep/grow",
            "keep/link",
            "keep/new",
            "keep/touched",
            "keep/type/",
            "",
        ],
    )
}

/// Checks the files that an accurate job sends, and those it records as deleted.
fn sent_by_all_facts(bacula: &Bacula) -> Result {
    let job = run(bacula, "acc", "Incremental accurate=yes")?.clean()?;
    check_set(
        "accurate",
        &sent(bacula, job.jobid, "web")?,
        &[
            "",
            "keep/",
            "keep/back",
            "keep/chmod",
            "keep/ctime",
            "keep/grow",
            "keep/link",
            "keep/new",
            "keep/new-name",
            "keep/touched",
            "keep/type/",
            "renamed/",
            "renamed/file",
        ],
    )?;
    let gone: BTreeSet<String> = bacula.deleted(job.jobid)?.into_iter().collect();
    check_set(
        "deleted",
        &gone,
        &[
            "/@guestsnap/web/keep/gone",
            "/@guestsnap/web/keep/old-name",
            "/@guestsnap/web/keep/type",
            "/@guestsnap/web/moved/",
            "/@guestsnap/web/moved/file",
        ],
    )
}

fn change_in_every_way(web: &Guest) -> Result {
    web.sh(
        "echo longer >> keep/grow; touch keep/touched; rm keep/gone; mv keep/old-name keep/new-name; rm keep/type; mkdir keep/type; \
         chmod 600 keep/chmod; setfattr -n user.x -v 1 keep/ctime 2>/dev/null || chown 7 keep/ctime; mv moved renamed; \
         echo BACK > keep/back; echo new > keep/new; ln -sfn b keep/link",
    )?;
    // The guest's clock was wrong: the file looks older than the full backup.
    for field in ["mtime", "ctime", "mtime_extra", "ctime_extra"] {
        let value = if field.ends_with("extra") {
            "0"
        } else {
            "@0x3b9aca00"
        };
        cmd::run(
            "debugfs",
            [
                "-w",
                "-R",
                &format!("set_inode_field /keep/back {field} {value}"),
                &web.path.display().to_string(),
            ],
        )?;
    }
    Ok(())
}

/// Incremental and differential jobs without accurate mode, with guests, disks and files that the job
/// before it does not have, however old they are.
fn additions() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let guest = |name: &str| Guest::new(&dir, &store, name, 32 * MIB);
    let (web, mail, late, data) = (
        guest("web")?,
        guest("mail")?,
        guest("late")?,
        guest("data")?,
    );
    let fstab = "LABEL=root / ext4 defaults 0 1\nLABEL=data /data ext4 nofail 0 2\n";
    web.sh("mkdir etc data; echo one > etc/one; echo two > etc/two")?;
    web.with(|path| Ok(std::fs::write(path.join("etc/fstab"), fstab)?))?;
    web.sh("mkdir var; echo x > var/old; touch var/.nobackup")?;
    [&mail, &late, &data]
        .iter()
        .try_for_each(|guest| guest.sh("mkdir etc; echo one > etc/one"))?;
    cmd::run("e2label", [data.path.display().to_string(), "data".into()])?;
    let store_path = store.path().display().to_string();
    let client = |disks: &str, more: &str| client_of_two(&store_path, disks, more);
    let one = format!("'{store_path}/web.img'");
    let both = format!("{one}, '{store_path}/data.img'");
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![(
            "g".into(),
            fileset(
                "signature = MD5",
                &format!("guestsnap: guest=web guest=mail image={store_path}/late*.img"),
            ),
        )],
        client_file: Some(client(&one, "skip = ['/etc/two']\n")),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;

    // One guest cannot be opened, one is not there yet.
    let (saved, away) = (dir.join("mail.saved"), late.path.with_extension("away"));
    std::fs::copy(&mail.path, &saved)?;
    std::fs::rename(&late.path, &away)?;
    no_superblock(&mail)?;
    let full = run(&bacula, "g", "Full")?;
    check!(full.errors > 0, "a guest that cannot be opened is no error");
    check_set("full", &sent(&bacula, full.jobid, "web")?, &WEB)?;
    std::thread::sleep(Duration::from_secs(2));
    std::fs::copy(&saved, &mail.path)?;
    std::fs::copy(&away, &late.path)?;
    whole_guests_more(&bacula)?;

    // A disk more, with old files; and another rule for what is left out.
    let client_file = bacula.path().join("etc/guestsnap.toml");
    std::fs::write(&client_file, client(&both, "skip = ['/etc/two']\n"))?;
    a_disk_more(&bacula)?;
    // A directory lost its mark.
    web.sh("rm var/.nobackup")?;
    sends(&bacula, "Incremental", [&["var/", "var/old"], &[], &[]])?;
    let listing = bacula.estimate("g", "Incremental")?;
    check!(
        !listing.contains("etc/one"),
        "an estimate lists more than is sent:\n{listing}"
    );
    std::fs::write(&client_file, client(&both, ""))?;
    let job = run(&bacula, "g", "Incremental")?.clean()?;
    check!(
        sent(&bacula, job.jobid, "web")?.contains("etc/two"),
        "what is no longer left out is not saved"
    );
    let to = dir.join("current");
    restore_current(&bacula, "g", &to)?.clean()?;
    for (guest, expected) in [("mail", mail.manifest()?), ("late", late.manifest()?)] {
        Manifest::of(&guest_in(&to, guest))?.check_equals(&expected, &ignore())?;
    }
    check!(
        guest_in(&to, "web").join("data/etc/one").exists(),
        "the new disk is not restored"
    );
    store.close()
}

/// Overwrites the start of a guest's disk: it cannot be opened any more.
fn no_superblock(guest: &Guest) -> Result {
    let path = guest.path.display();
    let zeros = format!("dd if=/dev/zero of='{path}' bs=64k count=1 conv=notrunc");
    cmd::sh(&zeros).map(drop)
}

/// Files of `web` in a full job of [`additions`], and of another guest that a job saves whole.
const WEB: [&str; 6] = ["", "data/", "etc/", "etc/fstab", "etc/one", "lost+found/"];
const WHOLE: [&str; 4] = ["", "etc/", "etc/one", "lost+found/"];

fn client_of_two(store: &str, disks: &str, more: &str) -> String {
    format!(
        "allow = ['{store}/*']\ndefaults.skip_dirs_containing = ['.nobackup']\n[guest.web]\ndisks = [{disks}]\n{more}\
         [guest.mail]\ndisks = ['{store}/mail.img']\n"
    )
}

/// A clean job that sends just these files of `web`, `mail` and `late`.
fn sends(bacula: &Bacula, level: &str, expected: [&[&str]; 3]) -> Result<JobResult> {
    let job = run(bacula, "g", level)?.clean()?;
    for (guest, expected) in ["web", "mail", "late"].into_iter().zip(expected) {
        check_set(
            &format!("{level} of {guest}, job {}", job.jobid),
            &sent(bacula, job.jobid, guest)?,
            expected,
        )?;
    }
    Ok(job)
}

/// The two guests that the full job does not have are saved whole, once.
fn whole_guests_more(bacula: &Bacula) -> Result {
    let job = sends(bacula, "Incremental", [&[], &WHOLE, &WHOLE])?;
    for text in ["mail: saved whole", "late: saved whole"] {
        check!(job.log.contains(text), "no word of {text:?}:\n{}", job.log);
    }
    check!(
        !job.log.contains("web: saved whole"),
        "more is saved than is needed:\n{}",
        job.log
    );
    sends(bacula, "Incremental", [&[], &[], &[]])?;
    sends(bacula, "Differential", [&[], &WHOLE, &WHOLE]).map(drop)
}

/// The files of the new disk are sent, once.
fn a_disk_more(bacula: &Bacula) -> Result {
    let new = ["data/", "data/etc/", "data/etc/one", "data/lost+found/"];
    let job = sends(bacula, "Incremental", [&new, &[], &[]])?;
    check!(
        job.log.contains("has not read them: /@guestsnap/web/data/"),
        "no word of the new disk:\n{}",
        job.log
    );
    sends(bacula, "Incremental", [&[], &[], &[]]).map(drop)
}

/// Unreadable objects are not recorded as deleted.
fn unreadable_guest_is_kept() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let (a, b) = (
        Guest::new(&dir, &store, "a", 32 * MIB)?,
        Guest::new(&dir, &store, "b", 32 * MIB)?,
    );
    for guest in [&a, &b] {
        guest.sh("mkdir etc; echo one > etc/one; echo two > etc/two")?;
    }
    let expected = b.manifest()?;
    let bacula = start(
        &store,
        &[
            (
                "acc",
                fileset("signature = MD5; accurate = mcs", &directive(&store, "*")),
            ),
            (
                "two",
                fileset(
                    "signature = MD5; accurate = mcs",
                    &format!("{} image={}", directive(&store, "a"), b.path.display()),
                ),
            ),
        ],
    )?;
    run(&bacula, "acc", "Full accurate=yes")?.clean()?;
    run(&bacula, "two", "Full accurate=yes")?.clean()?;
    std::thread::sleep(Duration::from_secs(2));
    a.sh("rm etc/one; echo three > etc/three")?;
    let saved = dir.join("b.saved");
    std::fs::copy(&b.path, &saved)?;
    no_superblock(&b)?;
    let job = run(&bacula, "acc", "Incremental accurate=yes")?;
    check!(
        job.errors > 0 && job.log.contains("b: ERROR GS-"),
        "a guest without a filesystem is no error:\n{}",
        job.log
    );
    check!(
        bacula.deleted(job.jobid)? == ["/@guestsnap/a/etc/one"],
        "recorded as deleted: {:?}",
        bacula.deleted(job.jobid)?
    );
    let to = dir.join("current");
    restore_current(&bacula, "acc", &to)?.clean()?;
    Manifest::of(&guest_in(&to, "b"))?.check_equals(&expected, &ignore())?;
    check!(
        !guest_in(&to, "a").join("etc/one").exists()
            && guest_in(&to, "a").join("etc/three").exists(),
        "the other guest's state is not the latest"
    );
    std::fs::copy(&saved, &b.path)?;
    let job = run(&bacula, "acc", "Incremental accurate=yes")?.clean()?;
    check_set("the guest is back", &sent(&bacula, job.jobid, "b")?, &[])?;
    check!(
        bacula.deleted(job.jobid)?.is_empty(),
        "something is recorded as deleted"
    );
    nothing_selected(&bacula, &b)?;
    let to = dir.join("two");
    restore_current(&bacula, "two", &to)?.clean()?;
    Manifest::of(&guest_in(&to, "b"))?.check_equals(&expected, &ignore())?;
    store.close()
}

/// One of two selectors finds nothing: its guest is not there, so the owner of those files is unknown.
fn nothing_selected(bacula: &Bacula, guest: &Guest) -> Result {
    std::fs::rename(&guest.path, guest.path.with_extension("away"))?;
    let job = run(bacula, "two", "Incremental accurate=yes")?;
    check!(
        job.errors > 0 && job.log.contains("GS-201"),
        "a selector that finds nothing is no error:\n{}",
        job.log
    );
    check!(
        bacula.deleted(job.jobid)?.is_empty(),
        "recorded as deleted: {:?}",
        bacula.deleted(job.jobid)?
    );
    Ok(())
}

/// A definition that cannot be read may be of a guest that the line means: that is an error, and nothing of the
/// line's guests counts as deleted.
fn unread_definition_is_kept() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let define = |file: &str, text: &str| std::fs::write(dir.join(file), text);
    for name in ["a", "b"] {
        let guest = Guest::new(&dir, &store, name, 32 * MIB)?;
        guest.sh("mkdir etc; echo one > etc/one")?;
        let disk = guest.path.display();
        let text = format!("name = '{name}'\ndisk = ['{disk},raw,xvda,w']\n");
        define(&format!("of-{name}.cfg"), &text)?;
    }
    let of = |line: &str| {
        let text = fileset("signature = MD5; accurate = mcs", line);
        format!("Ignore FileSet Changes = yes\n {text}")
    };
    let mut bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![("acc".into(), of("guestsnap: guest=[ab]"))],
        client_file: Some(format!(
            "[sources]\nxl = ['{}/of-*.cfg']\n",
            dir.path().display()
        )),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    run(&bacula, "acc", "Full accurate=yes")?.clean()?;
    define("of-b.cfg", "import os\n")?;
    let job = run(&bacula, "acc", "Incremental accurate=yes")?;
    check!(
        job.status == 'T'
            && job.errors == 2
            && job.log.contains("guestsnap: ERROR GS-202")
            && job.log.contains("b: ERROR GS-211"),
        "status {}, {} errors:\n{}",
        job.status,
        job.errors,
        job.log
    );
    check!(
        bacula.deleted(job.jobid)?.is_empty(),
        "recorded as deleted: {:?}",
        bacula.deleted(job.jobid)?
    );
    std::fs::remove_file(dir.join("of-b.cfg"))?;
    let job = run(&bacula, "acc", "Incremental accurate=yes")?;
    check!(
        job.errors == 1 && job.log.contains("GS-211") && bacula.deleted(job.jobid)?.is_empty(),
        "a guest that vanished: status {}\n{}",
        job.status,
        job.log
    );
    bacula.set_filesets(&[("acc", of("guestsnap: guest=[ab] exclude=b"))])?;
    let job = run(&bacula, "acc", "Incremental accurate=yes")?.clean()?;
    check!(
        bacula
            .deleted(job.jobid)?
            .iter()
            .any(|name| name == "/@guestsnap/b/etc/one"),
        "a guest that is gone is not recorded as deleted"
    );
    store.close()
}

/// A guest's second disk loses its partition table, then a superblock, then holds unknown bytes: each is
/// told, and nothing that was saved of it counts as deleted.
fn lost_content() -> Result {
    use std::os::unix::fs::FileExt;
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let (root, disk) = guest_on_two_disks(&dir, &store)?;
    let path = &disk.path;
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![(
            "acc".into(),
            fileset("signature = MD5; accurate = mcs", "guestsnap: guest=web"),
        )],
        client_file: Some(format!(
            "[guest.web]\ndisks = ['{0}/a.img', '{0}/b.img']\nskip = ['/skipped']\n",
            store.path().display()
        )),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    // Nothing of all that the fstab names besides is missed.
    let full = run(&bacula, "acc", "Full accurate=yes")?.clean()?;
    check!(
        sent(&bacula, full.jobid, "web")?.contains("data/sub/file"),
        "the second disk is not in the backup"
    );
    let saved = dir.join("b.saved");
    std::fs::copy(path, &saved)?;
    std::thread::sleep(Duration::from_secs(2));
    root.sh("rm etc/one")?;
    let write = |bytes: &[u8], at: u64| -> Result {
        let file = std::fs::File::options().write(true).open(path)?;
        Ok(file.write_all_at(bytes, at)?)
    };
    let lossy = |what: &str, texts: &[&str]| -> Result {
        told_and_kept(&bacula, texts).map_err(|e| format!("{what}: {}", message(&e)))?;
        std::fs::copy(&saved, path)?;
        Ok(())
    };
    // The first partition starts far beyond the end.
    write(&0x4000_0000_u32.to_le_bytes(), 446 + 8)?;
    lossy(
        "the table",
        &[
            "web: disk2: ERROR GS-402",
            "p1 starts beyond the end of the disk",
            "web: ERROR GS-507",
            "/data (LABEL=data)",
        ],
    )?;
    write(&vec![0; 4096], disk.part(1)?.offset)?;
    lossy(
        "the superblock",
        &["disk2p1: ERROR GS-404", "web: ERROR GS-507"],
    )?;
    write(b"a database of its own", disk.part(2)?.offset + 8192)?;
    lossy(
        "the raw volume",
        &["disk2p2: ERROR GS-404", "no known content, but not blank"],
    )?;
    write(b"LUKS\xba\xbe\x00\x01", disk.part(2)?.offset)?;
    lossy(
        "the encrypted volume",
        &[
            "disk2p2: ERROR GS-404",
            "encrypted with LUKS, and no key is given",
            "Nothing of this volume is in this backup",
        ],
    )?;
    let job = run(&bacula, "acc", "Incremental accurate=yes")?.clean()?;
    check!(
        bacula.deleted(job.jobid)? == ["/@guestsnap/web/etc/one"],
        "recorded as deleted when all is well: {:?}",
        bacula.deleted(job.jobid)?
    );
    store.close()
}

/// A job with errors that its log names; nothing of the guest counts as deleted.
fn told_and_kept(bacula: &Bacula, texts: &[&str]) -> Result {
    let job = run(bacula, "acc", "Incremental accurate=yes")?;
    check!(
        job.status != 'f' && job.errors > 0,
        "status {}, {} errors",
        job.status,
        job.errors
    );
    for text in texts {
        check!(job.log.contains(text), "the log does not say {text:?}");
    }
    let deleted = bacula.deleted(job.jobid)?;
    check!(deleted.is_empty(), "recorded as deleted: {deleted:?}");
    Ok(())
}

/// A root whose fstab names all kinds of filesystems, and another disk with data and an empty partition.
fn guest_on_two_disks(dir: &WorkDir, store: &Mounted) -> Result<(Guest, GuestDisk)> {
    let root = Guest::new(dir, store, "a", 32 * MIB)?;
    let fstab = "LABEL=root / ext4 defaults 0 1\nLABEL=data /data ext4 defaults 0 2\n\
        LABEL=usb /media/usb vfat nofail\n/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0\n/dev/fd0 /media/floppy auto rw\n\
        nas:/export /nfs nfs rw\nnas:/export /auto auto rw\ntmpfs /tmp tmpfs rw\n/data/sub /sub none bind\n\
        /dev/sdb2 none swap sw\nLABEL=skipped /skipped ext4 defaults\n";
    root.sh("mkdir etc data; echo one > etc/one; echo two > etc/two")?;
    root.with(|path| Ok(std::fs::write(path.join("etc/fstab"), fstab)?))?;
    let path = store.path().join("b.img");
    image(&path, 64 * MIB)?;
    let parts = [
        Part::fs(32 * MIB, Fs::Ext4, "data"),
        Part::new(16 * MIB, crate::guestdisk::Content::Empty),
    ];
    let disk = GuestDisk::create(&path, Table::Mbr, &parts)?;
    let mounted = disk.mount(1, &dir.join("mnt-b"))?;
    cmd::sh(&format!(
        "cd '{}'; mkdir sub; echo x > sub/file",
        mounted.path().display()
    ))?;
    mounted.close()?;
    Ok((root, disk))
}

/// Two Plugin lines that would put two guests into one folder of the catalog, and two that select the same one.
fn two_lines() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    for folder in ["a", "b"] {
        std::fs::create_dir(store.path().join(folder))?;
        let guest = Guest::new(&dir, &store, &format!("{folder}/web"), 32 * MIB)?;
        guest.sh(&format!("echo {folder} > {folder}"))?;
    }
    let lines = |names: [&str; 2]| {
        let lines = names.map(|name| format!("Plugin = \"{}\"\n", directive(&store, name)));
        format!(
            "Include {{\n Options {{ signature = MD5 }}\n {} }}",
            lines.concat()
        )
    };
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![
            ("two".into(), lines(["a/web", "b/web"])),
            ("same".into(), lines(["a/web", "a/w*"])),
        ],
        client_file: Some(format!("allow = ['{}/**']\n", store.path().display())),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let job = run(&bacula, "two", "Full")?;
    check!(
        job.errors > 0 && job.log.contains("web: ERROR GS-205"),
        "two guests in one folder are no error"
    );
    let files = sent(&bacula, job.jobid, "web")?;
    check!(
        files.contains("a") && !files.contains("b"),
        "two guests are one tree: {files:?}"
    );
    let job = run(&bacula, "same", "Full")?.clean()?;
    check!(
        job.log.contains("saved by another Plugin line already"),
        "nothing about the second line"
    );
    let times = bacula.list_files(job.jobid)?;
    let times = times.iter().filter(|name| *name == "/@guestsnap/web/a");
    check!(times.count() == 1, "the guest was not saved once");
    store.close()
}

/// Name of the FileSet, length of its digests, the options.
const OPTIONS: [(&str, u64, &str); 5] = [
    ("md5", 22, "signature = MD5; compression = GZIP1"),
    (
        "sha1",
        27,
        "signature = SHA1; compression = LZO; sparse = yes",
    ),
    ("sha256", 43, "signature = SHA256; sparse = yes"),
    (
        "sha512",
        86,
        "signature = SHA512; compression = GZIP9; sparse = yes",
    ),
    ("zstd", 22, "signature = MD5; compression = ZSTD"),
];

/// Digests and compressions, each with its length in the catalog and the same tree restored; filters in
/// several blocks of several kinds.
fn fileset_options() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let web = Guest::new(&dir, &store, "web", 96 * MIB)?;
    web.with(|root| {
        rich(root, 3, Fs::Ext4.can())?;
        std::fs::write(root.join("home/text"), "much of the same\n".repeat(100_000))?;
        Ok(())
    })?;
    let small = Guest::new(&dir, &store, "small", 32 * MIB)?;
    small.sh(
        "mkdir -p a/cache b/cache c; for f in a/x.log a/x.txt a/cache/y b/Z.TMP b/cache/y c/core.12 c/core.x c/keep; do echo $f > $f; done",
    )?;
    let expected = web.manifest()?;
    let line = directive(&store, "web");
    let mut filesets: Vec<_> = OPTIONS
        .iter()
        .map(|(name, _, options)| (*name, fileset(options, &line)))
        .collect();
    let ordinary = dir.join("nothing-here");
    filesets.push(("filters", filters(&directive(&store, "small"), &ordinary)));
    std::fs::write(&ordinary, "an ordinary file")?;
    // A Director older than ZSTD refuses its name.
    let zstd = filesets
        .iter()
        .position(|f| f.0 == "zstd")
        .map(|at| filesets.remove(at));
    let mut bacula = bacula(store.path(), plugin_so()?, &filesets)?;
    let (name, text) = zstd.ok_or("no ZSTD")?;
    let knows_zstd = bacula.parses(&text)?;
    if knows_zstd {
        bacula.set_filesets(&[(name, text)])?;
    }

    let text = dir.join("text");
    std::fs::write(&text, "much of the same\n".repeat(100_000))?;
    let mut problems = String::new();
    for (name, length, options) in OPTIONS {
        if name == "zstd" && !knows_zstd {
            continue;
        }
        // A daemon may be built without LZO or ZSTD, and then sends all uncompressed: what File= names too.
        let file = format!(
            "Include {{\n Options {{ {options} }}\n File = \"{}\"\n }}",
            text.display()
        );
        bacula.set_filesets(&[("file", file)])?;
        let wanted = compressed(&bacula.run_backup("file", "Full")?.clean()?);
        if wanted != options.contains("compression")
            && !options.contains("ZSTD")
            && !options.contains("LZO")
        {
            problems += &format!("{options}: a file of the host is compressed: {wanted}\n");
        }
        let job = run(&bacula, name, "Full")?.clean()?;
        let rows = bacula.sql(&format!(
            "select distinct length(MD5) as L from File where JobId={} and length(MD5) > 1",
            job.jobid
        ))?;
        if rows.len() != 1 || rows[0]["L"].as_u64() != Some(length) {
            problems += &format!("{options}: lengths of digests {rows:?}, expected {length}\n");
        }
        if compressed(&job) != wanted {
            problems += &format!(
                "{options}: compression is not what was asked for:\n{}\n",
                job.log
            );
        }
        let to = dir.join(name);
        bacula.restore(job.jobid, &Selection::All, &to)?.clean()?;
        if let Err(error) = Manifest::of(&guest_in(&to, "web"))?.check_equals(&expected, &ignore())
        {
            problems += &format!("{options}: {}\n", message(&error));
        }
        std::fs::remove_dir_all(&to)?;
    }
    check!(problems.is_empty(), "{problems}");
    filtered(&bacula)?;
    store.close()
}

fn compressed(job: &JobResult) -> bool {
    let mut lines = job.log.lines();
    !lines.any(|l| l.contains("Software Compression") && l.contains("None"))
}

/// Options blocks that choose and leave out, and a part of the FileSet that is not ours.
fn filters(directive: &str, ordinary: &Path) -> String {
    format!(
        "Include {{\n Options {{ wilddir = \"*/b/cache\"; exclude = yes }}\n \
             Options {{ signature = SHA1; wildfile = \"*.log\" }}\n \
             Options {{ regexfile = \"^.*/core\\\\.[0-9]+$\"; exclude = yes }}\n \
             Options {{ ignorecase = yes; wild = \"*.tmp\"; exclude = yes }}\n Options {{ signature = MD5 }}\n Plugin = \"{}\"\n }}\n \
             Include {{\n Options {{ signature = MD5 }}\n File = \"{}\"\n }}\n Exclude {{ File = \"/@guestsnap/small/a/cache\" }}",
        directive,
        ordinary.display()
    )
}

/// Paths that the job of these filters has sent.
fn filtered(bacula: &Bacula) -> Result {
    let job = run(bacula, "filters", "Full")?.clean()?;
    check_set(
        "filters",
        &sent(bacula, job.jobid, "small")?,
        &[
            "",
            "a/",
            "a/x.log",
            "a/x.txt",
            "b/",
            "c/",
            "c/core.x",
            "c/keep",
            "lost+found/",
        ],
    )?;
    let rows = bacula.sql(&format!(
        "select length(MD5) as L, count(*) as N from File where JobId={} and length(MD5) > 1 group by length(MD5)",
        job.jobid
    ))?;
    check!(
        rows.iter()
            .any(|r| r["L"].as_u64() == Some(27) && r["N"].as_u64() == Some(1)),
        "only the *.log file has the digest of its own Options block: {rows:?}"
    );
    Ok(())
}

/// Encrypted with the client's key: nothing readable on the volumes, restored with the key, refused with
/// another one.
fn encryption() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let web = Guest::new(&dir, &store, "web", 96 * MIB)?;
    let secret = "only the owner of the key may read this line";
    web.with(|root| {
        rich(root, 4, Fs::Ext4.can())?;
        std::fs::write(root.join("home/secret"), secret.repeat(100))?;
        Ok(())
    })?;
    let expected = web.manifest()?;
    for name in ["right", "wrong"] {
        let path = dir.join(name);
        let path = path.display();
        cmd::sh(&format!(
            "openssl req -new -x509 -newkey rsa:2048 -nodes -days 10 -subj /CN={name} -keyout '{path}.key' -out '{path}.crt' 2>/dev/null && \
             cat '{path}.key' '{path}.crt' > '{path}.pem'"
        ))?;
    }
    let used = dir.join("used.pem");
    std::fs::copy(dir.join("right.pem"), &used)?;
    let mut bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![(
            "g".into(),
            fileset("signature = SHA1", &directive(&store, "web")),
        )],
        client_file: Some(format!("allow = [\"{}/*\"]\n", store.path().display())),
        fd_conf: format!(
            "PKI Signatures = Yes\n  PKI Encryption = Yes\n  PKI Keypair = \"{}\"",
            used.display()
        ),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let job = run(&bacula, "g", "Full")?.clean()?;
    let found = cmd::sh(&format!(
        "grep -c '{secret}' '{}'/* || true",
        bacula.path().join("volumes").display()
    ))?;
    check!(
        found.lines().all(|l| l.ends_with(":0") || l == "0"),
        "the text is readable on a volume: {found}"
    );
    let to = dir.join("right-key");
    bacula.restore(job.jobid, &Selection::All, &to)?.clean()?;
    Manifest::of(&guest_in(&to, "web"))?.check_equals(&expected, &ignore())?;

    std::fs::copy(dir.join("wrong.pem"), &used)?;
    bacula.restart_fd()?;
    let to = dir.join("wrong-key");
    let path = "/@guestsnap/web/home/secret";
    let refused = bacula.restore(job.jobid, &Selection::Files(vec![path.into()]), &to)?;
    println!("{}", refused.log);
    check!(
        !refused.is_clean(),
        "a restore with another key looks clean:\n{}",
        refused.log
    );
    let text = std::fs::read(guest_in(&to, "web").join("home/secret")).unwrap_or_default();
    check!(
        !String::from_utf8_lossy(&text).contains(secret),
        "another key opened the file"
    );
    store.close()
}

/// Where, RegexWhere, prefixes, the four ways to replace, prefixed links, a hard link's second name.
fn restore_ways() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let web = Guest::new(&dir, &store, "web", 96 * MIB)?;
    web.with(|root| {
        rich(root, 5, Fs::Ext4.can())?;
        cmd::sh(&format!(
            "cd '{}' && mkdir locked && echo in > locked/file && chmod 555 locked && touch -d 2020-01-01 locked etc/hostname",
            root.display()
        ))?;
        Ok(())
    })?;
    let expected = web.manifest()?;
    let bacula = start_one(&store, "web")?;
    let id = run(&bacula, "g", "Full")?.clean()?.jobid;

    to_other_places(&bacula, id, &dir, &expected)?;
    over_older_and_newer(&bacula, id, &dir)?;
    names_of_one_file(&bacula, id, &dir.join("second"))?;
    with_prefix_links(&bacula, id, &dir.join("links"))?;
    twice_at_a_time(&bacula, id, &dir, &expected)?;
    store.close()
}

/// With RegexWhere, StripPrefix and AddPrefix.
fn to_other_places(bacula: &Bacula, id: u32, dir: &WorkDir, expected: &Manifest) -> Result {
    let to = dir.join("regex");
    restore_words(
        bacula,
        &format!(
            "fileset=g jobid={id} regexwhere=\"!^/@guestsnap/web!{}!\" replace=always all done yes",
            to.display()
        ),
    )?
    .clean()?;
    Manifest::of(&to)?.check_equals(expected, &ignore())?;

    let to = dir.join("added");
    restore_words(
        bacula,
        &format!(
            "fileset=g jobid={id} strip_prefix=\"/@guestsnap/web\" add_prefix=\"{}\" replace=always all done yes",
            to.display()
        ),
    )?
    .clean()?;
    Manifest::of(&to)?.check_equals(expected, &ignore())?;
    Ok(())
}

/// The file on the host is older, or newer, than the restored one (2020).
fn over_older_and_newer(bacula: &Bacula, id: u32, dir: &WorkDir) -> Result {
    for (replace, older, newer) in [
        ("always", true, true),
        ("never", false, false),
        ("ifnewer", true, false),
        ("ifolder", false, true),
    ] {
        for (year, replaced) in [(2010, older), (2030, newer)] {
            let to = dir.join(format!("{replace}-{year}"));
            let file = guest_in(&to, "web").join("etc/hostname");
            std::fs::create_dir_all(file.parent().ok_or("no parent")?)?;
            std::fs::write(&file, "of the host")?;
            cmd::run(
                "touch",
                ["-d", &format!("{year}-01-01"), &file.display().to_string()],
            )?;
            let path = "/@guestsnap/web/etc/hostname";
            bacula
                .restore_with(
                    id,
                    &Selection::Files(vec![path.into()]),
                    &to,
                    &format!("replace={replace}"),
                )?
                .clean()?;
            let text = std::fs::read_to_string(&file)?;
            check!(
                (text != "of the host") == replaced,
                "replace={replace}, a file of {year}: it holds {text:?}"
            );
        }
    }
    Ok(())
}

/// The data stands in the catalog with the name that was read first; the others need it.
fn names_of_one_file(bacula: &Bacula, id: u32, to: &Path) -> Result {
    let names = ["home/user/linked", "home/user/linked-2", "var/linked-3"];
    let path = |name: &str| format!("/@guestsnap/web/{name}");
    let mut alone = 0;
    for name in names {
        let to = to.join(name.replace('/', "-"));
        let job = bacula.restore(id, &Selection::Files(vec![path(name)]), &to)?;
        if job.is_clean() {
            alone += 1;
        } else {
            check!(
                job.log.contains("which must be restored too"),
                "{name} alone: {}",
                job.log
            );
        }
    }
    check!(alone == 1, "{alone} of the names come back alone");
    bacula
        .restore(id, &Selection::Files(names.map(path).to_vec()), to)?
        .clean()?;
    for name in names {
        let text = std::fs::read(guest_in(to, "web").join(name))?;
        check!(text == bytes(5 + 6, 5000), "{name} came back different");
    }
    Ok(())
}

/// An absolute link leads into the folder.
fn with_prefix_links(bacula: &Bacula, id: u32, to: &Path) -> Result {
    let job = bacula.queued(&format!(
        "restore client=bed-fd restorejob=restore-prefix-links fileset=g jobid={id} where=\"{}\" replace=always all done yes",
        to.display()
    ))?;
    bacula.wait_job(job)?.clean()?;
    let target = std::fs::read_link(guest_in(to, "web").join("etc/absolute"))?;
    check!(
        target == to.join("etc/passwd"),
        "with PrefixLinks an absolute link leads to {}",
        target.display()
    );
    Ok(())
}

/// The daemon keeps some of its restore state in globals.
fn twice_at_a_time(bacula: &Bacula, id: u32, dir: &WorkDir, expected: &Manifest) -> Result {
    let together: Vec<u32> = ["one", "two"]
        .iter()
        .map(|name| {
            bacula.queued(&format!(
                "restore client=bed-fd restorejob=restore fileset=g jobid={id} where=\"{}\" replace=always all done yes",
                dir.join(name).display()
            ))
        })
        .collect::<Result<_>>()?;
    for job in together {
        bacula.wait_job(job)?.clean()?;
    }
    for name in ["one", "two"] {
        Manifest::of(&guest_in(&dir.join(name), "web"))?.check_equals(expected, &ignore())?;
    }
    Ok(())
}

/// Choices of `restore`, `mod`, `Plugin Options`: attributes left out, the guest's folder stripped; refused where
/// that would be dangerous.
fn restore_options() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    for name in ["web", "mail"] {
        Guest::new(&dir, &store, name, 64 * MIB)?.sh(
            "mkdir bin etc; echo x > bin/tool; chown 12:34 bin/tool; chmod 6755 bin/tool; setcap cap_dac_override+ep bin/tool; \
             ln bin/tool etc/second; ln -s tool bin/link; setfacl -m u:77:rw bin/tool; setfattr -n user.note -v kept bin/tool; touch -d '2001-02-03 04:05:06.789' bin/tool",
        )?;
    }
    let bacula = start_one(&store, "*")?;
    let id = run(&bacula, "g", "Full")?.clean()?.jobid;
    let options = Options {
        bacula: &bacula,
        id,
        dir: &dir,
    };
    bacula
        .restore(id, &Selection::All, &dir.join("plain"))?
        .clean()?;
    let plain = options.state("plain")?;
    for text in [
        "12:34 6775 2 2001-02-03 04:05:06.789",
        "cap_dac_override=ep",
        "user:77:rw-",
        "user.note",
    ] {
        check!(plain.contains(text), "without options: {plain}");
    }
    options.left_out()?;
    options.stripped(&plain)?;
    options.refused()?;
    store.close()
}

/// Restores with the plugin's own options.
struct Options<'a> {
    bacula: &'a Bacula,
    id: u32,
    dir: &'a WorkDir,
}

impl Options<'_> {
    fn restore(&self, to: &str, which: &str, answers: &[(&str, &str)]) -> Result<JobResult> {
        let words = format!("fileset=g jobid={} {to} replace=always {which}", self.id);
        self.bacula
            .wait_job(self.bacula.start_restore_with_options(&words, answers)?)
    }

    /// The guest `web` in this folder.
    fn web(&self, name: &str, answers: &[(&str, &str)]) -> Result<JobResult> {
        let to = format!("where=\"{}\"", self.dir.join(name).display());
        self.restore(&to, ONLY_WEB, answers)?.clean()
    }

    /// Facts of the file that was restored below it.
    fn state(&self, name: &str) -> Result<String> {
        state(&guest_in(&self.dir.join(name), "web").join("bin/tool"))
    }

    /// Each option leaves out what it names, and what would be dangerous without it.
    fn left_out(&self) -> Result {
        let job = self.web("acl", &[("acl", "no")])?;
        check!(
            job.log
                .contains("restore options: acl=no xattr=yes owner=yes strip=no"),
            "{}",
            job.log
        );
        let text = self.state("acl")?;
        check!(
            text.contains("12:34 67") && text.contains("user.note") && !text.contains("user:77"),
            "acl=no: {text}"
        );
        self.web("xattr", &[("xattr", "no"), ("owner", "no")])?;
        let text = self.state("xattr")?;
        check!(
            text.contains("0:0 775 2 2001-02-03 04:05:06.789")
                && text.contains("user:77:rw-")
                && !text.contains("user.note"),
            "xattr=no, owner=no; nothing may be setuid root: {text}"
        );
        let job = self.web("owner", &[("owner", "no")])?;
        let text = self.state("owner")?;
        check!(
            text.contains("0:0 775 2") && text.contains("user.note") && !text.contains("cap_"),
            "owner=no; nothing may have rights of root: {text}"
        );
        check!(
            job.log
                .contains("1 files and folders do not have their owner"),
            "{}",
            job.log
        );
        Ok(())
    }

    /// The guest's tree without our folders above it.
    fn stripped(&self, plain: &str) -> Result {
        self.web("strip", &[("strip", "yes")])?;
        let text = state(&self.dir.join("strip/bin/tool"))?;
        check!(text == plain, "strip=yes: {text}, expected {plain}");
        check!(
            std::fs::read_link(self.dir.join("strip/bin/link"))? == Path::new("tool")
                && std::fs::read(self.dir.join("strip/etc/second"))? == b"x\n",
            "links of a stripped guest"
        );
        Ok(())
    }

    /// Two guests in one tree, the host's own root, and paths that Bacula changes itself.
    fn refused(&self) -> Result {
        let mixed = format!("where=\"{}\"", self.dir.join("mixed").display());
        let regex = "regexwhere=\"!^/@guestsnap!/nowhere!\"";
        for (to, which, why) in [
            (mixed.as_str(), "all done", "would be mixed"),
            ("where=/", ONLY_WEB, "this host's own files"),
            (regex, ONLY_WEB, "with RegexWhere"),
        ] {
            let job = self.restore(to, which, &[("strip", "yes")])?;
            check!(
                job.status == 'f' && job.log.contains("GS-607") && job.log.contains(why),
                "{to}: status {}\n{}",
                job.status,
                job.log
            );
            // It says so before the first file of the first guest.
            let told = job.log.find("this restore takes files of");
            check!(
                which == ONLY_WEB || told.is_some_and(|at| job.log.find("GS-607") > Some(at)),
                "nothing is told before: {}",
                job.log
            );
            // Its last word is none of a restore that is complete.
            let ended = job.log.contains("restore: NOT COMPLETE, it ended early");
            check!(ended == (which != ONLY_WEB), "its end: {}", job.log);
        }
        check!(
            !Path::new("/bin/tool").exists() && !Path::new("/nowhere").exists(),
            "a refused restore wrote to the host"
        );
        Ok(())
    }
}

/// Marks the one guest.
const ONLY_WEB: &str = "select\ncd \"/@guestsnap\"\nmark web\ndone";

fn state(file: &Path) -> Result<String> {
    cmd::sh(&format!(
        "stat -c '%u:%g %a %h %y' '{0}'; getfacl -nc --absolute-names '{0}' | grep user:77 || true; getfattr --absolute-names -d '{0}' | grep -v '^#' || true; getcap '{0}' | sed 's/.* //'",
        file.display()
    ))
}

/// A restore on a host without the plugin: Bacula writes the files by itself, and some of their attributes are lost.
fn without_plugin() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let web = Guest::new(&dir, &store, "web", 96 * MIB)?;
    web.with(|root| rich(root, 11, Fs::Ext4.can()))?;
    let expected = web.manifest()?;
    let mut bacula = start_one(&store, "web")?;
    let id = run(&bacula, "g", "Full")?.clean()?.jobid;
    std::fs::remove_file(bacula.path().join("plugins/guestsnap-fd.so"))?;
    bacula.restart_fd()?;
    let to = dir.join("bare");
    let job = bacula.restore(id, &Selection::All, &to)?;
    println!("{}", job.log);
    check!(
        job.is_clean(),
        "status {}, {} errors",
        job.status,
        job.errors
    );
    let restored = Manifest::of(&guest_in(&to, "web"))?;
    restored.check_equals(
        &expected,
        &Ignore {
            nanoseconds: true,
            holes: true,
            // All of them.
            xattrs: vec![String::new()],
            ..ignore()
        },
    )?;
    let complete = restored.check_equals(&expected, &ignore());
    check!(
        complete.is_err(),
        "nothing was lost: the documents say it is"
    );
    store.close()
}

/// `.query` lists guests and disks; from Bacula 11 on.
fn query() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    for name in ["web", "mail"] {
        Guest::new(&dir, &store, name, 32 * MIB)?;
    }
    let line = directive(&store, "*");
    let bacula = bacula(store.path(), plugin_so()?, &[("g", fileset_plugin(&line))])?;
    let ask = |line: &str, parameter: &str| {
        bacula.console(&format!(
            ".query plugin=\"{line}\" client=bed-fd parameter={parameter}"
        ))
    };
    let text = ask(&line, "guests")?;
    check!(
        text.contains("guest=mail\n") && text.contains("guest=web\n"),
        "guests: {text}"
    );
    let text = ask(&line, "disks")?;
    let image = store.path().join("web.img");
    check!(
        text.contains(&format!("disk=web: {}\n", image.display())),
        "disks: {text}"
    );
    let text = ask("guestsnap: image=/etc/*", "disks")?;
    check!(
        text.contains("not_allowed=") && !text.contains("passwd"),
        "what is not allowed: {text}"
    );
    store.close()
}

/// One tree saved by `File =` and by the plugin is restored alike, and an estimate lists the files that are sent.
fn as_file() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let web = Guest::new(&dir, &store, "web", 96 * MIB)?;
    web.with(|root| rich(root, 9, Fs::Ext4.can()))?;
    let expected = web.manifest()?;
    // Before the daemon, which sees only the mounts that are there when it starts.
    let mounted = web.disk.mount(1, &web.point)?;
    let line = directive(&store, "web");
    let options = "signature = MD5; aclsupport = yes; xattrsupport = yes";
    let bacula = start(
        &store,
        &[
            ("plugin", fileset(options, &line)),
            (
                "file",
                format!(
                    "Include {{\n Options {{ {options} }}\n File = \"{}\"\n }}",
                    mounted.path().display()
                ),
            ),
        ],
    )?;
    let by_file = run(&bacula, "file", "Full")?.clean()?;
    let (files, bytes) = estimated(&bacula.estimate("plugin", "Full")?)?;
    let by_plugin = run(&bacula, "plugin", "Full")?.clean()?;
    println!("{}", by_plugin.log);
    // The plugin's own: its manifest in its folder, and the questions for a restore.
    check!(
        by_plugin.files == files + 1,
        "the estimate says {files} files, {} were sent",
        by_plugin.files
    );
    // Each file once, with its holes, as Bacula counts its own.
    let sizes = cmd::sh(&format!(
        "find '{}' -type f -printf '%i %s\\n' | sort -u | awk '{{ s += $2 }} END {{ print s }}'",
        mounted.path().display()
    ))?;
    check!(
        // The manifest is the only one that is not the guest's.
        (1..10_000).contains(&bytes.saturating_sub(sizes.trim().parse()?)),
        "the estimate says {bytes} bytes, the files have {sizes}"
    );
    let restored = |job: &JobResult, inside: &Path| -> Result<Manifest> {
        let to = dir.join(format!("to-{}", job.jobid));
        bacula.restore(job.jobid, &Selection::All, &to)?.clean()?;
        Manifest::of(&to.join(inside.strip_prefix("/")?))
    };
    let plugin = restored(&by_plugin, Path::new("/@guestsnap/web"))?;
    let file = restored(&by_file, mounted.path())?;
    // The guest's own manifest lists the objects that Bacula's own restore does not bring back.
    plugin.check_equals(&expected, &ignore())?;
    plugin.check_equals(
        &file,
        &Ignore {
            nanoseconds: true,
            // Bacula's own restore loses extended attributes and further names of symbolic links.
            below: [
                "etc/absolute",
                "etc/dangling",
                "var/linked-symlink",
                ".guestsnap",
            ]
            .map(PathBuf::from)
            .into(),
            ..ignore()
        },
    )?;
    drop(bacula);
    mounted.close()?;
    store.close()
}

/// A target that is too small or read-only: clear errors, and no job that looks good.
fn restore_into_bad_targets() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let web = Guest::new(&dir, &store, "web", 64 * MIB)?;
    web.with(|root| {
        std::fs::write(root.join("large"), bytes(1, 20 << 20))?;
        many(root, 20, 1)
    })?;
    // Before the daemon, which sees only the mounts that are there when it starts.
    let file = dir.join("target.img");
    image(&file, 8 * MIB)?;
    let disk = GuestDisk::create(
        &file,
        Table::Whole,
        &[Part::fs(8 * MIB, Fs::Ext4, "target")],
    )?;
    let target = disk.mount(1, &dir.join("target"))?;
    let bacula = start_one(&store, "web")?;
    let id = run(&bacula, "g", "Full")?.clean()?.jobid;
    let job = bacula.restore(id, &Selection::All, &target.path().join("small"))?;
    println!("{}", job.log);
    check!(
        !job.is_clean() && job.log.contains("GS-603") && job.log.contains("No space left"),
        "a full target: status {}, {} errors\n{}",
        job.status,
        job.errors,
        job.log
    );
    cmd::sh(&format!(
        "rm -rf '{0}'/small; mount -o remount,ro '{0}'",
        target.path().display()
    ))?;
    let job = bacula.restore(id, &Selection::All, &target.path().join("ro"))?;
    println!("{}", job.log);
    check!(
        !job.is_clean() && job.log.contains("GS-603") && job.log.contains("Read-only file system"),
        "a read-only target: status {}, {} errors\n{}",
        job.status,
        job.errors,
        job.log
    );
    // It holds the mount.
    drop(bacula);
    target.close()?;
    store.close()
}

/// The numbers behind `files=` and `bytes=` of an estimate.
fn estimated(text: &str) -> Result<(u64, u64)> {
    let number = |key: &str| -> Option<u64> {
        let rest = text.rsplit_once(key)?.1;
        let digits: String = rest
            .chars()
            .take_while(|c| c.is_ascii_digit() || *c == ',')
            .filter(char::is_ascii_digit)
            .collect();
        digits.parse().ok()
    };
    match (number("files="), number("bytes=")) {
        (Some(files), Some(bytes)) => Ok((files, bytes)),
        _ => fail!("no numbers in the estimate:\n{text}"),
    }
}

/// A full backup on top of a base job holds only what changed since, and restores whole.
fn base_job() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let web = Guest::new(&dir, &store, "web", 64 * MIB)?;
    web.sh("mkdir usr; for f in a b c; do echo $f > usr/$f; done")?;
    let bacula = start(
        &store,
        &[(
            "g",
            fileset(
                "signature = MD5; basejob = mcs; accurate = mcs",
                &directive(&store, "web"),
            ),
        )],
    )?;
    run(&bacula, "g", "Base")?.clean()?;
    std::thread::sleep(Duration::from_secs(2));
    web.sh("echo B > usr/b; rm usr/c; echo d > usr/d")?;
    let expected = web.manifest()?;
    let id = bacula.queued("run job=based fileset=g level=Full yes")?;
    let job = bacula.wait_job(id)?.clean()?;
    println!("{}", job.log);
    let names = sent(&bacula, id, "web")?;
    check!(
        names.contains("usr/b") && names.contains("usr/d"),
        "changes are missing: {names:?}"
    );
    check!(
        !names.contains("usr/a") || job.files < 8,
        "unchanged files were sent: {names:?}"
    );
    let to = dir.join("all");
    bacula.restore(id, &Selection::All, &to)?.clean()?;
    Manifest::of(&guest_in(&to, "web"))?.check_equals(&expected, &ignore())?;
    store.close()
}

/// Files that the client file leaves out: by path, by a mark in a directory, by the cache tag, by size.
fn client_filters() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let web = Guest::new(&dir, &store, "web", 64 * MIB)?;
    web.sh(
        "mkdir -p var/cache/deep var/tmp/sub data/sub marked/sub tagged/sub untagged piped; \
         for d in var/cache/deep var/tmp/sub data data/sub marked marked/sub tagged tagged/sub untagged piped; do echo x > $d/file; done; \
         echo swap > swapfile; touch marked/.nobackup; touch .nobackup; \
         printf 'Signature: 8a477f597d28d172789f06886806bc55\\n# made by a test\\n' > tagged/CACHEDIR.TAG; \
         echo 'Signature: of something else' > untagged/CACHEDIR.TAG; mkfifo piped/CACHEDIR.TAG; \
         truncate -s 1M exact; truncate -s 1048577 over",
    )?;
    let other = Guest::new(&dir, &store, "other", 32 * MIB)?;
    other.sh("mkdir marked; touch marked/.nobackup marked/file; truncate -s 2M over")?;
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![("g".into(), fileset_plugin(&directive(&store, "*")))],
        client_file: Some(format!(
            "allow = [\"{}/*\"]\n[defaults]\nskip_dirs_containing = [\".nobackup\"]\n\
             [guest.web]\nskip = [\"/swapfile\", \"/var/cache\", \"/data/**\"]\nskip_caches = true\nmax_file_size = \"1M\"\n",
            store.path().display()
        )),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let listing = bacula.estimate("g", "Full")?;
    let job = run(&bacula, "g", "Full")?.clean()?;
    check_set(
        "web",
        &sent(&bacula, job.jobid, "web")?,
        &[
            "",
            ".nobackup",
            "data/",
            "exact",
            "lost+found/",
            "piped/",
            "piped/CACHEDIR.TAG",
            "piped/file",
            "untagged/",
            "untagged/CACHEDIR.TAG",
            "untagged/file",
            "var/",
            "var/tmp/",
            "var/tmp/sub/",
            "var/tmp/sub/file",
        ],
    )?;
    check_set(
        "other",
        &sent(&bacula, job.jobid, "other")?,
        &["", "lost+found/", "over"],
    )?;
    for text in [
        "web: /over is left out: 1048577 bytes, max_file_size is 1048576",
        ", 7 left out as the client file says",
        ", 1 left out as the client file says",
    ] {
        check!(
            job.log.contains(text),
            "the job log does not say {text:?}:\n{}",
            job.log
        );
    }
    // A backup sends the questions for a restore too, which an estimate does not count.
    check!(
        estimated(&listing)?.0 + 1 == job.files,
        "the estimate does not leave out the same:\n{listing}"
    );
    store.close()
}

/// The first name of a file moves behind the second one: what is left of the file has its data, in accurate mode.
fn second_name_before_the_first() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let web = Guest::new(&dir, &store, "web", 64 * MIB)?;
    web.sh("mkdir a b z; echo data > a/first; ln a/first b/second; ln a/first b/third")?;
    let bacula = start(
        &store,
        &[(
            "acc",
            fileset("signature = MD5; accurate = ms", &directive(&store, "web")),
        )],
    )?;
    run(&bacula, "acc", "Full accurate=yes")?.clean()?;
    // The file itself changes in nothing that this mode compares.
    web.sh("mv a/first z/first")?;
    let expected = web.manifest()?;
    let job = run(&bacula, "acc", "Incremental accurate=yes")?.clean()?;
    let sent = sent(&bacula, job.jobid, "web")?;
    for name in ["z/first", "b/second", "b/third"] {
        check!(sent.contains(name), "{name} is not sent: {sent:?}");
    }
    let to = dir.join("current");
    restore_current(&bacula, "acc", &to)?.clean()?;
    Manifest::of(&guest_in(&to, "web"))?.check_equals(&expected, &ignore())?;
    let job = run(&bacula, "acc", "Incremental accurate=yes")?.clean()?;
    check_set(
        "nothing changed",
        &self::sent(&bacula, job.jobid, "web")?,
        &[],
    )?;
    store.close()
}

/// A job that is stopped in the middle of a file. Bacula takes that file for saved when it restarts the job, which is
/// refused then.
fn restarted_job() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let web = Guest::new(&dir, &store, "web", 64 * MIB)?;
    // The hole takes minutes to be sent.
    web.sh(
        "mkdir -p d/a d/b; echo data > d/a/first; truncate -s 400G d/b/slow; echo end >> d/b/slow",
    )?;
    // A restart takes the FileSet of the Job resource. Without spooling the catalog has each file at once.
    let job = "Job {\n  Name = stopped\n  Type = Backup\n  Level = Full\n  Client = bed-fd\n  FileSet = g\n  \
               Storage = bed-sd\n  Messages = Standard\n  Pool = Default\n  SpoolAttributes = no\n}\n";
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![("g".into(), fileset_plugin(&directive(&store, "web")))],
        client_file: Some(format!("allow = [\"{}/*\"]\n", store.path().display())),
        dir_conf: job.into(),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let id = bacula.queued("run job=stopped yes")?;
    bacula.wait_processing("d/b/slow", Duration::from_secs(60))?;
    bacula.console(&format!("stop jobid={id}"))?;
    let stopped = bacula.wait_job(id)?;
    check!(
        stopped.status == 'I',
        "status {} of a stopped job:\n{}",
        stopped.status,
        stopped.log
    );
    let again = bacula.queued(&format!("restart incomplete jobid={id}"))?;
    check!(again == id, "the restarted job has another JobId: {again}");
    let what = "the end of the restarted job";
    let query =
        format!("select JobStatus from Job where JobId={id} and JobStatus in ('T','E','f')");
    cmd::wait_for(what, Duration::from_secs(120), || {
        Ok((!bacula.sql(&query)?.is_empty()).then_some(()))
    })?;
    let job = bacula.wait_job(id)?;
    println!("{}", job.log);
    check!(
        job.status == 'f' && job.log.contains("GS-213"),
        "status {} of a job that was cut off in a file",
        job.status
    );
    store.close()
}

/// With encryption Bacula sends holes as zeros, its own files' too; compressed before, they are next to nothing.
fn holes_under_encryption() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let web = Guest::new(&dir, &store, "web", 96 * MIB)?;
    let hole = 60 * MIB;
    let make = format!("truncate -s {hole} holes; echo end >> holes");
    web.sh(&make)?;
    let files = dir.join("files");
    std::fs::create_dir(&files)?;
    cmd::sh(&format!("cd '{}'; {make}", files.display()))?;
    let key = dir.join("key");
    let key = key.display();
    cmd::sh(&format!(
        "openssl req -new -x509 -newkey rsa:2048 -nodes -days 10 -subj /CN=x -keyout '{key}.key' -out '{key}.crt' \
         2>/dev/null && cat '{key}.key' '{key}.crt' > '{key}.pem'"
    ))?;
    let line = directive(&store, "web");
    let file = format!(
        "Include {{\n Options {{ sparse = yes }}\n File = \"{}\"\n }}",
        files.display()
    );
    let filesets = [
        ("plugin", fileset("sparse = yes", &line)),
        ("packed", fileset("compression = LZO", &line)),
        ("file", file),
    ];
    for (encrypted, expected) in [
        (
            false,
            [("plugin", false), ("file", false), ("packed", false)],
        ),
        (true, [("plugin", true), ("file", true), ("packed", false)]),
    ] {
        let pki =
            format!("PKI Signatures = Yes\n  PKI Encryption = Yes\n  PKI Keypair = \"{key}.pem\"");
        let bacula = Bacula::start(BaculaOptions {
            plugin_so: Some(plugin_so()?),
            filesets: filesets
                .iter()
                .map(|(name, text)| ((*name).to_owned(), text.clone()))
                .collect(),
            client_file: Some(format!("allow = [\"{}/*\"]\n", store.path().display())),
            fd_conf: if encrypted { pki } else { String::new() },
            ..BaculaOptions::default()
        })?;
        bacula.run_backup("Empty", "Full")?.clean()?;
        for (name, as_data) in expected {
            let volumes = bacula.path().join("volumes");
            let size = || -> Result<u64> {
                let text = cmd::sh(&format!("cat '{}'/* | wc -c", volumes.display()))?;
                Ok(text.trim().parse()?)
            };
            let before = size()?;
            run(&bacula, name, "Full")?.clean()?;
            let written = size()?.saturating_sub(before);
            println!("{name}, encrypted {encrypted}: {written} bytes");
            check!(
                (written > hole) == as_data && (as_data || written < 4 * MIB),
                "{name}, encrypted {encrypted}: {written} bytes for a hole of {hole}"
            );
        }
    }
    store.close()
}
