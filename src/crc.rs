//! CRC-32 for GPT, LVM2 and our own records.

/// Start value of all LVM2 checksums.
pub(crate) const LVM2_START: u32 = 0xF597_A6CF;

/// LVM2's checksum: the register after `data`, not inverted. Start with [`LVM2_START`].
pub(crate) fn register(start: u32, data: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(!start);
    hasher.update(data);
    !hasher.finalize()
}

/// Standard CRC-32, as in GPT.
pub(crate) fn crc32(data: &[u8]) -> u32 {
    crc32fast::hash(data)
}
