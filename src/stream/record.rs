//! Our record besides Bacula's own stat record: times in nanoseconds, inode flags, extended attributes.
//!
//! Bacula stores it as opaque bytes in its XATTR stream, one record per call. All numbers are
//! little-endian.
//!
//! ```text
//! magic    8 bytes  "guestsnp"
//! version  u16      1
//! reserved u16      0
//! length   u32      bytes of the fields
//! fields            each: tag u16, reserved u16, length u32, value
//! check    u32      CRC-32 (IEEE) of everything before
//! ```
//!
//! A file with many extended attributes has several records; the reader merges them. Unknown tags
//! and fields of later versions are skipped with a note: the format only ever gains fields.

use crate::crc::crc32;
use crate::inode::{Meta, Time};

const MAGIC: &[u8; 8] = b"guestsnp";
const VERSION: u16 = 1;
const HEADER: usize = 16;
const CHECK: usize = 4;

/// Maximum record length; fits one attribute of the maximum size.
pub const MAX_RECORD: usize = 128 << 10;

/// Maximum records of one object. A backup keeps up to 1 MiB of names and values, at most 25
/// records with 1.4 MiB.
pub const MAX_RECORDS: usize = 64;

/// Maximum bytes of all records of one object.
pub const MAX_BYTES: usize = 2 << 20;

/// Maximum extended attributes of one object: the kernel lists 64 KiB of names, each at least two
/// bytes long.
pub const MAX_XATTRS: usize = 32 << 10;

/// Maximum name length of an extended attribute.
const MAX_NAME: usize = 255;

/// Maximum value length of an extended attribute.
const MAX_VALUE: usize = 64 << 10;

const TAG_ATIME: u16 = 1;
const TAG_MTIME: u16 = 2;
const TAG_CTIME: u16 = 3;
const TAG_BTIME: u16 = 4;
const TAG_FLAGS: u16 = 5;
const TAG_XATTR: u16 = 6;

/// Attributes that Bacula's stat record lacks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    /// Last access.
    pub atime: Option<Time>,
    /// Last modification of the contents.
    pub mtime: Option<Time>,
    /// Last change of the metadata (informational; cannot be restored).
    pub ctime: Option<Time>,
    /// Birth time (informational; cannot be restored).
    pub btime: Option<Time>,
    /// Inode flags, as from `FS_IOC_GETFLAGS`.
    pub flags: Option<u32>,
    /// Extended attributes: name and value.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reason why bytes are not a valid record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// Wrong magic.
    #[error("not a guestsnap record")]
    NotARecord,
    /// Length differs from the header's.
    #[error("the record is cut off or has bytes behind its end")]
    Length,
    /// Wrong checksum.
    #[error("the record's checksum is wrong")]
    Checksum,
    /// Malformed field.
    #[error("a field of the record is malformed")]
    Field,
}

impl Record {
    /// Creates a record of an object's times.
    pub fn from_times(meta: &Meta) -> Record {
        Record {
            atime: Some(meta.atime),
            mtime: Some(meta.mtime),
            ctime: Some(meta.ctime),
            btime: meta.btime,
            ..Record::default()
        }
    }

    /// Encodes one or more records of at most [`MAX_RECORD`] bytes. `self` must not contain
    /// attributes beyond the kernel's own limits.
    pub fn encode(&self) -> Vec<Vec<u8>> {
        let mut done = Vec::new();
        let mut fields = Vec::new();
        let times = [
            (TAG_ATIME, self.atime),
            (TAG_MTIME, self.mtime),
            (TAG_CTIME, self.ctime),
            (TAG_BTIME, self.btime),
        ];
        for (tag, time) in times {
            if let Some(time) = time {
                let mut value = time.seconds.to_le_bytes().to_vec();
                value.extend(time.nanoseconds.to_le_bytes());
                put(&mut fields, tag, &[&value]);
            }
        }
        if let Some(flags) = self.flags {
            put(&mut fields, TAG_FLAGS, &[&flags.to_le_bytes()]);
        }
        for (name, value) in &self.xattrs {
            let Ok(length) = u16::try_from(name.len()) else {
                continue;
            };
            let needed = 8 + 2 + name.len() + value.len();
            if HEADER + fields.len() + needed + CHECK > MAX_RECORD {
                done.push(frame(&fields));
                fields.clear();
            }
            put(
                &mut fields,
                TAG_XATTR,
                &[&length.to_le_bytes(), name, value],
            );
        }
        if !fields.is_empty() {
            done.push(frame(&fields));
        }
        done
    }

