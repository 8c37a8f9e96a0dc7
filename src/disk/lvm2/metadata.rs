//! Metadata areas of the physical volumes: the newest text of each PV, parsed.

use std::collections::BTreeMap;
use std::io;

use super::group::Assembled;
use super::label::Held;
use super::pv::FoundPv;
use super::vg::Vg;
use super::{label, text, vg};
use crate::disk::read::{Part, ReadAt};

/// Maximum metadata text read for one guest.
const MAX_TEXT_TOTAL: u64 = 256 * 1024 * 1024;

/// Content of the metadata areas, by the PV's name.
#[derive(Default)]
pub(super) struct Texts {
    /// Newest text, parsed.
    pub(super) texts: BTreeMap<String, Vg>,
    /// Its bytes.
    pub(super) bytes: BTreeMap<String, Vec<u8>>,
    /// Problem with an area.
    pub(super) problems: BTreeMap<String, String>,
}

pub(super) fn read_texts(
    disks: &[&dyn ReadAt],
    pvs: &[FoundPv],
    out: &mut Assembled,
) -> io::Result<Texts> {
    let mut found = Texts::default();
    let texts = &mut found.texts;
    let mut budget = MAX_TEXT_TOTAL;
    let mut nodes = text::MAX_NODES;
    for pv in pvs {
        let Some(disk) = disks.get(pv.place.disk) else {
            continue;
        };
        let part = Part {
            disk: *disk,
            start: pv.place.start,
            len: pv.place.len,
        };
        for label::AreaPlace { start, len } in &pv.header.metadata_areas {
            let problem = match label::text(&part, *start, *len, &mut budget)? {
                Held::Nothing => continue,
                Held::Text(text) => match parse_within(&text, &mut nodes) {
                    Ok(vg) => {
                        let known = texts.get(&pv.name).is_some_and(|t| t.seqno >= vg.seqno);
                        if !known {
                            texts.insert(pv.name.clone(), vg);
                            found.bytes.insert(pv.name.clone(), text);
                        }
                        continue;
                    }
                    Err(why) => why,
                },
                Held::Unusable(why) => why.to_owned(),
            };
            let problem = format!("LVM metadata area at {start}: {problem}");
            out.notes.push(format!("{}: {problem}", pv.name));
            found.problems.insert(pv.name.clone(), problem);
        }
    }
    Ok(found)
}

/// Parses the text of one volume group. The error describes the problem, without guest text.
pub fn parse(text: &[u8]) -> Result<Vg, String> {
    parse_within(text, &mut text::MAX_NODES.clone())
}

/// Like `parse`, for one of several texts that share a budget of nodes.
fn parse_within(text: &[u8], nodes: &mut usize) -> Result<Vg, String> {
    vg::from_text(&text::parse_within(text, nodes).map_err(|e| e.to_string())?)
}
