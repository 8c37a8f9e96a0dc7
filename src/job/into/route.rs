//! The way of a catalog path to a place in the guest's tree. The catalog may hold any bytes.

use crate::error::escape;

/// Name of a backup's own folder in the guest's root; a number may follow.
const PRIVATE: &[u8] = b".guestsnap";

/// Where a file goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Route {
    /// To this path of the tree, no slash at its start.
    Guest(Vec<u8>),
    /// Nowhere: it is one of ours, the manifest for example.
    Ours,
    /// Nowhere: the target lacks its filesystem, for this reason.
    Missing(String),
}

/// A place in the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// Path, no slash at either end; empty: the root.
    pub(super) path: Vec<u8>,
    /// Name of the volume.
    pub(super) volume: String,
}

/// The places of a guest's tree.
#[derive(Debug, Default)]
pub(super) struct Routes {
    /// Name of our folder in this tree.
    pub(super) private: Vec<u8>,
    pub(super) places: Vec<Place>,
    /// Places whose filesystem is not there, each with the reason.
    pub(super) missing: Vec<(Vec<u8>, String)>,
}

impl Routes {
    /// `path` begins in the guest, with or without a slash.
    pub(super) fn route(&self, path: &[u8]) -> Route {
        let parts = path.split(|&b| b == b'/');
        let parts: Vec<&[u8]> = parts.filter(|p| !p.is_empty() && *p != b".").collect();
        match parts.as_slice() {
            [first, rest @ ..] if is_private(first) => self.of_ours(rest),
            parts => {
                let path = parts.join(&b'/');
                let lost = self.missing.iter().find(|(place, _)| {
                    let rest = path.strip_prefix(&place[..]);
                    rest.is_some_and(|rest| rest.starts_with(b"/"))
                });
                match lost {
                    Some((_, why)) => Route::Missing(why.clone()),
                    None => Route::Guest(path),
                }
            }
        }
    }

    /// A path below our own folder: a volume without a place in fstab, files below a mount point, or ours.
    fn of_ours(&self, rest: &[&[u8]]) -> Route {
        let here = [&[&self.private[..]], rest].concat().join(&b'/');
        let there = |place: &Place| {
            let rest = here.strip_prefix(&place.path[..]);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
        };
        let mut places = self.places.iter().filter(|place| !place.path.is_empty());
        match rest {
            [b"volumes" | b"hidden", _, ..] if places.any(there) => Route::Guest(here),
            [b"volumes", name, inside @ ..] => {
                let shown = escape(name);
                let mut of_it = self.places.iter().filter(|place| place.volume == shown);
                match (of_it.next(), of_it.next()) {
                    // The target's fstab has a place for it.
                    (Some(place), None) => {
                        let path = [&[&place.path[..]], inside].concat();
                        let path: Vec<&[u8]> = path.into_iter().filter(|p| !p.is_empty()).collect();
                        Route::Guest(path.join(&b'/'))
                    }
                    _ => Route::Missing(format!("no volume {shown}")),
                }
            }
            [b"hidden", ..] if rest.len() > 1 => {
                Route::Missing("nothing is mounted over it here".to_owned())
            }
            _ => Route::Ours,
        }
    }
}

/// Whether backups use this name in a guest's root.
pub(super) fn is_private(name: &[u8]) -> bool {
    let Some(rest) = name.strip_prefix(PRIVATE) else {
        return false;
    };
    let number = rest.strip_prefix(b"-").unwrap_or_default();
    rest.is_empty() || !number.is_empty() && number.iter().all(u8::is_ascii_digit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes() -> Routes {
        let place = |path: &str, volume: &str| Place {
            path: path.into(),
            volume: volume.into(),
        };
        Routes {
            private: b".guestsnap-1".to_vec(),
            places: vec![
                place("", "p1"),
                place("var", "p2"),
                place(".guestsnap-1/volumes/p3", "p3"),
                place(".guestsnap-1/hidden/var", "p1"),
            ],
            missing: vec![(b"srv/data".to_vec(), "UUID=1 (/srv/data)".into())],
        }
    }

    #[test]
    fn test_each_path_has_one_way() {
        let guest = |path: &str| Route::Guest(path.into());
        for (path, expected) in [
            ("", guest("")),
            ("/", guest("")),
            ("/etc//./passwd", guest("etc/passwd")),
            ("/var/", guest("var")),
            ("/.guestsnapper/x", guest(".guestsnapper/x")),
            ("/.guestsnap-x/x", guest(".guestsnap-x/x")),
            ("/etc/.guestsnap/x", guest("etc/.guestsnap/x")),
            ("/.guestsnap/", Route::Ours),
            ("/.guestsnap/volumes/", Route::Ours),
            ("/.guestsnap/manifest.json", Route::Ours),
            ("/.guestsnap-1/definition/web1.cfg", Route::Ours),
            ("/.guestsnap/kit/../../etc/x", Route::Ours),
            (
                "/.guestsnap/volumes/p3/a/b",
                guest(".guestsnap-1/volumes/p3/a/b"),
            ),
            ("/.guestsnap-1/volumes/p3", guest(".guestsnap-1/volumes/p3")),
            // Not in fstab at the backup, and now it is.
            ("/.guestsnap/volumes/p2/lib/x", guest("var/lib/x")),
            ("/.guestsnap/volumes/p2/", guest("var")),
            (
                "/.guestsnap/volumes/p9/x",
                Route::Missing("no volume p9".into()),
            ),
            (
                "/.guestsnap/hidden/var/x",
                guest(".guestsnap-1/hidden/var/x"),
            ),
            (
                "/.guestsnap/hidden/srv/x",
                Route::Missing("nothing is mounted over it here".into()),
            ),
            // The mount point itself is on the filesystem around it.
            ("/srv/data/", guest("srv/data")),
            ("/srv/database", guest("srv/database")),
            ("/srv/data/x", Route::Missing("UUID=1 (/srv/data)".into())),
        ] {
            assert_eq!(routes().route(path.as_bytes()), expected, "{path}");
        }
    }

    #[test]
    fn test_any_bytes_have_a_way() {
        for path in [
            &b"/\xff\0/../.."[..],
            b"////",
            b"/.guestsnap-",
            b"..",
            b"\n",
        ] {
            routes().route(path);
        }
    }
}
