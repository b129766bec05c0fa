//! What becomes of a device, as a stream: it is asked back, it reports errors, it is revoked and restored, it is gone.

use std::{
    cell::{Cell, RefCell},
    fmt,
    future::{Future, poll_fn},
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
    rc::{Rc, Weak},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use futures::Stream;
use rustix::event::{EventfdFlags, PollFlags, eventfd};
use slab::Slab;

use super::{
    Device, Inner, Irq, IrqInfo, State, StateChanges,
    gate::{Ended, Gate},
    removal,
};
use crate::{
    Error, Result,
    reactor::{
        self, Sleep,
        op::{self, MultishotPoll},
        sleep_until,
    },
    transport::vfio::DeviceFd,
};

/// Something that happened to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The device is asked back: it is to be unbound from its driver or unplugged, and whoever asks waits until this process has
    /// closed it. Drop it, or [`Device::close`] it, when what is under way is done. The kernel asks again every 10 s.
    RemovalRequested {
        /// When it is taken from this process, by the [policy](RemovalPolicy).
        deadline: Option<Instant>,
    },
    /// The device or its link reported an error that was not corrected (PCI Express AER). What it was is in the kernel's log, and in
    /// the device's own registers. A reset is the usual remedy.
    Error,
    /// The device can't be accessed at present, see [`State`].
    Revoked(State),
    /// The device is live again.
    Restored {
        /// Its [generation](Device::generation): another than before means that it was reset.
        generation: u64,
    },
    /// The device is gone, and closed. Nothing comes after it.
    Gone,
}

/// What happens when the kernel asks a device back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemovalPolicy {
    /// How long the application has to finish and to close the device; 5 s by default. Then it is taken away: it is stopped, its
    /// memory is unmapped, and it is closed, as by [`Device::close`].
    ///
    /// `None`: it is not. Whoever wants it back waits for the application, for ever if need be.
    pub grace: Option<Duration>,
}

impl Default for RemovalPolicy {
    fn default() -> Self {
        Self { grace: Some(Duration::from_secs(5)) }
    }
}

/// What listeners look at.
#[derive(Default)]
pub(super) struct Board {
    requests: Cell<u64>,
    deadline: Cell<Option<Instant>>,
    errors: Cell<u64>,
    /// The device is being closed by [`removal::give_up`].
    closing: Cell<bool>,
    closed: Cell<bool>,
    /// It does no DMA any more.
    stopped: Cell<bool>,
    listeners: RefCell<Slab<Waker>>,
}

impl Board {
    /// Whether the caller is the one to close the device.
    pub(super) fn begin_closing(&self) -> bool {
        !self.closing.replace(true)
    }

    pub(super) fn set_closed(&self) {
        self.closed.set(true);
        self.wake();
    }

    pub(super) fn set_stopped(&self) {
        self.stopped.set(true);
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.get()
    }

