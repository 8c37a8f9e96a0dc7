//! `log` records to the daemon's log.
//!
//! Code below the job reports through errors. It logs only where no job can take an error
//! (a `Drop`, a sweep in the background): warnings and errors become daemon messages, the rest
//! debug messages.

use log::{Level, LevelFilter, Log, Metadata, Record};

use super::daemon;
use crate::job::Importance;

struct Bridge;

static BRIDGE: Bridge = Bridge;

/// Idempotent: the library stays mapped when the daemon loads it a second time.
pub fn install() {
    if log::set_logger(&BRIDGE).is_ok() {
        log::set_max_level(LevelFilter::Debug);
    }
    // The default hook writes to the daemon's stderr; ours is private to this library.
    std::panic::set_hook(Box::new(|info| {
        daemon::debug(&format!(
            "guestsnap: {info}\n{}",
            std::backtrace::Backtrace::force_capture()
        ));
    }));
}

impl Log for Bridge {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let text = record.args().to_string();
        match record.level() {
            Level::Error => daemon::daemon_message(Importance::Error, &text),
            Level::Warn => daemon::daemon_message(Importance::Warning, &text),
            _ if record.target().starts_with("guestsnap") => {
                daemon::debug(&format!("{}: {text}", record.target()));
            }
            _ => {}
        }
    }

    fn flush(&self) {}
}
