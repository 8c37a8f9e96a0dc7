//! The plugin in a daemon of each interface version: a C program that drives the function table
//! (`tests/fake_host/host.c`), with a guest in an image file. 11 and 13 cannot be installed from
//! Debian; this and the layout assertions are what proves them.

use guestsnap_bed::cmd::wait_for;
use guestsnap_bed::guestdisk::Loop;
use guestsnap_bed::tree::{Ignore, Manifest};
use guestsnap_bed::workdir::WorkDir;
use guestsnap_bed::{message, plugin_so};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;
use std::time::Duration;

const VERSIONS: [u32; 4] = [14, 21, 22, 23];

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{text}",
        output.status
    );
    text
}

/// The daemon's stand-in for one interface version.
fn host(version: u32) -> PathBuf {
    static BUILT: Once = Once::new();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    BUILT.call_once(|| {
        let compiler = cc::Build::new()
            .target(env!("GUESTSNAP_TARGET"))
            .host(env!("GUESTSNAP_TARGET"))
            .opt_level(0)
            .cargo_metadata(false)
            .get_compiler();
        for version in VERSIONS {
            let status = compiler
                .to_command()
                .args([
                    "-Wall",
                    "-Wextra",
                    "-Iinclude",
                    "-Wno-cast-function-type",
                    "tests/fake_host/host.c",
                    "-o",
                ])
                .arg(folder.join(format!("host-{version}")))
                .arg(format!("-DGUESTSNAP_ABI={version}"))
                .args(["-ldl", "-lpthread"])
                .status()
                .expect("a C compiler");
            assert!(status.success(), "host.c for version {version}");
        }
    });
    folder.join(format!("host-{version}"))
}

/// A reflinking filesystem with one guest's image, and a client file that allows it. Unmounted
/// and removed when dropped.
struct Bed {
    folder: WorkDir,
}

impl Bed {
    fn new() -> Bed {
        let bed = Bed {
            folder: WorkDir::new().expect("a folder"),
        };
        let path = |name: &str| bed.path(name).display().to_string();
        run("truncate", &["-s", "1G", &path("xfs.img")]);
        run("mkfs.xfs", &["-q", &path("xfs.img")]);
        for folder in ["srv", "wd", "etc", "tree/etc", "tree/var/log", "tree/home"] {
            fs::create_dir_all(bed.path(folder)).expect("a folder");
        }
        run("mount", &["-o", "loop", &path("xfs.img"), &path("srv")]);
        bed.populate();
        run("truncate", &["-s", "64M", &path("srv/web1.img")]);
        // The old installers' layout: one ext3 partition at sector 63.
        run(
            "sh",
            &[
                "-c",
                &format!("echo '63,,L' | sfdisk -q {}", path("srv/web1.img")),
            ],
        );
        run(
            "mke2fs",
            &[
                "-q",
                "-t",
                "ext3",
                "-d",
                &path("tree"),
                "-E",
                "offset=32256",
                &path("srv/web1.img"),
                "60M",
            ],
        );
        fs::write(
            bed.path("etc/guestsnap.toml"),
            format!("allow = ['{}/*.img']\n", path("srv")),
        )
        .expect("client file");
        bed
    }

    fn populate(&self) {
        let file = |name: &str, data: &[u8]| {
            fs::write(self.path("tree").join(name), data).expect("a file")
        };
        file("etc/passwd", b"root:x:0:0::/root:/bin/sh\n");
        file("etc/empty", b"");
        file("home/big", &vec![0x5a; 3 << 20]);
        file("home/sparse", b"");
        fs::OpenOptions::new()
            .write(true)
            .open(self.path("tree/home/sparse"))
            .and_then(|f| f.set_len(8 << 20))
            .expect("a sparse file");
        std::os::unix::fs::symlink("passwd", self.path("tree/etc/link")).expect("a link");
        fs::hard_link(self.path("tree/etc/passwd"), self.path("tree/var/hard"))
            .expect("a hard link");
        run(
            "mkfifo",
            &[&self.path("tree/var/fifo").display().to_string()],
        );
        run(
            "setfattr",
            &[
                "-n",
                "user.note",
                "-v",
                "kept",
                &self.path("tree/etc/passwd").display().to_string(),
            ],
        );
        run(
            "chmod",
            &["4711", &self.path("tree/home/big").display().to_string()],
        );
        run(
            "chown",
            &["1234:5678", &self.path("tree/home").display().to_string()],
        );
        run(
            "touch",
            &[
                "-d",
                "1969-07-20 20:17:40.123456789 UTC",
                &self.path("tree/var/log").display().to_string(),
            ],
        );
    }

