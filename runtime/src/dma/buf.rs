//! Buffers: memory of a pool with one owner.

use std::{
    cell::Cell,
    fmt,
    ops::{Deref, DerefMut},
    ptr::NonNull,
    slice,
    sync::Arc,
};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{DmaShared, pool};
use crate::{Error, Result};

/// A buffer that a device can read and write: contiguous in its address space, and owned. A command takes it by value and
/// gives it back when the device is done with it, so that a slice of it is lent only while no command has it.
///
/// Dropped, its memory returns to its [`Pool`](super::Pool), from any thread.
///
/// ```
/// # futures::executor::block_on(async {
/// # use vfio_uring::dma::*;
/// # let space = AddressSpace::new(Backend::Null, &[IovaRange { start: 0, last: u64::MAX }], 4096, 64);
/// # let pool = Pool::new(&space, 65536, HugePages::No).await?;
/// use zerocopy::{FromBytes, Immutable, IntoBytes, little_endian::U32};
///
/// #[derive(FromBytes, IntoBytes, Immutable)]
/// #[repr(C)]
/// struct Entry {
///     key: U32,
///     value: U32,
/// }
///
/// let mut buf = pool.alloc(64)?;
/// buf.as_typed_mut::<Entry>()?[7].value = U32::new(5);
/// assert_eq!(buf[60..], [5, 0, 0, 0]);
/// # Ok::<_, vfio_uring::Error>(()) }).unwrap();
/// ```
pub struct DmaBuf(Box<Inner>);

struct Inner {
    ptr: NonNull<u8>,
    iova: u64,
    len: u32,
    /// 0 for a stand-in, which owns no memory.
    capacity: u32,
    /// Of the pool's space: looked at for every command, so it is near.
    space_id: u64,
    pool: Arc<pool::Inner>,
    /// Whether a device sees it all the time, so that it is given up when dropped. Touched through the one `DmaShared` only.
    shared: Cell<bool>,
}

// A buffer travels through a command by value: it has to stay cheap to move.
const _: () = assert!(size_of::<DmaBuf>() == 8 && size_of::<Option<DmaBuf>>() == 8);

// SAFETY: the memory is the buffer's alone and reachable from every thread; the pool is Send and Sync.
unsafe impl Send for DmaBuf {}
// SAFETY: a shared reference gives shared slices only; the cell is not reachable through one.
unsafe impl Sync for DmaBuf {}

impl DmaBuf {
    /// # Safety
    /// `capacity` bytes at `ptr` are in `pool`'s mapping, at `iova`, page-aligned, initialised, and nobody else's until they are
    /// released to `pool`. `len` is at most `capacity`.
    pub(super) unsafe fn new(ptr: NonNull<u8>, iova: u64, len: u32, capacity: u32, pool: Arc<pool::Inner>) -> Self {
        Self(Box::new(Inner { ptr, iova, len, capacity, space_id: pool.space_id(), pool, shared: Cell::new(false) }))
    }

    /// Where the device sees the buffer's first byte.
    #[inline]
    pub fn iova(&self) -> u64 {
        self.0.iova
    }

    /// Bytes of the buffer.
    #[inline]
    pub fn len(&self) -> usize {
        self.0.len as usize
    }

    /// Whether the length was set to 0.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// Bytes that the length can be set to: the whole pages of the buffer.
    #[inline]
    pub fn capacity(&self) -> usize {
        self.0.capacity as usize
    }

    /// Sets the length. The memory stays as it is, and the buffer's in whole.
    ///
    /// # Errors
    /// [`Error::Invalid`] above the capacity.
    pub fn set_len(&mut self, len: usize) -> Result<()> {
        if len > self.capacity() {
            return Err(Error::invalid(format!("a length of {len} bytes for a DMA buffer of {}", self.0.capacity)));
        }
        self.0.len = len as u32;
        Ok(())
    }

    /// Sets the length, and what it gains to `value`: nothing that the memory was used for before is seen.
    ///
    /// # Errors
    /// As of [`DmaBuf::set_len`].
    pub fn resize(&mut self, len: usize, value: u8) -> Result<()> {
        let before = self.len().min(len);
        self.set_len(len)?;
        self[before..].fill(value);
        Ok(())
    }

    /// [`AddressSpace::id`](super::AddressSpace::id) of the space that the buffer is mapped in.
    #[inline]
    pub fn space_id(&self) -> u64 {
        self.0.space_id
    }

    /// The buffer as an array.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the length is not a multiple of the element's.
    pub fn as_typed<T: FromBytes + Immutable>(&self) -> Result<&[T]> {
        <[T]>::ref_from_bytes(self).map_err(|_| self.not_an_array::<T>())
    }

    /// [`DmaBuf::as_typed`], to write.
    ///
    /// # Errors
    /// As of [`DmaBuf::as_typed`].
    pub fn as_typed_mut<T: FromBytes + IntoBytes + Immutable>(&mut self) -> Result<&mut [T]> {
        let error = self.not_an_array::<T>();
        <[T]>::mut_from_bytes(self).map_err(|_| error)
    }

    fn not_an_array<T>(&self) -> Error {
        let (size, align) = (size_of::<T>(), align_of::<T>());
        Error::invalid(format!("{} bytes are no array of elements of {size} bytes, aligned to {align}", self.0.len))
    }

    /// Gives the memory up: a device may still write it, so the pool counts it and never hands it out again. Nothing of it is
    /// kept besides, so that the pool's mapping still ends, and with its unmap the device's access.
    pub fn quarantine(self) {
        let mut this = self;
        // Without a capacity there is nothing to return to the pool.
        let capacity = std::mem::take(&mut this.0.capacity);
        this.0.pool.quarantine(capacity);
    }

    /// An empty buffer of the same pool, of length and capacity 0: what a driver gives back to its caller in the place of a buffer
    /// that a device may still write.
    pub fn stand_in(&self) -> Self {
        let Inner { ptr, iova, space_id, ref pool, .. } = *self.0;
        Self(Box::new(Inner { ptr, iova, len: 0, capacity: 0, space_id, pool: pool.clone(), shared: Cell::new(false) }))
    }

    /// Makes it memory that the device sees all the time, as queues: no slices, volatile and atomic accesses only. All of its
    /// length counts, and its contents stay. Dropped, it is given up unless [`DmaShared::release`] was called.
    pub fn into_shared(self) -> DmaShared {
        DmaShared::new(self)
    }

    pub(super) fn set_shared(&self, shared: bool) {
        self.0.shared.set(shared);
    }

    #[inline]
    pub(super) fn ptr(&self) -> NonNull<u8> {
        self.0.ptr
    }
}

impl Deref for DmaBuf {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes of live, initialised memory that is the buffer's alone.
        unsafe { slice::from_raw_parts(self.0.ptr.as_ptr(), self.len()) }
    }
}

impl DerefMut for DmaBuf {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and borrowed for writing.
        unsafe { slice::from_raw_parts_mut(self.0.ptr.as_ptr(), self.len()) }
    }
}

impl AsRef<[u8]> for DmaBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for DmaBuf {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl fmt::Debug for DmaBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let iova = format_args!("{:#x}", self.0.iova);
        f.debug_struct("DmaBuf").field("iova", &iova).field("len", &self.0.len).field("capacity", &self.0.capacity).finish()
    }
}

impl Drop for DmaBuf {
    fn drop(&mut self) {
        match self.0.shared.get() {
            true => self.0.pool.quarantine(self.0.capacity),
            false => self.0.pool.release(self.0.iova, self.0.capacity),
        }
    }
}
