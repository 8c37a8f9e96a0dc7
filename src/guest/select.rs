//! From a directive to guests.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::definition::{self, DefinedDisk, Definition, Resolved};
use super::inventory::{Inventory, LvCandidate, LvKind};
use super::{DiskSource, Guest, UncoveredDisk, libvirt, xl};
use crate::config::client::{Allow, DiskName};
use crate::config::pattern::Pattern;
use crate::config::{ClientFile, Directive, Selector};
use crate::error::escape;
use crate::{Code, Error, Result};

/// The longest name of a file on the usual filesystems, in bytes.
const MAX_NAME: usize = 255;

/// How many names an error lists.
const MAX_HINTS: usize = 8;

/// What a directive selects.
#[derive(Debug, Default)]
pub struct Selection {
    /// Guests in the order of the selectors, each selector's guests by name.
    pub guests: Vec<Guest>,
    /// What was selected and cannot be backed up: each is an error of the job. The name is a
    /// guest's; the same guest may stand in `guests` with its other disks.
    pub refused: Vec<(String, Error)>,
    /// Selectors that found nothing while others found something: each is an error of the job. Whose
    /// files are missing nobody can say, so none may be taken for deleted.
    pub misses: Vec<Error>,
    /// Definitions that cannot be read, by their files' names. `guest=` does not match these, but it may
    /// match the guests' names inside: each is a warning of the job.
    pub unread: Vec<(String, Error)>,
    /// What the job log should say besides.
    pub notes: Vec<String>,
}

impl Selection {
    /// Whether all that was asked for is in `guests`.
    pub fn is_whole(&self) -> bool {
        self.refused.is_empty() && self.misses.is_empty() && self.unread.is_empty()
    }

    /// Whether guests may be missing whose names nobody knows: then nothing that the line has saved
    /// before may be taken for deleted.
    pub fn may_miss_any(&self) -> bool {
        let nameless = |(_, error): &(_, Error)| error.code() == Code::BadGuestDefinition;
        !self.misses.is_empty() || !self.unread.is_empty() || self.refused.iter().any(nameless)
    }
}

/// Finds the guests that `directive` selects. An error means that there is nothing to do at all:
/// the inventory cannot be asked, or nothing matches.
pub fn select(
    directive: &Directive,
    client: &ClientFile,
    inventory: &dyn Inventory,
) -> Result<Selection> {
    // Hosts with image files only need no LVM.
    let volumes = match directive.selectors.as_slice() {
        selectors if selectors.iter().all(|s| matches!(s, Selector::Image(_))) => {
            Volumes::default()
        }
        _ => Volumes::ask(inventory)?,
    };
    let policy = Policy {
        allow: client.allow.as_deref(),
    };
    let mut selection = Selection::default();
    let mut found = Vec::new();
    let mut misses = Vec::new();
    for selector in &directive.selectors {
        let before = (found.len(), selection.refused.len());
        match selector {
            Selector::Lv { vg, pattern } => {
                volumes.by_name(vg, pattern, &mut found, &mut selection)?;
            }
            Selector::Tag(tag) => volumes.by_tag(tag, &mut found, &mut selection),
            Selector::Image(pattern) => images(inventory, pattern, &mut found, &mut selection)?,
            Selector::Xl(pattern) => {
                let mut sources = Definitions::new(&volumes, inventory);
                sources.read(Syntax::Xl, &path_pattern(pattern)?, None, &mut selection)?;
                found.append(&mut sources.found);
            }
            Selector::Libvirt(pattern) => {
                let mut sources = Definitions::new(&volumes, inventory);
                let pattern = path_pattern(pattern)?;
                sources.read(Syntax::Libvirt, &pattern, None, &mut selection)?;
                found.append(&mut sources.found);
            }
            Selector::Guest(pattern) => {
                let mut sources = Definitions::new(&volumes, inventory);
                sources.by_name(pattern, client, &mut selection)?;
                found.append(&mut sources.found);
                if before == (found.len(), selection.refused.len()) {
                    sources.names.sort_unstable();
                    sources.names.dedup();
                    misses.push(if sources.names.is_empty() {
                        format!("{selector} matches nothing: neither [guest.NAME] with disks nor [sources] of the client file define a guest")
                    } else {
                        let names: Vec<&str> = sources.names.iter().map(String::as_str).collect();
                        format!("{selector} matches nothing: there are {}", list(&names))
                    });
                    continue;
                }
            }
        }
        if before == (found.len(), selection.refused.len()) {
            misses.push(miss(selector, &volumes));
        }
    }
    if found.is_empty() && selection.refused.is_empty() {
        // These may hold the reason.
        misses.extend(selection.unread.iter().map(|(_, error)| error.to_string()));
        misses.append(&mut selection.notes);
        return Err(Error::new(Code::NothingMatches, misses.join("; ")));
    }
    let miss = |text| Error::new(Code::NothingMatches, text);
    selection.misses.extend(misses.into_iter().map(miss));

    let found = leave_out(found, directive, &mut selection)?;
    if found.is_empty() && selection.refused.is_empty() {
        return Err(Error::new(
            Code::NothingMatches,
            format!("exclude= leaves nothing: {}", selection.notes.join("; ")),
        ));
    }
    let mut found = volumes_and_policy(found, &volumes, &policy, &mut selection);
    doubts(&mut found, client, &volumes, inventory);
    unique(found, &mut selection);
    Ok(selection)
}

/// The guests of the client file's `[guest.NAME]` that nothing on this host is named after: no definition,
/// volume or allowed image has a name that ends so (`strip=` takes off a beginning). A Plugin line may
/// still know them, by definitions elsewhere.
pub fn unknown_sections<'a>(
    client: &'a ClientFile,
    inventory: &dyn Inventory,
) -> Result<Vec<&'a str>> {
    // One with disks is a definition.
    let sections = client.guest.iter().filter(|(_, s)| s.disks.is_none());
    let mut sections: Vec<&str> = sections.map(|(name, _)| name.as_str()).collect();
    if sections.is_empty() {
        return Ok(sections);
    }
    let volumes = Volumes::ask(inventory)?;
    let mut definitions = Definitions::new(&volumes, inventory);
    let mut selection = Selection::default();
    definitions.by_name("*", client, &mut selection)?;
    let mut names = definitions.names;
    // Of what cannot be read, the file's name.
    names.extend(selection.refused.into_iter().map(|(name, _)| name));
    names.extend(volumes.by_name.into_keys().map(|(_, lv)| lv));
    for pattern in client.allow.iter().flatten() {
        if pattern.text().starts_with('/') {
            let files = inventory.files(pattern)?;
            names.extend(files.iter().filter_map(|path| image_name(path)));
        }
    }
    let names: Vec<String> = names.iter().filter_map(|n| clean_name(n).ok()).collect();
    sections.retain(|section| !names.iter().any(|name| name.ends_with(section)));
    Ok(sections)
}

