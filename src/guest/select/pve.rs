//! Guests of Proxmox VE.

use std::path::{Path, PathBuf};

use super::definitions::{Defined, Definitions, Origin, unread_folder};
use super::selection::Selection;
use crate::config::ClientFile;
use crate::config::pattern::Pattern;
use crate::error::escape;
use crate::guest::definition::{self, DefinedDisk, NamedDisk};
use crate::guest::pve::{self, Config, Drive, Handle, Role, lxc, qemu, storage};
use crate::guest::{Absence, UncoveredDisk};
use crate::{Code, Error, Result};

/// A lock that stays while a virtual machine is suspended to disk: its disks are at rest.
const AT_REST: &str = "suspended";

/// A guest as its file describes it.
struct Member {
    vmid: u32,
    container: bool,
    config: Config,
    path: PathBuf,
    bytes: Vec<u8>,
}

/// All guests of a node.
#[derive(Default)]
struct Node {
    members: Vec<Member>,
    /// Files that cannot be read, by name without extension.
    unread: Vec<(String, Error)>,
    /// Folders that cannot be read, by name.
    folders: Vec<(String, Error)>,
}

impl Member {
    fn handle(&self) -> Handle {
        match self.container {
            true => Handle::Container,
            false => Handle::Machine {
                vmid: self.vmid,
                agent: self.config.agent,
            },
        }
    }

    /// Its name, or its VMID if it has none.
    fn name(&self) -> String {
        let name = self.config.name.clone();
        name.unwrap_or_else(|| self.vmid.to_string())
    }

    /// Its name with the VMID.
    fn name_with_id(&self) -> String {
        match &self.config.name {
            Some(name) => format!("{name}-{}", self.vmid),
            None => self.vmid.to_string(),
        }
    }
}

