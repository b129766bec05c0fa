//! The socket of a connection, and who waits for what on it: one runner task sends, receives, and watches the deadlines.
//!
//! Commands wait in one queue, first come, first served, until fewer than the agreed number are in flight. Each goes out in
//! one `sendmsg`. The server's own commands are answered one at a time before the next message is read.

mod io;

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, VecDeque},
    fmt,
    future::{Future, poll_fn},
    os::fd::OwnedFd,
    pin::{Pin, pin},
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use futures::channel::oneshot;
use slab::Slab;

use super::{
    protocol::{self, Expect},
    wire::{RegionAccess, command},
};
use crate::{
    Error, Result,
    device::gate::{Access, Gate},
    dma::WeakAddressSpace,
};

/// The reply to a command.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// Who gets the reply.
enum Answer {
    Caller(oneshot::Sender<Result<Reply>>),
    Posted(Rc<PostedWrite>),
    /// Nobody waits; what was wrong is only logged.
    Nobody,
}

struct Outgoing {
    bytes: Vec<u8>,
    fds: Vec<Arc<OwnedFd>>,
    expect: Expect,
    answer: Answer,
}

struct InFlight {
    expect: Expect,
    answer: Answer,
    until: Instant,
}

/// A register whose newest value is written by messages, at most one of them at a time.
#[derive(Debug)]
pub(crate) struct PostedWrite {
    access: RegionAccess,
    value: Cell<u64>,
    state: Cell<Posting>,
    error: RefCell<Option<Error>>,
    gate: Arc<Gate>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Posting {
    Idle,
    Queued,
    InFlight,
    /// In flight with a value that is not the newest.
    Stale,
}

impl PostedWrite {
    pub(crate) fn new(region: u32, offset: u64, width: usize, gate: &Arc<Gate>) -> Rc<Self> {
        let access = RegionAccess { offset: offset.into(), region: region.into(), count: (width as u32).into() };
        let (value, state, error) = (Cell::new(0), Cell::new(Posting::Idle), RefCell::default());
        Rc::new(Self { access, value, state, error, gate: gate.clone() })
    }

    /// The error of the last write that was refused, once.
    pub(crate) fn take_error(&self) -> Option<Error> {
        self.error.take()
    }

    fn message(&self) -> Vec<u8> {
        let width = self.access.count.get() as usize;
        protocol::message(command::REGION_WRITE, &self.access, &self.value.get().to_le_bytes()[..width.min(8)])
    }
}

pub(crate) struct Link {
    fd: Arc<OwnedFd>,
    peer: String,
    /// How long an answer may take from the sending of its command.
    pub(super) deadline: Duration,
    pub(super) max_outstanding: Cell<usize>,
    queue: RefCell<VecDeque<Outgoing>>,
    /// Sent commands by message id. An id stays taken until its reply, even when nobody waits for that any more.
    in_flight: RefCell<BTreeMap<u16, InFlight>>,
    next_id: Cell<u16>,
    /// The reply to a command of the server, until it has been sent.
    reply: RefCell<Option<Vec<u8>>>,
    replying: Cell<bool>,
    /// By when the message that is being sent or received must be through.
    sending: Cell<Option<Instant>>,
    receiving: Cell<Option<Instant>>,
    /// A deadline earlier than the one that the watch sleeps for.
    rewatch: Cell<bool>,
    watched: Cell<Option<Instant>>,
    space: RefCell<Option<WeakAddressSpace>>,
    gate: RefCell<Option<Arc<Gate>>>,
    ended: Cell<bool>,
    cause: RefCell<Option<Error>>,
    runner: RefCell<Option<Waker>>,
    gone: RefCell<Slab<Waker>>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("peer", &self.peer).field("ended", &self.ended).finish_non_exhaustive()
    }
}

impl Link {
    pub(super) fn new(fd: OwnedFd, peer: String, deadline: Duration) -> Rc<Self> {
        Rc::new(Self {
            fd: Arc::new(fd),
            peer,
            deadline,
            max_outstanding: Cell::new(1),
            queue: RefCell::default(),
            in_flight: RefCell::default(),
            next_id: Cell::new(0),
            reply: RefCell::default(),
            replying: Cell::new(false),
            sending: Cell::new(None),
            receiving: Cell::new(None),
            rewatch: Cell::new(false),
            watched: Cell::new(None),
            space: RefCell::default(),
            gate: RefCell::default(),
            ended: Cell::new(false),
            cause: RefCell::default(),
            runner: RefCell::default(),
            gone: RefCell::default(),
        })
    }

    /// The memory that DMA_READ and DMA_WRITE of the server reach.
    pub(super) fn serve(&self, space: WeakAddressSpace) {
        self.space.replace(Some(space));
    }

    /// The gate that is shut for ever when the connection ends.
    pub(super) fn shut_with_it(&self, gate: &Arc<Gate>) {
        self.gate.replace(Some(gate.clone()));
        if let Some(cause) = self.cause() {
            gate.end(cause);
        }
    }

    /// Why the connection has ended.
    pub(super) fn cause(&self) -> Option<Error> {
        if self.ended.get() { self.cause.borrow().clone() } else { None }
    }

    pub(super) fn is_gone(&self) -> bool {
        self.ended.get()
    }

    /// What a request gets that comes after the end.
    fn gone_error(&self) -> Error {
        match &*self.cause.borrow() {
            Some(gone @ Error::Gone { .. }) => gone.clone(),
            Some(cause) => Error::Gone { reason: cause.to_string().into() },
            None => Error::Gone { reason: format!("the connection to {} has ended", self.peer).into() },
        }
    }

