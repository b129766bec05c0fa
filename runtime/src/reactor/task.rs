//! Tasks: a header that lives for ever, and a future that lives as long as the task.
//!
//! A waker is a plain `&'static` pointer to a task's header. Headers belong to a [`Core`], cores are kept in a list and used
//! again by later reactors, and neither is ever given back to the allocator (a process keeps as many headers as it had tasks
//! at once, about 100 bytes each). So a clone of a waker is a copy, dropping it is nothing, and a wake is sound from any
//! thread at any time: after the task, after its reactor, during its own poll. A wake that comes too late makes whoever uses
//! the header now run once too often, which every future permits.

use std::{
    cell::{Cell, RefCell, UnsafeCell},
    future::Future,
    mem::ManuallyDrop,
    os::fd::OwnedFd,
    pin::Pin,
    ptr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, RawWaker, RawWakerVTable, Waker},
};

use rustix::event::{EventfdFlags, eventfd};

use super::inbox::{Inbox, Node};
use crate::{Error, Result};

type BoxedTask = Pin<Box<dyn Future<Output = ()>>>;

/// The part of a reactor that other threads may touch at any time.
pub(crate) struct Core {
    pub(crate) inbox: Inbox,
    /// Written once for a wake of a sleeping reactor; polled, never read.
    pub(crate) event: OwnedFd,
    /// The task of the host, while a guest sleeps: it is woken instead.
    #[cfg(feature = "tokio")]
    pub(crate) host: futures::task::AtomicWaker,
    taken: AtomicBool,
    /// Every header of the core. Touched by the reactor that took the core only.
    headers: RefCell<Vec<&'static Header>>,
    free: RefCell<Vec<&'static Header>>,
}

// SAFETY: `headers` and `free` are touched only by the thread of the reactor that won `taken`, which is released and taken
// with release and acquire order; the rest is made of `Sync` parts.
unsafe impl Sync for Core {}
// SAFETY: as above.
unsafe impl Send for Core {}

static CORES: Mutex<Vec<&'static Core>> = Mutex::new(Vec::new());

