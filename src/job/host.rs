//! This host as the choice of guests sees it.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use nix::sys::signal::SigSet;
use once_cell::unsync::OnceCell;

use crate::config::INSTANCE_TAG;
use crate::config::pattern::Pattern;
use crate::config::trust::{self, Refusal};
use crate::error::{Code, Error, Result, escape};
use crate::guest::{Inventory, LvCandidate, LvKind};
use crate::hostdev::drbd;
use crate::snapshot::lvm::{self, LvInfo};
use crate::snapshot::shared::Groups;

/// Folders that one file pattern may look into.
const MAX_FOLDERS: usize = 1000;

/// How deep `**` looks.
const MAX_DEPTH: usize = 8;

/// Links to DRBD devices by the names of their resources.
const BY_RESOURCE: &str = "/dev/drbd/by-res";

/// How long a folder of definitions may take to answer. `/etc/pve` is a FUSE filesystem whose daemon
/// may hang.
const PATIENCE: Duration = Duration::from_secs(10);

/// This host. Whether a volume is in use by the host itself is checked when it is snapshotted:
/// only then for those that are wanted, and as late as can be.
///
/// LVM is asked once, however many lines are looked up.
#[derive(Debug, Default)]
pub struct Host {
    volumes: OnceCell<Vec<LvCandidate>>,
    /// Folders that did not answer.
    silent: RefCell<BTreeSet<PathBuf>>,
}

impl Host {
    /// Forgets LVM's answer, and keeps the folders that did not answer.
    pub(super) fn anew(self) -> Host {
        Host {
            silent: self.silent,
            ..Host::default()
        }
    }

    /// Does work on a folder of definitions, on a thread of its own. One that does not come back in
    /// time is left behind: nothing can interrupt a wait for a filesystem.
    fn in_time<T: Send + 'static>(
        &self,
        folder: &Path,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let silent = || {
            let text = format!(
                "{}: nothing within {} s",
                escape(folder.as_os_str().as_encoded_bytes()),
                PATIENCE.as_secs()
            );
            Error::new(Code::DefinitionsSilent, text)
        };
        if self.silent.borrow().contains(folder) {
            return Err(silent());
        }
        let (give, take) = channel();
        std::thread::Builder::new()
            .name("guestsnap-look".to_owned())
            .spawn(move || {
                // The daemon's signals are handled by the daemon's threads.
                let _ = SigSet::all().thread_block();
                let _ = give.send(work());
            })
            .map_err(|error| Error::new(Code::Internal, "starting a thread").because(error))?;
        match take.recv_timeout(PATIENCE) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => {
                self.silent.borrow_mut().insert(folder.to_owned());
                Err(silent())
            }
            Err(RecvTimeoutError::Disconnected) => Err(Error::new(
                Code::Internal,
                "a thread beside the job is gone",
            )),
        }
    }
}

impl Inventory for Host {
    fn volumes(&self) -> Result<Vec<LvCandidate>> {
        let asked = self.volumes.get_or_try_init(|| {
            let mut groups = Groups::default();
            let all = lvm::list()?;
            let metadata: Vec<_> = all.iter().map(|lv| metadata_of(lv, &all)).collect();
            let volumes = all.into_iter().zip(metadata).map(|(lv, metadata_of)| {
                Ok(LvCandidate {
                    shared: groups.shared(&lv)?,
                    metadata_of,
                    kind: kind(&lv.attr, &lv.role),
                    writable: !has(&lv.attr, 1, 'r'),
                    ready: has(&lv.attr, 4, 'a') || !has(&lv.attr, 9, 'k'),
                    name: lv.name,
                    tags: lv.tags,
                    size: lv.size,
                    origin: lv.origin,
                    in_use: None,
                })
            });
            volumes.collect()
        });
        asked.cloned()
    }

    fn files(&self, pattern: &Pattern) -> Result<Vec<PathBuf>> {
        find(pattern, Links::Left)
    }

    fn definition_files(&self, pattern: &Pattern) -> Result<Vec<PathBuf>> {
        let wanted = pattern.clone();
        self.in_time(&start(pattern), move || {
            let mut files = find(&wanted, Links::Taken)?;
            // A link beside its file is one definition. A link without a target stays, to be told.
            let mut seen = BTreeSet::new();
            files.retain(|path| fs::canonicalize(path).map_or(true, |real| seen.insert(real)));
            Ok(files)
        })
    }

