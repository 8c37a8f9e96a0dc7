//! The package in an administrator's hands: installed, used as the README says, upgraded, purged.

use std::collections::BTreeSet;
use std::path::Path;

use crate::bacula::{Bacula, BaculaOptions, Selection};
use crate::check;
use crate::guestdisk::{Fs, MIB, classic};
use crate::inside::{Scenario, scenario};
use crate::lvm::HostVg;
use crate::populate::rich;
use crate::tree::{Ignore, Manifest};
use crate::workdir::WorkDir;
use crate::{Result, cmd};

use super::plugin::{guest_in, restored};

/// In the emulated machines.
pub const VM: &[Scenario] = &[scenario("package", package)];

const CLIENT_FILE: &str = "/etc/bacula/guestsnap.toml";
const README: &str = include_str!("../../../../README.md");

/// Lines of the README's block that holds this text, without their indentation.
fn block(text: &str) -> Result<Vec<&'static str>> {
    let lines: Vec<&str> = README.lines().collect();
    let at = lines
        .iter()
        .position(|line| line.starts_with("    ") && line.contains(text))
        .ok_or_else(|| format!("the README has no block with {text:?}"))?;
    let inside = |line: &&&str| line.starts_with("    ") || line.is_empty();
    let before = lines[..at].iter().rev().take_while(inside).count();
    let after = lines[at..].iter().take_while(inside).count();
    Ok(lines[at - before..at + after]
        .iter()
        .filter_map(|line| line.strip_prefix("    "))
        .collect())
}

/// Every file that a package may have brought or left. What package tools, LVM and bconsole keep for themselves is theirs.
fn everything() -> Result<BTreeSet<String>> {
    let text = cmd::sh(
        "find /etc /usr /var /opt /lib/systemd /run/systemd -xdev \\( -path /var/lib/dpkg -o -path /var/cache -o -path /var/log -o -path /etc/lvm/archive -o -path /etc/lvm/backup \\) \
         -prune -o -print | sort -u",
    )?;
    Ok(text.lines().map(str::to_owned).collect())
}

fn package() -> Result {
    let before = everything()?;
    cmd::sh("dpkg -i /bed/guestsnap-fd.deb")?;
    is_installed()?;
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let expected = guest(&vg, &dir)?;
    // An administrator's change of the client file: a name for the commands below.
    let changed =
        std::fs::read_to_string(CLIENT_FILE)? + "[guest.web1]\ndisks = [\"vg0/domu-web1\"]\n";
    std::fs::write(CLIENT_FILE, &changed)?;
    commands_of_the_readme()?;
    lvm_that_would_take_guests()?;

    // The README's FileSet, and its restore.
    let text = block("Plugin = \"guestsnap:")?.join("\n");
    let inner = text
        .split_once("Name = \"guests\"")
        .and_then(|(_, rest)| rest.rsplit_once('}'))
        .map(|(inner, _)| inner.to_owned())
        .ok_or("the README's FileSet")?;
    let bacula = Bacula::start(BaculaOptions {
        plugin_so: Some("/usr/lib/bacula/guestsnap-fd.so".into()),
        filesets: vec![("guests".into(), inner)],
        ..BaculaOptions::default()
    })?;
    let save_and_restore = |name: &str| save_and_restore(&bacula, &expected, &dir.join(name));
    save_and_restore("first")?;
    restore_of_the_readme(&bacula, &dir.join("readme"))?;
    upgrade(dir.path())?;
    check!(
        std::fs::read_to_string(CLIENT_FILE)? == changed,
        "the upgrade changed the client file"
    );
    save_and_restore("second")?;
    drop(bacula);

    // Nothing of ours stays.
    cmd::sh("dpkg --purge guestsnap-fd")?;
    let left: Vec<_> = everything()?.difference(&before).cloned().collect();
    check!(left.is_empty(), "left after the purge: {left:?}");
    let tags = cmd::sh("lvs --noheadings -o lv_tags | tr -d ' \\n'")?;
    check!(tags.is_empty(), "tags left: {tags}");
    Ok(())
}

