//! Turns `include/bacula_fd_abi.h` into Rust, once per interface version, and sets the link
//! options a plugin needs.

use std::{env, path::PathBuf};

/// Interface versions described by the header.
const VERSIONS: [u32; 4] = [14, 21, 22, 23];

fn main() {
    let header = "include/bacula_fd_abi.h";
    println!("cargo:rerun-if-changed={header}");
    println!("cargo:rerun-if-changed=build.rs");
    // For the C program of tests/fake_host_root.rs.
    println!(
        "cargo:rustc-env=GUESTSNAP_TARGET={}",
        env::var("TARGET").expect("cargo sets TARGET")
    );
    // The daemon closes plugins while thread-local destructors may be pending: stay mapped.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    // The daemon loads with RTLD_NOW: a missing symbol must fail here, not there. The
    // instrumentation of a fuzzer or a sanitizer has its symbols in the program.
    if ["FUZZING", "SANITIZE"]
        .iter()
        .all(|cfg| env::var_os(format!("CARGO_CFG_{cfg}")).is_none())
    {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,defs");
    }

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for version in VERSIONS {
        bindgen::Builder::default()
            .header(header)
            .clang_arg(format!("-DGUESTSNAP_ABI={version}"))
            .allowlist_file(".*/bacula_fd_abi\\.h")
            // One `stat` for all versions, and the one the rest of the crate uses.
            .blocklist_type("stat|timespec|__.*")
            .raw_line("use libc::{gid_t, mode_t, stat, uid_t};")
            .blocklist_type("uid_t|gid_t|mode_t")
            .prepend_enum_name(false)
            .derive_default(false)
            .generate_comments(false)
            .layout_tests(true)
            .generate()
            .expect("the header of the Bacula plugin interface is valid C")
            .write_to_file(out.join(format!("abi_{version}.rs")))
            .expect("OUT_DIR can be written");
    }
}
