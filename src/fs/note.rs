//! Lines for the job log.

/// Importance of a [`Note`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoteLevel {
    /// A decision worth recording.
    Info,
    /// All files are saved, but the administrator should look at it.
    Warning,
    /// Files may be missing from the backup, and the configuration does not ask for that.
    Error,
}

/// A line for the job log. The text is safe to print.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Importance.
    pub level: NoteLevel,
    /// The text.
    pub text: String,
}

impl Note {
    /// A decision worth recording.
    pub fn info(text: impl Into<String>) -> Note {
        Note {
            level: NoteLevel::Info,
            text: text.into(),
        }
    }

    /// A problem that loses no files.
    pub fn warning(text: impl Into<String>) -> Note {
        Note {
            level: NoteLevel::Warning,
            text: text.into(),
        }
    }

    /// Files that may be missing: the error's report, and the part missing from the backup.
    pub fn error(error: &crate::Error, rest: &str) -> Note {
        Note {
            level: NoteLevel::Error,
            text: format!("ERROR {}. {rest}", error.report()),
        }
    }
}
