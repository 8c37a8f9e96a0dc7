//! A job without a daemon, in a library with points to break at: what the tests of kill points and
//! failing calls run. One line per message (`I`, `W`, `E` or `F` for its importance, `L` for the
//! log), and a last line `end`.
//!
//! `points backup WORKDIR DIRECTIVE`, `points copy WORKDIR DIRECTIVE TARGET` (a backup and a
//! restore of the same files at once), `points into WORKDIR DIRECTIVE GUEST` (the same into the disks of a
//! guest), `points together WORKDIR DIRECTIVE TARGET` (several of these at
//! once, every other one cancelled), `points rebuild WORKDIR KIT TARGET…` (disks from a kit), `points sweep
//! WORKDIR`.

use std::ffi::{CStr, CString, OsStr};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;

use guestsnap::job::options::RestoreOptions;
use guestsnap::job::rebuild::plan::Plan;
use guestsnap::job::rebuild::{Rebuild, TargetName};
use guestsnap::job::{
    Backup, BackupSettings, CancelFlag, Daemon, FileType, Importance, Item, Reporter, Restore,
    RestoreFile, RestoreSettings, Restored, Step, journal_folder,
};
use guestsnap::{kit, snapshot};

/// After how many files each of the jobs of `together` is cancelled.
const TOGETHER: [Option<usize>; 4] = [Some(20), None, Some(150), None];

/// Prints.
struct Printer(CancelFlag);

fn say(importance: char, text: &str) {
    // Text that cannot be printed has no reader.
    let _ = writeln!(std::io::stdout(), "{importance} {text}");
    let _ = std::io::stdout().flush();
}

impl Reporter for Printer {
    fn message(&self, importance: Importance, message: &str) {
        let letter = match importance {
            Importance::Info => 'I',
            Importance::Warning => 'W',
            Importance::Error => 'E',
            Importance::Fatal => 'F',
        };
        say(letter, message);
    }

    fn cancelled(&self) -> bool {
        self.0.is_set()
    }
}

/// Takes everything.
struct Everything;

impl Daemon for Everything {
    fn accepts(&mut self, _: &Item) -> bool {
        true
    }

    fn changed(&mut self, _: &Item) -> bool {
        true
    }

    fn mark_seen(&mut self, _: &Item) {}
}

