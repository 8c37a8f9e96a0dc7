//! The last record of each guest, for the command that shows them.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use super::{FOLDER, Saved, Summary, failed, resource};
use crate::error::Result;

/// The last record of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastSave {
    /// Catalog tree, with a trailing slash.
    pub tree: String,
    /// Name of the job, with its time.
    pub job: String,
    /// `None`: it was written by an older version, or with `absent` it is not there any more.
    pub summary: Option<Summary>,
    /// The newest job has nothing of the guest.
    pub absent: bool,
}

/// The last record of each guest that a job on this host has read to its end, by Job resource and
/// name. Jobs that run meanwhile do not matter: records are single lines, appended.
pub fn last(working_dir: &Path) -> Result<Vec<LastSave>> {
    let folder = working_dir.join(FOLDER);
    let files = match std::fs::read_dir(&folder) {
        Ok(files) => files,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed("reading", &folder, error)),
    };
    let mut found: BTreeMap<(String, String), LastSave> = BTreeMap::new();
    for file in files {
        let path = file.map_err(|e| failed("reading", &folder, e))?.path();
        if path.extension().is_none_or(|end| end != "jsonl") {
            continue;
        }
        let text = std::fs::read(&path).map_err(|error| failed("reading", &path, error))?;
        let saved = text.split(|&b| b == b'\n').map(serde_json::from_slice);
        for saved in saved.flatten() {
            let Saved {
                job,
                guest,
                absent,
                dropped,
                summary,
                ..
            } = saved;
            let key = (resource(&job).to_owned(), guest.clone());
            if dropped {
                found.remove(&key);
                continue;
            }
            if absent {
                // The record of its last save may have been cut off.
                let last = found.entry(key).or_insert_with(|| LastSave {
                    tree: guest,
                    job,
                    summary: None,
                    absent,
                });
                last.absent = true;
                continue;
            }
            let last = LastSave {
                tree: guest,
                job,
                summary,
                absent,
            };
            found.insert(key, last);
        }
    }
    Ok(found.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::super::Saves;
    use super::super::tests::{job, result};
    use super::*;
    use crate::job::paths::Paths;

    #[test]
    fn test_the_last_record_of_each_guest() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(last(dir.path()).unwrap(), []);
        let open = |job: &str| Saves::open(dir.path(), job, 1, "").unwrap();
        let none = Paths::default();
        let saves = |job: &str, guests: &[&str], ended| {
            for guest in guests {
                let result = result(ended);
                open(job)
                    .saved(guest.as_bytes(), Vec::new(), &none, &none, result)
                    .unwrap();
            }
        };
        let other = "Other.2026-11-24_21.00.00_01";
        saves(other, &["/g/web/"], 5);
        saves(&job("21.00"), &["/g/web/", "/g/db/", "/g/old/"], 1);
        saves(&job("22.00"), &["/g/web/"], 2);
        open(&job("22.00")).absent(b"/g/old/", false).unwrap();
        saves(&job("21.00"), &["/g/unwanted/"], 1);
        open(&job("22.00")).dropped(b"/g/unwanted/").unwrap();
        // The record of its save was cut off.
        open(&job("22.00")).absent(b"/g/cut/", true).unwrap();
        // A record of an older version, and a torn one.
        let file = dir.path().join(FOLDER).join("Nightly.of web.jsonl");
        let mut text = std::fs::read_to_string(&file).unwrap();
        let line = format!(
            r#"{{"job":"{}","id":1,"guest":"/g/mail/","places":[],"trees":[],"objects":[],"marked":[]}}"#,
            job("20.00")
        );
        text.push_str(&format!("{line}\n{{\"job\":\"Nig"));
        std::fs::write(&file, text).unwrap();
        let found = last(dir.path()).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|l| {
                let ended = l.summary.as_ref().map(|s| s.ended);
                (l.tree.as_str(), l.job.as_str(), ended, l.absent)
            })
            .collect();
        let (first, second) = (job("21.00"), job("22.00"));
        assert_eq!(
            found,
            [
                ("/g/cut/", second.as_str(), None, true),
                ("/g/db/", first.as_str(), Some(1), false),
                ("/g/mail/", &job("20.00"), None, false),
                ("/g/old/", &first, Some(1), true),
                ("/g/web/", &second, Some(2), false),
                ("/g/web/", other, Some(5), false),
            ]
        );
    }
}
