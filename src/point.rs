//! Test points: places where tests kill, hang or break guestsnap.
//!
//! Every step that a crash could interrupt and every call that could fail has a point. The feature
//! `test-points` enables them; release builds never have it. A point obeys the file `act` in the
//! directory `GUESTSNAP_POINTS`: `NAME kill`, `NAME hang` (until the file changes), `NAME hang-one`
//! (first thread only: renames the file to `act.done` and waits until that is removed), `NAME
//! error=ERRNO`, or `NAME once=ERRNO` (first time only). It appends its name to the file `acted`
//! when it acts, and to `reached` when first passed. Without the feature, points compile to
//! nothing.

use rustix::io::Errno;

/// When a point is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// During a backup.
    Backup,
    /// During a restore.
    Restore,
    /// While a guest's disks are made again.
    Rebuild,
    /// During a restore into a guest's own disks.
    Into,
    /// During a sweep that finds something to remove.
    Sweep,
}

/// Guest storage needed to reach the point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Image files.
    Image,
    /// Host logical volumes and device-mapper.
    Volumes,
}

/// Consequence of a failure at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// None: a border between two steps.
    Border,
    /// The job is not OK, and an error gives the reason.
    Error,
    /// The job is OK: the failure does not affect it. There is a warning.
    Harmless,
}

macro_rules! points {
    ($($point:ident = $name:literal, $phase:ident, $needs:ident, $fault:ident;)*) => {
        /// A place in the code.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Point {
            $(#[doc = $name] $point,)*
        }

        impl Point {
            /// All points.
            pub const ALL: &'static [Point] = &[$(Point::$point,)*];

            /// Name in the file `act`.
            pub fn name(self) -> &'static str {
                match self { $(Point::$point => $name,)* }
            }

            /// When it is reached.
            pub fn phase(self) -> Phase {
                match self { $(Point::$point => Phase::$phase,)* }
            }

            /// Storage it needs.
            pub fn needs(self) -> Needs {
                match self { $(Point::$point => Needs::$needs,)* }
            }

            /// Consequence of its failure.
            pub fn fault(self) -> Fault {
                match self { $(Point::$point => Fault::$fault,)* }
            }
        }
    };
}

