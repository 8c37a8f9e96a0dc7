//! Reads that bypass the page cache.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Alignment of memory and lengths for direct I/O; no device has larger blocks.
const BLOCK: usize = 4096;

/// Reads the first `len` bytes of a device, or fewer if it is shorter, from the medium.
///
/// # Errors
///
/// Those of the kernel.
pub fn beginning(node: &Path, len: usize) -> io::Result<Vec<u8>> {
    let mut options = File::options();
    let file = options.read(true).custom_flags(libc::O_DIRECT).open(node)?;
    let whole = len.next_multiple_of(BLOCK);
    let mut memory = vec![0; whole + BLOCK];
    let aligned = memory.as_ptr().align_offset(BLOCK);
    let read = file.read_at(&mut memory[aligned..aligned + whole], 0)?;
    Ok(memory[aligned..aligned + read.min(len)].to_vec())
}
