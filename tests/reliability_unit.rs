//! `docs/reliability.md` names a test for each promise; the tests are there.

use std::fs;
use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust sources below a folder, as one text without white space: `cargo fmt` breaks long calls into lines.
fn sources(folder: &Path) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(folder).expect("a folder of sources") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            text += &sources(&path);
        } else if path.extension().is_some_and(|e| e == "rs") {
            text.extend(
                fs::read_to_string(&path)
                    .expect("a source")
                    .split_whitespace(),
            );
        }
    }
    text
}

/// The names of tests in a line: words in backquotes that begin as tests do.
fn tests_in(line: &str) -> Vec<&str> {
    let words = line.split('`').skip(1).step_by(2);
    let is_test = |word: &&str| {
        let tier = ["test_", "root_", "vm_"]
            .iter()
            .any(|t| word.starts_with(t));
        tier && !word.ends_with('*')
    };
    words.filter(is_test).collect()
}

fn exists(test: &str, sources: &str) -> bool {
    let function = format!("fn{test}(");
    let scenario = |name: &str| format!("scenario(\"{name}\",");
    match test.strip_prefix("vm_") {
        Some(name) => sources.contains(&scenario(name)),
        None => sources.contains(&function) || sources.contains(&scenario(test)),
    }
}

#[test]
fn test_every_promise_names_tests_that_exist() {
    let document = fs::read_to_string(repository().join("docs/reliability.md")).expect("the page");
    let sources = sources(&repository().join("src")) + &sources(&repository().join("tests"));
    let mut promises = 0;
    let mut in_promises = false;
    for line in document.lines() {
        if !line.starts_with('|') {
            in_promises = false;
        } else if line == "| promise | tests |" {
            in_promises = true;
        } else if in_promises && !line.starts_with("|---") {
            promises += 1;
            let tests = tests_in(line);
            assert!(!tests.is_empty(), "a promise without a test: {line}");
            for test in tests {
                assert!(exists(test, &sources), "there is no test {test}: {line}");
            }
        }
    }
    assert!(promises >= 20, "only {promises} promises found");
    assert!(!exists("root_of_all_evil", &sources));
}
