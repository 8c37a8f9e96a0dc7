//! Reading ahead of the daemon.

use crate::populate::{clear_fences, populate};
use crate::round_trip::copy_items;
use guestsnap::error::Code;
use guestsnap::inode::Kind;
use guestsnap::stream::{AheadOptions, ReadAhead, WalkOptions, Walker, ahead};
use guestsnap_bed::images::{Bench, Loop, assert_gone, open_descriptors, single};
use guestsnap_bed::run;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

/// An item's kind, its place in the order, and all that was read of it.
fn describe(item: ahead::Item) -> String {
    let mut buffer = vec![0; 10_000];
    let mut all = |mut prepared: ahead::Prepared| {
        let mut content = Vec::new();
        if prepared.entry.kind == Kind::Regular && prepared.entry.meta.size < 10_000_000 {
            let mut contents = prepared.contents().unwrap();
            loop {
                let length = contents.read(&mut buffer).unwrap();
                if length == 0 {
                    break;
                }
                content.extend_from_slice(&buffer[..length]);
            }
        }
        let sum = content
            .iter()
            .fold(0u64, |n, &b| n.wrapping_mul(31).wrapping_add(b.into()));
        let entry = &prepared.entry;
        let first = format!("{:?} {:?} {:?} {sum}", entry.path, entry.meta, entry.link);
        format!("{first} {:?}", prepared.attributes().unwrap().0)
    };
    match item {
        ahead::Item::Begin(entry) => format!("begin {:?} {:?}", entry.path, entry.meta),
        ahead::Item::Object(prepared) => all(prepared),
        ahead::Item::End(prepared) => format!("end {}", all(prepared)),
        other => format!("{other:?}"),
    }
}

/// The threads of this process. One that has been joined may still be on the kernel's list while it ends.
fn threads() -> usize {
    const PF_EXITING: u32 = 4;
    let lives = |task: fs::DirEntry| {
        let stat = fs::read_to_string(task.path().join("stat")).ok()?;
        // proc_pid_stat(5): the flags are the seventh field after the name, which is in brackets.
        let flags = stat.rsplit(')').next()?.split_whitespace().nth(6)?;
        (flags.parse::<u32>().unwrap() & PF_EXITING == 0).then_some(())
    };
    fs::read_dir("/proc/self/task")
        .unwrap()
        .flatten()
        .filter_map(lives)
        .count()
}

/// Every setting that changes how far ahead is read.
fn ahead_options() -> Vec<AheadOptions> {
    let mut all = vec![AheadOptions::default()];
    for (budget, threads) in [(64 << 10, 1), (1, 1), (1 << 20, 3), (64 << 10, 16)] {
        all.push(AheadOptions {
            budget,
            threads,
            ..AheadOptions::default()
        });
    }
    all.push(AheadOptions {
        changed_since: Some(1_400_000_000),
        ..AheadOptions::default()
    });
    all.push(AheadOptions {
        names_only: true,
        ..AheadOptions::default()
    });
    all
}

#[test]
fn root_reading_ahead_changes_nothing_but_the_time() {
    let bench = Bench::alone();
    let image = bench.image("guest.img", "ext4", &[]);
    populate(&bench.attach(&image).directory);
    let device = Loop::new(&image);
    let tree = single(&device);
    let plain: Vec<String> = Walker::new(&tree, WalkOptions::default())
        .map(|item| describe(item.into()))
        .collect();
    let before = (threads(), open_descriptors());
    for options in ahead_options() {
        let walk = WalkOptions::default();
        let ahead = ReadAhead::start(&tree, walk, options.clone()).unwrap();
        for (number, item) in ahead.enumerate() {
            assert!(plain[number] == describe(item), "{options:?} item {number}");
        }
        assert_eq!((threads(), open_descriptors()), before, "{options:?}");
    }
    let target = bench.path("target");
    let ahead = ReadAhead::start(&tree, WalkOptions::default(), AheadOptions::default()).unwrap();
    let log = copy_items(ahead, &target);
    clear_fences(&target);
    assert_eq!(log, Vec::<String>::new());
    tree.close().unwrap();
    assert_gone(&device);
}

