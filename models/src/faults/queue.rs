//! The queue of faults.

use std::{io, os::fd::OwnedFd, sync::Arc};

use rustix::io::Errno;
use vfio_uring::{
    dma::{HugePages, SharedMemory},
    fault::abi::{ConsumerHeader, ProducerHeader, Record, SingleHeader, VERSION_COUNTED, VERSION_NONE},
};
use zerocopy::{FromBytes, IntoBytes};

use super::{Config, Handle};
use crate::device::Mappable;

/// The form of a fault queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A region for the producer and one for the consumer, and a version that both agree on.
    TwoRegion,
    /// One region, and perhaps one for answers.
    Single,
}

/// A region with a page for its header and its entries from the next page on.
#[derive(Debug)]
pub(super) struct Pages {
    fd: Arc<OwnedFd>,
    memory: Arc<SharedMemory>,
    page: u64,
    mapped: bool,
}

impl Pages {
    pub fn new(entries: u64, mapped: bool) -> io::Result<Self> {
        let page = rustix::param::page_size() as u64;
        let size = page + entries.next_multiple_of(page);
        let other = |error: vfio_uring::Error| io::Error::other(error.to_string());
        let (fd, whole) = SharedMemory::create("fault-queue", size as usize, HugePages::No).map_err(other)?;
        drop(whole);
        let memory = SharedMemory::map(&fd, page, (size - page) as usize, true).map_err(other)?;
        Ok(Self { fd: Arc::new(fd), memory: Arc::new(memory), page, mapped })
    }

    pub fn size(&self) -> u64 {
        self.page + self.memory.len() as u64
    }

    /// Where the entries start.
    pub fn start(&self) -> u32 {
        self.page as u32
    }

    pub fn mappable(&self) -> Option<Mappable> {
        let (fd, memory) = (self.fd.clone(), self.memory.clone());
        self.mapped.then(|| Mappable { offset: self.page, size: memory.len() as u64, fd, memory })
    }

    /// Reads the header page, whose first bytes are `header`, or entries.
    pub fn read(&self, header: &[u8], offset: u64, to: &mut [u8]) -> Result<(), Errno> {
        for (at, byte) in (offset..).zip(to) {
            *byte = match at.checked_sub(self.page) {
                None => header.get(at as usize).copied().unwrap_or(0),
                Some(at) => self.memory.read_obj(at).map_err(|_| Errno::INVAL)?,
            };
        }
        Ok(())
    }

    /// Writes to an entry, or to several.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), Errno> {
        let at = offset.checked_sub(self.page).ok_or(Errno::INVAL)?;
        self.memory.write(at, from).map_err(|_| Errno::INVAL)
    }

    /// Copies an entry that the client may write to, once.
    pub fn entry<T: FromBytes>(&self, at: u64) -> Option<T> {
        self.memory.read_obj(at).ok()
    }

    pub fn clear(&self) {
        let cleared = self.memory.fill(0, self.memory.len(), 0);
        debug_assert!(cleared.is_ok(), "the memory is ours");
    }
}

#[derive(Debug)]
pub(super) struct Queue {
    form: Form,
    highest: u32,
    entries: u32,
    entry_size: u32,
    pages: Pages,
    /// `None` until there is a version.
    version: Option<u32>,
    prod: u32,
    cons: u32,
    lost: u32,
}

impl Queue {
    pub fn new(config: &Config) -> io::Result<Self> {
        let Config { form, version: highest, entries, entry_size, mapped, .. } = *config;
        let pages = Pages::new(u64::from(entries) * u64::from(entry_size), mapped)?;
        let mut queue = Self { form, highest, entries, entry_size, pages, version: None, prod: 0, cons: 0, lost: 0 };
        queue.reset();
        Ok(queue)
    }

    pub fn reset(&mut self) {
        // One region needs no agreement.
        self.version = (self.form == Form::Single).then_some(self.highest);
        (self.prod, self.cons, self.lost) = (0, 0, 0);
        self.pages.clear();
    }