impl Definitions<'_> {
    /// Selects guests by name. `own`: names that the client file defines, which takes precedence;
    /// `None`: a guest's VMID may match too.
    ///
    /// A lock is an error at once: the job waits, and selects again.
    pub(super) fn pve(
        &mut self,
        own: Option<&[String]>,
        pattern: &Pattern,
        client: &ClientFile,
        selection: &mut Selection,
    ) -> Result<()> {
        let Node {
            members,
            unread,
            folders,
        } = self.node(&client.sources.pve)?;
        let names: Vec<String> = members
            .iter()
            .filter(|member| !member.config.template)
            .map(Member::name)
            .collect();
        for member in members {
            let plain = member.name();
            let several = names.iter().filter(|name| **name == plain).count() > 1;
            let name = match several || self.id {
                true => member.name_with_id(),
                false => plain.clone(),
            };
            let mut wanted = pattern.matches(&plain) || pattern.matches(&name);
            match own {
                Some(own) => wanted &= !own.contains(&name),
                None => wanted |= pattern.matches(member.vmid.to_string()),
            }
            let from = escape(member.path.as_os_str().as_encoded_bytes());
            let shown = escape(name.as_bytes());
            if member.config.template {
                if wanted {
                    let text = format!("{shown} ({from}) is a template and was left out");
                    selection.notes.push(text);
                }
                continue;
            }
            self.ids.push(member.name_with_id());
            self.names.push(name.clone());
            if !wanted {
                continue;
            }
            match member.config.lock.as_deref() {
                Some(lock) if lock != AT_REST => {
                    let text = format!("{shown} ({from}): lock: {}", escape(lock.as_bytes()));
                    let error = Error::new(Code::GuestLocked, text);
                    selection.refused.push((shown, error));
                }
                _ => {
                    let disks = self.disks(&member, client);
                    let origin = Origin::file(&member.path, &member.bytes, Some(member.handle()));
                    self.add(&name, disks.into_iter(), origin, selection);
                }
            }
        }
        for (stem, error) in unread {
            match pattern.matches(&stem) {
                true => selection.refused.push((stem, error)),
                false => self.unread.push((stem, error)),
            }
        }
        match own {
            None => selection.refused.extend(folders),
            Some(_) => self.unread.extend(folders),
        }
        Ok(())
    }

    /// Reads all guests of this node.
    fn node(&self, folder: &Path) -> Result<Node> {
        let mut node = Node::default();
        for (name, container) in [("qemu-server", false), ("lxc", true)] {
            let files = folder.join(name).join("*.conf");
            let pattern = Pattern::path(&files.to_string_lossy())
                .map_err(|why| Error::new(Code::BadClientFile, why))?;
            let files = match self.inventory.definition_files(&pattern) {
                Ok(files) => files,
                Err(error) => {
                    node.folders.push(unread_folder(&files, error));
                    continue;
                }
            };
            for path in files {
                match self.member(path.clone(), container) {
                    Ok(member) => node.members.push(member),
                    Err(error) => {
                        let stem = path.file_stem().unwrap_or_default();
                        node.unread.push((escape(stem.as_encoded_bytes()), error));
                    }
                }
            }
        }
        Ok(node)
    }

    fn member(&self, path: PathBuf, container: bool) -> Result<Member> {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let vmid = pve::vmid(&file);
        let vmid = vmid.ok_or_else(|| definition::bad(&path, "its name is not VMID.conf"))?;
        let bytes = self.inventory.definition(&path, definition::MAX_BYTES)?;
        let config = match container {
            true => lxc::parse(&bytes),
            false => qemu::parse(&bytes),
        };
        Ok(Member {
            vmid,
            container,
            config: config.map_err(|why| definition::bad(&path, why))?,
            path,
            bytes,
        })
    }

    fn disks(&self, member: &Member, client: &ClientFile) -> Vec<Defined> {
        let drives = &member.config.drives;
        let given = match member.container {
            true => vec![None; drives.len()],
            false => qemu::guest_names(drives),
        };
        let disks = drives.iter().map(|drive| self.disk(drive, client));
        let disks: Vec<NamedDisk> = given.into_iter().zip(disks).collect();
        let names = definition::guest_names(&disks);
        let disks = names.into_iter().zip(disks).zip(drives);
        disks
            .map(|((names, (_, disk)), drive)| (names, Ok(disk), drive.place.clone()))
            .collect()
    }

    /// Looks a drive's disk up in its storage.
    fn disk(&self, drive: &Drive, client: &ClientFile) -> DefinedDisk {
        let (reason, absence) = match drive.role {
            Role::Cdrom => ("an optical drive or cloud-init".to_owned(), Absence::NoDisk),
            Role::Bind => (
                "a folder of the host: save it with the host's files".to_owned(),
                Absence::NoDisk,
            ),
            Role::NotWanted => (
                "its configuration says backup=0".to_owned(),
                Absence::NotWanted,
            ),
            Role::Disk => {
                let storages = || self.storages(&client.sources.pve);
                let storages = self.storages.get_or_init(storages);
                let path = match storages {
                    // A path needs no storage.
                    Err(_) if drive.volume.starts_with('/') => {
                        storage::path(&[], drive, &|vg| client.is_mine(vg))
                    }
                    Err(why) => Err(why.clone()),
                    Ok(storages) => storage::path(storages, drive, &|vg| client.is_mine(vg)),
                };
                match path {
                    Ok(path) => return DefinedDisk::Raw(path),
                    Err(reason) => (reason, Absence::Lost),
                }
            }
        };
        DefinedDisk::Uncovered(UncoveredDisk {
            what: escape(format!("{} ({})", drive.key, drive.volume).as_bytes()),
            reason: escape(reason.as_bytes()),
            absence,
        })
    }

    fn storages(&self, folder: &Path) -> std::result::Result<Vec<storage::Storage>, String> {
        let path = folder.join("storage.cfg");
        let bytes = self.inventory.definition(&path, definition::MAX_BYTES);
        let storages = bytes.and_then(|bytes| {
            storage::parse(&bytes).map_err(|problem| definition::bad(&path, problem))
        });
        storages.map_err(|error| error.with_causes())
    }
}

#[cfg(test)]
mod tests {
    use super::super::select;
    use super::super::testing::{host, picture, volume};
    use crate::config::{ClientFile, Directive};
    use crate::guest::pve::{Agent, Handle};
    use crate::guest::{Absence, FixedInventory};

    const STORAGES: &str = "dir: local\n\tpath /srv\nlvmthin: thin\n\tvgname pve\nlvm: san\n\tvgname vg1\n\tshared 1\n\
        rbd: ceph\n\tpool rbd\n";

