//! A private Bacula: Director, Storage Daemon and File Daemon of the installed packages, with their own catalog (SQLite),
//! ports, folders and configuration, all in one temporary folder. Works with 9.6 (Debian 12) and 15.0 (Debian 13).

use super::hoststate::{HostState, Scope};
use super::workdir::WorkDir;
use super::{Result, cmd};
use crate::{check, fail};
use std::fmt::Write as _;
use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// For the FileDaemon resource where [`Bacula::start_slow`] is used: zeros would be compressed, and only what is left of them
/// counts for the limit.
pub const UNCOMPRESSED: &str = "Comm Compression = no";
/// A job that has not ended by then is a failed test.
pub const JOB_LIMIT: Duration = Duration::from_secs(900);
const PASSWORD: &str = "bed-password";

/// Settings of the three daemons.
#[derive(Clone, Debug, Default)]
pub struct BaculaOptions {
    /// The plugin; copied (the daemon ignores symbolic links) to `guestsnap-fd.so` in a plugin folder of its own.
    pub plugin_so: Option<PathBuf>,
    /// FileSets: name and what stands between `FileSet { Name = …` and its closing brace, see [`fileset_plugin`] and
    /// [`fileset_files`].
    pub filesets: Vec<(String, String)>,
    /// More arguments for the File Daemon (`-d 100`).
    pub fd_args: Vec<String>,
    /// More environment for the File Daemon.
    pub fd_env: Vec<(String, String)>,
    /// The client file. The daemon then runs in a mount namespace of its own where `/etc/bacula` holds
    /// just this: nothing of the machine's own configuration is touched.
    pub client_file: Option<String>,
    /// More lines for the FileDaemon resource.
    pub fd_conf: String,
    /// More lines for the backup job.
    pub job_conf: String,
    /// More resources for the Director.
    pub dir_conf: String,
    /// More plugins to copy beside ours: file and its name in the plugin folder.
    pub more_plugins: Vec<(PathBuf, String)>,
    /// The File Daemon is the machine's own service `bacula-fd`, with Debian's folders, which this trio takes over
    /// (so in an emulated machine only). `plugin_so`, `fd_args`, `fd_env`, `client_file` are not for it.
    pub service: bool,
}

/// Text of a FileSet with one `Plugin =` line.
pub fn fileset_plugin(directive: &str) -> String {
    format!(
        "Include {{\n    Options {{ signature = MD5 }}\n    Plugin = \"{}\"\n  }}",
        directive.replace('"', "\\\"")
    )
}

/// Text of a FileSet with `File =` lines, ACL and xattr support on.
pub fn fileset_files(paths: &[&Path]) -> String {
    let mut text = String::from(
        "Include {\n    Options { signature = MD5; aclsupport = yes; xattrsupport = yes; sparse = yes; onefs = no }\n",
    );
    for path in paths {
        let _ = writeln!(text, "    File = \"{}\"", path.display());
    }
    text + "  }"
}

/// How a job ended.
#[derive(Clone, Debug)]
pub struct JobResult {
    /// Its number.
    pub jobid: u32,
    /// The catalog's JobStatus: `T` ended well (see `errors`), `W` with warnings, `E` errors, `f` fatal, `A` cancelled.
    pub status: char,
    /// The whole job log.
    pub log: String,
    /// JobFiles.
    pub files: u64,
    /// JobBytes.
    pub bytes: u64,
    /// JobErrors.
    pub errors: u64,
    /// From the question to the end of the job.
    pub seconds: f64,
}

impl JobResult {
    /// Status T, no errors counted.
    pub fn is_clean(&self) -> bool {
        self.status == 'T' && self.errors == 0
    }

    /// Fails with the job log unless the job ended well and without an error.
    pub fn clean(self) -> Result<Self> {
        if !self.is_clean() {
            fail!(
                "job {} ended with status {}, {} errors:\n{}",
                self.jobid,
                self.status,
                self.errors,
                self.log
            );
        }
        Ok(self)
    }
}

/// Selection of files to restore.
#[derive(Clone, Debug)]
pub enum Selection {
    /// All that it saved.
    All,
    /// These paths, as they are in the catalog; hard link partners come along by the Director's own rule.
    Files(Vec<String>),
    /// One directory with all below it.
    Dir(String),
}

/// A cancel must be answered within this time (half a second is the console's). In the emulated machine, where all
/// programs take several times as long (up to 6 s were seen), the removal of a snapshot by LVM is in it too.
pub fn answer() -> Duration {
    match super::inside::is_inside() {
        true => Duration::from_secs(10),
        false => Duration::from_millis(2500),
    }
}

/// A running trio. Dropping it ends the daemons and removes everything.
#[derive(Debug)]
pub struct Bacula {
    dir: WorkDir,
    options: BaculaOptions,
    ports: [u16; 3],
    dir_child: Option<Child>,
    sd_child: Option<Child>,
    fd_child: Option<Child>,
    /// Threads of the File Daemon before its first connection, without the plugin's.
    resting_threads: usize,
}

