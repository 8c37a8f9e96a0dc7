//! Image files: each match of a pattern is a guest with one disk.

use std::path::Path;

use super::selection::{Found, Selection};
use crate::config::pattern::Pattern;
use crate::error::escape;
use crate::guest::definition;
use crate::guest::{DiskSource, Inventory};
use crate::{Code, Error, Result};

/// Adds each matching regular file as a guest with one disk.
pub(super) fn images(
    inventory: &dyn Inventory,
    pattern: &Pattern,
    found: &mut Vec<Found>,
    selection: &mut Selection,
) -> Result<()> {
    for path in inventory.files(pattern)? {
        let shown = escape(path.as_os_str().as_encoded_bytes());
        // `allow` matches names; a link to a directory would give allowed names to files elsewhere.
        match inventory.canonical(&path) {
            Ok(real) if real == path => {}
            Ok(real) => {
                let real = escape(real.as_os_str().as_encoded_bytes());
                let text = format!("{shown}: a part of its path is a symbolic link, it is {real}");
                let name = image_name(&path).unwrap_or(shown);
                selection
                    .refused
                    .push((name, Error::new(Code::NotAllowed, text)));
                continue;
            }
            Err(error) => {
                let name = image_name(&path).unwrap_or(shown);
                selection.refused.push((name, error));
                continue;
            }
        }
        match image_name(&path) {
            Some(name) => found.push(Found {
                source_name: name.clone(),
                name,
                disks: vec![DiskSource::File(path)],
                disk_names: vec![definition::names_by_order(0)],
                places: vec![None],
                uncovered: Vec::new(),
                from: format!("image {shown}"),
                file: None,
                pve: None,
                defined_here: false,
                doubt: None,
            }),
            None => selection.refused.push((
                shown.clone(),
                Error::new(
                    Code::BadGuestDefinition,
                    format!("{shown}: the file's name is not UTF-8 and cannot name a guest"),
                ),
            )),
        }
    }
    Ok(())
}

/// Returns `web1` for `/srv/web1.img`.
pub(super) fn image_name(path: &Path) -> Option<String> {
    let usual = ["img", "raw", "image", "disk"];
    let name = match path.extension().and_then(|e| e.to_str()) {
        Some(extension) if usual.contains(&extension) => path.file_stem(),
        _ => path.file_name(),
    };
    name?.to_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::super::select;
    use super::super::testing::{allow, host, picture};
    use crate::config::Directive;

    #[test]
    fn test_an_image_behind_a_link_to_a_folder_is_refused() {
        let mut host = host();
        host.files
            .insert("/srv/img/link/web.img".into(), Vec::new());
        host.links
            .insert("/srv/img/link/web.img".into(), "/other/web.img".into());
        let client = allow(&["/srv/img/**"]);
        for text in ["image=/srv/img/link/web.img", "image=/srv/img/**/web.img"] {
            let directive = Directive::parse(text).unwrap();
            let selection = select(&directive, &client, &host).unwrap();
            assert_eq!(picture(&selection), ["!web GS-104"], "{text}");
            let report = selection.refused[0].1.report();
            assert!(report.contains("it is /other/web.img"), "{report}");
        }
    }
}
