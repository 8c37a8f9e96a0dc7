//! `guestsnap`: the command-line tool. Shows the view and the plans of the plugin.
//!
//! All decisions are the plugin library's; this program only presents them.

#![forbid(unsafe_code)]

mod args;
mod check;
mod daemon;
mod host;
mod loaded;
mod look;
mod picture;
mod rebuild;
mod screen;
mod status;
mod who;

use std::io::Write as _;
use std::process::ExitCode;

use guestsnap::{Code, Error};
use serde_json::json;

use args::{Arguments, Command};
use screen::{Answer, Style, complain, problem};

fn main() -> ExitCode {
    let arguments = match Arguments::parse(std::env::args_os().skip(1)) {
        Ok(arguments) => arguments,
        Err(error) => {
            complain(&format!("{error}\nTry guestsnap --help."));
            return ExitCode::from(2);
        }
    };
    let good = run(&arguments).and_then(|answer| {
        print(&answer, &arguments)?;
        Ok(answer.errors.is_empty())
    });
    let good = good.unwrap_or_else(|error| {
        if arguments.json && error.code() != Code::OutputFailed {
            let failed = Answer {
                errors: vec![problem(&error)],
                ..Answer::default()
            };
            // The reader may be gone; the exit status carries the result.
            let _ = print(&failed, &arguments);
        } else {
            complain(&error.report());
        }
        false
    });
    ExitCode::from(u8::from(!good))
}

/// Prints an answer. A reader that closes the pipe early is no error.
fn print(answer: &Answer, arguments: &Arguments) -> guestsnap::Result<()> {
    let mut output = std::io::stdout();
    let written = match arguments.json {
        true => {
            let envelope = json!({
                "version": env!("CARGO_PKG_VERSION"),
                "command": arguments.name,
                "result": answer.json,
                "errors": answer.errors,
            });
            writeln!(output, "{}", without_controls(&format!("{envelope:#}")))
        }
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
    let client = || arguments.client();
    // Says so itself, among all else that it looks at.
    if !matches!(arguments.command, Command::Say(_) | Command::Check) {
        host::root()?;
    }
    Ok(match &arguments.command {
        Command::Say(text) => Answer {
            text: text.clone(),
            json: json!(text),
            errors: Vec::new(),
        },
        Command::List => host::list(&client()?, style)?,
        Command::Plan(text) => host::plan(text, &client()?, style)?,
        Command::Check => check::check(arguments, style),
        Command::Status { max_age } => status::status(*max_age, arguments, style)?,
        Command::Inspect(name) => look::inspect(name, arguments, style)?,
        Command::Ls {
            place,
            long,
            recursive,
        } => look::ls(place, *long, *recursive, arguments)?,
        Command::Cat(place) => look::cat(place, arguments)?,
        Command::Who(name) => who::who(name, &client()?, style)?,
        Command::Rebuild { kit, options } => rebuild::rebuild(kit, options, arguments)?,
        Command::Sweep { dry_run } => host::sweep(arguments, *dry_run)?,
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
