//! A fault queue in a region without its region: what its header may say, which entries are read, what was lost, and groups.
//!
//! Everything here is a pure function of bytes that the device may have made up: nothing panics on them, and nothing is allocated
//! in a size of their choosing.

use std::collections::VecDeque;

use zerocopy::FromBytes;

use super::{
    Fault, FaultGroup, Lost,
    abi::{self, ProducerHeader, RECORD, Record, ResponseHeader, SingleHeader},
    assembly::{Assembly, GroupKey},
};
use crate::{Error, Result};

/// Bytes of an entry at most.
pub const MAX_ENTRY: u32 = 4096;
/// Entries of a queue at most.
pub const MAX_ENTRIES: u32 = 1 << 20;

/// Where a queue is: checked, and the same for as long as the queue is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Entries. One of them is always free.
    pub entries: u32,
    /// Bytes of an entry.
    pub entry_size: u32,
    /// Where in the region the first one is.
    pub offset: u32,
}

impl Geometry {
    /// Checks what a header of `header` bytes says, in a region of `region` bytes. An entry has `record` bytes at least.
    ///
    /// # Errors
    /// [`Error::DeviceFault`] for sizes and places that can't be.
    pub fn check(self, record: usize, header: usize, region: u64) -> Result<Self> {
        let Self { entries, entry_size, offset } = self;
        if !(2..=MAX_ENTRIES).contains(&entries) {
            return Err(fault(format!("{entries} entries; from 2 to {MAX_ENTRIES} make sense")));
        }
        if (entry_size as usize) < record || entry_size > MAX_ENTRY {
            return Err(fault(format!("entries of {entry_size} bytes; from {record} to {MAX_ENTRY} make sense")));
        }
        if (offset as usize) < header {
            return Err(fault(format!("it starts at {offset:#x}, inside of its header of {header} bytes")));
        }
        let end = u64::from(offset) + u64::from(entries) * u64::from(entry_size);
        if end > region {
            return Err(fault(format!(
                "{entries} entries of {entry_size} bytes at {offset:#x} end at {end:#x}, beyond its region of {region:#x} bytes"
            )));
        }
        Ok(self)
    }

    /// Where an entry is.
    pub fn at(&self, slot: u32) -> u64 {
        u64::from(self.offset) + u64::from(slot) * u64::from(self.entry_size)
    }

    /// Steps from one slot to another, forward.
    fn distance(&self, from: u32, to: u32) -> u32 {
        if to >= from { to - from } else { self.entries - from + to }
    }

    fn forward(&self, slot: u32, by: u32) -> u32 {
        let to = slot + by;
        if to >= self.entries { to - self.entries } else { to }
    }

    fn index(&self, name: &str, index: u32) -> Result<u32> {
        if index < self.entries {
            return Ok(index);
        }
        Err(fault(format!("its {name} is {index}, of {} entries", self.entries)))
    }
}

fn fault(what: String) -> Error {
    Error::fault(format!("the fault queue: {what}"))
}

/// A header, copied once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snapshot {
    /// The version in it; the single-region form has none there.
    pub version: Option<u32>,
    /// Where the queue is, unchecked.
    pub geometry: Geometry,
    /// Where the next record goes to.
    pub produced: u32,
    /// The record that is read next, where the header has it.
    pub consumed: Option<u32>,
    /// What was lost so far, in version 2.
    pub lost: Option<u32>,
}

impl Snapshot {
    /// Reads the header of the two-region form: 20 bytes, or 24 with the counter.
    pub fn of_producer(bytes: &[u8]) -> Option<Self> {
        let (header, counted) = widened::<ProducerHeader>(bytes)?;
        Some(Self {
            version: Some(header.version.get()),
            geometry: Geometry {
                entries: header.nb_entries.get(),
                entry_size: header.entry_size.get(),
                offset: header.offset.get(),
            },
            produced: header.prod.get(),
            consumed: None,
            lost: counted.then_some(header.lost.get()),
        })
    }

    /// Reads the header of the single-region form: 20 bytes, or 24 with the counter.
    pub fn of_single(bytes: &[u8]) -> Option<Self> {
        let (header, counted) = widened::<SingleHeader>(bytes)?;
        Some(Self {
            version: None,
            geometry: Geometry {
                entries: header.nb_entries.get(),
                entry_size: header.entry_size.get(),
                offset: header.offset.get(),
            },
            produced: header.head.get(),
            consumed: Some(header.tail.get()),
            lost: counted.then_some(header.lost.get()),
        })
    }

    /// Bytes that were read of it.
    fn size(&self) -> usize {
        abi::PLAIN_HEADER + if self.lost.is_some() { 4 } else { 0 }
    }
}

