//! The sections and keys of the client file.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use super::values::*;
use crate::config::{Size, SnapshotKind, defaults};
use crate::hostdev::lvname::VgName;

/// Parsed client file. The default equals a missing file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClientFile {
    /// Volumes and files that a Director may select. `None`: any logical volume that this host does
    /// not use itself, and the files that definitions on this host name.
    pub allow: Option<Vec<Allow>>,
    /// Where `guest=` finds definitions.
    pub sources: Sources,
    /// Limits of snapshots and read-ahead, and the interval of progress lines.
    pub limits: Limits,
    /// Commands around a job.
    pub hooks: Hooks,
    /// Settings for all guests.
    pub defaults: GuestSettings,
    /// Settings of one guest, by its name in the catalog. Unset ones come from the defaults.
    pub guest: BTreeMap<String, GuestSettings>,
    /// Settings of one volume group, by name.
    pub vg: BTreeMap<String, VgSettings>,
    /// Guests of Proxmox VE.
    pub pve: PveSettings,
    /// Restores.
    pub restore: RestoreSettings,
}

/// `[restore]`. `None`: not set.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RestoreSettings {
    /// Guests, volumes and images that a restore may write into; by default none.
    pub into: Option<Vec<IntoPattern>>,
}

/// `[pve]`. `None`: not set.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PveSettings {
    /// Maximum wait for guests that an operation of Proxmox VE holds, in seconds.
    pub lock_wait: Option<LockSeconds>,
}

/// `[vg.NAME]`. `None`: not set.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VgSettings {
    /// Whether the group may be changed although LVM marks it for use by several hosts.
    pub shared: Option<Shared>,
}

/// Values of `shared`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shared {
    /// This host alone writes to the group.
    Mine,
}

/// `[sources]`: where `guest=` finds definitions, besides `[guest.NAME]` with `disks`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sources {
    /// Patterns of xl.cfg files.
    pub xl: Vec<PathPattern>,
    /// Patterns of libvirt domain XML files.
    pub libvirt: Vec<PathPattern>,
    /// Patterns of libvirt storage pool XML files, for disks that a domain names by pool and volume.
    pub pools: Vec<PathPattern>,
    /// Folder with the configurations of Proxmox VE.
    pub pve: Folder,
}

impl Default for Sources {
    fn default() -> Self {
        let patterns = |texts: &[&str]| {
            texts
                .iter()
                .filter_map(|text| PathPattern::try_from((*text).to_owned()).ok())
                .collect()
        };
        Sources {
            xl: patterns(defaults::XL),
            libvirt: patterns(defaults::LIBVIRT),
            pools: patterns(defaults::POOLS),
            pve: Folder(defaults::PVE.into()),
        }
    }
}

/// `[limits]`. `None`: not set.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Fill above which a thick snapshot is extended, in percent.
    pub extend_at: Option<Percent>,
    /// Extension as a share of the snapshot's size, in percent; 0: never extend.
    pub extend_by: Option<PercentOrNone>,
    /// Fill above which a thin pool causes a warning, in percent.
    pub warn_pool_at: Option<Percent>,
    /// Fill above which snapshots in a thin pool are given up, in percent.
    pub give_up_pool_at: Option<Percent>,
    /// Minutes between progress lines of a long job.
    pub progress_minutes: Option<Minutes>,
    /// Read-ahead memory.
    pub read_ahead: Option<ReadAheadBytes>,
    /// Number of read-ahead threads.
    pub readers: Option<Readers>,
    /// Maximum bytes of file holes delivered as zeros, per guest.
    pub holes: Option<FileSize>,
    /// Maximum seconds to hold a guest's writes while its snapshots are taken.
    pub hold_seconds: Option<HoldSeconds>,
}

/// `[hooks]`: commands around each backup or estimate.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Hooks {
    /// Runs before the first snapshot; its failure fails the job.
    pub before: Option<Argv>,
    /// Runs when all objects of the job are gone, whenever `before` was started.
    pub after: Option<Argv>,
    /// Time limit of each hook, in seconds.
    pub seconds: Option<HookSeconds>,
}

