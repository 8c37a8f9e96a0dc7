//! Guests that are more than one filesystem: fstab, LVM of their own, thin origins, one broken among good ones.

use crate::bacula::{Bacula, BaculaOptions, JobResult, Selection, fileset_plugin};
use crate::check;
use crate::cmd;
use crate::guestdisk::{Content, Fs, GuestDisk, GuestLv, GuestVg, MIB, Part, Table, classic};
use crate::hoststate::{HostState, Scope};
use crate::inside::{Scenario, scenario};
use crate::lvm::HostVg;
use crate::populate::rich;
use crate::tree::{Ignore, Manifest};
use crate::workdir::WorkDir;
use crate::{Result, message, plugin_so};
use std::path::Path;

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("guests_fstab", guests_fstab).only("trixie"),
    scenario("guests_lvm_same_names", guests_lvm_same_names).only("trixie"),
    scenario("guests_thin_origin", guests_thin_origin).only("trixie"),
    scenario("guests_one_broken", guests_one_broken).only("bookworm"),
    scenario("guests_lvm_of_many_kinds", guests_lvm_of_many_kinds).only("bookworm"),
];

const DIRECTIVE: &str = "guestsnap: lv=vg0/domu-* strip=domu-";

/// A Bacula with the plugin and a FileSet `guests`.
fn bacula() -> Result<Bacula> {
    Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![("guests".into(), fileset_plugin(DIRECTIVE))],
        ..BaculaOptions::default()
    })
}

/// Objects that a plugin restore leaves out: sockets (Bacula saves none), the plugin's own report, files in motion.
fn restore_ignores() -> Result<Ignore> {
    let mut ignore = Ignore::after_plugin_restore()?;
    ignore.below.push("busy".into());
    Ok(ignore)
}

/// Restores all of a job and compares one guest with what it was.
fn compare(bacula: &Bacula, job: &JobResult, to: &Path, guests: &[(&str, &Manifest)]) -> Result {
    bacula.restore(job.jobid, &Selection::All, to)?.clean()?;
    for (guest, expected) in guests {
        let tree = Manifest::of(&to.join("@guestsnap").join(guest))?;
        tree.check_equals(expected, &restore_ignores()?)
            .map_err(|e| format!("{guest}: {}\n{}", message(&e), job.log))?;
    }
    Ok(())
}

/// The host (without the daemon) is as before.
fn check_host(before: &HostState) -> Result {
    let left = HostState::settled_diff(before, &Scope::default())?;
    check!(
        left.is_empty(),
        "left behind on the host:\n  {}",
        left.join("\n  ")
    );
    Ok(())
}

/// Fills an NTFS: through the kernel's driver, and a stream that only the other driver can write.
fn fill_ntfs(disk: &GuestDisk, part: u32, point: &Path) -> Result<Manifest> {
    let mounted = disk.mount(part, point)?;
    rich(mounted.path(), 4, Fs::Ntfs.can())?;
    let named = mounted.path().join("Grüße 漢字.txt");
    std::fs::write(&named, "named\n")?;
    std::os::unix::fs::chown(named, Some(1000), Some(100))?;
    mounted.close()?;
    let volume = disk.volume(part)?;
    let name = point.display().to_string();
    let options = ["-o", "streams_interface=windows", volume.device(), &name];
    cmd::run("ntfs-3g", options)?;
    let stream = std::fs::write(
        point.join("etc/hostname:Zone.Identifier"),
        "[ZoneTransfer]\n",
    );
    cmd::run("umount", [&name])?;
    stream?;
    drop(volume);
    let mounted = disk.mount(part, point)?;
    let expected = Manifest::of(mounted.path())?;
    mounted.close()?;
    Ok(expected)
}

