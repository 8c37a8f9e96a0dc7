//! Guests with a kernel and a boot loader: lost, made again, and booted.

use super::image::store;
use super::rebuild::{rebuild, restored_kit};
use crate::bacula::{Bacula, BaculaOptions, fileset_plugin};
use crate::guestdisk::{Content, Fs, GuestDisk, Loop, MIB, Part, Table, image};
use crate::inside::{Scenario, scenario};
use crate::workdir::WorkDir;
use crate::{Result, check, cmd, emulator, plugin_so, vm};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// On this machine.
pub const ROOT: &[Scenario] = &[scenario("root_rebuild_boots", boots)];

const SUITE: &str = "bookworm";
const PACKAGES: &str = "systemd-sysv,udev,kmod,linux-image-cloud-amd64,initramfs-tools,grub-pc-bin,grub2-common,\
    e2fsprogs,xfsprogs,btrfs-progs";
/// Time limit of a boot under emulation.
const BOOTED: Duration = Duration::from_secs(300);

/// Runs at the end of the boot: what is mounted, whether fstab fits, and a file of the incremental job. Then the machine
/// is switched off.
const CHECK: &str = r#"[Unit]
After=local-fs.target swap.target systemd-user-sessions.service
[Service]
Type=idle
StandardOutput=tty
TTYPath=/dev/ttyS0
ExecStart=/bin/sh -c 'echo; findmnt --verify || echo FSTAB-BAD; for m in $(findmnt -rno TARGET --fstab); do findmnt -rno TARGET,FSTYPE,UUID $m; done; swapon --show=UUID --noheadings; echo MARKER $(cat /srv/marker); failed=$(systemctl --failed --no-legend --plain) && echo FAILED-UNITS: $failed.; echo BOOT-END; systemctl poweroff'
"#;

