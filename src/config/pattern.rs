//! Shell patterns for names and paths.

use std::fmt;
use std::path::Path;

use globset::{GlobBuilder, GlobMatcher};

/// A pattern with `*`, `?`, `[…]` and `{a,b}`; `*` and `?` do not match a slash, `**` does.
#[derive(Debug, Clone)]
pub struct Pattern {
    text: String,
    matcher: GlobMatcher,
}

impl Pattern {
    /// Creates a pattern for names without a slash.
    pub fn name(text: &str) -> std::result::Result<Pattern, String> {
        if text.is_empty() {
            return Err("a pattern must not be empty".to_owned());
        }
        let matcher = GlobBuilder::new(text)
            .literal_separator(true)
            .backslash_escape(true)
            .build()
            .map_err(|error| format!("\"{text}\" is not a pattern: {}", error.kind()))?
            .compile_matcher();
        Ok(Pattern {
            text: text.to_owned(),
            matcher,
        })
    }

    /// Creates a pattern for absolute paths.
    pub fn path(text: &str) -> std::result::Result<Pattern, String> {
        if !text.starts_with('/') {
            return Err(format!("\"{text}\" is not absolute"));
        }
        if text.split('/').any(|part| matches!(part, "." | "..")) {
            return Err(format!("\"{text}\" must not hold . or .."));
        }
        Pattern::name(text)
    }

    /// The pattern as written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether it has no wildcard, so that it matches a single name.
    pub fn is_literal(&self) -> bool {
        !self.text.contains(['*', '?', '[', '{', '\\'])
    }

    /// Whether `name` matches.
    pub fn matches(&self, name: impl AsRef<Path>) -> bool {
        self.matcher.is_match(name)
    }
}

/// Shows the pattern as written.
impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Patterns with the same text are equal.
impl PartialEq for Pattern {
    fn eq(&self, other: &Pattern) -> bool {
        self.text == other.text
    }
}

impl Eq for Pattern {}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn test_patterns() {
        let cases: &[(&str, &[u8], bool)] = &[
            ("domu-*", b"domu-web1", true),
            ("domu-*", b"domu-", true),
            ("domu-*", b"Domu-web1", false),
            ("web?", b"web1", true),
            ("web?", b"web", false),
            ("web[0-9]", b"web5", true),
            ("web[!0-9]", b"web5", false),
            ("{web,db}1", b"db1", true),
            ("*", b"a/b", false),
            ("/etc/xen/*.cfg", b"/etc/xen/web1.cfg", true),
            ("/etc/xen/*.cfg", b"/etc/xen/auto/web1.cfg", false),
            ("/etc/xen/**/*.cfg", b"/etc/xen/auto/web1.cfg", true),
            ("a\\*", b"a*", true),
            ("a\\*", b"ab", false),
            ("web*", b"web\xff", true),
            ("web?", b"web\xff", true),
        ];
        for (text, name, expected) in cases {
            let pattern = Pattern::name(text).unwrap();
            assert_eq!(
                pattern.matches(OsStr::from_bytes(name)),
                *expected,
                "{text} {name:?}"
            );
        }
    }

    #[test]
    fn test_literal() {
        for (text, expected) in [("web1", true), ("web*", false), ("a\\*", false)] {
            assert_eq!(Pattern::name(text).unwrap().is_literal(), expected);
        }
    }
}
