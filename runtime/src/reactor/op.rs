//! Operations on the ring: futures that own their buffers and descriptors until the completion.
//!
//! Every future here may be dropped at any time: the operation is cancelled, and what it uses is kept until the kernel is
//! done with it. Bytes that a dropped read or receive had already taken are lost.

use std::{
    cell::Cell,
    future::Future,
    io,
    os::fd::{AsRawFd, OwnedFd},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
};

use io_uring::{opcode, squeue, types};

use super::{
    Local, current,
    message::{Message, to_io},
    ring::{OpId, Owned},
    task::TaskRef,
};
pub use super::{
    message::{MAX_FDS, Received},
    watch::{MultishotPoll, poll_multishot},
};

/// A one-shot operation under way.
struct Op {
    local: Rc<Local>,
    id: Cell<Option<OpId>>,
}

impl Op {
    /// # Safety
    /// As for `Ring::start`.
    unsafe fn start(fd: &Arc<OwnedFd>, owned: Owned, entry: impl FnOnce(types::Fd, &mut Owned) -> squeue::Entry) -> Self {
        let local = current("a ring operation");
        let target = types::Fd(fd.as_raw_fd());
        // SAFETY: the caller's promise; the slot holds the descriptor.
        let id = unsafe { local.ring.borrow_mut().start(Some(fd.clone()), owned, false, |owned| entry(target, owned)) };
        Self { local, id: Cell::new(Some(id)) }
    }
}

impl Future for Op {
    type Output = (io::Result<usize>, Owned);

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let id = self.id.get().expect("an operation is not polled after its end");
        let Some((result, owned)) = self.local.ring.borrow_mut().take(id, TaskRef::current(cx)) else {
            return Poll::Pending;
        };
        self.id.set(None);
        Poll::Ready((to_io(result), owned))
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        if let Some(id) = self.id.get() {
            self.local.ring.borrow_mut().orphan(id);
        }
    }
}

fn buffer(owned: Owned) -> Vec<u8> {
    match owned {
        Owned::Buffer(buffer) => buffer,
        Owned::Message(message) => message.into_bytes(),
        Owned::Nothing | Owned::Counter(_) => Vec::new(),
    }
}

/// Reads up to `buf.len()` bytes at `offset` of a file or device.
///
/// # Panics
/// Like every operation here: outside of a reactor.
pub async fn read_at(fd: &Arc<OwnedFd>, buf: Vec<u8>, offset: u64) -> (io::Result<usize>, Vec<u8>) {
    let entry = |fd, owned: &mut Owned| {
        let Owned::Buffer(buf) = owned else { unreachable!("the slot was given a buffer") };
        opcode::Read::new(fd, buf.as_mut_ptr(), buf.len() as u32).offset(offset).build()
    };
    // SAFETY: the entry points to the heap of the slot's buffer.
    let (result, owned) = unsafe { Op::start(fd, Owned::Buffer(buf), entry) }.await;
    (result, buffer(owned))
}

/// Writes up to `buf.len()` bytes at `offset` of a file or device.
pub async fn write_at(fd: &Arc<OwnedFd>, buf: Vec<u8>, offset: u64) -> (io::Result<usize>, Vec<u8>) {
    let entry = |fd, owned: &mut Owned| {
        let Owned::Buffer(buf) = owned else { unreachable!("the slot was given a buffer") };
        opcode::Write::new(fd, buf.as_ptr(), buf.len() as u32).offset(offset).build()
    };
    // SAFETY: the entry points to the heap of the slot's buffer.
    let (result, owned) = unsafe { Op::start(fd, Owned::Buffer(buf), entry) }.await;
    (result, buffer(owned))
}

/// Waits until one of the poll(2) `events` is there; gives those that are.
pub async fn poll(fd: &Arc<OwnedFd>, events: u32) -> io::Result<u32> {
    // SAFETY: a poll points to nothing.
    let op = unsafe { Op::start(fd, Owned::Nothing, |fd, _| opcode::PollAdd::new(fd, events).build()) };
    op.await.0.map(|events| events as u32)
}

/// Reads the counter of an eventfd, which resets it; waits while it is 0.
pub async fn eventfd_count(fd: &Arc<OwnedFd>) -> io::Result<u64> {
    let entry = |fd, owned: &mut Owned| {
        let Owned::Counter(count) = owned else { unreachable!("the slot was given a counter") };
        opcode::Read::new(fd, std::ptr::from_mut(&mut **count).cast(), 8).build()
    };
    // SAFETY: the entry points to the slot's boxed counter.
    let (result, owned) = unsafe { Op::start(fd, Owned::Counter(Box::new(0)), entry) }.await;
    match (result?, owned) {
        (8, Owned::Counter(count)) => Ok(*count),
        (n, _) => Err(io::Error::other(format!("an eventfd gave {n} bytes where 8 are due"))),
    }
}

/// Sends `bytes` with descriptors on a socket, in one `sendmsg`; fewer bytes may go out than were given.
pub async fn send(fd: &Arc<OwnedFd>, bytes: Vec<u8>, fds: Vec<Arc<OwnedFd>>) -> (io::Result<usize>, Vec<u8>) {
    if fds.len() > MAX_FDS {
        return (Err(io::Error::new(io::ErrorKind::InvalidInput, "more than 253 descriptors in a message")), bytes);
    }
    let entry = |fd, owned: &mut Owned| {
        let Owned::Message(message) = owned else { unreachable!("the slot was given a message") };
        opcode::SendMsg::new(fd, message.header()).flags(libc::MSG_NOSIGNAL as u32).build()
    };
    // SAFETY: the entry points to the slot's boxed message, which points to its own heap.
    let (result, owned) = unsafe { Op::start(fd, Owned::Message(Message::outgoing(bytes, fds)), entry) }.await;
    (result, buffer(owned))
}

/// Receives up to `buf.len()` bytes and `max_fds` descriptors from a socket, in one `recvmsg`.
pub async fn recv(fd: &Arc<OwnedFd>, buf: Vec<u8>, max_fds: usize) -> (io::Result<Received>, Vec<u8>) {
    let entry = |fd, owned: &mut Owned| {
        let Owned::Message(message) = owned else { unreachable!("the slot was given a message") };
        opcode::RecvMsg::new(fd, message.header()).flags(libc::MSG_CMSG_CLOEXEC as u32).build()
    };
    // SAFETY: as in `send`.
    let (result, owned) = unsafe { Op::start(fd, Owned::Message(Message::incoming(buf, max_fds)), entry) }.await;
    match owned {
        Owned::Message(mut message) => (result.map(|n| message.received(n)), message.into_bytes()),
        owned => (result.and(Err(io::ErrorKind::InvalidData.into())), buffer(owned)),
    }
}
