//! A namespace for other threads: a handle that is `Send`, and the task by which the reactor that owns the queue serves it.

mod gate;

use std::{
    fmt,
    future::{Future, poll_fn},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
};

use futures::{channel::oneshot, future::LocalBoxFuture};
use vfio_uring::dma::DmaBuf;

use crate::{
    Error, Result,
    namespace::{Io, Namespace, NamespaceInfo},
};
use gate::{Gate, Rest, Ticket};

/// Most requests that the handles of one runner can have under way.
pub const MAX_REMOTE: usize = 1 << 16;

/// A namespace for any thread and any executor. Cloning it is cheap; the clones share one runner and its capacity.
///
/// [`Namespace::remote`] makes it, with the [`RemoteRunner`] that has to run on the reactor that owns the queue. Requests go
/// there through a bounded queue and one wake, and all that came in by one turn of the reactor share a doorbell. Results come
/// back through the waker of whoever awaits them: tokio, `futures::executor::block_on`, or any other.
///
/// **Backpressure.** At most `capacity` requests are under way, from their first poll to the end of their command. Further ones
/// wait in order; each is a future of its caller's, nothing else grows.
///
/// **Every request gets a result.** When the runner is dropped, or its reactor, all that wait get [`Error::NoRunner`]; when
/// the queue ends, [`Error::Ended`]. A reactor that exists but is not run leaves them waiting.
///
/// ```no_run
/// use vfio_uring::{device::{Address, Device}, dma::{HugePages, Pool}, reactor::{self, Reactor}};
/// use vfio_uring_nvme::{Controller, Options};
///
/// let (sender, receiver) = std::sync::mpsc::channel();
/// let owner = std::thread::spawn(move || Reactor::new()?.block_on(async {
///     let device = Device::open(&"vfio-user:/tmp/nvme.sock".parse::<Address>()?).await?;
///     let controller = Controller::new(&device, Options::default()).await?;
///     let (remote, runner) = controller.create_queue(128).await?.namespace(1)?.remote(256)?;
///     let pool = Pool::new(device.dma(), 1 << 20, HugePages::No).await?;
///     let _ = sender.send((remote, pool));
///     // To the last handle's end; `reactor::spawn(runner.run())` where there is more to do.
///     runner.run().await;
///     controller.shutdown().await
/// }));
///
/// let (remote, pool) = receiver.recv()?;
/// // On any thread, under any executor:
/// let (result, block) = futures::executor::block_on(remote.read(0, pool.alloc(remote.block_size())?));
/// result?;
/// println!("{:x?}", &block[..16]);
/// drop(remote);
/// owner.join().unwrap()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Remote(Arc<Handle>);

/// What the clones of a handle, and their requests, share.
struct Handle {
    gate: Arc<Gate<Request>>,
    info: NamespaceInfo,
    capacity: usize,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.gate.desert();
    }
}

impl Remote {
    pub(crate) fn new(ns: Namespace, capacity: usize) -> Result<(Self, RemoteRunner)> {
        if !(1..=MAX_REMOTE).contains(&capacity) {
            return Err(Error::invalid(format!("a remote handle for {capacity} requests: it can have 1 to {MAX_REMOTE}")));
        }
        let gate = Arc::new(Gate::new(capacity));
        let wakers = (0..capacity).map(|index| Waker::from(Arc::new(CommandWaker { gate: gate.clone(), index }))).collect();
        let remote = Self(Arc::new(Handle { gate: gate.clone(), info: *ns.info(), capacity }));
        Ok((remote, RemoteRunner { ns, gate, wakers }))
    }

    /// Reads `buf.len()` bytes from block `lba` on. More than one command may carry are split.
    ///
    /// The buffer comes from a [`Pool`](vfio_uring::dma::Pool) of the device, which is `Send` as well. It goes with the request
    /// and comes back with its result; an empty one comes back in its place where the controller may still write it.
    ///
    /// A future that is dropped after its first poll leaves its request: one that the runner has not taken yet is skipped, a
    /// command under way runs on. Either way the buffer returns to its pool when nothing uses it any more.
    ///
    /// # Errors
    /// As of [`Namespace::read`], and [`Error::NoRunner`]. Of a command that was under way it is not known then whether it was
    /// executed.
    pub fn read(&self, lba: u64, buf: DmaBuf) -> RemoteIo {
        RemoteIo(self.call(Work::Read, lba, Some(buf)))
    }

    /// Writes `buf` to block `lba` and on, as [`Remote::read`] reads.
    pub fn write(&self, lba: u64, buf: DmaBuf) -> RemoteIo {
        RemoteIo(self.call(Work::Write, lba, Some(buf)))
    }

