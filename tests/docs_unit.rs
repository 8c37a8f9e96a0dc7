//! The documents and samples say what the code does.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use guestsnap::config::client::Fsck;
use guestsnap::config::{
    ClientFile, Directive, OnError, Size, SnapshotKind, When, defaults, directive,
};
use guestsnap::{Code, Error};

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(repository().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The directives of a Bacula configuration or a document: what stands behind
/// `Plugin = "guestsnap:`.
fn directives(text: &str) -> Vec<String> {
    text.split("Plugin = \"guestsnap:")
        .skip(1)
        .filter_map(|rest| rest.split('"').next())
        .map(str::to_owned)
        .collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[test]
fn test_directives_of_samples_and_documents_are_valid() {
    let mut texts = files(&repository().join("bacula-conf"));
    texts.extend(files(&repository().join("docs")));
    texts.push(repository().join("README.md"));
    let mut seen = 0;
    for path in texts {
        for text in directives(&fs::read_to_string(&path).unwrap()) {
            if let Err(error) = Directive::parse(&text) {
                panic!("{}: {text}: {}", path.display(), error.report());
            }
            seen += 1;
        }
    }
    assert!(seen >= 10, "only {seen} directives found");
}

#[test]
fn test_sample_client_file_is_valid() {
    let text = read("bacula-conf/client/guestsnap.toml");
    let file = ClientFile::parse(&text).unwrap_or_else(|e: Error| panic!("{}", e.report()));
    assert!(file.guest.contains_key("db1") && file.quiesce("app", None).is_some());
}

#[test]
fn test_every_key_is_documented() {
    let document = read("docs/configuration.md");
    for (key, _) in directive::KEYS {
        assert!(
            document.contains(&format!("| `{key}=")),
            "directive key {key}"
        );
    }
    // The parser itself lists the keys it knows.
    for (section, text) in [
        ("the file", "?"),
        ("[sources]", "[sources]\n?"),
        ("[limits]", "[limits]\n?"),
        ("a guest", "[guest.x]\n?"),
    ] {
        let error = ClientFile::parse(&text.replace('?', "zzz = 1"))
            .unwrap_err()
            .to_string();
        let list = error.split("expected").nth(1).expect("a list of keys");
        let keys: Vec<&str> = list.split('`').skip(1).step_by(2).collect();
        assert!(keys.len() > 1, "{error}");
        for key in keys {
            let written = [
                format!("`{key}`"),
                format!("`[{key}]`"),
                format!("`[{key}.NAME]`"),
            ];
            assert!(
                written.iter().any(|w| document.contains(w)),
                "{section}: key {key}"
            );
        }
    }
}

/// The defaults that are plain values, as the tables of the document write them.
fn plain_defaults() -> Vec<(&'static str, String)> {
    let size = |bytes: u64| {
        let units = [(40, "T"), (30, "G"), (20, "M"), (10, "k")];
        let unit = units.iter().find(|(shift, _)| bytes % (1 << shift) == 0);
        let (shift, unit) = unit.expect("a whole number of a unit");
        format!("{}{unit}", bytes >> shift)
    };
    let quoted = |text: &str| format!("`\"{text}\"`");
    let patterns = |all: &[&str]| {
        let all: Vec<_> = all.iter().map(|p| format!("`{p}`")).collect();
        all.join(", ")
    };
    let snapshot = match defaults::SNAPSHOT {
        SnapshotKind::Auto => "auto",
        SnapshotKind::Thick => "thick",
        SnapshotKind::Thin => "thin",
        SnapshotKind::None => "none",
    };
    let snapshots = match defaults::SNAPSHOTS {
        When::Auto => "auto",
        When::All => "all",
        When::Turn => "turn",
    };
    let on_error = match defaults::ON_ERROR {
        OnError::Continue => "continue",
        OnError::Fail => "fail",
    };
    let fsck = match defaults::FSCK {
        Fsck::None => "none",
        Fsck::Before => "before",
    };
    let space = match defaults::SIZE {
        Size::Percent(percent) => format!("{percent}%"),
        Size::Bytes(bytes) => size(bytes),
    };
    let read_ahead = u64::try_from(defaults::READ_AHEAD).expect("a size");
    let line = |value: &str| format!("client file, else {value}");
    vec![
        ("snapshot=", line(&format!("`{snapshot}`"))),
        ("size=", line(&format!("`{space}`"))),
        ("chunk=", line(&size(defaults::CHUNK))),
        ("path=", format!("`{}`", defaults::PATH)),
        ("on_error=", format!("`{on_error}`")),
        ("snapshots=", format!("`{snapshots}`")),
        (
            "id=",
            if defaults::ID { "`yes`" } else { "`no`" }.to_owned(),
        ),
        ("pve", quoted(defaults::PVE)),
        ("lock_wait", defaults::LOCK_WAIT.to_string()),
        ("xl", patterns(defaults::XL)),
        ("libvirt", patterns(defaults::LIBVIRT)),
        ("pools", patterns(defaults::POOLS)),
        ("extend_at", defaults::EXTEND_AT.to_string()),
        ("extend_by", defaults::EXTEND_BY.to_string()),
        ("warn_pool_at", defaults::WARN_POOL_AT.to_string()),
        ("give_up_pool_at", defaults::GIVE_UP_POOL_AT.to_string()),
        ("hold_seconds", defaults::HOLD_SECONDS.to_string()),
        ("progress_minutes", defaults::PROGRESS_MINUTES.to_string()),
        ("read_ahead", quoted(&size(read_ahead))),
        ("readers", defaults::READERS.to_string()),
        ("holes", quoted(&size(defaults::HOLES))),
        ("seconds", defaults::HOOK_SECONDS.to_string()),
        ("snapshot", quoted(snapshot)),
        ("size", quoted(&space)),
        ("chunk", quoted(&size(defaults::CHUNK))),
        ("activate", format!("`{}`", defaults::ACTIVATE)),
        ("filesystems", defaults::FILESYSTEMS.join(", ")),
        ("skip_recovery", format!("`{}`", defaults::SKIP_RECOVERY)),
        ("fsck", quoted(fsck)),
        ("freeze_seconds", defaults::FREEZE_SECONDS.to_string()),
        ("skip_caches", format!("`{}`", defaults::SKIP_CACHES)),
    ]
}

/// Rows of the tables whose default is in words, or nothing.
const OTHER_DEFAULTS: &[&str] = &[
    "lv=",
    "tag=",
    "guest=",
    "xl=",
    "libvirt=",
    "pve=",
    "image=",
    "exclude=",
    "strip=",
    "allow",
    "into",
    "before",
    "after",
    "disks",
    "vg",
    "quiesce",
    "freeze",
    "domain",
    "root",
    "skip",
    "skip_dirs_containing",
    "max_file_size",
    "shared",
    "into",
];

#[test]
fn test_defaults_are_those_of_the_document() {
    let document = read("docs/configuration.md");
    let mut shown = Vec::new();
    for table in document.split("| key | meaning | default |\n").skip(1) {
        let rows = table.lines().skip(1).take_while(|l| l.starts_with('|'));
        shown.extend(rows.map(|row| {
            let row = row.replace("\\|", "/");
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            assert_eq!(cells.len(), 5, "{row}");
            // `[limits]` `holes`, or `lv=VG/GLOB`.
            let mut words = cells[1].split('`').skip(1).step_by(2);
            let key = words.find(|word| !word.starts_with('[')).expect("a key");
            let key = key.split_inclusive('=').next().unwrap_or_default();
            (key.to_owned(), cells[3].to_owned())
        }));
    }
    let plain = plain_defaults();
    let expected = |key: &str| plain.iter().find(|(k, _)| *k == key);
    for (key, value) in &shown {
        match expected(key) {
            Some((_, expected)) => assert_eq!(value, expected, "the default of {key}"),
            None => assert!(OTHER_DEFAULTS.contains(&key.as_str()), "{key}: {value}"),
        }
    }
    for (key, _) in &plain {
        let rows = shown.iter().filter(|(k, _)| k == key).count();
        assert_eq!(rows, 1, "rows of {key}");
    }
}

/// `docs/messages.md` is made from the table in `src/error.rs`; with `GUESTSNAP_UPDATE_DOCS=1` this
/// test writes it.
#[test]
fn test_every_message_is_documented() {
    let mut table = String::new();
    for code in Code::ALL {
        let _ = writeln!(table, "| {code} | {} | {} |", code.title(), code.remedy());
    }
    let document = read("docs/messages.md");
    let start = document.find("|---|---|---|\n").expect("a table") + "|---|---|---|\n".len();
    if std::env::var_os("GUESTSNAP_UPDATE_DOCS").is_some() {
        let text = format!("{}{table}", &document[..start]);
        fs::write(repository().join("docs/messages.md"), text).unwrap();
        return;
    }
    assert_eq!(
        &document[start..],
        table,
        "run GUESTSNAP_UPDATE_DOCS=1 cargo test --test docs_unit"
    );
}

#[test]
fn test_every_dependency_has_a_reason() {
    let decisions = read("docs/decisions.md");
    let mut names = BTreeSet::new();
    for manifest in ["Cargo.toml", "tests/bed/Cargo.toml"] {
        let manifest: toml::Table = read(manifest).parse().unwrap();
        for section in ["dependencies", "build-dependencies", "dev-dependencies"] {
            let section = manifest.get(section).and_then(|s| s.as_table());
            names.extend(section.into_iter().flat_map(|s| s.keys().cloned()));
        }
    }
    assert!(names.len() > 20 && names.remove("guestsnap"), "{names:?}");
    for name in &names {
        let row = decisions
            .lines()
            .filter(|line| line.starts_with("| "))
            .any(|line| {
                line[2..]
                    .split(" | ")
                    .next()
                    .unwrap_or("")
                    .replace(',', " ")
                    .split_whitespace()
                    .any(|w| w == *name)
            });
        assert!(row, "docs/decisions.md has no reason for {name}");
    }
}

#[test]
fn test_licence_is_complete() {
    let text = read("LICENSE");
    assert_eq!((text.lines().count(), text.len()), (661, 34520));
    assert!(
        text.trim_start()
            .starts_with("GNU AFFERO GENERAL PUBLIC LICENSE")
    );
}

/// Each row of `docs/bacula-features.md` has a state and names tests that exist.
#[test]
fn test_features_are_backed_by_tests() {
    let sources: String = files(&repository().join("tests"))
        .iter()
        .filter(|path| path.extension().is_some_and(|e| e == "rs"))
        .map(|path| fs::read_to_string(path).unwrap())
        .flat_map(|text| {
            text.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .collect();
    let document = read("docs/bacula-features.md");
    let rows = document
        .lines()
        .filter(|line| line.starts_with("| "))
        .skip(1);
    let mut seen = 0;
    for row in rows {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        assert_eq!(cells.len(), 6, "{row}");
        let (state, why, tests) = (cells[2], cells[3], cells[4]);
        assert!(
            ["works", "partly", "not possible", "not yet"].contains(&state),
            "{row}"
        );
        assert!(state == "works" || !why.is_empty(), "no reason: {row}");
        assert!(
            state.starts_with("not") || !tests.is_empty(),
            "no test: {row}"
        );
        for name in tests.split('`').skip(1).step_by(2) {
            let registered = sources.contains(&format!("scenario(\"{name}\""))
                || sources.contains(&format!("fn{name}()"));
            assert!(registered, "there is no test {name}: {row}");
            seen += 1;
        }
    }
    assert!(seen > 20, "only {seen} tests named");
}

/// All documents of the repository.
fn documents() -> Vec<(String, String)> {
    let mut names: Vec<String> = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
        .map(str::to_owned)
        .into();
    for folder in ["docs", "tests", "fuzz"] {
        for entry in fs::read_dir(repository().join(folder)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name.ends_with(".md") {
                names.push(format!("{folder}/{name}"));
            }
        }
    }
    names.sort();
    assert!(names.len() > 12, "{names:?}");
    names
        .into_iter()
        .map(|name| (name.clone(), read(&name)))
        .collect()
}

/// Pieces of a text between two marks.
fn between<'a>(text: &'a str, start: &str, end: char) -> Vec<&'a str> {
    text.split(start)
        .skip(1)
        .filter_map(|rest| rest.split(end).next())
        .collect()
}

/// A heading as a link names it.
fn anchor(heading: &str) -> String {
    heading
        .trim_start_matches('#')
        .trim()
        .to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || *c == ' ' || *c == '-')
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

#[test]
fn test_links_lead_somewhere() {
    let mut seen = 0;
    for (name, text) in documents() {
        for link in between(&text, "](", ')') {
            if link.starts_with("http") {
                continue;
            }
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = match path {
                "" => repository().join(&name),
                _ => repository().join(&name).with_file_name("").join(path),
            };
            let there = fs::read_to_string(&target);
            assert!(
                there.is_ok() || target.is_dir(),
                "{name}: {link} leads nowhere"
            );
            let found = heading.is_empty()
                || there
                    .unwrap_or_default()
                    .lines()
                    .any(|line| line.starts_with('#') && anchor(line) == heading);
            assert!(found, "{name}: there is no heading {link}");
            seen += 1;
        }
    }
    assert!(seen > 20, "only {seen} links");
}

/// Targets of make, commands of guestsnap, numbers of messages and names of tests that documents speak of.
#[test]
fn test_what_documents_name_exists() {
    let makefile = read("Makefile");
    let help = read("packaging/guestsnap.8");
    let sources: String = files(&repository().join("src"))
        .into_iter()
        .chain(files(&repository().join("tests")))
        .filter(|path| path.extension().is_some_and(|e| e == "rs"))
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let codes: Vec<String> = Code::ALL.iter().map(ToString::to_string).collect();
    let word = |text: &str| -> String {
        text.chars()
            .take_while(|c| c.is_ascii_alphanumeric() || *c == '_' || *c == '-')
            .collect()
    };
    let mut seen = [0; 4];
    for (name, text) in documents() {
        let commands = ["`make ", "    make "].map(|start| between(&text, start, '\n'));
        for target in commands.concat() {
            let target = word(target);
            assert!(
                makefile.contains(&format!("\n{target}:")),
                "{name}: make {target}"
            );
            seen[0] += 1;
        }
        let commands = ["`guestsnap ", "    guestsnap "].map(|start| between(&text, start, '\n'));
        for command in commands.concat() {
            let command = word(command);
            let known = command.is_empty() || command == "COMMAND" || command.starts_with('-');
            assert!(
                known
                    || help.lines().any(|line| line == format!(".B {command}")
                        || line.starts_with(&format!(".B {command} \\f"))),
                "{name}: guestsnap {command}"
            );
            seen[1] += 1;
        }
        for number in between(&text, "GS-", ' ') {
            let number = word(number);
            let known = number == "nnn" || codes.contains(&format!("GS-{number}"));
            assert!(known || number.is_empty(), "{name}: GS-{number}");
            seen[2] += 1;
        }
        for test in text.split('`').skip(1).step_by(2) {
            let bare = match test.split_once('_') {
                Some(("vm", rest)) => rest
                    .trim_start_matches("bookworm_")
                    .trim_start_matches("trixie_"),
                Some(("root" | "test", _)) => test,
                _ => continue,
            };
            if bare.contains(['*', '<', '.', ' ', '/']) {
                continue;
            }
            let there = [
                format!("scenario(\"{bare}\""),
                format!("fn {bare}("),
                format!("\"{bare}\",\n"),
            ];
            assert!(
                there.iter().any(|t| sources.contains(t)),
                "{name}: there is no test {test}"
            );
            seen[3] += 1;
        }
    }
    assert!(seen.iter().all(|n| *n > 10), "{seen:?}");
}

#[test]
fn test_the_hardened_unit_leaves_what_is_needed() {
    let capabilities = |text: &str| -> BTreeSet<String> {
        text.split(|c: char| !c.is_ascii_uppercase() && c != '_')
            .filter(|word| word.starts_with("CAP_"))
            .map(str::to_owned)
            .collect()
    };
    let table = read("docs/reliability.md");
    let row = table
        .lines()
        .find(|l| l.starts_with("| `CapabilityBoundingSet=` |"));
    let needed = capabilities(row.expect("the row of the capabilities"));
    assert!(needed.len() > 9, "{needed:?}");
    assert_eq!(
        capabilities(&read("bacula-conf/systemd/hardened.conf")),
        needed
    );
}
