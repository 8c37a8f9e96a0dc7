//! Hand-made pools, valid and damaged.

use super::*;

const KIB: u64 = 1024;
const CHUNK: u64 = 64 * KIB;

/// Pool metadata in memory.
#[derive(Clone)]
struct Pool {
    bytes: Vec<u8>,
    used: u64,
}

impl Pool {
    /// Blocks 1 and 2 are the roots of the details and mapping trees.
    fn new(blocks: usize) -> Self {
        let mut pool = Pool {
            bytes: vec![0; blocks * BLOCK],
            used: 1,
        };
        let block = pool.block(0);
        block[32..40].copy_from_slice(&MAGIC.to_le_bytes());
        block[40..44].copy_from_slice(&2u32.to_le_bytes());
        block[48..56].copy_from_slice(&7u64.to_le_bytes());
        block[320..328].copy_from_slice(&2u64.to_le_bytes());
        block[328..336].copy_from_slice(&1u64.to_le_bytes());
        block[336..340].copy_from_slice(&128u32.to_le_bytes());
        block[340..344].copy_from_slice(&8u32.to_le_bytes());
        pool.seal(0);
        pool.used = 3;
        pool
    }

    fn block(&mut self, number: u64) -> &mut [u8] {
        let at = usize::try_from(number).unwrap() * BLOCK;
        &mut self.bytes[at..at + BLOCK]
    }

    fn seal(&mut self, number: u64) {
        let salt = if number == 0 {
            SUPERBLOCK_SALT
        } else {
            NODE_SALT
        };
        let block = self.block(number);
        block[8..16].copy_from_slice(&number.to_le_bytes());
        let sum = !crc32c::crc32c(&block[4..]) ^ salt;
        block[..4].copy_from_slice(&sum.to_le_bytes());
    }

