//! One object to restore, and Bacula's rules for existing objects.

use crate::inode::Meta;

/// Treatment of existing objects, from Bacula's replace option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replace {
    /// `a`: replace.
    Always,
    /// `w`: replace if the saved file is newer.
    IfNewer,
    /// `o`: replace if the saved file is older.
    IfOlder,
    /// `n`: keep the existing object.
    Never,
}

impl Replace {
    /// Decodes Bacula's character.
    pub fn from_char(c: u8) -> Option<Replace> {
        match c {
            b'a' => Some(Replace::Always),
            b'w' => Some(Replace::IfNewer),
            b'o' => Some(Replace::IfOlder),
            b'n' => Some(Replace::Never),
            _ => None,
        }
    }
}

/// Kind of object to create.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What<'a> {
    /// An object of the kind in its mode, except links.
    Object,
    /// A symbolic link to this target.
    Symlink(&'a [u8]),
    /// Another name of the file at this path (which includes the restore folder, like the request's
    /// path).
    HardLink(&'a [u8]),
}

/// Attributes to restore; all by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// POSIX ACLs.
    pub acls: bool,
    /// The other extended attributes.
    pub xattrs: bool,
    /// Owner and group, by number. Without them setuid, setgid and file capabilities are dropped:
    /// the program would belong to root, and every user of the host could run it with these rights.
    pub owners: bool,
}

impl Default for Wanted {
    fn default() -> Wanted {
        Wanted {
            acls: true,
            xattrs: true,
            owners: true,
        }
    }
}

/// One object to restore.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Target path from Bacula, including the restore folder.
    pub path: &'a [u8],
    /// Kind of object.
    pub what: What<'a>,
    /// Bacula's stat record: at least mode, owner, size, blocks, rdev and mtime.
    pub meta: Meta,
    /// Treatment of an existing object.
    pub replace: Replace,
}

/// Result of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Created {
    /// A regular file: data may follow.
    Extract,
    /// Created; no data follows.
    Created,
    /// Left unchanged, for this reason.
    Skipped(&'static str),
}

/// Reason to keep the existing object, if any, by Bacula's own rules.
pub(super) fn keep(request: &Request<'_>, existing: &Meta) -> Option<&'static str> {
    let saved = request.meta.mtime.seconds;
    let there = existing.mtime.seconds;
    match request.replace {
        Replace::Always => None,
        Replace::Never => Some("it exists"),
        Replace::IfNewer => (saved <= there).then_some("the saved one is not newer"),
        Replace::IfOlder => (saved >= there).then_some("the saved one is not older"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inode::Time;

    #[test]
    fn test_replace_rules_are_baculas() {
        let at = |seconds| Meta {
            mtime: Time {
                seconds,
                nanoseconds: 0,
            },
            ..Meta::default()
        };
        let kept = |c, saved, there| {
            let request = Request {
                path: b"/x",
                what: What::Object,
                meta: at(saved),
                replace: Replace::from_char(c).unwrap(),
            };
            keep(&request, &at(there)).is_some()
        };
        assert!(!kept(b'a', 1, 2));
        assert!(kept(b'n', 2, 1));
        assert!(kept(b'w', 1, 1) && kept(b'w', 1, 2) && !kept(b'w', 2, 1));
        assert!(kept(b'o', 1, 1) && kept(b'o', 2, 1) && !kept(b'o', 1, 2));
        assert_eq!(Replace::from_char(b'x'), None);
    }
}