points! {
    // Journal.
    JournalCreate = "journal-create", Backup, Image, Error;
    JournalHeader = "journal-header", Backup, Image, Error;
    JournalRename = "journal-rename", Backup, Image, Error;
    JournalReady = "journal-ready", Backup, Image, Border;
    JournalIntend = "journal-intend", Backup, Volumes, Error;
    JournalIntended = "journal-intended", Backup, Volumes, Border;
    JournalRecord = "journal-record", Backup, Volumes, Harmless;
    JournalRemove = "journal-remove", Backup, Image, Error;
    JournalRemoved = "journal-removed", Backup, Image, Border;
    // Snapshots.
    CommandStart = "command-start", Backup, Volumes, Error;
    VolumesListed = "volumes-listed", Backup, Volumes, Border;
    SnapshotsPrepared = "snapshots-prepared", Backup, Volumes, Border;
    Activate = "activate", Backup, Volumes, Error;
    Activated = "activated", Backup, Volumes, Border;
    Deactivate = "deactivate", Backup, Volumes, Error;
    Deactivated = "deactivated", Backup, Volumes, Border;
    HoldArm = "hold-arm", Backup, Volumes, Harmless;
    HoldSuspend = "hold-suspend", Backup, Volumes, Harmless;
    Held = "held", Backup, Volumes, Border;
    HoldRelease = "hold-release", Backup, Volumes, Border;
    HoldReleased = "hold-released", Backup, Volumes, Border;
    Lvcreate = "lvcreate", Backup, Volumes, Error;
    LvcreateDone = "lvcreate-done", Backup, Volumes, Error;
    LvcreateKnown = "lvcreate-known", Backup, Volumes, Border;
    SnapshotStatus = "snapshot-status", Backup, Volumes, Error;
    Lvremove = "lvremove", Backup, Volumes, Error;
    LvremoveDone = "lvremove-done", Backup, Volumes, Border;
    ReflinkFile = "reflink-file", Backup, Image, Error;
    ReflinkClone = "reflink-clone", Backup, Image, Error;
    ReflinkDone = "reflink-done", Backup, Image, Border;
    // Disks and devices.
    JobStarted = "job-started", Backup, Image, Border;
    DiskOpen = "disk-open", Backup, Image, Error;
    DiskRead = "disk-read", Backup, Image, Error;
    DiskExamined = "disk-examined", Backup, Image, Border;
    LoopAttach = "loop-attach", Backup, Image, Error;
    LoopAttached = "loop-attached", Backup, Image, Error;
    LoopRelease = "loop-release", Backup, Image, Border;
    LoopReleased = "loop-released", Backup, Image, Error;
    DmCreate = "dm-create", Backup, Volumes, Error;
    DmCreated = "dm-created", Backup, Volumes, Border;
    DmLoad = "dm-load", Backup, Volumes, Error;
    DmResume = "dm-resume", Backup, Volumes, Error;
    DmOpen = "dm-open", Backup, Volumes, Error;
    DmArm = "dm-arm", Backup, Volumes, Error;
    DmReady = "dm-ready", Backup, Volumes, Border;
    DmRelease = "dm-release", Backup, Volumes, Border;
    DmReleased = "dm-released", Backup, Volumes, Error;
    // Filesystems.
    Probe = "probe", Backup, Image, Error;
    MountOpen = "mount-fsopen", Backup, Image, Error;
    MountConfigure = "mount-configure", Backup, Image, Error;
    MountCreate = "mount-create", Backup, Image, Error;
    MountFsmount = "mount-fsmount", Backup, Image, Error;
    MountVerify = "mount-verify", Backup, Image, Error;
    Mounted = "mounted", Backup, Image, Border;
    GuestOpened = "guest-opened", Backup, Image, Border;
    Unmount = "unmount", Backup, Image, Border;
    Unmounted = "unmounted", Backup, Image, Border;
    // Files.
    FirstFile = "first-file", Backup, Image, Border;
    WalkOpen = "walk-open", Backup, Image, Error;
    WalkNames = "walk-names", Backup, Image, Error;
    WalkStat = "walk-statx", Backup, Image, Error;
    WalkReadlink = "walk-readlink", Backup, Image, Error;
    FileOpen = "file-open", Backup, Image, Error;
    FileRead = "file-read", Backup, Image, Error;
    XattrList = "xattr-list", Backup, Image, Error;
    XattrGet = "xattr-get", Backup, Image, Error;
    LastFile = "last-file", Backup, Image, Border;
    Release = "release", Backup, Image, Border;
    Released = "released", Backup, Image, Border;
    JobFinish = "job-finish", Backup, Image, Border;
    JobFinished = "job-finished", Backup, Image, Border;
    // Sweep.
    SweepLock = "sweep-lock", Sweep, Image, Harmless;
    SweepRead = "sweep-read", Sweep, Image, Harmless;
    SweepTaken = "sweep-taken", Sweep, Image, Border;
    SweepDevice = "sweep-device", Sweep, Volumes, Harmless;
    SweepVolumes = "sweep-volumes", Sweep, Volumes, Border;
    SweepRemove = "sweep-remove", Sweep, Volumes, Border;
    SweepRemoved = "sweep-removed", Sweep, Volumes, Border;
    SweepDeactivate = "sweep-deactivate", Sweep, Volumes, Border;
    SweepJournal = "sweep-journal", Sweep, Image, Harmless;
    SweepDone = "sweep-done", Sweep, Image, Border;
    // Restores.
    RestoreFolder = "restore-folder", Restore, Image, Error;
    RestoreResolve = "restore-resolve", Restore, Image, Error;
    RestoreMkdir = "restore-mkdir", Restore, Image, Error;
    RestoreCreate = "restore-create", Restore, Image, Error;
    RestoreSymlink = "restore-symlink", Restore, Image, Error;
    RestoreNode = "restore-node", Restore, Image, Error;
    RestoreLink = "restore-link", Restore, Image, Error;
    RestoreCreated = "restore-created", Restore, Image, Border;
    RestoreWrite = "restore-write", Restore, Image, Error;
    RestoreSize = "restore-size", Restore, Image, Error;
    RestoreAttributes = "restore-attributes", Restore, Image, Border;
    RestoreOwner = "restore-owner", Restore, Image, Error;
    RestoreXattr = "restore-xattr", Restore, Image, Error;
    RestoreTimes = "restore-times", Restore, Image, Error;
    RestoreClose = "restore-close", Restore, Image, Error;
    RestoreFinished = "restore-finished", Restore, Image, Border;
    // Rebuilds.
    RebuildImage = "rebuild-image", Rebuild, Image, Error;
    RebuildImageMade = "rebuild-image-made", Rebuild, Image, Border;
    RebuildLvcreate = "rebuild-lvcreate", Rebuild, Volumes, Error;
    RebuildLvcreated = "rebuild-lvcreated", Rebuild, Volumes, Border;
    RebuildKept = "rebuild-kept", Rebuild, Volumes, Border;
    RebuildWrite = "rebuild-write", Rebuild, Image, Error;
    RebuildSubvolume = "rebuild-subvolume", Rebuild, Image, Error;
    RebuildFstab = "rebuild-fstab", Rebuild, Image, Error;
    RebuildMkfs = "rebuild-mkfs", Rebuild, Image, Error;
    RebuildRename = "rebuild-rename", Rebuild, Image, Error;
    RebuildRenamed = "rebuild-renamed", Rebuild, Image, Border;
    // Restores into a guest's disks.
    IntoTaken = "into-taken", Into, Image, Border;
    IntoJournaled = "into-journaled", Into, Image, Border;
    IntoMountPoint = "into-mount-point", Into, Image, Harmless;
    IntoOpened = "into-opened", Into, Image, Border;
    IntoSync = "into-sync", Into, Image, Error;
    IntoSynced = "into-synced", Into, Image, Border;
    IntoUnmounted = "into-unmounted", Into, Image, Border;
    IntoFlush = "into-flush", Into, Image, Error;
    IntoReleased = "into-released", Into, Image, Border;
}

