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

/// Debian's configuration of a new Director, as its package makes it of this template.
const TEMPLATE: &str = "/usr/share/bacula-common/defconfig/bacula-dir.conf";

fn samples(folder: &str) -> Result<Vec<PathBuf>> {
    let folder = crate::repository().join("bacula-conf").join(folder);
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    files.retain(|file| file.extension().is_some_and(|e| e == "conf"));
    files.sort();
    Ok(files)
}

/// Debian's own Director with a catalog that is there: the test of a configuration opens it.
fn debian_director(bacula: &Bacula) -> Result<String> {
    let template = fs::read_to_string(TEMPLATE)?;
    let catalog = fs::read_to_string(bacula.path().join("bacula-dir.conf"))?;
    let database = catalog.lines().find(|line| line.contains("dbname"));
    let folder = bacula.path().join("dir").display().to_string();
    let lines = template.lines().map(|line| match line {
        line if line.contains("dbname") => database.unwrap_or_default().to_owned(),
        line if line.contains("WorkingDirectory") => format!("  WorkingDirectory = \"{folder}\""),
        line => line.replace("@debian_basename@", "host1"),
    });
    Ok(lines.map(|line| line + "\n").collect())
}

/// Every sample goes through the daemons' own test of a configuration; a broken one does not.
fn samples_are_valid() -> Result {
    let bacula = Bacula::start(BaculaOptions::default())?;
    let file = bacula.path().join("sample.conf");
    let test = |daemon: &str, text: &str| -> Result {
        fs::write(&file, text)?;
        cmd::run(daemon, ["-t", "-c", &file.display().to_string()]).map(drop)
    };
    let around = debian_director(&bacula)?;
    test("bacula-dir", &around)?;
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
    check!(directors.len() >= 7, "only {} samples", directors.len());
    Ok(())
}
