//! Every parser of configuration takes any bytes: it answers or refuses, it never panics or hangs.

use std::path::Path;
use std::time::{Duration, Instant};

use guestsnap::config::{ClientFile, Directive};
use guestsnap::guest::{libvirt, pve, xl};
use guestsnap::hostdev::lvname::LvName;

const SEEDS: &[&[u8]] = &[
    b"lv=vg0/domu-* strip=domu- exclude='a \\' b' image=\"/srv/x y.raw\" size=10G chunk=64k path=/mnt",
    b"guest={web,db}[0-9]? tag=backup on_error=fail snapshot=thin",
    b"allow = ['vg0/*']\n[defaults]\nsize = '20%'\n[guest.a]\ndisks = ['vg0/x']\nquiesce = 'xl-pause'\n",
    b"name = \"w\\x41\"\ndisk = [ 'phy:/dev/a/b,xvda,w', # x\n \"format=raw,vdev=xvdb,target=/c,d\"]\nx += [-1,0x2]\n",
    b"tap2:tapdisk:aio:/srv/a.img,hdc:cdrom,r,script=block,backend=0",
    b"<domain type='kvm'><name>a</name><devices><disk type='block'><source dev='/dev/a/b'/></disk></devices></domain>",
    b"<pool type='logical'><name>a</name><source><name>vg0</name></source><target><path>/dev/a</path></target></pool>",
    b"<pool type='dir'><name>a</name><target><path>/srv/a</path></target></pool>",
    b"vg--0-domu--web1",
    b"name: web\nscsi0: thin:vm-100-disk-0,backup=0\nide2: none,media=cdrom\n[before]\nlock: backup\n",
    b"hostname: ct\nrootfs: thin:vm-101-disk-0\nmp0: /tank,mp=/a/b,backup=0\nmp1: thin:b,mp=/c\n[x]\n",
    b"lvmthin: thin\n\tthinpool data\n\tvgname pve\ndir: local\n\tpath /var/lib/vz\n\tshared 1\n",
];

/// Pieces that mean something to one of the parsers.
const PIECES: &[&[u8]] = &[
    b"'",
    b"\"",
    b"\\",
    b"=",
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b"\n",
    b"#",
    b"/",
    b"..",
    b"%",
    b"*",
    b"**",
    b"-",
    b"--",
    b"\0",
    b"\xff",
    b"\xc3",
    b"<",
    b">",
    b"&amp;",
    b"<!--",
    b"target=",
    b"disk=",
    b"99999999999999999999",
    b"\xe2\x82\xac",
];

fn parse_all(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let _ = Directive::parse(&text);
    let _ = ClientFile::parse(&text);
    let _ = xl::parse(bytes);
    let _ = xl::parse_disk(bytes);
    let _ = libvirt::parse(bytes);
    let _ = libvirt::parse_pool(bytes).map(|pool| pool.path(&text));
    let _ = pve::qemu::parse(bytes).map(|config| pve::qemu::guest_names(&config.drives));
    let _ = pve::lxc::parse(bytes);
    let _ = pve::vmid(&text);
    let _ = pve::storage::parse(bytes);
    let _ = LvName::of_device(&Path::new("/dev/mapper").join(&*text));
}

#[test]
fn test_parsers_take_any_bytes() {
    // A fixed sequence: a failure can be repeated.
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below.max(1) as u64).unwrap_or(0)
    };
    for _ in 0..20_000 {
        let mut bytes = SEEDS[random(SEEDS.len())].to_vec();
        for _ in 0..=random(6) {
            let at = random(bytes.len() + 1);
            match random(4) {
                0 => bytes.truncate(at),
                1 => {
                    let piece = PIECES[random(PIECES.len())];
                    bytes.splice(at..at, piece.iter().copied());
                }
                2 if at < bytes.len() => bytes[at] = u8::try_from(random(256)).unwrap_or(0),
                _ => {
                    let other = SEEDS[random(SEEDS.len())];
                    let from = random(other.len());
                    bytes.splice(at..at, other[from..].iter().copied());
                }
            }
        }
        parse_all(&bytes);
    }
}

#[test]
fn test_parsers_are_bounded_in_time() {
    for piece in PIECES.iter().chain(SEEDS) {
        let long = piece.repeat((1 << 19) / piece.len());
        let begun = Instant::now();
        parse_all(&long);
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "{} of {:?}",
            begun.elapsed().as_secs_f32(),
            String::from_utf8_lossy(piece)
        );
    }
}
