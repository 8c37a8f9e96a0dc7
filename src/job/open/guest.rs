//! A guest whose disks are open.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;

use super::mapped::MappedVolume;
use crate::config::client::FilterSettings;
use crate::error::{Code, Error, Result, escape};
use crate::fs::{Claim, GuestTree};
use crate::guest::quiesce::Consistency;
use crate::guest::{Absence, Guest};
use crate::job::manifest::Manifest;
use crate::job::paths::Paths;
use crate::job::prepare::Prepared;
use crate::job::saves::Place;
use crate::kit::{self, Collected};
use crate::snapshot::{self, Snapshot, Status};
use crate::stream::{AheadOptions, ReadAhead, WalkOptions};

/// A file of ours in a guest's backup.
#[derive(Debug)]
pub(in crate::job) struct OwnFile {
    /// Catalog path.
    pub(in crate::job) path: Vec<u8>,
    pub(in crate::job) data: Vec<u8>,
    /// The job before has the same bytes.
    pub(in crate::job) unchanged: bool,
}

/// A guest that can be read.
#[derive(Debug)]
pub(in crate::job) struct OpenGuest {
    pub(super) guest: Guest,
    pub(super) prefix: Vec<u8>,
    pub(super) consistency: Consistency,
    /// Why its disks are not of one instant.
    pub(super) apart: Option<String>,
    // Dropped in this order: each holds the next busy.
    pub(super) tree: Option<GuestTree>,
    pub(super) mapped: Vec<MappedVolume>,
    pub(super) claim: Option<Claim>,
    pub(super) snapshots: Vec<Box<dyn Snapshot>>,
    /// `None`: its disks were not examined yet.
    pub(super) manifest: Option<Manifest>,
    /// The rebuild kit, made with the manifest.
    pub(super) kit: Option<Collected>,
    /// The files of the kit that the job before has, with their digests.
    kit_before: BTreeMap<String, String>,
    pub(super) filter: FilterSettings,
    /// Not all that may hold files was opened.
    pub(super) failed_volumes: bool,
    /// Keys of the opened volumes.
    pub(super) volumes: Vec<String>,
    /// Places in the catalog whose filesystem is not there.
    pub(super) missed: Vec<Vec<u8>>,
    pub(super) peak: Option<f64>,
    /// Why it is not read to its end.
    pub(super) given_up: Option<Error>,
}

impl OpenGuest {
    /// The consistency of its snapshots.
    pub(in crate::job) fn consistency(&self) -> Consistency {
        self.consistency
    }

    /// Not looked into yet.
    pub(in crate::job) fn new(prepared: Prepared) -> OpenGuest {
        let Prepared {
            guest,
            snapshots,
            prefix,
            consistency,
            apart,
            errors: _,
            filter,
        } = prepared;
        OpenGuest {
            // The paths of files on such a disk are unknown.
            failed_volumes: guest
                .uncovered
                .iter()
                .any(|disk| disk.absence == Absence::Lost),
            guest,
            volumes: Vec::new(),
            prefix,
            consistency,
            apart,
            tree: None,
            mapped: Vec::new(),
            claim: None,
            snapshots,
            manifest: None,
            kit: None,
            kit_before: BTreeMap::new(),
            filter,
            missed: Vec::new(),
            peak: None,
            given_up: None,
        }
    }

    /// The guest's name.
    pub(in crate::job) fn name(&self) -> &str {
        &self.guest.name
    }

    /// The mounted tree.
    pub(in crate::job) fn tree(&self) -> Option<&GuestTree> {
        self.tree.as_ref()
    }

    /// The manifest. `None`: the disks were not examined.
    pub(in crate::job) fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// The files of the kit that the job before has: paths and digests. Nothing for a full job.
    pub(in crate::job) fn kit_was(&mut self, before: BTreeMap<String, String>) {
        self.kit_before = before;
    }

    /// Digests of the kit's files, by their paths in the guest.
    pub(in crate::job) fn kit_digests(&self) -> BTreeMap<String, String> {
        let files = self.kit.iter().flat_map(Collected::files);
        files
            .map(|(name, bytes)| (self.kit_path(&name), kit::sha256(&bytes)))
            .collect()
    }

    /// Path of a file of the kit in the guest. The private folder may have another name in another job.
    fn kit_path(&self, name: &str) -> String {
        let private = self
            .tree
            .as_ref()
            .map_or(&b".guestsnap"[..], GuestTree::private);
        format!("{}/{}/{name}", escape(private), kit::FOLDER)
    }

