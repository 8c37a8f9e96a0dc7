//! Reads a guest's thin pool metadata: resolves a thin volume to runs of the pool's data.
//!
//! The guest writes these blocks, and the kernel's dm-thin trusts them: a cyclic tree keeps it busy
//! for ever. So they never reach dm-thin. This reader checks each block's checksum, location and
//! structure, visits no block twice, and has fixed limits. It does not use the space maps, so it
//! can read a pool that needs `thin_check` because of them.
//!
//! ```text
//! block 0: superblock ─▶ details: volume ─▶ number of mapped blocks
//!                     └▶ mapping: volume ─▶ tree: block of the volume ─▶ block of the data
//! ```

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::le::{u32_at, u64_at};
use super::read::ReadAt;

/// Size of a metadata block in bytes.
const BLOCK: usize = 4096;
const BLOCK_BYTES: u64 = 4096;
/// The kernel's limit on pool metadata (just below 16 GiB), in blocks.
const MAX_METADATA: u64 = 255 << 14;
/// Maximum levels of one tree. Four suffice for [`MAX_METADATA`]; deletions add none.
const MAX_DEPTH: usize = 16;
/// Maximum metadata blocks read for all volumes of a guest: 2 GiB.
const MAX_BLOCKS: usize = 1 << 19;
/// Maximum table lines of one volume: runs and gaps.
pub const MAX_LINES: usize = 1 << 18;
/// Maximum table lines of all volumes of a guest. Each takes about 300 bytes of kernel memory.
const MAX_GUEST_LINES: usize = 1 << 19;

const MAGIC: u64 = 27_022_010;
const SUPERBLOCK_SALT: u32 = 160_774;
const NODE_SALT: u32 = 121_107;
const NEEDS_CHECK: u32 = 1;
const INTERNAL: u32 = 1;
const LEAF: u32 = 2;
/// Size of a node header in bytes.
const HEADER: usize = 32;
/// Size of a value in the details tree, in bytes.
const DETAILS: usize = 24;
/// Size of any other value in bytes.
const NUMBER: usize = 8;
/// Low bits of a mapping: time of writing. The block number is above them.
const TIME_BITS: u32 = 24;

/// Smallest chunk size of dm-thin; all others are multiples.
const MIN_CHUNK: u64 = 64 * 1024;
const MAX_CHUNK: u64 = 1024 * 1024 * 1024;

/// Limits shared by the thin volumes of one guest.
#[derive(Debug, Default)]
pub struct Budget {
    volumes: AtomicUsize,
    blocks: AtomicUsize,
    lines: AtomicUsize,
}

impl PartialEq for Budget {
    /// Always equal: limits are no property of a volume, so layouts compare by volume only.
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Budget {}

impl Budget {
    /// Registers a thin volume.
    pub(super) fn add_volume(&self) {
        self.volumes.fetch_add(1, Ordering::Relaxed);
    }

    /// Number of thin volumes, at least one.
    pub(super) fn volumes(&self) -> usize {
        self.volumes.load(Ordering::Relaxed).max(1)
    }

    fn read_block(&self) -> Result<(), Refused> {
        if self.blocks.fetch_add(1, Ordering::Relaxed) < MAX_BLOCKS {
            return Ok(());
        }
        Err(Refused::TooLarge(format!(
            "more than {MAX_BLOCKS} blocks of metadata in the thin volumes of the guest"
        )))
    }

    /// Takes lines; [`Budget::give_lines_back`] returns them.
    fn take_lines(&self, lines: usize) -> Result<(), Refused> {
        let before = self.lines.fetch_add(lines, Ordering::Relaxed);
        if before.saturating_add(lines) <= MAX_GUEST_LINES {
            return Ok(());
        }
        self.give_lines_back(lines);
        Err(Refused::TooLarge(format!(
            "the thin volumes of the guest have more than {MAX_GUEST_LINES} runs and gaps"
        )))
    }