/// A header of 24 bytes, or of the first 20 of them; whether it has all.
fn widened<T: FromBytes>(bytes: &[u8]) -> Option<(T, bool)> {
    if let Ok((header, _)) = T::read_from_prefix(bytes) {
        return Some((header, true));
    }
    let mut whole = [0; abi::PLAIN_HEADER + 4];
    whole[..abi::PLAIN_HEADER].copy_from_slice(bytes.get(..abi::PLAIN_HEADER)?);
    Some((T::read_from_prefix(&whole).ok()?.0, false))
}

/// The queue of answers, as its header has it: where the next answer goes to, and whether there is room for it.
///
/// # Errors
/// [`Error::DeviceFault`] as for a fault queue.
pub fn response_slot(header: &ResponseHeader, region: u64) -> Result<(Geometry, u32, bool)> {
    let geometry =
        Geometry { entries: header.nb_entries.get(), entry_size: header.entry_size.get(), offset: header.offset.get() };
    let of_answers = |error: Error| fault(format!("that of answers: {error}"));
    let geometry =
        geometry.check(size_of::<abi::PageResponse>(), size_of::<ResponseHeader>(), region).map_err(of_answers)?;
    let head = geometry.index("head", header.head.get()).map_err(of_answers)?;
    let tail = geometry.index("tail", header.tail.get()).map_err(of_answers)?;
    Ok((geometry, head, geometry.forward(head, 1) != tail))
}

/// The reader's side of a queue.
#[derive(Debug)]
pub struct Ring {
    geometry: Geometry,
    version: Option<u32>,
    /// The next entry to be read.
    cons: u32,
    /// What the device knows of that.
    published: u32,
    /// What it knew before; `None` once it was looked whether the queue was full then.
    before: Option<u32>,
    /// The entries before which the queue was perhaps full, where that is not counted: from the next one on, ascending.
    suspects: VecDeque<u32>,
    /// Where the device was when it was looked last.
    seen: u32,
    /// The counter there, and how much of it was told.
    counter: Option<u32>,
    told: u32,
}

impl Ring {
    /// The queue of a header, in a region of `region` bytes, read from its first unread entry on. `resumed`: others have read it
    /// before, and the header does not say how far; what is in it now is skipped, and the device is to be told of that.
    ///
    /// # Errors
    /// [`Error::DeviceFault`] for a header that can't be.
    pub fn new(first: &Snapshot, region: u64, resumed: bool) -> Result<Self> {
        let geometry = first.geometry.check(RECORD, first.size(), region)?;
        let seen = geometry.index("producer", first.produced)?;
        let (cons, told) = match first.consumed {
            Some(tail) => (geometry.index("consumer", tail)?, 0),
            None if resumed => (seen, first.lost.unwrap_or(0)),
            None => (0, 0),
        };
        let (version, counter) = (first.version, first.lost);
        Ok(Self {
            geometry,
            version,
            cons,
            published: cons,
            before: None,
            suspects: VecDeque::new(),
            seen: cons,
            counter,
            told,
        })
    }

    /// Where the queue is.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Takes a fresh header; how many entries wait.
    ///
    /// # Errors
    /// [`Error::DeviceFault`] when it says something else of the queue than the first one, or its indices or its counter can't be.
    pub fn look(&mut self, header: &Snapshot) -> Result<u32> {
        let geometry = self.geometry;
        if header.geometry != geometry {
            return Err(fault(format!(
                "it changed while it was read, from {} entries of {} bytes at {:#x} to {} of {} at {:#x}",
                geometry.entries,
                geometry.entry_size,
                geometry.offset,
                header.geometry.entries,
                header.geometry.entry_size,
                header.geometry.offset
            )));
        }
        if header.version != self.version {
            let [was, is] = [self.version, header.version].map(Option::unwrap_or_default);
            return Err(fault(format!("its version changed from {was} to {is}")));
        }
        let produced = geometry.index("producer", header.produced)?;
        if let Some(tail) = header.consumed
            && tail != self.published
        {
            return Err(fault(format!("its consumer is at {tail}, where {} was written", self.published)));
        }
        let waiting = geometry.distance(self.cons, produced);
        if waiting < geometry.distance(self.cons, self.seen) {
            return Err(fault(format!("its producer went back from {} to {produced}", self.seen)));
        }
        match (self.counter, header.lost) {
            (Some(was), Some(is)) if is.wrapping_sub(was) > i32::MAX as u32 => {
                return Err(fault(format!("its counter of lost faults went back from {was} to {is}")));
            }
            _ => {}
        }
        if let Some(before) = self.before.take().filter(|_| header.lost.is_none()) {
            // The slot that was free when the queue was full.
            let free = geometry.forward(before, geometry.entries - 1);
            if waiting >= geometry.distance(self.cons, free) {
                self.suspects.push_back(free);
            }
        }
        self.seen = produced;
        self.counter = header.lost;
        Ok(waiting)
    }

