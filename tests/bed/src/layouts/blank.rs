use super::{Expected, Layout};

pub const LAYOUT: Layout = Layout {
    shows: "A disk with nothing on it is an error.",
    mib: 16,
    build: |_, _| Ok(()),
    expected: Expected::Says("GS-406"),
};