/// A guest before its name and disks have been judged.
#[derive(Debug, Clone)]
struct Found {
    /// Name as the source has it.
    source_name: String,
    /// Name in the catalog.
    name: String,
    disks: Vec<DiskSource>,
    /// See [`Guest::disk_names`].
    disk_names: Vec<Vec<String>>,
    uncovered: Vec<UncoveredDisk>,
    /// Where it comes from, for messages.
    from: String,
    /// True when root on this host wrote down that these disks are this guest's.
    defined_here: bool,
    /// See [`Guest::doubt`].
    doubt: Option<String>,
}

/// The host's logical volumes, sorted.
#[derive(Default)]
struct Volumes {
    by_name: BTreeMap<(String, String), LvCandidate>,
}

impl Volumes {
    fn ask(inventory: &dyn Inventory) -> Result<Volumes> {
        let by_name = inventory
            .volumes()?
            .into_iter()
            .map(|volume| ((volume.vg.clone(), volume.lv.clone()), volume))
            .collect();
        Ok(Volumes { by_name })
    }

    fn get(&self, vg: &str, lv: &str) -> Option<&LvCandidate> {
        self.by_name.get(&(vg.to_owned(), lv.to_owned()))
    }

    fn by_name(
        &self,
        vg: &str,
        text: &str,
        found: &mut Vec<Found>,
        selection: &mut Selection,
    ) -> Result<()> {
        let pattern = name_pattern(text)?;
        for volume in self.by_name.values() {
            if volume.vg != vg || !pattern.matches(&volume.lv) || volume.is_ours() {
                continue;
            }
            let whole = format!("{vg}/{}", volume.lv);
            match (volume.kind, &volume.origin) {
                (LvKind::Plain, _) | (LvKind::Thin, None) => found.push(one_volume(volume)),
                (LvKind::Thin, Some(_)) if pattern.is_literal() => found.push(one_volume(volume)),
                (LvKind::Thin, Some(origin)) => selection.notes.push(format!(
                    "{whole} is a thin snapshot of {origin} and was left out; a guest made from a \
                     template is selected by its exact name, by tag= or by a guest definition"
                )),
                // Nobody means these by a pattern.
                (LvKind::Snapshot | LvKind::Pool | LvKind::Hidden, _) if !pattern.is_literal() => {}
                (kind, _) => selection
                    .refused
                    .push((volume.lv.clone(), unsupported(&whole, kind))),
            }
        }
        Ok(())
    }

    fn by_tag(&self, tag: &str, found: &mut Vec<Found>, selection: &mut Selection) {
        for volume in self.by_name.values() {
            if volume.is_ours() || !volume.tags.iter().any(|t| t == tag) {
                continue;
            }
            match volume.kind {
                LvKind::Plain | LvKind::Thin => found.push(one_volume(volume)),
                LvKind::Other => selection.refused.push((
                    volume.lv.clone(),
                    unsupported(&format!("{}/{}", volume.vg, volume.lv), volume.kind),
                )),
                // Snapshots inherit no tags, but an admin may tag them with the rest.
                kind => selection.notes.push(format!(
                    "{}/{} has the tag {tag} but is {} and was left out",
                    volume.vg,
                    volume.lv,
                    describe(kind)
                )),
            }
        }
    }

    /// Names that a pattern in `vg` could have meant, the likeliest first.
    fn hints(&self, vg: &str, pattern: &str) -> String {
        let mut names: Vec<&str> = self
            .by_name
            .values()
            .filter(|volume| volume.vg == vg && !volume.is_ours())
            .filter(|volume| matches!(volume.kind, LvKind::Plain | LvKind::Thin))
            .map(|volume| volume.lv.as_str())
            .collect();
        if names.is_empty() {
            let mut vgs: Vec<&str> = self.by_name.keys().map(|(vg, _)| vg.as_str()).collect();
            vgs.dedup();
            return match (vgs.contains(&vg), vgs.is_empty()) {
                (true, _) => format!("{vg} holds no volume that could be a guest's disk"),
                (_, true) => "this host has no logical volumes".to_owned(),
                _ => format!("there is no volume group {vg}; there is {}", list(&vgs)),
            };
        }
        names.sort_by_key(|name| {
            let common = name
                .bytes()
                .zip(pattern.bytes())
                .take_while(|(a, b)| a == b);
            std::cmp::Reverse(common.count())
        });
        format!("{vg} holds {}", list(&names))
    }
}

fn one_volume(volume: &LvCandidate) -> Found {
    Found {
        source_name: volume.lv.clone(),
        name: volume.lv.clone(),
        disks: vec![DiskSource::Lv {
            vg: volume.vg.clone(),
            lv: volume.lv.clone(),
        }],
        disk_names: vec![definition::names_by_order(0)],
        uncovered: Vec::new(),
        from: format!("logical volume {}/{}", volume.vg, volume.lv),
        defined_here: false,
        doubt: None,
    }
}

fn describe(kind: LvKind) -> &'static str {
    match kind {
        LvKind::Plain => "a volume",
        LvKind::Thin => "a thin volume",
        LvKind::Snapshot => "a snapshot",
        LvKind::Pool => "a pool",
        LvKind::Hidden => "a part of another volume",
        LvKind::Other => "being merged or converted, or of a kind that is not known",
    }
}

fn unsupported(what: &str, kind: LvKind) -> Error {
    Error::new(
        Code::UnsupportedDisk,
        format!("{what} is {}", describe(kind)),
    )
}

fn list(names: &[&str]) -> String {
    let mut text = names[..names.len().min(MAX_HINTS)].join(", ");
    if names.len() > MAX_HINTS {
        text.push_str(&format!(" and {} more", names.len() - MAX_HINTS));
    }
    text
}

