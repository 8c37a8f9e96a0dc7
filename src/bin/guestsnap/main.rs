//! `guestsnap`: the command-line tool. Shows what the plugin sees and would do.
//!
//! All decisions are the plugin library's; this program only presents them.

#![forbid(unsafe_code)]

mod args;
mod check;
mod daemon;
mod host;
mod look;
mod picture;
mod screen;
mod who;

use std::io::Write as _;
use std::process::ExitCode;

use guestsnap::config::ClientFile;
use guestsnap::{Code, Error};
use serde_json::json;

use args::{Arguments, Command};
use screen::{Answer, Style, complain};

fn main() -> ExitCode {
    let arguments = match Arguments::parse(std::env::args_os().skip(1)) {
        Ok(arguments) => arguments,
        Err(error) => {
            complain(&format!("{error}\nTry guestsnap --help."));
            return ExitCode::from(2);
        }
    };
    let good = run(&arguments).and_then(|answer| {
        print(&answer, arguments.json)?;
        Ok(answer.good)
    });
    let good = good.unwrap_or_else(|error| {
        let report = error.report();
        if arguments.json && error.code() != Code::OutputFailed {
            let found = json!({ "error": report, "code": error.code().to_string() });
            // The reader may be gone; the exit status carries the result.
            let _ = writeln!(std::io::stdout(), "{found:#}");
        } else {
            complain(&report);
        }
        false
    });
    ExitCode::from(u8::from(!good))
}

/// Prints an answer. A reader that closes the pipe early is no error.
fn print(answer: &Answer, as_json: bool) -> guestsnap::Result<()> {
    let mut output = std::io::stdout();
    let written = match as_json {
        true => writeln!(
            output,
            "{}",
            without_controls(&format!("{:#}", answer.json))
        ),
        false => output.write_all(answer.text.as_bytes()),
    };
    match written.and_then(|()| output.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::new(Code::OutputFailed, "standard output").because(error))
        }
        _ => Ok(()),
    }
}

/// Escapes control characters from U+007F on, which JSON permits and terminals obey. Names come
/// from the guest. In JSON such characters occur in strings only.
fn without_controls(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '\u{7f}'..='\u{9f}' => text.push_str(&format!("\\u{:04x}", u32::from(c))),
            _ => text.push(c),
        }
    }
    text
}

fn run(arguments: &Arguments) -> guestsnap::Result<Answer> {
    let style = Style::of_stdout();
    let client = || ClientFile::load(&arguments.client_file);
    Ok(match &arguments.command {
        Command::Say(text) => Answer {
            text: text.clone(),
            json: json!(text),
            good: true,
        },
        Command::List => host::list(&client()?, style)?,
        Command::Plan(text) => host::plan(text, &client()?, style)?,
        Command::Check => check::check(arguments, style),
        Command::Inspect(name) => look::inspect(name, arguments, style)?,
        Command::Ls(place) => look::ls(place, arguments)?,
        Command::Cat(place) => look::cat(place, arguments)?,
        Command::Who(name) => who::who(name, &client()?, style)?,
        Command::Sweep { dry_run } => {
            host::root()?;
            host::sweep(arguments, *dry_run)?
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_json_holds_no_controls() {
        let json = serde_json::json!({ "label": "a\u{9b}31m\u{7f}ä\u{1b}" });
        let text = without_controls(&json.to_string());
        assert_eq!(text, r#"{"label":"a\u009b31m\u007fä\u001b"}"#);
        let back: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(back, json);
    }
}
