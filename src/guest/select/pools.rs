//! Storage pools of libvirt: the path of a volume that a definition names by pool and name.

use std::path::PathBuf;

use crate::config::client::PathPattern;
use crate::error::escape;
use crate::guest::libvirt::{self, Pool};
use crate::guest::{Inventory, definition};

/// The pools of the host, and the files that could not be read.
#[derive(Debug, Default)]
pub(super) struct Pools {
    pools: Vec<Pool>,
    unread: Vec<String>,
}

impl Pools {
    /// Reads all pools. Trusts their files as it does guest definitions.
    pub(super) fn read(patterns: &[PathPattern], inventory: &dyn Inventory) -> Pools {
        let mut all = Pools::default();
        for pattern in patterns {
            let files = match inventory.definition_files(pattern) {
                Ok(files) => files,
                Err(error) => {
                    all.unread.push(error.with_causes());
                    continue;
                }
            };
            for path in files {
                let pool = inventory
                    .definition(&path, definition::MAX_BYTES)
                    .and_then(|bytes| {
                        libvirt::parse_pool(&bytes).map_err(|why| definition::bad(&path, why))
                    });
                match pool {
                    Ok(pool) => all.pools.push(pool),
                    Err(error) => all.unread.push(error.with_causes()),
                }
            }
        }
        all
    }

    /// The path of a pool's volume. The error says why it is not known.
    pub(super) fn path(&self, pool: &str, volume: &str) -> Result<PathBuf, String> {
        let named: Vec<&Pool> = self.pools.iter().filter(|p| p.name == pool).collect();
        let remedy = "name its path in `disks` of [guest.NAME], or back it up inside the guest";
        let first = match named.as_slice() {
            [] if self.unread.is_empty() => {
                return Err(format!(
                    "no file of `pools` in [sources] defines that pool: {remedy}"
                ));
            }
            [] => {
                let unread = self.unread.join("; ");
                return Err(format!(
                    "that pool may be in a file that cannot be read: {unread}"
                ));
            }
            [first, rest @ ..] if rest.iter().all(|other| other.volumes == first.volumes) => first,
            _ => return Err(format!("several pools have that name: {remedy}")),
        };
        first
            .path(volume)
            .map_err(|why| escape(format!("{why}: {remedy}").as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::select;
    use super::super::testing::{host, picture};
    use crate::config::{ClientFile, Directive};
    use crate::guest::Absence;

    #[test]
    fn test_disks_in_storage_pools() {
        let mut host = host();
        let disk = |pool: &str, volume: &str| {
            format!(
                "<disk type='volume'><source pool='{pool}' volume='{volume}'/><target dev='vda'/></disk>"
            )
        };
        let domain = |name: &str, disks: &[String]| {
            let disks = disks.concat();
            format!("<domain><name>{name}</name><devices>{disks}</devices></domain>")
        };
        let folder = |name: &str, path: &str| {
            format!(
                "<pool type='dir'><name>{name}</name><target><path>{path}</path></target></pool>"
            )
        };
        let files = [
            (
                "storage/l.xml",
                "<pool type='logical'><name>l</name><source><name>vg0</name></source></pool>"
                    .to_owned(),
            ),
            ("storage/d.xml", folder("d", "/srv/img")),
            ("storage/two.xml", folder("two", "/srv/img")),
            ("storage/two2.xml", folder("two", "/srv/other")),
            (
                "storage/r.xml",
                "<pool type='rbd'><name>r</name></pool>".to_owned(),
            ),
            (
                "qemu/both.xml",
                domain("both", &[disk("l", "domu-web1"), disk("d", "a.raw")]),
            ),
            (
                "qemu/ceph.xml",
                domain("ceph", &[disk("r", "v"), disk("l", "domu-web1")]),
            ),
            ("qemu/gone.xml", domain("gone", &[disk("d", "none.raw")])),
            ("qemu/lost.xml", domain("lost", &[disk("x", "v")])),
            ("qemu/out.xml", domain("out", &[disk("d", "../img/a.raw")])),
            ("qemu/twice.xml", domain("twice", &[disk("two", "a.raw")])),
        ];
        for (path, text) in files {
            let path = format!("/etc/libvirt/{path}");
            host.files.insert(path.into(), text.into_bytes());
        }
        let run = |line: &str, client: &str, host: &_| {
            let client = ClientFile::parse(client).unwrap();
            select(&Directive::parse(line).unwrap(), &client, host).unwrap()
        };
        let cases: &[(&str, &[&str])] = &[
            ("guest=both", &["both=vg0/domu-web1,/srv/img/a.raw"]),
            ("guest=ceph", &["ceph=vg0/domu-web1"]),
            ("guest=gone", &["!gone GS-310"]),
            ("guest=lost", &["!lost GS-204"]),
            ("guest=out", &["!out GS-204"]),
            ("guest=twice", &["!twice GS-204"]),
            (
                "libvirt=/etc/libvirt/qemu/both.xml",
                &["both=vg0/domu-web1,/srv/img/a.raw"],
            ),
        ];
        for (line, expected) in cases {
            assert_eq!(picture(&run(line, "", &host)), *expected, "{line}");
        }
        let reason = |line: &str, client: &str, host: &_| {
            let selection = run(line, client, host);
            let uncovered = selection.guests.iter().flat_map(|g| &g.uncovered);
            let uncovered = uncovered.map(|d| {
                (d.absence == Absence::Lost)
                    .then(|| d.reason.clone())
                    .unwrap()
            });
            let refused = selection.refused.iter().map(|(_, error)| error.to_string());
            uncovered.chain(refused).collect::<String>()
        };
        for (line, expected) in [
            (
                "guest=ceph",
                "the pool is of type rbd: name its path in `disks`",
            ),
            (
                "guest=lost",
                "no file of `pools` in [sources] defines that pool",
            ),
            ("guest=out", "not the name of a volume"),
            ("guest=twice", "several pools have that name"),
        ] {
            let reason = reason(line, "", &host);
            assert!(reason.contains(expected), "{line}: {reason}");
        }
        let elsewhere = "[sources]\npools = ['/opt/*.xml']\n";
        assert!(reason("guest=both", elsewhere, &host).contains("no file of `pools`"));
        // An unreadable file may define the pool.
        host.files
            .insert("/etc/libvirt/storage/bad.xml".into(), b"<pool".to_vec());
        let reason = reason("guest=lost", "", &host);
        assert!(reason.contains("bad.xml: line 1"), "{reason}");
        assert_eq!(picture(&run("guest=both", "", &host)).len(), 1);
    }
}