fn miss(selector: &Selector, volumes: &Volumes) -> String {
    match selector {
        Selector::Lv { vg, pattern } => {
            format!("{selector} matches nothing: {}", volumes.hints(vg, pattern))
        }
        Selector::Tag(_) => {
            let mut tags: Vec<&str> = volumes
                .by_name
                .values()
                .filter(|volume| !volume.is_ours())
                .flat_map(|volume| volume.tags.iter().map(String::as_str))
                .collect();
            tags.sort_unstable();
            tags.dedup();
            if tags.is_empty() {
                format!("{selector} matches nothing: no logical volume has a tag")
            } else {
                format!(
                    "{selector} matches nothing: there are the tags {}",
                    list(&tags)
                )
            }
        }
        _ => format!("{selector} matches nothing"),
    }
}

/// Each matching regular file is a guest with one disk.
fn images(
    inventory: &dyn Inventory,
    text: &str,
    found: &mut Vec<Found>,
    selection: &mut Selection,
) -> Result<()> {
    for path in inventory.files(&path_pattern(text)?)? {
        let shown = escape(path.as_os_str().as_encoded_bytes());
        // `allow` speaks of names, and a link to a folder gives names to what is elsewhere.
        match inventory.canonical(&path) {
            Ok(real) if real == path => {}
            Ok(real) => {
                let real = escape(real.as_os_str().as_encoded_bytes());
                let text = format!("{shown}: a part of its path is a symbolic link, it is {real}");
                let name = image_name(&path).unwrap_or(shown);
                selection
                    .refused
                    .push((name, Error::new(Code::NotAllowed, text)));
                continue;
            }
            Err(error) => {
                let name = image_name(&path).unwrap_or(shown);
                selection.refused.push((name, error));
                continue;
            }
        }
        match image_name(&path) {
            Some(name) => found.push(Found {
                source_name: name.clone(),
                name,
                disks: vec![DiskSource::File(path)],
                disk_names: vec![definition::names_by_order(0)],
                uncovered: Vec::new(),
                from: format!("image {shown}"),
                defined_here: false,
                doubt: None,
            }),
            None => selection.refused.push((
                shown.clone(),
                Error::new(
                    Code::BadGuestDefinition,
                    format!("{shown}: the file's name is not UTF-8 and cannot name a guest"),
                ),
            )),
        }
    }
    Ok(())
}

/// `web1` for `/srv/web1.img`.
fn image_name(path: &Path) -> Option<String> {
    let usual = ["img", "raw", "image", "disk"];
    let name = match path.extension().and_then(|e| e.to_str()) {
        Some(extension) if usual.contains(&extension) => path.file_stem(),
        _ => path.file_name(),
    };
    name?.to_str().map(str::to_owned)
}

fn path_pattern(text: &str) -> Result<Pattern> {
    Pattern::path(text).map_err(|e| Error::new(Code::BadDirective, e))
}

fn name_pattern(text: &str) -> Result<Pattern> {
    Pattern::name(text).map_err(|e| Error::new(Code::BadDirective, e))
}

/// How a definition is written.
#[derive(Debug, Clone, Copy)]
enum Syntax {
    Xl,
    Libvirt,
}

/// Guests that files of this host define.
struct Definitions<'a> {
    volumes: &'a Volumes,
    inventory: &'a dyn Inventory,
    found: Vec<Found>,
    /// Every name that was seen, wanted or not.
    names: Vec<String>,
    /// See [`Selection::unread`].
    unread: Vec<(String, Error)>,
}

impl<'a> Definitions<'a> {
    fn new(volumes: &'a Volumes, inventory: &'a dyn Inventory) -> Self {
        Definitions {
            volumes,
            inventory,
            found: Vec::new(),
            names: Vec::new(),
            unread: Vec::new(),
        }
    }

    /// The guests whose names match: from the client file, which is always right about its own
    /// guests, and from the definitions that it points to.
    fn by_name(
        &mut self,
        text: &str,
        client: &ClientFile,
        selection: &mut Selection,
    ) -> Result<()> {
        let pattern = name_pattern(text)?;
        for (name, settings) in &client.guest {
            let Some(disks) = &settings.disks else {
                continue;
            };
            self.names.push(name.clone());
            if pattern.matches(name) {
                let vg = settings.vg.as_deref().or(client.defaults.vg.as_deref());
                // `disks` is the guest's order: the second one is what it calls sdb, vdb or xvdb.
                let disks = disks.iter().enumerate().map(|(number, disk)| {
                    let disk = match disk.get_ref() {
                        DiskName::Path(path) => Ok(DefinedDisk::Raw(path.clone())),
                        DiskName::Lv { vg: own, lv } => {
                            let vg = own.as_ref().or(vg).cloned().unwrap_or_default();
                            Err(DiskSource::Lv { vg, lv: lv.clone() })
                        }
                    };
                    (definition::names_by_order(number), disk)
                });
                self.add(name, disks, format!("[guest.{name}]"), selection);
            }
        }
        let own = self.names.clone();
        let sources = [
            (Syntax::Xl, &client.sources.xl),
            (Syntax::Libvirt, &client.sources.libvirt),
        ];
        for (syntax, patterns) in sources {
            for files in patterns {
                self.read(syntax, files, Some((&pattern, &own)), selection)?;
            }
        }
        // The one guest that is meant is there: these are others.
        if pattern.is_literal() && !self.found.is_empty() {
            let unread = self.unread.drain(..);
            let notes = unread.map(|(_, error)| error.to_string());
            selection.notes.extend(notes);
        }
        for (name, error) in self.unread.drain(..) {
            let text = error.to_string();
            // Another selector may have met it.
            if !selection.unread.iter().any(|u| u.1.to_string() == text) {
                selection.unread.push((name, error));
            }
        }
        Ok(())
    }

