//! Bacula's plugin interface in four layouts, the callback shell, messages.
