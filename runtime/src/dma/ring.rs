//! Memory that a device sees all the time: queues, lists of pages.

use std::{
    fmt,
    marker::PhantomData,
    ops::Range,
    ptr::NonNull,
    sync::atomic::{Ordering, fence},
};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{DmaBuf, OutOfBounds};
use crate::{Error, Result, mmio::access};

/// A [`DmaBuf`] that the device may read and write at any time. No reference to it is ever made: values are copied in and out.
///
/// It moves between threads but is not shared by them: two of them would race each other. Dropped, its memory is given up, as the
/// device may still use it; [`DmaShared::release`] or [`DmaShared::into_buf`] say that it does not.
pub struct DmaShared {
    buf: DmaBuf,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the pointer is into the buffer, which may be sent; not `Sync`, as it is not said to be.
unsafe impl Send for DmaShared {}

impl DmaShared {
    pub(super) fn new(buf: DmaBuf) -> Self {
        buf.set_shared(true);
        Self { base: buf.ptr(), len: buf.len(), buf }
    }

    /// Where the device sees the first byte.
    #[inline]
    pub fn iova(&self) -> u64 {
        self.buf.iova()
    }

    /// Bytes of the memory.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// [`AddressSpace::id`](super::AddressSpace::id) of the space that the memory is mapped in.
    #[inline]
    pub fn space_id(&self) -> u64 {
        self.buf.space_id()
    }

    #[inline(always)]
    fn at(&self, offset: usize, len: usize, align: usize) -> Result<*mut u8, OutOfBounds> {
        if offset <= self.len() && len <= self.len() - offset && offset & (align - 1) == 0 {
            // SAFETY: inside of the buffer.
            Ok(unsafe { self.base.as_ptr().add(offset) })
        } else {
            Err(self.outside(offset, len))
        }
    }

    #[cold]
    fn outside(&self, offset: usize, len: usize) -> OutOfBounds {
        OutOfBounds { offset: offset as u64, len, size: self.len() }
    }

    /// Copies a value out. One of whole, aligned `u64`s is loaded as such, each untorn.
    #[inline]
    pub fn read_obj<T: FromBytes>(&self, offset: usize) -> Result<T, OutOfBounds> {
        let from = self.at(offset, size_of::<T>(), 1)?;
        // SAFETY: valid for the size of `T`.
        Ok(unsafe { access::load_obj(from) })
    }

    /// Copies a value in. One of whole, aligned `u64`s is stored as such, each untorn.
    #[inline]
    pub fn write_obj<T: IntoBytes + Immutable>(&self, offset: usize, value: &T) -> Result<(), OutOfBounds> {
        let to = self.at(offset, size_of::<T>(), 1)?;
        // SAFETY: valid for the size of `T`.
        unsafe { access::store_obj(to, value) };
        Ok(())
    }

    /// Copies bytes out.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), OutOfBounds> {
        let from = self.at(offset, to.len(), 1)?;
        // SAFETY: valid for the length; a slice of ours does not overlap device memory, of which none is ever lent.
        let _ = unsafe { access::copy(from, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    /// Copies bytes in.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), OutOfBounds> {
        let to = self.at(offset, from.len(), 1)?;
        // SAFETY: as in `read`.
        let _ = unsafe { access::copy(from.as_ptr(), to, from.len()) };
        Ok(())
    }

    /// Loads an aligned little-endian `u32`, with acquire order: what the device stored before it is seen after it.
    #[inline]
    pub fn load_u32(&self, offset: usize) -> Result<u32, OutOfBounds> {
        let at = self.at(offset, 4, 4)?;
        // SAFETY: inside of the buffer and aligned, as the buffer starts on a page.
        let value = unsafe { access::load::<u32>(at.cast()) };
        fence(Ordering::Acquire);
        Ok(value)
    }

    /// Stores an aligned little-endian `u32`, with release order: what was stored before it is seen by who loads it.
    #[inline]
    pub fn store_u32(&self, offset: usize, value: u32) -> Result<(), OutOfBounds> {
        let at = self.at(offset, 4, 4)?;
        fence(Ordering::Release);
        // SAFETY: as in `load_u32`.
        unsafe { access::store::<u32>(at.cast(), value) };
        Ok(())
    }

    /// Fills all of it with `byte`.
    pub fn fill(&self, byte: u8) {
        // SAFETY: all of the buffer.
        let _ = unsafe { access::fill(self.base.as_ptr(), self.len(), byte) };
    }

    /// The device is proven not to use the memory any more: dropped, it returns to its pool.
    pub fn release(&self) {
        self.buf.set_shared(false);
    }

    /// The buffer, for slices of it again: when the device is proven not to use it any more.
    pub fn into_buf(self) -> DmaBuf {
        self.release();
        self.buf
    }
}

impl fmt::Debug for DmaShared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DmaShared").field(&self.buf).finish()
    }
}

