//! `status`: the last save of each guest, from the records that jobs leave.

use std::fmt::Write as _;
use std::time::UNIX_EPOCH;

use guestsnap::error::escape;
use guestsnap::job::{LastSave, last_saves, size_text};
use serde_json::{Value, json};

use crate::args::Arguments;
use crate::look::date;
use crate::screen::{Answer, Style};

pub fn status(
    max_age: Option<u64>,
    arguments: &Arguments,
    style: Style,
) -> guestsnap::Result<Answer> {
    let now = UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
    let saves = last_saves(&arguments.working_dir())?;
    Ok(answer(&saves, now, max_age, style))
}

fn answer(saves: &[LastSave], now: u64, max_age: Option<u64>, style: Style) -> Answer {
    let mut answer = Answer::default();
    let mut rows = Vec::new();
    for save in saves {
        let guest = escape(save.tree.trim_end_matches('/').as_bytes());
        let mut row = json!({ "guest": guest, "job": save.job, "absent": save.absent });
        let mut said = format!("{guest:<32} ");
        match &save.summary {
            None if save.absent => said.push_str("no record of its last save"),
            None => said.push_str("saved by an older version"),
            Some(summary) => {
                let age = now.saturating_sub(summary.ended);
                row["ended"] = json!(summary.ended);
                row["age_seconds"] = json!(age);
                row["full"] = json!(summary.full);
                row["files"] = json!(summary.files);
                row["bytes"] = json!(summary.bytes);
                row["errors"] = json!(summary.errors);
                row["consistency"] = json!(summary.consistency);
                let ended = i64::try_from(summary.ended).unwrap_or(i64::MAX);
                let _ = write!(
                    said,
                    "{} ({} h ago)  {} files, {}{}, {} errors, {}",
                    date(ended),
                    age / 3600,
                    summary.files,
                    size_text(summary.bytes),
                    if summary.full { " (full)" } else { "" },
                    summary.errors,
                    summary.consistency,
                );
            }
        }
        let found: Vec<Value> = problems(save, now, max_age)
            .into_iter()
            .map(|text| json!({ "guest": guest, "text": text }))
            .collect();
        let mark = match found.is_empty() {
            true => style.good("ok   "),
            false => style.bad("ERROR"),
        };
        let _ = writeln!(answer.text, "{mark} {said}");
        for problem in &found {
            let text = problem["text"].as_str().unwrap_or_default();
            let _ = writeln!(answer.text, "      {guest}: {text}");
        }
        answer.errors.extend(found);
        rows.push(row);
    }
    if saves.is_empty() {
        let text = "no job has saved a guest of this host yet";
        answer.errors.push(json!({ "text": text }));
        answer.text = format!("{} {text}\n", style.bad("ERROR"));
    }
    answer.json = json!(rows);
    answer
}

/// Reasons to look at a guest.
fn problems(save: &LastSave, now: u64, max_age: Option<u64>) -> Vec<String> {
    let mut found = Vec::new();
    if save.absent {
        found.push("the newest job has nothing of it: see that job's log".to_owned());
    }
    match &save.summary {
        None if max_age.is_some() => found.push("its age is not known".to_owned()),
        None => {}
        Some(summary) => {
            let age = now.saturating_sub(summary.ended);
            if summary.ended > now + 3600 {
                found
                    .push("its last save is dated in the future: see this host's clock".to_owned());
            }
            if let Some(most) = max_age.filter(|most| age > *most) {
                found.push(format!(
                    "its last save is {} h old, more than {} h",
                    age / 3600,
                    most / 3600
                ));
            }
            if summary.errors > 0 {
                found.push(format!(
                    "its last save has {} errors: see the log of {}",
                    summary.errors,
                    escape(save.job.as_bytes())
                ));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use guestsnap::job::Summary;

    use super::*;

    fn save(guest: &str, ended: u64, errors: u64) -> LastSave {
        LastSave {
            tree: format!("/@guestsnap/{guest}/"),
            job: "Nightly.2026-11-25_21.00.00_07".into(),
            summary: Some(Summary {
                ended,
                full: false,
                files: 12,
                bytes: 2048,
                errors,
                kit: Default::default(),
                consistency: "crash-consistent".into(),
            }),
            absent: false,
        }
    }

    #[test]
    fn test_what_is_worth_an_alarm() {
        let hour = 3600;
        let now = 100 * hour;
        let absent = LastSave {
            absent: true,
            ..save("gone", now - hour, 0)
        };
        let old = LastSave {
            summary: None,
            ..save("old", 0, 0)
        };
        let saves = [
            save("web", now - 5 * hour, 0),
            save("db", 0, 3),
            absent,
            old,
        ];
        let texts = |max_age| {
            let found = answer(&saves, now, max_age, Style::with(false));
            let texts = found.errors.iter().map(|e| {
                let guest = e["guest"].as_str().unwrap().rsplit('/').next().unwrap();
                format!("{guest}: {}", e["text"].as_str().unwrap())
            });
            texts.collect::<Vec<_>>()
        };
        let errors =
            "db: its last save has 3 errors: see the log of Nightly.2026-11-25_21.00.00_07";
        let gone = "gone: the newest job has nothing of it: see that job's log";
        assert_eq!(texts(None), [errors, gone]);
        assert_eq!(
            texts(Some(36 * hour)),
            [
                "db: its last save is 100 h old, more than 36 h",
                errors,
                gone,
                "old: its age is not known",
            ]
        );
        let early = answer(&saves[..1], now - 7 * hour, None, Style::with(false));
        assert!(
            early.errors[0]["text"]
                .as_str()
                .unwrap()
                .contains("in the future")
        );
        let found = answer(&saves[..1], now, Some(5 * hour), Style::with(false));
        assert!(found.errors.is_empty());
        assert_eq!(
            found.text,
            format!(
                "ok    {:<32} 1970-01-04 23:00:00 (5 h ago)  12 files, 2.0 KiB, 0 errors, crash-consistent\n",
                "/@guestsnap/web"
            )
        );
        assert_eq!(found.json[0]["age_seconds"], 5 * hour);
        assert_eq!(answer(&[], now, None, Style::with(false)).errors.len(), 1);
    }
}
