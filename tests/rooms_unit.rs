//! The rooms of the code are those that `docs/architecture.md` draws, and each uses only rooms below it.

use std::fs;
use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The rooms of the table in the document, from the lowest to the highest. A row may name several.
fn rooms() -> Vec<String> {
    let page = fs::read_to_string(repository().join("docs/architecture.md")).expect("the document");
    let table = page
        .split("| module |")
        .nth(1)
        .expect("the table of modules");
    let rows = table.lines().skip(2).take_while(|l| l.starts_with('|'));
    let cells = rows.filter_map(|row| row.split('|').nth(1));
    let names = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2).map(str::to_owned));
    names.collect()
}

fn sources(path: &Path, found: &mut Vec<PathBuf>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).expect("a folder of sources") {
            sources(&entry.expect("an entry").path(), found);
        }
    } else if path.extension().is_some_and(|e| e == "rs") {
        found.push(path.to_owned());
    }
}

/// The rooms that a source names, in code and not in comments.
fn used(text: &str) -> Vec<String> {
    let code = text.lines().filter(|l| !l.trim_start().starts_with("//"));
    let words = code.flat_map(|line| line.split("crate::").skip(1));
    let names = words.map(|word| {
        let end = word.find(|c: char| !c.is_alphanumeric() && c != '_');
        word[..end.unwrap_or(word.len())].to_owned()
    });
    // Types that the library shows at its top are those of `error`.
    names
        .filter(|name| name.starts_with(char::is_lowercase))
        .collect()
}

#[test]
fn test_rooms_use_only_rooms_below_them() {
    let rooms = rooms();
    let floor = |room: &str| rooms.iter().position(|one| one == room);
    let src = repository().join("src");
    let mut wrong = Vec::new();
    for entry in fs::read_dir(&src).expect("src") {
        let path = entry.expect("an entry").path();
        let room = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if ["lib", "bin"].contains(&room.as_str()) {
            continue;
        }
        let Some(own) = floor(&room) else {
            wrong.push(format!("{room} is not in the document"));
            continue;
        };
        let mut files = Vec::new();
        sources(&path, &mut files);
        for file in files {
            let text = fs::read_to_string(&file).expect("a source");
            for name in used(&text) {
                if floor(&name).is_none_or(|at| at > own) {
                    wrong.push(format!("{}: uses {name}", file.display()));
                }
            }
        }
    }
    for room in &rooms {
        let there = src.join(room).is_dir() || src.join(format!("{room}.rs")).is_file();
        if !there {
            wrong.push(format!("{room} is in the document alone"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn test_what_a_source_uses() {
    let text = "use crate::error::{Code, Error};\n//! see [`crate::ffi`]\nlet a = crate::fs::probe(crate::Code::Ok);";
    assert_eq!(used(text), ["error", "fs"]);
}

/// A `mod.rs` names the modules of a room and what they show; what they are made of has files of its own.
#[test]
fn test_a_mod_file_is_a_face() {
    let mut files = Vec::new();
    sources(&repository().join("src"), &mut files);
    let faces = files.iter().filter(|path| path.ends_with("mod.rs"));
    let mut count = 0;
    for path in faces {
        count += 1;
        let text = fs::read_to_string(path).expect("a source");
        let words = [
            "struct ", "enum ", "trait ", "fn ", "impl ", "impl<", "type ", "static ",
        ];
        let item = text.lines().find(|line| {
            let line = line
                .trim_start_matches("pub ")
                .trim_start_matches("unsafe ");
            words.iter().any(|word| line.starts_with(word))
        });
        assert_eq!(item, None, "{}", path.display());
    }
    assert!(count > 20, "{count}");
}
