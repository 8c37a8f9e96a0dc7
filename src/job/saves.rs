//! Records of the guests that each job saved, for the job that adds to it.
//!
//! An incremental job asks for files that changed since the previous job. For a guest or a disk that the
//! previous job could not read, that would silently be next to nothing. The daemon knows no guests, so
//! this file records them: lines of JSON, one file per Job resource. Accurate jobs compare with the
//! catalog, but it holds complete timestamps even for unreadable or partly read files.

pub(super) mod last;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::{fs::File, io};

use rustix::fs::{Mode, OFlags, openat, renameat};
use serde::{Deserialize, Serialize};

use super::paths::Paths;
use crate::error::{Code, Error, Result};
use crate::snapshot::open_folder;

/// The folder, beside that of the journals.
const FOLDER: &str = "guestsnap-saves";

/// A longer file loses its first half.
const MAX_FILE: u64 = 4 << 20;

/// Maximum bytes recorded for one guest. A guest with more is saved again whole.
const MAX_LINE: usize = 128 << 10;

/// A filesystem with its place in the guest, or the exclusion rules.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Place {
    /// Catalog tree, with a trailing slash.
    tree: String,
    /// Tells it from another one.
    what: String,
    /// Tells its volume from copies of it, as long as the guest's disks keep their names. Not for a comparison.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    volume: String,
}

impl PartialEq for Place {
    fn eq(&self, other: &Place) -> bool {
        (&self.tree, &self.what) == (&other.tree, &other.what)
    }
}

impl Place {
    pub(super) fn new(tree: &[u8], what: String) -> Place {
        let tree = readable(tree);
        let volume = String::new();
        Place { tree, what, volume }
    }

    /// The place of a volume with this key.
    pub(super) fn of(self, key: &str) -> Place {
        let volume = key.to_owned();
        Place { volume, ..self }
    }
}

/// The result of a guest that a job has read to its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Seconds since 1970.
    pub ended: u64,
    /// Whether it was a full backup; otherwise only changes were sent.
    pub full: bool,
    /// Files and other objects sent.
    pub files: u64,
    /// Bytes of files sent.
    pub bytes: u64,
    /// Errors reported, those of its disks and volumes included.
    pub errors: u64,
    /// SHA-256 of the files of its rebuild kit, by their paths in the guest.
    #[serde(default)]
    pub kit: BTreeMap<String, String>,
    /// [`Consistency`](crate::guest::quiesce::Consistency), as text.
    pub consistency: String,
}

/// A guest in a job.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    /// The job's name with its time: the Director tells the next job this one.
    job: String,
    /// Two Directors may use the same names.
    id: u32,
    /// Catalog tree of the guest, with a trailing slash.
    guest: String,
    places: Vec<Place>,
    /// Unreadable trees and single objects.
    trees: Vec<String>,
    objects: Vec<String>,
    /// Trees that were excluded because of a marker in them.
    marked: Vec<String>,
    /// The job has nothing of the guest, but a job before has.
    #[serde(default)]
    absent: bool,
    /// The job's lines leave the guest out, which a job before has saved.
    #[serde(default)]
    dropped: bool,
    /// With `absent`: the job before does not have it either, but an earlier one. For [`last::last`] alone.
    #[serde(default)]
    earlier: bool,
    #[serde(default)]
    summary: Option<Summary>,
}

impl Saved {
    fn is_there(&self) -> bool {
        !self.absent && !self.dropped
    }

    fn missing(&self) -> Paths {
        let bytes = |path: &String| path.clone().into_bytes();
        let mut missing: Paths = self.trees.iter().map(bytes).collect();
        self.objects
            .iter()
            .for_each(|path| missing.insert_object(bytes(path)));
        missing
    }
}

/// The memory of one job.
#[derive(Debug)]
pub(super) struct Saves {
    job: String,
    id: u32,
    path: PathBuf,
    file: File,
    /// Contents of the previous job.
    before: Vec<Saved>,
    /// Catalog trees of all guests that [`last::last`] knows.
    known: BTreeSet<String>,
}

