//! Restores one object, for unit tests.

use super::{Replace, Request, Restorer, What};
use crate::error::Error;
use crate::inode::{Meta, Time};
use crate::stream::record::Record;

/// Restores an empty file or a directory with this owner. Returns the warnings.
pub(super) fn put(restorer: &mut Restorer, path: &[u8], mode: u32, uid: u32) -> Vec<Error> {
    put_with(restorer, path, mode, uid, &Record::default())
}

pub(super) fn put_with(
    restorer: &mut Restorer,
    path: &[u8],
    mode: u32,
    uid: u32,
    record: &Record,
) -> Vec<Error> {
    let meta = Meta {
        mode,
        uid,
        gid: rustix::process::getegid().as_raw(),
        mtime: Time {
            seconds: 1_000_000_000,
            nanoseconds: 0,
        },
        ..Meta::default()
    };
    let request = Request {
        path,
        what: What::Object,
        meta,
        replace: Replace::Always,
    };
    restorer.create(&request).unwrap();
    for bytes in record.encode() {
        restorer.apply_record(&bytes).unwrap();
    }
    restorer.finish().unwrap()
}

pub(super) fn own() -> u32 {
    rustix::process::geteuid().as_raw()
}