    /// Reads definition files; with `wanted`, takes only guests whose names match and that are not
    /// among the others given.
    fn read(
        &mut self,
        syntax: Syntax,
        files: &Pattern,
        wanted: Option<(&Pattern, &[String])>,
        selection: &mut Selection,
    ) -> Result<()> {
        for path in self.inventory.definition_files(files)? {
            let definition = self
                .inventory
                .definition(&path, definition::MAX_BYTES)
                .and_then(|bytes| {
                    match syntax {
                        Syntax::Xl => xl::parse(&bytes),
                        Syntax::Libvirt => libvirt::parse(&bytes),
                    }
                    .map_err(|problem| definition::bad(&path, problem))
                });
            let shown = escape(path.as_os_str().as_encoded_bytes());
            match definition {
                Ok(Definition { name, disks }) => {
                    self.names.push(name.clone());
                    if wanted
                        .is_none_or(|(pattern, not)| pattern.matches(&name) && !not.contains(&name))
                    {
                        let names = definition::guest_names(&disks);
                        let disks = disks.into_iter().map(|(_, disk)| Ok(disk));
                        self.add(&name, names.into_iter().zip(disks), shown, selection);
                    }
                }
                // The best guess at the guest's name. A file that nobody asked for must not fail every
                // job, but what it is only its text says.
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
        Ok(())
    }

    /// A guest with the disks that a definition names. `Err` of a disk: already resolved.
    fn add(
        &mut self,
        name: &str,
        defined: impl Iterator<Item = (Vec<String>, std::result::Result<DefinedDisk, DiskSource>)>,
        from: String,
        selection: &mut Selection,
    ) {
        let exists = |vg: &str, lv: &str| self.volumes.get(vg, lv).is_some();
        let shown = escape(name.as_bytes());
        let mut disks = Vec::new();
        let mut disk_names = Vec::new();
        let mut uncovered: Vec<UncoveredDisk> = Vec::new();
        let mut missing = false;
        for (names, disk) in defined {
            match disk {
                Err(disk) => {
                    disks.push(disk);
                    disk_names.push(names);
                }
                Ok(DefinedDisk::Uncovered(disk)) => uncovered.push(disk),
                Ok(DefinedDisk::Raw(path)) => {
                    match definition::resolve(&path, &exists, self.inventory) {
                        Ok(Resolved::Disk(disk)) => {
                            disks.push(disk);
                            disk_names.push(names);
                        }
                        Ok(Resolved::Other(device)) => uncovered.push(UncoveredDisk {
                            what: escape(path.as_os_str().as_encoded_bytes()),
                            reason: format!(
                                "{} is no logical volume",
                                escape(device.as_os_str().as_encoded_bytes())
                            ),
                            expected: false,
                        }),
                        Err(error) => {
                            missing = true;
                            selection.refused.push((shown.clone(), error));
                        }
                    }
                }
            }
        }
        if disks.is_empty() {
            let unexpected: Vec<String> = uncovered
                .iter()
                .filter(|disk| !disk.expected)
                .map(|disk| format!("{} ({})", disk.what, disk.reason))
                .collect();
            if !unexpected.is_empty() {
                let detail = format!("{shown} ({from}): {}", unexpected.join(", "));
                selection
                    .refused
                    .push((shown, Error::new(Code::UnsupportedDisk, detail)));
            } else if !missing {
                selection
                    .notes
                    .push(format!("{shown} ({from}) has no disks and was left out"));
            }
            return;
        }
        self.found.push(Found {
            source_name: name.to_owned(),
            name: name.to_owned(),
            disks,
            disk_names,
            uncovered,
            from,
            defined_here: true,
            doubt: None,
        });
    }
}

/// Applies `strip=` and `exclude=`, and makes the names fit for a path.
fn leave_out(
    found: Vec<Found>,
    directive: &Directive,
    selection: &mut Selection,
) -> Result<Vec<Found>> {
    let mut excludes = Vec::new();
    for text in &directive.exclude {
        let pattern = name_pattern(text)?;
        excludes.push((pattern, false));
    }
    let mut kept = Vec::new();
    let mut left_out = Vec::new();
    let mut excluded = |name: &str, stripped: &str| {
        let mut excluded = false;
        for (pattern, hit) in &mut excludes {
            if pattern.matches(name) || pattern.matches(stripped) {
                *hit = true;
                excluded = true;
            }
        }
        excluded
    };
    // Errors of guests that nobody wants are of no interest.
    for errors in [&mut selection.refused, &mut selection.unread] {
        errors.retain_mut(|(name, _)| {
            let prefix = directive.strip.as_deref().unwrap_or_default();
            let stripped = name.strip_prefix(prefix).unwrap_or(name).to_owned();
            let wanted = !excluded(name, &stripped);
            *name = stripped;
            wanted
        });
    }
    for mut guest in found {
        if let Some(prefix) = &directive.strip {
            match guest.source_name.strip_prefix(prefix.as_str()) {
                Some("") => selection.notes.push(format!(
                    "strip={prefix} would leave nothing of the name {}: it was kept",
                    escape(guest.source_name.as_bytes())
                )),
                Some(rest) => guest.name = rest.to_owned(),
                None => {}
            }
        }
        if excluded(&guest.source_name, &guest.name) {
            left_out.push(escape(guest.name.as_bytes()));
            continue;
        }
        match clean_name(&guest.name) {
            Ok(name) => {
                guest.name = name;
                kept.push(guest);
            }
            Err(problem) => selection.refused.push((
                escape(guest.source_name.as_bytes()),
                Error::new(
                    Code::BadGuestDefinition,
                    format!("{}: {problem}", guest.from),
                ),
            )),
        }
    }
    if !left_out.is_empty() {
        left_out.dedup();
        let names: Vec<&str> = left_out.iter().map(String::as_str).collect();
        selection
            .notes
            .push(format!("left out by exclude=: {}", list(&names)));
    }
    for (pattern, hit) in excludes {
        if !hit {
            selection
                .notes
                .push(format!("exclude={} matches no guest", pattern.text()));
        }
    }
    Ok(kept)
}

/// One path component from a guest's name: slashes and control characters become `_`.
fn clean_name(name: &str) -> std::result::Result<String, String> {
    let clean: String = name
        .chars()
        .map(|c| if c == '/' || c.is_control() { '_' } else { c })
        .collect();
    match clean.as_str() {
        "" => Err("the guest's name is empty".to_owned()),
        "." | ".." => Err(format!("\"{clean}\" cannot be a guest's name")),
        // It would be an option to xl and virsh.
        _ if clean.starts_with('-') => Err(format!(
            "the guest's name \"{clean}\" starts with a dash: change strip="
        )),
        _ if clean.len() > MAX_NAME => {
            Err(format!("the guest's name is longer than {MAX_NAME} bytes"))
        }
        _ => Ok(clean),
    }
}

/// What the client's administrator lets a Director select.
struct Policy<'a> {
    allow: Option<&'a [Allow]>,
}

impl Policy<'_> {
    /// Judges one disk. `in_use` is what the host itself does with it.
    fn judge(&self, disk: &DiskSource, in_use: Option<&str>, defined_here: bool) -> Result<()> {
        let name = match disk {
            DiskSource::Lv { vg, lv } => PathBuf::from(format!("{vg}/{lv}")),
            DiskSource::File(path) => path.clone(),
        };
        let matching: Vec<&Allow> = self
            .allow
            .into_iter()
            .flatten()
            .filter(|pattern| pattern.matches(&name))
            .collect();
        if let Some(use_) = in_use {
            return Err(Error::new(Code::DiskInUse, format!("{disk}: {use_}")));
        }
        match (&self.allow, disk) {
            (Some(_), _) if matching.is_empty() => Err(Error::new(
                Code::NotAllowed,
                format!("{disk} matches nothing in `allow`"),
            )),
            (None, DiskSource::File(_)) if !defined_here => Err(Error::new(
                Code::NotAllowed,
                format!("{disk}: files need a pattern in `allow`"),
            )),
            _ => Ok(()),
        }
    }
}

