//! Region infos with their capability chains, and PCI capability lists, as a hostile device gives them.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vfio_uring::{pci::CapabilityWalk, transport::user::protocol};

fuzz_target!(|input: (u32, u32, Vec<u8>)| {
    let (index, argsz, payload) = input;
    let _ = protocol::parse_region_info(&payload, index, argsz, 4096);
    let mut words = payload.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).cycle();
    let mut walk = CapabilityWalk::new(4096);
    let mut steps = 0;
    while let Some(offset) = walk.wants() {
        assert!(offset < 4096 && offset % 4 == 0);
        let Some(word) = words.next() else { return };
        if walk.give(word).is_err() {
            return;
        }
        steps += 1;
        assert!(steps < 4096, "the walk of a bounded space ends");
    }
});
