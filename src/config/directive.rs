//! The text behind `guestsnap:` in a `Plugin =` line.

/// Which guests a directive selects.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Selector {
    /// `lv=VG/GLOB`: each matching LV is a guest with one disk.
    Lv {
        /// Volume group, no pattern.
        vg: String,
        /// Pattern over LV names.
        pattern: String,
    },
    /// `tag=TAG`: LVs with this LVM tag.
    Tag(String),
    /// `guest=GLOB`: guests by name from the client file.
    Guest(String),
    /// `xl=GLOB`: xl.cfg files.
    Xl(String),
    /// `libvirt=GLOB`: libvirt domain XML files.
    Libvirt(String),
    /// `image=GLOB`: raw image files, one guest each.
    Image(String),
}

/// How a disk is snapshotted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SnapshotKind {
    /// Thin for thin LVs, thick for others, reflink for files.
    #[default]
    Auto,
    /// Copy-on-write LV beside the origin.
    Thick,
    /// Thin snapshot in the origin's pool.
    Thin,
}

/// Size of a thick snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// Share of the origin, in percent (1 to 100).
    Percent(u8),
    /// Bytes.
    Bytes(u64),
}

/// What a guest that cannot be opened does to the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// An error is counted, the other guests go on.
    #[default]
    Continue,
    /// The job fails.
    Fail,
}

/// One parsed directive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directive {
    /// Selectors in the order written; never empty.
    pub selectors: Vec<Selector>,
    /// Prefix taken off guest names.
    pub strip: Option<String>,
    /// Patterns of guest names (before and after `strip`) to leave out.
    pub exclude: Vec<String>,
    /// How to snapshot.
    pub snapshot: SnapshotKind,
    /// Size of thick snapshots; `None`: the client file's default, else 20 % of the origin.
    pub size: Option<Size>,
    /// Chunk size of thick snapshots in bytes; `None`: default.
    pub chunk: Option<u64>,
    /// Path under which guests appear in the catalog, absolute, no trailing slash.
    pub path: String,
    /// What to do about guests that cannot be opened.
    pub on_error: OnError,
}
