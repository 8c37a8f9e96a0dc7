//! Limits of reading ahead.

use crate::config::defaults;

/// Limits of reading ahead.
#[derive(Debug, Clone)]
pub struct AheadOptions {
    /// Maximum bytes of queued results.
    pub budget: usize,
    /// Reading threads, besides the walking one; at least one is used.
    pub threads: usize,
    /// Incremental cut-off, in seconds since 1970: contents and attributes of objects unchanged
    /// since then are not read ahead. They are rarely requested; if they are, they are read then.
    pub changed_since: Option<i64>,
    /// Never read contents and attributes ahead: an estimate requests neither.
    pub names_only: bool,
}

impl Default for AheadOptions {
    fn default() -> Self {
        AheadOptions {
            budget: defaults::READ_AHEAD,
            threads: defaults::READERS,
            changed_since: None,
            names_only: false,
        }
    }
}