    /// The entries that are read next, at most `most`, next to each other: the first, and how many.
    pub fn run(&self, most: u32) -> Option<(u32, u32)> {
        let waiting = self.geometry.distance(self.cons, self.seen);
        let count = waiting.min(most).min(self.geometry.entries - self.cons);
        (count != 0).then_some((self.cons, count))
    }

    /// Takes the next entry; what was lost directly before it.
    ///
    /// # Errors
    /// [`Error::DeviceFault`] for one that is no record.
    pub fn take(&mut self, entry: &[u8]) -> Result<(Option<Lost>, Record)> {
        let slot = self.cons;
        let record = Record::parse(entry).map_err(|error| fault(format!("entry {slot}: {error}")))?;
        let lost = self.lost_before(slot, Some(record.lost))?;
        self.cons = self.geometry.forward(slot, 1);
        Ok((lost, record))
    }

    /// What was lost after the last entry; to be asked when no more wait.
    pub fn lost_at_end(&mut self) -> Option<Lost> {
        if self.cons != self.seen {
            return None;
        }
        self.lost_before(self.cons, self.counter).ok().flatten()
    }

    fn lost_before(&mut self, slot: u32, counted: Option<u32>) -> Result<Option<Lost>> {
        let (Some(counter), Some(counted)) = (self.counter, counted) else {
            let suspected = self.suspects.pop_front_if(|suspect| *suspect == slot);
            return Ok(suspected.map(|_| Lost::Perhaps));
        };
        let new = counted.wrapping_sub(self.told);
        if new > counter.wrapping_sub(self.told) {
            return Err(fault(format!(
                "entry {slot}: it says that {counted} faults were lost before it; it is from {} to {counter}",
                self.told
            )));
        }
        self.told = counted;
        Ok((new != 0).then_some(Lost::Count(new.into())))
    }

    /// Whether it is to be looked at again at once: there are more, or it was full, and may have lost some since.
    pub fn has_more(&self) -> bool {
        let full = self.before.is_some_and(|before| self.geometry.distance(before, self.seen) == self.geometry.entries - 1);
        self.cons != self.seen || full
    }

    /// The index that the device is to be told of, where it changed.
    pub fn publish(&mut self) -> Option<u32> {
        if self.cons == self.published {
            return None;
        }
        self.before = Some(self.published);
        self.published = self.cons;
        Some(self.cons)
    }
}

/// What came of some entries.
#[derive(Debug, Default)]
pub struct Batch {
    /// Whole groups, each with its key where it can be answered.
    pub groups: Vec<(FaultGroup, Option<GroupKey>)>,
    /// Groups that are too long: to be answered, but by nobody else.
    pub refused: Vec<GroupKey>,
    /// Why there will be no more.
    pub error: Option<Error>,
}

impl Batch {
    /// Takes entries of `entry_size` bytes from the ring's next on.
    pub fn take(&mut self, ring: &mut Ring, assembly: &mut Assembly, entries: &[u8]) {
        for entry in entries.chunks_exact(ring.geometry.entry_size as usize) {
            if let Err(error) = self.take_one(ring, assembly, entry) {
                self.error = Some(error);
                return;
            }
        }
    }

    fn take_one(&mut self, ring: &mut Ring, assembly: &mut Assembly, entry: &[u8]) -> Result<()> {
        let (lost, record) = ring.take(entry)?;
        match record.fault {
            Fault::Unrecoverable(_) => self.push(lost, vec![record.fault], None),
            Fault::PageRequest(request) => {
                // It is told in its place, even where the group has to wait for its end.
                if let Some(lost) = lost {
                    self.lose(lost);
                }
                match assembly.add(request, record.last)? {
                    None => {}
                    Some((key, None)) => self.refused.push(key),
                    Some((key, Some(faults))) => self.push(None, faults, Some(key)),
                }
            }
        }
        Ok(())
    }

    /// Tells of a loss with no fault after it.
    pub fn lose(&mut self, lost: Lost) {
        self.push(Some(lost), Vec::new(), None);
    }

    fn push(&mut self, lost: Option<Lost>, faults: Vec<Fault>, key: Option<GroupKey>) {
        self.groups.push((FaultGroup { lost, device_id: 0, faults, id: None }, key));
    }
}