/// [`DmaShared`] memory as an array of entries, each a whole number of `u64`s long (else it does not compile).
///
/// An access costs one compare and one load or store for each 8 bytes.
///
/// ```
/// # futures::executor::block_on(async {
/// # use vfio_uring::dma::*;
/// # let space = AddressSpace::new(Backend::Null, &[IovaRange { start: 0, last: u64::MAX }], 4096, 64);
/// # let pool = Pool::new(&space, 65536, HugePages::No).await?;
/// let list = DmaRing::<u64>::new(pool.alloc(4096)?.into_shared())?;
/// list.set(511, &0x1000)?;
/// assert_eq!((list.len(), list.get(511)), (512, Ok(0x1000)));
/// assert!(list.get(512).is_err());
/// # Ok::<_, vfio_uring::Error>(()) }).unwrap();
/// ```
pub struct DmaRing<T> {
    shared: DmaShared,
    len: usize,
    entries: PhantomData<T>,
}

impl<T> DmaRing<T> {
    const ENTRY: () = assert!(size_of::<T>() > 0 && size_of::<T>().is_multiple_of(8), "an entry is whole u64s");

    /// As many entries as fit.
    ///
    /// # Errors
    /// [`Error::Invalid`] when not even one does.
    pub fn new(shared: DmaShared) -> Result<Self> {
        let () = Self::ENTRY;
        match shared.len() / size_of::<T>() {
            0 => Err(Error::invalid(format!("{} bytes are no ring of entries of {} bytes", shared.len(), size_of::<T>()))),
            len => Ok(Self { shared, len, entries: PhantomData }),
        }
    }

    /// Entries of the ring.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "a ring has at least one entry")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where the device sees the first entry.
    #[inline]
    pub fn iova(&self) -> u64 {
        self.shared.iova()
    }

    /// The memory.
    pub fn shared(&self) -> &DmaShared {
        &self.shared
    }

    /// The memory, without its form.
    pub fn into_shared(self) -> DmaShared {
        self.shared
    }

    #[inline(always)]
    fn at(&self, index: usize) -> Result<*mut u8, OutOfBounds> {
        if index < self.len {
            // SAFETY: `len` entries are inside of the buffer.
            let at = unsafe { self.shared.base.as_ptr().add(index * size_of::<T>()) };
            // SAFETY: buffers start on a page, and entries are whole u64s. It saves a test for each access.
            unsafe { std::hint::assert_unchecked((at as usize).is_multiple_of(8)) };
            Ok(at)
        } else {
            Err(self.shared.outside(index.saturating_mul(size_of::<T>()), size_of::<T>()))
        }
    }

    /// Copies an entry out.
    ///
    /// # Errors
    /// [`OutOfBounds`] beyond the last.
    #[inline]
    pub fn get(&self, index: usize) -> Result<T, OutOfBounds>
    where
        T: FromBytes,
    {
        let from = self.at(index)?;
        // SAFETY: valid for the size of `T`.
        Ok(unsafe { access::load_obj(from) })
    }

