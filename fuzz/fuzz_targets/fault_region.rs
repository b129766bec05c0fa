//! A fault queue in a region, as a hostile device gives it: capabilities of its region and interrupt, headers that change, entries that
//! are rewritten, and the queue of answers.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vfio_uring::{
    fault::{
        abi::{RECORD, Record, ResponseHeader},
        assembly::Assembly,
        ring::{self, Batch, Ring, Snapshot},
    },
    transport::user::protocol,
};
use zerocopy::FromBytes;

const OPEN: usize = 4;
const REQUESTS: usize = 8;

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    two_region: bool,
    counted: bool,
    resumed: bool,
    region: u16,
    /// Entries, bytes beyond the least of them, and where they start: a queue that can be. `None`: whatever the bytes say.
    possible: Option<(u8, u8, u8)>,
    capabilities: &'a [u8],
    answers: [u8; 20],
    looks: Vec<Look>,
    /// What the region holds; more bytes than there are repeat it.
    bytes: &'a [u8],
}

#[derive(Debug, Arbitrary)]
struct Look {
    /// Words of the header that differ from what they were.
    changes: Vec<(u8, Change)>,
    most: u8,
    publish: bool,
}

#[derive(Debug, Arbitrary)]
enum Change {
    Small(u8),
    Any(u32),
}

fuzz_target!(|input: Input| {
    let _ = protocol::parse_region_info(input.capabilities, 9, 4096, 4096);
    let _ = protocol::parse_irq_info(input.capabilities, 5);
    let region = u64::from(input.region);
    if let Ok(header) = ResponseHeader::read_from_bytes(&input.answers)
        && let Ok((geometry, head, _)) = ring::response_slot(&header, region)
    {
        assert!(geometry.at(head) + u64::from(geometry.entry_size) <= region);
    }
    let byte = |at: u64| input.bytes.get(at as usize % input.bytes.len().max(1)).copied().unwrap_or(0);
    let mut header: [u8; 24] = std::array::from_fn(|at| byte(at as u64));
    if let Some((entries, more, gap)) = input.possible {
        let (entries, size) = (u32::from(entries), RECORD as u32 + u32::from(more));
        let [second, third] = if input.two_region { [entries, size] } else { [size, entries] };
        for (word, value) in [(0, 0), (1, second), (2, third), (3, 24 + u32::from(gap)), (4, 0), (5, 0)] {
            header[word * 4..word * 4 + 4].copy_from_slice(&value.to_le_bytes());
        }
    }
    let read = |header: &[u8; 24]| {
        let bytes = if input.counted { &header[..] } else { &header[..20] };
        if input.two_region { Snapshot::of_producer(bytes) } else { Snapshot::of_single(bytes) }
    };
    let Some(first) = read(&header) else { return };
    let Ok(mut ring) = Ring::new(&first, region, input.resumed) else { return };
    let geometry = ring.geometry();
    let mut assembly = Assembly::new(OPEN, REQUESTS);
    for look in &input.looks {
        for (word, value) in &look.changes {
            let at = usize::from(word % 6) * 4;
            let value = match *value {
                Change::Small(value) => value.into(),
                Change::Any(value) => value,
            };
            header[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        let Some(snapshot) = read(&header) else { return };
        let Ok(waiting) = ring.look(&snapshot) else { return };
        assert!(waiting < geometry.entries);
        let mut batch = Batch::default();
        let mut left = u32::from(look.most % 65);
        while let Some((start, count)) = ring.run(left) {
            assert!(count <= left && geometry.at(start) >= 20 && geometry.at(start + count) <= region);
            let mut entries: Vec<u8> = (geometry.at(start)..geometry.at(start + count)).map(byte).collect();
            if input.possible.is_some() {
                // Records of both sorts, but for some.
                for entry in entries.chunks_exact_mut(geometry.entry_size as usize).filter(|entry| entry[0] < 0xf0) {
                    let head = [1 + entry[0] % 2, 0, 0, 0, entry[0] / 0x80, 0, 0, 0];
                    entry[..8].copy_from_slice(&head);
                }
            }
            for entry in entries.chunks_exact(geometry.entry_size as usize) {
                if let Ok(record) = Record::parse(entry) {
                    assert!(entry.len() >= RECORD && Record::parse(&record.to_bytes()) == Ok(record));
                }
            }
            batch.take(&mut ring, &mut assembly, &entries);
            if batch.error.is_some() {
                break;
            }
            left -= count;
        }
        assert!(batch.groups.iter().all(|(group, _)| group.faults.len() <= REQUESTS));
        assert!(batch.groups.len() + batch.refused.len() <= 2 * 64);
        if batch.error.is_some() {
            return;
        }
        let _ = ring.lost_at_end();
        if look.publish
            && let Some(cons) = ring.publish()
        {
            assert!(cons < geometry.entries);
            if !input.two_region {
                header[..4].copy_from_slice(&cons.to_le_bytes());
            }
        }
        let _ = ring.has_more();
    }
});
