//! Kernel features that tests do without, and the only ones.

/// Kernels that the plugin supports may lack these. A test that needs anything else fails without it.
const MAY_BE_ABSENT: [&str; 2] = ["btrfs clones (Linux 6.7)", "vfat"];

/// Whether this kernel has the feature. An absent one is named at the end of the run, and must be in the list.
pub fn present(feature: &str, found: bool) -> bool {
    if !found {
        assert!(
            MAY_BE_ABSENT.contains(&feature),
            "this kernel lacks {feature}"
        );
        let folder = super::target().join("tmp/absent");
        std::fs::create_dir_all(&folder).expect("a folder below the target folder");
        std::fs::write(folder.join(feature), "").expect("a file below the target folder");
        eprintln!("not run here: {feature}");
    }
    found
}