/// GPT with xfs as root, ext4, vfat and NTFS by the guest's fstab, on a disk with 512-byte sectors.
fn guests_fstab() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let disk = GuestDisk::create(
        &vg.lv("domu-gpt", "600m")?,
        Table::Gpt,
        &[
            Part::fs(64 * MIB, Fs::Vfat, "EFI"),
            Part::fs(320 * MIB, Fs::Xfs, "root"),
            Part::fs(100 * MIB, Fs::Ext4, "data"),
            Part::fs(60 * MIB, Fs::Ntfs, "WINDOWS"),
        ],
    )?;
    let root = disk.mount(2, &dir.join("mnt"))?;
    rich(root.path(), 2, Fs::Xfs.can())?;
    for name in ["boot/efi", "data", "windows"] {
        std::fs::create_dir_all(root.path().join(name))?;
    }
    std::fs::write(
        root.path().join("etc/fstab"),
        "LABEL=root / xfs defaults 0 1\nLABEL=data /data ext4 defaults 0 2\nLABEL=EFI /boot/efi vfat umask=0077 0 1\n\
         LABEL=WINDOWS /windows ntfs3 defaults 0 0\n",
    )?;
    root.sync()?;
    let expected = Manifest::of(root.path())?;
    root.close()?;
    let data = disk.mount(3, &dir.join("mnt"))?;
    rich(data.path(), 3, Fs::Ext4.can())?;
    let expected_data = Manifest::of(data.path())?;
    data.close()?;
    let efi = disk.mount(1, &dir.join("mnt"))?;
    std::fs::write(efi.path().join("grub.cfg"), "set root=hd0\n")?;
    efi.close()?;
    let expected_windows = fill_ntfs(&disk, 4, &dir.join("mnt"))?;

    let bacula = bacula()?;
    let host = HostState::capture(None)?;
    let job = bacula.run_backup("guests", "Full")?.clean()?;
    check_host(&host)?;
    println!("{}", job.log);
    check!(
        job.log
            .contains("alternate data streams, owners and access lists of NTFS are not saved"),
        "no word about what an NTFS holds besides:\n{}",
        job.log
    );
    let to = dir.join("all");
    let restored = bacula.restore(job.jobid, &Selection::All, &to)?.clean()?;
    check!(
        restored.log.contains("attributes that only NTFS keeps"),
        "no word about what only an NTFS keeps:\n{}",
        restored.log
    );
    let tree = Manifest::of(&to.join("@guestsnap/gpt"))?;
    let mut ignore = restore_ignores()?;
    ignore
        .below
        .extend(["boot".into(), "data".into(), "windows".into()]);
    tree.check_equals(&expected, &ignore)?;
    tree.below(Path::new("data"))
        .check_equals(&expected_data, &restore_ignores()?)?;
    let mut ignore = restore_ignores()?;
    ignore.xattrs.push("$LX".into());
    tree.below(Path::new("windows"))
        .check_equals(&expected_windows, &ignore)?;
    let grub = std::fs::read(to.join("@guestsnap/gpt/boot/efi/grub.cfg"))?;
    check!(
        grub == b"set root=hd0\n",
        "the vfat partition came back different"
    );
    Ok(())
}

/// Two guests whose VG has the same name, and that is the host's name too.
fn guests_lvm_same_names() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let mut expected = Vec::new();
    for (seed, name) in [(11, "a"), (12, "b")] {
        let lv = vg.lv(&format!("domu-{name}"), "300m")?;
        let parts = [
            Part::fs(60 * MIB, Fs::Ext4, "boot"),
            Part::new(230 * MIB, Content::Pv),
        ];
        let disk = GuestDisk::create(&lv, Table::Mbr, &parts)?;
        let lvs = [
            GuestLv::new("root", "-L 120m", Content::Fs(Fs::Ext4, "root".into())),
            GuestLv::new("swap", "-L 16m", Content::Swap),
        ];
        let guest = GuestVg::create("vg0", &[(&disk, 2)], &lvs)?;
        expected.push(guest.with_mounted("root", Fs::Ext4, &dir.join("mnt"), |point| {
            rich(point, seed, Fs::Ext4.can())?;
            std::fs::create_dir(point.join("boot"))?;
            std::fs::write(
                point.join("etc/fstab"),
                "/dev/mapper/vg0-root / ext4 defaults 0 1\nLABEL=boot /boot ext4 defaults 0 2\n/dev/vg0/swap none swap sw 0 0\n",
            )?;
            Manifest::of(point)
        })?);
        let boot = disk.mount(1, &dir.join("mnt"))?;
        std::fs::write(boot.path().join("vmlinuz"), name)?;
        boot.close()?;
    }
    let bacula = bacula()?;
    let host = HostState::capture(None)?;
    let job = bacula.run_backup("guests", "Full")?.clean()?;
    check_host(&host)?;
    println!("{}", job.log);
    let to = dir.join("all");
    bacula.restore(job.jobid, &Selection::All, &to)?.clean()?;
    let mut ignore = restore_ignores()?;
    ignore.below.push("boot".into());
    for (name, expected) in ["a", "b"].iter().zip(&expected) {
        let guest = to.join("@guestsnap").join(name);
        Manifest::of(&guest)?
            .check_equals(expected, &ignore)
            .map_err(|e| format!("{name}: {}", message(&e)))?;
        check!(
            std::fs::read(guest.join("boot/vmlinuz"))? == name.as_bytes(),
            "{name}: another guest's boot"
        );
    }
    Ok(())
}

fn guests_thin_origin() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    vg.thin_pool("pool", "1g")?;
    let disk = classic(&vg.thin_lv("pool", "domu-thin", "300m")?, 32 * MIB)?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    rich(mounted.path(), 4, Fs::Ext3.can())?;
    mounted.sync()?;
    let expected = Manifest::of(mounted.path())?;
    let bacula = bacula()?;
    let host = HostState::capture(None)?;
    let job = bacula.run_backup("guests", "Full")?.clean()?;
    check_host(&host)?;
    check!(
        job.log.contains("thin"),
        "the log does not speak of a thin snapshot:\n{}",
        job.log
    );
    compare(&bacula, &job, &dir.join("all"), &[("thin", &expected)])?;
    drop(bacula);
    mounted.close()
}