    /// The guest's files as the kernel shows them when the image is mounted.
    fn guest(&self) -> Manifest {
        let (image, at) = (self.path("srv/web1.img"), self.path("mounted"));
        fs::create_dir_all(&at).expect("a folder");
        let at = at.display().to_string();
        run(
            "mount",
            &[
                "-o",
                "loop,ro,offset=32256",
                &image.display().to_string(),
                &at,
            ],
        );
        let manifest = Manifest::of(Path::new(&at)).expect("the guest's tree");
        run("umount", &[&at]);
        manifest
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs the host in a mount namespace of its own where `/etc/bacula` is ours.
    fn host(&self, version: u32, env: &[(&str, &str)], args: &[&str]) -> (String, bool) {
        self.host_after("true", version, env, args)
    }

    /// Runs the host after a command in that namespace; with `exec`, under that command.
    fn host_after(
        &self,
        command: &str,
        version: u32,
        env: &[(&str, &str)],
        args: &[&str],
    ) -> (String, bool) {
        fs::create_dir_all("/etc/bacula").expect("/etc/bacula as a place to mount on");
        let (first, under) = match command.strip_prefix("exec ") {
            Some(under) => ("true", under),
            None => (command, ""),
        };
        let script =
            format!(r#"mount --bind "$1" /etc/bacula && shift && {first} && exec {under} "$@""#);
        let output = Command::new("unshare")
            .args(["-m", "sh", "-c", &script, "sh"])
            .arg(self.path("etc"))
            .arg(host(version))
            .arg(plugin_so().expect("the plugin"))
            .arg(self.path("wd"))
            .args(args)
            .envs(env.iter().copied())
            .output()
            .expect("unshare");
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        println!("--- version {version} {args:?}: {}\n{text}", output.status);
        (text, output.status.success())
    }

    fn directive(&self, more: &str) -> String {
        format!(
            "guestsnap: image={}/*.img {more}",
            self.path("srv").display()
        )
    }

    /// Loop devices on files in our store, by the number of its device: paths are cut short once the namespace of
    /// the daemon is gone. The kernel keeps the loop device of a filesystem that is in use, also of a detached mount.
    fn loops(&self) -> String {
        let store = fs::metadata(self.path("srv")).expect("the store").dev();
        let on = format!("{}:{}", rustix::fs::major(store), rustix::fs::minor(store));
        let columns = "BACK-MAJ:MIN,NAME,BACK-FILE";
        let all = run("losetup", &["--list", "--noheadings", "-O", columns]);
        all.lines()
            .filter(|line| line.split_whitespace().next() == Some(&on))
            .collect()
    }

    /// Nothing of ours is on the host. A process that looks at all block devices may hold one open for a moment.
    fn nothing_left(&self, text: &str) {
        let free = || Ok(self.loops().is_empty().then_some(()));
        wait_for("loop devices to be free", Duration::from_secs(10), free)
            .unwrap_or_else(|e| panic!("{}: {}", message(&e), self.loops()));
        let left: Vec<_> = fs::read_dir(self.path("wd/guestsnap"))
            .into_iter()
            .flatten()
            .flatten()
            .collect();
        assert!(left.is_empty(), "journals left: {left:?}");
        let fds = |when: &str| {
            let line = text
                .lines()
                .find_map(|l| l.strip_prefix(&format!("FDS {when} ")))
                .map(str::to_owned);
            line.unwrap_or_else(|| panic!("no FDS {when} line"))
        };
        assert_eq!(fds("before"), fds("after"), "open files");
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let mounted = self.path("srv");
        if let Err(error) = Command::new("umount").arg(&mounted).status() {
            eprintln!("umount {}: {error}", mounted.display());
        }
    }
}

fn lines<'a>(text: &'a str, start: &str) -> Vec<&'a str> {
    text.lines().filter(|l| l.starts_with(start)).collect()
}

