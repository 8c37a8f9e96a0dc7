//! The C library's `stat`.
#![expect(unsafe_code, reason = "libc offers no constructor for it")]

/// A zeroed `stat`, to be filled by field: its padding is private to the C library.
pub fn zeroed_stat() -> libc::stat {
    // SAFETY: a C structure of integers, for which all bits zero is a valid value.
    unsafe { std::mem::zeroed() }
}