impl Hooks {
    /// Returns a hook's argument vector for one job.
    pub fn argv(hook: &Argv, job_id: u32) -> Vec<String> {
        let job = job_id.to_string();
        hook.iter().map(|a| a.replace("{job}", &job)).collect()
    }

    /// Time limit of each hook.
    pub fn patience(&self) -> Duration {
        let seconds = self.seconds.as_deref().copied();
        Duration::from_secs(seconds.unwrap_or(defaults::HOOK_SECONDS))
    }
}

/// `[defaults]` or `[guest.NAME]`. `None`: not set.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuestSettings {
    /// The guest's disks in order. A section with disks defines a guest for `guest=`; one without
    /// only tunes a guest selected otherwise. Not in `[defaults]`.
    pub disks: Option<Vec<Spanned<DiskName>>>,
    /// Default volume group for disks without one.
    pub vg: Option<VgName>,
    /// Snapshot method.
    pub snapshot: Option<SnapshotKind>,
    /// Size of a thick snapshot.
    pub size: Option<Size>,
    /// Chunk size of a thick snapshot.
    pub chunk: Option<Chunk>,
    /// Whether to activate inactive volumes for the duration of a backup.
    pub activate: Option<bool>,
    /// Filesystem types to mount, as `blkid` names them.
    pub filesystems: Option<Vec<FsType>>,
    /// Do not replay journals; each such mount gives a warning.
    pub skip_recovery: Option<bool>,
    /// Filesystem check.
    pub fsck: Option<Fsck>,
    /// How to quiesce the guest while its snapshots are taken.
    pub quiesce: Option<QuiesceWay>,
    /// Freeze command, for `quiesce = "commands"`.
    pub freeze: Option<Argv>,
    /// Thaw command, for `quiesce = "commands"`.
    pub thaw: Option<Argv>,
    /// Seconds after which the guest is thawed unconditionally.
    pub freeze_seconds: Option<FreezeSeconds>,
    /// The guest's name for `xl` and `virsh`, if different. Not in `[defaults]`.
    pub domain: Option<DomainName>,
    /// The guest's root if several filesystems look like one: `VG/LV` of the guest, a filesystem's
    /// UUID, or a volume's name. A colon and a subvolume may follow. Not in `[defaults]`.
    pub root: Option<RootName>,
    /// Patterns of guest paths to leave out.
    pub skip: Option<Vec<PathPattern>>,
    /// Leave out directories that contain one of these names.
    pub skip_dirs_containing: Option<Vec<FileName>>,
    /// Leave out directories with a `CACHEDIR.TAG`.
    pub skip_caches: Option<bool>,
    /// Leave out larger files.
    pub max_file_size: Option<FileSize>,
}

/// Values of `fsck`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fsck {
    /// No check: the kernel replays the journal.
    None,
    /// Check the snapshot before it is read.
    Before,
}

/// Values of `quiesce`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum QuiesceWay {
    /// Not at all: crash-consistent.
    None,
    /// `xl pause` and `xl unpause`: crash-consistent, all disks at one instant.
    XlPause,
    /// `virsh suspend` and `virsh resume`: like `XlPause`, with libvirt.
    VirshSuspend,
    /// `virsh domfsfreeze` and `virsh domfsthaw`: filesystems frozen (needs the guest agent).
    VirshFreeze,
    /// `qm suspend` and `qm resume`: like `XlPause`, with Proxmox VE.
    QmSuspend,
    /// `qm guest cmd … fsfreeze-freeze` and `… fsfreeze-thaw`: filesystems frozen (needs the guest
    /// agent).
    QmFreeze,
    /// The commands `freeze` and `thaw`.
    Commands,
}

impl QuiesceWay {
    /// Whether the commands are those of Proxmox VE.
    pub fn is_qm(self) -> bool {
        matches!(self, QuiesceWay::QmSuspend | QuiesceWay::QmFreeze)
    }
}
