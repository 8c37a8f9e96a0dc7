//! The fields of a record of ours, as a Director or a volume may have changed them; head and
//! checksum are made right. What is understood can be written and read again.
#![no_main]

use guestsnap::stream::record::Record;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|fields: &[u8]| {
    let mut bytes = b"guestsnp".to_vec();
    bytes.extend_from_slice(&[1, 0, 0, 0]);
    bytes.extend_from_slice(&u32::try_from(fields.len()).unwrap().to_le_bytes());
    bytes.extend_from_slice(fields);
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    if let Ok((understood, _)) = Record::decode(&bytes) {
        for bytes in understood.encode() {
            Record::decode(&bytes).expect("a record of ours");
        }
    }
});
