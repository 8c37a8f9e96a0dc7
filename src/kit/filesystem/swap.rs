//! Swap areas. Fields: Linux, `include/linux/swap.h`; words: mkswap(8).

use serde::{Deserialize, Serialize};

use super::{Argv, Described, Recipe, argv, label, uuid};
use crate::disk::le::{array, u32_at};

/// Marks at the end of the first page: swap, and images of a hibernated system in it.
const MARKS: [&[u8; 10]; 4] = [
    b"SWAPSPACE2",
    b"S1SUSPEND\0",
    b"S2SUSPEND\0",
    b"ULSUSPEND\0",
];

/// The properties of a swap area.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Swap {
    /// UUID.
    pub uuid: String,
    /// Label; empty: none.
    pub label: String,
    /// Bytes of a page.
    pub page_size: u32,
}

pub(super) fn parse(head: &[u8]) -> Option<Result<Described, String>> {
    let marked = |page: &u32| {
        let end = usize::try_from(*page).ok()?;
        let mark = head.get(end.checked_sub(10)?..end)?;
        MARKS.iter().any(|known| mark == *known).then_some(*page)
    };
    let page_size = [4096, 8192, 16384, 65536].iter().find_map(marked)?;
    if u32_at(head, 1024)? != 1 {
        return Some(Err("a swap area of another version".to_owned()));
    }
    let mut lost = Vec::new();
    let swap = Swap {
        uuid: uuid(array(head, 1036)?),
        label: label(head.get(1052..1068)?, &mut lost),
        page_size,
    };
    let recipe = Recipe::Swap(swap);
    Some(Ok(Described { recipe, lost }))
}

impl Swap {
    pub(super) fn command(&self, device: &str) -> Argv {
        argv(
            "mkswap",
            &[
                ("-U", self.uuid.clone()),
                ("-L", self.label.clone()),
                ("-p", self.page_size.to_string()),
            ],
            &["-f".to_owned(), device.to_owned()],
        )
    }
}