    /// Copies an entry in.
    ///
    /// # Errors
    /// [`OutOfBounds`] beyond the last.
    #[inline]
    pub fn set(&self, index: usize, value: &T) -> Result<(), OutOfBounds>
    where
        T: IntoBytes + Immutable,
    {
        let to = self.at(index)?;
        // SAFETY: valid for the size of `T`.
        unsafe { access::store_obj(to, value) };
        Ok(())
    }

    /// Stores some of an entry's `u64`s, each given with its number in the entry, and leaves the others.
    ///
    /// # Errors
    /// [`OutOfBounds`] beyond the last entry, or the entry.
    #[inline(always)]
    pub fn set_words<const N: usize>(&self, index: usize, words: [(usize, u64); N]) -> Result<(), OutOfBounds> {
        let to = self.at(index)?.cast::<u64>();
        for (number, word) in words {
            if number >= size_of::<T>() / 8 {
                return Err(self.shared.outside(number.saturating_mul(8), 8));
            }
            // SAFETY: within the entry, whose start is a multiple of 8.
            unsafe { access::store_nth(to, number, word) };
        }
        Ok(())
    }

    /// Loads the little-endian `u32` at `offset` of an entry, with acquire order: what the device stored before it, as the rest of
    /// the entry, is seen after it.
    ///
    /// # Errors
    /// [`OutOfBounds`] beyond the last entry, or the entry, or at no multiple of 4.
    #[inline]
    pub fn load_u32(&self, index: usize, offset: usize) -> Result<u32, OutOfBounds> {
        if offset > size_of::<T>() - 4 || !offset.is_multiple_of(4) {
            return Err(self.shared.outside(offset, 4));
        }
        let entry = self.at(index)?;
        // SAFETY: within the entry, whose start is a multiple of 8.
        let value = unsafe { access::load_nth::<u32>(entry.cast(), offset / 4) };
        fence(Ordering::Acquire);
        Ok(value)
    }

    /// Loads the little-endian `u64` at `offset` of an entry, with acquire order, untorn.
    ///
    /// # Errors
    /// [`OutOfBounds`] beyond the last entry, or the entry, or at no multiple of 8.
    #[inline]
    pub fn load_u64(&self, index: usize, offset: usize) -> Result<u64, OutOfBounds> {
        if offset > size_of::<T>() - 8 || !offset.is_multiple_of(8) {
            return Err(self.shared.outside(offset, 8));
        }
        let entry = self.at(index)?;
        // SAFETY: within the entry, whose start is a multiple of 8.
        let value = unsafe { access::load_nth::<u64>(entry.cast(), offset / 8) };
        fence(Ordering::Acquire);
        Ok(value)
    }

    /// An entry, for several accesses at the price of one check.
    ///
    /// # Errors
    /// [`OutOfBounds`] beyond the last.
    #[inline(always)]
    pub fn entry(&self, index: usize) -> Result<DmaEntry<'_, T>, OutOfBounds> {
        Ok(DmaEntry { at: self.at(index)?.cast(), ring: PhantomData })
    }

    /// The entries of a range, in order, at the price of one check for all.
    ///
    /// # Errors
    /// [`OutOfBounds`] for a range that is not inside of the ring.
    #[inline(always)]
    pub fn entries(&self, range: Range<usize>) -> Result<DmaEntries<'_, T>, OutOfBounds> {
        let Range { start, end } = range;
        if start > end || end > self.len {
            return Err(self.shared.outside(start.saturating_mul(size_of::<T>()), size_of::<T>()));
        }
        // SAFETY: `len` entries are inside of the buffer, and `start` is at most `len`.
        let first = unsafe { self.shared.base.as_ptr().add(start * size_of::<T>()) }.cast();
        Ok(DmaEntries { first, next: 0, len: end - start, ring: PhantomData })
    }

    /// Fills all entries with zeros.
    pub fn clear(&self) {
        self.shared.fill(0);
    }
}