impl Bacula {
    /// Starts the three daemons and waits until they listen.
    pub fn start(options: BaculaOptions) -> Result<Self> {
        let dir = WorkDir::new()?;
        for sub in ["dir", "sd", "fd", "volumes", "plugins", "run"] {
            std::fs::create_dir(dir.join(sub))?;
        }
        if let Some(so) = &options.plugin_so {
            copy_plugin(so, &dir.join("plugins/guestsnap-fd.so"))?;
        }
        for (so, name) in &options.more_plugins {
            copy_plugin(so, &dir.join("plugins").join(name))?;
        }
        create_catalog(&dir.join("dir/bacula.db"))?;
        let mut bacula = Self {
            dir,
            options,
            ports: free_ports()?,
            dir_child: None,
            sd_child: None,
            fd_child: None,
            resting_threads: 0,
        };
        bacula.write_configuration()?;
        bacula.sd_child = Some(bacula.spawn("sd", &[])?);
        bacula.start_fd()?;
        bacula.dir_child = Some(bacula.spawn("dir", &[])?);
        bacula.wait_listening(1)?;
        bacula.wait_listening(0)?;
        Ok(bacula)
    }

    /// The folder everything lies in; free for the test's own files too.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The File Daemon's working directory.
    pub fn fd_working_dir(&self) -> PathBuf {
        match self.options.service {
            true => "/var/lib/bacula".into(),
            false => self.dir.join("fd"),
        }
    }

    /// Process id of the File Daemon.
    pub fn fd_pid(&self) -> Option<i32> {
        if self.options.service {
            let pid = cmd::run("systemctl", ["show", "-P", "MainPID", "bacula-fd"]).ok()?;
            return pid.trim().parse().ok().filter(|pid| *pid > 0);
        }
        self.fd_child.as_ref().map(|c| c.id() as i32)
    }

    /// The File Daemon's part for [`HostState::capture_scope`].
    pub fn scope(&self) -> Scope {
        Scope {
            fd_pid: self.fd_pid(),
            working_dir: Some(self.fd_working_dir()),
        }
    }

    /// The host's state with this File Daemon, taken when it has come to rest after a connection.
    pub fn host_state(&self) -> Result<HostState> {
        let scope = self.scope();
        if scope.rests(self.resting_threads)? {
            return HostState::capture_scope(&scope);
        }
        fail!(
            "the File Daemon does not come to rest: {} threads before its first connection\n{}",
            self.resting_threads,
            self.daemon_output()
        )
    }

    /// Fails if the host's state differs from the one before after the settle time.
    pub fn check_host_state(&self, before: &HostState) -> Result {
        let lines = HostState::settled_diff(before, &self.scope())?;
        check!(
            lines.is_empty(),
            "left behind on the host:\n  {}",
            lines.join("\n  ")
        );
        Ok(())
    }

    /// All messages of the daemons, and what they printed.
    pub fn daemon_output(&self) -> String {
        let mut text = String::new();
        for name in ["messages", "dir.out", "sd.out", "fd.out"] {
            let body = std::fs::read(self.dir.join(name)).unwrap_or_default();
            let _ = writeln!(text, "--- {name}\n{}", String::from_utf8_lossy(&body));
        }
        text
    }

    /// Version of the installed Bacula, as `bacula-fd -?` says it ("9.6.7", "15.0.3").
    pub fn version() -> Result<String> {
        let out = cmd::command("/usr/sbin/bacula-fd").arg("-?").output()?;
        let text = String::from_utf8_lossy(&out.stderr).into_owned()
            + &String::from_utf8_lossy(&out.stdout);
        let version = text
            .split("ersion: ")
            .nth(1)
            .and_then(|t| t.split_whitespace().next());
        Ok(version
            .ok_or_else(|| format!("no version in: {text}"))?
            .to_string())
    }

    /// Feeds lines to bconsole; all it printed.
    pub fn console(&self, commands: &str) -> Result<String> {
        let conf = self.dir.join("bconsole.conf");
        // Messages of jobs are read from the catalog; here they would only stand between the answers.
        let input = format!("gui on\n{commands}\nquit\n");
        let mut command = cmd::command("timeout");
        command.args(["900", "bconsole", "-n", "-c"]).arg(&conf);
        cmd::output(command, Some(input.as_bytes()))
            .map_err(|e| format!("{}\n{}", super::message(&e), self.daemon_output()).into())
    }

    /// Runs a backup to its end. Level: `Full`, `Incremental`, `Differential`, or more words of the run command
    /// (`"Incremental accurate=yes"`).
    pub fn run_backup(&self, fileset: &str, level: &str) -> Result<JobResult> {
        let started = Instant::now();
        let jobid = self.start_backup(fileset, level)?;
        let mut result = self.wait_job(jobid)?;
        result.seconds = started.elapsed().as_secs_f64();
        Ok(result)
    }

