//! Memory that is mapped at a device, and the queue of mappings that wait for their unmap.

use std::{
    collections::VecDeque,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use futures::task::AtomicWaker;

use super::{SharedMemory, foreign::Keeper};
use crate::Result;

/// Memory and its place in the device's address space.
#[derive(Debug)]
pub(super) struct Region {
    pub(super) memory: SharedMemory,
    pub(super) iova: u64,
    pub(super) backing: Backing,
    view: OnceLock<SharedMemory>,
    /// Of the devices of a shared space, those that have it.
    holders: Mutex<Vec<u64>>,
    owned: AtomicBool,
    mapped: AtomicBool,
}

/// What is behind the memory of a region.
#[derive(Debug)]
pub(super) enum Backing {
    /// A memfd of ours, from its start.
    Memfd(Arc<OwnedFd>),
    /// Memory of the caller.
    Foreign(Keeper),
}

impl Region {
    pub(super) fn new(memory: SharedMemory, backing: Backing, iova: u64) -> Self {
        let (view, holders) = (OnceLock::new(), Mutex::default());
        let (owned, mapped) = (AtomicBool::new(true), AtomicBool::new(false));
        Self { memory, iova, backing, view, holders, owned, mapped }
    }

    /// The memory as the device sees it: mapped once more, at first use. A pool lends slices of its own mapping, and nothing in
    /// this program may write behind those at the same addresses. No slices of memory of the caller are lent.
    pub(super) fn view(&self) -> Result<&SharedMemory> {
        let Backing::Memfd(fd) = &self.backing else { return Ok(&self.memory) };
        match self.view.get() {
            Some(view) => Ok(view),
            None => {
                let view = SharedMemory::map(fd, 0, self.memory.len(), true)?;
                Ok(self.view.get_or_init(|| view))
            }
        }
    }

    pub(super) fn fd(&self) -> Option<&Arc<OwnedFd>> {
        match &self.backing {
            Backing::Memfd(fd) => Some(fd),
            Backing::Foreign(_) => None,
        }
    }

    /// The kernel may have the pages from now on, or has given them back.
    pub(super) fn set_pinned(&self, pinned: bool) {
        if let Backing::Foreign(keeper) = &self.backing {
            keeper.set_pinned(pinned);
        }
    }

    /// Whether the device has it: from when it has confirmed the mapping until it has confirmed the unmap.
    pub(super) fn is_mapped(&self) -> bool {
        self.mapped.load(Ordering::Relaxed)
    }

    pub(super) fn set_mapped(&self, mapped: bool) {
        self.mapped.store(mapped, Ordering::Relaxed);
    }

    /// Whether its mapping has an owner: else it waits for its unmap.
    pub(super) fn is_owned(&self) -> bool {
        self.owned.load(Ordering::Relaxed)
    }

    pub(super) fn holders(&self) -> MutexGuard<'_, Vec<u64>> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn len(&self) -> u64 {
        self.memory.len() as u64
    }
}

/// Memory that the device may read and write, made by [`AddressSpace::map`](super::AddressSpace::map), or the caller's by
/// [`AddressSpace::map_pages`](super::AddressSpace::map_pages).
///
/// When the last `Arc` is dropped, on whatever thread, the mapping is *retired*: its memory and addresses stay until the
/// address space has had the unmap confirmed.
#[derive(Debug)]
pub struct Mapping {
    region: Arc<Region>,
    retired: Arc<Retired>,
    space_id: u64,
}

impl Mapping {
    pub(super) fn new(region: Arc<Region>, retired: Arc<Retired>, space_id: u64) -> Self {
        Self { region, retired, space_id }
    }

    /// The memory.
    pub fn memory(&self) -> &SharedMemory {
        &self.region.memory
    }

    /// The memfd behind the memory: mapped from its start. A software device in this process maps it for itself. `None`: memory of
    /// the caller.
    pub fn fd(&self) -> Option<&Arc<OwnedFd>> {
        self.region.fd()
    }

    /// Where the device sees the memory.
    pub fn iova(&self) -> u64 {
        self.region.iova
    }

    /// Bytes of the mapping.
    pub fn len(&self) -> usize {
        self.region.memory.len()
    }

    /// Never true: a mapping has at least a page.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// [`AddressSpace::id`](super::AddressSpace::id) of the space that the mapping is in.
    pub fn space_id(&self) -> u64 {
        self.space_id
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.region.owned.store(false, Ordering::Relaxed);
        self.retired.push(self.region.clone());
    }
}

/// Mappings without an owner whose unmap is not confirmed yet. They hold their memory.
#[derive(Debug, Default)]
pub(super) struct Retired {
    queue: Mutex<Queue>,
    reclaimer: AtomicWaker,
}

#[derive(Debug, Default)]
struct Queue {
    regions: VecDeque<Arc<Region>>,
    closed: bool,
}

impl Retired {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, region: Arc<Region>) {
        let mut queue = self.lock();
        // Closed: nobody is left to unmap it from, or by. See `close` for why the memory may go.
        if !queue.closed {
            queue.regions.push_back(region);
            drop(queue);
            self.reclaimer.wake();
        }
    }

    /// Puts back what [`Retired::pop`] took when its unmap was given up midway.
    pub(super) fn put_back(&self, region: Arc<Region>) {
        let mut queue = self.lock();
        if !queue.closed {
            queue.regions.push_front(region);
        }
    }

    pub(super) fn pop(&self) -> Option<Arc<Region>> {
        self.lock().regions.pop_front()
    }

    pub(super) fn len(&self) -> usize {
        self.lock().regions.len()
    }

    /// No unmap will be confirmed any more: the connection is gone, or the address space is. The memory of all mappings without
    /// an owner goes at once, now and later.
    ///
    /// That is safe without proof: what we unmap is our own view of a memfd. Its pages live for as long as the peer maps them
    /// and are never given to anyone else, so a late write of the peer reaches nothing of ours. Their addresses are not handed
    /// out again.
    ///
    /// Of the caller's memory a vfio-user server had nothing, only answers to its messages. The kernel has its pages: there the
    /// memory does not go, see [`Keeper`].
    pub(super) fn close(&self) {
        let regions = {
            let mut queue = self.lock();
            queue.closed = true;
            std::mem::take(&mut queue.regions)
        };
        drop(regions);
        self.reclaimer.wake();
    }

    /// Waits for a mapping in the queue. `false` when none will come any more.
    pub(super) fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<bool> {
        self.reclaimer.register(cx.waker());
        let queue = self.lock();
        match queue.regions.is_empty() {
            false => Poll::Ready(true),
            true if queue.closed => Poll::Ready(false),
            true => Poll::Pending,
        }
    }
}
