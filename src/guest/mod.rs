//! Sources of guests. A guest is a name and its ordered disks.

pub mod definition;
pub mod inventory;
pub mod libvirt;
mod parts;
pub mod pve;
pub mod quiesce;
pub mod select;
pub mod state;
pub mod xl;

pub use inventory::{FixedInventory, Inventory, LvCandidate, LvKind};
pub use parts::{Absence, DefinitionFile, DiskSource, Guest, UncoveredDisk};
pub use select::{Selection, select, unknown_sections};
