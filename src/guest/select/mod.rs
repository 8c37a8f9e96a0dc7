//! From a directive to guests.

mod definitions;
mod directive;
mod doubts;
mod images;
mod names;
mod policy;
mod pools;
mod pve;
mod selection;
mod tags;
#[cfg(test)]
mod testing;
mod volumes;

pub use directive::{select, unknown_sections};
pub use selection::Selection;