#[test]
fn root_reading_ahead_can_be_dropped_stopped_and_told_to_leave_out() {
    let bench = Bench::alone();
    let image = bench.image("guest.img", "xfs", &[]);
    {
        let attached = bench.attach(&image);
        for folder in 0..40 {
            for inner in 0..5 {
                let path = attached.directory.join(format!("f{folder:02}/i{inner}"));
                fs::create_dir_all(&path).unwrap();
                for n in 0..30 {
                    fs::write(path.join(n.to_string()), vec![7; 3000]).unwrap();
                }
            }
        }
    }
    let device = Loop::new(&image);
    let tree = single(&device);
    let before = (threads(), open_descriptors());
    for options in ahead_options() {
        let start = || ReadAhead::start(&tree, WalkOptions::default(), options.clone()).unwrap();
        for taken in [0, 1, 50, 3000] {
            let mut ahead = start();
            assert_eq!(ahead.by_ref().take(taken).count(), taken);
            drop(ahead);
            assert_eq!((threads(), open_descriptors()), before);
        }
        let mut ahead = start();
        let stopped = AtomicBool::new(false);
        std::thread::scope(|threads| {
            threads.spawn(|| stopped.store(true, Ordering::Relaxed));
            // It may come to any point.
            while ahead
                .next_unless(|| stopped.load(Ordering::Relaxed))
                .is_some()
            {}
        });
        drop(ahead);
        assert_eq!((threads(), open_descriptors()), before);

        // Leave out whole folders, inner ones, and the last before an end.
        let mut ahead = start();
        let mut objects = 0;
        let mut ends = BTreeSet::new();
        while let Some(item) = ahead.next() {
            match item {
                ahead::Item::Begin(entry) => {
                    let text = String::from_utf8(entry.path).unwrap();
                    if text.ends_with("0") || text.starts_with("f3") && !text.contains("/") {
                        ahead.leave_out();
                    }
                }
                ahead::Item::Object(prepared) => {
                    assert!(!prepared.entry.path.starts_with(b"f3"));
                    objects += 1;
                }
                ahead::Item::End(prepared) => {
                    ends.insert(String::from_utf8(prepared.entry.path).unwrap());
                }
                other => panic!("{other:?}"),
            }
        }
        // f00, f10, f20, f30-f39 are gone, and i0 of the rest.
        assert_eq!(objects, 27 * 4 * 30, "{options:?}");
        assert_eq!(ends.len(), 27 * 5 + 1);
        drop(ahead);
        assert_eq!((threads(), open_descriptors()), before);
    }
    tree.close().unwrap();
    assert_gone(&device);
}

/// Items that wait to be taken hold few folders open, however deep or wide the tree is; in the daemon all jobs share the
/// descriptors.
#[test]
fn root_reading_ahead_holds_few_descriptors() {
    let bench = Bench::alone();
    let image = bench.image("guest.img", "ext4", &["-N", "20000"]);
    {
        let attached = bench.attach(&image);
        let mut deep = attached.directory.clone();
        for _ in 0..1500 {
            deep.push("d");
        }
        fs::create_dir_all(&deep).unwrap();
        for folder in 0..1500 {
            let path = attached.directory.join(format!("wide/{folder}"));
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("file"), "x").unwrap();
        }
    }
    let device = Loop::new(&image);
    let tree = single(&device);
    let count = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = count();
    let mut most = 0;
    let mut ahead =
        ReadAhead::start(&tree, WalkOptions::default(), AheadOptions::default()).unwrap();
    let mut taken = 0;
    // The line is full each time.
    for _ in 0..40 {
        std::thread::sleep(std::time::Duration::from_millis(50));
        most = most.max(count() - before);
        taken += ahead.by_ref().take(70).count();
    }
    taken += ahead.by_ref().count();
    assert!(taken > 6000, "{taken}");
    drop(ahead);
    println!("{most} descriptors");
    assert!(most < 320, "{most} descriptors");
    tree.close().unwrap();
    assert_gone(&device);
}

/// Ends the whole test run if the work does not end in time: a thread that hangs cannot be ended alone.
fn in_time<T>(seconds: u64, what: &str, work: impl FnOnce() -> T) -> T {
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let text = format!("{what}: not done in {seconds} s");
    let guard = std::thread::spawn(move || {
        let limit = std::time::Duration::from_secs(seconds);
        if wait.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            eprintln!("{text}");
            std::process::abort();
        }
    });
    let result = work();
    drop(done);
    guard.join().unwrap();
    result
}