    /// Returns the lines of a removed table.
    pub(super) fn give_lines_back(&self, lines: usize) {
        self.lines.fetch_sub(lines, Ordering::Relaxed);
    }
}

/// A volume to resolve, from LVM's metadata.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Device id in the pool.
    pub device_id: u32,
    /// Size in bytes.
    pub size: u64,
    /// Transaction id that the pool must carry.
    pub transaction_id: u64,
    /// Chunk size in bytes.
    pub chunk_size: u64,
    /// Size of the pool's data in bytes.
    pub data_size: u64,
}

/// A run of the volume, contiguous in the pool's data. All values in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Offset in the volume.
    pub start: u64,
    /// Offset in the pool's data.
    pub data: u64,
    /// Length.
    pub len: u64,
}

impl Run {
    fn end(self) -> u64 {
        // No overflow: `push` keeps both ends below the sizes of volume and data.
        self.start + self.len
    }
}

/// A resolved thin volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// Ascending, disjoint, merged where contiguous in volume and data.
    pub runs: Vec<Run>,
    /// Table lines: runs and gaps.
    pub lines: usize,
    /// Whether the pool has no other volume, so that no chunk is shared.
    pub alone: bool,
    /// Whether the kernel marked the pool as needing `thin_check`.
    pub needs_check: bool,
}

/// Reason why a thin volume cannot be resolved.
#[derive(Debug)]
pub enum Refused {
    /// Read error.
    Unreadable(io::Error),
    /// Metadata inconsistent with themselves or with LVM's.
    Damaged(String),
    /// Limit exceeded.
    TooLarge(String),
    /// Job cancelled.
    Cancelled,
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Refused::Unreadable(error)
    }
}

fn damaged<T>(text: impl Into<String>) -> Result<T, Refused> {
    Err(Refused::Damaged(text.into()))
}

/// Resolves one volume. `metadata` is the pool's metadata volume; `stop` reports cancellation. The
/// mapping's lines stay taken from `budget`.
pub fn resolve(
    metadata: &dyn ReadAt,
    wanted: &Wanted,
    budget: &Budget,
    stop: &dyn Fn() -> bool,
) -> Result<Mapping, Refused> {
    let superblock = Superblock::read(metadata)?;
    superblock.check(wanted)?;
    let blocks = (metadata.size() / BLOCK_BYTES).min(MAX_METADATA);
    let mut walk = Walk {
        metadata,
        blocks,
        visited: Bits::new(blocks),
        budget,
        stop,
    };
    let key = u64::from(wanted.device_id);
    let (details, alone) = walk.find::<DETAILS>(superblock.details, key, "details")?;
    let expected = details
        .and_then(|value| u64_at(&value, 0))
        .ok_or_else(|| Refused::Damaged(format!("no volume {key} in the pool")))?;
    let (root, _) = walk.find::<NUMBER>(superblock.mapping, key, "mapping")?;
    let Some(root) = root.map(u64::from_le_bytes) else {
        return damaged(format!("no mapping of volume {key}"));
    };
    let mut found = Found {
        limit: wanted.size.div_ceil(wanted.chunk_size),
        chunk: wanted.chunk_size,
        size: wanted.size,
        data_chunks: wanted.data_size / wanted.chunk_size,
        runs: Vec::new(),
        lines: 0,
        count: 0,
        cut: false,
    };
    let node = walk.node(root, NUMBER, "mapping")?;
    walk.collect(&node, 0..u64::MAX, 0, &mut found)?;
    // The count excludes blocks past the end of a volume that was reduced.
    if !found.cut && found.count != expected {
        return damaged(format!(
            "volume {key} has {} chunks, its details say {expected}",
            found.count
        ));
    }
    let lines = found.finish()?;
    budget.take_lines(lines)?;
    Ok(Mapping {
        runs: found.runs,
        lines,
        alone,
        needs_check: superblock.flags & NEEDS_CHECK != 0,
    })
}

