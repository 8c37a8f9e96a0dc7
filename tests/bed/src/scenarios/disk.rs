//! Guest volumes of all kinds, made and written by the real LVM and kernel, read through our own maps.

use crate::check;
use crate::examined::{device_bytes, refs, sfdisk, volume};
use crate::guestdisk::{Loop, image};
use crate::inside::{Scenario, scenario};
use crate::lvm::{HostVg, lvm};
use crate::populate::bytes;
use crate::workdir::WorkDir;
use crate::{Result, cmd};
use guestsnap::disk::map::CountingNamer;
use guestsnap::disk::{Examined, FileDisk, Layout, Mapped, ReadAt, VolumeReader, examine, map};
use guestsnap::snapshot::Device;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// In the emulated machines.
pub const VM: &[Scenario] = &[
    scenario("disk_partition_on_lv", partition_on_lv).only("bookworm"),
    scenario("disk_lvm_of_many_kinds", lvm_of_many_kinds).only("trixie"),
    scenario(
        "disk_files_with_several_segments",
        files_with_several_segments,
    )
    .only("trixie"),
    scenario(
        "disk_killed_process_leaves_nothing",
        killed_process_leaves_nothing,
    )
    .only("bookworm"),
    scenario("disk_busy_device_is_reported", busy_device_is_reported).only("trixie"),
];

const MIB: u64 = 1024 * 1024;

/// The disks of one guest, and its VG while it runs.
struct Guest {
    disks: Vec<PathBuf>,
    loops: Vec<Loop>,
    vg: Option<&'static str>,
}

impl Guest {
    fn on_lvs(vg: &HostVg, sizes: &[u64]) -> Result<Self> {
        let mut disks = Vec::new();
        for (index, size) in sizes.iter().enumerate() {
            disks.push(vg.lv(&format!("domu-disk{index}"), &format!("{size}b"))?);
        }
        Ok(Guest {
            disks,
            loops: Vec::new(),
            vg: None,
        })
    }

    fn on_files(dir: &WorkDir, sizes: &[u64]) -> Result<Self> {
        let mut disks = Vec::new();
        for (index, size) in sizes.iter().enumerate() {
            let path = dir.join(format!("disk{index}"));
            image(&path, *size)?;
            disks.push(path);
        }
        Ok(Guest {
            disks,
            loops: Vec::new(),
            vg: None,
        })
    }

    /// Makes PVs of all disks from these offsets on, and a VG on them; the devices.
    fn start(&mut self, name: &'static str, offsets: &[u64]) -> Result<Vec<String>> {
        for (disk, offset) in self.disks.iter().zip(offsets) {
            self.loops.push(Loop::attach(disk, *offset, None, 0)?);
        }
        let devices: Vec<String> = self.loops.iter().map(|l| l.device().to_string()).collect();
        let mut args = vec!["-s", "1m", name];
        args.extend(devices.iter().map(String::as_str));
        self.lvm("vgcreate", &args)?;
        self.vg = Some(name);
        Ok(devices)
    }

    fn lvm(&self, command: &str, args: &[&str]) -> Result<String> {
        let devices: Vec<&str> = self.loops.iter().map(Loop::device).collect();
        lvm(
            command,
            &[&["-q", "-y", "--devices", &devices.join(",")], args].concat(),
        )
    }

    /// The VG is deactivated, the devices of the tools go.
    fn shut_down(&mut self) -> Result {
        if let Some(vg) = self.vg.take() {
            self.lvm("vgchange", &["-an", vg])?;
        }
        self.loops.clear();
        cmd::run("udevadm", ["settle"])?;
        Ok(())
    }

    fn open(&self) -> Vec<FileDisk> {
        self.disks
            .iter()
            .map(|path| FileDisk::open(path).unwrap())
            .collect()
    }

    fn devices(&self) -> Vec<Device> {
        let device = |path: &PathBuf| Device {
            path: path.clone(),
            size: FileDisk::open(path).unwrap().size(),
            read_only: false,
        };
        self.disks.iter().map(device).collect()
    }

    fn examine(&self) -> Examined {
        let disks = self.open();
        examine(&refs(&disks)).unwrap()
    }
}

fn write(device: &Path, content: &[u8], offset: u64) -> Result {
    let file = File::options().write(true).open(device)?;
    file.write_all_at(content, offset)?;
    file.sync_all()?;
    Ok(())
}

