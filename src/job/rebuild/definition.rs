//! The definition of a guest whose disks have new names.

use super::target::TargetName;
use crate::hostdev::lvname::LvName;

/// Puts new names of disks into a definition (xl.cfg, domain XML): paths of images, and volumes as `/dev/VG/LV`,
/// `/dev/mapper/VG-LV` or `VG/LV`. Returns the text, and the old names that are not in it.
pub fn with_new_disks(text: &str, disks: &[(String, TargetName)]) -> (String, Vec<String>) {
    let mut text = text.to_owned();
    let mut missing = Vec::new();
    for (old, new) in disks {
        let mut found = false;
        for (old, new) in names(old, new) {
            let replaced = replace(&text, &old, &new);
            found |= replaced.is_some();
            text = replaced.unwrap_or(text);
        }
        if !found {
            missing.push(old.clone());
        }
    }
    (text, missing)
}

/// New texts for the forms of a name in a definition, the longest form first.
fn names(old: &str, new: &TargetName) -> Vec<(String, String)> {
    let path = match new {
        TargetName::Image(path) => path.display().to_string(),
        TargetName::Volume { name, .. } => format!("/dev/{name}"),
    };
    let volume = match old.split('/').collect::<Vec<_>>()[..] {
        [vg, lv] => LvName::new(vg, lv).ok(),
        _ => None,
    };
    let Some(volume) = volume else {
        return vec![(old.to_owned(), path)];
    };
    let bare = match new {
        TargetName::Image(_) => path.clone(),
        TargetName::Volume { name, .. } => name.to_string(),
    };
    vec![
        (format!("/dev/mapper/{}", volume.dm_name()), path.clone()),
        (format!("/dev/{volume}"), path),
        (volume.to_string(), bare),
    ]
}

/// Replaces a name where it stands alone. `None`: it does not.
fn replace(text: &str, old: &str, new: &str) -> Option<String> {
    let part = |c: char| c.is_alphanumeric() || "_-+./".contains(c);
    let mut out = String::new();
    let mut rest = text;
    let mut found = false;
    while let Some(at) = rest.find(old) {
        let (before, after) = (&rest[..at], &rest[at + old.len()..]);
        let alone = !before.ends_with(part) && !after.starts_with(part);
        out.push_str(before);
        out.push_str(if alone { new } else { old });
        found |= alone;
        rest = after;
    }
    out.push_str(rest);
    found.then_some(out)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn test_names_of_disks_are_replaced_where_they_stand_alone() {
        let disks = |pairs: &[(&str, &str)]| -> Vec<(String, TargetName)> {
            let pair = |(old, new): &(&str, &str)| {
                (
                    (*old).to_owned(),
                    TargetName::parse(OsStr::new(new)).unwrap(),
                )
            };
            pairs.iter().map(pair).collect()
        };
        let xl = "disk = ['phy:/dev/vg0/web,xvda,w', 'phy:/dev/vg0/web-data,xvdb,w', 'vdev=xvdc, target=/dev/mapper/vg0-w--x']\n";
        let (text, missing) = with_new_disks(
            xl,
            &disks(&[
                ("vg0/web", "vg1/web"),
                ("vg0/w-x", "/srv/x.img"),
                ("vg0/gone", "vg1/gone"),
            ]),
        );
        assert_eq!(
            text,
            "disk = ['phy:/dev/vg1/web,xvda,w', 'phy:/dev/vg0/web-data,xvdb,w', 'vdev=xvdc, target=/srv/x.img']\n"
        );
        assert_eq!(missing, ["vg0/gone"]);
        let xml = "<source file='/srv/web.img'/><source file='/srv/web.img.old'/>";
        let (text, missing) = with_new_disks(xml, &disks(&[("/srv/web.img", "vg0/pool/web")]));
        assert_eq!(
            text,
            "<source file='/dev/vg0/web'/><source file='/srv/web.img.old'/>"
        );
        assert!(missing.is_empty());
    }
}