    /// Writes a node with values of `size` bytes, zero-padded.
    fn node(&mut self, number: u64, flags: u32, size: usize, entries: &[(u64, u64)]) {
        let max = (BLOCK - HEADER) / (8 + size) / 3 * 3;
        let block = self.block(number);
        block.fill(0);
        block[4..8].copy_from_slice(&flags.to_le_bytes());
        for (at, value) in [(16, entries.len()), (20, max), (24, size)] {
            block[at..at + 4].copy_from_slice(&u32::try_from(value).unwrap().to_le_bytes());
        }
        for (index, (key, value)) in entries.iter().enumerate() {
            let at = HEADER + 8 * index;
            block[at..at + 8].copy_from_slice(&key.to_le_bytes());
            let at = HEADER + 8 * max + size * index;
            block[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        self.seal(number);
    }

    /// Builds a volume's tree from (chunk, data chunk) pairs; returns its root.
    fn tree(&mut self, mappings: &[(u64, u64)]) -> u64 {
        let mut flags = LEAF;
        let shifted = mappings
            .iter()
            .map(|(key, data)| (*key, data << TIME_BITS | 5));
        let mut level: Vec<(u64, u64)> = shifted.collect();
        if level.is_empty() {
            self.node(self.used, LEAF, NUMBER, &[]);
            self.used += 1;
            return self.used - 1;
        }
        loop {
            let mut above = Vec::new();
            for entries in level.chunks(200) {
                self.node(self.used, flags, NUMBER, entries);
                above.push((entries[0].0, self.used));
                self.used += 1;
            }
            if let [(_, root)] = above[..] {
                return root;
            }
            level = above;
            flags = INTERNAL;
        }
    }

    /// Builds a pool from volume ids and mappings.
    fn with(volumes: &[(u64, &[(u64, u64)])]) -> Self {
        let nodes: usize = volumes.iter().map(|(_, m)| m.len() / 100 + 4).sum();
        let mut pool = Pool::new(3 + nodes);
        let mut roots = Vec::new();
        let mut details = Vec::new();
        for (id, mappings) in volumes {
            roots.push((*id, pool.tree(mappings)));
            details.push((*id, u64::try_from(mappings.len()).unwrap()));
        }
        pool.node(1, LEAF, DETAILS, &details);
        pool.node(2, LEAF, NUMBER, &roots);
        pool
    }

    fn resolve(&self, device_id: u32, chunks: u64) -> Result<Mapping, String> {
        let wanted = wanted(device_id, chunks * CHUNK);
        resolve(&self.bytes, &wanted, &Budget::default(), &|| false).map_err(text)
    }
}

fn wanted(device_id: u32, size: u64) -> Wanted {
    Wanted {
        device_id,
        size,
        transaction_id: 7,
        chunk_size: CHUNK,
        data_size: 1_000_000 * CHUNK,
    }
}

fn text(refused: Refused) -> String {
    match refused {
        Refused::Unreadable(error) => format!("unreadable: {error}"),
        Refused::Damaged(why) => why,
        Refused::TooLarge(why) => format!("too large: {why}"),
        Refused::Cancelled => "cancelled".into(),
    }
}

fn run(start: u64, data: u64, chunks: u64) -> Run {
    Run {
        start: start * CHUNK,
        data: data * CHUNK,
        len: chunks * CHUNK,
    }
}

#[test]
fn test_runs_are_merged_and_gaps_counted() {
    let pool = Pool::with(&[
        (3, &[(1, 10), (2, 11), (3, 20), (7, 21), (8, 22)]),
        (9, &[]),
    ]);
    let found = pool.resolve(3, 10).unwrap();
    assert_eq!(found.runs, [run(1, 10, 2), run(3, 20, 1), run(7, 21, 2)]);
    // Gaps at the start, before chunk 7, and at the end.
    assert_eq!(found.lines, 6);
    assert!(!found.alone && !found.needs_check);
    // The volume ends inside the last chunk.
    let short = wanted(3, 9 * CHUNK - 4096);
    let found = resolve(&pool.bytes, &short, &Budget::default(), &|| false).unwrap();
    assert_eq!(found.runs[2].len, 2 * CHUNK - 4096);
    assert_eq!(found.lines, 5);
    // A volume that was reduced keeps its chunks past the end.
    assert_eq!(pool.resolve(3, 3).unwrap().runs, [run(1, 10, 2)]);
    let empty = pool.resolve(9, 4).unwrap();
    assert_eq!((empty.runs.len(), empty.lines), (0, 1));
    assert!(Pool::with(&[(0, &[(0, 5)])]).resolve(0, 1).unwrap().alone);
    let missing = pool.resolve(4, 4).unwrap_err();
    assert_eq!(missing, "no volume 4 in the pool");
}

#[test]
fn test_trees_of_several_levels() {
    let mappings: Vec<(u64, u64)> = (0..100_000).map(|n| (2 * n, 3 * n)).collect();
    let pool = Pool::with(&[(1, &mappings)]);
    let found = pool.resolve(1, 200_000).unwrap();
    assert_eq!(found.runs.len(), 100_000);
    assert_eq!(found.lines, 200_000);
    assert!(
        found
            .runs
            .iter()
            .zip(0..)
            .all(|(r, n)| *r == run(2 * n, 3 * n, 1))
    );
    let part = pool.resolve(1, 1001).unwrap();
    assert_eq!(part.runs.len(), 501);
}

#[test]
fn test_what_does_not_belong_to_the_volume_group_is_refused() {
    let pool = Pool::with(&[(1, &[(0, 5)])]);
    let refused = |change: &dyn Fn(&mut Wanted)| {
        let mut wanted = wanted(1, CHUNK);
        change(&mut wanted);
        text(resolve(&pool.bytes, &wanted, &Budget::default(), &|| false).unwrap_err())
    };
    let why = refused(&|w| w.transaction_id = 8);
    assert_eq!(why, "transaction 7 in the pool, 8 in the volume group");
    let why = refused(&|w| w.chunk_size = 2 * CHUNK);
    assert_eq!(
        why,
        "chunks of 128 sectors in the pool, 256 in the volume group"
    );
    let why = refused(&|w| w.data_size = 5 * CHUNK);
    assert_eq!(why, "chunk 0 lies beyond the end of the pool's data");
    let cancelled = resolve(&pool.bytes, &wanted(1, CHUNK), &Budget::default(), &|| true);
    assert!(matches!(cancelled, Err(Refused::Cancelled)));
}

#[test]
fn test_superblock() {
    let sound = Pool::with(&[(1, &[(0, 5)])]);
    let changed = |at: usize, bytes: &[u8]| {
        let mut pool = sound.clone();
        pool.block(0)[at..at + bytes.len()].copy_from_slice(bytes);
        pool.seal(0);
        pool.resolve(1, 1)
    };
    let why = changed(32, &[0]).unwrap_err();
    assert_eq!(why, "its metadata have no superblock");
    let why = changed(40, &[3]).unwrap_err();
    assert_eq!(
        why,
        "its metadata are of version 3, features 0x0, which are not known"
    );
    assert!(changed(360, &[1]).unwrap_err().contains("features 0x1"));
    assert_eq!(
        changed(340, &[16]).unwrap_err(),
        "metadata blocks of 16 sectors"
    );
    // The kernel would check its space maps, which this reader does not need.
    assert!(changed(4, &[1]).unwrap().needs_check);
    let mut pool = sound.clone();
    pool.block(0)[100] ^= 1;
    let why = pool.resolve(1, 1).unwrap_err();
    assert_eq!(why, "superblock: block 0 has a wrong checksum");
    let tiny = resolve(
        &vec![0; 100],
        &wanted(1, CHUNK),
        &Budget::default(),
        &|| false,
    );
    assert_eq!(text(tiny.unwrap_err()), "its metadata are too small");
}

/// Three nodes in a cycle, in both details and mapping: the kernel would loop for ever.
#[test]
fn test_circles_are_refused() {
    for (root, what) in [(328, "details"), (320, "mapping")] {
        let mut pool = Pool::new(10);
        for (number, next) in [(5, 6), (6, 7), (7, 5)] {
            pool.node(number, INTERNAL, NUMBER, &[(0, next)]);
        }
        pool.node(1, LEAF, DETAILS, &[(1, 1)]);
        pool.block(0)[root..root + 8].copy_from_slice(&5u64.to_le_bytes());
        pool.seal(0);
        let why = pool.resolve(1, 4).unwrap_err();
        assert_eq!(why, format!("{what}: block 5 is reached twice"));
    }
    // Within a volume's tree, and from there into the upper trees.
    for (target, twice) in [(4, 4), (2, 2), (1, 1)] {
        let mut pool = Pool::with(&[(1, &[(0, 5)])]);
        pool.node(4, INTERNAL, NUMBER, &[(0, 3), (1, target)]);
        pool.node(2, LEAF, NUMBER, &[(1, 4)]);
        let why = pool.resolve(1, 4).unwrap_err();
        assert_eq!(why, format!("mapping: block {twice} is reached twice"));
    }
}

#[test]
fn test_deep_trees_are_refused() {
    let mut pool = Pool::new(60);
    pool.node(1, LEAF, DETAILS, &[(1, 1)]);
    pool.node(2, LEAF, NUMBER, &[(1, 10)]);
    for number in 10..40 {
        pool.node(number, INTERNAL, NUMBER, &[(0, number + 1)]);
    }
    pool.node(40, LEAF, NUMBER, &[(0, 0)]);
    let deep = "mapping: the tree is deeper than 16 levels";
    assert_eq!(pool.resolve(1, 4).unwrap_err(), deep);
    pool.node(2, INTERNAL, NUMBER, &[(0, 10)]);
    assert_eq!(pool.resolve(1, 4).unwrap_err(), deep);
    // A leaf below 15 levels is accepted.
    pool.node(2, LEAF, NUMBER, &[(1, 24)]);
    assert_eq!(pool.resolve(1, 4).unwrap_err(), deep);
    pool.node(2, LEAF, NUMBER, &[(1, 25)]);
    assert_eq!(pool.resolve(1, 4).unwrap().runs, [run(0, 0, 1)]);
}

#[test]
fn test_damaged_nodes_are_refused() {
    let leaf = |change: &dyn Fn(&mut Pool)| {
        let mut pool = Pool::with(&[(1, &[(0, 5), (1, 7)])]);
        change(&mut pool);
        pool.resolve(1, 4).unwrap_err()
    };
    let field = |at: usize, value: u32| {
        leaf(&|pool| {
            pool.block(3)[at..at + 4].copy_from_slice(&value.to_le_bytes());
            pool.seal(3);
        })
    };
    for (at, value) in [
        (4, 0),
        (4, 3),
        (16, 253),
        (20, 255),
        (20, u32::MAX),
        (24, 16),
    ] {
        assert_eq!(
            field(at, value),
            "mapping: block 3 is no node",
            "{at} {value}"
        );
    }
    let why = leaf(&|pool| pool.node(3, LEAF, NUMBER, &[(1, 5 << 24), (0, 7 << 24)]));
    assert_eq!(why, "mapping: the keys of block 3 are not in order");
    let why = leaf(&|pool| pool.node(3, LEAF, NUMBER, &[(1, 5 << 24), (1, 7 << 24)]));
    assert_eq!(why, "mapping: the keys of block 3 are not in order");
    let why = leaf(&|pool| pool.node(3, LEAF, NUMBER, &[(0, 5 << 24)]));
    assert_eq!(why, "volume 1 has 1 chunks, its details say 2");
    let why = leaf(&|pool| pool.node(3, INTERNAL, NUMBER, &[]));
    assert_eq!(why, "mapping: block 3 is no node");
    let why = leaf(&|pool| pool.node(2, LEAF, NUMBER, &[(1, 900)]));
    assert_eq!(why, "mapping: block 900 is not in the metadata");
    let why = leaf(&|pool| pool.node(2, LEAF, NUMBER, &[(1, 0)]));
    assert_eq!(why, "mapping: block 0 is not in the metadata");
    let why = leaf(&|pool| pool.node(2, LEAF, NUMBER, &[(2, 3)]));
    assert_eq!(why, "no mapping of volume 1");
    let why = leaf(&|pool| pool.block(3)[2000] ^= 1);
    assert_eq!(why, "mapping: block 3 has a wrong checksum");
    let why = leaf(&|pool| {
        let copy = pool.block(3).to_vec();
        pool.block(4).copy_from_slice(&copy);
        pool.node(2, LEAF, NUMBER, &[(1, 4)]);
    });
    assert_eq!(why, "mapping: block 4 belongs elsewhere");
    // A child with keys outside its parent's range.
    let why = leaf(&|pool| {
        pool.node(4, LEAF, NUMBER, &[(2, 9 << 24)]);
        pool.node(5, INTERNAL, NUMBER, &[(0, 3), (1, 4)]);
        pool.node(2, LEAF, NUMBER, &[(1, 5)]);
    });
    assert_eq!(why, "mapping: block 3 holds keys of another one");
}

#[test]
fn test_limits_of_a_guest() {
    let mappings: Vec<(u64, u64)> = (0..140_000).map(|n| (2 * n, 3 * n)).collect();
    let pool = Pool::with(&[(1, &mappings)]);
    let most = u64::try_from(MAX_LINES).unwrap();
    assert_eq!(pool.resolve(1, most).unwrap().lines, MAX_LINES);
    let why = pool.resolve(1, most + 1).unwrap_err();
    assert_eq!(why, "too large: more than 262144 runs and gaps");
    let budget = Budget::default();
    let again = || resolve(&pool.bytes, &wanted(1, most * CHUNK), &budget, &|| false);
    let first = again().unwrap().lines;
    again().unwrap();
    assert!(text(again().unwrap_err()).starts_with("too large: the thin volumes of the guest"));
    budget.give_lines_back(first);
    again().unwrap();
    budget.blocks.store(MAX_BLOCKS - 5, Ordering::Relaxed);
    budget.give_lines_back(first);
    assert!(text(again().unwrap_err()).starts_with("too large: more than 524288 blocks"));
}
