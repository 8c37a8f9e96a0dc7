//! The client file `/etc/bacula/guestsnap.toml`.

/// Everything the client's administrator decides.
#[derive(Debug, Clone, Default)]
pub struct ClientFile {}
