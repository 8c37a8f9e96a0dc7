//! LVM UUIDs and names, in metadata and in messages.

/// Maximum bytes of a metadata name shown in messages.
const MAX_SHOWN: usize = 128;

/// Strips the dashes of a UUID; `None` unless 32 valid characters remain.
pub(super) fn uuid(text: &str) -> Option<String> {
    let plain: String = text.chars().filter(|c| *c != '-').collect();
    let fine = plain.len() == 32
        && plain
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"!#".contains(&b));
    fine.then_some(plain)
}

/// Formats a UUID like the LVM tools.
pub(super) fn dashed(uuid: &str) -> String {
    let mut text = String::with_capacity(38);
    for (index, c) in uuid.chars().enumerate() {
        if matches!(index, 6 | 10 | 14 | 18 | 22 | 26) {
            text.push('-');
        }
        text.push(c);
    }
    text
}

/// Escapes a name chosen by a guest for a message. LVM2's own limit is shorter; longer names would
/// be repeated in the message of every volume that depends on them.
pub(super) fn printable(name: &str) -> String {
    let end = (0..=MAX_SHOWN.min(name.len())).rfind(|at| name.is_char_boundary(*at));
    crate::error::escape(&name.as_bytes()[..end.unwrap_or(0)])
}