    /// Makes durable what was written: all writes whose results are there.
    ///
    /// # Errors
    /// As of [`Namespace::flush`], and [`Error::NoRunner`].
    pub fn flush(&self) -> impl Future<Output = Result<()>> + Send + use<> {
        let mut call = self.call(Work::Flush, 0, None);
        async move { poll_fn(|cx| call.poll(cx)).await.0 }
    }

    /// Blocks of the namespace.
    pub fn blocks(&self) -> u64 {
        self.0.info.blocks
    }

    /// Bytes in a block.
    pub fn block_size(&self) -> usize {
        self.0.info.block_size as usize
    }

    /// Requests that can be under way at once.
    pub fn capacity(&self) -> usize {
        self.0.capacity
    }

    /// Requests that would not have to wait in line now: 0 tells a service to shed load. Other threads change it at any time.
    pub fn available(&self) -> usize {
        self.0.gate.free()
    }

    fn call(&self, work: Work, lba: u64, buf: Option<DmaBuf>) -> Call {
        let (sender, answer) = oneshot::channel();
        let request = Request { work, lba, buf, sender: Some(sender) };
        Call { answer, request: Some(request), place: Place { handle: self.0.clone(), ticket: None } }
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remote").field("info", &self.0.info).field("capacity", &self.0.capacity).finish_non_exhaustive()
    }
}

/// The future of a read or write through a [`Remote`]. It is `Send`, borrows nothing, and keeps its runner running.
///
/// ```no_run
/// # fn several(remote: vfio_uring_nvme::Remote, pool: vfio_uring::dma::Pool) -> Result<(), Box<dyn std::error::Error>> {
/// // Both are under way at once.
/// let (one, other) = (remote.read(0, pool.alloc(4096)?), remote.read(8, pool.alloc(4096)?));
/// let ((one, first), (other, _)) = futures::executor::block_on(futures::future::join(one, other));
/// one.and(other)?;
/// println!("{:x?}", &first[..16]);
/// # Ok(()) }
/// ```
#[must_use = "a request is made when it is first polled"]
pub struct RemoteIo(Call);

impl Future for RemoteIo {
    type Output = (Result<()>, DmaBuf);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll(cx).map(|answer| match answer {
            (result, Some(buf)) => (result, buf),
            (_, None) => unreachable!("the answer to a transfer has a buffer"),
        })
    }
}

impl fmt::Debug for RemoteIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let made = self.0.request.is_none();
        f.debug_struct("RemoteIo").field("made", &made).field("ticket", &self.0.place.ticket).finish_non_exhaustive()
    }
}

/// A caller's side of a request.
struct Call {
    /// Dropped first: what happens to the request of a caller who leaves wakes nobody.
    answer: oneshot::Receiver<Answer>,
    /// Until the first poll.
    request: Option<Request>,
    place: Place,
}

/// A place in the line, from which the request may have gone on meanwhile.
struct Place {
    handle: Arc<Handle>,
    ticket: Option<Ticket>,
}

/// How a request ended; with the buffer of a transfer.
type Answer = (Result<()>, Option<DmaBuf>);

impl Call {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Answer> {
        if let Some(request) = self.request.take() {
            self.place.ticket = self.place.handle.gate.enter(request);
        }
        Pin::new(&mut self.answer).poll(cx).map(|answer| {
            self.place.ticket = None;
            answer.expect("a future is not polled after its end")
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            drop(self.handle.gate.leave(ticket));
        }
    }
}

enum Work {
    Read,
    Write,
    Flush,
}

/// A request on its way. Dropped anywhere, it is answered.
struct Request {
    work: Work,
    lba: u64,
    /// Not while a command has it.
    buf: Option<DmaBuf>,
    /// Until the answer.
    sender: Option<oneshot::Sender<Answer>>,
}

impl Request {
    fn answer(&mut self, result: Result<()>, buf: Option<DmaBuf>) {
        if let Some(sender) = self.sender.take() {
            // Nobody may wait for it any more: then the buffer goes to its pool.
            drop(sender.send((result, buf)));
        }
    }

