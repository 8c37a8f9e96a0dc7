//! Directories that may be subvolumes.

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::{Source, Walker};
use crate::error::{Code, Error, escape};
use crate::inode::Meta;
use crate::stream::entry::{Entry, Place};
use crate::stream::walk::item::{Item, LeftOut, Problem};
use crate::stream::walk::unread::Step;
use crate::sys::btrfs::subvolume_kind;

impl Walker {
    /// Whether a directory may exceed the limit of subvolumes. Only a lookup tells, and it makes
    /// the kernel keep the subvolume.
    pub(super) fn has_too_many_subvolumes(&self, number: usize) -> bool {
        let join = &self.joins[self.stack[number].join];
        self.subvolumes > self.options.subvolumes && join.fstype == "btrfs"
    }

    /// Leaves out a possible subvolume. Reports one error per filesystem.
    pub(super) fn pass_over(&mut self, number: usize) -> Step {
        let frame = &mut self.stack[number];
        frame.incomplete = true;
        if !self.crowded.insert(frame.join) {
            return Step::Passed;
        }
        let join = &self.joins[frame.join];
        let detail = format!(
            "{}: more than {} subvolumes without a line in the guest's fstab: from /{} on, folders of this filesystem \
             that were not reached before are left out",
            join.volume,
            self.options.subvolumes,
            escape(&self.path)
        );
        let problem = Problem {
            path: join.path.clone(),
            subtree: true,
            error: Error::new(Code::TooManySubvolumes, detail),
        };
        Item::Problem(problem).into()
    }

    pub(super) fn subdirectory(
        &mut self,
        number: usize,
        path: Vec<u8>,
        meta: Meta,
        place: Place,
    ) -> Item {
        if meta.encrypted {
            let problem = Problem::encrypted(&path, true);
            let begin = self.announce(path, meta, place, Source::LeftOut);
            self.queue.push_back(Item::Problem(problem));
            return begin;
        }
        let frame = &self.stack[number];
        let join = &self.joins[frame.join];
        let other_filesystem = meta.dev != frame.meta.dev;
        if !other_filesystem || join.nested_subvolumes {
            return self.announce(path, meta, place, Source::Inherited);
        }
        // Saved at its own place.
        if self.has_place(&meta) {
            return self.announce(path, meta, place, Source::LeftOut);
        }
        let entry = Entry::directory(path, meta, place);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK;
        let kind = match entry.open(flags) {
            Ok(Some(directory)) => subvolume_kind(&directory),
            Ok(None) => Err(Errno::BADF.into()),
            Err(errno) => Err(errno.into()),
        };
        let Entry {
            path, meta, place, ..
        } = entry;
        let kind = match kind {
            Ok(kind) => kind,
            Err(error) => {
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                let problem = Problem::new(&path, true, "which kind of subvolume it is", errno);
                let begin = self.announce(path, meta, place, Source::LeftOut);
                self.queue.push_back(Item::Problem(problem));
                return begin;
            }
        };
        if !kind.snapshot {
            return self.announce(path, meta, place, Source::Inherited);
        }
        // An empty directory on btrfs has size 0 and loses nothing.
        let left_out = (meta.size > 0).then(|| LeftOut {
            path: path.clone(),
            read_only: kind.is_past(),
        });
        let begin = self.announce(path, meta, place, Source::LeftOut);
        self.queue.extend(left_out.map(Item::LeftOut));
        begin
    }

    /// Whether a directory is the root of a joined filesystem, possibly elsewhere: snapper's first
    /// snapshot is the root.
    fn has_place(&self, meta: &Meta) -> bool {
        let id = Some(meta.id());
        self.joins.iter().any(|join| join.id == id)
    }
}
