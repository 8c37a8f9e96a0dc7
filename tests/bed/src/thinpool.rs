//! Metadata of a guest's thin pool, forged as a guest could forge them.

use super::Result;
use crate::check;
use guestsnap::disk::{FileDisk, Layout, Segment, ThinPool, examine};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

const BLOCK: usize = 4096;
const SUPERBLOCK_SALT: u32 = 160_774;
const NODE_SALT: u32 = 121_107;

/// A root in the superblock of the metadata.
#[derive(Clone, Copy, Debug)]
pub enum Root {
    /// Root of the tree of mappings.
    Mapping,
    /// Root of the tree of device details.
    Details,
}

/// The first thin pool of a guest.
pub fn pool(disk: &Path) -> Result<Arc<ThinPool>> {
    let file = FileDisk::open(disk).map_err(|e| e.report())?;
    let found = examine(&[&file]).map_err(|e| e.report())?;
    let pool = found
        .volumes
        .iter()
        .find_map(|volume| match &volume.layout {
            Layout::Thin { pool, .. } => Some(pool.clone()),
            _ => None,
        });
    Ok(pool.ok_or_else(|| format!("no thin volume: {found:?}"))?)
}

/// Leads a root of the pool's metadata to three nodes that lead to each other, with checksums that are right. The
/// kernel's dm-thin walks along them for ever.
pub fn make_circle(disk: &Path, root: Root) -> Result {
    let metadata = Metadata::open(disk)?;
    let nodes = [10, 9, 8].map(|n| metadata.blocks - n);
    for (index, number) in nodes.into_iter().enumerate() {
        metadata.node(number, INTERNAL, 8, &[(0, nodes[(index + 1) % 3])])?;
    }
    match root {
        Root::Mapping => metadata.roots(Some(nodes[0]), None),
        Root::Details => metadata.roots(None, Some(nodes[0])),
    }
}

/// Gives volume 1 of the pool every second chunk, so many in all, over the first 1000 chunks of the data.
pub fn scatter(disk: &Path, count: u64) -> Result {
    let metadata = Metadata::open(disk)?;
    // Beyond those that the pool itself has in use.
    let mut next = 300;
    let mut flags = LEAF;
    let mut level: Vec<(u64, u64)> = (0..count).map(|n| (2 * n, (n * 7 % 1000) << 24)).collect();
    let root = loop {
        let mut above = Vec::new();
        for entries in level.chunks(252) {
            metadata.node(next, flags, 8, entries)?;
            above.push((entries[0].0, next));
            next += 1;
        }
        if let [(_, root)] = above[..] {
            break root;
        }
        level = above;
        flags = INTERNAL;
    };
    metadata.node(next, LEAF, 8, &[(1, root)])?;
    metadata.node(next + 1, LEAF, 24, &[(1, count)])?;
    metadata.roots(Some(next), Some(next + 1))
}

const INTERNAL: u32 = 1;
const LEAF: u32 = 2;

/// The metadata of a guest's pool, to be written to.
struct Metadata {
    device: File,
    start: u64,
    blocks: u64,
}

impl Metadata {
    fn open(disk: &Path) -> Result<Self> {
        let pool = pool(disk)?;
        let [Segment::Linear(extent)] = &pool.metadata[..] else {
            crate::fail!("the metadata are not one run: {pool:?}");
        };
        Ok(Metadata {
            device: File::options().read(true).write(true).open(disk)?,
            start: extent.start,
            blocks: extent.len / BLOCK as u64,
        })
    }

    fn at(&self, number: u64) -> u64 {
        self.start + number * BLOCK as u64
    }

    /// Writes a node with values of `size` bytes, of which the first eight are given.
    fn node(&self, number: u64, flags: u32, size: usize, entries: &[(u64, u64)]) -> Result {
        check!(number < self.blocks, "no room for block {number}");
        let max = (BLOCK - 32) / (8 + size) / 3 * 3;
        let mut node = [0; BLOCK];
        put(&mut node, 4, flags.to_le_bytes());
        put(&mut node, 8, number.to_le_bytes());
        for (offset, value) in [(16, entries.len()), (20, max), (24, size)] {
            put(&mut node, offset, u32::try_from(value)?.to_le_bytes());
        }
        for (index, (key, value)) in entries.iter().enumerate() {
            put(&mut node, 32 + 8 * index, key.to_le_bytes());
            put(&mut node, 32 + 8 * max + size * index, value.to_le_bytes());
        }
        seal(&mut node, NODE_SALT);
        self.device.write_all_at(&node, self.at(number))?;
        Ok(())
    }

    /// Sets roots of the superblock.
    fn roots(&self, mapping: Option<u64>, details: Option<u64>) -> Result {
        let mut superblock = [0; BLOCK];
        self.device.read_exact_at(&mut superblock, self.at(0))?;
        let before = superblock;
        seal(&mut superblock, SUPERBLOCK_SALT);
        check!(
            superblock == before,
            "the superblock is not where it should be"
        );
        for (offset, root) in [(320, mapping), (328, details)] {
            if let Some(root) = root {
                put(&mut superblock, offset, root.to_le_bytes());
            }
        }
        seal(&mut superblock, SUPERBLOCK_SALT);
        self.device.write_all_at(&superblock, self.at(0))?;
        self.device.sync_all()?;
        Ok(())
    }
}

fn put<const N: usize>(block: &mut [u8; BLOCK], at: usize, bytes: [u8; N]) {
    block[at..at + N].copy_from_slice(&bytes);
}

fn seal(block: &mut [u8; BLOCK], salt: u32) {
    let sum = !crc32c::crc32c(&block[4..]) ^ salt;
    put(block, 0, sum.to_le_bytes());
}