    /// Files of ours: the manifest and the rebuild kit if the disks were examined, and the guest's definition.
    pub(in crate::job) fn own_files(&self) -> Vec<OwnFile> {
        let private = self
            .tree
            .as_ref()
            .map_or(&b".guestsnap"[..], |t| t.private());
        let path = |name: &[u8]| self.catalog_path(&[private, name].concat());
        let always = |name: &[u8], data| OwnFile {
            path: path(name),
            data,
            unchanged: false,
        };
        let manifest = self
            .manifest()
            .map(|manifest| always(b"/manifest.json", manifest.to_file()));
        let definition = self.guest.file.as_ref().map(|file| {
            let name = [b"/definition/", file.name.as_bytes()].concat();
            always(&name, file.bytes.to_vec())
        });
        let kit = self.kit.iter().flat_map(Collected::files);
        let kit = kit.map(|(name, data)| OwnFile {
            unchanged: self.kit_before.get(&self.kit_path(&name)) == Some(&kit::sha256(&data)),
            path: path(format!("/{}/{name}", kit::FOLDER).as_bytes()),
            data,
        });
        manifest.into_iter().chain(definition).chain(kit).collect()
    }

    /// A walk over its tree, with threads that read ahead. `None`: there is no tree.
    pub(in crate::job) fn read_ahead(&self, options: AheadOptions) -> Result<Option<ReadAhead>> {
        self.tree
            .as_ref()
            .map(|tree| ReadAhead::start(tree, WalkOptions::default(), options))
            .transpose()
    }

    /// Catalog path of a path in the guest.
    pub(in crate::job) fn catalog_path(&self, path: &[u8]) -> Vec<u8> {
        let mut out = self.prefix.clone();
        if !path.is_empty() {
            out.push(b'/');
            out.extend_from_slice(path);
        }
        out
    }

    /// All of it in the catalog: a path with a trailing slash.
    pub(in crate::job) fn catalog_tree(&self) -> Vec<u8> {
        [&self.prefix[..], b"/"].concat()
    }

    /// The filesystems that are read, with their places in the catalog and the exclusion rules.
    pub(in crate::job) fn places(&self) -> Vec<Place> {
        let joins = self.tree.iter().flat_map(|tree| tree.joins());
        let filesystems = joins.map(|join| {
            let mut tree = self.catalog_path(&join.path);
            tree.push(b'/');
            Place::new(&tree, join.identity()).of(&join.key)
        });
        // Files excluded by other rules may be unchanged since, and were not saved.
        let rules = Place::new(&self.catalog_tree(), format!("rules {}", self.filter));
        filesystems.chain([rules]).collect()
    }

    /// Nothing at these places of the catalog may count as deleted: other volumes were there.
    pub(in crate::job) fn keep(&mut self, trees: &Paths) {
        self.missed.extend(trees.trees().cloned());
    }

    /// Whether the guest has this volume, opened.
    pub(in crate::job) fn has_volume(&self, key: &str) -> bool {
        self.volumes.iter().any(|volume| volume == key)
    }

    /// Catalog trees in which nothing may count as deleted: places whose filesystem is not there;
    /// and all of the guest if a volume was not opened, for which paths that held is not known.
    pub(in crate::job) fn unread(&self) -> Vec<Vec<u8>> {
        let mut trees = self.missed.clone();
        if self.failed_volumes {
            trees.push(self.catalog_tree());
        }
        trees
    }

    /// It is not read to its end. Gives the catalog tree of which nothing may count as deleted.
    pub(in crate::job) fn give_up(&mut self, why: Error) -> Vec<u8> {
        self.given_up = Some(why);
        self.catalog_tree()
    }

    /// Whether all snapshots are still valid; to be asked after the last byte was read.
    pub(in crate::job) fn check(&mut self) -> Result<()> {
        if let Some(why) = self.given_up.take() {
            return Err(why);
        }
        for (disk, snapshot) in self.guest.disks.iter().zip(&self.snapshots) {
            match snapshot.status()? {
                Status::Valid { used } => self.peak = Some(self.peak.unwrap_or(0.0).max(used)),
                Status::Invalid => {
                    self.peak = Some(100.0);
                    return Err(Error::new(
                        Code::SnapshotInvalid,
                        format!("disk {disk}: {}", snapshot.describe()),
                    ));
                }
            }
        }
        Ok(())
    }

    /// The snapshots of the guest's disks.
    pub(in crate::job) fn snapshots(&self) -> &[Box<dyn Snapshot>] {
        &self.snapshots
    }

    /// A share of a COW area in use, in percent, that was seen elsewhere.
    pub(in crate::job) fn seen(&mut self, used: Option<f64>) {
        self.peak = self.peak.into_iter().chain(used).reduce(f64::max);
    }

    /// Highest share of a COW area in use that was seen, in percent.
    pub(in crate::job) fn peak(&self) -> Option<f64> {
        self.peak
    }

    /// Takes everything down, in reverse, whatever fails.
    pub(in crate::job) fn close(mut self) -> Vec<Error> {
        let mut errors = Vec::new();
        if let Some(Err(error)) = self.tree.take().map(GuestTree::close) {
            errors.push(error);
        }
        for mapped in self.mapped.drain(..).rev() {
            errors.extend(mapped.close().err());
        }
        self.claim = None;
        errors.extend(snapshot::close_all(std::mem::take(&mut self.snapshots)).err());
        errors
    }
}