/// Checks every disk: it exists, can be snapshotted, and may be selected. What fails is taken off
/// its guest and counted.
fn volumes_and_policy(
    found: Vec<Found>,
    volumes: &Volumes,
    policy: &Policy<'_>,
    selection: &mut Selection,
) -> Vec<Found> {
    let mut kept = Vec::new();
    for mut guest in found {
        let mut disks = Vec::new();
        let mut disk_names = Vec::new();
        let named = std::mem::take(&mut guest.disk_names);
        for (disk, names) in std::mem::take(&mut guest.disks).into_iter().zip(named) {
            let verdict = match &disk {
                DiskSource::File(_) => policy.judge(&disk, None, guest.defined_here),
                DiskSource::Lv { vg, lv } => match volumes.get(vg, lv) {
                    None => Err(Error::new(
                        Code::OriginGone,
                        format!("{disk} ({})", guest.from),
                    )),
                    Some(volume) if matches!(volume.kind, LvKind::Plain | LvKind::Thin) => {
                        policy.judge(&disk, volume.in_use.as_deref(), guest.defined_here)
                    }
                    Some(volume) => Err(unsupported(&disk.to_string(), volume.kind)),
                },
            };
            match verdict {
                Ok(()) => {
                    disks.push(disk);
                    disk_names.push(names);
                }
                Err(error) => selection.refused.push((guest.name.clone(), error)),
            }
        }
        guest.disks = disks;
        guest.disk_names = disk_names;
        if !guest.disks.is_empty() {
            kept.push(guest);
        }
    }
    kept
}

/// A Plugin line gives names: `strip=domu-x` makes `web1` of the volume `domu-xweb1`. Where a command
/// would be run for the guest of that name, the host itself must say that the disks are that guest's:
/// by a definition, or, if it has none of that name, by the name of the volume or file itself.
fn doubts(found: &mut [Found], client: &ClientFile, volumes: &Volumes, inventory: &dyn Inventory) {
    let mut sources = None;
    for guest in found {
        if !client.quiesce(&guest.name).is_some_and(|q| q.by_name) {
            continue;
        }
        let domain = client.domain(&guest.name);
        let means = |name: &str| name == guest.name || name == domain;
        if guest.defined_here && means(&guest.source_name) {
            continue;
        }
        let (definitions, read, aside) = sources.get_or_insert_with(|| {
            let mut all = Definitions::new(volumes, inventory);
            let mut aside = Selection::default();
            let read = all.by_name("*", client, &mut aside);
            (all, read, aside)
        });
        let owns = |other: &Found| {
            means(&other.source_name) && guest.disks.iter().all(|disk| other.disks.contains(disk))
        };
        if definitions.found.iter().any(owns) {
            continue;
        }
        // By the name of its file, what cannot be read may be the guest's.
        let mut bad = aside.refused.iter().filter(|(name, _)| means(name));
        let bad = bad.next().map(|(_, error)| error);
        let why = match read.as_ref().err().or(bad) {
            Some(error) => error.with_causes(),
            None if definitions.names.iter().any(|name| means(name)) => {
                "the definition of that name has other disks".to_owned()
            }
            None if guest.source_name == guest.name => continue,
            None => format!(
                "that name was made of {}, and no definition says so: name its disks in [guest.{}]",
                escape(guest.source_name.as_bytes()),
                guest.name
            ),
        };
        guest.doubt = Some(format!("{} may not be its disk: {why}", guest.from));
    }
}

