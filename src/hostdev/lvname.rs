//! Names in the host's LVM. Each is one that LVM accepts, so none can be read as an option or leaves `/dev`.
//!
//! Names in a guest's LVM are the guest's own text (`disk::lvm2`), and are never of these types.

use std::borrow::Borrow;
use std::fmt;
use std::ops::Deref;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Code, Error, Result, escape};

/// Maximum length of LV and VG names.
const MAX_NAME: usize = 127;

/// Whether LVM accepts this as the name of a group or volume.
fn is_valid(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME
        && !name.starts_with('-')
        && name != "."
        && name != ".."
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"+_.-".contains(&b))
}

/// A volume group of the host.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct VgName(String);

impl VgName {
    /// Validates the name. The error is a sentence about it.
    pub fn new(name: impl Into<String>) -> std::result::Result<VgName, String> {
        let name = name.into();
        if is_valid(&name) {
            return Ok(VgName(name));
        }
        let name = escape(name.as_bytes());
        Err(format!("\"{name}\" cannot be the name of a volume group"))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for VgName {
    type Error = String;

    fn try_from(name: String) -> std::result::Result<VgName, String> {
        VgName::new(name)
    }
}

impl Deref for VgName {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for VgName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VgName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A logical volume of the host, by the names of its group and its own.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LvName {
    vg: VgName,
    lv: String,
}

impl LvName {
    /// Validates both names.
    pub fn new(vg: &str, lv: impl Into<String>) -> Result<LvName> {
        let lv = lv.into();
        match VgName::new(vg) {
            Ok(vg) => LvName::within(vg, lv),
            Err(_) => Err(not_a_name(vg, &lv)),
        }
    }

    /// Validates the name of a volume of this group.
    pub fn within(vg: VgName, lv: impl Into<String>) -> Result<LvName> {
        let lv = lv.into();
        match is_valid(&lv) {
            true => Ok(LvName { vg, lv }),
            false => Err(not_a_name(&vg, &lv)),
        }
    }

    /// The volume that `/dev/VG/LV` or `/dev/mapper/VG-LV` may be.
    pub fn of_device(path: &Path) -> Option<LvName> {
        let parts: Vec<&str> = path
            .strip_prefix("/dev")
            .ok()?
            .iter()
            .map(|part| part.to_str())
            .collect::<Option<_>>()?;
        match parts.as_slice() {
            ["mapper", name] => LvName::of_dm_name(name),
            [vg, lv] => LvName::new(vg, *lv).ok(),
            _ => None,
        }
    }

    /// The volume of a device-mapper name: see [`LvName::dm_name`].
    fn of_dm_name(name: &str) -> Option<LvName> {
        let mut border = None;
        let mut at = 0;
        while let Some(next) = name[at..].find('-') {
            at += next;
            if name[at..].starts_with("--") {
                at += 2;
            } else if border.replace(at).is_some() {
                return None;
            } else {
                at += 1;
            }
        }
        let border = border?;
        let (vg, lv) = (&name[..border], &name[border + 1..]);
        LvName::new(&vg.replace("--", "-"), lv.replace("--", "-")).ok()
    }

    /// Volume group.
    pub fn vg(&self) -> &VgName {
        &self.vg
    }

    /// Logical volume.
    pub fn lv(&self) -> &str {
        &self.lv
    }

    /// Device-mapper name: both names with `-` doubled, joined by `-`.
    pub fn dm_name(&self) -> String {
        format!(
            "{}-{}",
            self.vg.replace('-', "--"),
            self.lv.replace('-', "--")
        )
    }
}

fn not_a_name(vg: &str, lv: &str) -> Error {
    let (vg, lv) = (escape(vg.as_bytes()), escape(lv.as_bytes()));
    Error::new(
        Code::OriginGone,
        format!("`{vg}/{lv}` is not the name of a logical volume"),
    )
}

impl fmt::Display for LvName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.vg, self.lv)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_names_that_could_be_options_are_refused() {
        let long = "x".repeat(MAX_NAME + 1);
        for bad in ["-f", "", ".", "..", "a/b", "a b", "ä", "a\n", &long] {
            assert!(LvName::new("vg0", bad).is_err(), "{bad:?}");
            assert!(LvName::new(bad, "lv").is_err(), "{bad:?}");
            assert!(VgName::new(bad).is_err(), "{bad:?}");
        }
        assert!(LvName::new("vg-0", "domu_a.b+c").is_ok());
        assert!(VgName::new(&long[1..]).is_ok());
    }

    #[test]
    fn test_names_of_devices() {
        let cases = [
            ("vg0-web1", Some(("vg0", "web1"))),
            ("vg--0-domu--web1", Some(("vg-0", "domu-web1"))),
            // Not `a` and `-b`: names never start with a dash.
            ("a---b", Some(("a-", "b"))),
            ("a-----b", Some(("a--", "b"))),
            // A component of a volume.
            ("vg0-web1-real", None),
            ("vg0", None),
            ("vg0-", None),
            ("-x", None),
            ("", None),
            ("--", None),
            ("vg0-a b", None),
        ];
        for (name, expected) in cases {
            let device = Path::new("/dev/mapper").join(name);
            let expected = expected.map(|(vg, lv)| LvName::new(vg, lv).unwrap());
            assert_eq!(LvName::of_device(&device), expected, "{name}");
            if let Some(volume) = expected {
                assert_eq!(volume.dm_name(), name);
            }
        }
        let web = LvName::new("vg0", "web").ok();
        assert_eq!(LvName::of_device(Path::new("/dev/vg0/web")), web);
        for path in [
            "/dev/web",
            "/dev/vg0/web/x",
            "/vg0/web",
            "/dev/vg0/-f",
            "/dev/v g/web",
        ] {
            assert_eq!(LvName::of_device(Path::new(path)), None, "{path}");
        }
    }
}
