//! One reactor per thread: it runs tasks, rings doorbells, and waits on an io_uring for all that is not plain memory.
//!
//! A turn runs every ready task once, then the registered [`Poller`]s (a queue rings one doorbell for all that the tasks
//! submitted and drains its completions), then looks at the ring. When nothing was found, the reactor waits as its [`Idle`]
//! mode says. A wake on the reactor's own thread is a few plain loads and stores; other threads wake it at any time through a
//! lock-free inbox.
//!
//! Needs Linux 5.15 or newer; from 6.1 on the ring runs with DEFER_TASKRUN, older kernels get plainer flags.
//!
//! ```
//! use std::time::Duration;
//! use vfio_uring::reactor::{self, Reactor};
//!
//! let reactor = Reactor::new()?;
//! let sum = reactor.block_on(async {
//!     let task = reactor::spawn(async { 40 });
//!     reactor::sleep(Duration::from_millis(1)).await;
//!     task.await.unwrap() + 2
//! });
//! assert_eq!(sum, 42);
//! # Ok::<(), vfio_uring::Error>(())
//! ```

#[cfg(feature = "tokio")]
mod guest;
mod idle;
mod inbox;
mod join;
mod message;
pub mod op;
mod poller;
mod ring;
mod task;
mod timer;
mod watch;

use std::{cell::RefCell, fmt, future::Future, marker::PhantomData, pin::pin, rc::Rc, task::Poll, time::Instant};

#[cfg(feature = "tokio")]
pub use guest::Guest;
pub use idle::Idle;
pub use join::{Cancelled, JoinHandle, spawn, yield_now};
pub use poller::{Poller, PollerGuard, Standby, register_poller};
pub use task::TaskRef;
pub use timer::{Elapsed, Sleep, sleep, sleep_until, timeout};

use crate::{Error, Result};
use idle::{Turn, Waiting};
use poller::Pollers;
use ring::{Owner, Ring, SharedRing};
use task::{Core, Header, ReadyList, with_waker};
use timer::Timers;

/// Turns between looks at the ring, which costs more than memory; before the reactor waits, it always looks.
const RING_INTERVAL: u32 = 16;
/// Turns between looks at the clock.
const CLOCK_INTERVAL: u32 = 64;

/// What the ops, timers and tasks of one reactor share.
pub(crate) struct Local {
    pub(crate) ready: ReadyList,
    pub(crate) ring: SharedRing,
    pub(crate) timers: RefCell<Timers>,
    pub(crate) pollers: Pollers,
    /// A task without a future: to wake it is to wake the reactor.
    pub(crate) nobody: &'static Header,
}

impl fmt::Debug for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Local").finish_non_exhaustive()
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        self.ready.core.free_header(self.nobody);
        self.ready.core.release();
    }
}

thread_local! {
    static LOCAL: RefCell<Option<Rc<Local>>> = const { RefCell::new(None) };
}

/// The reactor that runs on this thread now.
pub(crate) fn try_current() -> Option<Rc<Local>> {
    // While a thread ends, when its locals go one after the other, there is none.
    LOCAL.try_with(|local| local.borrow().clone()).ok().flatten()
}

/// # Panics
/// Outside of a reactor, naming what needs one.
pub(crate) fn current(what: &'static str) -> Rc<Local> {
    match try_current() {
        Some(local) => local,
        None => panic!("{}", Error::NoReactor { what }),
    }
}

/// Whether this thread runs a reactor now.
pub fn is_running() -> bool {
    try_current().is_some()
}

/// An io_uring, an executor and timers, for one thread.
///
/// Dropping it drops its tasks, cancels their operations and waits for the kernel to let go of their buffers.
pub struct Reactor {
    local: Rc<Local>,
    idle: Idle,
    _not_send: PhantomData<*const ()>,
}

/// Options of a [`Reactor`].
#[derive(Debug, Clone)]
pub struct Builder {
    entries: u32,
    idle: Idle,
}

impl Builder {
    /// Entries of the submission queue, 128 by default: operations that can be started in one turn without a system call.
    pub fn entries(mut self, entries: u32) -> Self {
        self.entries = entries;
        self
    }

    /// How to wait, [`Idle::Hybrid`] by default.
    pub fn idle(mut self, idle: Idle) -> Self {
        self.idle = idle;
        self
    }

    /// Makes the reactor.
    ///
    /// # Errors
    /// [`Error::NoIoUring`] where the kernel or a sandbox refuses.
    pub fn build(self) -> Result<Reactor> {
        self.build_for(Owner::Reactor)
    }

