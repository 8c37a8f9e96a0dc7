//! A host with guests, for unit tests.

use std::path::PathBuf;

use super::Selection;
use crate::config::ClientFile;
use crate::config::client::Allow;
use crate::guest::{FixedInventory, LvCandidate, LvKind};
use crate::hostdev::lvname::LvName;

pub(super) fn volume(vg: &str, lv: &str) -> LvCandidate {
    LvCandidate {
        name: LvName::new(vg, lv).unwrap(),
        tags: Vec::new(),
        size: 1 << 30,
        kind: LvKind::Plain,
        origin: None,
        writable: true,
        ready: true,
        in_use: None,
        metadata_of: None,
        shared: None,
    }
}

pub(super) fn host() -> FixedInventory {
    let with = |mut v: LvCandidate, change: fn(&mut LvCandidate)| {
        change(&mut v);
        v
    };
    FixedInventory {
        volumes: vec![
            volume("vg0", "domu-web2"),
            volume("vg0", "domu-web1"),
            volume("vg0", "domu-test1"),
            with(volume("vg0", "root"), |v| {
                v.in_use = Some("mounted on /".into())
            }),
            with(volume("vg0", "domu-snap"), |v| {
                v.kind = LvKind::Snapshot;
                v.origin = Some("domu-web1".into());
            }),
            with(volume("vg0", "guestsnap-7-0"), |v| {
                v.kind = LvKind::Snapshot;
                v.tags = vec!["guestsnap".into(), "guestsnap.job=7".into()];
            }),
            with(volume("vg0", "domu-ours"), |v| {
                v.kind = LvKind::Thin;
                v.tags = vec!["guestsnap".into()];
            }),
            with(volume("vg0", "domu-pool"), |v| v.kind = LvKind::Pool),
            with(volume("vg0", "domu-pool_tdata"), |v| {
                v.kind = LvKind::Hidden
            }),
            with(volume("vg1", "db1"), |v| {
                v.tags = vec!["backup".into()];
                v.kind = LvKind::Thin;
            }),
            with(volume("vg1", "db1-old"), |v| {
                v.kind = LvKind::Thin;
                v.origin = Some("db1".into());
                v.ready = false;
            }),
            volume("vg1", "web1"),
            volume("vg1", "domu-"),
        ],
        files: ["/srv/img/a.raw", "/srv/img/b.qcow", "/srv/img/a.img"]
            .iter()
            .map(|path| (PathBuf::from(path), Vec::new()))
            .collect(),
        ..FixedInventory::default()
    }
}

/// Formats each guest as `name=disk,disk`, then each refusal as `!name GS-nnn`.
pub(super) fn picture(selection: &Selection) -> Vec<String> {
    let guests = selection.guests.iter().map(|guest| {
        let disks: Vec<String> = guest.disks.iter().map(ToString::to_string).collect();
        format!("{}={}", guest.name, disks.join(","))
    });
    let refused = selection
        .refused
        .iter()
        .map(|(name, error)| format!("!{name} {}", error.code()));
    guests.chain(refused).collect()
}

pub(super) fn allow(patterns: &[&str]) -> ClientFile {
    ClientFile {
        allow: Some(
            patterns
                .iter()
                .map(|text| Allow::try_from((*text).to_owned()).unwrap())
                .collect(),
        ),
        ..ClientFile::default()
    }
}

/// The host with guest definitions.
pub(super) fn defined() -> FixedInventory {
    let mut host = host();
    let files: &[(&str, &str)] = &[
        (
            "/etc/xen/web1.cfg",
            "name='web1'\ndisk=['phy:/dev/vg0/domu-web1,xvda,w','/dev/vg1/web1,raw,xvdb,rw','/x.iso,raw,hdc,r,cdrom']",
        ),
        (
            "/etc/xen/db1.cfg",
            "name='db1'\ndisk=['/dev/mapper/vg1-db1,raw,xvda,rw','/srv/db1.q,qcow2,xvdb,rw']",
        ),
        (
            "/etc/xen/gone.cfg",
            "name='gone'\ndisk=['/dev/vg0/gone,raw,xvda,rw','/dev/vg0/domu-web2,raw,xvdb']",
        ),
        ("/etc/xen/old.cfg", "import os"),
        ("/etc/xen/net.cfg", "name='net'"),
        ("/etc/xen/drbd.cfg", "name='drbd'\ndisk=['rbd:x,xvda,w']"),
        (
            "/etc/libvirt/qemu/kvm1.xml",
            "<domain><name>kvm1</name><devices><disk type='file'><driver type='raw'/><source file='/srv/img/a.raw'/></disk></devices></domain>",
        ),
    ];
    for (path, text) in files {
        host.files.insert(path.into(), text.as_bytes().to_vec());
    }
    host
}
