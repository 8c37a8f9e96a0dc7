//! A guest whose disks are open for writing.

use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::open::mount_all;
use super::route::{Place, Route, Routes, is_private};
use super::target;
use crate::config::ClientFile;
use crate::config::client::Fsck;
use crate::error::{Code, Error, Result, escape};
use crate::fs::{Claim, GuestTree, Join};
use crate::guest::{Guest, state};
use crate::job::caller::{CancelFlag, Importance, Reporter};
use crate::job::open::{How, MappedVolume};
use crate::job::prepare;
use crate::point::{Point, pass, reach};
use crate::snapshot::{Direct, Journal, Object, take_for_writing};
use crate::stream::Restorer;
use crate::stream::restore::Joined;

/// A guest whose filesystems are mounted for writing.
#[derive(Debug)]
pub(in crate::job) struct IntoGuest {
    pub(super) guest: Guest,
    client: ClientFile,
    // Closed in this order: each holds the next busy.
    pub(super) tree: Option<GuestTree>,
    pub(super) mapped: Vec<MappedVolume>,
    pub(super) claim: Option<Claim>,
    pub(super) holds: Vec<MappedVolume>,
    pub(super) disks: Vec<Direct>,
    journal: Arc<Journal>,
    /// Stands in the journal while the disks are written to.
    entry: Object,
    routes: Routes,
    /// The name of our folder in the backup, once seen.
    private: Option<Vec<u8>>,
}

impl IntoGuest {
    /// Opens the guest that `into` names, or releases everything and says why not.
    pub(in crate::job) fn open(
        into: &str,
        working_dir: PathBuf,
        job_id: u32,
        reporter: &dyn Reporter,
        cancel: &CancelFlag,
    ) -> Result<IntoGuest> {
        let client = ClientFile::load(&prepare::client_file())?;
        let guest = target::find(into, &client)?;
        let journal = prepare::journal(working_dir, job_id, reporter)?;
        let disks = take_for_writing(&guest.disks, client.activate(&guest.name), &journal)?;
        pass(Point::IntoTaken);
        let entry = Object::Into {
            guest: guest.name.clone(),
            disks: guest.disks.iter().map(ToString::to_string).collect(),
        };
        let mut open = IntoGuest {
            guest,
            client,
            tree: None,
            mapped: Vec::new(),
            claim: None,
            holds: Vec::new(),
            disks,
            journal,
            entry,
            routes: Routes::default(),
            private: None,
        };
        if let Err(error) = open.mount(job_id, reporter, cancel) {
            for undo in open.release(false) {
                reporter.message(Importance::Error, &undo.report());
            }
            return Err(error);
        }
        open.tell_places(reporter);
        Ok(open)
    }

    fn mount(&mut self, job_id: u32, reporter: &dyn Reporter, cancel: &CancelFlag) -> Result<()> {
        self.journal.intend(&self.entry)?;
        pass(Point::IntoJournaled);
        let (name, journal) = (self.guest.name.clone(), self.journal.clone());
        let mut policy = self.client.fs_policy(&name);
        policy.writable = true;
        let stop = || cancel.is_set();
        let how = How {
            policy,
            fsck: Fsck::None,
            root: self.client.root(&name),
            before: Default::default(),
            journal: &journal,
            job_id,
            reporter,
            stop: &stop,
        };
        mount_all(self, &how)?;
        if stop() {
            return Err(Error::new(Code::Cancelled, name));
        }
        let Some(tree) = &self.tree else {
            return Err(Error::new(Code::Internal, "a guest without a tree"));
        };
        let missing = tree.missing().iter().map(|missing| {
            let place = missing.place.as_ref();
            let place = place.unwrap_or(&missing.line.mount_point);
            (place.clone(), missing.to_string())
        });
        self.routes = Routes {
            private: tree.private().to_vec(),
            places: tree.joins().iter().map(place).collect(),
            missing: missing.collect(),
        };
        Ok(())
    }

    /// The target, for messages: the guest and its disks.
    pub(in crate::job) fn describe(&self) -> String {
        let disks: Vec<_> = self.guest.disks.iter().map(ToString::to_string).collect();
        format!("{} ({})", self.guest.name, disks.join(", "))
    }

    fn tell_places(&self, reporter: &dyn Reporter) {
        let joins = self.tree.iter().flat_map(|tree| tree.joins());
        let places = joins.map(|join| {
            let (volume, fstype) = (&join.volume, &join.fstype);
            format!("{volume} {fstype} /{}", escape(&join.path))
        });
        let places: Vec<_> = places.collect();
        let text = format!("restoring into {}: {}", self.describe(), places.join(", "));
        reporter.message(Importance::Info, &text);
        for (place, why) in &self.routes.missing {
            let (name, place) = (&self.guest.name, escape(place));
            let text = format!("{name}: nothing is restored below /{place}: {why}");
            reporter.message(Importance::Info, &text);
        }
    }

    /// Text in front of the guest's paths in messages.
    fn prefix(&self) -> Vec<u8> {
        format!("{}:", self.guest.name).into_bytes()
    }