    pub fn size(&self) -> u64 {
        self.pages.size()
    }

    pub fn mappable(&self) -> Option<Mappable> {
        self.pages.mappable()
    }

    pub fn read(&self, offset: u64, to: &mut [u8], handle: &Handle) -> Result<(), Errno> {
        let version = self.version.ok_or(Errno::INVAL)?;
        let (nb_entries, entry_size) = (self.entries.into(), self.entry_size.into());
        let offset_of = self.pages.start().into();
        let lost = if version >= VERSION_COUNTED { self.lost } else { 0 }.into();
        let mut words: [[u8; 4]; 6] = match self.form {
            Form::TwoRegion => zerocopy::transmute!(ProducerHeader {
                version: version.into(),
                nb_entries,
                entry_size,
                offset: offset_of,
                prod: self.prod.into(),
                lost,
            }),
            Form::Single => zerocopy::transmute!(SingleHeader {
                tail: self.cons.into(),
                entry_size,
                nb_entries,
                offset: offset_of,
                head: self.prod.into(),
                lost,
            }),
        };
        handle.lies(&mut words);
        self.pages.read(words.as_bytes(), offset, to)
    }

    /// The consumer's region: version and index are checked together, whatever part of them is written.
    pub fn write_consumer(&mut self, offset: u64, from: &[u8]) -> Result<(), Errno> {
        let now = ConsumerHeader { version: self.version.unwrap_or(VERSION_NONE).into(), cons: self.cons.into() };
        let mut bytes: [u8; 8] = zerocopy::transmute!(now);
        let at = usize::try_from(offset).map_err(|_| Errno::INVAL)?;
        let end = at.checked_add(from.len()).ok_or(Errno::INVAL)?;
        bytes.get_mut(at..end).ok_or(Errno::INVAL)?.copy_from_slice(from);
        let new: ConsumerHeader = zerocopy::transmute!(bytes);
        let version = new.version.get();
        match self.version {
            None if (1..=self.highest).contains(&version) => {}
            Some(agreed) if agreed == version => {}
            _ => return Err(Errno::INVAL),
        }
        let cons = self.checked(new.cons.get())?;
        (self.version, self.cons) = (Some(version), cons);
        Ok(())
    }

    /// The single region: its tail, and nothing else.
    pub fn write_tail(&mut self, offset: u64, from: &[u8]) -> Result<(), Errno> {
        let (0, Ok(tail)) = (offset, from.try_into()) else { return Err(Errno::INVAL) };
        self.cons = self.checked(u32::from_le_bytes(tail))?;
        Ok(())
    }

    /// A consumer that is in the queue and behind the producer.
    fn checked(&self, cons: u32) -> Result<u32, Errno> {
        let distance = |to: u32| (to + self.entries - self.cons) % self.entries;
        if cons < self.entries && distance(cons) <= distance(self.prod) { Ok(cons) } else { Err(Errno::INVAL) }
    }

    /// Stores a record, if there is room for it; whether it did.
    pub fn store(&mut self, record: Record, handle: &Handle) -> bool {
        let Some(version) = self.version else {
            handle.count(|counters| counters.unheard += 1);
            return false;
        };
        let next = (self.prod + 1) % self.entries;
        if next == self.cons {
            self.lost = self.lost.wrapping_add(1);
            handle.count(|counters| counters.lost += 1);
            return false;
        }
        let lost = if version >= VERSION_COUNTED { self.lost } else { 0 };
        self.rewrite(self.prod, &Record { lost, ..record }.to_bytes());
        self.prod = next;
        handle.count(|counters| counters.stored += 1);
        true
    }

    /// Writes to an entry, whoever reads it.
    pub fn rewrite(&self, slot: u32, bytes: &[u8]) {
        let at = u64::from(self.pages.start()) + u64::from(slot) * u64::from(self.entry_size);
        if self.pages.write(at, bytes).is_err() {
            tracing::debug!(slot, "an entry that is not there");
        }
    }
}
