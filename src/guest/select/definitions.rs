//! Guests defined by files of the host: the client file, and definitions of xl, libvirt and Proxmox VE.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use super::pools::Pools;
use super::selection::{Found, Selection};
use super::volumes::Volumes;
use crate::config::ClientFile;
use crate::config::client::{DiskName, PathPattern};
use crate::config::pattern::Pattern;
use crate::error::escape;
use crate::guest::definition::{self, DefinedDisk, Definition, Resolved};
use crate::guest::pve::Handle;
use crate::guest::pve::storage::Storage;
use crate::guest::{Absence, DefinitionFile, DiskSource, Inventory, UncoveredDisk, libvirt, xl};
use crate::hostdev::drbd;
use crate::hostdev::lvname::LvName;
use crate::{Code, Error, Result};

/// Syntax of a definition.
#[derive(Debug, Clone, Copy)]
pub(super) enum Syntax {
    Xl,
    Libvirt,
}

/// The place of a disk, as far as its definition tells.
enum Place {
    Disk(DiskSource),
    Path(PathBuf),
    Uncovered(UncoveredDisk),
}

/// A disk: see [`Guest::disk_names`] and [`Guest::places`](crate::guest::Guest::places). `Err`: already
/// resolved.
pub(super) type Defined = (
    Vec<String>,
    std::result::Result<DefinedDisk, DiskSource>,
    Option<String>,
);

/// Source of a guest's definition.
pub(super) struct Origin {
    /// For messages.
    pub(super) from: String,
    pub(super) file: Option<DefinitionFile>,
    pub(super) pve: Option<Handle>,
}

impl Origin {
    /// A section of the client file.
    fn section(name: &str) -> Origin {
        Origin {
            from: format!("[guest.{name}]"),
            file: None,
            pve: None,
        }
    }

    /// A file.
    pub(super) fn file(path: &Path, bytes: &[u8], pve: Option<Handle>) -> Origin {
        Origin {
            from: escape(path.as_os_str().as_encoded_bytes()),
            file: Some(DefinitionFile::new(path, bytes)),
            pve,
        }
    }
}

/// The name of a folder whose list of files cannot be read, and the error for its guests. Their names are unknown.
pub(super) fn unread_folder(files: &Path, error: Error) -> (String, Error) {
    let folder = files.parent().unwrap_or(files);
    let name = folder.file_name().unwrap_or_default();
    let error = match error.code() {
        Code::DefinitionsSilent => error,
        _ => {
            let folder = escape(folder.as_os_str().as_encoded_bytes());
            Error::new(Code::BadGuestDefinition, folder).because(error)
        }
    };
    (escape(name.as_encoded_bytes()), error)
}

/// Guests defined by files of this host.
pub(super) struct Definitions<'a> {
    pub(super) volumes: &'a Volumes,
    pub(super) inventory: &'a dyn Inventory,
    pub(super) found: Vec<Found>,
    /// All names seen, selected or not.
    pub(super) names: Vec<String>,
    /// See [`Selection::unread`].
    pub(super) unread: Vec<(String, Error)>,
    /// Where storage pools are defined, and the pools once a disk needs them.
    sources: &'a [PathPattern],
    pools: OnceCell<Pools>,
    /// Whether names of guests of Proxmox VE always end with their VMID.
    pub(super) id: bool,
    /// Names of all guests of Proxmox VE with their VMID.
    pub(super) ids: Vec<String>,
    /// The storages of Proxmox VE once a disk needs them.
    pub(super) storages: OnceCell<std::result::Result<Vec<Storage>, String>>,
}

impl<'a> Definitions<'a> {
    pub(super) fn new(
        volumes: &'a Volumes,
        inventory: &'a dyn Inventory,
        client: &'a ClientFile,
    ) -> Self {
        Definitions {
            volumes,
            inventory,
            sources: &client.sources.pools,
            pools: OnceCell::new(),
            id: false,
            ids: Vec::new(),
            storages: OnceCell::new(),
            found: Vec::new(),
            names: Vec::new(),
            unread: Vec::new(),
        }
    }

    /// Selects all guests.
    pub(super) fn all(&mut self, client: &ClientFile, selection: &mut Selection) -> Result<()> {
        let all = Pattern::name("*").map_err(|e| Error::new(Code::BadDirective, e))?;
        self.by_name(&all, client, selection)
    }