/// Checks a block's checksum and recorded location.
fn check_block(
    block: &[u8],
    number: u64,
    salt: u32,
    place: usize,
    what: &str,
) -> Result<(), Refused> {
    let body = block.get(4..).unwrap_or_default();
    // The kernel omits the final inversion.
    if u32_at(block, 0) != Some(!crc32c::crc32c(body) ^ salt) {
        return damaged(format!("{what}: block {number} has a wrong checksum"));
    }
    if u64_at(block, place) != Some(number) {
        return damaged(format!("{what}: block {number} belongs elsewhere"));
    }
    Ok(())
}

/// Relevant fields of block 0.
#[derive(Debug)]
struct Superblock {
    flags: u32,
    version: u32,
    transaction_id: u64,
    mapping: u64,
    details: u64,
    /// Chunk size in sectors.
    chunk: u32,
    /// Block size in sectors.
    block: u32,
    incompatible: u32,
}

impl Superblock {
    fn read(metadata: &dyn ReadAt) -> Result<Self, Refused> {
        if metadata.size() < BLOCK_BYTES {
            return damaged("its metadata are too small");
        }
        let mut block = [0; BLOCK];
        metadata.read_exact_at(&mut block, 0)?;
        if u64_at(&block, 32) != Some(MAGIC) {
            return damaged("its metadata have no superblock");
        }
        check_block(&block, 0, SUPERBLOCK_SALT, 8, "superblock")?;
        let short = || Refused::Damaged("superblock".into());
        let word = |at| u32_at(&block, at).ok_or_else(short);
        let long = |at| u64_at(&block, at).ok_or_else(short);
        Ok(Superblock {
            flags: word(4)?,
            version: word(40)?,
            transaction_id: long(48)?,
            mapping: long(320)?,
            details: long(328)?,
            chunk: word(336)?,
            block: word(340)?,
            incompatible: word(360)?,
        })
    }

    fn check(&self, wanted: &Wanted) -> Result<(), Refused> {
        if !matches!(self.version, 1 | 2) || self.incompatible != 0 {
            return damaged(format!(
                "its metadata are of version {}, features {:#x}, which are not known",
                self.version, self.incompatible
            ));
        }
        if u64::from(self.block) * 512 != BLOCK_BYTES {
            return damaged(format!("metadata blocks of {} sectors", self.block));
        }
        if self.transaction_id != wanted.transaction_id {
            return damaged(format!(
                "transaction {} in the pool, {} in the volume group",
                self.transaction_id, wanted.transaction_id
            ));
        }
        let chunk = wanted.chunk_size;
        if u64::from(self.chunk) * 512 != chunk {
            return damaged(format!(
                "chunks of {} sectors in the pool, {} in the volume group",
                self.chunk,
                chunk / 512
            ));
        }
        if !(MIN_CHUNK..=MAX_CHUNK).contains(&chunk) || chunk % MIN_CHUNK != 0 {
            return damaged(format!("chunks of {chunk} bytes"));
        }
        Ok(())
    }
}

/// Bitmap of the metadata blocks.
struct Bits(Vec<u64>);

impl Bits {
    fn new(count: u64) -> Self {
        // At most MAX_METADATA bits.
        Bits(vec![0; usize::try_from(count.div_ceil(64)).unwrap_or(0)])
    }

    /// Sets a bit. Returns whether it was clear.
    fn set(&mut self, index: u64) -> bool {
        let word = usize::try_from(index / 64)
            .ok()
            .and_then(|word| self.0.get_mut(word));
        let Some(word) = word else {
            return false;
        };
        let bit = 1 << (index % 64);
        let clear = *word & bit == 0;
        *word |= bit;
        clear
    }
}

/// A verified node of a tree.
struct Node {
    number: u64,
    leaf: bool,
    count: usize,
    /// Capacity in entries; the values follow this many keys.
    max: usize,
    value_size: usize,
    bytes: Box<[u8; BLOCK]>,
}

