//! Objects that a restore leaves alone, replaces and warns of.

use crate::populate::{POSIX_ACL, add_flags, clear_fences, set_times, set_xattr};
use guestsnap::error::Code;
use guestsnap::inode::{Meta, Time};
use guestsnap::job::{
    CancelFlag, FileType as Saved, Importance, Reporter, Restore, RestoreFile, RestoreSettings,
};
use guestsnap::stream::restore::Created;
use guestsnap::stream::{Replace, Request, Restorer, What};
use guestsnap_bed::images::{Bench, has_driver};
use guestsnap_bed::tree::xattrs;
use rustix::fs::IFlags;
use std::ffi::CString;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::sync::{Arc, Mutex};

fn meta(mode: u32) -> Meta {
    Meta {
        mode,
        mtime: Time {
            seconds: 1_000_000_000,
            nanoseconds: 0,
        },
        ..Meta::default()
    }
}

fn request<'a>(path: &'a Path, what: What<'a>, mode: u32) -> Request<'a> {
    Request {
        path: path.as_os_str().as_bytes(),
        what,
        meta: meta(mode),
        replace: Replace::Always,
    }
}

/// Restores one small file.
fn put(restorer: &mut Restorer, path: &Path, content: &[u8]) -> guestsnap::Result<()> {
    let mut wanted = request(path, What::Object, 0o100_644);
    wanted.meta.size = content.len() as u64;
    restorer.create(&wanted)?;
    restorer.write(content)?;
    restorer.finish_data()?;
    let warnings = restorer.finish()?;
    assert!(warnings.is_empty(), "{warnings:?}");
    Ok(())
}

#[test]
fn root_restore_never_follows_planted_links() {
    let bench = Bench::alone();
    let outside = bench.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("victim"), "untouched").unwrap();
    // The restore folder itself may be reached over a link.
    fs::create_dir(bench.path("real")).unwrap();
    symlink("real", bench.path("where")).unwrap();
    let top = bench.path("where");
    let mut restorer = Restorer::new(Some(top.as_os_str().as_bytes())).unwrap();

    symlink(&outside, top.join("dir")).unwrap();
    let error = put(&mut restorer, &top.join("dir/victim"), b"hit").unwrap_err();
    assert_eq!(error.code(), Code::RestoreOutside, "{}", error.report());
    let error = put(&mut restorer, &top.join("dir/new/deeper"), b"hit").unwrap_err();
    assert_eq!(error.code(), Code::RestoreOutside, "{}", error.report());
    let error = put(&mut restorer, &top.join("../outside/victim"), b"hit").unwrap_err();
    assert_eq!(error.code(), Code::RestoreOutside, "{}", error.report());

    // In place of the object itself: replaced, not followed.
    symlink(outside.join("victim"), top.join("file")).unwrap();
    put(&mut restorer, &top.join("file"), b"mine").unwrap();
    assert!(top.join("file").symlink_metadata().unwrap().is_file());
    symlink(&outside, top.join("folder")).unwrap();
    let path = top.join("folder");
    restorer
        .create(&request(&path, What::Object, 0o040_750))
        .unwrap();
    assert!(restorer.finish().unwrap().is_empty());
    assert!(top.join("folder").symlink_metadata().unwrap().is_dir());

    // A link as the source of another name is no file of this restore.
    symlink(outside.join("victim"), top.join("first")).unwrap();
    let first = top.join("first");
    let path = top.join("second");
    let what = What::HardLink(first.as_os_str().as_bytes());
    let error = restorer
        .create(&request(&path, what, 0o100_644))
        .unwrap_err();
    assert_eq!(error.code(), Code::RestoreFailed, "{}", error.report());
    assert!(top.join("second").symlink_metadata().is_err());

    assert_eq!(
        fs::read_to_string(outside.join("victim")).unwrap(),
        "untouched"
    );
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
}