/// An entry of a [`DmaRing`]. Words are `u64`s; a number beyond the entry does not compile.
///
/// ```
/// # futures::executor::block_on(async {
/// # use vfio_uring::dma::*;
/// # let space = AddressSpace::new(Backend::Null, &[IovaRange { start: 0, last: u64::MAX }], 4096, 64);
/// # let pool = Pool::new(&space, 65536, HugePages::No).await?;
/// let ring = DmaRing::<[u64; 2]>::new(pool.alloc(4096)?.into_shared())?;
/// let entry = ring.entry(255)?;
/// entry.store::<1>(7);
/// assert_eq!((entry.load::<1>(), ring.get(255)?[1].to_le()), (7, 7));
/// # Ok::<_, vfio_uring::Error>(()) }).unwrap();
/// ```
pub struct DmaEntry<'a, T> {
    at: *mut u64,
    ring: PhantomData<&'a DmaRing<T>>,
}

impl<T> DmaEntry<'_, T> {
    /// Loads a little-endian word, with acquire order.
    #[inline(always)]
    pub fn load<const WORD: usize>(&self) -> u64 {
        const { assert!(WORD < size_of::<T>() / 8, "a word of the entry") };
        // SAFETY: within the entry, which lives as long as the ring that is borrowed, and starts at a multiple of 8.
        let value = unsafe { access::load_nth::<u64>(self.at, WORD) };
        fence(Ordering::Acquire);
        value
    }

    /// Stores a little-endian word.
    #[inline(always)]
    pub fn store<const WORD: usize>(&self, value: u64) {
        const { assert!(WORD < size_of::<T>() / 8, "a word of the entry") };
        // SAFETY: as in `load`.
        unsafe { access::store_nth(self.at, WORD, value.to_le()) };
    }
}

/// Consecutive entries of a [`DmaRing`]: [`DmaRing::entries`].
///
/// ```
/// # futures::executor::block_on(async {
/// # use vfio_uring::dma::*;
/// # let space = AddressSpace::new(Backend::Null, &[IovaRange { start: 0, last: u64::MAX }], 4096, 64);
/// # let pool = Pool::new(&space, 65536, HugePages::No).await?;
/// let ring = DmaRing::<[u64; 2]>::new(pool.alloc(4096)?.into_shared())?;
/// for (entry, value) in ring.entries(250..256)?.zip(1..) {
///     entry.store::<0>(value);
/// }
/// assert_eq!((ring.get(250)?[0].to_le(), ring.get(255)?[0].to_le()), (1, 6));
/// assert!(ring.entries(250..257).is_err());
/// # Ok::<_, vfio_uring::Error>(()) }).unwrap();
/// ```
pub struct DmaEntries<'a, T> {
    first: *mut u64,
    // Numbers and no end, as the compiler sees that they are those of a slice of the same length next to it.
    next: usize,
    len: usize,
    ring: PhantomData<&'a DmaRing<T>>,
}

impl<'a, T> Iterator for DmaEntries<'a, T> {
    type Item = DmaEntry<'a, T>;

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.len {
            return None;
        }
        // SAFETY: there are `len` entries from the first on.
        let at = unsafe { self.first.byte_add(self.next * size_of::<T>()) };
        self.next += 1;
        Some(DmaEntry { at, ring: PhantomData })
    }

    #[inline]
    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.len - self.next, Some(self.len - self.next))
    }
}

impl<T> ExactSizeIterator for DmaEntries<'_, T> {}

impl<T> fmt::Debug for DmaEntries<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaEntries").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for DmaEntry<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaEntry").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for DmaRing<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaRing").field("iova", &self.iova()).field("len", &self.len).finish()
    }
}