/// Writes noise to a device of the guest and returns it.
fn fill(device: &str, len: u64, seed: u64) -> Result<Vec<u8>> {
    let content = bytes(seed, usize::try_from(len)?);
    write(Path::new(device), &content, 0)?;
    Ok(content)
}

fn our_devices() -> Vec<String> {
    let all = cmd::run("dmsetup", ["ls"]).unwrap();
    let names = all
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    names
        .filter(|name| name.starts_with("guestsnap-"))
        .map(str::to_owned)
        .collect()
}

fn partition_on_lv() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let dir = WorkDir::new()?;
    let guest = Guest::on_lvs(&vg, &[64 * MIB, 16 * MIB])?;
    sfdisk(&guest.disks[0], "label: gpt\nstart=2048,size=20480\n")?;
    // A filesystem that udev would make by-uuid links for.
    let file = dir.join("fs");
    image(&file, 10 * MIB)?;
    let uuid = "11111111-2222-3333-4444-555555555555";
    cmd::run("mkfs.ext4", ["-q", "-U", uuid, &file.display().to_string()])?;
    let content = std::fs::read(&file)?;
    write(&guest.disks[0], &content, MIB)?;

    let found = guest.examine();
    let mut names = CountingNamer::new("1");
    let started = Instant::now();
    let mapped = map(volume(&found, "p1"), &guest.devices(), &mut names).unwrap();
    println!("mapped in {:?}", started.elapsed());
    assert_eq!(our_devices(), ["guestsnap-1-1"]);
    assert_eq!(
        mapped.describe(),
        format!("{} (guestsnap-1-1)", mapped.path().display())
    );
    assert!(device_bytes(&mapped) == content);
    let link = format!("/dev/disk/by-uuid/{uuid}");
    cmd::run("udevadm", ["settle"])?;
    assert!(!Path::new(&link).exists());
    cmd::run("udevadm", ["trigger", "--action=change"])?;
    cmd::run("udevadm", ["settle"])?;
    assert!(!Path::new(&link).exists());
    let info = cmd::run("dmsetup", ["info", "guestsnap-1-1"])?;
    assert!(info.contains("LVM-guestsnap_private_device_"), "{info}");
    assert!(info.contains(".guestsnap:1:1"), "{info}");
    assert!(info.contains("DEFERRED REMOVE"), "{info}");

    // It mounts, and what is written arrives in the guest's disk.
    let point = dir.join("mnt").display().to_string();
    std::fs::create_dir(&point)?;
    cmd::run(
        "mount",
        ["-t", "ext4", &mapped.path().display().to_string(), &point],
    )?;
    std::fs::write(format!("{point}/hello"), "there")?;
    cmd::run("umount", [&point])?;
    let started = Instant::now();
    mapped.close().unwrap();
    println!("closed in {:?}", started.elapsed());
    assert!(our_devices().is_empty());
    let disks = guest.open();
    let all = refs(&disks);
    let reader = VolumeReader::new(&all, &volume(&found, "p1").layout).unwrap();
    let mut after = vec![0; content.len()];
    reader.read_exact_at(&mut after, 0)?;
    assert!(after != content);

    // A whole disk is the device itself.
    let mapped = map(volume(&found, "disk2"), &guest.devices(), &mut names).unwrap();
    assert_eq!(mapped.path(), guest.disks[1]);
    assert!(our_devices().is_empty());
    mapped.close().unwrap();
    Ok(())
}