    /// Decodes one record. Also returns notes on skipped parts.
    pub fn decode(bytes: &[u8]) -> Result<(Record, Vec<String>), RecordError> {
        let mut notes = Vec::new();
        if !bytes.starts_with(MAGIC) {
            return Err(RecordError::NotARecord);
        }
        if bytes.len() < HEADER + CHECK || bytes.len() > MAX_RECORD {
            return Err(RecordError::Length);
        }
        let version = u16_at(bytes, 8).ok_or(RecordError::Length)?;
        let length = u32_at(bytes, 12).ok_or(RecordError::Length)?;
        let end = bytes.len() - CHECK;
        if u32::try_from(end - HEADER) != Ok(length) {
            return Err(RecordError::Length);
        }
        if u32_at(bytes, end) != Some(crc32(&bytes[..end])) {
            return Err(RecordError::Checksum);
        }
        if version != VERSION {
            notes.push(format!(
                "the record has format version {version}, this guestsnap knows {VERSION}"
            ));
        }
        let mut record = Record::default();
        let mut rest = &bytes[HEADER..end];
        while !rest.is_empty() {
            let tag = u16_at(rest, 0).ok_or(RecordError::Field)?;
            let length = u32_at(rest, 4).ok_or(RecordError::Field)?;
            let length = usize::try_from(length).map_err(|_| RecordError::Field)?;
            let value_end = length.checked_add(8).ok_or(RecordError::Field)?;
            let value = rest.get(8..value_end).ok_or(RecordError::Field)?;
            rest = &rest[value_end..];
            if !record.take(tag, value)? && notes.len() < 4 {
                notes.push(format!(
                    "field {tag} of the record is not known and not used"
                ));
            }
        }
        Ok((record, notes))
    }

    /// Merges another record of the same object.
    pub fn absorb(&mut self, other: Record) {
        self.atime = other.atime.or(self.atime);
        self.mtime = other.mtime.or(self.mtime);
        self.ctime = other.ctime.or(self.ctime);
        self.btime = other.btime.or(self.btime);
        self.flags = other.flags.or(self.flags);
        self.xattrs.extend(other.xattrs);
    }

    /// Parses one field; `false` for an unknown tag.
    fn take(&mut self, tag: u16, value: &[u8]) -> Result<bool, RecordError> {
        match tag {
            TAG_ATIME => self.atime = Some(time(value)?),
            TAG_MTIME => self.mtime = Some(time(value)?),
            TAG_CTIME => self.ctime = Some(time(value)?),
            TAG_BTIME => self.btime = Some(time(value)?),
            TAG_FLAGS => {
                let bytes = value.try_into().map_err(|_| RecordError::Field)?;
                self.flags = Some(u32::from_le_bytes(bytes));
            }
            TAG_XATTR => self.xattrs.push(xattr(value)?),
            _ => return Ok(false),
        }
        Ok(true)
    }
}

fn time(value: &[u8]) -> Result<Time, RecordError> {
    let (seconds, nanoseconds) = value.split_at_checked(8).ok_or(RecordError::Field)?;
    let time = Time {
        seconds: i64::from_le_bytes(seconds.try_into().map_err(|_| RecordError::Field)?),
        nanoseconds: u32::from_le_bytes(nanoseconds.try_into().map_err(|_| RecordError::Field)?),
    };
    if time.nanoseconds < 1_000_000_000 {
        Ok(time)
    } else {
        Err(RecordError::Field)
    }
}

fn xattr(value: &[u8]) -> Result<(Vec<u8>, Vec<u8>), RecordError> {
    let length = usize::from(u16_at(value, 0).ok_or(RecordError::Field)?);
    let name = value.get(2..2 + length).ok_or(RecordError::Field)?;
    let value = &value[2 + length..];
    let bad_name = name.is_empty() || name.len() > MAX_NAME || name.contains(&0);
    if bad_name || value.len() > MAX_VALUE {
        return Err(RecordError::Field);
    }
    Ok((name.to_vec(), value.to_vec()))
}

fn put(fields: &mut Vec<u8>, tag: u16, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|p| p.len()).sum();
    fields.extend(tag.to_le_bytes());
    fields.extend([0, 0]);
    fields.extend(u32_length(length).to_le_bytes());
    for part in parts {
        fields.extend_from_slice(part);
    }
}