/// The files of a bootable Debian 12, built once.
fn system() -> Result<PathBuf> {
    // The number counts changes of the script below.
    let recipe = (SUITE, PACKAGES, CHECK, 2);
    vm::built("guest", &recipe, |dir| {
        vm::mmdebstrap(SUITE, "minbase", PACKAGES, dir, &[])?;
        let root = dir.join("root");
        std::fs::write(root.join("etc/systemd/system/boot-check.service"), CHECK)?;
        cmd::sh(&format!(
            "set -e; cd '{}'; mkdir -p etc/systemd/system/multi-user.target.wants
             ln -s ../boot-check.service etc/systemd/system/multi-user.target.wants/boot-check.service
             rm -f etc/systemd/system/getty.target.wants/*; echo guest > etc/hostname
             ln -sf /dev/null etc/systemd/system/serial-getty@ttyS0.service
             ln -sf /dev/null etc/systemd/system/apt-daily.timer
             ln -sf /dev/null etc/systemd/system/apt-daily-upgrade.timer",
            root.display()
        ))?;
        Ok(())
    })
    .map(|dir| dir.join("root"))
}

/// UUID of the filesystem on a partition.
fn uuid(disk: &GuestDisk, number: u32) -> Result<String> {
    let volume = disk.volume(number)?;
    Ok(cmd::run(
        "blkid",
        ["-p", "-s", "UUID", "-o", "value", volume.device()],
    )?
    .trim()
    .to_owned())
}

/// A guest that boots: its disk, and the lines that its boot must print.
struct Guest {
    disk: GuestDisk,
    expected: Vec<String>,
}

/// Copies the system into a mounted root, and installs GRUB.
fn install(disk: &GuestDisk, root: &Path, fstab: &str, kernel: &str, modules: &str) -> Result {
    let whole = Loop::attach(&disk.path, 0, None, 0)?;
    let (root, system) = (root.display(), system()?);
    cmd::sh(&format!(
        "set -e; cp -a '{}/.' '{root}/'; cd '{root}'; printf '%s' '{fstab}' > etc/fstab; mkdir -p srv boot/grub
         kernel=$(basename boot/vmlinuz-*); version=${{kernel#vmlinuz-}}
         cat > boot/grub/grub.cfg <<END
serial --unit=0
terminal_output serial
linux {kernel}/boot/$kernel ro console=ttyS0 quiet systemd.show_status=0 {{ROOT}}
initrd {kernel}/boot/initrd.img-$version
boot
END
         for folder in dev proc sys; do mount --bind /$folder $folder; done
         trap 'umount dev proc sys' EXIT
         chroot . grub-install --target=i386-pc --modules='part_msdos part_gpt {modules}' {}",
        system.display(),
        whole.device()
    ))?;
    Ok(())
}

/// An MBR with GRUB in the gap, ext4 and XFS.
fn classic(dir: &WorkDir, path: &Path) -> Result<Guest> {
    image(path, 1800 * MIB)?;
    let disk = GuestDisk::create(
        path,
        Table::Mbr,
        &[
            Part::fs(1200 * MIB, Fs::Ext4, "root"),
            Part::fs(320 * MIB, Fs::Xfs, "srv"),
            Part::new(32 * MIB, Content::Swap),
        ],
    )?;
    let ids = [1, 2, 3].map(|number| uuid(&disk, number));
    let [root, srv, swap] = ids;
    let (root, srv, swap) = (root?, srv?, swap?);
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    let fstab = format!(
        "UUID={root} / ext4 defaults 0 1\nUUID={srv} /srv xfs defaults 0 2\nUUID={swap} none swap sw 0 0\n"
    );
    install(&disk, mounted.path(), &fstab, "", "ext2")?;
    cmd::sh(&format!(
        "sed -i 's/{{ROOT}}/root=UUID={root}/' '{}/boot/grub/grub.cfg'",
        mounted.path().display()
    ))?;
    mounted.close()?;
    let expected = vec![format!("/ ext4 {root}"), format!("/srv xfs {srv}"), swap];
    Ok(Guest { disk, expected })
}

/// A GPT with a BIOS boot partition, and btrfs in subvolumes.
fn modern(dir: &WorkDir, path: &Path) -> Result<Guest> {
    image(path, 1500 * MIB)?;
    let disk = GuestDisk::create(
        path,
        Table::Gpt,
        &[
            Part::new(MIB, Content::Empty),
            Part::fs(1400 * MIB, Fs::Btrfs, "root"),
        ],
    )?;
    cmd::run(
        "sfdisk",
        [
            "--part-type",
            &path.display().to_string(),
            "1",
            "21686148-6449-6E6F-744E-656564454649",
        ],
    )?;
    let root = uuid(&disk, 2)?;
    let mounted = disk.mount(2, &dir.join("mnt"))?;
    cmd::sh(&format!(
        "cd '{}'; btrfs -q subvolume create @; btrfs -q subvolume create @srv; btrfs -q subvolume set-default @",
        mounted.path().display()
    ))?;
    mounted.close()?;
    let mounted = disk.mount(2, &dir.join("mnt"))?;
    let fstab =
        format!("UUID={root} / btrfs subvol=@ 0 0\nUUID={root} /srv btrfs subvol=@srv 0 0\n");
    install(&disk, mounted.path(), &fstab, "/@", "btrfs")?;
    cmd::sh(&format!(
        "sed -i 's/{{ROOT}}/root=UUID={root} rootflags=subvol=@/' '{}/boot/grub/grub.cfg'",
        mounted.path().display()
    ))?;
    mounted.close()?;
    let expected = vec![format!("/ btrfs {root}"), format!("/srv btrfs {root}")];
    Ok(Guest { disk, expected })
}

/// Boots a disk; what its console says.
fn boot(disk: &Path, console: &Path) -> Result<String> {
    let mut machine = emulator::command()?;
    machine
        .args([
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-m",
            "512",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args([
            "-nic",
            "none",
            "-serial",
            &format!("file:{}", console.display()),
        ])
        .args([
            "-drive",
            &format!("file={},format=raw,if=virtio,cache=unsafe", disk.display()),
        ])
        .stdin(Stdio::null());
    let mut child = machine.spawn()?;
    let ended = cmd::wait_for("the guest to switch itself off", BOOTED, || {
        Ok(child.try_wait()?)
    });
    let text = String::from_utf8_lossy(&std::fs::read(console)?).into_owned();
    if ended.is_err() {
        child.kill()?;
        child.wait()?;
    }
    check!(ended.is_ok(), "it does not end:\n{text}");
    Ok(text)
}

/// Guests with GRUB are saved by a full job and its incremental, their disks are lost, and after a rebuild and a
/// restore into them they boot as if nothing had been.
fn boots() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let folder = store.path().display().to_string();
    let guests = [
        ("web1", classic(&dir, &store.path().join("web1.img"))?),
        ("web2", modern(&dir, &store.path().join("web2.img"))?),
    ];
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: vec![("g".into(), fileset_plugin("guestsnap: guest=web*"))],
        client_file: Some(format!(
            "allow = [\"{folder}/*\"]\n[restore]\ninto = [\"web?\"]\n[guest.web1]\ndisks = [\"{folder}/web1.img\"]\n\
             [guest.web2]\ndisks = [\"{folder}/web2.img\"]\n"
        )),
        ..BaculaOptions::default()
    })?;
    let full = bacula.run_backup("g", "Full")?.clean()?;
    for (name, guest) in &guests {
        let mark = |place: &Path| -> Result {
            Ok(std::fs::write(place.join("marker"), format!("of {name}"))?)
        };
        if *name == "web1" {
            let srv = guest.disk.mount(2, &dir.join("mnt"))?;
            mark(srv.path())?;
            srv.close()?;
        } else {
            let top = guest.disk.mount(2, &dir.join("mnt"))?;
            cmd::sh(&format!(
                "m='{0}'; mount -o subvol=@srv $(findmnt -nvo SOURCE $m) $m/srv",
                top.path().display()
            ))?;
            mark(&top.path().join("srv"))?;
            cmd::run("umount", [top.path().join("srv").display().to_string()])?;
            top.close()?;
        }
    }
    let more = bacula.run_backup("g", "Incremental")?.clean()?;
    for (name, guest) in &guests {
        let path = &guest.disk.path;
        std::fs::remove_file(path)?;
        let kit = restored_kit(&bacula, full.jobid, name, &dir.join("kit"))?;
        rebuild(&bacula, &kit, path)?;
        let words = format!(
            "fileset=g jobid={},{} where=/ replace=always select\ncd /@guestsnap\nmark {name}\ndone",
            full.jobid, more.jobid
        );
        let job = bacula.start_restore_with_options(&words, &[("into", name)])?;
        bacula.wait_job(job)?.clean()?;
        let said = boot(path, &dir.join("console"))?;
        println!("{said}");
        for line in guest.expected.iter().map(String::as_str).chain([
            &*format!("MARKER of {name}"),
            "FAILED-UNITS: .",
            "BOOT-END",
        ]) {
            check!(
                said.contains(line),
                "{name}: \"{line}\" is missing:\n{said}"
            );
        }
        check!(!said.contains("FSTAB-BAD"), "{name}:\n{said}");
    }
    drop(bacula);
    store.close()
}
