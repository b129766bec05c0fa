//! Pools: mappings cut into buffers.

use std::{
    ptr::NonNull,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{AddressSpace, DmaBuf, HugePages, IovaAllocator, IovaRange, Mapping};
use crate::{Error, Result};

/// Unit of buffers, and their least alignment: the smallest page that devices know (NVMe base specification, CAP.MPSMIN).
const PAGE: u64 = 4096;

/// Memory mapped at a device that hands out [`DmaBuf`]s. A handle: clones are the same pool, on any thread.
///
/// Allocation takes a lock and a search: buffers are made ahead and used again, not made for each command. The memory is
/// unmapped when the last handle and the last buffer are gone.
#[derive(Debug, Clone)]
pub struct Pool {
    inner: Arc<Inner>,
}

/// What a pool holds, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// All of its memory.
    pub bytes: u64,
    /// Free, in pieces of any size.
    pub free: u64,
    /// The largest free piece: the longest buffer that can be had now.
    pub largest_free: u64,
    /// In buffers that were given up, since a device may still write them.
    pub quarantined: u64,
}

#[derive(Debug)]
pub(super) struct Inner {
    /// Of the mapping's space: looked at for every command, so it is near.
    space_id: u64,
    mapping: Arc<Mapping>,
    books: Mutex<Books>,
}

#[derive(Debug)]
struct Books {
    allocator: IovaAllocator,
    quarantined: u64,
}

impl Pool {
    /// Maps `bytes`, rounded up to the page size, of zeroed memory in `space`.
    ///
    /// # Errors
    /// As of [`AddressSpace::map`].
    pub async fn new(space: &AddressSpace, bytes: usize, huge: HugePages) -> Result<Self> {
        Ok(Self::of(space.map(bytes, huge).await?))
    }

    fn of(mapping: Arc<Mapping>) -> Self {
        let range = IovaRange { start: mapping.iova(), last: mapping.iova() + (mapping.len() as u64 - 1) };
        let books = Books { allocator: IovaAllocator::new(&[range], PAGE), quarantined: 0 };
        Self { inner: Arc::new(Inner { space_id: mapping.space_id(), mapping, books: Mutex::new(books) }) }
    }

    /// A buffer of `len` bytes that is contiguous for the device and starts on a page of 4 KiB. It holds whatever its memory
    /// was used for before; memory of a new pool is zero.
    ///
    /// # Errors
    /// [`Error::Exhausted`] when no piece of the pool is long enough, [`Error::Invalid`] for 0 or more than `u32::MAX` bytes.
    pub fn alloc(&self, len: usize) -> Result<DmaBuf> {
        self.alloc_aligned(len, PAGE)
    }

    /// [`Pool::alloc`] at a multiple of `align` (rounded up to a power of two and 4 KiB) of the device's addresses.
    ///
    /// # Errors
    /// As of [`Pool::alloc`].
    pub fn alloc_aligned(&self, len: usize, align: u64) -> Result<DmaBuf> {
        let whole = len.checked_next_multiple_of(PAGE as usize).and_then(|whole| u32::try_from(whole).ok());
        let Some(whole) = whole.filter(|&whole| whole != 0) else {
            return Err(Error::invalid(format!("a DMA buffer of {len} bytes: from 1 to {}", u32::MAX - (PAGE as u32 - 1))));
        };
        let mut books = self.inner.lock();
        let Some(iova) = books.allocator.alloc(whole.into(), align) else {
            return Err(Error::Exhausted {
                what: format!(
                    "no DMA buffer of {len} bytes aligned to {align}: the pool of {} bytes has {} free, {} at most in one piece; \
                     make the pool larger or drop buffers",
                    self.inner.mapping.len(),
                    books.allocator.free_bytes(),
                    books.allocator.largest_free()
                ),
            });
        };
        drop(books);
        let offset = (iova - self.inner.mapping.iova()) as usize;
        // SAFETY: the allocator hands out addresses of the mapping only, so the offset is inside of its memory.
        let ptr: NonNull<u8> = unsafe { self.inner.mapping.memory().as_ptr().add(offset) };
        // SAFETY: the piece is the buffer's alone until it is released, and the mapping lives as long as `inner`.
        Ok(unsafe { DmaBuf::new(ptr, iova, len as u32, whole, self.inner.clone()) })
    }

    /// [`AddressSpace::id`] of the space that the pool's memory is mapped in.
    pub fn space_id(&self) -> u64 {
        self.inner.space_id()
    }

    /// What the pool holds at present.
    pub fn stats(&self) -> PoolStats {
        let books = self.inner.lock();
        PoolStats {
            bytes: self.inner.mapping.len() as u64,
            free: books.allocator.free_bytes(),
            largest_free: books.allocator.largest_free(),
            quarantined: books.quarantined,
        }
    }

    /// The memory behind the buffers. Not for users: they could write behind a slice that a buffer lends.
    #[cfg(test)]
    pub(super) fn mapping(&self) -> &Arc<Mapping> {
        &self.inner.mapping
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Books> {
        // No code under the lock panics midway through a change.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    pub(super) fn space_id(&self) -> u64 {
        self.space_id
    }

    /// Takes a buffer's memory back.
    pub(super) fn release(&self, iova: u64, capacity: u32) {
        // A stand-in owns nothing.
        if capacity == 0 {
            return;
        }
        if let Err(error) = self.lock().allocator.free(iova, capacity.into()) {
            tracing::error!(iova, capacity, %error, "the books of a DMA pool are wrong");
        }
    }

    /// Counts a buffer whose memory is not taken back.
    pub(super) fn quarantine(&self, capacity: u32) {
        self.lock().quarantined += u64::from(capacity);
    }
}