#[test]
fn root_only_our_loops_count() {
    let (bed, other) = (Bed::new(), Bed::new());
    let attach = |bed: &Bed| Loop::attach(&bed.path("srv/web1.img"), 0, None, 0).expect("a loop");
    let fds = "FDS before 1\nFDS after 1\n";
    let foreign = attach(&other);
    let quiet = bed.loops();
    let leak = attach(&bed);
    let seen = bed.loops();
    assert!(quiet.is_empty(), "another's loop device counts: {quiet}");
    assert!(
        seen.contains(leak.device()) && seen.ends_with("srv/web1.img"),
        "a leak is not seen: {seen}"
    );
    drop((foreign, leak));
    bed.nothing_left(fds);
}

#[test]
fn root_every_version_backs_up_and_restores() {
    let bed = Bed::new();
    let expected = bed.guest();
    let passwd = &expected.entries[Path::new("etc/passwd")];
    assert_eq!(passwd.xattrs["user.note"], b"kept");
    let ignore = Ignore {
        below: vec![".guestsnap".into(), "lost+found".into()],
        ..Ignore::default()
    };
    for version in VERSIONS {
        let target = bed.path(&format!("restore-{version}"));
        let (text, ok) = bed.host(
            version,
            &[],
            &["backup", &bed.directive(""), &target.display().to_string()],
        );
        assert!(
            ok && text.contains("JOB done")
                && text.contains("RESTORED done")
                && text.contains("RELOAD 0")
        );
        assert!(lines(&text, "MSG ERROR").is_empty() && lines(&text, "MSG WARNING").is_empty());
        let hard = lines(&text, "FILE type=1");
        assert!(
            hard.len() == 1 && hard[0].ends_with("/@guestsnap/web1/etc/passwd"),
            "{hard:?}"
        );
        // A further name of a file becomes a link after the question about it.
        assert_eq!(lines(&text, "FILLED AGAIN"), ["FILLED AGAIN 1"]);
        assert!(text.contains("/@guestsnap/web1/.guestsnap/manifest.json"));
        Manifest::of(&target.join("@guestsnap/web1"))
            .and_then(|restored| restored.check_equals(&expected, &ignore))
            .unwrap_or_else(|e| panic!("restored by version {version}: {}", message(&e)));
        assert_eq!(
            fs::metadata(target.join("@guestsnap/web1/home/sparse"))
                .map(|m| m.blocks())
                .ok(),
            Some(0)
        );
        bed.nothing_left(&text);
    }
}

#[test]
fn root_every_version_estimates_excludes_and_cancels() {
    let bed = Bed::new();
    for version in VERSIONS {
        let (text, ok) = bed.host(version, &[], &["estimate", &bed.directive("path=/mnt")]);
        assert!(ok && text.contains("JOB done") && text.contains("/mnt/web1/etc/passwd"));
        // Only data counts: folders, links and further names have no size.
        let sized: Vec<_> = lines(&text, "FILE")
            .into_iter()
            .filter(|l| !l.contains("size=0 "))
            .collect();
        assert!(
            sized.iter().all(|l| l.starts_with("FILE type=3 ")),
            "{sized:?}"
        );
        bed.nothing_left(&text);

        let (text, _) = bed.host(
            version,
            &[("EXCLUDE", "/web1/home")],
            &["backup", &bed.directive("")],
        );
        assert!(
            text.contains("JOB done") && !lines(&text, "FILE").iter().any(|l| l.contains("home"))
        );
        bed.nothing_left(&text);

        let (text, _) = bed.host(
            version,
            &[("CHANGED", "passwd")],
            &["incremental", &bed.directive("")],
        );
        let sent = lines(&text, "FILE");
        assert!(
            sent.len() == 3
                && sent[0].ends_with("/etc/passwd")
                && sent[1].contains("/var/hard -> "),
            "the file, its second name and the manifest: {sent:?}"
        );

        let (text, ok) = bed.host(version, &[], &["cancel", &bed.directive(""), "3"]);
        assert!(ok && text.contains("JOB cancelled") && lines(&text, "FILE").len() <= 4);
        assert!(text.contains("NOT COMPLETE"));
        bed.nothing_left(&text);

        let (text, ok) = bed.host(version, &[], &["console"]);
        assert!(
            ok && lines(&text, "MSG").is_empty(),
            "a console connection is quiet"
        );
    }
}

