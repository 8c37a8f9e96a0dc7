//! A btrfs over two disks of the guest: saved whole when both are there, an error that names the other when not.

use super::image::{guest_in, run, store};
use crate::bacula::{Bacula, BaculaOptions, Selection, fileset_plugin};
use crate::guestdisk::{Loop, MIB, image};
use crate::inside::{Scenario, scenario};
use crate::workdir::WorkDir;
use crate::{Result, check, cmd, plugin_so};

pub const ROOT: &[Scenario] = &[scenario("root_btrfs_over_two_disks", btrfs_over_two_disks)];

/// The kernels of both suites take the second device in ways of their own.
pub const VM: &[Scenario] = &[scenario(
    "members_btrfs_over_two_disks",
    btrfs_over_two_disks,
)];

fn btrfs_over_two_disks() -> Result {
    let dir = WorkDir::new()?;
    let store = store(&dir)?;
    let paths = ["a.img", "b.img"].map(|name| store.path().join(name));
    let mnt = dir.join("guest");
    std::fs::create_dir(&mnt)?;
    let content = vec![7; 5 << 20];
    {
        paths.iter().try_for_each(|path| image(path, 160 * MIB))?;
        let one = Loop::attach(&paths[0], 0, None, 0)?;
        let other = Loop::attach(&paths[1], 0, None, 0)?;
        let (a, b) = (one.device(), other.device());
        cmd::sh(&format!(
            "mkfs.btrfs -q -f -m raid1 -d raid0 {a} {b}; mount -o device={b} {a} {}",
            mnt.display()
        ))?;
        std::fs::write(mnt.join("large"), &content)?;
        cmd::sh(&format!(
            "cd {}; btrfs -q subvolume create var; touch var/log; mkdir etc; echo ID=x > etc/os-release",
            mnt.display()
        ))?;
        // Both lines by the second device, which means the same filesystem.
        std::fs::write(
            mnt.join("etc/fstab"),
            "/dev/vdb / btrfs defaults 0 0\n/dev/vdb /var btrfs subvol=var 0 0\n",
        )?;
        cmd::sh(&format!(
            "umount {}; btrfs device scan --forget {a}; btrfs device scan --forget {b}",
            mnt.display()
        ))?;
    }
    let [a, b] = paths.each_ref().map(|path| path.display().to_string());
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some(plugin_so()?),
        filesets: ["web", "half"]
            .map(|guest| {
                let line = format!("guestsnap: guest={guest}");
                (guest.to_owned(), fileset_plugin(&line))
            })
            .into(),
        client_file: Some(format!(
            "[guest.web]\ndisks = ['{a}', '{b}']\n[guest.half]\ndisks = ['{b}']\n"
        )),
        ..BaculaOptions::default()
    })?;
    bacula.run_backup("Empty", "Full")?.clean()?;
    let job = run(&bacula, "web", "Full")?.clean()?;
    let to = dir.join("restored");
    bacula.restore(job.jobid, &Selection::All, &to)?.clean()?;
    let restored = std::fs::read(guest_in(&to, "web").join("large"))?;
    check!(restored == content, "other contents");

    let job = run(&bacula, "half", "Full")?;
    check!(job.errors > 0, "no error without one of its disks");
    for text in ["ERROR GS-404", "a btrfs over 2; missing: device 1 (UUID "] {
        check!(job.log.contains(text), "the log does not say {text:?}");
    }
    check!(!job.log.contains("fsck"), "it says fsck");
    store.close()
}
