//! Parts of a guest that are not, or may not be, in the backup, and their messages.

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;

use super::contents::{Closed, Nothing};
use super::guest::OpenGuest;
use crate::config::client::FilterSettings;
use crate::disk::{self, Skipped, SkippedKind};
use crate::error::{Code, Error, escape};
use crate::fs::Missing;
use crate::fs::fstab::{self, Source};
use crate::guest::Absence;
use crate::job::caller::{Importance, Reporter};

impl OpenGuest {
    /// Tells of a volume that lies on disks whose snapshots are not of one instant: its parts do not fit
    /// together. The readable files are saved, but they may be incomplete.
    pub(super) fn torn(&mut self, volumes: &[&disk::Volume], what: &str, reporter: &dyn Reporter) {
        let disks: BTreeSet<usize> = volumes.iter().flat_map(|v| v.layout.disks()).collect();
        let Some(why) = self.apart.as_ref().filter(|_| disks.len() > 1) else {
            return;
        };
        let disks = disks.iter().filter_map(|disk| self.guest.disks.get(*disk));
        let disks: Vec<String> = disks.map(ToString::to_string).collect();
        let text = format!("{what}: it lies on {}: {why}", disks.join(", "));
        let error = Error::new(Code::NotOneInstant, text);
        let text = format!(
            "{what}: ERROR {}. Its files in this backup may be damaged.",
            error.report()
        );
        reporter.message(Importance::Error, &text);
        self.failed_volumes = true;
    }

    /// Reports that the guest's fstab cannot be read. Its mounts are saved elsewhere this time, so accurate
    /// mode must not delete old paths. Returns the text reported.
    pub(super) fn lost_fstab(&mut self, error: &Error, reporter: &dyn Reporter) -> String {
        self.failed_volumes = true;
        let text = format!(
            "{}: ERROR {}. Which filesystem the guest has where is not known: what is not its root is in \
             .guestsnap/volumes of this backup.",
            self.guest.name,
            error.report()
        );
        reporter.message(Importance::Error, &text);
        error.to_string()
    }

    /// Reports that the root may be another filesystem. Accurate mode must then not delete old paths. Returns the
    /// text reported.
    pub(super) fn unsure_root(&mut self, error: &Error, reporter: &dyn Reporter) -> String {
        self.failed_volumes = true;
        let text = format!(
            "{}: ERROR {}. All files are in this backup, but maybe in other places than in the guest: what has no \
             place is in .guestsnap/volumes.",
            self.guest.name,
            error.report()
        );
        reporter.message(Importance::Error, &text);
        error.to_string()
    }

    /// Whether the client file leaves out a volume that has no place in the guest's tree.
    pub(super) fn unwanted(&self, volume: &str) -> bool {
        let folder = format!(".guestsnap/volumes/{}", volume.replace('/', "-"));
        left_out(&self.filter, folder.as_bytes())
    }

    /// Tells of the volumes that may hold files and cannot be read. `named`: the numbers of those that a line of
    /// the guest's fstab names; that it may be missing, or is an error, was told with the line.
    pub(super) fn tell_closed(
        &mut self,
        closed: &[Closed],
        named: &[usize],
        reporter: &dyn Reporter,
    ) {
        for (number, volume) in closed.iter().enumerate() {
            let Some(nothing) = volume.reason.as_ref().filter(|n| n.may_hold_files()) else {
                continue;
            };
            let what = format!("{}: {}: {nothing}", self.guest.name, volume.name);
            if self.unwanted(&volume.name) {
                let text = format!("{what}; left out by `skip`");
                reporter.message(Importance::Info, &text);
                continue;
            }
            // The job before may have read it.
            self.failed_volumes = true;
            let rest = "Nothing of this volume is in this backup.";
            if named.contains(&number) {
                reporter.message(Importance::Info, &format!("{what}. {rest}"));
                continue;
            }
            let error = Error::new(Code::UnsupportedVolume, nothing.to_string()).report();
            let text = format!(
                "{}: {}: ERROR {error}. {rest}",
                self.guest.name, volume.name
            );
            reporter.message(Importance::Error, &text);
        }
    }

