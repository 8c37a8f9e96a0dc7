//! `xl.cfg` files: the syntax of Xen's libxlu, as far as needed for a guest's name and disks.
//!
//! ```text
//! settings = { NAME ( "=" | "+=" ) value ( newline | ";" ) }
//! value    = string | number | "[" [ value { "," value } [ "," ] ] "]"
//! ```
//!
//! The old `xm` read these files as Python. Like `xl`, the parser rejects Python code that is not a
//! setting.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::definition::{DefinedDisk, Definition, MAX_DISKS, NamedDisk, at, device_name};

/// Maximum nesting of lists.
const MAX_DEPTH: usize = 8;

/// Parses a guest's name and disks. The error names line and column.
pub fn parse(text: &[u8]) -> Result<Definition, String> {
    let settings = Reader { text, at: 0 }.settings()?;
    let name = match settings.get(b"name".as_slice()) {
        Some(Value::Text(name, place)) => std::str::from_utf8(name)
            .map_err(|_| at(text, *place, "the guest's name is not UTF-8"))?
            .to_owned(),
        Some(Value::List(_, place)) => return Err(at(text, *place, "name is a list")),
        None => return Err("there is no name =".to_owned()),
    };
    let mut disks = Vec::new();
    match settings.get(b"disk".as_slice()) {
        None => {}
        Some(Value::Text(_, place)) => return Err(at(text, *place, "disk is not a list")),
        Some(Value::List(items, place)) => {
            if items.len() > MAX_DISKS {
                return Err(at(text, *place, format!("more than {MAX_DISKS} disks")));
            }
            for item in items {
                match item {
                    Value::Text(disk, _) => disks.push(named_disk(disk)),
                    Value::List(_, place) => {
                        return Err(at(text, *place, "a disk is a string, not a list"));
                    }
                }
            }
        }
    }
    Ok(Definition { name, disks })
}

/// A value with its position in the text.
#[derive(Debug, Clone)]
enum Value {
    Text(Vec<u8>, usize),
    List(Vec<Value>, usize),
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn fail<T>(&self, problem: impl std::fmt::Display) -> Result<T, String> {
        Err(at(self.text, self.at, problem))
    }

