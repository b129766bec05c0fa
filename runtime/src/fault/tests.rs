//! The reader's side of a region queue against a device in memory, without regions and messages.

use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::{
    Fault, Lost, PageRequest, Permissions, Reason, Unrecoverable,
    abi::{ProducerHeader, RECORD, Record, SingleHeader},
    assembly::{Assembly, GroupKey},
    ring::{Batch, Geometry, Ring, Snapshot},
};

const HEADER: u32 = 64;

/// A queue as a device keeps it.
struct Model {
    entries: Vec<[u8; RECORD]>,
    counted: bool,
    prod: u32,
    cons: u32,
    lost: u32,
    raised: u64,
}

impl Model {
    fn new(entries: usize, counted: bool, lost: u32) -> Self {
        Self { entries: vec![[0; RECORD]; entries], counted, prod: 0, cons: 0, lost, raised: 0 }
    }

    fn raise(&mut self) {
        let n = self.entries.len() as u32;
        let next = (self.prod + 1) % n;
        if next == self.cons {
            self.lost = self.lost.wrapping_add(1);
        } else {
            let lost = if self.counted { self.lost } else { 0 };
            self.entries[self.prod as usize] = numbered(self.raised, lost).to_bytes();
            self.prod = next;
        }
        self.raised += 1;
    }

    fn header(&self) -> Snapshot {
        let header = SingleHeader {
            tail: self.cons.into(),
            entry_size: (RECORD as u32).into(),
            nb_entries: (self.entries.len() as u32).into(),
            offset: HEADER.into(),
            head: self.prod.into(),
            lost: self.lost.into(),
        };
        let bytes = header.as_bytes();
        Snapshot::of_single(if self.counted { bytes } else { &bytes[..20] }).unwrap()
    }

    fn size(&self) -> u64 {
        u64::from(HEADER) + (self.entries.len() * RECORD) as u64
    }

    /// One look of the reader, of at most `most` entries. `late`: faults that come before the device hears of it.
    fn look(&mut self, ring: &mut Ring, most: u32, late: usize, batch: &mut Batch) {
        let mut assembly = Assembly::new(1, 1);
        ring.look(&self.header()).unwrap();
        let mut left = most;
        while let Some((first, count)) = ring.run(left) {
            let entries = &self.entries[first as usize..(first + count) as usize];
            batch.take(ring, &mut assembly, entries.as_bytes());
            assert!(batch.error.is_none(), "{:?}", batch.error);
            left -= count;
        }
        batch.groups_at_end(ring);
        (0..late).for_each(|_| self.raise());
        if let Some(cons) = ring.publish() {
            self.cons = cons;
        }
    }
}

impl Batch {
    fn groups_at_end(&mut self, ring: &mut Ring) {
        if let Some(lost) = ring.lost_at_end() {
            self.lose(lost);
        }
    }
}

fn numbered(number: u64, lost: u32) -> Record {
    let fault = Unrecoverable {
        reason: Reason::PteFetch,
        pasid: None,
        permissions: Permissions::READ,
        address: Some(number),
        fetch_address: None,
    };
    Record { lost, fault: Fault::Unrecoverable(fault), last: true }
}

fn number(fault: &Fault) -> u64 {
    match fault {
        Fault::Unrecoverable(fault) => fault.address.unwrap(),
        Fault::PageRequest(request) => panic!("{request:?}"),
    }
}

proptest! {
    /// Whatever the device does between two looks, and between a look and its answer: each loss is told of, in its place.
    #[test]
    fn every_loss_is_told_of_in_its_place(
        entries in 2..12usize,
        counted: bool,
        steps in prop::collection::vec((0..16usize, 1..16u32, 0..16usize), 1..60),
    ) {
        // The counter wraps on its way; a reader that opens the queue then would be told of all before.
        let mut model = Model::new(entries, counted, 0);
        let mut ring = Ring::new(&model.header(), model.size(), false).unwrap();
        let (mut batch, mut end) = (Batch::default(), 0);
        for (before, most, late) in steps {
            (0..before).for_each(|_| model.raise());
            model.look(&mut ring, most, late, &mut batch);
        }
        while ring.has_more() || model.prod != model.cons || end < 2 {
            model.look(&mut ring, 64, 0, &mut batch);
            end += 1;
        }
        let mut expected = 0;
        let mut perhaps = false;
        for (group, _) in &batch.groups {
            match group.lost {
                Some(Lost::Count(lost)) => expected += lost,
                Some(Lost::Perhaps) => perhaps = true,
                None => {}
            }
            for fault in &group.faults {
                let number = number(fault);
                prop_assert!(number == expected || (perhaps && number > expected), "{number} where {expected} is due");
                expected = number + 1;
                perhaps = false;
            }
        }
        prop_assert!(expected == model.raised || perhaps, "{expected} of {}", model.raised);
    }

    /// Headers and entries of any content give faults or an error.
    #[test]
    fn any_bytes_are_taken_or_refused(
        headers in prop::collection::vec((prop::array::uniform6(prop_oneof![0..8u32, Just(48), Just(64), any::<u32>()]), any::<u8>()), 1..8),
        two_region: bool,
        counted: bool,
    ) {
        let read = |words: &[u32; 6]| {
            let bytes = words.as_bytes();
            let bytes = if counted { bytes } else { &bytes[..20] };
            if two_region { Snapshot::of_producer(bytes) } else { Snapshot::of_single(bytes) }.unwrap()
        };
        let Ok(mut ring) = Ring::new(&read(&headers[0].0), 8192, false) else { return Ok(()) };
        let (mut assembly, mut batch) = (Assembly::new(4, 4), Batch::default());
        for (words, fill) in &headers {
            let Ok(waiting) = ring.look(&read(words)) else { return Ok(()) };
            prop_assert!(waiting < ring.geometry().entries);
            while let Some((first, count)) = ring.run(64) {
                prop_assert!(ring.geometry().at(first + count) <= 8192);
                let entries = vec![*fill; (count * ring.geometry().entry_size) as usize];
                batch.take(&mut ring, &mut assembly, &entries);
                if batch.error.is_some() {
                    return Ok(());
                }
            }
            batch.groups_at_end(&mut ring);
            if let Some(cons) = ring.publish() {
                prop_assert!(cons < ring.geometry().entries);
            }
        }
    }
}

