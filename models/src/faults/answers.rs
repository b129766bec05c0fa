//! The queue of answers to page requests.

use std::{collections::BTreeMap, io};

use rustix::io::Errno;
use vfio_uring::fault::abi::{PageResponse, RESPONSE_PASID_VALID, ResponseHeader};
use zerocopy::IntoBytes;

use super::{GivenAnswer, Handle, queue::Pages};
use crate::device::Mappable;

/// Entries of the queue.
const ENTRIES: u32 = 64;
const ENTRY: u32 = size_of::<PageResponse>() as u32;
/// Page request group indices have 9 bits (PCI Express 5.0, section 10.4.1).
const GROUPS: u32 = 1 << 9;

#[derive(Debug)]
pub(super) struct Answers {
    pages: Pages,
    head: u32,
    tail: u32,
    /// Codes by group.
    given: BTreeMap<u32, u32>,
    stalled: bool,
}

impl Answers {
    pub fn new(mapped: bool) -> io::Result<Self> {
        let pages = Pages::new(u64::from(ENTRIES * ENTRY), mapped)?;
        Ok(Self { pages, head: 0, tail: 0, given: BTreeMap::new(), stalled: false })
    }

    pub fn reset(&mut self) {
        (self.head, self.tail) = (0, 0);
        self.given.clear();
        self.pages.clear();
    }

    pub fn size(&self) -> u64 {
        self.pages.size()
    }

    pub fn mappable(&self) -> Option<Mappable> {
        self.pages.mappable()
    }

    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), Errno> {
        let header = ResponseHeader {
            head: self.head.into(),
            entry_size: ENTRY.into(),
            nb_entries: ENTRIES.into(),
            offset: self.pages.start().into(),
            tail: self.tail.into(),
        };
        self.pages.read(header.as_bytes(), offset, to)
    }

    /// An entry, or the head.
    pub fn write(&mut self, offset: u64, from: &[u8], handle: &Handle) -> Result<(), Errno> {
        if offset != 0 {
            return self.pages.write(offset, from);
        }
        let head = u32::from_le_bytes(from.try_into().map_err(|_| Errno::INVAL)?);
        if head >= ENTRIES {
            return Err(Errno::INVAL);
        }
        self.head = head;
        self.service(handle);
        Ok(())
    }

    pub fn is_active(&self) -> bool {
        self.head != self.tail && !self.stalled
    }

    /// Takes the answers that are there.
    pub fn service(&mut self, handle: &Handle) -> usize {
        self.stalled = handle.is_stalled();
        let mut taken = 0;
        while !self.stalled && self.tail != self.head {
            if let Some(response) = self.pages.entry::<PageResponse>(u64::from(self.tail * ENTRY)) {
                self.take(&response, handle);
            }
            self.tail = (self.tail + 1) % ENTRIES;
            taken += 1;
        }
        taken
    }

    fn take(&mut self, response: &PageResponse, handle: &Handle) {
        let (group, code) = (response.grpid.get(), response.code.get());
        let pasid = (response.flags.get() & RESPONSE_PASID_VALID != 0).then(|| response.pasid.get());
        if response.argsz.get() < ENTRY || response.version.get() != 1 || code > 2 {
            tracing::debug!(?response, "an answer that can't be understood");
            return;
        }
        if group < GROUPS {
            self.given.insert(group, code);
        }
        handle.answered(GivenAnswer { pasid, group, code });
    }

    pub fn to(&self, group: u32) -> Option<u32> {
        self.given.get(&group).copied()
    }

    pub fn forget(&mut self, group: u32) {
        self.given.remove(&group);
    }
}
