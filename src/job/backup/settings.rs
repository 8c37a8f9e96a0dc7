//! The daemon's words for a backup.

use std::path::PathBuf;

/// The daemon's facts of the job.
#[derive(Debug, Clone)]
pub struct BackupSettings {
    /// Bacula's JobId; 0 for estimates.
    pub job_id: u32,
    /// Bacula's name of the job, with its time.
    pub job: String,
    /// Name of the job that this one adds to.
    pub previous: String,
    /// The daemon's working directory; ours is a folder in it.
    pub working_dir: PathBuf,
    /// A full backup: nothing is asked about changes.
    pub full: bool,
    /// Accurate mode: unchanged files must be marked.
    pub accurate: bool,
    /// Only names and sizes are wanted.
    pub estimate: bool,
    /// Incremental cut-off (seconds since 1970): older files are not read ahead. The daemon still decides
    /// which are sent.
    pub since: i64,
}
