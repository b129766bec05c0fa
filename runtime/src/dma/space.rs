//! A device's view of memory: which of our memory is mapped at which I/O virtual address.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fmt,
    future::{Future, poll_fn},
    ops::Range,
    rc::{Rc, Weak as RcWeak},
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use futures::lock::{Mutex, MutexGuard};

use super::{
    Backend, HugePages, IovaAllocator, IovaRange, MapRefused, Mapping, SharedMemory,
    attempt::{Attempt, Outcome, Unmap},
    conflict::intersection,
    foreign::Forgotten,
    mapping::{Backing, Region, Retired},
    stats::{MappingInfo, SpaceStats},
};
use crate::{Error, Result};

/// The mappings of a device, and the addresses that they may use. A handle: clones are the same space.
///
/// See the [module](crate::dma) for an example.
#[derive(Clone)]
pub struct AddressSpace {
    inner: Rc<Inner>,
}

/// A handle that does not keep the space: for what the space itself keeps, as its connection.
#[derive(Debug, Clone)]
pub struct WeakAddressSpace {
    inner: RcWeak<Inner>,
}

pub(super) struct Inner {
    id: u64,
    granule: Cell<u64>,
    max_mappings: Cell<usize>,
    pub(super) backend: Backend,
    /// The addresses that the caller allows, whatever the devices do.
    wanted: Vec<IovaRange>,
    /// Those of them that the devices allow, too.
    allowed: RefCell<Vec<IovaRange>>,
    iova: RefCell<IovaAllocator>,
    /// What the device has or may have mapped, by address.
    mapped: RefCell<BTreeMap<u64, Weak<Region>>>,
    pub(super) leaked: RefCell<Vec<Arc<Region>>>,
    quarantined: Cell<(usize, u64)>,
    forgotten: Arc<Forgotten>,
    retired: Arc<Retired>,
    /// Held while a device joins.
    attaching: Mutex<()>,
    /// Held while unmaps are under way: who is short of addresses waits for those of another task.
    pub(super) reclaiming: Mutex<()>,
    /// Devices of the kernel in it.
    pub(super) devices: Cell<usize>,
    /// The last of them was taken away.
    pub(super) vacated: Cell<bool>,
    /// The kernel has dropped all mappings.
    pub(super) emptied: Cell<bool>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddressSpace").field("id", &self.id).finish_non_exhaustive()
    }
}

impl fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.backend.is_kernel() {
            // Memory of the caller is freed only against proof, and there is nobody to wait for it.
            while let Some(region) = self.retired.pop() {
                if region.fd().is_none() && self.has(&region) {
                    self.backend.unmap_detached(region);
                }
            }
        }
        self.retired.close();
    }
}

impl AddressSpace {
    /// A space of the addresses in `ranges`, in multiples of `granule` bytes, with at most `max_mappings` mappings at a time.
    pub fn new(backend: Backend, ranges: &[IovaRange], granule: u64, max_mappings: usize) -> Self {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let iova = IovaAllocator::new(ranges, granule);
        let inner = Inner {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            granule: Cell::new(iova.granule()),
            max_mappings: Cell::new(max_mappings),
            backend,
            wanted: ranges.to_vec(),
            allowed: RefCell::new(ranges.to_vec()),
            iova: RefCell::new(iova),
            mapped: RefCell::default(),
            leaked: RefCell::default(),
            quarantined: Cell::default(),
            forgotten: Arc::default(),
            retired: Arc::default(),
            attaching: Mutex::default(),
            reclaiming: Mutex::default(),
            devices: Cell::new(0),
            vacated: Cell::new(false),
            emptied: Cell::new(false),
        };
        Self { inner: Rc::new(inner) }
    }

    /// A number that no other space of this process has: a buffer of another space is told by it.
    pub fn id(&self) -> u64 {
        self.inner.id
    }

    /// Unit of mappings, in bytes.
    pub fn granule(&self) -> u64 {
        self.inner.granule.get()
    }

    pub(super) fn inner(&self) -> &Inner {
        &self.inner
    }

