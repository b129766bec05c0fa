//! BAR0.

use std::{io, os::fd::OwnedFd, sync::Arc};

use vfio_uring::dma::{HugePages, SharedMemory};

use super::{PAGE, spec::register};
use crate::device::Mappable;

/// BAR0: registers, doorbells from 0x1000, then the MSI-X table and its pending bits.
#[derive(Debug)]
pub(super) struct Bar {
    pub doorbells: Mappable,
    pub table: Vec<u8>,
    pub table_at: u64,
    pub size: u64,
}

impl Bar {
    pub fn new(vectors: u16) -> io::Result<Self> {
        let size = (u64::from(vectors) * 8).next_multiple_of(PAGE).next_multiple_of(rustix::param::page_size() as u64);
        let end = register::DOORBELLS + size;
        let len = end.next_multiple_of(rustix::param::page_size() as u64);
        let other = |error: vfio_uring::Error| io::Error::other(error.to_string());
        let (fd, whole) = SharedMemory::create("nvme-doorbells", len as usize, HugePages::No).map_err(other)?;
        drop(whole);
        let memory = SharedMemory::map(&fd, register::DOORBELLS, size as usize, true).map_err(other)?;
        let fd: Arc<OwnedFd> = Arc::new(fd);
        let doorbells = Mappable { offset: register::DOORBELLS, size, fd, memory: Arc::new(memory) };
        let mut bar = Self { doorbells, table: Vec::new(), table_at: end, size: 0 };
        bar.size = (bar.pending_at(vectors) + u64::from(vectors).div_ceil(64) * 8).next_power_of_two().max(0x4000);
        bar.table = vec![0; (bar.size - end) as usize];
        bar.reset(vectors);
        Ok(bar)
    }

    /// Where the pending bits are, in a page of their own.
    pub fn pending_at(&self, vectors: u16) -> u64 {
        (self.table_at + u64::from(vectors) * 16).next_multiple_of(PAGE)
    }

    /// Every vector is masked.
    pub fn reset(&mut self, vectors: u16) {
        self.table.fill(0);
        for entry in self.table.chunks_exact_mut(16).take(vectors.into()) {
            entry[12] = 1;
        }
    }

    /// The offset in the doorbell area, when it is there.
    pub fn doorbell(&self, offset: u64) -> Option<u64> {
        offset.checked_sub(register::DOORBELLS).filter(|&at| at < self.doorbells.size)
    }

    pub fn table_range(&self, offset: u64) -> Option<std::ops::Range<usize>> {
        let at = usize::try_from(offset.checked_sub(self.table_at)?).ok()?;
        (at + 4 <= self.table.len()).then_some(at..at + 4)
    }
}
