//! CRC-32 with the reflected polynomial 0xEDB88320, as GPT and LVM2 use it.

const TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    let mut seed = 0;
    while index < 256 {
        let mut value: u32 = seed;
        let mut bit = 0;
        while bit < 8 {
            value = (value >> 1) ^ (0xEDB8_8320 * (value & 1));
            bit += 1;
        }
        table[index] = value;
        index += 1;
        seed += 1;
    }
    table
}

/// The register after `data`, without any final inversion: LVM2's checksums, which start at
/// [`LVM2_START`].
pub(super) fn register(start: u32, data: &[u8]) -> u32 {
    data.iter().fold(start, |crc, byte| {
        let index = (crc ^ u32::from(*byte)) & 0xFF;
        (crc >> 8) ^ TABLE[usize::try_from(index).unwrap_or(0)]
    })
}

/// The start value of all LVM2 checksums.
pub(super) const LVM2_START: u32 = 0xF597_A6CF;

/// The usual CRC-32, as in GPT.
pub(super) fn crc32(data: &[u8]) -> u32 {
    !register(!0, data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_crc32_check_value() {
        assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
    }
}