    /// Ends the connection: all who wait get `cause`, all who come later learn that it is gone.
    pub(super) fn fail(&self, cause: Error) {
        if self.ended.replace(true) {
            return;
        }
        if !matches!(cause, Error::Gone { .. }) {
            tracing::warn!(peer = self.peer, %cause, "the connection is given up");
        }
        self.cause.replace(Some(cause.clone()));
        // Before anybody learns of the end: whoever does finds the device gone.
        if let Some(gate) = &*self.gate.borrow() {
            gate.end(cause.clone());
        }
        // The peer learns of it now, not when the last operation has let go of the socket.
        let _ = rustix::net::shutdown(&*self.fd, rustix::net::Shutdown::Both);
        let queued = self.queue.take().into_iter().map(|outgoing| outgoing.answer);
        let in_flight = self.in_flight.take().into_values().map(|call| call.answer);
        for answer in in_flight.chain(queued) {
            if let Answer::Caller(caller) = answer {
                let _ = caller.send(Err(cause.clone()));
            }
        }
        for (_, waker) in self.gone.take() {
            waker.wake();
        }
        self.kick();
        let space = self.space.borrow().as_ref().and_then(WeakAddressSpace::upgrade);
        if let Some(space) = space {
            space.disconnected();
        }
    }

    /// Hands a fault over that was found in a reply's payload: it ends the connection.
    pub(super) fn checked<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(fault @ Error::DeviceFault { .. }) = &result {
            self.fail(fault.clone());
        }
        result
    }

    /// Ends when the connection does.
    pub(super) fn until_gone(self: &Rc<Self>) -> UntilGone {
        UntilGone { link: self.clone(), key: None }
    }

    fn kick(&self) {
        if let Some(runner) = &*self.runner.borrow() {
            runner.wake_by_ref();
        }
    }

    /// Sends a command and waits for its reply. Dropped before it is sent, it is not sent; dropped later, its effects happen
    /// and its reply is thrown away.
    pub(super) async fn request(&self, bytes: Vec<u8>, fds: Vec<Arc<OwnedFd>>, expect: Expect) -> Result<Reply> {
        let (caller, reply) = oneshot::channel();
        self.push(Outgoing { bytes, fds, expect, answer: Answer::Caller(caller) })?;
        reply.await.unwrap_or_else(|_| Err(self.gone_error()))
    }

    /// Queues a command that nobody waits for.
    pub(super) fn request_detached(&self, bytes: Vec<u8>, expect: Expect) {
        let _ = self.push(Outgoing { bytes, fds: Vec::new(), expect, answer: Answer::Nobody });
    }

    /// Writes `value` to a register by and by; a newer value may overtake it.
    pub(super) fn post(&self, write: &Rc<PostedWrite>, value: u64) {
        write.value.set(value);
        match write.state.get() {
            Posting::Idle => self.post_again(write.clone()),
            Posting::InFlight => write.state.set(Posting::Stale),
            Posting::Queued | Posting::Stale => {}
        }
    }

    fn post_again(&self, write: Rc<PostedWrite>) {
        // Messages are sent in their order: one that is queued here comes before the reset, or the gate is closed already.
        if let Err(error) = write.gate.enter(Access::Memory) {
            write.error.replace(Some(error));
            write.state.set(Posting::Idle);
            return;
        }
        write.state.set(Posting::Queued);
        let expect = Expect::exactly(command::REGION_WRITE, size_of::<RegionAccess>());
        let _ = self.push(Outgoing { bytes: Vec::new(), fds: Vec::new(), expect, answer: Answer::Posted(write) });
    }

    fn push(&self, outgoing: Outgoing) -> Result<()> {
        if self.ended.get() {
            return Err(self.gone_error());
        }
        self.queue.borrow_mut().push_back(outgoing);
        self.kick();
        Ok(())
    }

    /// The runner: ends with the connection. Dropped before that, as with its reactor, it ends the connection.
    pub(super) async fn run(self: Rc<Self>) {
        struct End(Rc<Link>);
        impl Drop for End {
            fn drop(&mut self) {
                let reason = format!("the reactor that ran the connection to {} has ended", self.0.peer);
                self.0.fail(Error::Gone { reason: reason.into() });
            }
        }
        let end = End(self);
        let link = &*end.0;
        let mut receive = pin!(link.receive_all());
        let mut send = pin!(link.send_all());
        let mut watch = pin!(link.watch());
        let cause = poll_fn(|cx| {
            if !link.runner.borrow().as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                link.runner.replace(Some(cx.waker().clone()));
            }
            if link.ended.get() {
                return Poll::Ready(None);
            }
            // The order matters: a reply makes room for a command, and a command sent makes a deadline to watch.
            for part in [receive.as_mut() as Pin<&mut dyn Future<Output = Error>>, send.as_mut(), watch.as_mut()] {
                if let Poll::Ready(cause) = part.poll(cx) {
                    return Poll::Ready(Some(cause));
                }
            }
            Poll::Pending
        })
        .await;
        if let Some(cause) = cause {
            link.fail(cause);
        }
    }
}

/// Ends when the connection does, with the cause.
#[derive(Debug)]
pub(crate) struct UntilGone {
    link: Rc<Link>,
    key: Option<usize>,
}

impl Future for UntilGone {
    type Output = Error;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Error> {
        if let Some(cause) = self.link.cause() {
            self.key = None;
            return Poll::Ready(cause);
        }
        let mut waiting = self.link.gone.borrow_mut();
        match self.key {
            Some(key) => waiting[key].clone_from(cx.waker()),
            None => {
                let key = waiting.insert(cx.waker().clone());
                drop(waiting);
                self.key = Some(key);
            }
        }
        Poll::Pending
    }
}

impl Drop for UntilGone {
    fn drop(&mut self) {
        if let Some(key) = self.key
            && !self.link.ended.get()
        {
            self.link.gone.borrow_mut().try_remove(key);
        }
    }
}
