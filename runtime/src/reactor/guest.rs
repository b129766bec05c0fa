//! The reactor as a guest: one task of a tokio runtime, or of tokio-uring's.

use std::{
    fmt,
    future::{Future, poll_fn},
    os::fd::OwnedFd,
    pin::{Pin, pin},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::Handle,
    task::unconstrained,
};

use super::{
    Builder, Local, Reactor, RootHeader,
    idle::{Turn, Waiting},
    ring::Owner,
    task::with_waker,
};
use crate::{Error, Result};

/// What a poll of the guest may do before the host's other tasks have their turn: looks that found nothing count one.
const BUDGET: u32 = 128;
/// What a turn that found work counts.
const BUSY_COST: u32 = 8;
/// A guest that never sleeps lets its host look at everything else this often.
const HOST_INTERVAL: Duration = Duration::from_micros(500);

/// A reactor that runs as one task of a tokio runtime: current-thread, a `LocalSet`, or inside of `tokio_uring::start`.
///
/// What runs in [`Guest::run`], and the tasks that it spawns with [`spawn`](super::spawn), use devices and drivers just as under
/// [`Reactor::block_on`]. They may await what belongs to the host, too: its timers, sockets, channels and files. The host's other tasks
/// go on beside; those of them that want to use a device send their requests to a task of the guest, through a channel.
///
/// Interrupts are taken by tokio's own event loop; sockets, region reads and timers by a ring whose descriptor is in that loop.
/// All modes of [`Idle`](super::Idle) work: a guest that spins or is busy lets the host's tasks run after a bounded number of turns, and one
/// that has nothing to do sleeps with its host.
///
/// ```
/// use std::time::Duration;
/// use vfio_uring::reactor::{self, Guest};
///
/// let host = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
/// let sum = host.block_on(async {
///     let mut guest = Guest::new()?;
///     let sum = guest.run(async {
///         let ours = reactor::spawn(async {
///             reactor::sleep(Duration::from_millis(1)).await;
///             40
///         });
///         tokio::time::sleep(Duration::from_millis(1)).await;
///         ours.await.unwrap() + 2
///     });
///     sum.await
/// })?;
/// assert_eq!(sum, 42);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Guest {
    reactor: Reactor,
}

impl Builder {
    /// Makes a guest.
    ///
    /// # Errors
    /// [`Error::NoIoUring`] where the kernel or a sandbox refuses.
    pub fn guest(self) -> Result<Guest> {
        Ok(Guest { reactor: self.build_for(Owner::Guest)? })
    }
}

impl Guest {
    /// A guest with the default options.
    ///
    /// # Errors
    /// See [`Builder::guest`].
    pub fn new() -> Result<Self> {
        Reactor::builder().guest()
    }

    /// Runs `future` to its end, and the guest's tasks beside it. Tasks that have not ended then go on in the next run, which has
    /// to be in the same runtime, or end with the guest. So they do when this future is dropped.
    ///
    /// # Errors
    /// [`Error::NoReactor`] outside of a tokio runtime, [`Error::Io`] when its event loop takes no more descriptors.
    ///
    /// # Panics
    /// When a task panics, and, by tokio, when the runtime was built without `enable_io` or `enable_all`.
    pub async fn run<F: Future>(&mut self, future: F) -> Result<F::Output> {
        if Handle::try_current().is_err() {
            return Err(Error::NoReactor { what: "a guest" });
        }
        let reactor = &self.reactor;
        let mut future = pin!(Some(future));
        let mut run = Run {
            reactor,
            root: RootHeader { header: reactor.local.ready.core.new_header(), ready: &reactor.local.ready },
            future: future.as_mut(),
            waiting: Waiting::new(reactor.idle),
            host: Host::new(&reactor.local)?,
        };
        reactor.local.ready.push(run.root.header);
        // Turns are bounded here already.
        Ok(unconstrained(poll_fn(|cx| run.poll(cx))).await)
    }
}

impl fmt::Debug for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guest").field("idle", &self.reactor.idle).finish_non_exhaustive()
    }
}

/// A run of a guest.
struct Run<'a, F: Future> {
    reactor: &'a Reactor,
    root: RootHeader<'a>,
    future: Pin<&'a mut Option<F>>,
    waiting: Waiting,
    host: Host,
}