    fn node() -> FixedInventory {
        let mut host = host();
        for lv in ["vm-100-disk-0", "vm-101-disk-0", "vm-101-disk-1"] {
            host.volumes.push(volume("pve", lv));
        }
        let files = [
            ("storage.cfg", STORAGES),
            (
                "qemu-server/100.conf",
                "name: web\nscsi0: thin:vm-100-disk-0\nscsi1: local:100/a.raw,backup=0\nide2: none,media=cdrom\n\
                 virtio3: local:100/b.raw\n[before]\nscsi0: thin:old\n",
            ),
            (
                "lxc/101.conf",
                "hostname: ct\nmp1: thin:vm-101-disk-1,mp=/srv\nmp0: /tank,mp=/tank\nrootfs: thin:vm-101-disk-0\n",
            ),
            (
                "qemu-server/102.conf",
                "name: golden\ntemplate: 1\nscsi0: thin:base-102-disk-0\n",
            ),
            (
                "qemu-server/103.conf",
                "name: busy\nlock: migrate\nscsi0: thin:vm-100-disk-0\n",
            ),
            (
                "qemu-server/104.conf",
                "name: slept\nlock: suspended\nscsi0: thin:vm-100-disk-0\n",
            ),
            (
                "qemu-server/105.conf",
                "name: part\nscsi0: ceph:vm-105-disk-0\nscsi1: size=1G\nscsi2: /dev/vg0/domu-web1\n",
            ),
            (
                "qemu-server/106.conf",
                "name: ceph\nscsi0: ceph:vm-106-disk-0\n",
            ),
            ("qemu-server/107.conf", "name: far\nscsi0: san:web1\n"),
            (
                "qemu-server/108.conf",
                "name: lost\nscsi0: thin:vm-108-disk-0\n",
            ),
            ("qemu-server/109.conf", "scsi0: thin:vm-100-disk-0\n"),
        ];
        for (path, text) in files {
            let path = format!("/etc/pve/{path}");
            host.files.insert(path.into(), text.as_bytes().to_vec());
        }
        for name in ["a", "b"] {
            let path = format!("/srv/images/100/{name}.raw");
            host.files.insert(path.into(), Vec::new());
        }
        host
    }

    fn chosen(line: &str, client: &str, host: &FixedInventory) -> Vec<String> {
        let client = ClientFile::parse(client).unwrap();
        picture(&select(&Directive::parse(line).unwrap(), &client, host).unwrap())
    }

    #[test]
    fn test_guests_by_vmid_and_name() {
        let web = "web=pve/vm-100-disk-0,/srv/images/100/b.raw";
        let ct = "ct=pve/vm-101-disk-1,pve/vm-101-disk-0";
        let mine = "[vg.vg1]\nshared = 'mine'\n";
        let own = "[guest.web]\ndisks = ['vg0/domu-web1']\n";
        let cases: &[(&str, &str, &[&str])] = &[
            ("pve=100", "", &[web]),
            ("pve=w*", "", &[web]),
            ("guest=web", "", &[web]),
            ("guest=web", own, &["web=vg0/domu-web1"]),
            ("pve=web", own, &[web]),
            ("pve=ct", "", &[ct]),
            (
                "pve=101 id=yes",
                "",
                &["ct-101=pve/vm-101-disk-1,pve/vm-101-disk-0"],
            ),
            ("pve=109", "", &["109=pve/vm-100-disk-0"]),
            ("pve=109 id=yes", "", &["109=pve/vm-100-disk-0"]),
            ("pve=busy", "", &["!busy GS-216"]),
            ("pve=slept", "", &["slept=pve/vm-100-disk-0"]),
            ("pve=part", "", &["part=vg0/domu-web1"]),
            ("pve=ceph", "", &["!ceph GS-204"]),
            ("pve=far", "", &["!far GS-204"]),
            ("pve=far", mine, &["far=vg1/web1"]),
            ("pve=lost", "", &["!lost GS-310"]),
            ("pve={web,golden}", "", &[web]),
            (
                "pve=100",
                "allow = ['vg0/*']",
                &["!web GS-104", "!web GS-104"],
            ),
        ];
        for (line, client, expected) in cases {
            assert_eq!(chosen(line, client, &node()), *expected, "{line} {client}");
        }
        let error = |line: &str| {
            let directive = Directive::parse(line).unwrap();
            select(&directive, &ClientFile::default(), &node())
                .unwrap_err()
                .report()
        };
        assert!(
            error("pve=golden").contains("golden (/etc/pve/qemu-server/102.conf) is a template")
        );
        assert!(
            error("pve=nobody").contains("there are 109, busy, ceph, ct"),
            "{}",
            error("pve=nobody")
        );
        let elsewhere = ClientFile::parse("[sources]\npve = '/opt/pve'\n").unwrap();
        let directive = Directive::parse("pve=*").unwrap();
        let error = select(&directive, &elsewhere, &node())
            .unwrap_err()
            .report();
        assert!(error.contains("/opt/pve defines no guest"), "{error}");
    }

