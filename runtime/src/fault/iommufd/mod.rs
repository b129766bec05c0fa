//! Page requests through iommufd (Linux 6.11).
//!
//! An [`IommufdFaultQueue`] is the stream over a fault object, whatever is attached to it. [`Faults`] is what an application uses:
//! a device that is attached to a page table with a queue, and the right way to part them again.
//!
//! Only page requests arrive (PRI, SMMU stall). An access that can't be resolved never does: it is in the kernel's log, or a
//! [virtual event](super::veventq). Nothing is lost: a device has a number of requests that it may have open, and waits.
//!
//! Source: `include/uapi/linux/iommufd.h`, `drivers/iommu/iommufd/eventq.c`.

mod faults;
mod records;
mod waiting;

use std::{
    cell::{Cell, RefCell},
    collections::{HashSet, VecDeque},
    fmt,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::Stream;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{self, Errno},
};
use waiting::Waiting;

pub use faults::{Attach, Cdev, Faults};
pub use records::{Group, RECORD_SIZE, RESPONSE_SIZE, parse};

use super::{Answer, FaultGroup, GroupId, next_queue};
use crate::{
    Error, Result,
    reactor::{self, op::MultishotPoll},
    transport::iommufd::{Closed, FaultObject, IommufdFd},
};

/// Records that are read at a time, as long as all groups are shorter.
const FIRST_RECORDS: usize = 64;
/// Reads of what is queued when a queue is closed. What comes later is answered by the kernel when the device is detached.
const DRAIN_READS: usize = 64;
/// Groups that are refused before others get their turn.
const REFUSED_AT_ONCE: usize = 64;
/// Tries to destroy a queue whose descriptor is about to be closed by the ring, a millisecond apart.
const DESTROY_ATTEMPTS: usize = 1000;

/// What a queue takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests of a group; 4096 by default. A longer one ends the stream.
    pub max_requests: usize,
    /// Groups that may wait for their answer; 1024 by default. One that comes when so many wait is answered with
    /// [`Answer::Invalid`] and [counted](Responder::refused).
    pub max_waiting: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_requests: 4096, max_waiting: 1024 }
    }
}

/// The page requests of all devices that are attached to page tables with this queue: a stream that ends with its first error.
///
/// Groups come whole, in the order in which they were complete. Each is to be answered, by [`IommufdFaultQueue::respond`] or a
/// [`Responder`]; the device waits until then.
///
/// Dropping it answers what was not answered with [`Answer::Invalid`], and destroys the queue when no page table uses it any more.
/// The kernel can't: to a device that stays attached, a closed queue is one that never answers. [`Faults`] sees to that.
pub struct IommufdFaultQueue {
    shared: Rc<Shared>,
    /// Goes first: the ring holds the descriptor through it.
    watch: Option<MultishotPoll>,
    object: Option<FaultObject>,
    limits: Limits,
    ready: VecDeque<Group>,
    buffer: Vec<u8>,
    /// Nothing was there at the last look; the descriptor is watched.
    drained: bool,
    ended: bool,
}

struct Shared {
    /// `None` when the queue is closed.
    fd: RefCell<Option<Arc<OwnedFd>>>,
    queue: u64,
    waiting: RefCell<Waiting>,
    refused: Cell<u64>,
}

/// Answers groups of a queue while its stream is being read elsewhere. A handle: clones are the same.
#[derive(Clone)]
pub struct Responder(Rc<Shared>);

impl fmt::Debug for IommufdFaultQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IommufdFaultQueue").field("object", &self.object).field("ended", &self.ended).finish_non_exhaustive()
    }
}

impl fmt::Debug for Responder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Responder").field("waiting", &self.0.waiting.borrow().len()).finish_non_exhaustive()
    }
}