    fn definition(&self, path: &Path, limit: u64) -> Result<Vec<u8>> {
        let wanted = path.to_owned();
        self.in_time(path.parent().unwrap_or(path), move || {
            trust::read(&wanted, limit).map_err(|refusal| {
                let error = Error::new(
                    Code::BadGuestDefinition,
                    escape(wanted.as_os_str().as_encoded_bytes()),
                );
                match refusal {
                    Refusal::Missing => error.because(io::Error::from(io::ErrorKind::NotFound)),
                    Refusal::Untrusted(cause) => error.because(cause),
                    Refusal::Unreadable(cause) => error.because(cause),
                }
            })
        })
    }

    fn canonical(&self, path: &Path) -> Result<PathBuf> {
        let failed = |e| Error::new(Code::OriginGone, path.display().to_string()).because(e);
        let real = fs::canonicalize(path).map_err(failed)?;
        if !real.starts_with("/dev") {
            return Ok(real);
        }
        if real.starts_with(BY_RESOURCE) && real.is_dir() {
            // A resource with several volumes has no device of its own name.
            return self.canonical(&real.join("0"));
        }
        if let Some(minor) = drbd::device_name(&real).and_then(drbd::minor) {
            return Ok(drbd::backing(minor).unwrap_or(real));
        }
        let name = real.file_name().unwrap_or_default();
        match fs::read_to_string(Path::new("/sys/class/block").join(name).join("dm/name")) {
            Ok(name) => Ok(Path::new("/dev/mapper").join(name.trim_end())),
            Err(_) => Ok(real),
        }
    }
}

/// The volume whose external DRBD metadata a volume has. Its name alone is no evidence.
fn metadata_of(lv: &LvInfo, all: &[LvInfo]) -> Option<String> {
    let data = drbd::data_name(lv.name.lv())?;
    let data = all
        .iter()
        .find(|other| other.name.vg() == lv.name.vg() && other.name.lv() == data)?;
    let on = |lv: &LvInfo| lv.devno.map(drbd::on).unwrap_or_default();
    let above = on(data);
    let instance = |lv: &LvInfo| {
        lv.tags
            .iter()
            .find(|tag| tag.starts_with(INSTANCE_TAG))
            .cloned()
    };
    let alike = on(lv).iter().any(|minor| above.contains(minor))
        || instance(lv).is_some_and(|tag| instance(data) == Some(tag));
    alike.then(|| data.name.lv().to_owned())
}

/// Whether `lv_attr` has this letter at this place.
fn has(attr: &str, place: usize, letter: char) -> bool {
    attr.chars().nth(place) == Some(letter)
}

/// Kind of a volume, by the first letter of its `lv_attr`. Parts of other volumes are private. A public
/// volume of an unknown kind may be a guest's disk.
fn kind(attr: &str, role: &[String]) -> LvKind {
    match attr.chars().next() {
        Some('V') => LvKind::Thin,
        Some('s' | 'S') => LvKind::Snapshot,
        Some('t' | 'd') => LvKind::Pool,
        Some('-' | 'o' | 'm' | 'M' | 'r' | 'R' | 'C') => LvKind::Plain,
        _ if role.iter().any(|word| word == "private") => LvKind::Hidden,
        _ => LvKind::Other,
    }
}

/// The treatment of symbolic links to files in a search. Those to folders are never followed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Links {
    Left,
    Taken,
}

/// Where a search starts: the longest part of the pattern without a wildcard.
fn start(pattern: &Pattern) -> PathBuf {
    let plain = |part: &std::path::Component<'_>| {
        !part
            .as_os_str()
            .to_string_lossy()
            .contains(['*', '?', '[', '{'])
    };
    let parts = Path::new(pattern.text()).components();
    parts.take_while(plain).collect()
}