    fn take_while(&mut self, wanted: impl Fn(u8) -> bool) -> &'a [u8] {
        let start = self.at;
        while self.peek().is_some_and(&wanted) {
            self.at += 1;
        }
        &self.text[start..self.at]
    }

    /// Skips blanks and comments; with `lines`, also line ends.
    fn skip(&mut self, lines: bool) {
        loop {
            self.take_while(|b| matches!(b, b' ' | b'\t' | b'\r') || (lines && b == b'\n'));
            if self.peek() != Some(b'#') {
                return;
            }
            self.take_while(|b| b != b'\n');
        }
    }

    fn settings(mut self) -> Result<HashMap<&'a [u8], Value>, String> {
        let mut settings = HashMap::new();
        // Editors on other systems write a byte order mark.
        if self.text.starts_with(b"\xef\xbb\xbf") {
            self.at = 3;
        }
        loop {
            self.skip(true);
            match self.peek() {
                None => return Ok(settings),
                Some(b';') => self.at += 1,
                Some(_) => self.setting(&mut settings)?,
            }
        }
    }

    fn setting(&mut self, settings: &mut HashMap<&'a [u8], Value>) -> Result<(), String> {
        let start = self.at;
        let name = self.take_while(|b| b.is_ascii_alphanumeric() || b == b'_');
        if name.is_empty() || name[0].is_ascii_digit() {
            return self.fail("a setting's name was expected");
        }
        self.skip(false);
        let append = self.peek() == Some(b'+');
        if append {
            self.at += 1;
        }
        if self.peek() != Some(b'=') {
            self.at = start;
            return self.fail(
                "this is not NAME = VALUE (files for the old xm may hold Python, which xl does not read)",
            );
        }
        self.at += 1;
        self.skip(false);
        let value = self.value(0)?;
        self.skip(false);
        match self.peek() {
            None => {}
            Some(b'\n' | b';') => self.at += 1,
            Some(_) => return self.fail("the end of the line was expected"),
        }
        let value = match (append, settings.remove(name), value) {
            (true, Some(Value::Text(mut old, place)), Value::Text(new, _)) => {
                old.extend(new);
                Value::Text(old, place)
            }
            (true, Some(Value::List(mut old, place)), Value::List(new, _)) => {
                old.extend(new);
                Value::List(old, place)
            }
            (true, Some(_), _) => {
                self.at = start;
                return self.fail("+= puts a list and a string together");
            }
            (_, _, value) => value,
        };
        settings.insert(name, value);
        Ok(())
    }

    fn value(&mut self, depth: usize) -> Result<Value, String> {
        let place = self.at;
        match self.peek() {
            Some(quote @ (b'\'' | b'"')) => Ok(Value::Text(self.string(quote)?, place)),
            Some(b'[') if depth == MAX_DEPTH => self.fail("too many lists in each other"),
            Some(b'[') => {
                self.at += 1;
                let mut items = Vec::new();
                loop {
                    self.skip(true);
                    if self.peek() == Some(b']') {
                        break;
                    }
                    items.push(self.value(depth + 1)?);
                    self.skip(true);
                    match self.peek() {
                        Some(b',') => self.at += 1,
                        Some(b']') => break,
                        Some(_) => return self.fail("a comma or ] was expected"),
                        None => return Err(at(self.text, place, "the list has no end")),
                    }
                }
                self.at += 1;
                Ok(Value::List(items, place))
            }
            Some(b'0'..=b'9' | b'-') => {
                let number = self.take_while(|b| b.is_ascii_alphanumeric() || b == b'-');
                let digits = number.strip_prefix(b"-").unwrap_or(number);
                let good = match digits.strip_prefix(b"0x") {
                    Some(hex) => !hex.is_empty() && hex.iter().all(u8::is_ascii_hexdigit),
                    None => !digits.is_empty() && digits.iter().all(u8::is_ascii_digit),
                };
                if !good {
                    return Err(at(self.text, place, "this is no number"));
                }
                Ok(Value::Text(number.to_vec(), place))
            }
            _ => self.fail("a string, a number or a list was expected"),
        }
    }

    fn string(&mut self, quote: u8) -> Result<Vec<u8>, String> {
        let place = self.at;
        self.at += 1;
        let mut out = Vec::new();
        loop {
            match self.peek() {
                None | Some(b'\n') => {
                    return Err(at(self.text, place, "the string has no closing quote"));
                }
                Some(b) if b == quote => {
                    self.at += 1;
                    return Ok(out);
                }
                Some(b'\\') => {
                    self.at += 1;
                    out.push(self.escaped()?);
                }
                Some(b) => {
                    self.at += 1;
                    out.push(b);
                }
            }
        }
    }

    /// Reads the character after a backslash.
    fn escaped(&mut self) -> Result<u8, String> {
        let Some(b) = self.peek() else {
            return self.fail("nothing follows the backslash");
        };
        let number = |digits: &[u8], radix| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, radix).ok()
        };
        let (value, length) = match b {
            b'a' => (Some(7), 1),
            b'b' => (Some(8), 1),
            b'f' => (Some(12), 1),
            b'n' => (Some(b'\n'), 1),
            b'r' => (Some(b'\r'), 1),
            b't' => (Some(b'\t'), 1),
            b'v' => (Some(11), 1),
            b'\\' | b'\'' | b'"' => (Some(b), 1),
            b'x' => (
                self.text
                    .get(self.at + 1..self.at + 3)
                    .filter(|d| d.iter().all(u8::is_ascii_hexdigit))
                    .and_then(|d| number(d, 16)),
                3,
            ),
            b'0'..=b'7' => (
                self.text
                    .get(self.at..self.at + 3)
                    .filter(|d| d.iter().all(|b| matches!(b, b'0'..=b'7')))
                    .and_then(|d| number(d, 8)),
                3,
            ),
            _ => (None, 1),
        };
        match value {
            Some(value) => {
                self.at += length;
                Ok(value)
            }
            None => self.fail("an unknown escape"),
        }
    }
}

/// Parses one string of `disk =`: `target,format,vdev,access` mixed with `key=value`, or the old
/// `prefix:target,vdev,access`.
pub fn parse_disk(spec: &[u8]) -> DefinedDisk {
    named_disk(spec).1
}

fn named_disk(spec: &[u8]) -> NamedDisk {
    let mut vdev = None;
    let disk = disk_and_vdev(spec, &mut vdev);
    let name = vdev.and_then(|name| std::str::from_utf8(name).ok());
    (name.and_then(device_name), disk)
}

