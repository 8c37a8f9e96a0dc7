//! CRC-32 as GPT, LVM2 and our own records use it.

/// The start value of all LVM2 checksums.
pub(crate) const LVM2_START: u32 = 0xF597_A6CF;

/// LVM2's checksum: the register after `data`, not inverted; it starts at [`LVM2_START`].
pub(crate) fn register(start: u32, data: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(!start);
    hasher.update(data);
    !hasher.finalize()
}

/// The usual CRC-32, as in GPT.
pub(crate) fn crc32(data: &[u8]) -> u32 {
    crc32fast::hash(data)
}
