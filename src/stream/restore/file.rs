//! The object between create and finish: its data, its records, and its losses.

use std::os::fd::OwnedFd;

use rustix::fs::IFlags;
use rustix::io::Errno;

use super::errors::{attributes, failed};
use super::request::Request;
use crate::error::{Code, Error, Result, escape};
use crate::inode::{Kind, Meta};
use crate::point::{Point, reach};
use crate::stream::record::{MAX_BYTES, MAX_RECORDS, MAX_XATTRS, Record};

/// Aligned blocks of zeros of this size become holes in sparse files.
const HOLE: usize = 4096;

/// The object between create and finish.
#[derive(Debug)]
pub(super) struct Current {
    pub(super) path: Vec<u8>,
    pub(super) kind: Kind,
    /// `None`: another hard link; nothing to set.
    pub(super) file: Option<OwnedFd>,
    pub(super) meta: Meta,
    pub(super) record: Record,
    /// Number and bytes of the records received.
    records: (usize, usize),
    position: u64,
    pub(super) end: u64,
    pub(super) data_done: bool,
    /// btrfs accepts NOCOW only for empty files.
    pub(super) lost_nocow: bool,
    /// Whether a program's rights were withheld because its owner was not restored.
    pub(super) lost_rights: bool,
    /// It had extended attributes of NTFS that the target does not keep.
    pub(super) lost_ntfs: bool,
    /// Inode flags that the target does not support.
    pub(super) lost_flags: IFlags,
    pub(super) warnings: Vec<Error>,
}

impl Current {
    /// Starts with a newly created object or another hard link.
    pub(super) fn new(
        request: &Request<'_>,
        kind: Kind,
        file: Option<OwnedFd>,
        warnings: Vec<Error>,
    ) -> Current {
        let extract = file.is_some() && kind == Kind::Regular;
        Current {
            path: request.path.to_vec(),
            kind,
            file,
            meta: request.meta,
            record: Record::default(),
            records: (0, 0),
            position: 0,
            end: 0,
            data_done: !extract,
            lost_nocow: false,
            lost_rights: false,
            lost_ntfs: false,
            lost_flags: IFlags::empty(),
            warnings,
        }
    }

    /// Writes at the current position. In a file that was sparse, blocks of zeros become holes.
    pub(super) fn write(&mut self, data: &[u8]) -> Result<()> {
        if self.meta.is_sparse() {
            self.write_sparse(data)
        } else {
            self.write_all(data)
        }
    }

    /// Sets the position for the next write.
    pub(super) fn seek(&mut self, position: u64) {
        self.position = position;
        self.end = self.end.max(position);
    }

    /// Ends the data and sets the file's size.
    pub(super) fn finish_data(&mut self) -> Result<()> {
        self.data_done = true;
        let Some(file) = &self.file else {
            return Ok(());
        };
        reach(Point::RestoreSize)
            .and_then(|()| rustix::fs::ftruncate(file, self.end))
            .map_err(|e| failed(&self.path, "setting its size").because(e))?;
        if self.end != self.meta.size {
            let text = format!(
                "{} bytes came, its record says {}",
                self.end, self.meta.size
            );
            self.warnings.push(failed(&self.path, &text));
        }
        Ok(())
    }

    /// Takes one of our records.
    pub(super) fn apply_record(&mut self, bytes: &[u8]) -> Result<()> {
        if self.has_enough(bytes.len())? {
            return Ok(());
        }
        let (record, notes) = Record::decode(bytes).map_err(|e| {
            let shown = escape(&self.path);
            Error::new(Code::RestoreAttributes, shown).because(e)
        })?;
        if self.record.xattrs.len() + record.xattrs.len() > MAX_XATTRS {
            return Err(self.too_many_records());
        }
        for note in notes {
            self.warn(&note, None);
        }
        self.record.absorb(record);
        Ok(())
    }

    /// Counts a record. `true`: the limit was exceeded before, and has been reported.
    fn has_enough(&mut self, length: usize) -> Result<bool> {
        let (records, bytes) = &mut self.records;
        if *records > MAX_RECORDS {
            return Ok(true);
        }
        *records += 1;
        *bytes = bytes.saturating_add(length);
        if *records > MAX_RECORDS || *bytes > MAX_BYTES {
            return Err(self.too_many_records());
        }
        Ok(false)
    }

    /// Ignores all further records of the object.
    fn too_many_records(&mut self) -> Error {
        self.records.0 = MAX_RECORDS + 1;
        let step = format!(
            "more records than a file can have ({MAX_RECORDS}, {} MiB, or {MAX_XATTRS} extended attributes): the volume \
             does not hold what guestsnap wrote, and the rest of them is left out",
            MAX_BYTES >> 20
        );
        attributes(&self.path, &step)
    }