impl<F: Future> Run<'_, F> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<F::Output> {
        let (reactor, local) = (self.reactor, &*self.reactor.local);
        reactor.within(|| {
            local.end_sleep();
            let mut budget = BUDGET;
            loop {
                if local.ready.run(self.root.header)
                    && let Some(future) = self.future.as_mut().as_pin_mut()
                    && let Poll::Ready(output) = with_waker(self.root.header, |cx| future.poll(cx))
                {
                    // What the last tasks submitted still goes out.
                    local.pollers.poll();
                    local.service_ring();
                    return Poll::Ready(output);
                }
                self.waiting.woke();
                let cost = match reactor.turn(&mut self.waiting) {
                    Turn::Busy => BUSY_COST,
                    Turn::Look => 1,
                    Turn::Sleep(limit) if self.host.sleep(local, limit, cx) => return Poll::Pending,
                    Turn::Sleep(_) => 1,
                };
                budget = budget.saturating_sub(cost);
                if budget == 0 {
                    self.host.give_way(local, cx);
                    return Poll::Pending;
                }
            }
        })
    }
}

impl<F: Future> Drop for Run<'_, F> {
    /// What the future holds may need its reactor to be dropped.
    fn drop(&mut self) {
        self.reactor.within(|| {
            self.reactor.local.end_sleep();
            self.future.set(None);
        });
    }
}

impl Local {
    /// Back from a sleep that the host did, if it did.
    fn end_sleep(&self) {
        let core = self.ready.core;
        core.inbox.finish_sleep();
        core.host.take();
        self.drain_inbox();
        self.fire_timers();
    }
}

/// The host, as the guest sees it.
struct Host {
    /// The guest's ring in the host's event loop.
    ring: AsyncFd<OwnedFd>,
    /// When the guest slept last.
    slept: Instant,
}

impl Host {
    fn new(local: &Local) -> Result<Self> {
        let fd = local.ring.borrow().duplicate_fd()?;
        // SAFETY: an owned descriptor is the same and open for as long as it lives.
        let ring = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        let ring = ring.map_err(|error| Error::io("adding the ring to tokio's event loop", error.into_parts().1))?;
        Ok(Self { ring, slept: Instant::now() })
    }

    /// Sees to it that the host polls the guest again at the next event, wake or timer, or after `limit`. False: there is something
    /// to do now.
    fn sleep(&mut self, local: &Local, limit: Option<Duration>, cx: &mut Context<'_>) -> bool {
        let (limit, timer) = (limit.map(|limit| Instant::now() + limit), local.timers.borrow().next());
        let until = limit.into_iter().chain(timer).min();
        if let Some(at) = until {
            local.ring.borrow_mut().set_alarm(at);
        }
        local.service_ring();
        self.watch(local, cx);
        // An alarm that rang meanwhile, or just before it was set anew, has to be set again.
        let rang = until.is_some() && !local.ring.borrow().has_alarm();
        let core = local.ready.core;
        core.host.register(cx.waker());
        let sleeps = !rang && local.ready.is_empty() && core.inbox.prepare_sleep();
        if sleeps {
            self.slept = Instant::now();
        }
        sleeps
    }

    /// Has the ring's events wake the guest, and takes those that are there.
    fn watch(&self, local: &Local, cx: &mut Context<'_>) {
        while let Poll::Ready(ready) = self.ring.poll_read_ready(cx) {
            match ready {
                Ok(mut guard) => guard.clear_ready(),
                // The host is about to drop the guest.
                Err(error) => return tracing::debug!(%error, "tokio's event loop has ended"),
            }
            local.service_ring();
        }
    }

    /// Lets the host run its other tasks, and has it poll the guest again.
    fn give_way(&mut self, local: &Local, cx: &mut Context<'_>) {
        local.service_ring();
        if self.slept.elapsed() < HOST_INTERVAL {
            return cx.waker().wake_by_ref();
        }
        // Some things are only done by a host that has nothing left to run, such as the submitting of tokio-uring: let it go to
        // sleep, and wake it at once.
        self.slept = Instant::now();
        self.watch(local, cx);
        if let Err(error) = local.ring.borrow_mut().ring_bell() {
            tracing::error!(%error, "the ring refuses a no-op");
            cx.waker().wake_by_ref();
        }
    }
}