impl Core {
    /// A core that no reactor uses: a used one, or a new one.
    pub(crate) fn take() -> Result<&'static Self> {
        let mut cores = CORES.lock().unwrap_or_else(PoisonError::into_inner);
        for core in cores.iter() {
            if core.taken.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                return Ok(core);
            }
        }
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::io("making the reactor's eventfd", e))?;
        let core = Box::leak(Box::new(Self {
            inbox: Inbox::new(),
            event,
            #[cfg(feature = "tokio")]
            host: futures::task::AtomicWaker::new(),
            taken: AtomicBool::new(true),
            headers: RefCell::default(),
            free: RefCell::default(),
        }));
        cores.push(core);
        Ok(core)
    }

    /// Gives the core back; none of its headers holds a future any more.
    pub(crate) fn release(&self) {
        self.taken.store(false, Ordering::Release);
    }

    pub(crate) fn new_header(&'static self) -> &'static Header {
        if let Some(header) = self.free.borrow_mut().pop() {
            return header;
        }
        let header: &'static Header = Box::leak(Box::new(Header {
            node: Node::new(),
            core: self,
            next: Cell::new(None),
            ready: Cell::new(false),
            epoch: Cell::new(0),
            aborted: Cell::new(false),
            future: UnsafeCell::new(None),
        }));
        self.headers.borrow_mut().push(header);
        header
    }

    pub(crate) fn free_header(&self, header: &'static Header) {
        header.epoch.set(header.epoch.get() + 1);
        header.aborted.set(false);
        self.free.borrow_mut().push(header);
    }

    /// Drops the futures of all tasks, and of those that the dropping spawns.
    pub(crate) fn drop_tasks(&self) {
        while let Some(header) = self.next_occupied() {
            drop(header.take_future());
            self.free_header(header);
        }
    }

    fn next_occupied(&self) -> Option<&'static Header> {
        self.headers.borrow().iter().copied().find(|header| header.is_occupied())
    }

    fn wake(&self, header: &'static Header) {
        if self.inbox.push(&header.node) {
            self.notify();
        }
    }

    /// Wakes the reactor out of its sleep.
    pub(crate) fn notify(&self) {
        #[cfg(feature = "tokio")]
        if let Some(host) = self.host.take() {
            return host.wake();
        }
        // A full counter (EAGAIN) is readable already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

/// A task's header: what its wakers point to.
#[repr(C)]
pub(crate) struct Header {
    /// First, so that a node's address is its header's.
    node: Node,
    core: &'static Core,
    next: Cell<Option<&'static Header>>,
    ready: Cell<bool>,
    epoch: Cell<u64>,
    aborted: Cell<bool>,
    future: UnsafeCell<Option<BoxedTask>>,
}

// SAFETY: other threads use `node` and `core` only, through wakers; the cells belong to the reactor's thread.
unsafe impl Sync for Header {}
// SAFETY: as above.
unsafe impl Send for Header {}

impl Header {
    /// The header whose node this is.
    pub(crate) fn of(node: &'static Node) -> &'static Self {
        // SAFETY: every node that is pushed to an inbox is the first field of a `repr(C)` header.
        unsafe { &*ptr::from_ref(node).cast() }
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.get()
    }

    fn is_occupied(&self) -> bool {
        // SAFETY: on the reactor's thread, and no reference into the cell outlives a call here.
        unsafe { (*self.future.get()).is_some() }
    }

    fn take_future(&self) -> Option<BoxedTask> {
        // SAFETY: as in `is_occupied`.
        unsafe { (*self.future.get()).take() }
    }

    fn put_future(&self, future: BoxedTask) {
        // SAFETY: as in `is_occupied`; the cell is empty, so there is nothing to drop.
        unsafe { self.future.get().write(Some(future)) };
    }
}

thread_local! {
    /// The ready list of the reactor that runs on this thread now.
    static CURRENT: Cell<*const ReadyList> = const { Cell::new(ptr::null()) };
}

/// The tasks that are to run, in order, linked through their headers.
pub(crate) struct ReadyList {
    pub(crate) core: &'static Core,
    head: Cell<Option<&'static Header>>,
    tail: Cell<Option<&'static Header>>,
}

impl ReadyList {
    pub(crate) fn new(core: &'static Core) -> Self {
        Self { core, head: Cell::new(None), tail: Cell::new(None) }
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.head.get().is_none()
    }

    #[inline]
    pub(crate) fn push(&self, header: &'static Header) {
        if header.ready.replace(true) {
            return;
        }
        header.next.set(None);
        match self.tail.replace(Some(header)) {
            Some(tail) => tail.next.set(Some(header)),
            None => self.head.set(Some(header)),
        }
    }

    #[inline]
    fn pop(&self) -> Option<&'static Header> {
        let header = self.head.get()?;
        let next = header.next.get();
        self.head.set(next);
        if next.is_none() {
            self.tail.set(None);
        }
        header.ready.set(false);
        Some(header)
    }

    /// Runs `body` with this list as the thread's current one.
    pub(crate) fn enter<T>(&self, body: impl FnOnce() -> T) -> T {
        struct Restore(*const ReadyList);
        impl Drop for Restore {
            fn drop(&mut self) {
                CURRENT.set(self.0);
            }
        }
        let _restore = Restore(CURRENT.replace(self));
        body()
    }

    /// Starts a task.
    pub(crate) fn spawn(&self, future: BoxedTask) -> &'static Header {
        let header = self.core.new_header();
        header.put_future(future);
        self.push(header);
        header
    }

    /// Ends a task, if it is still the one of that epoch.
    pub(crate) fn abort(&self, header: &'static Header, epoch: u64) {
        if header.epoch.get() != epoch {
            return;
        }
        match header.take_future() {
            Some(future) => {
                self.core.free_header(header);
                drop(future);
            }
            // It is being polled and its future is on the stack.
            None => header.aborted.set(true),
        }
    }

    /// Runs what is ready now, each task once. True: `root` was among it.
    #[inline]
    pub(crate) fn run(&self, root: &'static Header) -> bool {
        let Some(last) = self.tail.get() else { return false };
        let mut root_ready = false;
        while let Some(header) = self.pop() {
            if ptr::eq(header, root) {
                root_ready = true;
            } else {
                self.poll(header);
            }
            if ptr::eq(header, last) {
                break;
            }
        }
        root_ready
    }

    #[inline]
    fn poll(&self, header: &'static Header) {
        // The future is on the stack while it runs: a panic drops it, and it may abort itself.
        let Some(mut future) = header.take_future() else { return };
        let done = with_waker(header, |cx| future.as_mut().poll(cx)).is_ready();
        if done || header.aborted.get() {
            self.core.free_header(header);
        } else {
            header.put_future(future);
        }
    }

    pub(crate) fn clear(&self) {
        while self.pop().is_some() {}
    }
}