fn frame(fields: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + fields.len() + CHECK);
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend([0, 0]);
    bytes.extend(u32_length(fields.len()).to_le_bytes());
    bytes.extend_from_slice(fields);
    let check = crc32(&bytes);
    bytes.extend(check.to_le_bytes());
    bytes
}

/// [`MAX_RECORD`] bounds all lengths; a greater one gives an undecodable record.
fn u32_length(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Record {
        let time = |seconds| {
            Some(Time {
                seconds,
                nanoseconds: 123_456_789,
            })
        };
        Record {
            atime: time(1),
            mtime: time(-5),
            ctime: time(1 << 33),
            btime: None,
            flags: Some(0x10),
            xattrs: vec![
                (b"user.empty".to_vec(), vec![]),
                (b"user.n\xff".to_vec(), b"a\0b".to_vec()),
            ],
        }
    }

    #[test]
    fn test_what_goes_in_comes_out() {
        let record = sample();
        let encoded = record.encode();
        assert_eq!(encoded.len(), 1);
        assert_eq!(Record::decode(&encoded[0]).unwrap(), (record, vec![]));
        assert!(Record::default().encode().is_empty());
    }

    #[test]
    fn test_many_attributes_make_several_records() {
        let mut record = sample();
        for i in 0..6u8 {
            record.xattrs.push((vec![b'u', i + 1], vec![i; MAX_VALUE]));
        }
        let encoded = record.encode();
        assert!(encoded.len() > 3);
        assert!(encoded.iter().all(|r| r.len() <= MAX_RECORD));
        let mut all = Record::default();
        for bytes in &encoded {
            all.absorb(Record::decode(bytes).unwrap().0);
        }
        assert_eq!(all, record);
    }

    #[test]
    fn test_every_damage_is_noticed() {
        let bytes = &sample().encode()[0];
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            assert!(Record::decode(&damaged).is_err(), "byte {at}");
            assert!(Record::decode(&bytes[..at]).is_err(), "cut at {at}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert_eq!(Record::decode(&longer), Err(RecordError::Length));
        assert_eq!(Record::decode(b""), Err(RecordError::NotARecord));
    }

    #[test]
    fn test_unknown_fields_and_versions_are_passed_over() {
        let mut fields = Vec::new();
        put(&mut fields, 999, &[b"from the future"]);
        put(&mut fields, TAG_FLAGS, &[&7u32.to_le_bytes()]);
        let mut bytes = frame(&fields);
        bytes[8] = 2;
        let end = bytes.len() - CHECK;
        let check = crc32(&bytes[..end]).to_le_bytes();
        bytes[end..].copy_from_slice(&check);
        let (record, notes) = Record::decode(&bytes).unwrap();
        assert_eq!(record.flags, Some(7));
        assert_eq!(notes.len(), 2);
    }

    #[test]
    fn test_malformed_fields_are_refused() {
        let refused = |tag, value: &[u8]| {
            let mut fields = Vec::new();
            put(&mut fields, tag, &[value]);
            assert_eq!(Record::decode(&frame(&fields)), Err(RecordError::Field));
        };
        refused(TAG_MTIME, &[0; 11]);
        refused(TAG_MTIME, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0xca, 0x9a, 0x3b]);
        refused(TAG_FLAGS, &[0; 5]);
        refused(TAG_XATTR, &[]);
        refused(TAG_XATTR, &[9, 0, b'x']);
        refused(TAG_XATTR, &[0, 0, b'x']);
        refused(TAG_XATTR, &[2, 0, b'x', 0]);
        refused(
            TAG_XATTR,
            &[&[1, 0, b'x'][..], &[0; MAX_VALUE + 1]].concat(),
        );
        assert_eq!(Record::decode(&frame(&[1, 0, 0])), Err(RecordError::Field));
        let huge = [1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(Record::decode(&frame(&huge)), Err(RecordError::Field));
    }
    #[test]
    fn test_any_bytes_are_survived() {
        // The frame is always valid, so that the field parser is reached.
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        for _ in 0..20_000 {
            let mut fields = Vec::new();
            for _ in 0..random % 60 {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                // Small numbers make valid lengths and tags.
                let byte = random.to_le_bytes()[3];
                fields.push(if random & 0x700 == 0 { byte } else { byte % 8 });
            }
            random = random.wrapping_add(1);
            let _ = Record::decode(&fields);
            if let Ok((record, _)) = Record::decode(&frame(&fields)) {
                for bytes in record.encode() {
                    Record::decode(&bytes).unwrap();
                }
            }
        }
    }
}
