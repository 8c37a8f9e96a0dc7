//! Reads extended attributes (including ACLs and file capabilities) and inode flags.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::content::FileReader;
use super::entry::Entry;
use super::record::Record;
use crate::error::{Code, Error, Result, escape};
use crate::inode::{Kind, proc_path};
use crate::point::{Point, reach};

/// Maximum length of the list of names, as in the kernel.
const MAX_LIST: usize = 64 << 10;

/// Maximum value length, as in the kernel.
const MAX_VALUE: usize = 64 << 10;

/// Maximum bytes of names and values kept per object.
const MAX_TOTAL: usize = 1 << 20;

/// Collects the attributes of an object that Bacula's stat record lacks.
///
/// Problems, such as an unreadable attribute, do not end the collection. The second value lists
/// them, one error each.
pub fn collect(entry: &Entry, reader: Option<&FileReader>) -> Result<(Record, Vec<Error>)> {
    let mut record = Record::from_times(&entry.meta);
    let mut problems = Vec::new();
    if let Some(reader) = reader {
        read_all(reader.as_fd(), true, entry, &mut record, &mut problems);
        return Ok((record, problems));
    }
    // Devices, pipes and sockets must not be opened, and links cannot.
    let openable = matches!(entry.kind, Kind::Regular | Kind::Directory);
    let flags = if openable {
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY
    } else {
        OFlags::PATH
    };
    let opened = entry
        .open(flags)
        .map_err(|e| problem(entry, "opening it for its attributes").because(e))?;
    if let Some(file) = opened {
        read_all(file.as_fd(), openable, entry, &mut record, &mut problems);
    }
    Ok((record, problems))
}

fn problem(entry: &Entry, step: &str) -> Error {
    let text = format!("/{}: {step}", escape(&entry.path));
    Error::new(Code::ReadFailed, text)
}

/// Method to read attributes. fgetxattr rejects an O_PATH descriptor, but getxattr works on its
/// path in /proc, even for a link's own attributes. (lgetxattr would look at the magic link itself
/// and find nothing.)
enum Way<'a> {
    Descriptor(BorrowedFd<'a>),
    Name(String),
}

impl Way<'_> {
    fn list(&self, buffer: &mut [u8]) -> std::result::Result<usize, Errno> {
        match self {
            Way::Descriptor(fd) => rustix::fs::flistxattr(fd, buffer),
            Way::Name(path) => rustix::fs::listxattr(path.as_str(), buffer),
        }
    }

    fn get(&self, name: &[u8], buffer: &mut [u8]) -> std::result::Result<usize, Errno> {
        match self {
            Way::Descriptor(fd) => rustix::fs::fgetxattr(fd, name, buffer),
            Way::Name(path) => rustix::fs::getxattr(path.as_str(), name, buffer),
        }
    }
}

/// Calls with a small buffer first. If that is too small, calls with the largest size the kernel fills.
fn with_room(
    largest: usize,
    mut call: impl FnMut(&mut [u8]) -> std::result::Result<usize, Errno>,
) -> std::result::Result<Vec<u8>, Errno> {
    let mut small = [0; 1024];
    match call(&mut small) {
        Ok(length) => Ok(small[..length].to_vec()),
        Err(Errno::RANGE) => {
            let mut large = vec![0; largest];
            let length = call(&mut large)?;
            large.truncate(length);
            large.shrink_to_fit();
            Ok(large)
        }
        Err(errno) => Err(errno),
    }
}

fn read_all(
    file: BorrowedFd<'_>,
    opened: bool,
    entry: &Entry,
    record: &mut Record,
    problems: &mut Vec<Error>,
) {
    let way = if opened {
        match rustix::fs::ioctl_getflags(file) {
            Ok(flags) => record.flags = Some(flags.bits()),
            // Unsupported by the filesystem.
            Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(errno) => problems.push(problem(entry, "reading inode flags").because(errno)),
        }
        Way::Descriptor(file)
    } else {
        Way::Name(proc_path(file))
    };
    let listed =
        reach(Point::XattrList).and_then(|()| with_room(MAX_LIST, |buffer| way.list(buffer)));
    let list = match listed {
        Ok(list) => list,
        // Unsupported by the filesystem.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => return,
        Err(errno) => {
            problems.push(problem(entry, "listing extended attributes").because(errno));
            return;
        }
    };
    let names: Vec<&[u8]> = list.split(|&b| b == 0).filter(|n| !n.is_empty()).collect();
    let mut total = 0;
    for name in &names {
        if is_raw_acl(name, &names) {
            continue;
        }
        let value = reach(Point::XattrGet)
            .and_then(|()| with_room(MAX_VALUE, |buffer| way.get(name, buffer)));
        let value = match value {
            Ok(value) => value,
            Err(errno) => {
                let step = format!("reading the extended attribute {}", escape(name));
                problems.push(problem(entry, &step).because(errno));
                continue;
            }
        };
        total += name.len() + value.len();
        if total > MAX_TOTAL {
            let step = "more than 1 MiB of extended attributes: the rest is left out";
            problems.push(problem(entry, step));
            break;
        }
        record.xattrs.push((name.to_vec(), value));
    }
}

/// xfs lists an ACL twice: as `system.posix_acl_*`, and in its own raw form, which other
/// filesystems would store as a meaningless attribute.
fn is_raw_acl(name: &[u8], all: &[&[u8]]) -> bool {
    let public: &[u8] = match name {
        b"trusted.SGI_ACL_FILE" => b"system.posix_acl_access",
        b"trusted.SGI_ACL_DEFAULT" => b"system.posix_acl_default",
        _ => return false,
    };
    all.contains(&public)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_raw_acl_only_beside_the_public_one() {
        let both: [&[u8]; 2] = [b"trusted.SGI_ACL_FILE", b"system.posix_acl_access"];
        assert!(is_raw_acl(both[0], &both));
        assert!(!is_raw_acl(both[1], &both));
        assert!(!is_raw_acl(both[0], &both[..1]));
    }

    #[test]
    fn test_large_values_get_a_large_buffer() {
        let value = with_room(4096, |buffer| {
            if buffer.len() < 3000 {
                return Err(Errno::RANGE);
            }
            buffer[..3000].fill(7);
            Ok(3000)
        });
        assert_eq!(value, Ok(vec![7; 3000]));
    }
}