impl Node {
    /// `leaf_value`: value size in the tree's leaves, in bytes.
    fn new(
        bytes: Box<[u8; BLOCK]>,
        number: u64,
        leaf_value: usize,
        what: &str,
    ) -> Result<Self, Refused> {
        check_block(&bytes[..], number, NODE_SALT, 8, what)?;
        let bad = || Refused::Damaged(format!("{what}: block {number} is no node"));
        let word = |at| {
            let word = u32_at(&bytes[..], at)?;
            usize::try_from(word).ok()
        };
        let flags = u32_at(&bytes[..], 4).ok_or_else(bad)?;
        let (count, max, value_size) = (
            word(16).ok_or_else(bad)?,
            word(20).ok_or_else(bad)?,
            word(24).ok_or_else(bad)?,
        );
        let leaf = match flags {
            LEAF => true,
            INTERNAL => false,
            _ => return Err(bad()),
        };
        let fits = value_size
            .checked_add(8)
            .and_then(|entry| entry.checked_mul(max))
            .is_some_and(|bytes| bytes <= BLOCK - HEADER);
        let size = if leaf { leaf_value } else { NUMBER };
        // Only the root leaf of an empty tree has no entries.
        if !fits || count > max || value_size != size || (count == 0 && !leaf) {
            return Err(bad());
        }
        let node = Node {
            number,
            leaf,
            count,
            max,
            value_size,
            bytes,
        };
        let ascending = (1..count).all(|index| node.key(index - 1) < node.key(index));
        if !ascending {
            return damaged(format!(
                "{what}: the keys of block {number} are not in order"
            ));
        }
        Ok(node)
    }

    /// In bounds: `new` checked that all entries fit.
    fn key(&self, index: usize) -> u64 {
        u64_at(&self.bytes[..], HEADER + 8 * index).unwrap_or_default()
    }

    fn value<const N: usize>(&self, index: usize) -> Option<[u8; N]> {
        let at = HEADER + 8 * self.max + self.value_size * index;
        self.bytes.get(at..at + N)?.try_into().ok()
    }

    /// A child of an internal node, or a mapping in a leaf.
    fn number_at(&self, index: usize) -> u64 {
        self.value(index)
            .map(u64::from_le_bytes)
            .unwrap_or_default()
    }

    /// The entry with the largest key not above `key`.
    fn at_or_below(&self, key: u64) -> Option<usize> {
        let keys = (0..self.count).take_while(|index| self.key(*index) <= key);
        keys.last()
    }

    /// The key range allowed below an entry.
    fn below(&self, index: usize, range: &Range<u64>) -> Range<u64> {
        let end = if index + 1 < self.count {
            self.key(index + 1)
        } else {
            range.end
        };
        self.key(index)..end
    }

    fn inside(&self, range: &Range<u64>, what: &str) -> Result<(), Refused> {
        let outside = |index: usize| !range.contains(&self.key(index));
        if self.count > 0 && (outside(0) || outside(self.count - 1)) {
            let number = self.number;
            return damaged(format!("{what}: block {number} holds keys of another one"));
        }
        Ok(())
    }
}

/// A traversal of the trees. It visits each block at most once.
struct Walk<'a> {
    metadata: &'a dyn ReadAt,
    blocks: u64,
    visited: Bits,
    budget: &'a Budget,
    stop: &'a dyn Fn() -> bool,
}

