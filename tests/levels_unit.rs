//! The warnings that the documents list are those in the code.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, found),
            false => found.push(path),
        }
    }
}

/// The words of the comment above each place that makes a warning. Those that only pass one on are not looked at.
fn in_the_code(src: &Path) -> BTreeSet<String> {
    let passes_on = ["ffi", "bin", "job/caller.rs", "fs/mod.rs"].map(|name| src.join(name));
    let mut paths = Vec::new();
    sources(src, &mut paths);
    let mut found = BTreeSet::new();
    for path in paths {
        if passes_on.iter().any(|name| path.starts_with(name)) {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        let lines: Vec<&str> = code.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            let makes = line.contains("Note::warning") || line.contains("Importance::Warning");
            if !makes || line.contains(">=") {
                continue;
            }
            let above = lines[number.saturating_sub(3)..number].iter().rev();
            let word = above
                .filter_map(|line| line.trim().strip_prefix("// Warning: "))
                .find_map(|word| word.strip_suffix('.'));
            let place = format!("{}:{}", path.display(), number + 1);
            found.insert(
                word.unwrap_or_else(|| panic!("{place} is in no row"))
                    .to_owned(),
            );
        }
    }
    found
}

#[test]
fn test_every_warning_has_its_reason_in_the_documents() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(repository.join("docs/troubleshooting.md")).unwrap();
    let table = page.split("| warning | what is so |").nth(1).unwrap();
    let rows = table
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    let documented: BTreeSet<String> = rows
        .map(|row| row.split('|').nth(1).unwrap().trim().to_owned())
        .collect();
    assert_eq!(in_the_code(&repository.join("src")), documented);
}
