//! A volume's filesystem: probing, mount policy, the detached mount, the guest's fstab, one tree.