    #[test]
    fn test_disks_of_a_guest() {
        let get = |line: &str| {
            let directive = Directive::parse(line).unwrap();
            select(&directive, &ClientFile::default(), &node())
                .unwrap()
                .guests
                .remove(0)
        };
        let web = get("pve=web");
        assert_eq!(web.disk_names, [vec!["sda", "hda", "xvda"], vec!["vda"]]);
        assert_eq!(web.places, [None, None]);
        let uncovered: Vec<_> = web
            .uncovered
            .iter()
            .map(|d| (&*d.what, d.absence))
            .collect();
        assert_eq!(
            uncovered,
            [
                ("scsi1 (local:100/a.raw)", Absence::NotWanted),
                ("ide2 (none)", Absence::NoDisk),
            ]
        );
        let file = web.file.unwrap();
        assert!(file.name == "100.conf" && file.bytes.starts_with(b"name: web"));
        let (vmid, agent) = (100, Agent::Off);
        assert_eq!(web.pve, Some(Handle::Machine { vmid, agent }));
        let ct = get("pve=ct");
        assert_eq!(ct.pve, Some(Handle::Container));
        let places: Vec<_> = ct
            .places
            .iter()
            .map(|place| place.as_deref().unwrap())
            .collect();
        assert_eq!(places, ["srv", ""]);
        assert_eq!(ct.uncovered[0].absence, Absence::NoDisk);
        let part = get("pve=part");
        let reasons: Vec<_> = part
            .uncovered
            .iter()
            .map(|d| (&*d.reason, d.absence))
            .collect();
        assert_eq!(
            reasons,
            [
                (
                    "the storage ceph is of type rbd: back up the guest from inside",
                    Absence::Lost
                ),
                ("its line names no volume", Absence::Lost),
            ]
        );
    }

    #[test]
    fn test_two_guests_of_one_name_get_their_vmids() {
        let mut node = node();
        let mut add = |path: &str, text: &str| {
            let path = format!("/etc/pve/{path}");
            node.files.insert(path.into(), text.as_bytes().to_vec());
        };
        add(
            "lxc/200.conf",
            "hostname: web\nrootfs: thin:vm-101-disk-0\n",
        );
        add(
            "qemu-server/201.conf",
            "name: golden\nscsi0: thin:vm-100-disk-0\n",
        );
        let web = "web-100=pve/vm-100-disk-0,/srv/images/100/b.raw";
        let both = [web, "web-200=pve/vm-101-disk-0"];
        assert_eq!(chosen("pve=web", "", &node), both);
        assert_eq!(chosen("guest=web", "", &node), both);
        assert_eq!(chosen("pve=100", "", &node), [web]);
        assert_eq!(chosen("pve=web-200", "", &node), [both[1]]);
        // A template is no guest.
        assert_eq!(
            chosen("pve=golden", "", &node),
            ["golden=pve/vm-100-disk-0"]
        );
    }

    #[test]
    fn test_bad_files_are_errors_of_their_guests_alone() {
        let mut node = node();
        let mut add = |path: &str, text: &str| {
            let path = format!("/etc/pve/{path}");
            node.files.insert(path.into(), text.as_bytes().to_vec());
        };
        add("qemu-server/300.conf", "name: a/b\n");
        add("qemu-server/0301.conf", "name: c\n");
        let web = "web=pve/vm-100-disk-0,/srv/images/100/b.raw";
        let bad = [web, "!300 GS-202"];
        assert_eq!(chosen("pve={100,300}", "", &node), bad);
        let client = ClientFile::default();
        let run = |line: &str, node: &FixedInventory| {
            select(&Directive::parse(line).unwrap(), &client, node).unwrap()
        };
        // Each may be the guest of any name.
        let selection = run("pve=w*", &node);
        let unread: Vec<_> = selection.unread.iter().map(|(name, _)| &**name).collect();
        assert_eq!(unread, ["0301", "300"]);
        assert_eq!(picture(&selection), [web]);
        assert!(run("pve=web", &node).unread.is_empty());
        // Without storage.cfg, only paths are known.
        node.files
            .insert("/etc/pve/storage.cfg".into(), b"x".to_vec());
        assert_eq!(chosen("pve=web", "", &node), ["!web GS-204"]);
        let part = run("pve=part", &node);
        assert_eq!(picture(&part), ["part=vg0/domu-web1"]);
        assert!(
            part.guests[0].uncovered[0]
                .reason
                .contains("storage.cfg: line 1")
        );
    }
}