impl Saves {
    /// Reads the record of the previous job, `previous`. `job` is this job's name with its time.
    pub(super) fn open(working_dir: &Path, job: &str, id: u32, previous: &str) -> Result<Saves> {
        let path = working_dir.join(FOLDER);
        let folder = open_folder(&path)?;
        let name = format!("{}.jsonl", resource(job).replace('/', "_"));
        let path = path.join(&name);
        let (file, text) = read(&folder, &name).map_err(|error| failed("reading", &path, error))?;
        let saved = text.split(|&b| b == b'\n').map(serde_json::from_slice);
        // A line that is torn says nothing: that guest is saved again.
        let saved = saved.flatten();
        let mut known = BTreeSet::new();
        let note = |saved: &Saved| match saved.dropped {
            true => drop(known.remove(&saved.guest)),
            false => drop(known.insert(saved.guest.clone())),
        };
        let before = saved.inspect(note);
        let mut before: Vec<Saved> = before.filter(|s: &Saved| s.job == previous).collect();
        if before.iter().any(|saved| saved.id != before[0].id) {
            before.clear();
        }
        Ok(Saves {
            job: job.to_owned(),
            id,
            path,
            file,
            before,
            known,
        })
    }

    /// Paths of a guest that the previous job lacks, or that held something else there.
    pub(super) fn not_before(&self, guest: &[u8], places: &[Place]) -> Paths {
        let Some(saved) = self.of(guest) else {
            return [guest.to_vec()].into_iter().collect();
        };
        let new = places.iter().filter(|place| !saved.places.contains(place));
        // Files that a filesystem covered which is gone.
        let gone = saved.places.iter().filter(|place| !places.contains(place));
        let mut paths = saved.missing();
        paths.extend(new.chain(gone).map(|place| place.tree.clone().into_bytes()));
        paths
    }

    /// The volumes of a guest in the job before, by their places in the guest.
    pub(super) fn volumes_before(&self, guest: &[u8]) -> BTreeMap<Vec<u8>, String> {
        let places = self.of(guest).into_iter().flat_map(|saved| &saved.places);
        let known = places.filter(|place| !place.volume.is_empty());
        let below = known.filter_map(|place| {
            let path = place.tree.as_bytes().strip_prefix(guest)?;
            let path = path.strip_suffix(b"/").unwrap_or(path);
            Some((path.to_vec(), place.volume.clone()))
        });
        below.collect()
    }

    /// The files of a guest's rebuild kit that the job before has: paths in the guest and SHA-256.
    pub(super) fn kit_before(&self, guest: &[u8]) -> BTreeMap<String, String> {
        let saved = self.of(guest).and_then(|saved| saved.summary.as_ref());
        saved.map(|summary| summary.kit.clone()).unwrap_or_default()
    }

    /// Trees of a guest where another volume is than in the job before, though that one is still `there`.
    pub(super) fn moved(
        &self,
        guest: &[u8],
        places: &[Place],
        there: impl Fn(&str) -> bool,
    ) -> Paths {
        let before = self.of(guest).into_iter().flat_map(|saved| &saved.places);
        let moved = before.filter(|before| {
            let now = places.iter().filter(|now| now.tree == before.tree);
            let mut now = now.filter(|now| !now.volume.is_empty());
            !before.volume.is_empty()
                && there(&before.volume)
                && now.next().is_none_or(|now| now.volume != before.volume)
        });
        moved.map(|place| place.tree.clone().into_bytes()).collect()
    }

    /// Trees that the previous job excluded because of a marker in them. Without the marker, their
    /// contents are new to a job.
    pub(super) fn marked_before(&self, guest: &[u8]) -> Paths {
        let trees = self.of(guest).into_iter().flat_map(|saved| &saved.marked);
        trees.map(|tree| tree.clone().into_bytes()).collect()
    }

    /// Paths of a guest that the previous job could not read.
    pub(super) fn unread_before(&self, guest: &[u8]) -> Paths {
        self.of(guest).map(Saved::missing).unwrap_or_default()
    }

    /// The catalog trees of the guests that the job before or one before that has saved.
    pub(super) fn guests_before(&self) -> impl Iterator<Item = &str> {
        let wanted = self.before.iter();
        let wanted = wanted.filter(|saved| !saved.dropped && !saved.earlier);
        wanted.map(|saved| saved.guest.as_str())
    }

    /// The catalog trees of the guests that any job has saved, up to the one that dropped them.
    pub(super) fn guests_known(&self) -> impl Iterator<Item = &str> {
        self.known.iter().map(String::as_str)
    }