    /// Selects guests by name: from the client file, which takes precedence for its own guests, and
    /// from the definitions it refers to.
    pub(super) fn by_name(
        &mut self,
        pattern: &Pattern,
        client: &ClientFile,
        selection: &mut Selection,
    ) -> Result<()> {
        for (name, settings) in &client.guest {
            let Some(disks) = &settings.disks else {
                continue;
            };
            self.names.push(name.clone());
            if pattern.matches(name) {
                let vg = settings.vg.as_ref().or(client.defaults.vg.as_ref());
                // `disks` is in the guest's order: the second one is sdb, vdb or xvdb there.
                let disks = disks.iter().enumerate().map(|(number, disk)| {
                    let disk = match disk.get_ref() {
                        DiskName::Path(path) => Ok(DefinedDisk::Raw(path.clone())),
                        DiskName::Lv(name) => Err(DiskSource::Lv(name.clone())),
                        DiskName::InVg(lv) => {
                            let name = vg.and_then(|vg| LvName::within(vg.clone(), lv).ok());
                            let unknown = || DefinedDisk::uncovered(lv.as_bytes(), "no volume");
                            name.map(DiskSource::Lv).map_or_else(|| Ok(unknown()), Err)
                        }
                    };
                    let names = definition::names_by_order(number);
                    (names, disk, None)
                });
                self.add(name, disks, Origin::section(name), selection);
            }
        }
        let own = self.names.clone();
        self.pve(Some(&own), pattern, client, selection)?;
        let sources = [
            (Syntax::Xl, &client.sources.xl),
            (Syntax::Libvirt, &client.sources.libvirt),
        ];
        for (syntax, patterns) in sources {
            for files in patterns {
                self.read(syntax, files, Some((pattern, &own)), selection);
            }
        }
        self.settle(pattern, selection);
        Ok(())
    }

    /// Hands over the unreadable files, once all sources that `pattern` means were read.
    pub(super) fn settle(&mut self, pattern: &Pattern, selection: &mut Selection) {
        // The single guest meant was found, so the unread files define others.
        if pattern.is_literal() && !self.found.is_empty() {
            let unread = self.unread.drain(..);
            let notes = unread.map(|(_, error)| error.to_string());
            selection.notes.extend(notes);
        }
        for (name, error) in self.unread.drain(..) {
            let text = error.to_string();
            // Another selector may have reported it.
            if !selection.unread.iter().any(|u| u.1.to_string() == text) {
                selection.unread.push((name, error));
            }
        }
    }

    /// Reads definition files. `wanted` restricts the guests to a pattern, without the names listed.
    pub(super) fn read(
        &mut self,
        syntax: Syntax,
        files: &Pattern,
        wanted: Option<(&Pattern, &[String])>,
        selection: &mut Selection,
    ) {
        let paths = match self.inventory.definition_files(files) {
            Ok(paths) => paths,
            Err(error) => {
                let list = match wanted {
                    None => &mut selection.refused,
                    Some(_) => &mut self.unread,
                };
                list.push(unread_folder(Path::new(files.text()), error));
                return;
            }
        };
        for path in paths {
            let definition = self
                .inventory
                .definition(&path, definition::MAX_BYTES)
                .and_then(|bytes| {
                    let parsed = match syntax {
                        Syntax::Xl => xl::parse(&bytes),
                        Syntax::Libvirt => libvirt::parse(&bytes),
                    };
                    let parsed = parsed.map_err(|problem| definition::bad(&path, problem))?;
                    Ok((parsed, bytes))
                });
            match definition {
                Ok((Definition { name, disks }, bytes)) => {
                    self.names.push(name.clone());
                    if wanted
                        .is_none_or(|(pattern, not)| pattern.matches(&name) && !not.contains(&name))
                    {
                        let names = definition::guest_names(&disks);
                        let disks = names.into_iter().zip(disks);
                        let disks = disks.map(|(names, (_, disk))| (names, Ok(disk), None));
                        self.add(&name, disks, Origin::file(&path, &bytes, None), selection);
                    }
                }
                // The file name is the best guess at the guest's name. An unrequested file must not
                // fail every job, but only its text tells the name.
                Err(error) => {
                    let stem = path.file_stem().unwrap_or_default();
                    let list = match wanted {
                        Some((pattern, _)) if !pattern.matches(stem) => &mut self.unread,
                        _ => &mut selection.refused,
                    };
                    list.push((escape(stem.as_encoded_bytes()), error));
                }
            }
        }
    }