    pub(super) fn forgotten(&self) -> &Arc<Forgotten> {
        &self.inner.forgotten
    }

    /// A handle that does not keep the space.
    pub fn downgrade(&self) -> WeakAddressSpace {
        WeakAddressSpace { inner: Rc::downgrade(&self.inner) }
    }

    /// Makes zeroed memory of `len` bytes, rounded up to the page size and the granule, and maps it for the device to read and
    /// write. It returns when the device has confirmed.
    ///
    /// A dropped future, or an answer that never comes, leaves open whether the device has the memory; its addresses are not
    /// used again then.
    ///
    /// # Errors
    /// [`Error::Exhausted`] when the device takes no more mappings, or the addresses or hugepages run out; the backend's error
    /// when the device refuses.
    pub async fn map(&self, len: usize, huge: HugePages) -> Result<Arc<Mapping>> {
        self.map_somewhere(len, huge, |iova, bytes| ours(iova, bytes, huge)).await
    }

    /// Maps the region that `make` makes, given its place and its length.
    pub(super) async fn map_somewhere(
        &self,
        len: usize,
        huge: HugePages,
        make: impl FnOnce(u64, usize) -> Result<Region>,
    ) -> Result<Arc<Mapping>> {
        let inner = &*self.inner;
        let reserve = || {
            let (bytes, unit) = inner.size(len, huge)?;
            Ok::<_, Error>((inner.reserve(bytes, unit)?, bytes))
        };
        let mut entered = inner.backend.enter().await;
        let reserved = match reserve() {
            Err(Error::Exhausted { .. }) => {
                drop(entered.take());
                inner.reclaim().await;
                entered = inner.backend.enter().await;
                reserve()
            }
            reserved => reserved,
        };
        let (iova, bytes) = reserved?;
        let mapping = self.map_reserved(iova, bytes, make).await;
        drop(entered);
        mapping
    }

    /// [`AddressSpace::map`] at addresses of the caller's choice.
    ///
    /// # Errors
    /// [`Error::Map`] with the reason, where something is mapped there, or the devices can't use all of the addresses; else as for
    /// [`AddressSpace::map`].
    pub async fn map_at(&self, iova: u64, len: usize, huge: HugePages) -> Result<Arc<Mapping>> {
        // Addresses whose unmap is not confirmed yet are in use.
        self.inner.reclaim().await;
        let _entered = self.inner.backend.enter().await;
        let (bytes, _) = self.inner.size(len, huge)?;
        self.inner.reserve_at(iova, bytes)?;
        self.map_reserved(iova, bytes, |iova, bytes| ours(iova, bytes, huge)).await
    }

    async fn map_reserved(
        &self,
        iova: u64,
        bytes: u64,
        make: impl FnOnce(u64, usize) -> Result<Region>,
    ) -> Result<Arc<Mapping>> {
        let inner = &*self.inner;
        let mut attempt = Attempt { inner, iova, bytes, outcome: Outcome::Absent };
        let region = Arc::new(make(iova, bytes as usize)?);
        // The device may use the memory before its reply arrives here.
        inner.mapped.borrow_mut().insert(iova, Arc::downgrade(&region));
        attempt.outcome = Outcome::Unknown;
        region.set_pinned(inner.backend.is_kernel());
        let result = inner.backend.map(&region).await;
        attempt.outcome = match &result {
            Ok(()) => {
                region.set_mapped(true);
                Outcome::Mapped
            }
            Err(failed) if failed.absent => {
                region.set_pinned(false);
                Outcome::Absent
            }
            Err(_) => Outcome::Unknown,
        };
        drop(attempt);
        let mapping = result.map(|()| Arc::new(Mapping::new(region, inner.retired.clone(), inner.id)));
        // Its last device may have been taken away meanwhile; a mapping that was made is retired then.
        inner.check_alive()?;
        mapping.map_err(|failed| failed.error)
    }