    fn of(&self, guest: &[u8]) -> Option<&Saved> {
        // A job may be told of a guest twice, if it was started again: the last time counts.
        let known = |saved: &&Saved| saved.guest.as_bytes() == guest && saved.is_there();
        self.before.iter().rfind(known)
    }

    /// Records a guest that was read to its end, except for the `missing` paths and the excluded trees in
    /// `marked`.
    pub(super) fn saved(
        &self,
        guest: &[u8],
        places: Vec<Place>,
        missing: &Paths,
        marked: &Paths,
        summary: Summary,
    ) -> Result<()> {
        let mut told = Paths::default();
        told.extend(missing.trees().map(|path| readable(path).into_bytes()));
        for path in missing.objects() {
            match readable(path).into_bytes() {
                whole if whole.len() == path.len() => told.insert_object(whole),
                tree => told.insert(tree),
            }
        }
        let texts =
            |paths: &mut dyn Iterator<Item = &Vec<u8>>| paths.map(|p| readable(p)).collect();
        let mut saved = Saved {
            job: self.job.clone(),
            id: self.id,
            guest: readable(guest),
            places,
            trees: texts(&mut told.trees()),
            objects: texts(&mut told.objects()),
            marked: texts(&mut marked.trees()),
            absent: false,
            dropped: false,
            earlier: false,
            summary: Some(summary),
        };
        let encode = |saved: &Saved| serde_json::to_string(saved).map_err(io::Error::from);
        let mut line = encode(&saved);
        if line.as_ref().is_ok_and(|line| line.len() > MAX_LINE) {
            saved.places.clear();
            saved.objects.clear();
            saved.marked.clear();
            // It is sent again.
            if let Some(summary) = &mut saved.summary {
                summary.kit.clear();
            }
            saved.trees = vec![saved.guest.clone()];
            line = encode(&saved);
        }
        self.write(line)
    }

    /// Remembers a guest that was saved before this job, and not in it. `earlier`: the job before did not have
    /// it either.
    pub(super) fn absent(&self, guest: &[u8], earlier: bool) -> Result<()> {
        self.without(guest, false, earlier)
    }

    /// Remembers a guest that was saved before this job, and is left out of it by its lines.
    pub(super) fn dropped(&self, guest: &[u8]) -> Result<()> {
        self.without(guest, true, false)
    }

    fn without(&self, guest: &[u8], dropped: bool, earlier: bool) -> Result<()> {
        let saved = Saved {
            job: self.job.clone(),
            id: self.id,
            guest: readable(guest),
            places: Vec::new(),
            trees: Vec::new(),
            objects: Vec::new(),
            marked: Vec::new(),
            absent: !dropped,
            dropped,
            earlier,
            summary: None,
        };
        self.write(serde_json::to_string(&saved).map_err(io::Error::from))
    }

    fn write(&self, line: io::Result<String>) -> Result<()> {
        line.and_then(|line| (&self.file).write_all(format!("{line}\n").as_bytes()))
            .map_err(|error| failed("writing", &self.path, error))
    }
}

fn failed(step: &str, path: &Path, error: io::Error) -> Error {
    Error::new(Code::JournalFailed, format!("{step} {}", path.display())).because(error)
}

/// Name of the Job resource within a job's name, which ends with a time and a number.
fn resource(job: &str) -> &str {
    job.rsplitn(4, '.').nth(3).unwrap_or(job)
}

/// A path as text. A path that is not UTF-8 is cut to the folder around its first invalid part.
fn readable(path: &[u8]) -> String {
    let valid = path.utf8_chunks().next().map_or("", |chunk| chunk.valid());
    match valid.len() == path.len() {
        true => valid.to_owned(),
        false => valid[..valid.rfind('/').map_or(0, |at| at + 1)].to_owned(),
    }
}