/// The files that match, sorted.
fn find(pattern: &Pattern, links: Links) -> Result<Vec<PathBuf>> {
    let text = Path::new(pattern.text());
    let start = start(pattern);
    let depth = text.components().count() - start.components().count();
    if depth == 0 {
        return Ok(if start.is_file() {
            vec![start]
        } else {
            Vec::new()
        });
    }
    // `**` stands for any number of folders.
    let deep = pattern.text().contains("**");
    let depth = if deep { MAX_DEPTH } else { depth };
    let mut files = Vec::new();
    let mut folders = vec![(start, depth)];
    let mut looked = 0;
    while let Some((folder, depth)) = folders.pop() {
        looked += 1;
        if looked > MAX_FOLDERS {
            let text = format!(
                "{}: matches below more than {MAX_FOLDERS} folders",
                pattern.text()
            );
            return Err(Error::new(Code::BadDirective, text));
        }
        let failed = |e| Error::new(Code::OriginGone, folder.display().to_string()).because(e);
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            // Not every host has every folder where definitions may be.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(error)),
        };
        for entry in entries {
            let entry = entry.map_err(failed)?;
            let kind = entry.file_type().map_err(failed)?;
            // A link to an image could lead out of the folders that the client file allows.
            if kind.is_dir() && depth > 1 {
                folders.push((entry.path(), depth - 1));
            } else if (kind.is_file()
                || (links == Links::Taken && links_to_file(&kind, &entry.path())))
                && (deep || depth == 1)
                && pattern.matches(entry.path())
            {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Whether this is a link to something else than a folder, or to nothing.
fn links_to_file(kind: &fs::FileType, path: &Path) -> bool {
    kind.is_symlink() && !fs::metadata(path).is_ok_and(|target| target.is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_a_silent_folder_is_not_asked_again_in_a_job() {
        let host = Host::default();
        let folder = Path::new("/etc/pve/qemu-server");
        assert_eq!(host.in_time(folder, || Ok(1)).unwrap(), 1);
        host.silent.borrow_mut().insert(folder.to_owned());
        let host = host.anew();
        let error = host.in_time(folder, || Ok(1)).unwrap_err();
        assert_eq!(error.code(), Code::DefinitionsSilent);
        let other = Path::new("/etc/xen");
        assert_eq!(host.in_time(other, || Ok(2)).unwrap(), 2);
    }

    #[test]
    fn test_kinds_of_volumes() {
        let cases = [
            ("-wi-ao----", "public", LvKind::Plain),
            ("owi-aos---", "public", LvKind::Plain),
            ("Vwi-aotz--", "public", LvKind::Thin),
            ("swi-a-s---", "public", LvKind::Snapshot),
            ("twi-aotz--", "private", LvKind::Pool),
            ("dwi-------", "private", LvKind::Pool),
            // Merging, converted, virtual, with integrity, and kinds unknown today.
            ("Owi-aos---", "public", LvKind::Other),
            ("cwi-aom---", "public", LvKind::Other),
            ("vwi-a-----", "public", LvKind::Other),
            ("gwi-a-----", "public", LvKind::Other),
            ("?wi-a-----", "public", LvKind::Other),
            ("", "public", LvKind::Other),
            ("Twi-ao----", "private", LvKind::Hidden),
            ("iwi-aor---", "private", LvKind::Hidden),
            ("ewi-aor---", "private", LvKind::Hidden),
        ];
        for (attr, role, expected) in cases {
            assert_eq!(kind(attr, &[role.to_owned()]), expected, "{attr}");
        }
    }

    #[test]
    fn test_files() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.cfg", "b.cfg", "b.txt", "sub/c.cfg", "sub/deep/d.cfg"] {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("link.cfg")).unwrap();
        let cases: &[(&str, &[&str])] = &[
            ("*.cfg", &["a.cfg", "b.cfg"]),
            ("b.cfg", &["b.cfg"]),
            ("none.cfg", &[]),
            ("none/*.cfg", &[]),
            ("*/*.cfg", &["sub/c.cfg"]),
            (
                "**/*.cfg",
                &["a.cfg", "b.cfg", "sub/c.cfg", "sub/deep/d.cfg"],
            ),
            ("{a,b}.*", &["a.cfg", "b.cfg", "b.txt"]),
        ];
        for (pattern, expected) in cases {
            let text = format!("{}/{pattern}", folder.path().display());
            let files = Host::default()
                .files(&Pattern::path(&text).unwrap())
                .unwrap();
            let names: Vec<_> = files
                .iter()
                .map(|path| path.strip_prefix(folder.path()).unwrap().to_str().unwrap())
                .collect();
            assert_eq!(&names, expected, "{pattern}");
        }
    }

    /// Example: /etc/xen/auto.
    #[test]
    fn test_definitions_may_be_links() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("auto")).unwrap();
        fs::write(path("web.cfg"), "").unwrap();
        for (target, link) in [
            ("../web.cfg", "auto/web.cfg"),
            ("../gone.cfg", "auto/gone.cfg"),
            ("..", "auto/folder.cfg"),
        ] {
            std::os::unix::fs::symlink(target, path(link)).unwrap();
        }
        let cases: &[(&str, &[&str])] = &[
            ("auto/*.cfg", &["auto/gone.cfg", "auto/web.cfg"]),
            ("**/*.cfg", &["auto/gone.cfg", "auto/web.cfg"]),
            ("*.cfg", &["web.cfg"]),
        ];
        for (pattern, expected) in cases {
            let text = path(pattern).display().to_string();
            let pattern = Pattern::path(&text).unwrap();
            let expected: Vec<_> = expected.iter().map(|name| path(name)).collect();
            assert_eq!(
                Host::default().definition_files(&pattern).unwrap(),
                expected
            );
            assert_eq!(
                Host::default().files(&pattern).unwrap().len(),
                usize::from(!text.contains("auto/"))
            );
        }
    }
}
