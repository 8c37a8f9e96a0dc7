//! Volume groups whose metadata other hosts write too.
//!
//! A snapshot changes the group's metadata. Two hosts that do so without a lock overwrite each
//! other's version, which destroys volumes. LVM's marks for such groups are facts of lvmlockd(8) and
//! lvmsystemid(7).

use std::fs;
use std::path::Path;

use super::lvm::{self, LvInfo, Sharing};
use crate::Result;

/// The daemon's process number, where LVM's build puts it by default.
const LVMLOCKD: &str = "/run/lvmlockd.pid";

/// Judges groups by this host's own system ID and its lvmlockd. Both are determined at first need:
/// usual groups have no mark.
#[derive(Debug, Default)]
pub struct Groups {
    system_id: Option<String>,
    lock_daemon: Option<bool>,
}

impl Groups {
    /// Explains why other hosts may change the volume's group while this one does; `None`: this host
    /// is alone in it, or LVM coordinates them.
    pub fn shared(&mut self, lv: &LvInfo) -> Result<Option<String>> {
        let sharing = &lv.sharing;
        if *sharing == Sharing::default() {
            return Ok(None);
        }
        let own = match &self.system_id {
            Some(own) => own.clone(),
            None => lvm::system_id()?,
        };
        let running = *self
            .lock_daemon
            .get_or_insert_with(|| lock_daemon(Path::new(LVMLOCKD), Path::new("/proc")));
        let why = why(lv.name.vg(), sharing, &own, running);
        self.system_id = Some(own);
        Ok(why)
    }
}

fn why(vg: &str, sharing: &Sharing, own: &str, lock_daemon: bool) -> Option<String> {
    let Sharing {
        lock_type,
        clustered,
        system_id,
    } = sharing;
    if *clustered || lock_type == "clvm" {
        // No LVM of today has a lock for these.
        return Some(format!("{vg} is marked clustered"));
    }
    if !system_id.is_empty() && system_id != own {
        let own = match own {
            "" => "none".to_owned(),
            own => format!("`{own}`"),
        };
        return Some(format!(
            "{vg} belongs to the host with the LVM system ID `{system_id}`; this host's is {own}"
        ));
    }
    if !lock_type.is_empty() && !lock_daemon {
        return Some(format!(
            "{vg} has the lock type {lock_type}, and lvmlockd does not run here"
        ));
    }
    None
}

/// Whether lvmlockd runs. A stale file names another process or none.
fn lock_daemon(file: &Path, proc: &Path) -> bool {
    let name = fs::read_to_string(file).ok().and_then(|text| {
        let pid: u32 = text.trim().parse().ok()?;
        fs::read_to_string(proc.join(pid.to_string()).join("comm")).ok()
    });
    name.is_some_and(|name| name.trim_end() == "lvmlockd")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_a_group_is_shared_by_its_marks() {
        let marks = |lock_type: &str, clustered, system_id: &str| Sharing {
            lock_type: lock_type.into(),
            clustered,
            system_id: system_id.into(),
        };
        // Marks, own system ID, whether lvmlockd runs, part of the reason.
        let cases = [
            (marks("", false, ""), "", false, None),
            (marks("", false, "me"), "me", false, None),
            (marks("sanlock", false, ""), "me", true, None),
            (marks("dlm", false, ""), "", true, None),
            (
                marks("sanlock", false, ""),
                "",
                false,
                Some("lock type sanlock"),
            ),
            (marks("dlm", false, ""), "me", false, Some("lock type dlm")),
            (marks("idm", false, ""), "me", false, Some("lock type idm")),
            (
                marks("", false, "other"),
                "me",
                true,
                Some("`other`; this host's is `me`"),
            ),
            (
                marks("", false, "other"),
                "",
                false,
                Some("`other`; this host's is none"),
            ),
            // A running lvmlockd takes no lock for these.
            (marks("", true, ""), "", true, Some("clustered")),
            (marks("clvm", false, ""), "", true, Some("clustered")),
        ];
        for (sharing, own, running, expected) in cases {
            let found = why("vg0", &sharing, own, running);
            match expected {
                None => assert_eq!(found, None, "{sharing:?}"),
                Some(part) => assert!(
                    found.as_ref().is_some_and(|text| text.contains(part)),
                    "{sharing:?}: {found:?}"
                ),
            }
        }
    }

    #[test]
    fn test_a_stale_file_is_no_running_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let (file, proc) = (dir.path().join("pid"), dir.path().join("proc"));
        assert!(!lock_daemon(&file, &proc));
        fs::create_dir_all(proc.join("77")).unwrap();
        fs::create_dir_all(proc.join("78")).unwrap();
        fs::write(proc.join("77/comm"), "lvmlockd\n").unwrap();
        fs::write(proc.join("78/comm"), "bash\n").unwrap();
        for (text, expected) in [
            ("77\n", true),
            ("78\n", false),
            ("79\n", false),
            ("x", false),
        ] {
            fs::write(&file, text).unwrap();
            assert_eq!(lock_daemon(&file, &proc), expected, "{text}");
        }
    }
}