struct Log;

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            say('L', &record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// The part of an item that is needed once the backup moves on.
struct Seen {
    file_type: FileType,
    name: Vec<u8>,
    link: Option<Vec<u8>>,
    stat: libc::stat,
}

/// Where a restore goes.
#[derive(Clone, Copy)]
enum Target<'a> {
    Folder(&'a Path),
    /// The disks of the guest of this name.
    Guest(&'a str),
}

fn full(job_id: u32, work: &Path) -> BackupSettings {
    BackupSettings {
        job_id,
        job: format!("Driver.{job_id}"),
        previous: String::new(),
        working_dir: work.to_path_buf(),
        full: true,
        accurate: false,
        estimate: false,
        since: 0,
    }
}

fn backup(
    job_id: u32,
    work: &Path,
    directive: &str,
    target: Option<Target<'_>>,
    cancel: CancelFlag,
    progress: impl Fn(),
) -> guestsnap::Result<()> {
    let text = format!("guestsnap: {directive}").into_bytes();
    let reporter = Arc::new(Printer(cancel.clone()));
    let mut backup = Backup::start(
        full(job_id, work),
        std::slice::from_ref(&text),
        reporter.clone(),
        cancel.clone(),
    )?;
    backup.begin_command()?;
    let mut restore = target.map(|target| {
        let (folder, into) = match target {
            Target::Folder(folder) => (folder, None),
            Target::Guest(guest) => (Path::new(""), Some(guest.to_owned())),
        };
        let settings = RestoreSettings {
            job_id,
            working_dir: work.to_path_buf(),
            options: RestoreOptions {
                into,
                ..RestoreOptions::default()
            },
        };
        (folder, Restore::new(settings, reporter, cancel))
    });
    if let Some((_, restore)) = &mut restore {
        restore.begin_command(&text)?;
    }
    let mut buffer = vec![0; 64 << 10];
    let mut index = 0;
    loop {
        let seen = match backup.next_file(&mut Everything) {
            Ok(Step::Accepted(item) | Step::Other(item)) => Seen {
                file_type: item.file_type,
                name: item.name.to_bytes().to_vec(),
                link: item.link.as_ref().map(|link| link.to_bytes().to_vec()),
                stat: item.stat,
            },
            Ok(Step::Questions) => continue,
            Ok(Step::End) => break,
            Err(error) => {
                backup.finish();
                return Err(error);
            }
        };
        let wanted = match &mut restore {
            Some((target, restore)) => create(restore, target, &seen),
            None => false,
        };
        if seen.file_type == FileType::Regular {
            let restore = restore.as_mut().map(|(_, restore)| restore);
            contents(
                &mut backup,
                restore.filter(|_| wanted),
                &seen.name,
                &mut buffer,
            );
        }
        while let Some(record) = backup.record() {
            if let Some((_, restore)) = restore.as_mut() {
                restore.record(&record);
            }
        }
        if let Some((_, restore)) = restore.as_mut() {
            restore.end_file();
        }
        index += 1;
        backup.end_file(index);
        progress();
    }
    if let Some((_, restore)) = restore.as_mut() {
        restore.finish();
    }
    backup.finish();
    say('I', &format!("{index} files"));
    Ok(())
}

/// Reads a file to its end, for a restore if it is wanted.
fn contents(
    backup: &mut Backup,
    mut restore: Option<&mut Restore>,
    name: &[u8],
    buffer: &mut [u8],
) {
    loop {
        match backup.read(buffer) {
            Ok(0) => break,
            Ok(length) => {
                if let Some(restore) = restore.as_mut() {
                    // It has told the reason itself.
                    let _ = restore.write(&buffer[..length]);
                }
            }
            Err(error) => {
                let name = String::from_utf8_lossy(name).into_owned();
                say('E', &format!("GS-601 read error on {name}: {error}"));
                break;
            }
        }
    }
    if let Some(restore) = restore {
        let _ = restore.close_data();
    }
}

fn alone(work: &str, directive: &str, target: Option<Target<'_>>) -> guestsnap::Result<()> {
    let never = CancelFlag::default();
    backup(1, Path::new(work), directive, target, never, || {})
}

/// Several jobs at once as in a daemon, some of which another thread cancels.
fn together(work: &Path, directive: &str, target: &Path) {
    std::thread::scope(|scope| {
        for (job_id, cancel_after) in (1..).zip(TOGETHER) {
            let (cancel, (give, take)) = (CancelFlag::default(), channel());
            let theirs = cancel.clone();
            scope.spawn(move || {
                let target = target.join(job_id.to_string());
                let target = Some(Target::Folder(&target));
                let progress = || {
                    // After the cancel nothing is counted any more.
                    let _ = give.send(());
                };
                let done = backup(job_id, work, directive, target, theirs, progress);
                if let Err(error) = done {
                    say('F', &format!("{job_id}: {}", error.report()));
                }
            });
            scope.spawn(move || {
                if cancel_after.is_some_and(|files| take.iter().nth(files).is_some()) {
                    cancel.set();
                }
            });
        }
    });
}

/// Whether data are wanted.
fn create(restore: &mut Restore, target: &Path, seen: &Seen) -> bool {
    let below = |path: &[u8]| {
        let mut whole = target.as_os_str().as_encoded_bytes().to_vec();
        whole.extend_from_slice(path);
        CString::new(whole).unwrap_or_default()
    };
    let link = match (&seen.link, seen.file_type) {
        (Some(link), FileType::HardLink) => below(link),
        (Some(link), _) => CString::new(link.clone()).unwrap_or_default(),
        (None, _) => CString::default(),
    };
    let (name, folder) = (below(&seen.name), below(b""));
    let file = RestoreFile {
        file_type: seen.file_type,
        name: &name,
        link: &link,
        stat: seen.stat,
        where_: Some(CStr::from_bytes_with_nul(folder.as_bytes_with_nul()).unwrap_or(c"")),
        replace: b'a',
    };
    match restore.create(&file) {
        Ok(restored) => restored == Restored::Data,
        Err(error) => {
            say('E', &error.report());
            false
        }
    }
}

/// Makes disks from a kit.
fn rebuild(work: &str, kit: &str, targets: &[&str]) -> guestsnap::Result<()> {
    let targets = targets
        .iter()
        .map(|text| TargetName::parse(OsStr::new(text)));
    let targets = targets.collect::<guestsnap::Result<Vec<_>>>()?;
    let plan = Plan::new(kit::load(Path::new(kit))?, targets, false)?;
    let printer = Arc::new(Printer(CancelFlag::default()));
    let made = Rebuild::start(plan, PathBuf::from(work), printer)?.run()?;
    say('I', &format!("made {}", made.disks.join(", ")));
    Ok(())
}

fn main() {
    // Set once, at the start: it cannot fail.
    let _ = log::set_logger(&Log);
    log::set_max_level(log::LevelFilter::Warn);
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["backup", work, directive] => alone(work, directive, None),
        ["copy", work, directive, target] => {
            alone(work, directive, Some(Target::Folder(Path::new(target))))
        }
        ["into", work, directive, guest] => alone(work, directive, Some(Target::Guest(guest))),
        ["together", work, directive, target] => {
            together(Path::new(work), directive, Path::new(target));
            Ok(())
        }
        ["rebuild", work, kit, targets @ ..] => rebuild(work, kit, targets),
        ["sweep", work] => snapshot::sweep(&journal_folder(PathBuf::from(work)), false)
            .map(|report| report.lines().for_each(|line| say('I', &line))),
        _ => {
            eprintln!(
                "backup WORKDIR DIRECTIVE | copy WORKDIR DIRECTIVE TARGET | \
                 into WORKDIR DIRECTIVE GUEST | \
                 rebuild WORKDIR KIT TARGET... | \
                 together WORKDIR DIRECTIVE TARGET | sweep WORKDIR"
            );
            std::process::exit(2);
        }
    };
    if let Err(error) = result {
        say('F', &error.report());
    }
    println!("end");
}