    /// Whether its caller has gone.
    fn is_left(&self) -> bool {
        self.sender.as_ref().is_none_or(oneshot::Sender::is_canceled)
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        let buf = self.buf.take();
        self.answer(Err(Error::NoRunner), buf);
    }
}

/// Marks a command of the runner as woken. The queue's poller calls it, or whoever has the waker.
struct CommandWaker {
    gate: Arc<Gate<Request>>,
    index: usize,
}

impl Wake for CommandWaker {
    fn wake(self: Arc<Self>) {
        self.gate.wake(self.index);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.gate.wake(self.index);
    }
}

/// Serves the clones of a [`Remote`]: [`RemoteRunner::run`] has to run on the reactor that owns the queue. Dropped, it answers
/// all that wait with [`Error::NoRunner`].
///
/// ```no_run
/// # async fn serve(ns: vfio_uring_nvme::Namespace) -> vfio_uring_nvme::Result<vfio_uring_nvme::Remote> {
/// let (remote, runner) = ns.remote(64)?;
/// vfio_uring::reactor::spawn(runner.run());
/// # Ok(remote) }
/// ```
#[must_use = "without its runner, no request of the handle gets on"]
pub struct RemoteRunner {
    ns: Namespace,
    gate: Arc<Gate<Request>>,
    wakers: Box<[Waker]>,
}

impl RemoteRunner {
    /// Serves until the last handle and the last future of one are gone, and the last command is done. When the queue ends,
    /// requests are answered with its error.
    pub async fn run(self) {
        let mut desk = Desk {
            runner: &self,
            commands: self.wakers.iter().map(|_| None).collect(),
            free: (0..self.wakers.len()).rev().collect(),
        };
        poll_fn(|cx| {
            desk.gate().take_woken(|index| desk.poll_command(index));
            desk.take_requests();
            // What is left of this turn, or came in meanwhile, has its turn after the doorbell.
            match desk.gate().rest(cx.waker()) {
                Rest::Deserted if desk.is_idle() => return Poll::Ready(()),
                Rest::Busy => cx.waker().wake_by_ref(),
                Rest::Deserted | Rest::Asleep => {}
            }
            Poll::Pending
        })
        .await;
    }
}

impl Drop for RemoteRunner {
    fn drop(&mut self) {
        self.gate.close();
    }
}

impl fmt::Debug for RemoteRunner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteRunner").field("ns", &self.ns).field("capacity", &self.wakers.len()).finish()
    }
}

/// What a runner has under way: a place for each permit.
struct Desk<'a> {
    runner: &'a RemoteRunner,
    commands: Box<[Option<Command<'a>>]>,
    /// Places without a command.
    free: Vec<usize>,
}

impl<'a> Desk<'a> {
    fn gate(&self) -> &'a Gate<Request> {
        &self.runner.gate
    }

    fn is_idle(&self) -> bool {
        self.free.len() == self.commands.len()
    }

    /// Starts what was asked for, at most as many as there are permits.
    fn take_requests(&mut self) {
        for _ in 0..self.commands.len() {
            let Some(request) = self.gate().next() else { return };
            if request.is_left() {
                drop(request);
                self.gate().done();
                continue;
            }
            // There is a place for each permit.
            let Some(index) = self.free.pop() else { return };
            self.commands[index] = Some(Command::new(&self.runner.ns, request));
            self.poll_command(index);
        }
    }

    /// Polls a command, if there is one: wakes may come late.
    fn poll_command(&mut self, index: usize) {
        let place = &mut self.commands[index];
        let Some(command) = place else { return };
        let Poll::Ready((result, buf)) = command.poll(&mut Context::from_waker(&self.runner.wakers[index])) else { return };
        let Some(mut command) = place.take() else { return };
        self.free.push(index);
        self.gate().done();
        command.request.answer(result, buf);
    }
}

/// A request under way, in a place of the desk.
struct Command<'a> {
    request: Request,
    doing: Doing<'a>,
}

enum Doing<'a> {
    Transfer(Io<'a>),
    Flush(LocalBoxFuture<'a, Result<()>>),
}

impl<'a> Command<'a> {
    fn new(ns: &'a Namespace, mut request: Request) -> Self {
        let doing = match (&request.work, request.buf.take()) {
            (Work::Read, Some(buf)) => Doing::Transfer(ns.read(request.lba, buf)),
            (Work::Write, Some(buf)) => Doing::Transfer(ns.write(request.lba, buf)),
            (Work::Flush, _) | (_, None) => Doing::Flush(Box::pin(ns.flush())),
        };
        Self { request, doing }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Answer> {
        match &mut self.doing {
            Doing::Transfer(io) => Pin::new(io).poll(cx).map(|(result, buf)| (result, Some(buf))),
            Doing::Flush(flush) => flush.as_mut().poll(cx).map(|result| (result, None)),
        }
    }
}

impl Drop for Command<'_> {
    /// The runner goes: what can be given back of the buffer is.
    fn drop(&mut self) {
        if let Doing::Transfer(io) = &mut self.doing {
            self.request.buf = io.give_up();
        }
    }
}