/// Opens the file for appending. Returns it with its contents.
fn read(folder: &OwnedFd, name: &str) -> io::Result<(File, Vec<u8>)> {
    let open = |name: &str, more: OFlags| {
        let flags = OFlags::RDWR | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW;
        let mode = Mode::RUSR | Mode::WUSR;
        openat(folder, name, flags | more | OFlags::CLOEXEC, mode).map(File::from)
    };
    let mut file = open(name, OFlags::empty())?;
    let length = file.metadata()?.len();
    let mut text = Vec::new();
    file.seek(SeekFrom::Start(length.saturating_sub(MAX_FILE)))?;
    (&file).take(MAX_FILE).read_to_end(&mut text)?;
    if length > MAX_FILE {
        let half = text.len() / 2;
        let begin = text[half..].iter().position(|&b| b == b'\n');
        text.drain(..begin.map_or(half, |at| half + at + 1));
        let new = format!("{name}.new");
        file = open(&new, OFlags::TRUNC)?;
        file.write_all(&text)?;
        renameat(folder, &new, folder, name)?;
    } else if text.last().is_some_and(|&b| b != b'\n') {
        file.write_all(b"\n")?;
    }
    Ok((file, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(tree: &str, what: &str) -> Place {
        Place::new(tree.as_bytes(), what.into())
    }

    pub(super) fn job(time: &str) -> String {
        format!("Nightly.of web.2026-11-25_{time}.00_07")
    }

    pub(super) fn result(ended: u64) -> Summary {
        Summary {
            ended,
            full: true,
            files: 7,
            bytes: 4096,
            errors: 0,
            kit: Default::default(),
            consistency: "crash-consistent".into(),
        }
    }

    fn paths(paths: &[&str]) -> Paths {
        paths.iter().map(|p| p.as_bytes().to_vec()).collect()
    }

    #[test]
    fn test_what_the_job_before_does_not_have() {
        let dir = tempfile::tempdir().unwrap();
        let open = |job: &str, id, before: &str| Saves::open(dir.path(), job, id, before).unwrap();
        let (root, data) = (place("/g/web/", "ext4 1"), place("/g/web/data/", "xfs 2"));
        let both = [root.clone(), data.clone()];
        let web = b"/g/web/";
        let (everything, none) = (paths(&["/g/web/"]), Paths::default());

        let first = open(&job("21.00"), 1, "");
        assert_eq!(first.not_before(web, &both), everything);
        let mut lost = paths(&["/g/web/etc/a", "/g/web/home/"]);
        lost.insert_object(b"/g/web/var/".to_vec());
        let cache = paths(&["/g/web/cache/"]);
        first
            .saved(web, vec![root.clone()], &lost, &cache, result(1))
            .unwrap();

        let next = open(&job("22.00"), 2, &job("21.00"));
        let not = next.not_before(web, &both);
        let mut expected = lost.clone();
        expected.insert(b"/g/web/data/".to_vec());
        assert_eq!(not, expected);
        assert_eq!(next.unread_before(web), lost);
        assert_eq!(next.marked_before(web), cache);
        assert_eq!(next.not_before(b"/g/mail/", &[]), paths(&["/g/mail/"]));
        assert_eq!(next.unread_before(b"/g/mail/"), Paths::default());
        next.saved(web, both.to_vec(), &Paths::default(), &none, result(2))
            .unwrap();

        let last = open(&job("23.00"), 3, &job("22.00"));
        assert_eq!(last.not_before(web, &both), Paths::default());
        // Another disk at the same place.
        let other = [root, place("/g/web/data/", "xfs 3")];
        assert_eq!(last.not_before(web, &other), paths(&["/g/web/data/"]));
        // Everything below it.
        assert_eq!(last.not_before(web, &other[..1]), paths(&["/g/web/data/"]));
        assert_eq!(last.unread_before(web), Paths::default());
        // The Director adds to the first one again; to an unknown one; another resource.
        let again = open(&job("23.01"), 4, &job("21.00"));
        assert_ne!(again.not_before(web, &both), Paths::default());
        let again = open(&job("23.02"), 5, &job("20.00"));
        assert_eq!(again.not_before(web, &both), everything);
        let again = open("Other.2026-11-25_23.03.00_07", 6, &job("22.00"));
        assert_eq!(again.not_before(web, &both), everything);
        // A guest that a job has nothing of is remembered, and is as new when it is back.
        let mail = b"/g/mail/";
        let absent = open(&job("23.05"), 8, &job("22.00"));
        absent.absent(mail, false).unwrap();
        let again = open(&job("23.06"), 9, &job("23.05"));
        assert_eq!(again.guests_before().collect::<Vec<_>>(), ["/g/mail/"]);
        assert_eq!(again.not_before(mail, &[]), paths(&["/g/mail/"]));
        assert_eq!(again.unread_before(mail), Paths::default());
        // One that only an earlier job has is no matter of the next one.
        let full = open(&job("23.07"), 10, "");
        assert_eq!(full.guests_before().count(), 0);
        let known: Vec<_> = full.guests_known().collect();
        assert_eq!(known, ["/g/mail/", "/g/web/"]);
        full.absent(mail, true).unwrap();
        full.dropped(web).unwrap();
        let next = open(&job("23.08"), 11, &job("23.07"));
        assert_eq!(next.guests_before().count(), 0);
        assert_eq!(next.guests_known().collect::<Vec<_>>(), ["/g/mail/"]);
        // Two Directors with the same names.
        let twin = open(&job("22.00"), 99, "");
        twin.saved(web, both.to_vec(), &Paths::default(), &none, result(3))
            .unwrap();
        let again = open(&job("23.04"), 7, &job("22.00"));
        assert_eq!(again.not_before(web, &both), everything);
    }

    #[test]
    fn test_where_the_volumes_were() {
        let dir = tempfile::tempdir().unwrap();
        let open = |job: &str, before: &str| Saves::open(dir.path(), job, 1, before).unwrap();
        let of = |tree: &str, volume: &str| place(tree, "ext4 1").of(volume);
        let none = Paths::default();
        let web = b"/g/web/";
        let places = vec![
            of("/g/web/", "vg/web p1"),
            of("/g/web/srv/data/", "vg/data"),
            place("/g/web/", "rules"),
        ];
        let first = open(&job("21.00"), "");
        first
            .saved(web, places.clone(), &none, &none, result(1))
            .unwrap();
        assert!(first.volumes_before(web).is_empty());
        let next = open(&job("22.00"), &job("21.00"));
        let before = next.volumes_before(web);
        assert_eq!(before[&b""[..]], "vg/web p1");
        assert_eq!(before[&b"srv/data"[..]], "vg/data");
        assert_eq!(before.len(), 2);
        assert_eq!(next.moved(web, &places, |_| true), none);
        // A copy took its place; it is gone; its disk has another name.
        let other = [of("/g/web/", "vg/copy p1"), places[1].clone()];
        assert_eq!(next.not_before(web, &other[..2]), paths(&["/g/web/"]));
        assert_eq!(next.moved(web, &other, |_| true), paths(&["/g/web/"]));
        let data = |volume: &str| volume == "vg/data";
        assert_eq!(
            next.moved(web, &places[..1], data),
            paths(&["/g/web/srv/data/"])
        );
        assert_eq!(next.moved(web, &other, |_| false), none);
    }

    #[test]
    fn test_lines_are_bounded_and_torn_ones_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let open = |job: &str, before: &str| Saves::open(dir.path(), job, 1, before).unwrap();
        let (web, everything) = (b"/g/web/", paths(&["/g/web/"]));
        let none = Paths::default();
        let saves = open(&job("01.00"), "");
        let mut lost = Paths::default();
        lost.insert(b"/g/web/etc/\xff/a".to_vec());
        saves
            .saved(web, Vec::new(), &lost, &none, result(1))
            .unwrap();
        let next = open(&job("02.00"), &job("01.00"));
        assert_eq!(next.not_before(web, &[]), paths(&["/g/web/etc/"]));

        let many = (0..4000).map(|n| format!("/g/web/{n:040}").into_bytes());
        saves
            .saved(web, Vec::new(), &many.collect(), &none, result(1))
            .unwrap();
        let mut next = open(&job("02.00"), &job("01.00"));
        assert_eq!(next.not_before(web, &[]), everything);

        // A crash while a line was written, and more lines than there is room for.
        next.file.write_all(b"{\"job\":\"Night").unwrap();
        let next = open(&job("03.00"), "");
        let long = paths(&[&format!("/g/web/{}", "x".repeat(60_000))]);
        for _ in 0..100 {
            next.saved(web, Vec::new(), &long, &none, result(1))
                .unwrap();
        }
        next.saved(web, Vec::new(), &Paths::default(), &none, result(1))
            .unwrap();
        let next = open(&job("04.00"), &job("03.00"));
        assert_eq!(next.not_before(web, &[]), Paths::default());
        assert!(next.file.metadata().unwrap().len() < MAX_FILE);
        assert_eq!(
            std::fs::read_dir(dir.path().join(FOLDER)).unwrap().count(),
            1
        );
        let next = open(&job("05.00"), &job("01.00"));
        assert_eq!(next.not_before(web, &[]), everything);
    }
}
