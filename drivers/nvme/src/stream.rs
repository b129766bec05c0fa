//! The queue as a completion stream: submitting gives a token, completions come in batches to one task. It carries the peak.

use std::{future::poll_fn, task::Poll};

use vfio_uring::{dma::DmaBuf, reactor::TaskRef};

use crate::{
    Error, Result,
    namespace::Namespace,
    queue::{NONE, Outcome, Owned, State},
    spec::nvm,
};

/// A command of a [`CommandStream`]: what [`Completion::token`] will be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token(u16);

impl Token {
    /// A number below [`CommandStream::capacity`], no other command's while this one is under way: an index for the caller's
    /// own table.
    #[inline]
    pub fn index(self) -> usize {
        self.0.into()
    }
}

/// A command that is done.
#[derive(Debug)]
pub struct Completion {
    /// Which one.
    pub token: Token,
    /// How it ended.
    pub result: Result<()>,
    /// Its buffer.
    pub buf: DmaBuf,
}

/// A command that was not submitted.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Rejected {
    /// Why; [`Error::Full`] when completions have to be taken first.
    pub error: Error,
    /// The buffer, untouched.
    pub buf: DmaBuf,
}

/// A namespace's queue as a completion stream. Dropping it lets what is under way run to its end.
#[derive(Debug)]
pub struct CommandStream {
    ns: Namespace,
}

impl CommandStream {
    pub(crate) fn new(ns: Namespace) -> Result<Self> {
        if ns.queue.stream.taken.replace(true) {
            return Err(Error::Invalid("the queue has a completion stream already".into()));
        }
        Ok(Self { ns })
    }

    /// Commands that can be under way at once.
    pub fn capacity(&self) -> usize {
        self.ns.queue.slots.len()
    }

    /// Commands under way, or done and not taken yet.
    #[inline]
    pub fn in_flight(&self) -> usize {
        self.ns.queue.stream.in_flight.get() as usize
    }

    /// Submits a read of `buf.len()` bytes from block `lba` on; the doorbell follows at the end of the turn.
    ///
    /// # Errors
    /// [`Rejected`] with the buffer: as for [`Namespace::read`], and for more than one command can carry.
    #[inline]
    pub fn submit_read(&self, lba: u64, buf: DmaBuf) -> Result<Token, Rejected> {
        self.submit(nvm::READ, lba, buf)
    }

    /// Submits a write of `buf` to block `lba` and on.
    ///
    /// # Errors
    /// As of [`CommandStream::submit_read`].
    #[inline]
    pub fn submit_write(&self, lba: u64, buf: DmaBuf) -> Result<Token, Rejected> {
        self.submit(nvm::WRITE, lba, buf)
    }

    #[inline]
    fn submit(&self, opcode: u8, lba: u64, buf: DmaBuf) -> Result<Token, Rejected> {
        let (ns, queue) = (&self.ns, &*self.ns.queue);
        let blocks = match ns.check(lba, &buf) {
            Ok(blocks) if buf.len() <= ns.part_len && !queue.dead.get() && queue.permits.try_take() => blocks,
            checked => return Err(self.reject(checked, buf)),
        };
        let (iova, len) = (buf.iova(), buf.len());
        let sqe = ns.sqe(opcode, lba, blocks as usize);
        queue.stream.in_flight.set(queue.stream.in_flight.get() + 1);
        Ok(Token(queue.start(sqe, iova, len, State::Streamed, Owned::Buffer(buf))))
    }

    #[cold]
    fn reject(&self, checked: Result<u64>, buf: DmaBuf) -> Rejected {
        let queue = &self.ns.queue;
        let error = match checked {
            Err(error) => error,
            Ok(_) if queue.dead.get() => queue.end_error(),
            Ok(_) if buf.len() > self.ns.part_len => {
                let (len, most) = (buf.len(), self.ns.part_len);
                Error::Invalid(format!("a transfer of {len} bytes: one command carries {most}, the stream does not split"))
            }
            Ok(_) => Error::Full(queue.slots.len()),
        };
        Rejected { error, buf }
    }

    /// Waits until a command is done, and appends all that are to `to`. Returns at once when nothing is under way.
    ///
    /// # Errors
    /// [`Error::Ended`] when the queue has ended, after what was done before; the buffers of what was under way stay with the
    /// controller.
    pub async fn completions(&self, to: &mut Vec<Completion>) -> Result<()> {
        poll_fn(|cx| {
            let (queue, stream) = (&*self.ns.queue, &self.ns.queue.stream);
            if self.take_listed(to) || stream.in_flight.get() == 0 {
                return Poll::Ready(Ok(()));
            }
            if queue.dead.get() {
                return Poll::Ready(Err(queue.end_error()));
            }
            stream.task.set(TaskRef::current(cx));
            Poll::Pending
        })
        .await
    }

    #[inline]
    fn take_listed(&self, to: &mut Vec<Completion>) -> bool {
        let (queue, stream) = (&*self.ns.queue, &self.ns.queue.stream);
        let mut index = stream.head.replace(NONE);
        if index == NONE {
            return false;
        }
        stream.tail.set(NONE);
        let mut taken = 0;
        while index != NONE {
            let slot = &queue.slots[usize::from(index)];
            let next = slot.next.get();
            if let Owned::Buffer(buf) = slot.owned.take() {
                let result = Outcome { status: slot.status.get(), result: 0 }.into_result().map(drop);
                to.push(Completion { token: Token(index), result, buf });
            }
            queue.free_slot(index);
            taken += 1;
            index = next;
        }
        stream.in_flight.set(stream.in_flight.get() - taken);
        true
    }
}

impl Drop for CommandStream {
    fn drop(&mut self) {
        self.take_listed(&mut Vec::new());
        let queue = &self.ns.queue;
        for slot in queue.slots.iter().filter(|slot| slot.state.get() == State::Streamed) {
            slot.state.set(State::Orphaned);
        }
        queue.stream.in_flight.set(0);
        queue.stream.task.take();
        queue.stream.taken.set(false);
    }
}