    /// The I/O virtual addresses that mappings may have at present: those that were asked for, as far as all devices of the space
    /// can use them.
    pub fn allowed(&self) -> Vec<IovaRange> {
        self.inner.allowed.borrow().clone()
    }

    /// Waits for its turn to add a device.
    pub(crate) async fn attaching(&self) -> MutexGuard<'_, ()> {
        self.inner.attaching.lock().await
    }

    /// Whose mappings these are.
    pub(crate) fn backend(&self) -> &Backend {
        &self.inner.backend
    }

    /// Addresses that mappings have, or may have.
    pub(crate) fn taken(&self) -> Vec<IovaRange> {
        self.inner.iova.borrow().taken().collect()
    }

    /// Takes over what the devices of the space can use from now on, if all that is mapped lies in it.
    ///
    /// # Errors
    /// The mapping that does not, and the hole that it lies in: the space goes on as it was then.
    pub(crate) fn install(&self, usable: &[IovaRange]) -> Result<(), (IovaRange, IovaRange)> {
        self.inner.install(usable)
    }

    /// Unmaps the retired mappings at the device, and frees their memory and addresses as each is confirmed. How many were.
    ///
    /// One that the device does not unmap is leaked and counted. A dropped future loses nothing. Where another task reclaims, it
    /// waits for that one first.
    pub async fn reclaim(&self) -> usize {
        self.inner.reclaim().await
    }

    /// A future that reclaims retired mappings whenever there are some: for a task of its own, one for each space. It does not
    /// keep the space, and ends when the last handle to it is dropped, or when the connection is found to be gone.
    ///
    /// ```
    /// # use futures::executor::block_on;
    /// # use vfio_uring::dma::{AddressSpace, Backend, HugePages, IovaRange};
    /// let space = AddressSpace::new(Backend::Null, &[IovaRange { start: 0, last: u64::MAX }], 4096, 64);
    /// let reclaimer = space.reclaimer();
    /// drop(block_on(space.map(4096, HugePages::No)).unwrap());
    /// assert_eq!(space.stats().retired, 1);
    /// drop(space);
    /// block_on(reclaimer);
    /// ```
    pub fn reclaimer(&self) -> impl Future<Output = ()> + use<> {
        let (space, retired) = (self.downgrade(), self.inner.retired.clone());
        async move {
            while poll_fn(|cx| retired.poll_ready(cx)).await {
                let Some(space) = space.upgrade() else { break };
                space.reclaim().await;
            }
        }
    }

    /// Says that a connection is gone. Where other devices share the space, they go on, free of what that one could not do. After
    /// the last one, retired mappings, now and later, are freed without an unmap, and the reclaimer ends. Their addresses are not
    /// used again.
    pub fn disconnected(&self) {
        match &self.inner.backend {
            Backend::User(peers) if !peers.is_gone() => self.relax(peers),
            _ => self.inner.retired.close(),
        }
    }

    /// Copies `to.len()` bytes at `iova` out of the mapped memory, as the device would: for a request of the peer. Mappings that
    /// touch are read as one.
    ///
    /// # Errors
    /// [`Error::Invalid`] when not all of it is mapped.
    pub fn read(&self, iova: u64, to: &mut [u8]) -> Result<()> {
        self.inner.walk(iova, to.len(), |view, offset, part| Ok(view.read(offset, &mut to[part])?))
    }

    /// Copies `from` to `iova` in the mapped memory, as the device would: for a request of the peer. Mappings that touch are
    /// written as one.
    ///
    /// # Errors
    /// [`Error::Invalid`] when not all of it is mapped; nothing is written then.
    pub fn write(&self, iova: u64, from: &[u8]) -> Result<()> {
        self.inner.walk(iova, from.len(), |_, _, _| Ok(()))?;
        self.inner.walk(iova, from.len(), |view, offset, part| Ok(view.write(offset, &from[part])?))
    }

    /// What the device has mapped at present, by address: for a device in the same process ([`Backend::Null`]).
    pub fn mappings(&self) -> Vec<MappingInfo> {
        let info =
            |region: Arc<Region>| MappingInfo { iova: region.iova, len: region.memory.len(), fd: region.fd().cloned() };
        self.inner.regions().into_iter().map(info).collect()
    }

    /// What the space holds at present.
    pub fn stats(&self) -> SpaceStats {
        let leaked = self.inner.leaked.borrow();
        let (quarantined, quarantined_bytes) = self.inner.quarantined.get();
        SpaceStats {
            mappings: self.inner.mapped.borrow().len(),
            retired: self.inner.retired.len(),
            leaked: leaked.len(),
            leaked_bytes: leaked.iter().map(|region| region.len()).sum(),
            quarantined,
            quarantined_bytes,
            forgotten: self.inner.forgotten.mappings.load(Ordering::Relaxed),
            forgotten_bytes: self.inner.forgotten.bytes.load(Ordering::Relaxed),
        }
    }
}

