//! Disks made again from the kit in a guest's backup.

use super::image::{bacula, run, store};
use crate::bacula::{Bacula, Selection, fileset_plugin};
use crate::check;
use crate::guestdisk::{Content, Fs, GuestDisk, MIB, Part, Table, image};
use crate::inside::{Scenario, scenario};
use crate::populate::bytes;
use crate::workdir::WorkDir;
use crate::{Result, cmd, plugin_so, tool};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// On this machine.
pub const ROOT: &[Scenario] = &[scenario("root_rebuild_images", images)];

/// The Plugin line's directive for all images of a folder.
fn line(store: &Path) -> String {
    fileset_plugin(&format!("guestsnap: image={}/web*.img", store.display()))
}

/// Restores the kit of a guest from one job; the folder that `guestsnap rebuild` takes.
pub(super) fn restored_kit(
    bacula: &Bacula,
    jobid: u32,
    guest: &str,
    to: &Path,
) -> Result<std::path::PathBuf> {
    let selection = Selection::Dir(format!("/@guestsnap/{guest}/.guestsnap/"));
    bacula.restore(jobid, &selection, to)?.clean()?;
    Ok(to.join("@guestsnap").join(guest).join(".guestsnap"))
}

/// What identifies each filesystem of a disk: the lines of blkid, without the devices.
fn identities(disk: &GuestDisk) -> Result<Vec<String>> {
    let of = |number| -> Result<String> {
        let volume = disk.volume(number)?;
        let text = cmd::run("blkid", ["-p", "-o", "export", volume.device()])?;
        let wanted = ["UUID=", "LABEL=", "TYPE=", "VERSION=", "BLOCK_SIZE="];
        let lines = text
            .lines()
            .filter(|l| wanted.iter().any(|w| l.starts_with(w)));
        Ok(lines.collect::<Vec<_>>().join(" "))
    };
    disk.parts
        .iter()
        .filter(|p| p.content != Content::Empty)
        .map(|p| of(p.number))
        .collect()
}

/// The table as sfdisk shows it, without the name of the disk.
fn table(path: &Path) -> Result<String> {
    let name = path.display().to_string();
    Ok(cmd::run("sfdisk", ["--dump", &name])?.replace(&name, "disk"))
}

/// Bytes of a disk.
fn read(path: &Path, at: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    File::open(path)?.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

/// Code in front of the first partition, and in a filesystem's first sector.
fn put_boot_code(disk: &GuestDisk) -> Result {
    let file = File::options().write(true).open(&disk.path)?;
    file.write_all_at(&bytes(440, 1), 0)?;
    file.write_all_at(&bytes(50_000, 2), 64 << 10)?;
    file.write_all_at(&bytes(1024, 3), disk.part(1)?.offset)?;
    file.sync_all()?;
    Ok(())
}

fn check_filesystems(disk: &GuestDisk) -> Result {
    for part in &disk.parts {
        let Content::Fs(fs, _) = &part.content else {
            continue;
        };
        let volume = disk.volume(part.number)?;
        match fs {
            Fs::Xfs => cmd::run("xfs_repair", ["-n", volume.device()])?,
            Fs::Vfat => cmd::run("fsck.fat", ["-n", volume.device()])?,
            Fs::Btrfs => cmd::run("btrfs", ["check", volume.device()])?,
            _ => cmd::run("e2fsck", ["-f", "-n", volume.device()])?,
        };
    }
    Ok(())
}

/// An MBR with logical partitions and a GPT with a boot partition: both come back as they were, from a full
/// job and its incremental.
fn images() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let (mbr, gpt) = (store.path().join("web1.img"), store.path().join("web2.img"));
    image(&mbr, 800 * MIB)?;
    image(&gpt, 900 * MIB)?;
    let mbr = GuestDisk::create(
        &mbr,
        Table::Mbr,
        &[
            Part::fs(100 * MIB, Fs::Ext4, "root"),
            Part::new(16 * MIB, Content::Swap).logical(),
            Part::fs(320 * MIB, Fs::Xfs, "data").logical(),
            Part::fs(64 * MIB, Fs::Ext3, "old").logical(),
        ],
    )?;
    let gpt = GuestDisk::create(
        &gpt,
        Table::Gpt,
        &[
            Part::fs(64 * MIB, Fs::Ext2, "boot"),
            Part::new(16 * MIB, Content::Swap),
            Part::fs(200 * MIB, Fs::Btrfs, "pool"),
        ],
    )?;
    put_boot_code(&mbr)?;
    put_boot_code(&gpt)?;
    let bacula = bacula(store.path(), plugin_so()?, &[("g", line(store.path()))])?;
    let full = run(&bacula, "g", "Full")?.clean()?;
    for (guest, disk) in [("web1", &mbr), ("web2", &gpt)] {
        let kit = restored_kit(&bacula, full.jobid, guest, &dir.join("kit"))?;
        let made = dir.join(format!("{guest}.img"));
        let place = made.display().to_string();
        let words = ["rebuild", &kit.display().to_string(), "--disk", &place];
        let working = format!("--working-dir={}", bacula.fd_working_dir().display());
        let command = tool()?.display().to_string();
        let plan = cmd::run(&command, words.iter().copied().chain(["--plan", &working]))?;
        check!(!made.exists(), "a plan made the disk:\n{plan}");
        let said = cmd::run(&command, words.iter().copied().chain([&*working]))?;
        println!("{plan}{said}");
        let again = GuestDisk {
            path: made.clone(),
            parts: disk.parts.clone(),
        };
        check!(
            table(&disk.path)? == table(&made)?,
            "{}\n{}",
            table(&disk.path)?,
            table(&made)?
        );
        let (known, found) = (identities(disk)?, identities(&again)?);
        check!(known == found, "{known:#?}\n{found:#?}");
        let first = disk.part(1)?.offset;
        let front = usize::try_from(first)? - 1024;
        for (at, len) in [(0, 440), (1024, front), (first, 1024)] {
            check!(
                read(&disk.path, at, len)? == read(&made, at, len)?,
                "{guest}: bytes at {at}"
            );
        }
        check_filesystems(&again)?;
    }
    changes(&bacula, &mbr)?;
    store.close()
}

/// An incremental job has the part of the kit that changed, and nothing else of it.
fn changes(bacula: &Bacula, disk: &GuestDisk) -> Result {
    let kit = |jobid| -> Result<Vec<String>> {
        let files = bacula.list_files(jobid)?.into_iter();
        Ok(files
            .filter(|f| f.contains("/.guestsnap/rebuild/") && !f.ends_with('/'))
            .collect())
    };
    let same = run(bacula, "g", "Incremental")?.clean()?;
    check!(kit(same.jobid)?.is_empty(), "{:?}", kit(same.jobid)?);
    let file = File::options().write(true).open(&disk.path)?;
    file.write_all_at(&bytes(440, 9), 0)?;
    file.sync_all()?;
    let changed = run(bacula, "g", "Incremental")?.clean()?;
    let names = kit(changed.jobid)?;
    let expected =
        ["area-0", "kit.json"].map(|n| format!("/@guestsnap/web1/.guestsnap/rebuild/{n}"));
    check!(names == expected, "{names:?}");
    Ok(())
}
