//! Memory of the caller's that is mapped at a device: a `Vec` of pages, an mmap, or another device's BAR.
//!
//! It is kept until the unmap is confirmed. The kernel pins the pages of a mapping: memory that was freed while a device can
//! still write to it would be handed out again with the same pages. So where the kernel does not confirm an unmap, the memory
//! is never freed, and counted ([`SpaceStats::forgotten`](super::SpaceStats::forgotten)).

use std::{
    fmt,
    mem::ManuallyDrop,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{
    AddressSpace, HugePages, MapRefused, Mapping, SharedMemory,
    mapping::{Backing, Region},
};
use crate::{Error, Result};

/// A page of the caller's memory, to be mapped by [`AddressSpace::map_pages`]. It is aligned as a device needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C, align(4096))]
pub struct Page(pub [u8; 4096]);
const _: () = assert!(size_of::<Page>() == 4096 && align_of::<Page>() == 4096);

impl Page {
    /// A page of zeros.
    pub const ZERO: Self = Self([0; 4096]);
}

impl Default for Page {
    fn default() -> Self {
        Self::ZERO
    }
}

/// What was never freed: mappings, and their bytes.
#[derive(Debug, Default)]
pub(super) struct Forgotten {
    pub(super) mappings: AtomicUsize,
    pub(super) bytes: AtomicU64,
}

/// Whoever keeps memory of the caller.
trait Owner: Send + Sync {}
impl<T: Send + Sync> Owner for T {}

/// Keeps memory of the caller: dropped while the kernel may have its pages, it forgets the owner instead.
pub(super) struct Keeper {
    // The only thing to be done with it is to drop it, whatever it is.
    owner: ManuallyDrop<Box<dyn Owner>>,
    bytes: u64,
    pinned: AtomicBool,
    forgotten: Arc<Forgotten>,
}

impl Keeper {
    fn new(owner: impl Send + Sync + 'static, bytes: u64, forgotten: Arc<Forgotten>) -> Self {
        Self { owner: ManuallyDrop::new(Box::new(owner)), bytes, pinned: AtomicBool::new(false), forgotten }
    }

    pub(super) fn set_pinned(&self, pinned: bool) {
        self.pinned.store(pinned, Ordering::Release);
    }
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").field("bytes", &self.bytes).field("pinned", &self.pinned).finish_non_exhaustive()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if self.pinned.load(Ordering::Acquire) {
            tracing::warn!(bytes = self.bytes, "the caller's memory is never freed: the kernel has not confirmed its unmap");
            self.forgotten.mappings.fetch_add(1, Ordering::Relaxed);
            self.forgotten.bytes.fetch_add(self.bytes, Ordering::Relaxed);
            return;
        }
        // SAFETY: once, here; nobody uses it after that.
        unsafe { ManuallyDrop::drop(&mut self.owner) };
    }
}

impl AddressSpace {
    /// Maps the caller's `pages` for the device to read and write: their bytes are [`Mapping::memory`]. They are freed when the
    /// unmap is confirmed.
    ///
    /// A vfio-user server gets no descriptor of such memory: it reads and writes it by messages, if it can.
    ///
    /// ```
    /// # futures::executor::block_on(async {
    /// use vfio_uring::dma::{AddressSpace, Backend, IovaRange, Page};
    ///
    /// let space = AddressSpace::new(Backend::Null, &[IovaRange { start: 0, last: u64::MAX }], 4096, 64);
    /// let mapping = space.map_pages(vec![Page([7; 4096]); 3]).await?;
    /// let mut seen = [0; 4];
    /// space.read(mapping.iova() + 4094, &mut seen)?;
    /// assert_eq!(seen, [7; 4]);
    /// # Ok::<_, vfio_uring::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// [`Error::Map`] with [`MapRefused::Misaligned`] for no pages, or where the granule is larger than a page; else as of
    /// [`AddressSpace::map`].
    pub async fn map_pages(&self, mut pages: Vec<Page>) -> Result<Arc<Mapping>> {
        let address = NonNull::from(pages.as_mut_slice()).cast::<u8>();
        let len = pages.len() * size_of::<Page>();
        // SAFETY: the vector owns this memory, wherever it is moved to, and nobody reads or writes it by the vector again.
        unsafe { self.map_foreign(address, len, pages) }.await
    }

    /// Maps memory of the caller for the device to read and write: an mmap, or a BAR of another device. `owner` is dropped when
    /// the unmap is confirmed, on any thread, and the memory may go then.
    ///
    /// Of a device's BAR, type 1 takes the mapping; iommufd does not, and says [`MapRefused::BadAddress`].
    ///
    /// # Safety
    /// The `len` bytes at `address` are valid for reads and writes by any thread until `owner` is dropped, and no reference to
    /// them is used until then: the device, and other threads of this process on its behalf, write to them at any time.
    ///
    /// # Errors
    /// [`Error::Map`] with [`MapRefused::Misaligned`] when address or length are not multiples of the granule, or the length is 0;
    /// else as of [`AddressSpace::map`]. `owner` is dropped then, unless it is not known whether the device has the memory.
    pub async unsafe fn map_foreign(
        &self,
        address: NonNull<u8>,
        len: usize,
        owner: impl Send + Sync + 'static,
    ) -> Result<Arc<Mapping>> {
        let keeper = Keeper::new(owner, len as u64, self.forgotten().clone());
        let granule = self.granule();
        let at = address.addr().get() as u64;
        if len == 0 || !at.is_multiple_of(granule) || !(len as u64).is_multiple_of(granule) {
            return Err(Error::Map { iova: 0, len: len as u64, reason: MapRefused::Misaligned { granule } });
        }
        // SAFETY: the caller's promise, and the region that they go to has the keeper, which is dropped after the memory.
        let memory = unsafe { SharedMemory::borrowed(address, len) }?;
        self.map_somewhere(len, HugePages::No, move |iova, _| Ok(Region::new(memory, Backing::Foreign(keeper), iova))).await
    }
}
