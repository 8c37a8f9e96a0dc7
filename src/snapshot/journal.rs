//! What a job is about to create, written down before it is created.

/// Names one job of one daemon, for tags, names and the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobTag {
    /// Bacula's JobId; 0 for estimates and the command line.
    pub job_id: u32,
}

/// The journal of one job.
#[derive(Debug)]
pub struct Journal {}