    /// Waits until the device is closed.
    pub(super) async fn until_closed(self: &Rc<Self>) {
        let mut place = Place { board: self.clone(), key: None };
        poll_fn(|cx| {
            place.register(cx);
            if self.closed.get() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    fn requested(&self, deadline: Option<Instant>) {
        self.requests.set(self.requests.get() + 1);
        self.deadline.set(deadline);
        self.wake();
    }

    fn failed(&self) {
        self.errors.set(self.errors.get() + 1);
        self.wake();
    }

    fn wake(&self) {
        let wakers: Vec<_> = self.listeners.borrow().iter().map(|(_, waker)| waker.clone()).collect();
        wakers.into_iter().for_each(Waker::wake);
    }
}

/// A place among those that a board wakes.
struct Place {
    board: Rc<Board>,
    key: Option<usize>,
}

impl Place {
    fn register(&mut self, cx: &Context<'_>) {
        let mut listeners = self.board.listeners.borrow_mut();
        match self.key {
            Some(key) => listeners[key].clone_from(cx.waker()),
            None => self.key = Some(listeners.insert(cx.waker().clone())),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let waker = self.key.and_then(|key| self.board.listeners.borrow_mut().try_remove(key));
        // Not while the list is borrowed: with the waker a task may go that waits as well.
        drop(waker);
    }
}

/// A device's events from now on, and the removal request that was there before: from [`Device::events`].
///
/// Several of a kind that come before the stream is looked at are one item; no kind is left out. After [`Event::Gone`] it ends. It
/// does not keep the device open.
pub struct Events {
    place: Place,
    changes: StateChanges,
    requests: u64,
    errors: u64,
    generation: u64,
    /// The state has become one in which there is nothing to tell but the end.
    gone: bool,
    ended: bool,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").field("ended", &self.ended).finish_non_exhaustive()
    }
}

impl Events {
    fn new(board: &Rc<Board>, gate: &Arc<Gate>) -> Self {
        let changes = StateChanges::new(gate);
        Self {
            place: Place { board: board.clone(), key: None },
            changes,
            requests: 0,
            errors: board.errors.get(),
            generation: gate.generation(),
            gone: gate.is_gone(),
            ended: false,
        }
    }
}

impl Stream for Events {
    type Item = Event;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        this.place.register(cx);
        let board = &this.place.board;
        if this.requests != board.requests.get() {
            this.requests = board.requests.get();
            return Poll::Ready(Some(Event::RemovalRequested { deadline: board.deadline.get() }));
        }
        if this.errors != board.errors.get() {
            this.errors = board.errors.get();
            return Poll::Ready(Some(Event::Error));
        }
        while !this.gone {
            match Pin::new(&mut this.changes).poll_next(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => this.gone = true,
                Poll::Ready(Some(change)) => {
                    this.generation = change.generation;
                    match change.state {
                        State::Gone => this.gone = true,
                        State::Live => return Poll::Ready(Some(Event::Restored { generation: change.generation })),
                        state => return Poll::Ready(Some(Event::Revoked(state))),
                    }
                }
            }
        }
        // Whose device is taken away hears of the end when that is done.
        if board.closing.get() && !board.closed.get() {
            return Poll::Pending;
        }
        this.ended = true;
        Poll::Ready(Some(Event::Gone))
    }
}

impl Device {
    /// What becomes of the device: removal requests and errors, where the kernel tells of them (both interrupts are taken for this),
    /// and its state. Each call gives a listener of its own, that hears of everything.
    ///
    /// ```no_run
    /// use futures::StreamExt;
    /// use vfio_uring::device::{Device, Event};
    ///
    /// # async fn doc(device: Device) {
    /// let mut events = device.events();
    /// while let Some(event) = events.next().await {
    ///     match event {
    ///         Event::RemovalRequested { .. } => {
    ///             // Finish what is under way, then:
    ///             device.close().await;
    ///         }
    ///         Event::Gone => println!("it is gone"),
    ///         event => println!("{event:?}"),
    ///     }
    /// }
    /// # }
    /// ```
    pub fn events(&self) -> Events {
        Events::new(&self.inner.board, &self.inner.gate)
    }
}

/// What the kernel signals besides interrupts.
#[derive(Default)]
pub(super) struct Signals {
    request: Option<Arc<OwnedFd>>,
    error: Option<Arc<OwnedFd>>,
}

impl Signals {
    /// Has the kernel signal what it can. System calls that may wait.
    pub(super) fn bind(device: &DeviceFd, irqs: &[IrqInfo]) -> Self {
        let bind = |irq: Irq| {
            irqs.get(irq as usize).filter(|info| info.count != 0)?;
            match eventfd_of(device, irq) {
                Ok(fd) => Some(Arc::new(fd)),
                Err(error) => {
                    tracing::warn!(?irq, %error, "the device's events are not told");
                    None
                }
            }
        };
        Self { request: bind(Irq::Request), error: bind(Irq::Error) }
    }
}

fn eventfd_of(device: &DeviceFd, irq: Irq) -> Result<OwnedFd> {
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|errno| Error::io("making an eventfd for a device's events; raise ulimit -n", errno))?;
    device.set_irqs_eventfds(irq as u32, 0, &[Some(fd.as_fd())])?;
    Ok(fd)
}

/// What a watch has seen.
enum Seen {
    Request,
    Error,
    GraceOver,
    Ended,
}

/// Watches a device of the kernel until it is gone. Does not keep it.
pub(super) async fn watch(device: Weak<Inner>, gate: Arc<Gate>, board: Rc<Board>, signals: Signals, policy: RemovalPolicy) {
    let poll = |fd: Option<Arc<OwnedFd>>| fd.map(|fd| op::poll_multishot(&fd, PollFlags::IN.bits().into()));
    let (mut request, mut error) = (poll(signals.request), poll(signals.error));
    let mut ended = Ended::new(&gate);
    let mut grace: Option<Sleep> = None;
    let mut deadline = None;
    loop {
        let seen = poll_fn(|cx| {
            if Pin::new(&mut ended).poll(cx).is_ready() {
                return Poll::Ready(Seen::Ended);
            }
            if signalled(&mut request, cx) {
                return Poll::Ready(Seen::Request);
            }
            if signalled(&mut error, cx) {
                return Poll::Ready(Seen::Error);
            }
            match grace.as_mut().map(|grace| Pin::new(grace).poll(cx)) {
                Some(Poll::Ready(_)) => Poll::Ready(Seen::GraceOver),
                _ => Poll::Pending,
            }
        });
        match seen.await {
            Seen::Request => {
                if grace.is_none() {
                    deadline = policy.grace.and_then(|grace| Instant::now().checked_add(grace));
                    grace = deadline.map(sleep_until);
                }
                board.requested(deadline);
            }
            Seen::Error => board.failed(),
            Seen::GraceOver => {
                let Some(device) = device.upgrade() else { return };
                let reason = "the kernel asked it back, and it was not closed in time: it was unbound or unplugged";
                // A task of its own: this one ends with the device.
                reactor::spawn(removal::give_up(device, Error::Gone { reason: reason.into() }));
                return;
            }
            Seen::Ended => return,
        }
    }
}

fn signalled(signal: &mut Option<MultishotPoll>, cx: &mut Context<'_>) -> bool {
    match signal.as_mut().map(|signal| Pin::new(signal).poll_next(cx)) {
        Some(Poll::Ready(Some(Ok(_)))) => true,
        Some(Poll::Ready(failed)) => {
            tracing::warn!(?failed, "a device's events can't be watched any more");
            *signal = None;
            false
        }
        Some(Poll::Pending) | None => false,
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt, StreamExt};

    use super::*;

    fn next(events: &mut Events) -> Option<Option<Event>> {
        events.next().now_or_never()
    }

    #[test]
    fn each_listener_hears_of_each_kind_once() {
        let (board, gate) = (Rc::new(Board::default()), Gate::of_user("test"));
        let mut one = Events::new(&board, &gate);
        assert_eq!(next(&mut one), None);
        board.failed();
        board.failed();
        board.requested(None);
        let mut two = Events::new(&board, &gate);
        let request = Event::RemovalRequested { deadline: None };
        assert_eq!((next(&mut one), next(&mut one), next(&mut one)), (Some(Some(request)), Some(Some(Event::Error)), None));
        // What was asked before still holds; the errors are of before.
        assert_eq!((next(&mut two), next(&mut two)), (Some(Some(request)), None));
        board.requested(None);
        assert_eq!((next(&mut one), next(&mut two)), (Some(Some(request)), Some(Some(request))));
    }

    #[test]
    fn the_end_comes_last_and_once() {
        let (board, gate) = (Rc::new(Board::default()), Gate::of_user("test"));
        let mut events = Events::new(&board, &gate);
        board.failed();
        assert!(board.begin_closing() && !board.begin_closing());
        gate.end(Error::Gone { reason: "test".into() });
        assert_eq!(next(&mut events), Some(Some(Event::Error)));
        assert_eq!(next(&mut events), None, "it is not closed yet");
        board.set_closed();
        assert_eq!((next(&mut events), next(&mut events)), (Some(Some(Event::Gone)), Some(None)));
        assert_eq!(next(&mut Events::new(&board, &gate)), Some(Some(Event::Gone)));
        assert!(board.until_closed().now_or_never().is_some());
        drop(events);
        assert!(board.listeners.borrow().is_empty());
    }
}