/// One guest per name: the same disks twice are one guest, different disks under one name are an
/// error for both.
fn unique(found: Vec<Found>, selection: &mut Selection) {
    let mut by_name: BTreeMap<&str, Vec<&Found>> = BTreeMap::new();
    for guest in &found {
        let same = by_name.entry(&guest.name).or_default();
        if !same.iter().any(|other| other.disks == guest.disks) {
            same.push(guest);
        }
    }
    let mut disks: BTreeMap<&DiskSource, &str> = BTreeMap::new();
    let mut done: Vec<&str> = Vec::new();
    for guest in &found {
        if done.contains(&guest.name.as_str()) {
            continue;
        }
        done.push(&guest.name);
        let same = &by_name[guest.name.as_str()];
        if let [_, _, ..] = same.as_slice() {
            let sources: Vec<&str> = same.iter().map(|g| g.from.as_str()).collect();
            selection.refused.push((
                guest.name.clone(),
                Error::new(
                    Code::DuplicateGuest,
                    format!("{}: {}", guest.name, sources.join(" and ")),
                ),
            ));
            continue;
        }
        for disk in &guest.disks {
            if let Some(other) = disks.insert(disk, &guest.name) {
                selection.notes.push(format!(
                    "{disk} is a disk of {other} and of {}: its files are saved twice",
                    guest.name
                ));
            }
        }
        // The same guest by its volume and by its definition: the definition knows its disks' names,
        // and those of its disks that are not saved.
        let best = found
            .iter()
            .find(|other| other.name == guest.name && other.defined_here)
            .unwrap_or(guest);
        selection.guests.push(Guest {
            name: guest.name.clone(),
            disks: guest.disks.clone(),
            disk_names: best.disk_names.clone(),
            uncovered: best.uncovered.clone(),
            // One selector that is sure of it is enough.
            doubt: found
                .iter()
                .filter(|other| other.name == guest.name)
                .map(|other| other.doubt.clone())
                .min()
                .flatten(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::FixedInventory;

    fn volume(vg: &str, lv: &str) -> LvCandidate {
        LvCandidate {
            vg: vg.into(),
            lv: lv.into(),
            tags: Vec::new(),
            size: 1 << 30,
            kind: LvKind::Plain,
            origin: None,
            in_use: None,
        }
    }

    fn host() -> FixedInventory {
        let with = |mut v: LvCandidate, change: fn(&mut LvCandidate)| {
            change(&mut v);
            v
        };
        FixedInventory {
            volumes: vec![
                volume("vg0", "domu-web2"),
                volume("vg0", "domu-web1"),
                volume("vg0", "domu-test1"),
                with(volume("vg0", "root"), |v| {
                    v.in_use = Some("mounted on /".into())
                }),
                with(volume("vg0", "domu-snap"), |v| {
                    v.kind = LvKind::Snapshot;
                    v.origin = Some("domu-web1".into());
                }),
                with(volume("vg0", "guestsnap-7-0"), |v| {
                    v.kind = LvKind::Snapshot;
                    v.tags = vec!["guestsnap".into(), "guestsnap.job=7".into()];
                }),
                with(volume("vg0", "domu-ours"), |v| {
                    v.kind = LvKind::Thin;
                    v.tags = vec!["guestsnap".into()];
                }),
                with(volume("vg0", "domu-pool"), |v| v.kind = LvKind::Pool),
                with(volume("vg0", "domu-pool_tdata"), |v| {
                    v.kind = LvKind::Hidden
                }),
                with(volume("vg1", "db1"), |v| {
                    v.tags = vec!["backup".into()];
                    v.kind = LvKind::Thin;
                }),
                with(volume("vg1", "db1-old"), |v| {
                    v.kind = LvKind::Thin;
                    v.origin = Some("db1".into());
                }),
                volume("vg1", "web1"),
                volume("vg1", "domu-"),
            ],
            files: ["/srv/img/a.raw", "/srv/img/b.qcow", "/srv/img/a.img"]
                .iter()
                .map(|path| (PathBuf::from(path), Vec::new()))
                .collect(),
            ..FixedInventory::default()
        }
    }

    /// `name=disk,disk` for each guest, then `!name GS-nnn` for each refusal.
    fn picture(selection: &Selection) -> Vec<String> {
        let guests = selection.guests.iter().map(|guest| {
            let disks: Vec<String> = guest.disks.iter().map(ToString::to_string).collect();
            format!("{}={}", guest.name, disks.join(","))
        });
        let refused = selection
            .refused
            .iter()
            .map(|(name, error)| format!("!{name} {}", error.code()));
        guests.chain(refused).collect()
    }

    fn allow(patterns: &[&str]) -> ClientFile {
        ClientFile {
            allow: Some(
                patterns
                    .iter()
                    .map(|text| Allow::try_from((*text).to_owned()).unwrap())
                    .collect(),
            ),
            ..ClientFile::default()
        }
    }

    #[test]
    fn test_selections() {
        let open = ClientFile::default();
        let cases: Vec<(&str, ClientFile, &[&str])> = vec![
            (
                "lv=vg0/domu-*",
                open.clone(),
                &[
                    "domu-test1=vg0/domu-test1",
                    "domu-web1=vg0/domu-web1",
                    "domu-web2=vg0/domu-web2",
                ],
            ),
            (
                "lv=vg0/domu-* strip=domu- exclude=test*",
                open.clone(),
                &["web1=vg0/domu-web1", "web2=vg0/domu-web2"],
            ),
            (
                "lv=vg0/domu-* strip=domu- exclude=domu-test* exclude=web1",
                open.clone(),
                &["web2=vg0/domu-web2"],
            ),
            // Order of the selectors; the same guest twice is one guest.
            (
                "lv=vg0/domu-web2 lv=vg0/domu-web*",
                open.clone(),
                &["domu-web2=vg0/domu-web2", "domu-web1=vg0/domu-web1"],
            ),
            // One name from two volumes.
            (
                "lv=vg0/domu-web* lv=vg1/web1 strip=domu-",
                open.clone(),
                &["web2=vg0/domu-web2", "!web1 GS-205"],
            ),
            ("tag=backup", open.clone(), &["db1=vg1/db1"]),
            ("lv=vg1/db*", open.clone(), &["db1=vg1/db1"]),
            ("lv=vg1/db1-old", open.clone(), &["db1-old=vg1/db1-old"]),
            (
                "lv=vg1/domu- strip=domu-",
                open.clone(),
                &["domu-=vg1/domu-"],
            ),
            (
                "lv=vg0/*web1 lv=vg0/r*",
                open.clone(),
                &["domu-web1=vg0/domu-web1", "!root GS-203"],
            ),
            ("lv=vg0/root", allow(&["vg0/*"]), &["!root GS-203"]),
            ("lv=vg0/root", allow(&["vg0/root"]), &["!root GS-203"]),
            (
                "lv=vg0/domu-web*",
                allow(&["vg0/domu-web1", "/srv/*"]),
                &["domu-web1=vg0/domu-web1", "!domu-web2 GS-104"],
            ),
            ("lv=vg0/domu-web1", allow(&[]), &["!domu-web1 GS-104"]),
            ("lv=vg0/domu-snap", open.clone(), &["!domu-snap GS-204"]),
            ("lv=vg0/domu-pool", open.clone(), &["!domu-pool GS-204"]),
            ("image=/srv/img/b*", open.clone(), &["!b.qcow GS-104"]),
            (
                "image=/srv/img/*",
                allow(&["/srv/img/*"]),
                &["b.qcow=/srv/img/b.qcow", "!a GS-205"],
            ),
        ];
        for (text, client, expected) in cases {
            let directive = Directive::parse(text).unwrap();
            let selection = select(&directive, &client, &host()).unwrap();
            assert_eq!(picture(&selection), expected, "{text}");
        }
    }

    /// The host with definitions of guests.
    fn defined() -> FixedInventory {
        let mut host = host();
        let files: &[(&str, &str)] = &[
            (
                "/etc/xen/web1.cfg",
                "name='web1'\ndisk=['phy:/dev/vg0/domu-web1,xvda,w','/dev/vg1/web1,raw,xvdb,rw','/x.iso,raw,hdc,r,cdrom']",
            ),
            (
                "/etc/xen/db1.cfg",
                "name='db1'\ndisk=['/dev/mapper/vg1-db1,raw,xvda,rw','/srv/db1.q,qcow2,xvdb,rw']",
            ),
            (
                "/etc/xen/gone.cfg",
                "name='gone'\ndisk=['/dev/vg0/gone,raw,xvda,rw','/dev/vg0/domu-web2,raw,xvdb']",
            ),
            ("/etc/xen/old.cfg", "import os"),
            ("/etc/xen/net.cfg", "name='net'"),
            ("/etc/xen/drbd.cfg", "name='drbd'\ndisk=['drbd:x,xvda,w']"),
            (
                "/etc/libvirt/qemu/kvm1.xml",
                "<domain><name>kvm1</name><devices><disk type='file'><driver type='raw'/><source file='/srv/img/a.raw'/></disk></devices></domain>",
            ),
        ];
        for (path, text) in files {
            host.files.insert(path.into(), text.as_bytes().to_vec());
        }
        host
    }

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

    /// The name of a guest stands in its definition: one that cannot be read may be of any guest.
    #[test]
    fn test_an_unread_definition_may_be_of_a_guest_that_is_meant() {
        // The line, what is told, and whether any guest may be missing.
        let cases: &[(&str, &[&str], bool)] = &[
            ("guest=db*", &["old"], true),
            ("guest=db* guest=web*", &["old"], true),
            ("guest=nobody lv=vg1/db1", &["old"], true),
            // It is there, so it is none of these.
            ("guest=db1", &[], false),
            ("guest=db* exclude=old", &[], false),
            // These are errors already.
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
    fn test_nothing_matches_says_what_exists() {
        let cases = [
            (
                "lv=vg0/web*",
                "lv=vg0/web* matches nothing: vg0 holds domu-test1, domu-web1, domu-web2, root",
            ),
            (
                "lv=vg7/web*",
                "there is no volume group vg7; there is vg0, vg1",
            ),
            ("tag=x", "there are the tags backup"),
            ("lv=vg0/guestsnap-7-0", "matches nothing"),
            ("lv=vg0/domu-pool_*", "matches nothing"),
            (
                "lv=vg0/domu-web1 exclude=*",
                "left out by exclude=: domu-web1",
            ),
            ("image=/x/*", "image=/x/* matches nothing"),
        ];
        for (text, expected) in cases {
            let directive = Directive::parse(text).unwrap();
            let error = select(&directive, &ClientFile::default(), &host()).unwrap_err();
            assert_eq!(error.code(), Code::NothingMatches, "{text}");
            assert!(
                error.report().contains(expected),
                "{text}: {}",
                error.report()
            );
        }
    }

    #[test]
    fn test_notes() {
        let cases = [
            ("lv=vg1/db*", "vg1/db1-old is a thin snapshot of db1"),
            ("lv=vg1/db1 exclude=foo", "exclude=foo matches no guest"),
            ("lv=vg1/domu- strip=domu-", "would leave nothing"),
        ];
        for (text, expected) in cases {
            let directive = Directive::parse(text).unwrap();
            let selection = select(&directive, &ClientFile::default(), &host()).unwrap();
            assert!(
                selection.notes.iter().any(|note| note.contains(expected)),
                "{text}: {:?}",
                selection.notes
            );
        }
    }

    #[test]
    fn test_names_of_disks_come_from_the_definition() {
        let by_order = |number| definition::names_by_order(number);
        let names = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        let mut host = defined();
        // The first disk is not covered: the second one is not the guest's first for that.
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
            // By its volume first.
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

    /// `strip=` is the Director's word: it must not choose which guest is frozen.
    #[test]
    fn test_only_the_host_says_whose_disks_they_are() {
        let rest = "quiesce = 'xl-pause'\n";
        let section = format!("[guest.web1]\n{rest}");
        let defaults = format!("[defaults]\n{rest}");
        let disks = |names: &str| format!("{section}disks = {names}\n");
        let mut plain = host();
        plain.volumes.push(volume("vg0", "domu-xweb1"));
        let mut with_definitions = defined();
        with_definitions.volumes.push(volume("vg0", "domu-xweb1"));
        with_definitions.volumes.push(volume("vg0", "old"));
        // The host, the client file, the Plugin line, what is doubted.
        type Case<'a> = (&'a FixedInventory, &'a str, &'a str, Option<&'a str>);
        let cases: &[Case<'_>] = &[
            // Nothing here says whose disk it is but the volume's own name.
            (&plain, &section, "lv=vg1/web1", None),
            (
                &plain,
                &section,
                "lv=vg0/domu-web1 strip=domu-",
                Some("[guest.web1]"),
            ),
            (
                &plain,
                &defaults,
                "lv=vg0/domu-web1 strip=domu-",
                Some("made of domu-web1"),
            ),
            (
                &plain,
                &section,
                "lv=vg0/domu-xweb1 strip=domu-x",
                Some("made of domu-xweb1"),
            ),
            // The client file does.
            (
                &plain,
                &disks("['vg0/domu-web1']"),
                "lv=vg0/domu-web1 strip=domu-",
                None,
            ),
            (
                &plain,
                &disks("['vg0/domu-web1']"),
                "lv=vg0/domu-xweb1 strip=domu-x",
                Some("other disks"),
            ),
            (
                &plain,
                &disks("['vg0/domu-web1']"),
                "lv=vg1/web1",
                Some("other disks"),
            ),
            (&plain, &disks("['vg0/domu-web1']"), "guest=web1", None),
            // A definition does, of the name that xl knows it by.
            (
                &with_definitions,
                &section,
                "lv=vg0/domu-web1 strip=domu-",
                None,
            ),
            (
                &with_definitions,
                &defaults,
                "lv=vg0/domu-web1 strip=domu-",
                None,
            ),
            (
                &with_definitions,
                &section,
                "lv=vg0/domu-xweb1 strip=domu-x",
                Some("other disks"),
            ),
            (&with_definitions, &section, "guest=web1", None),
            (
                &with_definitions,
                "[guest.x]\nquiesce = 'xl-pause'\ndomain = 'web1'\n",
                "xl=/etc/xen/web1.cfg strip=domu-",
                None,
            ),
            // `ne` is no guest's name here.
            (
                &with_definitions,
                &defaults,
                "guest=gone strip=go",
                Some("made of gone"),
            ),
            (
                &with_definitions,
                "[guest.ne]\nquiesce = 'xl-pause'\ndomain = 'gone'\n",
                "guest=gone strip=go",
                None,
            ),
            // The definition of that name may have other disks, but it cannot be read.
            (
                &with_definitions,
                &defaults,
                "lv=vg0/old",
                Some("old.cfg: line 1"),
            ),
            (
                &with_definitions,
                "[guest.domu-web2]\nquiesce = 'xl-pause'\ndomain = 'old'\n",
                "lv=vg0/domu-web2",
                Some("old.cfg: line 1"),
            ),
            (
                &with_definitions,
                "[guest.old]\nquiesce = 'xl-pause'\ndisks = ['vg0/old']\n",
                "lv=vg0/old",
                None,
            ),
            // Another guest's is of no interest.
            (&with_definitions, &defaults, "lv=vg0/domu-web2", None),
            // Where nothing is run, nothing is read.
            (&plain, "", "lv=vg0/domu-xweb1 strip=domu-x", None),
        ];
        for (host, client, text, expected) in cases {
            let directive = Directive::parse(text).unwrap();
            let client = ClientFile::parse(client).unwrap();
            let selection = select(&directive, &client, *host).unwrap();
            let doubt = selection.guests[0].doubt.as_deref();
            match expected {
                None => assert_eq!(doubt, None, "{text}"),
                Some(part) => assert!(doubt.is_some_and(|d| d.contains(part)), "{text}: {doubt:?}"),
            }
        }
    }

    #[test]
    fn test_an_image_behind_a_link_to_a_folder_is_refused() {
        let mut host = host();
        host.files
            .insert("/srv/img/link/web.img".into(), Vec::new());
        host.links
            .insert("/srv/img/link/web.img".into(), "/other/web.img".into());
        let client = allow(&["/srv/img/**"]);
        for text in ["image=/srv/img/link/web.img", "image=/srv/img/**/web.img"] {
            let directive = Directive::parse(text).unwrap();
            let selection = select(&directive, &client, &host).unwrap();
            assert_eq!(picture(&selection), ["!web GS-104"], "{text}");
            let report = selection.refused[0].1.report();
            assert!(report.contains("it is /other/web.img"), "{report}");
        }
    }

    /// Without a word a guest would be missing in a job that is OK.
    #[test]
    fn test_a_volume_of_an_unknown_kind_is_refused_by_patterns_and_tags() {
        let mut merging = volume("vg0", "domu-merging");
        merging.kind = LvKind::Other;
        merging.tags = vec!["backup".into()];
        let mut host = host();
        host.volumes.push(merging);
        for (text, expected) in [
            (
                "lv=vg0/domu-{web1,m*}",
                ["domu-web1=vg0/domu-web1", "!domu-merging GS-204"],
            ),
            ("tag=backup", ["db1=vg1/db1", "!domu-merging GS-204"]),
        ] {
            let directive = Directive::parse(text).unwrap();
            let selection = select(&directive, &ClientFile::default(), &host).unwrap();
            assert_eq!(picture(&selection), expected, "{text}");
        }
    }

    /// As an information the guests of that selector would be gone from the backup, and in accurate
    /// mode from the catalog, with a job that is OK.
    #[test]
    fn test_a_selector_of_several_that_finds_nothing_is_no_note() {
        let cases = [
            ("lv=vg1/db1 lv=vg1/x", "lv=vg1/x matches nothing: vg1 holds"),
            ("tag=backup tag=x", "there are the tags backup"),
            ("lv=vg1/db1 guest=web*", "[guest.NAME]"),
            ("lv=vg1/db1 xl=/etc/xen/*.cfg", "matches nothing"),
            ("lv=vg1/db1 image=/gone/*.img", "matches nothing"),
        ];
        for (text, expected) in cases {
            let directive = Directive::parse(text).unwrap();
            let selection = select(&directive, &ClientFile::default(), &host()).unwrap();
            assert_eq!(picture(&selection), ["db1=vg1/db1"], "{text}");
            let [miss] = selection.misses.as_slice() else {
                panic!("{text}: {:?}", selection.misses);
            };
            assert_eq!(miss.code(), Code::NothingMatches);
            assert!(miss.report().contains(expected), "{text}: {miss}");
            assert!(selection.notes.is_empty(), "{text}: {:?}", selection.notes);
        }
    }

    #[test]
    fn test_sections_that_fit_no_guest_are_named() {
        let text =
            "allow = ['vg*/*', '/srv/img/*']\n[guest.app]\ndisks = ['vg0/gone']\n".to_owned();
        // By definition, volume, stripped volume, image, unread definition.
        let known = ["kvm1", "domu-web2", "web2", "b.qcow", "old"];
        let unknown = ["wbe1", "db", "x-web2"];
        let sections = known.iter().chain(&unknown);
        let text = sections.fold(text, |text, name| text + &format!("[guest.'{name}']\n"));
        let client = ClientFile::parse(&text).unwrap();
        let found = unknown_sections(&client, &defined()).unwrap();
        assert_eq!(found, ["db", "wbe1", "x-web2"]);
        let client = ClientFile::default();
        assert!(unknown_sections(&client, &defined()).unwrap().is_empty());
    }

    #[test]
    fn test_clean_names() {
        let long = "x".repeat(256);
        let cases: &[(&str, Option<&str>)] = &[
            ("web1", Some("web1")),
            ("a/b", Some("a_b")),
            ("a\nb", Some("a_b")),
            ("", None),
            (".", None),
            ("..", None),
            ("-web1", None),
            ("...", Some("...")),
            (&long, None),
        ];
        for (name, expected) in cases {
            assert_eq!(clean_name(name).ok().as_deref(), *expected, "{name}");
        }
    }
}