    /// Looks the disk up in its storage pool, if it is in one.
    fn place(&self, disk: std::result::Result<DefinedDisk, DiskSource>) -> Place {
        match disk {
            Err(disk) => Place::Disk(disk),
            Ok(DefinedDisk::Raw(path)) => Place::Path(path),
            Ok(DefinedDisk::Uncovered(disk)) => Place::Uncovered(disk),
            Ok(DefinedDisk::InPool { pool, volume, what }) => {
                let pools = || Pools::read(self.sources, self.inventory);
                match self.pools.get_or_init(pools).path(&pool, &volume) {
                    Ok(path) => Place::Path(path),
                    Err(reason) => Place::Uncovered(UncoveredDisk {
                        what,
                        reason,
                        absence: Absence::Lost,
                    }),
                }
            }
        }
    }

    /// Adds a guest with the disks of its definition.
    pub(super) fn add(
        &mut self,
        name: &str,
        defined: impl Iterator<Item = Defined>,
        origin: Origin,
        selection: &mut Selection,
    ) {
        let Origin { from, file, pve } = origin;
        let exists = |name: &LvName| self.volumes.get(name).is_some();
        let shown = escape(name.as_bytes());
        let mut disks = Vec::new();
        let (mut disk_names, mut places) = (Vec::new(), Vec::new());
        let mut uncovered: Vec<UncoveredDisk> = Vec::new();
        let mut missing = false;
        for (names, disk, place) in defined {
            let push = |disk| {
                disks.push(disk);
                disk_names.push(names);
                places.push(place);
            };
            match self.place(disk) {
                Place::Disk(disk) => push(disk),
                Place::Uncovered(disk) => uncovered.push(disk),
                Place::Path(path) => match definition::resolve(&path, &exists, self.inventory) {
                    Ok(Resolved::Disk(disk)) => push(disk),
                    Ok(Resolved::Other(device)) if drbd::device_name(&device).is_some() => {
                        missing = true;
                        let device = escape(device.as_os_str().as_encoded_bytes());
                        let what = format!(
                            "{shown} ({from}): {device} has no logical volume as its disk here"
                        );
                        let error = Error::new(Code::BelowDrbd, what);
                        selection.refused.push((shown.clone(), error));
                    }
                    Ok(Resolved::Other(device)) => uncovered.push(UncoveredDisk {
                        what: escape(path.as_os_str().as_encoded_bytes()),
                        reason: format!(
                            "{} is no logical volume",
                            escape(device.as_os_str().as_encoded_bytes())
                        ),
                        absence: Absence::Lost,
                    }),
                    Err(error) => {
                        missing = true;
                        selection.refused.push((shown.clone(), error));
                    }
                },
            }
        }
        if disks.is_empty() {
            if !missing || uncovered.iter().any(|disk| disk.absence == Absence::Lost) {
                tell_no_disks(shown, &from, &uncovered, selection);
            }
            return;
        }
        self.found.push(Found {
            source_name: name.to_owned(),
            name: name.to_owned(),
            disks,
            disk_names,
            places,
            uncovered,
            from,
            file,
            pve,
            alone: false,
            defined_here: true,
            doubt: None,
        });
    }
}

