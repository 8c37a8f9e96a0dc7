//! Real tools make guests' disks on loop devices, without device-mapper; guestsnap reads them.
//!
//! Needs root, loop devices, lvm2, fdisk (sfdisk) and e2fsprogs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use guestsnap::disk::map::CountingNamer;
use guestsnap::disk::{FileDisk, ReadAt, SkippedKind, VolumeKind, VolumeReader, examine, map};
use guestsnap::snapshot::Device;
use guestsnap_bed::examined::{device_bytes, refs, sfdisk, volume};
use guestsnap_bed::guestdisk::Loop;
use guestsnap_bed::populate;
use guestsnap_bed::workdir::WorkDir;

const MIB: u64 = 1024 * 1024;

/// Ends the test unless this tier can run.
fn root() {
    assert!(
        rustix::process::geteuid().is_root() && Path::new("/dev/loop-control").exists(),
        "these tests need root and loop devices"
    );
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .env("LVM_SUPPRESS_FD_WARNINGS", "1")
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Disks of one guest under construction: image files with loop devices for the tools.
struct Bench {
    folder: WorkDir,
    images: Vec<PathBuf>,
    loops: Vec<Loop>,
}

impl Bench {
    fn new() -> Self {
        Bench {
            folder: WorkDir::new().unwrap(),
            images: Vec::new(),
            loops: Vec::new(),
        }
    }

    fn image(&mut self, size: u64) -> PathBuf {
        let path = self
            .folder
            .path()
            .join(format!("disk{}.img", self.images.len()));
        File::create(&path).unwrap().set_len(size).unwrap();
        self.images.push(path.clone());
        path
    }

    /// A loop device on a part of an image, for the tools that need a device.
    fn tool_loop(&mut self, image: usize, offset: u64, len: u64) -> String {
        let tool = Loop::attach(&self.images[image], offset, Some(len), 0).unwrap();
        let device = tool.device().to_owned();
        self.loops.push(tool);
        device
    }

    /// Runs an LVM command that sees our loop devices only and has no driver.
    fn lvm(&self, args: &[&str]) {
        let devices: Vec<_> = self.loops.iter().map(Loop::device).collect();
        let devices = devices.join(",");
        let mut all = vec![
            args[0],
            "--driverloaded",
            "n",
            "--devices",
            &devices,
            "--config",
        ];
        all.push(
            "devices/hints=\"none\" backup/backup=0 backup/archive=0 global/notify_dbus=0 \
             activation/monitoring=0 activation/udev_sync=0 activation/udev_rules=0",
        );
        all.extend(&args[1..]);
        run("lvm", &all);
    }

    fn create(&self, name: &str, more: &[&str]) {
        let mut args = vec!["lvcreate", "-an", "-Zn", "-Wn", "-n", name];
        args.extend(more);
        self.lvm(&args);
    }

    /// Changes an LV until the newest metadata lie across the end of the ring; how many changes.
    fn change_until_wrapped(&self, lv: &str, image: usize) -> u64 {
        for round in 1..200 {
            self.lvm(&["lvchange", "-q", "--addtag", &format!("tag{round}"), lv]);
            let image = File::open(&self.images[image]).unwrap();
            let field = |at: u64| {
                let mut bytes = [0; 8];
                image.read_exact_at(&mut bytes, 4096 + at).unwrap();
                u64::from_le_bytes(bytes)
            };
            if field(40) + field(48) > field(32) {
                return round;
            }
        }
        panic!("the ring did not wrap");
    }

    /// The tools' loop devices go; the images stay.
    fn finish_tools(&mut self) {
        self.loops.clear();
    }

    fn disks(&self) -> Vec<FileDisk> {
        self.images
            .iter()
            .map(|path| FileDisk::open(path).unwrap())
            .collect()
    }

    fn devices(&self) -> Vec<Device> {
        let device = |path: &PathBuf| Device {
            path: path.clone(),
            size: path.metadata().unwrap().len(),
            read_only: false,
        };
        self.images.iter().map(device).collect()
    }
}

fn bytes(disk: &dyn ReadAt) -> Vec<u8> {
    let mut all = vec![0; usize::try_from(disk.size()).unwrap()];
    disk.read_exact_at(&mut all, 0).unwrap();
    all
}

#[test]
fn root_mbr_with_logical_partitions_as_util_linux_sees_it() {
    root();
    let mut bench = Bench::new();
    let image = bench.image(64 * MIB);
    sfdisk(
        &image,
        "label: dos\nlabel-id: 0xdeadbeef\n2048,8192,83\n10240,4096,82\n16384,100000,0f\n,,,-\n\
         18432,8192,83\n30720,8192,83\n40960,,83\n",
    )
    .unwrap();
    let disks = bench.disks();
    let found = examine(&refs(&disks)).unwrap();
    // The view of util-linux; Linux numbers them the same way.
    let listed = run(
        "partx",
        &["-g", "-o", "NR,START,SECTORS", image.to_str().unwrap()],
    );
    let reference: Vec<(u32, u64, u64)> = listed
        .lines()
        .map(|line| {
            let mut words = line
                .split_whitespace()
                .map(|word| word.parse::<u64>().unwrap());
            let mut next = || words.next().unwrap();
            (u32::try_from(next()).unwrap(), next(), next())
        })
        // The extended partition itself.
        .filter(|(number, _, _)| *number != 3)
        .collect();
    let ours: Vec<(u32, u64, u64)> = found.disks[0]
        .table
        .partitions
        .iter()
        .map(|p| (p.number, p.start / 512, p.len / 512))
        .collect();
    assert_eq!(ours, reference);
    assert_eq!(ours.len(), 6);
    assert!(found.notes.is_empty(), "{:?}", found.notes);
    let VolumeKind::Partition { partuuid, .. } = &volume(&found, "p5").kind else {
        panic!()
    };
    assert_eq!(partuuid.as_deref(), Some("deadbeef-05"));
}

#[test]
fn root_gpt_and_loop_mapping() {
    root();
    let mut bench = Bench::new();
    let image = bench.image(64 * MIB);
    sfdisk(
        &image,
        "label: gpt\nstart=2048,size=16384,type=L,name=\"boot of it\"\nstart=20480,size=40960,type=V\n",
    ).unwrap();
    let content = populate::bytes(7, 16384 * 512);
    let file = File::options().write(true).open(&image).unwrap();
    file.write_all_at(&content, 2048 * 512).unwrap();
    let disks = bench.disks();
    let found = examine(&refs(&disks)).unwrap();
    assert!(found.notes.is_empty(), "{:?}", found.notes);
    let boot = volume(&found, "p1");
    let VolumeKind::Partition { partlabel, .. } = &boot.kind else {
        panic!()
    };
    assert_eq!(partlabel.as_deref(), Some("boot of it"));
    let all = refs(&disks);
    let reader = VolumeReader::new(&all, &boot.layout).unwrap();
    assert!(bytes(&reader) == content);

    let mapped = map(boot, &bench.devices(), &mut CountingNamer::new("test")).unwrap();
    assert!(mapped.path().starts_with("/dev"));
    assert!(device_bytes(&mapped) == content);
    // Writes arrive in the image: journals must be replayed.
    let device = File::options().write(true).open(mapped.path()).unwrap();
    device.write_all_at(b"replayed", 4096).unwrap();
    device.sync_all().unwrap();
    drop(device);
    let name = mapped
        .path()
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned();
    mapped.close().unwrap();
    assert!(!Path::new(&format!("/sys/block/{name}/loop")).exists());
    let mut buf = [0; 8];
    File::open(&image)
        .unwrap()
        .read_exact_at(&mut buf, 2048 * 512 + 4096)
        .unwrap();
    assert_eq!(&buf, b"replayed");
}

/// A process keeps our loop device open: the error names it, and the device goes with its last user.
#[test]
fn root_busy_loop_device_is_reported() {
    root();
    let mut bench = Bench::new();
    let image = bench.image(64 * MIB);
    sfdisk(&image, "label: gpt\nstart=2048,size=16384,type=L\n").unwrap();
    let disks = bench.disks();
    let found = examine(&refs(&disks)).unwrap();
    let volume = volume(&found, "p1");
    let mapped = map(volume, &bench.devices(), &mut CountingNamer::new("test")).unwrap();
    let path = mapped.path().to_path_buf();
    let holder = File::open(&path).unwrap();
    let report = mapped.close().unwrap_err().report();
    assert!(report.contains("GS-307"), "{report}");
    let who = format!("(pid {}): open {}", std::process::id(), path.display());
    assert!(report.contains(&who), "{report} does not say {who:?}");
    drop(holder);
    let name = path.file_name().unwrap().to_str().unwrap();
    let bound = PathBuf::from(format!("/sys/block/{name}/loop"));
    for _ in 0..100 {
        if !bound.exists() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    panic!("{name} is still bound");
}

/// Reads of many threads must not wait for each other in a loop device: the kernel's own answer to `losetup` says
/// whether it can do without its cache. A filesystem must still find sectors as small as it wants.
#[test]
fn root_files_are_mapped_for_direct_io() {
    root();
    for (block, start, sector) in [
        ("4096", 0, "4096"),
        ("1024", 0, "512"),
        ("4096", 63, "512"),
        ("4096", 2048, "4096"),
    ] {
        let what = format!("blocks of {block} from sector {start}");
        let mut bench = Bench::new();
        let image = bench.image(48 * MIB);
        let len = match start {
            0 => 48 * MIB,
            _ => {
                sfdisk(
                    &image,
                    &format!("label: dos\nstart={start},size=65536,type=83\n"),
                )
                .unwrap();
                65536 * 512
            }
        };
        let tool = bench.tool_loop(0, start * 512, len);
        run("mkfs.ext4", &["-q", "-b", block, &tool]);
        bench.finish_tools();
        let size = sector.parse().unwrap();
        let tool = Loop::attach(&image, start * 512, Some(len), size).unwrap();
        run("losetup", &["--direct-io=on", tool.device()]);
        let about = |device: &str, name: &str| {
            let path = device.replace("/dev/", "/sys/block/") + "/" + name;
            std::fs::read_to_string(path).unwrap().trim().to_owned()
        };

        let found = examine(&refs(&bench.disks())).unwrap();
        let volume = &found.volumes[0];
        let mapped = map(volume, &bench.devices(), &mut CountingNamer::new("test")).unwrap();
        let device = mapped.path().to_str().unwrap().to_owned();
        assert_eq!(about(&device, "queue/logical_block_size"), sector, "{what}");
        assert_eq!(
            about(&device, "loop/dio"),
            about(tool.device(), "loop/dio"),
            "{what}"
        );
        let point = bench.folder.path().join("mnt");
        std::fs::create_dir(&point).unwrap();
        let point = point.to_str().unwrap();
        run("mount", &["-o", "ro", &device, point]);
        run("umount", &[point]);
        mapped.close().unwrap();
    }
}

#[test]
fn root_lvm_linear_striped_and_raid0() {
    root();
    let mut bench = Bench::new();
    bench.image(96 * MIB);
    bench.image(64 * MIB);
    sfdisk(
        &bench.images[0].clone(),
        "label: dos\nstart=2048,size=2048,type=83\nstart=4096,type=8e\n",
    )
    .unwrap();
    let first = bench.tool_loop(0, 2 * MIB, 94 * MIB);
    let second = bench.tool_loop(1, 0, 64 * MIB);
    bench.lvm(&["pvcreate", "-q", &first, &second]);
    bench.lvm(&["vgcreate", "-q", "-s", "1m", "VolGroup00", &first, &second]);
    bench.create("root", &["-L", "8m", "VolGroup00", &first]);
    bench.create("gap", &["-L", "2m", "VolGroup00", &first]);
    bench.create(
        "striped",
        &["-L", "8m", "-i", "2", "-I", "64k", "VolGroup00"],
    );
    bench.create(
        "raided",
        &[
            "-L",
            "8m",
            "--type",
            "raid0",
            "-i",
            "2",
            "-I",
            "4k",
            "VolGroup00",
        ],
    );
    // Three segments on two disks.
    bench.lvm(&["lvextend", "-q", "-L", "+4m", "VolGroup00/root", &second]);
    bench.lvm(&["lvextend", "-q", "-L", "+4m", "VolGroup00/root", &first]);
    bench.lvm(&["lvremove", "-q", "-y", "VolGroup00/gap"]);
    bench.finish_tools();

    let disks = bench.disks();
    let found = examine(&refs(&disks)).unwrap();
    assert!(found.notes.is_empty(), "{:?}", found.notes);
    assert!(found.skipped.is_empty(), "{:?}", found.skipped);
    let names: Vec<&str> = found.volumes.iter().map(|v| v.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "p1",
            "VolGroup00/raided",
            "VolGroup00/root",
            "VolGroup00/striped"
        ]
    );
    assert_eq!(found.groups[0].physical_volumes, ["p2", "disk2"]);
    let root = volume(&found, "VolGroup00/root");
    assert_eq!(root.size(), 16 * MIB);
    assert_eq!(volume(&found, "VolGroup00/striped").size(), 8 * MIB);
    let json = serde_json::to_value(&found).unwrap();
    assert_eq!(json["disks"][0]["table"]["kind"], "mbr");
    assert_eq!(json["volumes"][2]["kind"]["lv"]["vg"], "VolGroup00");

    // A host without device-mapper says so for what it cannot map.
    if !Path::new("/dev/mapper/control").exists() {
        let error = map(root, &bench.devices(), &mut CountingNamer::new("t")).unwrap_err();
        assert!(
            error.report().contains("device-mapper"),
            "{}",
            error.report()
        );
    }
}

#[test]
fn root_lvm_metadata_ring_wraps_and_pv_goes_missing() {
    root();
    let mut bench = Bench::new();
    bench.image(32 * MIB);
    bench.image(32 * MIB);
    let first = bench.tool_loop(0, 0, 32 * MIB);
    let second = bench.tool_loop(1, 0, 32 * MIB);
    // The smallest ring, and the label in sector 3.
    for device in [&first, &second] {
        bench.lvm(&[
            "pvcreate",
            "-q",
            "--metadatasize",
            "60k",
            "--dataalignment",
            "64k",
            "--labelsector",
            "3",
            device,
        ]);
    }
    bench.lvm(&[
        "vgcreate",
        "-q",
        "-s",
        "128k",
        "vg.with-odd_name+",
        &first,
        &second,
    ]);
    bench.create("one", &["-l", "3", "vg.with-odd_name+", &first]);
    bench.create("two", &["-l", "3", "vg.with-odd_name+", &second]);
    let seqno = 3 + bench.change_until_wrapped("vg.with-odd_name+/one", 0);
    bench.finish_tools();
    let disks = bench.disks();
    let all = refs(&disks);
    let found = examine(&all).unwrap();
    assert!(found.notes.is_empty(), "{:?}", found.notes);
    assert_eq!(found.volumes.len(), 2);
    assert_eq!(found.groups[0].seqno, seqno);

    let alone = examine(&all[..1]).unwrap();
    assert_eq!(alone.volumes.len(), 1);
    assert_eq!(alone.volumes[0].name, "vg.with-odd_name+/one");
    assert_eq!(alone.skipped[0].name, "vg.with-odd_name+/two");
    assert_eq!(alone.skipped[0].kind, SkippedKind::LogicalVolume);
    assert!(
        alone.skipped[0].reason.contains("missing"),
        "{}",
        alone.skipped[0].reason
    );

    // One disk twice, as with multipath: nothing is guessed.
    let twice = examine(&[all[0], all[1], all[0]]).unwrap();
    assert_eq!(twice.volumes.len(), 1);
    assert_eq!(twice.volumes[0].name, "vg.with-odd_name+/two");
    assert!(
        twice.notes.iter().any(|n| n.contains("twice")),
        "{:?}",
        twice.notes
    );
}

#[test]
fn root_filesystems_on_whole_disks_are_not_tables() {
    root();
    let mut bench = Bench::new();
    let fat = bench.image(64 * MIB);
    run("mkfs.vfat", &[fat.to_str().unwrap()]);
    let ext = bench.image(16 * MIB);
    run("mkfs.ext4", &["-q", ext.to_str().unwrap()]);
    let disks = bench.disks();
    let found = examine(&refs(&disks)).unwrap();
    let names: Vec<&str> = found.volumes.iter().map(|v| v.name.as_str()).collect();
    assert_eq!(names, ["disk", "disk2"]);
    assert!(matches!(
        found.volumes[0].kind,
        VolumeKind::Whole { disk: 0 }
    ));
}

/// Writes the small disks that fuzzing and the tests of damaged disks start from. Run with
/// `GUESTSNAP_WRITE_SEEDS=1` after a change here; the text `kinds` comes from a real guest.
#[test]
fn root_write_seeds() {
    if std::env::var_os("GUESTSNAP_WRITE_SEEDS").is_none() {
        return;
    }
    root();
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let keep = |target: &str, name: &str, image: &Path, len: u64| {
        let folder = corpus.join(target);
        std::fs::create_dir_all(&folder).unwrap();
        let mut head = vec![0; usize::try_from(len).unwrap()];
        File::open(image)
            .unwrap()
            .read_exact_at(&mut head, 0)
            .unwrap();
        std::fs::write(folder.join(name), head).unwrap();
    };
    let mut bench = Bench::new();
    let mbr = bench.image(32 * 1024);
    sfdisk(
        &mbr,
        "label: dos\n8,8,83\nstart=16,size=4,type=82\n20,44,0f\nstart=4,size=4,type=8e\n\
         start=22,size=4,type=83\nstart=30,size=8,type=83\nstart=40,size=8,type=83\n",
    )
    .unwrap();
    keep("disk_table", "mbr", &mbr, 32 * 1024);
    let gpt = bench.image(64 * 1024);
    sfdisk(
        &gpt,
        "label: gpt\nfirst-lba: 34\nstart=40,size=8,name=one\nstart=60,size=20\n",
    )
    .unwrap();
    keep("disk_table", "gpt", &gpt, 64 * 1024);
    let mut sectors = vec![0; 17 * 1024];
    File::open(&gpt)
        .unwrap()
        .read_exact_at(&mut sectors, 512)
        .unwrap();
    std::fs::create_dir_all(corpus.join("disk_gpt")).unwrap();
    std::fs::write(corpus.join("disk_gpt/sfdisk"), sectors).unwrap();
    for (name, wrapped) in [("pv", false), ("wrapped", true)] {
        let mut bench = Bench::new();
        let image = bench.image(4 * MIB);
        let device = bench.tool_loop(0, 0, 4 * MIB);
        let size = ["--metadatasize", "60k", "--dataalignment", "64k"];
        bench.lvm(&[&["pvcreate", "-q"], &size[..], &[&device]].concat());
        bench.lvm(&["vgcreate", "-q", "-s", "4k", "guest", &device]);
        bench.create("root", &["-l", "3", "guest"]);
        bench.create("gap", &["-l", "1", "guest"]);
        bench.create("swap", &["-l", "1", "guest"]);
        bench.lvm(&["lvremove", "-q", "-y", "guest/gap"]);
        bench.lvm(&["lvextend", "-q", "-l", "+2", "guest/root"]);
        if wrapped {
            bench.change_until_wrapped("guest/root", 0);
        }
        bench.finish_tools();
        keep("disk_lvm_label", name, &image, 128 * 1024);
    }
}