impl WeakAddressSpace {
    /// The space, unless its last handle was dropped.
    pub fn upgrade(&self) -> Option<AddressSpace> {
        self.inner.upgrade().map(|inner| AddressSpace { inner })
    }
}

/// Zeroed memory of ours.
fn ours(iova: u64, bytes: usize, huge: HugePages) -> Result<Region> {
    let (fd, memory) = SharedMemory::create("vfio-uring-dma", bytes, huge)?;
    Ok(Region::new(memory, Backing::Memfd(Arc::new(fd)), iova))
}

impl Inner {
    /// What is mapped, by address.
    pub(super) fn regions(&self) -> Vec<Arc<Region>> {
        self.mapped.borrow().values().filter_map(Weak::upgrade).collect()
    }

    pub(super) fn install(&self, usable: &[IovaRange]) -> Result<(), (IovaRange, IovaRange)> {
        let allowed = intersection(&self.wanted, usable);
        self.iova.borrow_mut().set_ranges(&allowed)?;
        self.allowed.replace(allowed);
        Ok(())
    }

    /// The unit of mappings from now on, and how many there may be.
    pub(super) fn set_limits(&self, granule: u64, max_mappings: usize) {
        self.granule.set(granule.max(self.iova.borrow().granule()));
        self.max_mappings.set(max_mappings);
    }

    /// Bytes of a mapping of `len` bytes, and what they are a multiple of.
    fn size(&self, len: usize, huge: HugePages) -> Result<(u64, u64)> {
        let unit = (huge.page_size() as u64).max(self.granule.get());
        let bytes = (len as u64).checked_next_multiple_of(unit).filter(|&bytes| (1..=isize::MAX as u64).contains(&bytes));
        let bytes = bytes.ok_or_else(|| Error::invalid(format!("{len} bytes can't be mapped: from 1 to {}", isize::MAX)))?;
        Ok((bytes, unit))
    }

    fn check_budget(&self, bytes: u64) -> Result<()> {
        self.check_alive()?;
        if self.mapped.borrow().len() < self.max_mappings.get() {
            return Ok(());
        }
        if self.max_mappings.get() == 0 {
            return Err(Error::Unsupported {
                what: "DMA memory without an IOMMU, which would have to be memory that can't move, by its physical address; boot with \
                       an IOMMU, and open the device without no_iommu"
                    .into(),
            });
        }
        Err(Error::Exhausted {
            what: format!(
                "no DMA mapping of {bytes} bytes: all {} that the device allows are in use; map fewer and larger pools",
                self.max_mappings.get()
            ),
        })
    }

    /// Takes a place among the mappings, and the addresses from `iova` on.
    fn reserve_at(&self, iova: u64, bytes: u64) -> Result<()> {
        self.check_budget(bytes)?;
        let granule = self.granule.get();
        let taken = match iova.is_multiple_of(granule) {
            true => self.iova.borrow_mut().alloc_at(iova, bytes, &self.allowed.borrow()),
            false => Err(MapRefused::Misaligned { granule }),
        };
        taken.map_err(|reason| Error::Map { iova, len: bytes, reason })?;
        self.mapped.borrow_mut().insert(iova, Weak::new());
        Ok(())
    }

