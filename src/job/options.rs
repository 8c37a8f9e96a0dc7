//! Options of a restore (`restore`, `mod`, `Plugin Options`).
//!
//! The questions go to the catalog with every backup; the Director asks them and sends the answers
//! before the first file, but only if something was answered.

use std::ffi::CStr;

use crate::error::{Code, Error, Result, escape};
use crate::stream::restore::Wanted;

/// The name of the questions in the catalog. Jobs that are restored together must agree about it.
pub const NAME: &CStr = c"guestsnap restore options";

/// The questions, as the Director parses them.
///
/// A Director of 9.6 with SQLite loses objects whose length leaves 1 when divided by 3. The
/// questions have another length. The answers repeat the prompts, and these are as long as it takes
/// for the answers that are given most to arrive: one or two times `no`, or all of them `yes`.
pub const QUESTIONS: &CStr = c"\
OptPrompt=\"Restore access lists (ACL)\"
OptDefault=\"yes\"
acl=@BOOL@

OptPrompt=\"Restore extended attributes\"
OptDefault=\"yes\"
xattr=@BOOL@

OptPrompt=\"Restore the owner and group\"
OptDefault=\"yes\"
owner=@BOOL@

OptPrompt=\"Strip the guest's own folder from paths\"
OptDefault=\"no\"
strip=@BOOL@

OptPrompt=\"Restore into the disks of this guest, which must be off\"
into=@STR@
";

/// How every answer of a Director begins. One that was lost on the way does not.
const HEAD: &[u8] = b"# Plugin configuration file\n";

/// The answers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RestoreOptions {
    /// The attributes to restore.
    pub wanted: Wanted,
    /// Paths begin in the guest, not with `path=` and its name.
    pub strip: bool,
    /// The guest, `VG/LV` or image whose own disks are written to. `None`: files go to a folder.
    pub into: Option<String>,
}

impl RestoreOptions {
    /// Reads an answer. `bytes` may be anything.
    pub fn parse(bytes: &[u8]) -> Result<RestoreOptions> {
        let bad = |what: String| Error::new(Code::BadRestoreOptions, what);
        if !bytes.starts_with(HEAD) {
            return Err(bad(
                "they did not arrive: Directors before 11 with an SQLite catalog lose some. \
                 Answer one question more, if only with its default"
                    .to_owned(),
            ));
        }
        let mut options = RestoreOptions::default();
        for line in bytes.split(|&b| b == b'\n').map(<[u8]>::trim_ascii) {
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            let not_understood = || bad(format!("\"{}\" is not understood", escape(line)));
            let equals = line.iter().position(|&b| b == b'=');
            let (key, value) = line.split_at(equals.ok_or_else(not_understood)?);
            if key == b"into" {
                options.into = text(&value[1..]).ok_or_else(not_understood)?;
                continue;
            }
            let value = match &value[1..] {
                b"yes" | b"1" | b"on" | b"true" => true,
                b"no" | b"0" | b"off" | b"false" => false,
                _ => return Err(not_understood()),
            };
            match key {
                b"acl" => options.wanted.acls = value,
                b"xattr" => options.wanted.xattrs = value,
                b"owner" => options.wanted.owners = value,
                b"strip" => options.strip = value,
                _ => return Err(not_understood()),
            }
        }
        Ok(options)
    }

    /// For the job log.
    pub fn describe(&self) -> String {
        let word = |yes: bool| if yes { "yes" } else { "no" };
        let into = self.into.as_ref();
        let into = into.map_or_else(String::new, |into| {
            format!(" into={}", escape(into.as_bytes()))
        });
        format!(
            "restore options: acl={} xattr={} owner={} strip={}{into}",
            word(self.wanted.acls),
            word(self.wanted.xattrs),
            word(self.wanted.owners),
            word(self.strip)
        )
    }
}