fn lvm_of_many_kinds() -> Result {
    let mut vg = HostVg::on_scratch("hostvg")?;
    let mut guest = Guest::on_lvs(&vg, &[300 * MIB, 200 * MIB])?;
    let contents = volumes_of_many_kinds(&mut guest)?;
    guest.shut_down()?;
    // The host's VG gets the guest's name: no harm.
    lvm("vgrename", &["hostvg", "vg0"])?;
    vg.name = "vg0".into();
    for disk in &mut guest.disks {
        *disk = vg.node(disk.file_name().unwrap().to_str().unwrap());
    }

    let found = guest.examine();
    assert!(found.notes.is_empty(), "{:?}", found.notes);
    let skipped: Vec<(&str, &str)> = found
        .skipped
        .iter()
        .map(|s| (s.name.as_str(), s.reason.as_str()))
        .collect();
    assert_eq!(
        skipped,
        [("vg0/snap", "a snapshot of root inside the guest")]
    );
    assert_eq!(found.volumes.len(), contents.len());
    let mut names = CountingNamer::new("2");
    let mapped = mapped_with(&guest, &found, &contents, &mut names)?;
    // Three thin volumes: each has a base, a store for writes, and itself.
    assert_eq!(our_devices().len(), 7 + 9);
    check!(
        !cmd::run("dmsetup", ["table"])?
            .lines()
            .any(|line| line.starts_with("guestsnap-") && line.contains(" thin")),
        "the kernel's dm-thin sees a guest's pool"
    );
    writes_stay_in_their_volume(&contents, &mapped)?;
    let started = Instant::now();
    for device in mapped {
        device.close().unwrap();
    }
    println!("all closed in {:?}", started.elapsed());
    assert!(our_devices().is_empty(), "{:?}", our_devices());
    thin_volumes_are_as_before(&guest, &found, &contents, &mut names);
    wrong_transaction_is_refused(&guest, &found, &mut names);
    Ok(())
}