    /// Takes a place among the mappings, and addresses.
    fn reserve(&self, bytes: u64, align: u64) -> Result<u64> {
        self.check_budget(bytes)?;
        let mut mapped = self.mapped.borrow_mut();
        let mut allocator = self.iova.borrow_mut();
        let iova = allocator.alloc(bytes, align).ok_or_else(|| Error::Exhausted {
            what: format!(
                "no I/O virtual addresses for {bytes} bytes aligned to {align}: {} are free, the largest piece is {}; map less at once",
                allocator.free_bytes(),
                allocator.largest_free()
            ),
        })?;
        mapped.insert(iova, Weak::new());
        Ok(iova)
    }

    /// Counts addresses that are never used again.
    pub(super) fn quarantine(&self, bytes: u64) {
        let (count, sum) = self.quarantined.get();
        self.quarantined.set((count + 1, sum + bytes));
    }

    /// Gives the place and the addresses back: the device does not have the mapping.
    pub(super) fn release(&self, iova: u64, bytes: u64) {
        self.mapped.borrow_mut().remove(&iova);
        if let Err(error) = self.iova.borrow_mut().free(iova, bytes) {
            tracing::error!(iova, bytes, %error, "the books of the address space are wrong");
        }
    }

    async fn reclaim(&self) -> usize {
        let _turn = self.reclaiming.lock().await;
        let mut confirmed = 0;
        // Those that come meanwhile are for the next time: it ends.
        for _ in 0..self.retired.len() {
            let _entered = self.backend.enter().await;
            confirmed += usize::from(self.reclaim_one().await);
        }
        if self.backend.is_gone() {
            self.retired.close();
        }
        confirmed
    }

    /// [`Inner::reclaim`] while the gate is closed.
    pub(super) async fn reclaim_closed(&self) {
        for _ in 0..self.retired.len() {
            self.reclaim_one().await;
        }
    }

    /// Unmaps the first of the retired mappings. Whether that was confirmed.
    async fn reclaim_one(&self) -> bool {
        if self.backend.is_gone() {
            return false;
        }
        let Some(region) = self.retired.pop() else { return false };
        if !self.has(&region) {
            region.set_pinned(false);
            self.release(region.iova, region.len());
            return true;
        }
        let mut unmap = Unmap { retired: &self.retired, region: Some(region.clone()) };
        let result = self.backend.unmap(&region).await;
        unmap.region = None;
        match result {
            Ok(()) => {
                region.set_pinned(false);
                self.release(region.iova, region.len());
                return true;
            }
            Err(_) if self.backend.is_gone() => {}
            Err(error) => self.leak(region, &error),
        }
        false
    }

    /// Keeps a region as long as the space: it could not be unmapped.
    pub(super) fn leak(&self, region: Arc<Region>, error: &Error) {
        tracing::warn!(iova = region.iova, bytes = region.len(), %error, "a mapping is leaked: its unmap failed");
        self.leaked.borrow_mut().push(region);
    }

    /// Calls `visit` with the memory of each region that `iova..iova + len` touches, the offset in it, and the part of the request.
    fn walk(
        &self,
        iova: u64,
        len: usize,
        mut visit: impl FnMut(&SharedMemory, u64, Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let mapped = self.mapped.borrow();
        let mut done = 0;
        while done < len {
            let at = iova.checked_add(done as u64);
            let region = at.and_then(|at| mapped.range(..=at).next_back()?.1.upgrade());
            let (Some(at), Some(region)) = (at, region) else { return Err(unmapped(iova, len)) };
            let offset = at - region.iova;
            let part = region.len().saturating_sub(offset).min((len - done) as u64) as usize;
            if part == 0 {
                return Err(unmapped(iova, len));
            }
            visit(region.view()?, offset, done..done + part)?;
            done += part;
        }
        Ok(())
    }
}

fn unmapped(iova: u64, len: usize) -> Error {
    Error::invalid(format!("{len} bytes at IOVA {iova:#x} are not all mapped"))
}