/// Reports a guest without a disk to save: an error if one that is not covered holds files.
fn tell_no_disks(
    shown: String,
    from: &str,
    uncovered: &[UncoveredDisk],
    selection: &mut Selection,
) {
    let lost: Vec<String> = uncovered
        .iter()
        .filter(|disk| disk.absence == Absence::Lost)
        .map(|disk| format!("{} ({})", disk.what, disk.reason))
        .collect();
    if lost.is_empty() {
        let note = format!("{shown} ({from}) has no disks to save and was left out");
        selection.notes.push(note);
    } else {
        let detail = format!("{shown} ({from}): {}", lost.join(", "));
        let error = Error::new(Code::UnsupportedDisk, detail);
        selection.refused.push((shown, error));
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{defined, host, picture};
    use super::super::{select, unknown_sections};
    use super::*;
    use crate::config::Directive;
    use crate::guest::{FixedInventory, LvCandidate};

    #[test]
    fn test_definitions() {
        let open = ClientFile::default();
        let own = ClientFile::parse(
            "allow = ['vg*/*']\n[defaults]\nvg = 'vg0'\n[guest.web1]\ndisks = ['domu-web1']\n[guest.app]\n\
             disks = ['domu-web2', '/dev/vg1/web1']\n[guest.tuned]\nsize = '1G'\n",
        )
        .unwrap();
        let cases: Vec<(&str, &ClientFile, &[&str])> = vec![
            ("guest=web1", &open, &["web1=vg0/domu-web1,vg1/web1"]),
            ("guest=web1", &own, &["web1=vg0/domu-web1"]),
            (
                "guest=*",
                &own,
                &[
                    "app=vg0/domu-web2,vg1/web1",
                    "web1=vg0/domu-web1",
                    "db1=vg1/db1",
                    "gone=vg0/domu-web2",
                    "!drbd GS-204",
                    "!old GS-202",
                    "!gone GS-310",
                    "!kvm1 GS-104",
                ],
            ),
            ("guest=kvm*", &open, &["kvm1=/srv/img/a.raw"]),
            (
                "libvirt=/etc/libvirt/qemu/*.xml",
                &open,
                &["kvm1=/srv/img/a.raw"],
            ),
            (
                "xl=/etc/xen/web1.cfg xl=/etc/xen/db*.cfg exclude=db1",
                &open,
                &["web1=vg0/domu-web1,vg1/web1"],
            ),
            ("xl=/etc/xen/old.cfg", &open, &["!old GS-202"]),
            (
                "guest=gone strip=go",
                &open,
                &["ne=vg0/domu-web2", "!ne GS-310"],
            ),
        ];
        for (text, client, expected) in cases {
            let directive = Directive::parse(text).unwrap();
            let selection = select(&directive, client, &defined()).unwrap();
            assert_eq!(picture(&selection), expected, "{text}");
        }
        let directive = Directive::parse("guest=db1").unwrap();
        let selection = select(&directive, &open, &defined()).unwrap();
        assert_eq!(selection.guests[0].uncovered.len(), 1);
        assert!(
            selection
                .notes
                .iter()
                .any(|note| note.contains("/etc/xen/old.cfg: line 1"))
        );
        let directive = Directive::parse("guest=x").unwrap();
        let error = select(&directive, &open, &defined()).unwrap_err().report();
        assert!(
            error.contains("there are db1, drbd, gone, kvm1, net, web1"),
            "{error}"
        );
        let error = select(&directive, &open, &host()).unwrap_err().report();
        assert!(error.contains("[sources]"), "{error}");
    }

    /// A guest's name stands in its definition, so an unreadable one may be of any guest.
    #[test]
    fn test_an_unread_definition_may_be_of_a_guest_that_is_meant() {
        // The line, the reported names, and whether any guest may be missing.
        let cases: &[(&str, &[&str], bool)] = &[
            ("guest=db*", &["old"], true),
            ("guest=db* guest=web*", &["old"], true),
            ("guest=nobody lv=vg1/db1", &["old"], true),
            // The guest was found, so none of the unread files defines it.
            ("guest=db1", &[], false),
            ("guest=db* exclude=old", &[], false),
            // Already errors.
            ("guest=o* lv=vg1/db1", &[], true),
            ("xl=/etc/xen/*.cfg", &[], true),
            ("xl=/etc/xen/db1.cfg lv=vg0/root", &[], false),
        ];
        for (text, expected, any) in cases {
            let directive = Directive::parse(text).unwrap();
            let selection = select(&directive, &ClientFile::default(), &defined()).unwrap();
            let unread: Vec<&str> = selection.unread.iter().map(|(n, _)| n.as_str()).collect();
            assert_eq!(unread, *expected, "{text}");
            assert_eq!(selection.may_miss_any(), *any, "{text}");
            assert!(unread.is_empty() || !selection.is_whole(), "{text}");
        }
        let directive = Directive::parse("guest=x*").unwrap();
        let error = select(&directive, &ClientFile::default(), &defined()).unwrap_err();
        assert!(error.report().contains("old.cfg: line 1"), "{error}");
    }

    #[test]
    fn test_names_of_disks_come_from_the_definition() {
        let by_order = |number| definition::names_by_order(number);
        let names = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        let mut host = defined();
        // The first disk is not covered; that does not make the second one the guest's first.
        let text = "name='two'\ndisk=['/srv/a.q,qcow2,xvda,w','/dev/vg0/domu-test1,raw,xvdb,w']";
        let xml = "<domain><name>kvm2</name><devices>\
             <disk type='block'><source dev='/dev/vg0/domu-web1'/><target dev='vdb'/></disk>\
             <disk type='block'><source dev='/dev/vg1/web1'/><target dev='vda'/></disk></devices></domain>";
        for (path, text) in [
            ("/etc/xen/two.cfg", text),
            ("/etc/libvirt/qemu/kvm2.xml", xml),
        ] {
            host.files.insert(path.into(), text.as_bytes().to_vec());
        }
        let own = "[guest.app]\ndisks = ['vg0/gone', 'vg0/domu-web2', 'vg1/web1']\n";
        let cases = [
            ("guest=two", "", vec![names(&["xvdb"])]),
            ("guest=kvm2", "", vec![names(&["vdb"]), names(&["vda"])]),
            ("lv=vg0/domu-test1", "", vec![by_order(0)]),
            ("guest=app", own, vec![by_order(1), by_order(2)]),
            ("lv=vg0/domu-test1 strip=domu-test1", "", vec![by_order(0)]),
            // Found by its volume first.
            (
                "lv=vg1/db1 guest=db1",
                "",
                vec![names(&["xvda", "hda", "sda"])],
            ),
        ];
        for (text, client, expected) in cases {
            let directive = Directive::parse(text).unwrap();
            let client = ClientFile::parse(client).unwrap();
            let selection = select(&directive, &client, &host).unwrap();
            assert_eq!(selection.guests[0].disk_names, expected, "{text}");
        }
    }

    /// A host where one folder of definitions does not answer.
    struct Silent(FixedInventory, &'static str);

    impl Inventory for Silent {
        fn volumes(&self) -> Result<Vec<LvCandidate>> {
            self.0.volumes()
        }

        fn files(&self, pattern: &Pattern) -> Result<Vec<PathBuf>> {
            self.0.files(pattern)
        }

        fn definition_files(&self, pattern: &Pattern) -> Result<Vec<PathBuf>> {
            match pattern.text().starts_with(self.1) {
                true => Err(Error::new(Code::DefinitionsSilent, self.1)),
                false => self.0.definition_files(pattern),
            }
        }

        fn definition(&self, path: &Path, limit: u64) -> Result<Vec<u8>> {
            self.0.definition(path, limit)
        }

        fn canonical(&self, path: &Path) -> Result<PathBuf> {
            self.0.canonical(path)
        }
    }

    #[test]
    fn test_a_silent_folder_is_an_error_of_its_guests_alone() {
        let open = ClientFile::default();
        let cases = [
            (
                "/etc/xen",
                "xl=/etc/xen/*.cfg lv=vg1/web1",
                vec!["web1=vg1/web1", "!xen GS-217"],
            ),
            (
                "/etc/libvirt/qemu",
                "libvirt=/etc/libvirt/qemu/*.xml xl=/etc/xen/web1.cfg",
                vec!["web1=vg0/domu-web1,vg1/web1", "!qemu GS-217"],
            ),
            // Another source defines the guest.
            (
                "/etc/libvirt",
                "guest=web1",
                vec!["web1=vg0/domu-web1,vg1/web1"],
            ),
            ("/etc/xen", "guest=kvm*", vec!["kvm1=/srv/img/a.raw"]),
        ];
        for (folder, text, expected) in cases {
            let directive = Directive::parse(text).unwrap();
            let host = Silent(defined(), folder);
            let selection = select(&directive, &open, &host).unwrap();
            assert_eq!(picture(&selection), expected, "{text}");
            // A guest that is named and found is no guest of the silent folder.
            let sure = text == "guest=web1";
            assert_eq!(selection.may_miss_any(), !sure, "{text}");
            let told = selection.unread.iter().any(|(name, _)| name == "xen");
            assert_eq!(told, text == "guest=kvm*", "{text}");
        }
        let directive = Directive::parse("guest=web1").unwrap();
        let error = select(&directive, &open, &Silent(defined(), "/etc/xen")).unwrap_err();
        assert!(error.report().contains("GS-217"), "{}", error.report());
        let sections = ClientFile::parse("[guest.web9]\nsize = '1G'\n").unwrap();
        let unknown = unknown_sections(&sections, &Silent(defined(), "/etc/xen"));
        assert_eq!(unknown.unwrap_err().code(), Code::DefinitionsSilent);
    }
}