/// Volumes of all kinds and snapshots in the guest's group; what is in each.
fn volumes_of_many_kinds(guest: &mut Guest) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let pvs = guest.start("vg0", &[0, 0])?;
    let (first, second) = (pvs[0].as_str(), pvs[1].as_str());
    let mut contents: Vec<(&'static str, Vec<u8>)> = Vec::new();
    let kinds: [(&'static str, u64, &[&str]); 7] = [
        ("root", 8, &["vg0", first]),
        ("striped", 8, &["-i", "2", "-I", "64k", "vg0"]),
        ("odd", 12, &["-i", "2", "-I", "4k", "vg0"]),
        (
            "raid0",
            8,
            &["--type", "raid0", "-i", "2", "-I", "16k", "vg0"],
        ),
        ("raid1", 8, &["--type", "raid1", "-m", "1", "vg0"]),
        ("mirror", 8, &["--type", "mirror", "-m", "1", "vg0"]),
        (
            "corelog",
            8,
            &["--type", "mirror", "-m", "1", "--mirrorlog", "core", "vg0"],
        ),
    ];
    for (name, mib, args) in kinds {
        guest.lvm(
            "lvcreate",
            &[&["-Wn", "-n", name, "-L", &format!("{mib}m")], args].concat(),
        )?;
    }
    guest.lvm("lvextend", &["-L", "+4m", "vg0/root", second])?;
    guest.lvm("lvextend", &["-L", "+3m", "vg0/root", first])?;
    let pool = [
        "-L",
        "40m",
        "--type",
        "thin-pool",
        "-c",
        "128k",
        "--poolmetadatasize",
        "4m",
        "-n",
        "pool",
        "vg0",
    ];
    guest.lvm("lvcreate", &pool)?;
    guest.lvm(
        "lvcreate",
        &["-V", "64m", "--thinpool", "vg0/pool", "-n", "thin1"],
    )?;
    guest.lvm(
        "lvcreate",
        &["-V", "16m", "--thinpool", "vg0/pool", "-n", "thin2"],
    )?;
    for (seed, (name, mib, _)) in (1..).zip(kinds) {
        let len = if name == "root" { 15 } else { mib } * MIB;
        contents.push((name, fill(&format!("/dev/vg0/{name}"), len, seed)?));
    }
    let old = fill("/dev/vg0/thin1", 8 * MIB, 50)?;
    contents.push(("thin2", fill("/dev/vg0/thin2", 8 * MIB, 51)?));
    // Snapshots of both kinds, and the origins move on.
    guest.lvm("lvcreate", &["-s", "-n", "thinsnap", "-kn", "vg0/thin1"])?;
    let mut new = fill("/dev/vg0/thin1", 4 * MIB, 60)?;
    new.extend_from_slice(&old[new.len()..]);
    contents.push(("thin1", new));
    contents.push(("thinsnap", old));
    guest.lvm("lvcreate", &["-s", "-L", "4m", "-n", "snap", "vg0/root"])?;
    contents[0].1[..512].fill(b'x');
    write(Path::new("/dev/vg0/root"), &[b'x'; 512], 0)?;
    cmd::wait_for("raid1 in sync", Duration::from_secs(100), || {
        let status = cmd::run("dmsetup", ["status"])?;
        let done = status
            .lines()
            .all(|l| !l.contains(" raid raid1 ") || l.contains(" AA "));
        Ok(done.then_some(()))
    })?;
    Ok(contents)
}

/// Devices of all volumes, with the bytes that are in them.
fn mapped_with(
    guest: &Guest,
    found: &Examined,
    contents: &[(&str, Vec<u8>)],
    names: &mut CountingNamer,
) -> Result<Vec<Mapped>> {
    let devices = guest.devices();
    let disks = guest.open();
    let all = refs(&disks);
    let mut mapped = Vec::new();
    for (name, content) in contents {
        let volume = volume(found, &format!("vg0/{name}"));
        // Segments can be read without a device as well.
        if let Some(reader) = VolumeReader::new(&all, &volume.layout) {
            let mut direct = vec![0; content.len()];
            reader.read_exact_at(&mut direct, 0)?;
            assert!(
                direct == *content,
                "{name} has other bytes without a device"
            );
        }
        let started = Instant::now();
        let device = map(volume, &devices, names).unwrap();
        println!("{name}: {} in {:?}", device.describe(), started.elapsed());
        let have = device_bytes(&device);
        assert!(
            have[..content.len()] == content[..],
            "{name} has other bytes"
        );
        // Blocks never written to a thin volume read as zeros.
        assert!(
            have[content.len()..].iter().all(|b| *b == 0),
            "{name} has more bytes"
        );
        mapped.push(device);
    }
    Ok(mapped)
}

/// Nothing that was written to a thin volume is in the guest's disks.
fn thin_volumes_are_as_before(
    guest: &Guest,
    found: &Examined,
    contents: &[(&str, Vec<u8>)],
    names: &mut CountingNamer,
) {
    let devices = guest.devices();
    for name in ["vg0/thin1", "vg0/thinsnap"] {
        let device = map(volume(found, name), &devices, names).unwrap();
        let have = device_bytes(&device);
        let (_, content) = contents.iter().find(|(n, _)| name.ends_with(n)).unwrap();
        assert!(
            have[..content.len()] == content[..],
            "{name} was written to"
        );
        assert!(have[content.len()..].iter().all(|b| *b == 0), "{name} too");
        device.close().unwrap();
        assert!(our_devices().is_empty());
    }
}

/// A wrong transaction id is refused, and nothing is left of the attempt.
fn wrong_transaction_is_refused(guest: &Guest, found: &Examined, names: &mut CountingNamer) {
    let mut wrong = volume(found, "vg0/thin1").clone();
    let Layout::Thin { pool, .. } = &mut wrong.layout else {
        panic!("{wrong:?}")
    };
    let mut other = (**pool).clone();
    other.transaction_id += 1;
    *pool = other.into();
    let error = map(&wrong, &guest.devices(), names).unwrap_err().report();
    assert!(error.contains("transaction"), "{error}");
    assert!(our_devices().is_empty());
}

/// Replays write to thin volumes: to chunks that a snapshot shares, and to gaps. Both arrive, and in no other volume.
fn writes_stay_in_their_volume(contents: &[(&str, Vec<u8>)], mapped: &[Mapped]) -> Result {
    let place = |name: &str| contents.iter().position(|(n, _)| *n == name).unwrap();
    let (origin, snapshot) = (place("thin1"), place("thinsnap"));
    // Shared by both, beyond what the origin wrote later; and in no chunk at all.
    let (shared, gap) = (6 * MIB, 32 * MIB + 12_288);
    let new = bytes(77, 1 << 20);
    for at in [shared, gap] {
        write(mapped[origin].path(), &new, at)?;
    }
    cmd::sh("sync; echo 3 > /proc/sys/vm/drop_caches")?;
    let place_of = |at: u64| usize::try_from(at).unwrap();
    let have = device_bytes(&mapped[origin]);
    for at in [shared, gap] {
        let (at, end) = (place_of(at), place_of(at + MIB));
        check!(have[at..end] == new[..], "what was written at {at} is lost");
        check!(
            have[at - 4096..at] != new[..4096] && have[end..end + 4096] != new[..4096],
            "more was written than asked"
        );
    }
    let have = device_bytes(&mapped[snapshot]);
    let content = &contents[snapshot].1;
    check!(have[..content.len()] == content[..], "the snapshot changed");
    check!(
        have[content.len()..].iter().all(|b| *b == 0),
        "the snapshot's gap changed"
    );
    Ok(())
}

fn files_with_several_segments() -> Result {
    let dir = WorkDir::new()?;
    let mut guest = Guest::on_files(&dir, &[64 * MIB, 64 * MIB])?;
    guest.start("guest", &[MIB, 0])?;
    guest.lvm(
        "lvcreate",
        &[
            "-Wn", "-n", "striped", "-L", "8m", "-i", "2", "-I", "64k", "guest",
        ],
    )?;
    let content = fill("/dev/guest/striped", 8 * MIB, 5)?;
    guest.shut_down()?;
    let disk = guest.disks[0].display().to_string();
    cmd::run_with_input(
        "sfdisk",
        ["-q", "-w", "never", &disk],
        b"label: dos\nstart=2048,type=8e\n",
    )?;
    let found = guest.examine();
    let mut names = CountingNamer::new("3");
    let mapped = map(
        volume(&found, "guest/striped"),
        &guest.devices(),
        &mut names,
    )
    .unwrap();
    assert!(device_bytes(&mapped) == content);
    mapped.close().unwrap();
    assert!(our_devices().is_empty());
    Ok(())
}

/// Maps everything in a child that then is killed.
fn killed_process_leaves_nothing() -> Result {
    const CHILD: &str = "GUESTSNAP_DISK_CHILD";
    if let Some(disk) = std::env::var_os(CHILD) {
        return map_and_die(PathBuf::from(disk));
    }
    let vg = HostVg::on_scratch("vg0")?;
    let mut guest = Guest::on_lvs(&vg, &[200 * MIB])?;
    guest.start("guest", &[0])?;
    guest.lvm("lvcreate", &["-Wn", "-n", "root", "-L", "8m", "guest"])?;
    guest.lvm(
        "lvcreate",
        &[
            "-L",
            "40m",
            "--type",
            "thin-pool",
            "--poolmetadatasize",
            "4m",
            "-n",
            "pool",
            "guest",
        ],
    )?;
    guest.lvm(
        "lvcreate",
        &["-V", "64m", "--thinpool", "guest/pool", "-n", "thin"],
    )?;
    guest.shut_down()?;
    let status = Command::new(std::env::current_exe()?)
        .args(["--bed-one", "disk_killed_process_leaves_nothing"])
        .env(CHILD, &guest.disks[0])
        .status()?;
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(9),
        "{status}"
    );
    cmd::wait_for(
        "devices of a dead process to go",
        Duration::from_secs(10),
        || Ok(our_devices().is_empty().then_some(())),
    )
}