fn disk_and_vdev<'a>(spec: &'a [u8], vdev: &mut Option<&'a [u8]>) -> DefinedDisk {
    let mut target: Option<&[u8]> = None;
    let mut format: Option<&[u8]> = None;
    let mut script: Option<&[u8]> = None;
    let mut backend: Option<&[u8]> = None;
    let mut positions = 0;
    let mut removable = None;
    let mut rest = Some(spec);
    while let Some(text) = rest {
        // `target=` takes the rest of the text, including commas.
        if let Some(value) = text.trim_ascii_start().strip_prefix(b"target=") {
            target = Some(value.trim_ascii());
            break;
        }
        let (part, following) = match text.iter().position(|b| *b == b',') {
            Some(comma) => (&text[..comma], Some(&text[comma + 1..])),
            None => (text, None),
        };
        rest = following;
        let part = part.trim_ascii();
        let keyed = part.iter().position(|b| *b == b'=').filter(|end| {
            *end > 0
                && part[..*end]
                    .iter()
                    .all(|b| b.is_ascii_lowercase() || matches!(b, b'-' | b'0'..=b'9'))
        });
        match (keyed.map(|end| (&part[..end], &part[end + 1..])), part) {
            (Some((b"format", value)), _) => format = Some(value),
            (Some((b"script", value)), _) => script = Some(value),
            (Some((b"backend", value)), _) => backend = Some(value),
            (Some((b"devtype", b"cdrom")), _) | (None, b"cdrom") => removable = Some("CD"),
            (Some((b"devtype", b"floppy")), _) => removable = Some("floppy"),
            (Some((b"vdev", value)), _) => {
                *vdev = Some(value);
                if value.ends_with(b":cdrom") {
                    removable = Some("CD");
                }
            }
            // Access, back-end type, discard and future keys are irrelevant.
            (Some(_), _) => {}
            (None, _) if positions == 0 => {
                target = Some(part);
                positions = 1;
            }
            (None, b"raw" | b"qcow" | b"qcow2" | b"vhd" | b"qed") if positions == 1 => {
                format = Some(part);
                positions = 2;
            }
            (None, b"") => positions += 1,
            (None, other) => {
                // The first that is neither target nor format. Access follows it.
                vdev.get_or_insert(other);
                if other.ends_with(b":cdrom") {
                    removable = Some("CD");
                } else if other.ends_with(b":floppy") {
                    removable = Some("floppy");
                }
                positions += 1;
            }
        }
    }
    if let Some(kind) = removable {
        return DefinedDisk::removable(spec, kind);
    }
    placed(spec, target, format, script, backend)
}

/// The disk that the parts of `spec` mean.
fn placed<'a>(
    spec: &'a [u8],
    target: Option<&'a [u8]>,
    mut format: Option<&'a [u8]>,
    script: Option<&[u8]>,
    backend: Option<&[u8]>,
) -> DefinedDisk {
    let Some(mut target) = target.filter(|t| !t.is_empty()) else {
        return DefinedDisk::uncovered(spec, "it has no target");
    };
    let drbd = script == Some(b"block-drbd");
    if let Some(path) = target
        .strip_prefix(b"drbd:")
        .or(drbd.then_some(target))
        .and_then(resource)
    {
        return DefinedDisk::Raw(path);
    }
    let mut below_dev = false;
    // Prefixes of the old syntax: `tap2:tapdisk:aio:/srv/x.img`.
    while !target.starts_with(b"/") {
        let Some(colon) = target.iter().position(|b| *b == b':') else {
            break;
        };
        let prefix = &target[..colon];
        match prefix {
            b"raw" | b"qcow" | b"qcow2" | b"vhd" | b"qed" => format = Some(prefix),
            b"phy" => below_dev = true,
            b"file" | b"tap" | b"tap2" | b"tapdisk" | b"aio" | b"ioemu" => {}
            other => {
                let reason = format!("a disk of type {}", String::from_utf8_lossy(other));
                return DefinedDisk::uncovered(spec, reason);
            }
        }
        target = &target[colon + 1..];
    }
    if let Some(format) = format.filter(|f| !matches!(*f, b"raw" | b"")) {
        let format = String::from_utf8_lossy(format);
        return DefinedDisk::uncovered(spec, format!("an image in the format {format}"));
    }
    if let Some(script) = script.filter(|s| !matches!(*s, b"block" | b"")) {
        let script = String::from_utf8_lossy(script);
        return DefinedDisk::uncovered(spec, format!("made by the script {script}"));
    }
    if let Some(domain) = backend.filter(|b| !matches!(*b, b"0" | b"Domain-0" | b"")) {
        let domain = String::from_utf8_lossy(domain);
        return DefinedDisk::uncovered(spec, format!("served by the domain {domain}"));
    }
    let path = Path::new(OsStr::from_bytes(target));
    match (path.is_absolute(), below_dev) {
        (true, _) => DefinedDisk::Raw(path.to_owned()),
        (false, true) => DefinedDisk::Raw(PathBuf::from("/dev").join(path)),
        (false, false) => DefinedDisk::uncovered(spec, "its path is not absolute"),
    }
}

