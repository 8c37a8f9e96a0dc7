//! Runs libblkid's safe probe on an open file or device.
//!
//! The bindings are used directly: the wrapper crate wants UTF-8 for every value and takes a raw
//! descriptor without a lifetime, while labels are bytes that guests choose.
#![expect(unsafe_code, reason = "calls into libblkid")]

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use libblkid_rs_sys as sys;
use nix::errno::Errno;

/// Result of the safe probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Exactly one signature, with its values by name (`TYPE`, `UUID`, `LABEL`, `VERSION`,
    /// `USAGE`…).
    Found(BTreeMap<String, Vec<u8>>),
    /// No signature.
    Nothing,
    /// Conflicting signatures.
    Ambivalent,
}

/// The probe handle; freed on drop.
struct Probe(sys::blkid_probe);

impl Drop for Probe {
    fn drop(&mut self) {
        // SAFETY: `self.0` came from blkid_new_probe, is not null and is freed only here.
        unsafe { sys::blkid_free_probe(self.0) }
    }
}

/// Probes `size` bytes from `offset` for superblocks (`size` 0: to the end).
///
/// Ignores partition tables and superblocks of the type `but`.
pub fn safe_probe(
    file: BorrowedFd<'_>,
    offset: u64,
    size: u64,
    but: Option<&CStr>,
) -> io::Result<Answer> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let offset = i64::try_from(offset).map_err(invalid)?;
    let size = i64::try_from(size).map_err(invalid)?;

    // SAFETY: no arguments; null is checked below.
    let raw = unsafe { sys::blkid_new_probe() };
    if raw.is_null() {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let probe = Probe(raw);
    // SAFETY: the probe is valid; the descriptor is open for as long as `file` is borrowed, which
    // is longer than the probe lives, and libblkid does not close a descriptor given this way.
    check(unsafe { sys::blkid_probe_set_device(probe.0, file.as_raw_fd(), offset, size) })?;
    // SAFETY: the probe is valid.
    check(unsafe { sys::blkid_probe_enable_superblocks(probe.0, 1) })?;
    let wanted = sys::BLKID_SUBLKS_LABEL
        | sys::BLKID_SUBLKS_UUID
        | sys::BLKID_SUBLKS_TYPE
        | sys::BLKID_SUBLKS_USAGE
        | sys::BLKID_SUBLKS_VERSION;
    // SAFETY: the probe is valid.
    check(unsafe { sys::blkid_probe_set_superblocks_flags(probe.0, wanted as i32) })?;
    if let Some(but) = but {
        let mut names = [but.as_ptr().cast_mut(), ptr::null_mut()];
        let flag = sys::BLKID_FLTR_NOTIN as i32;
        // SAFETY: the probe is valid; the list ends with a null pointer, and neither it nor the name in it is
        // changed or kept.
        check(unsafe {
            sys::blkid_probe_filter_superblocks_type(probe.0, flag, names.as_mut_ptr())
        })?;
    }
    Errno::clear();
    // SAFETY: the probe is valid.
    match unsafe { sys::blkid_do_safeprobe(probe.0) } {
        0 => values(&probe).map(Answer::Found),
        1 => Ok(Answer::Nothing),
        -2 => Ok(Answer::Ambivalent),
        // libblkid 2.41 (Debian 13) reports ambivalence this way: an error without a failed system
        // call.
        -1 if Errno::last_raw() == 0 => Ok(Answer::Ambivalent),
        _ => Err(io::Error::last_os_error()),
    }
}

fn check(code: i32) -> io::Result<()> {
    if code == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn values(probe: &Probe) -> io::Result<BTreeMap<String, Vec<u8>>> {
    let mut all = BTreeMap::new();
    // SAFETY: the probe is valid.
    let count = unsafe { sys::blkid_probe_numof_values(probe.0) };
    for number in 0..count {
        let mut name: *const c_char = ptr::null();
        let mut data: *const c_char = ptr::null();
        let mut length = 0;
        // SAFETY: the probe is valid, the number is below the count, the out pointers are ours.
        check(unsafe {
            sys::blkid_probe_get_value(probe.0, number, &mut name, &mut data, &mut length)
        })?;
        if name.is_null() || data.is_null() {
            continue;
        }
        // SAFETY: libblkid gives a NUL-terminated name that lives as long as the probe.
        let name = unsafe { CStr::from_ptr(name) };
        // SAFETY: libblkid gives `length` bytes that live as long as the probe; copied below.
        let data = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), length) };
        // The length of a text includes its terminating NUL.
        let data = data.split(|&b| b == 0).next().unwrap_or_default();
        all.insert(name.to_string_lossy().into_owned(), data.to_vec());
    }
    Ok(all)
}