#[test]
fn root_restore_replaces_as_asked() {
    let bench = Bench::alone();
    let top = bench.path("where");
    let mut restorer = Restorer::new(Some(top.as_os_str().as_bytes())).unwrap();
    let path = top.join("a/b/file");
    put(&mut restorer, &path, b"first").unwrap();
    // Folders made on the way are closed to others until their own attributes come.
    let mode = fs::metadata(top.join("a")).unwrap();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode.permissions()),
        0o040_700
    );

    let mut wanted = request(&path, What::Object, 0o100_644);
    for (replace, expected) in [
        (Replace::Never, "first"),
        (Replace::IfNewer, "first"),
        (Replace::IfOlder, "first"),
    ] {
        wanted.replace = replace;
        assert!(matches!(
            restorer.create(&wanted).unwrap(),
            Created::Skipped(_)
        ));
        assert_eq!(fs::read_to_string(&path).unwrap(), expected);
    }
    // But a folder that this restore made itself gets its attributes.
    let folder = top.join("a/b");
    let mut wanted = request(&folder, What::Object, 0o040_755);
    wanted.replace = Replace::Never;
    assert_eq!(restorer.create(&wanted).unwrap(), Created::Created);
    assert!(restorer.finish().unwrap().is_empty());
    // Once it is finished, it is an existing one.
    assert!(matches!(
        restorer.create(&wanted).unwrap(),
        Created::Skipped(_)
    ));
    // A later file in it leaves its times alone.
    put(&mut restorer, &top.join("a/b/later"), b"x").unwrap();
    let modified = fs::metadata(&folder).unwrap();
    assert_eq!(
        std::os::unix::fs::MetadataExt::mtime(&modified),
        1_000_000_000
    );

    // A file in place of a folder is not forced.
    let error = put(&mut restorer, &folder, b"x").unwrap_err();
    assert!(error.report().contains("in the way"), "{}", error.report());
    // An immutable file is replaced.
    add_flags(&path, IFlags::IMMUTABLE);
    put(&mut restorer, &path, b"second").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "second");
}

/// Takes a restore's messages.
#[derive(Default)]
struct Told(Mutex<Vec<String>>);

impl Reporter for Told {
    fn message(&self, importance: Importance, message: &str) {
        let line = format!("{importance:?} {message}");
        self.0.lock().unwrap().push(line);
    }

    fn cancelled(&self) -> bool {
        false
    }
}

fn is_immutable(path: &Path) -> bool {
    let file = File::open(path).unwrap();
    let flags = rustix::fs::ioctl_getflags(&file).unwrap();
    flags.contains(IFlags::IMMUTABLE)
}

#[test]
fn root_restore_fences_folders_at_its_end() {
    let bench = Bench::alone();
    let top = bench.path("where");
    fences_come_at_the_end(&bench, &top);
    let mut restorer = Restorer::new(Some(top.as_os_str().as_bytes())).unwrap();
    fences_of_replaced_files(&mut restorer, &top);
    fences_that_were_there(restorer, &top);
    clear_fences(&top);
}

/// An immutable folder takes the files that come after it, and is immutable at the end, also when
/// the restore is cancelled. What that end refuses is told.
fn fences_come_at_the_end(bench: &Bench, top: &Path) {
    let (folder, file) = (bench.path("folder"), bench.path("file"));
    fs::create_dir(&folder).unwrap();
    fs::write(&file, "").unwrap();
    set_times(&folder, 1_000_000_000, 0);
    let saved = |path: &Path| nix::sys::stat::stat(path).unwrap();
    let c_string = |path: &Path| CString::new(path.as_os_str().as_bytes()).unwrap();
    let record = guestsnap::stream::Record {
        flags: Some((IFlags::IMMUTABLE | IFlags::NODUMP).bits()),
        ..Default::default()
    };
    let told = Arc::new(Told::default());
    let cancel = CancelFlag::default();
    let mut restore = Restore::new(RestoreSettings::default(), told.clone(), cancel.clone());
    let mut restored = |name: &str, file_type, from: &Path| {
        let created = restore.create(&RestoreFile {
            file_type,
            name: &c_string(&top.join(name)),
            link: c"",
            stat: saved(from),
            where_: Some(&c_string(top)),
            replace: b'a',
        });
        created.unwrap();
        if file_type == Saved::Directory {
            record.encode().iter().for_each(|r| restore.record(r));
        }
        restore.end_file();
    };
    for name in ["one", "gone"] {
        restored(name, Saved::Directory, &folder);
        restored(&format!("{name}/file"), Saved::Regular, &file);
    }
    assert!(!is_immutable(&top.join("one")));
    fs::rename(top.join("gone"), top.join("away")).unwrap();
    // Another owner's folder of the same name is not touched.
    fs::create_dir(top.join("gone")).unwrap();
    cancel.set();
    drop(restore);

    assert!(is_immutable(&top.join("one")));
    assert!(!is_immutable(&top.join("gone")));
    assert_eq!(
        std::os::unix::fs::MetadataExt::mtime(&fs::metadata(top.join("one")).unwrap()),
        1_000_000_000
    );
    assert!(top.join("one/file").exists());
    let told = told.0.lock().unwrap().clone();
    let [error, end] = &told[..] else {
        panic!("{told:?}");
    };
    assert!(
        error.starts_with("Error GS-604") && error.contains("where/gone: "),
        "{error}"
    );
    assert!(end.ends_with("1 errors"), "{end}");
}