    /// Starts a backup and returns its JobId at once.
    pub fn start_backup(&self, fileset: &str, level: &str) -> Result<u32> {
        self.queued(&format!(
            "run job=backup fileset=\"{fileset}\" level={level} yes"
        ))
    }

    /// Starts a full backup of 1 MiB a second and returns its JobId at once: one that is held open by a large file leaves the
    /// processor to others.
    pub fn start_slow(&self, fileset: &str) -> Result<u32> {
        self.queued(&format!(
            "run job=slow fileset=\"{fileset}\" level=Full yes"
        ))
    }

    /// Feeds commands that queue a job; its JobId.
    pub fn queued(&self, commands: &str) -> Result<u32> {
        let out = self.console(commands)?;
        let id = out.split("JobId=").skip(1).filter_map(|t| {
            t.chars()
                .take_while(char::is_ascii_digit)
                .collect::<String>()
                .parse::<u32>()
                .ok()
        });
        // The restore command's echo holds other JobIds before the one that was queued.
        let queued = out.contains("Job queued");
        match id.last() {
            Some(id) if queued => Ok(id),
            _ => Err(format!("no job was queued by:\n{commands}\n{out}").into()),
        }
    }

    /// Waits until the job has ended and its log is complete.
    pub fn wait_job(&self, jobid: u32) -> Result<JobResult> {
        self.wait_job_limit(jobid, JOB_LIMIT)
    }