#[test]
fn root_every_version_asks_about_restores() {
    let bed = Bed::new();
    let head = r"# Plugin configuration file\n# Version 1\n";
    for version in VERSIONS {
        let restore = |name: &str, answer: &str| {
            let target = bed.path(&format!("{name}-{version}"));
            let args = ["backup", &bed.directive(""), &target.display().to_string()];
            let (text, ok) = bed.host(version, &[("ANSWER", &format!("{head}{answer}"))], &args);
            assert!(ok, "{text}");
            assert_eq!(lines(&text, "OBJECT").len(), 1, "{text}");
            assert!(text.contains("asks=strip"), "{text}");
            bed.nothing_left(&text);
            (target, text)
        };
        let (target, text) = restore("chosen", r"xattr=no\nowner=no\nstrip=yes\n");
        assert!(text.contains("RESTORED done") && lines(&text, "MSG ERROR").is_empty());
        assert!(text.contains("restore options: acl=yes xattr=no owner=no strip=yes"));
        let meta = fs::metadata(target.join("home/big")).expect("the guest's folder is stripped");
        // Without its owner a file must not be setuid any more.
        assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o711, 0));
        assert_eq!(
            fs::metadata(target.join("home")).map(|m| m.gid()).ok(),
            Some(0)
        );
        assert_eq!(
            fs::metadata(target.join("etc/passwd"))
                .map(|m| m.nlink())
                .ok(),
            Some(2),
            "further names are stripped too"
        );
        let named = run(
            "getfattr",
            &["-d", &target.join("etc/passwd").display().to_string()],
        );
        assert!(!named.contains("user.note"), "{named}");

        let (target, text) = restore("lost", "colour=yes");
        assert!(
            text.contains("GS-607") && text.contains("RESTORED fatal"),
            "{text}"
        );
        assert!(!target.join("@guestsnap").exists());
    }
}

#[test]
fn root_every_version_answers_queries() {
    let bed = Bed::new();
    for version in VERSIONS.into_iter().filter(|v| *v >= 21) {
        let ask = |line: &str, parameters: &[&str]| {
            let mut args = vec!["query", line];
            args.extend(parameters);
            let (text, ok) = bed.host(version, &[], &args);
            assert!(ok, "{text}");
            bed.nothing_left(&text);
            lines(&text, "ANSWER").join("\n")
        };
        let image = bed.path("srv/web1.img").display().to_string();
        // Twice: an answer leaves nothing behind for the next question.
        let text = ask(&bed.directive(""), &["guests", "disks", "guests", "colour"]);
        assert_eq!(text.matches("rc=0 guest=web1").count(), 2, "{text}");
        assert!(text.contains(&format!("rc=0 disk=web1: {image}")), "{text}");
        assert!(text.contains("rc=0 error=GS-101"), "{text}");
        fs::copy(bed.path("srv/web1.img"), bed.path("srv/web2.img")).expect("a second guest");
        let text = ask(&bed.directive(""), &["guests"]);
        assert!(
            text.contains("rc=3 guest=web1\nANSWER rc=0 guest=web2"),
            "{text}"
        );
        fs::remove_file(bed.path("srv/web2.img")).expect("a file of ours");
        // Guests that the client file does not allow are not told.
        let text = ask("guestsnap: image=/etc/*", &["disks"]);
        assert!(
            text.contains("rc=0 not_allowed=") && !text.contains("passwd"),
            "{text}"
        );
    }
}