    /// A writer for the guest's tree. It must end before the guest is closed.
    pub(in crate::job) fn restorer(&mut self) -> Result<Restorer> {
        let joins = self.tree.iter().flat_map(|tree| tree.joins());
        let joins: Vec<&Join> = joins.collect();
        let mut roots = Vec::new();
        for join in &joins {
            if let Some(root) = &join.root {
                let root = root.try_clone().map_err(|error| {
                    let text = format!("{}: /{}", self.guest.name, escape(&join.path));
                    Error::new(Code::RestoreFailed, text).because(error)
                })?;
                roots.push(Joined {
                    path: join.path.clone(),
                    root,
                });
            }
        }
        // A backup has the files that a mount point hides at a place of their own.
        let hidden: Vec<Joined> = joins
            .iter()
            .filter_map(|join| hidden(join, &joins, &self.routes.private))
            .filter(|hidden| roots.iter().all(|root| root.path != hidden.path))
            .collect();
        self.routes.places.extend(hidden.iter().map(|hidden| Place {
            path: hidden.path.clone(),
            // No volume is looked for by this place.
            volume: String::new(),
        }));
        roots.extend(hidden);
        Ok(Restorer::into_tree(roots, &self.prefix()))
    }

    /// The path for the restorer of a path in the guest. `None`: a file of ours, which no guest gets.
    pub(in crate::job) fn route(&mut self, path: &[u8]) -> Result<Option<Vec<u8>>> {
        let shown = || format!("{}:{}", self.guest.name, escape(path));
        match self.routes.route(path) {
            Route::Guest(inside) => Ok(Some([&self.prefix()[..], b"/", &inside].concat())),
            Route::Missing(why) => {
                let text = format!("{}: {why}", shown());
                Err(Error::new(Code::NoSuchPlace, text))
            }
            Route::Ours => {
                let first = path.split(|&b| b == b'/').find(|part| !part.is_empty());
                let first = first.filter(|name| is_private(name)).unwrap_or_default();
                let known = self.private.get_or_insert_with(|| first.to_vec());
                // One of the two is the guest's own folder.
                if known != first {
                    let text = format!(
                        "{}: beside /{} this may be the guest's own file",
                        shown(),
                        escape(known)
                    );
                    return Err(Error::new(Code::NoSuchPlace, text));
                }
                Ok(None)
            }
        }
    }

    /// Writes everything back, unmounts and releases. Returns the failures. `half`: the next sweep tells
    /// that the guest is restored in part.
    pub(in crate::job) fn close(self, half: bool) -> Vec<Error> {
        let (guest, client) = (self.guest.clone(), self.client.clone());
        let mut errors = self.release(half);
        // Nothing kept the hypervisor from starting it.
        errors.extend(state::check_off(&guest, &client).err());
        errors
    }

    fn release(mut self, half: bool) -> Vec<Error> {
        let mut errors = Vec::new();
        if let Some(tree) = self.tree.take() {
            errors.extend(self.sync(&tree));
            pass(Point::IntoSynced);
            errors.extend(tree.damage().into_iter().map(|damage| {
                Error::new(
                    Code::RestoreFailed,
                    format!("{}: {damage}", self.guest.name),
                )
            }));
            errors.extend(tree.close().err());
        }
        pass(Point::IntoUnmounted);
        for mapped in self.mapped.drain(..).rev() {
            errors.extend(mapped.close().err());
        }
        self.claim = None;
        for hold in self.holds.drain(..).rev() {
            errors.extend(hold.close().err());
        }
        for disk in self.disks.drain(..) {
            errors.extend(disk.is_alone().err());
            errors.extend(disk.close().err());
        }
        if !half {
            self.journal.gone(&self.entry);
        }
        match self.journal.close() {
            // The entry is all that is left.
            Err(_) if half && errors.is_empty() => self.journal.leave(),
            closed => errors.extend(closed.err()),
        }
        pass(Point::IntoReleased);
        errors
    }

    /// Writes each filesystem back. The kernel tells an error of it only here.
    fn sync(&self, tree: &GuestTree) -> Vec<Error> {
        let sync = |join: &Join| {
            let root = join.root.as_ref()?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let done = reach(Point::IntoSync)
                .and_then(|()| rustix::fs::openat(root, c".", flags, Mode::empty()))
                .and_then(rustix::fs::syncfs);
            let errno = done.err()?;
            let place = escape(&join.path);
            let text = format!(
                "{}: /{place}: writing back what was restored",
                self.guest.name
            );
            Some(Error::new(Code::RestoreFailed, text).because(errno))
        };
        tree.joins().iter().filter_map(sync).collect()
    }
}

fn place(join: &Join) -> Place {
    Place {
        path: join.path.clone(),
        volume: join.volume.clone(),
    }
}

/// The directory below a mount point, at the place that it has in a backup.
fn hidden(join: &Join, joins: &[&Join], private: &[u8]) -> Option<Joined> {
    let below = |above: &Join| {
        let rest = join.path.strip_prefix(&above.path[..])?;
        match above.path.is_empty() {
            true => Some(rest.to_vec()),
            false => rest.strip_prefix(b"/").map(<[u8]>::to_vec),
        }
    };
    if join.path.is_empty() || join.path.starts_with(private) {
        return None;
    }
    let above = joins.iter().filter(|above| above.path != join.path);
    let above = above.filter_map(|above| Some((above, below(above)?)));
    let (above, rest) = above.max_by_key(|(above, _)| above.path.len())?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let root = above.root.as_ref()?;
    let root = rustix::fs::openat2(root, &rest, flags, Mode::empty(), how).ok()?;
    Some(Joined {
        path: [private, b"/hidden/", &join.path].concat(),
        root,
    })
}
