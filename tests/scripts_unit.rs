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

    fn run(&self, script: &str) -> Output {
        let path = format!("{}:/usr/bin:/bin", self.0.path().display());
        Command::new(script).env("PATH", path).output().unwrap()
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
    let output = stand_ins.run(INSTALL_DEPS);
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