/// An immutable file that cannot be replaced stays immutable; so does another name of one that is.
fn fences_of_replaced_files(restorer: &mut Restorer, top: &Path) {
    for name in ["away/file", "one/file"] {
        add_flags(&top.join(name), IFlags::IMMUTABLE);
    }
    let error = put(restorer, &top.join("one/file"), b"new").unwrap_err();
    assert!(error.report().contains("removing"), "{}", error.report());
    assert!(is_immutable(&top.join("one/file")));
    clear_fences(&top.join("away"));
    fs::hard_link(top.join("away/file"), top.join("other-name")).unwrap();
    add_flags(&top.join("away/file"), IFlags::IMMUTABLE);
    put(restorer, &top.join("away/file"), b"new").unwrap();
    assert!(is_immutable(&top.join("other-name")));
    assert_eq!(fs::read(top.join("away/file")).unwrap(), b"new");
}

/// A folder that was fenced before stays so, though the saved one is not; what that forbids is told.
fn fences_that_were_there(mut restorer: Restorer, top: &Path) {
    let record = guestsnap::stream::Record {
        flags: Some(0),
        ..Default::default()
    };
    for (name, fence) in [("i", IFlags::IMMUTABLE), ("a", IFlags::APPEND)] {
        let path = top.join(name);
        fs::create_dir(&path).unwrap();
        add_flags(&path, fence);
        restorer
            .create(&request(&path, What::Object, 0o040_755))
            .unwrap();
        for bytes in record.encode() {
            restorer.apply_record(&bytes).unwrap();
        }
        let told: Vec<String> = restorer
            .finish()
            .unwrap()
            .iter()
            .map(|e| e.report())
            .collect();
        for step in ["owner", "mode", "times"] {
            assert!(told.iter().any(|t| t.contains(step)), "{name}: {told:?}");
        }
    }
    assert!(restorer.end(|e| panic!("{}", e.report())).is_empty());
    for (name, fence) in [("i", IFlags::IMMUTABLE), ("a", IFlags::APPEND)] {
        let file = File::open(top.join(name)).unwrap();
        assert!(rustix::fs::ioctl_getflags(&file).unwrap().contains(fence));
    }
}

#[test]
fn root_restore_ignores_acls_of_the_target() {
    let bench = Bench::alone();
    let image = bench.image("target.img", "ext4", &[]);
    let attached = bench.attach(&image);
    let top = &attached.directory;
    set_xattr(top, "system.posix_acl_default", POSIX_ACL);
    let mut restorer = Restorer::new(Some(top.as_os_str().as_bytes())).unwrap();
    put(&mut restorer, &top.join("sub/file"), b"x").unwrap();
    let path = top.join("sub");
    restorer
        .create(&request(&path, What::Object, 0o040_755))
        .unwrap();
    assert!(restorer.finish().unwrap().is_empty());
    for (name, mode) in [("fifo", 0o010_644), ("device", 0o020_644)] {
        let path = top.join(name);
        let mut request = request(&path, What::Object, mode);
        request.meta.rdev = rustix::fs::makedev(1, 3);
        restorer.create(&request).unwrap();
        assert!(restorer.finish().unwrap().is_empty());
    }
    for name in ["sub", "sub/file", "fifo", "device"] {
        let found = xattrs(&top.join(name)).unwrap();
        assert!(found.is_empty(), "{name}: {found:?}");
    }
    let mode = fs::metadata(top.join("sub/file")).unwrap();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode.permissions()),
        0o100_644
    );
}

