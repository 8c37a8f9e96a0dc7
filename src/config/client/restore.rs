//! The guests whose disks a restore may write to.

use super::settings::ClientFile;
use super::values::Allow;

impl ClientFile {
    /// Whether a restore may write into this target: a guest's name, `VG/LV` or a path.
    pub fn allows_into(&self, target: &str) -> bool {
        let patterns = self.restore.into.iter().flatten();
        patterns.into_iter().any(|pattern| pattern.matches(target))
    }

    /// These settings with `into` in place of `allow`: a disk to restore into need not be one to save.
    pub fn for_into(&self) -> ClientFile {
        let patterns = self.restore.into.iter().flatten();
        let disks = patterns.filter(|pattern| pattern.text().contains('/'));
        ClientFile {
            allow: Some(disks.map(|pattern| Allow((**pattern).clone())).collect()),
            ..self.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_nothing_is_written_to_unless_the_client_file_says_so() {
        assert!(!ClientFile::default().allows_into("web1"));
        let text =
            "allow = ['vg0/domu-*']\n[restore]\ninto = ['web?', 'vg0/restore-*', '/srv/*.img']\n";
        let file = ClientFile::parse(text).unwrap();
        for (target, allowed) in [
            ("web1", true),
            ("web", false),
            ("web1/x", false),
            ("vg0/restore-web1", true),
            ("vg0/domu-web1", false),
            ("/srv/a.img", true),
            ("/srv/a/b.img", false),
            ("/srv/../srv/a.img", false),
        ] {
            assert_eq!(file.allows_into(target), allowed, "{target}");
        }
        let allow = file.for_into().allow.unwrap();
        let texts: Vec<_> = allow.iter().map(|pattern| pattern.text()).collect();
        assert_eq!(texts, ["vg0/restore-*", "/srv/*.img"]);
        for bad in ["''", "'srv/../x/y'", "'/srv/../x'", "'/'"] {
            let text = format!("[restore]\ninto = [{bad}]\n");
            assert_eq!(ClientFile::parse(&text).is_ok(), bad == "'/'", "{bad}");
        }
    }
}
