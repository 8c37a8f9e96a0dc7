//! Values of settings: sizes, names and paths.

use super::INSTANCE_TAG;
use crate::hostdev::lvname::VgName;

/// Parses plain digits.
pub(super) fn digits(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// Parses a size such as `64k` or `10G`: a whole number with a unit k, M, G or T (powers of 1024).
pub(crate) fn parse_bytes(text: &str) -> std::result::Result<u64, String> {
    let wrong =
        || format!("\"{text}\" is not a size: write a number and one of k, M, G, T, as in 10G");
    let unit = text.chars().next_back().ok_or_else(wrong)?;
    let shift = match unit.to_ascii_lowercase() {
        'k' => 10,
        'm' => 20,
        'g' => 30,
        't' => 40,
        _ => return Err(wrong()),
    };
    let number = digits(&text[..text.len() - unit.len_utf8()]).ok_or_else(wrong)?;
    match number.checked_mul(1 << shift) {
        Some(0) => Err(format!("\"{text}\" is nothing")),
        Some(bytes) if i64::try_from(bytes).is_ok() => Ok(bytes),
        _ => Err(format!("\"{text}\" is too much")),
    }
}

/// Parses a chunk size that `lvcreate` accepts: a power of two from 4k to 512k.
pub(crate) fn parse_chunk(text: &str) -> std::result::Result<u64, String> {
    let bytes = parse_bytes(text)?;
    if bytes.is_power_of_two() && (4 << 10..=512 << 10).contains(&bytes) {
        Ok(bytes)
    } else {
        Err(format!(
            "\"{text}\" is not a chunk size: a power of two from 4k to 512k is needed"
        ))
    }
}

/// A volume group that the user names.
pub(crate) fn vg_name(text: &str) -> std::result::Result<VgName, String> {
    if text.contains(['*', '?', '[', '{']) {
        return Err(format!(
            "\"{text}\" is a pattern: the volume group has to be named exactly, repeat lv= for others"
        ));
    }
    VgName::new(text)
}

pub(super) fn check_tag(tag: &str) -> std::result::Result<(), String> {
    let any = tag.strip_suffix('*');
    let tag = any
        .filter(|start| start.starts_with(INSTANCE_TAG))
        .unwrap_or(tag);
    if tag.starts_with('@') {
        return Err(format!("\"{tag}\": write the tag without @"));
    }
    let good = |c: char| c.is_ascii_alphanumeric() || "_+.-/=!:&#".contains(c);
    if tag.starts_with('-') || !tag.chars().all(good) {
        return Err(format!("\"{tag}\" cannot be an LVM tag"));
    }
    if tag == "guestsnap" || tag.starts_with("guestsnap.") {
        return Err(format!(
            "\"{tag}\" marks the snapshots that guestsnap makes"
        ));
    }
    Ok(())
}

pub(super) fn check_path(path: &str) -> std::result::Result<(), String> {
    let Some(rest) = path.strip_prefix('/') else {
        return Err(format!("\"{path}\" is not absolute"));
    };
    match rest
        .split('/')
        .find(|part| matches!(*part, "" | "." | ".."))
    {
        None => Ok(()),
        Some("") if path == "/" => {
            Err("\"/\" would put guests among the host's own files".to_owned())
        }
        Some("") => Err(format!("\"{path}\" holds a slash too many")),
        Some(_) => Err(format!("\"{path}\" must not hold . or ..")),
    }
}