#[test]
fn root_bad_input_is_one_clear_message() {
    let bed = Bed::new();
    fs::write(bed.path("srv/blank.dat"), vec![0; 1 << 20]).expect("a blank disk");
    let srv = bed.path("srv").display().to_string();
    for (directive, code) in [
        ("guestsnap: lv=vg0/a colour=red".to_owned(), "GS-101"),
        ("guestsnap: lv=vg0/a size=0%".to_owned(), "GS-101"),
        (format!("guestsnap: image={srv}/none-*.img"), "GS-201"),
        ("guestsnap: lv=nosuchvg/x*".to_owned(), "GS-201"),
        (format!("guestsnap: image={srv}/blank.dat"), "GS-104"),
    ] {
        let (text, ok) = bed.host(14, &[], &["backup", &directive]);
        assert!(
            ok && text.contains("JOB fatal"),
            "{directive}: the job must fail"
        );
        assert!(
            lines(&text, "MSG")
                .iter()
                .any(|l| l.contains(code) && l.contains("To do: ")),
            "{directive}: {code}"
        );
        bed.nothing_left(&text);
    }
    // Allowed now, but nothing is in it.
    fs::write(
        bed.path("etc/guestsnap.toml"),
        format!("allow = ['{srv}/*']\n"),
    )
    .expect("client file");
    let (text, _) = bed.host(
        14,
        &[],
        &["backup", &format!("guestsnap: image={srv}/blank.dat")],
    );
    let errors = lines(&text, "MSG ERROR");
    assert!(
        errors.len() == 1 && errors[0].contains("blank.dat: ERROR GS-406"),
        "{errors:?}"
    );
    assert!(
        text.contains("GS-206") && text.contains("JOB fatal"),
        "no guest at all is a failed job"
    );
    // With a good guest beside it the job goes on.
    let (text, _) = bed.host(14, &[], &["backup", &format!("guestsnap: image={srv}/*")]);
    assert!(
        text.contains("JOB done")
            && text.contains("blank.dat: ERROR")
            && text.contains("web1/etc/passwd")
    );
    let (text, _) = bed.host(
        14,
        &[],
        &["backup", &format!("guestsnap: image={srv}/* on_error=fail")],
    );
    assert!(text.contains("JOB fatal"));
    // A client file that others can change is refused.
    run(
        "chmod",
        &["666", &bed.path("etc/guestsnap.toml").display().to_string()],
    );
    let (text, _) = bed.host(14, &[], &["backup", &bed.directive("")]);
    assert!(text.contains("GS-103") && text.contains("JOB fatal"));
    bed.nothing_left(&text);
}

/// A node that is no file is no program: it hides one from the daemon alone.
const HIDE: &str = "mount --bind /dev/null";

#[test]
fn root_missing_tools_and_rights_are_named() {
    let bed = Bed::new();
    let image = bed.directive("");
    for (command, directive, code) in [
        (
            format!("{HIDE} /usr/sbin/lvs"),
            "guestsnap: lv=vg0/*",
            "GS-302",
        ),
        (format!("{HIDE} /dev/loop-control"), &image, "GS-405"),
        (
            "exec setpriv --reuid=65534 --regid=65534 --clear-groups".to_owned(),
            &image,
            "GS-309",
        ),
    ] {
        let (text, ok) = bed.host_after(&command, 14, &[], &["backup", directive]);
        assert!(
            ok && text.contains("JOB fatal"),
            "{command}: the job must fail"
        );
        assert!(
            lines(&text, "MSG")
                .iter()
                .any(|l| l.contains(code) && l.contains("To do: ")),
            "{command}: {code}"
        );
        bed.nothing_left(&text);
    }
}

#[test]
fn root_unknown_interface_is_refused() {
    let bed = Bed::new();
    for number in ["13", "15", "24"] {
        let (text, ok) = bed.host(23, &[("VERSION", number), ("DEBUG", "1")], &["load"]);
        assert!(
            !ok && text.contains("REFUSED") && text.contains("GS-702"),
            "version {number}: {text}"
        );
    }
}

#[test]
fn test_exports_and_link_flags() {
    let so = plugin_so().expect("the plugin").display().to_string();
    let symbols = run("nm", &["-D", "--defined-only", &so]);
    let mut names: Vec<_> = symbols
        .lines()
        .filter_map(|l| l.rsplit(' ').next())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["loadPlugin", "unloadPlugin"]);
    let dynamic = run("readelf", &["-d", &so]);
    assert!(
        dynamic.contains("NODELETE") && dynamic.contains("NOW"),
        "{dynamic}"
    );
}