    /// Tells of a line of the guest's fstab that got no place, and remembers the place if files may
    /// be missed there. Returns the text, and which of the closed volumes the line names.
    pub(super) fn miss(
        &mut self,
        missing: &Missing,
        unlisted: usize,
        closed: &[Closed],
        reporter: &dyn Reporter,
    ) -> (String, Option<usize>) {
        let name = &self.guest.name;
        let line = &missing.line;
        let number = closed
            .iter()
            .position(|c| fstab::matches(&line.source, &c.identity, &c.filesystem));
        let volume = number.map(|number| &closed[number]);
        let mut text = missing.to_string();
        if let Some(volume) = volume {
            let name = escape(volume.identity.name.as_bytes());
            text = format!("{text}: it is {name}");
            if let Some(reason) = &volume.reason {
                text = format!("{text}, {reason}");
            }
        }
        let absent = |which| {
            self.guest
                .uncovered
                .iter()
                .any(|disk| disk.absence == which)
        };
        let not_wanted = absent(Absence::NotWanted) && !absent(Absence::Lost);
        // These names are our guess: the line may mean one of the other volumes, which are saved.
        let guessed = matches!(
            line.source,
            Source::Device(_) | Source::DiskLink(..) | Source::Other(_)
        );
        let importance = match volume {
            _ if left_out(&self.filter, &line.mount_point) => {
                text = format!("{text}; left out by `skip`");
                Importance::Info
            }
            // All other disks are here.
            None if not_wanted && missing.why.is_none() => {
                text.push_str("; it may be on a disk that its owner wants no backup of");
                Importance::Info
            }
            // It is an error already.
            Some(Closed { reason: None, .. }) => Importance::Info,
            Some(Closed {
                reason: Some(Nothing::Unknown),
                ..
            }) => Importance::Error,
            // It may be absent at boot. A present but unreadable volume is an error.
            _ if line.optional && missing.why.is_none() => Importance::Info,
            None if guessed && missing.why.is_none() && unlisted > 0 => {
                text.push_str("; UUID= or LABEL= there would tell which one it is");
                Importance::Error
            }
            _ => Importance::Error,
        };
        if importance != Importance::Error {
            reporter.message(importance, &format!("{name}: {text}"));
            return (text, number);
        }
        let error = Error::new(Code::VolumeMissing, text);
        let shown = escape(&line.mount_point);
        let told = format!(
            "{name}: ERROR {}. Nothing of /{shown} is in this backup.",
            error.report()
        );
        reporter.message(Importance::Error, &told);
        for place in [Some(&line.mount_point), missing.place.as_ref()] {
            let Some(place) = place.filter(|place| !place.is_empty()) else {
                continue;
            };
            let mut tree = self.catalog_path(place);
            tree.push(b'/');
            if !self.missed.contains(&tree) {
                self.missed.push(tree);
            }
        }
        (error.to_string(), number)
    }

    /// Describes an unreachable volume: the step, the disk and the cause.
    pub(super) fn loss_text(&self, skipped: &Skipped) -> String {
        let step = match skipped.kind {
            SkippedKind::DamagedTable => "reading the partition table",
            SkippedKind::DamagedPv => "reading the LVM metadata",
            _ => return skipped.reason.clone(),
        };
        let disk = skipped.disk.and_then(|disk| self.guest.disks.get(disk));
        let disk = disk.map(ToString::to_string).unwrap_or_default();
        format!("disk {disk}: {step}: {}", skipped.reason)
    }
}