/// A text, which Directors quote or not; an empty one is none. `None`: it has characters that no name
/// of a target has.
fn text(value: &[u8]) -> Option<Option<String>> {
    let quoted = value
        .strip_prefix(b"\"")
        .and_then(|rest| rest.strip_suffix(b"\""));
    let text = std::str::from_utf8(quoted.unwrap_or(value)).ok()?;
    let fits = |c: char| !c.is_control() && c != '"' && c != '\\';
    let text = Some(text.trim()).filter(|text| text.chars().all(fits))?;
    Some((!text.is_empty()).then(|| text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The form in which a Director writes them.
    fn answer(values: &[(&str, &str)]) -> Vec<u8> {
        let mut text = "# Plugin configuration file\n# Version 1\n".to_owned();
        let questions = QUESTIONS.to_str().unwrap();
        for (key, value) in values {
            let block = questions
                .split("\n\n")
                .find(|block| block.contains(&format!("\n{key}=@")))
                .unwrap();
            let prompt = block.split('"').nth(1).unwrap();
            text += &format!("# {prompt}\n{key}={value}\n\n");
        }
        text.into_bytes()
    }

    #[test]
    fn test_answers_are_understood() {
        let parsed = |values: &[_]| RestoreOptions::parse(&answer(values)).unwrap();
        assert_eq!(parsed(&[]), RestoreOptions::default());
        let options = parsed(&[("acl", "no"), ("owner", "no"), ("strip", "yes")]);
        assert!(!options.wanted.acls && options.wanted.xattrs && !options.wanted.owners);
        assert!(options.strip);
        assert_eq!(
            options.describe(),
            "restore options: acl=no xattr=yes owner=no strip=yes"
        );
        for (value, expected) in [
            ("web1", Some("web1")),
            ("\"vg0/new\"", Some("vg0/new")),
            ("\"/srv/a b.img\"", Some("/srv/a b.img")),
            ("", None),
            ("\"\"", None),
        ] {
            let options = parsed(&[("into", value)]);
            assert_eq!(options.into.as_deref(), expected, "{value}");
        }
        let text = parsed(&[("into", "web1")]).describe();
        assert!(text.ends_with("strip=no into=web1"), "{text}");
    }

    #[test]
    fn test_what_did_not_arrive_is_refused() {
        let lost: [&[u8]; 4] = [b"", b"\0\0\0\0", b"acl=no\n", b"# Plugin configuration fil"];
        for bytes in lost {
            let error = RestoreOptions::parse(bytes).unwrap_err();
            assert_eq!(error.code(), Code::BadRestoreOptions);
            assert!(error.report().contains("did not arrive"), "{error}");
        }
        for line in [
            "into",
            "into=a\"b",
            "into=a\\b",
            "acl",
            "acl=",
            "acl=maybe",
            "colour=yes",
            "=",
            "acl=no\u{1}",
        ] {
            let mut bytes = answer(&[]);
            bytes.extend_from_slice(line.as_bytes());
            let error = RestoreOptions::parse(&bytes).unwrap_err();
            assert!(error.report().contains("not understood"), "{line}: {error}");
        }
    }

    /// See [`QUESTIONS`].
    #[test]
    fn test_lengths_survive_an_old_director() {
        let survives = |length: usize| length % 3 != 1;
        assert!(survives(QUESTIONS.count_bytes()) && QUESTIONS.count_bytes() < 1000);
        let keys = ["acl", "xattr", "owner", "strip"];
        for (at, key) in keys.iter().enumerate() {
            for value in ["yes", "no"] {
                assert!(survives(answer(&[(key, value)]).len()), "{key}={value}");
            }
            for second in &keys[at + 1..] {
                let both = answer(&[(key, "no"), (second, "no")]);
                assert!(survives(both.len()), "{key}, {second}");
            }
        }
        assert!(survives(answer(&keys.map(|key| (key, "yes"))).len()));
        // One with a text of any length arrives alone, or with another default beside it.
        for length in 1..20 {
            let into = ("into", &*"x".repeat(length));
            let arrives = |more: &[_]| survives(answer(&[&[into], more].concat()).len());
            assert!(arrives(&[]) || arrives(&[("acl", "yes")]), "{length}");
        }
    }
}