/// Calls `body` with a context whose waker is `header`'s.
#[inline]
pub(crate) fn with_waker<T>(header: &'static Header, body: impl FnOnce(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
    // SAFETY: the vtable's functions take a `&'static Header` and uphold the contract of `RawWaker`: thread-safe by `wake`.
    let waker = unsafe { Waker::from_raw(RawWaker::new(ptr::from_ref(header).cast(), &VTABLE)) };
    // Dropping it would call a function that does nothing.
    let waker = ManuallyDrop::new(waker);
    body(&mut Context::from_waker(&waker))
}

static VTABLE: RawWakerVTable = RawWakerVTable::new(|data| RawWaker::new(data, &VTABLE), wake_raw, wake_raw, |_| {});

fn wake_raw(data: *const ()) {
    // SAFETY: the data of this vtable is always a `&'static Header`.
    wake(unsafe { &*data.cast::<Header>() });
}

/// Wakes a task: on its own thread by linking it in, elsewhere through the inbox.
#[inline]
fn wake(header: &'static Header) {
    let current = CURRENT.get();
    // SAFETY: `CURRENT` is set while the list is borrowed by `enter` on this thread, and reset before that ends.
    if let Some(list) = unsafe { current.as_ref() }
        && ptr::eq(list.core, header.core)
    {
        list.push(header);
    } else {
        header.core.wake(header);
    }
}

/// Who is to be woken: for the slots of a driver's queue.
///
/// It holds a task of this executor as a plain pointer, so that registering and waking cost a few instructions, and any
/// other executor's waker as a clone.
#[derive(Default)]
pub struct TaskRef(Option<Waker>);

impl TaskRef {
    /// Nobody.
    pub const fn none() -> Self {
        Self(None)
    }

    /// The task that is being polled with `cx`.
    #[inline(always)]
    pub fn current(cx: &Context<'_>) -> Self {
        let waker = cx.waker();
        if ptr::eq(waker.vtable(), &VTABLE) {
            // SAFETY: what a clone of ours gives, without a call: a copy of a pointer that stays valid for ever.
            Self(Some(unsafe { Waker::from_raw(RawWaker::new(waker.data(), &VTABLE)) }))
        } else {
            Self(Some(waker.clone()))
        }
    }

    /// Wakes the task and forgets it.
    #[inline(always)]
    pub fn wake(&mut self) {
        let Some(waker) = self.0.take() else { return };
        if ptr::eq(waker.vtable(), &VTABLE) {
            // SAFETY: only this module makes wakers with this vtable, and their data is a `&'static Header`.
            wake(unsafe { &*waker.data().cast::<Header>() });
            // Dropping one of ours does nothing.
            std::mem::forget(waker);
        } else {
            waker.wake();
        }
    }

    /// Whether there is nobody to wake.
    #[inline]
    pub fn is_none(&self) -> bool {
        self.0.is_none()
    }
}

impl std::fmt::Debug for TaskRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match &self.0 {
            None => "nobody",
            Some(waker) if ptr::eq(waker.vtable(), &VTABLE) => "a task of this executor",
            Some(_) => "a foreign task",
        })
    }
}
