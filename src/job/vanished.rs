//! Guests that the job before has and that this one does not find.
//!
//! A pattern that finds one guest less looks like any other: the image was moved, or the volume group is
//! away. In accurate mode all files of that guest would count as deleted, in a job that is OK.

use std::collections::BTreeSet;

use super::prepare;
use crate::config::Directive;
use crate::guest::Selection;

/// The catalog trees of the guests that a line selects, those that are refused too.
pub(super) fn trees(selection: &Selection, directive: &Directive) -> Vec<Vec<u8>> {
    let guests = selection.guests.iter().map(|guest| &guest.name);
    let refused = selection.refused.iter().map(|(name, _)| name);
    let names = guests.chain(refused);
    names
        .map(|name| prepare::prefix(directive, name, true))
        .collect()
}

/// A guest of the job before.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Vanished {
    pub(super) name: String,
    /// Its catalog tree, with a trailing slash.
    pub(super) tree: Vec<u8>,
    /// The line that has saved it, as far as its path tells.
    pub(super) line: Option<usize>,
}

/// The guests of the job before, as catalog trees, that are not among those `found` and that no line leaves out by
/// `exclude=`.
pub(super) fn vanished<'a>(
    before: impl Iterator<Item = &'a str>,
    lines: &[Directive],
    found: &BTreeSet<Vec<u8>>,
) -> Vec<Vanished> {
    let mut gone: Vec<Vanished> = Vec::new();
    for tree in before {
        let Some((folder, name)) = tree
            .strip_suffix('/')
            .and_then(|path| path.rsplit_once('/'))
        else {
            continue;
        };
        let known =
            found.contains(tree.as_bytes()) || gone.iter().any(|g| g.tree == tree.as_bytes());
        if known || lines.iter().any(|line| excludes(line, name)) {
            continue;
        }
        gone.push(Vanished {
            name: name.to_owned(),
            tree: tree.as_bytes().to_vec(),
            line: lines.iter().position(|line| line.path == folder),
        });
    }
    gone
}

/// Whether `exclude=` names a guest, with or without the prefix of `strip=`.
fn excludes(line: &Directive, name: &str) -> bool {
    let whole = format!("{}{name}", line.strip.as_deref().unwrap_or_default());
    let mut patterns = line.exclude.iter();
    patterns.any(|pattern| pattern.matches(name) || pattern.matches(&whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_guests_of_the_job_before_that_no_line_finds() {
        let lines = [
            "lv=vg0/domu-* strip=domu- exclude=domu-old",
            "lv=vg1/* path=/@b",
        ];
        let lines = lines.map(|line| Directive::parse(line).unwrap());
        let found = BTreeSet::from([b"/@guestsnap/web/".to_vec()]);
        let before = [
            "/@guestsnap/web/",
            "/@guestsnap/old/",
            "/@guestsnap/mail/",
            "/@guestsnap/mail/",
            "/@b/db/",
            "/@c/x/",
        ];
        let gone = vanished(before.into_iter(), &lines, &found);
        let gone: Vec<_> = gone.iter().map(|g| (g.name.as_str(), g.line)).collect();
        assert_eq!(gone, [("mail", Some(0)), ("db", Some(1)), ("x", None)]);
    }
}
