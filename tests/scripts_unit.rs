//! Scripts that change a machine, with stand-ins for the programs that would change it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const INSTALL_DEPS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/install-deps");

/// Programs that stand in front of the real ones in PATH. Each writes down how it was called.
struct StandIns(tempfile::TempDir);

impl StandIns {
    fn new(programs: &[(&str, &str)]) -> StandIns {
        let folder = tempfile::tempdir().unwrap();
        for (name, script) in programs {
            let path = folder.path().join(name);
            let log = folder.path().join("calls");
            let text = format!(
                "#!/bin/sh\necho {name} \"$@\" >> '{}'\n{script}\n",
                log.display()
            );
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        StandIns(folder)
    }

    fn run(&self, script: &str, arguments: &[&str]) -> Output {
        let path = format!("{}:/usr/bin:/bin", self.0.path().display());
        let mut command = Command::new(script);
        command.args(arguments).env("PATH", path).output().unwrap()
    }

    fn calls(&self) -> String {
        let log: PathBuf = self.0.path().join("calls");
        fs::read_to_string(log).unwrap_or_default()
    }
}

/// Runs `scripts/install-deps` where nothing is installed and apt plans this; what it says, and how apt was called.
fn install_deps(plan: &str) -> (bool, String, String) {
    let stand_ins = StandIns::new(&[
        ("dpkg-query", "exit 1"),
        // Not root: it stops before it changes anything here, whatever it decides.
        ("id", "echo 1000"),
        ("apt-get", &format!("cat <<'END'\n{plan}\nEND")),
    ]);
    assert!(Path::new(INSTALL_DEPS).exists());
    let output = stand_ins.run(INSTALL_DEPS, &[]);
    let said = String::from_utf8(output.stderr).unwrap();
    let calls = stand_ins.calls();
    let apt = calls.lines().filter(|line| line.starts_with("apt-get "));
    (
        output.status.success(),
        said,
        apt.collect::<Vec<_>>().join("\n"),
    )
}

#[test]
fn test_install_deps_removes_nothing() {
    let plan = "Remv bacula-director-pgsql [9.6.7-7] [bacula-director:amd64 ]\n\
                Inst bacula-director-sqlite3 (9.6.7-7 Debian:12 [all])\n\
                Purg dbconfig-pgsql [2.0]\n\
                Conf bacula-director-sqlite3 (9.6.7-7 Debian:12 [all])";
    let (good, said, apt) = install_deps(plan);
    assert!(!good);
    let named = "would remove packages that are installed: bacula-director-pgsql dbconfig-pgsql";
    assert!(said.contains(named), "{said}");
    assert!(
        said.contains("nothing was changed") && said.contains("mmdebstrap"),
        "{said}"
    );
    assert!(
        apt.starts_with("apt-get install -s ") && apt.lines().count() == 1,
        "{apt}"
    );
}

#[test]
fn test_install_deps_goes_on_where_nothing_is_removed() {
    let plan = "Inst gcc (12 Debian:12 [amd64])\nConf gcc (12 Debian:12 [amd64])";
    let (good, said, apt) = install_deps(plan);
    assert!(!good);
    assert_eq!(said, "install-deps: must be root to install them\n");
    assert_eq!(apt.lines().count(), 1, "{apt}");
    // Should the machine change between the plan and the deed, apt itself refuses.
    let script = fs::read_to_string(INSTALL_DEPS).unwrap();
    assert!(script.contains("install=(apt-get install -y --no-install-recommends --no-remove "));
}

/// A build alone installs neither a Bacula beside a running one nor an emulator.
#[test]
fn test_install_deps_for_a_build_takes_compilers_and_libraries_only() {
    let stand_ins = StandIns::new(&[("dpkg-query", "exit 1")]);
    let missing = |arguments: &[&str]| {
        let output = stand_ins.run(INSTALL_DEPS, arguments);
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stdout).unwrap()
    };
    let build = missing(&["--check", "build"]);
    assert!(
        build.contains("gcc") && build.contains("libblkid-dev"),
        "{build}"
    );
    for other in ["bacula", "mmdebstrap", "qemu", "sqlite3", "lvm2"] {
        assert!(!build.contains(other), "{other} in {build}");
    }
    let all = missing(&["--check"]);
    assert!(all.contains("bacula-director-sqlite3") && all.contains("libblkid-dev"));
    let wrong = stand_ins.run(INSTALL_DEPS, &["bulid"]);
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn test_make_install_puts_everything_below_prefix_and_keeps_the_client_file() {
    let folder = tempfile::tempdir().unwrap();
    let (target, root) = (folder.path().join("target"), folder.path().join("root"));
    fs::create_dir_all(target.join("release")).unwrap();
    fs::write(target.join("guestsnap-fd.so"), "plugin").unwrap();
    fs::write(target.join("release/guestsnap"), "command").unwrap();
    let install = || {
        let output = Command::new("make")
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(["-s", "install", "READY=1", "PREFIX=/opt/gs"])
            .arg("PLUGINDIR=/opt/bacula/plugins")
            .arg(format!("DESTDIR={}", root.display()))
            .env("CARGO_TARGET_DIR", &target)
            .env_remove("MAKEFLAGS")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    install();
    for (path, mode) in [
        ("opt/bacula/plugins/guestsnap-fd.so", 0o644),
        ("opt/gs/sbin/guestsnap", 0o755),
        ("opt/gs/share/man/man8/guestsnap.8", 0o644),
        ("opt/gs/share/bash-completion/completions/guestsnap", 0o644),
        ("opt/gs/share/zsh/site-functions/_guestsnap", 0o644),
        (
            "opt/gs/share/fish/vendor_completions.d/guestsnap.fish",
            0o644,
        ),
        ("opt/gs/share/doc/guestsnap-fd/docs/configuration.md", 0o644),
        (
            "opt/gs/share/doc/guestsnap-fd/examples/one-job-for-all.conf",
            0o644,
        ),
        ("etc/bacula/guestsnap.toml", 0o644),
    ] {
        let found = fs::metadata(root.join(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
        assert_eq!(found.permissions().mode() & 0o777, mode, "{path}");
    }
    let unit = root.join("opt/gs/lib/systemd/system/guestsnap-sweep.service");
    let unit = fs::read_to_string(unit).unwrap();
    assert!(
        unit.contains("ExecStart=/opt/gs/sbin/guestsnap sweep"),
        "{unit}"
    );
    let client_file = root.join("etc/bacula/guestsnap.toml");
    fs::write(&client_file, "# mine\n").unwrap();
    install();
    assert_eq!(fs::read_to_string(client_file).unwrap(), "# mine\n");
}