impl IommufdFaultQueue {
    /// Makes a queue in the context. Page tables are made with its [id](Self::id).
    ///
    /// # Errors
    /// [`Error::NoReactor`] outside of a reactor, [`Error::Unsupported`] before Linux 6.11, else [`Error::Io`].
    pub fn open(context: &IommufdFd, limits: Limits) -> Result<Self> {
        if !reactor::is_running() {
            return Err(Error::NoReactor { what: "a fault queue" });
        }
        let object = FaultObject::alloc(context)?;
        let fd = object.fd().clone();
        let shared = Rc::new(Shared {
            fd: RefCell::new(Some(fd.clone())),
            queue: next_queue(),
            waiting: RefCell::default(),
            refused: Cell::new(0),
        });
        let max_requests = limits.max_requests.max(1);
        Ok(Self {
            shared,
            // Only that there is something to read: writing is always possible, and would be told of for ever.
            watch: Some(reactor::op::poll_multishot(&fd, PollFlags::IN.bits().into())),
            object: Some(object),
            limits: Limits { max_requests, ..limits },
            ready: VecDeque::new(),
            buffer: vec![0; FIRST_RECORDS.min(max_requests) * RECORD_SIZE],
            drained: false,
            ended: false,
        })
    }

    /// Its id in the context, for [`Hwpt::alloc`](crate::transport::iommufd::Hwpt::alloc).
    pub fn id(&self) -> u32 {
        self.object.as_ref().map_or(0, FaultObject::id)
    }

    /// A handle that answers groups.
    pub fn responder(&self) -> Responder {
        Responder(self.shared.clone())
    }

    /// [`Responder::respond`].
    ///
    /// # Errors
    /// As there.
    pub fn respond(&self, group: GroupId, answer: Answer) -> Result<()> {
        self.shared.respond(&[(group, answer)])
    }

    /// [`Responder::respond_all`].
    ///
    /// # Errors
    /// As there.
    pub fn respond_all(&self, answers: &[(GroupId, Answer)]) -> Result<()> {
        self.shared.respond(answers)
    }

    /// Groups that wait for their answer.
    pub fn waiting(&self) -> usize {
        self.shared.waiting.borrow().len()
    }

    /// Answers what was read or is queued with [`Answer::Invalid`], and destroys the queue. The page tables with it must be gone:
    /// detach the devices and destroy the tables first.
    ///
    /// # Errors
    /// [`Error::Io`] with EBUSY while a page table uses it. The queue is closed all the same, and stays in its context until that
    /// ends; a device that is still attached stalls at its next page request.
    pub async fn close(mut self) -> Result<()> {
        self.answer_all();
        match self.take_closed() {
            Some(closed) => destroy(closed).await,
            None => Ok(()),
        }
    }

