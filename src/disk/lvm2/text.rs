//! The text format of LVM2 metadata: nested sections of `key = value`.

use std::fmt;

/// Maximum nesting of sections; real metadata has four levels.
const MAX_DEPTH: usize = 16;
/// Maximum sections, keys and list items in all texts of one guest. Each takes several hundred
/// bytes of memory for a few bytes of text. A VG with 10,000 LVs has about 200,000.
pub(super) const MAX_NODES: usize = 2_000_000;

/// A value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Integer.
    Int(i64),
    /// Quoted string.
    Str(String),
    /// Bracketed list.
    List(Vec<Value>),
}

/// A key's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// `key = value`
    Value(Value),
    /// `key { … }`
    Section(Section),
}

/// Keys in file order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Section {
    nodes: Vec<(String, Node)>,
}

impl Section {
    fn get(&self, key: &str) -> Option<&Node> {
        self.nodes
            .iter()
            .find(|(k, _)| k == key)
            .map(|(_, node)| node)
    }

    /// Subsections with their names.
    pub fn sections(&self) -> impl Iterator<Item = (&str, &Section)> {
        self.nodes.iter().filter_map(|(key, node)| match node {
            Node::Section(section) => Some((key.as_str(), section)),
            Node::Value(_) => None,
        })
    }

    /// Returns a subsection.
    pub fn section(&self, key: &str) -> Option<&Section> {
        match self.get(key)? {
            Node::Section(section) => Some(section),
            Node::Value(_) => None,
        }
    }

    /// Returns a non-negative number.
    pub fn number(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Node::Value(Value::Int(number)) => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    /// Returns a string.
    pub fn string(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Node::Value(Value::Str(text)) => Some(text),
            _ => None,
        }
    }

    /// Returns a list, or an empty one.
    pub fn list(&self, key: &str) -> &[Value] {
        match self.get(key) {
            Some(Node::Value(Value::List(list))) => list,
            _ => &[],
        }
    }

    /// Whether a list contains this string.
    pub fn has(&self, key: &str, text: &str) -> bool {
        self.list(key)
            .iter()
            .any(|v| matches!(v, Value::Str(s) if s == text))
    }
}

/// Position of a syntax error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SyntaxError {
    line: usize,
    what: &'static str,
}

impl fmt::Display for SyntaxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.what)
    }
}

impl std::error::Error for SyntaxError {}

/// Parses metadata text; a NUL byte ends it.
pub fn parse(text: &[u8]) -> Result<Section, SyntaxError> {
    parse_within(text, &mut MAX_NODES.clone())
}

/// Like `parse`, with at most `left` nodes; subtracts those it creates.
pub(super) fn parse_within(text: &[u8], left: &mut usize) -> Result<Section, SyntaxError> {
    let text = text.split(|b| *b == 0).next().unwrap_or_default();
    let mut parser = Parser { text, at: 0, left };
    match parser.section(0) {
        Ok(section) => Ok(section),
        Err(what) => {
            let line = 1 + text.iter().take(parser.at).filter(|b| **b == b'\n').count();
            Err(SyntaxError { line, what })
        }
    }
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
    /// Nodes still allowed.
    left: &'a mut usize,
}

type Parsed<T> = Result<T, &'static str>;

