//! Filesystems made again from what their superblocks say: each must describe itself as the first one did.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use guestsnap::disk::FileDisk;
use guestsnap::kit::filesystem::{self, Described};

const MIB: u64 = 1 << 20;
const UUID: &str = "7c5d2b1a-0f3e-4a6b-9c8d-1e2f3a4b5c6d";

/// One way to make a filesystem: its type, the size of its volume in MiB, the command.
struct Way(&'static str, u64, &'static [&'static str]);

const WAYS: &[Way] = &[
    Way("ext4", 64, &["mkfs.ext4", "-L", "root fs"]),
    Way(
        "ext4",
        64,
        &[
            "mkfs.ext4",
            "-b",
            "1024",
            "-I",
            "128",
            "-N",
            "5000",
            "-m",
            "0.5",
        ],
    ),
    Way(
        "ext4",
        64,
        &[
            "mkfs.ext4",
            "-O",
            "^64bit,^metadata_csum,uninit_bg,^has_journal",
        ],
    ),
    Way(
        "ext4",
        64,
        &[
            "mkfs.ext4",
            "-O",
            "quota,project,bigalloc",
            "-C",
            "16384",
            "-E",
            "quotatype=usrquota:prjquota",
        ],
    ),
    Way(
        "ext4",
        64,
        &[
            "mkfs.ext4",
            "-O",
            "casefold,encrypt,verity,inline_data",
            "-E",
            "encoding_flags=strict",
        ],
    ),
    Way(
        "ext4",
        200,
        &[
            "mkfs.ext4",
            "-J",
            "size=16",
            "-G",
            "4",
            "-E",
            "stride=16,stripe_width=64",
            "-e",
            "remount-ro",
        ],
    ),
    Way(
        "ext4",
        64,
        &["mkfs.ext4", "-O", "mmp,orphan_file,fast_commit"],
    ),
    Way("ext3", 64, &["mkfs.ext3", "-U", UUID]),
    Way(
        "ext2",
        16,
        &[
            "mkfs.ext2",
            "-O",
            "^resize_inode,^dir_index,^sparse_super",
            "-b",
            "1024",
        ],
    ),
    Way("xfs", 320, &["mkfs.xfs", "-L", "data", "-q"]),
    Way(
        "xfs",
        320,
        &[
            "mkfs.xfs",
            "-q",
            "-m",
            "rmapbt=1,reflink=0,bigtime=0,inobtcount=0",
            "-i",
            "size=1024,nrext64=1",
        ],
    ),
    Way(
        "xfs",
        320,
        &["mkfs.xfs", "-q", "-m", "crc=0", "-n", "ftype=0"],
    ),
    Way(
        "xfs",
        320,
        &[
            "mkfs.xfs",
            "-q",
            "-m",
            "crc=0",
            "-n",
            "version=ci,size=8192",
        ],
    ),
    Way(
        "xfs",
        512,
        &[
            "mkfs.xfs",
            "-q",
            "-s",
            "size=4096",
            "-d",
            "agcount=7,su=64k,sw=4",
            "-l",
            "size=64m,su=64k",
        ],
    ),
    Way(
        "xfs",
        64,
        &["mkfs.xfs", "-q", "--unsupported", "-l", "size=8m"],
    ),
    Way("btrfs", 128, &["mkfs.btrfs", "-q", "-L", "pool"]),
    Way(
        "btrfs",
        128,
        &[
            "mkfs.btrfs",
            "-q",
            "-n",
            "4096",
            "--csum",
            "xxhash",
            "-O",
            "^no-holes",
            "-R",
            "^free-space-tree",
        ],
    ),
    Way(
        "btrfs",
        128,
        &["mkfs.btrfs", "-q", "-M", "-n", "4096", "--csum", "blake2"],
    ),
    Way(
        "vfat",
        64,
        &["mkfs.fat", "-F", "32", "-n", "EFI", "-i", "12ab34cd"],
    ),
    Way(
        "vfat",
        64,
        &["mkfs.fat", "-F", "16", "-s", "8", "-r", "1024", "-f", "1"],
    ),
    Way("vfat", 4, &["mkfs.fat", "-F", "12", "-h", "2048"]),
    Way("vfat", 64, &["mkfs.fat", "-F", "32", "-S", "4096"]),
    Way("swap", 16, &["mkswap", "-L", "swap 1"]),
    Way("swap", 16, &["mkswap", "-p", "65536", "-U", UUID]),
];

fn run(argv: &[String]) {
    let output = Command::new(&argv[0])
        .args(&argv[1..])
        .env("MKE2FS_CONFIG", "/dev/null")
        .output()
        .unwrap_or_else(|e| panic!("{}: {e}", argv[0]));
    assert!(
        output.status.success(),
        "{argv:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn describe(fstype: &str, image: &Path) -> Described {
    let disk = FileDisk::open(image).unwrap();
    let found = filesystem::read(fstype, &disk).unwrap();
    found
        .expect("a type that is made again")
        .unwrap_or_else(|why| panic!("{why}"))
}

/// The filesystem's own check.
fn check(fstype: &str, image: &str) {
    let argv: &[&str] = match fstype {
        "ext2" | "ext3" | "ext4" => &["e2fsck", "-f", "-n", image],
        "xfs" => &["xfs_repair", "-n", "-f", image],
        "btrfs" => &["btrfs", "check", image],
        "vfat" => &["fsck.fat", "-n", image],
        _ => return,
    };
    run(&argv
        .iter()
        .map(|word| (*word).to_owned())
        .collect::<Vec<_>>());
}

#[test]
fn root_filesystems_are_made_again_as_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    for Way(fstype, size, words) in WAYS {
        for image in [&first, &second] {
            let file = File::create(image).unwrap();
            file.set_len(size * MIB).unwrap();
        }
        let image = first.to_str().unwrap();
        // The usual configuration of the system, as the guest had it.
        let made = Command::new(words[0])
            .args(&words[1..])
            .arg(image)
            .output()
            .unwrap();
        assert!(
            made.status.success(),
            "{words:?}: {}",
            String::from_utf8_lossy(&made.stderr)
        );
        let known = describe(fstype, &first);
        assert_eq!(known.lost, Vec::<String>::new(), "{words:?}");
        assert_eq!(known.recipe.check(), Ok(()), "{words:?}");
        let image = second.to_str().unwrap();
        for argv in known.recipe.commands(image) {
            run(&argv);
        }
        assert_eq!(describe(fstype, &second), known, "{words:?}");
        check(fstype, image);
    }
}