#[test]
fn root_restore_seeks_over_holes() {
    let bench = Bench::alone();
    let image = bench.image("target.img", "ext4", &[]);
    let attached = bench.attach(&image);
    let top = &attached.directory;
    let mut restorer = Restorer::new(Some(top.as_os_str().as_bytes())).unwrap();
    let path = top.join("sparse");
    let mut wanted = request(&path, What::Object, 0o100_600);
    wanted.meta.size = (100 << 20) + 3;
    restorer.create(&wanted).unwrap();
    // Unaligned writes around zeros, then a jump as Bacula's sparse streams make it.
    let mut data = vec![0; 1 << 20];
    data[5000] = 1;
    data[900_001] = 2;
    restorer.write(&data[..3]).unwrap();
    restorer.write(&data[3..700_000]).unwrap();
    restorer.write(&data[700_000..]).unwrap();
    restorer.seek(50 << 20).unwrap();
    restorer.write(b"middle").unwrap();
    restorer.seek((100 << 20) + 2).unwrap();
    restorer.write(&[0]).unwrap();
    restorer.finish_data().unwrap();
    assert!(restorer.finish().unwrap().is_empty());
    let file = File::open(&path).unwrap();
    let mut found = vec![0xff; 1 << 20];
    file.read_exact_at(&mut found, 0).unwrap();
    assert!(found == data);
    let mut middle = [0; 8];
    file.read_exact_at(&mut middle, 50 << 20).unwrap();
    assert_eq!(&middle, b"middle\0\0");
    let stat = file.metadata().unwrap();
    assert_eq!(stat.len(), (100 << 20) + 3);
    assert!(std::os::unix::fs::MetadataExt::blocks(&stat) <= 64);
}

#[test]
fn root_restore_warns_of_what_the_target_cannot_keep() {
    let bench = Bench::alone();
    let image = bench.image("target.img", "ext4", &["-I", "128"]);
    let attached = bench.attach(&image);
    let top = &attached.directory;
    let mut restorer = Restorer::new(Some(top.as_os_str().as_bytes())).unwrap();
    let path = top.join("file");
    let mut wanted = request(&path, What::Object, 0o100_600);
    wanted.meta.size = 4;
    restorer.create(&wanted).unwrap();
    restorer.write(b"kept").unwrap();
    restorer.finish_data().unwrap();
    let record = guestsnap::stream::Record {
        flags: Some(0x0080_0000),
        xattrs: vec![
            (b"user.too-large".to_vec(), vec![1; 30_000]),
            (b"system.unknown".to_vec(), vec![1]),
            (b"$LXMOD".to_vec(), vec![1]),
            (b"user.fits".to_vec(), vec![1]),
        ],
        ..Default::default()
    };
    for bytes in record.encode() {
        restorer.apply_record(&bytes).unwrap();
    }
    assert!(restorer.apply_record(b"noise").is_err());
    let warnings: Vec<String> = restorer
        .finish()
        .unwrap()
        .iter()
        .map(|e| e.report())
        .collect();
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(warnings[0].contains("user.too-large"), "{warnings:?}");
    assert!(warnings[1].contains("system.unknown"), "{warnings:?}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "kept");
    let found = xattrs(&path).unwrap();
    assert_eq!(found.len(), 1);
    // ext4 has no NOCOW and no attributes of NTFS: each told once, and no error of the file.
    let told = restorer.end(|e| panic!("{}", e.report()));
    assert!(
        told.len() == 2
            && told[0].contains("1 files and folders had extended attributes that only NTFS keeps")
            && told[1].contains("1 files and folders had the inode flag +C"),
        "{told:?}"
    );
}

/// btrfs takes NOCOW for a file with data, and says so, but does not keep it.
#[test]
fn root_restore_warns_of_flags_that_btrfs_ignores() {
    if !has_driver("btrfs") {
        return;
    }
    let bench = Bench::alone();
    let image = bench.image("target.img", "btrfs", &[]);
    let attached = bench.attach(&image);
    let top = &attached.directory;
    let mut restorer = Restorer::new(Some(top.as_os_str().as_bytes())).unwrap();
    let record = guestsnap::stream::Record {
        flags: Some((IFlags::NOCOW | IFlags::NODUMP).bits()),
        ..Default::default()
    };
    for (name, content) in [("empty", ""), ("data", "data")] {
        let path = top.join(name);
        let mut wanted = request(&path, What::Object, 0o100_600);
        wanted.meta.size = content.len() as u64;
        restorer.create(&wanted).unwrap();
        restorer.write(content.as_bytes()).unwrap();
        restorer.finish_data().unwrap();
        for bytes in record.encode() {
            restorer.apply_record(&bytes).unwrap();
        }
        assert!(restorer.finish().unwrap().is_empty(), "{name}");
        let flags = rustix::fs::ioctl_getflags(File::open(&path).unwrap()).unwrap();
        assert!(flags.contains(IFlags::NODUMP), "{flags:?}");
        assert_eq!(flags.contains(IFlags::NOCOW), content.is_empty());
    }
    let told = restorer.end(|e| panic!("{}", e.report()));
    assert!(
        told.len() == 1 && told[0].contains("1 files are not NOCOW"),
        "{told:?}"
    );
}
