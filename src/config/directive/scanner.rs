//! Splits the text of a directive into settings.

use super::error_at;
use crate::error::Result;

/// One `key=value`.
#[derive(Debug)]
pub(super) struct Setting<'a> {
    pub(super) key: &'a str,
    pub(super) key_at: usize,
    pub(super) value: String,
    pub(super) value_at: usize,
}

/// Splits the text into settings.
pub(super) struct Scanner<'a> {
    pub(super) text: &'a str,
    pub(super) at: usize,
}

impl<'a> Scanner<'a> {
    fn setting(&mut self) -> Result<Setting<'a>> {
        let key_at = self.at;
        let rest = &self.text[key_at..];
        let key_end = rest
            .find(|c: char| c == '=' || c.is_whitespace())
            .unwrap_or(rest.len());
        let key = &rest[..key_end];
        if !rest[key_end..].starts_with('=') || key.is_empty() {
            return Err(error_at(
                self.text,
                key_at,
                "this is not key=value; no blank may stand around the equals sign, and a value with blanks needs quotes",
            ));
        }
        let value_at = key_at + key_end + 1;
        let rest = &self.text[value_at..];
        let value = match rest.chars().next() {
            Some(quote @ ('\'' | '"')) => {
                let (value, length) = unquote(rest, quote)
                    .ok_or_else(|| error_at(self.text, value_at, "the closing quote is missing"))?;
                self.at = value_at + length;
                if !self.text[self.at..].is_empty()
                    && !self.text[self.at..].starts_with(char::is_whitespace)
                {
                    return Err(error_at(
                        self.text,
                        self.at,
                        "a blank is needed behind the closing quote",
                    ));
                }
                value
            }
            _ => {
                let length = rest.find(char::is_whitespace).unwrap_or(rest.len());
                self.at = value_at + length;
                let value = &rest[..length];
                if let Some(quote) = value.find(['\'', '"']) {
                    return Err(error_at(
                        self.text,
                        value_at + quote,
                        "a quote may only stand around the whole value",
                    ));
                }
                value.to_owned()
            }
        };
        Ok(Setting {
            key,
            key_at,
            value,
            value_at,
        })
    }
}

impl<'a> Iterator for Scanner<'a> {
    type Item = Result<Setting<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
        if self.at == self.text.len() {
            return None;
        }
        let setting = self.setting();
        if setting.is_err() {
            self.at = self.text.len();
        }
        Some(setting)
    }
}

/// Returns the value of a quoted text and its length in bytes, including both quotes.
fn unquote(text: &str, quote: char) -> Option<(String, usize)> {
    let mut value = String::new();
    let mut chars = text.char_indices().skip(1).peekable();
    while let Some((at, c)) = chars.next() {
        if c == quote {
            return Some((value, at + 1));
        }
        let escaped = chars
            .peek()
            .map(|(_, next)| *next)
            .filter(|next| c == '\\' && matches!(next, '\'' | '"' | '\\'));
        match escaped {
            Some(next) => {
                value.push(next);
                chars.next();
            }
            None => value.push(c),
        }
    }
    None
}
