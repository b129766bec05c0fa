//! The client's memory: what it mapped, and access to it.

use std::{cell::Cell, os::fd::OwnedFd};

use rustix::io::Errno;
use vfio_uring::{
    dma::SharedMemory,
    transport::user::wire::{DmaMap, DmaUnmap, flags},
};

/// Mappings of a client at most.
pub(super) const MAX_MAPS: usize = 32768;
/// The smallest page of a mapping.
pub(super) const PAGE: u64 = 4096;

#[derive(Debug)]
pub(super) struct Region {
    start: u64,
    size: u64,
    readable: bool,
    writable: bool,
    /// `None`: the client serves it by messages.
    memory: Option<SharedMemory>,
}

impl Region {
    /// How much of `len` bytes at `iova` it holds.
    #[inline]
    fn part(&self, iova: u64, len: usize) -> usize {
        (self.size - (iova - self.start)).min(len as u64) as usize
    }
}

/// A piece of client memory.
pub(super) enum Piece<'a> {
    Mapped { memory: &'a SharedMemory, offset: u64, len: usize },
    Messages { len: usize },
}

/// The mappings of a client, by address.
#[derive(Debug, Default)]
pub(super) struct DmaTable {
    regions: Vec<Region>,
    last: Cell<usize>,
}

impl DmaTable {
    #[inline]
    fn find(&self, iova: u64) -> Option<&Region> {
        if let Some(region) = self.regions.get(self.last.get())
            && iova.wrapping_sub(region.start) < region.size
        {
            return Some(region);
        }
        let at = self.regions.partition_point(|region| region.start <= iova).checked_sub(1)?;
        let region = self.regions.get(at).filter(|region| iova - region.start < region.size)?;
        self.last.set(at);
        Some(region)
    }

    /// The memory that holds all of a range.
    #[inline]
    pub fn window(&self, iova: u64, len: usize) -> Option<(&SharedMemory, u64)> {
        let region = self.find(iova)?;
        let memory = region.memory.as_ref().filter(|_| region.readable && region.part(iova, len) == len)?;
        Some((memory, iova - region.start))
    }

    /// The start of a range.
    #[inline]
    pub fn piece(&self, iova: u64, len: usize, write: bool) -> Option<Piece<'_>> {
        let region = self.find(iova).filter(|region| if write { region.writable } else { region.readable })?;
        let len = region.part(iova, len);
        Some(match &region.memory {
            Some(memory) => Piece::Mapped { memory, offset: iova - region.start, len },
            None => Piece::Messages { len },
        })
    }

    /// DMA_MAP.
    pub fn map(&mut self, map: &DmaMap, fds: Vec<OwnedFd>) -> Result<(), Errno> {
        let (start, size, offset) = (map.address.get(), map.size.get(), map.offset.get());
        let access = map.flags.get();
        let known = flags::DMA_READ | flags::DMA_WRITE;
        if access & known == 0 || access & !known != 0 || fds.len() > 1 || size == 0 {
            return Err(Errno::INVAL);
        }
        if !start.is_multiple_of(PAGE) || !size.is_multiple_of(PAGE) {
            return Err(Errno::INVAL);
        }
        // By the last byte, since the last page of the address space has no end that can be written down.
        let last = start.checked_add(size - 1).ok_or(Errno::INVAL)?;
        let at = self.regions.partition_point(|region| region.start <= last);
        let before = at.checked_sub(1).map(|before| &self.regions[before]);
        if before.is_some_and(|before| before.start >= start || start - before.start < before.size) {
            return Err(Errno::EXIST);
        }
        if self.regions.len() >= MAX_MAPS {
            return Err(Errno::NOSPC);
        }
        let (readable, writable) = (access & flags::DMA_READ != 0, access & flags::DMA_WRITE != 0);
        let memory = match fds.first() {
            Some(fd) => {
                let len = usize::try_from(size).map_err(|_| Errno::INVAL)?;
                Some(SharedMemory::map(fd, offset, len, writable).map_err(errno)?)
            }
            None => None,
        };
        self.regions.insert(at, Region { start, size, readable, writable, memory });
        Ok(())
    }

    /// DMA_UNMAP: one mapping exactly as it was made, or all.
    pub fn unmap(&mut self, unmap: &DmaUnmap) -> Result<(), Errno> {
        let (start, size) = (unmap.address.get(), unmap.size.get());
        match unmap.flags.get() {
            flags::UNMAP_ALL if start == 0 && size == 0 => {
                self.regions.clear();
                Ok(())
            }
            0 => {
                let at = self.regions.binary_search_by_key(&start, |region| region.start).map_err(|_| Errno::NOENT)?;
                if self.regions[at].size != size {
                    return Err(Errno::NOENT);
                }
                self.regions.remove(at);
                Ok(())
            }
            _ => Err(Errno::INVAL),
        }
    }
}

/// The errno of an error of the runtime.
fn errno(error: vfio_uring::Error) -> Errno {
    tracing::debug!("a client's memory can't be mapped: {error}");
    match error {
        vfio_uring::Error::Io { source, .. } => source.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error),
        _ => Errno::INVAL,
    }
}