#[test]
fn root_reading_ahead_with_the_least_memory_is_slow_but_never_stuck() {
    let bench = Bench::alone();
    let image = bench.image("guest.img", "ext4", &[]);
    {
        let attached = bench.attach(&image);
        for folder in 0..100 {
            let path = attached.directory.join(format!("f{folder:02}"));
            fs::create_dir(&path).unwrap();
            for n in 0..20 {
                // Some larger than the whole budget, some than a quarter of it.
                let length = [0, 100, 5000, 17_000, 70_000][n % 5];
                fs::write(path.join(n.to_string()), vec![n as u8; length]).unwrap();
            }
        }
    }
    let device = Loop::new(&image);
    let tree = single(&device);
    let before = (threads(), open_descriptors());
    for (budget, readers) in [(64 << 10, 1), (64 << 10, 4), (1, 1), (0, 0), (4096, 64)] {
        let options = AheadOptions {
            budget,
            threads: readers,
            ..AheadOptions::default()
        };
        let start = || ReadAhead::start(&tree, WalkOptions::default(), options.clone()).unwrap();
        let what = format!("{budget} bytes, {readers} threads");
        in_time(60, &what, || {
            let mut bytes = 0;
            let mut buffer = vec![0; 65536];
            for item in start() {
                let ahead::Item::Object(mut prepared) = item else {
                    continue;
                };
                let mut contents = prepared.contents().unwrap();
                loop {
                    let length = contents.read(&mut buffer).unwrap();
                    if length == 0 {
                        break;
                    }
                    bytes += length;
                }
            }
            assert_eq!(bytes, 100 * 4 * (100 + 5000 + 17_000 + 70_000), "{what}");
        });
        // All queues are full and all threads wait; then the job ends.
        for taken in [0, 1, 33, 200] {
            let mut ahead = start();
            ahead.by_ref().take(taken).for_each(drop);
            std::thread::sleep(std::time::Duration::from_millis(300));
            in_time(10, &what, || drop(ahead));
            // Another test may have closed some of its own.
            let left: Vec<_> = open_descriptors().difference(&before.1).cloned().collect();
            assert_eq!((threads(), left), (before.0, Vec::new()), "{what}");
        }
    }
    tree.close().unwrap();
    assert_gone(&device);
}

/// Names come in the order of their inodes, so that a disk with heads is asked in the order of its tracks.
#[test]
fn root_reading_ahead_follows_the_inodes() {
    let bench = Bench::alone();
    for fstype in ["ext4", "xfs"] {
        let image = bench.image(&format!("{fstype}.img"), fstype, &[]);
        let names: Vec<String> = (0..300).map(|n| format!("{:03}", n * 7 % 300)).collect();
        {
            let attached = bench.attach(&image);
            fs::create_dir(attached.directory.join("d")).unwrap();
            for name in &names {
                fs::write(attached.directory.join("d").join(name), "x").unwrap();
            }
        }
        let device = Loop::new(&image);
        let tree = single(&device);
        let options = AheadOptions::default();
        let mut seen = Vec::new();
        for item in ReadAhead::start(&tree, WalkOptions::default(), options).unwrap() {
            if let ahead::Item::Object(prepared) = item {
                seen.push((prepared.entry.meta.ino, prepared.entry.path));
            }
        }
        assert_eq!(seen.len(), names.len(), "{fstype}");
        assert!(seen.is_sorted_by_key(|(ino, _)| *ino), "{fstype}: {seen:?}");
        assert!(!seen.is_sorted_by_key(|(_, path)| path.clone()), "{fstype}");
        tree.close().unwrap();
        assert_gone(&device);
    }
}

/// Bytes that this process has read of files.
fn bytes_read() -> u64 {
    let text = fs::read_to_string("/proc/self/io").unwrap();
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix("rchar: "))
        .unwrap();
    line.parse().unwrap()
}

/// Nothing is read of what an incremental job does not ask for, but all of its metadata are there.
#[test]
fn root_reading_ahead_leaves_unchanged_files_alone() {
    const NEW: i64 = 1_600_000_000;
    let bench = Bench::alone();
    let image = bench.image("guest.img", "ext4", &[]);
    {
        let attached = bench.attach(&image);
        for n in 0..500 {
            let path = attached.directory.join(format!("{n:03}"));
            fs::write(&path, vec![7; 20_000]).unwrap();
        }
    }
    let device = Loop::new(&image);
    let tree = single(&device);
    // The files were made just now.
    let now = std::time::SystemTime::now();
    let now = now.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    for (since, read) in [(NEW, true), (now + 1000, false)] {
        let before = bytes_read();
        let options = AheadOptions {
            changed_since: Some(since),
            ..AheadOptions::default()
        };
        let ahead = ReadAhead::start(&tree, WalkOptions::default(), options).unwrap();
        let mut objects = 0;
        for item in ahead {
            if let ahead::Item::Object(prepared) = item {
                objects += 1;
                assert_eq!(prepared.entry.meta.size, 20_000);
                assert_eq!(
                    (prepared.has_contents(), prepared.has_attributes()),
                    (read, read)
                );
            }
        }
        assert_eq!(objects, 500);
        let bytes = bytes_read() - before;
        println!("changed since {since}: {bytes} bytes read");
        // /proc is read too.
        assert_eq!(bytes > 500 * 20_000, read, "{bytes}");
        assert!(read || bytes < 100_000, "{bytes}");
    }
    tree.close().unwrap();
    assert_gone(&device);
}

