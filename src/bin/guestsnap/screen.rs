//! Output, and the signals that stop the program.

use std::io::{IsTerminal, Write as _};
use std::sync::{Mutex, PoisonError};

use guestsnap::error::escape;
use guestsnap::job::{CancelFlag, Importance, Reporter};
use guestsnap::{Code, Error};
use nix::sys::signal::{SigSet, Signal};
use serde_json::{Value, json};

/// Result of a command.
#[derive(Debug, Default)]
pub struct Answer {
    pub text: String,
    /// `result` of the JSON.
    pub json: Value,
    /// Problems found, as JSON: [`problem`]. The exit status is 0 without any.
    pub errors: Vec<Value>,
}

/// An error as JSON: its code and text.
pub fn problem(error: &Error) -> Value {
    json!({ "code": error.code().to_string(), "text": error.report() })
}

/// An error of a guest, or of a definition without a guest's name.
pub fn problem_of(name: &str, error: &Error) -> Value {
    let mut row = problem(error);
    row["guest"] = json!(name);
    row
}

/// Terminal colours, or none.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    colours: bool,
}

impl Style {
    /// Style for standard output.
    pub fn of_stdout() -> Style {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        Style {
            colours: std::io::stdout().is_terminal() && !set("NO_COLOR") && !dumb,
        }
    }

    /// Style with or without colours.
    #[cfg(test)]
    pub fn with(colours: bool) -> Style {
        Style { colours }
    }

    fn paint(self, code: &str, text: &str) -> String {
        match self.colours {
            true => format!("\x1b[{code}m{text}\x1b[0m"),
            false => text.to_owned(),
        }
    }

    /// Marks an error.
    pub fn bad(self, text: &str) -> String {
        self.paint("1;31", text)
    }

    /// Marks success.
    pub fn good(self, text: &str) -> String {
        self.paint("32", text)
    }

    /// Marks a warning.
    pub fn warning(self, text: &str) -> String {
        self.paint("33", text)
    }

    /// A heading.
    pub fn heading(self, text: &str) -> String {
        self.paint("1", text)
    }
}

/// Prints a line on standard error.
pub fn complain(text: &str) {
    // A failed write to standard error has no other place to be reported.
    let _ = writeln!(std::io::stderr(), "guestsnap: {text}");
}

/// Collects the messages of a look, shows its progress, and carries the stop flag.
#[derive(Debug)]
pub struct Screen {
    cancel: CancelFlag,
    messages: Mutex<Vec<(Importance, String)>>,
    /// Whether standard error is a terminal.
    progress: bool,
}

impl Screen {
    /// Installs signal handlers: the first terminating signal sets [`Reporter::cancelled`], the
    /// second one kills the program. Call this before starting any thread.
    pub fn new() -> guestsnap::Result<Screen> {
        let mut signals = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            signals.add(signal);
        }
        let failed = |step| move |error| Error::new(Code::Internal, step).because(error);
        signals
            .thread_block()
            .map_err(|errno| failed("signals")(std::io::Error::from(errno)))?;
        let cancel = CancelFlag::default();
        let theirs = cancel.clone();
        std::thread::Builder::new()
            .spawn(move || {
                if signals.wait().is_ok() {
                    theirs.set();
                    complain("stopping: what was made is being removed");
                }
                if signals.wait().is_ok() {
                    complain("ended at once: `guestsnap sweep` removes what is left");
                    std::process::exit(1);
                }
            })
            .map_err(failed("starting a thread"))?;
        Ok(Screen {
            cancel,
            messages: Mutex::default(),
            progress: std::io::stderr().is_terminal(),
        })
    }

    /// Shows progress on a terminal.
    pub fn progress(&self, text: &str) {
        if self.progress {
            let text: String = escape(text.as_bytes()).chars().take(79).collect();
            let _ = write!(std::io::stderr(), "\r\x1b[K{text}");
        }
    }

    /// Clears the progress line.
    pub fn clear(&self) {
        if self.progress {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }

    /// Returns the messages since the last call.
    pub fn take(&self) -> Vec<(Importance, String)> {
        std::mem::take(&mut *self.messages.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Prints the messages since the last call that have at least this importance. Returns the
    /// errors among them, as JSON.
    pub fn tell(&self, least: Importance) -> Vec<Value> {
        self.clear();
        let mut errors = Vec::new();
        for (importance, text) in self.take() {
            if importance >= Importance::Error {
                errors.push(json!({ "text": escape(text.as_bytes()) }));
            }
            if importance < least {
                continue;
            }
            let mark = match importance {
                Importance::Info => "",
                Importance::Warning => "warning: ",
                Importance::Error | Importance::Fatal => "ERROR ",
            };
            complain(&format!("{mark}{}", escape(text.as_bytes())));
        }
        errors
    }
}

impl Reporter for Screen {
    fn message(&self, importance: Importance, message: &str) {
        self.progress(message);
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.push((importance, message.to_owned()));
    }

    fn cancelled(&self) -> bool {
        self.cancel.is_set()
    }
}