/// One guest's root is damaged: the job counts an error and names it, the other guest is complete.
fn guests_one_broken() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let bad = classic(&vg.lv("domu-bad", "300m")?, 32 * MIB)?;
    {
        // A superblock that still looks like one, with a group descriptor table of noise.
        let volume = bad.volume(1)?;
        let of = format!("of={}", volume.device());
        cmd::run(
            "dd",
            [
                "if=/dev/urandom",
                &of,
                "bs=1k",
                "seek=2",
                "count=200",
                "conv=notrunc,fsync",
                "status=none",
            ],
        )?;
    }
    let good = classic(&vg.lv("domu-good", "300m")?, 32 * MIB)?;
    let mounted = good.mount(1, &dir.join("mnt"))?;
    rich(mounted.path(), 6, Fs::Ext3.can())?;
    let expected = Manifest::of(mounted.path())?;
    mounted.close()?;
    let bacula = bacula()?;
    let host = HostState::capture(None)?;
    let job = bacula.run_backup("guests", "Full")?;
    check!(
        job.errors > 0,
        "a guest that cannot be opened is no error:\n{}",
        job.log
    );
    check!(
        job.log.contains("bad: ERROR"),
        "the broken guest is not named:\n{}",
        job.log
    );
    check_host(&host)?;
    compare(&bacula, &job, &dir.join("all"), &[("good", &expected)])
}

/// A guest of two disks with one VG across them: striped, raid1, mirror and thin volumes, each a filesystem of its own.
fn guests_lvm_of_many_kinds() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let (_guest, expected) = guest_of_many_kinds(&vg, &dir)?;
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: ["web1", "half"]
            .map(|name| (name.to_owned(), fileset_plugin(&format!("guestsnap: guest={name}"))))
            .to_vec(),
        client_file: Some(
            "[guest.web1]\ndisks = ['vg0/web1-a', 'vg0/web1-b']\n[guest.half]\ndisks = ['vg0/web1-a']\n".into(),
        ),
        ..BaculaOptions::default()
    })?;
    let host = HostState::capture(None)?;
    let job = bacula.run_backup("web1", "Full")?.clean()?;
    check_host(&host)?;
    println!("{}", job.log);
    let to = dir.join("all");
    bacula.restore(job.jobid, &Selection::All, &to)?.clean()?;
    let tree = Manifest::of(&to.join("@guestsnap/web1"))?;
    for (name, manifest) in &expected {
        let mut ignore = restore_ignores()?;
        let below = match *name {
            "root" => {
                ignore.below.push("m".into());
                tree.clone()
            }
            name => tree.below(&Path::new("m").join(name)),
        };
        below
            .check_equals(manifest, &ignore)
            .map_err(|e| format!("{name}: {}", message(&e)))?;
    }
    // With one disk missing each volume that needs it is named; the job is not clean.
    let job = bacula.run_backup("half", "Full")?;
    check_host(&host)?;
    println!("{}", job.log);
    check!(job.errors > 0, "a missing disk is no error");
    for lv in ["guestvg/root", "guestvg/usr"] {
        check!(job.log.contains(lv), "{lv} is not named");
    }
    Ok(())
}

/// The guest, and the contents of its volumes.
fn guest_of_many_kinds(
    vg: &HostVg,
    dir: &WorkDir,
) -> Result<(GuestVg, Vec<(&'static str, Manifest)>)> {
    let mut disks = Vec::new();
    for name in ["web1-a", "web1-b"] {
        let lv = vg.lv(name, "700m")?;
        disks.push(GuestDisk::create(
            &lv,
            Table::Whole,
            &[Part::new(700 * MIB, Content::Pv)],
        )?);
    }
    let ext4 =
        |name: &str, args: &str| GuestLv::new(name, args, Content::Fs(Fs::Ext4, name.into()));
    let pool = GuestLv::pool("pool", 100);
    let lvs = [
        ext4("root", "-i 2 -I 64k -L 120m"),
        ext4("usr", "--type raid1 -m1 -L 60m"),
        ext4("srv", "--type mirror -m1 --mirrorlog core -L 60m"),
        pool,
        GuestLv::new(
            "home",
            "-V 200m --thinpool pool",
            Content::Fs(Fs::Ext4, "home".into()),
        ),
    ];
    let guest = GuestVg::create("guestvg", &[(&disks[0], 1), (&disks[1], 1)], &lvs)?;
    let mut expected = Vec::new();
    for (seed, name) in [(1, "usr"), (2, "srv"), (3, "home"), (4, "root")] {
        let manifest = guest.with_mounted(name, Fs::Ext4, &dir.join("mnt"), |point| {
            rich(point, seed, Fs::Ext4.can())?;
            if name == "root" {
                for below in ["m/usr", "m/srv", "m/home"] {
                    std::fs::create_dir_all(point.join(below))?;
                }
                std::fs::write(
                    point.join("etc/fstab"),
                    "/dev/mapper/guestvg-root / ext4 defaults 0 1\n/dev/guestvg/usr /m/usr ext4 defaults 0 2\n\
                     LABEL=srv /m/srv ext4 defaults 0 2\n/dev/mapper/guestvg-home /m/home ext4 defaults 0 2\n",
                )?;
            }
            Manifest::of(point)
        })?;
        expected.push((name, manifest));
    }
    Ok((guest, expected))
}