    /// Like [`Self::wait_job`], with another time limit.
    pub fn wait_job_limit(&self, jobid: u32, limit: Duration) -> Result<JobResult> {
        let started = Instant::now();
        // The summary is the last message of a job; every message is appended to the file when it is made.
        let mark = format!("JobId:                  {jobid}\n");
        let found = cmd::wait_for(&format!("the end of job {jobid}"), limit, || {
            let bytes = std::fs::read(self.dir.join("messages")).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes);
            Ok(text
                .split(&mark)
                .nth(1)
                .is_some_and(|rest| rest.contains("Termination: "))
                .then_some(()))
        });
        if let Err(e) = found {
            fail!(
                "{}\n{}\n{}",
                super::message(&e),
                self.status_client().unwrap_or_default(),
                self.daemon_output()
            );
        }
        let sql =
            format!("select JobStatus, JobFiles, JobBytes, JobErrors from Job where JobId={jobid}");
        let row = cmd::wait_for(
            "the job's last status in the catalog",
            Duration::from_secs(20),
            || {
                let rows = self.sql(&sql)?;
                let row = rows.first().cloned().ok_or("no such job in the catalog")?;
                let status = row["JobStatus"].as_str().unwrap_or("?").to_string();
                Ok((!matches!(status.as_str(), "C" | "R" | "l" | "L" | "i" | "a")).then_some(row))
            },
        )?;
        Ok(JobResult {
            jobid,
            status: row["JobStatus"]
                .as_str()
                .and_then(|s| s.chars().next())
                .unwrap_or('?'),
            files: row["JobFiles"].as_u64().unwrap_or(0),
            bytes: row["JobBytes"].as_u64().unwrap_or(0),
            errors: row["JobErrors"].as_u64().unwrap_or(0),
            log: self.job_log(jobid)?,
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    /// The job log as far as it is written.
    pub fn job_log(&self, jobid: u32) -> Result<String> {
        // Hexadecimal digits, because messages may hold bytes that are no UTF-8.
        let rows = self.sql(&format!(
            "select hex(LogText) as Hex from Log where JobId={jobid} order by LogId"
        ))?;
        let mut log = String::new();
        for text in rows.iter().filter_map(|r| unhex(r["Hex"].as_str()?)) {
            // The Director's SQLite escaping leaves a backslash behind each message.
            let text = String::from_utf8_lossy(&text);
            log += text.strip_suffix('\\').unwrap_or(&text);
        }
        Ok(log)
    }

    /// Cancels a running job (does not wait for its end).
    pub fn cancel(&self, jobid: u32) -> Result<String> {
        self.console(&format!("cancel jobid={jobid} yes"))
    }

    /// Cancels a job, which must end as cancelled; how long our part of it took to end.
    pub fn cancel_timed(&self, jobid: u32) -> Result<Duration> {
        let pid = self.fd_pid().ok_or("no File Daemon")?;
        // The thread that each backup has.
        self.cancel_until(jobid, || Ok(!has_thread(pid, "(guestsnap-fill)")?))
    }

    /// Cancels a job where another fact tells that our part is over.
    pub fn cancel_until(&self, jobid: u32, over: impl Fn() -> Result<bool>) -> Result<Duration> {
        let asked = Instant::now();
        self.cancel(jobid)?;
        self.wait_over(jobid, asked, over)
    }

    /// Cancels a job while the Storage Daemon is held, which the Director's cancel waits for. Lets it go on.
    pub fn cancel_held(&self, jobid: u32, over: impl Fn() -> Result<bool>) -> Result<Duration> {
        let asked = Instant::now();
        std::thread::scope(|scope| {
            let cancel = scope.spawn(|| self.cancel(jobid));
            let ended = cmd::wait_for("the end of the job", Duration::from_secs(60), || {
                Ok(over()?.then(|| asked.elapsed()))
            });
            self.let_sd_go()?;
            cancel.join().map_err(|_| "the cancel panicked")??;
            self.wait_over(jobid, asked, over)?;
            ended
        })
    }

    fn wait_over(
        &self,
        jobid: u32,
        asked: Instant,
        over: impl Fn() -> Result<bool>,
    ) -> Result<Duration> {
        // The Director ends its part without waiting for the File Daemon, and that one waits for the heartbeat of a
        // connection that is gone (10 s) when ours is over.
        cmd::wait_for("the end of the job", Duration::from_secs(60), || {
            Ok(over()?.then_some(()))
        })?;
        let took = asked.elapsed();
        let result = self.wait_job(jobid)?;
        println!(
            "{}\nended {:.2} s after the cancel",
            result.log,
            took.as_secs_f64()
        );
        check!(
            result.status == 'A',
            "status {} after a cancel:\n{}",
            result.status,
            result.log
        );
        Ok(took)
    }

    /// Cancels a job, which must end at once and as cancelled, and leave the host as it was.
    pub fn cancel_cleanly(&self, jobid: u32, before: &HostState) -> Result {
        let took = self.cancel_timed(jobid)?;
        check!(
            took < answer(),
            "the job ended {:.2} s after its cancel",
            took.as_secs_f64()
        );
        self.check_host_state(before)
    }

    /// Waits until the File Daemon does not run the job any more.
    pub fn wait_ended(&self, jobid: u32) -> Result {
        let running = format!("JobId {jobid} Job ");
        let what = "the daemon's end of the job";
        cmd::wait_for(what, Duration::from_secs(60), || {
            Ok((!self.status_client()?.contains(&running)).then_some(()))
        })
    }

    /// Waits until the job log of a running job holds the text.
    pub fn wait_log(&self, jobid: u32, text: &str, limit: Duration) -> Result {
        let mark = format!("JobId {jobid}: ");
        cmd::wait_for(
            &format!("{text:?} in the log of job {jobid}"),
            limit,
            || {
                let bytes = std::fs::read(self.dir.join("messages")).unwrap_or_default();
                let log = String::from_utf8_lossy(&bytes);
                Ok(log
                    .lines()
                    .any(|l| l.contains(&mark) && l.contains(text))
                    .then_some(()))
            },
        )
        .map_err(|e| format!("{}\n{}", super::message(&e), self.daemon_output()).into())
    }

    /// `estimate listing` of a FileSet.
    pub fn estimate(&self, fileset: &str, level: &str) -> Result<String> {
        self.console(&format!(
            "estimate job=backup fileset=\"{fileset}\" level={level} listing"
        ))
    }

    /// Restores below a folder and waits for the end.
    pub fn restore(&self, jobid: u32, selection: &Selection, where_: &Path) -> Result<JobResult> {
        self.restore_with(jobid, selection, where_, "replace=always")
    }

    /// Like [`Self::restore`], with more words for the restore command.
    pub fn restore_with(
        &self,
        jobid: u32,
        selection: &Selection,
        where_: &Path,
        more: &str,
    ) -> Result<JobResult> {
        let queued = self.start_restore(jobid, selection, where_, more)?;
        self.wait_job(queued)
    }

    /// Starts a restore; its JobId at once.
    pub fn start_restore(
        &self,
        jobid: u32,
        selection: &Selection,
        where_: &Path,
        more: &str,
    ) -> Result<u32> {
        let head = format!(
            "restore client=bed-fd restorejob=restore fileset=\"{}\" jobid={jobid} where=\"{}\" {more}",
            self.fileset_of(jobid)?,
            where_.display()
        );
        self.queued(&match selection {
            Selection::All => format!("{head} all done yes"),
            Selection::Dir(path) => {
                let path = path.trim_end_matches('/');
                let (parent, name) = path
                    .rsplit_once('/')
                    .ok_or("a directory path holds a slash")?;
                let parent = if parent.is_empty() { "/" } else { parent };
                // Not `select`, which takes the last full backup whatever the JobId.
                format!("{head}\ncd \"{parent}\"\nmark \"{name}\"\ndone\nyes")
            }
            Selection::Files(paths) => {
                let list = self.dir.join(format!("restore-list.{jobid}"));
                std::fs::write(
                    &list,
                    paths.iter().map(|p| format!("{p}\n")).collect::<String>(),
                )?;
                format!("{head} file=\"<{}\" yes", list.display())
            }
        })
    }

    fn fileset_of(&self, jobid: u32) -> Result<String> {
        let rows = self.sql(&format!(
            "select FileSet.FileSet as Name from Job join FileSet on Job.FileSetId=FileSet.FileSetId where JobId={jobid}"
        ))?;
        Ok(rows
            .first()
            .and_then(|r| r["Name"].as_str())
            .ok_or("the job has no FileSet")?
            .to_string())
    }

    /// Starts a restore with answers to the plugin's own questions; returns its JobId.
    pub fn start_restore_with_options(&self, words: &str, answers: &[(&str, &str)]) -> Result<u32> {
        // In the order of the questions, counted from 1.
        let keys = ["acl", "xattr", "owner", "strip", "into"];
        let mut words = format!("restore client=bed-fd restorejob=restore {words}\nmod\n13\n");
        for (key, value) in answers {
            let at = keys.iter().position(|k| k == key);
            let at = at.ok_or("no such question")? + 1;
            words += &format!("mod\n{at}\n{value}\n");
        }
        self.queued(&format!("{words}yes\nyes"))
    }

    /// Paths of a job in the catalog, in the order they were sent; bytes that are no UTF-8 are replaced.
    pub fn list_files(&self, jobid: u32) -> Result<Vec<String>> {
        Ok(self
            .list_files_raw(jobid)?
            .iter()
            .map(|p| String::from_utf8_lossy(p).into_owned())
            .collect())
    }

    /// Paths of a job in the catalog as bytes.
    pub fn list_files_raw(&self, jobid: u32) -> Result<Vec<Vec<u8>>> {
        self.paths(jobid, "FileIndex > 0 order by FileIndex")
    }

    /// Paths that a job records as deleted.
    pub fn deleted(&self, jobid: u32) -> Result<Vec<String>> {
        let paths = self.paths(jobid, "FileIndex <= 0")?;
        let texts = paths.iter().map(|path| String::from_utf8_lossy(path));
        Ok(texts.map(|text| text.into_owned()).collect())
    }

    fn paths(&self, jobid: u32, which: &str) -> Result<Vec<Vec<u8>>> {
        let old = !self
            .sql("select name from sqlite_master where type='table' and name='Filename'")?
            .is_empty();
        let (name, join) = match old {
            true => (
                "Filename.Name",
                "join Filename on File.FilenameId=Filename.FilenameId",
            ),
            false => ("File.Filename", ""),
        };
        let rows = self.sql(&format!(
            "select hex(Path.Path) || hex({name}) as Hex from File join Path on File.PathId=Path.PathId {join} \
             where JobId={jobid} and {which}"
        ))?;
        rows.iter()
            .map(|r| {
                r["Hex"]
                    .as_str()
                    .and_then(unhex)
                    .ok_or_else(|| "bad path in the catalog".into())
            })
            .collect()
    }

    /// Waits until the File Daemon says that it is at a file of this name. (What a job says reaches its log when the
    /// Director gets round to it, which may be at the job's end.)
    pub fn wait_processing(&self, name: &str, limit: Duration) -> Result {
        cmd::wait_for(&format!("{name} to be read"), limit, || {
            Ok(self.status_client()?.contains(name).then_some(()))
        })
    }

    /// `status client`.
    pub fn status_client(&self) -> Result<String> {
        self.console("status client=bed-fd")
    }

    /// A query on the catalog; rows as JSON objects.
    pub fn sql(&self, query: &str) -> Result<Vec<serde_json::Value>> {
        let db = self.dir.join("dir/bacula.db");
        let out = cmd::run(
            "sqlite3",
            [
                "-readonly",
                "-json",
                "-cmd",
                ".timeout 30000",
                &db.display().to_string(),
                query,
            ],
        )?;
        if out.trim().is_empty() {
            return Ok(Vec::new());
        }
        Ok(serde_json::from_str(&out).map_err(|e| format!("{e} in {out}"))?)
    }

    /// Stops the File Daemon in order (SIGTERM, so that the plugin is unloaded) and starts it again.
    pub fn restart_fd(&mut self) -> Result {
        if let Some(child) = self.fd_child.take() {
            stop(child, Duration::from_secs(30));
        }
        self.start_fd()
    }

    /// Kills the File Daemon (SIGKILL). Start it again with [`Self::restart_fd`].
    pub fn kill_fd(&mut self) -> Result {
        if let Some(mut child) = self.fd_child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Adds FileSets (or replaces those of the same name) in the running Director.
    pub fn set_filesets(&mut self, filesets: &[(&str, String)]) -> Result {
        for (name, text) in filesets {
            self.options.filesets.retain(|(n, _)| n != name);
            self.options.filesets.push((name.to_string(), text.clone()));
        }
        self.write_configuration()?;
        let out = self.console("reload")?;
        check!(
            !out.contains("rror"),
            "the Director refused the new FileSets:\n{out}\n{}",
            self.daemon_output()
        );
        Ok(())
    }

    /// Whether the Director's parser takes a FileSet of this text.
    pub fn parses(&self, text: &str) -> Result<bool> {
        let mut conf = std::fs::read_to_string(self.dir.join("bacula-dir.conf"))?;
        let _ = writeln!(conf, "FileSet {{\n  Name = \"parsed\"\n  {text}\n}}");
        let file = self.dir.join("parsed.conf");
        std::fs::write(&file, conf)?;
        let mut command = cmd::command("/usr/sbin/bacula-dir");
        let out = command.arg("-t").arg("-c").arg(file).output()?;
        Ok(out.status.success())
    }

    fn start_fd(&mut self) -> Result {
        if self.options.service {
            std::fs::copy(
                self.dir.join("bacula-fd.conf"),
                "/etc/bacula/bacula-fd.conf",
            )?;
            cmd::run("systemctl", ["restart", "bacula-fd"])?;
            return self.wait_listening(2);
        }
        let args = self.options.fd_args.clone();
        self.fd_child = Some(self.spawn("fd", &args)?);
        self.wait_listening(2)
    }

    fn spawn(&self, which: &str, args: &[String]) -> Result<Child> {
        let out = File::options()
            .create(true)
            .append(true)
            .open(self.dir.join(format!("{which}.out")))?;
        let daemon = format!("/usr/sbin/bacula-{which}");
        let mut command: Command = match &self.options.client_file {
            Some(text) if which == "fd" => {
                let etc = self.dir.join("etc");
                std::fs::create_dir_all(&etc)?;
                std::fs::write(etc.join("guestsnap.toml"), text)?;
                let mut command = cmd::command("unshare");
                let script = r#"mount --bind "$1" /etc/bacula && shift && exec "$@""#;
                // Mounts that the test makes later are seen in there too.
                command
                    .args(["-m", "--propagation", "slave"])
                    .args(["sh", "-c", script, "sh"])
                    .arg(etc)
                    .arg(daemon);
                command
            }
            _ => cmd::command(&daemon),
        };
        command
            .arg("-f")
            .args(args)
            .arg("-c")
            .arg(self.dir.join(format!("bacula-{which}.conf")));
        if which == "fd" {
            command.envs(self.options.fd_env.iter().cloned());
        }
        command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .current_dir(self.dir.path());
        Ok(command
            .spawn()
            .map_err(|e| format!("bacula-{which}: {e}"))?)
    }

    fn wait_listening(&mut self, which: usize) -> Result {
        let port = self.ports[which];
        let name = ["bacula-dir", "bacula-sd", "bacula-fd"][which];
        let child = match which {
            0 => &mut self.dir_child,
            1 => &mut self.sd_child,
            _ => &mut self.fd_child,
        };
        let waited = cmd::wait_for(
            &format!("{name} to listen"),
            Duration::from_secs(90),
            || {
                if let Some(status) = child.as_mut().map(Child::try_wait).transpose()?.flatten() {
                    return Err(format!("{name} ended at once: {status}").into());
                }
                Ok(is_listening(port)?.then_some(()))
            },
        );
        if let (2, Some(pid)) = (which, self.fd_pid()) {
            // The plugin sweeps in a thread at the start, which has no name in its first moment.
            std::thread::sleep(Duration::from_millis(50));
            let plugin = |name: &String| name.starts_with("guestsnap");
            let threads = super::hoststate::threads(pid)?;
            self.resting_threads = threads.iter().filter(|name| !plugin(name)).count();
        }
        match waited {
            Ok(()) => Ok(()),
            Err(e) => fail!("{}\n{}", super::message(&e), self.daemon_output()),
        }
    }

    fn write_configuration(&self) -> Result {
        for (name, text) in [
            ("bacula-dir.conf", self.director_conf() + &self.jobs_conf()),
            ("bacula-sd.conf", self.storage_conf()),
            ("bacula-fd.conf", self.file_daemon_conf()),
            ("bconsole.conf", self.console_conf()),
            ("query.sql", String::new()),
        ] {
            std::fs::write(self.dir.join(name), text)?;
        }
        Ok(())
    }

    /// The Director, whom it knows, and the filesets.
    fn director_conf(&self) -> String {
        let dir = self.dir.path().display();
        let [dir_port, sd_port, fd_port] = self.ports;
        let mut text = format!(
            r#"Director {{
  Name = bed-dir
  DirPort = {dir_port}
  DirAddress = 127.0.0.1
  QueryFile = "{dir}/query.sql"
  WorkingDirectory = "{dir}/dir"
  PidDirectory = "{dir}/run"
  Maximum Concurrent Jobs = 20
  Password = "{PASSWORD}"
  Messages = Standard
}}
Catalog {{
  Name = MyCatalog
  dbname = "bacula"; dbuser = ""; dbpassword = ""
}}
Client {{
  Name = bed-fd
  Address = 127.0.0.1
  FDPort = {fd_port}
  Catalog = MyCatalog
  Password = "{PASSWORD}"
  Maximum Concurrent Jobs = 20
  AutoPrune = no
}}
Storage {{
  Name = bed-sd
  Address = 127.0.0.1
  SDPort = {sd_port}
  Password = "{PASSWORD}"
  Device = Changer
  Autochanger = yes
  Media Type = File
  Maximum Concurrent Jobs = 20
}}
Pool {{
  Name = Default
  Pool Type = Backup
  Recycle = no
  AutoPrune = no
  Label Format = "vol-"
  Maximum Volume Jobs = 1
}}
Messages {{
  Name = Standard
  console = all, !skipped, !saved, !restored
  append = "{dir}/messages" = all, !skipped, !restored
  catalog = all, !skipped, !restored
}}
FileSet {{
  Name = Empty
  Include {{
    Options {{ signature = MD5 }}
    File = "{dir}/bacula-fd.conf"
  }}
}}
"#
        );
        for (name, fileset) in &self.options.filesets {
            let _ = writeln!(text, "FileSet {{\n  Name = \"{name}\"\n  {fileset}\n}}");
        }
        text
    }

    fn jobs_conf(&self) -> String {
        let dir = self.dir.path().display();
        let more = &self.options.job_conf;
        format!(
            r#"Job {{
  Name = backup
  Type = Backup
  Level = Full
  Client = bed-fd
  FileSet = Empty
  Storage = bed-sd
  Messages = Standard
  Pool = Default
  Maximum Concurrent Jobs = 10
  Allow Duplicate Jobs = yes
  {more}
}}
Job {{
  Name = slow
  Type = Backup
  Level = Full
  Client = bed-fd
  FileSet = Empty
  Storage = bed-sd
  Messages = Standard
  Pool = Default
  Maximum Bandwidth = 1 mb/s
}}
Job {{
  Name = restore
  Type = Restore
  Client = bed-fd
  FileSet = Empty
  Storage = bed-sd
  Messages = Standard
  Pool = Default
  Maximum Concurrent Jobs = 10
  Where = "{dir}/restored"
}}
Job {{
  Name = restore-prefix-links
  Type = Restore
  Client = bed-fd
  FileSet = Empty
  Storage = bed-sd
  Messages = Standard
  Pool = Default
  Maximum Concurrent Jobs = 10
  Where = "{dir}/restored"
  Prefix Links = yes
}}
Job {{
  Name = based
  Type = Backup
  Level = Full
  Base = backup
  Accurate = yes
  Client = bed-fd
  FileSet = Empty
  Storage = bed-sd
  Messages = Standard
  Pool = Default
}}
Job {{
  Name = verify
  Type = Verify
  Level = VolumeToCatalog
  Client = bed-fd
  FileSet = Empty
  Storage = bed-sd
  Messages = Standard
  Pool = Default
}}
{}
"#,
            self.options.dir_conf
        )
    }

    fn storage_conf(&self) -> String {
        let dir = self.dir.path().display();
        let [_, sd_port, _] = self.ports;
        let mut storage = format!(
            r#"Storage {{
  Name = bed-sd
  SDPort = {sd_port}
  SDAddress = 127.0.0.1
  WorkingDirectory = "{dir}/sd"
  Pid Directory = "{dir}/run"
  Maximum Concurrent Jobs = 20
}}
Director {{
  Name = bed-dir
  Password = "{PASSWORD}"
}}
Messages {{
  Name = Standard
  director = bed-dir = all
}}
Autochanger {{
  Name = Changer
  Device = Device1, Device2, Device3, Device4
  Changer Command = ""
  Changer Device = /dev/null
}}
"#
        );
        for n in 1..=4 {
            let _ = writeln!(
                storage,
                "Device {{\n  Name = Device{n}\n  Media Type = File\n  Archive Device = \"{dir}/volumes\"\n  \
                 LabelMedia = yes\n  Random Access = yes\n  AutomaticMount = yes\n  RemovableMedia = no\n  \
                 AlwaysOpen = no\n  Autochanger = yes\n  Drive Index = {}\n  Maximum Concurrent Jobs = 5\n}}",
                n - 1
            );
        }
        storage
    }

    fn file_daemon_conf(&self) -> String {
        let dir = self.dir.path().display();
        let [_, _, fd_port] = self.ports;
        let fd_dir = self.fd_working_dir();
        let fd_dir = fd_dir.display();
        let (run_dir, plugin_dir) = match self.options.service {
            true => ("/run/bacula".to_owned(), "/usr/lib/bacula".to_owned()),
            false => (format!("{dir}/run"), format!("{dir}/plugins")),
        };
        format!(
            r#"FileDaemon {{
  Name = bed-fd
  FDport = {fd_port}
  FDAddress = 127.0.0.1
  WorkingDirectory = "{fd_dir}"
  Pid Directory = "{run_dir}"
  Maximum Concurrent Jobs = 20
  Plugin Directory = "{plugin_dir}"
  {}
}}
Director {{
  Name = bed-dir
  Password = "{PASSWORD}"
}}
Messages {{
  Name = Standard
  director = bed-dir = all, !skipped, !restored
}}
"#,
            self.options.fd_conf
        )
    }

    fn console_conf(&self) -> String {
        let [dir_port, _, _] = self.ports;
        format!(
            "Director {{\n  Name = bed-dir\n  DirPort = {dir_port}\n  Address = 127.0.0.1\n  Password = \"{PASSWORD}\"\n}}\n"
        )
    }
}