fn producer(prod: u32) -> ProducerHeader {
    ProducerHeader {
        version: 1.into(),
        nb_entries: 8.into(),
        entry_size: 48.into(),
        offset: 4096.into(),
        prod: prod.into(),
        lost: 0.into(),
    }
}

fn snapshot(header: &ProducerHeader) -> Snapshot {
    Snapshot::of_producer(&header.as_bytes()[..20]).unwrap()
}

#[test]
fn a_producer_that_goes_back_is_refused() {
    let mut ring = Ring::new(&snapshot(&producer(0)), 8192, false).unwrap();
    assert_eq!(ring.look(&snapshot(&producer(5))).unwrap(), 5);
    let error = ring.look(&snapshot(&producer(3))).unwrap_err().to_string();
    assert!(error.contains("its producer went back from 5 to 3"), "{error}");
    assert!(ring.look(&snapshot(&producer(8))).is_err());
    assert_eq!(ring.look(&snapshot(&producer(6))).unwrap(), 6);
}

#[test]
fn who_comes_later_skips_what_is_there() {
    let mut ring = Ring::new(&snapshot(&producer(5)), 8192, true).unwrap();
    assert_eq!(ring.look(&snapshot(&producer(5))).unwrap(), 0);
    assert_eq!(ring.look(&snapshot(&producer(6))).unwrap(), 1);
    assert_eq!(ring.run(64), Some((5, 1)));
    let mut ring = Ring::new(&snapshot(&producer(5)), 8192, false).unwrap();
    assert_eq!(ring.look(&snapshot(&producer(5))).unwrap(), 5);
}

#[test]
fn a_counter_that_wraps_is_no_lie() {
    let mut model = Model::new(4, true, u32::MAX - 2);
    let mut ring = Ring::new(&model.header(), model.size(), false).unwrap();
    let mut batch = Batch::default();
    model.look(&mut ring, 64, 0, &mut batch);
    (0..10).for_each(|_| model.raise());
    model.look(&mut ring, 64, 0, &mut batch);
    let lost: Vec<_> = batch.groups.iter().filter_map(|(group, _)| group.lost).collect();
    assert_eq!(lost, [Lost::Count(u64::from(u32::MAX - 2)), Lost::Count(7)]);
}

#[test]
fn sizes_have_bounds() {
    let geometry = |entries, entry_size, offset| Geometry { entries, entry_size, offset };
    assert!(geometry(2, 48, 20).check(48, 20, 116).is_ok());
    for (wrong, region) in [
        (geometry(1, 48, 20), 1 << 20),
        (geometry(2, 47, 20), 1 << 20),
        (geometry(2, 48, 19), 1 << 20),
        (geometry(2, 48, 20), 115),
        (geometry(2, 4097, 20), 1 << 20),
        (geometry(u32::MAX, u32::MAX, u32::MAX), u64::MAX),
        (geometry((1 << 20) + 1, 48, 20), u64::MAX),
    ] {
        assert!(wrong.check(48, 20, region).is_err(), "{wrong:?}");
    }
}

#[test]
fn groups_end_with_their_last_request() {
    let request = |group_index, address| PageRequest {
        pasid: None,
        group_index,
        permissions: Permissions::READ,
        address,
        length: 0,
        private_data: None,
    };
    let key = |index| GroupKey { pasid: None, index };
    let mut assembly = Assembly::new(2, 2);
    assert_eq!(assembly.add(request(1, 0), false).unwrap(), None);
    assert_eq!(assembly.add(request(2, 0), false).unwrap(), None);
    assert!(assembly.add(request(3, 0), false).is_err(), "two may be open");
    assert_eq!(assembly.add(request(3, 0), true).unwrap(), Some((key(3), Some(vec![Fault::PageRequest(request(3, 0))]))));
    assert_eq!(assembly.add(request(1, 1), false).unwrap(), None);
    assert_eq!(assembly.add(request(1, 2), false).unwrap(), None);
    assert_eq!(assembly.add(request(1, 3), true).unwrap(), Some((key(1), None)), "it is too long");
    assert_eq!(assembly.add(request(1, 4), false).unwrap(), None, "another one");
    let (_, faults) = assembly.add(request(2, 1), true).unwrap().unwrap();
    assert_eq!(faults.unwrap().len(), 2);
    assert_eq!(assembly.take_open(), [key(1)]);
}
