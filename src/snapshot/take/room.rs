//! Room in the volume groups for thick snapshots.

use std::collections::BTreeMap;

use super::{Choice, Kind};
use crate::error::{Code, Error, Result};
use crate::hostdev::lvname::VgName;
use crate::snapshot::human;

/// Room of the groups that is not for the guests still to come.
#[derive(Debug, Default)]
pub(super) struct Promised {
    /// Bytes for the guests before.
    pub(super) bytes: BTreeMap<VgName, u64>,
    /// Places of guests that wait for room in a group.
    waiting: BTreeMap<VgName, usize>,
}

impl Promised {
    /// Whether all these rooms are there for the guest of this place.
    pub(super) fn check(&mut self, rooms: &mut [Room], place: Option<usize>) -> Result<()> {
        for room in &mut *rooms {
            let gone = self.bytes.get(&room.vg).copied().unwrap_or(0);
            room.free = room.free.saturating_sub(gone);
        }
        let earlier = |room: &&Room| {
            let waits = self.waiting.get(&room.vg);
            place.is_some_and(|place| waits.is_some_and(|waits| *waits < place))
        };
        let checked = match rooms.iter().find(earlier) {
            Some(room) => {
                let what = format!(
                    "{}: guests of an earlier Plugin line wait for room",
                    room.vg
                );
                Err(Error::new(Code::NoRoom, what))
            }
            None => rooms.iter().try_for_each(Room::check),
        };
        if let (Err(_), Some(place)) = (&checked, place) {
            for room in rooms {
                let waits = self.waiting.entry(room.vg.clone()).or_insert(place);
                *waits = place.min(*waits);
            }
        }
        checked
    }
}

/// Room needed in a group for all its thick snapshots.
#[derive(Debug)]
pub struct Room {
    /// The group.
    pub vg: VgName,
    /// Bytes needed.
    pub needed: u64,
    /// Bytes that one guest needs at most.
    pub most: u64,
    /// Bytes free.
    pub free: u64,
    /// Origins.
    pub(super) disks: Vec<String>,
}

impl Room {
    /// Checks that each guest has room when its turn comes. `true`: some have to wait for it.
    pub fn check_in_turn(&self) -> Result<bool> {
        if self.most <= self.free {
            return Ok(self.needed > self.free);
        }
        let (most, free) = (human(self.most), human(self.free));
        let text = format!("{}: {most} needed for one guest, {free} free", self.vg);
        Err(Error::new(Code::NoRoom, text))
    }

    /// Checks that the room is free.
    pub fn check(&self) -> Result<()> {
        if self.needed <= self.free {
            return Ok(());
        }
        let text = format!(
            "{}: {} needed, {} free in {}",
            self.disks.join(", "),
            human(self.needed),
            human(self.free),
            self.vg
        );
        Err(Error::new(Code::NoRoom, text))
    }
}

pub(super) fn rooms(choices: &[Choice<'_>]) -> Vec<Room> {
    let mut rooms: BTreeMap<&VgName, Room> = BTreeMap::new();
    for choice in choices {
        if let Choice::Volume(origin, Kind::Thick { extents, .. }) = choice {
            let bytes = |extents: u64| extents.saturating_mul(origin.extent_size);
            let vg = origin.name.vg();
            let room = rooms.entry(vg).or_insert_with(|| Room {
                vg: vg.clone(),
                needed: 0,
                most: 0,
                free: bytes(origin.vg_free),
                disks: Vec::new(),
            });
            room.needed = room.needed.saturating_add(bytes(*extents));
            room.disks.push(origin.name.to_string());
        }
    }
    rooms.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_a_guest_gets_no_room_before_one_of_an_earlier_line() {
        let room = |vg: &str, needed: u64, free: u64| Room {
            vg: VgName::new(vg).unwrap(),
            needed,
            most: needed,
            free,
            disks: vec![format!("{vg}/x")],
        };
        let mut promised = Promised::default();
        let mut ask = |needed, place| promised.check(&mut [room("a", needed, 10)], place).is_ok();
        assert!(!ask(11, Some(1)));
        // This line, an earlier one, and one that does not wait.
        assert!(ask(5, Some(1)) && ask(5, Some(0)) && ask(5, None));
        assert!(!ask(5, Some(2)));
        // Another group; and room is all or none.
        assert!(promised.check(&mut [room("b", 5, 10)], Some(2)).is_ok());
        let mut both = [room("b", 5, 10), room("c", 5, 4)];
        assert!(promised.check(&mut both, Some(2)).is_err());
        promised.bytes.insert(VgName::new("b").unwrap(), 6);
        assert!(promised.check(&mut [room("b", 5, 10)], Some(2)).is_err());
    }

    #[test]
    fn test_a_guest_waits_only_for_room_that_can_come() {
        let check = |needed, most, free| {
            let (vg, disks) = (VgName::new("a").unwrap(), Vec::new());
            let room = Room {
                vg,
                needed,
                most,
                free,
                disks,
            };
            room.check_in_turn().map_err(|error| error.code())
        };
        assert_eq!(check(10, 5, 10), Ok(false));
        assert_eq!(check(10, 5, 9), Ok(true));
        assert_eq!(check(10, 5, 4), Err(Code::NoRoom));
    }
}