/// The device of a DRBD resource, by its name.
fn resource(name: &[u8]) -> Option<PathBuf> {
    let good = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    let is_name = name.iter().all(good) && !matches!(name, b"" | b"." | b"..");
    is_name.then(|| Path::new("/dev/drbd/by-res").join(OsStr::from_bytes(name)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Absence;

    fn picture(disk: &DefinedDisk) -> String {
        match disk {
            DefinedDisk::Raw(path) => path.display().to_string(),
            DefinedDisk::Uncovered(d) if d.absence == Absence::NoDisk => format!("({})", d.reason),
            DefinedDisk::Uncovered(d) => format!("! {}", d.reason),
            DefinedDisk::InPool { .. } => panic!("xl has no storage pools"),
        }
    }

    #[test]
    fn test_disks() {
        let cases = [
            ("phy:/dev/vg0/web1,xvda,w", "/dev/vg0/web1"),
            ("phy:vg0/web1,xvda,w", "/dev/vg0/web1"),
            ("/dev/vg0/web1,raw,xvda,rw", "/dev/vg0/web1"),
            ("/dev/vg0/web1,,xvda", "/dev/vg0/web1"),
            ("/dev/vg0/web1,xvda,w!", "/dev/vg0/web1"),
            (" /dev/vg0/web1 , raw , xvda , rw ", "/dev/vg0/web1"),
            (
                "format=raw, vdev=xvda, access=rw, target=/dev/vg0/web1",
                "/dev/vg0/web1",
            ),
            ("vdev=xvda,discard,target=/srv/a,b=c.img", "/srv/a,b=c.img"),
            ("/dev/vg0/web1,vdev=xvda,backendtype=phy", "/dev/vg0/web1"),
            ("file:/srv/web1.img,xvda,w", "/srv/web1.img"),
            ("tap:aio:/srv/web1.img,xvda,w", "/srv/web1.img"),
            ("tap2:tapdisk:aio:/srv/web1.img,xvda,w", "/srv/web1.img"),
            (
                "tap:qcow2:/srv/web1.q,xvda,w",
                "! an image in the format qcow2",
            ),
            ("/srv/web1.q,qcow2,xvda,w", "! an image in the format qcow2"),
            (
                "format=vhd,vdev=xvda,target=/srv/x",
                "! an image in the format vhd",
            ),
            ("drbd:web1,xvda,w", "/dev/drbd/by-res/web1"),
            (
                "vdev=xvda,script=block-drbd,target=web1",
                "/dev/drbd/by-res/web1",
            ),
            ("drbd:../web1,xvda,w", "! a disk of type drbd"),
            ("drbd:..,xvda,w", "! a disk of type drbd"),
            (
                "vdev=xvda,script=block-iscsi,target=web1",
                "! made by the script block-iscsi",
            ),
            (
                "/dev/vg0/a,raw,xvda,rw,backend=storage",
                "! served by the domain storage",
            ),
            ("/dev/vg0/a,raw,xvda,rw,backend=0", "/dev/vg0/a"),
            ("/srv/cd.iso,raw,hdc,r,cdrom", "(a CD drive)"),
            ("file:/srv/cd.iso,hdc:cdrom,r", "(a CD drive)"),
            (",raw,hdc,r,devtype=cdrom", "(a CD drive)"),
            ("devtype=cdrom,vdev=hdc,target=/srv/a.iso", "(a CD drive)"),
            ("web1.img,raw,xvda,w", "! its path is not absolute"),
            ("", "! it has no target"),
            ("target=", "! it has no target"),
            (",,,", "! it has no target"),
        ];
        for (spec, expected) in cases {
            assert_eq!(picture(&parse_disk(spec.as_bytes())), expected, "{spec}");
        }
    }

    #[test]
    fn test_names_of_disks() {
        let cases = [
            ("phy:/dev/vg0/web1,xvdb,w", Some("xvdb")),
            ("/dev/vg0/web1,raw,xvda2,rw", Some("xvda2")),
            ("/dev/vg0/web1,,hda", Some("hda")),
            (
                "format=raw, vdev=xvdc, access=rw, target=/dev/vg0/web1",
                Some("xvdc"),
            ),
            ("file:/srv/cd.iso,hdc:cdrom,r", Some("hdc")),
            ("drbd:web1,xvdd,w", Some("xvdd")),
            ("/dev/vg0/web1", None),
            ("vdev=/,target=/x", None),
        ];
        for (spec, expected) in cases {
            assert_eq!(named_disk(spec.as_bytes()).0.as_deref(), expected, "{spec}");
        }
    }

    #[test]
    fn test_files() {
        let cases: &[(&[u8], &str, &[&str])] = &[
            (
                b"# web\nname = \"web1\"\nmemory = 1024\n\
                  disk = [ 'phy:/dev/vg0/web1,xvda,w',\n  # data \xff\n\t\"/dev/vg0/web1-data,raw,xvdb,rw\",\n]\n\
                  vif = [ 'bridge=xenbr0' ]\non_crash = 'restart'",
                "web1",
                &["/dev/vg0/web1", "/dev/vg0/web1-data"],
            ),
            (b"name='a';disk=[];vcpus=2", "a", &[]),
            (b"\xef\xbb\xbfname='a'\r\ndisk=['/dev/a/b,xvda,w']\r\n", "a", &["/dev/a/b"]),
            (b"name='a'\nname='b'\ndisk=['/dev/a/b,xvda']\ndisk+=['/dev/a/c,xvdb']", "b", &["/dev/a/b", "/dev/a/c"]),
            (b"name='a'\nname+='b'", "ab", &[]),
            (b"name='\\x41\\102\\'\\\\'\nx=[[1,2],[0xff]]\ny=-1", "AB'\\", &[]),
        ];
        for (text, name, disks) in cases {
            let definition = parse(text).unwrap();
            assert_eq!(definition.name, *name);
            let found: Vec<String> = definition.disks.iter().map(|(_, d)| picture(d)).collect();
            assert_eq!(&found, disks);
        }
    }

    #[test]
    fn test_bad_files_name_the_place() {
        let deep = [b"x=".as_slice(), &b"[".repeat(100_000)].concat();
        let many = [b"name='a'\ndisk=[".as_slice(), &b"'/x',".repeat(600), b"]"].concat();
        let cases: &[(&[u8], &str)] = &[
            (b"", "there is no name"),
            (b"memory = 1", "there is no name"),
            (
                b"import os\nname='a'",
                "line 1, column 1: this is not NAME = VALUE",
            ),
            (
                b"name='a'\nif x:\n",
                "line 2, column 1: this is not NAME = VALUE",
            ),
            (
                b"name = hostname()",
                "line 1, column 8: a string, a number or a list",
            ),
            (
                b"name = 'a' + 'b'",
                "line 1, column 12: the end of the line",
            ),
            (
                b"name = 'a",
                "line 1, column 8: the string has no closing quote",
            ),
            (
                b"name = 'a\n'",
                "line 1, column 8: the string has no closing quote",
            ),
            (
                b"name='a'\ndisk = [ 'x'",
                "line 2, column 8: the list has no end",
            ),
            (
                b"name='a'\ndisk = [ 'x' 'y' ]",
                "line 2, column 14: a comma or ]",
            ),
            (
                b"name='a'\ndisk = 'x'",
                "line 2, column 8: disk is not a list",
            ),
            (
                b"name='a'\ndisk = [['x']]",
                "line 2, column 9: a disk is a string",
            ),
            (b"name=['a']", "line 1, column 6: name is a list"),
            (
                b"name='\xff'",
                "line 1, column 6: the guest's name is not UTF-8",
            ),
            (b"name='a\\q'", "line 1, column 9: an unknown escape"),
            (b"name='a\\", "nothing follows"),
            (b"name='a\\x4", "an unknown escape"),
            (b"name='a\\400'", "an unknown escape"),
            (b"name='a'\nname+=['b']", "line 2, column 1: +="),
            (b"x=1.5", "line 1, column 4: the end of the line"),
            (b"x=1g", "line 1, column 3: this is no number"),
            (b"=1", "line 1, column 1: a setting's name"),
            (b"1=1", "a setting's name"),
            (b"\0", "line 1, column 1"),
            (&deep, "too many lists"),
            (&many, "more than 512 disks"),
        ];
        for (text, expected) in cases {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{}: {error}", escape_short(text));
        }
    }

    fn escape_short(text: &[u8]) -> String {
        crate::error::escape(&text[..text.len().min(60)])
    }

    #[test]
    fn test_every_cut_of_a_file_ends() {
        let text =
            b"name=\"w\\x41\"\ndisk=['phy:/dev/a/b,xvda,w', # x\n \"/c,raw,xvdb\"]\nx+=[-1,0x2]";
        for end in 0..text.len() {
            let _ = parse(&text[..end]);
            let mut broken = text.to_vec();
            broken[end] = b'[';
            let _ = parse(&broken);
        }
    }
}