/// Files of the package, and the plugin's libraries.
fn is_installed() -> Result {
    for path in [
        "/usr/lib/bacula/guestsnap-fd.so",
        "/usr/sbin/guestsnap",
        "/etc/bacula/guestsnap.toml",
        "/usr/lib/systemd/system/guestsnap-sweep.service",
    ] {
        check!(Path::new(path).is_file(), "the package has no {path}");
    }
    check!(
        cmd::sh(
            "ldd -r /usr/lib/bacula/guestsnap-fd.so 2>&1 | grep -E 'not found|undefined' || true"
        )?
        .is_empty(),
        "the plugin lacks libraries of this suite"
    );
    Ok(())
}

/// A guest in `vg0`; its tree.
fn guest(vg: &HostVg, dir: &WorkDir) -> Result<Manifest> {
    let disk = classic(&vg.lv("domu-web1", "400m")?, 32 * MIB)?;
    let mounted = disk.mount(1, &dir.join("mnt"))?;
    rich(mounted.path(), 1, Fs::Ext3.can())?;
    std::fs::write(
        mounted.path().join("etc/fstab"),
        "/dev/xvda1 / ext3 defaults 0 1\n",
    )
    .map_err(|e| format!("etc/fstab: {e}"))?;
    let expected = Manifest::of(mounted.path())?;
    mounted.close()?;
    Ok(expected)
}

fn commands_of_the_readme() -> Result {
    for line in block("guestsnap inspect web1")? {
        // Two blanks divide a command from what is said of it.
        let command = line.split("  ").next().unwrap_or(line);
        let said = cmd::sh(command)?;
        println!("{command}\n{said}");
        check!(!said.is_empty(), "{command} says nothing");
    }
    Ok(())
}

/// A host whose LVM would take guests' volume groups for its own.
fn lvm_that_would_take_guests() -> Result {
    let local = "/etc/lvm/lvmlocal.conf";
    let usual = std::fs::read_to_string(local)?;
    std::fs::write(local, "devices { scan_lvs = 1 }\n")?;
    let said = cmd::sh("guestsnap check || true")?;
    std::fs::write(local, usual)?;
    check!(
        said.contains("ERROR lvm settings   scan_lvs is 1"),
        "nothing about scan_lvs:\n{said}"
    );
    Ok(())
}

fn save_and_restore(bacula: &Bacula, expected: &Manifest, to: &Path) -> Result {
    let job = bacula.run_backup("guests", "Full")?.clean()?;
    println!("{}", job.log);
    bacula.restore(job.jobid, &Selection::All, to)?.clean()?;
    let ignore = Ignore {
        root: true,
        ..restored()
    };
    Manifest::of(&guest_in(to, "web1"))?.check_equals(expected, &ignore)
}

fn restore_of_the_readme(bacula: &Bacula, to: &Path) -> Result {
    let words = block("restore client=host1-fd")?
        .join("\n")
        .replace("client=host1-fd", "client=bed-fd restorejob=restore")
        .replace("where=/var/tmp/restore", &format!("where={}", to.display()));
    bacula
        .wait_job(bacula.queued(&format!("{words}\nyes"))?)?
        .clean()?;
    check!(
        guest_in(to, "web1").join("etc/passwd").is_file(),
        "the README's restore brought no passwd"
    );
    Ok(())
}

/// A later version, with a later default of the client file.
fn upgrade(dir: &Path) -> Result {
    let later = cmd::sh(&format!(
        "cd '{}'; dpkg-deb -R /bed/guestsnap-fd.deb later; sed -i 's/^Version: .*/Version: 99/' later/DEBIAN/control; \
         echo '# a new default' >> later/etc/bacula/guestsnap.toml; \
         dpkg-deb -Znone -b later later.deb >/dev/null; dpkg --force-confold -i later.deb; dpkg-query -W -f '${{Version}}' guestsnap-fd; rm -r later later.deb",
        dir.display()
    ))?;
    check!(later.ends_with("99"), "not upgraded: {later}");
    Ok(())
}
