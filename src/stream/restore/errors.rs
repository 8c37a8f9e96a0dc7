//! Errors for one path of a restore.

use crate::error::{Code, Error, escape};

pub(super) fn attributes(path: &[u8], step: &str) -> Error {
    Error::new(Code::RestoreAttributes, format!("{}: {step}", escape(path)))
}

pub(super) fn failed(path: &[u8], step: &str) -> Error {
    Error::new(Code::RestoreFailed, format!("{}: {step}", escape(path)))
}