impl Drop for Bacula {
    fn drop(&mut self) {
        // The File Daemon first and in order, so that the plugin can undo what it made.
        if self.options.service {
            if let Err(e) = cmd::run("systemctl", ["stop", "bacula-fd"]) {
                eprintln!("{}", super::message(&e));
            }
        }
        for child in [
            self.fd_child.take(),
            self.dir_child.take(),
            self.sd_child.take(),
        ]
        .into_iter()
        .flatten()
        {
            stop(child, Duration::from_secs(20));
        }
    }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    (0..text.len() / 2)
        .map(|i| u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok())
        .collect()
}

/// SIGTERM, then SIGKILL when the time is up.
fn stop(mut child: Child, limit: Duration) {
    if let Some(pid) = rustix::process::Pid::from_raw(child.id() as i32) {
        // Our own child that was not waited for yet: the number cannot belong to another process.
        let _gone = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    let end = Instant::now() + limit;
    while Instant::now() < end {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    eprintln!(
        "process {} did not end in {} s, killing it",
        child.id(),
        limit.as_secs()
    );
    let _gone = child.kill();
    let _gone = child.wait();
}

fn copy_plugin(so: &Path, to: &Path) -> Result {
    std::fs::copy(so, to).map_err(|e| format!("{}: {e}", so.display()))?;
    Ok(())
}

/// Whether a process listens on this port. A connection to see it would be one more that the daemon serves.
fn is_listening(port: u16) -> Result<bool> {
    let sockets = std::fs::read_to_string("/proc/net/tcp")?;
    let (local, listens) = (format!(":{port:04X}"), "0A");
    Ok(sockets.lines().skip(1).any(|line| {
        let mut columns = line.split_whitespace().skip(1);
        let is_local = columns.next().is_some_and(|at| at.ends_with(&local));
        is_local && columns.nth(1) == Some(listens)
    }))
}

/// Three different free ports. Another process may take one before the daemon does; the daemon then says so.
fn free_ports() -> Result<[u16; 3]> {
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(TcpListener::bind(("127.0.0.1", 0))?);
    }
    Ok([
        held[0].local_addr()?.port(),
        held[1].local_addr()?.port(),
        held[2].local_addr()?.port(),
    ])
}

/// Makes the catalog with the SQL of the installed package, its only description.
fn create_catalog(db: &Path) -> Result {
    let sql = "/usr/share/dbconfig-common/data/bacula-director-sqlite3/install/sqlite3";
    let text = std::fs::read_to_string(sql)
        .map_err(|e| format!("{sql}: {e} (scripts/install-deps installs it)"))?;
    // One transaction and no fsync: the catalog lives as long as the test. (No PRAGMA is allowed inside of it.)
    let mut script = b"PRAGMA synchronous=OFF;\nBEGIN;\n".to_vec();
    for line in text.lines().filter(|l| !l.starts_with("PRAGMA")) {
        script.extend_from_slice(line.as_bytes());
        script.push(b'\n');
    }
    script.extend_from_slice(b"COMMIT;\n");
    cmd::run_with_input("sqlite3", ["-bail", &db.display().to_string()], &script)?;
    Ok(())
}

/// Daemons that go away in the middle.
impl Bacula {
    /// Kills the Storage Daemon (SIGKILL).
    pub fn kill_sd(&mut self) -> Result {
        kill(self.sd_child.take())
    }

    /// Starts the Storage Daemon again.
    pub fn start_sd(&mut self) -> Result {
        self.sd_child = Some(self.spawn("sd", &[])?);
        self.wait_listening(1)
    }

    /// Stops the Storage Daemon's process (SIGSTOP): a running job goes on until all buffers are full, and stays there.
    pub fn hold_sd(&self) -> Result {
        let pid = self.sd_child.as_ref().map(|child| child.id().to_string());
        cmd::run("kill", ["-STOP", &pid.ok_or("no Storage Daemon")?])?;
        Ok(())
    }

    /// Lets the Storage Daemon go on.
    pub fn let_sd_go(&self) -> Result {
        let pid = self.sd_child.as_ref().map(|child| child.id().to_string());
        cmd::run("kill", ["-CONT", &pid.ok_or("no Storage Daemon")?])?;
        Ok(())
    }

    /// Kills the Director (SIGKILL).
    pub fn kill_dir(&mut self) -> Result {
        kill(self.dir_child.take())
    }

    /// Starts the Director again.
    pub fn start_dir(&mut self) -> Result {
        self.dir_child = Some(self.spawn("dir", &[])?);
        self.wait_listening(0)
    }
}

/// Whether a process has a thread whose state begins with its name like this.
pub fn has_thread(pid: i32, what: &str) -> Result<bool> {
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        if stat.contains(what) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn kill(child: Option<Child>) -> Result {
    if let Some(mut child) = child {
        child.kill()?;
        child.wait()?;
    }
    Ok(())
}