impl Parser<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    /// Skips white space and comments; returns the next byte.
    fn token(&mut self) -> Option<u8> {
        loop {
            match self.peek()? {
                b'#' => {
                    while self.peek().is_some_and(|b| b != b'\n') {
                        self.at += 1;
                    }
                }
                b if b.is_ascii_whitespace() => self.at += 1,
                b => return Some(b),
            }
        }
    }

    fn take_while(&mut self, take: impl Fn(u8) -> bool) -> &[u8] {
        let start = self.at;
        while self.peek().is_some_and(&take) {
            self.at += 1;
        }
        self.text.get(start..self.at).unwrap_or_default()
    }

    fn count(&mut self) -> Parsed<()> {
        *self.left = self.left.checked_sub(1).ok_or("too many entries")?;
        Ok(())
    }

    /// Parses up to the closing brace; at depth 0, to the end of the text.
    fn section(&mut self, depth: usize) -> Parsed<Section> {
        if depth > MAX_DEPTH {
            return Err("sections too deep");
        }
        let mut section = Section::default();
        loop {
            match self.token() {
                None if depth == 0 => break,
                None => return Err("section without end"),
                Some(b'}') if depth > 0 => {
                    self.at += 1;
                    break;
                }
                Some(_) => {}
            }
            self.count()?;
            let key = self.take_while(|b| b.is_ascii_alphanumeric() || b"_-+./".contains(&b));
            if key.is_empty() {
                return Err("a name was expected");
            }
            let key = String::from_utf8_lossy(key).into_owned();
            let node = match self.token() {
                Some(b'=') => {
                    self.at += 1;
                    Node::Value(self.value()?)
                }
                Some(b'{') => {
                    self.at += 1;
                    Node::Section(self.section(depth + 1)?)
                }
                _ => return Err("`=` or `{` was expected"),
            };
            section.nodes.push((key, node));
        }
        // A growing vector reserves four elements: most of the memory of many small sections.
        section.nodes.shrink_to_fit();
        Ok(section)
    }

    fn value(&mut self) -> Parsed<Value> {
        if self.token() != Some(b'[') {
            return self.scalar();
        }
        self.at += 1;
        let mut list = Vec::new();
        loop {
            if self.token() == Some(b']') {
                break;
            }
            self.count()?;
            list.push(self.scalar()?);
            match self.token() {
                Some(b',') => self.at += 1,
                Some(b']') => break,
                _ => return Err("`,` or `]` was expected"),
            }
        }
        self.at += 1;
        list.shrink_to_fit();
        Ok(Value::List(list))
    }

    fn scalar(&mut self) -> Parsed<Value> {
        match self.token() {
            Some(b'"') => self.string(),
            Some(b'-' | b'0'..=b'9') => {
                let digits = self.take_while(|b| b == b'-' || b == b'.' || b.is_ascii_digit());
                let number = std::str::from_utf8(digits)
                    .ok()
                    .and_then(|d| d.parse().ok());
                number.map(Value::Int).ok_or("not a whole number")
            }
            _ => Err("a value was expected"),
        }
    }

    fn string(&mut self) -> Parsed<Value> {
        self.at += 1;
        let mut bytes = Vec::new();
        loop {
            let byte = self.peek().ok_or("text without end")?;
            self.at += 1;
            match byte {
                b'"' => break,
                b'\\' => {
                    bytes.push(self.peek().ok_or("text without end")?);
                    self.at += 1;
                }
                byte => bytes.push(byte),
            }
        }
        Ok(Value::Str(String::from_utf8_lossy(&bytes).into_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_sections_values_comments() {
        let text =
            b"# head\nvg-1.x+ {\n id = \"a\\\"b\\\\c\" # tail\n seqno=7\nlist = [\"x\", 3,\n-4]\n\
            empty = []\n sub { }\n}\nversion = 1\n\0garbage {{{";
        let root = parse(text).unwrap();
        let vg = root.section("vg-1.x+").unwrap();
        assert_eq!(vg.string("id"), Some("a\"b\\c"));
        assert_eq!(vg.number("seqno"), Some(7));
        assert_eq!(
            vg.list("list"),
            [Value::Str("x".into()), Value::Int(3), Value::Int(-4)]
        );
        assert!(vg.has("list", "x") && !vg.has("empty", "x") && !vg.has("none", "x"));
        assert!(vg.section("sub").is_some() && vg.section("id").is_none());
        assert_eq!(root.number("version"), Some(1));
        assert_eq!(root.sections().count(), 1);
    }

    #[test]
    fn test_entries_are_counted_over_all_texts() {
        let text = b"a { b = [1, 2] } c = 3";
        let mut left = 7;
        assert!(parse_within(text, &mut left).is_ok());
        assert_eq!(left, 2);
        let error = parse_within(text, &mut left).unwrap_err();
        assert_eq!(error.what, "too many entries");
        // 32 MiB, the limit for one metadata area.
        let many = b"aaaa{}".repeat((32 << 20) / 6);
        let error = parse(&many).unwrap_err();
        assert_eq!(error.what, "too many entries");
    }

    #[test]
    fn test_errors_have_lines() {
        let error = |text: &str| parse(text.as_bytes()).unwrap_err().to_string();
        assert_eq!(error("a = 1\nb 2"), "line 2: `=` or `{` was expected");
        assert_eq!(error("a {\n"), "line 2: section without end");
        assert_eq!(error("}"), "line 1: a name was expected");
        assert_eq!(error("a = \"x"), "line 1: text without end");
        assert_eq!(error("a = [1 2]"), "line 1: `,` or `]` was expected");
        assert_eq!(
            error("a = 99999999999999999999"),
            "line 1: not a whole number"
        );
        assert_eq!(error("a = @x"), "line 1: a value was expected");
        assert!(error(&"a {".repeat(100_000)).contains("too deep"));
    }
}