fn map_and_die(disk: PathBuf) -> Result {
    let file = FileDisk::open(&disk).unwrap();
    let found = examine(&[&file]).unwrap();
    let devices = [Device {
        path: disk,
        size: file.size(),
        read_only: false,
    }];
    let mut names = CountingNamer::new("4");
    let mapped: Vec<Mapped> = found
        .volumes
        .iter()
        .map(|v| map(v, &devices, &mut names).unwrap())
        .collect();
    assert_eq!(mapped.len(), 2);
    assert_eq!(our_devices().len(), 4);
    cmd::sh(&format!("kill -9 {}", std::process::id()))?;
    std::thread::sleep(Duration::from_secs(5));
    Ok(())
}

fn busy_device_is_reported() -> Result {
    let vg = HostVg::on_scratch("vg0")?;
    let mut guest = Guest::on_lvs(&vg, &[64 * MIB])?;
    guest.start("guest", &[0])?;
    guest.lvm("lvcreate", &["-Wn", "-n", "root", "-L", "8m", "guest"])?;
    guest.shut_down()?;
    let found = guest.examine();
    let mapped = map(
        volume(&found, "guest/root"),
        &guest.devices(),
        &mut CountingNamer::new("5"),
    )
    .unwrap();
    let holder = File::open(mapped.path())?;
    let path = mapped.path().display().to_string();
    let report = mapped.close().unwrap_err().report();
    println!("{report}");
    assert!(report.contains("GS-307"), "{report}");
    let who = format!("(pid {}): open {path}", std::process::id());
    assert!(report.contains(&who), "{report} does not say {who:?}");
    assert_eq!(our_devices().len(), 1);
    // It goes by itself as soon as the holder does.
    drop(holder);
    cmd::wait_for("the device to go", Duration::from_secs(10), || {
        Ok(our_devices().is_empty().then_some(()))
    })
}