/// A backup does not push out the host's page cache.
#[test]
fn root_what_was_read_of_a_large_file_leaves_the_page_cache() {
    const SIZE: usize = 64 << 20;
    let bench = Bench::alone();
    let image = bench.image("guest.img", "ext4", &[]);
    let content = vec![7; SIZE];
    fs::write(bench.attach(&image).directory.join("large"), &content).unwrap();
    let device = Loop::new(&image);
    let tree = single(&device);
    let ahead = ReadAhead::start(&tree, WalkOptions::default(), AheadOptions::default()).unwrap();
    let objects = ahead.filter_map(|item| match item {
        ahead::Item::Object(prepared) => Some(prepared),
        _ => None,
    });
    let mut large = objects.last().unwrap();
    let mut contents = large.contents().unwrap();
    // The file's own descriptor; the tree has no path.
    let fd = fs::read_dir("/proc/self/fd").unwrap().flatten().find(|fd| {
        let target = fs::read_link(fd.path());
        target.is_ok_and(|target| target.ends_with("large"))
    });
    let path = fd.unwrap().path();
    let path = path
        .display()
        .to_string()
        .replace("self", &std::process::id().to_string());
    let held = File::open(&path).unwrap();
    let cached = || -> usize {
        let out = run!(
            "fincore",
            "--bytes",
            "--noheadings",
            "--output",
            "RES",
            &path
        );
        out.trim().parse().unwrap()
    };
    let mut buffer = vec![0; 65536];
    let (mut read, mut most) = (0, 0);
    loop {
        let length = contents.read(&mut buffer).unwrap();
        if length == 0 {
            break;
        }
        read += length;
        if read % (1 << 20) == 0 {
            most = most.max(cached());
        }
    }
    assert_eq!(read, SIZE);
    assert!(
        (65536..SIZE / 2).contains(&most),
        "{most} bytes in the cache"
    );
    let path = format!("/proc/{}/fd/{}", std::process::id(), held.as_raw_fd());
    drop((contents, large));
    let out = run!(
        "fincore",
        "--bytes",
        "--noheadings",
        "--output",
        "RES",
        &path
    );
    let rest: usize = out.trim().parse().unwrap();
    println!("at most {most} bytes in the cache, {rest} at the end");
    assert!(rest < 1 << 20, "{rest} bytes in the cache");
    drop(held);
    tree.close().unwrap();
    assert_gone(&device);
}

/// In a process without handlers of SIGSEGV and SIGBUS, as the daemon: where there are some, the runtime gives each
/// thread a stack for them, and ends the process if that finds no room.
#[test]
fn root_reading_ahead_makes_do_with_the_threads_it_gets() {
    let script = r#"trap '' SEGV BUS; exec "$0" --ignored --exact ahead::few_threads --nocapture"#;
    let exe = std::env::current_exe().unwrap();
    let output = Command::new("sh").arg("-c").arg(script).arg(exe).output();
    let output = output.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}\n{errors}"
    );
}

/// The other half of the test above.
#[test]
#[ignore = "run by the test above"]
fn few_threads() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let bench = Bench::alone();
    let image = bench.image("guest.img", "ext4", &[]);
    {
        let attached = bench.attach(&image);
        for n in 0..500 {
            fs::write(attached.directory.join(n.to_string()), vec![7; 3000]).unwrap();
        }
    }
    let device = Loop::new(&image);
    let tree = single(&device);
    let before = (threads(), open_descriptors());
    // So many that stacks of earlier threads, which the C library keeps, do not do. The small budget keeps them
    // alive until their results are taken.
    let options = AheadOptions {
        threads: 500,
        budget: 64 << 10,
        ..AheadOptions::default()
    };
    // Room in the heap, so that only threads do not fit under the limit.
    let chunks: Vec<Vec<u8>> = (0..1000).map(|_| vec![1; 4000]).collect();
    let top = vec![1; 64];
    drop(chunks);
    let old = getrlimit(Resource::As);
    let start = |room: u64| {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("VmSize:")).unwrap();
        let size: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        let limit = Rlimit {
            current: Some((size << 10) + room),
            ..old
        };
        setrlimit(Resource::As, limit).unwrap();
        let ahead = ReadAhead::start(&tree, WalkOptions::default(), options.clone());
        setrlimit(Resource::As, old).unwrap();
        ahead
    };
    let ahead = start(8 * (260 << 10)).unwrap();
    let readers = threads() - before.0 - 1;
    assert!((1..400).contains(&readers), "{readers} threads");
    // None at all: an error, and nothing is left.
    let error = start(64 << 10).unwrap_err();
    assert_eq!(error.code(), Code::Internal, "{error}");
    assert_eq!(threads(), before.0 + 1 + readers);
    let objects = in_time(60, "few threads", || {
        ahead
            .filter(|item| matches!(item, ahead::Item::Object(_)))
            .count()
    });
    assert_eq!(objects, 500);
    assert_eq!((threads(), open_descriptors()), before);
    drop(top);
    tree.close().unwrap();
    assert_gone(&device);
}
