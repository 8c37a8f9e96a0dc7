//! The start of a volume, as each type that is made again; what comes out must be fit for a command line.
#![no_main]

use guestsnap::kit::filesystem;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    // A superblock at its place needs no zeros in the corpus.
    let Some((kind, block)) = input.split_first() else {
        return;
    };
    let (fstype, at) = [("ext4", 1024), ("xfs", 0), ("btrfs", 0x1_0000), ("vfat", 0), ("swap", 0)]
        [usize::from(*kind) % 5];
    let mut head = vec![0; at];
    head.extend_from_slice(block);
    if fstype == "swap" {
        head.resize(4096, 0);
        head[4086..].copy_from_slice(b"SWAPSPACE2");
    }
    if let Some(Ok(described)) = filesystem::parse(fstype, &head) {
        described.recipe.check().expect("words of fixed lists, a label, a UUID");
        for argv in described.recipe.commands("/dev/loop0") {
            assert!(argv.iter().all(|word| !word.contains('\0')));
        }
    }
});