    /// Closes the file. A server or a quota may report data errors only now: no space, a failed disk.
    pub(super) fn close(&mut self, file: OwnedFd) {
        let closed = reach(Point::RestoreClose).and_then(|()| {
            nix::unistd::close(file).map_err(|e| Errno::from_raw_os_error(e as i32))
        });
        if let Err(errno) = closed {
            let error = failed(&self.path, "closing it: its contents may not be there");
            self.warnings.push(error.because(errno));
        }
    }

    pub(super) fn warn(&mut self, step: &str, cause: Option<Errno>) {
        let error = attributes(&self.path, step);
        self.warnings.push(match cause {
            Some(errno) => error.because(errno),
            None => error,
        });
    }

    pub(super) fn check(&mut self, step: &str, result: std::result::Result<(), Errno>) {
        if let Err(errno) = result {
            self.warn(step, Some(errno));
        }
    }

    fn write_all(&mut self, mut data: &[u8]) -> Result<()> {
        let Some(file) = &self.file else {
            return Err(failed(&self.path, "write without a file"));
        };
        while !data.is_empty() {
            let written = reach(Point::RestoreWrite)
                .and_then(|()| rustix::io::pwrite(file, data, self.position));
            match written {
                Ok(0) => return Err(failed(&self.path, "write: nothing was taken")),
                Ok(length) => {
                    data = &data[length..];
                    self.position += length as u64;
                    self.end = self.end.max(self.position);
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(failed(&self.path, "write").because(errno)),
            }
        }
        Ok(())
    }

    /// Writes data, with aligned blocks of zeros as holes.
    fn write_sparse(&mut self, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            // Up to the next block boundary of the file.
            let into = usize::try_from(self.position % HOLE as u64).unwrap_or(0);
            let length = data.len().min(HOLE - into);
            let (block, rest) = data.split_at(length);
            if block.iter().all(|&b| b == 0) {
                self.position += length as u64;
                self.end = self.end.max(self.position);
                data = rest;
                continue;
            }
            // Write in one go up to the next block of zeros.
            let mut run = length;
            for next in rest.chunks(HOLE) {
                if next.iter().all(|&b| b == 0) {
                    break;
                }
                run += next.len();
            }
            let (now, later) = data.split_at(run);
            self.write_all(now)?;
            data = later;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::super::attributes::MAX_NAMED_XATTRS;
    use super::super::{Replace, Restorer, What};
    use super::*;

    #[test]
    fn test_records_of_one_file_are_bounded() {
        let target = tempfile::tempdir().unwrap();
        let path = [target.path().as_os_str().as_bytes(), b"/file"].concat();
        let mut r = Restorer::new(Some(target.path().as_os_str().as_bytes())).unwrap();
        let record = |xattrs| Record {
            xattrs,
            ..Record::default()
        };
        let large = record(vec![(b"user.large".to_vec(), vec![0; 64 << 10])]);
        let tiny = record((0..8000).map(|_| (b"u".to_vec(), Vec::new())).collect());
        let floods = [
            (large.encode().remove(0), 100),
            (tiny.encode().remove(0), 100),
            (
                record(vec![(b"user.x".to_vec(), Vec::new())])
                    .encode()
                    .remove(0),
                100_000,
            ),
            // Undecodable, but still records of one file.
            (b"noise".to_vec(), 100_000),
        ];
        for (bytes, count) in floods {
            let request = Request {
                path: &path,
                what: What::Object,
                meta: Meta {
                    mode: 0o100_600,
                    ..Meta::default()
                },
                replace: Replace::Always,
            };
            r.create(&request).unwrap();
            let told = (0..count)
                .filter_map(|_| r.apply_record(&bytes).err())
                .map(|e| e.report());
            let mut told: Vec<String> = told.collect();
            let last = told.pop().unwrap();
            assert!(last.contains("64, 2 MiB, or 32768"), "{last}");
            assert!(told.len() <= MAX_RECORDS, "{}", told.len());
            assert!(told.is_empty() || bytes == b"noise", "{told:?}");
            let current = r.current().unwrap();
            assert!(current.record.xattrs.len() <= MAX_XATTRS);
            let held = current.record.xattrs.iter().map(|(n, v)| n.len() + v.len());
            assert!(held.sum::<usize>() <= MAX_BYTES);
            // Few lines report everything that the target refuses.
            let warnings = r.finish().unwrap();
            assert!(warnings.len() <= MAX_NAMED_XATTRS + 2, "{}", warnings.len());
        }
    }
}
