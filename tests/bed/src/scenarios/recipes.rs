//! Filesystems made again from what their superblocks say, by the programs of both suites.

use crate::guestdisk::{MIB, image};
use crate::inside::{Scenario, scenario};
use crate::workdir::WorkDir;
use crate::{Result, check, cmd, fail};
use guestsnap::disk::FileDisk;
use guestsnap::kit::filesystem::{self, Described, Recipe, Xfs};
use std::path::Path;

/// On this machine.
pub const ROOT: &[Scenario] = &[scenario("root_rebuild_filesystems", filesystems)];

/// With the programs of Debian 13.
pub const VM: &[Scenario] = &[scenario("rebuild_filesystems", filesystems)
    .only("trixie")
    .programs()];

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
    Way("ext4", 64, &["mkfs.ext4", "-O", "none,filetype,quota"]),
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
    Way("xfs", 64, &["mkfs.xfs", "-q", "--unsupported"]),
    Way(
        "xfs",
        400,
        &[
            "mkfs.xfs",
            "-q",
            "--unsupported",
            "-l",
            "size=20m",
            "-d",
            "agcount=1",
        ],
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

fn run_all(argv: &[String]) -> Result<String> {
    let words = ["MKE2FS_CONFIG=/dev/null".to_owned()]
        .into_iter()
        .chain(argv.iter().cloned());
    cmd::run("env", words)
}

fn describe(fstype: &str, image: &Path) -> Result<Described> {
    let disk = FileDisk::open(image).map_err(|e| e.report())?;
    let found = filesystem::read(fstype, &disk)?.ok_or("a type that is not made again")?;
    Ok(found?)
}

/// Filesystems made again from what their superblocks say: each must describe itself as the first one did.
fn filesystems() -> Result {
    let dir = WorkDir::new()?;
    let (first, second) = (dir.join("first"), dir.join("second"));
    for Way(fstype, size, words) in WAYS {
        for path in [&first, &second] {
            image(path, size * MIB)?;
        }
        let name = first.display().to_string();
        // By the usual configuration of the system, as the guest had it.
        cmd::run(words[0], words[1..].iter().copied().chain([&*name]))?;
        let known = describe(fstype, &first)?;
        check!(known.lost.is_empty(), "{words:?}: {:?}", known.lost);
        check!(known.recipe.check() == Ok(()), "{words:?}");
        let name = second.display().to_string();
        for argv in known.recipe.commands(&name) {
            let Err(first) = run_all(&argv) else {
                continue;
            };
            let (argv, lost) = known.recipe.second_try(&name).ok_or(first)?;
            check!(lost.is_none(), "{words:?}: {lost:?}");
            run_all(&argv)?;
        }
        let again = describe(fstype, &second)?;
        check!(again == known, "{words:?}:\n{known:#?}\n{again:#?}");
        let found = cmd::run("blkid", ["-p", "-s", "TYPE", "-o", "value", &name])?;
        check!(found.trim() == known.recipe.fstype(), "{words:?}: {found}");
        match *fstype {
            "xfs" => cmd::run("xfs_repair", ["-o", "force_geometry", "-n", "-f", &name])?,
            "btrfs" => cmd::run("btrfs", ["check", &name])?,
            "vfat" => cmd::run("fsck.fat", ["-n", &name])?,
            "swap" => continue,
            _ => cmd::run("e2fsck", ["-f", "-n", &name])?,
        };
    }
    small_log(&second)
}

/// A log that today's program calls too small is replaced by one of its own choice.
fn small_log(path: &Path) -> Result {
    let name = path.display().to_string();
    image(path, 320 * MIB)?;
    cmd::run("mkfs.xfs", ["-q", "-f", &name])?;
    let Recipe::Xfs(known) = describe("xfs", path)?.recipe else {
        fail!("not XFS");
    };
    let recipe = Recipe::Xfs(Xfs {
        log_blocks: 100,
        ..known.clone()
    });
    check!(
        run_all(&recipe.commands(&name)[0]).is_err(),
        "a log of 100 blocks is made"
    );
    let (argv, _) = recipe.second_try(&name).ok_or("no second try")?;
    run_all(&argv)?;
    check!(
        describe("xfs", path)?.recipe == Recipe::Xfs(known),
        "another XFS"
    );
    Ok(())
}
