//! The samples in `bacula-conf/`, as Bacula itself reads them.

use crate::Result;
use crate::bacula::{Bacula, BaculaOptions};
use crate::check;
use crate::cmd;
use crate::inside::{Scenario, scenario};
use std::fs;
use std::path::PathBuf;

/// On this machine.
pub const ROOT: &[Scenario] = &[scenario("root_samples_are_valid", samples_are_valid)];

/// What the samples take for granted on a Director.
const AROUND: &str = r#"
Client { Name = host1-fd; Address = 127.0.0.1; Catalog = MyCatalog; Password = "x" }
Storage { Name = file; Address = 127.0.0.1; Password = "x"; Device = d; Media Type = File }
Pool { Name = default; Pool Type = Backup }
Messages { Name = standard; catalog = all }
Schedule {
  Name = nightly
  Run = Level=Incremental at 02:00
}
"#;

fn samples(folder: &str) -> Result<Vec<PathBuf>> {
    let folder = crate::repository().join("bacula-conf").join(folder);
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    files.retain(|file| file.extension().is_some_and(|e| e == "conf"));
    files.sort();
    Ok(files)
}

/// Every sample goes through the daemons' own test of a configuration; a broken one does not.
fn samples_are_valid() -> Result {
    let bacula = Bacula::start(BaculaOptions::default())?;
    let file = bacula.path().join("sample.conf");
    let test = |daemon: &str, text: &str| -> Result {
        fs::write(&file, text)?;
        cmd::run(daemon, ["-t", "-c", &file.display().to_string()]).map(drop)
    };
    let around = fs::read_to_string(bacula.path().join("bacula-dir.conf"))? + AROUND;
    let directors = samples("director")?;
    for sample in &directors {
        println!("{}", sample.display());
        test(
            "bacula-dir",
            &(around.clone() + &fs::read_to_string(sample)?),
        )?;
    }
    let broken =
        around.clone() + &fs::read_to_string(&directors[0])?.replace("Plugin =", "Plugins =");
    check!(
        test("bacula-dir", &broken).is_err(),
        "a broken sample passes"
    );

    let other = "Director { Name = dir; Password = \"x\" }\nMessages { Name = Standard; director = dir = all }\n";
    for sample in samples("client")? {
        println!("{}", sample.display());
        test("bacula-fd", &(fs::read_to_string(sample)? + other))?;
    }
    check!(directors.len() >= 3, "only {} samples", directors.len());
    Ok(())
}