impl Walk<'_> {
    fn node(&mut self, number: u64, leaf_value: usize, what: &str) -> Result<Node, Refused> {
        if (self.stop)() {
            return Err(Refused::Cancelled);
        }
        // Block 0 is the superblock.
        if number == 0 || number >= self.blocks {
            return damaged(format!("{what}: block {number} is not in the metadata"));
        }
        if !self.visited.set(number) {
            return damaged(format!("{what}: block {number} is reached twice"));
        }
        self.budget.read_block()?;
        let mut bytes = Box::new([0; BLOCK]);
        self.metadata
            .read_exact_at(&mut bytes[..], number * BLOCK_BYTES)?;
        Node::new(bytes, number, leaf_value, what)
    }

    /// Looks up a key. Returns its value and whether it is the tree's only key.
    fn find<const N: usize>(
        &mut self,
        root: u64,
        key: u64,
        what: &str,
    ) -> Result<(Option<[u8; N]>, bool), Refused> {
        let mut range = 0..u64::MAX;
        let mut node = self.node(root, N, what)?;
        let alone = node.leaf && node.count == 1;
        for _ in 0..MAX_DEPTH {
            node.inside(&range, what)?;
            let Some(index) = node.at_or_below(key) else {
                return Ok((None, alone));
            };
            if node.leaf {
                let value = node.value(index).filter(|_| node.key(index) == key);
                return Ok((value, alone));
            }
            range = node.below(index, &range);
            node = self.node(node.number_at(index), N, what)?;
        }
        damaged(format!(
            "{what}: the tree is deeper than {MAX_DEPTH} levels"
        ))
    }

    /// Collects all mappings below a node within the volume's size.
    fn collect(
        &mut self,
        node: &Node,
        range: Range<u64>,
        depth: usize,
        found: &mut Found,
    ) -> Result<(), Refused> {
        if depth >= MAX_DEPTH {
            return damaged(format!(
                "mapping: the tree is deeper than {MAX_DEPTH} levels"
            ));
        }
        node.inside(&range, "mapping")?;
        let wanted = (0..node.count)
            .take_while(|index| node.key(*index) < found.limit)
            .count();
        found.cut |= wanted < node.count;
        if node.leaf {
            return (0..wanted)
                .try_for_each(|index| found.push(node.key(index), node.number_at(index)));
        }
        for (index, child) in self.children(node, wanted)?.into_iter().enumerate() {
            self.collect(&child, node.below(index, &range), depth + 1, found)?;
        }
        Ok(())
    }

    /// Reads the first `count` children of a node in disk order.
    fn children(&mut self, node: &Node, count: usize) -> Result<Vec<Node>, Refused> {
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_by_key(|index| node.number_at(*index));
        let mut children = Vec::with_capacity(count);
        for index in order {
            let child = self.node(node.number_at(index), NUMBER, "mapping")?;
            children.push((index, child));
        }
        children.sort_by_key(|(index, _)| *index);
        Ok(children.into_iter().map(|(_, child)| child).collect())
    }
}

/// A volume's mapping under construction.
struct Found {
    /// Volume size in chunks.
    limit: u64,
    chunk: u64,
    size: u64,
    data_chunks: u64,
    runs: Vec<Run>,
    lines: usize,
    count: u64,
    /// Whether chunks past the volume's end exist.
    cut: bool,
}

impl Found {
    /// `index` is below `limit` and above all earlier ones.
    fn push(&mut self, index: u64, value: u64) -> Result<(), Refused> {
        let data = value >> TIME_BITS;
        if data >= self.data_chunks {
            return damaged(format!(
                "chunk {index} lies beyond the end of the pool's data"
            ));
        }
        self.count += 1;
        // Neither overflows: both are below the byte sizes of volume and data.
        let (start, data) = (index * self.chunk, data * self.chunk);
        let len = self.chunk.min(self.size - start);
        let end = self.runs.last().map_or(0, |last| last.end());
        match self.runs.last_mut() {
            Some(last) if end == start && last.data + last.len == data => last.len += len,
            _ => {
                self.lines += 1 + usize::from(end < start);
                self.runs.push(Run { start, data, len });
            }
        }
        self.enough()
    }

    fn enough(&self) -> Result<(), Refused> {
        if self.lines <= MAX_LINES {
            return Ok(());
        }
        Err(Refused::TooLarge(format!(
            "more than {MAX_LINES} runs and gaps"
        )))
    }

    /// Counts the trailing gap.
    fn finish(&mut self) -> Result<usize, Refused> {
        let end = self.runs.last().map_or(0, |last| last.end());
        self.lines += usize::from(end < self.size);
        self.enough()?;
        Ok(self.lines)
    }
}

#[cfg(test)]
#[path = "thin_tests.rs"]
mod tests;
