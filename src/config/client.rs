//! The client file `/etc/bacula/guestsnap.toml`.

/// Everything the client's administrator decides.
#[derive(Debug, Clone, Default)]
pub struct ClientFile {
    /// What a Director may select: `VG/GLOB` or an absolute path pattern. `None`: any logical
    /// volume that this host does not use itself.
    pub allow: Option<Vec<String>>,
}