    /// Answers all groups that were read, and those that are queued, with `Invalid`. No more are given out.
    fn answer_all(&mut self) {
        self.ended = true;
        let mut cookies = self.shared.waiting.borrow_mut().take();
        cookies.extend(self.ready.drain(..).map(|group| group.cookie));
        self.shared.answer_invalid(&cookies);
        for _ in 0..DRAIN_READS {
            match self.read() {
                Ok(Some(read)) => self.shared.answer_invalid(&records::cookies(&self.buffer[..read])),
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// Closes the descriptor, as far as it is in our hands: the ring has it for a moment longer.
    fn take_closed(&mut self) -> Option<Closed> {
        self.watch = None;
        self.shared.fd.take();
        self.object.take().map(FaultObject::close_fd)
    }

    /// Closes it, and leaves the object to the end of its context: a page table that uses it could not be destroyed.
    fn leak(mut self) {
        self.answer_all();
        if let Some(closed) = self.take_closed() {
            closed.forget();
        }
    }

    /// Reads what is there; how many bytes. The buffer grows until the first group fits.
    fn read(&mut self) -> Result<Option<usize>> {
        let shared = self.shared.clone();
        let guard = shared.fd.borrow();
        let Some(fd) = guard.as_ref() else { return Ok(None) };
        loop {
            match io::read(fd, &mut self.buffer[..]) {
                // Nothing is there; or, to older kernels, nothing that fits.
                Ok(0) if !readable(fd.as_fd()) => return Ok(None),
                Ok(0) | Err(Errno::INVAL) => self.grow()?,
                Ok(read) if read <= self.buffer.len() => return Ok(Some(read)),
                Ok(read) => return Err(Error::fault(format!("a read of {} bytes gave {read}", self.buffer.len()))),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::io("reading page requests from iommufd", errno)),
            }
        }
    }

    fn grow(&mut self) -> Result<()> {
        let (now, most) = (self.buffer.len() / RECORD_SIZE, self.limits.max_requests);
        if now >= most {
            return Err(Error::Exhausted {
                what: format!(
                    "a group of more than {most} page requests waits in a fault queue of iommufd: raise Limits::max_requests, or \
                     detach the device"
                ),
            });
        }
        self.buffer.resize((now * 2).min(most) * RECORD_SIZE, 0);
        Ok(())
    }

    /// Takes a batch of groups from the kernel; whether there was one.
    fn fill(&mut self) -> Result<bool> {
        let Some(read) = self.read()? else { return Ok(false) };
        match parse(&self.buffer[..read]) {
            Ok(groups) => self.ready.extend(groups),
            Err(error) => {
                // Nobody else would: the kernel holds them to be read.
                self.shared.answer_invalid(&records::cookies(&self.buffer[..read]));
                return Err(error);
            }
        }
        Ok(true)
    }

    fn poll_group(&mut self, cx: &mut Context<'_>) -> Poll<Result<FaultGroup>> {
        let mut refused = 0;
        loop {
            while let Some(group) = self.ready.pop_front() {
                if self.waiting() >= self.limits.max_waiting {
                    if refused == REFUSED_AT_ONCE {
                        self.ready.push_front(group);
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    refused += 1;
                    self.shared.refused.set(self.shared.refused.get() + 1);
                    self.shared.answer_invalid(&[group.cookie]);
                    continue;
                }
                let key = self.shared.waiting.borrow_mut().insert(group.cookie);
                let id = Some(GroupId { queue: self.shared.queue, key });
                let Group { device_id, faults, .. } = group;
                return Poll::Ready(Ok(FaultGroup { lost: None, device_id, faults, id }));
            }
            if self.drained {
                let Some(watch) = self.watch.as_mut() else { return Poll::Pending };
                match ready!(Pin::new(watch).poll_next(cx)) {
                    Some(Ok(_)) => self.drained = false,
                    Some(Err(error)) => return Poll::Ready(Err(Error::io("watching a fault queue of iommufd", error))),
                    None => return Poll::Pending,
                }
            }
            self.drained = !self.fill()?;
        }
    }
}

impl Stream for IommufdFaultQueue {
    type Item = Result<FaultGroup>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        let group = ready!(this.poll_group(cx));
        this.ended = group.is_err();
        Poll::Ready(Some(group))
    }
}

impl Drop for IommufdFaultQueue {
    fn drop(&mut self) {
        if self.object.is_some() {
            self.answer_all();
            let Some(closed) = self.take_closed() else { return };
            destroy_later(closed, "a fault queue", ());
        }
    }
}

impl Responder {
    /// Answers a group of page requests.
    ///
    /// # Errors
    /// [`Error::Invalid`] when nobody waits for this answer: it is of another queue, was given before, or the kernel has answered
    /// since the device was detached. [`Error::Unsupported`] for [`Answer::Failure`], which iommufd does not take: the group still
    /// waits. Else [`Error::Io`].
    pub fn respond(&self, group: GroupId, answer: Answer) -> Result<()> {
        self.0.respond(&[(group, answer)])
    }

    /// Answers several groups with one system call.
    ///
    /// # Errors
    /// As for [`Responder::respond`]. What could be told before the kernel was asked is told for the first wrong one, and none is
    /// answered; where the kernel refuses some, all others are answered, and the first that was refused is told of.
    pub fn respond_all(&self, answers: &[(GroupId, Answer)]) -> Result<()> {
        self.0.respond(answers)
    }

    /// Groups that were answered with [`Answer::Invalid`] unseen, since too many waited.
    pub fn refused(&self) -> u64 {
        self.0.refused.get()
    }
}

impl Shared {
    fn respond(&self, answers: &[(GroupId, Answer)]) -> Result<()> {
        let mut waiting = self.waiting.borrow_mut();
        let (mut responses, mut keys) = (Vec::with_capacity(answers.len()), HashSet::new());
        for (group, answer) in answers {
            let cookie = match group.queue == self.queue {
                true => waiting.cookie(group.key),
                false => {
                    return Err(Error::invalid("an answer to page requests of another fault queue: give it to that one"));
                }
            };
            let Some(cookie) = cookie.filter(|_| keys.insert(group.key)) else {
                return Err(Error::invalid(
                    "an answer to page requests that were answered before, or that the kernel answered when their device was \
                     detached: answer each group once",
                ));
            };
            let invalid = match answer {
                Answer::Success => false,
                Answer::Invalid => true,
                Answer::Failure => {
                    return Err(Error::Unsupported {
                        what: "answering page requests with Failure through iommufd; answer Invalid, and detach the device"
                            .into(),
                    });
                }
            };
            responses.push((group.key, records::response(cookie, invalid)));
        }
        let fd = self.fd.borrow();
        let Some(fd) = fd.as_ref() else {
            return Err(Error::invalid("an answer to a fault queue that is closed, which has answered all"));
        };
        let bytes: Vec<[u8; RESPONSE_SIZE]> = responses.iter().map(|(_, bytes)| *bytes).collect();
        let mut failed = None;
        let mut at = 0;
        while at < bytes.len() {
            match write(fd.as_fd(), &bytes[at..]) {
                Ok(done) => {
                    responses[at..at + done].iter().for_each(|(key, _)| waiting.remove(*key));
                    at += done;
                }
                Err(errno) => {
                    failed.get_or_insert(errno);
                    // It knows no such group: nobody waits.
                    if errno == Errno::INVAL {
                        waiting.remove(responses[at].0);
                    }
                    at += 1;
                }
            }
        }
        match failed {
            None => Ok(()),
            Some(Errno::INVAL) => Err(Error::invalid(
                "an answer to page requests that the kernel has answered, as it does when their device is detached",
            )),
            Some(errno) => Err(Error::io("answering page requests through iommufd", errno)),
        }
    }

    /// Those that the kernel has answered itself are no error.
    fn answer_invalid(&self, cookies: &[u32]) {
        let fd = self.fd.borrow();
        let Some(fd) = fd.as_ref() else { return };
        let responses: Vec<_> = cookies.iter().map(|cookie| records::response(*cookie, true)).collect();
        let mut at = 0;
        while at < responses.len() {
            at += match write(fd.as_fd(), &responses[at..]) {
                Ok(done) => done,
                Err(Errno::INVAL) => 1,
                Err(error) => {
                    tracing::warn!(%error, left = responses.len() - at, "page requests stay without an answer");
                    return;
                }
            };
        }
    }
}

/// Writes responses; how many were taken, at least one.
fn write(fd: BorrowedFd<'_>, responses: &[[u8; RESPONSE_SIZE]]) -> Result<usize, Errno> {
    match io::retry_on_intr(|| io::write(fd, responses.as_flattened())) {
        Ok(written) if written >= RESPONSE_SIZE => Ok((written / RESPONSE_SIZE).min(responses.len())),
        Ok(_) => Err(Errno::IO),
        Err(errno) => Err(errno),
    }
}

fn readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok() && fds[0].revents().contains(PollFlags::IN)
}

/// Destroys an object when the ring has let go of its descriptor.
pub(super) async fn destroy(mut closed: Closed) -> Result<()> {
    for attempt in 1.. {
        match closed.destroy() {
            Ok(()) => break,
            Err((again, error)) if attempt < DESTROY_ATTEMPTS && is_busy(&error) => closed = again,
            Err(failed) => return Err(Closed::leak(failed)),
        }
        reactor::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

fn is_busy(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.raw_os_error() == Some(Errno::BUSY.raw_os_error()))
}

/// [`destroy`] in a task, where there is a reactor. `held` must not go before it.
pub(super) fn destroy_later<T: 'static>(closed: Closed, what: &'static str, held: T) {
    let failed = move |error: Error| tracing::warn!(%error, "{what} stays until its context ends");
    if reactor::is_running() {
        reactor::spawn(async move {
            destroy(closed).await.unwrap_or_else(failed);
            drop(held);
        });
    } else if let Err(error) = closed.destroy().map_err(Closed::leak) {
        failed(error);
    }
}