/// Whether the client file excludes the filesystem that a guest mounts at this path, or the unmounted subvolume with
/// this path from the top of its filesystem.
pub(super) fn left_out(filter: &FilterSettings, path: &[u8]) -> bool {
    // `/data`, `/data/**`, or a folder above.
    let absolute = [b"/", path].concat();
    let below = [&absolute, &b"/x"[..]].concat();
    let ends = absolute.iter().enumerate().skip(1);
    let above = ends.filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
    let named = |path: &[u8]| {
        let path = std::ffi::OsStr::from_bytes(path);
        filter.skip.iter().any(|pattern| pattern.matches(path))
    };
    named(&absolute) || named(&below) || above.into_iter().any(|at| named(&absolute[..at]))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::config::pattern::Pattern;
    use crate::fs::fstab::Line;
    use crate::fs::{SkipReason, VolumeIdentity};
    use crate::guest::quiesce::Consistency;
    use crate::guest::{DiskSource, Guest, UncoveredDisk};
    use crate::job::prepare::Prepared;

    #[derive(Default)]
    struct Told(Mutex<Vec<(Importance, String)>>);

    impl Reporter for Told {
        fn message(&self, importance: Importance, message: &str) {
            self.0.lock().unwrap().push((importance, message.into()));
        }

        fn cancelled(&self) -> bool {
            false
        }
    }

    fn guest(uncovered: Vec<UncoveredDisk>, skip: &[&str]) -> OpenGuest {
        let skip = skip.iter().map(|p| Pattern::path(p).unwrap()).collect();
        OpenGuest::new(Prepared {
            guest: Guest {
                name: "web".into(),
                disks: vec![DiskSource::File("/srv/web.img".into())],
                disk_names: Vec::new(),
                places: Vec::new(),
                uncovered,
                file: None,
                pve: None,
                doubt: None,
            },
            snapshots: Vec::new(),
            prefix: b"/@guestsnap/web".to_vec(),
            consistency: Consistency::Crash,
            apart: None,
            errors: 0,
            filter: FilterSettings {
                skip,
                ..FilterSettings::default()
            },
        })
    }

    fn line(text: &str) -> Line {
        fstab::parse(text.as_bytes()).0.remove(0)
    }

    fn missing(text: &str) -> Missing {
        Missing {
            line: line(text),
            place: None,
            why: None,
        }
    }

    fn closed(number: u32, reason: Option<Nothing>) -> Closed {
        Closed::new(
            &format!("p{number}"),
            VolumeIdentity {
                disk_names: vec!["sda".into()],
                partition: Some(number),
                ..VolumeIdentity::default()
            },
            reason,
        )
    }

    #[test]
    fn test_a_line_without_its_volume_is_an_error_and_keeps_its_place() {
        let mut open = guest(Vec::new(), &[]);
        let told = Told::default();
        let mut gone = missing("UUID=1 /data ext4 defaults");
        gone.place = Some(b"srv/data".to_vec());
        open.miss(&gone, 0, &[], &told);
        let told = told.0.into_inner().unwrap();
        let [(Importance::Error, text)] = &told[..] else {
            panic!("{told:?}")
        };
        assert!(text.starts_with("web: ERROR GS-507 "), "{text}");
        assert!(
            text.contains("/data (UUID=1)") && text.contains("To do: "),
            "{text}"
        );
        assert!(
            text.ends_with("Nothing of /data is in this backup."),
            "{text}"
        );
        let kept: [&[u8]; 2] = [b"/@guestsnap/web/data/", b"/@guestsnap/web/srv/data/"];
        assert_eq!(open.unread(), kept);
    }

    #[test]
    fn test_an_unread_fstab_is_an_error_and_keeps_the_guest() {
        let mut open = guest(Vec::new(), &[]);
        let told = Told::default();
        let lost = Error::new(Code::ReadFailed, "its /etc/fstab: p1: EIO");
        open.lost_fstab(&lost, &told);
        let told = told.0.into_inner().unwrap();
        let [(Importance::Error, text)] = &told[..] else {
            panic!("{told:?}")
        };
        assert!(text.starts_with("web: ERROR GS-601 "), "{text}");
        assert!(text.contains("its /etc/fstab: p1: EIO"), "{text}");
        assert_eq!(open.unread(), [b"/@guestsnap/web/"]);
    }

    #[test]
    fn test_what_is_there_and_unread_is_an_error_though_it_may_be_away() {
        let mut open = guest(Vec::new(), &["/skipped"]);
        let mut unread = |text: &str| {
            let told = Told::default();
            let missing = Missing {
                why: Some("subvolume @data: EIO".into()),
                ..missing(text)
            };
            open.miss(&missing, 1, &[], &told);
            told.0.into_inner().unwrap().remove(0)
        };
        for options in ["nofail", "noauto", "nofail,x-systemd.automount"] {
            let (importance, text) = unread(&format!("UUID=1 /data btrfs subvol=@data,{options}"));
            assert_eq!(importance, Importance::Error, "{options}");
            assert!(text.contains("subvolume @data: EIO"), "{text}");
        }
        let (importance, _) = unread("UUID=1 /skipped btrfs subvol=@data,nofail");
        assert_eq!(importance, Importance::Info);
        assert_eq!(open.unread(), [b"/@guestsnap/web/data/"]);
    }

    #[test]
    fn test_lines_that_nobody_misses_are_no_errors() {
        let volumes = [
            closed(5, Some(Nothing::Known(SkipReason::Luks))),
            closed(6, None),
            closed(7, Some(Nothing::Unknown)),
        ];
        for (text, unlisted, expected) in [
            ("UUID=1 /data ext4 defaults", 1, Importance::Error),
            ("UUID=1 /data ext4 nofail", 0, Importance::Info),
            ("/dev/sr0 /media/cdrom0 auto ro", 0, Importance::Info),
            // Left out in the client file.
            ("UUID=1 /skipped ext4", 0, Importance::Info),
            ("UUID=1 /skipped/below ext4", 0, Importance::Info),
            ("UUID=1 /empty ext4", 0, Importance::Info),
            ("UUID=1 /skip ext4", 0, Importance::Error),
            // Such a name may mean one of those that are saved as volumes of their own.
            ("/dev/sdq1 /data ext4", 1, Importance::Error),
            ("/dev/sdq1 /data ext4", 0, Importance::Error),
            ("/dev/disk/by-id/x /data ext4", 1, Importance::Error),
            ("/dev/disk/by-label/x /data ext4", 1, Importance::Error),
            // Encrypted; failed, and told; unknown.
            ("/dev/sda5 /data ext4", 1, Importance::Error),
            ("/dev/sda5 /data ext4 nofail", 1, Importance::Info),
            ("/dev/sda6 /data ext4", 1, Importance::Info),
            ("/dev/sda7 /data ext4", 1, Importance::Error),
            ("/dev/sda7 /data ext4 nofail", 1, Importance::Error),
        ] {
            let mut open = guest(Vec::new(), &["/skipped", "/empty/**"]);
            let told = Told::default();
            open.miss(&missing(text), unlisted, &volumes, &told);
            let told = told.0.into_inner().unwrap();
            assert_eq!(told.len(), 1);
            assert_eq!(told[0].0, expected, "{told:?}");
            let kept = !open.unread().is_empty();
            assert_eq!(kept, expected == Importance::Error, "{text}");
        }
    }

    #[test]
    fn test_subvolumes_without_a_place_can_be_left_out() {
        let skips =
            |skip: &str, path: &str| left_out(&guest(Vec::new(), &[skip]).filter, path.as_bytes());
        assert!(skips("/@old", "@old") && skips("/@old", "@old/inner"));
        assert!(!skips("/@old", "@older") && !skips("/@old", "") && !skips("/@old", "a/@old"));
        for path in ["timeshift-btrfs", "timeshift-btrfs/snapshots/1/@"] {
            assert!(skips("/timeshift-btrfs/**", path));
        }
        // The top itself, and nothing in it.
        assert!(skips("/", "") && !skips("/", "@old"));
    }

    #[test]
    fn test_disks_that_are_not_covered_keep_the_guest() {
        let disk = |absence| UncoveredDisk {
            what: "vdb".into(),
            reason: "x".into(),
            absence,
        };
        use Absence::{Lost, NoDisk, NotWanted};
        let open = guest(vec![disk(NoDisk), disk(NotWanted)], &[]);
        assert!(open.unread().is_empty());
        let open = guest(vec![disk(NoDisk), disk(Lost)], &[]);
        assert_eq!(open.unread(), [b"/@guestsnap/web/"]);
        // A line may mean the disk that is not wanted only if no other is missed.
        for (disks, expected) in [
            (vec![NotWanted, NoDisk], Importance::Info),
            (vec![NoDisk], Importance::Error),
            (vec![NotWanted, Lost], Importance::Error),
        ] {
            let mut open = guest(disks.into_iter().map(disk).collect(), &[]);
            let told = Told::default();
            open.miss(&missing("UUID=1 /data ext4 defaults"), 0, &[], &told);
            assert_eq!(told.0.into_inner().unwrap()[0].0, expected);
        }
    }
}