/// A step whose call can fail; returns the error to inject.
#[cfg(not(feature = "test-points"))]
#[inline(always)]
pub(crate) fn reach(_: Point) -> Result<(), Errno> {
    Ok(())
}

/// A border between two steps.
#[cfg(not(feature = "test-points"))]
#[inline(always)]
pub(crate) fn pass(_: Point) {}

#[cfg(feature = "test-points")]
pub(crate) use acting::{pass, reach, stand_in};

#[cfg(feature = "test-points")]
mod acting {
    use std::collections::HashSet;
    use std::io::Write;
    use std::path::PathBuf;
    use std::sync::Mutex;
    use std::time::Duration;

    use super::{Errno, Point};

    static TOLD: Mutex<Option<HashSet<Point>>> = Mutex::new(None);

    fn folder() -> Option<PathBuf> {
        std::env::var_os("GUESTSNAP_POINTS").map(PathBuf::from)
    }

    /// A program to run in place of an LVM tool.
    pub(crate) fn stand_in(program: &str) -> Option<PathBuf> {
        let path = folder()?.join("bin").join(program);
        path.exists().then_some(path)
    }

    fn write(file: &str, point: Point) {
        let Some(folder) = folder() else {
            return;
        };
        let written = std::fs::File::options()
            .create(true)
            .append(true)
            .open(folder.join(file))
            .and_then(|mut f| f.write_all(format!("{}\n", point.name()).as_bytes()));
        written.expect("GUESTSNAP_POINTS is a folder that can be written");
    }

    fn tell(point: Point) {
        let mut told = TOLD.lock().unwrap_or_else(|e| e.into_inner());
        if told.get_or_insert_default().insert(point) {
            write("reached", point);
        }
    }

    fn action(point: Point) -> Option<String> {
        let text = std::fs::read_to_string(folder()?.join("act")).ok()?;
        let (name, action) = text.trim().split_once(' ')?;
        (name == point.name()).then(|| action.to_owned())
    }

    /// Whether this thread is the first to act: the one that removes the file.
    fn is_first() -> bool {
        folder().is_some_and(|f| std::fs::rename(f.join("act"), f.join("act.done")).is_ok())
    }

    pub(crate) fn reach(point: Point) -> Result<(), Errno> {
        tell(point);
        let Some(wanted) = action(point) else {
            return Ok(());
        };
        if (wanted.starts_with("once=") || wanted == "hang-one") && !is_first() {
            return Ok(());
        }
        write("acted", point);
        if wanted == "kill" {
            let us = rustix::process::getpid();
            let _ = rustix::process::kill_process(us, rustix::process::Signal::KILL);
            // The signal is on its way.
            loop {
                std::thread::sleep(Duration::from_secs(1));
            }
        }
        if wanted == "hang" {
            while action(point).as_ref() == Some(&wanted) {
                std::thread::sleep(Duration::from_millis(20));
            }
            return Ok(());
        }
        if wanted == "hang-one" {
            while folder().is_some_and(|f| f.join("act.done").exists()) {
                std::thread::sleep(Duration::from_millis(20));
            }
            return Ok(());
        }
        let number = wanted.split_once('=').map(|(_, number)| number.parse());
        match number {
            Some(Ok(number)) => Err(Errno::from_raw_os_error(number)),
            _ => panic!("GUESTSNAP_POINTS: {wanted:?} is no action"),
        }
    }

    pub(crate) fn pass(point: Point) {
        let _ = reach(point);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_points_have_names_of_their_own() {
        let names: std::collections::HashSet<_> = Point::ALL.iter().map(|p| p.name()).collect();
        assert_eq!(names.len(), Point::ALL.len());
        assert!(names.len() >= 40);
    }
}