    fn build_for(self, owner: Owner) -> Result<Reactor> {
        let core = Core::take()?;
        let ring = match Ring::new(self.entries, owner, &core.event) {
            Ok(ring) => ring,
            Err(error) => {
                core.release();
                return Err(error);
            }
        };
        let local = Rc::new(Local {
            ready: ReadyList::new(core),
            ring: RefCell::new(ring),
            timers: RefCell::default(),
            pollers: Pollers::default(),
            nobody: core.new_header(),
        });
        Ok(Reactor { local, idle: self.idle, _not_send: PhantomData })
    }
}

impl Reactor {
    /// A reactor with the default options.
    ///
    /// # Errors
    /// See [`Builder::build`].
    pub fn new() -> Result<Self> {
        Self::builder().build()
    }

    /// Options for a reactor.
    pub fn builder() -> Builder {
        Builder { entries: 128, idle: Idle::default() }
    }

    /// Runs `future` to its end, and the reactor's tasks beside it.
    ///
    /// # Panics
    /// When called inside of itself, or when a task panics.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let _current = SetCurrent::new(self.local.clone());
        let ready = &self.local.ready;
        let root = RootHeader { header: ready.core.new_header(), ready };
        let mut future = pin!(future);
        ready.enter(|| {
            ready.push(root.header);
            let mut waiting = Waiting::new(self.idle);
            loop {
                if ready.run(root.header)
                    && let Poll::Ready(output) = with_waker(root.header, |cx| future.as_mut().poll(cx))
                {
                    // What the last tasks submitted still goes out.
                    self.local.pollers.poll();
                    return output;
                }
                if let Turn::Sleep(limit) = self.turn(&mut waiting) {
                    idle::park(&self.local, limit);
                    waiting.woke();
                }
            }
        })
    }

    /// Runs `body` with this reactor as the thread's current one.
    fn within<T>(&self, body: impl FnOnce() -> T) -> T {
        let _current = SetCurrent::replace(self.local.clone());
        self.local.ready.enter(body)
    }

    /// The part of a turn after the tasks.
    #[inline]
    fn turn(&self, waiting: &mut Waiting) -> Turn {
        let local = &*self.local;
        let found = local.pollers.poll();
        if !local.ready.core.inbox.is_empty() {
            local.drain_inbox();
        }
        waiting.turns = waiting.turns.wrapping_add(1);
        if waiting.turns.is_multiple_of(RING_INTERVAL) {
            local.service_ring();
            if waiting.turns.is_multiple_of(CLOCK_INTERVAL) {
                local.fire_timers();
            }
        }
        if found || !local.ready.is_empty() {
            waiting.found_work();
            Turn::Busy
        } else {
            waiting.idle_turn(local)
        }
    }
}

impl Local {
    /// Whether the reactor runs in somebody else's event loop.
    #[cfg(feature = "tokio")]
    fn is_guest(&self) -> bool {
        self.ring.borrow().is_guest()
    }

    fn drain_inbox(&self) {
        self.ready.core.inbox.drain(|node| self.ready.push(Header::of(node)));
    }

    fn fire_timers(&self) {
        if !self.timers.borrow().is_empty() {
            self.timers.borrow_mut().fire(Instant::now());
        }
    }

    fn service_ring(&self) {
        let mut ring = self.ring.borrow_mut();
        if ring.wants_service()
            && let Err(error) = ring.turn()
        {
            // Nothing to hand it to: every op still gets its own result.
            tracing::error!(%error, "the ring refuses service");
        }
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        let local = &*self.local;
        self.within(|| local.ready.core.drop_tasks());
        local.pollers.clear();
        local.ready.clear();
    }
}

impl fmt::Debug for Reactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reactor").field("idle", &self.idle).finish_non_exhaustive()
    }
}

/// Gives the header of the root future back.
struct RootHeader<'a> {
    header: &'static Header,
    ready: &'a ReadyList,
}

impl Drop for RootHeader<'_> {
    fn drop(&mut self) {
        self.ready.core.free_header(self.header);
    }
}

/// Makes a reactor the thread's current one, until it is dropped.
struct SetCurrent(Option<Rc<Local>>);

impl SetCurrent {
    fn new(local: Rc<Local>) -> Self {
        let already = try_current().is_some_and(|current| Rc::ptr_eq(&current, &local));
        assert!(!already, "Reactor::block_on was called inside of itself: await instead");
        Self::replace(local)
    }

    fn replace(local: Rc<Local>) -> Self {
        Self(LOCAL.try_with(|current| current.replace(Some(local))).ok().flatten())
    }
}

impl Drop for SetCurrent {
    fn drop(&mut self) {
        let before = self.0.take();
        let _ = LOCAL.try_with(|current| current.replace(before));
    }
}
